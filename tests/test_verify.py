"""
`keybroker verify`, at gateways that are well and at such that are not.

LiteLLM, nginx with ModSecurity, curl and Claude Code are themselves; other faults are those of a
small gateway of the tests', one at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from keybroker.troubles import TROUBLES
from tests.canaries import Canaries
from tests.resident import Home, Resident
from tests.servers import refusals
from tests.servers.authority import Authority
from tests.servers.claude import NEWEST, VERSIONS, WITH_NODE_20, Result, run_claude
from tests.servers.faults import refused_url
from tests.servers.litellm import LiteLLM
from tests.servers.plain import Plain
from tests.servers.upstream import Refusal
from tests.servers.waf import Waf

pytestmark = pytest.mark.servers

KEY = "sk-fixed-0123456789abcdef0123456789abcdef"
NOT_FOUND = "the gateway does not know the model"


class User:
    """Somebody with one profile, `work`, whose key is in a file."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.canaries = Canaries()
        self.canaries.know("key", KEY)
        self.key = resident.home.path / "key"
        self.key.touch(0o600)
        self.key.write_text(f"{KEY}\n")

    def configure(self, url: str, more: str = "", source: str = "") -> None:
        source = source or f'type = "static"\nkey = {{ file = "{self.key}" }}'
        self.resident.configure(
            f'[profiles.work]\nbase_url = "{url}"\nverify = "none"\n{more}\n'
            f"[profiles.work.source]\n{source}\n"
        )

    def configure_litellm(self, litellm: LiteLLM) -> None:
        self.key.write_text(f"{litellm.master_key}\n")
        self.canaries.know("master", litellm.master_key)
        source = f'type = "litellm"\nadmin = {{ file = "{self.key}" }}'
        self.configure(litellm.url, source=source)

    def verify(self, *words: str, **variables: str) -> Result:
        """Type the command; neither key nor what a gateway said may be in what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", "from keybroker.cli import main; main()", "verify", *words],
            env={**self.resident.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert self.canaries.seen_in(done.stdout + done.stderr) == []
        assert "Traceback" not in done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def asked(self, *words: str, status: int = 0, **variables: str) -> dict[str, Any]:
        """Type it with --json; return what it says."""
        done = self.verify("--json", *words, **variables)
        assert done.rc == status, done
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["works"] == (status == 0)
        return found


@pytest.fixture
def user(resident: Resident) -> User:
    return User(resident)


@pytest.fixture
def gateway(user: User) -> Iterator[Plain]:
    """A gateway that is well; whatever it refuses, it says a secret with it."""
    with Plain(KEY) as server:
        server.says = f" {KEY} {user.canaries.new('body')}"
        user.configure(server.url)
        yield server


def rows(found: dict[str, Any]) -> list[int]:
    return [one["row"] for one in found["troubles"]]


def seen(found: dict[str, Any]) -> dict[str, str]:
    """What came of each request."""
    return {one["form"]: one["seen"] for one in found["requests"]}


# A gateway that is well


def test_all_forms_are_shown_then_a_line_then_what_to_type(user: User, gateway: Plain) -> None:
    """The table is aligned; each answer has its status, its time and the gateway's name for it."""
    done = user.verify()
    assert (done.rc, done.stderr) == (0, "")
    table, facts, end = re.split(r"\n\n|\n(?=works)", done.stdout)
    head, *lines = table.splitlines()
    assert re.split(r"  +", head) == ["REQUEST", "KEY IN", "ANSWER", "MS", "REQUEST ID"]
    assert len({line.index("200" if "200" in line else "401") for line in lines}) == 1
    assert [re.sub(r" +[0-9]+  req_test$", "", line).split("  ")[0] for line in lines] == [
        *("message",) * 4,
        "message, streamed",
        "count_tokens",
    ]
    assert facts == "key                authorization and x-api-key are both read"
    works, todo = end.splitlines()
    assert re.fullmatch(
        r"works: the gateway took the key in authorization and x-api-key and answered in "
        r"[0-9]+ ms \(request req_test\)",
        works,
    )
    assert todo == "next: keybroker verify --deep work, which sends what a session sends"


