"""run: a program has a key of its own, and whatever is killed, the key ends with it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keybroker import foreign, wire
from keybroker.config import read_profile
from keybroker.connect import inline
from keybroker.credential import fingerprint
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import ConfigError, NobodyAnswers
from keybroker.foreground import NoProgramError, NotRunnableError, find
from keybroker.journal import Journal
from keybroker.label import is_made, is_run, made_name, made_of
from keybroker.runs import Limits, made
from tests.canaries import Canaries
from tests.patched import daemon_with
from tests.resident import Resident, until
from tests.servers.faults import Faults, Hang

KEYBROKER = [sys.executable, "-c", "from keybroker.cli import main; main()"]
HASTY = "from keybroker import daemon\ndaemon.CLAIM_SECONDS = 0.5"
SECONDS = 10.0  # a killed process, a revoked key
URL = "https://llm.example.com"


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def user(resident: Resident, gateway: DevGateway) -> Resident:
    """Somebody with a profile at the gateway; no daemon runs yet."""
    resident.environment["ADMIN"] = gateway.master_key
    configure(resident, gateway.url)
    return resident


def configure(user: Resident, url: str, more: str = "", source: str = "") -> None:
    user.configure(
        f'[profiles.work]\nbase_url = "{url}"\n{more}\n[profiles.work.source]\n'
        f'type = "litellm"\nadmin = {{ env = "ADMIN" }}\n{source}\n'
    )


def own(gateway: DevGateway) -> list[str]:
    """Return the labels of the keys at the gateway that were made for programs."""
    aliases = [key.alias or "" for key in gateway.live_keys()]
    return [alias for alias in aliases if re.search(r"-work-(run|env)-[0-9a-f]{6}-", alias)]


class Started(NamedTuple):
    """A `keybroker run`, its program, and the key that this one has."""

    run: subprocess.Popen[str]
    program: int
    key: str


@contextmanager
def started(user: Resident, *options: str, script: str = "exec sleep 60") -> Iterator[Started]:
    """Run a shell that says its process and its key, and then goes on as it is told."""
    words = ["sh", "-c", f"echo $$ $ANTHROPIC_AUTH_TOKEN; {script}"]
    with subprocess.Popen(
        [*KEYBROKER, "run", *options, "--", *words],
        env=user.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        program = 0
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            pid, key = line.split()
            program = int(pid)
            yield Started(process, program, key)
        finally:
            for one in (program, process.pid):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL) if one else None


# What a profile for one program is made of


def profile(lifetime: str = "12h", **source: Any) -> Any:
    told = {"type": "litellm", "admin": {"env": "ADMIN"}, "lifetime": lifetime, **source}
    raw = {"base_url": URL, "source": told, "publish": {"to": "aws", "secret": "llm"}}
    return read_profile("work", raw, Where({}, "test"))


@pytest.mark.parametrize(
    ("ttl", "hold", "helper_ttl"),
    [
        ("30m", timedelta(minutes=10), timedelta(minutes=1)),
        ("12h", timedelta(minutes=17), timedelta(minutes=1)),  # as the profile's
        ("10s", timedelta(milliseconds=3333), timedelta(milliseconds=1111)),
    ],
)
def test_a_short_life_has_a_hold_that_fits(
    ttl: str, hold: timedelta, helper_ttl: timedelta
) -> None:
    """The rules of the file hold: three holds in a life, three refreshes in a hold."""
    units = {"s": "seconds", "m": "minutes", "h": "hours"}
    length = timedelta(**{units[ttl[-1]]: int(ttl[:-1])})
    one = made(profile(), "work-run-000000", Limits(ttl=length))

    assert (one.source["lifetime"], one.hold, one.helper_ttl) == (length, hold, helper_ttl)
    assert one.publish is None
    assert one.issuer == profile().issuer


def test_without_a_ttl_it_is_half_an_hour_or_the_profiles() -> None:
    """Never longer than a key of the profile lives."""
    assert made(profile(), "work-run-000000", Limits()).source["lifetime"] == timedelta(minutes=30)
    raw = {"base_url": URL, "hold": "2m", "source": {**profile().raw["source"], "lifetime": "10m"}}
    one = read_profile("work", raw, Where({}, "test"))
    assert made(one, "work-run-000000", Limits()).source["lifetime"] == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(ttl=timedelta(hours=13)), "--ttl: longer than its keys live, 12h"),
        (Limits(ttl=timedelta(seconds=9)), "--ttl: at least 10s works"),
        (Limits(ttl=timedelta(milliseconds=10500)), "--ttl: expected whole seconds"),
        (Limits(budget=6), "--budget: more than its keys have, 5"),
        (Limits(models=("a", "c")), "--model: its keys may not use c"),
    ],
)
def test_a_program_may_do_less_and_never_more(limits: Limits, problem: str) -> None:
    """What the profile's own keys may not, a program's may not either."""
    with pytest.raises(ConfigError) as caught:
        made(profile(max_budget=5, models=["a", "b"]), "work-run-000000", limits)
    assert caught.value.message == f"profiles.work: {problem}"


def test_the_name_says_what_it_was_made_of_and_is_nobody_elses() -> None:
    """Any profile's name has room for it, and the configuration refuses such a name."""
    for name in ("work", "a" * 32):
        run, env = made_name(name), made_name(name, "env")
        assert len(run) <= 32
        assert (is_made(run), is_run(run), is_made(env), is_run(env)) == (True, True, True, False)
        assert name.startswith(made_of(run))
    assert not is_made("work-run")


