"""Which gateway is it, and under which address does it answer Claude Code?

Asked with a key that nobody issued, and for a model that nobody has: nothing is spent, and no key
of anybody's goes to a host that was not chosen yet.

See: https://code.claude.com/docs/en/llm-gateway-protocol for what a gateway has to answer.
"""

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from keybroker.address import ANTHROPIC, OPTSCALE
from keybroker.config import origin
from keybroker.errors import SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources.http import Http, Reply

SECONDS = 8.0  # for all of it
FIRST_SECONDS = 5.0  # for the first answer: who has none by then is down
MODEL = "made-up-model"
NAMES = {
    "litellm": "LiteLLM",
    "bifrost": "Bifrost",
    "optscale": "OptScale AI",
    "openrouter": "OpenRouter",
    "new-api": "new-api or one-api",
    "kong": "Kong",
    "ollama": "Ollama",
    "ogx": "OGX",
    "vllm": "vLLM",
    "lmstudio": "LM Studio",
    "anthropic": "Anthropic",
    "unknown": "a gateway of a kind that keybroker does not know",
}
BELOW_ANTHROPIC = ("bifrost", "optscale")  # their root is for OpenAI's clients
LOCAL = ("ollama", "ogx", "vllm", "lmstudio")
_BIFROST = ("virtual_key_required", "virtual_key_not_found", "virtual_key_blocked")


