"""One Vault or OpenBao: hvac knows the calls, `Http` makes them, this says what came of them.

hvac by itself would take a token from the environment, send it along with any redirect, drop
Retry-After, and quote answers in its errors. Here it is given an adapter that does none of that.

See: https://developer.hashicorp.com/vault/api-docs
"""

import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import urlsplit

import hvac  # type: ignore[import-untyped]

from keybroker.credential import Secret
from keybroker.errors import SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources.http import Http, Reply
from keybroker.vault import Vault, host_of

Call = Callable[[Any], Any]  # given hvac's client, makes one call
THROTTLED = timedelta(seconds=5)  # where the server does not say for how long
PORTS = {"http": 80, "https": 443}
MOST_HOPS = 3
LEAST_SECONDS = 1.0  # for one of several nodes
LONGEST_SECONDS = 3650 * 86_400.0
CLEARLY_LESS = 0.9  # of what a renewal asked for: there is a maximum behind it
# A 500 that stays one however often it is asked.
FINAL_500 = re.compile(r"past the max ttl|failed to find entry for connection")
UPGRADING = re.compile(r"will resume service shortly")  # a KV 1 to KV 2, or one just mounted
NO_LEADER = re.compile(r"local node not active|cluster node not found")
# What a status alone says, whoever asked for what: (in words, hint, another node may do better).
STATES = {
    412: ("has not caught up with its leader", None, True),
    429: ("asks to wait", None, False),
    472: ("is a standby for disaster recovery", "name the active one in address or nodes", True),
    473: ("is a standby that answers nothing", "name the active one in address or nodes", True),
    501: ("is not initialised", "it is asked again by itself", True),
}


class Server:
    """
    Asks a Vault, or another node of its cluster when the first cannot answer.

    Attributes:
        host: What messages call it.
    """

    def __init__(self, vault: Vault, seconds: float) -> None:
        self.host = host_of(vault.address)
        self._namespace = vault.namespace
        self._seconds = seconds
        certificate = None
        if vault.client_cert is not None and vault.client_key is not None:
            certificate = (vault.client_cert, vault.client_key)
        self._nodes = [
            Http(
                "vault",
                address,
                host=f"{host_of(address)}:",
                ca=vault.ca,
                certificate=certificate,
                seconds=seconds,
                setting="address in [vault]",
            )
            for address in dict.fromkeys((vault.address, *vault.nodes))
        ]
        self._until = 0.0
        self._token: Secret | None = None
        self._makes = False
        self._client = hvac.Client(
            url=vault.address, token="", adapter=lambda **_: _Adapter(self._send)
        )
        self.begin()

    def begin(self) -> None:
        """Let the calls that follow take no longer than one, together."""
        self._until = time.monotonic() + self._seconds

    def ask(self, call: Call, token: Secret | None = None, *, makes: bool = False) -> Reply:
        """
        Make one call.

        Args:
            call: Is given hvac's client.
            token: What it is made with.
            makes: It leaves something behind, so it is never sent a second time.

        Returns:
            What Vault itself answered: done (2xx), or refused (400, 401, 403, 404, 405, and a
            500 that is final), which is for the caller to put into words.

        Raises:
            SourceUnavailable: No answer, not Vault's, or one that may be another next time;
                `unknown` when something may have been made all the same.
            SourceInvalid: A redirect to an address that is not configured.
            ConfigError: A file of the `[vault]` table cannot be used.
        """
        self._token, self._makes = token, makes
        try:
            reply: Reply = call(self._client)
        except SourceError as error:
            error.unknown = error.unknown and makes
            raise
        finally:
            self._token = None
        return reply

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    def _send(self, method: str, path: str, query: Mapping[str, Any] | None, body: Any) -> Reply:
        """Send a request to the first node that can take it."""
        left = list(self._nodes)
        while True:
            node = left.pop(0)
            node.until = self._until
            if left and not self._makes:  # time for the others, should this one be silent
                rest = self._until - time.monotonic()
                share = max(LEAST_SECONDS, rest / (len(left) + 1))
                node.until = min(self._until, time.monotonic() + share)
            try:
                reply, node = self._follow(node, method, path, query, body)
            except _Elsewhere as found:
                if left and time.monotonic() < self._until:
                    continue
                raise found.error from None
            self._nodes.remove(node)
            self._nodes.insert(0, node)  # the next call goes where this one was answered
            return reply

    def _follow(
        self,
        node: Http,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Any,
    ) -> tuple[Reply, Http]:
        """
        Ask a node, and the one that it redirects to, if that is configured.

        Returns:
            The answer, and who gave it.

        Raises:
            _Elsewhere: Another node may be able to answer.
            SourceError: None will.
        """
        headers = {"x-vault-request": "true"}
        if self._token is not None:
            headers["x-vault-token"] = self._token.reveal()
        if self._namespace is not None:
            headers["x-vault-namespace"] = self._namespace
        until = node.until
        for _ in range(MOST_HOPS):
            node.until = until
            try:
                reply = node.call(
                    method,
                    path,
                    query=query,
                    headers=headers,
                    body=body,
                    redirect_is_reply=True,
                )
            except SourceUnavailable as error:
                node.close()  # the files of its certificates may have been renewed
                if error.unknown and self._makes:
                    raise
                raise _Elsewhere(error) from None
            if not 300 <= reply.status < 400:
                self._judge(node, reply)
                return reply, node
            node = self._target(node, method, reply)
        raise _Elsewhere(SourceUnavailable(f"vault: {node.host} redirects without end"))

    def _target(self, node: Http, method: str, reply: Reply) -> Http:
        """Return the node that a redirect leads to: the token goes nowhere else."""
        kept = reply.status in (307, 308) or (method == "GET" and reply.status in (301, 302))
        leads_to = _origin(reply.headers.get("location", ""))
        for other in self._nodes:
            if kept and leads_to is not None and leads_to == _origin(other.url):
                return other
        raise SourceInvalid(
            f"vault: {node.host} redirects to an address that is not configured ({reply.status})",
            hint="if that is its cluster's leader, add its address to nodes",
        )

    def _judge(self, node: Http, reply: Reply) -> None:
        """Raise what an answer means, whoever asked for what; return if the caller knows best."""
        status, text = reply.status, said(reply)
        if status == 400 and UPGRADING.search(text):
            raise SourceUnavailable(f"vault: {node.host} is upgrading what is mounted there")
        if status == 204 or (is_own(reply) and status in (200, 202, 400, 401, 403, 404, 405)):
            return
        if is_own(reply) and status == 500 and FINAL_500.search(text):
            return
        who = f"vault: {node.host}"
        if status == 429 or (status in STATES and is_own(reply)):
            words, hint, elsewhere = STATES[status]
            wish = reply.retry_after or (THROTTLED if status == 429 else None)
            error = SourceUnavailable(f"{who} {words} ({status})", hint=hint, retry_after=wish)
        elif not is_own(reply) and status < 500:
            raise SourceUnavailable(
                f"{who} answers {status}, but not as Vault does",
                hint=_not_vault(node.url, status),
                unknown=status < 300,
            )
        elif status == 503 and "sealed" in text:
            error, elsewhere = SourceUnavailable(f"{who} is sealed", hint=UNSEAL), True
        elif NO_LEADER.search(text):
            error, elsewhere = SourceUnavailable(f"{who} has no leader ({status})"), True
        else:  # its own word says that it is done with the call; one of a proxy does not
            error = SourceUnavailable(
                f"{who} failed ({status})",
                retry_after=reply.retry_after,
                unknown=True,
                over=is_own(reply),
            )
            elsewhere = not self._makes
        if elsewhere:
            raise _Elsewhere(error)
        raise error


