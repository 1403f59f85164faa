"""Secrets do not travel: recognisable ones are planted everywhere and looked for everywhere else.

The canaries are the master key, every minted key, the wrap key, keys that programs print and keys
that somebody else keeps. The places are stdout, stderr, every file below HOME, and the command
line, the environment, the limits and the memory of every process while it runs.
"""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import pickle
import pprint
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import paths, worker
from keybroker.cache import Cached, WrapKey
from keybroker.clock import Clock, Instant
from keybroker.config import SOURCES, load
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.handout import Sealed
from keybroker.pool import Answer, Pool, variables
from keybroker.slots import Key, Slots
from keybroker.sources.http import Reply
from keybroker.values import replace
from tests.canaries import Canaries, Gateway, Process, Watch, canary, process, traces, write
from tests.conftest import Home
from tests.servers.faults import (
    CommitThenDrop,
    Exchange,
    Fault,
    Faults,
    GarbageJson,
    Html,
    Redirect,
    Reset,
    Truncated,
    too_many,
)
from tests.servers.keyring import Keyring

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
HASTY = """
from keybroker.cli import keys, main, source
keys.ACT_SECONDS = keys.ANSWER_SECONDS = 2.0
source.LOOKS_FOR_GONE = 1
main()
"""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
OTHER_GROUP = 12345  # root's processes are told apart by it, see `Process.closed`


