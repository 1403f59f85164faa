"""
What doctor finds, by faults that are planted: the line, the exit status, and that --fix mends it.

Each begins with a machine on which nothing is wrong: a daemon, a gateway, a connected Claude Code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from keybroker import __version__
from keybroker.doctor import agent, fixes, program
from keybroker.doctor.finding import KINDS, Command, Finding, Severity
from keybroker.doctor.together import together
from keybroker.errors import NobodyAnswers
from tests.canaries import Canaries
from tests.resident import Resident
from tests.servers import refusals
from tests.servers.authority import Authority
from tests.servers.claude import NEWEST, WITH_NODE_20, Result
from tests.servers.faults import refused_url
from tests.servers.install import claude_program
from tests.servers.managed import Machine
from tests.servers.plain import Plain
from tests.servers.waf import Waf

pytestmark = pytest.mark.servers

KEY = "sk-fixed-0123456789abcdef0123456789abcdef"
TOKEN, API_KEY = "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"
ADDRESS = "ANTHROPIC_BASE_URL"
STATUS = {Severity.ERROR: 78, Severity.WARNING: 75, Severity.NOTE: 0}


class User:
    """Somebody with one profile, `work`, whose key is in a file, and Claude Code connected."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.home = resident.home.path
        self.project = self.home / "project"
        self.project.mkdir()
        self.settings = self.home / ".claude/settings.json"
        self.canaries = Canaries()
        self.canaries.know("key", KEY)
        self.planted = f"sk-planted-{os.urandom(20).hex()}"
        self.canaries.know("planted", self.planted)
        self.put("key", f"{KEY}\n").chmod(0o600)
        self.programs = self.home / "programs"
        self.programs.mkdir()
        self.install(NEWEST)

    def install(self, version: str) -> None:
        """Have this version of the client in PATH."""
        program = self.programs / "claude"
        program.unlink(missing_ok=True)
        program.symlink_to(claude_program(version))

    def put(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def configure(self, url: str, more: str = "", source: str = "", cache: str = "file") -> None:
        source = source or f'type = "static"\nkey = {{ file = "{self.home / "key"}" }}'
        self.resident.configure(
            f'[profiles.work]\nbase_url = "{url}"\nverify = "none"\n{more}\n'
            f'[profiles.work.source]\n{source}\n[cache]\nkey = "{cache}"\n'
        )

    def type(self, *words: str, **variables: str) -> Result:
        """Type a command in the project; no secret may be in what it prints."""
        environment = {**self.resident.environment, **variables}
        environment["PATH"] = f"{self.programs}:{environment['PATH']}"
        done = subprocess.run(
            [sys.executable, "-c", "from keybroker.cli import main; main()", *words],
            cwd=self.project,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert self.canaries.seen_in(done.stdout + done.stderr) == []
        assert "Traceback" not in done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def connect(self, *words: str) -> None:
        done = self.type("connect", "--no-check", *words)
        assert done.rc == 0, done

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the user's settings."""
        found = json.loads(self.settings.read_text())
        change(found)
        self.settings.write_text(json.dumps(found))

    def set(self, **env: str) -> None:
        """Set variables in the user's settings."""
        self.edit(lambda found: found["env"].update(env))

    def in_project(self, name: str = "settings.json", **settings: Any) -> None:
        self.put(f"project/.claude/{name}", json.dumps(settings))

    def look(self, *words: str, **variables: str) -> dict[str, Any]:
        """Type doctor --json; its status is that of the worst finding."""
        done = self.type("doctor", "--json", *words, **variables)
        assert done.stdout, done
        found: dict[str, Any] = json.loads(done.stdout)
        worst = max((STATUS[one["severity"]] for one in found["findings"]), default=0)
        assert done.rc == worst
        return found

    def findings(self, *words: str, **variables: str) -> dict[str, list[dict[str, Any]]]:
        """Return the findings by their ids."""
        found: dict[str, list[dict[str, Any]]] = {}
        for one in self.look(*words, **variables)["findings"]:
            found.setdefault(one["id"], []).append(one)
        return found


@pytest.fixture
def user(resident: Resident) -> User:
    return User(resident)


@pytest.fixture
def gateway(user: User) -> Iterator[Plain]:
    """A gateway that is well, and Claude Code connected to it."""
    with Plain(KEY) as server:
        server.says = f" {KEY} {user.canaries.new('body')}"
        user.configure(server.url)
        user.connect()
        user.put(".claude.json", json.dumps({"hasCompletedOnboarding": True}))
        yield server


def test_a_healthy_machine_gives_no_finding(user: User, gateway: Plain) -> None:
    """With a daemon and without, for people and for programs, and with what a session sends."""
    for words in ((), ("--deep",)):
        found = user.look(*words)
        assert found["findings"] == []
    [route] = found["requests"]
    assert found["gateway"]["wrong_key"] == 401
    helper = f"apiKeyHelper in {user.settings}"
    assert route == {
        "surface": "claude",
        "url": gateway.url,
        "set_in": str(user.settings),
        "format": None,
        "authorization": helper,
        "x_api_key": helper,
        "passed_over": [],
    }
    done = user.type("doctor")
    assert done == Result(
        0,
        f"requests go\n  claude   to {gateway.url} (set in {user.settings}), with {helper}\n"
        f"  gateway  {gateway.url}: to a wrong key 401; authorization and x-api-key are both read\n"
        "nothing is wrong\n"
        "next: keybroker doctor --deep, which sends the gateway what a session sends\n",
        "",
    )
    assert user.type("daemon", "--stop").rc == 0
    assert user.look()["findings"] == []
    user.connect("--scope", "local")
    assert user.look()["findings"] == []


def test_what_does_not_count_is_said(user: User, gateway: Plain) -> None:
    """An export that settings beat, and a profile of a shell that nobody reads here."""
    user.put(".bashrc", f"export {ADDRESS}=https://old.example.com\n")
    found = user.look(**{ADDRESS: "https://old.example.com"})
    assert found["findings"] == []
    assert found["requests"][0]["url"] == gateway.url
    assert found["requests"][0]["passed_over"] == [
        f"{ADDRESS} in this terminal does not count: settings beat an export"
    ]


Variables = Mapping[str, str]


@dataclass(frozen=True)
class Fault:
    """
    One fault.

    Attributes:
        id: The finding that it gives.
        plant: Does it; may return variables of the terminal.
        says: A part of what is said; {home} and {url} are filled in.
        fix: A part of what is to be typed.
        severity: Where it is not that of its kind.
        mends: --fix does away with it.
        with_it: Ids of findings that come with it.
    """

    id: str
    plant: Callable[[User, Plain], Variables | None]
    says: str
    fix: str
    severity: Severity | None = None
    mends: bool = False
    words: tuple[str, ...] = ()
    with_it: tuple[str, ...] = field(default=())


def terminal(**variables: str) -> Callable[[User, Plain], Variables]:
    """Set variables in the terminal; PLANTED is a secret."""
    return lambda user, _: {
        name: value.replace("PLANTED", user.planted) for name, value in variables.items()
    }


def settings(**env: str) -> Callable[[User, Plain], None]:
    """Set variables in the user's settings."""
    return lambda user, _: user.set(
        **{name: value.replace("PLANTED", user.planted) for name, value in env.items()}
    )


def file(name: str, text: str) -> Callable[[User, Plain], None]:
    def plant(user: User, gateway: Plain) -> None:
        user.put(name, text.replace("PLANTED", user.planted).replace("GATEWAY", gateway.url))

    return plant


def gatewayed(**ways: Any) -> Callable[[User, Plain], None]:
    """Have the gateway be wrong."""

    def plant(_: User, gateway: Plain) -> None:
        for name, value in ways.items():
            assert hasattr(gateway, name)
            setattr(gateway, name, value)

    return plant


def changed(**values: Any) -> Callable[[User, Plain], None]:
    """Set keys of the user's settings."""
    return lambda user, _: user.edit(lambda found: found.update(values))


def vscode(user: User, _: Plain) -> None:
    editor = user.put(".config/Code/User/settings.json", "{}")
    user.connect("vscode")
    name = "claudeCode.environmentVariables"
    found = json.loads(editor.read_text())
    found[name].append({"name": TOKEN, "value": user.planted})
    editor.write_text(json.dumps(found))


def vscode_elsewhere(user: User, _: Plain) -> None:
    variables = [{"name": ADDRESS, "value": "https://other.example.com"}]
    user.put(
        ".config/Code/User/settings.json",
        json.dumps({"claudeCode.environmentVariables": variables}),
    )
    user.edit(lambda found: found["env"].pop(ADDRESS))


def unconnected(user: User, _: Plain) -> None:
    assert user.type("disconnect").rc == 0


def address_of_terminal(user: User, gateway: Plain) -> Variables:
    user.edit(lambda found: found["env"].pop(ADDRESS))
    user.put(".zshrc", f"export {ADDRESS}={gateway.url}\n")
    return {ADDRESS: gateway.url}


def helper_of_project_only(user: User, _: Plain) -> None:
    user.connect("--scope", "local")
    assert user.type("disconnect", "--scope", "user").rc == 0
    user.put(".claude.json", "{}")


def no_credential(user: User, _: Plain) -> None:
    user.edit(lambda found: found.pop("apiKeyHelper"))


def login_goes_out(user: User, gateway: Plain) -> None:
    no_credential(user, gateway)
    saved_login(user, gateway)


def saved_login(user: User, _: Plain) -> None:
    user.put(".claude/.credentials.json", json.dumps({"claudeAiOauth": {"accessToken": "x"}}))


def declined(user: User, gateway: Plain) -> Variables:
    no_credential(user, gateway)
    responses = {"approved": [], "rejected": [user.planted[-20:]]}
    state = {"hasCompletedOnboarding": True, "customApiKeyResponses": responses}
    user.put(".claude.json", json.dumps(state))
    return {API_KEY: user.planted}


def commented(user: User, _: Plain) -> None:
    text = user.settings.read_text()
    user.settings.write_text(text.replace("{", "{ // mine\n", 1))


def moved(user: User, _: Plain) -> None:
    """A virtual environment that is elsewhere now: the line names the old place."""
    line = json.loads(user.settings.read_text())["apiKeyHelper"]
    folder = str(Path(sys.executable).parent)
    assert folder in line
    user.edit(lambda found: found.update(apiKeyHelper=line.replace(folder, "/gone/keybroker/bin")))


def other_ttl(user: User, gateway: Plain) -> None:
    user.configure(gateway.url, 'helper_ttl = "30s"')


def old_client(user: User, gateway: Plain) -> None:
    user.install(WITH_NODE_20)
    gateway.refusal = 403


def old_and_401(user: User, _: Plain) -> None:
    user.install(WITH_NODE_20)


def before_discovery(user: User, _: Plain) -> None:
    program = user.programs / "claude"
    program.unlink()
    program.write_text("#!/bin/sh\necho '2.1.130 (Claude Code)'\n")
    program.chmod(0o700)
    user.set(CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY="1")


def discovery_in_a_format(user: User, gateway: Plain) -> None:
    user.configure(gateway.url)
    user.set(
        CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY="1",
        CLAUDE_CODE_USE_BEDROCK="1",
        ANTHROPIC_BEDROCK_BASE_URL=f"{gateway.url}/bedrock",
    )


def another_s_models(user: User, gateway: Plain) -> None:
    user.configure(gateway.url, "claude = { discovery = true }")
    user.connect()
    models = {"baseUrl": "https://other.example.com", "models": []}
    user.put(".claude/cache/gateway-models.json", json.dumps(models))


def desktop(**values: str) -> Callable[[User, Plain], None]:
    def plant(user: User, gateway: Plain) -> None:
        user.put(".config/Claude-3p/configLibrary/_meta.json", json.dumps({"appliedId": "one"}))
        found = {"inferenceProvider": "gateway", "inferenceGatewayBaseUrl": gateway.url, **values}
        user.put(".config/Claude-3p/configLibrary/one.json", json.dumps(found))

    return plant


def gone_gateway(user: User, _: Plain) -> None:
    url = refused_url()
    user.configure(url)
    user.connect()


def nameless_gateway(user: User, _: Plain) -> None:
    user.configure("http://gateway.invalid")
    user.connect()


def open_state(user: User, _: Plain) -> None:
    user.resident.state.chmod(0o755)


def stuck_daemon(user: User, _: Plain) -> None:
    assert user.resident.cli("get")[0] == 0
    pid = user.resident.owner()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)


def key_is_gone(user: User, _: Plain) -> None:
    (user.home / "key").unlink()


def in_memory(user: User, gateway: Plain) -> None:
    user.configure(gateway.url, cache="memory")


def broken(user: User, _: Plain) -> None:
    user.resident.file.write_text("[profiles.work]\nbase_ulr = 1\n")


def unit(user: User, _: Plain) -> None:
    user.put(
        ".config/systemd/user/keybroker.service",
        "[Service]\nExecStart=/gone/bin/keybroker daemon\n",
    )


CONNECT, OUT = "keybroker connect", "keybroker connect --take-out-keys"
LOCAL = "keybroker connect --scope local"
FAULTS = [
    # row 1: in every place that there is
    Fault(
        "two-sources", terminal(**{TOKEN: "PLANTED"}), f"{TOKEN} is set in this", f"unset {TOKEN}"
    ),
    Fault("two-sources", terminal(**{API_KEY: "PLANTED"}), "goes out in x-api-key", "unset"),
    Fault("two-sources", settings(**{TOKEN: "PLANTED"}), "{home}/.claude/settings.json (", OUT),
    Fault(
        "two-sources",
        file("project/.claude/settings.local.json", f'{{"env": {{"{TOKEN}": "PLANTED"}}}}'),
        "project/.claude/settings.local.json (",
        OUT,
    ),
    Fault(
        "two-sources",
        file("project/.claude/settings.json", f'{{"env": {{"{API_KEY}": "PLANTED"}}}}'),
        "project/.claude/settings.json (",
        OUT,
    ),
    Fault(
        "two-sources",
        file(".claude/remote-settings.json", f'{{"env": {{"{TOKEN}": "PLANTED"}}}}'),
        ".claude/remote-settings.json (",
        "ask who manages this machine",
    ),
    Fault("two-sources", vscode, "vscode: ANTHROPIC_AUTH_TOKEN is set in", "take ANTHROPIC_AUTH_T"),
    *(
        Fault("key-about", file(name, text), f"{name}:", fix)
        for name, text, fix in (
            (".bashrc", f"export {TOKEN}=PLANTED\n", OUT),
            (".zshrc", f"export {API_KEY}='PLANTED'\n", OUT),
            (".config/fish/config.fish", f"set -gx {TOKEN} PLANTED\n", OUT),
            (
                ".config/powershell/profile.ps1",
                f'$env:{API_KEY} = "PLANTED"\n',
                OUT,
            ),
            ("project/.envrc", f"export {TOKEN}=PLANTED\n", OUT),
            (".bashrc", f"export {TOKEN}=$(cat /x)\n", "take it out of"),
            (".config/environment.d/llm.conf", f"{TOKEN}=PLANTED\n", "take it out of"),
        )
    ),
    Fault(
        "key-about",
        file(
            ".config/Code/User/settings.json",
            f'{{"terminal.integrated.env.linux": {{"{TOKEN}": "PLANTED"}}}}',
        ),
        "for its terminals",
        "take it out of",
    ),
    Fault("saved-login", saved_login, "a login at Anthropic is saved", "claude /logout"),
    Fault(
        "saved-login",
        terminal(CLAUDE_CODE_OAUTH_TOKEN="PLANTED"),
        "CLAUDE_CODE_OAUTH_TOKEN is set in this terminal",
        "unset CLAUDE_CODE_OAUTH_TOKEN",
    ),
    Fault(
        "saved-login",
        login_goes_out,
        "without a helper the saved login goes to {url}",
        CONNECT,
        Severity.ERROR,
        with_it=("outdated",),
    ),
    Fault(
        "gateway-session",
        file(".claude/.credentials.json", '{"enterpriseGateway": {"url": "https://gw.example"}}'),
        "the gateway gw.example",
        "claude /logout",
        with_it=("saved-login",),
    ),
    # row 2
    Fault(
        "key-refused", gatewayed(key="sk-another"), "the key is refused: 401", "keybroker source"
    ),
    Fault(
        "custom-headers",
        settings(ANTHROPIC_CUSTOM_HEADERS="x-api-key: PLANTED"),
        "has a header x-api-key",
        "take x-api-key out of it",
    ),
    # rows 3, 4
    Fault("nobody-there", gone_gateway, "could not be reached", "is it running?"),
    Fault("nobody-there", nameless_gateway, "cannot be found by its name", "see base_url"),
    Fault("no-api", gatewayed(page=200), "what answers is no API: 200", "keybroker verify"),
    Fault("no-api", gatewayed(page=302), "what answers is no API: 302", "keybroker verify"),
    # rows 5, 6, 7
    Fault(
        "fields",
        gatewayed(refuses=(refusals.context_management,)),
        "context_management",
        "disable_experimental_betas = true in [profiles.work.claude], then: keybroker connect",
        words=("--deep",),
    ),
    Fault(
        "thinking",
        gatewayed(refuses=(refusals.adaptive,)),
        "adaptive thinking is refused: 400",
        "CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING=1",
        words=("--deep",),
    ),
    Fault(
        "too-long",
        gatewayed(refuses=(refusals.long_prompts,)),
        "fewer tokens than the model has: 400",
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW",
        words=("--deep",),
    ),
    # rows 8 to 11
    Fault(
        "old-discovery",
        before_discovery,
        "2.1.130) has it from 2.1.132 on",
        "claude update",
        with_it=("old-client",),
    ),
    Fault("no-discovery", discovery_in_a_format, "CLAUDE_CODE_USE_BEDROCK", "haiku, sonnet"),
    Fault(
        "models-of-another",
        another_s_models,
        "gateway-models.json is of https://other.example.com",
        "rm ",
        mends=True,
    ),
    Fault(
        "login-screen",
        helper_of_project_only,
        "only {home}/project/.claude/settings.local.json has a credential",
        "keybroker connect --scope user",
    ),
    Fault("login-screen", no_credential, "and no credential is", CONNECT, with_it=("outdated",)),
    Fault("key-declined", declined, "was declined", "/config, Use custom API key"),
    Fault(
        "first-party",
        file(".claude/remote-settings.json", '{"forceLoginMethod": "console"}'),
        "forceLoginMethod; Claude Code is 2.1.329",
        "ask who manages this machine",
    ),
    Fault("login-forced", changed(forceLoginOrgUUID="x"), "forceLoginOrgUUID", "take"),
    # row 14
    Fault(
        "helper-fails",
        changed(apiKeyHelper="echo PLANTED is wrong >&2; exit 3"),
        "the helper ended with status 3",
        "run it through sh",
        with_it=("other-helper",),
    ),
    Fault("other-helper", changed(apiKeyHelper="echo sk-1"), "is not keybroker's", "--force"),
    # where requests go
    Fault(
        "elsewhere",
        settings(**{ADDRESS: "https://other.example.com"}),
        f"{ADDRESS} is https://other.example.com in {{home}}/.claude/settings.json, not {{url}}",
        "keybroker connect --force",
        with_it=("outdated",),
        mends=True,
    ),
    Fault("elsewhere", vscode_elsewhere, "vscode: ", "keybroker connect vscode --force"),
    Fault("not-connected", unconnected, f"{ADDRESS} is set nowhere", CONNECT),
    Fault("export-only", address_of_terminal, "(/", CONNECT, with_it=("outdated",), mends=True),
    Fault(
        "provider",
        settings(CLAUDE_CODE_USE_BEDROCK="1"),
        "CLAUDE_CODE_USE_BEDROCK is set in {home}/.claude/settings.json",
        "take CLAUDE_CODE_USE_BEDROCK out of",
    ),
    Fault(
        "provider",
        terminal(CLAUDE_CODE_USE_VERTEX="1"),
        "CLAUDE_CODE_USE_VERTEX is set in this terminal",
        "unset CLAUDE_CODE_USE_VERTEX",
    ),
    Fault(
        "project",
        file(
            "project/.claude/settings.json", f'{{"env": {{"{ADDRESS}": "https://evil.example"}}}}'
        ),
        f"project/.claude/settings.json sets {ADDRESS}",
        LOCAL,
        with_it=("elsewhere",),
    ),
    Fault(
        "project",
        file("project/.claude/settings.json", '{"apiKeyHelper": "echo sk-evil"}'),
        "apiKeyHelper is set by",
        f"{LOCAL} --force",
    ),
    # settings
    Fault("broken-settings", commented, "is not strict JSON (line 1, column", "mend that place"),
    Fault(
        "bad-address",
        settings(**{ADDRESS: "gateway.example"}),
        "is no address",
        "keybroker connect --force",
        mends=True,
        with_it=("outdated",),
    ),
    Fault(
        "plain-http",
        settings(**{ADDRESS: "http://gateway.example"}),
        "begins with http://",
        "set base_url",
        with_it=("elsewhere",),
    ),
    *(
        Fault(
            "ttl",
            settings(CLAUDE_CODE_API_KEY_HELPER_TTL_MS=text),
            f"is '{text}'",
            CONNECT,
            mends=True,
        )
        for text in ("1e3", "0", "-5", "60s", "")
    ),
    Fault(
        "certificate",
        settings(NODE_EXTRA_CA_CERTS="/gone/authority.pem"),
        "names /gone/authority.pem, which cannot be read",
        "ca = ",
        Severity.WARNING,
    ),
    Fault("outdated", other_ttl, "CLAUDE_CODE_API_KEY_HELPER_TTL_MS not as", CONNECT, mends=True),
    Fault("moved", moved, "names /gone/keybroker/bin/", CONNECT, mends=True),
    Fault("old-client", old_client, "answers a wrong key with 403", "claude update"),
    Fault("old-client", old_and_401, "2.1.197) is older", "claude update", Severity.NOTE),
    Fault("refusal", gatewayed(refusal=400), "with 400", "push = true"),
    Fault(
        "desktop",
        desktop(inferenceGatewayBaseUrl="gateway.example"),
        "is no address",
        "keybroker connect desktop",
    ),
    Fault(
        "desktop",
        desktop(inferenceGatewayBaseUrl="https://other.example.com"),
        "is https://other.example.com",
        "keybroker connect desktop",
    ),
    Fault(
        "desktop",
        desktop(inferenceCredentialHelper="/gone/launcher"),
        "is no program that can be run",
        "keybroker connect desktop",
    ),
    # the gateway
    Fault("clock", gatewayed(ahead=300), "s ahead of this machine's", "timedatectl"),
    Fault("unwell", gatewayed(page=503), "answers 503 to message", "try again later"),
    Fault(
        "proxy",
        terminal(HTTP_PROXY="http://127.0.0.1:9"),
        "HTTP_PROXY is set in this terminal, and 127.0.0.1 is not in NO_PROXY",
        "write HTTP_PROXY",
        Severity.NOTE,
        with_it=("nobody-there",),
    ),
    Fault(
        "proxy",
        terminal(HTTP_PROXY="http://[bad"),
        "is no address",
        "unset HTTP_PROXY",
        Severity.ERROR,
    ),
    # keybroker
    Fault("configuration", broken, "base_ulr", "keybroker config check"),
    Fault("folder", open_state, "others can enter it", "chmod 700 ", mends=True),
    Fault("daemon", stuck_daemon, "does not answer", "keybroker daemon --stop", mends=True),
    Fault("no-key", key_is_gone, "key: cannot be read", "put it there", with_it=("helper-fails",)),
    Fault("not-kept", in_memory, "memory", 'cache.key = "file"'),
    Fault("unit", unit, "starts /gone/bin/keybroker, which is not there", "/bin/keybroker"),
]
NAMES = [f"{number} {one.id}" for number, one in enumerate(FAULTS)]


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_each_fault_is_found(user: User, gateway: Plain, fault: Fault) -> None:
    """What, why, row and fix in one line; the exit status; and it is gone when it was mended."""
    variables = fault.plant(user, gateway) or {}
    found = user.findings(*fault.words, **variables)
    assert fault.id in found, found
    says = fault.says.format(home=user.home, url=gateway.url)
    [one, *_] = [one for one in found[fault.id] if says in one["what"]] or [found[fault.id][0]]
    assert says in one["what"]
    assert fault.fix in one["fix"]
    kind = KINDS[fault.id]
    assert one["severity"] == (fault.severity or kind.severity)
    assert one["row"] == kind.row
    assert one["safe"] or not fault.mends or any(one["safe"] for one in found["outdated"])
    assert set(fault.with_it) - set(found) == set()

    done = user.type("doctor", *fault.words, **variables)
    row = f" (row {kind.row})" if kind.row else ""
    line = f"{one['severity']}: {one['what']}; {one['why']}{row}; fix: {one['fix']}"
    clean = [re.sub(r"\b\d+ s ahead", "N s ahead", text) for text in (done.stdout, line)]
    assert clean[1] in clean[0].splitlines()

    if fault.mends:
        after = user.look("--fix", *fault.words, **variables)
        assert [one["problem"] for one in after["mended"]] == [None] * len(after["mended"])
        assert fault.id in [one["id"] for one in after["mended"]] or "outdated" in found
        assert fault.id not in user.findings(*fault.words, **variables)


def test_every_row_of_the_page_is_planted() -> None:
    """Fourteen rows: those that are not in the list above have a test of their own below."""
    planted = {KINDS[one.id].row for one in FAULTS} - {None}
    assert planted | {12, 13} == set(range(1, 15))


def test_what_the_organisation_has_set_is_found(user: User, gateway: Plain, tmp_path: Path) -> None:
    """Files of the machine, as in /etc: address, helper, keys and logins beat what the user has."""
    machine = Machine(tmp_path)

    def look() -> dict[str, Any]:
        words = ("-c", "from keybroker.cli import main; main()", "doctor", "--json")
        done = subprocess.run(
            [*machine.command, sys.executable, *words],
            cwd=user.project,
            env={**user.resident.environment, "PATH": f"{user.programs}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert user.canaries.seen_in(done.stdout + done.stderr) == []
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    machine.write("managed-settings.json", {"env": {ADDRESS: "https://theirs.example.com"}})
    found = look()
    assert found["requests"][0]["set_in"] == "/etc/claude-code/managed-settings.json"
    assert [one["id"] for one in found["findings"]] == ["elsewhere"]
    assert found["findings"][0]["fix"].startswith("ask who manages this machine")

    theirs = {ADDRESS: gateway.url, TOKEN: user.planted}
    machine.write("managed-settings.d/20-b.json", {"env": theirs, "forceLoginMethod": "console"})
    found = look()
    assert [one["id"] for one in found["findings"]] == ["two-sources", "first-party"]
    assert "/etc/claude-code/managed-settings.d/20-b.json" in found["findings"][1]["what"]

    machine.write("managed-settings.d/30-c.json", '{"env": {},}')
    [one] = [one for one in look()["findings"] if one["id"] == "broken-settings"]
    assert "30-c.json: is not strict JSON (line 1, column" in one["what"]


def test_a_firewall_is_found(user: User, gateway: Plain) -> None:
    """Row 12: a request for one token passes, and what a session sends does not."""
    with Waf(gateway.url) as waf:
        user.configure(waf.url)
        user.connect()
        assert user.look()["findings"] == []
        [one] = user.findings("--deep")["firewall"]
    assert one["row"] == 12
    assert "exempt /v1/messages" in one["fix"]
    assert "CrossSiteScripting_Body" in one["fix"]


def test_a_certificate_that_node_does_not_trust(user: User, tmp_path: Path) -> None:
    """Row 13: nobody trusts it; the system does and Node does not; `ca` says it to both."""
    authority = Authority(tmp_path)
    user.put(".claude.json", json.dumps({"hasCompletedOnboarding": True}))
    with Plain(KEY, authority.server()) as gateway:
        user.configure(gateway.url)
        user.connect()
        [one] = user.findings()["certificate"]
        assert one["severity"] == "error"
        assert "ca = " in one["fix"]

        [one] = user.findings(SSL_CERT_FILE=str(authority.file))["certificate"]
        assert one["severity"] == "warning"
        assert str(authority.file) in one["fix"]
        assert "NODE_EXTRA_CA_CERTS" in one["fix"]

        user.configure(gateway.url, f"ca = {json.dumps(str(authority.file))}")
        user.connect()
        assert user.look()["findings"] == []


@pytest.mark.parametrize("name", ["settings.json", "settings.local.json"])
def test_what_a_folder_brings_along_is_not_run(user: User, gateway: Plain, name: str) -> None:
    """A line that is not ours is looked at and not run, whatever it calls itself."""
    user.in_project(name, apiKeyHelper=f"touch {user.home}/ran # keybroker")
    assert user.look()["requests"][0]["authorization"] == (
        f"apiKeyHelper in {user.project}/.claude/{name}"
    )
    assert not (user.home / "ran").exists()
    user.edit(lambda found: found.update(apiKeyHelper=f"touch {user.home}/ran; exit 1"))
    shutil.rmtree(user.project / ".claude")
    assert "helper-fails" in user.findings()
    assert (user.home / "ran").exists()


def test_a_header_that_is_not_read(user: User, gateway: Plain) -> None:
    """Row 2: a key in x-api-key, before a gateway that reads authorization alone."""
    gateway.reads = ("authorization",)
    assert user.look()["findings"] == []
    user.edit(lambda found: found.pop("apiKeyHelper"))
    [one] = user.findings(**{API_KEY: user.planted})["one-header"]
    assert one["what"] == (
        f"claude: {API_KEY} in this terminal goes out in x-api-key; this gateway reads "
        "authorization alone"
    )


def test_models_that_are_in_no_list(user: User, gateway: Plain) -> None:
    """Row 8: names that discovery would find, and names that it would not."""
    source = f'type = "litellm"\nadmin = {{ file = "{user.home / "key"}" }}\n'
    source += 'models = ["anthropic-large", "qwen-coder", "claude-sonnet-4-6"]'
    user.configure(gateway.url, source=source)
    found = user.findings()
    assert "anthropic-large are not among" in found["models-missing"][0]["what"]
    assert "[gatewayDiscovery]" in found["models-missing"][0]["fix"]
    assert "qwen-coder can be chosen" in found["models-unnamed"][0]["what"]


def test_desktop_has_a_line_of_its_own(user: User, gateway: Plain) -> None:
    """Where Claude Desktop's requests go is said beside the others."""
    (user.home / ".config/Claude-3p").mkdir(parents=True)
    assert user.type("connect", "desktop", "--no-check").rc == 0
    done = user.type("doctor")
    assert done.rc == 0, done
    assert re.search(rf"^  desktop  to {gateway.url} \(set in .*\), with infer", done.stdout, re.M)


def test_no_profile_is_no_fault(user: User) -> None:
    """On a machine where nothing is set up the next command is named."""
    done = user.type("doctor")
    assert (done.rc, done.stderr) == (0, "")
    assert "note: no profile is configured; " in done.stdout
    assert done.stdout.endswith("; fix: keybroker init\n")
    [one] = user.look()["findings"]
    assert (one["id"], one["severity"]) == ("no-profile", "note")
    assert user.type("doctor", "nobody").rc == 78


def test_without_claude_code_nothing_of_it_is_missing(user: User, gateway: Plain) -> None:
    """Who uses keys elsewhere is not told to connect."""
    assert user.type("disconnect").rc == 0
    shutil.rmtree(user.programs)
    shutil.rmtree(user.home / ".claude", ignore_errors=True)
    found = user.look()
    assert (found["requests"], found["findings"]) == ([], [])


# Of keybroker itself, by what a daemon says

ROW: dict[str, Any] = {
    "profile": "work",
    "phase": "fresh",
    "held": True,
    "late": False,
    "fingerprint": "0123abcd",
    "trouble": None,
    "hint": None,
    "open": [],
    "retired": [],
}


def standing(**changes: Any) -> list[Finding]:
    """Return what is found where a daemon says this."""
    row = {**ROW, **{name: value for name, value in changes.items() if name in ROW}}
    more = {name: value for name, value in changes.items() if name not in ROW}
    found = {"daemon": {"version": __version__}, "cache": "OS keyring", "profiles": [row], **more}
    return list(agent.of_standing(found, __version__, {}))


def stamp(ago: timedelta) -> str:
    return (datetime.now(UTC) - ago).isoformat().replace("+00:00", "Z")


@pytest.mark.parametrize(
    ("changes", "ids", "fix"),
    [
        ({}, [], ""),
        ({"trouble": "gateway: is down"}, ["failing"], "keybroker source test work"),
        ({"trouble": "x", "hint": "do y"}, ["failing"], "do y"),
        ({"late": True}, ["failing"], "keybroker rotate work"),
        ({"fingerprint": None, "trouble": "x"}, ["no-key"], "keybroker source test work"),
        ({"fingerprint": None}, [], ""),
        ({"retired": timedelta(minutes=-1)}, [], ""),
        ({"retired": timedelta(minutes=1)}, [], ""),
        ({"retired": timedelta(hours=1)}, ["unrevoked"], "keybroker reload"),
        (
            {"open": timedelta(hours=2)},
            ["unrevoked"],
            "keybroker sweep --profile work",
        ),
        (
            {"unconfigured": [{"profile": "old", "keys": [1, 2]}]},
            ["unrevoked"],
            "keybroker revoke old",
        ),
        ({"daemon": {"version": "0.0.1"}}, ["versions"], "keybroker daemon --stop"),
        ({"cache": "memory only: no keyring"}, ["not-kept"], 'cache.key = "file"'),
        ({"lost": ["cannot be read"]}, ["not-kept"], "keybroker status"),
        ({"push": {"off": {"/x": "is read-only"}}}, ["not-told"], "see that you may write /x"),
        ({"problem": "the daemon hangs; x"}, ["daemon"], "keybroker daemon --stop"),
    ],
)
def test_how_things_stand(changes: dict[str, Any], ids: list[str], fix: str) -> None:
    """What the daemon says of keys becomes a finding where somebody should do something."""
    if (ago := changes.get("retired")) is not None:
        changes = {"retired": [{"fingerprint": "9b8de279", "revoke_at": stamp(ago)}]}
    if (ago := changes.get("open")) is not None:
        changes = {"open": [{"label": "kb-1", "since": stamp(ago)}]}
    found = standing(**changes)
    assert [one.id for one in found] == ids
    assert [one.fix for one in found if fix not in one.fix] == []


def test_a_person_who_has_to_sign_in_is_told_what_to_type() -> None:
    """As it is typed."""
    hint = "run: keybroker login corp"
    findings = standing(fingerprint=None, trouble="login corp: nobody is signed in", hint=hint)
    assert [one.fix for one in findings] == ["keybroker login corp"]


def test_a_failing_profile_whose_key_is_late_is_worse() -> None:
    [one] = standing(trouble="x", late=True)
    assert one.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("changes", "held", "found"),
    [
        ({"command": None}, True, []),
        ({"ending": True}, True, [("login-ending", "warning")]),
        ({}, True, [("login-needed", "warning")]),
        ({}, False, [("login-needed", "error")]),
        ({"profiles": []}, False, [("login-needed", "warning")]),
    ],
)
def test_how_sign_ins_stand(
    changes: dict[str, Any], held: bool, found: list[tuple[str, str]]
) -> None:
    """One that somebody has to do is worse where there is no key any more."""
    one = {
        "login": "corp",
        "said": "nobody is signed in",
        "profiles": ["work"],
        "ending": False,
        "command": "keybroker login corp",
        **changes,
    }
    findings = list(agent.of_sign_ins([one], {"profiles": [{"profile": "work", "held": held}]}))
    assert [(each.id, str(each.severity)) for each in findings] == found
    for each in findings:
        users = ", ".join(one["profiles"]) or "no profile"
        assert each.what == f"login corp, for {users}: nobody is signed in"
        assert each.fix == "keybroker login corp"


# Side by side


def test_a_check_that_hangs_is_a_finding() -> None:
    """The others are there at once, in their order, and nobody waits for longer than was said."""
    hang = Event()

    def hangs() -> list[Finding]:
        hang.wait(30)
        return []

    checks = {"first": hangs, "second": lambda: [Finding("clock", "b", "c")]}
    found = together(checks, 0.2)
    hang.set()
    assert [(one.id, one.what) for one in found] == [
        ("not-looked-at", "first: did not end within 0.2 s"),
        ("clock", "b"),
    ]


def test_a_check_that_fails_names_its_place_alone() -> None:
    """A foreign error's text may hold a key."""

    def fails() -> list[Finding]:
        raise RuntimeError(KEY)

    [one] = together({"x": fails}, 5)
    assert re.fullmatch(r"x: RuntimeError at test_doctor\.py:\d+", one.what)


def test_a_daemon_that_does_not_answer_can_be_ended() -> None:
    """What a command would end with becomes a finding with the same words."""
    one = agent.of_error(NobodyAnswers("the daemon hangs", hint="keybroker daemon --stop"))
    assert (one.id, one.mend) == ("daemon", Command(("daemon", "--stop")))


def test_a_mend_that_fails_says_why(user: User) -> None:
    """The last line of ours is the reason."""
    problem = fixes.mend(Command(("rotate", "nobody")), user.resident.environment)
    assert problem == "config: no profile 'nobody'"


def test_the_version_is_that_of_the_package(user: User) -> None:
    """Nothing is started where a package says it; else `--version` is asked, with a deadline."""
    path = {"PATH": str(user.programs)}
    found = program.find(path)
    assert found is not None
    assert program.said(found.version) == NEWEST
    user.install(WITH_NODE_20)
    found = program.find(path)
    assert found is not None
    assert str(found) == f"{user.programs}/claude ({WITH_NODE_20})"
    (user.programs / "claude").unlink()
    assert program.find(path) is None


def test_every_kind_is_found_by_a_test() -> None:
    """No finding without a planted fault."""
    source = Path(__file__).read_text()
    missing = [one for one in KINDS if f'"{one}"' not in source]
    assert missing == []


def test_the_page_has_every_kind() -> None:
    """docs/doctor.md lists each finding with severity, row and meaning."""
    page = (Path(__file__).parent.parent / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (\d*) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [
        (name, str(kind.severity), str(kind.row or ""), kind.why) for name, kind in KINDS.items()
    ]
