"""LiteLLM's own sign-in, and keys of one's own with it, at a real proxy with people who sign in."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from keybroker import label
from keybroker.cache import find_wrap_key
from keybroker.credential import Secret
from keybroker.document import Where
from keybroker.errors import LoginNeeded, SourceInvalid, SourceUnavailable
from keybroker.login import APART
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import SignIn, file_of, read_login
from keybroker.values import replace
from tests import signing
from tests.contracts import ask
from tests.resident import Resident, fresh_home, until
from tests.servers.browser import Browser
from tests.servers.faults import Faults, Hang, Html, Status
from tests.servers.litellm import LiteLLM
from tests.servers.oidc import Oidc
from tests.servers.upstream import MODEL
from tests.signing import GatewayContract, problem, provider

pytestmark = pytest.mark.servers

REFUSED = Secret("litellm_login_no")  # what the proxy never gave
MESSAGE = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "ping"}]}


@pytest.fixture(scope="module")
def proxy() -> Iterator[LiteLLM]:
    """One proxy for the module: ada, tom and eve are who signs in."""
    with Oidc(3600) as oidc, LiteLLM({"enable_claude_code_gateway": True}, sso=oidc) as server:
        yield server


class TestGateway(GatewayContract):
    """The contract of a gateway, at LiteLLM, which asks nobody to slow down."""

    slow = 5.0

    @pytest.fixture
    def url(self, proxy: LiteLLM) -> str:
        self.proxy = proxy
        return f"{proxy.url}/claude_code_gateway"

    def takes(self, key: str) -> bool:
        path = "/claude_code_gateway/v1/messages"
        taken = ask(self.proxy.url, "POST", path, key, MESSAGE)[0] == 200
        # and by the key API: a source of type litellm can ask with it
        return taken and ask(self.proxy.url, "GET", "/key/list", key)[0] == 200


def configuration(url: str, login: str = "", lifetime: str = "60s", **profiles: str) -> str:
    """A login at the proxy, and profiles that mint with it, each with more of its source."""
    text = f'[logins.corp]\ntype = "litellm"\nurl = "{url}"\n{login}\n'
    for name, source in (profiles or {"work": ""}).items():
        text += f"""
[profiles.{name}]
base_url = "{url}"
helper_ttl = "1s"
hold = "2s"
[profiles.{name}.source]
type = "litellm"
login = "corp"
lifetime = "{lifetime}"
{source}
"""
    return text


PUBLISHED = """
[vault]
address = "http://127.0.0.1:1"
[vault.auth]
method = "token"
token = { file = "/nowhere" }
"""
PUBLISH = """
[profiles.work.publish]
to = "vault"
path = "secret/data/llm"
poll = "1s"
"""


def known(proxy: LiteLLM, person: str, **teams: str) -> None:
    """Have the proxy know somebody before they sign in, in teams."""
    wish = {"user_id": person, "user_email": f"{person}@example.com", "auto_create_key": False}
    proxy.administer("/user/new", {**wish, "user_role": "internal_user"})
    for team, name in teams.items():
        proxy.administer("/team/new", {"team_id": team, "team_alias": name})
        member = {"role": "user", "user_id": person}
        proxy.administer("/team/member_add", {"team_id": team, "member": member})


def owned(proxy: LiteLLM, user: Resident, person: str) -> list[str]:
    """Return the labels of somebody's keys that are of this installation."""
    begins = label.prefix((user.state / "instance").read_text())
    return [
        row["key_alias"]
        for row in proxy.key_rows()
        if (row["key_alias"] or "").startswith(begins) and row["user_id"] == person
    ]


def opened(user: Resident) -> tuple[Store, SignIn]:
    """Open what the sign-in gave, as only this user can."""
    table = tomllib.loads(user.file.read_text())["logins"]["corp"]
    key = find_wrap_key("file", user.state, {}).key
    return Store(user.state, key), read_login("corp", table, Where({}, "test"))


def age(user: Resident, access: Secret | None = None, ends: datetime | None = None) -> Secret:
    """Let a token be older, be another, or end at a time; return the one that it was."""
    store, sign_in = opened(user)
    tokens = store.load(sign_in)
    assert tokens is not None
    standing = tokens.standing
    aged = replace(
        standing,
        refreshed_at=standing.refreshed_at - APART,
        access_ends=ends or standing.access_ends,
    )
    store.save(replace(tokens, access=access or tokens.access, standing=aged))
    return tokens.access