@dataclass
class Desk:
    """A user's home with a gateway, and everything that was said and seen there."""

    home: Home
    canaries: Canaries
    gateway: Gateway
    faults: Faults
    watch: Watch
    environment: dict[str, str]
    planted: dict[Path, str] = field(default_factory=dict)  # files that may hold a secret: its role

    def plant(self, name: str, text: str, role: str) -> Path:
        """Put a secret into a file, where alone it may be."""
        path = write(self.home.path / "planted" / name, text)
        self.planted[path] = role
        return path

    def program(self, name: str, script: str, role: str) -> Path:
        """Write a program that prints a key."""
        path = self.plant(name, f"#!/bin/sh\n{script}\n", role)
        path.chmod(0o700)
        return path

    def configure(self, *tables: str, cache: str = "file") -> None:
        """Write the configuration."""
        text = "\n".join([f'default = "work"\n[cache]\nkey = "{cache}"', *tables])
        write(Path(self.environment["XDG_CONFIG_HOME"]) / "keybroker" / "config.toml", text)

    def plant_wrap_key(self) -> str:
        """Choose what seals the cache."""
        key = os.urandom(32).hex()
        state = paths.private_directory(paths.state_directory(self.environment))
        self.planted[write(state / paths.WRAP_KEY, key)] = "wrap"
        return know_wrap_key(self.canaries, key)

    def run(
        self, *arguments: str, status: int | None = 0, key: bool = False, hasty: bool = False
    ) -> str:
        """
        Run a command as a user does, and look for every secret in all that it leaves.

        Args:
            arguments: What is typed.
            status: The exit status; None is any.
            key: The command prints a key, and it alone.
            hasty: It gives up after two seconds instead of half a minute.
        """
        done = subprocess.run(
            [*([sys.executable, "-c", HASTY] if hasty else [KEYBROKER]), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        said, said_wrong = done.stdout, done.stderr
        if key and done.returncode == 0:
            assert re.fullmatch(r"[!-~]+\n", said), "get prints one line"
            assert self.canaries.seen_in(said), "and it is a key that was planted or minted"
            said = ""
        assert self.canaries.seen_in(said) == []
        assert self.canaries.seen_in(said_wrong) == []
        self.check_files()
        if status is not None:
            assert (done.returncode, said_wrong if status == 0 else "") == (status, "")
        return said_wrong if status else said

    def check_files(self) -> None:
        """See that no file below HOME has a secret, but those where one was planted."""
        assert self.canaries.below(self.home.path, self.planted) == []

    def check_processes(self, allowed: Mapping[str, Sequence[str]] | None = None) -> None:
        """See that no process showed a secret; `allowed`: roles in an environment, by process."""
        assert self.canaries.planted
        found = []
        for one in self.watch.seen.values():
            found += [
                f"{role} in argv of {one.name}" for role in self.canaries.seen_in(one.command)
            ]
            may = (allowed or {}).get(one.name, ())
            roles = self.canaries.seen_in(one.environment or b"", may)
            found += [f"{role} in environ of {one.name}" for role in roles]
        assert found == []


@pytest.fixture
def desk(home: Home) -> Iterator[Desk]:
    """A fresh home, a gateway that tells of its keys, and a proxy before it."""
    canaries = Canaries()
    with (
        Gateway(canaries) as gateway,
        Faults(gateway.url, admin=gateway.master_key) as faults,
        Watch() as watch,
    ):
        yield Desk(home, canaries, gateway, faults, watch, dict(home.environment))
    assert faults.errors == []
    assert gateway.failures == ()


def know_wrap_key(canaries: Canaries, key: str) -> str:
    """Know a wrap key as text, and as the 32 bytes that the cipher has."""
    raw = bytes.fromhex(key)
    canaries.know("wrap", key)
    canaries.planted["wrap"] |= {raw, base64.b64encode(raw), base64.urlsafe_b64encode(raw)}
    return key


def minting(url: str, admin: str, name: str = "work", more: str = "") -> str:
    """Return a profile that mints keys."""
    return (
        f'[profiles.{name}]\nbase_url = "{url}"\n{more}\n[profiles.{name}.source]\n'
        f'type = "litellm"\nadmin = {admin}\n'
    )


def following(url: str, source: str, name: str = "tool", more: str = "") -> str:
    """Return a profile whose key somebody else keeps."""
    return f'[profiles.{name}]\nbase_url = "{url}"\n{more}\n[profiles.{name}.source]\n{source}\n'


# The detector itself: it finds what it is for, in each kind of place.


@pytest.mark.parametrize(
    "disguise",
    [
        lambda secret: secret,
        lambda secret: secret[4:-7],
        lambda secret: secret[-14:],
        lambda secret: json.dumps({"key": secret}),
        lambda secret: repr(secret),
        lambda secret: secret.encode().hex(),
        lambda secret: secret.encode().hex().upper(),
        lambda secret: base64.b64encode(b"Bearer " + secret.encode()).decode(),
        lambda secret: base64.b64encode(b"x" + secret.encode()).decode(),
        lambda secret: base64.urlsafe_b64encode(b"ab" + secret.encode()).decode(),
        lambda secret: secret.encode("utf-16-le").decode("latin-1"),
    ],
)
def test_a_canary_is_recognised(disguise: Any) -> None:
    """Whole, cut, quoted and encoded; and nothing is recognised where it is not."""
    canaries = Canaries()
    secret, other = canaries.new("one"), canary("one")
    assert canaries.seen_in(b"before " + disguise(secret).encode("latin-1") + b" after") == ["one"]
    assert canaries.seen_in(b"before " + disguise(other).encode("latin-1") + b" after") == []
    assert canaries.seen_in(disguise(secret).encode("latin-1"), but=["one"]) == []


def test_a_canary_is_found_in_files_and_their_names(home: Home) -> None:
    """In a file however deep, in a name, and in no file where it may be."""
    canaries = Canaries()
    secret = canaries.new("one").split("-")[-1]
    write(home.path / "a" / "b" / "log", f"x{secret}y")
    named = write(home.path / "a" / secret, "")
    assert len(canaries.below(home.path)) == 2
    named.unlink()
    assert canaries.below(home.path) == ["one in a/b/log"]
    assert canaries.below(home.path, {home.path / "a/b/log": "one"}) == []
    assert canaries.below(home.path, {home.path / "a/b/log": "another"}) == ["one in a/b/log"]


def test_a_canary_is_found_in_running_processes() -> None:
    """On a command line, in an environment, and in those of a process's own children."""
    secret, other = canary("argv"), canary("environ")
    canaries = Canaries()
    canaries.know("argv", secret)
    canaries.know("environ", other)
    script = 'echo ready; read line; echo "$line"'
    outer = ["/bin/sh", "-c", f'/bin/sh -c "$0" {shlex.quote(secret)}; :', script]
    with (
        Watch() as watch,
        subprocess.Popen(
            outer,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.defpath, "A": other},
        ) as started,
    ):
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        seen = watch.look()
        started.communicate(b"end\n")
    inner = [one for one in seen if one.command.split(b"\0")[-2] == secret.encode()]
    assert len(inner) == 1
    for one in inner:
        assert canaries.seen_in(one.command) == ["argv"]
        assert canaries.seen_in(one.environment or b"") == ["environ"]


# Good paths.


@pytest.mark.parametrize("kind", ["file", "env", "command"])
def test_every_command_keeps_its_secrets(desk: Desk, kind: str) -> None:
    """Each command with each kind of reference to the master key; only `get` prints a key."""
    desk.plant_wrap_key()
    master = desk.gateway.master_key
    desk.environment["ANTHROPIC_API_KEY"] = desk.canaries.new("bystander")
    followed = desk.canaries.new("followed")
    source = f'type = "static"\nkey = {{ file = "{desk.plant("static", followed, "followed")}" }}'
    admin = f'{{ file = "{desk.plant("admin", master, "master")}" }}'
    allowed: dict[str, list[str]] = {"command line": ["bystander"]}
    if kind == "env":
        desk.environment["KB_ADMIN"] = master
        admin = '{ env = "KB_ADMIN" }'
        allowed = {"command line": ["bystander", "master"], "worker": ["master"]}
    if kind == "command":
        admin = f'{{ command = ["cat", "{desk.home.path / "planted" / "admin"}"] }}'
    desk.configure(
        minting(desk.faults.url, admin),
        following(desk.faults.url, source, more='verify = "none"') if kind == "file" else "",
    )
    at_work = []
    desk.faults.next(
        _Look(), path="/key/generate", before=lambda _: at_work.append(desk.watch.look())
    )
    desk.run("get", "--no-start", "work", key=True)
    assert {one.name for one in at_work[0]} >= {"worker", "command line"}
    desk.run("get", "--no-start", "work", key=True)
    desk.run("rotate", "work", "--json")
    desk.run("status")
    desk.run("audit")
    desk.run("source", "test", "work")
    if kind == "file":
        write(Path(desk.environment["XDG_CONFIG_HOME"]) / "unused", "x")
        lines = (
            "config check|config path|config schema|config show|config show --json|status --json|"
            "check|check --json|audit --json|audit verify|sweep --dry-run|rotate --dry-run|"
            "revoke --dry-run|source test work --json|--help|--version"
        )
        for line in lines.split("|"):
            desk.run(*line.split())
        desk.run("get", "--no-start", "tool", key=True)
        desk.run("rotate", "--all")
        orphan = next(iter(paths.state_directory(desk.environment).glob(paths.JOURNAL)))
        orphan.unlink()
        desk.run("sweep", "--yes")
        desk.run("get", "--no-start", "work", key=True)
    desk.run("revoke", "work")
    assert len(desk.gateway.minted) >= 3
    assert desk.gateway.live_keys() == ()
    desk.check_processes(allowed)


class _Look(Fault):
    """Pass the request on; for the hooks of the proxy."""

    def __call__(self, exchange: Exchange) -> None:
        exchange.client.sendall(exchange.commit().raw)


def test_keys_of_the_keyring_stay_in_the_keyring(desk: Desk, keyring_session: Keyring) -> None:
    """The master key and the wrap key are read from a real Secret Service, over its bus."""
    desk.environment.update(keyring_session.environment)
    name = f"admin-{os.getpid()}"
    _keyring(desk, f"keyring.set_password('keybroker', '{name}', input())", desk.gateway.master_key)
    desk.configure(minting(desk.faults.url, f'{{ keyring = "{name}" }}'), cache="keyring")
    desk.run("get", "--no-start", key=True)
    state = paths.state_directory(desk.environment).name
    wrap_key = _keyring(desk, f"print(keyring.get_password('keybroker', 'wrap-key {state}'))")
    know_wrap_key(desk.canaries, wrap_key.strip())
    desk.run("get", "--no-start", key=True)
    for line in ("rotate", "status", "source test", "check", "audit", "revoke"):
        desk.run(*line.split())
    desk.check_processes()


def _keyring(desk: Desk, statement: str, said: str = "") -> str:
    script = "import keyring.backends.SecretService as s; keyring = s.Keyring(); " + statement
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=desk.environment,
        input=said,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    return done.stdout


def test_the_demonstration_leaves_nothing(desk: Desk) -> None:
    """The master key and the keys of `keybroker demo` are shown nowhere and left nowhere."""
    told = desk.home.path.with_name(f"{desk.home.path.name}-told")
    temporary = desk.home.path / "tmp"
    temporary.mkdir()
    script = f"""
        import sys
        import keybroker.cli.demo as demo
        import keybroker.devgateway as devgateway

        told = open({str(told)!r}, "w", buffering=1)

        class Telling(devgateway.DevGateway):
            def __init__(self):
                super().__init__()
                print(self.master_key, file=told)

            def respond(self, request):
                reply = super().respond(request)
                if request.path == "/key/generate":
                    print(reply.body["key"], file=told)
                return reply

        devgateway.DevGateway = Telling
        demo.SECONDS = 6.0
        from keybroker.cli import main
        sys.argv[1:] = ["demo"]
        main()
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**desk.environment, "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
        )
        secrets_told = told.read_text().split()
    finally:
        told.unlink()
    for secret in secrets_told:
        desk.canaries.know("demo", secret)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(secrets_told) >= 3
    assert desk.canaries.seen_in(done.stdout) == []
    assert re.findall(r"sk-[\w-]{6,}", done.stdout) == []
    desk.check_files()
    desk.check_processes()
    assert list(temporary.iterdir()) == []


# Gateways that repeat what they were told.


@dataclass
class Echo(Fault):
    """An answer that has every secret of its request in its head and in its body."""

    canaries: Canaries
    status: int
    shape: str = "litellm"
    commit: bool = False
    count: int = 0

    def __call__(self, exchange: Exchange) -> None:
        request = exchange.request
        exchange.maybe_commit(self.commit)
        body = request.body.decode("latin-1")
        with suppress(ValueError, KeyError, TypeError):
            self.canaries.know("asked for", json.loads(body)["key"])
        held = " ".join(
            v for k, v in request.headers if k.lower() in ("authorization", "x-api-key")
        )
        text = f"{held} {body} {request.target}"
        token = held.split()[-1] if held else ""
        self.count += 1
        answers: dict[str, Any] = {
            "litellm": {"error": {"message": text, "type": token, "param": token, "code": token}},
            "detail": {"detail": text},
            "list": {"keys": [{"key_alias": token, "token": token, "expires": token}]},
            "key": {"key": token, "expires": token, "token_id": token},
            "deleted": {"deleted_keys": [token], "data": token, "input_tokens": token},
            "info": {"info": {"status": token, "key_name": token}},
            "anthropic": {"type": "error", "error": {"type": token, "message": text}},
        }
        said = json.dumps(answers[self.shape]).encode() if self.shape in answers else text.encode()
        lines = [
            f"HTTP/1.1 {self.status} {token}",
            f"content-length: {len(said)}",
            f"location: http://127.0.0.1:1/{token}",
            *(f"{name}: {token}" for name in ("retry-after", "date", "www-authenticate", "server")),
            f"set-cookie: seen={token}",
            "connection: close",
        ]
        if self.shape == "unpackable":
            lines.append("content-encoding: gzip")
        exchange.client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + said)


SHAPES = (
    *("litellm", "detail", "list", "key", "deleted", "info", "anthropic", "text", "unpackable"),
)
STATUSES = (200, 302, 400, 401, 403, 404, 405, 422, 429, 500, 502)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_answer_of_a_gateway_is_repeated_by_a_worker(desk: Desk, shape: str) -> None:
    """Every operation, every status, every shape: no answer, record or file has a secret of it."""
    operations = _operations(desk)
    profile = _minting_profile(desk)
    issued = _done(operations, "issue", profile=profile, label="kb-00000000-work-1")["credential"]
    lease = issued["lease"]
    before = {"profile": profile, "label": "kb-00000000-work-1"}
    issuer = {"type": "litellm", "url": desk.faults.url, "admin": {"file": _admin(desk)}}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("issue", {"profile": profile, "label": "kb-00000000-work-2"}),
        ("verify", {"profile": profile, "secret": issued["secret"]}),
        ("find", before),
        ("sweep", {"profile": profile, "prefix": "kb-00000000-"}),
        ("end", {**before, "lease": lease}),
        ("settle", {"profile": "work", "label": "x", "issuer": issuer, "last": False}),
        (
            "revoke",
            {"profile": "work", "label": "x", "fingerprint": "", "issuer": issuer, "lease": lease},
        ),
    ]
    refused = 0
    for status in STATUSES:
        for op, values in calls:
            desk.faults.clear()
            echo = Echo(desk.canaries, status, shape)
            desk.faults.next(echo, times=None)
            reply = worker.answer(operations, {"id": 1, "op": op, **values})
            assert echo.count, f"{op} asked the gateway"
            refused += "error" in reply
            if op == "issue" and "ok" in reply:
                continue  # the pipe's own business: a key was minted
            assert desk.canaries.seen_in(json.dumps(reply)) == [], (op, status)
    assert refused > len(STATUSES) * 4
    operations.close()
    desk.check_files()


@pytest.mark.parametrize(
    ("path", "status", "lines"),
    [
        ("/key/*", 200, ("rotate", "sweep --yes", "source test --json")),
        ("/key/*", 401, ("rotate", "revoke")),
        ("/key/*", 500, ("rotate --json", "revoke --json")),
        ("/v1/*", 401, ("rotate", "source test")),
    ],
)
def test_no_answer_of_a_gateway_is_repeated_by_a_command(
    desk: Desk, path: str, status: int, lines: Sequence[str]
) -> None:
    """The commands against a gateway that repeats the master key and the new key."""
    desk.plant_wrap_key()
    desk.configure(minting(desk.faults.url, f'{{ file = "{_admin(desk)}" }}'))
    desk.run("get", "--no-start", key=True)
    for line in lines:
        desk.faults.clear()
        echo = Echo(desk.canaries, status, "litellm", commit=status == 500)
        desk.faults.next(echo, path=path, times=None)
        desk.run(*line.split(), status=None, hasty=True)
        assert echo.count
    desk.run("status", "--json")
    desk.run("audit")
    desk.check_processes()


@pytest.mark.parametrize(
    "fault",
    [
        *(CommitThenDrop(), Reset(commit=True), Truncated(), GarbageJson(commit=True)),
        *(Html(status=200), Html(status=502), too_many(1)),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_no_fault_shows_a_secret(desk: Desk, fault: Fault) -> None:
    """What happens to a call that mints is told in words of our own."""
    desk.plant_wrap_key()
    desk.configure(minting(desk.faults.url, f'{{ file = "{_admin(desk)}" }}'))
    armed = desk.faults.next(fault, path="/key/*", times=3)
    said = desk.run("get", "--no-start", status=None, key=True, hasty=True)
    assert armed.entries
    assert said.count("\n") <= 1
    desk.run("status")
    desk.check_processes()


def test_the_master_key_does_not_follow_a_redirect(desk: Desk) -> None:
    """It is sent to the host that it was configured for and to no other."""
    with Faults(desk.gateway.url, admin=desk.gateway.master_key) as elsewhere:
        desk.configure(minting(desk.faults.url, f'{{ file = "{_admin(desk)}" }}'))
        for status in (301, 302, 303, 307, 308):
            desk.faults.clear()
            armed = desk.faults.next(Redirect(elsewhere.url, status), path="/key/*", times=None)
            said = desk.run("source", "test", status=77)
            assert armed.entries[0].admin_seen
            assert str(status) in said
        assert elsewhere.log == ()


# Configurations and references that are wrong.


def _pastes(key: str) -> Iterator[str]:
    """Yield documents with a key in every place that a person may take for the right one."""
    quoted = json.dumps(key)
    source = '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "A" }\n'
    top = '[profiles.work]\nbase_url = "https://llm.example.com"\n'
    good = top + source
    values = [quoted, f"[{quoted}]", f"{{ {quoted} = 1 }}", f"{{ a = {quoted} }}", f"[[{quoted}]]"]
    values += [f"{{ {kind} = {quoted} }}" for kind in ("env", "file", "keyring", "vault", "x")]
    values += [f"{{ env = {quoted}, file = {quoted} }}", f"{{ env = [{quoted}] }}"]
    for value in values:
        yield f"default = {value}\n{good}"
        yield f"[cache]\nkey = {value}\n{good}"
        yield f"profiles = {value}"
        yield f"[profiles]\nwork = {value}"
        yield f"{good}headers = {value}"
        for name in ("base_url", "helper_ttl", "hold", "verify", "headers", "max_live"):
            yield "[profiles.work]\n" + f"{name} = {value}\n" + source
            yield f"[defaults]\n{name} = {value}\n{good}"
        yield f"{top}source = {value}"
        for kind, fields in SOURCES.items():
            yield f"{top}[profiles.work.source]\ntype = {value}\n"
            for name in fields:
                yield f'{top}[profiles.work.source]\ntype = "{kind}"\n{name} = {value}\n'
    for line in (
        *(f"{quoted} = 1", f"{quoted} = {quoted}", f"[{quoted}]", f"[profiles.{quoted}]"),
        *(
            key,
            f"admin = {key}",
            f'admin = "{key}',
            f"admin = '{key}\n'",
            f"{quoted}",
            f"= {quoted}",
        ),
        *(
            f"a = 1\na = {quoted}",
            f"[{quoted}]\n[{quoted}]",
            f"x = {{ {quoted} = 1, {quoted} = 2 }}",
        ),
        *(
            f'x = "\\q{key}"',
            f"x = {quoted} {quoted}",
            f"x = [{quoted}",
            f"{quoted}.{quoted} = 1 1",
        ),
        *(f'x = """{key}', f"x = \x01{quoted}", f"[profiles.work.{quoted}]\nx = 1"),
    ):
        yield line
        yield good + line
    hidden = json.dumps(f"it's {key} (at line 1, column 1) {key}")
    yield f"x = {{ {hidden} = 1, {hidden} = 2 }}"
    yield f'{good}[profiles.work.headers]\nX-Route = "{key.split(chr(34))[0]}ü{key[-20:]}"'
    yield f'{good}[profiles.work.headers]\n{quoted} = "x"'
    yield f'{good}[profiles.work.headers]\nAuthorization = "Bearer {key[-20:]}"'
    yield f"{good}[profiles.work.headers]\nX-Gateway-Key = {quoted}"
    yield f'[profiles.work]\nbase_url = "https://u:{key[-20:]}@llm.example.com"\n{source}'
    yield f'[profiles.work]\nbase_url = "https://llm.example.com?key={key[-20:]}"\n{source}'


