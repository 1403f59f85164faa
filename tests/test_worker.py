"""The worker as a process: order, limits, what it inherits, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import paths, pool, worker
from keybroker.broker import Broker
from keybroker.clock import Clock, Instant
from keybroker.credential import Secret
from keybroker.devgateway import DevGateway
from keybroker.errors import JournalError, SourceUnavailable
from keybroker.journal import Journal
from keybroker.label import new_label
from keybroker.pool import Pool, _encode
from keybroker.slots import Event, replay
from tests.canaries import canary
from tests.patched import HANG, REPORT, profile_at, worker_with
from tests.world import STATE, Gateway, GatewaySource, MemoryDisk, Time, profile

LINUX = sys.platform == "linux"
WRAP_KEY = Secret("5a" * 32)
REAL = (sys.executable, "-I", "-m", "keybroker.worker")
LIMIT = 20.0  # of a test's patience


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return paths.private_directory(tmp_path / "state")


class ByHand:
    """A worker whose pipes are held here."""

    def __init__(self, state: Path, command: tuple[str, ...] = REAL, parent: int = 0) -> None:
        self.process = subprocess.Popen(
            [*command, str(parent or os.getpid()), str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def send(self, *messages: Mapping[str, Any]) -> None:
        self.stdin.write(b"".join(json.dumps(one).encode() + b"\n" for one in messages))
        self.stdin.flush()

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout.readline())
        return found

    def end(self, data: bytes = b"") -> tuple[int, bytes, bytes]:
        """Send the rest, close its stdin, and return status, stdout and stderr."""
        out, err = self.process.communicate(data, timeout=LIMIT)
        return self.process.returncode, out, err

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with closing(pipe):
                    pass


def load(number: int, name: str = "work") -> dict[str, Any]:
    return {"id": number, "op": "load", "profile": name, "wrap_key": None, "seconds": 10}


# lines in, lines out


def test_answers_come_in_order(state: Path) -> None:
    """One line each, under the numbers of their requests, however many came at once."""
    with ByHand(state) as by_hand:
        by_hand.send(*(load(n) for n in (7, 3, 5)))
        answers = [by_hand.answer() for _ in range(3)]
        assert answers == [{"id": n, "ok": {"cached": None}, "records": []} for n in (7, 3, 5)]
        assert by_hand.end() == (0, b"", b"")


def test_a_request_may_come_in_pieces(state: Path) -> None:
    """The line counts, not the write."""
    line = json.dumps(load(1)).encode() + b"\n"
    with ByHand(state) as by_hand:
        for byte in line:
            by_hand.stdin.write(bytes([byte]))
            by_hand.stdin.flush()
        assert by_hand.answer()["id"] == 1


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"op": "nonsense"}, "AttributeError in nonsense"),
        ({}, "KeyError in None"),
        ({"op": None}, "AttributeError in None"),
        ({"op": "load"}, "TypeError in load"),
        ({"op": "load", "profile": "work", "wrap_key": None, "more": 1}, "TypeError in load"),
        ({"op": "records"}, "TypeError in records"),
        ({"op": "verify", "profile": {}, "secret": "x"}, "KeyError in verify"),
        ({"op": "verify", "profile": "work", "secret": "CANARY"}, "ValueError in verify"),
        ({"op": "revoke", "lease": {"id": "CANARY"}}, "KeyError in revoke"),
        ({"op": "retire", "revoke_at": "CANARY"}, "ValueError in retire"),
        ({"op": "settle", "issuer": "CANARY"}, "AttributeError in settle"),
    ],
)
def test_a_request_that_makes_no_sense_is_an_error(
    state: Path, message: dict[str, Any], kind: str
) -> None:
    """It names the type of what went wrong, no value; whether it had an effect is not known."""
    # of characters that are in no word which is looked for in it
    secret = f"{canary('worker')} with a space".translate(str.maketrans("abcdef", "012345"))
    text = json.dumps({"id": 1, **message}).replace('"CANARY"', json.dumps(secret))
    with ByHand(state) as by_hand:
        by_hand.send(json.loads(text), load(2))
        problem = {
            "code": "internal",
            "message": f"worker: failed with {kind}",
            "hint": None,
            "unknown": True,
        }
        assert by_hand.answer() == {"id": 1, "error": problem, "records": []}
        assert by_hand.answer()["id"] == 2
        assert by_hand.end() == (0, b"", b"")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"not JSON, but CANARY\n", "JSONDecodeError"),
        (b'"CANARY"\n', "AttributeError"),
        (b'["CANARY"]\n', "AttributeError"),
        (b'{"seconds":"CANARY"}\n', "ValueError"),
        (b'{"seconds":["CANARY"]}\n', "TypeError"),
        (b"CANARY\xff\n", "UnicodeDecodeError"),
        (b"\n", "JSONDecodeError"),
    ],
)
def test_garbage_ends_it_with_the_name_of_the_problem(state: Path, line: bytes, kind: str) -> None:
    """No traceback, whose lines would have values in them; the pool starts another."""
    with ByHand(state) as by_hand:
        line = line.replace(b"CANARY", b"sk-canary-0123456789")
        assert by_hand.end(line) == (1, b"", f"keybroker: worker: {kind}\n".encode())


@pytest.mark.parametrize("data", [b"", b'{"id":1,"op":"lo', b"x" * (worker.LONGEST_LINE + 100_000)])
def test_half_a_line_is_no_request(state: Path, data: bytes) -> None:
    """At the end of its stdin it ends, with nothing done; so it does when a line never ends."""
    with ByHand(state) as by_hand:
        assert by_hand.end(data) == (0, b"", b"")


def test_a_reader_that_went_away_is_no_signal(state: Path) -> None:
    """It ends by itself when nobody reads its answer, and says no more than that."""
    with ByHand(state) as by_hand:
        by_hand.stdout.close()
        by_hand.send(load(1))
        assert by_hand.process.stderr is not None
        assert by_hand.process.stderr.read() == b"keybroker: worker: BrokenPipeError\n"
        assert by_hand.process.wait(LIMIT) == 1


# its end


def test_it_ends_when_it_idles(state: Path) -> None:
    """After some idle seconds, with its stdin still open; half a line is idling too."""
    for half in (b"", b'{"id":2'):
        with ByHand(state, worker_with("worker.IDLE_SECONDS = 0.05")) as by_hand:
            by_hand.send(load(1))
            assert by_hand.answer()["id"] == 1
            by_hand.stdin.write(half)
            by_hand.stdin.flush()
            assert by_hand.process.wait(LIMIT) == 0


def test_the_pool_starts_another(state: Path) -> None:
    """A worker that idled away is replaced, and nobody notices."""
    command = worker_with(f"worker.IDLE_SECONDS = 0.05\n{REPORT}")
    with closing(Pool(state, os.environ, None, command=command)) as workers:
        first = workers.call("litellm", "forget", LIMIT, profile="work")["pid"]
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        second = workers.call("litellm", "forget", LIMIT, profile="work")["pid"]
    assert first != second


def test_no_request_is_lost_to_a_worker_that_is_about_to_end(state: Path) -> None:
    """Between its last look at its stdin and its end, a request goes to another worker."""
    os.mkfifo(state / "ending")
    slow = """
