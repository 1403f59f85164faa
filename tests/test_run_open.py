"""
`run --host --port`: what `ogx connect claude` does, argument for argument, and nothing configured.

The server is an emulated OGX; what it was asked, and with what, is what counts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from keybroker.cli.open import profile_at
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError
from tests.resident import Home, Resident
from tests.servers import claude
from tests.servers.faults import refused_url
from tests.servers.install import claude_program
from tests.servers.ogx import Ogx
from tests.servers.web import LoopbackServer

COMMAND = [sys.executable, "-c", "from keybroker.cli import main; main()"]
FIRST = "ollama/qwen3:32b"
TIERS = tuple(f"ANTHROPIC_DEFAULT_{tier}_MODEL" for tier in ("HAIKU", "SONNET", "OPUS"))
LEADS_ELSEWHERE = {
    "CLAUDE_CODE_USE_VERTEX": "1",
    "ANTHROPIC_VERTEX_PROJECT_ID": "p",
    "CLAUDE_CODE_USE_BEDROCK": "1",
    "ANTHROPIC_BEDROCK_SESSION_TOKEN": "sk-bedrock",
    "ANTHROPIC_API_KEY": "sk-ant-geheim",
    "ANTHROPIC_AUTH_TOKEN": "sk-geheim",
}
# Says what it was given, as the client would have it.
FAKE = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
sys.exit(7)
"""


@pytest.fixture
def ogx() -> Iterator[Ogx]:
    with Ogx() as server:
        yield server


@pytest.fixture
def user(home: Home) -> Home:
    """Somebody without a configuration, who has a `claude` that tells what it was given."""
    folder = home.path / "bin"
    folder.mkdir()
    (folder / "claude").write_text(FAKE)
    (folder / "claude").chmod(0o755)
    home.environment["PATH"] = f"{folder}:{home.environment['PATH']}"
    return home