def test_keys_of_one_s_own(resident: Resident, proxy: LiteLLM) -> None:
    """Made, used, replaced, found, swept and revoked by somebody who is no administrator."""
    resident.configure(configuration(proxy.url))
    resident.start()
    done = signing.with_browser(resident, "ada")
    assert done.stdout == "Signed in to corp as ada@example.com. It is renewed by itself.\n"

    first = resident.key("work")
    assert ask(proxy.url, "POST", "/v1/messages", first, MESSAGE)[0] == 200
    [made] = owned(proxy, resident, "ada")
    assert resident.cli("rotate")[0] == 0
    second = resident.key("work")
    assert second != first
    assert ask(proxy.url, "POST", "/v1/messages", second, MESSAGE)[0] == 200
    until(lambda: made not in owned(proxy, resident, "ada"))
    assert ask(proxy.url, "GET", "/v1/models", first)[0] == 401

    status, stdout, _ = resident.cli("source", "test")
    assert (status, [line[:6].strip() for line in stdout.splitlines()]) == (0, ["ok"] * 7)

    # a key of this installation that no journal knows: of ada's, and of somebody else's
    instance = (resident.state / "instance").read_text()
    orphan, foreign = (label.new_label(instance, "work", datetime.now(UTC)) for _ in range(2))
    proxy.administer("/key/generate", {"key_alias": orphan, "user_id": "ada", "duration": "1h"})
    proxy.administer("/key/generate", {"key_alias": foreign, "duration": "1h"})
    assert resident.cli("sweep", "--yes")[0] == 0
    assert orphan not in owned(proxy, resident, "ada")
    assert foreign in [row["key_alias"] for row in proxy.key_rows()]

    kept = [one.read_bytes() for one in resident.home.path.rglob("*") if one.is_file()]
    store, sign_in = opened(resident)
    tokens = store.load(sign_in)
    assert tokens is not None
    assert tokens.refresh is not None
    secrets = (proxy.master_key, second, tokens.access.reveal(), tokens.refresh.reveal())
    assert [one for one in secrets for data in kept if one.encode() in data] == []

    # nobody who reads what is published is left with a dead key unasked
    another = resident.home.path / "another.toml"
    another.write_text(f"{PUBLISHED}{configuration(proxy.url)}{PUBLISH}".replace('"2s"', '"20s"'))
    resident.environment["KEYBROKER_CONFIG"] = str(another)
    status, said, shown = resident.cli("logout")
    assert (status, said) == (78, "")
    assert "login corp: its keys are published at vault http://127.0.0.1:1/v1/secret" in shown
    assert "hint: sign out all the same: keybroker logout --force corp" in shown
    assert len(owned(proxy, resident, "ada")) == 1
    del resident.environment["KEYBROKER_CONFIG"]

    assert resident.cli("logout") == (0, "Signed out of corp. 1 key revoked.\n", "")
    assert owned(proxy, resident, "ada") == []
    assert ask(proxy.url, "GET", "/v1/models", second)[0] == 401
    calls = [(one.path, one.status) for one in proxy.request_log()]
    assert calls.index(("/revoke", 200)) > max(
        number for number, call in enumerate(calls) if call == ("/key/delete", 200)
    )
    with provider(type="litellm", url=proxy.url) as at:
        assert isinstance(problem(lambda: at.refresh(tokens)), LoginNeeded)
    assert resident.helper()[:2] == (77, "")


@pytest.fixture(scope="module")
def tom(proxy: LiteLLM) -> Iterator[Resident]:
    """Somebody of one team who has signed in, for the module; without a daemon."""
    with fresh_home() as home:
        user = Resident(home)
        profiles = {"work": "", "team": 'team_id = "t1"', "other": 'user_id = "ada"'}
        user.configure(configuration(proxy.url, **profiles))
        known(proxy, "tom", t1="Team one")
        assert signing.with_browser(user, "tom").status == 0
        yield user


ADMINISTRATOR = (
    "an administrator makes you internal_user; for all who come, with "
    "default_internal_user_params: {user_role: internal_user}"
)


MEMBERS = (
    "take out source.team_id, or an administrator lets the team's members do it: /key/generate "
    "and /key/delete"
)


@pytest.mark.parametrize(
    ("profile", "role", "problem", "hint"),
    [
        (
            "work",
            "internal_user_viewer",
            "does not let you mint a key: your role there is internal_user_viewer (401)",
            ADMINISTRATOR,
        ),
        (
            "team",
            "internal_user",
            "does not let you mint a key for this team (401)",
            MEMBERS,
        ),
        (
            "other",
            "internal_user",
            "lets you mint a key for yourself alone (403)",
            "take out source.user_id",
        ),
    ],
)
def test_what_a_person_may_not_do(
    tom: Resident, proxy: LiteLLM, profile: str, role: str, problem: str, hint: str
) -> None:
    """
    It is said with what an administrator has to do, or they themselves.

    Another token would not help: none is asked for.
    """
    age(tom)
    seen = len(proxy.request_log())
    proxy.administer("/user/update", {"user_id": "tom", "user_role": role})
    try:
        status, _, stderr = tom.cli("source", "test", "--profile", profile)
    finally:
        proxy.administer("/user/update", {"user_id": "tom", "user_role": "internal_user"})
    assert status == 77
    host = proxy.url.removeprefix("http://")
    assert stderr == f"keybroker: litellm: {host} {problem}\nhint: {hint}\n"
    assert "/token" not in [one.path for one in proxy.request_log()[seen:]]


