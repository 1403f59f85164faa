"""Any program that prints a key: what is taken from it, and what it is given."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Look, Secret
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError, KeybrokerError, SourceInvalid, SourceUnavailable
from keybroker.pool import Pool
from keybroker.sources.command import LARGEST_OUTPUT, parse, run
from tests.contracts import entry

KEY = "sk-canary-0123456789"
NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
BASE = "http://127.0.0.1:9"
PATH = {"PATH": os.environ["PATH"]}


@pytest.fixture
def python(tmp_path: Path) -> Any:
    """Make a command of a piece of Python."""

    def python(code: str) -> list[str]:
        return [sys.executable, "-IS", "-c", code]

    return python


def profile(command: list[str], base_url: str = BASE, **source: Any) -> Profile:
    return entry(base_url, {"type": "command", "command": command, **source})


def issue(command: list[str], given: Mapping[str, str] = PATH, **source: Any) -> Credential:
    opened = sources.build(profile(command, **source), given)
    try:
        return opened.issue("")
    finally:
        opened.close()


def fails(kind: type[KeybrokerError], command: list[str], **source: Any) -> KeybrokerError:
    """Return the error of an issue, after a look that no output is in it."""
    with pytest.raises(KeybrokerError) as caught:
        issue(command, **source)
    assert type(caught.value) is kind
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"
    assert caught.value.message.startswith("command: ")
    return caught.value


# What it may print.


@pytest.mark.parametrize(
    "output", [KEY, f"{KEY}\n", f"  {KEY} \r\n\n", json.dumps({"key": KEY}), f'\n{{"key":"{KEY}"}}']
)
def test_a_key_alone_is_taken_and_has_no_end(python: Any, output: str) -> None:
    """Bare or in JSON, blanks around it dropped."""
    credential = issue(python(f"print({output!r}, end='')"))
    assert credential.secret == Secret(KEY)
    assert credential.lease.expires_at is None
    assert not credential.lease.revocable
    assert credential.lease.id == credential.secret.fingerprint


@pytest.mark.parametrize(
    ("more", "end"),
    [
        ({"ttl": 3600}, NOON + timedelta(hours=1)),
        ({"ttl": 0.5}, NOON + timedelta(seconds=0.5)),
        ({"ttl": "15m"}, NOON + timedelta(minutes=15)),
        ({"ttl": "1.5h"}, NOON + timedelta(minutes=90)),
        ({"expires_at": "2026-11-21T13:00:00Z"}, NOON + timedelta(hours=1)),
        ({"expires_at": "2026-11-21T14:00:00+01:00"}, NOON + timedelta(hours=1)),
        ({"expires_at": "2026-11-21T13:00:00.5+00:00"}, NOON + timedelta(hours=1, seconds=0.5)),
        ({"ttl": None, "expires_at": None}, None),
        ({"ttl": "15m", "expires_at": "2030-01-01T00:00:00Z"}, NOON + timedelta(minutes=15)),
        ({"token_type": "Bearer", "x": [1]}, None),
    ],
)
def test_an_end_is_read(more: dict[str, Any], end: datetime | None) -> None:
    """Seconds, a duration, or a moment with its zone; `ttl` counts from the start."""
    lease = parse(json.dumps({"key": KEY, **more}), NOON).lease
    assert (lease.issued_at, lease.expires_at) == (NOON, end)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("sk-canary-1\nsk-canary-2", "not one token"),
        ("sk-canary 1", "not one token"),
        ("sk-canary\t1", "not one token"),
        ("sk-canary-ü", "not one token"),
        ("sk-canary-\x7f", "not one token"),
        ("sk-canary-\x00", "not one token"),
        ("sk-canary-\ufffd", "not one token"),
        ("sk-canary" * 2000, "longer than 16384"),
        ("", "empty"),
        ('{"key": "sk-canary', "not"),
        ('{"key": "sk-canary"} trailing', "not"),
        ("{" * 100_000, "not"),
        ("{}", "empty"),
        ('{"key": ""}', "empty"),
        ('{"key": null}', "empty"),
        ('{"key": ["sk-canary"]}', "empty"),
        ('{"key": {"a": "sk-canary"}}', "empty"),
        ('{"key": "two words-canary"}', "not one token"),
        ('{"key": "sk-canary\\n"}', "not one token"),
        ('{"token": "sk-canary"}', "empty"),
    ],
)
def test_anything_else_is_refused_without_repeating_it(output: str, words: str) -> None:
    """Two lines, blanks, other alphabets, half of JSON: no key, and no text of it."""
    with pytest.raises(SourceInvalid) as caught:
        parse(output, NOON)
    assert words in caught.value.message
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"
    assert not caught.value.unknown


@pytest.mark.parametrize(
    "more",
    [
        {"ttl": "3600"},
        {"ttl": "soon"},
        {"ttl": "1 h"},
        {"ttl": True},
        {"ttl": [1]},
        {"ttl": {}},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"ttl": 1e300},
        {"ttl": "-5m"},
        {"expires_at": 1_800_000_000},
        {"expires_at": "tomorrow"},
        {"expires_at": "2026-11-21T13:00:00"},
        {"expires_at": "0001-01-01T00:00:00+14:00"},
        {"expires_at": ["2026-11-21T13:00:00Z"]},
    ],
)
def test_an_end_that_cannot_be_read_is_refused(more: dict[str, Any]) -> None:
    """A key whose end is not understood is not handed out as one without."""
    with pytest.raises(SourceInvalid) as caught:
        parse(json.dumps({"key": KEY, **more}), NOON)
    assert "cannot be read" in caught.value.message


@pytest.mark.parametrize(
    "more",
    [{"ttl": 0}, {"ttl": -1}, {"ttl": -1e9}, {"expires_at": "2026-11-21T12:00:00Z"}],
)
def test_a_key_that_has_expired_is_refused(more: dict[str, Any]) -> None:
    """An end that is not ahead is said to be one."""
    with pytest.raises(SourceInvalid) as caught:
        parse(json.dumps({"key": KEY, **more}), NOON)
    assert "expired" in caught.value.message


# How it may end.


@pytest.mark.parametrize("output", ["", "\n", " \n\t\n"])
def test_nothing_is_not_a_key(python: Any, output: str) -> None:
    """A program that prints nothing and says that all is well."""
    error = fails(SourceInvalid, python(f"print({output!r}, end='')"))
    assert "printed nothing" in error.message


@pytest.mark.parametrize("size", [LARGEST_OUTPUT + 1, 10_000_000])
def test_too_much_is_refused_and_the_program_ended(python: Any, size: int) -> None:
    """More than 64 KiB is not read."""
    error = fails(SourceInvalid, python(f"print('canary' + 'x' * {size})"))
    assert "64 KiB" in error.message


def test_a_program_without_an_end_is_ended_at_the_limit(python: Any) -> None:
    """Output for ever is cut off by its size, well before the deadline."""
    error = fails(SourceInvalid, python("while True: print('canary' * 1000)"), timeout="60s")
    assert "64 KiB" in error.message


@pytest.mark.parametrize("status", [1, 2, 75, 127, 255])
def test_a_failure_is_unavailable_whatever_it_printed(python: Any, status: int) -> None:
    """Half an answer and a status is no key; the status is shown and nothing else."""
    code = f"import os, sys; print('{KEY}', flush=True); print('canary', file=sys.stderr)"
    error = fails(SourceUnavailable, python(f"{code}; sys.stderr.flush(); os._exit({status})"))
    assert f"status {status}" in error.message
    assert isinstance(error, SourceUnavailable)
    assert not error.unknown


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_program_that_was_killed_printed_no_whole_key(python: Any, signal: str) -> None:
    """What an out-of-memory killer leaves on stdout may be half a key."""
    code = (
        f"import os, signal; os.write(1, b'sk-canary-half'); os.kill(os.getpid(), signal.{signal})"
    )
    fails(SourceUnavailable, python(code))


@pytest.mark.parametrize("name", ["/no/such/program", "no-such-program-canary-not", "/etc/passwd"])
def test_a_program_that_is_not_there_is_the_configuration_s_fault(name: str) -> None:
    """Somebody has to edit the file; the program is named, its arguments are not."""
    with pytest.raises(ConfigError) as caught:
        issue([name, "--password=canary-2"])
    assert name.rpartition("/")[2] in caught.value.message
    assert "canary-2" not in f"{caught.value!r} {caught.value.hint}"


def test_arguments_are_not_shown_when_it_fails(python: Any) -> None:
    """An argument may be a secret, whatever one thinks of that."""
    fails(SourceUnavailable, [*python("raise SystemExit(3)"), "--password=canary"])


# The deadline.


CHILD = """
import subprocess, sys
code = "import os, sys, time; os.open(sys.argv[1], os.O_WRONLY); os.write(1, b'x'); time.sleep(600)"
command = [sys.executable, "-IS", "-c", code, sys.argv[1]]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.read(1)
"""


@contextmanager
def held(path: Path) -> Iterator[Callable[[float], bool]]:
    """Make a named pipe; yields what waits until it was opened and all who had it have ended."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def ended(seconds: float) -> bool:
        poll = select.poll()
        poll.register(reader, select.POLLHUP)
        return bool(poll.poll(seconds * 1000))

    try:
        yield ended
    finally:
        os.close(reader)