worker.IDLE_SECONDS = 0.05
def close(self):
    os.close(os.open(self.state / "ending", os.O_WRONLY))
    time.sleep(0.5)
Operations.close = close
"""
    with closing(Pool(state, os.environ, None, command=worker_with(slow))) as workers:
        workers.call("litellm", "load", LIMIT, profile="work", wrap_key=None)
        with open(state / "ending", "rb") as ending:
            assert ending.read() == b""
        os.unlink(state / "ending")
        os.mkfifo(state / "ending")
        keeps_it_open = os.open(state / "ending", os.O_RDWR)
        found = workers.call("litellm", "load", LIMIT, profile="work", wrap_key=None)
        assert found == {"cached": None}
        workers.close()
        os.close(keeps_it_open)


def test_the_hard_timer_ends_what_no_time_out_can(state: Path) -> None:
    """An operation that hangs in C is ended by the kernel, at the request's limit."""
    os.mkfifo(state / "reached")
    with ByHand(state, worker_with(HANG)) as by_hand:
        by_hand.send({"id": 1, "op": "forget", "profile": "work", "seconds": 0.3})
        with open(state / "reached", "rb") as reached:
            assert reached.read() == b""
        assert by_hand.process.wait(LIMIT) == -signal.SIGALRM
        assert by_hand.end() == (-signal.SIGALRM, b"", b"")


