"""Sources of type vault, against a real OpenBao: its audit log is what is counted."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile
from keybroker.credential import Lease, Secret, Session
from keybroker.errors import (
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.sources import Source
from keybroker.sources.held import Held
from keybroker.values import replace
from tests.contracts import check_silent
from tests.scripted import profile
from tests.servers.agent import Agent
from tests.servers.awslogin import ACCESS_KEY, SECRET_KEY, AwsLogin
from tests.servers.cluster import Cluster
from tests.servers.database import Database
from tests.servers.faults import (
    DropBeforeCommit,
    Faults,
    GarbageJson,
    Hang,
    Html,
    Huge,
    Redirect,
    Reset,
    TrickleBody,
    Truncated,
)
from tests.servers.kubernetes import Kubernetes
from tests.servers.ldap import Ldap
from tests.servers.oidc import Oidc
from tests.servers.processes import wait_until
from tests.servers.signer import Signer
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Api, Kv
from tests.test_http import no_variables as no_variables
from tests.test_reference import private

pytestmark = pytest.mark.servers


@dataclass
class Desk:
    """Sources in front of one server, and the one session that they share."""

    url: str
    auth: Mapping[str, Any]
    environment: dict[str, str]
    more: Mapping[str, Any] = field(default_factory=dict)
    held: Held = field(default_factory=Held)
    made: list[Source] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)

    def profile(self, path: str, **more: Any) -> Profile:
        return profile(self.url, path, self.auth, **{**self.more, **more})

    def source(self, path: str, **more: Any) -> Source:
        built = sources.build(self.profile(path, **more), self.environment, self.held)
        self.made.append(built)
        return built

    def session(self, path: str) -> Session:
        vault = self.profile(path).vault
        assert vault is not None
        return self.held.get(vault.session)

    def fails(self, kind: type[KeybrokerError], call: Callable[[], object]) -> KeybrokerError:
        """Return the error of a call: of this class, and silent about all that is secret here."""
        with pytest.raises(KeybrokerError) as caught:
            call()
        tokens = {
            one.secret.reveal() for one in self.held._sessions.values() if one.secret is not None
        }
        known = {*self.secrets, *self.environment.values(), *tokens}
        check_silent(caught.value, *known)
        assert type(caught.value) is kind, caught.value.message
        return caught.value


Open = Callable[..., Desk]


@pytest.fixture
def desk() -> Iterator[Open]:
    """Open a desk; its sources are closed at the end."""
    opened: list[Desk] = []

    def open_(server: Api, auth: Mapping[str, Any], **how: Any) -> Desk:
        environment = how.pop("environment", {})
        opened.append(Desk(how.pop("url", server.url), auth, dict(environment), how))
        return opened[-1]

    yield open_
    for one in opened:
        for source in one.made:
            source.close()


@dataclass
class Role:
    """An AppRole of a test's own, at a mount of its own: its logins can be counted."""

    auth: Mapping[str, Any]
    environment: dict[str, str]
    login: str
    name: str
    mount: str


def approle(server: Api, rules: Mapping[str, list[str]], **options: Any) -> Role:
    name = f"r-{secrets.token_hex(4)}"
    policy = server.policy(name, rules)
    role_id, secret_id = server.approle(name, [policy], name, **options)
    auth = {
        "method": "approle",
        "mount": name,
        "role_id": role_id,
        "secret_id": {"env": "KB_SECRET_ID"},
    }
    return Role(auth, {"KB_SECRET_ID": secret_id}, f"auth/{name}/login", name, name)


@pytest.fixture(scope="module")
def kv(openbao: OpenBao) -> Kv:
    """A KV 2 of this module."""
    return openbao.kv()


def key() -> str:
    return f"sk-{secrets.token_hex(16)}"


def near(moment: datetime | None, **how: float) -> bool:
    assert moment is not None
    return abs(moment - (datetime.now(UTC) + timedelta(**how))) < timedelta(seconds=3)


def reading(kv: Kv, name: str) -> dict[str, list[str]]:
    return {kv.path(name): ["read"]}


# KV.


def test_one_login_serves_for_the_life_of_a_token(openbao: OpenBao, kv: Kv, desk: Open) -> None:
    """By the server's own log: twenty reads of five sources, one login, one read each."""
    first = key()
    kv.put("polled", key=first)
    role = approle(openbao, reading(kv, "polled"))
    one = desk(openbao, role.auth, environment=role.environment)
    path = kv.path("polled")
    before = openbao.count(path)
    for number in range(5):
        source = one.source(path, field="key", poll=f"{60 + number}s")
        for _ in range(4):
            assert source.issue("").secret == Secret(first)
    assert openbao.count(role.login) == 1
    assert openbao.count(path) - before == 20


