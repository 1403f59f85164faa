"""systemd: the units of `systemd/`, a drop-in for what the profiles need, and systemctl.

See: systemd.unit(5), systemd.exec(5), systemd.syntax(7).
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from keybroker.cache import CREDENTIAL
from keybroker.errors import ConfigError, NobodyAnswers
from keybroker.paths import SYSTEM_CONFIG, SYSTEM_SOCKET, Disk, private_directory, runtime_directory
from keybroker.services.manager import COMMAND_SECONDS, PROGRAM, State, content, is_current, run
from keybroker.services.needs import Needs

SERVICE, SOCKET = "keybroker.service", "keybroker.socket"
DROP_IN = "keybroker.service.d/50-profiles.conf"
PLACE = "share/keybroker/systemd"  # below where Python's own data is
READY_SECONDS = 60.0
HOMES = ("/home/", "/root/", "/run/user/")  # what ProtectHome=yes hides


class Systemd:
    """
    One manager: a user's own, or the system's.

    Args:
        environment: Of whoever calls us.
        system: The system's, for all users of a shared host.
    """

    name = "systemd"

    def __init__(self, environment: Mapping[str, str], *, system: bool = False) -> None:
        self._environment, self._system = environment, system
        if system:
            self.folder = Path("/etc/systemd/system")
            self.secrets = SYSTEM_CONFIG.parent / "credentials"
        else:
            home = Path(environment.get("HOME", "~")).expanduser()
            self.folder = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
            self.secrets = self.folder / "keybroker/credentials"
            self.folder = self.folder / "systemd/user"
        self._scope = [] if system else ["--user"]

    # files

    def files(self, needs: Needs) -> dict[Path, str]:
        """Return what is to be written where."""
        kind = "system" if self._system else "user"
        words = (sys.executable, "-I", "-c", PROGRAM)
        command = " ".join(quoted(one).replace("$", "$$") for one in words)
        found = {
            self.folder / name: template(f"{kind}/{name}").replace("@KEYBROKER@", command)
            for name in (SOCKET, SERVICE)
        }
        return {**found, self.folder / DROP_IN: self._drop_in(needs)}

    @property
    def places(self) -> list[Path]:
        """Where the files are, whatever is needed."""
        return [self.folder / name for name in (DROP_IN, SERVICE, SOCKET)]

    def _drop_in(self, needs: Needs) -> str:
        """Write what the profiles need beside the unit."""
        lines = ["# Written by keybroker service install, from the configuration.", "[Service]"]
        for name, value in needs.environment.items():
            lines.append(f"Environment={quoted(f'{name}={value}')}")
        lines += [f"ReadWritePaths={quoted(f'-{folder}')}" for folder in needs.writable]
        wanted = [*needs.credentials, CREDENTIAL] if needs.seals else needs.credentials
        for name in wanted:
            kept, sealed = self.secrets / name, self.secrets / f"{name}.cred"
            if sealed.exists():
                lines.append(f"LoadCredentialEncrypted={name}:{plain(sealed)}")
            elif kept.exists():
                lines.append(f"LoadCredential={name}:{plain(kept)}")
            elif name != CREDENTIAL:
                raise ConfigError(
                    f"reference credential:{name}: neither {sealed} nor {kept} is there",
                    hint=f"systemd-creds encrypt --name={name} - {sealed}",
                )
        if needs.programs:
            lines += [
                "# Programs of the configuration may make code at run time, as node and Java do.",
                "MemoryDenyWriteExecute=no",
            ]
        return "\n".join(lines) + "\n"

    def _make_wrap_key(self) -> None:
        """
        Have something that seals the cache, where this systemd hands it over and nothing did yet.

        A user's manager takes encrypted credentials from version 258 on; see systemd issue 33318.
        """
        sealed, kept = (self.secrets / f"{CREDENTIAL}{end}" for end in (".cred", ""))
        if sealed.exists() or kept.exists() or (not self._system and self._version() < 258):
            return
        private_directory(self.secrets)
        command = ["systemd-creds", *self._scope, "encrypt", f"--name={CREDENTIAL}", "-", "-"]
        done = run(command, given=os.urandom(32).hex())
        if done.returncode == 0:
            Disk().replace(sealed, done.stdout.encode())

    def _version(self) -> int:
        words = run(["systemctl", "--version"]).stdout.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0

    def write(self, needs: Needs) -> list[Path]:
        """
        Put the units in place.

        Returns:
            The files that were not as they are now.

        Raises:
            ConfigError: A file cannot be written.
        """
        changed = []
        self._check_place()
        self.files(needs)  # what is missing is said before anything is done
        if needs.seals:
            self._make_wrap_key()
        for file, text in self.files(needs).items():
            try:
                file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                if content(file) != text:
                    Disk().replace(file, text.encode())
                    file.chmod(0o644)
                    changed.append(file)
            except OSError as error:
                raise ConfigError(
                    f"{file}: cannot be written ({error.strerror})",
                    hint="sudo keybroker service install --system" if self._system else None,
                ) from None
        return changed

    def _check_place(self) -> None:
        """
        See that a service of the whole system comes to the interpreter.

        Raises:
            ConfigError: It is in a HOME, which that service does not see.
        """
        for place in (sys.executable, os.path.realpath(sys.executable)):
            if self._system and place.startswith(HOMES):
                raise ConfigError(
                    f"{place}: is in a HOME, which a service of the whole system does not see",
                    hint="install keybroker elsewhere, in /opt say, with a Python that all may run",
                )

    def remove(self) -> list[Path]:
        """
        Remove what `write` has put in place; return what there was.

        Raises:
            ConfigError: A file cannot be removed.
        """
        removed = []
        for file in self.places:
            try:
                file.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"{file}: cannot be removed ({error.strerror})") from None
            removed.append(file)
        own = (self.folder / DROP_IN).parent
        for folder in (own,) if self._system else (own, self.folder, self.folder.parent):
            with suppress(OSError):  # it is somebody else's too
                folder.rmdir()
        return removed

    @property
    def installed(self) -> bool:
        """Say whether our units are there."""
        return (self.folder / SOCKET).exists() and (self.folder / SERVICE).exists()

    # the manager

    def check(self) -> None:
        """
        See that there is a manager to talk to.

        Raises:
            NobodyAnswers: There is none.
        """
        done = self._systemctl("is-system-running")
        if done.stdout.strip() in ("running", "degraded", "starting", "initializing"):
            return
        if self._system:
            raise NobodyAnswers(
                "systemd is not what runs this machine", hint="keybroker daemon, under what does"
            )
        uid = os.geteuid()
        hint = (
            f"sudo loginctl enable-linger $USER; export XDG_RUNTIME_DIR=/run/user/{uid}; or where "
            "there is no systemd: the daemon needs no service, `keybroker get` starts it"
        )
        raise NobodyAnswers("no systemd of this user answers", hint=hint)

    def start(self, changed: Sequence[Path]) -> None:
        """
        Have both units run as their files are now, from each login or boot on.

        Returns when the daemon says that it is ready.

        Raises:
            NobodyAnswers: It did not become ready; its log says why.
        """
        self._do("daemon-reload")
        self._do("enable", SOCKET, SERVICE)
        if self.folder / SOCKET in changed:
            self._do("stop", SOCKET, SERVICE)
        self._do("start", SOCKET)
        self._do("restart" if changed else "start", SERVICE, seconds=READY_SECONDS)

    def stop(self) -> bool:
        """
        Stop both: with its socket alone the next helper would start the daemon again.

        Returns:
            Whether there was anything to stop.

        Raises:
            NobodyAnswers: It cannot be done.
        """
        found = self._systemctl("is-active", SOCKET, SERVICE).stdout.split()
        if not {"active", "activating"}.intersection(found):
            return False
        self._do("stop", SOCKET, SERVICE)
        return True

    def begin(self) -> bool:
        """Listen, so that whoever asks starts the daemon; say if that could be done."""
        return self._systemctl("start", SOCKET).returncode == 0

    def uninstall(self) -> list[Path]:
        """
        Stop both units, and have nothing left of them; return the files that were removed.

        Raises:
            NobodyAnswers: The manager does not do it.
        """
        if self.installed:
            self._do("disable", "--now", SOCKET, SERVICE)
        removed = self.remove()
        if removed:
            with suppress(OSError):  # somebody keeps a file there
                (
                    SYSTEM_SOCKET.parent if self._system else runtime_directory(self._environment)
                ).rmdir()
            self._do("daemon-reload")
            self._systemctl("reset-failed", SOCKET, SERVICE)
        return removed

    def state(self, needs: Needs | None) -> State:
        """Ask how the units stand; None: what is needed is not known."""
        fields = ("ActiveState", "MainPID", "NRestarts", "Result")
        done = self._systemctl("show", SERVICE, *(f"--property={one}" for one in fields))
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        socket = self._systemctl("is-active", SOCKET).stdout.strip()
        active = found.get("ActiveState", "unknown")
        return State(
            self.installed,
            is_current(self.files, needs),
            self._systemctl("is-enabled", SOCKET).stdout.strip() == "enabled",
            "listening" if active == "inactive" and socket == "active" else active,
            int(found.get("MainPID", "0")),
            int(found.get("NRestarts", "0")),
            found.get("Result", "unknown"),
        )

    def logs(self, lines: int, *, follow: bool) -> list[str]:
        """Return the command that shows what the daemon said."""
        unit = ["-u", SERVICE] if self._system else ["--user-unit", SERVICE]
        return ["journalctl", *unit, "-n", str(lines), *(["-f"] if follow else [])]

    @property
    def begins_at(self) -> str:
        """Say from when on it runs."""
        if self._system:
            return "from each boot on"
        done = run(["loginctl", "show-user", str(os.geteuid()), "--property=Linger"])
        if done.stdout.strip() == "Linger=yes":
            return "from each boot on (linger)"
        return "from each login on; before that as well: loginctl enable-linger"

    def _do(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> None:
        done = self._systemctl(*arguments, seconds=seconds)
        if done.returncode != 0:
            said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
            raise NobodyAnswers(
                f"systemctl {' '.join([*self._scope, *arguments])}: {said}",
                hint=f"keybroker service logs{' --system' if self._system else ''}",
            )

    def _systemctl(
        self, *arguments: str, seconds: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        return run(["systemctl", *self._scope, "--no-pager", *arguments], seconds)


def template(name: str) -> str:
    """
    Return a unit as it was shipped.

    Raises:
        ConfigError: It is not there: the installation is not whole.
    """
    places = (
        Path(sysconfig.get_path("data")) / PLACE,
        Path(__file__).parent.parent.parent / "systemd",  # of a checkout
    )
    for place in places:
        if (text := content(place / name)) is not None:
            return text
    raise ConfigError(f"{places[0] / name}: is missing", hint="install keybroker again")


def quoted(word: str) -> str:
    """Write one word of a setting, so that systemd reads it as it is."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + escaped.replace("%", "%%") + '"'


def plain(path: Path) -> str:
    """Write a path where systemd takes no quotes."""
    return str(path).replace("%", "%%")
