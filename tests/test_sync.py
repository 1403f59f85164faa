"""What is said to be on the disk is on the disk: the order of system calls, and power that fails.

SIGKILL cannot show this, since the kernel still writes what a killed process had written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import journal as journals
from keybroker import paths, worker
from keybroker.cache import Cache
from keybroker.chain import Chain
from keybroker.clock import Clock
from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Look, Secret, Verdict
from keybroker.devgateway import DevGateway
from keybroker.errors import KeybrokerError
from keybroker.journal import Journal
from keybroker.paths import Disk
from keybroker.pool import Pool, _encode
from keybroker.rotation import Kind
from keybroker.slots import Record, Slots, replay
from keybroker.sources import Capabilities
from tests.canaries import write
from tests.conftest import Home
from tests.servers.processes import wait_until

WRAP_KEY = Secret("ab" * 32)
HOLD = timedelta(minutes=15)
TRACED = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg,recvfrom"
# Enough of a text to know a journal's event and a request by; too little to hold a key.
TEXT = "58"


# The order of system calls.

CALL = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)")


def order(trace: str) -> list[str]:
    """Return what a worker did, in the words of the design; a trace itself is never shown."""
    return [done for done in map(_done, trace.splitlines()) if done]


def _done(line: str) -> str:
    match = CALL.match(line)
    if match is None or int(match[3]) < 0:
        return ""
    call, given = match[1], match[2]
    named = re.match(r"\d+<([^>]*)>", given)
    file = Path(named[1]).name if named else ""
    where = "journal" if file == paths.JOURNAL else "draft" if ".sealed." in file else file
    if call in ("write", "pwrite64"):
        if where == "journal":
            event = re.search(r'\\"event\\":\\"(\w+)\\"', given)
            return f"write {event[1] if event else 'first line'}"
        if where == "draft":
            return "write draft"
        return "answer" if given.startswith("1<socket:") else ""
    if call in ("fsync", "fdatasync"):
        return f"sync {where}"
    if call.startswith("rename"):
        return "rename draft" if ".sealed." in given else ""
    if call in ("sendto", "sendmsg"):
        request = re.search(r'"(GET|POST) (\S+) HTTP', given)
        return f"send {request[2]}" if request else ""
    if call == "recvfrom":
        return "receive" if '"HTTP/1.1 200' in given else ""
    return ""


@contextmanager
def traced(home: Home, gateway: DevGateway, command: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Yield a function that asks a worker under strace, and one that tells what it did."""
    admin = write(home.path / "admin", gateway.master_key)
    source = {"type": "litellm", "admin": {"file": str(admin)}}
    profile = worker.decode_profile(
        {"name": "work", "raw": {"base_url": gateway.url, "source": source}}
    )
    state = paths.private_directory(home.path / "state")
    trace = home.path / "trace"
    # -D: the worker stays our child, since it ends when it is not
    strace = ["/usr/bin/env", "strace", "-D", "-f", "-y", "-s", TEXT, "-o", str(trace)]
    pool = Pool(state, home.environment, None, command=[*strace, "-e", f"trace={TRACED}", *command])

    def ask(op: str, **values: Any) -> Any:
        named = {"profile": profile, **values}
        return pool.call("litellm", op, 30, **named), profile

    def done() -> list[list[str]]:
        pool.close()
        assert wait_until(lambda: "+++ exited with 0 +++" in trace.read_text(), 10)
        answers: list[list[str]] = [[]]
        for one in order(trace.read_text()):
            answers[-1].append(one)
            if one == "answer":
                answers.append([])
        return answers[:-1]

    try:
        yield ask, done
    finally:
        pool.close()


def life_of_two_keys(ask: Any) -> None:
    """Issue and publish two keys and revoke the first."""
    held = []
    for number in (1, 2):
        label = f"kb-00000000-work-{number}"
        answer, profile = ask("issue", label=label)
        credential = worker.decode_credential(answer["credential"])
        values = {"label": label, "verified": "models", "wrap_key": WRAP_KEY}
        values["anchor"] = Clock().read()
        ask("publish", credential=credential, hold=HOLD if held else None, **values)
        held.append((label, credential))
    label, credential = held[0]
    ask(
        "revoke",
        profile="work",
        label=label,
        fingerprint=credential.secret.fingerprint,
        issuer=profile.issuer,
        lease=credential.lease,
    )