def test_the_hard_timer_is_armed_where_the_parent_ignores_it(state: Path) -> None:
    """What a shell has ignored or blocked is inherited: the timer must end us all the same."""
    kept = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        by_hand = ByHand(state, worker_with(HANG))
    finally:
        signal.signal(signal.SIGALRM, kept)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    os.mkfifo(state / "reached")
    with by_hand:
        by_hand.send({"id": 1, "op": "forget", "profile": "work", "seconds": 0.3})
        with open(state / "reached", "rb") as reached:
            assert reached.read() == b""
        assert by_hand.process.wait(LIMIT) == -signal.SIGALRM


def test_a_request_that_was_answered_has_no_timer_left(state: Path) -> None:
    """An idle worker outlives the limit of its last request."""
    with ByHand(state, worker_with("worker.IDLE_SECONDS = 0.6")) as by_hand:
        by_hand.send({**load(1), "seconds": 0.3})
        assert by_hand.answer()["id"] == 1
        assert by_hand.process.wait(LIMIT) == 0


def test_the_pool_says_that_the_outcome_is_unknown(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker that its own timer ended; the next request has another worker."""
    monkeypatch.setattr(pool, "GRACE_SECONDS", LIMIT)  # the pool's own kill is not what is tried
    os.mkfifo(state / "reached")
    keeps_it_open = os.open(state / "reached", os.O_RDWR)
    with closing(Pool(state, os.environ, None, command=worker_with(HANG))) as workers:
        with pytest.raises(SourceUnavailable) as caught:
            workers.call("litellm", "forget", 0.3, profile="work")
        assert caught.value.unknown is True
        assert str(caught.value) == "worker: it ended without an answer"
        found = workers.call("litellm", "load", LIMIT, profile="work", wrap_key=None)
        assert found == {"cached": None}
    os.close(keeps_it_open)


PARENT = """
import sys
from pathlib import Path
from keybroker import paths, pool

state, seconds, *command = sys.argv[1:]
lock = paths.take_owner_lock(Path(state))
assert lock is not None
workers = pool.Pool(Path(state), {}, lock, command=command)
workers.send("litellm", "forget", float(seconds), profile="work")
sys.stdin.read()
"""


def orphan(state: Path, command: tuple[str, ...], seconds: float) -> None:
    """Start an owner whose worker is in the middle of something, and kill -9 the owner."""
    os.mkfifo(state / "reached")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(state), str(seconds), *command],
        stdin=subprocess.PIPE,
    )
    with parent:
        with open(state / "reached", "rb") as reached:
            assert reached.read() == b""
        assert paths.take_owner_lock(state) is None
        parent.kill()


def wait_for_owner_lock(state: Path) -> float:
    """Return how many seconds it took until nobody held the lock any more."""
    started = time.monotonic()
    with open(state / paths.OWNER_LOCK, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return time.monotonic() - started


def test_it_dies_with_its_parent(state: Path) -> None:
    """After kill -9 of the parent (where there is no such signal: at its timer)."""
    orphan(state, worker_with(HANG), 60.0 if LINUX else 1.0)
    assert wait_for_owner_lock(state) < 10


def test_it_holds_the_owner_lock_until_its_end(state: Path) -> None:
    """A worker that outlived its parent keeps everybody else from minting."""
    os.mkfifo(state / "release")
    outliving = """
def hang(self, profile):
    os.close(os.open(self.state / "reached", os.O_WRONLY))
    os.close(os.open(self.state / "release", os.O_RDONLY))
Operations.forget = hang
worker._bind_to_parent = lambda parent: None
"""
    orphan(state, worker_with(outliving), LIMIT)
    assert paths.take_owner_lock(state) is None
    os.close(os.open(state / "release", os.O_WRONLY))
    wait_for_owner_lock(state)
    lock = paths.take_owner_lock(state)
    assert lock is not None
    os.close(lock)


def test_it_serves_nobody_but_its_parent(state: Path) -> None:
    """Where the parent died before the worker could bind to it, it does nothing."""
    with ByHand(state, parent=1) as by_hand:
        assert by_hand.end(json.dumps(load(1)).encode() + b"\n") == (1, b"", b"")


# what it inherits


@pytest.fixture
def report(state: Path) -> dict[str, Any]:
    """What a worker of the kind litellm says of itself."""
    environment = {
        "PATH": os.defpath,
        "HOME": "/nowhere",
        "LANG": "C.UTF-8",
        "https_proxy": "http://127.0.0.1:9",
        "SSL_CERT_FILE": "/etc/ssl/corp.pem",
        "ADMIN": "sk-admin",
        "VAULT_TOKEN": "sk-other",
        "KEYBROKER_CONFIG": "/elsewhere",
        "ANTHROPIC_API_KEY": "sk-user",
        "PYTHONPATH": "/elsewhere",
        "LD_PRELOAD": "",
    }
    named = {"litellm": {"ADMIN", "NOT_SET"}, "command": {"VAULT_TOKEN"}}
    lock = paths.take_owner_lock(state)
    assert lock is not None
    command = worker_with(REPORT)
    try:
        with closing(Pool(state, environment, lock, named, command)) as workers:
            return dict(workers.call("litellm", "forget", LIMIT, profile="work"))
    finally:
        os.close(lock)


def test_its_environment_is_the_allowed_one(report: dict[str, Any]) -> None:
    """Proxies, authorities, home, and what its own kind of source names; nothing else."""
    assert report["environment"] == {
        "PATH": os.defpath,
        "HOME": "/nowhere",
        "LANG": "C.UTF-8",
        "https_proxy": "http://127.0.0.1:9",
        "SSL_CERT_FILE": "/etc/ssl/corp.pem",
        "ADMIN": "sk-admin",
        "KEYBROKER_WORKER": "1",  # said by itself, for what its libraries start
    }


def test_it_leaves_no_core_and_is_closed_to_debuggers(report: dict[str, Any]) -> None:
    """And what it writes is its owner's alone; it dies with its parent (Linux)."""
    assert report["core"] == [0, 0]
    assert report["umask"] == 0o077
    assert report["dumpable"] == (0 if LINUX else None)
    assert report["death"] == (signal.SIGKILL if LINUX else 0)


def test_its_arguments_are_its_parent_and_the_state(state: Path, report: dict[str, Any]) -> None:
    """No secret is in a list of processes; the interpreter takes nothing from its environment."""
    assert report["argv"] == [str(os.getpid()), str(state)]
    assert report["flags"] == 1


def test_it_inherits_pipes_and_the_lock_and_nothing_else(report: dict[str, Any]) -> None:
    """Files that its parent has open are not its own; 4 is where it moved its requests to."""

    def inheritable(descriptor: int) -> bool:
        try:
            return os.get_inheritable(descriptor)
        except OSError:
            return False

    ours = {fd for fd in range(3, 256) if inheritable(fd)}
    assert set(report["descriptors"]) == {0, 1, 2, 3, 4} | ours


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_files_cost_neither_pipes_nor_lock(state: Path, closed: str) -> None:
    """A parent that was started without stdin has its lock and its pipes under low numbers."""
    code = f"""
import json, os, sys
from pathlib import Path
from keybroker import paths, pool

state, *command = sys.argv[1:]
state = Path(state)
lock = paths.take_owner_lock(state)
workers = pool.Pool(state, {{}}, lock, command=command)
found = workers.call("litellm", "forget", {LIMIT}, profile="work")
(state / "found").write_text(json.dumps(found))
"""
    held = """
def held(self, profile):
    from keybroker.paths import OWNER_LOCK
    lock = os.stat(self.state / OWNER_LOCK).st_ino
    found = []
    for fd in range(3, 64):
        try:
            found.append(os.fstat(fd).st_ino)
        except OSError:
            pass
    return {"held": lock in found}
Operations.forget = held
"""
    command = [sys.executable, "-c", code, str(state), *worker_with(held)]
    subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], timeout=LIMIT, check=True)
    assert json.loads((state / "found").read_text()) == {"held": True}