UNSEAL = "unseal it; it is asked again by itself"


def said(reply: Reply) -> str:
    """Return the errors and warnings of an answer, for comparison only: they may hold secrets."""
    value = reply.value if isinstance(reply.value, dict) else {}
    found = [
        one
        for name in ("errors", "warnings")
        if isinstance(value.get(name), list)
        for one in value[name]
        if isinstance(one, str)
    ]
    return " ".join(" ".join(found).lower().split())


def part(reply: Reply, name: str) -> Mapping[str, Any]:
    """Return a table of an answer; an empty one where there is none."""
    found = reply.value.get(name) if isinstance(reply.value, dict) else None
    return found if isinstance(found, dict) else {}


def seconds(value: object) -> timedelta | None:
    """Read a length of time as Vault gives it; None for 0, which says that there is no end."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return None
    return timedelta(seconds=min(value, LONGEST_SECONDS))


def renewed(reply: Reply, asked: timedelta) -> tuple[timedelta | None, bool]:
    """
    Read what the renewal of a token gave.

    Args:
        asked: What it was asked for.

    Returns:
        How long it lives from now on, None where it goes on as it is: not renewable, past its
        maximum, or not allowed; and whether another renewal will give more.
    """
    auth = part(reply, "auth")
    got = seconds(auth.get("lease_duration"))
    if reply.status != 200 or got is None:
        return None, False
    return got, auth.get("renewable") is True and got >= CLEARLY_LESS * asked


def is_own(reply: Reply) -> bool:
    """Tell Vault's own answer from that of a portal or a proxy in between."""
    return isinstance(reply.value, dict) and not reply.value.keys().isdisjoint(
        ("errors", "request_id", "data", "auth")
    )


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    """Return what has to be the same for two addresses to lead to one server."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:  # no address
        return None


def _not_vault(url: str, status: int) -> str:
    if status == 400 and url.startswith("http://"):
        return "does its address begin with https://?"
    return "is this the address of a Vault, and is no login page in between?"


class _Elsewhere(Exception):  # noqa: N818, it says what to do next
    """This node cannot answer; another may."""

    def __init__(self, error: SourceUnavailable) -> None:
        super().__init__()
        self.error = error


class _Adapter(hvac.adapters.Adapter):  # type: ignore[misc]
    """
    Hands hvac's calls to ours and their replies back, whatever they are.

    It is given no token, no session of `requests` and nothing of the environment.
    """

    def __init__(self, send: Callable[[str, str, Mapping[str, Any] | None, Any], Reply]) -> None:
        self._sends = send

    def request(self, method: str, url: str, headers: object = None, **given: Any) -> Reply:
        """Send what hvac wants sent, but for its headers and what was left empty."""
        del headers
        body = given.get("json")
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if value is not None}
        return self._sends(method.upper(), url, given.get("params"), body)

    def get_login_token(self, response: object) -> NoReturn:
        """Never called: no login is told to keep its token in here."""
        raise AssertionError("a token is never kept in here")
