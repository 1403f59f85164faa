"""
A real OpenID provider: panva's oidc-provider, which issues JWTs to a machine.

See: https://github.com/panva/node-oidc-provider/blob/main/docs/README.md
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from urllib.parse import urlencode

from tests.servers.install import installed, oidc_provider_folder
from tests.servers.processes import Child, Port


class Oidc:
    """
    The provider, as a context. `stop` and `start` keep the port; the signing key is a new one.

    Args:
        seconds: How long its tokens live.

    Attributes:
        issuer: Its address, below which it describes itself.
        client: The client it knows.
        secret: Theirs.
        audience: What tokens are for unless asked otherwise.
    """

    def __init__(self, seconds: int = 60) -> None:
        self._seconds = seconds
        self.client = "keybroker"
        self.secret = secrets.token_urlsafe(24)
        self.audience = "https://vault.example"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            packages = installed(oidc_provider_folder()) / "node_modules"
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-oidc-")
            self._folder = Path(stack.enter_context(temporary))
            # a module finds packages in a folder beside it
            (self._folder / "node_modules").symlink_to(packages)
            shutil.copy(Path(__file__).with_suffix(".mjs"), self._folder)
            self._port = stack.enter_context(Port()).number
            self.issuer = f"http://127.0.0.1:{self._port}"
            self._child: Child | None = None
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it and wait until it gives a token for a secret that nobody else knows."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "ISSUER": self.issuer,
            "PORT": str(self._port),
            "CLIENT": self.client,
            "SECRET": self.secret,
            "AUDIENCE": self.audience,
            "SECONDS": str(self._seconds),
        }
        command = [shutil.which("node") or "node", str(self._folder / "oidc.mjs")]
        log = self._folder / "oidc.log"
        self._child = Child(command, log=log, environment=environment)
        self._child.wait_until(self._answers, 30)

    def stop(self) -> None:
        """End it: clients are refused. Stopping twice is fine."""
        if self._child:
            self._child.stop()

    def _answers(self) -> bool:
        try:
            return bool(self.token())
        except ConnectionError:
            return False

    def token(self, audience: str | None = None) -> str:
        """
        Get an access token with the client's secret.

        Raises:
            OSError: It gave none.
        """
        form = {"grant_type": "client_credentials", "resource": audience or self.audience}
        who = base64.b64encode(f"{self.client}:{self.secret}".encode()).decode()
        headers = {
            "authorization": f"Basic {who}",
            "content-type": "application/x-www-form-urlencoded",
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("POST", "/token", urlencode(form), headers)
            answer = connection.getresponse()
            said = json.load(answer)
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"no token: {answer.status} {said}")
        token: str = said["access_token"]
        return token
