"""
A real OpenBao, which speaks Vault's protocol.

    with OpenBao() as bao:
        kv = bao.kv()
        kv.put("llm", key="sk-…")
        role_id, secret_id = bao.approle("ci", [bao.policy("reader", {kv.path("llm"): ["read"]})])
        ...
        assert bao.count("auth/approle/login") == 1

What a test asserts does not come from the code under test: servers are set up and asked over plain
HTTP, and what reached them is read from their audit log.

See: https://openbao.org/docs/configuration/
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.servers.authority import Authority
from tests.servers.install import OPENBAO, openbao_program
from tests.servers.processes import Child, Port
from tests.servers.vaultapi import Api, RefusedError

NEWEST, WITH_LDAP = OPENBAO


class Server(Api):
    """
    One process of `bao server`, with an audit log.

    Its ports are kept over `stop` and `start`; `kill`, `pause` and `resume` are a crash, a hang,
    and the end of it.

    Args:
        folder: For its configuration, its logs and its data.
        port: It listens on.
        configuration: Added to what is said here.
        version: Of OpenBao.
    """

    def __init__(
        self, folder: Path, port: int, configuration: Mapping[str, Any], version: str = NEWEST
    ) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self.mark = f"keybroker-{secrets.token_hex(8)}"
        self.folder = folder
        self.audit = folder / "audit.log"
        self._version = version
        self._configuration = configuration
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        return self._running().pid

    def _running(self) -> Child:
        assert self._child
        return self._child

    def start(self) -> None:
        """Start it and wait until it answers, whatever it says."""
        configuration = {
            "cluster_name": self.mark,
            "api_addr": self.url,
            # it cannot be enabled over the API
            "audit": [{"type": "file", "path": "log", "options": {"file_path": str(self.audit)}}],
            **self._configuration,
        }
        file = self.folder / "server.json"
        file.write_text(json.dumps(configuration))
        self._child = Child(
            [str(openbao_program(self._version)), "server", f"-config={file}"],
            log=self.folder / "server.log",
            environment={"PATH": os.defpath, "HOME": str(self.folder)},
        )
        self._child.wait_until(lambda: "initialized" in self.health(), 60)

    def initialize(self, **options: Any) -> dict[str, Any]:
        """Make it a new Vault; returns its keys and keeps its root token."""
        made = self.do("PUT", "sys/init", options)
        self.token = made["root_token"]
        return made

    def wait_until_ours(self, seconds: float = 30) -> None:
        """Wait until it is active or stands by, and check that it is this server that answers."""
        self._running().wait_until(lambda: "cluster_name" in self.health(), seconds)
        found = self.health()["cluster_name"]
        if found != self.mark:
            raise RefusedError(f"{self.url} is {found}, not {self.mark}")

    def alive(self) -> bool:
        """Whether its process runs."""
        return bool(self._child and self._child.alive())

    def stop(self) -> None:
        """End it in good order. Stopping twice is fine."""
        if self._child:
            self._child.stop()

    def kill(self) -> None:
        """End it at once. Killing twice is fine."""
        if self._child:
            self._child.kill()

    def pause(self) -> None:
        """Let it hang."""
        self._running().pause()

    def resume(self) -> None:
        """End a pause."""
        self._running().resume()

    def audit_entries(self) -> list[dict[str, Any]]:
        """
        What reached it and what it answered, in order.

        A request is there once it is answered, and has an `error` when it was refused. Tokens and
        secrets are hashed; paths are not. What a sealed server was asked is not there.
        """
        written, _, _ = self.audit.read_text().rpartition("\n")
        return [json.loads(line) for line in written.splitlines()]

    def count(self, path_prefix: str, operation: str | None = None, type: str = "request") -> int:  # noqa: A002, the log's name for it
        """
        Count entries of the audit log.

        Args:
            path_prefix: As in `auth/approle/login`. A server for many tests is asked by many: a
                mount of the test's own makes the count its own.
            operation: `read`, `update`, `create`, `delete` or `list`.
            type: `request` or `response`. A request over the rate limit has no `response`.
        """
        return sum(
            entry["type"] == type
            and entry["request"]["path"].startswith(path_prefix)
            and operation in (None, entry["request"]["operation"])
            for entry in self.audit_entries()
        )

    def log(self) -> str:
        """The end of what it printed, to explain a failure."""
        return self._running().tail(200)


def listener(port: int, **options: Any) -> dict[str, Any]:
    """How a server listens on a loopback port; without TLS unless there is a certificate."""
    plain = {} if "tls_cert_file" in options else {"tls_disable": True}
    return {"tcp": {"address": f"127.0.0.1:{port}", **plain, **options}}


class OpenBao(Server):
    """
    A server by itself, as a context: in memory, unsealed by a key that it gives away.

    What ended has lost everything; a `Cluster(1)` has not.

    Args:
        version: Of OpenBao; `WITH_LDAP` is the last that has this method.
        tls: Serve TLS, with a certificate of `authority`. Clients may have one, too.
        settings: Added to its configuration, as `max_lease_ttl`.

    Attributes:
        authority: Of a server with TLS.
    """

    def __init__(
        self,
        version: str = NEWEST,
        *,
        tls: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._wanted_version = version
        self._tls = tls
        self._settings = dict(settings or {})
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-bao-")
            folder = Path(stack.enter_context(temporary))
            port = stack.enter_context(Port()).number
            configuration = {
                "storage": {"inmem": {}},
                "disable_clustering": True,  # or it listens on another port
                "listener": listener(port, **self._certified(folder)),
                **self._settings,
            }
            super().__init__(folder, port, configuration, self._wanted_version)
            if self._tls:
                self.url = f"https://127.0.0.1:{port}"
                self.ca_file = self.authority.file
            stack.callback(self.stop)
            self.start()
            self._unseal_key = self.initialize(secret_shares=1, secret_threshold=1)["keys"][0]
            self.unseal()
            self._stack = stack.pop_all()
        return self

    def _certified(self, folder: Path) -> dict[str, str]:
        if not self._tls:
            return {}
        self.authority = Authority(folder)
        certificate = self.authority.server()
        return {"tls_cert_file": str(certificate.file), "tls_key_file": str(certificate.key)}

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def seal(self) -> None:
        """Answer 503 to everything from now on. What is stored stays."""
        self.do("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal it and wait until it is active."""
        self.do("PUT", "sys/unseal", {"key": self._unseal_key})
        self.wait_until_ours()
