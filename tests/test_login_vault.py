"""Signing in at a real OpenBao, with a real OpenID provider behind it: browser, code, JWT."""

from __future__ import annotations

import secrets
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import login
from keybroker.cache import find_wrap_key
from keybroker.config import load, parse
from keybroker.credential import Secret
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import ConfigError, LoginNeeded
from keybroker.login.loopback import read_answer
from keybroker.login.provider import now
from keybroker.login.tokens import Store, Tokens
from keybroker.login.vault import VaultLogin
from keybroker.signin import SignIn, read_login
from keybroker.sources.held import Held
from keybroker.sources.vault.login import Login
from keybroker.sources.vault.server import Server
from keybroker.values import replace
from keybroker.vault import read_vault
from tests.canaries import Canaries
from tests.resident import Resident, until
from tests.servers.browser import Browser, command
from tests.servers.database import Database
from tests.servers.faults import DropBeforeCommit, Faults
from tests.servers.oidc import Oidc
from tests.servers.processes import Port
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Kv, RefusedError
from tests.test_vault_daemon import gateway as gateway
from tests.test_vault_daemon import minted, source
from tests.typed import Signing

pytestmark = pytest.mark.servers

OURS = "ada@example.com"


@dataclass(frozen=True)
class Place:
    """An OpenBao where people sign in: by the role `user` in a browser, by `dev` with a code."""

    bao: OpenBao
    oidc: Oidc
    mount: str
    port: int
    kv: Kv

    @property
    def back(self) -> str:
        return f"http://localhost:{self.port}/oidc/callback"

    def role(self, name: str, **options: Any) -> str:
        """Write a role; returns its name."""
        usual = {
            "role_type": "oidc",
            "user_claim": "email",
            "oidc_scopes": ["email"],
            "token_policies": ["default", self.mount],
            "allowed_redirect_uris": [self.back],
        }
        self.bao.do("POST", f"auth/{self.mount}/role/{name}", {**usual, **options})
        return name

    def table(self, role: str = "user", more: str = "") -> str:
        """Return the tables of a configuration that reads the key with a sign-in by a role."""
        return (
            f'[vault]\naddress = "{self.bao.url}"\n[vault.auth]\nmethod = "token"\n'
            'token = { login = "corp" }\n'
            f'[logins.corp]\ntype = "vault"\nmount = "{self.mount}"\nrole = "{role}"\n'
            f"port = {self.port}\n{more}\n"
        )

    def alive(self, token: str) -> bool:
        return self.bao.ask("GET", "auth/token/lookup-self", token=token).status == 200

    def tokens(self, mount: str) -> list[str]:
        """Return the accessors of the tokens that were had by logging in at a mount."""
        found = []
        for one in self.bao.do("LIST", "auth/token/accessors")["data"]["keys"]:
            with suppress(RefusedError):  # it has ended meanwhile
                said = self.bao.do("POST", "auth/token/lookup-accessor", {"accessor": one})
                found += [one] if said["data"]["path"] == f"auth/{mount}/login" else []
        return found

    def count(self, path: str) -> int:
        return self.bao.count(f"auth/{self.mount}/{path}")


@pytest.fixture(scope="module")
def place(openbao: OpenBao, oidc: Oidc) -> Iterator[Place]:
    with Port() as port:
        mount = openbao.enable_auth("oidc", f"oidc-{secrets.token_hex(4)}")
        made = Place(openbao, oidc, mount, port.number, openbao.kv())
        client = oidc.register(made.back, application_type="native")
        config = {
            "oidc_discovery_url": oidc.issuer,
            "oidc_client_id": client.id,
            "oidc_client_secret": client.secret,
            "default_role": "user",
        }
        openbao.do("POST", f"auth/{mount}/config", config)
        openbao.policy(mount, {made.kv.path("llm"): ["read"]})
        made.role("user")
        made.role("dev", callback_mode="device")
        yield made


@pytest.fixture
def key(place: Place, gateway: DevGateway) -> str:
    """A key of the gateway that somebody keeps in Vault."""
    made = minted(gateway)
    place.kv.put("llm", key=made)
    return made