ISSUED = [
    *("write wanted", "sync journal", "send /key/generate", "receive"),
    *("write have", "sync journal", "answer"),
]
PUBLISHED = [
    *("write draft", "sync draft", "rename draft", "sync cache"),
    *("write swap", "sync journal", "answer"),
]
REVOKED = ["send /key/delete", "receive", "write gone", "sync journal", "answer"]


def worker_open_to_strace(patch: str = "pass") -> tuple[str, ...]:
    """An ordinary user's strace cannot read a process that is closed to debuggers."""
    script = (
        "from keybroker import paths, worker\n"
        "worker._bind_to_parent = lambda parent: None\n"
        f"{patch}\n"
        "worker.main()"
    )
    return (sys.executable, "-I", "-c", script)


def test_a_worker_syncs_before_it_goes_on(home: Home) -> None:
    """The label is on the disk before the call, the lease before the answer, the end after it."""
    command = worker_open_to_strace()
    with DevGateway() as gateway, traced(home, gateway, command) as (ask, done):
        life_of_two_keys(ask)
        first, published, issued, published_again, revoked = done()
        assert gateway.failures == ()
    # the first of each also makes files and folders, and syncs what these are in
    assert first[:2] == ["write first line", "sync state"]
    above = ("sync state", f"sync {home.path.name}")
    assert [one for one in first[2:] if one not in above] == ISSUED
    assert published[0] == "sync state"
    assert [one for one in published if one not in above] == PUBLISHED
    assert (issued, published_again, revoked) == (ISSUED, PUBLISHED, REVOKED)


def test_the_order_of_a_worker_that_does_not_sync_is_seen(home: Home) -> None:
    """A worker whose journal is not synced does not pass the test above."""
    command = worker_open_to_strace("paths.Disk.sync = lambda *_: None")
    with DevGateway() as gateway, traced(home, gateway, command) as (ask, done):
        life_of_two_keys(ask)
        issued = done()[2]
    assert issued == [one for one in ISSUED if one != "sync journal"]


# Power that fails.


class PowerLossError(BaseException):
    """The machine is off: nothing that runs can catch this."""


@dataclass
class Platter(Disk):
    """
    A disk in memory that forgets, when the power fails, what was not synced.

    Args:
        survives: What is left of bytes that were appended and not synced, as a share.
    """

    survives: float = 0.0
    durable: dict[Path, bytes] = field(default_factory=dict)
    files: dict[Path, bytes] = field(default_factory=dict)
    calls: int = 0
    fails_after: int | None = None

    def read(self, path: Path, last: int | None = None) -> bytes | None:
        found = self.files.get(path)
        return found if found is None or last is None else found[-last:]

    def directory(self, path: Path) -> None:
        """There are no folders here."""

    def append(self, path: Path, data: bytes) -> None:
        self.durable.setdefault(path, b"")  # the folder is synced when a file is new
        self.files[path] = self.files.get(path, b"") + data
        self._done()

    def sync(self, path: Path) -> None:
        self.durable[path] = self.files[path]
        self._done()

    def truncate(self, path: Path, size: int) -> None:
        self.files[path] = self.files[path][:size]
        self._done()

    def replace(self, path: Path, data: bytes) -> None:
        self.files[path] = self.durable[path] = data
        self._done()

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)
        self.durable.pop(path, None)
        self._done()

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        yield

    def _done(self) -> None:
        self.calls += 1
        if self.calls == self.fails_after:
            self.lose()
            raise PowerLossError

    def lose(self) -> None:
        """Forget what was not synced, but for what happened to reach the disk."""
        for path, data in self.files.items():
            kept = self.durable.get(path, b"")
            if data.startswith(kept):
                kept = data[: len(kept) + int((len(data) - len(kept)) * self.survives)]
            self.durable[path] = kept
        self.files = dict(self.durable)


class Unsynced(Platter):
    """A disk on which a sync only waits."""

    def sync(self, path: Path) -> None:
        self._done()