def test_each_form_is_what_it_says(user: User, gateway: Plain) -> None:
    """One token to /v1/messages?beta=true, with the headers that Claude Code has."""
    user.verify()
    posts = [(path, headers, body) for path, headers, body in gateway.sent]
    assert [path for path, _, _ in posts] == [
        *("/v1/messages?beta=true",) * 5,
        "/v1/messages/count_tokens?beta=true",
    ]
    held = [("authorization" in h, "x-api-key" in h) for _, h, _ in posts]
    assert held == [
        *((True, True), (True, False), (False, True), (False, False)),
        *((True, True), (True, True)),
    ]
    for _, headers, body in posts[:5]:
        assert body["max_tokens"] == 1
        assert headers["anthropic-version"] == "2023-06-01"
        assert headers["anthropic-beta"].startswith("claude-code-")
        assert headers.get("authorization", f"Bearer {KEY}") == f"Bearer {KEY}"
    assert [body.get("stream", False) for _, _, body in posts] == [*[False] * 4, True, False]


@pytest.mark.parametrize(
    ("reads", "fact"),
    [
        (("authorization",), "authorization is read, x-api-key is not; Claude Code sends both"),
        (("x-api-key",), "x-api-key is read, authorization is not; Claude Code sends both"),
        ((), "none is asked for: whoever reaches this gateway may use it"),
    ],
)
def test_the_header_that_is_read_is_said(
    user: User, gateway: Plain, reads: tuple[str, ...], fact: str
) -> None:
    """A gateway that reads one works, since Claude Code sends both."""
    gateway.reads = reads
    found = user.asked()
    assert found["facts"]["key"] == fact
    assert found["reads"] == list(reads or ("authorization", "x-api-key"))


def test_a_model_that_nobody_has_proves_the_key(user: User, gateway: Plain) -> None:
    """It is asked for no more than was asked for; the status is 0, and says to name another."""
    gateway.model = "another"
    found = user.asked("--model", "nobody-has-it")
    assert found["conclusion"].endswith(f"{NOT_FOUND} nobody-has-it")
    assert "--model NAME" in found["next"]
    assert set(seen(found).values()) >= {"model"}

    deep = user.asked("--deep", "--model", "nobody-has-it", status=78)
    assert "session" not in seen(deep) or seen(deep)["session"] == "model"


def test_the_next_model_is_asked_for(user: User, gateway: Plain) -> None:
    """Without --model: the tiers of the profile, then one of ours, then `verify_model`."""
    gateway.model = "claude-of-the-house"
    user.configure(gateway.url, 'verify_model = "claude-of-the-house"')
    found = user.asked()
    assert found["model"] == "claude-of-the-house"
    assert found["conclusion"].startswith("the gateway took the key")


def test_an_id_of_another_kind_is_said_and_works(user: User, gateway: Plain) -> None:
    """Claude Code takes such a message, as the test of it below shows."""
    gateway.message_id = "chatcmpl-1"
    found = user.asked()
    assert seen(found)["message"] == "odd"
    assert "ids of another kind than msg_…" in found["conclusion"]


def test_count_tokens_is_optional(user: User, gateway: Plain) -> None:
    gateway.counts = False
    done = user.verify()
    assert done.rc == 0
    assert "404, not served (optional)" in done.stdout


# Not well


