"""
A real LiteLLM proxy over a real PostgreSQL, with a stand-in for the API behind it.

    test -> recorder -> LiteLLM -> upstream
                           |
                       PostgreSQL <- key_rows(), deleted_key_rows()

What a test asserts does not come from the code under test: requests are recorded in front of the
proxy, keys are read from its database.

See: https://docs.litellm.ai/docs/proxy/virtual_keys
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Self

from tests.servers.install import installed, litellm_folder, prisma_environment
from tests.servers.oidc import Oidc
from tests.servers.postgres import Postgres, unpack
from tests.servers.processes import Child, Port, wait_until
from tests.servers.upstream import MODEL, Upstream
from tests.servers.web import Handler, LoopbackServer

UPSTREAM_KEY = "sk-upstream-of-the-tests"
# One whose answers are too short for Claude Code, and one that gives none in words.
OF_OPENAI = ("gpt-4o", "text-embedding-3-small")


@dataclass(frozen=True, slots=True)
class Request:
    """One request that reached the proxy. `status` and `finished` are set as it is answered."""

    started: datetime
    method: str
    path: str
    key_sha256: str | None  # of the key presented; LiteLLM's name for that key
    status: int | None = None
    finished: datetime | None = None  # the proxy's answer was complete; the client may be gone
    session: str = ""  # whom a test's client says that it is: its header `x-session`


class LiteLLM:
    """
    The proxy, as a context.

    Args:
        general_settings: Added to the proxy's settings of this name.
        sso: Where people sign in; without a licence they may be five.
    """

    def __init__(
        self,
        general_settings: Mapping[str, Any] | None = None,
        *,
        sso: Oidc | None = None,
    ) -> None:
        self.master_key = f"sk-{secrets.token_urlsafe(24)}"
        self._general_settings = dict(general_settings or {})
        self._sso = sso
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = installed(litellm_folder())
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-litellm-")
            work = Path(stack.enter_context(temporary))
            data = unpack(folder / "database.tar", work)
            self._database = stack.enter_context(Postgres(data))
            self.upstream = stack.enter_context(Upstream())
            port = stack.enter_context(Port()).number
            self._recorder = stack.enter_context(_Recorder(port))
            self.url = self._recorder.url
            self._port = port
            self._child = stack.enter_context(self._start(folder, work))
            self._child.wait_until(self._ready, 180)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, folder: Path, work: Path) -> Child:
        config = work / "config.yaml"
        config.write_text(json.dumps(self._config()))  # JSON is YAML
        program = folder / "venv" / "bin" / "litellm"
        node = Path(shutil.which("node") or "node").parent
        environment = {
            **prisma_environment(folder),
            "PATH": f"{program.parent}:{node}:{os.defpath}",
            "HOME": str(work),
            "DATABASE_URL": self._database.url,
            "DISABLE_SCHEMA_UPDATE": "true",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_SALT_KEY": "sk-salt-of-the-tests",
            "PROXY_BASE_URL": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
            "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody: nothing may leave this machine
            **self._sign_in(),
        }
        words = ["--config", str(config), "--host", "127.0.0.1", "--port", str(self._port)]
        return Child([str(program), *words], log=work / "litellm.log", environment=environment)

    def _sign_in(self) -> dict[str, str]:
        """The variables that say where people sign in."""
        if self._sso is None:
            return {}
        client = self._sso.register(f"{self.url}/sso/callback")
        return {
            "GENERIC_CLIENT_ID": client.id,
            "GENERIC_CLIENT_SECRET": client.secret,
            "GENERIC_AUTHORIZATION_ENDPOINT": f"{self._sso.issuer}/auth",
            "GENERIC_TOKEN_ENDPOINT": f"{self._sso.issuer}/token",
            "GENERIC_USERINFO_ENDPOINT": f"{self._sso.issuer}/me",
            "GENERIC_SCOPE": "openid email profile",
        }

    def _config(self) -> dict[str, Any]:
        behind = {"api_base": self.upstream.url, "api_key": UPSTREAM_KEY}
        return {
            "model_list": [
                {"model_name": name, "litellm_params": {"model": f"anthropic/{name}", **behind}}
                for name in (MODEL, "claude-*")
            ]
            + [
                {"model_name": name, "litellm_params": {"model": f"openai/{name}", **behind}}
                for name in OF_OPENAI
            ],
            "general_settings": {"master_key": self.master_key, **self._general_settings},
            "litellm_settings": {
                "telemetry": False,
                "default_internal_user_params": {"user_role": "internal_user"},
            },
        }

    def _ready(self) -> bool:
        """
        Whether our proxy answers from our database.

        Nobody else knows the master key. 404 is what the proxy says of a key its database does
        not have.
        """
        with suppress(OSError, http.client.HTTPException):
            status, _ = self._ask("GET", f"/key/info?key={hashlib.sha256().hexdigest()}")
            if status == 404:
                wrong, _ = self._ask("GET", "/key/list", key="sk-not-the-master-key")
                return wrong == 401
        return False

    def _ask(
        self, method: str, path: str, key: str | None = None, body: str | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            headers = {"authorization": f"Bearer {key or self.master_key}"}
            if body is not None:
                headers["content-type"] = "application/json"
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def key_rows(self) -> list[dict[str, Any]]:
        """The keys that exist, oldest first, as the database has them; times are aware UTC."""
        return self._rows("LiteLLM_VerificationToken", "created_at")

    def deleted_key_rows(self) -> list[dict[str, Any]]:
        """What the proxy remembers of deleted keys, in the order of deletion."""
        return self._rows("LiteLLM_DeletedVerificationToken", "deleted_at")

    def _rows(self, table: str, order: str) -> list[dict[str, Any]]:
        sql = f"""select coalesce(json_agg(row order by {order}), '[]') from "{table}" row"""
        return [_with_times(row) for row in json.loads(self._database.query(sql))]

    def request_log(self) -> list[Request]:
        """Every request that reached the proxy through `url`, in order of arrival."""
        return self._recorder.requests()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Be without database for a while; it is back on leaving."""
        self.stop_database()
        try:
            yield
        finally:
            self.start_database()

    def stop_database(self) -> None:
        """Start an outage of the database."""
        self._database.stop()

    def start_database(self) -> None:
        """End the outage; returns when the proxy can read the database again."""
        self._database.start()
        if not wait_until(self._ready, 60):
            raise TimeoutError(f"LiteLLM did not find its database again\n{self._child.tail()}")

    def delete_key(self, token: str) -> None:
        """Delete a key as an administrator does; it is refused from now on."""
        self.administer("/key/delete", {"keys": [token]})

    def forget_key(self, token: str) -> None:
        """Have the proxy read a key from its database again, of which it keeps those in use."""
        self.administer("/key/update", {"key": token})

    def administer(self, path: str, body: dict[str, Any]) -> None:
        """
        Do what an administrator may.

        Raises:
            OSError: The proxy would not.
        """
        status, answer = self._ask("POST", path, body=json.dumps(body))
        if status != 200:
            raise OSError(f"{path}: {status} {answer.decode(errors='replace')}")

    def log(self) -> str:
        """The end of what the proxy printed, to explain a failure."""
        return self._child.tail(200)