# the order of things


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway("sk-admin") as gateway:
        yield gateway


@pytest.fixture
def workers(state: Path) -> Iterator[Pool]:
    lock = paths.take_owner_lock(state)
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "ADMIN": "sk-admin"}
    with closing(Pool(state, environment, lock, {"litellm": {"ADMIN"}})) as made:
        yield made
    assert lock is not None
    os.close(lock)


def events(state: Path) -> list[Event]:
    return [record.event for record in Journal(state).read()]


def mints(gateway: DevGateway) -> int:
    return [seen.path for seen in gateway.seen()].count("/key/generate")


def label() -> str:
    return new_label("0a1b2c3d", "work", datetime.now(UTC))


def issue(workers: Pool, gateway: DevGateway, **source: Any) -> Mapping[str, Any]:
    made = profile_at(gateway.url, **source)
    return workers.call("litellm", "issue", LIMIT, profile=made, label=label())


def test_the_label_is_on_the_disk_before_the_call(state: Path, workers: Pool) -> None:
    """And the lease before the answer: at no moment does only the gateway know of a key."""
    seen: list[list[Event]] = []

    def look() -> datetime:
        seen.append(events(state))
        return datetime.now(UTC)

    with DevGateway("sk-admin", clock=look) as gateway:
        issue(workers, gateway)
        assert mints(gateway) == 1
    assert {tuple(one) for one in seen} == {(Event.WANTED,)}
    assert events(state) == [Event.WANTED, Event.HAVE]


