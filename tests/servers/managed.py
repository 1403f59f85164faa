"""
A machine with managed settings for Claude Code, as far as one program can see.

The client reads them in `/etc/claude-code` and nowhere else. Linux lets everybody mount things
for programs of their own; where AppArmor forbids it
(`kernel.apparmor_restrict_unprivileged_userns`), only root.

See: https://man7.org/linux/man-pages/man7/mount_namespaces.7.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOUNT = """
mount --rbind /etc "$1"
mount --rbind "$2" /etc
shift 2
exec unshare --user "$@"
"""


class Machine:
    """
    The machine.

    Args:
        folder: Empty; its /etc is made below it, of what is in ours.
    """

    def __init__(self, folder: Path) -> None:
        self._ours, self._etc = folder / "ours", folder / "etc"
        self._ours.mkdir()
        self._settings = self._etc / "claude-code"
        self._settings.mkdir(parents=True)
        for entry in Path("/etc").iterdir():
            if entry.name != "claude-code":
                (self._etc / entry.name).symlink_to(self._ours / entry.name)

    def write(self, name: str, settings: Mapping[str, Any] | str) -> None:
        """Write a file of managed settings, or another one."""
        path = self._settings / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))

    @property
    def command(self) -> tuple[str, ...]:
        """What runs a program there, as the same user; its words follow."""
        return (
            *("unshare", "--user", "--map-root-user", "--mount"),
            *("sh", "-euc", _MOUNT, "sh", str(self._ours), str(self._etc)),
            *(f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"),
        )
