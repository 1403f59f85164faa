"""What is shipped: the same bytes each time, installed as people do, completed, with its manual."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from keybroker import __version__
from keybroker.cli.base import keybroker
from tests.resident import Home, fresh_home

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
COMPLETION = (
    "bash-completion/completions/keybroker",
    "zsh/site-functions/_keybroker",
    "fish/vendor_completions.d/keybroker.fish",
)
CONFIG = """
cache = { key = "file" }
[profiles.work]
base_url = "http://127.0.0.1:9"
verify = "none"
source = { type = "static", placeholder = "ollama" }
[profiles.other]
base_url = "http://127.0.0.1:9"
verify = "none"
source = { type = "static", placeholder = "ollama" }
[logins.corp]
type = "litellm"
url = "https://llm.example.com"
"""


def run(*command: str | Path, cwd: Path = ROOT, **more: str) -> str:
    """Run a program to its end; return what it prints."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Dist(NamedTuple):
    """What is published."""

    wheel: Path
    sdist: Path

    @property
    def bytes(self) -> tuple[bytes, bytes]:
        return self.wheel.read_bytes(), self.sdist.read_bytes()


def build(source: Path, *before: str) -> Dist:
    """Build both from a folder, as `make dist` does."""
    run(*before, PYTHON, "-m", "hatchling", "build", "-d", "out", cwd=source)
    [wheel] = (source / "out").glob("*.whl")
    [sdist] = (source / "out").glob("*.tar.gz")
    return Dist(wheel, sdist)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Dist:
    """What is built from the files as they are, committed or not."""
    source = tmp_path_factory.mktemp("source")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    return build(source)


