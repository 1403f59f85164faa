"""Sessions of Vault: one login in the life of a token, and what each refusal means."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker.credential import Secret, Session
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.sources.held import Held
from keybroker.sources.http import Reply
from keybroker.sources.vault.login import (
    LONGEST_BACKOFF,
    MOST_REFUSALS,
    Login,
    is_alive,
    is_due,
    is_old,
    token_of,
)
from keybroker.sources.vault.methods import METHODS
from keybroker.sources.vault.server import Server
from keybroker.values import replace
from keybroker.vault import AUTH, Vault, host_of
from keybroker.wire import one_line
from tests.scripted import (
    CANARY,
    DENIED,
    TOKEN,
    Answer,
    Script,
    fails,
    granted,
    looked,
    refused,
    table,
)
from tests.test_http import Authority
from tests.test_http import authority as authority
from tests.test_reference import private

PATH = "secret/data/llm/key"
SELF = "auth/token/lookup-self"
RENEW = "auth/token/renew-self"
GOOD = Answer(200, {"request_id": "r", "data": {}})
FORBIDDEN = Answer(403, DENIED)
NOON = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
OTHER = f"{TOKEN}-2"
APPROLE = {"method": "approle", "role_id": "r1", "secret_id": {"env": "KB_SECRET_ID"}}
ENVIRONMENT = {
    "KB_SECRET_ID": f"{CANARY}secret-id",
    "KB_TOKEN": TOKEN,
    "KB_JWT": f"{CANARY}.jwt",
    "KB_PASSWORD": f"{CANARY}password",
}


@dataclass
class Desk:
    """A login in front of a script, and what it holds."""

    script: Script
    vault: Vault
    login: Login
    held: Held
    environment: dict[str, str]
    server: Server

    def read(self, **how: Any) -> Reply:
        return self.login.ask(lambda client: client.read(PATH), PATH, "read", **how)

    @property
    def session(self) -> Session:
        return self.held.get(self.vault.session)

    def hold(self, **changes: Any) -> None:
        """Have the session as it would be at another time."""
        self.held.put(replace(self.session, **changes))

    def aged(self, age: timedelta) -> None:
        """Make the session older."""
        session = self.session
        moved = {
            name: value - age
            for name in ("issued_at", "expires_at", "renewed_at", "not_before")
            if (value := getattr(session, name)) is not None
        }
        self.hold(**moved)


@dataclass
class Desks:
    """Makes desks, and closes them."""

    script: Script
    made: list[Desk] = field(default_factory=list)

    def __call__(self, auth: Mapping[str, Any] = APPROLE, **more: Any) -> Desk:
        vault = table(self.script.url, auth, **more)
        server, held, environment = Server(vault, 4.0), Held(), dict(ENVIRONMENT)
        login = Login(vault, server, environment, held)
        self.made.append(Desk(self.script, vault, login, held, environment, server))
        return self.made[-1]


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as script:
        script.says(PATH, GOOD)
        script.says("auth/approle/login", granted())
        yield script


@pytest.fixture
def desks(script: Script) -> Iterator[Desks]:
    made = Desks(script)
    yield made
    for desk in made.made:
        desk.server.close()


# One login.


def test_one_login_is_enough_for_many_calls(desks: Desks) -> None:
    """The token is held, and handed back once."""
    desk = desks()
    for _ in range(3):
        assert desk.read().status == 200
    assert desk.script.paths() == ["auth/approle/login", PATH, PATH, PATH]
    assert [one.token for one in desk.script.asked] == [None, TOKEN, TOKEN, TOKEN]
    [session] = desk.held.changed()
    assert session.secret == Secret(TOKEN)
    assert session.key == desk.vault.session
    assert desk.held.changed() == []


def test_a_session_that_was_handed_over_is_used(desks: Desks) -> None:
    """A worker that starts anew does not log in anew."""
    desk = desks()
    now = datetime.now(UTC)
    session = Session(
        desk.vault.session,
        serial=9,
        secret=Secret(OTHER),
        issued_at=now,
        expires_at=now + timedelta(hours=1),
    )
    desk.held.take(session)
    desk.read()
    assert [one.token for one in desk.script.asked] == [OTHER]


def test_what_ends_and_when_is_read_off_the_login(desks: Desks, script: Script) -> None:
    """The life of a token counts from before the login was asked for."""
    script.says("auth/approle/login", granted(seconds=90, renewable=False))
    desk = desks()
    before = datetime.now(UTC)
    desk.read()
    session = desk.session
    assert session.issued_at is not None
    assert before <= session.issued_at <= datetime.now(UTC)
    assert session.expires_at == session.issued_at + timedelta(seconds=90)
    assert not session.renewable


def test_a_token_without_an_end_has_none(desks: Desks, script: Script) -> None:
    """And is not renewed either."""
    script.says("auth/approle/login", granted(seconds=0))
    desk = desks()
    desk.read()
    assert (desk.session.expires_at, desk.session.renewable) == (None, False)


@pytest.mark.parametrize("token", ["", None, "two words", 5])
def test_a_login_without_a_token_is_none(desks: Desks, script: Script, token: Any) -> None:
    """Such as one that asks for a second factor."""
    script.says("auth/approle/login", granted(token=token))
    error = fails(SourceInvalid, desks().read)
    assert "second factor" in str(error.hint)


def test_a_login_that_got_lost_made_no_key(desks: Desks, script: Script) -> None:
    """It is not sent twice, and what it was for is known not to have been done."""
    script.says("auth/approle/login", Answer(504, "<html>"))
    desk = desks()
    error = fails(SourceUnavailable, lambda: desk.read(makes=True, leases=True))
    assert isinstance(error, SourceError)
    assert (error.unknown, error.over) == (False, False)
    assert script.paths() == ["auth/approle/login"]


# Renewals.


def test_a_token_is_renewed_when_half_of_its_life_is_over(desks: Desks, script: Script) -> None:
    """By as much as it was given, before the call that it is for."""
    script.says(RENEW, granted(seconds=3600))
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=29))
    desk.read()
    assert RENEW not in script.paths()
    desk.aged(timedelta(minutes=2))
    desk.read()
    desk.read()
    assert script.paths()[2:] == [PATH, RENEW, PATH, PATH]
    assert script.asked[3].body == {"increment": "3600s"}
    session = desk.session
    assert session.renewed_at is not None
    assert session.expires_at == session.renewed_at + timedelta(hours=1)
    assert session.renewable


def test_a_renewal_that_is_cut_short_is_the_last(desks: Desks, script: Script) -> None:
    """There is a maximum behind it; the token is used to its end, then there is another login."""
    script.says(RENEW, granted(seconds=600))
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=31))
    desk.read()
    assert not desk.session.renewable
    desk.aged(timedelta(minutes=6))
    desk.read()
    desk.aged(timedelta(minutes=5))
    desk.read()
    asked = [one for one in script.paths() if one != PATH]
    assert asked == ["auth/approle/login", RENEW, "auth/approle/login"]


@pytest.mark.parametrize(
    "answer",
    [
        refused(400, "lease is not renewable"),
        refused(400, "batch tokens cannot be renewed"),
        refused(500, "1 error occurred:\n\t* past the max TTL, cannot renew\n\n"),
        Answer(200, {"request_id": "r", "auth": None, "data": {}}),
    ],
)
def test_a_token_that_cannot_be_renewed_is_used_to_its_end(
    desks: Desks, script: Script, answer: Answer
) -> None:
    """500 "past the max TTL" looks as if it would pass, and is final."""
    script.says(RENEW, answer)
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=31))
    desk.read()
    desk.read()
    assert script.paths()[2:] == [RENEW, PATH, PATH]
    assert not desk.session.renewable


def test_a_policy_without_renew_self_is_no_reason_to_log_in(desks: Desks, script: Script) -> None:
    """A 403 of a token that is alive: the policy."""
    script.says(RENEW, FORBIDDEN)
    script.says(SELF, looked())
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=31))
    desk.read()
    desk.read()
    assert script.paths()[2:] == [RENEW, SELF, PATH, PATH]


def test_a_token_found_dead_at_its_renewal_is_replaced(desks: Desks, script: Script) -> None:
    """A 403 of a token that is gone: somebody revoked it."""
    script.says(RENEW, FORBIDDEN)
    script.says(SELF, FORBIDDEN)
    desk = desks()
    desk.read()
    script.says("auth/approle/login", granted(OTHER))
    desk.aged(timedelta(minutes=31))
    desk.read()
    assert script.paths()[2:] == [RENEW, SELF, "auth/approle/login", PATH]
    assert script.asked[-1].token == OTHER


def test_a_renewal_that_fails_is_tried_again_later(desks: Desks, script: Script) -> None:
    """The token is alive: what it is for goes on, and not each call begins with a renewal."""
    script.says(RENEW, refused(503, "x"))
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=31))
    desk.read()
    desk.read()
    assert script.paths()[2:] == [RENEW, PATH, PATH]
    desk.aged(timedelta(seconds=2))
    script.says(RENEW, granted())
    desk.read()
    assert script.paths()[5:] == [RENEW, PATH]
    assert (desk.session.failures, desk.session.not_before) == (0, None)


# 403.


def test_a_token_that_is_gone_is_replaced_and_the_call_made_again(
    desks: Desks, script: Script
) -> None:
    """Once."""
    desk = desks()
    desk.read()
    script.says(PATH, FORBIDDEN, GOOD)
    script.says(SELF, FORBIDDEN)
    script.says("auth/approle/login", granted(OTHER))
    assert desk.read().status == 200
    assert script.paths()[2:] == [PATH, SELF, "auth/approle/login", PATH]
    assert desk.session.secret == Secret(OTHER)


def test_a_policy_that_forbids_is_said_with_what_to_add(desks: Desks, script: Script) -> None:
    """lookup-self tells it from a token that is gone; nobody logs in for it."""
    script.says(PATH, FORBIDDEN)
    script.says(SELF, looked())
    desk = desks()
    error = fails(SourceDenied, desk.read)
    assert error.message == f"vault: 127.0.0.1:{script.port}: the token may not read {PATH}"
    assert error.hint == f'add to its policy: path "{PATH}" {{ capabilities = ["read"] }}'
    assert script.paths() == ["auth/approle/login", PATH, SELF]


def test_where_a_token_may_not_look_at_itself_nobody_logs_in_each_time(
    desks: Desks, script: Script
) -> None:
    """A new token that is refused as well says that it is the policy; for a while it counts."""
    script.says(PATH, FORBIDDEN)
    script.says(SELF, FORBIDDEN)
    desk = desks()
    for _ in range(4):
        fails(SourceDenied, desk.read)
    assert script.paths().count("auth/approle/login") == 2
    desk.aged(LONGEST_BACKOFF)
    fails(SourceDenied, desk.read)
    assert script.paths().count("auth/approle/login") == 3


def test_whether_it_is_the_token_may_not_be_known(desks: Desks, script: Script) -> None:
    """Who cannot be asked leaves it open; nothing is given up."""
    script.says(PATH, FORBIDDEN)
    script.says(SELF, refused(503, "Vault is sealed"))
    desk = desks()
    fails(SourceUnavailable, desk.read)
    assert desk.session.secret == Secret(TOKEN)


# Failures.


def test_a_login_that_was_refused_is_not_tried_again_soon(desks: Desks, script: Script) -> None:
    """The same error is said without a request, until its time is over."""
    script.says("auth/approle/login", refused(400, "invalid role or secret ID"))
    desk = desks()
    first = fails(SourceDenied, desk.read)
    again = fails(SourceDenied, desk.read)
    assert (again.message, again.hint) == (first.message, first.hint)
    assert script.paths() == ["auth/approle/login"]
    session = desk.session
    assert (session.secret, session.failures) == (None, 1)
    assert session.not_before is not None
    assert session.not_before > datetime.now(UTC) + LONGEST_BACKOFF - timedelta(seconds=5)
    desk.aged(LONGEST_BACKOFF)
    fails(SourceDenied, desk.read)
    assert script.paths() == ["auth/approle/login"] * 2


def test_a_login_that_failed_is_tried_again_ever_later(desks: Desks, script: Script) -> None:
    """After 1, 2, 4 seconds and so on, and at least every five minutes."""
    script.says("auth/approle/login", refused(503, "Vault is sealed"))
    desk = desks()
    waits = []
    for _ in range(11):
        fails(SourceUnavailable, desk.read)
        again = fails(SourceUnavailable, desk.read)
        assert isinstance(again, SourceError)
        assert again.retry_after is not None
        waits.append(round(again.retry_after.total_seconds()))
        desk.aged(LONGEST_BACKOFF)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert len(script.asked) == 11


def test_a_server_that_asks_to_wait_is_given_what_it_asks(desks: Desks, script: Script) -> None:
    """Its wish counts where it is longer."""
    script.says("auth/approle/login", Answer(429, {"errors": ["quota"]}, {"Retry-After": "60"}))
    desk = desks()
    fails(SourceUnavailable, desk.read)
    again = fails(SourceUnavailable, desk.read)
    assert isinstance(again, SourceError)
    assert again.retry_after is not None
    assert again.retry_after > timedelta(seconds=55)


def test_other_material_is_tried_at_once(desks: Desks, script: Script) -> None:
    """Somebody put a new secret_id there."""
    script.says("auth/approle/login", refused(400, "invalid role or secret ID"), granted())
    desk = desks()
    fails(SourceDenied, desk.read)
    desk.environment["KB_SECRET_ID"] = f"{CANARY}new"
    desk.read()
    assert script.asked[1].body["secret_id"] == f"{CANARY}new"
    assert (desk.session.failures, desk.session.trouble) == (0, None)


def test_a_rest_by_a_clock_that_was_wrong_is_none(desks: Desks, script: Script) -> None:
    """The clock was a day ahead when a login failed, and is right again."""
    script.says("auth/approle/login", refused(400, "invalid role or secret ID"), granted())
    desk = desks()
    fails(SourceDenied, desk.read)
    desk.aged(-timedelta(days=1))
    assert desk.read().status == 200


def test_a_session_that_the_broker_cleared_is_tried_at_once(desks: Desks, script: Script) -> None:
    """After a reload, say."""
    script.says("auth/approle/login", refused(400, "invalid role or secret ID"), granted())
    desk = desks()
    fails(SourceDenied, desk.read)
    cleared = replace(desk.session, serial=99, failures=0, not_before=None, trouble=None)
    desk.held.take(cleared)
    assert desk.read().status == 200


@pytest.mark.parametrize("method", ["userpass", "ldap"])
def test_a_wrong_password_is_tried_twice_and_never_again(
    desks: Desks, script: Script, method: str
) -> None:
    """A few more would lock the user, for whom the right one would then be wrong as well."""
    login = f"auth/{method}/login/ada"
    script.says(login, refused(400, "invalid username or password"))
    desk = desks({"method": method, "username": "ada", "password": {"env": "KB_PASSWORD"}})
    for _ in range(5):
        error = fails(SourceDenied, desk.read)
        desk.aged(timedelta(days=1))
    assert script.paths() == [login] * MOST_REFUSALS
    assert "not tried again" in str(error.hint)
    assert "env:KB_PASSWORD" in str(error.hint)
    desk.environment["KB_PASSWORD"] = f"{CANARY}right"
    script.says(login, granted())
    assert desk.read().status == 200


def test_a_server_that_is_down_does_not_count_as_a_wrong_password(
    desks: Desks, script: Script
) -> None:
    """Only refusals do, in a row."""
    login = "auth/ldap/login/ada"
    script.says(login, refused(400, "error connecting to host ldap://127.0.0.1"))
    desk = desks({"method": "ldap", "username": "ada", "password": {"env": "KB_PASSWORD"}})
    for _ in range(4):
        fails(SourceUnavailable, desk.read)
        desk.aged(timedelta(days=1))
    script.says(login, refused(400, "ldap operation failed: failed to bind as user"))
    fails(SourceDenied, desk.read)
    assert desk.session.failures == 1


def test_material_that_is_not_there_is_the_configurations_fault(desks: Desks) -> None:
    """Nothing is asked for."""
    desk = desks()
    del desk.environment["KB_SECRET_ID"]
    assert "KB_SECRET_ID" in fails(ConfigError, desk.read).message
    assert desk.script.asked == []


# Leases.


def test_nothing_is_leased_with_a_token_near_its_end(desks: Desks, script: Script) -> None:
    """What is leased ends with it: past half of a life that cannot be prolonged, log in."""
    script.says("auth/approle/login", granted(renewable=False), granted(OTHER))
    desk = desks()
    desk.read(leases=True)
    desk.aged(timedelta(minutes=29))
    desk.read(leases=True)
    desk.aged(timedelta(minutes=2))
    desk.read()
    assert script.paths().count("auth/approle/login") == 1, "reading needs no longer life"
    desk.read(leases=True)
    assert script.paths().count("auth/approle/login") == 2
    assert script.asked[-1].token == OTHER
    assert desk.login.used.secret == Secret(OTHER)


def test_where_no_other_token_is_to_be_had_the_old_one_will_do(
    desks: Desks, script: Script
) -> None:
    """It is alive: a short lease is better than none, and the login is not tried each time."""
    login = "auth/approle/login"
    script.says(login, granted(renewable=False), refused(400, "invalid role or secret ID"))
    desk = desks()
    desk.read()
    desk.aged(timedelta(minutes=31))
    for _ in range(3):
        assert desk.read(leases=True).status == 200
    assert script.paths().count(login) == 2
    assert {one.token for one in script.asked if one.path.endswith(PATH)} == {TOKEN}


# Each method.

JWT = {"method": "jwt", "role": "kb", "jwt": {"env": "KB_JWT"}}
USERPASS = {"method": "userpass", "username": "ada/l", "password": {"env": "KB_PASSWORD"}}
SENT: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "approle": (
        APPROLE,
        "auth/approle/login",
        {"role_id": "r1", "secret_id": f"{CANARY}secret-id"},
    ),
    "approle without secret_id": (
        {"method": "approle", "role_id": {"env": "KB_SECRET_ID"}, "mount": "team/roles"},
        "auth/team/roles/login",
        {"role_id": f"{CANARY}secret-id"},
    ),
    "jwt": (JWT, "auth/jwt/login", {"role": "kb", "jwt": f"{CANARY}.jwt"}),
    "jwt of the default role": (
        {"method": "jwt", "jwt": {"env": "KB_JWT"}, "mount": "ci"},
        "auth/ci/login",
        {"jwt": f"{CANARY}.jwt"},
    ),
    "userpass": (
        USERPASS,
        "auth/userpass/login/ada%2Fl",
        {"password": f"{CANARY}password"},
    ),
    "ldap": (
        {**USERPASS, "method": "ldap", "username": "ada l", "mount": "corp"},
        "auth/corp/login/ada%20l",
        {"password": f"{CANARY}password"},
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_a_login_is_sent_as_its_method_wants_it(desks: Desks, script: Script, name: str) -> None:
    """Where it is mounted, with what it needs, and with no token."""
    auth, path, body = SENT[name]
    script.says(path, granted())
    desks(auth).read()
    login = script.asked[0]
    assert (login.method, login.path, login.body) == ("POST", f"/v1/{path}", body)
    assert login.token is None


def test_every_method_of_the_configuration_is_known() -> None:
    """Two of them are no login: a token that is there, and an agent that adds its own."""
    assert {*METHODS, "token", "agent"} == set(AUTH)


def test_a_projected_token_is_read_anew_and_may_be_open_to_others(
    desks: Desks, script: Script, tmp_path: Path
) -> None:
    """Kubernetes replaces the file, which is readable by all in the container."""
    path = private(tmp_path / "token", f"{CANARY}one", 0o644)
    script.says("auth/k8s/login", granted(seconds=60, renewable=False))
    auth = {"method": "kubernetes", "role": "kb", "token_path": str(path), "mount": "k8s"}
    desk = desks(auth)
    desk.read()
    path.write_text(f"{CANARY}two\n")
    desk.aged(timedelta(minutes=1))
    desk.read()
    sent = [one.body for one in script.asked if "login" in one.path]
    assert sent == [{"role": "kb", "jwt": f"{CANARY}{n}"} for n in ("one", "two")]
    path.unlink()
    desk.aged(timedelta(minutes=1))
    assert str(path) in fails(ConfigError, desk.read).message


def test_a_token_of_ci_may_be_in_a_file_open_to_others(
    desks: Desks, script: Script, tmp_path: Path
) -> None:
    """A platform puts it there so; a secret_id is our own to protect."""
    path = private(tmp_path / "jwt", f"{CANARY}jwt", 0o644)
    script.says("auth/jwt/login", granted())
    desks({"method": "jwt", "jwt": {"file": str(path)}}).read()
    bad = desks({**APPROLE, "secret_id": {"file": str(path)}})
    assert "others can read it" in fails(ConfigError, bad.read).message


def test_a_certificate_is_the_login(
    desks: Desks, script: Script, authority: Authority, tmp_path: Path
) -> None:
    """Its role is sent if there is one; another certificate is tried at once."""
    chain = authority.pem.with_name("chain.pem").read_text()
    pem = private(tmp_path / "me.pem", chain)
    mine = {"client_cert": str(pem), "client_key": str(pem)}
    script.says("auth/cert/login", refused(400, "invalid certificate or no client certificate"))
    desk = desks({"method": "cert", "name": "web"}, **mine)
    assert "refused our certificate" in fails(SourceDenied, desk.read).message
    fails(SourceDenied, desk.read)
    assert [one.body for one in script.asked] == [{"name": "web"}]
    pem.write_text(f"another\n{chain}")
    script.says("auth/cert/login", granted())
    assert desk.read().status == 200


def test_an_identity_of_aws_is_a_signed_question(
    desks: Desks, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Vault sends it on to AWS; what signs it stays here."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": f"{CANARY}key",
        "AWS_SESSION_TOKEN": f"{CANARY}session",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    script.says("auth/aws/login", granted())
    desks({"method": "aws", "role": "kb", "region": "eu-west-1", "server_id": "v1"}).read()
    body = script.asked[0].body
    headers = json.loads(base64.b64decode(body["iam_request_headers"]))
    assert body["role"] == "kb"
    assert base64.b64decode(body["iam_request_url"]) == b"https://sts.eu-west-1.amazonaws.com/"
    assert b"GetCallerIdentity" in base64.b64decode(body["iam_request_body"])
    assert headers["X-Vault-AWS-IAM-Server-ID"] == ["v1"]
    assert headers["X-Amz-Security-Token"] == [f"{CANARY}session"]
    assert "Credential=AKIATEST/" in headers["Authorization"][0]
    assert "/eu-west-1/sts/" in headers["Authorization"][0]
    assert f"{CANARY}key" not in json.dumps([body, headers])


def test_credentials_that_aws_lends_anew_are_no_reason_to_try_again(
    desks: Desks, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are others each hour, and of the same identity."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    script.says("auth/aws/login", refused(400, "IAM Principal arn:x does not belong to the role"))
    desk = desks({"method": "aws", "role": "kb"})
    for secret in ("one", "two", "three"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}{secret}")
        fails(SourceDenied, desk.read)
    assert script.paths() == ["auth/aws/login"]


def test_no_credentials_of_aws_is_the_configurations_fault(
    desks: Desks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So is a profile that is not there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no credentials" in fails(ConfigError, desks({"method": "aws"}).read).message
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "cannot be read" in fails(ConfigError, desks({"method": "aws"}).read).message


# Refusals.

REFUSED: list[tuple[dict[str, Any], Answer, type[KeybrokerError], str, str]] = [
    (
        APPROLE,
        refused(400, "invalid role or secret ID"),
        SourceDenied,
        "refused role_id or secret_id",
        "wrong, expired or used up: put a new secret_id into env:KB_SECRET_ID",
    ),
    (
        APPROLE,
        refused(400, 'source address "10.0.0.1" unauthorized by CIDR restrictions on the role'),
        SourceDenied,
        "does not let this address log in",
        "CIDR",
    ),
    (
        APPROLE,
        FORBIDDEN,
        SourceDenied,
        "lets nobody in: the user is locked, or nothing is mounted at auth/approle",
        "auth list",
    ),
    (APPROLE, refused(404, "namespace not found"), SourceInvalid, "no such namespace", "namespace"),
    (APPROLE, refused(405, "unsupported operation"), SourceInvalid, "(405)", "bao write auth"),
    (
        USERPASS,
        refused(400, "invalid username or password"),
        SourceDenied,
        "refused the name or the password",
        "env:KB_PASSWORD",
    ),
    (
        {**USERPASS, "method": "ldap"},
        refused(400, "ldap operation failed: failed to bind as user"),
        SourceDenied,
        "refused the name or the password",
        "env:KB_PASSWORD",
    ),
    (
        {**USERPASS, "method": "ldap"},
        refused(400, 'error connecting to host "ldap://127.0.0.1:1389"'),
        SourceUnavailable,
        "cannot reach its LDAP server",
        "",
    ),
    (
        JWT,
        refused(400, "error validating token: validation failed: token is expired"),
        SourceDenied,
        "finds the token expired",
        "newer one into env:KB_JWT",
    ),
    (
        JWT,
        refused(400, "error validating claims: token not yet valid"),
        SourceUnavailable,
        "not valid yet",
        "clocks",
    ),
    (
        JWT,
        refused(400, "error validating token: invalid audience (aud) claim: does not match"),
        SourceDenied,
        "audience",
        "bound_audiences",
    ),
    (JWT, refused(400, 'role "kb" could not be found'), SourceDenied, "has no such role", "role"),
    (
        JWT,
        refused(400, "error verifying token signature: no known key successfully validated"),
        SourceDenied,
        "cannot verify the token",
        "env:KB_JWT",
    ),
    (
        JWT,
        refused(400, "error verifying token: fetching keys oidc: get keys failed"),
        SourceUnavailable,
        "cannot ask who made the token",
        "",
    ),
    (
        JWT,
        refused(400, 'error validating claims: claim "project" does not match associated bound'),
        SourceDenied,
        "does not take what the token says",
        "bound claims",
    ),
    (
        {"method": "kubernetes", "role": "kb", "token_path": __file__},
        FORBIDDEN,
        SourceUnavailable,
        "refused the login, or cannot ask Kubernetes",
        "service account",
    ),
    (
        {"method": "token", "token": {"env": "KB_TOKEN"}},
        FORBIDDEN,
        SourceDenied,
        "refused the token: it has ended",
        "env:KB_TOKEN",
    ),
]
PLACES = {
    "approle": "auth/approle/login",
    "userpass": "auth/userpass/login/ada%2Fl",
    "ldap": "auth/ldap/login/ada%2Fl",
    "jwt": "auth/jwt/login",
    "kubernetes": "auth/kubernetes/login",
    "token": SELF,
}


@pytest.mark.parametrize(
    ("auth", "answer", "kind", "words", "hint"),
    REFUSED,
    ids=[f"{row[0]['method']}: {row[3][:30]}" for row in REFUSED],
)
def test_a_refusal_is_said_in_words_of_ours(
    desks: Desks,
    script: Script,
    tmp_path: Path,
    auth: dict[str, Any],
    answer: Answer,
    kind: type[KeybrokerError],
    words: str,
    hint: str,
) -> None:
    """What passes by itself is unavailable; for the rest somebody has to do what the hint says."""
    if auth["method"] == "kubernetes":
        auth = {**auth, "token_path": str(private(tmp_path / "token", f"{CANARY}t"))}
    script.says(PLACES[auth["method"]], answer)
    if auth["method"] == "token":  # what it reads tells whether it is alive
        script.says(PATH, answer)
    script.otherwise = answer
    error = fails(kind, desks(auth).read)
    assert error.message.startswith(f"vault: 127.0.0.1:{script.port}: ")
    assert words in error.message
    assert hint in (error.hint or "")


AWS_REFUSED = {
    "error making upstream request: received error code 403 from STS": SourceDenied,
    "error making upstream request: dial tcp: connection refused": SourceUnavailable,
    "error validating X-Vault-AWS-IAM-Server-ID header: missing header": SourceDenied,
    'IAM Principal "arn:aws:iam::1:user/a" does not belong to the role "kb"': SourceDenied,
    "entry for role kb not found": SourceDenied,
}


@pytest.mark.parametrize("text", AWS_REFUSED)
def test_a_refusal_of_aws_or_of_its_identity(
    desks: Desks, script: Script, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """AWS that is down passes."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}key")
    script.says("auth/aws/login", refused(400, text))
    error = fails(AWS_REFUSED[text], desks({"method": "aws"}).read)
    assert "(400)" not in error.message, "there are words for it"


