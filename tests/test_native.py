"""The helper in C: how short it is, how it is built and installed, whose answers it takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

from keybroker import asking
from keybroker.connect.line import helper_command, helper_line
from native.build import NAME, SOURCE, compile_helper
from tests.servers.unix import NOBODY, ScriptedServer, read

ROOT = Path(__file__).parent.parent
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")

# the source


def code(text: str) -> list[str]:
    """Return the lines that are neither blank nor only a comment."""
    without = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [line for line in without.splitlines() if line.strip()]


def test_it_is_short() -> None:
    """Under a hundred lines, none too long to be read."""
    text = SOURCE.read_text()
    assert len(code(text)) < 100
    assert len(code("a;\n\n/* b;\n * c; */\nd; /* e; */\n")) == 2
    assert [line for line in text.splitlines() if len(line.expandtabs(4)) > 100] == []


@pytest.mark.parametrize("optimised", ["-O0", "-O2"])
def test_a_strict_compiler_has_nothing_to_say(tmp_path: Path, optimised: str) -> None:
    """Of signs and widths either; some things it sees only when it optimises."""
    command = ["cc", optimised, *STRICT, "-o", tmp_path / NAME, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_has_the_numbers_and_the_words_of_the_reference() -> None:
    """Limits and times, what it says, and what it becomes."""
    text = SOURCE.read_text()
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z]+) = (-?\d+)", text)}
    assert numbers == {
        "NONE": -1,
        "NOBODY": -2,
        "FIRST": asking.FIRST_SECONDS * 100,
        "ALL": asking.WAIT_SECONDS * 100,
        "REQUEST": asking.LONGEST_REQUEST,
        "REPLY": asking.LONGEST_REPLY,
        "TEXT": asking.LONGEST_TEXT,
    }
    slow = ", ".join(f'"{word}"' for word in asking.SLOW)
    assert f"{{python, {slow}," in text
    assert asking.RUN_USER.decode() in text
    assert f'"{asking.SYSTEM.decode()}"' in text
    said = {(line, status) for status, line in re.findall(r'say\((\d+), "([^"]*)"\)', text)}
    reference = Path(asking.__file__).read_text()
    assert said == set(re.findall(r'_say\("([^"]*)", (\d+)\)', reference))


# a wheel


def built(folder: Path, *command: str, compiler: str | None = None) -> Path:
    """Build a distribution into a folder, with what is installed; return its file."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment | ({} if compiler is None else {"CC": compiler}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [file] = folder.iterdir()
    return file


def wheel(folder: Path, compiler: str | None = None) -> Path:
    folder.mkdir()
    arguments = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), ".")
    return built(folder, "pip", "wheel", *arguments, compiler=compiler)


def test_a_wheel_has_it_and_it_is_installed_beside_the_command(tmp_path: Path) -> None:
    """For the machine's kind and for each Python; it runs, and `status` would name it."""
    file = wheel(tmp_path / "wheel")
    assert re.fullmatch(r"keybroker-[\d.]+-py3-none-linux_\w+\.whl", file.name)

    fresh = tmp_path / "fresh"
    python = fresh / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", fresh],
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", file],
    ):
        subprocess.run(command, check=True, timeout=120)
    assert (fresh / "bin" / "keybroker").is_file()
    assert subprocess.run([fresh / "bin" / NAME], capture_output=True).returncode == 2


def test_without_a_compiler_a_wheel_is_for_every_machine(tmp_path: Path) -> None:
    """It has everything else, and the build does not fail."""
    file = wheel(tmp_path / "wheel", compiler="/nonexistent")
    assert re.fullmatch(r"keybroker-[\d.]+-py3-none-any\.whl", file.name)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        [described] = [name for name in names if name.endswith(".dist-info/WHEEL")]
        assert b"Root-Is-Purelib: true" in archive.read(described)
    assert "keybroker/helper.py" in names
    assert [name for name in names if NAME in name] == []