@pytest.mark.parametrize(
    ("ways", "status", "row", "said"),
    [
        ({"key": "sk-another"}, 77, 2, "the key is refused: 401 to message"),
        ({"page": 200}, 78, 4, "what answers is no API: 200 to message"),
        ({"page": 302}, 78, 4, "what answers is no API: 302 to message"),
        ({"page": 403}, 77, 12, "a firewall refuses what a session sends: 403 to message"),
    ],
)
def test_what_is_refused_is_named_by_its_row(
    user: User, gateway: Plain, ways: dict[str, Any], status: int, row: int, said: str
) -> None:
    """Status, row and what to do; a body that holds the key is repeated nowhere."""
    for name, value in ways.items():
        setattr(gateway, name, value)
    found = user.asked(status=status)
    assert rows(found) == [row]
    assert found["conclusion"] == said
    [trouble] = found["troubles"]
    assert trouble["shown"] == list(TROUBLES[trouble["id"]].shown)

    done = user.verify()
    assert done.rc == status
    assert f"row {row}, {TROUBLES[trouble['id']].title}: " in done.stdout
    assert TROUBLES[trouble["id"]].remedy in done.stdout
    assert done.stderr.startswith(f"keybroker: verify: {said}\nhint: ")


@pytest.mark.parametrize(
    ("page", "status", "said"),
    [
        (503, 75, "the gateway answers 503 to message"),
        (429, 75, "the gateway answers 429 to message"),
        (404, 78, "the gateway answers 404 to message: it has no such route"),
    ],
)
def test_what_is_in_no_row_is_said_as_such(
    user: User, gateway: Plain, page: int, status: int, said: str
) -> None:
    """An outage, a limit of requests, an address where nothing is."""
    gateway.page = page
    found = user.asked(status=status)
    assert (found["conclusion"], rows(found)) == (said, [])


def test_a_request_id_that_holds_the_key_is_not_shown(user: User, gateway: Plain) -> None:
    """`User.verify` looks for the key in all that is printed."""
    gateway.request_id = f"req-{KEY}"
    found = user.asked()
    assert {one["request_id"] for one in found["requests"]} == {""}


def test_a_server_for_openai_clients_alone_is_said_so(user: User, gateway: Plain) -> None:
    gateway.openai_only = True
    done = user.verify()
    assert done.rc == 78
    host = gateway.url.removeprefix("http://")
    assert done.stderr == (
        f"keybroker: verify: {host} speaks OpenAI's API alone: /v1/chat/completions answers, "
        "/v1/messages does not (404)\n"
        "hint: Claude Code needs a gateway that answers POST /v1/messages, such as LiteLLM\n"
    )


def test_nobody_there(user: User) -> None:
    """Row 3, and status 75: it may come back."""
    user.configure(refused_url())
    found = user.asked(status=75)
    assert rows(found) == [3]
    assert "could not be reached" in found["conclusion"]
    assert list(seen(found)) == ["message"]


def test_one_that_does_not_answer(user: User, gateway: Plain) -> None:
    """It is waited for as long as --timeout says."""
    gateway.silent = Event()
    found = user.asked("--timeout", "300ms", status=75)
    assert "did not answer in time" in found["conclusion"]


@pytest.mark.parametrize("header", ["anthropic-version", "anthropic-beta"])
def test_a_gateway_that_drops_a_header(user: User, gateway: Plain, header: str) -> None:
    """The API behind it wants its version; of the beta it says only what it says of a new field."""
    gateway.strips = (header,)
    gateway.refuses = (refusals.versions, refusals.context_management_without_beta)
    found = user.asked("--deep", status=78)
    if header == "anthropic-version":
        assert "anthropic-version did not reach who answers" in found["conclusion"]
    else:
        assert rows(found) == [5]
        assert found["facts"]["anthropic-beta"].startswith("cannot tell")
        assert found["facts"]["anthropic-version"].startswith("reaches the upstream")


# What a session sends