def test_such_a_name_in_the_file_is_refused(user: Resident) -> None:
    """With the line, since its keys would be revoked as those of a program that is gone."""
    user.configure(user.file.read_text().replace("profiles.work", "profiles.work-run-0a1b2c"))
    status, stdout, stderr = user.cli("config", "check")
    assert (status, stdout) == (78, "")
    assert "a name that ends so is one that `keybroker run` makes" in stderr


# What a program gets


FOREIGN = {
    "ANTHROPIC_API_KEY": "foreign",
    "ANTHROPIC_AUTH_TOKEN": "foreign",
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:9",
    "ANTHROPIC_CUSTOM_HEADERS": "x-api-key: foreign",
    "CLAUDE_CODE_OAUTH_TOKEN": "foreign",
    "CLAUDE_CODE_USE_BEDROCK": "1",
    "CLAUDE_CODE_USE_VERTEX": "1",
    "CLAUDE_CODE_USE_FOUNDRY": "1",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS": "1",
    "CLAUDE_CODE_USE_WHAT_COMES_NEXT": "1",
    "CLAUDE_CODE_SKIP_BEDROCK_AUTH": "1",
    "ANTHROPIC_BEDROCK_BASE_URL": "http://127.0.0.1:9",
    "ANTHROPIC_BEDROCK_SESSION_TOKEN": "foreign",
    "ANTHROPIC_VERTEX_PROJECT_ID": "foreign",
    "ANTHROPIC_VERTEX_BASE_URL": "http://127.0.0.1:9",
    "VERTEX_REGION_CLAUDE_4_0_SONNET": "foreign",
    "CLOUD_ML_REGION": "foreign",
    "ANTHROPIC_FOUNDRY_API_KEY": "foreign",
    "ANTHROPIC_FOUNDRY_RESOURCE": "foreign",
    "ANTHROPIC_AWS_WORKSPACE_ID": "foreign",
    "AWS_BEARER_TOKEN_BEDROCK": "foreign",
    "AWS_ACCESS_KEY_ID": "foreign",
    "AWS_PROFILE": "foreign",
    "AWS_REGION": "foreign",
}
SHOWS = "import os, json; print(json.dumps(dict(os.environ)))"


def environment_in(user: Resident, *options: str, name: str = sys.executable) -> dict[str, str]:
    """Return the environment that a program sees."""
    status, stdout, stderr = user.cli("run", *options, "--", name, "-c", SHOWS)
    assert status == 0, stderr
    found: dict[str, str] = json.loads(stdout)
    return found