def test_a_source_distribution_can_be_compiled(tmp_path: Path) -> None:
    """It has the source and what builds it."""
    command = ("hatchling", "build", "-t", "sdist", "-d", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    names = subprocess.run(
        ["tar", "-tf", built(tmp_path / "out", *command)], capture_output=True, text=True
    ).stdout.split()
    inside = {name.partition("/")[2] for name in names}
    assert inside >= {"native/key.c", "native/build.py", "pyproject.toml", "keybroker/helper.py"}


@pytest.mark.parametrize(
    ("does", "compiled"),
    [
        ('exec cc "$@"', True),
        ('case "$*" in *-static*) exit 1;; esac; exec cc "$@"', True),
        ("exit 1", False),
        ("exit 0", False),
        ('for it; do last=$out; out=$it; done; cp /bin/true "$last"', False),
        ('while [ "$1" != -o ]; do shift; done; echo other >"$2"; chmod +x "$2"', False),
        ('while [ "$1" != -o ]; do shift; done; cp /bin/true "$2"', False),
    ],
    ids=["one", "no static", "refuses", "lazy", "wrong place", "another machine's", "wrong"],
)
def test_only_what_runs_here_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, compiled: bool
) -> None:
    """A compiler for another machine, or one that is broken, is none."""
    compiler = tmp_path / "a compiler"
    compiler.write_text(f"#!/bin/sh\n{does}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", f"{shlex.quote(str(compiler))} -O1")
    (tmp_path / "out").mkdir()
    assert (compile_helper(tmp_path / "out") is not None) is compiled


# its line


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installation's commands, with a name that has to be quoted."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", {"scripts": str(folder)}.get)
    monkeypatch.delenv("KEYBROKER_CONFIG", raising=False)
    return folder


def test_status_names_it_where_it_is_installed(scripts: Path) -> None:
    """Beside the command and executable; with the interpreter for the slow path."""
    (scripts / NAME).touch(0o700)
    environment = {"XDG_RUNTIME_DIR": "/run/user/7"}
    socket = "/run/user/7/keybroker/s"
    expected = [str(scripts / NAME), socket, "work", sys.executable]
    assert helper_command(socket, "work") == expected
    line = helper_line("work", environment)
    assert shlex.split(line) == ["exec", *expected]
    assert line.endswith(f" '{socket}' 'work' '{sys.executable}'")


@pytest.mark.parametrize("there", ["nothing", "a folder", "no program"])
def test_status_names_the_one_in_python_elsewhere(scripts: Path, there: str) -> None:
    """Which is there in any case."""
    if there == "a folder":
        (scripts / NAME).mkdir()
    elif there == "no program":
        (scripts / NAME).touch(0o600)
    place = str(Path(asking.__file__).with_name("helper.py"))
    assert helper_command("-", "work") == [sys.executable, "-IS", place, "-", "work"]
    line = helper_line("work", {"XDG_RUNTIME_DIR": "/run/user/7"})
    socket = "/run/user/7/keybroker/s"
    assert line == f"exec '{sys.executable}' -IS '{place}' '{socket}' 'work'"


# whose answer counts


def test_what_we_and_what_root_say_counts(native_helper: Path) -> None:
    """A daemon of the system answers for root; a user's own answers for that user."""
    if os.geteuid() != 0:
        return  # `test_helper` has what others than root can try
    with tempfile.TemporaryDirectory(prefix="kb-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        helper = Path(shutil.copy(native_helper, folder))
        for owner in (None, NOBODY):
            path = folder / f"{owner}" / "s"
            with ScriptedServer(path, read, b"ok key\n", uid=owner):
                path.parent.chmod(0o755)
                path.chmod(0o666)
                for asker in (0, NOBODY, NOBODY - 1):
                    done = subprocess.run(
                        [helper, path], user=asker, env={}, capture_output=True, timeout=60
                    )
                    trusted = owner in (None, asker)
                    assert (done.returncode, done.stdout) == (
                        (0, b"key\n") if trusted else (69, b"")
                    )
