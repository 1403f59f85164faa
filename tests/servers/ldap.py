"""
A real LDAP directory with one user.

See: https://www.openldap.org/doc/admin25/slapdconfig.html
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.servers.processes import Child, Port
from tests.servers.vaultapi import Api

_CONFIG = """\
include /etc/ldap/schema/core.schema
pidfile {folder}/pid
database ldif
suffix "dc=test"
directory {folder}/data
"""

_ENTRIES = """\
dn: dc=test
objectClass: dcObject
objectClass: organization
dc: test
o: test

dn: cn={user},dc=test
objectClass: person
cn: {user}
sn: {user}
userPassword: {password}
"""


def _program(name: str) -> str:
    """Find one of OpenLDAP's programs; Debian keeps the server's out of a user's PATH."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not found:
        raise FileNotFoundError(f"{name} is not installed: run tests/setup.sh")
    return found


class Ldap:
    """
    The server, as a context. `stop` and `start` keep the port and what is stored.

    Attributes:
        user: The one it knows.
        password: Theirs.
    """

    def __init__(self, user: str = "llm-user") -> None:
        self.user = user
        self.password = secrets.token_urlsafe(12)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-ldap-")
            self._folder = Path(stack.enter_context(temporary))
            self._port = stack.enter_context(Port()).number
            self._config = self._folder / "slapd.conf"
            self._config.write_text(_CONFIG.format(folder=self._folder))
            (self._folder / "data").mkdir(mode=0o700)
            load = [_program("slapadd"), "-f", str(self._config)]
            entries = _ENTRIES.format(user=self.user, password=self.password)
            subprocess.run(load, input=entries, text=True, check=True, capture_output=True)
            self._child: Child | None = None
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"ldap://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it and wait until it lets its user in, whose password nobody else knows."""
        command = [_program("slapd"), "-f", str(self._config), "-h", self.url, "-d", "0"]
        environment = {"PATH": os.environ["PATH"]}
        log = self._folder / "slapd.log"
        self._child = Child(command, log=log, environment=environment)
        self._child.wait_until(lambda: self.logs_in(self.user, self.password), 30)

    def stop(self) -> None:
        """End it: clients are refused. Stopping twice is fine."""
        if self._child:
            self._child.stop()

    def logs_in(self, user: str, password: str) -> bool:
        """Whether it lets this user in."""
        who = ["-x", "-H", self.url, "-D", f"cn={user},dc=test", "-w", password]
        environment = {"PATH": os.environ["PATH"], "LDAPNOINIT": "1"}
        command = [_program("ldapwhoami"), *who]
        asked = subprocess.run(command, env=environment, capture_output=True, check=False)
        return asked.returncode == 0

    def enable(self, server: Api, policies: Sequence[str], **options: Any) -> str:
        """Let its user log in at a server that has this method; returns the path to log in at."""
        path = f"auth/{server.enable_auth('ldap')}"
        where = {"url": self.url, "userdn": "dc=test", "userattr": "cn"}
        config = {**where, "token_policies": list(policies), **options}
        server.do("POST", f"{path}/config", config)
        return f"{path}/login/{self.user}"
