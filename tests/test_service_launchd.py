"""launchd's property lists, and what launchctl is asked; no Mac is needed for either."""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path
from typing import Any

import pytest

from keybroker import starting
from keybroker.errors import NobodyAnswers
from keybroker.log import LARGEST, Log
from keybroker.services.launchd import Launchd, agent, daemon
from keybroker.services.needs import Needs
from tests.test_docs import ROOT

# launchd.plist(5), those that are used; limits are of setrlimit(2), by name.
TYPES: dict[str, type] = {
    "Label": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "Umask": int,
    "SoftResourceLimits": dict,
    "HardResourceLimits": dict,
    "StandardErrorPath": str,
    "UserName": str,
}
CHOICES = {"ProcessType": ("Background", "Standard", "Adaptive", "Interactive")}
KEPT_ALIVE = {"SuccessfulExit": bool, "Crashed": bool, "PathState": dict}
LIMITS = ("Core", "CPU", "Data", "FileSize", "MemoryLock", "NumberOfFiles", "Stack")
NEEDS = Needs((), {"HTTPS_PROXY": "http://proxy.example:3128"}, False, (), True)


def check(found: dict[str, Any]) -> None:
    """See that launchd would take it, by its manual."""
    for key, value in found.items():
        assert type(value) is TYPES[key], key
        assert value in CHOICES.get(key, (value,))
    assert all(isinstance(one, str) for one in found["ProgramArguments"])
    assert all(isinstance(one, str) for one in found["EnvironmentVariables"].values())
    assert {type(value) for key, value in found["KeepAlive"].items() if KEPT_ALIVE[key]} == {bool}
    for limits in (found["SoftResourceLimits"], found["HardResourceLimits"]):
        assert set(limits) <= set(LIMITS)
        assert {type(value) for value in limits.values()} == {int}
    for path in (found["ProgramArguments"][0], found["StandardErrorPath"]):
        assert path.startswith("/") and "~" not in path and "$" not in path  # none is expanded
    assert found["Umask"] == 0o077
    assert found["HardResourceLimits"]["Core"] == 0


SHIPPED = (
    "/usr/local/keybroker/bin/python3",
    Path("/Users/you/Library/Application Support/keybroker/0"),
)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("keybroker.agent", agent(*SHIPPED, {})),
        ("keybroker.daemon", daemon("you", *SHIPPED, {})),
    ],
)
def test_what_is_shipped_is_what_is_made(name: str, made: dict[str, Any]) -> None:
    """As XML, which is read back as it was."""
    check(made)
    assert plistlib.loads((ROOT / f"launchd/{name}.plist").read_bytes()) == made


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launchd:
    """A home, and a stand-in for launchctl that writes down what it was asked."""
    program = tmp_path / "bin/launchctl"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/asked\n'
        f'case "$1 $2" in\n'
        f'"print gui/"*/*) [ -e {tmp_path}/loaded ] || exit 113\n'
        '  printf "\\tstate = running\\n\\tpid = 4711\\n\\truns = 3\\n\\tlast exit code = 9\\n";;\n'
        f'"bootstrap "*) touch {tmp_path}/loaded;;\n'
        f'"bootout "*) rm -f {tmp_path}/loaded;;\n'
        f"esac\n[ ! -e {tmp_path}/broken ] || {{ echo '5: Input/output error' >&2; exit 5; }}\n"
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", "/opt/keybroker/bin/python3")
    return Launchd({"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")})


def asked(folder: Path) -> list[str]:
    """Return what launchctl was asked since the last time, without looks."""
    file = folder / "asked"
    lines = file.read_text().splitlines()
    file.write_text("")
    return [line for line in lines if not line.startswith("print")]


def test_the_agent_is_installed_started_and_removed(mac: Launchd, tmp_path: Path) -> None:
    """Once more changes nothing; a change is loaded anew."""
    file = tmp_path / "Library/LaunchAgents/keybroker.agent.plist"
    mac.check()
    changed = mac.write(NEEDS)
    assert changed == [file]
    found = plistlib.loads(file.read_bytes())
    check(found)
    assert found["EnvironmentVariables"] == {"HTTPS_PROXY": "http://proxy.example:3128"}
    mac.start(changed)
    domain = mac._domain
    label = f"{domain}/keybroker.agent"
    assert asked(tmp_path) == [
        f"bootout {label}",
        f"bootstrap {domain} {file}",
        f"kickstart {label}",
    ]
    state = mac.state(NEEDS)
    assert (state.installed, state.current, state.pid, state.restarts) == (True, True, 4711, 2)
    assert state.active == "active"

    assert mac.write(NEEDS) == []
    mac.start([])
    assert asked(tmp_path) == [f"kickstart {label}"]
    assert not mac.state(Needs((), {}, False, (), True)).current

    assert mac.uninstall() == [file]
    assert asked(tmp_path) == [f"bootout {label}"]
    assert (mac.installed, mac.stop(), mac.uninstall()) == (False, False, [])


def test_what_launchctl_says_is_said(mac: Launchd, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(NobodyAnswers, match="no launchd of this user's desktop"):
        mac.check()
    changed = mac.write(NEEDS)
    with pytest.raises(NobodyAnswers, match=r"launchctl bootstrap .*: 5: Input/output error"):
        mac.start(changed)


def test_its_log_is_what_logs_shows(mac: Launchd, tmp_path: Path) -> None:
    """launchd opens it, and nothing of launchd's sets it aside."""
    mac.write(NEEDS)
    found = plistlib.loads((tmp_path / "Library/LaunchAgents/keybroker.agent.plist").read_bytes())
    assert mac.logs(20, follow=True) == ["tail", "-n", "20", "-F", found["StandardErrorPath"]]
    assert Path(found["StandardErrorPath"]).name == starting.LOG


def test_a_log_that_is_large_is_set_aside(tmp_path: Path) -> None:
    """By whoever writes it: nothing is lost on the way, and there are two files at most."""
    file = tmp_path / "daemon.log"
    with open(file, "ab", buffering=0) as opened:
        log = Log(opened.fileno(), "text", str(file))
        line = "x" * 1000
        for _ in range(2 * LARGEST // 1000):
            log.say("info", line)
        assert {one.name for one in tmp_path.iterdir()} == {"daemon.log", "daemon.log.1"}
        assert file.stat().st_size < LARGEST
        assert LARGEST < (tmp_path / "daemon.log.1").stat().st_size < LARGEST + 2000
        assert file.stat().st_mode & 0o777 == 0o600