@pytest.mark.parametrize(
    ("refuses", "row", "line", "words"),
    [
        ((refusals.context_management,), 5, "disable_experimental_betas = true", "context_"),
        ((refusals.adaptive,), 6, "disable_adaptive_thinking = true", "adaptive"),
        ((refusals.large_answers,), 7, "max_output_tokens = 8192", "max_tokens"),
    ],
)
def test_what_to_write_is_named_and_helps(
    user: User, gateway: Plain, refuses: tuple[Refusal, ...], row: int, line: str, words: str
) -> None:
    """A plain request passes and a session's does not; with the line written, both do."""
    gateway.refuses = refuses
    assert user.verify().rc == 0
    found = user.asked("--deep", status=78)
    assert rows(found) == [row]
    [trouble] = found["troubles"]
    assert trouble["configuration"] == ["[profiles.work.claude]", line]
    assert words in trouble["seen"]

    user.configure(gateway.url, f"[profiles.work.claude]\n{line}")
    assert user.asked("--deep")["troubles"] == []


def test_several_refusals_are_named_together(user: User, gateway: Plain) -> None:
    """Each part is asked for by itself; two limits are one row with a line for each."""
    gateway.refuses = (refusals.effort, refusals.adaptive, refusals.large_answers)
    gateway.refuses += (refusals.long_prompts,)
    found = user.asked("--deep", status=78)
    assert sorted(rows(found)) == [5, 6, 7]
    lines = {one["row"]: one["configuration"] for one in found["troubles"]}
    assert lines[5] == []  # of an effort, that variable does nothing
    assert lines[7][1:] == ["max_output_tokens = 8192", "auto_compact_window = 100000"]


def test_only_some_models_can_do_without_adaptive_thinking(user: User, gateway: Plain) -> None:
    gateway.refuses = (refusals.adaptive,)
    found = user.asked("--deep", "--model", "claude-opus-4-8", status=78)
    assert rows(found) == [6]
    assert found["troubles"][0]["configuration"] == []


@pytest.mark.parametrize(
    ("model", "settings", "variables"),
    [
        ("claude-sonnet-4-6", "", {}),
        ("claude-sonnet-4-5", "", {}),
        (
            "claude-sonnet-4-6",
            "\n".join(
                (
                    "disable_experimental_betas = true",
                    "disable_adaptive_thinking = true",
                    "max_output_tokens = 4096",
                )
            ),
            {
                "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
                "CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING": "1",
                "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096",
            },
        ),
    ],
)
def test_a_session_s_request_is_that_of_claude_code(
    user: User, gateway: Plain, model: str, settings: str, variables: dict[str, str]
) -> None:
    """Path, betas and fields are those of the real client with the same settings."""
    user.configure(gateway.url, f"[profiles.work.claude]\n{settings}")
    user.asked("--deep", "--model", model)
    ours = next(one for one in gateway.sent if "tools" in one[2])
    gateway.sent.clear()
    answer = ask_claude(NEWEST, user.resident.home, gateway.url, model=model, **variables)
    assert (answer.rc, answer.stdout) == (0, "pong\n")
    [theirs] = gateway.sent

    assert ours[0] == theirs[0]
    for header in ("anthropic-version", "authorization", "x-api-key", "anthropic-beta"):
        assert ours[1][header] == theirs[1][header]
    for field in ("max_tokens", "thinking", "context_management", "stream"):
        assert ours[2].get(field) == theirs[2].get(field)
    assert set(ours[2]) == set(theirs[2]) - {"metadata"}
    size, theirs_size = (len(json.dumps(one[2])) for one in (ours, theirs))
    assert 0.6 < size / theirs_size < 1.25  # without betas, more tools are sent at once


# LiteLLM


@pytest.fixture
def proxy(user: User, litellm: LiteLLM) -> Iterator[LiteLLM]:
    """LiteLLM, whose upstream is put right again afterwards."""
    user.configure_litellm(litellm)
    yield litellm
    litellm.upstream.refuses = ()