def test_a_rotated_secret_is_another_version(openbao: OpenBao, kv: Kv, desk: Open) -> None:
    """Later written; one that is pinned stays."""
    name = "rotated"
    old, new = key(), key()
    kv.put(name, key=old)
    role = approle(openbao, reading(kv, name))
    one = desk(openbao, role.auth, environment=role.environment)
    source, pinned = one.source(kv.path(name)), one.source(kv.path(name), version=1)
    first = source.issue("")
    kv.put(name, key=new)
    second = source.issue("")
    assert (first.lease.id, second.lease.id) == ("version 1", "version 2")
    assert first.lease.written_at is not None
    assert second.lease.written_at is not None
    assert first.lease.written_at < second.lease.written_at
    assert (first.secret, second.secret) == (Secret(old), Secret(new))
    assert pinned.issue("").secret == Secret(old)


def test_what_kv_2_says_of_an_end_is_one(openbao: OpenBao, kv: Kv, desk: Open) -> None:
    """delete_version_after, and custom metadata."""
    role = approle(openbao, {f"{kv.mount}/data/*": ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    kv.describe("ending", delete_version_after="90s")
    kv.put("ending", key=key())
    assert near(one.source(kv.path("ending")).issue("").lease.expires_at, seconds=90)
    kv.put("described", key=key())
    kv.describe("described", custom_metadata={"ttl": "2h"})
    assert near(one.source(kv.path("described")).issue("").lease.expires_at, hours=2)


def test_what_is_gone_from_kv_2_is_said(openbao: OpenBao, kv: Kv, desk: Open) -> None:
    """Deleted, destroyed, forgotten, and a version that never was."""
    role = approle(openbao, {f"{kv.mount}/*": ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    for name in ("deleted", "destroyed", "forgotten"):
        kv.put(name, key=key())
    kv.delete("deleted")
    kv.destroy("destroyed", 1)
    kv.forget("forgotten")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for name, words in (
        ("deleted", f"version 1 was deleted on {today}"),
        ("destroyed", "version 1 was destroyed"),
        ("forgotten", "there is nothing at this path"),
    ):
        source = one.source(kv.path(name))
        error = one.fails(SourceInvalid, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert f"{kv.path(name)}: {words}" in error.message
    kv.undelete("deleted", 1)
    assert one.source(kv.path("deleted")).issue("").lease.id == "version 1"
    source = one.source(kv.path("deleted"), version=9)
    assert "no version 9" in one.fails(SourceInvalid, lambda: source.issue("")).message
    source = one.source(f"{kv.mount}/deleted")
    error = one.fails(SourceInvalid, lambda: source.issue(""))
    assert error.hint == f"path = {kv.path('deleted')}"


def test_a_secret_of_kv_1_is_read(openbao: OpenBao, desk: Open) -> None:
    """With its ttl as advice."""
    old = openbao.kv(version=1)
    value = key()
    old.put("llm", key=value, ttl="45s")
    role = approle(openbao, reading(old, "llm"))
    one = desk(openbao, role.auth, environment=role.environment)
    credential = one.source(old.path("llm")).issue("")
    assert credential.secret == Secret(value)
    assert near(credential.lease.reread_at, seconds=45)
    assert credential.lease.expires_at is None


def test_what_is_mounted_nowhere_is_said(openbao: OpenBao, desk: Open) -> None:
    """By its path."""
    role = approle(openbao, {"nowhere/*": ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source("nowhere/data/llm")
    assert "nothing is mounted there" in one.fails(SourceInvalid, lambda: source.issue("")).message


def test_a_field_that_is_no_key_is_not_shown(openbao: OpenBao, kv: Kv, desk: Open) -> None:
    """A canary in it is in no error."""
    role = approle(openbao, {f"{kv.mount}/data/*": ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    value = f"two words {key()}"
    one.secrets = {value, value.split()[-1]}
    kv.put("bad", key=value, spare=key())
    for field_ in ("key", "none"):
        source = one.source(kv.path("bad"), field=field_)
        one.fails(SourceInvalid, lambda source=source: source.issue(""))  # type: ignore[misc]


# 403.


def test_a_policy_that_forbids_is_told_from_a_dead_token(
    openbao: OpenBao, kv: Kv, desk: Open
) -> None:
    """The one is said, the other mended; both are 403 with the same words."""
    kv.put("guarded", key=key())
    kv.put("other", key=key())
    role = approle(openbao, reading(kv, "guarded"))
    one = desk(openbao, role.auth, environment=role.environment)
    source, forbidden = one.source(kv.path("guarded")), one.source(kv.path("other"))
    source.issue("")
    error = one.fails(SourceDenied, lambda: forbidden.issue(""))
    path = kv.path("other")
    assert error.hint == f'add to its policy: path "{path}" {{ capabilities = ["read"] }}'
    assert openbao.count(role.login) == 1
    token = one.session(kv.path("guarded")).secret
    assert token is not None
    openbao.do("POST", "auth/token/revoke", {"token": token.reveal()})
    source.issue("")
    assert openbao.count(role.login) == 2


def test_a_token_is_renewed_until_its_maximum_and_then_replaced(
    openbao: OpenBao, kv: Kv, desk: Open
) -> None:
    """A login when it has ended, not before: two in nine seconds of a maximum of six."""
    kv.put("long", key=key())
    role = approle(openbao, reading(kv, "long"), token_ttl="3s", token_max_ttl="6s")
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(kv.path("long"))
    before = openbao.count("auth/token/renew-self")
    until = time.monotonic() + 9
    while time.monotonic() < until:
        source.issue("")
        time.sleep(0.2)
    assert openbao.count(role.login) == 2
    assert 2 <= openbao.count("auth/token/renew-self") - before <= 5


# Sealed, throttled.


def test_a_sealed_server_is_said_and_comes_back(desk: Open) -> None:
    """Nothing has to be done here; the token is still good."""
    with OpenBao() as bao:
        kv = bao.kv()
        value = key()
        kv.put("llm", key=value)
        role = approle(bao, reading(kv, "llm"))
        one = desk(bao, role.auth, environment=role.environment)
        source = one.source(kv.path("llm"))
        source.issue("")
        bao.seal()
        error = one.fails(SourceUnavailable, lambda: source.issue(""))
        assert error.message.endswith(": is sealed")
        bao.unseal()
        assert source.issue("").secret == Secret(value)
        assert bao.count(role.login) == 1
        for headers, least in ((False, 4), (True, 20)):
            bao.rate_limit("q", kv.mount, interval="30s", block="30s", headers=headers)
            with pytest.raises(SourceUnavailable) as caught:
                for _ in range(3):
                    source.issue("")
            assert caught.value.message.endswith(": asks to wait (429)")
            assert caught.value.retry_after is not None
            assert caught.value.retry_after > timedelta(seconds=least)
            bao.end_rate_limit("q")
        bao.pause()
        quick = one.source(kv.path("llm"), timeout="500ms")
        error = one.fails(SourceUnavailable, lambda: quick.issue(""))
        assert error.message.endswith(": did not answer in time")
        bao.resume()


# Leases.


LEASES = {
    "sys/leases/revoke": ["update"],
    "sys/leases/renew": ["update"],
}


def leasing(openbao: OpenBao, path: str, **options: Any) -> Role:
    return approle(openbao, {path: ["read"], **LEASES}, **options)


def names(database: Database) -> set[str]:
    return {user for user in database.users() if user.startswith("v-")}


def test_a_lease_lives_is_renewed_and_revoked(
    openbao: OpenBao, database: Database, desk: Open
) -> None:
    """A real user of a real database, until we end it."""
    path = database.dynamic_role("lived", "10s", "20s")
    role = leasing(openbao, path)
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(path, engine="dynamic", field="password")
    before = names(database)
    credential = source.issue("kb-x")
    [user] = names(database) - before
    assert database.logs_in(user, credential.secret.reveal())
    lease = credential.lease
    assert openbao.leases(path) == [lease.id]
    assert near(lease.expires_at, seconds=10)
    assert (lease.renewable, lease.revocable) == (True, True)
    time.sleep(1.5)
    later = source.renew(lease)
    assert later.expires_at is not None
    assert lease.expires_at is not None
    assert later.expires_at > lease.expires_at + timedelta(seconds=1)
    assert later.renewable
    source.revoke(later)
    assert user not in names(database), "revoked is over, when it is said"
    source.revoke(later)
    error = one.fails(SourceInvalid, lambda: source.renew(later))
    assert error.message.endswith("has ended the lease")
    assert openbao.count(role.login) == 1


def test_a_lease_at_its_maximum_says_so(openbao: OpenBao, database: Database, desk: Open) -> None:
    """Renewals are cut short, then it is not renewed for nothing."""
    path = database.dynamic_role("bounded", "6s", "8s")
    role = leasing(openbao, path)
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(path, engine="dynamic", field="password")
    lease = source.issue("").lease
    time.sleep(3)
    bounded = source.renew(lease)
    assert not bounded.renewable
    assert bounded.expires_at is not None
    assert bounded.expires_at < lease.issued_at + timedelta(seconds=9)
    source.revoke(bounded)


def test_a_lease_ends_with_its_token_and_says_so(
    openbao: OpenBao, database: Database, desk: Open
) -> None:
    """Vault takes the user away with the token: an end that no lease_duration tells."""
    path = database.dynamic_role("child", "1h")
    role = leasing(openbao, path, token_ttl="4s", token_max_ttl="4s")
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(path, engine="dynamic", field="password")
    before = names(database)
    lease = source.issue("").lease
    [user] = names(database) - before
    assert near(lease.expires_at, seconds=4)
    assert lease.expires_at == lease.session_ends
    assert wait_until(lambda: user not in names(database), 10)
    assert datetime.now(UTC) >= lease.expires_at


def test_a_lease_of_no_use_is_given_back(openbao: OpenBao, database: Database, desk: Open) -> None:
    """No field, a wrong engine, more than a day: nobody is left in the database."""
    path = database.dynamic_role("useless")
    long = database.dynamic_role("long", "30h", "48h")
    role = approle(openbao, {path: ["read"], long: ["read"], **LEASES}, token_ttl="72h")
    openbao.do("POST", f"sys/auth/{role.mount}/tune", {"max_lease_ttl": "72h"})
    openbao.do("POST", f"sys/mounts/{database.mount}/tune", {"max_lease_ttl": "72h"})
    one = desk(openbao, role.auth, environment=role.environment)
    before = names(database)
    for source in (
        one.source(path, engine="dynamic", field="key"),
        one.source(path, engine="kv", field="password"),
        one.source(long, engine="dynamic", field="password"),
    ):
        one.fails(SourceInvalid, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert names(database) == before


def test_a_policy_without_revoke_is_said(openbao: OpenBao, database: Database, desk: Open) -> None:
    """With the line; what was leased is not lost."""
    path = database.dynamic_role("kept", "5s", "5s")
    role = approle(openbao, {path: ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(path, engine="dynamic", field="password")
    lease = source.issue("").lease
    error = one.fails(SourceDenied, lambda: source.revoke(lease))
    assert "sys/leases/revoke" in str(error.hint)


def test_what_the_journal_knows_is_enough_to_revoke(
    openbao: OpenBao, database: Database, desk: Open
) -> None:
    """The profile may be gone."""
    path = database.dynamic_role("journalled")
    role = leasing(openbao, path)
    one = desk(openbao, role.auth, environment=role.environment)
    before = names(database)
    lease = one.source(path, engine="dynamic", field="password").issue("").lease
    issuer = one.profile(path, engine="dynamic", field="password").issuer
    revoker = sources.revoker(issuer, role.environment, 8.0, Held())
    revoker.revoke(lease)
    revoker.close()
    assert names(database) == before


def test_a_database_that_is_down_leaves_it_unknown(openbao: OpenBao, desk: Open) -> None:
    """The engine answers 500; a role that is not there is final."""
    with Database(openbao) as database:
        path = database.dynamic_role("down")
        role = approle(openbao, {f"{database.mount}/creds/*": ["read"], **LEASES})
        one = desk(openbao, role.auth, environment=role.environment)
        source = one.source(path, engine="dynamic", field="password")
        gone = one.source(f"{path}-none", engine="dynamic", field="password")
        assert "no such role" in one.fails(SourceInvalid, lambda: gone.issue("")).message
        database.stop()
        error = one.fails(SourceUnavailable, lambda: source.issue(""))
        assert getattr(error, "unknown", None) is True
        assert getattr(error, "over", None) is True
        database.start()
        source.revoke(source.issue("").lease)


def test_a_static_role_is_followed(openbao: OpenBao, database: Database, desk: Open) -> None:
    """A password that Vault changes: when it was written, and when the next is due."""
    path = database.static_role("llm_static", "30s")
    role = approle(openbao, {path: ["read"]})
    one = desk(openbao, role.auth, environment=role.environment)
    source = one.source(path, engine="static-role", field="password")
    first = source.issue("")
    assert database.logs_in("llm_static", first.secret.reveal())
    assert first.lease.reread_at is not None
    assert timedelta(0) < first.lease.reread_at - datetime.now(UTC) <= timedelta(seconds=32)
    database.rotate("llm_static")
    second = source.issue("")
    assert second.secret != first.secret
    assert second.lease.written_at is not None
    assert first.lease.written_at is not None
    assert second.lease.written_at > first.lease.written_at
    assert second.lease.expires_at is None


# The ways in.


def reads(one: Desk, kv: Kv, name: str) -> Secret:
    return one.source(kv.path(name)).issue("").secret


@pytest.fixture(scope="module")
def guarded(openbao: OpenBao, kv: Kv) -> tuple[str, str, Secret]:
    """A secret, and the policy that lets one read it."""
    value = key()
    kv.put("ways", key=value)
    return kv.path("ways"), openbao.policy("ways", reading(kv, "ways")), Secret(value)


Guarded = tuple[str, str, Secret]


def test_a_token_from_a_file_is_renewed(
    openbao: OpenBao, guarded: Guarded, desk: Open, tmp_path: Path
) -> None:
    """A periodic one never ends; when it is revoked the file is named."""
    path, policy, value = guarded
    made = openbao.new_token([policy], period="3s")
    file = private(tmp_path / "token", made["client_token"])
    one = desk(openbao, {"method": "token", "token": {"file": str(file)}})
    source = one.source(path)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert source.issue("").secret == value
        time.sleep(0.3)
    openbao.do("POST", "auth/token/revoke", {"token": made["client_token"]})
    error = one.fails(SourceDenied, lambda: source.issue(""))
    assert error.hint == f"put a new one into file:{file}"
    file.write_text(openbao.new_token([policy])["client_token"])
    assert source.issue("").secret == value


def test_a_role_id_or_secret_id_that_is_wrong_is_said(
    openbao: OpenBao, guarded: Guarded, desk: Open
) -> None:
    """Once, until there is another."""
    path, policy, value = guarded
    role_id, secret_id = openbao.approle("used", [policy], "used", secret_id_num_uses=1)
    auth = {
        "method": "approle",
        "mount": "used",
        "role_id": role_id,
        "secret_id": {"env": "KB_SECRET_ID"},
    }
    one = desk(openbao, auth, environment={"KB_SECRET_ID": secret_id})
    source = one.source(path)
    assert source.issue("").secret == value
    one.held.put(replace(one.session(path), secret=None))
    for _ in range(3):
        error = one.fails(SourceDenied, lambda: source.issue(""))
    assert error.message.endswith("refused role_id or secret_id")
    assert openbao.count("auth/used/login") == 2
    one.environment["KB_SECRET_ID"] = openbao.secret_id("used", "used")
    again = one.source(path, poll="61s")
    assert again.issue("").secret == value


def test_a_wrapped_secret_id_is_unwrapped_once(
    openbao: OpenBao, guarded: Guarded, desk: Open
) -> None:
    """One that was opened before, or wrapped elsewhere, is refused."""
    path, policy, value = guarded
    role_id, _ = openbao.approle("wrap", [policy], "wrap")
    made_at = "auth/wrap/role/wrap/secret-id"

    def wrapped(at: str) -> str:
        answer = openbao.ask("POST", at, {}, headers={"X-Vault-Wrap-TTL": "60s"})
        token: str = answer.body["wrap_info"]["token"]
        return token

    auth = {
        "method": "approle",
        "mount": "wrap",
        "role_id": role_id,
        "secret_id": {"env": "KB_SECRET_ID"},
        "wrapped_by": made_at,
    }
    token = wrapped(made_at)
    one = desk(openbao, auth, environment={"KB_SECRET_ID": token})
    source = one.source(path)
    assert source.issue("").secret == value
    one.held.put(replace(one.session(path), secret=None))
    assert source.issue("").secret == value
    assert openbao.count("auth/wrap/login") == 2

    thief = desk(openbao, auth, environment={"KB_SECRET_ID": token})
    late = thief.source(path)
    assert "unwrapped before" in str(thief.fails(SourceDenied, lambda: late.issue("")).hint)
    other = wrapped("sys/wrapping/wrap")
    fooled = desk(openbao, auth, environment={"KB_SECRET_ID": other})
    foreign = fooled.source(path)
    fooled.fails(SourceDenied, lambda: foreign.issue(""))
    looked = openbao.ask("POST", "sys/wrapping/lookup", {"token": other}, token="")
    assert looked.status == 200, "what is not ours is left wrapped"


def test_a_wrong_password_does_not_lock_the_user(
    openbao: OpenBao, guarded: Guarded, desk: Open
) -> None:
    """Twice is tried, whatever asks; five times would lock it."""
    path, policy, value = guarded
    login = openbao.userpass("ada", "right-horse", [policy])
    auth = {"method": "userpass", "username": "ada", "password": {"env": "KB_PASSWORD"}}
    one = desk(openbao, auth, environment={"KB_PASSWORD": "wrong-horse"})
    source = one.source(path)
    for _ in range(6):
        one.fails(SourceDenied, lambda: source.issue(""))
        one.held.put(replace(one.session(path), not_before=_earlier(one.session(path))))
    assert openbao.count(login) == 2
    right = desk(openbao, auth, environment={"KB_PASSWORD": "right-horse"})
    assert right.source(path).issue("").secret == value


def _earlier(session: Session) -> datetime | None:
    """Let the waits of a denial pass, but not those that are for good."""
    assert session.not_before is not None
    for_good = session.not_before > datetime.now(UTC) + timedelta(days=1)
    return session.not_before if for_good else datetime.now(UTC)


def test_a_locked_user_and_a_mount_that_is_not_there(
    openbao: OpenBao, guarded: Guarded, desk: Open
) -> None:
    """Vault says the same of both, and so do we."""
    path, policy, _ = guarded
    login = openbao.userpass("eve", "right-horse", [policy])
    for _ in range(6):
        openbao.request("POST", login, {"password": "no"}, token="")
    auth = {"method": "userpass", "username": "eve", "password": {"env": "KB_PASSWORD"}}
    for changes, mount in (({}, "userpass"), ({"mount": "nowhere"}, "nowhere")):
        one = desk(openbao, {**auth, **changes}, environment={"KB_PASSWORD": "right-horse"})
        source = one.source(path)
        error = one.fails(SourceDenied, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert f"the user is locked, or nothing is mounted at auth/{mount}" in error.message


def test_a_directorys_user_logs_in(openbao_with_ldap: OpenBao, ldap: Ldap, desk: Open) -> None:
    """A wrong password is refused; a directory that is down passes."""
    kv = openbao_with_ldap.kv()
    value = key()
    kv.put("llm", key=value)
    policy = openbao_with_ldap.policy("llm", reading(kv, "llm"))
    login = ldap.enable(openbao_with_ldap, [policy])
    auth = {"method": "ldap", "username": ldap.user, "password": {"env": "KB_PASSWORD"}}
    one = desk(openbao_with_ldap, auth, environment={"KB_PASSWORD": ldap.password})
    before = openbao_with_ldap.count(login)
    assert reads(one, kv, "llm") == Secret(value)
    assert openbao_with_ldap.count(login) - before == 1
    wrong = desk(openbao_with_ldap, auth, environment={"KB_PASSWORD": "wrong-horse"})
    source = wrong.source(kv.path("llm"))
    error = wrong.fails(SourceDenied, lambda: source.issue(""))
    assert "refused the name or the password" in error.message
    ldap.stop()
    try:
        down = desk(openbao_with_ldap, auth, environment={"KB_PASSWORD": ldap.password})
        source = down.source(kv.path("llm"))
        error = down.fails(SourceUnavailable, lambda: source.issue(""))
        assert error.message.endswith("cannot reach its LDAP server")
    finally:
        ldap.start()


JWTS: dict[str, tuple[dict[str, Any], type[KeybrokerError], str]] = {
    "expired": ({"seconds": -600}, SourceDenied, "finds the token expired"),
    "early": ({"early": 6000, "seconds": 9000}, SourceUnavailable, "not valid yet"),
    "audience": ({"audience": "https://other.example"}, SourceDenied, "audience"),
    "subject": ({"subject": "mallory"}, SourceDenied, "does not take what the token says"),
}


def test_a_jwt_is_a_way_in(openbao: OpenBao, guarded: Guarded, desk: Open, tmp_path: Path) -> None:
    """And each thing that may be wrong with it is told from the others."""
    path, policy, value = guarded
    signer = Signer()
    config = {"jwt_validation_pubkeys": [signer.public_key], "bound_issuer": signer.issuer}
    good = {"subject": "ci", "audience": "https://vault.example"}
    openbao.jwt("ci", [policy], good["audience"], "ci", config=config, bound_subject="ci")
    file = private(tmp_path / "jwt", signer.token(**good), 0o644)
    auth = {"method": "jwt", "mount": "ci", "role": "ci", "jwt": {"file": str(file)}}
    assert desk(openbao, auth).source(path).issue("").secret == value
    other = Signer().token(**good)
    for token, auth_, kind, words in (
        *((signer.token(**{**good, **how}), auth, k, w) for how, k, w in JWTS.values()),
        (other, auth, SourceDenied, "cannot verify the token"),
        ("no-jwt", auth, SourceDenied, "cannot verify the token"),
        (signer.token(**good), {**auth, "role": "none"}, SourceDenied, "has no such role"),
    ):
        file.write_text(token)
        one = desk(openbao, auth_)
        one.secrets = {token}
        source = one.source(path)
        error = one.fails(kind, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert words in error.message


def test_a_workload_of_an_openid_provider_logs_in(
    openbao: OpenBao, guarded: Guarded, oidc: Oidc, desk: Open
) -> None:
    """With a token that a command gets; a provider that is down passes."""
    path, policy, value = guarded
    config = {"oidc_discovery_url": oidc.issuer, "bound_issuer": oidc.issuer}
    openbao.jwt("w", [policy], oidc.audience, "workload", config=config)
    auth = {
        "method": "jwt",
        "mount": "workload",
        "role": "w",
        "jwt": {"command": ["echo", oidc.token()]},
    }
    assert desk(openbao, auth).source(path).issue("").secret == value
    openbao.jwt("w", [policy], oidc.audience, "forgetful", config=config)  # has no keys of it yet
    one = desk(openbao, {**auth, "mount": "forgetful"})
    oidc.stop()
    try:
        error = one.fails(SourceUnavailable, lambda: one.source(path).issue(""))
    finally:
        oidc.start()
    assert "cannot ask who made the token" in error.message


def test_a_pod_logs_in(
    openbao: OpenBao, guarded: Guarded, kubernetes: Kubernetes, desk: Open, tmp_path: Path
) -> None:
    """Kubernetes that is down looks like a refusal, and passes."""
    path, policy, value = guarded
    mount = f"k-{secrets.token_hex(4)}"
    kubernetes.enable(openbao, "kb", [policy], "llm", mount=mount)
    file = private(tmp_path / "token", kubernetes.service_account_token("llm"), 0o644)
    auth = {"method": "kubernetes", "mount": mount, "role": "kb", "token_path": str(file)}
    kubernetes.is_down = True
    one = desk(openbao, auth)
    source = one.source(path)
    error = one.fails(SourceUnavailable, lambda: source.issue(""))
    assert "cannot ask Kubernetes" in error.message
    kubernetes.is_down = False
    one.held.put(replace(one.session(path), not_before=datetime.now(UTC)))
    assert source.issue("").secret == value
    assert kubernetes.reviews >= 1


def test_a_certificate_logs_in(openbao_tls: OpenBao, desk: Open) -> None:
    """Over TLS of a private authority; one that the role does not know is refused."""
    kv = openbao_tls.kv()
    value = key()
    kv.put("llm", key=value)
    policy = openbao_tls.policy("llm", reading(kv, "llm"))
    openbao_tls.cert("web", [policy], openbao_tls.authority, allowed_common_names=["good"])
    for name, kind in (("good", None), ("bad", SourceDenied)):
        mine = openbao_tls.authority.client(name)
        one = desk(
            openbao_tls,
            {"method": "cert", "name": "web"},
            ca=str(openbao_tls.authority.file),
            client_cert=str(mine.file),
            client_key=str(mine.key),
        )
        if kind is None:
            assert reads(one, kv, "llm") == Secret(value)
            continue
        source = one.source(kv.path("llm"))
        error = one.fails(kind, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert "refused our certificate" in error.message


def test_a_certificate_that_is_renewed_is_shown(openbao_tls: OpenBao, desk: Open) -> None:
    """In the same files, by the same process: not that of a connection that is still open."""
    kv = openbao_tls.kv()
    value = key()
    kv.put("llm", key=value)
    policy = openbao_tls.policy("llm", reading(kv, "llm"))
    openbao_tls.cert("renewed", [policy], openbao_tls.authority, allowed_common_names=["new"])
    mine, new = openbao_tls.authority.client("old"), openbao_tls.authority.client("new")
    one = desk(
        openbao_tls,
        {"method": "cert", "name": "renewed"},
        ca=str(openbao_tls.authority.file),
        client_cert=str(mine.file),
        client_key=str(mine.key),
    )
    source = one.source(kv.path("llm"))
    one.fails(SourceDenied, lambda: source.issue(""))
    mine.file.write_bytes(new.file.read_bytes())
    mine.key.write_bytes(new.key.read_bytes())
    assert source.issue("").secret == Secret(value)


def test_an_authority_that_nobody_knows_is_said(openbao_tls: OpenBao, desk: Open) -> None:
    """So are both ways of mixing up http and https."""
    role = approle(openbao_tls, {"x/y": ["read"]})
    plain = openbao_tls.url.replace("https://", "http://")
    # Go says 400 and resets: which of the two arrives first is chance
    for url, words in (
        (None, "certificate"),
        (plain, r"answers 400, but not|ended the connection"),
    ):
        one = desk(openbao_tls, role.auth, environment=role.environment)
        one.url = url or one.url
        source = one.source("x/y")
        error = one.fails(SourceUnavailable, lambda source=source: source.issue(""))  # type: ignore[misc]
        assert re.search(words, error.message)


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
def test_an_identity_of_aws_logs_in(
    openbao: OpenBao,
    guarded: Guarded,
    desk: Open,
    region: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By a signature that is checked as STS does."""
    path, policy, value = guarded
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token")
    auth = {"method": "aws", "role": "kb", "region": region, "server_id": "v.example.com"}
    with AwsLogin(
        openbao, region=region, server_id="v.example.com", session_token="session-token"
    ) as aws:
        aws.role("kb", [policy])
        assert desk(openbao, auth, url=aws.url).source(path).issue("").secret == value
        for changes, words in (
            ({"server_id": "w.example.com"}, "wants another server_id"),
            ({"role": "none"}, "has no such role"),
        ):
            one = desk(openbao, {**auth, **changes}, url=aws.url)
            source = one.source(path)
            error = one.fails(SourceDenied, lambda source=source: source.issue(""))  # type: ignore[misc]
            assert words in error.message
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        one = desk(openbao, auth, url=aws.url)
        source = one.source(path)
        error = one.fails(SourceDenied, lambda: source.issue(""))
        assert "heard from AWS that the signature is not valid" in error.message


def test_a_namespace_is_part_of_the_place(openbao: OpenBao, desk: Open) -> None:
    """Login and path are in it; without it nothing is there."""
    space = openbao.namespace(f"team-{secrets.token_hex(4)}")
    value = key()
    openbao.do("POST", "sys/mounts/kv", {"type": "kv", "options": {"version": "2"}}, space)
    openbao.do("POST", "kv/data/llm", {"data": {"key": value}}, space)
    rules = json.dumps({"path": {"kv/data/llm": {"capabilities": ["read"]}}})
    openbao.do("PUT", "sys/policies/acl/llm", {"policy": rules}, space)
    openbao.do("POST", "sys/auth/userpass", {"type": "userpass"}, space)
    user = {"password": "right-horse", "token_policies": ["llm"]}
    openbao.do("POST", "auth/userpass/users/ada", user, space)
    auth = {"method": "userpass", "username": "ada", "password": {"env": "KB_PASSWORD"}}
    environment = {"KB_PASSWORD": "right-horse"}
    one = desk(openbao, auth, environment=environment, namespace=space)
    assert one.source("kv/data/llm").issue("").secret == Secret(value)
    gone = desk(openbao, auth, environment=environment, namespace="nowhere")
    source = gone.source("kv/data/llm")
    gone.fails(SourceInvalid, lambda: source.issue(""))


@pytest.mark.parametrize("by", ["socket", "url"])
def test_an_agent_is_a_way_in(
    openbao: OpenBao, guarded: Guarded, database: Database, desk: Open, by: str
) -> None:
    """It logs in; what is leased through it ends with its token."""
    path, policy, value = guarded
    creds = database.dynamic_role(f"agent_{by}")
    leases = openbao.policy(f"agent-{by}", {creds: ["read"], **LEASES})
    name = f"agent-{by}"
    role_id, secret_id = openbao.approle(name, [policy, leases], name, token_ttl="90s")
    with Agent(openbao, role_id, secret_id, mount=name) as agent:
        url = f"unix:{agent.socket}" if by == "socket" else agent.url
        one = desk(openbao, {"method": "agent"}, url=url)
        assert one.source(path).issue("").secret == value
        source = one.source(creds, engine="dynamic", field="password")
        lease = source.issue("").lease
        assert near(lease.expires_at, seconds=90)
        assert lease.session
        source.revoke(source.renew(lease))


# A cluster.


def test_a_cluster_is_read_while_its_leader_is_killed(cluster: Cluster, desk: Open) -> None:
    """No read fails: another node answers; and nothing is taken for the end of a token."""
    leader = cluster.wait_for_leader()
    kv = leader.kv()
    value = key()
    kv.put("llm", key=value)
    role = approle(leader, reading(kv, "llm"))
    cluster.wait_for_standbys(kv.path("llm"))
    nodes = [node.url for node in cluster.standbys()]
    one = desk(leader, role.auth, environment=role.environment, nodes=nodes)
    source = one.source(kv.path("llm"))
    assert source.issue("").secret == Secret(value)
    token = one.session(kv.path("llm")).secret
    assert token is not None
    alone = {"X-Vault-No-Request-Forwarding": "true"}
    for node in cluster.standbys():  # one that has not heard of a token yet asks the leader
        ask = partial(node.ask, "GET", kv.path("llm"), token=token.reveal(), headers=alone)
        assert wait_until(lambda ask=ask: ask().status == 200, 10)  # type: ignore[misc]
    leader.kill()
    try:
        for _ in range(20):
            assert source.issue("").secret == Secret(value)
            time.sleep(0.1)
    finally:
        leader.start()
        cluster.wait_for_leader()
    assert cluster.leader().count(role.login) == 1


def test_an_old_lease_is_no_concern_of_a_new_process(openbao: OpenBao, desk: Open) -> None:
    """One that ended long ago is not asked about, though the server may be gone."""
    role = approle(openbao, LEASES)
    one = desk(openbao, role.auth, environment=role.environment, url="http://127.0.0.1:9")
    at = datetime.now(UTC) - timedelta(hours=2)
    lease = Lease("database/creds/x/y", "vault", at, at + timedelta(hours=1), revocable=True)
    one.source("database/creds/x", engine="dynamic").revoke(lease)


FAULTS = {
    "drops": DropBeforeCommit(),
    "resets": Reset(),
    "hangs": Hang(),
    "trickles": TrickleBody(0.2),
    "cuts off": Truncated(),
    "portal": Html(),
    "bad gateway": Html(502),
    "garbage": GarbageJson(),
    "never ends": Huge(),
    "redirects": Redirect("http://127.0.0.1:9/v1/x", 307),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way_costs_one_call(openbao: OpenBao, name: str) -> None:
    """Between us and a real server: it is said, within the time-out, and the next call works."""
    kv = openbao.kv()
    value = key()
    kv.put("llm", key=value)
    policy = openbao.policy(kv.mount, reading(kv, "llm"))
    token = openbao.new_token([policy, "default"])["client_token"]
    with Faults(openbao.url) as between:
        one = profile(between.url, kv.path("llm"), timeout="1s")
        source = sources.build(one, {"KB_TOKEN": token}, Held())
        assert source.issue("").secret == Secret(value)
        between.next(FAULTS[name])
        began = time.monotonic()
        with pytest.raises(SourceError) as caught:
            source.issue("")
        assert time.monotonic() - began < 3
        assert token not in f"{caught.value.message} {caught.value.hint}"
        assert caught.value.message.startswith("vault: 127.0.0.1:")
        assert not caught.value.withdrawn
        assert source.issue("").secret == Secret(value)
        source.close()


def test_what_a_standby_answers_too_late_is_told_by_when_it_was_written(cluster: Cluster) -> None:
    """Right after a write it has the version before: its time is the earlier one."""
    leader = cluster.wait_for_leader()
    kv = leader.kv()
    kv.put("llm", key=key())
    policy = leader.policy(kv.mount, reading(kv, "llm"))
    token = leader.new_token([policy, "default"])["client_token"]
    cluster.wait_for_standbys(kv.path("llm"))
    standby = cluster.standbys()[0]
    both = [
        sources.build(profile(url, kv.path("llm")), {"KB_TOKEN": token}, Held())
        for url in (standby.url, leader.url)
    ]
    assert wait_until(lambda: _reads(both[0]), 10)
    for _ in range(20):
        value = key()
        kv.put("llm", key=value)
        behind, ahead = (source.issue("") for source in both)
        assert ahead.secret == Secret(value)
        assert behind.lease.written_at is not None
        assert ahead.lease.written_at is not None
        if behind.secret != ahead.secret:
            assert behind.lease.written_at < ahead.lease.written_at
            break
        assert behind.lease.written_at == ahead.lease.written_at
    else:
        raise AssertionError("the standby was never behind")
    for source in both:
        source.close()


def _reads(source: Source) -> bool:
    """Whether a server has heard of a token."""
    try:
        source.issue("")
    except SourceError:
        return False
    return True