@dataclass(slots=True)
class Seen:
    """What the gateway answered, by what was asked; None where there was no whole answer."""

    http: Http
    at: str
    replies: dict[str, Reply | None] = field(default_factory=dict)

    def get(self, path: str) -> Reply | None:
        """Ask for something that needs no key."""
        return self._ask(f"GET {path}", lambda: self._call("GET", path))

    def post(self, path: str, key: str, body: dict[str, Any]) -> Reply | None:
        """Ask as a client with that key."""
        headers = {
            "authorization": f"Bearer {key}",
            "x-api-key": key,
            "anthropic-version": "2023-06-01",
        }
        return self._ask(f"POST {path}", lambda: self._call("POST", path, headers, body))

    def _ask(self, name: str, call: Any) -> Reply | None:
        if name not in self.replies:
            try:
                self.replies[name] = call()
            except SourceInvalid:  # endless: it is there, and it is no API
                self.replies[name] = None
            except SourceUnavailable:
                if not any(self.replies.values()):
                    raise  # the first call of all
                self.replies[name] = None
        return self.replies[name]

    def _call(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> Reply:
        return self.http.call(method, path, headers=headers, body=body, redirect_is_reply=True)


def recognise(
    candidates: Sequence[str], root: str, ca: str | None = None, *, asked: bool = False
) -> dict[str, Any]:
    """
    Ask under which address a gateway answers Claude Code, and of which kind it is.

    Args:
        candidates: The addresses that it may be, all of one host, in the order to ask.
        root: What they have in common: below it is the API of OpenAI's clients.
        ca: A PEM file of authorities that are trusted beside the system's.
        asked: The address is meant as it is, even where it hands requests on.

    Returns:
        `kind`, `name`, `base_url`, `openai_base_url` (None where it has none) and
        `checks_keys` (None where that cannot be told).

    Raises:
        SourceUnavailable: Nobody is there, or they are too slow.
        SourceInvalid: Something else answers there.
    """
    at = origin(root)
    http = Http("gateway", at, ca=ca, seconds=FIRST_SECONDS, setting="the address")
    http.until = time.monotonic() + SECONDS
    seen = Seen(http, at)
    key = f"sk-{secrets.token_hex(24)}"  # of the usual shape, and nobody's
    try:
        answers = [(url, *_messages(seen, url, key)) for url in candidates]
        kind = _kind(seen, root)
        openai = _openai(seen, root, key)
        chosen = _choose(answers, kind, root, asked)
        if chosen is None:
            raise _nothing_answers(seen, answers, openai)
        url, status = chosen
        return {
            "kind": kind,
            "name": NAMES[kind],
            "base_url": url,
            "openai_base_url": openai,
            "checks_keys": _checks_keys(seen, status, kind, root, key),
        }
    finally:
        http.close()


def _path(url: str) -> str:
    return urlsplit(url).path


def _messages(seen: Seen, url: str, key: str) -> tuple[Reply | None, bool]:
    """Ask for a message; say whether the answer is one of an API for messages."""
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    reply = seen.post(f"{_path(url)}/v1/messages", key, body)
    return reply, reply is not None and _is_api(reply, "content")


def _is_api(reply: Reply, member: str) -> bool:
    """Tell an API that was asked for what it has from a page, a portal or a missing route."""
    value = reply.value
    if not isinstance(value, dict):
        return False
    if reply.status == 200:
        return member in value
    problem = value.get("error")
    said = problem if isinstance(problem, dict) else value if problem else None
    if said is None:
        return False
    if reply.status in (400, 401, 402, 403, 422, 429):
        return True
    if reply.status == 404:  # of the model, and not of the route
        return re.search(r"\bmodels?\b", str(said.get("message")), re.I) is not None
    return reply.status >= 500 and value.get("type") == "error"


def _is_anthropic(reply: Reply | None) -> bool:
    """Tell whether an answer is in the words of the Anthropic API."""
    value = reply.value if reply is not None else None
    return isinstance(value, dict) and value.get("type") in ("error", "message")


def _choose(
    answers: list[tuple[str, Reply | None, bool]], kind: str, root: str, asked: bool
) -> tuple[str, int] | None:
    """Return the address to use and the status of its answer."""
    alive = [(url, reply) for url, reply, good in answers if good and reply is not None]
    if kind == "litellm" and not asked:
        # what is below /anthropic and the like goes on without virtual keys' models and budgets
        alive = [one for one in alive if one[0] == root] or alive
    elif kind in BELOW_ANTHROPIC:
        alive.sort(key=lambda one: not one[0].endswith(ANTHROPIC))
    else:
        alive.sort(key=lambda one: not _is_anthropic(one[1]))  # stable: else as they were given
    return (alive[0][0], alive[0][1].status) if alive else None


def _kind(seen: Seen, root: str) -> str:
    """Return the kind: by its host, by what it has said so far, then by asking."""
    parts = urlsplit(root)
    host = parts.hostname or ""
    if host == "anthropic.com" or host.endswith(".anthropic.com"):
        return "anthropic"
    if host == "openrouter.ai" or host.endswith(".openrouter.ai"):
        return "openrouter"
    if OPTSCALE.search(parts.path):
        return "optscale"
    said = {one for reply in seen.replies.values() if reply for one in _telling(reply)}
    for kind in ("litellm", "bifrost", "new-api"):
        if kind in said:
            return kind
    asked = next(_by_asking(seen, parts.path), None)
    return asked or ("kong" if "kong" in said else "unknown")


def _telling(reply: Reply) -> Iterator[str]:
    """Yield the kinds that an answer points at."""
    names = {name.lower() for name in reply.headers}
    if any(name.startswith(("x-litellm-", "llm_provider-")) for name in names):
        yield "litellm"
    if names & {"x-oneapi-request-id", "x-new-api-version"}:
        yield "new-api"
    served = f"{reply.headers.get('server', '')} {reply.headers.get('via', '')}".lower()
    if "kong" in served or "x-kong-request-id" in names:
        yield "kong"
    value = reply.value
    if not isinstance(value, dict):
        return
    problem = value.get("error")
    error = problem if isinstance(problem, dict) else {}
    kinds = {str(one) for one in (value.get("type"), error.get("type"), error.get("code"))}
    if "token_not_found_in_db" in kinds or str(error.get("message")).startswith(
        "Authentication Error, "
    ):
        yield "litellm"
    if "is_bifrost_error" in value or kinds & set(_BIFROST):
        yield "bifrost"
    if kinds & {"new_api_error", "one_api_error"}:
        yield "new-api"


def _by_asking(seen: Seen, path: str) -> Iterator[str]:
    """Ask for what one kind alone has; each look is made only if those before showed nothing."""
    alive = seen.get(f"{path}/health/liveliness")
    if alive is not None and alive.status == 200 and str(alive.value).startswith("I'm alive"):
        yield "litellm"
    health = seen.get("/health")
    if health is not None and isinstance(health.value, dict) and "components" in health.value:
        yield "bifrost"
    status = _object(seen.get("/api/status"))
    if status.get("success") is True and isinstance(status.get("data"), dict):
        yield "new-api"
    models = _object(seen.get(f"{path}/v1/models")).get("data")
    owners = {
        str(one.get("owned_by"))
        for one in (models if isinstance(models, list) else [])
        if isinstance(one, dict)
    }
    if "vllm" in owners:
        yield "vllm"
    if "organization_owner" in owners or "data" in _object(seen.get("/api/v0/models")):
        yield "lmstudio"
    if "version" in _object(seen.get("/api/version")) and "models" in _object(
        seen.get("/api/tags")
    ):
        yield "ollama"
    if "version" in _object(seen.get("/v1/version")) and "status" in _object(
        seen.get("/v1/health")
    ):
        yield "ogx"


def _object(reply: Reply | None) -> dict[str, Any]:
    good = reply is not None and reply.status == 200 and isinstance(reply.value, dict)
    return reply.value if good and reply is not None else {}


def _openai(seen: Seen, root: str, key: str) -> str | None:
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    reply = seen.post(f"{_path(root)}/v1/chat/completions", key, body)
    return f"{root}/v1" if reply is not None and _is_api(reply, "choices") else None


def _checks_keys(seen: Seen, status: int, kind: str, root: str, key: str) -> bool | None:
    """Tell whether a key that nobody issued is refused; None where the answer does not say."""
    if status in (401, 403):
        return True
    if kind in ("anthropic", "openrouter", "optscale"):
        return True
    reply = seen.get(f"{_path(root)}/v1/models")  # without any key
    if reply is not None and reply.status in (401, 403):
        return True
    if status == 200 or (reply is not None and reply.status == 200 and kind in LOCAL):
        return False
    return None


def _nothing_answers(
    seen: Seen, answers: list[tuple[str, Reply | None, bool]], openai: str | None
) -> SourceError:
    """Say what was found in place of an API, and what to type."""
    host = seen.http.host
    replies = [reply for _, reply, _ in answers if reply is not None]
    if not replies:
        return SourceUnavailable(
            f"gateway: {host} does not answer in time", hint="try again, or ask who runs it"
        )
    statuses = ", ".join(
        f"{_path(url) or '/'} {'no answer' if reply is None else reply.status}"
        for url, reply, _ in answers
    )
    first = replies[0]
    if 300 <= first.status < 400:
        to = urlsplit(first.headers.get("location", ""))
        here = urlsplit(seen.at)
        if (to.scheme, to.hostname) == ("https", here.hostname) and here.scheme == "http":
            return SourceInvalid(
                f"gateway: {host} answers at https:// alone",
                hint=f"--base-url https://{here.hostname}",
            )
        return SourceInvalid(
            f"gateway: {host} answers {first.status}, a redirect, as sign-in pages do",
            hint="--base-url with the address of its API, as its documents have it",
        )
    if openai is not None:
        return SourceInvalid(
            f"gateway: {host} speaks OpenAI's API alone: /v1/messages is not there ({statuses})",
            hint="Claude Code needs a gateway that answers POST /v1/messages, such as LiteLLM",
        )
    if any(reply.status >= 500 for reply in replies):
        return SourceUnavailable(
            f"gateway: {host} answers {first.status}: it is there, and does not work now",
            hint="try again later, or ask who runs it",
        )
    what = "with a page" if any(reply.value is None for reply in replies) else "with errors"
    return SourceInvalid(
        f"gateway: {host} answers {what}, not like the Anthropic API ({statuses})",
        hint="--base-url with the address of its API, as its documents have it",
    )