def test_a_program_has_the_key_and_nothing_that_leads_elsewhere(
    user: Resident, gateway: DevGateway
) -> None:
    """Everything else is as it was."""
    user.environment |= {**FOREIGN, "OTHER": "stays"}
    seen = environment_in(user)

    key = seen.pop("ANTHROPIC_AUTH_TOKEN")
    assert key.startswith("sk-")
    assert seen.pop("ANTHROPIC_BASE_URL") == gateway.url
    assert seen.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # of Python's own start
    wanted = {k: v for k, v in user.environment.items() if k not in FOREIGN}
    assert seen == wanted


def test_what_is_to_be_kept_is_kept(user: Resident) -> None:
    """By name, also where it could lead elsewhere: somebody said so."""
    user.environment |= FOREIGN
    seen = environment_in(user, "--keep", "AWS_PROFILE", "--keep", "AWS_REGION")
    assert {name for name in FOREIGN if name in seen} == {
        *("AWS_PROFILE", "AWS_REGION", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL")
    }


def test_the_list_has_every_variable_of_the_test() -> None:
    """The names that are taken out by name, and those of the same kind."""
    assert [name for name in FOREIGN if not foreign.is_foreign(name)] == []
    assert [
        name for name in ("HOME", "PATH", "OPENAI_API_KEY", "LAWS_X") if foreign.is_foreign(name)
    ] == []


def test_the_key_is_short_and_small(user: Resident, gateway: DevGateway) -> None:
    """Half an hour and a budget of 2, where nobody says otherwise; and `status` lists it."""
    with started(user) as one:
        [alias] = own(gateway)
        found = json.loads(user.cli("status", "--json")[1])
        info = key_info(gateway, one.key)

    assert info["max_budget"] == 2
    [given] = found["exported"]
    assert given["profile"] in alias
    assert (given["of"], given["program"], given["pid"]) == ("work", "sh", one.run.pid)
    assert given["fingerprint"] == fingerprint(one.key)
    assert given["revoke_at"] == given["expires_at"]
    assert found["unconfigured"] == []
    assert [row["profile"] for row in found["profiles"]] == ["work"]


def test_a_model_is_the_only_one(user: Resident, gateway: DevGateway) -> None:
    """Of the key, and of every tier."""
    with started(user, "--model", "claude-opus-4-6", "--budget", "0.5", "--ttl", "1m") as one:
        info = key_info(gateway, one.key)
    assert (info["models"], info["max_budget"]) == (["claude-opus-4-6"], 0.5)
    seen = environment_in(user, "--model", "claude-opus-4-6")
    tiers = {f"ANTHROPIC_DEFAULT_{tier}_MODEL" for tier in ("HAIKU", "SONNET", "OPUS")}
    assert {seen[name] for name in (*tiers, "ANTHROPIC_MODEL")} == {"claude-opus-4-6"}


def key_info(gateway: DevGateway, key: str) -> dict[str, Any]:
    """Ask the gateway what it knows of a key, by that key."""
    import urllib.request

    request = urllib.request.Request(
        f"{gateway.url}/key/info?key={key}",
        headers={"authorization": f"Bearer {gateway.master_key}"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        found: dict[str, Any] = json.load(answer)["info"]
    return found


def test_a_program_is_told_that_its_key_cannot_rotate(user: Resident) -> None:
    """In one line, on stderr; -q says nothing."""
    status, _, stderr = user.cli("run", "--", "true")
    assert status == 0
    assert re.fullmatch(
        r"keybroker: true has a key of its own, [0-9a-f]{8} until [0-9: -]+; it cannot rotate\n",
        stderr,
    )
    assert user.cli("run", "-q", "--", "true") == (0, "", "")


def test_umask_core_and_signals_are_as_they_were(user: Resident) -> None:
    """What keybroker sets for itself does not reach the program."""
    script = "umask; ulimit -S -c; grep -E 'SigBlk|SigIgn' /proc/self/status"
    of_libc = 0x180000000  # 32 and 33, which glibc's posix_spawn ignores for its own ends
    plain = ["sh", "-c", f"umask 027; ulimit -S -c 5; {script}"]
    run = ["sh", "-c", 'umask 027; ulimit -S -c 5; exec "$@"', "sh", *KEYBROKER]
    words = [*run, "run", "-q", "--", "sh", "-c", script]
    said = [
        subprocess.run(one, env=user.environment, capture_output=True, text=True, check=True).stdout
        for one in (plain, words)
    ]
    plainly, run_so = ([*one.split()] for one in said)
    assert plainly[:2] == run_so[:2] == ["0027", "5"]
    masks = [[int(one, 16) & ~of_libc for one in words[3::2]] for words in (plainly, run_so)]
    assert masks[0] == masks[1]


# How it ends


def test_the_exit_status_is_the_programs(user: Resident, gateway: DevGateway) -> None:
    """And the key is gone when the command is."""
    assert user.cli("run", "-q", "--", "sh", "-c", "exit 7") == (7, "", "")
    assert own(gateway) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT])
def test_it_dies_of_what_its_program_died_of(
    user: Resident, gateway: DevGateway, number: int
) -> None:
    """So that a shell sees 128 + n, and a script stops at Ctrl-C."""
    status, _, _ = user.cli("run", "-q", "--", "sh", "-c", f"kill -{number:d} $$")
    assert status == -number
    assert own(gateway) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_program_once(user: Resident, number: int) -> None:
    """Which may do with it what it likes."""
    name = signal.Signals(number).name.removeprefix("SIG")
    trap = f"n=0; trap 'n=$((n+1)); echo got' {name}; echo ready"
    script = f"{trap}; while [ $n = 0 ]; do sleep 0.05; done; read line; exit $((40+n))"
    with started(user, "-q", script=script) as one:
        assert one.run.stdout is not None
        assert one.run.stdout.readline() == "ready\n"
        one.run.send_signal(number)
        assert one.run.stdout.readline() == "got\n"
        one.run.communicate("\n", timeout=SECONDS)
        assert one.run.returncode == 41


def test_killed_itself_its_key_is_revoked(user: Resident, gateway: DevGateway) -> None:
    """SIGKILL of `run`: the kernel closes its connection, and the daemon sees that."""
    with started(user) as one:
        assert len(own(gateway)) == 1
        one.run.kill()
        until(lambda: own(gateway) == [], SECONDS)
        os.kill(one.program, 0)  # which goes on, with a key that nobody takes


def test_when_its_program_is_killed_the_key_is_revoked(user: Resident, gateway: DevGateway) -> None:
    """SIGKILL of the program: `run` ends so, and not before the key has."""
    with started(user) as one:
        os.kill(one.program, signal.SIGKILL)
        assert one.run.wait(SECONDS) == -signal.SIGKILL
        assert own(gateway) == []


def test_when_the_daemon_is_killed_the_key_lives_as_long_as_its_program(
    user: Resident, gateway: DevGateway
) -> None:
    """SIGKILL of the daemon: `run` starts another, which goes on with the same key."""
    with started(user, script="read line; exit 5") as one:
        [alias] = own(gateway)
        first = user.owner()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: user.owner() not in (None, first))
        until(lambda: [run["pid"] for run in user.status()["runs"]] == [one.run.pid])
        assert own(gateway) == [alias]
        assert one.run.communicate("\n", timeout=SECONDS)[1].count("\n") == 1
        assert one.run.returncode == 5
        assert own(gateway) == []