def test_effects_come_one_after_the_other(state: Path) -> None:
    """wanted, call, have, answer: each begins when the one before is done."""
    traced = """
perform = worker.perform
def traced(effect, call):
    with open("TRACE", "a") as trace: print("begin", effect, file=trace)
    result = perform(effect, call)
    with open("TRACE", "a") as trace: print("end", effect, file=trace)
    return result
worker.perform = traced
""".replace("TRACE", str(state / "trace"))
    environment = {"ADMIN": "sk-admin"}
    named = {"litellm": {"ADMIN"}}
    with (
        DevGateway("sk-admin") as gateway,
        closing(Pool(state, environment, None, named, worker_with(traced))) as workers,
    ):
        issue(workers, gateway)
    done = (state / "trace").read_text().splitlines()
    assert done == [
        f"{side} {effect}"
        for effect in ("wanted", "issue", "have", "answer")
        for side in ("begin", "end")
    ]


def test_without_a_journal_nothing_is_minted(
    state: Path, workers: Pool, gateway: DevGateway
) -> None:
    """A journal that cannot be written stops minting: we could not promise to revoke."""
    (state / paths.JOURNAL).mkdir()
    with pytest.raises(JournalError):
        issue(workers, gateway)
    assert mints(gateway) == 0


def test_a_key_that_cannot_be_journalled_is_revoked_at_once(state: Path, workers: Pool) -> None:
    """The disk fails between label and lease: the key is gone before the error is told."""
    journal = state / paths.JOURNAL

    def fail() -> datetime:
        if journal.is_file() and events(state) == [Event.WANTED]:
            journal.rename(state / "kept")
            journal.mkdir()
        return datetime.now(UTC)

    with DevGateway("sk-admin", clock=fail) as gateway:
        with pytest.raises(JournalError):
            issue(workers, gateway)
        assert mints(gateway) == 1
        assert gateway.live_keys() == ()
    assert (state / "kept").read_text().count('"event":"wanted"') == 1