@pytest.mark.parametrize("tail", ["", "\\", "'"], ids=["plain", "backslash", "quote"])
def test_no_error_repeats_what_a_configuration_says(home: Home, tail: str) -> None:
    """A key pasted in place of a name, a value, a table or a line is in no message."""
    canaries = Canaries()
    key = canaries.new("pasted") + tail
    file, errors = home.path / "config.toml", 0
    for document in _pastes(key):
        write(file, document)
        try:
            load([file])
        except ConfigError as error:
            errors += 1
            assert canaries.seen_in(f"{error.message} {error.hint} {error!r}") == []
            assert str(file) in error.message
            assert error.__cause__ is None and (error.__suppress_context__ or not error.__context__)
    assert errors > 350


def test_a_key_that_is_pasted_plainly_is_in_no_error(home: Home) -> None:
    """A key without odd characters could be a TOML key or a profile's name: it is not said."""
    canaries = Canaries()
    key = canaries.know("pasted", "sk-abcdefghijklmnopqrstuvwxyz0123456789")
    short = canaries.know("short", "sk-ant0123456789")
    errors = 0
    for one in (key, short):
        for document in _pastes(one):
            write(home.path / "config.toml", document)
            try:
                load([home.path / "config.toml"])
            except ConfigError as error:
                errors += 1
                assert canaries.seen_in(f"{error.message} {error.hint}") == []
    assert errors > 700