def test_when_all_are_killed_the_next_daemon_revokes_the_key(
    user: Resident, gateway: DevGateway
) -> None:
    """Nobody comes for it within ten seconds, as a `run` that lives would."""
    with started(user) as one:
        one.run.send_signal(signal.SIGSTOP)  # or it would start another at once
        daemon = user.owner()
        assert daemon is not None
        os.kill(daemon, signal.SIGKILL)
        one.run.kill()
        one.run.wait(SECONDS)
        assert len(own(gateway)) == 1
        user.start(command=daemon_with(HASTY, user.state, user.socket))
        until(lambda: own(gateway) == [], SECONDS)


def test_a_key_that_ended_meanwhile_is_told(user: Resident, gateway: DevGateway) -> None:
    """A `run` that was stopped while another daemon came cannot say that its program goes on."""
    with started(user, script="read line") as one:
        one.run.send_signal(signal.SIGSTOP)
        daemon = user.owner()
        assert daemon is not None
        os.kill(daemon, signal.SIGKILL)
        user.start(command=daemon_with(HASTY, user.state, user.socket))
        until(lambda: own(gateway) == [], SECONDS)
        one.run.send_signal(signal.SIGCONT)
        assert one.run.stderr is not None
        assert "cannot rotate" in one.run.stderr.readline()
        said = one.run.stderr.readline()
        assert said == "keybroker: sh: its key was revoked while no daemon was there\n"


