"""A real systemd: one ordinary user's manager, or the whole of a booted Debian.

The machine need not run systemd itself. A user's manager has mount and process namespaces of its
own: an empty /run, a group of its own in a cgroup2, a HOME. It looks for /run/systemd/system to see
that the machine was booted by systemd, and user units that have a sandbox and credentials want two
folders more; see sd_booted(3). Needs root, by itself or by sudo.
"""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from tests.servers.install import ROOT, debian_folder, installed

USER = "kbtest"
GROUPS = Path("/sys/fs/cgroup")
CHECKOUT = Path(__file__).parent.parent.parent
START_SECONDS = 30.0

# As root, in namespaces of its own: Python and the checkout where the user comes to them, what a
# booted system has in /run, and the manager as the user.
BEGIN = r"""
set -eu
user=$1 uid=$(id -u "$1") group=$2 needed=$3 closed=$4 home=$5 checkout=$6; shift 6
mount -t tmpfs -o mode=755 tmpfs /run
for place in $needed $home; do
    mkdir -p "/run/kept$place"
    mount --bind "$place" "/run/kept$place"
done
for place in $closed; do
    mount -t tmpfs -o mode=755 tmpfs "$place"
done
for place in $needed; do
    [ -e "$place" ] || { mkdir -p "$place"; mount --bind "/run/kept$place" "$place"; }
done
# units with a /tmp of their own see neither a HOME nor a checkout there
for place in /home /opt; do
    mount -t tmpfs -o mode=755 tmpfs "$place"
done
mkdir "/home/$user" /opt/checkout
mount --bind "/run/kept$home" "/home/$user"
mount --bind "/run/kept$checkout" /opt/checkout
mkdir -p /run/systemd/system /run/systemd/unit-root /run/credentials /run/user
chmod 700 /run/systemd/unit-root
install -d -m 0700 -o "$user" -g "$(id -gn "$user")" "/run/user/$uid"
umount -R /sys/fs/cgroup 2>/dev/null || umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$group/init"
chown -R "$user" "/sys/fs/cgroup/$group"
echo 0 > "/sys/fs/cgroup/$group/init/cgroup.procs"
setpriv --reuid="$user" --regid="$(id -gn "$user")" --init-groups --reset-env \
    env USER="$user" "$@" \
    PATH=/usr/local/bin:/usr/bin:/bin SYSTEMD_LOG_TARGET=console \
    XDG_RUNTIME_DIR="/run/user/$uid" DBUS_SESSION_BUS_ADDRESS="unix:path=/run/user/$uid/bus" \
    /lib/systemd/systemd --user --unit=default.target
exit $?  # a manager that were process 1 would be the system's
"""