# Wrapped secret_ids.

WRAPPED = {**APPROLE, "wrapped_by": "auth/approle/role/kb/secret-id"}
LOOKUP, UNWRAP = "sys/wrapping/lookup", "sys/wrapping/unwrap"


def made_at(path: str) -> Answer:
    return Answer(200, {"request_id": "r", "data": {"creation_path": path}})


@pytest.fixture
def wrapping(script: Script) -> Script:
    script.says(LOOKUP, made_at("auth/approle/role/kb/secret-id"))
    script.says(
        UNWRAP,
        Answer(200, {"request_id": "r", "data": {"secret_id": f"{CANARY}unwrapped"}}),
        refused(400, "wrapping token is not valid or does not exist"),
    )
    return script


def test_a_wrapped_secret_id_is_looked_at_unwrapped_and_kept(
    desks: Desks, wrapping: Script
) -> None:
    """It can be unwrapped once: the next login uses what was in it."""
    desk = desks(WRAPPED)
    desk.read()
    desk.hold(secret=None)
    desk.read()
    login = "auth/approle/login"
    assert wrapping.paths() == [LOOKUP, UNWRAP, login, PATH, login, PATH]
    wrapped = f"{CANARY}secret-id"
    assert (wrapping.asked[0].token, wrapping.asked[0].body) == (None, {"token": wrapped})
    assert (wrapping.asked[1].token, wrapping.asked[1].body) == (wrapped, {})
    assert wrapping.asked[4].body["secret_id"] == f"{CANARY}unwrapped"
    assert desk.session.kept == Secret(f"{CANARY}unwrapped")