@dataclass
class Mint:
    """A source that counts what it minted and revoked."""

    keys: dict[str, Lease] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    capabilities = Capabilities(Kind.MINTED, find=True, revoke=True, enforces_expiry=True)

    @property
    def live(self) -> set[str]:
        return set(self.keys) - self.revoked

    def issue(self, label: str) -> Credential:
        now = datetime.now(UTC)
        lease = Lease(f"id of {label}", "litellm", now, now + timedelta(hours=12), revocable=True)
        self.keys[label] = lease
        return Credential(Secret(f"sk-{label}"), lease)

    def revoke(self, lease: Lease) -> None:
        self.revoked |= {label for label, one in self.keys.items() if one.id == lease.id}

    def find(self, label: str) -> Sequence[Lease]:
        return [self.keys[label]] if label in self.live else []

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        return [(label, self.keys[label]) for label in sorted(self.live)]

    def verify(self, secret: Secret) -> Verdict:
        return Verdict(Look.ALIVE, "models", "200")

    def close(self) -> None:
        """Nothing is held open."""


@dataclass
class Life:
    """What was promised to somebody before the power failed."""

    disk: Platter
    state: Path
    mint: Mint = field(default_factory=Mint)
    published: str = ""  # the label of the last key that was handed out
    confirmed: set[str] = field(default_factory=set)  # labels whose revocation was answered

    def operations(self, kind: type[worker.Operations]) -> worker.Operations:
        return kind(
            self.state,
            {},
            disk=self.disk,
            build=lambda *_: self.mint,
            revoker=lambda *_: self.mint,
        )

    def run(self, kind: type[worker.Operations]) -> None:
        """Three rotations, as a broker asks for them, and a compaction."""
        operations = self.operations(kind)
        old: tuple[str, Credential] | None = None
        for number in range(3):
            label = f"kb-00000000-work-{number}"
            issued = _ask(operations, "issue", profile=RAW, label=label)["credential"]
            values = {"verified": "models", "wrap_key": WRAP_KEY.reveal()}
            values["anchor"] = _encode(Clock().read())
            hold = None if old is None else HOLD.total_seconds()
            _ask(
                operations,
                "publish",
                profile=RAW,
                label=label,
                credential=issued,
                hold=hold,
                **values,
            )
            self.published = label
            if old is not None:
                _ask(operations, "revoke", **self.revocation(*old))
                self.confirmed.add(old[0])
            old = (label, worker.decode_credential(issued))
            Journal(self.state, self.disk).compact()

    def revocation(self, label: str, credential: Credential) -> dict[str, Any]:
        return {
            "profile": "work",
            "label": label,
            "fingerprint": credential.secret.fingerprint,
            "issuer": journals.encode_issuer(PROFILE.issuer),
            "lease": journals.encode_lease(credential.lease),
        }

    def problems(self) -> list[str]:
        """Return the promises that are broken after the restart."""
        slots = replay(Journal(self.state, self.disk).read()).get("work", Slots())
        known = {one.label for one in slots.all}
        found = [f"{label} is forgotten" for label in sorted(self.mint.live - known)]
        if self.published:
            current = slots.current.label if slots.current is not None else ""
            if current < self.published:  # a later one was synced, and not yet answered
                found.append(
                    f"{self.published} was handed out, and {current or 'nothing'} is current"
                )
            cached = Cache(self.state, WRAP_KEY, self.disk).load("work")
            if cached is None or cached.label < self.published:
                found.append(f"{self.published} is not in the cache")
        found += [f"{label} was confirmed, and is back" for label in sorted(self.confirmed & known)]
        return found

    def recover(self) -> None:
        """Do what is left over, as the next broker does."""
        operations = self.operations(worker.Operations)
        slots = replay(Journal(self.state, self.disk).read()).get("work", Slots())
        for one in slots.open:
            issuer = journals.encode_issuer(one.issuer)
            values = {"profile": "work", "label": one.label, "issuer": issuer}
            _ask(operations, "settle", last=True, **values)
        for key in slots.keys:
            credential = Credential(Secret(f"sk-{key.label}"), key.lease)
            _ask(operations, "revoke", **self.revocation(key.label, credential))


RAW = {
    "name": "work",
    "raw": {
        "base_url": "https://llm.example.com",
        "source": {"type": "litellm", "admin": {"env": "ADMIN"}},
    },
}
PROFILE: Profile = worker.decode_profile(RAW)


def _ask(operations: worker.Operations, op: str, **values: Any) -> dict[str, Any]:
    reply = worker.answer(operations, {"id": 1, "op": op, **values})
    assert "ok" in reply, reply.get("error")
    found: dict[str, Any] = reply["ok"]
    return found


