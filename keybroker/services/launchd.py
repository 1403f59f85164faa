"""launchd: a property list for an agent of the user's, and launchctl.

See: launchd.plist(5), launchctl(1). Nothing of it was run on a Mac.
"""

import os
import plistlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from keybroker import starting
from keybroker.errors import ConfigError, NobodyAnswers
from keybroker.paths import Disk, private_directory, state_directory
from keybroker.services.manager import PROGRAM, State, content, is_current, run
from keybroker.services.needs import Needs

LABEL = "keybroker.agent"
DAEMON = "keybroker.daemon"  # the same from the boot on, for one user; root puts it in place
FILES = 16_384  # that may be open: 4096 clients, and room


class Launchd:
    """
    One user's agents.

    Args:
        environment: Of whoever calls us.
    """

    name = "launchd"
    begins_at = "from each login on"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        home = Path(environment.get("HOME", "~")).expanduser()
        self._file = home / "Library/LaunchAgents" / f"{LABEL}.plist"
        self._domain = (
            f"gui/{os.geteuid()}"  # there is one while the user is logged in to a desktop
        )

    def files(self, needs: Needs) -> dict[Path, str]:
        """Return what is to be written where."""
        found = agent(sys.executable, state_directory(self._environment), needs.environment)
        return {self._file: plistlib.dumps(found, sort_keys=False).decode()}

    def write(self, needs: Needs) -> list[Path]:
        """
        Put the agent in place.

        Returns:
            The file, if it was not as it is now.

        Raises:
            ConfigError: It cannot be written.
        """
        private_directory(state_directory(self._environment))  # its log is there
        changed = []
        for file, text in self.files(needs).items():
            try:
                file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                if content(file) != text:
                    Disk().replace(file, text.encode())
                    changed.append(file)
            except OSError as error:
                raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None
        return changed

    @property
    def places(self) -> list[Path]:
        """Where the file is, whatever is needed."""
        return [self._file]

    @property
    def installed(self) -> bool:
        """Say whether our agent is there."""
        return self._file.exists()

    def check(self) -> None:
        """
        See that there is a manager to talk to.

        Raises:
            NobodyAnswers: There is none.
        """
        if run(["launchctl", "print", self._domain]).returncode != 0:
            raise NobodyAnswers(
                "no launchd of this user's desktop answers",
                hint="log in at the machine; without a service `keybroker get` starts the daemon",
            )

    def start(self, changed: Sequence[Path]) -> None:
        """
        Have the agent run as its file is now, from each login on.

        Raises:
            NobodyAnswers: It cannot be started.
        """
        if changed:
            run(["launchctl", "bootout", f"{self._domain}/{LABEL}"])  # it may not be there
        if not self._runs():
            self._do("bootstrap", self._domain, str(self._file))
        self._do("kickstart", f"{self._domain}/{LABEL}")

    def stop(self) -> bool:
        """
        Stop it, and have it not started again before the next login.

        Returns:
            Whether there was anything to stop.
        """
        if not self._runs():
            return False
        self._do("bootout", f"{self._domain}/{LABEL}")
        return True

    def begin(self) -> bool:
        """Start it; say if that could be done."""
        if not self._runs():
            run(["launchctl", "bootstrap", self._domain, str(self._file)])
        return run(["launchctl", "kickstart", f"{self._domain}/{LABEL}"]).returncode == 0

    def uninstall(self) -> list[Path]:
        """Stop it, and remove its file; return that if there was one."""
        self.stop()
        with suppress(FileNotFoundError):
            self._file.unlink()
            return [self._file]
        return []

    def state(self, needs: Needs | None) -> State:
        """Ask how it stands; None: what is needed is not known."""
        done = run(["launchctl", "print", f"{self._domain}/{LABEL}"])
        lines = (line.strip().split(" = ", 1) for line in done.stdout.splitlines())
        found = {pair[0]: pair[1] for pair in lines if len(pair) == 2}
        running = found.get("state") == "running"
        return State(
            installed=self.installed,
            current=is_current(self.files, needs),
            enabled=self.installed,
            active="active" if running else "inactive",
            pid=int(found.get("pid", "0")) if running else 0,
            restarts=max(0, int(found.get("runs", "1")) - 1),
            result=found.get("last exit code", "unknown"),
        )

    def logs(self, lines: int, *, follow: bool) -> list[str]:
        """Return the command that shows what the daemon said."""
        file = starting.log_file(state_directory(self._environment))
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), str(file)]

    def _runs(self) -> bool:
        return run(["launchctl", "print", f"{self._domain}/{LABEL}"]).returncode == 0

    def _do(self, *arguments: str) -> None:
        done = run(["launchctl", *arguments])
        if done.returncode != 0:
            said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
            raise NobodyAnswers(f"launchctl {' '.join(arguments)}: {said}")


def agent(python: str, state: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the property list of one user's agent."""
    return {
        "Label": LABEL,
        "ProgramArguments": [python, "-I", "-c", PROGRAM, "daemon"],
        "EnvironmentVariables": dict(environment),
        "RunAtLoad": True,
        # it ends with 0 when it was told to, and with another status when it died
        "KeepAlive": {"SuccessfulExit": False},
        # launchd starts nothing more often; meanwhile the helper has the sealed key
        "ThrottleInterval": 10,
        "ExitTimeOut": 10,
        # without it, its processor time and its disk are throttled
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "SoftResourceLimits": {"NumberOfFiles": FILES},
        "HardResourceLimits": {"Core": 0},
        # the daemon sets it aside when it is large
        "StandardErrorPath": str(starting.log_file(state)),
    }


def daemon(user: str, python: str, state: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the property list of one user's daemon from the boot on; root puts it in place."""
    return {**agent(python, state, environment), "Label": DAEMON, "UserName": user}
