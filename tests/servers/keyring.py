"""
A real Secret Service: gnome-keyring on a D-Bus session of its own, without a display.

The bus is configured here, without service folders, so nothing is started on demand: neither
another keyring nor a dialog.

See: https://specifications.freedesktop.org/secret-service/latest/
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests.servers.processes import Child

_BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


_UNANSWERED_DIALOG = """
from jeepney import message_bus
from jeepney.io.blocking import open_dbus_connection

with open_dbus_connection() as bus:
    bus.send_and_get_reply(message_bus.RequestName("org.gnome.keyring.SystemPrompter"))
    print("ready", flush=True)
    while True:
        print(bus.receive().header, flush=True)
"""


class Keyring:
    """
    A bus with a keyring on it, as a context.

    Args:
        locked: Start with the keyring locked, as after a login without the password.
    """

    def __init__(self, *, locked: bool = False) -> None:
        self._start_locked = locked
        self._password = secrets.token_hex(8)
        self._daemon: Child | None = None
        self._stack = ExitStack()

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the keyring needs beside its own HOME."""
        return {"DBUS_SESSION_BUS_ADDRESS": f"unix:path={self._socket}"}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-bus-")
            self._work = Path(stack.enter_context(temporary))
            self._socket = self._work / "bus"
            (self._work / "home").mkdir(mode=0o700)
            (self._work / "run").mkdir(mode=0o700)
            config = self._work / "bus.conf"
            config.write_text(_BUS.format(socket=self._socket))
            command = ["dbus-daemon", "--nofork", "--nopidfile", f"--config-file={config}"]
            log = self._work / "bus.log"
            bus = stack.enter_context(Child(command, log=log, environment=self._environment()))
            bus.wait_until(self._socket.exists, 10)
            stack.callback(self.stop)
            self.unlock()  # creates the keyring, with this password
            if self._start_locked:
                self.lock()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def lock(self) -> None:
        """Start the daemon anew, without the password; what is stored stays."""
        self._start("--start")

    def unlock(self) -> None:
        """Start the daemon anew, with the password."""
        self._start("--unlock")

    @contextmanager
    def nobody_at_the_dialog(self) -> Iterator[Child]:
        """
        Let the unlock dialog of a locked keyring open, with nobody there to answer it.

        Whoever reads from the keyring then waits without end. The log of the process given
        tells when the dialog was asked for: it names `BeginPrompting`.
        """
        command = [sys.executable, "-c", _UNANSWERED_DIALOG]
        log = self._work / "dialog.log"
        with Child(command, log=log, environment=self._environment()) as dialog:
            dialog.wait_until(lambda: "ready" in dialog.tail(), 10)
            yield dialog

    def stop(self) -> None:
        """End the daemon: the bus is left without a Secret Service."""
        if self._daemon:
            self._daemon.stop()
            self._daemon = None

    def _start(self, how: str) -> None:
        self.stop()
        with tempfile.TemporaryFile() as password:
            if how == "--unlock":
                password.write(self._password.encode())  # a newline would be part of it
                password.seek(0)
            self._daemon = Child(
                ["gnome-keyring-daemon", how, "--foreground", "--components=secrets"],
                log=self._work / "keyring.log",
                environment=self._environment(),
                stdin=password,
            )
        self._daemon.wait_until(self._answers, 10)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._work / "home"),
            "XDG_RUNTIME_DIR": str(self._work / "run"),
            "LANG": "C.UTF-8",
            **self.environment,
        }

    def _answers(self) -> bool:
        """Whether the bus knows a Secret Service whose process is our daemon."""
        bus = "org.freedesktop.DBus"
        asked = subprocess.run(
            [
                *("dbus-send", "--session", "--print-reply=literal", f"--dest={bus}", "/"),
                *(f"{bus}.GetConnectionUnixProcessID", "string:org.freedesktop.secrets"),
            ],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        ours = self._daemon and str(self._daemon.pid)
        return asked.stdout.split()[-1:] == [ours]
