"""
Claude Code itself, with the line that `keybroker status` prints and a real LiteLLM behind it.

What a request was answered, and with which key, comes from a recorder in front of LiteLLM; when
a key came and went comes from its database. keybroker is asked for neither.

Times are short, the promise is the same: a key that was printed is valid for `hold`, and whoever
has it is told when it is replaced. A client notices that its settings were touched after 0.8 to
1.5 s, so `hold` has to be longer than that and the time that a request takes.

Below are tests of `keybroker get --no-start`, which does all that is due by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker.sessions import NOTICED_SECONDS
from tests.party import NEVER, Party, answered, check_touches, end_of, parties, together
from tests.resident import Resident, until
from tests.servers.claude import NEWEST, Result, run_claude
from tests.servers.faults import Armed, CommitLate, Faults, Reset, Status, refused_url
from tests.servers.litellm import LiteLLM, Request
from tests.servers.processes import wait_until

pytestmark = pytest.mark.servers

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
PONG = Result(0, "pong\n", "")
NOTICED = timedelta(seconds=NOTICED_SECONDS)
REFUSES_ALL = Status(
    401,
    {"content-type": "application/json"},
    b'{"error":{"message":"Authentication Error, Invalid proxy server token passed",'
    b'"type":"auth_error","param":"None","code":"401"}}',
)


class User:
    """Somebody with a profile `work` at the proxy, whose admin key is in a file."""

    def __init__(self, resident: Resident, litellm: LiteLLM) -> None:
        home = resident.home
        self.home = home.path
        self.litellm = litellm
        self.daemon = resident.owner
        self.client = {"XDG_RUNTIME_DIR": home.environment["XDG_RUNTIME_DIR"]}
        self._environment = home.environment
        self._config = home.path / ".config/keybroker/config.toml"
        self._config.touch(0o600)
        self._admin = home.path / "admin-key"
        self._admin.touch(0o600)
        self._admin.write_text(f"{litellm.master_key}\n")
        self._seen = len(litellm.request_log())

    def configure(
        self,
        *,
        lifetime: str,
        hold: str,
        base_url: str | None = None,
        key_api: str | None = None,
        max_live: int = 4,
    ) -> None:
        """Write the profile; unless told otherwise all is at the proxy."""
        self._config.write_text(
            f"""
            [cache]
            key = "file"

            [profiles.work]
            base_url = "{base_url or self.litellm.url}"
            helper_ttl = "1s"
            hold = "{hold}"
            max_live = {max_live}

            [profiles.work.source]
            type = "litellm"
            url = "{key_api or base_url or self.litellm.url}"
            admin = {{ file = "{self._admin}" }}
            lifetime = "{lifetime}"
            timeout = "2s"
            """
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Type a command."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([KEYBROKER, *words], env=self._environment, text=True, **pipes)

    def run(self, *words: str) -> Result:
        """Type a command and wait for its end."""
        with self.start(*words) as process:
            stdout, stderr = process.communicate(timeout=60)
        return Result(process.returncode, stdout, stderr)

    def get(self) -> str:
        """Be handed a key; its SHA-256, by which the database and the recorder know it."""
        done = self.run("get", "--no-start", "work")
        assert (done.rc, done.stderr) == (0, "")
        return sha256(done.stdout.removesuffix("\n"))

    def status(self) -> dict[str, Any]:
        """What `status --json` says of the profile."""
        done = self.run("status", "work", "--json")
        assert (done.rc, done.stderr) == (0, "")
        profile: dict[str, Any] = json.loads(done.stdout)["profiles"][0]
        return profile

    def settings(self) -> dict[str, Any]:
        """What `status --json` says to paste."""
        settings: dict[str, Any] = self.status()["settings"]
        return settings

    def alive(self) -> dict[str, dict[str, Any]]:
        """The database's rows of this user's keys, by their SHA-256, oldest first."""
        return self._ours(self.litellm.key_rows())

    def keys(self) -> dict[str, dict[str, Any]]:
        """Every row of this user's keys, of those that are deleted too, oldest first."""
        rows = self._ours(self.litellm.deleted_key_rows() + self.litellm.key_rows())
        return dict(sorted(rows.items(), key=lambda item: item[1]["created_at"]))

    def _ours(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        [file] = (self.home / ".local/state/keybroker").glob("*/instance")
        prefix = f"kb-{file.read_text()}-work-"
        return {row["token"]: row for row in rows if (row["key_alias"] or "").startswith(prefix)}

    def requests(self, path: str) -> list[Request]:
        """The requests to a path since this user is here, by anybody."""
        log = self.litellm.request_log()[self._seen :]
        return [r for r in log if r.method == "POST" and r.path.split("?")[0] == path]

    def messages(self) -> list[Request]:
        """What Claude Code asked of the model."""
        return self.requests("/v1/messages")

    def forget_requests(self) -> None:
        """Count requests from here on."""
        self._seen = len(self.litellm.request_log())


@pytest.fixture
def user(resident: Resident, litellm: LiteLLM) -> User:
    """Somebody whose daemon, if a helper starts one, ends with the test."""
    return User(resident, litellm)


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def most_at_once(keys: dict[str, dict[str, Any]]) -> int:
    """How many rows the database has ever had at the same time."""
    rows = list(keys.values())
    return max(
        sum(row["created_at"] <= new["created_at"] < row.get("deleted_at", NEVER) for row in rows)
        for new in rows
    )


def one_line(line: str) -> str:
    """The line that a client shows of its helper: short, keybroker's, with the profile first."""
    said = line.removeprefix("apiKeyHelper failed: exited 75: ")
    assert said.startswith("keybroker: work: ")
    assert len(said.rstrip("\n")) <= 200
    return said.removeprefix("keybroker: work: ")


@pytest.fixture
def users(litellm: LiteLLM) -> Iterator[list[Party]]:
    """Each version of the client with one session, and with three at once."""
    with parties(litellm) as made:
        yield made


def test_sessions_outlive_their_keys(users: list[Party]) -> None:
    """
    Keys are replaced under running and under idle sessions, and nobody notices.

    A key is asked for with 21 s, replaced after 5 to 7, and revoked 7 s later. First every session
    talks all the time, for three rotations at least; then nobody does for longer than a key lives.
    """
    for user in users:
        user.begin(lifetime="21s", hold="7s", helper_ttl="5s")
    together(users, _outlive_keys)


def _outlive_keys(user: Party) -> None:
    before = set(user.keys())
    user.ask_until(lambda: len(user.used_by_all() - before) >= 3, 60)
    busy = user.used_by_all() - before
    last = user.messages()[-1]
    count = len(user.messages())
    ends = max(row["expires"] for row in user.alive().values())
    over = max(ends, datetime.now(UTC) + timedelta(seconds=21))
    until(lambda: datetime.now(UTC) > over, 30)
    user.ask()

    requests, keys = user.messages(), user.keys()
    assert {one.status for one in requests} == {200}
    for one in requests:
        row = keys[one.key_sha256 or ""]
        assert one.finished is not None
        assert row["created_at"] < one.started < one.finished < end_of(row)
    new = [key for key in keys if key not in before]
    assert set(new[: len(busy)]) == busy  # no session passed a new key over
    after = requests[count:]
    assert len(after) == len(user.names)  # one a session: none was refused and sent again
    assert all(one.started > end_of(keys[last.key_sha256 or ""]) for one in after)
    assert busy.isdisjoint({one.key_sha256 for one in after})
    check_touches(user, keys, late=timedelta(seconds=3))
    assert most_at_once(keys) <= 4


def test_sessions_get_over_what_happens_to_key_daemon_and_gateway(users: list[Party]) -> None:
    """
    A user's own edit, a key deleted behind our back, a killed daemon, a gateway that is away.

    Only three keys are ever minted: the first, the one for that which was deleted, and the one
    that somebody asks for while the gateway is away. Of all requests one is made with a dead key.
    """
    for user in users:
        user.begin(lifetime="180s", hold="14s", helper_ttl="10s")
    together(users, _have_trouble)


def _have_trouble(user: Party) -> None:
    ttl = timedelta(seconds=10)
    [first] = user.alive()

    # Its owner edits the settings twice: every session asks for its key anew, much too early.
    looks = len(user.looks(first))
    user.edit(cleanupPeriodDays=30)
    user.have_asked(ttl.total_seconds())
    asks = {name: user.given(name)[-1] for name in user.names}
    user.edit(cleanupPeriodDays=31)
    edited_at = datetime.now(UTC)
    user.have_asked(ttl.total_seconds())
    assert all(user.given(name)[-1] - asks[name] < ttl / 2 for name in user.names)
    until(lambda: datetime.now(UTC) > edited_at + NOTICED, 5)
    assert len(user.looks(first)) == looks
    assert list(user.keys()) == [first]

    # The key is deleted: one request says so, and the other sessions are told in time.
    user.have_asked(2 * ttl.total_seconds())
    user.litellm.delete_key(first)
    announcer = user.names[0]
    assert datetime.now(UTC) - user.given(announcer)[-1] < ttl / 2
    user.ask(announcer)
    assert user.messages()[-1].key_sha256 != first
    until(user.touches, 5)
    until(lambda: datetime.now(UTC) > user.touches()[-1] + NOTICED, 5)
    user.ask()
    [second] = user.alive()
    assert user.used_by_all() == {first, second}

    # The daemon is killed: the next helper starts another, which has the same key.
    old_daemon = user.resident.owner()
    user.resident.kill()
    user.edit(cleanupPeriodDays=32)
    user.ask_until(lambda: user.resident.owner() not in (None, old_daemon), 20)
    user.ask()
    assert user.fingerprint() == second[:8]
    assert list(user.keys()) == [first, second]

    # The gateway is away: prompts wait for it, and so does a rotation that somebody wishes for.
    broken = user.faults.next(Reset(), times=None)
    waiting = user.start_asking()
    status, _, said = user.resident.cli("rotate", "work")
    assert status in (69, 75), said
    until(lambda: at_least(2, broken, user.names), 30)
    assert sha256(user.resident.key()) == second
    user.faults.clear()
    answered(waiting)
    user.ask_until(lambda: len(user.used_by_all()) == 3, 30)

    requests, keys = user.messages(), user.keys()
    assert len(keys) == 3
    assert user.used_by_all() == set(keys)
    refused = [one for one in requests if one.status != 200]
    assert [(one.session, one.key_sha256, one.status) for one in refused] == [
        (announcer, first, 401)
    ]
    dead = [one for one in requests if one.started > end_of(keys[one.key_sha256 or ""])]
    assert dead == refused
    assert user.resident.row()["phase"] == "fresh"
    check_touches(user, keys, late=timedelta(seconds=5))


def test_a_good_key_outlives_what_refuses_all_keys(users: list[Party], litellm: LiteLLM) -> None:
    """
    While its database is away, LiteLLM answers 503 to everybody, and 401 to some for a moment
    when it is back; other gateways answer 401 all the while.

    Sessions take a 401 for the end of their key and ask for another, and the daemon looks at it
    and is refused too. The key is neither replaced nor condemned, and serves again afterwards.
    """
    for user in users:
        user.begin(lifetime="10m", hold="30s", helper_ttl="20s")
    first = {user: next(iter(user.alive())) for user in users}
    together(users, lambda user: litellm.forget_key(first[user]))

    with litellm.outage():
        waiting = {user: user.start_asking() for user in users}
        together(users, lambda user: _is_told_nothing(user, first[user]))
    for user in users:
        answered(waiting[user])
    together(users, lambda user: _is_refused_for_a_while(user, first[user]))


def _is_told_nothing(user: Party, key: str) -> None:
    """Neither the sessions nor the daemon learn anything about the key, which is given on."""
    until(lambda: all(statuses(user, name)[503] >= 2 for name in user.names), 40)
    looks = sum(one.path == "/v1/models" for one in user.faults.log)
    asks = [user.resident.ask("work", os.getpid(), 60_000) for _ in range(2)]  # soon: suspicious
    assert [sha256(one.removeprefix("ok ")) for one in asks] == [key] * 2
    assert sum(one.path == "/v1/models" for one in user.faults.log) > looks
    assert user.resident.row()["phase"] == "fresh"


def _is_refused_for_a_while(user: Party, key: str) -> None:
    """Everything is refused, the look at the key and the minting of another."""
    broken = user.faults.next(REFUSES_ALL, times=None)
    waiting = user.start_asking()
    until(lambda: user.resident.row()["phase"] == "suspect", 30)
    until(lambda: at_least(3, broken, user.names), 30)
    until(lambda: any(one.path == "/key/generate" for one in broken.entries), 15)
    assert sha256(user.resident.key()) == key
    user.faults.clear()
    answered(waiting)
    until(lambda: user.resident.row()["phase"] == "fresh", 30)
    user.ask()

    assert list(user.keys()) == list(user.alive()) == [key]
    assert user.used_by_all() == {key}
    assert {one.key_sha256 for one in user.messages()} == {key}
    # LiteLLM itself says 401 for a moment, while it finds its database again.
    assert {200, 503} <= {one.status for one in user.messages()} <= {200, 401, 503}
    assert user.touches() == []


def at_least(times: int, broken: Armed, names: list[str]) -> bool:
    """Say whether every session met a fault that often."""
    met = Counter(one.headers.get("x-session") for one in broken.entries)
    return all(met[name] >= times for name in names)


def statuses(user: Party, name: str) -> Counter[int | None]:
    return Counter(one.status for one in user.messages(name))


def test_a_prompt_is_answered(user: User, claude_version: str) -> None:
    """With nothing running, the line that status prints starts a daemon; one prompt, one key."""
    user.configure(lifetime="60s", hold="10s")

    answer = run_claude(claude_version, user.home, user.settings(), env_extra=user.client)

    assert answer == PONG
    [request] = user.messages()
    assert request.status == 200
    assert [request.key_sha256] == list(user.alive()) == list(user.keys())
    assert user.daemon() is not None


def test_a_stale_key_outlasts_an_outage_of_the_database(user: User) -> None:
    """
    While no key can be minted, the current one is printed; afterwards it is replaced.

    A call that failed may have minted a key, and counts as one for a minute; the profile has room
    for those of a helper that runs every second.
    """
    user.configure(lifetime="30s", hold="10s", max_live=20)

    old = user.get()
    assert wait_until(lambda: user.status()["phase"] == "stale", 20)
    with user.litellm.outage():
        user.forget_requests()
        handed_out = [user.get() for _ in range(3)]
        failed = user.requests("/key/generate")
    assert wait_until(lambda: user.get() != old, 15)

    assert handed_out == [old] * 3
    assert {request.status for request in failed} == {500}
    assert user.get() in user.alive()


def test_a_client_without_gateway_says_what_its_helper_says(
    user: User, claude_version: str
) -> None:
    """
    Nothing answers and nothing is cached: a second later the user reads why, and what to type.

    The client would try for minutes to reach the gateway by itself; here it may try once.
    """
    nowhere = refused_url()
    user.configure(lifetime="12s", hold="3s", base_url=nowhere)
    settings, started = user.settings(), time.monotonic()

    once = {**user.client, "CLAUDE_CODE_MAX_RETRIES": "0"}
    answer = run_claude(claude_version, user.home, settings, env_extra=once)

    assert time.monotonic() - started < 8
    assert answer.rc == 1
    [line] = answer.stderr.splitlines()
    host = nowhere.removeprefix("http://")
    said = f"litellm: {host} could not be reached; is it running? see base_url"
    assert one_line(line) == said
    assert user.litellm.master_key not in answer.stdout + answer.stderr
    assert user.messages() == []


def test_a_failing_helper_fails_the_newest_client_within_seconds(user: User) -> None:
    """
    The client asks a helper that fails three times, and each time the reason is there at once.

    The gateway answers messages, only its key API is away. Clients before 2.1.208 go on for some
    minutes without a word, whatever their helper says.
    """
    nowhere = refused_url()
    user.configure(lifetime="12s", hold="3s", key_api=nowhere)
    settings, started = user.settings(), time.monotonic()

    answer = run_claude(NEWEST, user.home, settings, env_extra=user.client)

    assert time.monotonic() - started < 15
    assert answer.rc == 1
    assert "Your apiKeyHelper script is failing" in answer.stdout
    lines = answer.stderr.splitlines()
    host = nowhere.removeprefix("http://")
    said = f"litellm: {host} could not be reached; is it running? see base_url"
    assert [one_line(line) for line in lines] == [said] * 3
    assert user.litellm.master_key not in answer.stdout + answer.stderr
    sent = [(request.key_sha256, request.status) for request in user.messages()]
    assert set(sent) == {(sha256("Bearer"), 401)}  # the header's word, and no key after it


def test_a_key_that_comes_half_a_minute_late_is_found(user: User) -> None:
    """
    A call that the proxy carries out 30 s after our deadline leaves no key behind.

    The first `get` gives up, the second mints under another label. Of the look-ups of the first
    label, those at once and after 5 s find nothing and the one after 60 s finds the key, which
    nobody was given, and has it revoked; until then keys are replaced as ever. Row by row, the
    database never holds more than 4 keys.
    """
    deadline, late_by = timedelta(seconds=2), timedelta(seconds=30)
    handed_out = set()

    with Faults(user.litellm.url) as faults:
        user.configure(lifetime="40s", hold="10s", base_url=faults.url)
        late = CommitLate((deadline + late_by).total_seconds())
        armed = faults.next(late, method="POST", path="/key/generate")
        first = user.run("get", "--no-start", "work")
        [opened] = user.status()["open"]

        def found() -> bool:
            handed_out.add(user.get())
            time.sleep(1)
            labels = {row["key_alias"] for row in user.alive().values()}
            return armed.done.is_set() and opened["label"] not in labels

        assert wait_until(found, 105)
        status, keys = user.status(), user.keys()

    assert (first.rc, first.stdout) == (75, "")
    assert one_line(first.stderr).endswith(" did not answer in time; keybroker source test work\n")
    [(token, row)] = [at for at in keys.items() if at[1]["key_alias"] == opened["label"]]
    began = datetime.fromisoformat(opened["since"])
    assert row["created_at"] > began + deadline + late_by
    assert row["deleted_at"] > began + deadline + timedelta(seconds=60)
    assert token not in handed_out
    assert handed_out == set(keys) - {token}
    assert len(handed_out) >= 3
    assert most_at_once(keys) <= 4
    assert status["open"] == []


def test_ten_at_once_mint_one_key(user: User) -> None:
    """Ten who find nothing are handed the same key, and it is the only one."""
    user.configure(lifetime="60s", hold="3s")

    started = [user.start("get", "--no-start", "work") for _ in range(10)]
    said = [process.communicate(timeout=60) for process in started]

    assert {process.returncode for process in started} == {0}
    [(key, errors)] = set(said)
    assert errors == ""
    assert [sha256(key.removesuffix("\n"))] == list(user.alive()) == list(user.keys())
    assert [request.status for request in user.requests("/key/generate")] == [200]
