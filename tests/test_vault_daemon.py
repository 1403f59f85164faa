"""A daemon and a real OpenBao: keys that others rotate, leases, one login, a leader that dies."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from keybroker.devgateway import DevGateway
from tests.canaries import Canaries, Watch, write
from tests.resident import Resident, until
from tests.servers.cluster import Cluster
from tests.servers.database import Database
from tests.servers.litellm import LiteLLM
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Api, Kv

pytestmark = pytest.mark.servers

TOKEN = re.compile(rb"\b(?:hv)?s\.[A-Za-z0-9_-]{20,}")  # as Vault and OpenBao write one
LEASES = {path: ["update"] for path in ("sys/leases/renew", "sys/leases/revoke")}


KEYBROKER = [sys.executable, "-c", "from keybroker.cli import main; main()"]


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


def minted(gateway: DevGateway, label: str | None = None) -> str:
    """Have the gateway make a key that somebody may put into Vault."""
    return str(_ask(gateway, "/key/generate", {"duration": "1h", "key_alias": label})["key"])


def ended(gateway: DevGateway, key: str) -> None:
    _ask(gateway, "/key/delete", {"keys": [key]})


def _ask(gateway: DevGateway, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{gateway.url}{path}",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def vault_table(
    resident: Resident, server: Api, role: str, rules: Mapping[str, Any], **options: Any
) -> str:
    """Let a role log in with what is in a file; return the `[vault]` table that says so."""
    server.policy(role, rules)
    role_id, secret_id = server.approle(role, [role], **options)
    file = resident.home.path / "secret-id"
    file.touch(0o600)
    file.write_text(f"{secret_id}\n")
    return (
        f'[vault]\naddress = "{server.url}"\n[vault.auth]\nmethod = "approle"\n'
        f'role_id = "{role_id}"\nsecret_id = {{ file = "{file}" }}\n'
    )


def source(base_url: str, path: str, more: str = "", settings: str = "", name: str = "work") -> str:
    return (
        f'[profiles.{name}]\nbase_url = "{base_url}"\n{settings}\n'
        f'[profiles.{name}.source]\ntype = "vault"\npath = "{path}"\n{more}\n'
    )


def logins(server: OpenBao, role: str) -> int:
    """Count the tokens that a role was given, by the server's own log."""
    return sum(
        entry["type"] == "response"
        and entry.get("auth", {}).get("metadata", {}).get("role_name") == role
        and entry["request"]["path"].endswith("/login")
        for entry in server.audit_entries()
    )


@pytest.fixture
def kv(openbao: OpenBao) -> Kv:
    return openbao.kv()


@pytest.fixture
def role(request: pytest.FixtureRequest) -> str:
    """A role of the test's own, on a server that is shared."""
    return f"{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())[:40]}-{time.monotonic_ns()}"


@pytest.fixture
def following(
    resident: Resident, gateway: DevGateway, openbao: OpenBao, kv: Kv, role: str
) -> Resident:
    """A daemon whose key somebody else keeps in KV 2."""
    kv.put("llm", key=minted(gateway))
    table = vault_table(resident, openbao, role, {kv.path("llm"): ["read"]}, token_ttl="1h")
    resident.configure(table + source(gateway.url, kv.path("llm"), 'poll = "1s"'))
    resident.start()
    return resident


def test_a_key_that_somebody_rotates_is_followed(
    following: Resident, gateway: DevGateway, kv: Kv
) -> None:
    """The next version is handed out within the interval, when the gateway takes it."""
    first = following.key()
    second = minted(gateway)
    kv.put("llm", key=second)

    until(lambda: following.key() == second)

    assert first != second
    assert following.row()["verified"] == "models"
    assert following.row()["expires_at"] is None


def test_a_version_that_the_gateway_does_not_know_yet_waits(
    following: Resident, gateway: DevGateway, kv: Kv
) -> None:
    """Secrets are written before the gateway knows them: the key in use stays till it does."""
    first = following.key()
    early = "sk-not-there-yet-0123456789abcdef"
    kv.put("llm", key=early)

    until(lambda: "refused" in str(following.row()["trouble"]), 30)

    assert following.key() == first
    again = minted(gateway)
    kv.put("llm", key=again)
    until(lambda: following.key() == again, 30)
    assert following.row()["trouble"] is None


