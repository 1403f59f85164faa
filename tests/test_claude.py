"""
Claude Code itself, with `keybroker get` as its helper and a real LiteLLM behind it.

    claude -> recorder -> LiteLLM <- keybroker get <- claude
                             |
                         PostgreSQL

What a request was answered, and with which key, comes from the recorder; when a key came and went
comes from the database. keybroker is asked for neither. No daemon runs: rotation, look-ups and
revocation are done by each `get`, of which a session runs one in the background when the time to
live of its key is over.

Times are short, the promise is the same: a key that was printed is valid for `hold`. The client
uses a replaced key once more, at the prompt that makes it ask, and has the new one at the next. So
`hold` has to be longer than two prompts are apart, and no more is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Home
from tests.servers.claude import NEWEST, Result, run_claude, start_stream
from tests.servers.faults import CommitLate, Faults, refused_url
from tests.servers.litellm import LiteLLM, Request
from tests.servers.processes import wait_until

pytestmark = pytest.mark.servers

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
PONG = Result(0, "pong\n", "")
NEVER = datetime.max.replace(tzinfo=UTC)


class User:
    """Somebody with a profile `work` at the proxy, whose admin key is in a file."""

    def __init__(self, home: Home, litellm: LiteLLM) -> None:
        self.home = home.path
        self.litellm = litellm
        self._environment = home.environment
        self._config = home.path / ".config/keybroker/config.toml"
        self._config.parent.mkdir(mode=0o700)
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
def user(home: Home, litellm: LiteLLM) -> User:
    return User(home, litellm)


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


def test_a_prompt_is_answered(user: User, claude_version: str) -> None:
    """With the settings that status prints, one prompt is one request with one new key."""
    user.configure(lifetime="12s", hold="3s")
    settings = user.settings()

    answer = run_claude(claude_version, user.home, settings)

    assert settings["apiKeyHelper"] == f"exec {shlex.quote(KEYBROKER)} get work"
    assert answer == PONG
    [request] = user.messages()
    assert request.status == 200
    assert [request.key_sha256] == list(user.alive()) == list(user.keys())


def test_a_session_outlives_its_keys(user: User, claude_version: str) -> None:
    """
    A session is answered with one key after another, and never with a dead one.

    Beside it somebody else asks for the key, as a second session does: keys are replaced and
    revoked by whoever comes first, at any time between two prompts. A key lives for 15 s, is
    replaced after 3.5 to 5, and revoked 5 s later.
    """
    user.configure(lifetime="15s", hold="5s")
    answers, published = [], set()
    over = time.monotonic() + 90

    with start_stream(claude_version, user.home, user.settings()) as session:
        while len(published) < 4 and time.monotonic() < over:
            answers.append(session.ask())
            user.get()
            published.add(user.status()["fingerprint"])
        end = session.wait()

    assert len(published) == 4
    assert {(answer["is_error"], answer["result"]) for answer in answers} == {(False, "pong")}
    assert end.rc == 0
    requests, keys = user.messages(), user.keys()
    assert len(requests) == len(answers)
    assert {request.status for request in requests} == {200}
    assert len({request.key_sha256 for request in requests}) >= 3
    for request in requests:
        row = keys[request.key_sha256 or ""]
        dead = min(row["expires"], row.get("deleted_at") or row["expires"])
        assert request.finished
        assert row["created_at"] < request.started < request.finished < dead
    for old, new in itertools.pairwise(keys.values()):  # a replaced key was left to its readers
        assert old.get("deleted_at", NEVER) > new["created_at"] + timedelta(seconds=5)

    assert most_at_once(keys) <= 4

    left = set(user.alive()) - {user.get()}
    assert wait_until(lambda: user.get() not in left and not left & set(user.alive()), 30)
    asked_at = datetime.now(UTC)
    current, status = user.get(), user.status()
    waiting = {key["fingerprint"]: key["revoke_at"] for key in status["retired"]}
    assert {name[:8] for name in user.alive()} == {current[:8], *waiting}
    assert status["fingerprint"] == current[:8]
    assert all(datetime.fromisoformat(at) > asked_at for at in waiting.values())
    assert status["open"] == []


def test_an_idle_session_takes_the_new_key_after_one_refusal(
    user: User, claude_version: str
) -> None:
    """A key revoked while its session was idle is refused once; the user sees an answer."""
    user.configure(lifetime="60s", hold="3s")

    with start_stream(claude_version, user.home, user.settings()) as session:
        before = session.ask()
        [old] = user.alive()
        rotated = user.run("rotate", "work")
        new = user.get()
        revoked = wait_until(lambda: user.get() == new and old not in user.alive(), 20)
        after = session.ask()

    assert (before["result"], after["result"]) == ("pong", "pong")
    assert (rotated.rc, revoked) == (0, True)
    seen = [(request.key_sha256, request.status) for request in user.messages()]
    assert seen == [(old, 200), (old, 401), (new, 200)]


def test_a_stale_key_outlasts_an_outage_of_the_database(user: User) -> None:
    """
    While no key can be minted, the current one is printed; afterwards it is replaced.

    Prompts go on as far as LiteLLM answers them: from memory, for a key it has seen within the
    last minute. A call that failed may have minted a key, and counts as one for a minute; the
    profile has room for those of a helper that runs every second.
    """
    user.configure(lifetime="30s", hold="10s", max_live=20)

    with start_stream(NEWEST, user.home, user.settings()) as session:
        assert session.ask()["result"] == "pong"
        [old] = user.alive()
        assert wait_until(lambda: user.status()["phase"] == "stale", 20)
        with user.litellm.outage():
            user.forget_requests()
            handed_out = [user.get() for _ in range(3)]
            during = [session.ask()["result"] for _ in range(3)]
            failed = user.requests("/key/generate")
        assert wait_until(lambda: user.get() != old, 15)
        new = user.get()
        taken = wait_until(
            lambda: session.ask()["result"] == "pong" and user.messages()[-1].key_sha256 == new,
            15,
        )

    assert handed_out == [old] * 3
    assert {request.status for request in failed} == {500}
    assert during == ["pong"] * 3
    assert taken
    assert {request.status for request in user.messages()} == {200}
    assert new in user.alive()


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

    once = {"CLAUDE_CODE_MAX_RETRIES": "0"}
    answer = run_claude(claude_version, user.home, settings, env_extra=once)

    assert time.monotonic() - started < 8
    assert answer.rc == 1
    [line] = answer.stderr.splitlines()
    host = nowhere.removeprefix("http://")
    said = f"litellm: {host} could not be reached; keybroker source test work"
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

    answer = run_claude(NEWEST, user.home, settings)

    assert time.monotonic() - started < 15
    assert answer.rc == 1
    assert "Your apiKeyHelper script is failing" in answer.stdout
    lines = answer.stderr.splitlines()
    host = nowhere.removeprefix("http://")
    said = f"litellm: {host} could not be reached; keybroker source test work"
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
