"""
`bao agent` and `bao proxy`: log in by themselves, pass requests on, and render files.

See: https://openbao.org/docs/agent-and-proxy/
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.servers.install import openbao_program
from tests.servers.processes import Child, Port
from tests.servers.vault import NEWEST, listener
from tests.servers.vaultapi import Api


class Agent(Api):
    """
    An agent beside a server, as a context. It needs no token of whoever asks it.

    Args:
        server: Whom it asks.
        role_id: Of the AppRole it logs in with.
        secret_id: Of the same.
        mount: Where this method is enabled.
        templates: What is to be rendered, by the name that `rendered` takes.
        interval: How often secrets are read again that have no lease.
        proxy: Run `bao proxy` instead, which renders nothing.

    Attributes:
        url: Where it listens.
        socket: Where it listens, too.
    """

    def __init__(
        self,
        server: Api,
        role_id: str,
        secret_id: str,
        *,
        mount: str = "approle",
        templates: Mapping[str, str] | None = None,
        interval: str = "1s",
        proxy: bool = False,
    ) -> None:
        self._server = server
        self._login = {"role_id": role_id, "secret_id": secret_id}
        self._mount = mount
        self._templates = dict(templates or {})
        self._interval = interval
        self._command = "proxy" if proxy else "agent"
        self._stack = ExitStack()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._child
        return self._child.pid

    @property
    def log(self) -> str:
        """What it printed so far."""
        return (self.folder / "agent.log").read_text()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-agent-")
            self.folder = Path(stack.enter_context(temporary))
            self.socket = self.folder / "socket"
            self._port = stack.enter_context(Port()).number
            super().__init__(f"http://127.0.0.1:{self._port}")
            stack.callback(self.stop)
            self._child: Child | None = None
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _configuration(self) -> dict[str, Any]:
        login: dict[str, Any] = {"remove_secret_id_file_after_reading": False}
        for name, value in self._login.items():
            (self.folder / name).write_text(value)
            login[f"{name}_file_path"] = str(self.folder / name)
        ca_file = {"ca_cert": str(self._server.ca_file)} if self._server.ca_file else {}
        configuration: dict[str, Any] = {
            "vault": {"address": self._server.url, **ca_file},
            "auto_auth": {
                "method": [
                    {"type": "approle", "mount_path": f"auth/{self._mount}", "config": login}
                ]
            },
            "api_proxy": {"use_auto_auth_token": True},
            "cache": {},
            "listener": [
                listener(self._port),
                {
                    "unix": {
                        "address": str(self.socket),
                        "tls_disable": True,
                        "socket_mode": "0600",  # ignored without these two
                        "socket_user": str(os.getuid()),
                        "socket_group": str(os.getgid()),
                    }
                },
            ],
        }
        if self._templates:
            configuration["template_config"] = {"static_secret_render_interval": self._interval}
            configuration["template"] = [
                {"contents": text, "destination": str(self.folder / name), "perms": "0600"}
                for name, text in self._templates.items()
            ]
        return configuration

    def start(self) -> None:
        """Start it and wait until it has logged in and rendered everything."""
        file = self.folder / "agent.json"
        file.write_text(json.dumps(self._configuration()))
        self._child = Child(
            [str(openbao_program(NEWEST)), self._command, f"-config={file}"],
            log=self.folder / "agent.log",
            environment={"PATH": os.defpath, "HOME": str(self.folder)},
        )
        self._child.wait_until(self._ready, 30)

    def _ready(self) -> bool:
        """Whether its files are there, and it is somebody whom our server knows."""
        if not all((self.folder / name).exists() for name in self._templates):
            return False
        try:
            status, own = self.request("GET", "auth/token/lookup-self")
        except OSError:
            return False
        if status != 200:
            return False
        entity = own["data"]["entity_id"]  # the token's id and accessor an agent does not tell
        return self._server.request("GET", f"identity/entity/id/{entity}")[0] == 200

    def rendered(self, name: str) -> str:
        """What the file of a template holds."""
        return (self.folder / name).read_text()

    def stop(self) -> None:
        """End it. Stopping twice is fine."""
        if self._child:
            self._child.stop()

    def pause(self) -> None:
        """Let it hang."""
        assert self._child
        self._child.pause()

    def resume(self) -> None:
        """End a pause."""
        assert self._child
        self._child.resume()
