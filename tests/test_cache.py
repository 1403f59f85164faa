"""A credential on disk is sealed, bound to its profile, and may be lost but not misread."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.cache import MAGIC, Cache, Cached, find_wrap_key
from keybroker.clock import Instant
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret
from keybroker.errors import CacheError, CacheLocked, CacheUnreadable, ConfigError, KeybrokerError
from keybroker.paths import CACHE, WRAP_KEY, Disk
from keybroker.values import replace

NOON = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)
CANARY = "sk-canary-Zx81QpLmWvUt"
KEY, OTHER_KEY = Secret("00112233" * 8), Secret("aabbccdd" * 8)
CACHED = Cached(
    Credential(
        Secret(CANARY),
        Lease("token-1", "litellm", NOON, NOON + timedelta(hours=12), revocable=True),
    ),
    "kb-3f9a1c02-work-01k",
    Issuer("litellm", "https://llm.example.com", Reference("env", "ADMIN"), "/ca.pem"),
    "models",
    Instant(NOON, 1234.5, "boot-1"),
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with one sealed credential."""
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    Cache(path, KEY).save("work", CACHED)
    return path


@pytest.fixture
def file(state: Path) -> Path:
    return state / CACHE / "work.sealed"


def unreadable(state: Path, profile: str = "work", key: Secret = KEY) -> str:
    with pytest.raises(CacheUnreadable) as error:
        Cache(state, key).load(profile)
    assert CANARY not in str(error.value)
    return error.value.message


def test_what_is_sealed_is_opened(state: Path) -> None:
    """Secret, lease, label, issuer, method and clocks come back as they were."""
    assert Cache(state, KEY).load("work") == CACHED


@pytest.mark.parametrize(
    "cached",
    [
        replace(CACHED, issuer=Issuer("static", "http://localhost")),
        replace(CACHED, anchor=Instant(NOON, 0.0, "")),
        replace(CACHED, credential=Credential(Secret("x"), Lease("", "static", NOON, None))),
        replace(CACHED, issuer=Issuer("command", "u", Reference("command", ("a", "b")))),
    ],
    ids=["no admin", "no boot", "no end", "a command"],
)
def test_what_is_missing_stays_missing(state: Path, cached: Cached) -> None:
    """Each field that may be empty."""
    Cache(state, KEY).save("work", cached)

    assert Cache(state, KEY).load("work") == cached


def test_nothing_is_there_before_it_was_saved_and_after_it_was_forgotten(state: Path) -> None:
    """Not there is None, not an error; forgetting twice is fine."""
    cache = Cache(state, KEY)
    before = cache.load("home")
    cache.forget("work")
    cache.forget("work")

    assert (before, cache.load("work")) == (None, None)


def test_a_sealed_file_shows_nothing(file: Path) -> None:
    """Neither the key nor its fingerprint, label or address is in it."""
    data = file.read_bytes()

    assert data.startswith(MAGIC)
    for text in (CANARY, CACHED.credential.secret.fingerprint, CACHED.label, "llm.example.com"):
        assert text.encode() not in data


def test_sealing_twice_gives_two_files(state: Path, file: Path) -> None:
    """A nonce is never used again."""
    first = file.read_bytes()
    Cache(state, KEY).save("work", CACHED)

    assert file.read_bytes()[len(MAGIC) :][:12] != first[len(MAGIC) :][:12]


def test_sealed_files_are_their_owner_s_alone(state: Path, file: Path) -> None:
    """0600 in 0700, and nothing else beside them."""
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [path.name for path in state.rglob("*")] == [CACHE, "work.sealed"]


def test_another_key_does_not_open_it(state: Path, file: Path) -> None:
    """Said with the file, and no word of what was in it."""
    said = f"cache: {file}: cannot be opened with this key"

    assert unreadable(state, key=OTHER_KEY) == said