def test_what_was_unwrapped_is_kept_though_the_login_fails(desks: Desks, wrapping: Script) -> None:
    """It could not be had again."""
    wrapping.says("auth/approle/login", refused(503, "Vault is sealed"), granted())
    desk = desks(WRAPPED)
    fails(SourceUnavailable, desk.read)
    assert desk.session.kept == Secret(f"{CANARY}unwrapped")
    desk.aged(timedelta(seconds=2))
    assert desk.read().status == 200
    assert wrapping.paths().count(UNWRAP) == 1


def test_one_that_was_made_elsewhere_is_not_unwrapped(desks: Desks, wrapping: Script) -> None:
    """Somebody put another in its place; what is in it would be theirs."""
    wrapping.says(LOOKUP, made_at("auth/approle/role/evil/secret-id"))
    error = fails(SourceDenied, desks(WRAPPED).read)
    assert "not what it should be" in error.message
    assert "find out who had it" in str(error.hint)
    assert wrapping.paths() == [LOOKUP]


@pytest.mark.parametrize("path", [LOOKUP, UNWRAP])
def test_one_that_was_used_may_be_stolen(desks: Desks, wrapping: Script, path: str) -> None:
    """Theft and lateness look alike; nobody goes on as if nothing was."""
    wrapping.says(path, refused(400, "wrapping token is not valid or does not exist"))
    error = fails(SourceDenied, desks(WRAPPED).read)
    assert "unwrapped before" in str(error.hint)
    message = error.message.replace(host_of(wrapping.url), "vault-1.example.com:8200")
    line = one_line(SourceDenied(f"profile-of-a-team: {message}", hint=error.hint))
    assert line.endswith("wrap a new one"), "the helper's line is not cut"