def test_a_team_whose_members_make_keys(tom: Resident, proxy: LiteLLM) -> None:
    """With what the hint says, they do."""
    allowed = ["/key/generate", "/key/delete", "/key/info"]
    wish = {"team_id": "t1", "team_member_permissions": allowed}
    proxy.administer("/team/permissions_update", wish)
    assert tom.cli("source", "test", "--profile", "team")[0] == 0


def test_a_token_that_is_refused_is_renewed_once(tom: Resident, proxy: LiteLLM) -> None:
    """Though it seemed to be good; should its person be gone, that is the end."""
    before = age(tom, REFUSED)
    seen = len(proxy.request_log())
    assert tom.cli("source", "test", "--profile", "work")[0] == 0
    store, sign_in = opened(tom)
    tokens = store.load(sign_in)
    assert tokens is not None
    assert tokens.access.fingerprint not in (before.fingerprint, REFUSED.fingerprint)
    paths = [one.path for one in proxy.request_log()[seen:]]
    assert paths.count("/token") == 1

    age(tom, REFUSED)
    proxy.administer("/user/delete", {"user_ids": ["tom"]})
    host = proxy.url.removeprefix("http://")
    said = f"keybroker: login corp: {host} has ended the sign-in\nhint: run: keybroker login corp\n"
    for _ in range(2):
        assert tom.cli("source", "test", "--profile", "work")[::2] == (77, said)
    paths = [one.path for one in proxy.request_log()[seen:]]
    assert paths.count("/token") == 2
    assert tom.cli("whoami")[0] == 77


def test_somebody_of_several_teams(proxy: LiteLLM) -> None:
    """Who signs in with a code says in the login which one it is for, by id or by name."""
    known(proxy, "eve", t2="Team two", t3="Team three")
    for team in (None, "Team one", "t3", "Team two"):
        table = {"type": "litellm", "url": proxy.url} | ({"team": team} if team else {})
        with provider(**table) as at:
            device = at.device()
            Browser("eve", code=device.code).open(device.url)
            if team in ("t3", "Team two"):
                assert isinstance(device.poll(2.0), Tokens)
                continue
            error = problem(lambda device=device: device.poll(2.0))  # type: ignore[misc]
        what = "no team of this name" if team else "several teams"
        assert error.message == f"login corp: you are in {what} there"
        assert error.hint == ("set team in [logins.corp] to one of t2 (Team two), t3 (Team three)")


def test_a_sign_in_with_a_code(resident: Resident, proxy: LiteLLM) -> None:
    """It is not renewed: when it ends, the key serves to its own end."""
    resident.configure(configuration(proxy.url, lifetime="6s"))
    resident.start()
    done = signing.with_code(resident, Browser("ada"))
    assert re.fullmatch(
        r"Signed in to corp as ada@example\.com\. It lasts until .+ \((1d|23h 59m)\)\.\n",
        done.stdout,
    )
    assert resident.helper()[0] == 0

    good = age(resident, REFUSED)
    host = proxy.url.removeprefix("http://")
    said = f"keybroker: login corp: {host} does not take its token any more (401)\n"
    assert resident.cli("source", "test")[::2] == (77, f"{said}hint: run: keybroker login corp\n")
    age(resident, good)
    assert resident.cli("rotate")[0] == 0

    age(resident, good, ends=datetime.now(UTC))
    until(lambda: resident.row()["code"] == "login")
    key = resident.key("work")
    assert ask(proxy.url, "POST", "/v1/messages", key, MESSAGE)[0] == 200
    until(lambda: resident.helper()[0] != 0)
    ended = "keybroker: work: login corp: the sign-in has ended; run: keybroker login corp\n"
    assert resident.helper() == (77, "", ended)


def test_a_sign_in_that_is_refused(resident: Resident, proxy: LiteLLM) -> None:
    """On the page where the proxy asks whether it is right."""
    resident.configure(configuration(proxy.url))
    done = signing.with_browser(resident, "ada", refuses=proxy.url)
    assert (done.status, done.stdout) == (77, "")
    assert done.stderr.endswith(
        "keybroker: login corp: the sign-in was refused\nhint: run: keybroker login corp\n"
    )
    assert not file_of(resident.state, "corp").exists()


# proxies that are not as they should be


