"""One user with one profile at a gateway, whose commands are killed; and the judge."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from keybroker.journal import Journal
from keybroker.slots import Slots, replay
from tests.crash.entry import ENTRY
from tests.servers.faults import Faults
from tests.servers.litellm import LiteLLM

HOLD = timedelta(seconds=2)
CONFIGURATION = """\
[cache]
key = "file"
[profiles.work]
base_url = "{url}"
helper_ttl = "1s"
hold = "2s"
[profiles.work.source]
type = "litellm"
admin = {{ file = "{admin}" }}
lifetime = "10m"
timeout = "3s"
"""


@dataclass(frozen=True)
class Printed:
    at: datetime
    key_sha256: str


@dataclass
class Stage:
    """A HOME of its own. Every key that a command printed is remembered, by its hash."""

    url: str
    admin: str
    wire: Faults | None = None
    printed: list[Printed] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    revoked: list[datetime] = field(default_factory=list)  # when a person asked for it

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kb-crash-", ignore_cleanup_errors=True)
        self.home = Path(self._folder.name)
        admin = self.home / "admin"
        admin.touch(0o600)
        admin.write_text(self.admin)
        self.point_at(self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def point_at(self, url: str, admin: str | None = None) -> None:
        """Write the configuration; with another admin key, as one who moved to another gateway."""
        path = self.home / "admin"
        if admin is not None:
            path = self.home / "other-admin"
            path.touch(0o600)
            path.write_text(admin)
        file = self.home / ".config/keybroker/config.toml"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(CONFIGURATION.format(url=url, admin=path))

    def start(self, *arguments: str, **plan: Any) -> "subprocess.Popen[str]":
        if arguments[0] == "revoke":
            self.revoked.append(datetime.now(UTC))
        environment = {"PATH": os.defpath, "HOME": str(self.home)}
        return subprocess.Popen(
            [sys.executable, ENTRY, "command", json.dumps(plan), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: "subprocess.Popen[str]") -> int:
        """Wait for a command; remember the key that it printed, and when."""
        assert process.stdout is not None
        first = process.stdout.readline()
        at = datetime.now(UTC)
        _, err = process.communicate(timeout=60)
        self.said.append(err)
        if first.startswith("sk-") and first.endswith("\n"):
            self.printed.append(Printed(at, sha256(first.strip().encode()).hexdigest()))
        return process.returncode

    def run(self, *arguments: str, **plan: Any) -> int:
        return self.finish(self.start(*arguments, **plan))

    @property
    def state(self) -> Path:
        [state] = (self.home / ".local/state/keybroker").iterdir()
        return state

    @property
    def slots(self) -> Slots:
        return replay(Journal(self.state).read()).get("work", Slots())

    @property
    def instance(self) -> str:
        return (self.state / "instance").read_text()


def on_request(stage: Stage, one: Printed, gone: datetime) -> bool:
    """`keybroker revoke` leaves nobody a hold: that is what it is for."""
    return any(one.at - HOLD < asked <= gone for asked in stage.revoked)


def violations(stage: Stage, litellm: LiteLLM) -> list[str]:
    """
    Judge by LiteLLM's own tables what became of a stage's keys.

    Keys that were not deleted are the current one and retired ones that are not yet due; what was
    printed was alive at that time, and for its hold.
    """
    found = []
    prefix = f"kb-{stage.instance}-"
    rows = [row for row in litellm.key_rows() if str(row["key_alias"]).startswith(prefix)]
    deleted = {row["token"]: row["deleted_at"] for row in litellm.deleted_key_rows()}
    slots, now = stage.slots, datetime.now(UTC)
    known = {key.label for key in slots.keys if key.revoke_at is None or key.revoke_at > now}
    forgotten = {row["key_alias"] for row in rows} - known
    if forgotten:
        found.append(f"{len(forgotten)} keys live at the gateway, and should not: {forgotten}")
    if slots.current is None:
        found.append("no current key in the end")
    elif slots.current.label not in {row["key_alias"] for row in rows}:
        found.append("the current key does not live at the gateway")
    blocked = {row["token"] for row in rows if row["blocked"]}
    slack = timedelta(milliseconds=300)  # the database writes a moment after it was told
    for one in stage.printed:
        gone = deleted.get(one.key_sha256)
        if gone is not None and gone < one.at - slack:
            found.append("a dead key was printed")
        elif gone is not None and gone < one.at + HOLD - slack and not on_request(stage, one, gone):
            found.append("a key was revoked within its reader's hold")
        if one.key_sha256 in blocked:
            found.append("a key that the gateway refuses was printed")
    if not stage.printed:
        found.append("nothing was ever printed")
    return found