def test_a_gateway_that_hangs_keeps_nobody(user: Resident, gateway: DevGateway) -> None:
    """The command ends, says that the key is alive, and the daemon goes on trying."""
    with Faults(gateway.url, admin=gateway.master_key) as faults:
        configure(user, faults.url, source='timeout = "1s"')
        with started(user, script="read line") as one:
            faults.next(Hang(), times=None)
            _, stderr = one.run.communicate("\n", timeout=20)
            assert "its key is not revoked yet" in stderr
            assert len(own(gateway)) == 1
            faults.clear()
            until(lambda: own(gateway) == [], 30)


def test_nothing_is_left_of_many(user: Resident, gateway: DevGateway) -> None:
    """The daemon forgets each, and so does a journal that is compacted."""
    for _ in range(3):
        assert user.cli("run", "-q", "--", "true")[0] == 0
    until(lambda: user.status()["unconfigured"] == [])
    assert user.status()["runs"] == []
    user.stop()
    journal = Journal(user.state)
    journal.compact(above=0)
    left = {record.profile for record in journal.read()}
    assert len([name for name in left if is_made(name)]) <= 1  # the newest record always stays
    assert not list((user.state / "cache").glob("*run*"))


# What is said when it cannot be


def test_a_program_that_is_not_there(user: Resident, gateway: DevGateway) -> None:
    """127, as a shell has it, and nothing was minted."""
    status, stdout, stderr = user.cli("run", "--", "claude")
    assert (status, stdout) == (127, "")
    said, hint = stderr.splitlines()
    assert said == "keybroker: run: claude: is not in PATH"
    assert hint.startswith("hint: install Claude Code, ")
    status, _, stderr = user.cli("run", "--", str(user.file))
    assert (status, stderr) == (126, f"keybroker: run: {user.file}: cannot be run\n")
    assert gateway.requests == 0


def test_programs_are_found_as_a_shell_finds_them(tmp_path: Path) -> None:
    """The first in PATH that can be run; a path is taken as it is."""
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, mode in ((first, 0o600), (second, 0o700)):
        folder.mkdir()
        (folder / "tool").touch(mode)
    path = {"PATH": f"{first}:{second}"}
    assert find("tool", path) == str(second / "tool")
    assert find(str(second / "tool"), path) == str(second / "tool")
    with pytest.raises(NotRunnableError):
        find("tool", {"PATH": str(first)})
    with pytest.raises(NoProgramError):
        find("absent", path)
    with pytest.raises(NoProgramError):
        find(str(first / "absent"), path)


def test_a_gateway_that_refuses_the_admin_key(user: Resident) -> None:
    """77, about the profile of the file, and the program is not run."""
    user.environment["ADMIN"] = "sk-canary-not-the-admin-key"
    status, stdout, stderr = user.cli("run", "--", "echo", "ran")
    assert (status, stdout) == (77, "")
    assert re.match(r"keybroker: work: litellm: 127\.0\.0\.1:\d+ refused the admin key", stderr)
    assert "-run-" not in stderr


def test_two_hundred_models_are_too_many(user: Resident) -> None:
    """A request has 1,024 bytes."""
    names = [f"model-{n}" for n in range(200)]
    with DevGateway(models=names) as gateway:
        user.environment["ADMIN"] = gateway.master_key
        configure(user, gateway.url)
        words = [word for name in names for word in ("--model", name)]
        status, _, stderr = user.cli("run", *words, "--", "true")
    assert (status, stderr.splitlines()[0]) == (
        78,
        "keybroker: run: what was asked for is too long",
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "work", "profile": "work", "program": "x", "pid": 1},
        {"name": "work-run-000000", "profile": "work", "program": "x", "pid": "many"},
        {"name": "work-run-000000", "profile": "work", "program": "x", "pid": 1, "ttl_s": "x"},
        {"name": "work-run-000000", "profile": "work", "program": "x", "pid": 1, "ttl_s": 1e300},
        {"name": "work-run-000000", "profile": "work", "program": "x", "pid": 1, "budget": []},
        {"name": "work-run-000000", "profile": "work", "program": "x", "pid": 1, "models": 3},
    ],
)
def test_strange_requests_are_refused(user: Resident, values: dict[str, Any]) -> None:
    """In words, and the daemon goes on."""
    user.start()
    connection = wire.hold(user.socket, "run", values)
    connection.settimeout(SECONDS)
    with pytest.raises(NobodyAnswers, match="words it does not know"):
        wire.read_told(user.socket, connection.recv(1 << 16).rstrip(b"\n"))
    connection.close()
    assert user.key()