def test_a_key_that_can_be_neither_journalled_nor_revoked_stays_open() -> None:
    """Its label is on the disk, and is looked up: the third line of defence."""

    class Full(MemoryDisk):
        def append(self, path: Path, data: bytes) -> None:
            if b'"have"' in data:
                raise OSError(28, "No space left on device")
            super().append(path, data)

    time = Time()
    gateway = Gateway(time, lifetime=7200.0, plan=["ok", "down"])
    operations = worker.Operations(
        STATE,
        {},
        clock=time,
        disk=Full(),
        build=lambda *_: GatewaySource(gateway),  # type: ignore[arg-type,return-value]
    )
    message = {"id": 1, "op": "issue", "profile": _encode(profile()), "label": "kb-a"}
    reply = worker.answer(operations, message)
    assert reply["error"]["code"] == "unavailable"
    assert [record["event"] for record in reply["records"]] == ["wanted"]
    assert [record.event for record in Journal(STATE, operations.disk).read()] == [Event.WANTED]


@pytest.mark.parametrize("fate", ["drop", "lost", "late"])
def test_a_call_without_an_answer_leaves_its_label_open(fate: str) -> None:
    """It may have committed, or may yet: the label has no outcome in the journal."""
    time = Time()
    gateway = Gateway(time, lifetime=7200.0, plan=[fate])
    operations = worker.Operations(
        STATE,
        {},
        clock=time,
        disk=MemoryDisk(),
        build=lambda *_: GatewaySource(gateway),  # type: ignore[arg-type,return-value]
    )
    message = {"id": 1, "op": "issue", "profile": _encode(profile()), "label": "kb-a"}
    assert worker.answer(operations, message)["error"]["unknown"] is True
    [opened] = replay(Journal(STATE, operations.disk).read())["work"].open
    assert opened.label == "kb-a"


def test_a_refused_call_closes_its_label(state: Path, workers: Pool, gateway: DevGateway) -> None:
    """Nothing can have been committed: nothing is left to look up."""
    workers._environment = {"ADMIN": "sk-wrong"}
    with pytest.raises(Exception, match="refused the admin key"):
        issue(workers, gateway)
    assert events(state) == [Event.WANTED, Event.GONE]


class Later(Clock):
    """A clock that can be moved on."""

    def __init__(self) -> None:
        super().__init__()
        self.by = timedelta(0)

    def read(self) -> Instant:
        at = super().read()
        seconds = self.by.total_seconds()
        return Instant(at.wall + self.by, at.boot + seconds, at.boot_id)


def test_one_worker_serves_all_profiles_of_a_kind(
    state: Path, workers: Pool, gateway: DevGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty profiles are issued and rotated in one process, as many calls in one batch."""
    started: list[int] = []
    spawn = os.posix_spawn

    def counting(*arguments: Any, **options: Any) -> int:
        started.append(spawn(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(os, "posix_spawn", counting)
    profiles = [profile_at(gateway.url, f"p{n}") for n in range(20)]
    names = [one.name for one in profiles]
    clock = Later()
    journal = Journal(state)
    broker = Broker(
        profiles,
        [],
        {},
        workers,
        instance="0a1b2c3d",
        wrap_key=WRAP_KEY,
        mints=names,
        clock=clock,
        reread=journal.read,
    )

    def settle() -> set[str]:
        while not all(broker.settled(name) for name in names):
            broker.turn()
            broker.take(workers.receive(LIMIT))
        found = [broker.credential(name) for name in names]
        return {one.secret.fingerprint for one in found if one is not None}

    first = settle()
    clock.by += timedelta(seconds=2)  # the retry interval
    for name in names:
        broker.hurry(name)
    second = settle()
    assert (len(first), len(second), first & second) == (20, 20, set())
    assert mints(gateway) == 40
    assert len(started) == 1


def test_a_worker_keeps_a_few_sources_open(state: Path) -> None:
    """A thousand profiles are not a thousand connections: the oldest is closed for a new one."""
    closed: list[str] = []

    class Source:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    operations = worker.Operations(state, {}, build=lambda one, *_: Source(one.name))  # type: ignore[arg-type,return-value]
    profiles = [profile_at("http://127.0.0.1:1", f"p{n}") for n in range(worker.MOST_OPEN + 2)]
    for one in profiles:
        operations._source(one)
    assert closed == ["p0", "p1"]
    assert operations._source(profiles[-1]) is operations._source(profiles[-1])
    operations.close()
    assert len(closed) == len(profiles)