def test_a_slow_program_is_killed_with_its_children(python: Any, tmp_path: Path) -> None:
    """At the deadline nothing of it is left, and its key is not taken."""
    with held(tmp_path / "pipe") as ended:
        code = f"{CHILD}\nprint('{KEY}', flush=True)\nchild.wait()"
        command = [*python(code), str(tmp_path / "pipe")]
        error = fails(SourceUnavailable, command, timeout="1500ms")
        assert ended(10)
    assert "longer than 1.5 s" in error.message


def test_what_a_finished_program_left_behind_is_ended(python: Any, tmp_path: Path) -> None:
    """A child that stays in its group does not outlive the answer."""
    with held(tmp_path / "pipe") as ended:
        code = f"{CHILD}\nprint('{KEY}', flush=True)\nimport os; os._exit(0)"
        credential = issue([*python(code), str(tmp_path / "pipe")])
        assert ended(10)
    assert credential.secret == Secret(KEY)


def test_a_program_that_ignores_signals_is_killed(python: Any) -> None:
    """Nobody can decline the deadline."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    fails(SourceUnavailable, python(code), timeout="500ms")


def test_a_program_that_closes_stdout_and_stays_is_late(python: Any) -> None:
    """It has to end, since only then its status is known."""
    code = f"import os, time; os.write(1, b'{KEY}'); os.close(1); time.sleep(600)"
    fails(SourceUnavailable, python(code), timeout="700ms")


# What it is given.


def seen_by(python: Any, given: Mapping[str, str], **source: Any) -> dict[str, str]:
    """Return the environment of a program that a source runs."""
    code = "import os, binascii, json; e = json.dumps(dict(os.environ))"
    print_it = f"{code}; print(binascii.hexlify(e.encode()).decode())"
    text = issue(python(print_it), given, **source).secret.reveal()
    found: dict[str, str] = json.loads(bytes.fromhex(text))
    found.pop("LC_CTYPE", None)  # Python sets it for itself
    return found


def test_it_is_given_the_listed_variables_and_a_few_more(python: Any) -> None:
    """What every program needs, what is listed, and no secret of anybody else."""
    ours = {
        **PATH,
        "HOME": "/home/x",
        "USER": "x",
        "LOGNAME": "x",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "TMPDIR": "/tmp",
        "VAULT_ADDR": "https://vault.example.com",
        "LITELLM_ADMIN": "sk-canary",
        "HTTPS_PROXY": "http://user:canary@proxy",
    }
    seen = seen_by(python, ours, environment=["VAULT_ADDR", "NOT_SET"])
    hidden = {"LITELLM_ADMIN", "HTTPS_PROXY"}
    assert seen == {name: value for name, value in ours.items() if name not in hidden}


def test_the_environment_of_this_process_is_not_passed_on(
    python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the worker was given counts."""
    monkeypatch.setenv("KB_CANARY", "canary")
    assert seen_by(python, PATH, environment=["KB_CANARY"]) == PATH


