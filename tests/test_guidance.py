"""Guidance is true, current, harmless to source, and holds no secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.config import Profile, read_profile
from keybroker.document import Where
from keybroker.fields import read_url
from keybroker.guidance import environment, ttl_reason, write
from keybroker.paths import Disk
from keybroker.values import replace

URL = "https://llm.example.com"
HOSTILE = [
    "http://h/it's",
    "http://h/$HOME/${PATH}/$(touch${IFS}owned)",
    "http://h/`touch${IFS}owned`",
    'http://h/";touch${IFS}owned;"',
    "http://h/';touch${IFS}owned;'",
    "http://h/\\",
    "http://h/\\';touch${IFS}owned",
    "http://h/!!&&||>owned<x*[a-z]{a,b}~()",
    "http://'$(touch${IFS}owned)'/",
]
SHELLS = [
    found for name in ("sh", "bash", "dash", "zsh", "busybox") if (found := shutil.which(name))
]


def profile(name: str = "work", url: str = URL, *, lifetime: str = "12h", **more: Any) -> Profile:
    """Return a profile that mints, as the configuration has it."""
    source = {"type": "litellm", "admin": {"keyring": "the-admin-key"}, "lifetime": lifetime}
    return read_profile(name, {"base_url": url, **more, "source": source}, Where({}, "test"))


def followed(name: str = "local", url: str = "http://localhost:11434") -> Profile:
    """Return a profile whose key is somebody else's."""
    source = {"type": "static", "placeholder": "ollama"}
    return read_profile(name, {"base_url": url, "source": source}, Where({}, "test"))


def sourced(file: Path, shell: str = "sh") -> dict[str, str]:
    """Return what a shell's environment has gained by sourcing a file, in an empty folder."""
    folder = file.parent / "cwd"
    folder.mkdir(exist_ok=True)
    command = [shell, *(["sh"] if shell.endswith("busybox") else [])]
    done = subprocess.run(
        [*command, "-euc", '. "$1"; env -0', "-", str(file)],
        env={"PATH": os.environ["PATH"]},
        cwd=folder,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    assert list(folder.iterdir()) == []
    found = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
    its_own = ("PATH", "PWD", "OLDPWD", "SHLVL", "_", "HOME", "LOGNAME")  # the last two of zsh
    return {name: value for name, value in found.items() if name not in its_own}


def put(runtime: Path, *profiles: Profile, default: str | None = None) -> bool:
    return write(runtime, profiles, default, Disk())


def names(runtime: Path) -> list[str]:
    return sorted(path.name for path in runtime.iterdir())


# what is said


def test_the_environment_is_what_claude_code_reads() -> None:
    """Text, and the TTL a plain decimal integer of milliseconds."""
    assert environment(profile(url=f"{URL}/a/path")) == {
        "ANTHROPIC_BASE_URL": f"{URL}/a/path",
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "60000",
    }
    assert environment(profile(helper_ttl="1500ms"))["CLAUDE_CODE_API_KEY_HELPER_TTL_MS"] == "1500"


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (
            profile(),
            (
                "Claude Code asks again every 1m, in the background; well under a quarter of the "
                "key's 12h, so a replaced key is dropped long before its hold of 15m ends"
            ),
        ),
        (
            profile(lifetime="1h", helper_ttl="15m", hold="5m"),
            (
                "Claude Code asks again every 15m, in the background; not more than a quarter of "
                "the key's 1h, but a replaced key is revoked after its hold of 5m, which may cost "
                "a session one 401 that it retries by itself"
            ),
        ),
        (
            followed(),
            "Claude Code asks again every 1m, in the background, and so follows its owner",
        ),
    ],
)
def test_the_reason_is_true(one: Profile, reason: str) -> None:
    """It says what follows from the numbers, also where somebody chose unusual ones."""
    assert ttl_reason(one) == reason


# the files


def test_json_has_every_profile(tmp_path: Path) -> None:
    """Each with what to set and why, and which is meant when none is named."""
    put(tmp_path, profile(), followed(), default="work")

    assert json.loads((tmp_path / "guidance.json").read_text()) == {
        "profiles": {
            "work": {
                "base_url": URL,
                "helper_ttl_ms": 60000,
                "reason": ttl_reason(profile()),
                "environment": environment(profile()),
            },
            "local": {
                "base_url": "http://localhost:11434",
                "helper_ttl_ms": 60000,
                "reason": ttl_reason(followed()),
                "environment": environment(followed()),
            },
        },
        "default": "work",
    }


def test_a_shell_takes_each_profile_or_the_default(tmp_path: Path) -> None:
    """Exported, so that what the shell starts has it."""
    put(tmp_path, profile(), followed(), default="local")

    assert sourced(tmp_path / "guidance-work.env") == environment(profile())
    assert sourced(tmp_path / "guidance-local.env") == environment(followed())
    assert sourced(tmp_path / "guidance.env") == environment(followed())
    assert (tmp_path / "guidance.env").read_text() == (
        "# local: Claude Code asks again every 1m, in the background, and so follows its owner\n"
        "export ANTHROPIC_BASE_URL='http://localhost:11434'\n"
        "export CLAUDE_CODE_API_KEY_HELPER_TTL_MS='60000'\n"
    )