def typed(user: Home, *words: str, **variables: str) -> claude.Result:
    """Type `keybroker run …`."""
    done = subprocess.run(
        [*COMMAND, "run", *words],
        env={**user.environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return claude.Result(done.returncode, done.stdout, done.stderr)


def at(server: LoopbackServer) -> tuple[str, ...]:
    return ("--host", "127.0.0.1", "--port", str(server.port))


def launched(user: Home, *words: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """Return arguments, without the settings, and environment of a `claude` that was run."""
    done = typed(user, *words, **variables)
    assert (done.rc, done.stderr) == (7, "")
    arguments, environment = json.loads(done.stdout)
    assert arguments[0] == "--settings"
    settings = json.loads(arguments[1])
    assert settings["apiKeyHelper"] == ""
    for name, value in settings["env"].items():
        if name.startswith("ANTHROPIC_") and value:
            assert environment[name] == value
    return arguments[2:], environment


def tiers(environment: Mapping[str, str]) -> list[str]:
    return [environment[name] for name in TIERS]


# Each row of its table of flags


def test_no_flag_is_the_first_model_for_every_tier(user: Home, ogx: Ogx) -> None:
    """Embeddings and rerankers are left out, whatever their order; and nothing is configured."""
    arguments, environment = launched(user, *at(ogx), "--", "claude")
    assert arguments == []
    assert tiers(environment) == [FIRST] * 3
    assert environment["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{ogx.port}"
    assert environment["ANTHROPIC_AUTH_TOKEN"] == "ogx"
    assert "ANTHROPIC_MODEL" not in environment
    assert not (user.path / ".config/keybroker").exists()
    assert not (user.path / "run/keybroker/s").exists()  # nor is there a daemon


def test_model_is_for_every_tier(user: Home, ogx: Ogx) -> None:
    _, environment = launched(user, *at(ogx), "--model", "openai/gpt-4o", "--", "claude")
    assert tiers(environment) == ["openai/gpt-4o"] * 3


def test_each_tier_has_a_flag_that_overrides_model(user: Home, ogx: Ogx) -> None:
    """`--haiku-model`, `--sonnet-model`, `--opus-model`."""
    for number, flag in enumerate(("--haiku-model", "--sonnet-model", "--opus-model")):
        words = ("--model", "openai/gpt-4o", flag, "openai/gpt-4o-mini")
        _, environment = launched(user, *at(ogx), *words, "--", "claude")
        expected = ["openai/gpt-4o"] * 3
        expected[number] = "openai/gpt-4o-mini"
        assert tiers(environment) == expected


def test_a_claude_model_is_found_for_its_tier(user: Home) -> None:
    """Behind any prefix, as the starter distribution has them."""
    models = ("openai/gpt-4o", "anthropic/claude-haiku-4-5-20251001", "anthropic/claude-opus-4-6")
    with Ogx(dict.fromkeys(models, "llm")) as server:
        _, environment = launched(user, *at(server), "--", "claude")
    assert tiers(environment) == [models[1], models[0], models[2]]


def test_the_port_is_8321_or_what_ogx_port_says(
    user: Home, ogx: Ogx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the host is this one; each of the two flags is enough."""
    words = ("--host", "127.0.0.1", "--", "claude")
    _, environment = launched(user, *words, OGX_PORT=str(ogx.port))
    assert environment["ANTHROPIC_BASE_URL"] == ogx.url
    _, environment = launched(user, "--port", str(ogx.port), "--", "claude", OGX_PORT="9")
    assert environment["ANTHROPIC_BASE_URL"] == f"http://localhost:{ogx.port}"
    monkeypatch.delenv("OGX_PORT", raising=False)
    assert profile_at("10.0.0.7", None).base_url == "http://10.0.0.7:8321"
    assert profile_at(None, 9000).base_url == "http://localhost:9000"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("ogx.example.com", "http://ogx.example.com:1"),
        ("::1", "http://[::1]:1"),
        ("[fe80::7]", "http://[fe80::7]:1"),
        ("a_b-c", "http://a_b-c:1"),
    ],
)
def test_a_host_may_be_a_name_or_an_address(host: str, url: str) -> None:
    assert profile_at(host, 1).base_url == url


@pytest.mark.parametrize(
    "host", ["http://h", "h/p", "h:1", "user@h", "a b", "\x1b", "-h", "h?x", "h#x", "$(x)", "é"]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="--host: expected a host's name or address"):
        profile_at(host, 1)


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1", "99999999999", "\uff18"])
def test_a_port_in_the_environment_that_is_none_is_said(
    port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OGX_PORT", port)
    with pytest.raises(ConfigError, match="OGX_PORT: expected a port"):
        profile_at(None, None)


def test_what_stands_after_the_dashes_is_the_client_s(user: Home, ogx: Ogx) -> None:
    """`-- -p …`, `-- --model claude-sonnet-4-5`: as they are."""
    words = ("-p", "Write a hello world function", "--model", "claude-sonnet-4-5", "--", "-x")
    arguments, _ = launched(user, *at(ogx), "--", "claude", *words)
    assert arguments == list(words)


def test_what_leads_elsewhere_is_taken_out(user: Home, ogx: Ogx) -> None:
    """Vertex, Bedrock, and the keys of other gateways; one can be kept by name."""
    _, environment = launched(user, *at(ogx), "--", "claude", **LEADS_ELSEWHERE)
    assert environment["ANTHROPIC_AUTH_TOKEN"] == "ogx"
    gone = set(LEADS_ELSEWHERE) - {"ANTHROPIC_AUTH_TOKEN"}
    assert gone & set(environment) == set()
    words = ("--keep", "ANTHROPIC_VERTEX_PROJECT_ID", "--", "claude")
    _, environment = launched(user, *at(ogx), *words, **LEADS_ELSEWHERE)
    assert gone & set(environment) == {"ANTHROPIC_VERTEX_PROJECT_ID"}


def test_another_program_has_the_same_environment(user: Home, ogx: Ogx) -> None:
    """An agent built with the SDK is no `claude`, and has no settings."""
    done = typed(user, *at(ogx), "--", "sh", "-c", "env; exit 3", **LEADS_ELSEWHERE)
    assert (done.rc, done.stderr) == (3, "")
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert tiers(seen) == [FIRST] * 3
    assert (seen["ANTHROPIC_BASE_URL"], seen["ANTHROPIC_AUTH_TOKEN"]) == (ogx.url, "ogx")


def test_print_env_prints_what_a_shell_evaluates(user: Home, ogx: Ogx) -> None:
    """`eval "$(… --print-env)"`: the same variables; nothing is run, no program is named."""
    script = """
        eval "$("$@")"
        env
    """
    words = [*COMMAND, "run", *at(ogx), "--model", "openai/gpt-4o", "--print-env"]
    done = subprocess.run(
        ["sh", "-ec", script, "-", *words],
        env={**user.environment, **LEADS_ELSEWHERE, "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert tiers(seen) == ["openai/gpt-4o"] * 3
    assert (seen["ANTHROPIC_BASE_URL"], seen["ANTHROPIC_AUTH_TOKEN"]) == (ogx.url, "ogx")
    assert (set(LEADS_ELSEWHERE) - {"ANTHROPIC_AUTH_TOKEN"}) & set(seen) == set()


def test_print_env_needs_no_client(home: Home, ogx: Ogx) -> None:
    done = typed(home, *at(ogx), "--print-env", "--", "claude", PATH="/nowhere")
    assert (done.rc, done.stderr) == (0, "")
    assert f"export ANTHROPIC_DEFAULT_OPUS_MODEL='{FIRST}'\n" in done.stdout


# What goes wrong, each in words of its own


def test_no_client_is_said_before_the_gateway_is_asked(home: Home, ogx: Ogx) -> None:
    """127, as a shell has it, and where it comes from."""
    done = typed(home, *at(ogx), "--", "claude", PATH="/nowhere")
    assert (done.rc, done.stdout) == (127, "")
    assert done.stderr == (
        "keybroker: run: claude: is not in PATH\n"
        "hint: install Claude Code, as https://code.claude.com/docs/en/setup says; then try again\n"
    )
    assert ogx.lists == []


def test_no_gateway_is_said(user: Home) -> None:
    """75, the address, and what starts one."""
    port = refused_url().rpartition(":")[2]
    done = typed(user, "--host", "127.0.0.1", "--port", port, "--", "claude")
    assert (done.rc, done.stdout) == (75, "")
    assert done.stderr == (
        f"keybroker: gateway: 127.0.0.1:{port} could not be reached\n"
        "hint: is it running? ogx run starter; see --host and --port\n"
    )


def test_a_gateway_that_checks_keys_is_for_a_profile(user: Home) -> None:
    """What makes one is said; there is none whose status could be looked at."""
    with DevGateway() as gateway:
        port = gateway.url.rpartition(":")[2]
        done = typed(user, "--host", "127.0.0.1", "--port", port, "--", "claude")
    assert (done.rc, done.stdout) == (77, "")
    assert done.stderr == (
        f"keybroker: gateway: 127.0.0.1:{port} does not list models for this key (401)\n"
        f"hint: it checks keys: keybroker init --base-url http://127.0.0.1:{port}\n"
    )


def test_no_language_model_is_said(user: Home) -> None:
    """It is up, and no provider is."""
    with Ogx({"ollama/nomic-embed-text": "embedding", "cohere/rank-v3": "rerank"}) as server:
        done = typed(user, *at(server), "--", "claude")
    assert (done.rc, done.stdout) == (77, "")
    assert done.stderr == (
        f"keybroker: models: 127.0.0.1:{server.port} lists no model for chat\n"
        "hint: no provider is active there, or none that this key may use\n"
    )


@pytest.mark.parametrize("flag", ["--model", "--haiku-model", "--sonnet-model", "--opus-model"])
def test_a_model_that_is_not_listed_is_refused_with_the_list(
    user: Home, ogx: Ogx, flag: str
) -> None:
    """An embedding counts as not listed; ids match exactly."""
    for name in ("openai/gpt-5", "ollama/nomic-embed-text", "qwen3:32b"):
        done = typed(user, *at(ogx), flag, name, "--", "claude")
        assert (done.rc, done.stdout) == (78, "")
        assert done.stderr == (
            f"keybroker: {flag}: {name} is not listed by 127.0.0.1:{ogx.port}\n"
            "hint: it lists ollama/qwen3:32b, openai/gpt-4o-mini, openai/gpt-4o\n"
        )


@pytest.mark.parametrize("words", [("--profile", "work"), ("--ttl", "1h"), ("--budget", "1")])
def test_what_is_for_a_key_does_not_go_with_it(
    user: Home, ogx: Ogx, words: tuple[str, ...]
) -> None:
    done = typed(user, *at(ogx), *words, "--", "claude")
    assert (done.rc, done.stdout) == (2, "")
    assert f"{words[0]} is for a profile's key" in done.stderr


def test_a_program_has_to_be_named(user: Home, ogx: Ogx) -> None:
    done = typed(user, *at(ogx))
    assert done.rc == 2
    assert "such as: keybroker run -- claude" in done.stderr


def test_a_signal_ends_it_as_it_ends_its_program(user: Home, ogx: Ogx) -> None:
    """What another process sends is passed on, and the status is the program's."""
    words = [*COMMAND, "run", *at(ogx), "--", "sh", "-c", "echo there; exec sleep 60"]
    with subprocess.Popen(
        words, env=user.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


# Profiles of the file


def test_a_profile_s_models_are_looked_up_as_well(resident: Resident) -> None:
    """An id that is not listed is refused before a key is made; a tier's flag goes to its tier."""
    names = ["claude-haiku-4-5", "claude-sonnet-4-6", "gpt-4o"]
    with DevGateway(models=names) as gateway:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(
            f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.claude]\n'
            'haiku = "gpt-4o"\nopus = "gone"\n[profiles.work.source]\n'
            'type = "litellm"\nadmin = { env = "ADMIN" }\n'
        )
        program = ("--", "sh", "-c", "env")

        def seen(*words: str) -> list[str]:
            status, out, err = resident.cli("run", "-q", *words, *program)
            assert (status, err) == (0, "")
            lines = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
            return tiers(lines)

        assert seen("--sonnet-model", "gpt-4o") == ["gpt-4o", "gpt-4o", "claude-haiku-4-5"]
        assert seen("--model", "claude-sonnet-4-6") == ["claude-sonnet-4-6"] * 3
        both = ("--model", "claude-sonnet-4-6", "--opus-model", "gpt-4o")
        assert seen(*both) == ["claude-sonnet-4-6", "claude-sonnet-4-6", "gpt-4o"]
        status, out, err = resident.cli("run", "--model", "gpt-5", *program)
        assert (status, out) == (78, "")
        assert "--model: gpt-5 is not listed by" in err
        assert "it lists claude-haiku-4-5, claude-sonnet-4-6, gpt-4o" in err
        status, out, err = resident.cli("run", "--print-env", "--opus-model", "gpt-4o")
        assert (status, err) == (0, "")
        assert "export ANTHROPIC_DEFAULT_OPUS_MODEL='gpt-4o'\n" in out
        assert "ANTHROPIC_AUTH_TOKEN=" not in out


# The real client


@pytest.mark.servers
def test_the_real_client_is_launched(home: Home, ogx: Ogx, claude_version: str) -> None:
    """
    `run --host … --model … -- claude -p hi`: one answer, by the model, with the placeholder alone.

    The user has a helper and an address of another gateway in their settings, and a project that
    would lead elsewhere: neither is asked, and no key of theirs comes to the one that was named.
    """
    program = claude_program(claude_version)
    path = f"{program.parent}:{home.environment['PATH']}"
    with Ogx() as other:
        env = {"ANTHROPIC_BASE_URL": other.url}
        claude.write_settings(home.path, {"apiKeyHelper": "echo sk-geheim", "env": env})
        project = home.path / "project"
        (project / ".claude").mkdir(parents=True)
        told: dict[str, Any] = {"apiKeyHelper": "echo sk-project", "env": env}
        (project / ".claude/settings.json").write_text(json.dumps(told))
        done = subprocess.run(
            [*COMMAND, "run", *at(ogx), "--model", "openai/gpt-4o", "--", "claude", "-p", "hi"],
            cwd=project,
            env={**claude.environment(home.path), **home.environment, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (0, "pong\n"), done.stderr
        assert other.requests() == []
    asked = [one for one in ogx.requests() if one["path"].startswith("/v1/messages?")]
    assert {(one["authorization"], one["x-api-key"]) for one in asked} == {("Bearer ogx", None)}
    assert {one["model"] for one in asked} == {"openai/gpt-4o"}
    assert {one["max_tokens"] for one in asked} == {32_000}