class UserManager:
    """
    One user's systemd; a context manager. Each has a HOME of its own.

    Args:
        variables: Of the manager's own environment.

    Attributes:
        home: The user's HOME, which is in /home for them.
        outside: The same, as everybody else sees it.
        python: The interpreter that keybroker is installed for; see `install`.
    """

    def __init__(self, *variables: str) -> None:
        self.variables = variables
        self.folder = Path(tempfile.mkdtemp(prefix="kb-systemd-", dir="/var/tmp"))
        self.outside = self.folder / "home"
        self.home = Path("/home", USER)
        self.python = str(self.home / "app/bin/python")
        self._group = f"keybroker-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Self:
        uid, gid = user()
        self.folder.chmod(0o755)
        root(["install", "-d", "-m", "0700", "-o", str(uid), "-g", str(gid), str(self.outside)])
        self.log = open(self.folder / "manager.log", "wb")
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
        command += ["--mount-proc", "--kill-child", "bash", "-c", BEGIN, "begin", USER, self._group]
        needed = [Path(sys.base_prefix), CHECKOUT]
        command += [" ".join(map(str, needed)), " ".join(map(str, closed_above(needed)))]
        command += [str(self.folder / "home"), str(CHECKOUT)]
        self._process = subprocess.Popen(
            [*ROOT, *command, f"HOME={self.home}", *self.variables],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        ends = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, (self.folder / "manager.log").read_text()
            found = self.run(["systemctl", "--user", "is-system-running"])
            if found.stdout.strip() in ("running", "degraded"):
                return
            assert time.monotonic() < ends, (self.folder / "manager.log").read_text()
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.run(["systemctl", "--user", "exit"])
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()  # and with it all that is in its namespace
                self._process.wait()
        self.log.close()
        for place in (GROUPS / "unified" / self._group, GROUPS / self._group):
            root(
                ["sh", "-c", f"find {place} -depth -type d -exec rmdir {{}} + 2>/dev/null || true"]
            )
        root(["rm", "-rf", "--one-file-system", str(self.folder)])

    def install(self, wheel: Path) -> None:
        """Install keybroker into an environment of the user's, with the checkout's libraries."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        libraries = f"/opt/checkout/.venv/lib/{version}/site-packages"
        pip = ["/opt/checkout/.venv/bin/python", "-m", "pip", "--python", self.python]
        found = self.home / "wheels" / wheel.name
        for command in (
            [sys.executable, "-m", "venv", "--without-pip", str(self.home / "app")],
            ["mkdir", "-p", str(found.parent)],
            ["sh", "-c", f"echo {libraries} > app/lib/{version}/site-packages/libraries.pth"],
        ):
            self.do(command)
        root(["cp", str(wheel), str(self.outside / "wheels" / wheel.name)])
        self.do([*pip, "install", "-q", "--no-deps", "--no-index", "--force-reinstall", str(found)])

    def do(self, command: Sequence[str], **more: Any) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.run(command, **more)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def keybroker(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the one that is installed."""
        return self.run([str(self.home / "app/bin/keybroker"), *arguments], **more)

    @property
    def pid(self) -> int:
        """The manager's, as it is seen from outside."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        found = children.read_text().split()
        return int(found[0]) if found else 0

    def run(
        self, command: Sequence[str], *, seconds: float = 60.0, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the user, as in a session of theirs."""
        uid, gid = user()
        if not self.pid:
            return subprocess.CompletedProcess(command, 1, "", "")
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p"]
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--init-groups", "--reset-env"]
        environment = {
            "HOME": str(self.home),
            "USER": USER,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "XDG_RUNTIME_DIR": f"/run/user/{uid}",
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path=/run/user/{uid}/bus",
            **variables,
        }
        given = [f"{name}={value}" for name, value in environment.items()]
        return subprocess.run(
            [*ROOT, *inside, *drop, "env", "-C", str(self.home), *given, *command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )


# In a mount namespace of its own: a Debian with all that is written to it in memory.
BOOT = r"""
set -eu
work=$1 tree=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/tree"
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$work/upper,workdir=$work/work" "$work/tree"
rm -f "$work/tree/etc/machine-id"
: > "$work/tree/etc/machine-id"  # a fresh machine each time
exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --directory="$work/tree" \
    --register=no --boot --console=pipe --link-journal=no --system-call-filter=@keyring "$@"
"""


class Booted:
    """
    A Debian that systemd has booted, as process 1; a context manager.

    Its loopback is the machine's own. Python is in /opt/python, the checkout in /opt/checkout.
    """

    python = "/opt/keybroker/bin/python"

    def __init__(self, suite: str) -> None:
        self._tree = installed(debian_folder(suite)) / "tree"
        self.folder = Path(tempfile.mkdtemp(prefix="kb-boot-", dir="/var/tmp"))

    def __enter__(self) -> Self:
        options = [f"--machine=kb{os.getpid()}-{time.monotonic_ns()}"]
        options += [] if Path("/run/systemd/system").is_dir() else ["--keep-unit"]
        options += [
            f"--bind-ro={sys.base_prefix}:/opt/python",
            f"--bind-ro={CHECKOUT}:/opt/checkout",
        ]
        command = ["unshare", "--mount", "--propagation", "private", "--fork", "--kill-child"]
        command += ["bash", "-c", BOOT, "boot", str(self.folder), str(self._tree), *options]
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [*ROOT, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                self._wait(log)
            except BaseException:
                self.__exit__()
                raise
        return self

    def _wait(self, log: IO[bytes]) -> None:
        ends = time.monotonic() + START_SECONDS
        while True:
            log.seek(0)
            assert self._process.poll() is None, log.read().decode(errors="replace")
            if self.run(["systemctl", "is-system-running"]).stdout in ("running\n", "degraded\n"):
                # nspawn hides it behind a file that is gone, which no unit can hide once more
                self.run(["umount", "/proc/kmsg"])
                return
            assert time.monotonic() < ends, log.read().decode(errors="replace")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.run(["systemctl", "poweroff"])
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        root(["rm", "-rf", "--one-file-system", str(self.folder)])

    @property
    def pid(self) -> int:
        """Its process 1, as it is seen from outside; 0 while there is none."""
        found = self._process.pid
        for _ in range(len(ROOT) + 2):  # sudo, unshare, nspawn
            children = Path(f"/proc/{found}/task/{found}/children").read_text().split()
            if not children:
                return 0
            found = int(children[0])
        return found

    def install(self, wheel: Path) -> None:
        """Install keybroker for all users, with the checkout's libraries."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        libraries = f"/opt/checkout/.venv/lib/{version}/site-packages"
        place = f"/opt/keybroker/lib/{version}/site-packages/libraries.pth"
        self.do(["sh", "-c", "echo /opt/python/lib > /etc/ld.so.conf.d/python.conf; ldconfig"])
        self.do([f"/opt/python/bin/{version}", "-m", "venv", "--without-pip", "/opt/keybroker"])
        self.do(["sh", "-c", f"echo {libraries} > {place}"])
        copy = f"base64 -d > /opt/{wheel.name}"
        self.do(["sh", "-c", copy], stdin=base64.b64encode(wheel.read_bytes()).decode())
        pip = ["env", f"PYTHONPATH={libraries}", "/opt/python/bin/python3", "-m", "pip"]
        flags = ["-q", "--no-deps", "--no-index", "--root-user-action=ignore"]
        self.do([*pip, "--python", self.python, "install", *flags, f"/opt/{wheel.name}"])

    def keybroker(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the one that is installed, as root if no other user is named."""
        return self.run(["/opt/keybroker/bin/keybroker", *arguments], **more)

    def do(self, command: Sequence[str], **more: Any) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.run(command, **more)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def run(
        self,
        command: Sequence[str],
        *,
        user: str = "root",
        seconds: float = 60.0,
        stdin: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it."""
        given = [f"{name}={value}" for name, value in (variables or {}).items()]
        if not self.pid:
            return subprocess.CompletedProcess(command, 1, "", "")
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C"]
        drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [*ROOT, *inside, *drop, "env", "-C", "/", path, *given, *command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )


def root(command: Sequence[str]) -> None:
    """Run a command as root."""
    subprocess.run([*ROOT, *command], check=True, capture_output=True)


def user() -> tuple[int, int]:
    """Return the uid and gid of an ordinary user, who is made if there is none."""
    import pwd

    try:
        found = pwd.getpwnam(USER)
    except KeyError:
        root(["useradd", "--no-create-home", "--home-dir", "/nonexistent", USER])
        found = pwd.getpwnam(USER)
    return found.pw_uid, found.pw_gid


def closed_above(places: Sequence[Path]) -> list[Path]:
    """Return the folders above some places that not everybody may enter: root's HOME, say."""
    found = []
    for place in places:
        above = [*reversed(place.parents), place]
        found += [one for one in above if not one.stat().st_mode & stat.S_IXOTH][:1]
    return list(dict.fromkeys(found))


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=CHECKOUT)
    [found] = folder.glob("*.whl")
    return found
