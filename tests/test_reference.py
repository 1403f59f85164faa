"""Where a secret is: a variable, a file, the OS keyring, a program."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import oskeyring
from keybroker.credential import LONGEST_SECRET, Reference, Secret
from keybroker.errors import ConfigError, KeybrokerError, SourceDenied, SourceUnavailable
from keybroker.sources.reference import resolve
from tests.servers.keyring import Keyring

KEY = "sk-canary-0123456789"


def fails(
    kind: type[KeybrokerError], reference: Reference, environment: dict[str, str] | None = None
) -> KeybrokerError:
    """Return the error; it shows where the secret is, and nothing of it."""
    with pytest.raises(KeybrokerError) as caught:
        resolve(reference, environment or {})
    assert type(caught.value) is kind
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"
    return caught.value


# Variables.


@pytest.mark.parametrize("value", [KEY, f"{KEY}\n", f"  {KEY}\t"])
def test_a_variable_is_read_without_the_blanks_around_it(value: str) -> None:
    """A newline that a shell left there is not part of the key."""
    assert resolve(Reference("env", "KB"), {"KB": value}) == Secret(KEY)


def test_a_variable_that_is_not_set_is_named() -> None:
    """The error says what to set, and this process's own variables do not count."""
    os.environ["KB_ELSEWHERE"] = KEY
    try:
        error = fails(ConfigError, Reference("env", "KB_ELSEWHERE"))
    finally:
        del os.environ["KB_ELSEWHERE"]
    assert "KB_ELSEWHERE" in error.message
    assert error.hint is not None
    assert error.hint.startswith("set KB_ELSEWHERE; ")