def test_another_wrapping_token_is_unwrapped(desks: Desks, wrapping: Script) -> None:
    """What was kept of the one before is forgotten."""
    desk = desks(WRAPPED)
    desk.read()
    desk.hold(secret=None)
    desk.environment["KB_SECRET_ID"] = f"{CANARY}another"
    fails(SourceDenied, desk.read)
    assert wrapping.asked[-1].token == f"{CANARY}another"
    assert desk.session.kept is None


# A token that is there.


def test_a_token_is_looked_at_once(desks: Desks, script: Script) -> None:
    """For its end, and whether it can be renewed; its life counts from when it was made."""
    script.says(SELF, looked(1200, creation_ttl=3600))
    script.says(RENEW, granted(seconds=3600))
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    desk.read()
    desk.read()
    assert script.paths() == [SELF, RENEW, PATH, PATH], "two thirds of it are over"
    assert script.asked[1].body == {"increment": "3600s"}


def test_a_periodic_token_is_renewed_by_its_period(desks: Desks, script: Script) -> None:
    """Which may be longer than it was made for."""
    script.says(SELF, looked(600, creation_ttl=600, period=1800))
    script.says(RENEW, granted(seconds=1800))
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    desk.read()
    assert script.asked[1].body == {"increment": "1800s"}


