"""People who sign in: each with a home, a login called `corp`, and a profile of its token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from keybroker import cache, signin
from keybroker.document import Where
from keybroker.login.flow import SigningIn
from keybroker.login.provider import BROWSER
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import SignIn
from keybroker.values import replace
from tests.resident import Resident, until
from tests.servers import browser
from tests.servers.browser import Browser
from tests.servers.faults import Entry
from tests.servers.oidc import Oidc

COMMAND = [sys.executable, "-c", "from keybroker.cli import main; main()"]
PROFILE = """\
[profiles.{name}]
base_url = "http://127.0.0.1:9"
verify = "none"
helper_ttl = "1s"
[profiles.{name}.source]
type = "login"
login = "corp"
"""


class Person:
    """
    Somebody at a machine of their own.

    Args:
        keys: Further keys of the login's table, as TOML has them.

    Attributes:
        here: Their home and daemon.
    """

    def __init__(self, here: Resident, provider: Oidc, client: str = "", **keys: str) -> None:
        self.here = here
        self.provider = provider
        self.client = client or provider.public
        self._began = len(provider.front.log)
        here.environment["BROWSER"] = browser.command()
        self.configure(**keys)

    def configure(self, *profiles: str, cache: str = "file", **keys: str) -> None:
        """Write the configuration."""
        table = {
            "issuer": json.dumps(self.provider.issuer),
            "client_id": json.dumps(self.client),
            "scopes": '["openid", "email", "offline_access"]',
            **keys,
        }
        login = "".join(f"{key} = {value}\n" for key, value in table.items())
        names = profiles or ("work",)
        self.here.configure(
            f'default = "{names[0]}"\n[cache]\nkey = "{cache}"\n[logins.corp]\ntype = "oidc"\n'
            f"{login}{''.join(PROFILE.format(name=name) for name in names)}"
        )

    @property
    def sign_in(self) -> SignIn:
        """The login's table."""
        import tomllib

        raw = tomllib.loads(self.here.file.read_text())["logins"]["corp"]
        return signin.read_login("corp", raw, Where({}, "test"))

    @property
    def store(self) -> Store:
        """Where sign-ins are kept, opened with the key of a file."""
        found = cache.find_wrap_key("file", self.here.state, self.here.environment)
        return Store(self.here.state, found.key)

    @property
    def held(self) -> Tokens:
        """What the sign-in gave."""
        found = self.store.load(self.sign_in)
        assert found is not None
        return found

    def arrive(self, user: str = "ada", age: float = 0) -> Tokens:
        """Sign in without a command; `age`: so many seconds ago."""
        with closing(SigningIn(self.sign_in, self.here.environment, [BROWSER])) as begun:
            Browser(user).open(begun.begin()["url"])
            tokens = begun.step(None, 5.0)
        assert tokens is not None
        self.keep(tokens, age)
        return tokens

    def keep(self, tokens: Tokens, age: float = 0) -> None:
        """Put what a sign-in gave where it belongs, made older."""
        self.store.save(aged(tokens, timedelta(seconds=age)))

    def asked(self, path: str = "/token") -> list[Entry]:
        """What reached the provider since this person is here."""
        log = self.provider.front.log[self._began :]
        return [one for one in log if one.path == path]

    def forget_what_was_asked(self) -> None:
        """Count from now on."""
        self._began = len(self.provider.front.log)

    def cli(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command; return its status, stdout and stderr."""
        return self.here.cli(*arguments)

    @contextmanager
    def typing(
        self, *arguments: str, command: Sequence[str] = (), **streams: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """Run a command that waits for something; it is ended with the test."""
        pipe = subprocess.PIPE
        wanted = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **streams}
        process = subprocess.Popen(
            [*(command or COMMAND), *arguments],
            env=self.here.environment,
            text=True,
            start_new_session=True,
            **wanted,
        )
        with process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def aged(tokens: Tokens, age: timedelta = timedelta(hours=1)) -> Tokens:
    """Return what was given, as it would be later."""
    standing = tokens.standing
    times = {
        name: getattr(standing, name) - age
        for name in ("since", "refreshed_at", "access_ends", "ends_at")
        if getattr(standing, name) is not None
    }
    return replace(tokens, standing=replace(standing, **times))


def address(process: subprocess.Popen[str]) -> str:
    """Read what a command says until there is an address; return that."""
    assert process.stderr is not None
    for line in process.stderr:
        for word in line.split():
            if word.startswith("http"):
                return word
    raise AssertionError("it ended without an address")


def children(pid: int) -> list[int]:
    """Return the processes that one has started."""
    with suppress(OSError):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(one) for one in found.split()]
    return []


def gone(pids: Sequence[int]) -> None:
    """Wait until processes have ended."""
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