@pytest.fixture
def person(resident: Resident, place: Place, gateway: DevGateway) -> Resident:
    """Somebody's daemon, which would read the key, and a browser that signs in as ada."""
    resident.environment["BROWSER"] = command("ada")
    resident.configure(place.table() + source(gateway.url, place.kv.path("llm"), 'poll = "1s"'))
    resident.start()
    return resident


def tokens_of(resident: Resident) -> Tokens:
    """Open what the sign-in of a daemon is kept in."""
    sign_in = load([resident.file], resident.environment).logins["corp"]
    key = find_wrap_key("file", resident.state, resident.environment).key
    found = Store(resident.state, key).load(sign_in)
    assert found is not None
    return found


# In a browser


def test_one_sign_in_reads_the_key_from_then_on(person: Resident, place: Place, key: str) -> None:
    """The browser goes to the provider and comes back; before that the helper says what to type."""
    before = place.count("oidc/callback")
    refused = person.helper()
    nobody = person.cli("whoami")
    done = person.cli("login")

    assert (refused[0], nobody[0]) == (77, 77)
    assert "run: keybroker login corp" in refused[2]
    assert done[:1] == (0,), done
    assert done[1].startswith(f"Signed in to corp as {OURS}. It is renewed by itself.")
    assert until(lambda: person.helper()[1]) == f"{key}\n"
    assert person.cli("whoami") == (0, f"corp: {OURS}; renewed by itself\n", "")
    person.kill()
    person.start()
    assert person.key() == key
    assert place.count("oidc/callback") == before + 1
    assert tokens_of(person).standing.who == OURS