@pytest.mark.parametrize("kind", ["env", "file", "keyring"])
def test_a_key_in_place_of_its_place_is_refused(home: Home, kind: str) -> None:
    """A reference is recorded and shown, so a key that was pasted into one goes no further."""
    canaries = Canaries()
    for key in (canaries.new("pasted"), "sk-ant-api03-abcdef", "Bearer abcdef"):
        reference = f"{{ {kind} = {json.dumps(key)} }}"
        for document in (
            minting("https://llm.example.com", reference),
            following("https://llm.example.com", f'type = "static"\nkey = {reference}'),
        ):
            file = write(home.path / "config.toml", document)
            with pytest.raises(ConfigError, match="never a key itself") as raised:
                load([file])
            assert canaries.seen_in(f"{raised.value.message} {raised.value.hint}") == []


def test_a_key_in_a_header_is_refused(home: Home) -> None:
    """`config show` shows headers; a header that holds a key has no place in the file."""
    for name in ("X-Gateway-Key", "api-key", "x-litellm-api-key"):
        header = f'headers = {{ "{name}" = "sk-abcdef" }}'
        document = minting("https://llm.example.com", '{ env = "ADMIN" }', more=header)
        with pytest.raises(ConfigError, match="looks like a key"):
            load([write(home.path / "config.toml", document)])


