"""Where things live, and who else can get at them: nobody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import paths
from keybroker.errors import ConfigError, JournalError
from keybroker.paths import Disk, private_directory, state_directory, take_owner_lock


@pytest.fixture
def masked() -> Iterator[None]:
    """The most generous umask: modes are given, not left over."""
    old = os.umask(0)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def refused(path: Path) -> tuple[str, str | None]:
    with pytest.raises(ConfigError) as error:
        private_directory(path)
    return error.value.message, error.value.hint


# directories


@pytest.mark.usefixtures("masked")
def test_a_private_directory_is_made_with_its_mode(tmp_path: Path) -> None:
    """0700 whatever the umask, and made a second time without complaint."""
    path = tmp_path / "a" / "b"

    assert private_directory(path) == path
    assert private_directory(path) == path
    assert mode(path) == 0o700


@pytest.mark.parametrize("open_to", [0o710, 0o701, 0o750, 0o755, 0o770, 0o777])
def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path, open_to: int) -> None:
    """With the command that mends it; it is not changed behind anyone's back."""
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(open_to)

    assert refused(path) == (f"{path}: others can enter it", f"type: chmod 700 {path}")
    assert mode(path) == open_to


def test_a_link_to_a_directory_is_not_one(tmp_path: Path) -> None:
    """Even to one of our own: what it points to can be changed."""
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")

    assert refused(link) == (f"{link}: is not a directory", None)


def test_a_file_in_the_directory_s_place_is_refused(tmp_path: Path) -> None:
    """And what cannot be made below one."""
    file = tmp_path / "file"
    file.touch()

    assert refused(file) == (f"{file}: is not a directory", None)
    assert refused(file / "below" / "it")[0] == (
        f"{file / 'below' / 'it'}: cannot be created (Not a directory)"
    )


def test_a_directory_of_another_user_is_refused() -> None:
    """The root of the file system is root's; to root, a directory of somebody else is not."""
    program = (
        "import os; from pathlib import Path; from keybroker.errors import ConfigError;"
        "from keybroker.paths import private_directory\n"
        "if os.geteuid() == 0: os.seteuid(12345)\n"
        "try: private_directory(Path('/'))\n"
        "except ConfigError as error: print(error.message)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "/: belongs to another user\n"


# files


@pytest.mark.usefixtures("masked")
def test_files_are_made_with_their_mode(tmp_path: Path) -> None:
    """0600 from the first byte on, whatever the umask."""
    disk = Disk()
    disk.append(tmp_path / "appended", b"a")
    disk.replace(tmp_path / "replaced", b"b")
    with disk.lock(tmp_path / "locked"):
        pass

    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
        "appended": 0o600,
        "replaced": 0o600,
        "locked.lock": 0o600,
    }


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Whole, or only the end; nothing is None."""
    disk, file = Disk(), tmp_path / "f"

    absent = disk.read(file)
    disk.append(file, b"one")
    disk.append(file, b"two")

    assert (absent, disk.read(file), disk.read(file, 4), disk.read(file, 99)) == (
        None,
        b"onetwo",
        b"etwo",
        b"onetwo",
    )


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """Whoever has the old one open reads it to its end; no draft is left."""
    disk, file = Disk(), tmp_path / "f"
    disk.replace(file, b"old")
    with file.open("rb") as reader:
        disk.replace(file, b"new")
        assert reader.read() == b"old"

    assert disk.read(file) == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_replacement_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    """Whatever goes wrong between the first byte and the last."""
    Disk().replace(tmp_path / "f", b"old")
    program = (
        "import resource, sys; from pathlib import Path; from keybroker.paths import Disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: Disk().replace(Path(sys.argv[1]), b'x' * 100)\n"
        "except OSError as error: print(error.errno)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "f")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == f"{errno.EFBIG}\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


def test_a_draft_that_a_crash_left_is_no_obstacle(tmp_path: Path) -> None:
    """Even one that is a link to somewhere else: it is removed, not written through."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / f".f.{os.getpid()}").symlink_to(precious)

    Disk().replace(tmp_path / "f", b"new")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "f": b"new",
        "precious": b"precious",
    }


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """What it points to stays as it is."""
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_bytes(b"precious")
    link.symlink_to(precious)

    Disk().replace(link, b"new")

    assert (link.is_symlink(), link.read_bytes(), precious.read_bytes()) == (
        False,
        b"new",
        b"precious",
    )