def test_nothing_of_a_sign_in_is_where_it_does_not_belong(
    person: Resident, place: Place, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The token is in one sealed file; the code and the state are nowhere, and no page has them."""
    canaries = Canaries()
    walker = Browser("ada")
    with Signing(person, ("--browser", "--no-browser")) as signing:
        assert signing.ended()[0] == 2  # one of the two
    with Signing(person, ("--no-browser",)) as signing:
        page = walker.open(signing.url())
        status, said, shown = signing.ended()
    assert status == 0, shown
    token = canaries.know("token", tokens_of(person).access.reveal())
    for visited in walker.visited:
        if "code=" in visited:
            canaries.know("code", visited.partition("code=")[2].partition("&")[0])
    assert set(canaries.planted) == {"token", "code"}
    until(lambda: person.key() == key)
    person.stop()

    assert page.url == f"{place.back}/signed-in"
    assert (page.status, OURS in page.text) == (200, True)
    assert canaries.seen_in(page.text + said + shown + capfd.readouterr().err) == []
    assert canaries.below(person.home.path) == []
    assert token.startswith("s.")


def test_an_address_is_pasted_from_a_browser_elsewhere(
    person: Resident, place: Place, key: str
) -> None:
    """What an older sign-in ended at is not taken; the one that is waited for is."""
    with Signing(person, ("--no-browser",)) as signing:
        old = Browser(before=place.back).open(signing.url()).url
    with Signing(person, ("--no-browser",)) as signing:
        right = Browser(before=place.back).open(signing.url()).url
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(old)
        assert "an older one" in refused.value.read().decode()
        signing.paste(right)
        status, said, shown = signing.ended()

    assert (status, said.startswith(f"Signed in to corp as {OURS}")) == (0, True), shown
    assert until(person.key) == key


def test_a_person_who_refuses_is_told_so(person: Resident, place: Place) -> None:
    """On the page and in the terminal; nobody is signed in."""
    with Signing(person, ("--no-browser",)) as signing:
        page = Browser(refuses=f"{place.oidc.issuer}/interaction").open(signing.url())
        status, said, shown = signing.ended()

    assert (status, said) == (77, "")
    assert "login corp: the sign-in was refused" in shown
    assert (page.status, "The sign-in was refused" in page.text) == (400, True)
    assert person.cli("whoami")[0] == 77


@pytest.mark.parametrize(
    ("role", "options", "wanted"),
    [
        (
            "elsewhere",
            {"allowed_redirect_uris": ["http://localhost/other"]},
            "take http://localhost:PORT/oidc/callback; add it to its allowed_redirect_uris",
        ),
        ("direct", {"callback_mode": "direct"}, "by a role with callback_mode = direct"),
        ("nobody", None, "has no such role; see role"),
    ],
)
def test_a_role_that_does_not_fit_is_said_at_once(
    person: Resident, place: Place, role: str, options: Mapping[str, Any] | None, wanted: str
) -> None:
    """Before any window opens, with what to change."""
    if options is not None:
        place.role(role, **options)
    person.configure(place.table(role))
    status, _, shown = person.cli("login")

    assert status in (77, 78)
    text = shown.replace("\nhint: ", "; ").replace(str(place.port), "PORT")
    assert wanted in " ".join(text.split())


def test_a_claim_that_is_not_bound_is_said_on_the_page_too(person: Resident, place: Place) -> None:
    """Vault's no comes after the provider's yes."""
    place.role("bound", bound_claims={"email": "bob@example.com"})
    person.configure(place.table("bound"))
    with Signing(person, ("--no-browser",)) as signing:
        page = Browser().open(signing.url())
        status, _, shown = signing.ended()

    assert status == 77
    assert "does not take what the token says" in shown
    assert "see the bound claims of the role" in shown
    assert (page.status, "does not take what the token says" in page.text) == (400, True)


def test_people_sign_in_within_a_namespace(place: Place, oidc: Oidc) -> None:
    """All that is asked is asked there: where to sign in, for the token, who it is, its end."""
    space = place.bao.namespace(f"eng-{secrets.token_hex(4)}")
    client = oidc.register(place.back, application_type="native")
    config = {
        "oidc_discovery_url": oidc.issuer,
        "oidc_client_id": client.id,
        "oidc_client_secret": client.secret,
    }
    role = {
        "role_type": "oidc",
        "user_claim": "email",
        "oidc_scopes": ["email"],
        "token_policies": ["default"],
        "allowed_redirect_uris": [place.back],
    }
    place.bao.do("POST", "sys/auth/sso", {"type": "oidc"}, space)
    place.bao.do("POST", "auth/sso/config", config, space)
    place.bao.do("POST", "auth/sso/role/dev", role, space)
    where = {"address": place.bao.url, "namespace": space, "mount": "sso"}
    raw = {"type": "vault", "role": "dev", "port": place.port, **where}
    with closing(VaultLogin(read_login("corp", raw, Where({}, "test")), {})) as provider:
        assert provider.flows == ("browser",)
        visit = provider.browser(place.back)
        answer = read_answer(Browser(before=place.back).open(visit.url).url)
        given = visit.redeem(answer)
        renewed = provider.refresh(given)
        told = provider.revoke(renewed)

    assert (given.standing.who, renewed.access, told) == (OURS, given.access, True)
    token = given.access.reveal()
    looked = place.bao.ask("GET", "auth/token/lookup-self", token=token, namespace=space)
    assert looked.status == 403


# With a code


def test_a_code_is_typed_on_any_device(person: Resident, place: Place, key: str) -> None:
    """A role in device mode needs no browser here, and no option: the command finds out."""
    person.configure(
        place.table("dev") + source(person_url(person), place.kv.path("llm"), 'poll = "1s"')
    )
    with Signing(person, ()) as signing:
        page, code = signing.url(), signing.code()
        Browser("ada", code=code).open(page)
        status, said, shown = signing.ended()

    assert status == 0, shown
    assert said.startswith(f"Signed in to corp as {OURS}.")
    assert f"or open {page}?user_code={code}" in shown
    assert until(person.key) == key


def person_url(resident: Resident) -> str:
    """Return the gateway that is configured."""
    return load([resident.file], resident.environment).profiles["work"].base_url


def test_a_code_that_is_refused_ends_the_sign_in(person: Resident, place: Place) -> None:
    """The provider's no is Vault's, and is said."""
    person.configure(place.table("dev"))
    with Signing(person, ("--device",)) as signing:
        walker = Browser(code=signing.code(), refuses=f"{place.oidc.issuer}/device")
        with suppress(OSError):  # the page goes round and round
            walker.open(signing.url())
        status, _, shown = signing.ended()

    assert status == 77
    assert "heard from the provider that it was refused" in shown


def test_who_asks_too_soon_for_a_code_is_slowed_down(place: Place) -> None:
    """The provider says so through Vault: five seconds more, as RFC 8628 has it."""
    raw = {"type": "vault", "address": place.bao.url, "mount": place.mount, "role": "dev"}
    provider = VaultLogin(read_login("corp", raw, Where({}, "test")), {})
    with closing(provider):
        device = provider.device()
        assert [device.poll(device.interval) for _ in range(2)] == [1.0, 6.0]


# What a sign-in is used for


def test_the_token_is_renewed_until_its_maximum_and_then_a_person_is_needed(
    person: Resident, place: Place, key: str
) -> None:
    """`whoami` follows each renewal; at the end there is no loop, no window, and the key lives."""
    place.role("short", token_ttl="8s", token_max_ttl="16s")
    gateway = person_url(person)
    person.configure(place.table("short") + source(gateway, place.kv.path("llm"), 'poll = "1s"'))
    assert person.cli("login")[0] == 0
    first = tokens_of(person).standing
    assert until(person.key) == key

    until(lambda: tokens_of(person).standing.refreshed_at > first.refreshed_at)
    until(lambda: not tokens_of(person).standing.renewable)  # it is the last one
    until(lambda: person.cli("whoami")[0] == 77)
    until(lambda: "login corp" in str(person.row()["trouble"]))
    asked = place.bao.count("auth/token/")
    assert person.helper()[1] == f"{key}\n"  # Vault does not say that it is no more
    person.cli("rotate")
    status, _, shown = person.cli("source", "test", "work")

    assert status == 77
    assert "run: keybroker login corp" in shown
    assert place.bao.count("auth/token/") == asked
    assert first.access_ends is not None
    assert person.cli("login")[0] == 0
    until(lambda: person.row()["trouble"] is None)


def test_a_token_that_was_revoked_is_noticed_and_said(
    person: Resident, place: Place, key: str
) -> None:
    """By an administrator, behind our back: `whoami` says so as well, without asking Vault."""
    assert person.cli("login")[0] == 0
    assert until(person.key) == key
    place.bao.do("POST", "auth/token/revoke", {"token": tokens_of(person).access.reveal()})

    until(lambda: tokens_of(person).standing.ended)
    status, said, shown = person.cli("whoami")

    assert (status, said) == (77, f"corp: {OURS}; Vault has ended the token\n")
    assert "run: keybroker login corp" in shown
    assert "run: keybroker login corp" in person.cli("source", "test", "work")[2]


def test_signing_out_ends_the_token_at_vault(person: Resident, place: Place, key: str) -> None:
    """And here: the key that it read is not handed out any more."""
    assert person.cli("login")[0] == 0
    assert until(person.key) == key
    token = tokens_of(person).access.reveal()
    assert place.alive(token)

    assert person.cli("logout") == (0, "Signed out of corp.\n", "")
    assert not place.alive(token)
    assert not (person.state / "logins" / "corp.json").exists()
    until(lambda: person.helper()[0])
    status, said, shown = person.helper()
    assert (status, said) == (77, "")
    assert "run: keybroker login corp" in shown
    assert person.cli("logout") == (0, "Nobody was signed in to corp.\n", "")


def test_what_was_leased_is_revoked_before_the_token(
    person: Resident, place: Place, database: Database
) -> None:
    """With the token that made it; also after a restart, when only the journal knows of it."""
    path = database.dynamic_role(f"role-{place.mount}", "1h", "2h")
    rules = {path: ["read"], "sys/leases/revoke": ["update"], "sys/leases/renew": ["update"]}
    place.role("leases", token_policies=["default", place.bao.policy(f"l-{place.mount}", rules)])
    table = 'engine = "dynamic"\nfield = "password"'
    settings = 'verify = "none"\nhold = "1s"'
    before = database.users()
    person.configure(
        place.table("leases") + source("http://127.0.0.1:9", path, table, settings, "leased")
    )
    assert person.cli("login")[0] == 0
    until(lambda: person.helper("leased")[1])
    assert len(database.users() - before) == 1
    person.kill()
    person.start()
    began = len(place.bao.audit_entries())
    done = person.cli("logout")

    assert done == (0, "Signed out of corp. 1 key revoked.\n", "")
    until(lambda: database.users() == before)
    asked = [
        one["request"]["path"]
        for one in place.bao.audit_entries()[began:]
        if one["type"] == "request" and "revoke" in one["request"]["path"]
    ]
    assert asked == ["sys/leases/revoke", "auth/token/revoke-self"]


def test_signing_out_by_force_leaves_nothing_to_ask_with(
    person: Resident, place: Place, key: str
) -> None:
    """Vault was not told, and the token lives there; nobody here asks with it, sealed or not."""
    assert person.cli("login")[0] == 0
    assert until(person.key) == key
    token = tokens_of(person).access.reveal()

    status, said, _ = person.cli("logout", "--force")
    assert (status, "was not told" in said) == (0, True)
    assert place.alive(token)
    assert until(lambda: person.helper()[0]) == 77
    person.kill()
    person.start()
    assert person.helper()[0] == 77


def by_jwt(person: Resident, place: Place, oidc: Oidc, **role: Any) -> str:
    """Configure a Vault that is logged in to with a token of a company's provider; its mount."""
    audience = f"https://{place.mount}.example"
    config = {"oidc_discovery_url": oidc.issuer, "bound_issuer": oidc.issuer}
    mount = f"jwt-{secrets.token_hex(4)}"
    place.bao.jwt("people", ["default", place.mount], audience, mount, config=config)
    if role:
        known = place.bao.do("GET", f"auth/{mount}/role/people")["data"]
        place.bao.do("POST", f"auth/{mount}/role/people", {**known, **role})
    person.configure(
        f'[vault]\naddress = "{place.bao.url}"\n[vault.auth]\nmethod = "jwt"\n'
        f'mount = "{mount}"\nrole = "people"\njwt = {{ login = "sso" }}\n'
        f'[logins.sso]\ntype = "oidc"\nissuer = "{oidc.issuer}"\nresource = "{audience}"\n'
        + source(person_url(person), place.kv.path("llm"), 'poll = "1s"')
    )
    return mount


@pytest.mark.parametrize("running", [True, False])
def test_a_token_of_a_provider_logs_in_by_jwt(
    person: Resident, place: Place, oidc: Oidc, key: str, running: bool
) -> None:
    """One sign-in at the company's provider is enough for a Vault that knows it."""
    mount = by_jwt(person, place, oidc)
    until(lambda: "run: keybroker login sso" in person.helper()[2])
    status, _, shown = person.cli("login", "sso")

    assert status == 0, shown
    assert until(person.key) == key

    # and signing out ends what it began there: nothing more is read, nothing is renewed
    assert len(place.tokens(mount)) == 1
    until(lambda: list((person.state / "cache").glob("session.*")))
    if not running:
        person.kill(signal.SIGTERM)
    status, said, shown = person.cli("logout", "sso")
    assert (status, said, shown) == (0, "Signed out of sso.\n", "")
    assert place.tokens(mount) == []
    assert not list((person.state / "cache").glob("session.*"))
    if not running:
        person.start()
    until(lambda: person.helper()[0] == 77)
    assert "run: keybroker login sso" in person.helper()[2]


def test_a_token_of_vault_s_that_may_not_end_itself_is_said(
    person: Resident, place: Place, oidc: Oidc, key: str
) -> None:
    """Signing out is done all the same: it is not asked with any more."""
    mount = by_jwt(person, place, oidc, token_no_default_policy=True, token_policies=[place.mount])
    assert person.cli("login", "sso")[0] == 0
    assert until(person.key) == key

    status, said, shown = person.cli("logout", "sso")

    assert (status, shown) == (0, "")
    assert "Not ended: vault: " in said
    assert "auth/token/revoke-self: did not end the token (403), which may live on" in said
    assert len(place.tokens(mount)) == 1
    until(lambda: person.helper()[0] == 77)


# The table


VAULT = {"address": "https://vault.example:8200", "namespace": "eng", "auth": {"method": "agent"}}


def read(login_table: Mapping[str, Any], vault: Mapping[str, Any] | None, **variables: str) -> Any:
    tables = {"logins": {"corp": {"type": "vault", **login_table}}}
    return parse({**tables, **({"vault": vault} if vault else {})}, Where({}, "x"), (), variables)


@pytest.mark.parametrize(
    ("table", "vault", "variables", "wanted"),
    [
        ({}, VAULT, {}, (VAULT["address"], "eng")),
        ({}, None, {"VAULT_ADDR": "https://v:1"}, ("https://v:1", None)),
        ({}, VAULT, {"VAULT_ADDR": "https://v:1"}, (VAULT["address"], "eng")),
        ({"address": "https://own:1"}, VAULT, {}, ("https://own:1", None)),
        ({"address": "https://own:1"}, None, {"VAULT_NAMESPACE": "x/"}, ("https://own:1", "x")),
    ],
)
def test_the_server_is_its_own_or_that_of_the_vault_table(
    table: Mapping[str, Any],
    vault: Mapping[str, Any] | None,
    variables: dict[str, str],
    wanted: tuple[str, str | None],
) -> None:
    """What is meant for one server, such as a namespace, is not taken to another."""
    settings = read(table, vault, **variables).logins["corp"].settings
    assert (settings["address"], settings["namespace"]) == wanted


def test_another_server_is_another_sign_in() -> None:
    """Also where the server is named elsewhere: a token is for one."""
    marks = {read({}, {**VAULT, "address": f"https://{n}:1"}).logins["corp"].mark for n in "abb"}
    assert len(marks) == 2


@pytest.mark.parametrize(
    ("table", "vault", "wanted"),
    [
        ({}, None, "x: logins.corp: has no address of a Vault: set address in [vault]"),
        ({"client_key": "/k"}, VAULT, "x: logins.corp: client_cert and client_key belong together"),
        (
            {},
            {**VAULT, "auth": {"method": "jwt", "jwt": {"login": "corp"}}},
            'x: vault.auth.jwt.login: a login of type vault is for [vault.auth]: method = "token"',
        ),
    ],
)
def test_a_table_that_cannot_work_is_refused(
    table: Mapping[str, Any], vault: Mapping[str, Any] | None, wanted: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(table, vault)
    assert refused.value.message.startswith(wanted)


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        (
            {"vault": {**VAULT, "auth": {"method": "token", "token": {"login": "sso"}}}},
            "expected a login of type vault",
        ),
        (
            {
                "profiles": {
                    "work": {
                        "base_url": "https://llm.example",
                        "source": {"type": "login", "login": "corp"},
                    }
                }
            },
            "a login of type vault is for [vault.auth]",
        ),
    ],
)
def test_a_token_is_for_whoever_gave_it(tables: Mapping[str, Any], wanted: str) -> None:
    """Vault's goes to no gateway, and a provider's is none of Vault's."""
    corp = {"type": "vault", "address": "https://vault.example:8200"}
    sso = {"type": "oidc", "issuer": "https://login.example"}
    with pytest.raises(ConfigError) as refused:
        parse({"logins": {"corp": corp, "sso": sso}, **tables}, Where({}, "x"), (), {})
    assert wanted in refused.value.message