def _with_times(row: dict[str, Any]) -> dict[str, Any]:
    times = {name for name in row if name == "expires" or name.endswith("_at")}
    return {
        name: datetime.fromisoformat(value).replace(tzinfo=UTC)
        if name in times and value
        else value
        for name, value in row.items()
    }


class _Recorder(LoopbackServer):
    """Passes requests on to the proxy and remembers them."""

    def __init__(self, port: int) -> None:
        super().__init__(_Pass)
        self.behind = port
        self._requests: list[Request] = []
        self._requests_guard = Lock()

    def requests(self) -> list[Request]:
        with self._requests_guard:
            return list(self._requests)

    def arrived(self, request: Request) -> int:
        with self._requests_guard:
            self._requests.append(request)
            return len(self._requests) - 1

    def answered(self, number: int, status: int) -> None:
        with self._requests_guard:
            self._requests[number] = replace(
                self._requests[number], status=status, finished=datetime.now(UTC)
            )


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class _Pass(Handler):
    server: _Recorder

    def do_GET(self) -> None:  # noqa: N802, the standard library's names
        body = self.body()
        who = self.headers.get("x-session", "")
        request = Request(datetime.now(UTC), self.command, self.path, self._key_sha256())
        number = self.server.arrived(replace(request, session=who))
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=120)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
            behind.request(self.command, self.path, body=body or None, headers=headers)
            self._answer(number, behind.getresponse())
        except (OSError, http.client.HTTPException):
            self.server.answered(number, 502)
            self.close_connection = True
        finally:
            behind.close()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def _key_sha256(self) -> str | None:
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ").strip()
        key = bearer or self.headers.get("x-api-key")
        return hashlib.sha256(key.encode()).hexdigest() if key else None

    def _answer(self, number: int, answer: http.client.HTTPResponse) -> None:
        """Pass the answer on as it comes. It is recorded even when the client is gone."""
        streamed = answer.length is None and self.command != "HEAD" and answer.status >= 200
        first = b"" if streamed else answer.read()
        if not streamed:
            self.server.answered(number, answer.status)
        head = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        head += [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
        if streamed:
            head.append("transfer-encoding: chunked")
        elif answer.status not in (204, 304):
            head.append(f"content-length: {answer.getheader('content-length', len(first))}")
        self._write("\r\n".join([*head, "", ""]).encode("latin-1") + first)
        while streamed and (part := answer.read1(65536)):
            self._write(b"%x\r\n%s\r\n" % (len(part), part))
        if streamed:
            self.server.answered(number, answer.status)
            self._write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True