# what is in it


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """From two clones at other places, years apart, with another umask; the helper in C too."""
    here, there = tmp_path / "a", tmp_path / "somewhere" / "else"
    run("git", "clone", "-q", ROOT, here)
    run("sh", "-c", f"umask 077; git clone -q '{ROOT}' '{there}'")
    first = build(here)
    assert build(there, "faketime", "2031-05-06 07:08:09").bytes == first.bytes

    with tarfile.open(first.sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert build(unpacked).bytes == first.bytes
    committed = int(run("git", "log", "-1", "--format=%ct"))
    with tarfile.open(first.sdist) as archive:
        assert {member.mtime for member in archive} == {committed}


def test_a_source_distribution_has_the_manual_and_what_writes_it(dist: Dist) -> None:
    """Who packs it for a system can take either."""
    with tarfile.open(dist.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"share/generate.py", "share/man/man1/keybroker.1", "native/key.c"}
    assert names >= {f"share/{name}" for name in COMPLETION}


def inside(dist: Dist, pattern: str) -> dict[str, bytes]:
    """Return the files of the wheel whose names match a pattern."""
    with zipfile.ZipFile(dist.wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if re.search(pattern, name)}


def test_each_command_has_a_page_without_a_fault(dist: Dist, tmp_path: Path) -> None:
    """For mandoc and for groff, with each option of its help."""
    pages = inside(dist, r"\.data/data/share/man/man1/")
    found = {Path(name).name: text for name, text in pages.items()}
    assert {"keybroker.1", "keybroker-service-install.1", "keybroker-run.1"} <= set(found)
    for name, text in found.items():
        (tmp_path / name).write_bytes(text)
    assert run("mandoc", "-T", "lint", "-W", "warning", *found, cwd=tmp_path) == ""
    assert run("sh", "-c", "groff -man -ww -z *.1 2>&1", cwd=tmp_path) == ""
    for name in found:
        shown = run("mandoc", "-T", "ascii", name, cwd=tmp_path)
        text = re.sub(".\b", "", shown)
        words = name.removesuffix(".1").split("-")[1:]
        said = CliRunner().invoke(keybroker, [*words, "--help"]).output
        options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", said, re.MULTILINE))
        assert "--help" in options
        assert [one for one in options if one not in text] == []


def valid(text: str) -> dict[str, Any]:
    """Return a bill of materials, which its own schema takes."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_wheel_has_a_bill_of_materials(dist: Dist) -> None:
    """Where PEP 770 wants it: keybroker, and each package that it asks for."""
    [(name, text)] = inside(dist, "sboms/").items()
    assert name == f"keybroker-{__version__}.dist-info/sboms/keybroker.cdx.json"
    bill = valid(text.decode())
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/keybroker@{__version__}"
    [metadata] = inside(dist, r"dist-info/METADATA$").values()
    asked = re.findall(r"^Requires-Dist: ([\w-]+)", metadata.decode(), re.MULTILINE)
    assert [one["name"] for one in bill["components"]] == sorted(asked)


# installed


class Installed(NamedTuple):
    """Where a tool puts it: the commands, and what lies below `share`."""

    bin: Path
    manual: Path
    share: Path


def venv(folder: Path) -> Path:
    run(PYTHON, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


def install(tool: str, dist: Dist, folder: Path) -> Installed:
    """Install into a fresh environment, with the settings and the cache that a user has."""
    own, share = folder / "bin", folder / "share"
    if tool == "pipx":
        places = {"PIPX_HOME": folder / "home", "PIPX_BIN_DIR": own, "PIPX_MAN_DIR": share / "man"}
        places["PIPX_COMPLETION_DIR"] = share
        named = {name: str(place) for name, place in places.items()}
        run(PYTHON, "-m", "pipx", "install", dist.wheel, **named)
    elif tool == "uv":
        tools = folder / "tools"
        named = {"UV_TOOL_DIR": str(tools), "UV_TOOL_BIN_DIR": str(own)}
        run(PYTHON, "-m", "uv", "tool", "install", "-q", "--python", PYTHON, dist.wheel, **named)
        share = tools / "keybroker" / "share"
    else:
        file = dist.wheel if tool == "pip" else dist.sdist
        python = venv(folder)
        run(PYTHON, "-m", "pip", "--python", python, "install", "-q", "--no-compile", file)
    return Installed(own, share / "man", share)


@pytest.fixture(scope="module", params=["pip", "pip, from source", "pipx", "uv"])
def installed(
    request: pytest.FixtureRequest, dist: Dist, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """Each way to have it."""
    return install(request.param, dist, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a configuration that needs no gateway."""
    with fresh_home() as made:
        file = made.path / ".config" / "keybroker" / "config.toml"
        file.parent.mkdir(mode=0o700)
        file.touch(0o600)
        file.write_text(CONFIG)
        yield made


def test_what_is_installed_works(installed: Installed, home: Home) -> None:
    """A key through a daemon, by the command and by the helper's line, which is the one in C."""

    def said(*command: str | Path) -> str:
        done = subprocess.run(
            command, env=home.environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    program = installed.bin / "keybroker"
    assert said(program, "--version") == f"keybroker, version {__version__}\n"
    assert "ok: 2 profiles in " in said(program, "config", "check")
    try:
        assert said(program, "get", "work") == "ollama\n"
        status = json.loads(said(program, "status", "--json"))
        assert status["daemon"]["version"] == __version__
        line = status["profiles"][0]["settings"]["apiKeyHelper"]
        assert "/keybroker-key' " in line
        assert said("sh", "-c", line) == "ollama\n"
    finally:
        said(program, "daemon", "--stop")


def test_its_manual_is_found(installed: Installed) -> None:
    """Where the tool puts it, and completion beside it."""
    found = run("man", "-w", "keybroker", "keybroker-get", MANPATH=str(installed.manual))
    pages = [installed.manual / "man1" / f"keybroker{end}.1" for end in ("", "-get")]
    assert found.split() == [str(page.resolve()) for page in pages]
    assert [name for name in COMPLETION if not (installed.share / name).is_file()] == []


def test_an_installation_has_a_bill_of_materials(
    request: pytest.FixtureRequest, installed: Installed, tmp_path: Path
) -> None:
    """Its packages with their versions, and nothing of this machine and this moment."""
    if "[pip]" not in request.node.name:
        return
    run(".ci/sbom", installed.bin / "python", tmp_path / "bill.json")
    text = (tmp_path / "bill.json").read_text()
    assert str(installed.bin.parent) not in text
    bill = valid(text)
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]
    ours = bill["metadata"]["component"]
    assert (ours["name"], ours["version"]) == ("keybroker", __version__)
    [root] = [one for one in bill["dependencies"] if one["ref"] == ours["bom-ref"]]
    assert len(root["dependsOn"]) > 8
    versions = {one["name"]: one["version"] for one in bill["components"]}
    assert {"click", "cryptography", "botocore"} < set(versions)
    assert all(versions.values())


# completed

BASH = """
. "$SHARE/bash-completion/completions/keybroker"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
$(complete -p keybroker | sed 's/.* -F \\([^ ]*\\) .*/\\1/') keybroker
printf '%s\\n' "${COMPREPLY[@]}"
"""
# zsh completes only where somebody types
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1=; fpath=($SHARE/zsh/site-functions $fpath); autoload -Uz compinit'
zpty -w shell 'compinit -u -D; print REA""DY'
zpty -r shell seen '*READY*'
zpty -w -n shell "$*"$'\\t'
zpty -r -m shell seen "*$WANTED*" && print -r -- $WANTED
"""


def completed(shell: str, installed: Installed, home: Home, *words: str, wanted: str) -> list[str]:
    """Return what a shell makes of words when TAB is typed after the last."""
    program = {
        "bash": ["bash", "--norc", "-c", BASH, "bash", *words],
        "zsh": ["zsh", "-f", "-c", ZSH, "zsh", *words],
        "fish": ["fish", "-c", f"complete -C '{' '.join(words)}'"],
    }[shell]
    environment = {
        **home.environment,
        "PATH": f"{installed.bin}:{os.defpath}",
        "SHARE": str(installed.share),
        "XDG_DATA_DIRS": str(installed.share),
        "TERM": "dumb",
        "WANTED": wanted,
    }
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def by_uv(dist: Dist, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """One installation, whose completion is tried."""
    return install("uv", dist, tmp_path_factory.mktemp("completed"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(by_uv: Installed, home: Home, shell: str) -> None:
    """Commands, and the names of profiles and logins; no daemon is started for it."""
    for words, expected in (
        (("keybroker", "ro"), ["rotate"]),
        (("keybroker", "get", "ot"), ["other"]),
        (("keybroker", "run", "--profile", "ot"), ["other"]),
        (("keybroker", "logout", "co"), ["corp"]),
        (("keybroker", "service", "uni"), ["uninstall"]),
    ):
        found = completed(shell, by_uv, home, *words, wanted=expected[0])
        assert [line.partition("\t")[0] for line in found] == expected
    assert list((home.path / "run").iterdir()) == []


def test_fish_shows_descriptions_whole(by_uv: Installed, home: Home) -> None:
    """One with a comma too."""
    assert completed("fish", by_uv, home, "keybroker", "aud", wanted="audit") == [
        "audit\tShow who was given which key, and what became of it."
    ]


@pytest.mark.parametrize(
    "text", ["", "[", "profiles = 3", '[profiles."sk-ant\\n"]', "profiles = [1]"]
)
def test_a_configuration_that_cannot_be_read_completes_nothing(
    by_uv: Installed, home: Home, text: str
) -> None:
    """And says nothing: a line that is being typed is no place for an error."""
    (home.path / ".config" / "keybroker" / "config.toml").write_text(text)
    assert completed("bash", by_uv, home, "keybroker", "get", "", wanted="") == [""]
    found = completed("bash", by_uv, home, "keybroker", "nonsense", "", wanted="")
    assert "rotate" in found or found == [""]