def lives(
    state: Path,
    platter: Callable[..., Platter] = Platter,
    kind: type[worker.Operations] = worker.Operations,
) -> Iterator[Life]:
    """Yield a life for each call to the disk after which the power fails, restarted."""
    for survives in (0.0, 0.5, 1.0):
        at = 1
        while True:
            life = Life(platter(survives=survives), state)
            life.disk.fails_after = at
            try:
                life.run(kind)
            except PowerLossError:
                life.disk.fails_after = None
                yield life
                at += 1
                continue
            break
        assert at > 25


@pytest.fixture(autouse=True)
def compacts_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have compaction take part in so short a life."""
    monkeypatch.setattr(journals, "COMPACT_ABOVE", 4)


def test_no_promise_is_broken_wherever_the_power_fails(tmp_path: Path) -> None:
    """Every key of the gateway is known, what was handed out is current, the revoked stays gone."""
    count = 0
    for life in lives(tmp_path):
        assert life.problems() == []
        count += 1
    assert count > 100


def test_what_is_left_over_is_done_again(tmp_path: Path) -> None:
    """After any loss the next process leaves no live key; a lost `gone` only means to ask again."""
    again = 0
    for life in lives(tmp_path):
        slots = replay(Journal(tmp_path, life.disk).read()).get("work", Slots())
        again += any(key.label in life.mint.revoked for key in slots.keys)
        life.recover()
        assert life.mint.live == set()
        left = replay(Journal(tmp_path, life.disk).read()).get("work", Slots())
        assert left.all == ()
    assert again, "a `gone` was lost at least once"


def broken(state: Path, **how: Any) -> set[str]:
    """Return the promises that a mutant breaks, without the labels."""
    found: set[str] = set()
    for life in lives(state, **how):
        try:
            found |= {re.sub(r"\S+-\d", "it", one) for one in life.problems()}
        except KeybrokerError as error:
            found.add(error.code)
    return found


def test_a_journal_that_is_not_synced_is_found(tmp_path: Path) -> None:
    """The mutant that appends without a sync forgets keys, swaps and revocations."""
    found = broken(tmp_path, platter=Unsynced)
    assert "it is forgotten" in found
    assert {
        "it was handed out, and it is current",
        "it was handed out, and nothing is current",
    } & found


class CallsFirst(worker.Operations):
    """Writes the label only after the key was minted."""

    def issue(self, profile: Profile, label: str) -> dict[str, Any]:
        """Mint, then say so."""
        self._source(profile).issue(label)
        return super().issue(profile, label)


class SaysGoneFirst(worker.Operations):
    """Says that a key is gone before it asks for its end."""

    def revoke(self, profile: str, label: str, fingerprint: str, **rest: Any) -> dict[str, Any]:
        """Say so, then do it."""
        self._gone(profile, label, "revoked", fingerprint)
        return super().revoke(profile, label, fingerprint, **rest)


class Quiet(worker.Operations):
    """Answers before the swap is in the journal."""

    def _write(self, effect: str, record: Record) -> None:
        if effect != "swap":
            super()._write(effect, record)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (CallsFirst, "it is forgotten"),
        (SaysGoneFirst, "it is forgotten"),
        (Quiet, "it was handed out, and nothing is current"),
    ],
)
def test_a_worker_in_the_wrong_order_is_found(
    tmp_path: Path, kind: type[worker.Operations], problem: str
) -> None:
    """The label after the call, the end before the revocation, no swap: each breaks a promise."""
    assert problem in broken(tmp_path, kind=kind)


def test_the_audit_log_is_not_waited_for(tmp_path: Path) -> None:
    """Its lines are written without a sync: losing one costs nobody a key."""
    disk = Platter()
    Chain(tmp_path / paths.AUDIT, "audit", disk).append({"event": "given"}, sync=False)
    assert disk.files[tmp_path / paths.AUDIT]
    disk.lose()
    assert disk.files[tmp_path / paths.AUDIT] == b""


def test_a_new_folder_is_synced_into_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that is on the disk in a folder that is not would be lost with it."""
    synced: list[Path] = []
    monkeypatch.setattr(paths, "_sync_directory", synced.append)
    state = tmp_path / "keybroker" / "machine"
    paths.private_directory(state)
    assert synced == [tmp_path / "keybroker", tmp_path]
    paths.private_directory(state)
    assert len(synced) == 2