def test_another_profile_s_file_is_not_taken(state: Path, file: Path) -> None:
    """A file that was copied to another name was not sealed for it."""
    file.rename(file.with_name("home.sealed"))

    assert "cannot be opened" in unreadable(state, "home")


@pytest.mark.parametrize(
    "data", [b"", MAGIC, MAGIC + b"x" * 5, MAGIC + b"x" * 40, b"x" * 200, MAGIC[:-2]]
)
def test_rubbish_is_unreadable(state: Path, file: Path, data: bytes) -> None:
    """Whatever stands in the file, the error is the same."""
    file.write_bytes(data)

    assert unreadable(state) == f"cache: {file}: cannot be opened with this key"


def test_every_flipped_bit_and_every_cut_is_seen(state: Path, file: Path) -> None:
    """The whole file is authenticated, its first line included."""
    whole = file.read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        file.write_bytes(flipped)
        assert "cannot be opened" in unreadable(state)
        file.write_bytes(whole[:at])
        assert "cannot be opened" in unreadable(state)
    file.write_bytes(whole + b"\0")
    assert "cannot be opened" in unreadable(state)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    Cache(path, KEY).save("work", CACHED)
    return path


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_unreadable(scratch: Path, data: bytes, headed: bool) -> None:
    """Nothing but CacheUnreadable comes out of a file."""
    (scratch / CACHE / "work.sealed").write_bytes((MAGIC if headed else b"") + data)

    assert "cannot be opened" in unreadable(scratch)


def test_without_a_key_nothing_is_kept_and_nothing_opened(state: Path) -> None:
    """Memory only: saving does nothing, and what another kept is locked."""
    cache = Cache(state, None)
    cache.save("home", CACHED)
    with pytest.raises(CacheLocked) as error:
        cache.load("work")

    assert not (state / CACHE / "home.sealed").exists()
    assert error.value.exit_status == 69


def test_a_full_disk_is_said_and_leaves_the_old_file(state: Path) -> None:
    """The current key stays where it was."""

    class Full(Disk):
        def replace(self, path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError) as error:
        Cache(state, KEY, Full()).save("work", CACHED)

    assert error.value.message.endswith("cannot be written (No space left on device)")
    assert Cache(state, KEY).load("work") == CACHED


def test_a_link_in_the_file_s_place_is_not_followed(state: Path, file: Path) -> None:
    """It is unreadable, and replaced by the next save."""
    elsewhere = file.rename(state / "elsewhere")
    file.symlink_to(elsewhere)

    assert "cannot be read" in unreadable(state)
    Cache(state, KEY).save("work", CACHED)
    assert Cache(state, KEY).load("work") == CACHED


def test_a_cache_directory_that_others_can_enter_is_refused(state: Path, file: Path) -> None:
    """With the command that mends it."""
    file.parent.chmod(0o755)

    with pytest.raises(ConfigError) as error:
        Cache(state, KEY).save("work", CACHED)

    assert error.value.hint == f"type: chmod 700 {file.parent}"


# what seals it


def wrap_file(state: Path) -> Path:
    return state / WRAP_KEY


def test_a_key_file_is_made_once(state: Path) -> None:
    """32 bytes in hex, its owner's alone, the same for whoever asks later."""
    first, second = (find_wrap_key("file", state, {}) for _ in range(2))

    assert (first.origin, second.origin) == ("key file", "key file")
    assert first.key is not None
    assert first.key == second.key
    assert len(bytes.fromhex(first.key.reveal())) == 32
    assert wrap_file(state).stat().st_mode & 0o777 == 0o600


ASK = """
import sys
from pathlib import Path
from keybroker.cache import find_wrap_key
from keybroker.values import replace
print("ready", flush=True)
sys.stdin.readline()
print(find_wrap_key(sys.argv[2], Path(sys.argv[1]), {}).key.reveal())
"""