def test_a_token_that_is_not_to_be_renewed_is_not(desks: Desks, script: Script) -> None:
    """Somebody else sees to it."""
    script.says(SELF, looked(60, creation_ttl=3600))
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}, "renew": False})
    desk.read()
    assert script.paths() == [SELF, PATH]


def test_a_root_token_has_no_end(desks: Desks, script: Script) -> None:
    """Its ttl is 0."""
    script.says(SELF, looked(0, creation_ttl=0))
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    desk.read(leases=True)
    assert (desk.session.expires_at, desk.session.renewable) == (None, False)


def test_another_token_in_the_file_is_taken_up(
    desks: Desks, script: Script, tmp_path: Path
) -> None:
    """Whoever rotates it need not tell us; the same one is not looked at again."""
    path = private(tmp_path / "token", TOKEN)
    script.says(SELF, looked())
    desk = desks({"method": "token", "token": {"file": str(path)}})
    desk.read()
    desk.read()
    path.write_text(OTHER)
    desk.read()
    desk.read()
    assert script.paths() == [SELF, PATH, PATH, SELF, PATH, PATH]
    assert [one.token for one in script.asked[3:]] == [OTHER] * 3
    path.unlink()
    desk.read()
    assert script.asked[-1].token == OTHER, "what is held is alive"