@pytest.mark.parametrize("line", ["config check", "get --no-start", "status", "revoke", "audit"])
def test_commands_do_not_show_a_pasted_key(desk: Desk, line: str) -> None:
    """The same by way of the commands: exit status 78 where a configuration is needed."""
    key = desk.canaries.new("pasted")
    admin = json.dumps(key)
    desk.configure(minting(desk.faults.url, admin))
    config = Path(desk.environment["XDG_CONFIG_HOME"]) / "keybroker" / "config.toml"
    desk.planted[config] = "pasted"
    said = desk.run(*line.split(), status=0 if line == "audit" else 78)
    assert ("config.toml:" in said) == (line != "audit")


BAD_SECRETS = {
    "two lines": "{0}\n{0}\n",
    "two words": "{0} {0}",
    "not ASCII": "{0}ü",
    "a control character": "{0}\x1b[1m{0}",
    "a NUL": "{0}\x00",
    "too long": "{0}" * 400,
}


@pytest.mark.parametrize("kind", ["file", "env", "command"])
def test_a_reference_to_something_badly_formed_is_not_repeated(desk: Desk, kind: str) -> None:
    """The message says what is wrong with it and where it is, not what it is."""
    for problem, form in BAD_SECRETS.items():
        text = form.format(desk.canaries.new("bad"))
        path = desk.plant("bad", text, "bad")
        reference = {
            "file": {"file": str(path)},
            "env": {"env": "BAD"},
            "command": {"command": ["cat", str(path)]},
        }[kind]
        for source in (
            {"type": "litellm", "admin": reference},
            {"type": "static", "key": reference},
        ):
            operations = _operations(desk, BAD=text.replace("\0", "\1"))
            profile = {"name": "work", "raw": {"base_url": desk.faults.url, "source": source}}
            op = "issue" if source["type"] == "litellm" else "poll"
            values = {"label": "kb-00000000-work-1"} if op == "issue" else {}
            reply = worker.answer(operations, {"id": 1, "op": op, "profile": profile, **values})
            assert reply["error"]["code"] == "config", problem
            assert desk.canaries.seen_in(json.dumps(reply)) == [], problem
    desk.check_files()
    assert desk.gateway.seen() == ()