@pytest.mark.parametrize(
    "act",
    [
        lambda path: Disk().read(path),
        lambda path: Disk().append(path, b"x"),
        lambda path: Disk().sync(path),
        lambda path: Disk().truncate(path, 0),
    ],
    ids=["read", "append", "sync", "truncate"],
)
def test_no_operation_follows_a_link(tmp_path: Path, act: object) -> None:
    """A file of ours that became a link is somebody else's doing."""
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_bytes(b"precious")
    link.symlink_to(precious)

    assert callable(act)
    with pytest.raises(OSError, match="symbolic link") as error:
        act(link)

    assert error.value.errno == errno.ELOOP
    assert precious.read_bytes() == b"precious"


def test_a_file_that_is_not_there_is_removed(tmp_path: Path) -> None:
    """Twice is as good as once."""
    disk, file = Disk(), tmp_path / "f"
    disk.replace(file, b"x")

    disk.remove(file)
    disk.remove(file)

    assert list(tmp_path.iterdir()) == []


def test_a_file_s_lock_keeps_others_waiting(tmp_path: Path) -> None:
    """What two processes read, change and write comes out as if one had done it."""
    file = tmp_path / "count"
    Disk().replace(file, b"0")
    program = (
        "import sys; from pathlib import Path; from keybroker.paths import Disk\n"
        "disk, file = Disk(), Path(sys.argv[1])\n"
        "for _ in range(100):\n"
        "  with disk.lock(file): file.write_text(str(int(file.read_text()) + 1))"
    )

    counters = [subprocess.Popen([sys.executable, "-c", program, str(file)]) for _ in range(3)]

    assert [counter.wait(30) for counter in counters] == [0, 0, 0]
    assert file.read_text() == "300"


# the owner lock


def free(state: Path) -> bool:
    """Say whether another process could become the owner."""
    program = (
        "import sys; from pathlib import Path; from keybroker.paths import take_owner_lock;"
        "print(take_owner_lock(Path(sys.argv[1])) is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(state)], capture_output=True, text=True, check=True
    )
    return done.stdout == "True\n"


def test_one_process_owns_a_state_directory(tmp_path: Path) -> None:
    """Until it gives the lock back."""
    state = tmp_path / "state"
    lock = take_owner_lock(state)
    assert lock is not None
    held = free(state)
    os.close(lock)

    assert (held, free(state)) == (False, True)


def test_the_owner_is_not_its_own_successor(tmp_path: Path) -> None:
    """A second attempt of the same process finds the lock taken."""
    lock = take_owner_lock(tmp_path / "state")
    second = take_owner_lock(tmp_path / "state")
    assert lock is not None
    os.close(lock)

    assert second is None


def test_a_worker_that_inherited_the_lock_holds_it(tmp_path: Path) -> None:
    """A worker may still mint when its broker has died: nobody else may then."""
    state = tmp_path / "state"
    lock = take_owner_lock(state)
    assert lock is not None
    worker = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=[lock],
    )
    os.close(lock)
    while_it_runs = free(state)
    worker.communicate(timeout=10)

    assert (while_it_runs, free(state)) == (False, True)


def test_a_program_that_is_started_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """Only who is meant to holds it: a forgotten child would keep everybody out."""
    state = tmp_path / "state"
    lock = take_owner_lock(state)
    assert lock is not None
    other = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        close_fds=False,
    )
    os.close(lock)
    found = free(state)
    other.communicate(timeout=10)

    assert found is True


def test_a_lock_that_cannot_be_taken_is_said(tmp_path: Path) -> None:
    """A directory in its place, or a link, is an error of ours with its path and reason."""
    state = private_directory(tmp_path / "state")
    (state / paths.OWNER_LOCK).mkdir()

    with pytest.raises(JournalError) as error:
        take_owner_lock(state)

    assert error.value.message == f"{state / paths.OWNER_LOCK}: cannot be locked (Is a directory)"


# places


@pytest.mark.parametrize(
    ("variables", "config", "state"),
    [
        ({}, "/home/me/.config/keybroker", "/home/me/.local/state/keybroker"),
        (
            {"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s"},
            "/c/keybroker",
            "/s/keybroker",
        ),
        (
            {"XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": ""},
            "/home/me/.config/keybroker",
            "/home/me/.local/state/keybroker",
        ),
    ],
    ids=["defaults", "absolute", "relative"],
)
def test_files_are_where_xdg_has_them(variables: dict[str, str], config: str, state: str) -> None:
    """Relative values are ignored, as the specification has it."""
    environment = {"HOME": "/home/me", **variables}
    system = "/etc/keybroker"
    if sys.platform == "darwin":  # which has one place, whatever XDG says
        system = "/Library/Application Support/keybroker"
        config = state = f"/home/me{system}"

    assert paths.config_files(environment) == (
        Path(system) / "config.toml",
        Path(config) / "config.toml",
    )
    assert state_directory(environment).parent == Path(state)