# One token, several who ask with it


@dataclass(frozen=True)
class Desk:
    """A sign-in that is kept, and sources that ask with it."""

    place: Place
    store: Store
    sign_in: SignIn
    open: ExitStack

    def held(self) -> Held:
        made = Held()
        made.store = self.store
        return made

    def login(self, held: Held, *, ends: bool = False) -> Login:
        auth = {"method": "token", "token": {"login": self.sign_in.text}}
        raw = {"address": self.sign_in.settings["address"], "auth": auth}
        vault = read_vault(raw, ("vault",), Where({}, "test"))
        server = self.open.enter_context(closing(Server(vault, 4.0)))
        return Login(vault, server, {}, held, ends=ends)

    @property
    def tokens(self) -> Tokens:
        found = self.store.load(self.sign_in)
        assert found is not None
        return found

    def aged(self, age: timedelta) -> None:
        """Have the token as it would be later, as far as we know."""
        standing = self.tokens.standing
        assert standing.access_ends is not None
        older = replace(
            standing,
            refreshed_at=standing.refreshed_at - age,
            access_ends=standing.access_ends - age,
        )
        self.store.save(replace(self.tokens, standing=older))


@pytest.fixture
def front(openbao: OpenBao) -> Iterator[Faults]:
    with Faults(openbao.url) as made:
        yield made


