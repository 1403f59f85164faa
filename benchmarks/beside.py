"""keybroker's daemon beside `bao agent`: they follow the same secrets of one OpenBao."""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import UnmeasurableError
from benchmarks.stage import Home, ask, daemon
from keybroker.devgateway import DevGateway
from tests.servers.agent import Agent
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Kv

PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 0.01  # between two looks at what a reader has
FIRST = """\
default = "{default}"
[cache]
key = "file"
"""
VAULT = """\
[vault]
address = "{address}"
[vault.auth]
method = "approle"
role_id = "{role_id}"
secret_id = {{ file = "{folder}/secret-id" }}
"""
FOLLOWED = """\
[profiles.{name}]
base_url = "{url}"
[profiles.{name}.source]
type = "vault"
path = "{path}"
poll = "{interval}"
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """
    Whoever rotates: keys are minted at a gateway and put into a KV 2.

    Attributes:
        kept: The key of each secret now.
    """

    bao: OpenBao
    kv: Kv
    gateway: DevGateway
    kept: dict[str, str] = field(default_factory=dict)

    def rotate(self, name: str) -> str:
        """Put a new key into a secret; return the one before, which stays alive."""
        before = self.kept.get(name, "")
        self.kept[name] = str(self._call("/key/generate", {"duration": "1h"})["key"])
        self.kv.put(name, key=self.kept[name])
        return before

    def end(self, key: str) -> None:
        """Have the gateway refuse a key from now on."""
        self._call("/key/delete", {"keys": [key]})

    def accepts(self, key: str) -> bool:
        """Say whether the gateway takes a key."""
        try:
            self._call("/v1/models", None, key)
        except urllib.error.HTTPError as error:
            with error:
                return error.code != 401
        return True

    def role(self, name: str) -> tuple[str, str]:
        """Make a role that may read every secret; return its role_id and a secret_id."""
        policy = self.bao.policy(name, {self.kv.path("*"): ["read"]})
        return self.bao.approle(name, [policy])

    def requests(self, role: str) -> int:
        """Return how many requests the server's log has of a role, logins aside."""
        return sum(
            one["type"] == "request"
            and one.get("auth", {}).get("metadata", {}).get("role_name") == role
            for one in self.bao.audit_entries()
        )

    def _call(self, path: str, body: Mapping[str, Any] | None, key: str = "") -> dict[str, Any]:
        bearer = {"authorization": f"Bearer {key or self.gateway.master_key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.gateway.url}{path}", data, bearer)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=PATIENCE_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def desk(names: Sequence[str]) -> Iterator[Desk]:
    """Run an OpenBao and a gateway, with a key in each secret."""
    with OpenBao() as bao, DevGateway() as gateway:
        made = Desk(bao, bao.kv("kept"), gateway)
        for name in names:
            made.rotate(name)
        yield made


@dataclass(frozen=True, slots=True)
class Follower:
    """A daemon that follows secrets, each as a profile of its name; the helper asks for `work`."""

    home: Home
    pid: int
    role: str

    def key(self, name: str) -> str:
        """Return the key that it hands out."""
        return ask(self.home.socket, name).removeprefix("wait\n").removeprefix("ok ").rstrip("\n")


def follow(folder: Path, at: Desk, names: Sequence[str], interval: str) -> str:
    """Add a profile for each secret to a configuration; return the role that reads them."""
    role = f"daemon-{secrets.token_hex(4)}"
    role_id, secret_id = at.role(role)
    text = VAULT.format(address=at.bao.url, role_id=role_id, folder=folder)
    for name in names:
        url, path = at.gateway.url, at.kv.path(name)
        text += FOLLOWED.format(name=name, url=url, path=path, interval=interval)
    (folder / "secret-id").touch(0o600)
    (folder / "secret-id").write_text(secret_id)
    with (folder / "config.toml").open("a") as file:
        file.write(text)
    return role


@contextmanager
def follower(folder: Path, at: Desk, names: Sequence[str], interval: str) -> Iterator[Follower]:
    """Run a daemon that reads secrets, each as often as it is told."""
    home = Home(folder, profiles=list(names))
    for below in ("run", "state"):
        (folder / below).mkdir(mode=0o700, parents=True)
    (folder / "config.toml").touch(0o600)
    (folder / "config.toml").write_text(FIRST.format(default=names[0]))
    role = follow(folder, at, names, interval)
    with daemon(home) as server:
        made = Follower(home, server.pid, role)
        if any(made.key(name) != at.kept[name] for name in names):
            raise UnmeasurableError("the daemon hands out another key")
        yield made


@dataclass(frozen=True, slots=True)
class Renderer:
    """An agent that writes each secret's key to a file of its own."""

    agent: Agent
    role: str

    def file(self, name: str) -> Path:
        return self.agent.folder / name

    def key(self, name: str) -> str:
        """Return what its file holds."""
        return self.file(name).read_text()


@contextmanager
def renderer(at: Desk, names: Sequence[str], interval: str) -> Iterator[Renderer]:
    """Run an agent that reads secrets, each as often as it is told."""
    role = f"agent-{secrets.token_hex(4)}"
    what = {
        name: f'{{{{ with secret "{at.kv.path(name)}" }}}}{{{{ .Data.data.key }}}}{{{{ end }}}}'
        for name in names
    }
    with Agent(at.bao, *at.role(role), templates=what, interval=interval) as agent:
        made = Renderer(agent, role)
        if any(made.key(name) != at.kept[name] for name in names):
            raise UnmeasurableError("the agent's file holds another key")
        yield made


def until_noticed(
    at: Desk, due: Mapping[str, float], readers: Mapping[str, Follower | Renderer]
) -> dict[str, list[float]]:
    """
    Rotate secrets, and wait until every reader has every new key.

    Args:
        due: In how many seconds each of them is rotated.

    Returns:
        How long each reader took, from when the server had the new key.
    """
    began = time.monotonic()
    waiting: dict[tuple[str, str], float] = {}
    left = dict(due)
    taken: dict[str, list[float]] = {who: [] for who in readers}
    while left or waiting:
        for name in [one for one in left if time.monotonic() - began >= left[one]]:
            del left[name]
            at.rotate(name)
            waiting.update({(who, name): time.monotonic() for who in readers})
        for who, name in list(waiting):
            if readers[who].key(name) == at.kept[name]:
                taken[who].append(time.monotonic() - waiting.pop((who, name)))
        if time.monotonic() - began > max(due.values()) + PATIENCE_SECONDS:
            raise UnmeasurableError(f"never noticed: {waiting}")
        time.sleep(LOOK_SECONDS)
    return taken
