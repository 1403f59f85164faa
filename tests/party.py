"""
Users with real clients at a real gateway, and what the gateway saw of them.

    claude, claude, ... -> faults -> recorder -> LiteLLM <- recorder <- faults <- daemon
       |                                                                            |
       +- settings.json: helper -> socket ------------------------------------------+

What became of keys is read from LiteLLM's database, what was asked with which key from the
recorder in front of it, when a settings file was touched from the file system.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from tests.resident import Resident, fresh_home, until
from tests.servers.claude import VERSIONS, Session, start_stream, write_settings
from tests.servers.faults import Faults
from tests.servers.litellm import LiteLLM, Request

LOOK_SECONDS = 0.01  # between two looks at a settings file; a daemon's touches are 2 s apart
NEVER = datetime.max.replace(tzinfo=UTC)


class Party:
    """
    One user: a profile `work`, a daemon, and one or more sessions of a version of the client.

    Args:
        version: The client's.
        count: Of sessions.
    """

    def __init__(self, version: str, count: int, resident: Resident, litellm: LiteLLM) -> None:
        self.resident = resident
        self.litellm = litellm
        home = resident.home.path.name  # the gateway's log is that of all tests
        self.names = [f"{home}/{number}" for number in range(count)]
        self.sessions: dict[str, Session] = {}
        self._version = version
        self._stack = ExitStack()
        self._home = resident.home.path
        self._settings = self._home / ".claude" / "settings.json"
        self._own_edits: set[datetime] = set()
        self._seen_times: list[datetime] = []

    def __repr__(self) -> str:
        return f"<Party of {self._version} with {len(self.names)} sessions>"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.faults = stack.enter_context(Faults(self.litellm.url))
            self._threads = stack.enter_context(ThreadPoolExecutor(len(self.names)))
            stack.callback(self.resident.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, *, lifetime: str, hold: str, helper_ttl: str) -> None:
        """
        Configure, start the daemon, put what `status` prints into settings, start sessions.

        Each session is asked once before the next is started: a start takes a second of computing.
        """
        admin = self._home / "admin-key"
        admin.touch(0o600)
        admin.write_text(f"{self.litellm.master_key}\n")
        self.resident.configure(
            f"""
            [profiles.work]
            base_url = "{self.faults.url}"
            helper_ttl = "{helper_ttl}"
            hold = "{hold}"

            [profiles.work.source]
            type = "litellm"
            admin = {{ file = "{admin}" }}
            lifetime = "{lifetime}"
            timeout = "3s"
            """
        )
        self.resident.start()
        status, text, _ = self.resident.cli("status", "work", "--json")
        assert status == 0
        self.settings: dict[str, Any] = json.loads(text)["profiles"][0]["settings"]
        self.edit()
        self._watch()
        for name in self.names:
            variables = {
                "XDG_RUNTIME_DIR": self.resident.environment["XDG_RUNTIME_DIR"],
                "ANTHROPIC_CUSTOM_HEADERS": f"x-session: {name}",
            }
            session = start_stream(self._version, self._home, None, variables)
            self.sessions[name] = self._stack.enter_context(session)
            self.ask(name)

    # what its user does

    def edit(self, **more: Any) -> None:
        """Write the settings anew, as their owner does."""
        write_settings(self._home, {**self.settings, **more})
        self._own_edits.add(_changed(self._settings))

    def start_asking(self, *names: str) -> dict[str, Future[dict[str, Any]]]:
        """Send one prompt in each session, or in those named; the answers come."""
        chosen = names or tuple(self.names)
        return {name: self._threads.submit(self.sessions[name].ask) for name in chosen}

    def ask(self, *names: str) -> None:
        """Send one prompt in each session at once, or in those named; all must be answered."""
        answered(self.start_asking(*names))

    def ask_until(self, what: Callable[[], object], seconds: float) -> None:
        """Send prompts in every session, one after another, until something is so."""

        def asked() -> object:
            self.ask()
            return what()

        until(asked, seconds, every=0.4)

    def fingerprint(self) -> str:
        """The current key's, as the daemon says."""
        return str(self.resident.row()["fingerprint"])

    # what the gateway has

    def alive(self) -> dict[str, dict[str, Any]]:
        """The database's rows of this user's keys, by their SHA-256, oldest first."""
        return self._ours(self.litellm.key_rows())

    def keys(self) -> dict[str, dict[str, Any]]:
        """The same of those too that were deleted."""
        rows = self._ours(self.litellm.deleted_key_rows() + self.litellm.key_rows())
        return dict(sorted(rows.items(), key=lambda item: item[1]["created_at"]))

    def _ours(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        prefix = f"kb-{(self.resident.state / 'instance').read_text()}-work-"
        return {row["token"]: row for row in rows if (row["key_alias"] or "").startswith(prefix)}

    def messages(self, name: str | None = None) -> list[Request]:
        """What was asked of the model in all sessions, or in one, as far as it was answered."""
        return [
            one
            for one in self.litellm.request_log()
            if one.session in ([name] if name else self.names)
            and (one.method, one.path.split("?")[0]) == ("POST", "/v1/messages")
            and one.status is not None
        ]

    def looks(self, key: str) -> list[Request]:
        """The daemon's own looks at a key."""
        return [
            one
            for one in self.litellm.request_log()
            if (one.path, one.key_sha256, one.session) == ("/v1/models", key, "")
        ]

    def used(self, name: str) -> set[str]:
        """The keys with which a session was answered."""
        return {str(one.key_sha256) for one in self.messages(name) if one.status == 200}

    def used_by_all(self) -> set[str]:
        """The keys with which every session was answered."""
        return set.intersection(*(self.used(name) for name in self.names))

    # what the daemon did

    def given(self, name: str) -> list[datetime]:
        """When a session was given a key, by the audit log; a few at once count as one."""
        pid = self.sessions[name].pid
        lines = (self.resident.state / "audit.jsonl").read_text().splitlines()[1:]
        found = [one for one in map(json.loads, lines) if one["event"] == "given"]
        return [datetime.fromisoformat(one["at"]) for one in found if one["pid"] == pid]

    def have_asked(self, seconds: float) -> None:
        """Send prompts until the daemon was asked by every session, once more."""
        before = {name: len(self.given(name)) for name in self.names}
        self.ask_until(lambda: all(len(self.given(n)) > before[n] for n in self.names), seconds)

    def touches(self) -> list[datetime]:
        """When somebody else than its owner changed the settings file, or its times."""
        return [at for at in self._seen_times if at not in self._own_edits]

    def _watch(self) -> None:
        over = threading.Event()

        def look() -> None:
            last = _changed(self._settings)
            while not over.wait(LOOK_SECONDS):
                if (now := _changed(self._settings)) != last:
                    self._seen_times.append(now)
                    last = now

        watcher = threading.Thread(target=look, name="settings")
        watcher.start()
        self._stack.callback(watcher.join)
        self._stack.callback(over.set)


def _changed(file: Path) -> datetime:
    return datetime.fromtimestamp(os.stat(file).st_mtime, UTC)


def answered(asked: Mapping[str, Future[dict[str, Any]]]) -> None:
    """See that every prompt gets its answer."""
    said = {name: one.result(timeout=90) for name, one in asked.items()}
    found = {name: (one["is_error"], one["result"]) for name, one in said.items()}
    assert found == dict.fromkeys(asked, (False, "pong"))


@contextmanager
def parties(litellm: LiteLLM) -> Iterator[list[Party]]:
    """Yield four users: of each version of the client, one with one session, one with three."""
    with ExitStack() as stack:
        made = []
        for version in VERSIONS:
            for count in (1, 3):
                resident = Resident(stack.enter_context(fresh_home()))
                made.append(stack.enter_context(Party(version, count, resident, litellm)))
        yield made


def together(users: Sequence[Party], act: Callable[[Party], object]) -> None:
    """Have something done by all at once; the first failure is raised when all are done."""
    with ThreadPoolExecutor(len(users)) as threads:
        started = [(user, threads.submit(act, user)) for user in users]
        for user, one in started:
            try:
                one.result()
            except BaseException as error:
                error.add_note(f"{user}\n{timeline(user)}")
                raise


def end_of(row: Mapping[str, Any]) -> datetime:
    """When the gateway stopped taking a key, or will."""
    end: datetime = min(row["expires"], row.get("deleted_at") or NEVER)
    return end


def check_touches(user: Party, keys: Mapping[str, Mapping[str, Any]], late: timedelta) -> None:
    """
    See that the settings were touched when a key was replaced, and at no other time.

    Args:
        keys: All of the user's, oldest first; each but the first replaced one.
        late: How much later than a new key's birth its touch may be.
    """
    births = [row["created_at"] for row in keys.values()][1:]
    touches = user.touches()
    assert len(touches) == len(births), (touches, births)
    for born, touched in zip(births, touches, strict=True):
        assert born - timedelta(seconds=0.1) <= touched <= born + late


def timeline(user: Party) -> str:
    """Tell what the gateway, the clients and the settings file saw, to explain a failure."""
    keys = user.keys()
    numbers = {key: f"key {number}" for number, key in enumerate(keys)}
    events = [(at, "settings touched") for at in user.touches()]
    for key, row in keys.items():
        events.append((row["created_at"], f"{numbers[key]} made"))
        if "deleted_at" in row:
            events.append((row["deleted_at"], f"{numbers[key]} deleted"))
    for one in user.litellm.request_log():
        if one.session in user.names or one.key_sha256 in keys:
            who, key = one.session or "daemon", numbers.get(one.key_sha256 or "", "?")
            events.append((one.started, f"  {who} {one.path} {key} {one.status}"))
    for name in user.names:
        events += [(at, f"    {name} was given a key") for at in user.given(name)]
    return "\n".join(f"{at:%T.%f} {what}" for at, what in sorted(events))