PROGRAMS = {
    "prints it and fails": 'echo "{0}"; exit 3',
    "prints it twice": 'echo "{0}"; echo "{0}"',
    "prints it to stderr": 'echo "{0}" >&2',
    "prints it to stderr and fails": 'echo "{0}" >&2; exit 1',
    "prints half a JSON": """printf '{{"key": "%s"' "{0}" """,
    "prints it as its end": """printf '{{"key": "k", "ttl": "%s"}}' "{0}" """,
    "prints it as its date": """printf '{{"key": "k", "expires_at": "%s"}}' "{0}" """,
    "prints a list of it": """printf '{{"key": ["%s"]}}' "{0}" """,
    "prints it by another name": """printf '{{"token": "%s"}}' "{0}" """,
    "prints it as a name": """printf '{{"%s": 1}}' "{0}" """,
    "prints it, expired": """printf '{{"key": "%s", "ttl": -5}}' "{0}" """,
    "prints it with words": 'echo "your key is {0}"',
    "prints much of it": 'yes "{0}" | head -c 100000',
    "kills itself": 'echo "{0}"; kill -TERM $$',
    "hands an Anthropic key out": 'echo "sk-ant-{0}"',
}


@pytest.mark.parametrize("problem", PROGRAMS)
def test_what_a_program_prints_is_not_repeated(desk: Desk, problem: str) -> None:
    """A `command` source, and a reference, whose program misbehaves with a key in its hands."""
    key = desk.canaries.new("from a program").replace('"', "").replace("\\", "").replace("%", "")
    path = desk.program("program", PROGRAMS[problem].format(key), "from a program")
    operations = _operations(desk)
    profile = {
        "name": "tool",
        "raw": {
            "base_url": desk.faults.url.replace("127.0.0.1", "localhost"),
            "source": {"type": "command", "command": [str(path)]},
        },
    }
    reply = worker.answer(operations, {"id": 1, "op": "poll", "profile": profile})
    assert "error" in reply
    assert desk.canaries.seen_in(json.dumps(reply)) == []
    if problem in ("prints it and fails", "prints it to stderr", "prints it twice"):
        desk.configure(
            following(desk.faults.url, f'type = "command"\ncommand = ["{path}"]', "work"),
        )
        desk.run("get", "--no-start", status=75 if "fails" in problem else 77)
        desk.run("status")
        desk.run("source", "test", "--json", status=None)
        desk.check_processes()


# Environments.


# A worker that answers everything with what it was started with.
TELLING = """
import json, os, sys
for line in sys.stdin:
    ok = {"environment": dict(os.environ), "arguments": sys.argv}
    print(json.dumps({"id": json.loads(line)["id"], "ok": ok, "records": []}), flush=True)
"""


def test_a_worker_has_only_the_variables_that_its_kind_of_source_names(desk: Desk) -> None:
    """A secret of the user's environment goes to the workers of the source that names it."""
    names = {"litellm": "ADMIN", "static": "KEY", "command": "LISTED", "cache": "NOBODY"}
    for name in names.values():
        desk.environment[name] = desk.canaries.new(name)
    desk.configure(
        minting(desk.faults.url, '{ env = "ADMIN" }'),
        following(desk.faults.url, 'type = "static"\nkey = { env = "KEY" }', "kept"),
        following(
            desk.faults.url, 'type = "command"\ncommand = ["x"]\nenvironment = ["LISTED"]', "tool"
        ),
    )
    config = load(paths.config_files(desk.environment))
    state = paths.private_directory(paths.state_directory(desk.environment))
    pool = Pool(
        state, desk.environment, None, variables(config), (sys.executable, "-I", "-c", TELLING)
    )
    try:
        for kind, name in names.items():
            answer = pool.call(kind, "x", 10)
            seen = desk.canaries.seen_in(json.dumps(answer["environment"]))
            assert seen == ([] if kind == "cache" else [name])
            assert desk.canaries.seen_in(json.dumps(answer["arguments"])) == []
    finally:
        pool.close()


def test_a_program_has_only_the_variables_that_it_lists(desk: Desk) -> None:
    """Neither a `command` source nor the program of a reference sees another source's secret."""
    for name in ("ADMIN", "LISTED", "OTHER", "ANTHROPIC_API_KEY"):
        desk.environment[name] = desk.canaries.new(name)
    desk.environment["HTTPS_PROXY"] = f"http://u:{desk.canaries.new('proxy')}@127.0.0.1:1"
    told = desk.home.path.with_name(f"{desk.home.path.name}-told")
    script = f"env > {told}; echo k3y-of-a-program"
    program = desk.program("program", script, "nothing")
    reference = desk.program("reference", f"{script}-again", "nothing")
    other = minting(desk.faults.url, '{ env = "ADMIN" }', "other")
    source = f'type = "command"\ncommand = ["{program}"]\nenvironment = ["LISTED"]'
    minted = minting(desk.faults.url, f'{{ command = ["{reference}"] }}')
    try:
        for tables, roles in (
            ((other, following(desk.faults.url, source, "work")), ["LISTED"]),
            ((other, minted), []),
        ):
            desk.configure(*tables)
            desk.run("get", "--no-start", "work", status=77)
            assert "HOME=" in told.read_text()
            assert desk.canaries.seen_in(told.read_bytes()) == roles
            told.unlink()
    finally:
        told.unlink(missing_ok=True)
    everything = list(desk.canaries.planted)
    desk.check_processes({"command line": everything, "worker": ["ADMIN", "LISTED", "proxy"]})


# Memory: no core, no debugger.


