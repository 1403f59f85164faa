"""
A second opinion on AWS's services, by moto: neither signatures nor policies are checked.

Where it is not as ministack is, see `tests/test_servers.py`; what holds with both is asked with
`VersionStage="AWSCURRENT"`, and told apart by its code, not by its status.

See: https://docs.getmoto.org/en/latest/docs/server_mode.html
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from botocore.exceptions import BotoCoreError, ClientError

from tests.servers.aws import REGION, Keys, connect
from tests.servers.install import installed, moto_folder
from tests.servers.processes import Child, Port, StartError


class Moto:
    """
    The server, as a context.

    Attributes:
        url: Its address, for all services.
        account: Its number.
        keys: Some that it takes; it takes all.
    """

    def __init__(self) -> None:
        self.account = f"{secrets.randbelow(10**12):012d}"
        self.keys = Keys("test", "test")
        self._clients: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-moto-")
            self.folder = Path(stack.enter_context(temporary))
            port = stack.enter_context(Port()).number
            self.url = f"http://127.0.0.1:{port}"
            (self.folder / "none").touch()
            settings = {
                "PATH": os.defpath,
                "HOME": str(self.folder),
                "MOTO_ACCOUNT_ID": self.account,
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            program = str(installed(moto_folder()) / "bin" / "moto_server")
            command = [program, "-H", "127.0.0.1", "-p", str(port)]
            log = self.folder / "moto.log"
            child = Child(command, log=log, environment=settings)
            stack.enter_context(child)
            child.wait_until(self._is_ours, 60)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for client in self._clients.values():
            client.close()

    def _is_ours(self) -> bool:
        try:
            identity = self.client("sts").get_caller_identity()
        except (BotoCoreError, ClientError):
            return False
        if identity["Account"] != self.account:
            raise StartError(f"{self.url} is of {identity['Account']}, not {self.account}")
        return True

    def client(self, service: str) -> Any:
        """The client of a service."""
        if service not in self._clients:
            self._clients[service] = connect(service, self.url, self.keys)
        return self._clients[service]

    def environment(self) -> dict[str, str]:
        """What a client's program needs, and nothing of the files in a HOME."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
            "AWS_ACCESS_KEY_ID": self.keys.access_key,
            "AWS_SECRET_ACCESS_KEY": self.keys.secret_key,
        }
