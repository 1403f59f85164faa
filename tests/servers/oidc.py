"""
A real OpenID provider: panva's oidc-provider. Machines get JWTs, people sign in on its pages.

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
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

from tests.servers.faults import Faults
from tests.servers.install import installed, oidc_provider_folder
from tests.servers.processes import Child, Port

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
LOOPBACK = ("http://127.0.0.1/callback", "http://localhost/callback")


class Registered(NamedTuple):
    """A client that the provider was told of; a public one has no secret."""

    id: str
    secret: str


class Oidc:
    """
    The provider, as a context. `stop` and `start` keep the port; the signing key is a new one, and
    all that was registered or granted is forgotten.

    Who signs in has any name, here `ada`: they are then `ada@example.com`, in the group `llm-users`
    and, if the name begins with `admin`, in `llm-admins`. a `Browser` does it.

    Args:
        seconds: How long its access and ID tokens live, where a client says nothing else.
        host: Where it listens.
        fronted: Put a proxy before it, which counts and breaks; only at 127.0.0.1.

    Attributes:
        issuer: Its address, below which it describes itself.
        client: The machine it knows.
        secret: Theirs.
        audience: What that one's tokens are for unless asked otherwise.
        public: A native client without a secret: a code with PKCE to any port of 127.0.0.1 or
            localhost, below `/callback`; a device code; refresh tokens that can be used once.
    """

    def __init__(
        self, seconds: int = 60, *, host: str = "127.0.0.1", fronted: bool = False
    ) -> None:
        self._seconds = seconds
        self._host = host
        self._fronted = fronted
        self._front: Faults | None = None
        self.client = "machine"
        self.secret = secrets.token_urlsafe(24)
        self.public = "keybroker"
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
            self.issuer = f"http://{self._host}:{self._port}"
            if self._fronted:
                self._front = stack.enter_context(Faults(self.issuer))
                self.issuer = self._front.url
            self._child: Child | None = None
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def front(self) -> Faults:
        """The proxy before it."""
        assert self._front is not None, "it has none"
        return self._front

    def start(self) -> None:
        """Start it and wait until it gives a token for a secret that nobody else knows."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "ISSUER": self.issuer,
            "HOST": self._host,
            "PORT": str(self._port),
            "MACHINE": self.client,
            "SECRET": self.secret,
            "PUBLIC": self.public,
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
        status, said = self.post("/token", form, {"authorization": f"Basic {who}"})
        if status != 200:
            raise OSError(f"no token: {status} {said}")
        token: str = said["access_token"]
        return token

    def register(self, *redirects: str, public: bool = False, **metadata: Any) -> Registered:
        """
        Have it know another client.

        Args:
            redirects: Its redirect addresses; none: what `self.public` has.
            public: It is one without a secret.
            metadata: Of OpenID's registration, beside `access_seconds`, `id_seconds`,
                `refresh_seconds`, `device_seconds` (how long each lives), `poll_seconds`
                (between two asks for a device code) and `gateway` (it gets refresh tokens though
                it asks for no consent).

        See: OpenID Connect Dynamic Client Registration 1.0, section 2.
        """
        asked = {
            "application_type": "web" if redirects else "native",
            "redirect_uris": redirects or LOOPBACK,
            "token_endpoint_auth_method": "none" if public else "client_secret_basic",
            "response_types": ["code"],
            "grant_types": ["authorization_code", "refresh_token", DEVICE],
            **metadata,
        }
        status, said = self.post("/reg", asked)
        if status != 201:
            raise OSError(f"not registered: {status} {said}")
        return Registered(said["client_id"], said.get("client_secret", ""))

    def post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send it a form, or JSON where it registers; return the status and what it said."""
        json_wanted = path == "/reg"
        kind = "application/json" if json_wanted else "application/x-www-form-urlencoded"
        text = json.dumps(body) if json_wanted else urlencode(body)
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        try:
            connection.request("POST", path, text, {"content-type": kind, **(headers or {})})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(data) if data else {}