def test_a_host_has_a_state_directory_of_its_own() -> None:
    """Sixteen hex digits made from the machine's id, which itself is not handed on."""
    name = state_directory({"HOME": "/home/me"}).name
    machine = Path("/etc/machine-id")

    assert len(bytes.fromhex(name)) == 8
    assert name not in (machine.read_text() if machine.exists() else "")


@pytest.mark.parametrize("environment", [{}, {"HOME": ""}, {"HOME": "relative"}])
def test_no_home_is_said(environment: dict[str, str]) -> None:
    """With the variables that help."""
    with pytest.raises(ConfigError) as error:
        state_directory(environment)

    assert (error.value.message, error.value.hint) == (
        "paths: HOME is not set",
        "set HOME, or XDG_STATE_HOME and KEYBROKER_CONFIG",
    )


@pytest.mark.parametrize("variable", ["/run/user/1000", "/somewhere else", "/"])
def test_the_socket_is_in_the_session_s_folder(variable: str) -> None:
    """Where XDG_RUNTIME_DIR says, on every system."""
    environment = {"XDG_RUNTIME_DIR": variable, "HOME": "/home/me"}

    assert paths.runtime_directory(environment) == Path(variable) / "keybroker"
    assert paths.socket_path(environment) == Path(variable) / "keybroker" / "s"


@pytest.mark.parametrize("variable", [None, "", "run", "./run"])
def test_without_a_session_s_folder_the_user_s_own_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    """A relative value counts as none. What is there must be ours, and not a link."""
    environment = {"HOME": "/home/me"} | ({} if variable is None else {"XDG_RUNTIME_DIR": variable})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(paths, "RUN_USER", str(tmp_path))
    uid = os.geteuid()
    ours, elsewhere = tmp_path / str(uid), Path(f"/tmp/keybroker-{uid}")

    assert paths.runtime_directory(environment) == elsewhere
    ours.symlink_to(tmp_path)
    assert paths.runtime_directory(environment) == elsewhere
    ours.unlink()
    ours.touch()
    assert paths.runtime_directory(environment) == elsewhere
    ours.unlink()
    ours.mkdir()
    assert paths.runtime_directory(environment) == ours / "keybroker"
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    (tmp_path / str(uid + 1)).mkdir()
    assert paths.runtime_directory(environment) == Path(f"/tmp/keybroker-{uid + 1}")


def test_a_mac_has_its_socket_among_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no folder of a session there; without a home there is no place."""
    monkeypatch.setattr(sys, "platform", "darwin")

    found = paths.runtime_directory({"HOME": "/Users/me"})
    with pytest.raises(ConfigError, match="HOME is not set"):
        paths.runtime_directory({})

    assert found == Path("/Users/me/Library/Caches/keybroker")


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    """Counted in bytes: a name outside ASCII is longer than it looks."""
    below = len("/keybroker/s")
    fits = "/" + "a" * (paths.LONGEST_SOCKET_PATH - below - 1)
    wide = "/" + "ä" * (len(fits) // 2 + 1)

    assert len(str(paths.socket_path({"XDG_RUNTIME_DIR": fits}))) == 103
    for long in (f"{fits}a", wide):
        with pytest.raises(ConfigError) as error:
            paths.socket_path({"XDG_RUNTIME_DIR": long})
        assert error.value.message == (
            f"{long}/keybroker/s: too long for a socket (at most 103 bytes)"
        )
        assert error.value.hint == "set XDG_RUNTIME_DIR to a shorter folder"


def test_an_installation_keeps_its_name(tmp_path: Path) -> None:
    """Its keys are known by it at the gateway; a lost state directory comes back to the same."""
    first = paths.instance(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "lost")
    again = paths.instance(tmp_path / "one")
    (tmp_path / "one" / paths.INSTANCE).write_bytes(b"abcd1234")

    assert len(bytes.fromhex(first)) == 4
    assert again == first
    assert paths.instance(tmp_path / "one") == "abcd1234"


def test_two_state_directories_are_two_installations(tmp_path: Path) -> None:
    """Neither sweeps the keys of the other."""
    assert paths.instance(tmp_path / "one") != paths.instance(tmp_path / "two")


@pytest.mark.parametrize("damaged", [b"", b"abc", b"../../..", b"\xff" * 8, b"x" * 9])
def test_a_damaged_name_is_made_anew(tmp_path: Path, damaged: bytes) -> None:
    """It goes into labels and into what is swept."""
    name = paths.instance(tmp_path / "one")
    (tmp_path / "one" / paths.INSTANCE).write_bytes(damaged)

    assert paths.instance(tmp_path / "one") == name
