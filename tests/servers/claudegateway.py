"""
Anthropic's own gateway, which is a command of the client, with people who sign in.

    test -> claude gateway -> upstream
              |        |
         PostgreSQL  OpenID provider

It refuses provider and upstream on loopback; they are at this machine's own address.

See: https://code.claude.com/docs/en/claude-apps-gateway, and `GET /protocol` of the gateway itself.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from tests.servers.claude import NEWEST
from tests.servers.install import claude_program
from tests.servers.oidc import Oidc
from tests.servers.postgres import Postgres, create
from tests.servers.processes import Child, Port
from tests.servers.upstream import Upstream

UPSTREAM_KEY = "sk-upstream-of-the-tests"


def own_address() -> str:
    """Return an address of this machine that is not loopback; what goes there stays here."""
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True)
    return next(one for one in done.stdout.split() if "." in one)


class ClaudeGateway:
    """
    The gateway, as a context. `stop` and `start` keep its port and all that it knows.

    Args:
        seconds: How long a session lives.

    Attributes:
        url: Where Claude Code is pointed at.
        upstream: What answers behind it.
    """

    def __init__(self, seconds: float = 3600) -> None:
        self._seconds = seconds
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-cgw-")
            self._work = Path(stack.enter_context(temporary))
            self._database = stack.enter_context(Postgres(create(self._work)))
            self._database.query("create database gateway", database="postgres")
            address = own_address()
            self.upstream = stack.enter_context(Upstream(host=address))
            oidc = stack.enter_context(Oidc(3600, host=address))
            self._port = stack.enter_context(Port()).number
            self.url = f"http://127.0.0.1:{self._port}"
            client = oidc.register(f"{self.url}/oauth/callback", gateway=True)
            config = {
                "listen": {"host": "127.0.0.1", "port": self._port, "public_url": self.url},
                "oidc": {
                    "issuer": oidc.issuer,
                    "client_id": client.id,
                    "client_secret": client.secret,
                },
                "session": {
                    "ttl_hours": self._seconds / 3600,
                    "jwt_secret": secrets.token_hex(24),
                },
                "store": {"postgres_url": self._database.url.replace("/litellm", "/gateway")},
                "upstreams": [
                    {
                        "provider": "anthropic",
                        "auth": {"api_key": UPSTREAM_KEY},
                        "base_url": self.upstream.url,
                    }
                ],
            }
            (self._work / "gateway.yaml").write_text(json.dumps(config))  # JSON is YAML
            self._child: Child | None = None
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._child = Child(
            [str(claude_program(NEWEST)), "gateway", "--config", str(self._work / "gateway.yaml")],
            log=self._work / "gateway.log",
            environment={"PATH": os.environ["PATH"], "HOME": str(self._work)},
        )
        self._child.wait_until(self._ready, 60)

    def stop(self) -> None:
        """End it: clients are refused. Stopping twice is fine."""
        if self._child:
            self._child.stop()

    def _ready(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/readyz")[0] == 200
        return False

    def ask(self, method: str, path: str, key: str = "", body: Any = None) -> tuple[int, bytes]:
        """Ask it as a client does that has a key."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def log(self) -> str:
        """The end of what it printed, to explain a failure."""
        assert self._child is not None
        return self._child.tail(100)