# Keys that are not made here


def test_a_key_that_somebody_else_keeps_is_given_as_it_is(
    user: Resident, gateway: DevGateway
) -> None:
    """There is no other; that is said, and it is listed as exported while the program runs."""
    user.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        f'type = "static"\nkey = {{ env = "ADMIN" }}\n'
    )
    with started(user, script="read line") as one:
        assert one.key == gateway.master_key
        [given] = json.loads(user.cli("status", "--json")[1])["exported"]
        assert (given["profile"], given["program"], given["revoke_at"]) == ("work", "sh", None)
        _, stderr = one.run.communicate("\n", timeout=SECONDS)
    assert "sh has the key of work, which is not made here and is not revoked" in stderr
    assert user.key() == gateway.master_key
    status, _, stderr = user.cli("run", "--ttl", "1m", "--", "true")
    assert (status, stderr) == (
        78,
        "keybroker: profiles.work: --ttl: its key is not made here, and cannot be limited\n",
    )


# A claude that is told of the helper


CLAUDE = """#!{python}
import json, os, subprocess, sys
def helper():
    settings = json.loads(sys.argv[sys.argv.index("--settings") + 1])
    environment = {{**os.environ, **settings["env"]}}
    done = subprocess.run(settings["apiKeyHelper"], shell=True, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout.strip() or done.stderr
seen = {{"argv": sys.argv, "environment": dict(os.environ), "key": helper()}}
print(json.dumps(seen), flush=True)
for line in sys.stdin:
    print(json.dumps(helper()), flush=True)
"""


@pytest.fixture
def claude(user: Resident) -> Resident:
    """A user with a program `claude` that shows what it was given, and its helper's key."""
    folder = user.home.path / "bin"
    folder.mkdir()
    (folder / "claude").touch(0o700)
    (folder / "claude").write_text(CLAUDE.format(python=sys.executable))
    user.environment["PATH"] = f"{folder}:{user.environment['PATH']}"
    return user


