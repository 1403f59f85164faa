"""OpenCode, the real one, with a real LiteLLM and a key of its own that a daemon keeps current."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from keybroker.config import load
from keybroker.paths import KEYS
from tests.resident import Resident, until
from tests.servers.litellm import LiteLLM
from tests.servers.opencode import run_opencode
from tests.servers.upstream import MODEL

pytestmark = pytest.mark.servers
MINE = '{\n  // mine\n  "model": "other/model",\n  "provider": {"other": {"name": "theirs"},},\n}\n'


@pytest.fixture
def user(resident: Resident, litellm: LiteLLM) -> Resident:
    """Somebody with a profile at the proxy; no daemon runs yet."""
    resident.environment["ADMIN"] = litellm.master_key
    resident.configure(
        f'[profiles.work]\nbase_url = "{litellm.url}"\nhelper_ttl = "1s"\nhold = "5s"\n'
        '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
        f'models = ["{MODEL}"]\n'
    )
    (resident.home.path / "project").mkdir()
    return resident


def opencode_file(user: Resident) -> Path:
    return user.home.path / ".config/opencode/opencode.json"


def key_file(user: Resident) -> Path:
    return user.socket.parent / KEYS / "work-opencode"


def connect(user: Resident, *words: str) -> str:
    status, said, wrong = user.cli("connect", "opencode", *words)
    assert status == 0, wrong
    return said


def prompt(user: Resident) -> str:
    done = run_opencode(
        user.environment,
        user.home.path / "project",
        *("run", "-m", f"keybroker-work/{MODEL}", "ping"),
    )
    assert done.rc == 0, done
    return done.stdout.strip()


def test_it_answers_and_takes_the_new_key_when_it_is_started_anew(
    user: Resident, litellm: LiteLLM
) -> None:
    """
    Its requests go to /v1 with the profile's own key, which is short and has a budget.

    After a rotation the file has another, with which the next run asks. Claude Code's key is
    never sent.
    """
    connect(user)
    seen, sent = len(litellm.request_log()), []
    for _ in range(2):
        key = key_file(user).read_text()
        assert prompt(user) == "pong"
        requests = [r for r in litellm.request_log()[seen:] if r.path == "/v1/chat/completions"]
        sent.append({r.key_sha256 for r in requests})
        assert sent[-1] == {sha256(key.encode()).hexdigest()}
        assert {r.status for r in requests} == {200}
        assert user.cli("rotate", "work-opencode")[0] == 0
        until(lambda key=key: key_file(user).read_text() != key)
        seen = len(litellm.request_log())

    [row] = [row for row in litellm.key_rows() if row["token"] in sent[1]]
    assert "-work-opencode-" in row["key_alias"]
    assert row["max_budget"] == 2.0
    lives = row["expires"] - row["created_at"]
    assert 6 * 3600 - 60 < lives.total_seconds() < 6 * 3600 + 60


def test_disconnect_leaves_nothing(user: Resident, litellm: LiteLLM) -> None:
    """Both files are what they were, byte for byte; the key is out of its file, and dead."""
    file = opencode_file(user)
    file.parent.mkdir()
    file.write_text(MINE)
    configuration = user.file.read_bytes()
    connect(user)
    digest = sha256(key_file(user).read_bytes()).hexdigest()
    assert "// mine" in file.read_text()

    status, said, wrong = user.cli("disconnect", "opencode")

    assert (status, wrong) == (0, "")
    assert said.splitlines() == [
        f"restored  {file}, byte for byte",
        f"restored  {user.file}, byte for byte",
        "work-opencode: 1 revoked",
    ]
    assert file.read_text() == MINE
    assert user.file.read_bytes() == configuration
    assert not key_file(user).exists()
    assert digest not in {row["token"] for row in litellm.key_rows()}


def test_what_is_written(user: Resident) -> None:
    """The address ends with /v1, the key is a reference, and the key's file is private."""
    user.file.write_text(
        user.file.read_text().replace("helper_ttl", 'headers = { "X-Route" = "eng" }\nhelper_ttl')
    )
    connect(user)
    found = json.loads(opencode_file(user).read_text())
    url = load([user.file], user.environment).profiles["work"].base_url

    assert found == {
        "provider": {
            "keybroker-work": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "work",
                "options": {
                    "baseURL": f"{url}/v1",
                    "apiKey": f"{{file:{key_file(user)}}}",
                    "headers": {"X-Route": "eng"},
                },
                "models": {MODEL: {}},
            }
        }
    }
    assert key_file(user).stat().st_mode & 0o777 == 0o600
    assert user.row("work-opencode")["exported"] == str(key_file(user))
    assert user.row("work")["exported"] is None