@pytest.fixture
def cores() -> Iterator[bool]:
    """Let processes leave cores, as far as this user may; False where no process may."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    most = resource.RLIM_INFINITY if os.geteuid() == 0 else before[1]
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    yield most != 0
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_no_core_and_no_debugger(desk: Desk, cores: bool) -> None:
    """While a key is minted, the memory of command and worker is root's, and no core is left."""
    desk.configure(minting(desk.faults.url, f'{{ file = "{_admin(desk)}" }}'))
    seen: list[Process] = []
    desk.faults.next(_Look(), path="/key/generate", before=lambda _: seen.extend(desk.watch.look()))
    group = {"group": OTHER_GROUP, "extra_groups": []} if os.geteuid() == 0 else {}
    plain = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **group
    )  # what an ordinary program is like
    try:
        desk.watch.look()
        done = subprocess.run(
            [KEYBROKER, "get", "--no-start"],
            env=desk.environment,
            capture_output=True,
            text=True,
            **group,
        )
        ordinary = process(plain.pid)
    finally:
        plain.communicate(b"\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert ordinary is not None
    assert (ordinary.closed, ordinary.core) == (False, cores)
    ours = [one for one in seen if one.name != "program"]
    assert sorted(one.name for one in ours) == ["command line", "worker"]
    assert [(one.closed, one.core) for one in ours] == [(True, False)] * 2


# Bugs of ours.


BUGS = {
    "an error with a key": "raise RuntimeError(KEY)",
    "an error of an error": """
try:
    raise KeyError(KEY)
except KeyError as error:
    raise ValueError(KEY) from error""",
    "an error with a repr": """
class Odd(Exception):
    __str__ = __repr__ = lambda self: KEY
raise Odd()""",
    "a group of errors": "raise ExceptionGroup(KEY, [ValueError(KEY)])",
    "no room for Unicode": "(KEY + chr(233)).encode('ascii')",
    "a wrong type": "json.dumps({KEY: object()})",
    "too deep": "f = lambda: f()\nf()",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_worker_says_its_type_and_no_more(desk: Desk, bug: str) -> None:
    """An exception of a source whose text is a key: in no answer, record, file or traceback."""
    key = desk.canaries.new("in a bug")
    path = desk.plant("key", key, "in a bug")
    script = f"""
        import json, pathlib, sys
        from keybroker import sources, worker
        KEY = pathlib.Path({str(path)!r}).read_text()
        def build(profile, environment):
            class Source:
                def issue(self, label):
                    held = KEY
                    bug()
                def close(self): pass
            return Source()
        def bug():
{textwrap.indent(BUGS[bug], " " * 12)}
        original = worker.Operations.__init__
        def started(self, *given, **named):
            original(self, *given, **{{**named, "build": build}})
        worker.Operations.__init__ = started
        worker.main()
    """
    driver = write(desk.home.path / "planted" / "driver.py", textwrap.dedent(script))
    raw = {"base_url": desk.faults.url, "source": {"type": "litellm", "admin": {"env": "A"}}}
    profile = worker.decode_profile({"name": "work", "raw": raw})
    state = paths.private_directory(paths.state_directory(desk.environment))
    errors = os.open(desk.home.path / "stderr", os.O_RDWR | os.O_CREAT, 0o600)
    kept = os.dup(2)
    os.dup2(errors, 2)
    pool = Pool(state, desk.environment, None, command=(sys.executable, "-I", str(driver)))
    try:
        with pytest.raises(KeybrokerError) as raised:
            pool.call("litellm", "issue", 10, profile=profile, label="kb-00000000-work-1")
    finally:
        pool.close()
        os.dup2(kept, 2)
        os.close(errors)
        os.close(kept)
    assert re.fullmatch(r"worker: failed with \w+ in issue", raised.value.message)
    assert desk.canaries.seen_in(f"{raised.value!r} {raised.value.hint}") == []
    assert (desk.home.path / "stderr").read_text() == ""
    desk.check_files()


def test_a_worker_that_is_sent_nonsense_shows_none_of_it(desk: Desk) -> None:
    """What is no JSON, or no request, ends the worker with the name of a type."""
    state = paths.private_directory(paths.state_directory(desk.environment))
    for line in ('{{"key": "{0}"', '["{0}"]', '"{0}"', '{{"seconds": "{0}", "op": "x"}}', "{0}"):
        key = desk.canaries.new("on the pipe")
        done = subprocess.run(
            [sys.executable, "-I", "-m", "keybroker.worker", str(os.getpid()), str(state)],
            input=line.format(json.dumps(key)[1:-1]) + "\n",
            env=desk.environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"keybroker: worker: \w+\n", done.stderr)
        assert desk.canaries.seen_in(done.stderr) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_command_says_its_type_and_no_more(desk: Desk, bug: str) -> None:
    """The command line's own last resort: one line, a type and a place, and exit status 70."""
    path = desk.plant("key", desk.canaries.new("in a bug"), "in a bug")
    desk.configure(minting(desk.faults.url, f'{{ file = "{path}" }}'))
    script = f"""
        import json, pathlib, sys
        import keybroker.cli.work as work
        KEY = pathlib.Path({str(path)!r}).read_text()
        def bug(*given, **named):
            held = KEY
{textwrap.indent(BUGS[bug], " " * 12)}
        work.Broker = bug
        sys.argv[1:] = ["get", "--no-start"]
        from keybroker.cli import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        env=desk.environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (70, "")
    assert re.fullmatch(r"keybroker: internal error: \w+ at \S+:\d+\n", done.stderr)
    assert desk.canaries.seen_in(done.stderr) == []
    desk.check_files()


# Values that are shown, copied and kept by accident.


def _values(secret: str) -> dict[str, Any]:
    """Return every value of ours that has a secret in it."""
    lease = Lease("id", "litellm", NOW, NOW + timedelta(hours=1))
    credential = Credential(Secret(secret), lease)
    issuer = Issuer("litellm", "https://llm.example.com", Reference("command", ("cat", "x")))
    anchor = Instant(NOW, 1.0, "boot")
    label = "kb-00000000-work-1"
    key = Key(
        label, issuer, lease, credential.secret.fingerprint, timedelta(hours=1), timedelta(hours=1)
    )
    ok = {"credential": worker.encode_credential(credential)}
    return {
        "secret": credential.secret,
        "credential": credential,
        "sealed": Sealed(credential, label, issuer, "models", anchor),
        "cached": Cached(credential, label, issuer, "models", anchor),
        "wrap key": WrapKey(Secret(secret), "key file"),
        "slots": Slots(current=key, next=key, retired=(key,)),
        "answer": Answer(1, ok, None, ()),
        "reply": Reply(200, {"www-authenticate": secret}, {"key": secret}, NOW),
        "list": [credential],
        "mapping": {"held": {"deep": (credential.secret,)}},
        "error": KeybrokerError("worker: failed", hint="type: x"),
    }


SHOWN = {
    "str": str,
    "repr": repr,
    "format": "{}".format,
    "f-string": lambda value: f"{value!r} {value!s} {value}",
    "percent": lambda value: "%s %r" % (value, (value,)),  # noqa: UP031
    "json with default": lambda value: json.dumps(value, default=str),
    "ascii": ascii,
    "traceback": lambda value: _traceback_with_locals(value),
    "logging": lambda value: _logged(value),
    "replaced": lambda value: repr(replace(value)) if hasattr(value, "_shown") else "",
    "pprint": pprint.pformat,
    "slots": lambda value: repr(getattr(value, "__match_args__", "")),
}


def _logged(value: Any) -> str:
    record = logging.LogRecord("x", logging.DEBUG, "x", 1, "%s %r", (value, [value]), None)
    return logging.Formatter("%(message)s %(args)s").format(record)


def _traceback_with_locals(value: Any) -> str:
    try:
        held = value  # noqa: F841
        raise ValueError(value)
    except ValueError as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        return "".join(shown.format())


@pytest.mark.parametrize("how", SHOWN)
def test_no_value_shows_its_secret(how: str) -> None:
    """However a value is shown: by name, by format, in a log, in a traceback with its locals."""
    canaries = Canaries()
    for name, value in _values(canaries.new("held")).items():
        with suppress(TypeError):  # JSON does not take it at all
            assert canaries.seen_in(SHOWN[how](value)) == [], name


def test_the_ways_to_show_a_value_do_show_it() -> None:
    """A plain text goes through each of them, so that a secret would too."""
    canaries = Canaries()
    plain = canaries.new("plain")
    shown = {how for how, show in SHOWN.items() if canaries.seen_in(show(plain))}
    assert shown == set(SHOWN) - {"replaced", "slots"}


# Protocols 0 and 1 already refuse what is around it, as they do every class with slots.
NOT_PICKLED = "a secret is not copied or pickled|without defining __getstate__ cannot be pickled"


def test_a_secret_is_not_copied() -> None:
    """Not pickled, copied, put into JSON or taken apart, alone or inside another value."""
    canaries = Canaries()
    found = _values(canaries.new("held"))
    for name in ("secret", "credential", "sealed", "cached", "wrap key", "list", "mapping"):
        value = found[name]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=NOT_PICKLED):
                pickle.dumps(value, protocol)
        with pytest.raises(TypeError, match="a secret is not copied or pickled"):
            copy.deepcopy(value)
        with pytest.raises(TypeError) as raised:
            json.dumps(value)
        assert canaries.seen_in(str(raised.value)) == []
    secret = found["secret"]
    for take in (copy.copy, vars, dict, list, bytes, lambda held: held.__getstate__()):
        with suppress(TypeError):
            assert canaries.seen_in(repr(take(secret))) == []
    for mistake in ("{:>40}", "{:s}"):
        with pytest.raises(TypeError):
            mistake.format(secret)
    assert not hasattr(secret, "__dict__")
    assert secret != canaries
    with pytest.raises(TypeError):
        _ = "Bearer " + secret


def test_pytest_does_not_show_a_secret(home: Home) -> None:
    """A failing test that holds one prints its fingerprint, locals and all."""
    secret = canary("held")
    path = write(home.path / "key", secret)
    test = write(
        home.path / "test_it.py",
        textwrap.dedent(f"""
            from tests.test_leaks import _values

            def test_it():
                values = _values(open({str(path)!r}).read())
                assert values["credential"] == values["secret"]
        """),
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-l", "-p", "no:cacheprovider", str(test)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    canaries = Canaries()
    canaries.know("held", secret)
    assert done.returncode == 1
    assert "<secret " in done.stdout
    assert canaries.seen_in(done.stdout + done.stderr) == []


def test_traces_of_different_secrets_are_different() -> None:
    """No test passes because two canaries are alike, or fails because of their shared beginning."""
    assert traces(canary("one")) & traces(canary("one")) == set()


# What the tests share.


def _operations(desk: Desk, **environment: str) -> worker.Operations:
    state = paths.private_directory(paths.state_directory(desk.environment))
    return worker.Operations(state, {**desk.environment, **environment}, Clock())


def _admin(desk: Desk) -> str:
    return str(desk.plant("admin", desk.gateway.master_key, "master"))


def _minting_profile(desk: Desk) -> dict[str, Any]:
    source = {"type": "litellm", "admin": {"file": _admin(desk)}}
    return {"name": "work", "raw": {"base_url": desk.faults.url, "source": source}}


def _done(operations: worker.Operations, op: str, **values: Any) -> dict[str, Any]:
    reply = worker.answer(operations, {"id": 1, "op": op, **values})
    assert "ok" in reply, reply.get("error")
    found: dict[str, Any] = reply["ok"]
    return found