BAD = {
    "nothing": ("", "empty"),
    "blanks": (" \n ", "empty"),
    "two words": ("sk-canary x", "not one token"),
    "two lines": ("sk-canary\nsk-canary", "not one token"),
    "other alphabet": ("sk-canary-ü", "not one token"),
    "too long": ("c" * (LONGEST_SECRET + 1), "longer than 16384"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_key_is_refused_from_anywhere(case: str, tmp_path: Path) -> None:
    """One token of printable ASCII, or an error that names the reference."""
    value, words = BAD[case]
    path = private(tmp_path / "key", value)
    for reference in (Reference("env", "KB"), Reference("file", str(path))):
        error = fails(ConfigError, reference, {"KB": value})
        assert words in error.message
        assert str(reference) in error.message


# Files.


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.touch(0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_is_read(tmp_path: Path, mode: int) -> None:
    """One that is its owner's alone."""
    path = private(tmp_path / "key", f"{KEY}\n", mode)
    assert resolve(Reference("file", str(path)), {}) == Secret(KEY)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602, 0o610])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    """With the command that mends it."""
    path = private(tmp_path / "key", KEY, mode)
    error = fails(ConfigError, Reference("file", str(path)))
    assert error.hint == f"type: chmod 600 {path}"


def test_a_file_that_a_platform_keeps_may_be_open_to_others(tmp_path: Path) -> None:
    """Only where that is said; there is no advice on how to make one."""
    path = private(tmp_path / "token", KEY, 0o644)
    reference = Reference("file", str(path))
    assert resolve(reference, {}, open_to_others=True) == Secret(KEY)
    fails(ConfigError, reference)
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        resolve(reference, {}, open_to_others=True)
    assert caught.value.hint is None


def test_a_file_behind_a_link_counts_by_its_own_mode(tmp_path: Path) -> None:
    """A link to a private file is fine, one to an open file is not."""
    good, bad = private(tmp_path / "good", KEY), private(tmp_path / "bad", KEY, 0o644)
    for target in (good, bad):
        (tmp_path / f"to-{target.name}").symlink_to(target)
    assert resolve(Reference("file", str(tmp_path / "to-good")), {}) == Secret(KEY)
    fails(ConfigError, Reference("file", str(tmp_path / "to-bad")))


def test_a_file_that_is_not_there_is_the_configuration_s_fault(tmp_path: Path) -> None:
    """So is a folder."""
    assert "No such file" in fails(ConfigError, Reference("file", str(tmp_path / "no"))).message
    assert "directory" in fails(ConfigError, Reference("file", str(tmp_path))).message


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    """Bytes of another kind are no key, and no more than 64 KiB are read."""
    path = private(tmp_path / "key", "")
    path.write_bytes(b"sk-canary\xff\xfe")
    assert "not one token" in fails(ConfigError, Reference("file", str(path))).message
    path.write_bytes(b"c" * 1_000_000)
    assert "longer than" in fails(ConfigError, Reference("file", str(path))).message


def test_a_file_below_home_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~/ is the home of whoever runs it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    private(tmp_path / "key", KEY)
    assert resolve(Reference("file", "~/key"), {}) == Secret(KEY)


# The OS keyring.


@pytest.fixture
def keyring(keyring_session: Keyring, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keyring]:
    for name, value in keyring_session.environment.items():
        monkeypatch.setenv(name, value)
    yield keyring_session


@pytest.mark.servers
def test_an_entry_of_the_keyring_is_read(keyring: Keyring) -> None:
    """By its user name, under the service `keybroker`."""
    oskeyring.write("test-reference", f"{KEY}\n")
    assert resolve(Reference("keyring", "test-reference"), {}) == Secret(KEY)


@pytest.mark.servers
def test_an_entry_that_is_not_there_is_denied_with_what_to_do(keyring: Keyring) -> None:
    """Trying again is no use until somebody stores it."""
    error = fails(SourceDenied, Reference("keyring", "never-stored"))
    assert "never-stored" in error.message
    assert "service keybroker" in str(error.hint)


@pytest.mark.servers
def test_a_locked_keyring_is_unavailable_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be unlocked later; no dialog is opened for it."""
    with Keyring() as keyring, monkeypatch.context() as patched:
        for name, value in keyring.environment.items():
            patched.setenv(name, value)
        oskeyring.write("test-locked", KEY)
        keyring.lock()
        with keyring.nobody_at_the_dialog() as dialog:
            error = fails(SourceUnavailable, Reference("keyring", "test-locked"))
            assert "BeginPrompting" not in dialog.tail(200)
        assert "locked" in error.message
        keyring.unlock()
        assert resolve(Reference("keyring", "test-locked"), {}) == Secret(KEY)


@pytest.mark.servers
def test_without_a_keyring_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus without a Secret Service, and no bus at all."""
    with Keyring() as keyring:
        keyring.stop()
        monkeypatch.setenv(
            "DBUS_SESSION_BUS_ADDRESS", keyring.environment["DBUS_SESSION_BUS_ADDRESS"]
        )
        fails(SourceUnavailable, Reference("keyring", "x"))
    fails(SourceUnavailable, Reference("keyring", "x"))


# Programs.


def program(code: str) -> Reference:
    return Reference("command", (sys.executable, "-IS", "-c", code))


def test_what_a_program_prints_is_read() -> None:
    """A key alone, blanks around it dropped."""
    assert resolve(program(f"print('{KEY}')"), {}) == Secret(KEY)


def test_a_program_s_json_is_not_looked_into() -> None:
    """A reference is one secret; JSON with a blank is none."""
    fails(ConfigError, program('print(\'{"key": "sk-canary"}\')'))


def test_a_program_that_fails_is_unavailable() -> None:
    """With its status and without its output."""
    error = fails(SourceUnavailable, program("print('canary'); raise SystemExit(4)"))
    assert "status 4" in error.message


def test_a_program_that_is_not_there_is_the_configuration_s_fault() -> None:
    """Its name is shown, not its arguments."""
    error = fails(ConfigError, Reference("command", ("/no/such/thing", "canary")))
    assert "thing" in error.message


def test_a_program_is_not_given_the_secrets_of_others() -> None:
    """Variables that other references name stay with us; those of a session are passed on."""
    environment = {"HOME": "/home/x", "XDG_RUNTIME_DIR": "/run/x", "LITELLM_ADMIN": "sk-canary"}
    code = "import os; print(','.join(sorted(os.environ)))"
    names = resolve(program(code), environment).reveal().split(",")
    assert [name for name in names if name != "LC_CTYPE"] == ["HOME", "XDG_RUNTIME_DIR"]


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (Reference("env", "KB"), "env:KB"),
        (Reference("file", "/etc/key"), "file:/etc/key"),
        (Reference("keyring", "admin"), "keyring:admin"),
        (Reference("command", ("op", "read", "op://canary")), "command:op"),
    ],
)
def test_a_reference_prints_as_where_and_never_as_what(reference: Reference, text: str) -> None:
    """A program's arguments are left out."""
    assert str(reference) == text
    assert not re.search("canary", str(reference))


# Vault.


def test_a_secret_in_vault_is_read_by_whoever_can() -> None:
    """What reads it is given, with the table that says how to log in there."""
    asked: list[Reference] = []

    def reader(reference: Reference) -> Secret:
        asked.append(reference)
        return Secret(KEY)

    reference = Reference("vault", "secret/data/llm/admin#key")
    assert resolve(reference, {}, reader) == Secret(KEY)
    assert asked == [reference]
    with pytest.raises(AssertionError):
        resolve(reference, {})