def test_a_second_time_changes_nothing(user: Resident) -> None:
    """Nor is there a second profile; what was changed of it by hand stays, and is kept later."""
    connect(user)
    before = user.file.read_text(), opencode_file(user).read_text()
    connect(user)
    assert (user.file.read_text(), opencode_file(user).read_text()) == before
    changed = before[0].replace("max_budget = 2.0", "max_budget = 9.5")
    user.file.write_text(changed)
    connect(user)
    assert user.file.read_text() == changed

    status, said, _ = user.cli("disconnect")
    assert status == 0
    assert "keybroker connect opencode: its own key" in said
    assert user.file.read_text() == changed
    assert not opencode_file(user).exists()


def test_the_profile_without_a_name_stays_what_it_was(user: Resident) -> None:
    """A profile for another program is not asked for by a command that names none."""
    connect(user)
    status, key, _ = user.cli("get")

    assert (status, key.strip()) == (0, user.key("work"))
    assert user.cli("get", "work-opencode")[1] == f"{key_file(user).read_text()}\n"


def test_a_file_with_comments_is_preferred(user: Resident) -> None:
    """OpenCode lets opencode.jsonc count more than opencode.json."""
    file = opencode_file(user).with_suffix(".jsonc")
    file.parent.mkdir()
    file.write_text(MINE)
    connect(user)

    assert "keybroker-work" in file.read_text()
    assert not opencode_file(user).exists()
    assert prompt(user) == "pong"


def test_dry_run_says_it_all_and_does_nothing(user: Resident) -> None:
    """Both files, and no daemon is started for it."""
    configuration = user.file.read_bytes()
    said = connect(user, "--dry-run")

    assert "+[profiles.work-opencode]" in said
    assert '"apiKey": "{file:' in said
    assert user.file.read_bytes() == configuration
    assert not opencode_file(user).exists()
    assert user.owner() is None


def test_a_profile_that_nothing_can_be_added_to_is_printed(user: Resident) -> None:
    """Where `profiles` is a table on one line, a person has to write it."""
    user.file.write_text(
        'profiles = { work = { base_url = "http://127.0.0.1:9", source = { type = "static", '
        'placeholder = "x" } } }\n'
    )
    status, said, wrong = user.cli("connect", "opencode")

    assert (status, said) == (78, "")
    assert f"{user.file}: nothing can be added at its end" in wrong
    assert "[profiles.work-opencode]" in wrong


def test_a_source_that_mints_nothing_is_said_to_share_its_key(user: Resident) -> None:
    """The key of a static source is the one that all have."""
    user.file.write_text(
        '[cache]\nkey = "file"\n[profiles.work]\nbase_url = "http://127.0.0.1:9/anthropic"\n'
        'verify = "none"\n[profiles.work.source]\ntype = "static"\nplaceholder = "ollama"\n'
    )
    status, _, wrong = user.cli("connect", "opencode")

    assert status == 0, wrong
    assert "the key is the one that all have: its source makes no others" in wrong
    assert key_file(user).read_text() == "ollama"
    options = json.loads(opencode_file(user).read_text())["provider"]["keybroker-work"]["options"]
    assert options["baseURL"] == "http://127.0.0.1:9/v1"