def test_a_refused_session_has_vault_read_at_once(
    resident: Resident, gateway: DevGateway, openbao: OpenBao, kv: Kv, role: str
) -> None:
    """A key ended behind our back costs one retry, however long the interval is."""
    first, second = minted(gateway), minted(gateway)
    kv.put("llm", key=first)
    table = vault_table(resident, openbao, role, {kv.path("llm"): ["read"]})
    resident.configure(table + source(gateway.url, kv.path("llm"), 'poll = "1h"'))
    resident.start()
    asking = threading.get_native_id()
    assert resident.ask("work", asking, 60_000) == f"ok {first}"
    kv.put("llm", key=second)
    ended(gateway, first)

    began = time.monotonic()
    assert resident.ask("work", asking, 60_000) == f"ok {second}"

    assert time.monotonic() - began < 6


def test_a_deleted_secret_is_said_and_its_key_is_kept_until_it_is_refused(
    following: Resident, gateway: DevGateway, kv: Kv
) -> None:
    key = following.key()
    kv.delete("llm")

    until(lambda: "version 1 was deleted" in str(following.row()["trouble"]))

    assert following.key() == key
    assert following.row()["held"]
    status, printed, _ = following.cli("status")
    assert status == 0
    assert "version 1 was deleted" in printed
    ended(gateway, key)
    me = threading.get_native_id()
    replies = [following.ask("work", me, 60_000) for _ in range(2)]
    until(lambda: following.ask("work", me, 60_000).startswith("error "), 30)
    assert all(key not in reply or reply.startswith("ok ") for reply in replies)
    status, printed, said = following.helper()
    assert (status, printed) == (77, "")
    assert "version 1 was deleted" in said


def test_there_is_one_login_in_the_life_of_a_token(
    following: Resident, openbao: OpenBao, role: str
) -> None:
    """Polls, further workers and further daemons go on with it: it is kept, sealed."""
    following.key()
    time.sleep(3.5)  # three more polls
    assert logins(openbao, role) == 1
    for _ in range(3):
        following.kill()
        following.start()
        following.cli("rotate", "work")
        assert following.cli("source", "test", "work")[0] == 0
    assert logins(openbao, role) == 1
    sealed = next(following.state.rglob("session.*.sealed"))
    assert sealed.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "of one use"])
def test_a_login_that_a_command_made_is_the_daemon_s_too(
    following: Resident, openbao: OpenBao, kv: Kv, role: str, wrapped: bool
) -> None:
    """What can be had once was used up by `source test`: it is nobody's second time."""
    key = following.key()
    once = f"{role}-once"
    role_id, secret_id = openbao.approle(once, [role], secret_id_num_uses=0 if wrapped else 1)
    if wrapped:
        secret_id = openbao.wrapped_secret_id(once)
    file = following.home.path / "once"
    write(file, secret_id)
    by = f'wrapped_by = "auth/approle/role/{once}/secret-id"\n' if wrapped else ""
    table = (
        f'[vault]\naddress = "{openbao.url}"\n[vault.auth]\nmethod = "approle"\n'
        f'role_id = "{role_id}"\nsecret_id = {{ file = "{file}" }}\n{by}'
    )
    base_url = following.row()["base_url"]
    following.configure(table + source(base_url, kv.path("llm"), 'poll = "1h"'))
    assert following.cli("source", "test", "work")[0] == 0

    assert following.cli("rotate", "work")[0] == 0
    assert following.cli("source", "test", "work")[0] == 0
    following.kill()
    following.start()
    status, _, said = following.cli("rotate", "work")

    assert (status, following.key()) == (0, key), said
    assert following.row()["trouble"] is None
    assert logins(openbao, once) == 1


def test_many_profiles_share_one_login(
    resident: Resident, gateway: DevGateway, openbao: OpenBao, kv: Kv, role: str
) -> None:
    """Twelve of them, cold: one token."""
    names = [f"p{number}" for number in range(12)]
    for name in names:
        kv.put(name, key=minted(gateway))
    rules = {kv.path(name): ["read"] for name in names}
    table = vault_table(resident, openbao, role, rules)
    resident.configure(
        table + "".join(source(gateway.url, kv.path(name), name=name) for name in names)
    )
    resident.start()

    keys = {resident.key(name) for name in names}

    assert len(keys) == 12
    assert logins(openbao, role) == 1