def test_it_has_no_stdin_and_no_file_of_ours(python: Any, tmp_path: Path) -> None:
    """It reads the end at once, and inherits neither pipes nor locks."""
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        code = """
import os, sys
assert sys.stdin.read() == ""
open_ = []
for number in range(3, 256):
    try:
        os.fstat(number)
        open_.append(number)
    except OSError:
        pass
print("files:" + ",".join(map(str, open_)))
"""
        ours, theirs = os.pipe()
        os.write(theirs, b"not for it")
        kept = os.dup(0)
        os.dup2(ours, 0)
        try:
            assert issue(python(code)).secret.reveal() == "files:"
        finally:
            os.dup2(kept, 0)
            for descriptor in (ours, theirs, kept):
                os.close(descriptor)


def test_its_stderr_is_seen_by_nobody(python: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Whether it succeeds or fails: a program may show its key there."""
    issue(python(f"import sys; print('{KEY}'); print('canary', file=sys.stderr)"))
    fails(SourceUnavailable, python("import sys; sys.exit('canary')"))
    assert capfd.readouterr() == ("", "")


def test_it_is_found_on_the_path_that_it_is_given(tmp_path: Path) -> None:
    """A program is named as its owner would type it, and no shell reads its arguments."""
    program = tmp_path / "print-key"
    program.write_text('#!/bin/sh\nprintf %s "$1"\n')
    program.chmod(stat.S_IRWXU)
    found = run([str(program), "$HOME;x"], PATH, 10)
    assert found == b"$HOME;x"


# Beside the program.


def test_its_key_is_not_ours_to_revoke_or_find(python: Any) -> None:
    """Somebody else rotates it."""
    source = sources.build(profile(python("pass")), PATH)
    assert (list(source.find("kb")), list(source.sweep("kb"))) == ([], [])
    assert not source.capabilities.revoke
    with pytest.raises(SourceInvalid):
        source.revoke(Lease("x", "command", NOON))
    source.close()


def test_its_key_is_tried_at_the_gateway(python: Any) -> None:
    """The verdict is the data plane's."""
    with DevGateway() as gateway:
        code = f"print({gateway.master_key!r})"
        source = sources.build(profile(python(code), gateway.url), PATH)
        assert source.verify(source.issue("").secret).look is Look.ALIVE
        assert source.verify(Secret(KEY)).look is Look.REFUSED
        source.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    environment = {**PATH, "KB_LISTED": "listed", "KB_OTHER": "canary"}
    pool = Pool(tmp_path, environment, None, {"command": {"KB_LISTED"}})
    yield pool
    pool.close()


def test_a_worker_runs_it_and_reports_in_our_words(python: Any, pool: Pool) -> None:
    """Through the pipe: the key, or an error without the program's output."""
    code = f"import os; print('{KEY}-' + os.environ['KB_LISTED'] + str(len(os.environ)))"
    one = profile(python(code), environment=["KB_LISTED"])
    answer = pool.call("command", "poll", 30.0, profile=one)
    assert answer["credential"]["secret"].startswith(f"{KEY}-listed")
    bad = profile(python("import sys; print('canary'); sys.exit('canary')"))
    with pytest.raises(SourceUnavailable) as caught:
        pool.call("command", "poll", 30.0, profile=bad)
    assert "status 1" in caught.value.message
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"


def test_anthropic_s_own_key_does_not_come_out_of_a_worker(python: Any, pool: Pool) -> None:
    """A program that prints sk-ant-… for another host is refused before anybody is given it."""
    one = profile(python("print('sk-ant-api03-canary')"))
    with pytest.raises(SourceInvalid) as caught:
        pool.call("command", "poll", 30.0, profile=one)
    assert "127.0.0.1" in caught.value.message
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"
