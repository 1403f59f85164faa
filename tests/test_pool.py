"""The parent's side of the pipe: requests whose workers die, hang or talk rubbish."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import errors, pool
from keybroker.credential import Credential, Lease, Secret
from keybroker.errors import CLASSES, KeybrokerError, SourceError, SourceUnavailable
from keybroker.paths import private_directory
from keybroker.pool import Answer, Pool, decode_error
from keybroker.slots import Event
from keybroker.worker import encode_error
from tests.canaries import canary
from tests.patched import HANG, REPORT, profile_at, worker_with
from tests.world import START

LIMIT = 20.0
# `forget` does as the profile's name says.
OBEY = """
def obey(self, profile):
    exec(profile)
    return {"pid": os.getpid()}
Operations.forget = obey
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return private_directory(tmp_path / "state")


@pytest.fixture
def obeying(state: Path) -> Iterator[Pool]:
    with closing(Pool(state, os.environ, None, command=worker_with(OBEY))) as made:
        yield made


def pid(workers: Pool, kind: str = "litellm") -> int:
    return int(workers.call(kind, "forget", LIMIT, profile="pass")["pid"])


def wait_until_over(number: int) -> None:
    """Wait for the end of a process that stays to be reaped."""
    os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)


def gone(number: int) -> bool:
    """Say whether a process ended and was reaped."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


# workers


def test_workers_are_started_when_needed_one_of_a_kind(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that nobody asks has none."""
    started = []
    spawn = os.posix_spawn

    def counting(*arguments: Any, **options: Any) -> int:
        started.append(spawn(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(os, "posix_spawn", counting)
    with closing(Pool(state, os.environ, None, command=worker_with(OBEY))) as workers:
        assert workers.receive(LIMIT) == []
        assert started == []
        pids = [pid(workers, kind) for kind in ("litellm", "command", "litellm", "command")]
    assert pids == started * 2
    assert len(started) == 2


def test_a_kind_has_the_variables_that_are_named_for_it(state: Path) -> None:
    """An admin credential goes to the workers of its own source."""
    environment = {"LANG": "C.UTF-8", "ADMIN": "sk-admin", "TOKEN": "t-1", "OTHER": "x"}
    named = {"litellm": ["ADMIN"], "command": {"TOKEN"}}
    with closing(Pool(state, environment, None, named, worker_with(REPORT))) as workers:
        seen = {
            kind: set(workers.call(kind, "forget", LIMIT, profile="x")["environment"])
            for kind in ("litellm", "command", "static")
        }
    own = {"LANG", "KEYBROKER_WORKER"}  # the second is said by the worker itself
    assert seen == {"litellm": {*own, "ADMIN"}, "command": {*own, "TOKEN"}, "static": own}


def test_closing_reaps_all_workers(state: Path) -> None:
    """They end when their stdin does, and no zombie stays; what runs is finished first."""
    workers = Pool(state, os.environ, None, command=worker_with(OBEY))
    pids = [pid(workers, "litellm"), pid(workers, "command")]
    workers.send("litellm", "forget", LIMIT, profile="(self.state / 'done').touch()")
    workers.close()
    assert [gone(number) for number in pids] == [True, True]
    assert (state / "done").exists()


def test_a_pool_can_be_used_after_it_was_closed(obeying: Pool) -> None:
    """It starts new workers."""
    first = pid(obeying)
    obeying.close()
    assert pid(obeying) != first


def test_descriptors_are_given_back(obeying: Pool) -> None:
    """A hundred workers later, no more files are open than after the first."""

    def descriptors() -> set[int]:
        found = set()
        for number in range(256):
            try:
                os.fstat(number)
            except OSError:
                continue
            found.add(number)
        return found

    before = descriptors()
    for _ in range(10):
        obeying.send("litellm", "forget", LIMIT, profile="os._exit(3)")
        assert [answer.records for answer in obeying.receive(LIMIT)] == [None]
    while obeying.limit is not None:  # the last one is still ending
        assert obeying.receive(LIMIT) == []
    assert descriptors() == before


# deaths


def test_a_worker_that_died_leaves_an_unknown_outcome(obeying: Pool) -> None:
    """Its records are None: the journal must be read. The next request has another worker."""
    number = obeying.send("litellm", "forget", LIMIT, profile="os.kill(os.getpid(), 9)")
    [answer] = obeying.receive(LIMIT)
    assert (answer.id, answer.ok, answer.records) == (number, None, None)
    assert isinstance(answer.error, SourceUnavailable)
    assert answer.error.unknown is True
    assert pid(obeying) > 0


def test_every_request_of_a_dead_worker_is_answered(obeying: Pool, state: Path) -> None:
    """Those that it was at or had ahead as unknown; what it was not given, by another."""
    os.mkfifo(state / "go")
    wait = f"os.close(os.open({str(state / 'go')!r}, os.O_RDONLY)); os._exit(0)"
    asked = [obeying.send("litellm", "forget", LIMIT, profile=what) for what in (wait, "1", "2")]
    os.close(os.open(state / "go", os.O_WRONLY))
    answers: list[Answer] = []
    while len(answers) < 3:
        answers += obeying.receive(LIMIT)
    assert [answer.id for answer in answers] == asked
    assert [answer.records is None for answer in answers] == [True, True, False]


def test_half_an_answer_is_none(obeying: Pool) -> None:
    """A worker that was cut off in the middle of its line did not answer."""
    what = """os.write(1, b'{"id":1,"ok":{"credential"'); os._exit(0)"""
    obeying.send("litellm", "forget", LIMIT, profile=what)
    [answer] = obeying.receive(LIMIT)
    assert (answer.ok, answer.records) == (None, None)


@pytest.mark.parametrize(
    "line",
    [
        b"a library says hello\n",
        b"\n",
        b"[]\n",
        b'{"id":1}\n',
        b'{"id":1,"ok":{},"records":[{"event":"eaten"}]}\n',
        b'{"id":1,"error":{},"records":[]}\n',
        b"\xff\n",
    ],
)
def test_a_worker_that_talks_rubbish_is_a_dead_one(obeying: Pool, line: bytes) -> None:
    """What it says is not repeated; it is ended, and the outcome is unknown."""
    first = pid(obeying)
    obeying.send("litellm", "forget", LIMIT, profile=f"os.write(1, {line!r})")
    [answer] = obeying.receive(LIMIT)
    assert (answer.ok, answer.records) == (None, None)
    assert str(answer.error) == "worker: it ended without an answer"
    assert pid(obeying) != first
    assert gone(first)


def test_a_line_that_never_ends_is_not_kept(obeying: Pool) -> None:
    """A worker that writes more than a line may have is ended at once, not at its limit."""
    what = "os.set_blocking(1, True); [os.write(1, b'x' * 65536) for _ in range(64)]"
    started = time.monotonic()
    obeying.send("litellm", "forget", LIMIT, profile=what)
    answers: list[Answer] = []
    while not answers:
        answers = obeying.receive(LIMIT)
    assert [answer.records for answer in answers] == [None]
    assert pid(obeying) > 0
    assert time.monotonic() - started < LIMIT / 2


def test_an_overdue_worker_is_killed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose own timer does not end it; what waited behind is answered as well."""
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.1)
    os.mkfifo(state / "reached")
    keeps_it_open = os.open(state / "reached", os.O_RDWR)
    deaf = "worker.signal.setitimer = lambda *timer: None"
    command = worker_with(f"{HANG}\n{deaf}")
    with closing(Pool(state, os.environ, None, command=command)) as workers:
        asked = [workers.send("litellm", "forget", 0.3, profile="work") for _ in range(2)]
        answers = workers.receive(LIMIT)
        assert [answer.id for answer in answers] == asked
        assert [answer.records for answer in answers] == [None, None]
        found = workers.call("litellm", "load", LIMIT, profile="work", wrap_key=None)
        assert found == {"cached": None}
    os.close(keeps_it_open)


def test_waiting_for_an_answer_ends_in_time(state: Path) -> None:
    """`receive` returns with nothing when nothing came; the answer may still come."""
    os.mkfifo(state / "go")
    slow = """
def wait(self, profile):
    os.close(os.open(self.state / "go", os.O_RDONLY))
    return {}
Operations.forget = wait
"""
    with closing(Pool(state, os.environ, None, command=worker_with(slow))) as workers:
        number = workers.send("litellm", "forget", LIMIT, profile="work")
        assert workers.receive(0.05) == []
        os.close(os.open(state / "go", os.O_WRONLY))
        [answer] = workers.receive(LIMIT)
        assert (answer.id, answer.ok) == (number, {})


def test_a_worker_that_died_idle_costs_nothing(obeying: Pool) -> None:
    """It owed nothing: the request goes to another, and is answered."""
    first = pid(obeying)
    os.kill(first, signal.SIGKILL)
    wait_until_over(first)
    assert pid(obeying) != first
    assert gone(first)


def test_a_program_that_cannot_be_started_is_an_error(state: Path) -> None:
    """Nothing waits for it for ever."""
    with closing(Pool(state, {}, None, command=("/nowhere/python",))) as workers:
        number = workers.send("litellm", "load", LIMIT, profile="work", wrap_key=None)
        assert workers.limit == 0.0
        [answer] = workers.receive(LIMIT)
        assert (answer.id, answer.records) == (number, ())
        assert str(answer.error) == "worker: could not start (No such file or directory)"
        assert workers.receive(LIMIT) == []


# errors


def all_errors() -> list[type[KeybrokerError]]:
    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, KeybrokerError)
    ]
    return [kind for kind in found if kind is not SourceError]  # never raised as itself


def test_every_error_has_a_code_of_its_own() -> None:
    """The list by which errors travel has every class there is."""
    assert set(CLASSES.values()) == set(all_errors())
    assert len({kind.code for kind in all_errors()}) == len(all_errors())


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_travels(kind: type[KeybrokerError]) -> None:
    """Class, message and hint; of a source's also whether the outcome is known, and the wish."""
    error = kind("who: what happened", hint="what to type")
    back = decode_error(encode_error(error))
    assert (type(back), back.message, back.hint) == (kind, "who: what happened", "what to type")
    assert decode_error(encode_error(kind("bare"))).hint is None
    if issubclass(kind, SourceError):
        for unknown, wish in ((True, timedelta(seconds=2.5)), (False, None)):
            error = kind("who: what", unknown=unknown, retry_after=wish)
            back = decode_error(encode_error(error))
            assert isinstance(back, SourceError)
            assert (back.unknown, back.retry_after) == (unknown, wish)


def test_an_error_of_a_later_version_is_still_one() -> None:
    """An unknown code is an error without a class of its own."""
    assert type(decode_error({"code": "eaten", "message": "x"})) is KeybrokerError


def test_errors_come_through_the_pipe(obeying: Pool) -> None:
    """As the worker raised them, beside the records that it had written by then."""
    what = """
from datetime import timedelta
from keybroker.errors import SourceUnavailable
raise SourceUnavailable("litellm: busy", hint="wait", retry_after=timedelta(seconds=7))
"""
    with pytest.raises(SourceUnavailable) as caught:
        obeying.call("litellm", "forget", LIMIT, profile=what)
    error = caught.value
    assert (error.message, error.hint, error.unknown) == ("litellm: busy", "wait", False)
    assert error.retry_after == timedelta(seconds=7)
    what = "self.retire('work', 'kb-a', 'f', self.clock.read().wall, 'lost'); raise ValueError"
    obeying.send("litellm", "forget", LIMIT, profile=what)
    [answer] = obeying.receive(LIMIT)
    assert str(answer.error) == "worker: failed with ValueError in forget"
    assert answer.records is not None
    assert [(record.event, record.why) for record in answer.records] == [(Event.RETIRED, "lost")]


def test_a_foreign_error_says_its_type_and_nothing_more(obeying: Pool) -> None:
    """Its text may have a key in it."""
    secret = canary("foreign")
    with pytest.raises(KeybrokerError) as caught:
        obeying.call("litellm", "forget", LIMIT, profile=f"raise OSError({secret!r})")
    assert str(caught.value) == "worker: failed with OSError in forget"


# secrets


def test_no_repr_has_a_secret(obeying: Pool) -> None:
    """An answer shows its number and its error; what it carries may be a key."""
    secret = canary("answer")
    obeying.send("litellm", "unlock", LIMIT, kind="memory")
    [answer] = obeying.receive(LIMIT)
    assert repr(answer) == f"Answer(id={answer.id}, error=None, records=[])"
    assert secret not in repr(Answer(1, {"secret": secret}, None, ()))


def test_a_message_has_values_in_the_words_of_the_journal() -> None:
    """What JSON does not know is written as the worker reads it."""
    lease = Lease("token", "litellm", START, revocable=True)
    profile = profile_at("http://127.0.0.1:1")
    wire = {
        "id": "token",
        "source": "litellm",
        "issued_at": "2026-11-21T12:00:00.000000Z",
        "revocable": True,
    }
    assert pool._encode(Secret("sk-1")) == "sk-1"
    assert pool._encode(lease) == wire
    assert pool._encode(Credential(Secret("sk-1"), lease)) == {"secret": "sk-1", "lease": wire}
    assert pool._encode(profile) == {"name": "work", "raw": profile.raw}
    assert pool._encode(profile.issuer) == {
        "type": "litellm",
        "url": "http://127.0.0.1:1",
        "admin": {"env": "ADMIN"},
    }
    assert pool._encode(timedelta(minutes=1)) == 60.0
    assert pool._encode(START) == "2026-11-21T12:00:00.000000Z"
    assert (pool._encode(None), pool._encode("x"), pool._encode(True)) == (None, "x", True)


def test_a_worker_that_idled_away_leaves_nothing_to_read(obeying: Pool) -> None:
    """A loop that watches `fileno` reads the end of an idle worker, and is woken by it once."""
    first = pid(obeying)
    assert select.select([obeying.fileno()], [], [], 0.0)[0] == []
    os.kill(first, signal.SIGKILL)
    wait_until_over(first)

    assert select.select([obeying.fileno()], [], [], LIMIT)[0] == [obeying.fileno()]
    assert obeying.receive(0.0) == []
    assert select.select([obeying.fileno()], [], [], 0.0)[0] == []
    assert gone(first)
    assert obeying.limit is None
