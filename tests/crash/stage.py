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

import httpx

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
hold = "{hold}s"
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
    hold: timedelta = HOLD
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
        self.url = url
        path = self.home / "admin"
        if admin is not None:
            path = self.home / "other-admin"
            path.touch(0o600)
            path.write_text(admin)
        file = self.home / ".config/keybroker/config.toml"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(CONFIGURATION.format(url=url, admin=path, hold=self.hold.seconds))

    @property
    def direct(self) -> str:
        """Where the gateway is for those who use a key; no fault that is planned meets them."""
        return self.url if self.wire is None else self.wire.behind

    def start(self, *arguments: str, **plan: Any) -> "subprocess.Popen[str]":
        """Type a command; `get` does what is due by itself and leaves no daemon behind."""
        if arguments[0] == "get":
            arguments = ("get", "--no-start", *arguments[1:])
        if arguments[0] == "revoke":
            self.revoked.append(datetime.now(UTC))
        return subprocess.Popen(
            [sys.executable, ENTRY, "command", json.dumps(plan), *arguments],
            env=self.environment,
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
            self.use(first.strip())
        return process.returncode

    def use(self, key: str) -> None:
        """Make a request with a key that was printed; the gateway's log has what came of it."""
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
        httpx.get(f"{self.direct}/v1/models", headers=headers, trust_env=False, timeout=20)

    def run(self, *arguments: str, **plan: Any) -> int:
        return self.finish(self.start(*arguments, **plan))

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of ours but where programs are; no other stage's daemon is found by it."""
        run = self.home / "run"
        run.mkdir(mode=0o700, exist_ok=True)
        return {"PATH": os.defpath, "HOME": str(self.home), "XDG_RUNTIME_DIR": str(run)}

    @property
    def state(self) -> Path:
        [state] = (self.home / ".local/state/keybroker").iterdir()
        return state

    @property
    def instance(self) -> str:
        return (self.state / "instance").read_text()


def on_request(stage: Stage, one: Printed, gone: datetime) -> bool:
    """`keybroker revoke` leaves nobody a hold: that is what it is for."""
    return any(one.at - stage.hold < asked <= gone for asked in stage.revoked)


def violations(stage: Stage, litellm: LiteLLM, *, settled: bool = True) -> list[str]:
    """
    Judge by LiteLLM's own tables and request log what became of a stage's keys.

    Nothing of keybroker's is read but its name for itself. What was printed was alive at that time
    and for its hold, and the requests that were made with it were answered. Once all is settled,
    and every hold over, the one key that lives is the one that was printed last.
    """
    found = []
    prefix = f"kb-{stage.instance}-"
    rows = [row for row in litellm.key_rows() if str(row["key_alias"]).startswith(prefix)]
    deleted = {row["token"]: row["deleted_at"] for row in litellm.deleted_key_rows()}
    if not stage.printed:
        return ["nothing was ever printed"]
    last = stage.printed[-1].key_sha256
    forgotten = {row["key_alias"] for row in rows if row["token"] != last}
    if settled and forgotten:
        found.append(f"{len(forgotten)} keys live at the gateway, and should not: {forgotten}")
    if settled and last not in {row["token"] for row in rows}:
        found.append("the key that was printed last does not live at the gateway")
    blocked = {row["token"] for row in rows if row["blocked"]}
    log = litellm.request_log()
    slack = timedelta(milliseconds=300)  # the database writes a moment after it was told
    for one in stage.printed:
        gone = deleted.get(one.key_sha256)
        if gone is not None and gone < one.at - slack:
            found.append("a dead key was printed")
        elif (
            gone is not None
            and gone < one.at + stage.hold - slack
            and not on_request(stage, one, gone)
        ):
            found.append("a key was revoked within its reader's hold")
        if one.key_sha256 in blocked:
            found.append("a key that the gateway refuses was printed")
        used = [r for r in log if r.key_sha256 == one.key_sha256 and r.started >= one.at]
        if gone is not None and on_request(stage, one, gone):
            continue
        if any(
            request.status != 200 for request in used if request.started < one.at + stage.hold / 2
        ):
            found.append("a request with a key that was just printed was refused")
    return found