def test_litellm_hands_on_what_is_asked_for(user: User, proxy: LiteLLM) -> None:
    """A key that was minted works in all forms, and both headers are seen to reach the API."""
    proxy.upstream.refuses = (refusals.unknown_betas, refusals.versions)
    found = user.asked("--deep")
    told = "reaches the upstream: a made-up one was refused by its name"
    assert found["facts"] == {
        "key": "authorization and x-api-key are both read",
        "anthropic-beta": told,
        "anthropic-version": told,
    }
    ids = [one["request_id"] for one in found["requests"] if one["seen"] == "ok"]
    assert all(ids[:3])


def test_litellm_hands_on_refusals(user: User, proxy: LiteLLM) -> None:
    """In its own wrapping, each is still known; of the model it says so itself."""
    proxy.upstream.refuses = (refusals.context_management, refusals.adaptive)
    found = user.asked("--deep", status=78)
    assert sorted(rows(found)) == [5, 6]

    found = user.asked("--model", "gpt-nobody")
    assert found["conclusion"].endswith(f"{NOT_FOUND} gpt-nobody")


# A firewall


def test_a_firewall_lets_a_token_pass_and_no_session(user: User, gateway: Plain) -> None:
    """Row 12: what is behind it is well, and never saw the request; exempt, it passes."""
    with Waf(gateway.url) as waf:
        user.configure(waf.url)
        assert user.verify().rc == 0
        gateway.sent.clear()
        found = user.asked("--deep", status=77)
        assert rows(found) == [12]
        assert "ModSecurity" in found["troubles"][0]["remedy"]
        assert [form for form, what in seen(found).items() if what == "trouble"] == [
            *("no key", "session", "text")
        ]
        assert not any("<script" in json.dumps(body) for _, _, body in gateway.sent)

        answer = ask_claude(NEWEST, user.resident.home, waf.url)
        assert shows(12, answer)
    with Waf(gateway.url, exempt=True) as waf:
        user.configure(waf.url)
        assert user.asked("--deep")["troubles"] == []


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that nobody trusts yet."""
    return Authority(tmp_path)


def test_tls_by_an_authority_of_ones_own(user: User, authority: Authority) -> None:
    """
    Row 13: with `ca` we trust it, and so does Node, by NODE_EXTRA_CA_CERTS; without, nobody does.

    Where the system alone does, its bundle is named for those who run Claude Code on Node. Its own
    program asks the system, too.
    """
    home = user.resident.home
    with Plain(KEY, authority.server()) as gateway:
        user.configure(gateway.url)
        found = user.asked(status=78)
        assert rows(found) == [13]
        assert "certificate that is not trusted" in found["conclusion"]
        assert shows(13, ask_claude(NEWEST, home, gateway.url))

        system = {"SSL_CERT_FILE": str(authority.file)}
        found = user.asked(**system)
        assert rows(found) == [13]
        assert found["facts"]["TLS"] == "trusted by the system, and not by Node's own list"
        assert ask_claude(NEWEST, home, gateway.url, process=system).stdout == "pong\n"
        written = f"ca = {json.dumps(str(authority.file))}"
        assert found["troubles"][0]["configuration"] == ["[profiles.work]", written]

        user.configure(gateway.url, written)
        found = user.asked()
        assert found["facts"]["TLS"] == "Node trusts the certificate, too"
        extra = {"NODE_EXTRA_CA_CERTS": str(authority.file)}
        assert ask_claude(NEWEST, home, gateway.url, **extra).stdout == "pong\n"


# Shown, and typed


def test_the_request_that_is_shown_can_be_typed(user: User, gateway: Plain) -> None:
    """sh and curl do with it what verify does; the key is in neither text nor arguments."""
    user.configure(gateway.url, 'headers = { "X-Org-Route" = "it\'s eng" }')
    done = user.verify("--print")
    assert (done.rc, done.stderr) == (0, "")
    sh, power = done.stdout.split("\n\n# PowerShell\n")
    assert gateway.sent == []

    bin_folder = user.resident.home.path / "bin"
    bin_folder.mkdir()
    typed = subprocess.run(
        ["/bin/sh", "-c", sh],
        env={**user.resident.environment, "PATH": f"{Path(sys.executable).parent}:{os.defpath}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(typed.stdout)["id"].startswith("msg_")
    [(path, headers, body)] = gateway.sent
    assert (path, body["max_tokens"]) == ("/v1/messages?beta=true", 1)
    assert (headers["authorization"], headers["x-api-key"]) == (f"Bearer {KEY}", KEY)
    assert headers["x-org-route"] == "it's eng"
    assert "'X-Org-Route' = 'it''s eng'" in power
    assert "keybroker get work" in power


@pytest.mark.parametrize(
    "words", [("--print", "--deep"), ("--print", "--json"), ("--timeout", "0s"), ("nobody",)]
)
def test_what_makes_no_sense_is_refused(user: User, gateway: Plain, words: tuple[str, ...]) -> None:
    done = user.verify(*words)
    assert done.rc == (78 if words == ("nobody",) else 2)
    assert gateway.sent == []


# Claude Code shows the messages of the table


def ask_claude(
    version: str,
    home: Home,
    url: str,
    model: str = "claude-sonnet-4-6",
    process: Mapping[str, str] | None = None,
    **variables: str,
) -> Result:
    """
    Ask the real client through a gateway, which it tries once.

    Args:
        process: Of its environment; the other variables are of its settings.
    """
    settings = {
        "apiKeyHelper": variables.pop("helper", f"echo {KEY}"),
        "model": model,
        "env": {"ANTHROPIC_BASE_URL": url, "CLAUDE_CODE_MAX_RETRIES": "0", **variables},
    }
    return run_claude(version, home.path, settings, env_extra=process)


def shows(row: int, answer: Result) -> bool:
    """Say whether a client shows what the table says that it does."""
    [trouble] = [one for one in TROUBLES.values() if one.row == row]
    return answer.rc == 1 and any(one in answer.stdout for one in trouble.shown)


@pytest.mark.parametrize(
    ("row", "version", "ways"),
    [
        (2, NEWEST, {"reads": ("x-other",)}),
        (4, NEWEST, {"page": 200}),
        (5, WITH_NODE_20, {"refuses": (refusals.context_management,)}),
        (6, NEWEST, {"refuses": (refusals.adaptive,)}),
        (7, WITH_NODE_20, {"refuses": (refusals.long_prompts,)}),
        (7, NEWEST, {"refuses": (refusals.large_answers,)}),
        (12, NEWEST, {"page": 403}),
    ],
)
def test_claude_code_shows_the_row(
    home: Home, row: int, version: str, ways: dict[str, Any]
) -> None:
    """What its user sees is what the table has for that row."""
    with Plain(KEY, **ways) as gateway:
        assert shows(row, ask_claude(version, home, gateway.url))


def test_a_newer_claude_code_does_without_a_field_that_is_refused(home: Home) -> None:
    """It asks once more without `context_management`: a prompt costs two requests, and works."""
    with Plain(KEY, refuses=(refusals.context_management,)) as gateway:
        assert ask_claude(NEWEST, home, gateway.url).stdout == "pong\n"
        assert ["context_management" in body for _, _, body in gateway.sent] == [True, False]


@pytest.mark.parametrize("version", VERSIONS)
def test_claude_code_shows_that_nobody_is_there(home: Home, version: str) -> None:
    """The newer one has other words for it."""
    assert shows(3, ask_claude(version, home, refused_url()))


def test_claude_code_shows_that_its_helper_fails(home: Home) -> None:
    with Plain(KEY) as gateway:
        assert shows(14, ask_claude(NEWEST, home, gateway.url, helper="exit 1"))


@pytest.mark.parametrize("version", VERSIONS)
def test_claude_code_takes_an_id_of_another_kind(home: Home, version: str) -> None:
    """So `verify` calls it working."""
    with Plain(KEY, message_id="chatcmpl-1") as gateway:
        assert ask_claude(version, home, gateway.url).stdout == "pong\n"