def test_a_token_that_has_ended_is_said_by_where_it_is(desks: Desks, script: Script) -> None:
    """Nobody can log in anew with it; it is not asked about again and again."""
    script.says(SELF, looked(), FORBIDDEN)
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    desk.read()
    script.says(PATH, FORBIDDEN)
    error = fails(SourceDenied, desk.read)
    assert "refused the token" in error.message
    fails(SourceDenied, desk.read)
    assert script.paths() == [SELF, PATH, PATH, SELF]


def test_a_token_that_may_not_look_at_itself_is_used(desks: Desks, script: Script) -> None:
    """Its policy lacks `default`: how long it lives is not known, and what it reads is."""
    script.says(SELF, FORBIDDEN)
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    desk.read()
    desk.read()
    assert script.paths() == [SELF, PATH, PATH]


def test_a_token_that_ends_this_second_is_no_root_token(desks: Desks, script: Script) -> None:
    """Its ttl is 0, as that of one without an end; it has a time to expire."""
    script.says(SELF, looked(0, expire_time="2026-11-21T12:00:00Z"))
    desk = desks({"method": "token", "token": {"env": "KB_TOKEN"}})
    fails(SourceDenied, desk.read)
    assert PATH not in script.paths()


@pytest.mark.parametrize("kind", ["command", "env"])
def test_what_a_program_prints_anew_each_time_is_no_reason_to_try_again(
    desks: Desks, script: Script, kind: str
) -> None:
    """A token of CI's is another at each look, and as good or bad as the one before."""
    program = ["python3", "-c", "import os; print('jwt' + os.urandom(8).hex())"]
    named = {"command": program} if kind == "command" else {"env": "KB_JWT"}
    login = PLACES["jwt"]
    script.says(login, refused(400, "invalid audience (aud) claim"))
    desk = desks({"method": "jwt", "jwt": named})
    for _ in range(4):
        fails(SourceDenied, desk.read)
    assert script.paths() == [login]