@contextmanager
def session(user: Resident, *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run claude; yield it and what it saw. It ends well, and nothing is said beside it."""
    with subprocess.Popen(
        [*KEYBROKER, "run", *words],
        env=user.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
        assert process.communicate(timeout=SECONDS) == ("", "")
        assert process.returncode == 0


def asked_again(process: subprocess.Popen[str]) -> str:
    """Have claude run its helper once more."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    key: str = json.loads(process.stdout.readline())
    return key


def test_claude_has_a_helper_and_no_key(claude: Resident, gateway: DevGateway) -> None:
    """Neither in its arguments nor in its environment; its own arguments come after ours."""
    claude.environment |= FOREIGN
    with session(claude, "--", "claude", "-p", "hi") as (process, seen):
        [alias] = own(gateway)
        settings = json.loads(seen["argv"][2])
        assert seen["argv"][1] == "--settings"
        assert seen["argv"][3:] == ["-p", "hi"]
        assert seen["key"].startswith("sk-")
        assert seen["key"] not in json.dumps([seen["argv"], seen["environment"]])
        assert [name for name in FOREIGN if name in seen["environment"]] == []
        assert settings["env"]["ANTHROPIC_BASE_URL"] == gateway.url
        assert settings["env"]["CLAUDE_CODE_USE_BEDROCK"] == "0"
        assert settings["env"]["ANTHROPIC_AUTH_TOKEN"] == ""
        [row] = [
            r
            for r in claude.status()["profiles"]
            if r["profile"] in alias and "-run-" in r["profile"]
        ]
        assert row["held"]
        text = claude.cli("status")[1]
        assert f"made for     claude, process {process.pid}" in text
    assert own(gateway) == []


def test_claude_rotates(claude: Resident, gateway: DevGateway) -> None:
    """In a life of ten seconds, a key is replaced after about three."""
    with session(claude, "--ttl", "10s", "--", "claude") as (process, seen):
        until(lambda: asked_again(process) != seen["key"], SECONDS, every=0.3)
    assert own(gateway) == []


def test_claude_outlives_a_daemon(claude: Resident, gateway: DevGateway) -> None:
    """Its helper waits for the next one, which makes another key; both end with it."""
    with session(claude, "--", "claude") as (process, seen):
        daemon = claude.owner()
        assert daemon is not None
        os.kill(daemon, signal.SIGKILL)
        key = asked_again(process)
        assert key.startswith("sk-")
        assert key != seen["key"]
    until(lambda: own(gateway) == [], SECONDS)


def test_a_helper_whose_program_has_ended_is_told_so(claude: Resident) -> None:
    """Not that the configuration is wrong."""
    with session(claude, "--", "claude") as (_, seen):
        line = json.loads(seen["argv"][2])["apiKeyHelper"]
    done = subprocess.run(line, shell=True, env=claude.environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "")
    assert "was made for one program, and is not handed out any more" in done.stderr


def test_nobody_is_asked_in_vain_for_ever(user: Resident) -> None:
    """Without a daemon, the slow path waits for one, and says when none comes."""
    hasty = "from keybroker.cli import keys, main; keys.ANSWER_SECONDS = 0.3; main()"
    done = subprocess.run(
        [sys.executable, "-c", hasty, "get", "--unanswered", "work-run-000000"],
        env=user.environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert "no daemon runs, and no `keybroker run` starts one" in done.stderr


OURS: dict[str, Any] = {"apiKeyHelper": "ours", "env": {"ANTHROPIC_BASE_URL": URL}}


@pytest.mark.parametrize("form", ["two", "one", "file"])
def test_settings_of_the_users_own_are_taken_in(form: str, tmp_path: Path) -> None:
    """There can be one --settings only; helper and address are ours."""
    theirs = {
        "model": "opus",
        "apiKeyHelper": "theirs",
        "env": {"A": "1", "ANTHROPIC_BASE_URL": "x"},
    }
    text = json.dumps(theirs)
    if form == "file":
        (tmp_path / "mine.json").write_text(f"\ufeff{text}")
        text = str(tmp_path / "mine.json")
    given = [f"--settings={text}"] if form == "one" else ["--settings", text]
    said = inline.told(["-c", *given, "-p", "hi"], OURS)

    assert (said[:2], said[3:]) == (["-c", "--settings"], ["-p", "hi"])
    assert json.loads(said[2]) == {
        "model": "opus",
        "apiKeyHelper": "ours",
        "env": {"A": "1", "ANTHROPIC_BASE_URL": URL},
    }


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("/absent/x.json", "--settings /absent/x.json: cannot be read (No such file or directory)"),
        ("{,}", "--settings: is not JSON, and Claude Code would ignore it"),
        ('{"env": 3}', "--settings: env: expected an object"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(value: str, problem: str) -> None:
    """Rather than to leave out what somebody wanted."""
    with pytest.raises(ConfigError) as caught:
        inline.told(["--settings", value], OURS)
    assert caught.value.message == f"run: {problem}"


# A terminal


class Terminal:
    """A shell with job control at a terminal of its own."""

    def __init__(self, user: Resident) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(
                "/bin/bash",
                ["bash", "--norc", "--noprofile", "-i"],
                {**user.environment, "PS1": "$ ", "TERM": "dumb"},
            )
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def see(self, pattern: str, seconds: float = 15.0) -> str:
        """Wait until something is shown, and take it away with all before it."""
        ends = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            ready, _, _ = select.select([self.master], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"not shown: {pattern!r}; but {self.text!r}"
            self.text += os.read(self.master, 1 << 16).decode()
        self.text = self.text[found.end() :]
        return found[0]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        os.close(self.master)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(user: Resident) -> Iterator[Terminal]:
    user.start()
    one = Terminal(user)
    one.type(f'kb() {{ {sys.executable} -c "from keybroker.cli import main; main()" "$@"; }}\n')
    yield one
    one.close()


COUNTS = "n=0; trap 'n=$((n+1)); echo got-$n' INT; echo begun; while :; do sleep 0.1; done"


def test_ctrl_c_goes_to_the_program_once(terminal: Terminal, gateway: DevGateway) -> None:
    """Which here survives it; `run` does too. Another ends both, and the shell sees 130."""
    terminal.type(f'kb run -- sh -c "{COUNTS.replace("$", chr(92) + "$")}"\n')
    terminal.see(r"\r\nbegun")
    for count in (1, 2):
        terminal.type("\x03")
        terminal.see(rf"got-{count}\r\n")
    assert len(own(gateway)) == 1
    terminal.type("\x1c")  # SIGQUIT, which it does not trap
    terminal.type("echo status-$?\n")
    terminal.see(r"\r\nstatus-131")
    assert own(gateway) == []


def test_ctrl_z_stops_both_and_fg_goes_on(terminal: Terminal, gateway: DevGateway) -> None:
    """The program has the terminal again, and its key all the time."""
    terminal.type("kb run -- sh -c 'echo begun; read line; echo got-$line'\n")
    terminal.see(r"\r\nbegun")
    terminal.type("\x1a")
    terminal.see(r"Stopped")
    assert len(own(gateway)) == 1
    terminal.type("fg\n")
    terminal.see(r"\$ fg\r\n.*\r\n")
    terminal.type("back\n")
    terminal.see(r"got-back")
    terminal.type("echo status-$?\n")
    terminal.see(r"\r\nstatus-0")
    assert own(gateway) == []


def test_a_program_that_stops_itself_gives_the_shell_back(terminal: Terminal) -> None:
    """`run` stops with it, or the shell would wait for ever."""
    terminal.type("kb run -- sh -c 'echo begun; kill -STOP $$; echo went-on'\n")
    terminal.see(r"\r\nbegun")
    terminal.see(r"Stopped")
    terminal.type("fg\n")
    terminal.see(r"\r\nwent-on")


def test_a_signal_of_another_process_is_passed_on_at_a_terminal_too(terminal: Terminal) -> None:
    """SIGINT of `kill` is told from that of Ctrl-C."""
    terminal.type(f'kb run -- sh -c "echo ppid-\\$PPID; {COUNTS.replace("$", chr(92) + "$")}"\n')
    pid = int(terminal.see(r"ppid-[0-9]+").removeprefix("ppid-"))
    terminal.see(r"\r\nbegun")
    os.kill(pid, signal.SIGINT)
    terminal.see(r"got-1\r\n")
    os.kill(pid, signal.SIGTERM)
    terminal.see(r"Terminated")


def test_at_a_terminal_all_is_said(terminal: Terminal, user: Resident) -> None:
    """What was taken out of the environment, and how long the key lives."""
    terminal.type("AWS_PROFILE=x kb run -- true\n")
    terminal.see(r"keybroker: true has a key of its own in ANTHROPIC_AUTH_TOKEN: [0-9a-f]{8} until")
    terminal.see(r"keybroker: it cannot rotate there, and ends with the program")
    terminal.see(
        r"keybroker: taken out of its environment: AWS_PROFILE \(--keep NAME leaves one in\)"
    )


# Leaks


def test_no_key_is_where_others_look(user: Resident, gateway: DevGateway) -> None:
    """In no command line, in no environment but the program's, in no file."""
    canaries = Canaries()
    canaries.know("admin", gateway.master_key)
    with started(user, script="read line") as one:
        canaries.know("key", one.key)
        for pid, allowed in ((one.run.pid, ["admin"]), (one.program, ["key", "admin"])):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert canaries.seen_in(command) == []
            assert canaries.seen_in(environment, allowed) == []
        one.run.communicate("\n", timeout=SECONDS)
    assert canaries.below(user.home.path) == []
