"""A Vault that says what a test wants: rows that no real server can be made to say on time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from keybroker.config import Profile
from keybroker.credential import Session
from keybroker.errors import KeybrokerError
from keybroker.sources.held import Held
from keybroker.vault import Vault, read_vault
from tests.contracts import check_silent, entry
from tests.servers.web import Handler, LoopbackServer

CANARY = "".join(
    ("can", "ary-")
)  # in every secret here; not in one piece, to be no line of a trace
TOKEN = f"hvs.{CANARY}token"
DENIED = {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}


@dataclass(frozen=True)
class Answer:
    """One answer; a body that is no text is sent as JSON."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any

    @property
    def token(self) -> str | None:
        """What it was made with."""
        return self.headers.get("x-vault-token")


class Script(LoopbackServer):
    """Answers each path in turn with what it was told; the last of them stays."""

    def __init__(self) -> None:
        super().__init__(_Script)
        self.asked: list[Asked] = []
        self._answers: dict[str, list[Answer]] = {}
        self.otherwise = Answer(404, {"errors": []})

    def says(self, path: str, *answers: Answer) -> None:
        """Have a path below /v1/ answered so from now on."""
        self._answers[f"/v1/{path}"] = list(answers)

    def answer(self, path: str) -> Answer:
        """Return what a path is answered with now."""
        answers = self._answers.get(path, [self.otherwise])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def paths(self) -> list[str]:
        """Return what was asked for, in order."""
        return [one.path.removeprefix("/v1/") for one in self.asked]


class _Script(Handler):
    server: Script

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        parts = urlsplit(self.path)
        raw = self.body()
        body = None
        with suppress(ValueError):
            body = json.loads(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query))
        self.server.asked.append(Asked(self.command, parts.path, query, headers, body))
        answer = self.server.answer(parts.path)
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        data = b"" if answer.status == 204 else text.encode()
        self.send_response_only(answer.status)  # with no Date but the test's
        for name, value in {"content-length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_GET  # noqa: N815


def granted(token: str = TOKEN, seconds: int = 3600, renewable: bool = True) -> Answer:
    """Answer a login or a renewal."""
    auth = {"client_token": token, "lease_duration": seconds, "renewable": renewable}
    return Answer(200, {"request_id": "r", "auth": auth, "data": None})


def looked(seconds: int = 3600, **more: Any) -> Answer:
    """Answer lookup-self."""
    data = {"ttl": seconds, "creation_ttl": 3600, "renewable": True, "accessor": "a1", **more}
    return Answer(200, {"request_id": "r", "data": data})


def refused(status: int, *errors: str) -> Answer:
    """Refuse as Vault does."""
    return Answer(status, {"errors": list(errors)})


def table(address: str, auth: Mapping[str, Any] | None = None, **more: Any) -> Vault:
    """Read a [vault] table."""
    from keybroker.document import Where

    auth = auth or {"method": "token", "token": {"env": "KB_TOKEN"}}
    return read_vault({"address": address, "auth": auth, **more}, ("vault",), Where({}, "test"))


def profile(address: str, path: str, auth: Mapping[str, Any] | None = None, **more: Any) -> Profile:
    """Read a profile whose source is a Vault."""
    auth = auth or {"method": "token", "token": {"env": "KB_TOKEN"}}
    source = {"type": "vault", "address": address, "path": path, "auth": auth, **more}
    return entry("http://127.0.0.1:9", source)


def held(vault: Vault, *sessions: Session) -> Held:
    """Hold sessions, as a worker that was handed them."""
    made = Held()
    for session in sessions:
        made.put(session)
    made.changed()
    assert all(one.key == vault.session for one in sessions)
    return made


def fails(kind: type[KeybrokerError], call: Callable[[], object]) -> KeybrokerError:
    """Return the error that a call ends with: of this class, and silent about any secret."""
    with pytest.raises(KeybrokerError) as caught:
        call()
    check_silent(caught.value, CANARY)
    assert type(caught.value) is kind
    return caught.value