def test_processes_that_ask_at_once_get_one_key(state: Path) -> None:
    """Of several first ones: what the loser sealed could not be opened again."""
    for _ in range(3):
        wrap_file(state).unlink(missing_ok=True)
        askers = [
            subprocess.Popen(
                [sys.executable, "-c", ASK, str(state), "file"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(6)
        ]
        for asker in askers:
            assert asker.stdout is not None
            assert asker.stdout.readline() == "ready\n"
        for asker in askers:  # all at once, each waiting in its own readline
            assert asker.stdin is not None
            asker.stdin.write("go\n")
            asker.stdin.flush()
        keys = {asker.communicate(timeout=30)[0] for asker in askers}

        assert keys == {wrap_file(state).read_text() + "\n"}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused(state: Path, mode: int) -> None:
    """With the command that mends it, and without its content."""
    key = find_wrap_key("file", state, {}).key
    wrap_file(state).chmod(mode)

    with pytest.raises(ConfigError) as error:
        find_wrap_key("file", state, {})

    assert error.value.message == f"{wrap_file(state)}: others can read it"
    assert error.value.hint == f"type: chmod 600 {wrap_file(state)}"
    assert key is not None


@pytest.mark.parametrize("content", [b"", b"secret", b"00" * 31, b"zz" * 32, b"\xff" * 32])
def test_a_key_file_without_a_key_is_said(state: Path, content: bytes) -> None:
    """It is not replaced behind anyone's back, and not quoted."""
    wrap_file(state).write_bytes(content)
    wrap_file(state).chmod(0o600)

    with pytest.raises(CacheUnreadable) as error:
        find_wrap_key("file", state, {})

    assert (error.value.message, error.value.hint) == (
        f"cache: {wrap_file(state)} holds no key",
        f"type: rm {wrap_file(state)}",
    )
    assert wrap_file(state).read_bytes() == content


def test_a_link_in_the_key_file_s_place_is_refused(state: Path, tmp_path: Path) -> None:
    """Not followed."""
    (tmp_path / "key").write_text(KEY.reveal())
    wrap_file(state).symlink_to(tmp_path / "key")

    with pytest.raises(CacheError, match="cannot be used"):
        find_wrap_key("file", state, {})


def test_memory_has_no_key(state: Path) -> None:
    """And looks for none, wherever there may be one."""
    found = find_wrap_key("memory", state, {"CREDENTIALS_DIRECTORY": "/nowhere"})

    assert (found.key, found.origin) == (None, "memory only, as configured")


@pytest.mark.parametrize("kind", ["auto", "keyring", "file"])
def test_a_systemd_credential_goes_first(state: Path, tmp_path: Path, kind: str) -> None:
    """Any bytes will do; two different ones give two keys, and no key file is made."""
    keys = []
    for content in (b"one\n", b"\x00\xff" * 50):
        (tmp_path / "keybroker-wrap-key").write_bytes(content)
        found = find_wrap_key(kind, state, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
        assert found.origin == "systemd credential"
        assert found.key is not None
        keys.append(found.key.reveal())

    assert len({*keys}) == 2
    assert [len(bytes.fromhex(key)) for key in keys] == [32, 32]
    assert not wrap_file(state).exists()


def test_a_credentials_directory_without_ours_is_passed_over(state: Path, tmp_path: Path) -> None:
    """Other services' credentials are none of ours."""
    found = find_wrap_key("file", state, {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert found.origin == "key file"


def test_a_systemd_credential_that_cannot_be_read_is_said(state: Path, tmp_path: Path) -> None:
    """A service that was given one does not go on with another."""
    (tmp_path / "keybroker-wrap-key").mkdir()

    with pytest.raises(KeybrokerError) as error:
        find_wrap_key("file", state, {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    file = tmp_path / "keybroker-wrap-key"
    assert error.value.message == f"cache: {file}: cannot be read (Is a directory)"
    assert error.value.exit_status == 69
    assert os.listdir(state) == [CACHE]