def test_refusals_of_a_password_count_whatever_comes_between(desks: Desks, script: Script) -> None:
    """An outage between two of them does not make it right: the third would lock the user."""
    login = PLACES["userpass"]
    wrong = refused(400, "invalid username or password")
    script.says(login, wrong, refused(503, "Vault is sealed"), wrong, wrong)
    desk = desks({"method": "userpass", "username": "ada/l", "password": {"env": "KB_PASSWORD"}})
    for kind in (SourceDenied, SourceUnavailable, *[SourceDenied] * 4):
        fails(kind, desk.read)
        desk.aged(timedelta(minutes=10))
    assert script.paths().count(login) == 3


# Agents.

AGENT = {"method": "agent"}


def test_an_agent_adds_its_own_token(desks: Desks, script: Script) -> None:
    """None is sent, none is held."""
    desk = desks(AGENT)
    desk.read()
    assert [(one.path, one.token) for one in script.asked] == [(f"/v1/{PATH}", None)]
    assert desk.held.changed() == []


def test_what_is_leased_through_an_agent_ends_with_its_token(desks: Desks, script: Script) -> None:
    """Which is looked at through the agent; another accessor is another token."""
    script.says(SELF, looked(60, accessor="a1"), looked(3600, accessor="a2"))
    desk = desks(AGENT)
    desk.read(leases=True)
    first = desk.login.used
    desk.read(leases=True)
    second = desk.login.used
    assert first.expires_at is not None
    assert first.issued_at is not None
    assert first.expires_at - first.issued_at == timedelta(seconds=60)
    assert token_of(first) != token_of(second)