@pytest.fixture
def desk(place: Place, front: Faults, tmp_path: Path) -> Iterator[Desk]:
    raw = {"type": "vault", "address": front.url, "mount": place.mount}
    sign_in = read_login("corp", raw, Where({}, "test"))
    store = Store(tmp_path, Secret("5e" * 32))
    token = place.bao.new_token(["default"], ttl="60s", display_name=f"{place.mount}-{OURS}")
    provider = VaultLogin(sign_in, {})
    given = provider._made(
        Secret(token["client_token"]),
        now(),
        timedelta(seconds=60),
        refresh=Secret(token["client_token"]),
    )
    provider.close()
    store.save(given)
    with ExitStack() as stack:
        yield Desk(place, store, sign_in, stack)


def older(login_: Login) -> None:
    """Make a session one that is due."""
    issued, ends = now() - timedelta(seconds=40), now() + timedelta(seconds=20)
    login_._held.put(replace(login_.session(), issued_at=issued, expires_at=ends))


def renewals(front: Faults) -> int:
    return sum(one.path == "/v1/auth/token/renew-self" for one in front.log)


def test_a_renewal_is_done_once_for_all_who_ask(desk: Desk, front: Faults) -> None:
    """Whoever comes first renews; the others, and `whoami`, have the new end from the file."""
    desk.aged(timedelta(seconds=35))
    before = desk.tokens.standing
    several = [desk.login(desk.held()) for _ in range(3)]
    for one in several:
        older(one)
    renewed = [one.session() for one in several]

    assert renewals(front) == 1
    assert desk.tokens.standing.refreshed_at > before.refreshed_at
    assert {one.expires_at for one in renewed} == {desk.tokens.standing.access_ends}
    assert all(one.renewable for one in renewed)