@pytest.fixture
def faults(proxy: LiteLLM) -> Iterator[Faults]:
    """A proxy before the proxy."""
    with Faults(proxy.url) as between:
        yield between


DESCRIBED = "/.well-known/litellm-cli-auth"


def description(url: str, **more: Any) -> Status:
    """What a proxy says of its sign-in, with something else in it."""
    names = ("authorization", "token", "registration", "revocation")
    found = {f"{name}_endpoint": f"{url}/{name}" for name in names}
    found = {"contract_version": 1, "issuer": url, "resource": url, **found, **more}
    return Status(200, {"content-type": "application/json"}, json.dumps(found).encode())


def test_a_proxy_that_goes_by_another_name(proxy: LiteLLM, faults: Faults) -> None:
    """In a browser that is refused, since a token is for the name; a code is not for any."""
    with provider(type="litellm", url=faults.url) as at:
        assert at.flows == ("browser", "device")
        error = problem(lambda: at.browser("http://127.0.0.1:1/callback"))
        assert isinstance(error, SourceInvalid)
        assert error.message.endswith(" calls itself something else than url")
        assert "keybroker login --device corp" in (error.hint or "")
        tokens = signing.signed_in(at.device(), Browser("ada"))
        assert tokens.standing.who == "ada@example.com"
        assert not tokens.standing.renewable
        assert at.revoke(tokens) is False


@pytest.mark.parametrize("answer", [Status(404), description("http://x", contract_version=2)])
def test_a_proxy_of_another_version_has_the_code(faults: Faults, answer: Status) -> None:
    """One that is too old to say how else, or speaks of it in another way."""
    faults.next(answer, path=DESCRIBED)
    with provider(type="litellm", url=faults.url) as at:
        assert at.flows == ("device",)


@pytest.mark.parametrize("name", ["registration", "token", "authorization"])
def test_endpoints_of_another_host_are_not_asked(faults: Faults, name: str) -> None:
    """A code, and a refresh token, go to the proxy that was configured."""
    elsewhere = {f"{name}_endpoint": "http://127.0.0.1:9/x"}
    faults.next(description(faults.url, **elsewhere), path=DESCRIBED)
    registered = json.dumps({"client_id": "llm_dcrc_x"}).encode()
    faults.next(Status(201, {}, registered), path="/registration")
    with provider(type="litellm", url=faults.url) as at:

        def sign_in() -> None:
            visit = at.browser("http://127.0.0.1:1/callback")
            visit.redeem({"code": "the-code", "state": visit.state})

        error = problem(sign_in, "the-code")
    assert isinstance(error, SourceInvalid)
    assert error.message.endswith(f" names no {name}_endpoint of its own")


@pytest.mark.parametrize(
    ("answer", "kind"), [(Status(400), SourceInvalid), (Status(503), SourceUnavailable)]
)
def test_a_client_that_is_not_registered(
    faults: Faults, answer: Status, kind: type[Exception]
) -> None:
    """Nobody is sent to a page that would not send them back."""
    faults.next(description(faults.url), path=DESCRIBED)
    faults.next(answer, path="/registration")
    with provider(type="litellm", url=faults.url) as at:
        error = problem(lambda: at.browser("http://127.0.0.1:1/callback"))
    assert type(error) is kind
    assert "failed to register a client" in error.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Status(429, {}, b'{"detail": "Too many CLI login attempts."}'), "asks to wait (429)"),
        (Status(404, {}, b'{"detail": "Not Found"}'), "has no sign-in with a code (404)"),
        (Status(200, {}, b"<html>"), "has no sign-in with a code (200)"),
        (Status(503), "failed to give a code (503)"),
    ],
)
def test_a_code_that_is_not_given(faults: Faults, answer: Status, words: str) -> None:
    """What the proxy said, in our words."""
    faults.next(answer, path="/sso/cli/start")
    with provider(type="litellm", url=faults.url) as at:
        assert problem(at.device).message.endswith(words)


def test_a_code_that_is_asked_for_in_vain(faults: Faults) -> None:
    """A proxy in trouble is asked less often; one that knows it no more is not asked again."""
    polls = "/sso/cli/poll/*"
    with provider(type="litellm", url=faults.url, timeout="1s") as at:
        device = at.device()
        assert device.poll(2.0) == 2.0
        for fault in (Status(503), Status(429), Html(502), Hang()):
            faults.next(fault, path=polls)
            assert device.poll(2.0) == 4.0
        faults.next(Status(503), path=polls)
        assert device.poll(50.0) == 60.0
        gone = b'{"detail": "CLI login session not found or expired."}'
        faults.next(Status(400, {}, gone), path=polls)
        error = problem(lambda: device.poll(2.0))
    assert error.message.endswith(" does not know the code any more (400)")
    assert "Redis" in (error.hint or "")