def test_a_refused_login_is_no_storm(
    resident: Resident, gateway: DevGateway, openbao: OpenBao, kv: Kv, role: str
) -> None:
    """However many ask; and a changed file ends the wait at once."""
    kv.put("llm", key=minted(gateway))
    table = vault_table(resident, openbao, role, {kv.path("llm"): ["read"]})
    file = resident.home.path / "secret-id"
    right = file.read_text()
    file.write_text("wrong\n")
    path = kv.path("llm")
    profiles = "".join(source(gateway.url, path, name=f"p{n}") for n in range(5))
    before = openbao.count("auth/approle/login")
    resident.configure(table + profiles)
    resident.start()

    for _ in range(3):
        for number in range(5):
            reply = resident.ask(f"p{number}")
            assert reply.startswith("error 77 ")
            assert "refused role_id or secret_id" in reply
    assert openbao.count("auth/approle/login") - before <= 2

    file.write_text(right)
    until(lambda: resident.ask("p0").startswith("ok "), 20)


def test_an_admin_key_may_be_in_vault(
    resident: Resident, litellm: LiteLLM, openbao: OpenBao, kv: Kv, role: str
) -> None:
    """LiteLLM mints with a key that is on this machine for as long as a worker needs it."""
    kv.put("admin", key=litellm.master_key)
    table = vault_table(resident, openbao, role, {kv.path("admin"): ["read"]})
    resident.configure(
        table + f'[profiles.work]\nbase_url = "{litellm.url}"\n[profiles.work.source]\n'
        f'type = "litellm"\nadmin = {{ vault = "{kv.path("admin")}#key" }}\n'
    )
    resident.start()
    first = resident.key()

    status, _, said = resident.cli("rotate", "work")

    assert status == 0, said
    assert resident.key() != first
    assert logins(openbao, role) == 1
    status, _, said = resident.cli("revoke", "work")
    assert status == 0, said
    everything = b"".join(one.read_bytes() for one in resident.state.rglob("*") if one.is_file())
    assert litellm.master_key.encode() not in everything


def test_a_lease_is_renewed_replaced_and_revoked(
    resident: Resident, openbao: OpenBao, database: Database, role: str
) -> None:
    """A real engine's: its user ends when ours does, and not before the next one is there."""
    path = database.dynamic_role(role, "4s", "9s")
    rules = {path: ["read"], **LEASES}
    table = vault_table(resident, openbao, role, rules, token_ttl="1h")
    resident.configure(
        table
        + source(
            "http://127.0.0.1:9",
            path,
            'engine = "dynamic"\nfield = "password"',
            'verify = "none"\nhold = "1s"',
        )
    )
    before = database.users()
    resident.start()
    first = resident.key()
    assert len(database.users() - before) == 1

    until(lambda: resident.key() != first, 15)
    assert openbao.count("sys/leases/renew") >= 1
    until(lambda: len(database.users() - before) == 1, 10)  # the one before is revoked
    assert openbao.count("sys/leases/revoke") >= 1
    status, printed, said = resident.cli("revoke", "work")
    assert status == 0, said
    assert "1 key" in printed or "revoked" in printed
    until(lambda: database.users() == before, 10)


def test_a_lease_of_a_profile_that_is_gone_is_revoked(
    resident: Resident, openbao: OpenBao, database: Database, role: str
) -> None:
    """By what the journal knows, with the token that is still held."""
    path = database.dynamic_role(role, "1h", "2h")
    table = vault_table(resident, openbao, role, {path: ["read"], **LEASES})
    made = source(
        "http://127.0.0.1:9",
        path,
        'engine = "dynamic"\nfield = "password"',
        'verify = "none"\nhold = "1s"',
    )
    before = database.users()
    resident.configure(table + made)
    resident.start()
    resident.key()
    assert len(database.users() - before) == 1
    resident.kill()
    resident.configure(table + source("http://127.0.0.1:9", path, 'poll = "1h"', name="other"))

    resident.start()

    until(lambda: database.users() == before, 20)


