"""The test servers are what the other tests take them for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Home
from tests.servers.claude import run_claude, start_stream
from tests.servers.keyring import Keyring
from tests.servers.litellm import UPSTREAM_KEY, LiteLLM
from tests.servers.processes import wait_until

pytestmark = pytest.mark.servers


def call(
    url: str, path: str, key: str, body: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """POST a body, or GET; returns the status and the answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def new_key(litellm: LiteLLM, alias: str) -> str:
    """Mint a key that lives for an hour."""
    request = {"key_alias": alias, "duration": "1h", "key_type": "llm_api"}
    status, answer = call(litellm.url, "/key/generate", litellm.master_key, request)
    assert status == 200
    key: str = answer["key"]
    return key


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def helper_settings(url: str, key_file: Path) -> dict[str, Any]:
    """Settings of a client whose helper prints a file."""
    return {"apiKeyHelper": f"cat {key_file}", "env": {"ANTHROPIC_BASE_URL": url}}


def test_a_key_is_a_row_until_it_is_deleted(litellm: LiteLLM) -> None:
    """A new key opens /v1/models and is a row; a deleted one is refused and remembered."""
    key = new_key(litellm, "a-row")

    [row] = [row for row in litellm.key_rows() if row["token"] == sha256(key)]
    left = row["expires"] - datetime.now(UTC)
    opened, _ = call(litellm.url, "/v1/models", key)
    deleted, _ = call(litellm.url, "/key/delete", litellm.master_key, {"keys": [key]})
    refused, answer = call(litellm.url, "/v1/models", key)

    assert row["key_alias"] == "a-row"
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert (opened, deleted, refused) == (200, 200, 401)
    assert answer["error"]["type"] == "token_not_found_in_db"
    assert sha256(key) not in {row["token"] for row in litellm.key_rows()}
    assert sha256(key) in {row["token"] for row in litellm.deleted_key_rows()}


def test_requests_are_recorded_with_the_key_presented(litellm: LiteLLM) -> None:
    """The log names method, path, status, times and the key, for refused keys too."""
    before = datetime.now(UTC)

    key = "sk-nobody-has-minted-this"

    call(litellm.url, "/v1/models", key)

    [seen] = [r for r in litellm.request_log() if r.key_sha256 == sha256(key)]
    assert (seen.method, seen.path, seen.status) == ("GET", "/v1/models", 401)
    assert seen.finished
    assert before <= seen.started <= seen.finished <= datetime.now(UTC)


def test_messages_reach_the_upstream_with_the_gateway_s_own_key(litellm: LiteLLM) -> None:
    """A virtual key stays at the gateway."""
    key = new_key(litellm, "upstream")
    message = {"role": "user", "content": "ping"}
    request = {"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [message]}

    status, answer = call(litellm.url, "/v1/messages", key, request)

    assert (status, answer["content"][0]["text"]) == (200, "pong")
    assert {r["x-api-key"] for r in litellm.upstream.requests()} == {UPSTREAM_KEY}


def test_an_outage_of_the_database_is_503_for_a_new_key(litellm: LiteLLM) -> None:
    """The proxy cannot look up a key it has not seen, and recovers by itself."""
    with litellm.outage():
        during, _ = call(litellm.url, "/v1/models", "sk-not-seen-before-the-outage")
    after, _ = call(litellm.url, "/v1/models", new_key(litellm, "after-the-outage"))

    assert (during, after) == (503, 200)


def test_the_client_gets_an_answer_through_the_gateway(
    litellm: LiteLLM, home: Home, claude_version: str
) -> None:
    """Claude Code asks its helper for the key and prints what the gateway passes on."""
    key_file = home.path / "key"
    key_file.write_text(new_key(litellm, f"client-{claude_version}"))

    result = run_claude(claude_version, home.path, helper_settings(litellm.url, key_file))

    assert (result.rc, result.stdout, result.stderr) == (0, "pong\n", "")


def test_a_running_client_takes_a_new_key(
    litellm: LiteLLM, home: Home, claude_version: str
) -> None:
    """A deleted key is refused once; the client asks its helper again and goes on."""
    old, new = (new_key(litellm, f"{name}-{claude_version}") for name in ("old", "new"))
    key_file = home.path / "key"
    key_file.write_text(old)
    settings = helper_settings(litellm.url, key_file)

    with start_stream(claude_version, home.path, settings) as session:
        first = session.ask("ping")
        key_file.write_text(new)
        call(litellm.url, "/key/delete", litellm.master_key, {"keys": [old]})
        second = session.ask("ping again")

    names = {sha256(old): "old", sha256(new): "new"}
    seen = [
        (names[r.key_sha256], r.status)
        for r in litellm.request_log()
        if r.key_sha256 in names and r.path.startswith("/v1/messages")
    ]
    assert (first["result"], second["result"]) == ("pong", "pong")
    assert seen[0] == ("old", 200)
    assert seen[-1] == ("new", 200)
    assert ("old", 401) in seen


def in_keyring(keyring: Keyring, home: Home, program: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the keyring's bus."""
    return subprocess.run(
        [sys.executable, "-c", f"import keyring; {program}"],
        env={**home.environment, **keyring.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_keyring_keeps_what_is_stored(keyring_session: Keyring, home: Home) -> None:
    """A second process reads what the first stored, through the Secret Service."""
    stored = in_keyring(keyring_session, home, "keyring.set_password('kb-test', 'me', 'wrapped')")
    read = in_keyring(
        keyring_session,
        home,
        "print(keyring.get_keyring().__module__, keyring.get_password('kb-test', 'me'))",
    )

    assert (stored.returncode, stored.stderr) == (0, "")
    assert (read.stdout, read.stderr) == ("keyring.backends.SecretService wrapped\n", "")


def test_a_locked_keyring_refuses(home: Home) -> None:
    """Nobody can answer a dialog here: a locked keyring is an error at once."""
    store = "keyring.set_password('kb-test', 'me', 'wrapped')"
    read = "print(keyring.get_password('kb-test', 'me'))"
    with Keyring() as keyring:
        in_keyring(keyring, home, store)
        keyring.lock()
        locked = in_keyring(keyring, home, read)
        keyring.unlock()
        unlocked = in_keyring(keyring, home, read)

    assert locked.returncode == 1
    assert "KeyringLocked" in locked.stderr
    assert unlocked.stdout == "wrapped\n"


def test_a_dialog_that_nobody_answers_blocks_the_reader(home: Home) -> None:
    """A keyring with a dialog keeps its reader waiting as long as the dialog is open."""
    with Keyring(locked=True) as keyring, keyring.nobody_at_the_dialog() as dialog:
        read = subprocess.Popen(
            [sys.executable, "-c", "import keyring; keyring.get_password('kb-test', 'me')"],
            env={**home.environment, **keyring.environment},
        )
        asked = wait_until(lambda: "BeginPrompting" in dialog.tail(), 30)
        waiting = read.poll() is None
        read.kill()
        read.wait()

    assert (asked, waiting) == (True, True)
