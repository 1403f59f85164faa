"""Who was given what is written down line by line; a line that was changed is found."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from keybroker.answering import Answers
from keybroker.audit import KEPT, LARGEST, Audit, asker
from keybroker.config import Config
from keybroker.credential import Secret
from keybroker.errors import JournalError
from keybroker.handout import Handout
from keybroker.journal import write_time
from keybroker.paths import AUDIT, Disk
from keybroker.push import SettingsFiles

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def test_a_line_for_several_says_from_when_to_when(tmp_path: Path) -> None:
    """It is written a moment later, when the key may have been revoked already."""
    audit = Audit(tmp_path)
    answers = Answers(Config({}, None, "file", ()), audit, SettingsFiles(tmp_path), {})
    key = Handout(Secret("sk-0123456789"), None, 0.0, 0.0)
    for seconds in (0.0, 1.0, 1.5):
        answers._give("work", key, None, 1000, NOON.timestamp() + seconds)
    answers._give("home", key, None, 1000, NOON.timestamp() + 2)
    answers.write_audit()

    found = [[line.get(name) for name in ("at", "times", "until")] for line in audit.read()]
    assert found == [
        [write_time(NOON), 3, write_time(NOON + timedelta(seconds=1.5))],
        [write_time(NOON + timedelta(seconds=2)), None, None],
    ]


def test_a_line_says_who_was_given_what(tmp_path: Path) -> None:
    """When, which profile, which fingerprint, and the facts that the writer knew."""
    Audit(tmp_path).write(NOON, "given", "work", fingerprint="3f9a1c02", uid=1000, pid=4711)

    [line] = Audit(tmp_path).read()

    del line["prev"]
    assert line == {
        "n": 1,
        "at": "2026-11-21T12:00:00.000000Z",
        "event": "given",
        "profile": "work",
        "fingerprint": "3f9a1c02",
        "uid": 1000,
        "pid": 4711,
    }


def test_the_log_is_its_owner_s_alone(tmp_path: Path) -> None:
    """It says when somebody was at work."""
    Audit(tmp_path).write(NOON, "given", "work")

    assert (tmp_path / AUDIT).stat().st_mode & 0o777 == 0o600


def test_a_tampered_line_is_named(tmp_path: Path) -> None:
    """The line after it does not follow from it."""
    audit = Audit(tmp_path)
    for number in range(4):
        audit.write(NOON, "given", "work", pid=number)
    text = audit.path.read_text()
    audit.path.write_text(text.replace('"pid":1', '"pid":9'))

    with pytest.raises(JournalError) as error:
        audit.read()

    said = "line 4 does not follow the one before it"
    assert error.value.message == f"audit: {audit.path}: {said}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_line_that_cannot_be_written_costs_nobody_a_key(tmp_path: Path, number: int) -> None:
    """A full disk is no reason to stop work."""

    class Broken(Disk):
        def append(self, path: Path, data: bytes) -> None:
            raise OSError(number, os.strerror(number))

    Audit(tmp_path, Broken()).write(NOON, "given", "work")

    assert Audit(tmp_path).read() == []


def test_a_damaged_log_costs_nobody_a_key(tmp_path: Path) -> None:
    """It is not written to, and stays as it was found."""
    (tmp_path / AUDIT).write_bytes(b"rubbish\n")

    Audit(tmp_path).write(NOON, "given", "work")

    assert (tmp_path / AUDIT).read_bytes() == b"rubbish\n"


def test_a_large_file_is_set_aside(tmp_path: Path) -> None:
    """A few older files are kept, oldest first; what is older than those goes."""
    audit = Audit(tmp_path)
    written = (KEPT + 2) * LARGEST // 60_000
    for number in range(written):
        audit.write(NOON, "given", "work", number=number, filler="x" * 60_000)
    numbers = [line["number"] for line in audit.read()]

    assert [path.name for path in audit.files()] == [
        *(f"{AUDIT}.{n}" for n in range(KEPT, 0, -1)),
        AUDIT,
    ]
    assert numbers == list(range(numbers[0], written))
    assert numbers[0] > 0


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from keybroker import audit

audit.LARGEST = 2000
log = audit.Audit(Path(sys.argv[1]))
for number in range(200):
    log.write(datetime(2026, 11, 21, tzinfo=UTC), "given", "work", pid=number)
"""


def test_processes_that_write_at_once_agree_when_a_file_is_full(tmp_path: Path) -> None:
    """The daemon and its workers set it aside between lines: each file is whole, none is lost."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command) for _ in range(3)]
    assert [one.wait(30) for one in writers] == [0, 0, 0]
    audit = Audit(tmp_path)

    assert audit.read()
    assert len(audit.files()) == KEPT + 1
    assert all(one.stat().st_size >= 2000 for one in audit.files()[:-1])


def test_a_tampered_line_in_an_older_file_is_named(tmp_path: Path) -> None:
    """Each file's chain is checked."""
    audit = Audit(tmp_path)
    audit.write(NOON, "given", "work", pid=1)
    audit.write(NOON, "given", "work", pid=2)
    older = tmp_path / f"{AUDIT}.1"
    older.write_text(audit.path.read_text().replace('"pid":1', '"pid":9'))

    with pytest.raises(JournalError) as error:
        audit.read()

    assert error.value.message.startswith(f"audit: {older}: line 3 ")


def test_the_asker_is_the_process_that_waits() -> None:
    """Its uid, its pid and, where the system tells, its name."""
    program = "from keybroker.audit import asker; print(asker())"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    comm = Path(f"/proc/{os.getpid()}/comm")
    name = comm.read_text().strip() if comm.exists() else "?"
    assert done.stdout == f"{ {'uid': os.getuid(), 'pid': os.getpid(), 'program': name} }\n"
    assert asker()["pid"] == os.getppid()