def test_no_window_while_the_leader_dies(
    resident: Resident, cluster: Cluster, tmp_path: Path
) -> None:
    """
    A key of a 10 s lease, used all the time for 70 s, through its replacements and a fail-over.

    No use fails.
    """
    leader = cluster.wait_for_leader()
    with Database(leader) as database:
        path = database.dynamic_role("window", "10s", "20s")
        table = vault_table(resident, leader, "window", {path: ["read"], **LEASES}, token_ttl="1h")
        nodes = json.dumps([node.url for node in cluster.nodes])
        table = table.replace("[vault]\n", f"[vault]\nnodes = {nodes}\n")
        resident.configure(
            table
            + source(
                "http://127.0.0.1:9",
                path,
                'engine = "dynamic"\nfield = "password"\ntimeout = "4s"',
                'verify = "none"\nhold = "2s"',
            )
        )
        resident.start()
        resident.key()
        ends, killed = time.monotonic() + 70, False
        uses, refused, keys = 0, [], set()
        while time.monotonic() < ends:
            key = resident.key()
            keys.add(key)
            lives = _lets_in(database, key)
            uses += 1
            if not lives:
                refused.append(70 - (ends - time.monotonic()))
            if not killed and time.monotonic() > ends - 45:
                leader.kill()
                killed = True
        try:
            assert refused == [], resident.said()
            assert uses > 100
            assert len(keys) >= 4
        finally:
            leader.start()
            leader.wait_until_ours()
            cluster.wait_for_leader()


def _lets_in(database: Database, password: str) -> bool:
    """Whether the database takes a key: it is the password of one of its users."""
    return any(database.logs_in(user, password) for user in _users(database))


def _users(database: Database) -> list[str]:
    return sorted((name for name in database.users() if name.startswith("v-")), reverse=True)


@pytest.mark.parametrize("method", ["token", "approle", "userpass"])
def test_nothing_of_vault_s_leaves(
    resident: Resident,
    gateway: DevGateway,
    openbao: OpenBao,
    kv: Kv,
    role: str,
    method: str,
) -> None:
    """No token, secret_id, password or key is in a file, a line, an argument or a variable."""
    canaries = Canaries()
    key = canaries.know("key", minted(gateway))
    kv.put("llm", key=key)
    openbao.policy(role, {kv.path("llm"): ["read"]})
    material = resident.home.path / "material"
    if method == "token":
        text = openbao.new_token([role, "default"], ttl="1h")["client_token"]
        login = f'token = {{ file = "{material}" }}'
    elif method == "approle":
        role_id, text = openbao.approle(role, [role])
        login = f'role_id = "{role_id}"\nsecret_id = {{ file = "{material}" }}'
    else:
        text = "correct-horse-battery-staple-0123456789"
        openbao.userpass(role, text, [role])
        login = f'username = "{role}"\npassword = {{ file = "{material}" }}'
    write(material, canaries.know("material", text))
    resident.configure(
        f'[vault]\naddress = "{openbao.url}"\n[vault.auth]\nmethod = "{method}"\n{login}\n'
        + source(gateway.url, kv.path("llm"), 'poll = "1s"')
    )
    with Watch() as watch:
        resident.start()
        assert resident.key() == key
        said = [*resident.cli("status"), *resident.cli("rotate", "work")]
        said += [*resident.cli("source", "test", "work"), *resident.cli("config", "show")]
        kv.put("llm", key=canaries.know("blanks", "sk-with blanks-0123456789abcdef"))
        until(lambda: "not one token" in str(resident.row()["trouble"]))
        said += [*resident.cli("rotate", "work"), *resident.cli("status", "--json")]
        kv.delete("llm")
        write(material, canaries.know("wrong", f"wrong-{secrets.token_hex(20)}"))
        resident.kill()
        next(resident.state.rglob("session.*.sealed")).unlink()
        resident.start()
        until(lambda: resident.row()["trouble"], 20)
        said += [*resident.cli("rotate", "work"), *resident.cli("audit"), resident.said()]
        seen = watch.look() + list(watch.seen.values())
    printed = "\n".join(str(one) for one in said)
    assert canaries.seen_in(printed) == []
    assert canaries.below(resident.home.path, {material: "wrong"}) == []
    for process in seen:
        assert canaries.seen_in(process.command) == []
        assert canaries.seen_in(process.environment or b"") == []
    everything = b"\n".join(
        one.read_bytes() for one in resident.home.path.rglob("*") if one.is_file()
    )
    assert TOKEN.findall(printed.encode() + everything) == []


