"""A host that publishes its keys, and those who read them: at AWS, or in a Vault."""

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, Protocol, Self

from keybroker import asking, paths, wire
from keybroker.devgateway import DevGateway
from keybroker.errors import KeybrokerError
from keybroker.journal import Journal
from keybroker.slots import Event, Record, Slots, replay
from tests.crash.entry import ENTRY
from tests.crash.stage import HOLD, Stage
from tests.servers.aws import REGION, Aws, allow
from tests.servers.awsfaults import Front
from tests.servers.faults import Armed, Fault, Faults
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Kv

ACTIONS = ("DescribeSecret", "GetSecretValue", "PutSecretValue", "UpdateSecretVersionStage")
OFTEN_SECONDS = 0.15


class Place(Protocol):
    """One secret that others read, with a wire in front of it."""

    tables: str  # of the configuration
    variables: Mapping[str, str]

    def read(self) -> Mapping[str, str]:
        """Return the fields that others read, asked past the wire."""

    def currents(self) -> int:
        """Count the versions that are current."""

    def fault(self, effect: str, fault: Fault, times: int = 1) -> Armed:
        """Arm a fault for the next calls of an effect."""

    def note(self, text: str) -> None:
        """Have somebody change another field."""


class AwsPlace:
    """A secret of AWS's, and a user who may do what publishing takes."""

    CALLS: Mapping[str, str] = {
        "staged": "DescribeSecret",
        "stage": "PutSecretValue",
        "promote": "UpdateSecretVersionStage",
        "recover": "GetSecretValue",
    }

    def __init__(self, aws: Aws, front: Front) -> None:
        self._aws, self._front = aws, front
        self.name = f"llm/{secrets.token_hex(4)}"
        aws.put(self.name, '{"note": "one"}')
        allowed = [f"secretsmanager:{action}" for action in ACTIONS]
        self.variables = aws.environment(aws.user("publisher", allow(allowed)), front.url)
        self.place = f'secret = "{self.name}"\nfield = "/key"\nregion = "{REGION}"\n'
        self.tables = f'[profiles.work.publish]\nto = "aws"\n{self.place}'

    def read(self) -> Mapping[str, str]:
        found: Mapping[str, str] = json.loads(self._aws.value(self.name))
        return found

    def currents(self) -> int:
        versions = self._aws.secret(self.name)["VersionIdsToStages"]
        return sum("AWSCURRENT" in labels for labels in versions.values())

    def fault(self, effect: str, fault: Fault, times: int = 1) -> Armed:
        return self._front.fault(fault, self.CALLS[effect], secret=self.name, times=times)

    def labels(self) -> Mapping[str, str]:
        """Return the versions by their labels."""
        return self._aws.labels(self.name)

    def note(self, text: str) -> None:
        self._aws.put(self.name, json.dumps({**self.read(), "note": text}))