@pytest.mark.parametrize("answer", [FORBIDDEN, refused(400, "missing client token")])
def test_an_agent_that_is_not_logged_in_is_said(
    desks: Desks, script: Script, answer: Answer
) -> None:
    """It may be, soon."""
    script.says(PATH, answer)
    script.says(SELF, answer)
    error = fails(SourceUnavailable, desks(AGENT).read)
    assert "the agent sends no token" in error.message
    assert "auto_auth" in str(error.hint)


def test_an_agents_policy_is_said(desks: Desks, script: Script) -> None:
    """As any other."""
    script.says(PATH, FORBIDDEN)
    script.says(SELF, looked())
    assert "may not read" in fails(SourceDenied, desks(AGENT).read).message


# The rules.


def session(
    life: float, *, renewed: float | None = None, renewable: bool = True, secret: bool = True
) -> Session:
    """A session of so many seconds from noon, or from its renewal."""
    since = NOON if renewed is None else NOON + timedelta(seconds=renewed)
    return Session(
        "k",
        secret=Secret(TOKEN) if secret else None,
        issued_at=NOON,
        expires_at=since + timedelta(seconds=life),
        renewable=renewable,
        renewed_at=None if renewed is None else since,
    )


@pytest.mark.parametrize(
    ("life", "at", "alive"),
    [
        *[(100, 89, True), (100, 90, False)],  # a tenth
        *[(5, 3.9, True), (5, 4, False)],  # a second
        *[(1, 0.4, True), (1, 0.5, False)],  # never more than half
    ],
)
def test_a_token_is_alive_but_for_a_margin(life: float, at: float, alive: bool) -> None:
    """A call that begins in it must not find it dead."""
    assert is_alive(session(life), NOON + timedelta(seconds=at)) is alive
    assert not is_alive(session(life, secret=False), NOON)


@pytest.mark.parametrize(
    ("one", "at", "due"),
    [
        (session(100), 49, False),
        (session(100), 50, True),
        (session(100, renewable=False), 50, False),
        (session(100, renewed=60), 100, False),
        (session(100, renewed=60), 110, True),
        (Session("k", secret=Secret(TOKEN), renewable=True), 999, False),
    ],
)
def test_a_token_is_due_when_half_is_over(one: Session, at: float, due: bool) -> None:
    """Of what it was last given."""
    assert is_due(one, NOON + timedelta(seconds=at)) is due


@pytest.mark.parametrize(
    ("one", "at", "old"),
    [
        (session(100), 99, False),
        (session(100, renewable=False), 49, False),
        (session(100, renewable=False), 50, True),
        (session(20, renewed=80, renewable=False), 81, True),
        (Session("k", secret=Secret(TOKEN)), 999, False),
    ],
)
def test_a_token_is_old_when_half_of_all_its_life_is_over(
    one: Session, at: float, old: bool
) -> None:
    """Its whole life, where nothing prolongs it any more."""
    assert is_old(one, NOON + timedelta(seconds=at)) is old