def test_a_token_that_is_asked_with_seldom_does_not_die(
    resident: Resident, litellm: LiteLLM, openbao: OpenBao, kv: Kv, role: str
) -> None:
    """A periodic one that only an admin key's reference needs: it is renewed in between."""
    kv.put("admin", key=litellm.master_key)
    openbao.policy(role, {kv.path("admin"): ["read"]})
    token = openbao.new_token([role, "default"], period="4s")["client_token"]
    write(resident.home.path / "token", token)
    resident.configure(
        f'[vault]\naddress = "{openbao.url}"\n[vault.auth]\nmethod = "token"\n'
        f'token = {{ file = "{resident.home.path / "token"}" }}\n'
        f'[profiles.work]\nbase_url = "{litellm.url}"\n[profiles.work.source]\n'
        f'type = "litellm"\nadmin = {{ vault = "{kv.path("admin")}#key" }}\n'
    )
    resident.start()
    first = resident.key()
    time.sleep(9)

    status, _, said = resident.cli("rotate", "work")

    assert status == 0, said
    assert resident.key() != first
    assert resident.cli("revoke", "work")[0] == 0


def test_refusals_alone_end_no_key_that_its_keeper_did_not_withdraw(
    following: Resident, gateway: DevGateway, kv: Kv
) -> None:
    """The secret cannot be read for another reason, and the gateway may be in trouble."""
    key = following.key()
    kv.put("llm", other="x")  # the field is gone: somebody's mistake
    until(lambda: "has no field key" in str(following.row()["trouble"]))
    ended(gateway, key)
    me = threading.get_native_id()

    replies = [following.ask("work", me, 60_000) for _ in range(3)]

    assert replies[-1] == f"ok {key}"


def test_sources_of_different_kinds_share_one_login(
    resident: Resident,
    gateway: DevGateway,
    litellm: LiteLLM,
    openbao: OpenBao,
    kv: Kv,
    role: str,
) -> None:
    """With a secret_id that works once: whoever comes first logs in for all."""
    kv.put("llm", key=minted(gateway), admin=litellm.master_key)
    path = kv.path("llm")
    table = vault_table(resident, openbao, role, {path: ["read"]}, secret_id_num_uses=1)
    resident.configure(
        table
        + source(gateway.url, path, name="kept")
        + f'[profiles.fixed]\nbase_url = "{gateway.url}"\n[profiles.fixed.source]\n'
        f'type = "static"\nkey = {{ vault = "{path}#key" }}\n'
        f'[profiles.made]\nbase_url = "{litellm.url}"\n[profiles.made.source]\n'
        f'type = "litellm"\nadmin = {{ vault = "{path}#admin" }}\n'
    )
    resident.start()

    assert resident.key("kept") == resident.key("fixed")
    assert resident.key("made").startswith("sk-")
    assert logins(openbao, role) == 1
    assert resident.cli("revoke", "made")[0] == 0


@pytest.mark.parametrize("words", [["run", "--", "sh"], ["run", "--", "./claude"]])
def test_a_program_has_a_lease_of_its_own(
    resident: Resident, openbao: OpenBao, database: Database, role: str, words: list[str]
) -> None:
    """Which is revoked with it, whether it has the password itself or a helper for it."""
    path = database.dynamic_role(role, "1h", "2h")
    table = vault_table(resident, openbao, role, {path: ["read"], **LEASES})
    settings = 'engine = "dynamic"\nfield = "password"'
    resident.configure(table + source("http://127.0.0.1:9", path, settings, 'verify = "none"'))
    claude = resident.home.path / "claude"
    claude.touch(0o700)
    claude.write_text('#!/bin/sh\nexec sh "$3" "$4"\n')  # after --settings and what they are
    before = database.users()
    resident.start()
    resident.key()
    [mine] = database.users() - before
    words = [word.replace("./claude", str(claude)) for word in words]
    with subprocess.Popen(
        [*KEYBROKER, *words, "-c", "echo begun; read line"],
        env=resident.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        assert len(database.users() - before) == 2
        process.communicate(b"\n", timeout=15)
    assert process.returncode == 0
    assert database.users() - before == {mine}
    status, _, said = resident.cli("run", "--ttl", "1m", "--", "true")
    assert status == 78
    assert "how long its leases live is Vault's to say" in said