def test_a_vault_that_is_gone_ends_no_sign_in(desk: Desk, front: Faults) -> None:
    """The token is asked with for what is left of it, and renewed when Vault is back."""
    one = desk.login(desk.held())
    older(one)
    desk.aged(timedelta(seconds=35))
    gone = front.next(DropBeforeCommit(), path="/v1/auth/token/renew-self")
    session = one.session()

    gone.wait()
    assert (session.secret, session.failures) == (desk.tokens.access, 1)
    assert desk.tokens.standing.ended == ""
    one._held.put(replace(session, not_before=None))
    assert one.session().failures == 0
    assert renewals(front) == 2


def test_a_token_that_ended_at_vault_ends_the_sign_in(desk: Desk) -> None:
    """A renewal says so, once; who asks then is told what to type, and Vault is not asked."""
    one = desk.login(desk.held())
    older(one)
    desk.aged(timedelta(seconds=35))
    token = desk.tokens.access.reveal()
    desk.place.bao.do("POST", "auth/token/revoke", {"token": token})
    with pytest.raises(LoginNeeded) as needed:
        one.session()

    assert needed.value.message == "login corp: Vault has ended the token"
    assert needed.value.hint == "run: keybroker login corp"
    assert desk.tokens.standing.ended == "Vault has ended the token"


def test_who_signed_out_only_ends_what_was_made(desk: Desk) -> None:
    """Between the two steps of a logout the token revokes, and does nothing else."""
    login.leave(desk.sign_in, desk.store)

    with pytest.raises(LoginNeeded) as needed:
        desk.login(desk.held()).session()
    assert needed.value.hint == "run: keybroker login corp"
    assert desk.login(desk.held(), ends=True).session().secret == desk.tokens.access
