"""The data plane: does the gateway take this key?

A method counts only after it was seen to refuse a made-up key of the same shape. What names a
model, a budget, a policy or a missing right says nothing about the key: undecided.
"""

import re
import secrets
from collections.abc import Callable
from typing import Any

from keybroker.config import Profile
from keybroker.credential import Look, Secret, Verdict
from keybroker.errors import SourceError
from keybroker.sources.http import Http, Reply

# error types and messages by which gateways refuse the key itself
REFUSED_TYPES = frozenset(
    {
        "expired_key",
        "token_not_found_in_db",
        "authentication_error",
        "invalid_api_key",
        "auth_error",
    }
)
NOT_ABOUT_THE_KEY = re.compile(
    r"only proxy admin|not allowed|no api key|permission|role=|model|team|budget|enterprise", re.I
)
Method = Callable[[Secret], Verdict]


class Gateway:
    """Looks at a profile's base URL with a key."""

    def __init__(self, http: Http, mode: str, model: str, info: Method | None = None) -> None:
        self._http = http
        self._model = model
        methods: dict[str, Method] = {"models": self._models, "count_tokens": self._count_tokens}
        if info is not None:
            methods["info"] = info
        if mode == "message":
            methods = {"message": self._message}
        elif mode != "auto":
            methods = {name: method for name, method in methods.items() if name == mode}
        self._methods = methods
        self._tells_apart: dict[str, bool] = {}

    @classmethod
    def of(cls, profile: Profile, info: Method | None = None) -> "Gateway":
        """Return the gateway of a profile; `info` is its key API's own look."""
        http = Http(
            "gateway",
            profile.base_url,
            ca=profile.ca,
            headers=profile.headers,
            seconds=profile.source["timeout"].total_seconds(),
        )
        return cls(http, profile.verify, profile.verify_model, info)

    def verify(self, secret: Secret) -> Verdict:
        """Look once, on a connection of its own, by the first method that tells keys apart."""
        undecided: Verdict | None = None
        if not self._methods:
            return Verdict(Look.UNVERIFIED, "none", "as configured")
        self._http.fresh()
        for name, method in self._methods.items():
            if name not in self._tells_apart:
                seen = method(made_up(secret))
                if seen.look is Look.UNDECIDED:
                    if not _says(seen, "404"):  # a gateway may lack a route
                        undecided = undecided or seen
                    if self._http.is_late:
                        break
                    continue
                self._tells_apart[name] = seen.look is Look.REFUSED
            if self._tells_apart[name]:
                return method(secret)
        if undecided is not None:
            return undecided
        return Verdict(Look.UNVERIFIED, "none", "the gateway refuses no made-up key")

    def answers(self, secret: Secret) -> Verdict:
        """Ask only whether the gateway is there."""
        verdict = self._models(secret)
        if verdict.look is Look.UNDECIDED and not _says(verdict, "4.."):
            return verdict
        refused = _says(verdict, "401")
        why = "401: this gateway checks keys" if refused else "a placeholder is not checked"
        return Verdict(Look.UNVERIFIED, "answers", why)

    def close(self) -> None:
        self._http.close()

    def _models(self, secret: Secret) -> Verdict:
        return self._try("models", secret, "GET", "/v1/models", "data")

    def _count_tokens(self, secret: Secret) -> Verdict:
        body = {"model": self._model, "messages": [{"role": "user", "content": "hi"}]}
        path = "/v1/messages/count_tokens"
        return self._try("count_tokens", secret, "POST", path, "input_tokens", body)

    def _message(self, secret: Secret) -> Verdict:
        body = {
            "model": self._model,
            "max_tokens": 1,
            "messages": [{"role": "user", "content": "hi"}],
        }
        return self._try("message", secret, "POST", "/v1/messages", "content", body)

    def _try(
        self,
        name: str,
        secret: Secret,
        method: str,
        path: str,
        expected: str,
        body: dict[str, Any] | None = None,
    ) -> Verdict:
        headers = {  # as Claude Code sends what the helper printed
            "authorization": f"Bearer {secret.reveal()}",
            "x-api-key": secret.reveal(),
            "anthropic-version": "2023-06-01",
        }
        try:
            reply = self._http.call(method, path, headers=headers, body=body)
        except SourceError as error:
            reason = error.message.removeprefix("gateway: ")
            return Verdict(Look.UNDECIDED, name, reason)
        look, reason = classify(reply, expected)
        return Verdict(look, name, reason)


def classify(reply: Reply, expected: str) -> tuple[Look, str]:
    """
    Read an answer of the data plane.

    Args:
        reply: Its status and body.
        expected: The member that a real answer's JSON has.
    """
    status, value = reply.status, reply.value
    if status == 200:
        if isinstance(value, dict) and expected in value:
            return Look.ALIVE, "200"
        return Look.UNDECIDED, "200, but not what was asked for"
    problem = value.get("error") if isinstance(value, dict) else None
    if not isinstance(problem, dict):
        return Look.UNDECIDED, f"{status} without a reason"
    kind, message = str(problem.get("type")), str(problem.get("message"))
    known = kind if kind in REFUSED_TYPES else "error"
    if status == 401 and kind in ("expired_key", "token_not_found_in_db"):
        return Look.REFUSED, f"401 {kind}"
    if status == 401 and not NOT_ABOUT_THE_KEY.search(message):
        return Look.REFUSED, f"401 {known}"
    if status == 400 and (kind == "expired_key" or "Expired Key" in message):
        return Look.REFUSED, "400 expired_key"
    return Look.UNDECIDED, f"{status} {known}"


def _says(verdict: Verdict, status: str) -> bool:
    """Tell whether a reason begins with such a status; it may as well begin with an address."""
    return re.match(rf"{status} ", verdict.reason) is not None


def made_up(secret: Secret) -> Secret:
    """Return a key of the same shape that nobody issued."""
    text = secret.reveal()
    prefix = re.match(r"(?:[a-z]{1,4}[0-9]{0,2}-){0,3}", text)
    start = prefix[0] if prefix else ""
    length = max(32, len(text) - len(start))
    return Secret(start + secrets.token_hex((length + 1) // 2)[:length])
