"""Settings files are touched, and nothing else of them changes; what cannot be is said once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.paths import Disk
from keybroker.push import APART_SECONDS, MOST_DIRECTORIES, Push, SettingsFiles

LONG_AGO = 1_000_000_000
TEXT = b'{\r\n\t"apiKeyHelper": "exec x", // not even JSON\n}'


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return path


def settings(directory: Path, content: bytes = TEXT) -> Path:
    """Write a settings file that has not been touched for a long time."""
    directory.mkdir(exist_ok=True)
    file = directory / "settings.json"
    file.write_bytes(content)
    os.utime(file, (LONG_AGO, LONG_AGO))
    return file


def files(state: Path, *directories: Path) -> SettingsFiles:
    """Return what knows these directories."""
    known = SettingsFiles(state)
    for directory in directories:
        known.name(str(directory))
    return known


def was_touched(file: Path) -> bool:
    return file.stat().st_mtime > LONG_AGO


def repeat(step: Callable[[], object], until: Callable[[], bool]) -> None:
    """Do something until it is later by the clock of files, which ticks in milliseconds."""
    deadline = time.monotonic() + 10
    while not until():
        assert time.monotonic() < deadline
        step()


# what is known


def test_a_helper_names_its_client_s_directory(state: Path) -> None:
    """Once it is new, then it is known."""
    known = SettingsFiles(state)

    assert known.known() == []
    assert known.name("/home/you/.claude") is True
    assert known.name("/home/you/.claude") is False
    assert known.name("/home/you/with blank") is True
    assert known.known() == [
        "/home/you/.claude/settings.json",
        "/home/you/with blank/settings.json",
    ]


@pytest.mark.parametrize("directory", ["", ".", "home/you", "~/.claude", "../up", "/home/\0/x"])
def test_what_is_no_absolute_path_is_ignored(state: Path, directory: str) -> None:
    """The daemon's own folder is nobody's."""
    known = SettingsFiles(state)

    assert known.name(directory) is False
    assert known.known() == []


def test_the_least_recently_named_is_forgotten(state: Path, tmp_path: Path) -> None:
    """With what was wrong with its file."""
    known = files(state, *(tmp_path / str(n) for n in range(MOST_DIRECTORIES)))
    known.touch()
    known.name(str(tmp_path / "0"))
    known.name(str(tmp_path / "new"))

    kept = [str(tmp_path / str(n) / "settings.json") for n in (*range(2, MOST_DIRECTORIES), 0)]
    assert known.known() == [*kept, str(tmp_path / "new" / "settings.json")]
    assert sorted(known.off) == sorted(kept[:-1])


def test_directories_outlive_the_daemon(state: Path) -> None:
    """In their order, in a file of ours that only we can read; names that are no text too."""
    odd = os.fsdecode(b"/home/\xff/.claude")
    known = SettingsFiles(state)
    for directory in ("/b", "/a", odd, "/b"):
        known.name(directory)
    assert known.save() is True

    again = SettingsFiles(state)
    again.load()

    record = state / "settings-files.json"
    assert json.loads(record.read_bytes()) == {"v": 1, "directories": ["/a", odd, "/b"]}
    assert record.stat().st_mode & 0o777 == 0o600
    assert again.known() == known.known()
    assert again.name("/a") is False


@pytest.mark.parametrize(
    ("record", "directories"),
    [
        (b"", []),
        (b"\xff\xfe{", []),
        (b"[]", []),
        (b"7", []),
        (b'{"v":1}', []),
        (b'{"v":1,"directories":7}', []),
        (b'{"v":1,"directories":[1,null,["/x"],"relative","/a"]}', ["/a"]),
        (b'{"v":1,"directories":["/a"', []),
        (b'{"v":2,"directories":["/a"],"more":1}', ["/a"]),
    ],
)
def test_a_record_that_is_damaged_is_no_failure(
    state: Path, record: bytes, directories: list[str]
) -> None:
    """What can be read of it is; the helpers name the rest again."""
    (state / "settings-files.json").write_bytes(record)
    known = SettingsFiles(state)
    known.load()

    assert known.known() == [f"{one}/settings.json" for one in directories]


def test_a_record_that_is_absent_or_unreadable_is_no_failure(state: Path) -> None:
    """Nor one that has become a directory."""
    known = SettingsFiles(state)
    known.load()
    (state / "settings-files.json").mkdir()
    known.load()

    assert known.known() == []


def test_a_record_that_is_too_long_is_cut(state: Path) -> None:
    """The bound holds whoever wrote it; the most recently named stay."""
    names = [f"/{n}" for n in range(1000)]
    (state / "settings-files.json").write_text(json.dumps({"v": 1, "directories": names}))
    known = SettingsFiles(state)
    known.load()

    assert known.known() == [f"{one}/settings.json" for one in names[-MOST_DIRECTORIES:]]


def test_a_full_disk_costs_only_the_record(state: Path) -> None:
    """The daemon goes on."""

    class Full(Disk):
        def replace(self, path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    known = SettingsFiles(state, Full())
    known.name("/a")

    assert known.save() is False
    assert known.known() == ["/a/settings.json"]


# when they were changed


def test_the_newest_change_counts(state: Path, tmp_path: Path) -> None:
    """Whatever was changed: contents, times or mode; a file that is absent is not asked."""
    old, new = settings(tmp_path / "old"), settings(tmp_path / "new")
    known = files(state, old.parent, new.parent, tmp_path / "absent")

    assert known.changed_at() == max(old.stat().st_ctime, new.stat().st_ctime)
    before = known.changed_at()
    repeat(lambda: old.chmod(0o640), lambda: known.changed_at() != before)
    assert known.changed_at() == old.stat().st_ctime
    assert old.stat().st_mtime == LONG_AGO


def test_no_file_has_no_change(state: Path, tmp_path: Path) -> None:
    """Neither without a directory nor in one that has none."""
    assert files(state).changed_at() is None
    assert files(state, tmp_path).changed_at() is None


def test_a_link_that_is_led_elsewhere_is_a_change(state: Path, tmp_path: Path) -> None:
    """Even to an old file; and so is a change of the file that it leads to."""
    one, two = settings(tmp_path / "one"), settings(tmp_path / "two")
    directory = tmp_path / "config"
    directory.mkdir()
    link = directory / "settings.json"
    link.symlink_to(one)
    known = files(state, directory)

    def lead_to_two() -> None:
        link.unlink()
        link.symlink_to(two)

    assert known.changed_at() == link.lstat().st_ctime
    repeat(lambda: os.utime(one), lambda: one.stat().st_ctime > link.lstat().st_ctime)
    assert known.changed_at() == one.stat().st_ctime
    repeat(lead_to_two, lambda: link.lstat().st_ctime > one.stat().st_ctime)
    assert known.changed_at() == link.lstat().st_ctime
    link.unlink()
    link.symlink_to(tmp_path / "nothing")
    assert known.changed_at() == link.lstat().st_ctime


def test_our_own_touch_is_a_change(state: Path, tmp_path: Path) -> None:
    """So that the asks that follow it are not suspicious."""
    file = settings(tmp_path / "config")
    known = files(state, file.parent)
    before = known.changed_at()

    repeat(known.touch, lambda: known.changed_at() != before)

    assert known.changed_at() == file.stat().st_ctime == file.lstat().st_ctime
    assert before is not None
    assert file.stat().st_ctime > before


# touching


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o400, 0o444])
def test_only_the_times_change(state: Path, tmp_path: Path, mode: int) -> None:
    """Contents, inode, mode and owner stay, and nothing is left beside it."""
    file = settings(tmp_path / "config")
    file.chmod(mode)
    before = file.stat()

    assert files(state, file.parent).touch() == []

    after = file.stat()
    assert after.st_mtime > LONG_AGO
    assert file.read_bytes() == TEXT
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_gid, after.st_nlink) == (
        *(before.st_ino, before.st_mode, before.st_uid, before.st_gid, before.st_nlink),
    )
    assert list(file.parent.iterdir()) == [file]


def test_a_link_is_followed(state: Path, tmp_path: Path) -> None:
    """As synced dotfiles have it: the file is touched, and the link stays a link."""
    file = settings(tmp_path / "dotfiles")
    directory = tmp_path / "config"
    directory.mkdir()
    (directory / "settings.json").symlink_to(file)
    known = files(state, directory)

    assert known.touch() == []
    assert was_touched(file)
    assert (directory / "settings.json").is_symlink()


def test_no_file_is_made(state: Path, tmp_path: Path) -> None:
    """Neither the file, nor its directory, nor what a link leads to."""
    empty, linked = tmp_path / "empty", tmp_path / "linked"
    empty.mkdir()
    linked.mkdir()
    (linked / "settings.json").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_bytes(b"")
    directories = [empty, linked, tmp_path / "absent", tmp_path / "file"]
    known = files(state, *directories)

    failed = known.touch()

    assert failed == [(f"{one}/settings.json", "does not exist") for one in directories]
    assert known.off == dict(failed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "linked", "state"]
    assert list(empty.iterdir()) == []


def test_an_absent_file_is_tried_again_when_it_is_named_again(state: Path, tmp_path: Path) -> None:
    """Not before: a client that makes its file asks its helper too."""
    known = files(state, tmp_path / "config")
    assert len(known.touch()) == 1
    assert known.touch() == []
    file = settings(tmp_path / "config")
    known.touch()
    assert not was_touched(file)

    assert known.name(str(file.parent)) is False

    assert known.off == {}
    assert known.touch() == []
    assert was_touched(file)


def test_another_s_file_is_left_alone(state: Path, tmp_path: Path) -> None:
    """Also behind a link of ours, also for root; naming it again changes nothing."""
    directory = tmp_path / "config"
    directory.mkdir()
    if os.geteuid() == 0:
        foreign = settings(tmp_path / "foreign")
        os.chown(foreign, 12345, -1)
    else:
        foreign = Path("/etc/passwd")
    (directory / "settings.json").symlink_to(foreign)
    before = foreign.stat().st_mtime
    known = files(state, directory)

    failed = known.touch()
    known.name(str(directory))

    assert failed == [(f"{directory}/settings.json", "belongs to another user")]
    assert known.off == dict(failed)
    assert known.touch() == []
    assert foreign.stat().st_mtime == before


def test_what_is_no_file_is_left_alone(state: Path, tmp_path: Path) -> None:
    """A directory, and a pipe that nobody writes, which holds nobody up."""
    directory, pipe, loop = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    (directory / "settings.json").mkdir(parents=True)
    pipe.mkdir()
    os.mkfifo(pipe / "settings.json")
    loop.mkdir()
    (loop / "settings.json").symlink_to("settings.json")

    assert files(state, directory, pipe, loop).touch() == [
        (f"{directory}/settings.json", "is not a regular file"),
        (f"{pipe}/settings.json", "is not a regular file"),
        (f"{loop}/settings.json", "is a link that leads nowhere"),
    ]


UNREADABLE = """
import os, sys
from pathlib import Path
from keybroker.push import SettingsFiles
directory = sys.argv[1]
if os.geteuid() == 0:
    os.chown(directory + "/settings.json", 12345, -1)
    os.seteuid(12345)