def test_the_only_profile_is_the_default(tmp_path: Path) -> None:
    """As for every command."""
    put(tmp_path, followed())

    assert sourced(tmp_path / "guidance.env") == environment(followed())
    assert json.loads((tmp_path / "guidance.json").read_text())["default"] == "local"


@pytest.mark.parametrize(
    ("profiles", "text"),
    [
        (
            [profile(), followed()],
            (
                "# several profiles and no default: source one of guidance-work.env, "
                "guidance-local.env\n"
            ),
        ),
        ([], "# no profile is configured\n"),
    ],
)
def test_without_a_default_nothing_is_set(
    tmp_path: Path, profiles: list[Profile], text: str
) -> None:
    """The file says which others there are."""
    put(tmp_path, *profiles)

    assert (tmp_path / "guidance.env").read_text() == text
    assert sourced(tmp_path / "guidance.env") == {}
    assert json.loads((tmp_path / "guidance.json").read_text())["default"] is None


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("url", HOSTILE)
def test_an_address_is_text_to_a_shell(tmp_path: Path, url: str, shell: str) -> None:
    """Whatever the configuration takes for one: nothing of it is run, nothing of it is lost."""
    one = profile(url=url)
    assert one.base_url == read_url(url)
    put(tmp_path, one)

    assert sourced(tmp_path / "guidance.env", shell) == environment(one)


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_any_text_is_text_to_a_shell(text: str) -> None:
    """Beyond what the configuration lets through: blanks, new lines, other scripts."""
    import tempfile

    one = replace(profile(), base_url=text)
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        put(Path(folder), one)
        assert sourced(Path(folder, "guidance.env")) == environment(one)
        document = json.loads(Path(folder, "guidance.json").read_text())
        assert document["profiles"]["work"]["base_url"] == text


def test_files_are_ours_alone(tmp_path: Path) -> None:
    """Of mode 0600, with no draft left beside them."""
    put(tmp_path, profile())

    assert names(tmp_path) == ["guidance-work.env", "guidance.env", "guidance.json"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_no_secret_and_no_reference_is_in_them(tmp_path: Path) -> None:
    """They are for anybody to copy; a header that would carry a secret is not configured."""
    put(tmp_path, profile(headers={"X-Route": "eng"}), followed())

    texts = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "llm.example.com" in texts
    for word in ("the-admin-key", "keyring", "ollama"):
        assert word not in texts


# keeping them current


def test_nothing_is_written_that_did_not_change(tmp_path: Path) -> None:
    """What watches a file is not woken; what changed is replaced, and only that."""
    assert put(tmp_path, profile(), followed(), default="work") is True
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}

    assert put(tmp_path, profile(), followed(), default="work") is False
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before

    assert put(tmp_path, profile(helper_ttl="30s"), followed(), default="work") is True
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {
        *("guidance-work.env", "guidance.env", "guidance.json"),
    }
    assert sourced(tmp_path / "guidance.env")["CLAUDE_CODE_API_KEY_HELPER_TTL_MS"] == "30000"


def test_a_profile_that_went_away_takes_its_file_along(tmp_path: Path) -> None:
    """And nothing else that is in the directory."""
    (tmp_path / "s").touch()
    (tmp_path / "guidance.txt").touch()
    put(tmp_path, profile(), followed())
    assert put(tmp_path, followed()) is True

    assert names(tmp_path) == [
        *("guidance-local.env", "guidance.env", "guidance.json", "guidance.txt", "s"),
    ]
    assert put(tmp_path, followed()) is False
    assert put(tmp_path) is True
    assert names(tmp_path) == ["guidance.env", "guidance.json", "guidance.txt", "s"]


def test_what_somebody_changed_is_mended(tmp_path: Path) -> None:
    """Also a link that was put in a file's place: what it leads to is left alone."""
    put(tmp_path, profile())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    (tmp_path / "guidance.env").write_text("changed")
    (tmp_path / "guidance.json").unlink()
    (tmp_path / "guidance-work.env").unlink()
    (tmp_path / "guidance-work.env").symlink_to(elsewhere)

    assert put(tmp_path, profile()) is True

    assert sourced(tmp_path / "guidance.env") == environment(profile())
    assert not (tmp_path / "guidance-work.env").is_symlink()
    assert (tmp_path / "guidance.json").exists()
    assert elsewhere.read_text() == "theirs"


def test_a_default_that_is_no_profile_is_none(tmp_path: Path) -> None:
    """The configuration refuses it; here it does no harm."""
    put(tmp_path, profile(), default="gone")

    assert sourced(tmp_path / "guidance.env") == {}
    assert json.loads((tmp_path / "guidance.json").read_text())["default"] is None