class VaultPlace:
    """A path of a KV 2, and a role that may do what publishing takes."""

    def __init__(self, bao: OpenBao, kv: Kv, wire: Faults) -> None:
        self._kv, self._wire = kv, wire
        self.name = f"llm-{secrets.token_hex(4)}"
        self.path = kv.path(self.name)
        kv.put(self.name, note="one")
        policy = bao.policy(self.name, {self.path: ["create", "read", "update"]})
        role_id, secret_id = bao.approle(self.name, [policy])
        self.variables = {"SECRET_ID": secret_id}
        self.tables = (
            f'[profiles.work.publish]\nto = "vault"\npath = "{self.path}"\n'
            f'[vault]\naddress = "{wire.url}"\n[vault.auth]\nmethod = "approle"\n'
            f'role_id = "{role_id}"\nsecret_id = {{ env = "SECRET_ID" }}\n'
        )

    def read(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self._kv.api.do("GET", self.path)["data"]["data"]
        return found

    def currents(self) -> int:
        return 1  # the newest is, and there is only one

    def fault(self, effect: str, fault: Fault, times: int = 1) -> Armed:
        methods = ("POST", "PUT") if effect == "promote" else ("GET",)
        return self._wire.next(
            fault,
            where=lambda one: one.method in methods and self.name in one.path,
            times=times,
        )

    def note(self, text: str) -> None:
        self._kv.put(self.name, **{**self.read(), "note": text})


@dataclass
class Publisher(Stage):
    """A HOME whose profile publishes; with `spawn`, a daemon of its own."""

    place: Place | None = None
    hold: timedelta = HOLD
    daemon: "subprocess.Popen[bytes] | None" = None

    def point_at(self, url: str, admin: str | None = None) -> None:
        super().point_at(url, admin)
        file = self.home / ".config/keybroker/config.toml"
        text = file.read_text().replace('hold = "2s"', f'hold = "{self.hold.seconds}s"')
        text = text.replace("helper_ttl", "max_live = 12\nhelper_ttl")
        assert self.place is not None
        file.write_text(text + self.place.tables)

    @property
    def environment(self) -> dict[str, str]:
        assert self.place is not None
        return {**super().environment, **self.place.variables}

    def __exit__(self, *_: object) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
        super().__exit__()

    def spawn(self) -> None:
        """Start a daemon, and wait until it answers."""
        folder = paths.private_directory(paths.state_directory(self.environment))
        socket = paths.socket_path(self.environment)
        paths.private_directory(socket.parent)
        words = ["daemon", json.dumps({}), str(folder), str(socket), "text"]
        with open(self.home / "log", "ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, ENTRY, *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        ends = time.monotonic() + 20
        while True:
            try:
                wire.control(socket, "status", 5.0)
            except KeybrokerError:
                assert time.monotonic() < ends, (self.home / "log").read_text()
                time.sleep(0.05)
            else:
                return

    @property
    def slots(self) -> Slots:
        """What its journal knows."""
        return replay(Journal(self.state).read()).get("work", Slots())

    def records(self) -> list[Record]:
        return Journal(self.state).read()

    def ended(self) -> set[str]:
        """Return the labels that its journal says are gone."""
        return {one.label for one in self.records() if one.event is Event.GONE}

    def ask(self) -> str | None:
        """Ask the daemon for a key, as the helper does."""
        reply = wire.ask(paths.socket_path(self.environment), wire.request("work"))
        status, text = asking.read_reply(reply) or (69, "")
        return text if status == 0 else None


class Readers:
    """
    Those who read what is published, all the time; what they find wrong is in `found`.

    A key is alive when it is read, and for its hold after that.
    """

    def __init__(self, gateway: DevGateway, place: Place, hold: timedelta = HOLD) -> None:
        self._gateway, self._place, self._hold = gateway, place, hold.total_seconds()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.found: list[str] = []
        self.seen: dict[str, float] = {}  # by the key's hash; when it was read last

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _read(self) -> None:
        while not self._over.wait(OFTEN_SECONDS):
            before = time.monotonic()
            key = self._place.read().get("key")
            alive = {one.token for one in self._gateway.live_keys()}
            after = time.monotonic()
            if key is not None:
                token = sha256(key.encode()).hexdigest()
                self.seen[token] = before
                if token not in alive and self._place.read().get("key") == key:
                    self.found.append("a dead key was read")
            held = {one for one, at in self.seen.items() if after < at + self._hold}
            if held - alive:
                self.found.append("a key died within the hold of somebody who had read it")


def wrong(gateway: DevGateway, place: Place, *hosts: Publisher) -> list[str]:
    """Judge, once all is settled, by the gateway's books, the store's, and the hosts' journals."""
    found = []
    live = {one.alias: one.token for one in gateway.live_keys()}
    known = {one.label for host in hosts for one in host.slots.all}
    if set(live) - known:
        found.append(f"live, and in no journal: {set(live) - known}")
    keys = {key.label for host in hosts for key in host.slots.keys}
    if keys - set(live):
        found.append(f"in a journal, and not alive: {keys - set(live)}")
    if place.currents() != 1:
        found.append(f"{place.currents()} versions are current")
    token = sha256(place.read().get("key", "").encode()).hexdigest()
    mine = {host.slots.current.label for host in hosts if host.slots.current is not None}
    if token not in live.values():
        found.append("the key that others read is dead")
    elif token not in {live.get(label) for label in mine}:
        found.append("the key that others read is no host's current one")
    return found


@contextmanager
def publisher(gateway: Any, place: Place, hold: timedelta = HOLD) -> Iterator[Publisher]:
    """Make a host that publishes there, with its first key."""
    with Publisher(gateway.url, gateway.master_key, place=place, hold=hold) as host:
        assert host.run("get", "work") == 0, host.said[-1]
        yield host