files = SettingsFiles(Path("/nowhere"))
files.name(directory)
print(files.touch()[0][1])
"""


def test_a_file_that_may_not_be_read_is_left_alone() -> None:
    """The owner may have meant it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="kb-") as folder:  # a folder that another may enter
        Path(folder).chmod(0o755)
        file = settings(Path(folder))
        file.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE, folder], capture_output=True, text=True, check=True
        )
        assert done.stdout == "may not be read by this user\n"
        assert not was_touched(file)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EPERM, "may not be touched by this user"),
        (errno.EROFS, "is on a read-only file system"),
        (errno.EIO, "cannot be touched (Input/output error)"),
    ],
)
def test_a_file_that_cannot_be_touched_is_switched_off(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    """With the reason in words; the others are touched all the same, and it when it is cleared."""
    broken, whole = settings(tmp_path / "broken"), settings(tmp_path / "whole")
    known = files(state, broken.parent, whole.parent)
    real, fails = os.utime, [broken.stat().st_ino]

    def utime(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino in fails:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "utime", utime)
    descriptors = len(os.listdir("/dev/fd"))

    assert known.touch() == [(str(broken), reason)]
    assert was_touched(whole)
    assert known.touch() == []
    assert known.off == {str(broken): reason}
    assert len(os.listdir("/dev/fd")) == descriptors
    fails.clear()
    known.off.clear()
    assert known.touch() == []
    assert was_touched(broken)


# when to touch


def test_a_replaced_key_is_pushed_at_once(state: Path, tmp_path: Path) -> None:
    """And once; before it there is nothing to do."""
    file = settings(tmp_path / "config")
    push = Push(files(state, file.parent))
    assert push.due() is None
    assert push.run(99.0) == []
    assert not was_touched(file)

    push.replaced(100.0)
    assert push.due() == 100.0
    push.run(100.0)

    assert was_touched(file)
    assert push.due() is None


def test_several_keys_at_a_time_are_one_touch(state: Path, tmp_path: Path) -> None:
    """Twenty profiles that rotate together do not make their clients ask twenty times."""
    file = settings(tmp_path / "config")
    push = Push(files(state, file.parent))
    for n in range(20):
        push.replaced(100.0 + n / 100)
    assert push.due() == 100.0
    push.run(100.2)
    push.replaced(100.3)
    push.replaced(101.9)
    assert push.due() == 102.2
    os.utime(file, (LONG_AGO, LONG_AGO))
    push.run(102.1)
    assert not was_touched(file)
    push.run(102.2)
    assert was_touched(file)
    assert push.due() is None
    push.replaced(110.0)
    assert push.due() == 110.0


def test_a_push_says_what_could_not_be_touched(state: Path, tmp_path: Path) -> None:
    """Once for each file."""
    push = Push(files(state, tmp_path / "absent"))
    push.replaced(1.0)
    assert push.run(1.0) == [(f"{tmp_path}/absent/settings.json", "does not exist")]
    push.replaced(5.0)
    assert push.run(5.0) == []


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=60))
def test_touches_are_never_closer_than_2_s_and_no_key_is_forgotten(
    turns: list[tuple[bool, float]],
) -> None:
    """However replacements and turns of the loop fall; none waits for longer than 2 s."""

    class Counted(SettingsFiles):
        def touch(self) -> list[tuple[str, str]]:
            touched.append(now)
            return []

    touched: list[float] = []
    now, waiting = 100.0, None
    push = Push(Counted(Path("/nowhere")))
    for replaced, step in turns:
        now += step
        if replaced:
            push.replaced(now)
            waiting = now if waiting is None else waiting
        due = push.due()
        assert (due is None) == (waiting is None)
        if due is not None and waiting is not None:
            assert waiting <= due <= waiting + APART_SECONDS
        count = len(touched)
        push.run(now)
        if len(touched) > count:
            waiting = None

    assert all(later >= one + APART_SECONDS for one, later in pairwise(touched))
