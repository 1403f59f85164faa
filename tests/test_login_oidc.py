"""OpenID Connect: what a provider says is checked, word by word, and no half answer counts."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey

from keybroker import login, signin
from keybroker.credential import Secret
from keybroker.document import Where
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    LoginNeeded,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.flow import SigningIn
from keybroker.login.oidc import Oidc
from keybroker.login.provider import BROWSER, DEVICE, HalfRenewedError, Visit
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import SignIn
from keybroker.values import replace
from tests.canaries import Canaries
from tests.servers.authority import Authority
from tests.servers.browser import Browser
from tests.servers.faults import (
    CommitThenDrop,
    DropBeforeCommit,
    Fault,
    GarbageJson,
    Hang,
    Html,
    Redirect,
    Status,
    Truncated,
)
from tests.servers.liar import Liar
from tests.servers.oidc import Oidc as Server

BACK = "http://127.0.0.1:1/callback"
WITH_EMAIL = ["openid", "email", "offline_access"]


def table(issuer: str, **keys: Any) -> SignIn:
    return signin.read_login("corp", {"type": "oidc", "issuer": issuer, **keys}, Where({}, "test"))


@pytest.fixture(scope="module")
def one_liar() -> Iterator[Liar]:
    with Liar() as server:
        yield server


@pytest.fixture
def liar(one_liar: Liar) -> Iterator[Liar]:
    """A liar that tells the truth, until a test has it say something else."""
    described, keys = dict(one_liar.described), list(one_liar.keys)
    yield one_liar
    one_liar.described, one_liar.keys = described, keys
    one_liar.answer = (200, {})
    one_liar.asked.clear()
    one_liar.headers.clear()
    one_liar.failing.clear()
    one_liar.posted_only = False


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, Secret("00" * 32))


def question(visit: Visit) -> dict[str, str]:
    """Return what the page was asked for."""
    return {name: values[0] for name, values in parse_qs(urlsplit(visit.url).query).items()}


def signed_in(
    liar: Liar, answer: dict[str, str] | None = None, issuer: str = "", **keys: Any
) -> Tokens:
    """Go through a sign-in at the liar, which gives what `liar.answer` says: a dict or a call."""
    environment = {"S": "s:e/c%r+t"}
    with closing(Oidc(table(issuer or liar.issuer, **keys), environment)) as provider:
        visit = provider.browser(BACK)
        status, body = liar.answer
        if callable(body):
            liar.answer = (status, body(question(visit)["nonce"]))
        return visit.redeem({"code": "the-code", "iss": liar.issuer, **(answer or {})})


def gives(liar: Liar, head: dict[str, Any] | None = None, **claims: Any) -> None:
    """Have the liar give tokens with such an ID token."""

    def body(nonce: str) -> dict[str, Any]:
        token = liar.id_token(head=head, **{"nonce": nonce, **claims})
        return {
            "access_token": "opaque",
            "token_type": "Bearer",
            "expires_in": 300,
            "refresh_token": "r-1",
            "id_token": token,
        }

    liar.answer = (200, body)


# ID tokens


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("RS256", None),
        ("PS384", RSAKey.generate_key(2048, {"kid": "two"})),
        ("ES256", ECKey.generate_key("P-256", {"kid": "two"})),
        ("ES512", ECKey.generate_key("P-521", {"kid": "two"})),
        ("EdDSA", OKPKey.generate_key("Ed25519", {"kid": "two"})),
        ("Ed25519", OKPKey.generate_key("Ed25519", {"kid": "two"})),
    ],
)
def test_who_signed_in_stands_in_an_id_token(liar: Liar, algorithm: str, key: Key | None) -> None:
    """It is taken with every signature that a provider may use."""
    if key is not None:
        liar.keys.append(key)
    gives(
        liar,
        {"alg": algorithm, "kid": "one" if key is None else "two"},
        key=key,
        email="ada@example.com",
    )

    tokens = signed_in(liar)

    assert tokens.standing.who == "ada@example.com"
    assert (tokens.access.reveal(), tokens.refresh) == ("opaque", Secret("r-1"))
    assert tokens.left(datetime.now(UTC)) == pytest.approx(300, abs=5)


# times are seconds from now
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another nonce": ({"nonce": "another"}, "nonce"),
    "no nonce": ({"without": "nonce"}, "nonce"),
    "another issuer": ({"iss": "https://evil.example"}, "iss"),
    "no issuer": ({"without": "iss"}, "iss"),
    "another audience": ({"aud": "another"}, "aud"),
    "no audience": ({"without": "aud"}, "aud"),
    "one of several, authorized to nobody": ({"aud": ["keybroker", "another"]}, "azp"),
    "one of several, authorized to another": (
        {"aud": ["keybroker", "another"], "azp": "another"},
        "azp",
    ),
    "authorized to another": ({"azp": "another"}, "azp"),
    "ended": ({"exp": -61}, "exp"),
    "no end": ({"without": "exp"}, "exp"),
    "of the future": ({"iat": 300}, "iat"),
    "not valid yet": ({"nbf": 300}, "nbf"),
    "no beginning": ({"without": "iat"}, "iat"),
    "nobody": ({"without": "sub"}, "sub"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_id_token_that_says_something_else_is_refused(liar: Liar, name: str) -> None:
    """The claim is named, with what to look at; the token is not shown."""
    claims, said = WRONG[name]
    now = int(time.time())
    gives(
        liar, **{one: now + what if isinstance(what, int) else what for one, what in claims.items()}
    )

    with pytest.raises(SourceInvalid, match="ID token is not what it should be") as raised:
        signed_in(liar)

    assert raised.value.message.endswith(f"({said})")
    assert raised.value.hint == "see issuer and client_id; is this machine's clock right?"


def test_several_audiences_are_fine_if_it_was_made_for_us(liar: Liar) -> None:
    gives(liar, aud=["another", "keybroker"], azp="keybroker")
    assert signed_in(liar).standing.who == "ada"


def test_two_clocks_may_differ_a_little(liar: Liar) -> None:
    """By less than a minute, both ways."""
    now = int(time.time())
    gives(liar, iat=now + 50, nbf=now + 50)
    signed_in(liar)
    gives(liar, iat=now - 600, exp=now - 50)
    signed_in(liar)


def forged(liar: Liar, way: str, nonce: str) -> str:
    """Make an ID token whose claims are right, and whose signature is not the provider's."""
    right = liar.id_token(nonce=nonce)
    head, claims, signature = right.split(".")
    if way == "another key":
        return liar.id_token(key=RSAKey.generate_key(2048), nonce=nonce)
    if way == "its public key as a shared secret":
        pem = liar.keys[0].as_pem(private=False)
        payload = jwt.decode(right, liar.keys[0]).claims
        secret = OctKey.import_key(pem.replace(b"-----", b"-"))  # joserfc makes none of a whole PEM
        return jwt.encode({"alg": "HS256", "kid": "one"}, payload, secret, algorithms=["HS256"])
    if way == "the client's secret":
        payload = jwt.decode(right, liar.keys[0]).claims
        secret = OctKey.import_key("client-secret-of-thirty-two-bytes")
        return jwt.encode({"alg": "HS256", "kid": "one"}, payload, secret, algorithms=["HS256"])
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"one"}').rstrip(b"=").decode()
    return {
        "none": f"{none}.{claims}.",
        "none, with a signature": f"{none}.{claims}.{signature}",
        "no signature": f"{head}.{claims}.",
        "half": right[: len(right) // 2],
        "nothing": "",
        "no token": "opaque-and-nothing-else",
    }[way]


@pytest.mark.parametrize(
    "way",
    [
        "another key",
        "its public key as a shared secret",
        "the client's secret",
        "none",
        "none, with a signature",
        "no signature",
        "half",
        "nothing",
        "no token",
    ],
)
def test_an_id_token_that_the_provider_did_not_sign_is_refused(liar: Liar, way: str) -> None:
    canaries = Canaries()

    def body(nonce: str) -> dict[str, str]:
        token = forged(liar, way, nonce)
        if len(token) > 40:
            canaries.know("forged", token.rpartition(".")[2] or token.split(".")[1])
        return {"access_token": "a", "token_type": "Bearer", "id_token": token}

    liar.answer = (200, body)
    with pytest.raises(SourceInvalid) as raised:
        signed_in(liar)
    assert "ID token" in raised.value.message
    assert canaries.seen_in(raised.value.message) == []


def test_keys_that_were_replaced_are_fetched_once_more(liar: Liar) -> None:
    """And once only, for a token that stays wrong."""
    with closing(Oidc(table(liar.issuer), {})) as provider:
        gives(liar)
        status, body = liar.answer
        visit = provider.browser(BACK)
        liar.answer = (status, body(question(visit)["nonce"]))
        visit.redeem({"code": "c", "iss": liar.issuer})
        visit = provider.browser(BACK)
        liar.answer = (status, body(question(visit)["nonce"]))
        visit.redeem({"code": "c", "iss": liar.issuer})
        assert liar.count("/keys") == 1

        liar.keys = [RSAKey.generate_key(2048, {"kid": "new"})]
        visit = provider.browser(BACK)
        token = liar.id_token(head={"kid": "new"}, nonce=question(visit)["nonce"])
        liar.answer = (200, {"access_token": "a", "token_type": "Bearer", "id_token": token})
        visit.redeem({"code": "c", "iss": liar.issuer})
        assert liar.count("/keys") == 2

        other = RSAKey.generate_key(2048, {"kid": "unknown"})
        visit = provider.browser(BACK)
        token = liar.id_token(key=other, head={"kid": "unknown"}, nonce="n")
        liar.answer = (200, {"access_token": "a", "token_type": "Bearer", "id_token": token})
        with pytest.raises(SourceInvalid):
            visit.redeem({"code": "c", "iss": liar.issuer})
        assert liar.count("/keys") == 3


@pytest.mark.parametrize(
    "strange",
    [
        {"kty": "EC", "crv": "brainpoolP256r1", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": 5},
        {},
        5,
    ],
)
def test_a_key_of_a_kind_that_nobody_knows_is_passed_over(liar: Liar, strange: Any) -> None:
    """RFC 7517, section 5: a provider may have keys for others beside that which signed."""
    liar.strange = [strange]
    gives(liar)
    assert signed_in(liar).standing.who


def test_no_id_token_though_it_was_asked_for_is_no_sign_in(liar: Liar) -> None:
    """Without `openid` nobody asks for one, and nobody knows who it is."""
    liar.answer = (200, {"access_token": "a", "token_type": "Bearer", "expires_in": 60})
    with pytest.raises(SourceInvalid, match="gave no ID token") as raised:
        signed_in(liar)
    assert raised.value.hint == 'scopes has to name "openid"'

    assert signed_in(liar, scopes=["api"]).standing.who == ""
    with pytest.raises(SourceInvalid, match="gave no ID token"):
        signed_in(liar, scopes=["api"], token="id")


# The answer that the browser brings


@pytest.mark.parametrize("iss", ["https://evil.example", "", "http://127.0.0.1:1"])
def test_an_answer_of_another_provider_is_refused(liar: Liar, iss: str) -> None:
    """RFC 9207: a code of a mixed-up provider is not given to this one."""
    gives(liar)
    with pytest.raises(SourceInvalid, match="the answer is of another provider"):
        signed_in(liar, {"iss": iss})
    assert liar.count("/token") == 0


def test_an_answer_without_its_provider_is_refused_if_it_promised_to_say(liar: Liar) -> None:
    gives(liar)
    with closing(Oidc(table(liar.issuer), {})) as provider:
        with pytest.raises(SourceInvalid, match="another provider"):
            provider.browser(BACK).redeem({"code": "c"})
        assert liar.count("/token") == 0

    del liar.described["authorization_response_iss_parameter_supported"]
    gives(liar)
    with closing(Oidc(table(liar.issuer), {})) as provider:
        visit = provider.browser(BACK)
        status, body = liar.answer
        liar.answer = (status, body(question(visit)["nonce"]))
        assert visit.redeem({"code": "c"}).standing.who == "ada"


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"error": "access_denied"}, SourceDenied, "login corp: the sign-in was refused"),
        (
            {"error": "access_denied", "error_description": "not on\nthe\tlist"},
            SourceDenied,
            "login corp: the sign-in was refused: not onthelist",
        ),
        (
            {
                "error": "server_error",
                "error_description": f"see {'x' * 19}, {'A1' * 16} and so on",
            },
            SourceInvalid,
            f"login corp: HOST will not sign in (server_error: see {'x' * 19}, … and so on)",
        ),
        (
            {"error": "<script>alert(1)</script>"},
            SourceInvalid,
            "login corp: HOST will not sign in (an error without a name)",
        ),
        ({"code": ""}, SourceInvalid, "login corp: the answer has no code in it"),
    ],
)
def test_a_refusal_is_told_to_the_person(
    liar: Liar, answer: dict[str, str], kind: type[KeybrokerError], said: str
) -> None:
    """With what the provider adds, but for what looks like a token."""
    with pytest.raises(kind) as raised:
        signed_in(liar, {"code": "", **answer})
    assert raised.value.message == said.replace("HOST", f"127.0.0.1:{liar.port}")
    assert liar.count("/token") == 0


def test_the_question_has_what_it_needs_and_nothing_twice_the_same(liar: Liar) -> None:
    """PKCE by S256, a state and a nonce that nobody guesses, a page for each sign-in."""
    keys = {"scopes": WITH_EMAIL, "resource": "https://gw.example", "audience": "aud"}
    with closing(Oidc(table(liar.issuer, **keys), {})) as provider:
        asked = [question(provider.browser(BACK)) for _ in range(2)]
    for name in ("state", "nonce", "code_challenge"):
        assert len({one[name] for one in asked}) == 2
        assert all(len(one.pop(name)) == 43 for one in asked)
    assert asked[0] == asked[1]
    assert asked[0] == {
        "response_type": "code",
        "client_id": "keybroker",
        "redirect_uri": BACK,
        "scope": "openid email offline_access",
        "code_challenge_method": "S256",
        "resource": "https://gw.example",
        "audience": "aud",
        "prompt": "consent",
    }


@pytest.mark.parametrize(
    ("keys", "prompt"),
    [
        ({"scopes": ["openid"]}, None),
        ({"parameters": {"prompt": "select_account"}}, "select_account"),
        ({"scopes": ["openid"], "parameters": {"prompt": "login"}}, "login"),
    ],
)
def test_a_prompt_is_as_it_is_wished(liar: Liar, keys: Any, prompt: str | None) -> None:
    with closing(Oidc(table(liar.issuer, **keys), {})) as provider:
        assert question(provider.browser(BACK)).get("prompt") == prompt


# What it says of itself


@pytest.mark.parametrize("path", ["/realms/corp", "/"])
def test_an_issuer_may_have_a_path_or_end_with_a_slash(path: str) -> None:
    """What it calls itself is what its tokens have to say."""
    with Liar(path=path.rstrip("/")) as liar:
        liar.issuer = liar.described["issuer"] = f"http://127.0.0.1:{liar.port}{path}"
        gives(liar)
        tokens = signed_in(liar)
        assert tokens.standing.who == "ada"
        gives(liar, iss=liar.issuer[:-1])
        with pytest.raises(SourceInvalid, match=r"\(iss\)"):
            signed_in(liar)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"issuer": "https://evil.example"}, "calls itself something else than issuer"),
        ({"issuer": None}, "does not describe itself (200)"),
        ({"token_endpoint": None}, "the provider names no token_endpoint"),
        ({"token_endpoint": "file:///etc/passwd"}, "the provider names no token_endpoint"),
        ({"jwks_uri": None}, "the provider names no jwks_uri"),
    ],
)
def test_a_description_that_is_none_is_refused(
    liar: Liar, described: dict[str, Any], said: str
) -> None:
    gives(liar)
    liar.described.update(described)
    with pytest.raises(SourceInvalid) as raised:
        signed_in(liar)
    assert said in raised.value.message


def test_who_does_not_describe_itself_is_no_provider(liar: Liar) -> None:
    with pytest.raises(SourceInvalid, match="does not describe itself") as raised:
        signed_in(liar, issuer=f"{liar.issuer}/nothing/there")
    assert raised.value.hint is not None
    assert "/.well-known/openid-configuration" in raised.value.hint


def test_a_way_that_the_provider_has_not_is_said(liar: Liar) -> None:
    """With those that it has."""
    del liar.described["device_authorization_endpoint"]
    begun = SigningIn(table(liar.issuer), {}, [DEVICE])
    with closing(begun), pytest.raises(ConfigError) as raised:
        begun.begin()
    assert raised.value.message == "login corp: the provider offers browser, not device"

    begun = SigningIn(table(liar.issuer), {}, [DEVICE, BROWSER])
    with closing(begun):
        assert begun.begin()["way"] == BROWSER


def test_with_tls_all_of_it_has_tls_and_the_authority_can_be_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Liar(authority.server()) as liar:
        gives(liar)
        with pytest.raises(SourceUnavailable, match="certificate that is not trusted") as raised:
            signed_in(liar)
        assert raised.value.hint == 'name its authority: ca = "/path/to/authority.pem"'
        assert signed_in(liar, ca=str(authority.file)).standing.who == "ada"

        liar.described["token_endpoint"] = f"http://127.0.0.1:{liar.port}/token"
        gives(liar)
        with pytest.raises(SourceInvalid, match="token_endpoint is without TLS"):
            signed_in(liar, ca=str(authority.file))


# What it gives


def life(tokens: Tokens) -> float | None:
    standing = tokens.standing
    if standing.access_ends is None:
        return None
    return (standing.access_ends - standing.refreshed_at).total_seconds()


JWT_OF_A_MINUTE = jwt.encode({"alg": "HS256"}, {"iat": 1000, "exp": 1060}, OctKey.generate_key(256))


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ({"expires_in": 90}, 90),
        ({"expires_in": "90"}, 90),
        ({}, None),
        ({"expires_in": 0}, None),
        ({"access_token": JWT_OF_A_MINUTE}, 60),
        ({"access_token": JWT_OF_A_MINUTE, "expires_in": 30}, 30),
        ({"access_token": "a.b.c"}, None),
    ],
)
def test_how_long_a_token_lives(liar: Liar, answer: dict[str, Any], seconds: float | None) -> None:
    """By the answer; else by what the token says of itself; else nobody knows."""
    liar.answer = (200, {"access_token": "a", "token_type": "Bearer", **answer})
    assert life(signed_in(liar, scopes=["api"])) == seconds


def test_the_id_token_can_be_what_is_used(liar: Liar) -> None:
    """Its life is by the provider's clock alone."""
    now = int(time.time())
    gives(liar, iat=now + 40, exp=now + 640)
    tokens = signed_in(liar, token="id")
    assert tokens.access.reveal() == liar.answer[1]["id_token"]
    assert life(tokens) == 600

    gives(liar, iat=now + 40, exp=now + 40)
    with pytest.raises(SourceInvalid, match=r"\(exp\)"):
        signed_in(liar, token="id")


@pytest.mark.parametrize(
    ("keys", "more", "seconds"),
    [
        ({}, {}, None),
        ({"lasts": "8h"}, {}, 8 * 3600),
        ({}, {"refresh_expires_in": 1800}, 1800),
        ({"lasts": "8h"}, {"refresh_expires_in": 1800}, 1800),
    ],
)
def test_how_long_a_sign_in_lasts(
    liar: Liar, keys: dict[str, str], more: dict[str, Any], seconds: float | None
) -> None:
    """As the provider says, as the table says, or nobody knows."""
    gives(liar)
    status, body = liar.answer
    liar.answer = (status, lambda nonce: body(nonce) | more)
    standing = signed_in(liar, **keys).standing
    ends = None if standing.ends_at is None else (standing.ends_at - standing.since).seconds
    assert ends == seconds
    assert standing.lasts_until == standing.ends_at


def test_without_a_refresh_token_it_lasts_as_long_as_the_token(liar: Liar) -> None:
    gives(liar)
    status, body = liar.answer
    liar.answer = (status, lambda nonce: body(nonce) | {"refresh_token": None})
    standing = signed_in(liar, lasts="8h").standing
    assert not standing.renewable
    assert standing.lasts_until == standing.access_ends
    assert standing.access_ends is not None
    assert not standing.over(standing.access_ends - timedelta(seconds=1))
    assert standing.over(standing.access_ends)


@pytest.mark.parametrize("methods", [None, ["client_secret_basic"], ["client_secret_post"]])
def test_a_secret_is_sent_as_the_provider_takes_it(liar: Liar, methods: list[str] | None) -> None:
    """In a header, encoded as RFC 6749 has it, or in the form."""
    if methods:
        liar.described["token_endpoint_auth_methods_supported"] = methods
    gives(liar)
    tokens = signed_in(liar, client_secret={"env": "S"}, client_id="keybroker")
    del tokens
    [(_, form)] = [one for one in liar.asked if one[0] == "/token"]
    posted, header = form.get("client_secret"), liar.headers[0].get("authorization")
    if methods == ["client_secret_post"]:
        assert (posted, header) == ("s:e/c%r+t", None)
    else:
        assert posted is None
        assert header == "Basic " + base64.b64encode(b"keybroker:s%3Ae%2Fc%25r%2Bt").decode()


def test_a_way_that_is_refused_gives_way_to_the_other_and_is_known_from_then_on(
    liar: Liar, store: Store
) -> None:
    """Both may be named, and one of them agreed upon. A public client has no other way."""
    keys = {"client_secret": {"env": "S"}}
    liar.posted_only = True
    gives(liar)
    store.save(aged(signed_in(liar, **keys)))
    assert ["client_secret" in form for path, form in liar.asked if path == "/token"] == [
        False,
        True,
    ]
    liar.asked.clear()
    liar.answer = (200, NEW)
    login.current(table(liar.issuer, **keys), {"S": "s:e/c%r+t"}, store)
    assert ["client_secret" in form for path, form in liar.asked if path == "/token"] == [True]

    liar.asked.clear()
    gives(liar)
    with pytest.raises(SourceDenied, match="invalid_client"):
        signed_in(liar)
    assert liar.count("/token") == 1


# Renewals


def aged(tokens: Tokens, age: timedelta = timedelta(hours=1)) -> Tokens:
    """Return what was given, as it would be later."""
    standing = tokens.standing
    times = {
        name: getattr(standing, name) - age
        for name in ("since", "refreshed_at", "access_ends", "ends_at")
        if getattr(standing, name) is not None
    }
    return replace(tokens, standing=replace(standing, **times))


def renewal(liar: Liar, store: Store, answer: tuple[int, Any], **keys: Any) -> Tokens:
    """Sign in, let the token end, and renew it with what the liar answers."""
    gives(liar)
    store.save(aged(signed_in(liar, **keys)))
    liar.answer = answer
    liar.asked.clear()
    return login.current(table(liar.issuer, **keys), {}, store)


def held(store: Store, liar: Liar, **keys: Any) -> Tokens:
    found = store.load(table(liar.issuer, **keys))
    assert found is not None
    return found


NEW = {"access_token": "new", "token_type": "Bearer", "expires_in": 300, "refresh_token": "r-2"}


def test_a_renewal_is_kept_before_it_is_used(liar: Liar, store: Store) -> None:
    tokens = renewal(liar, store, (200, NEW))
    assert (tokens.access, tokens.refresh) == (Secret("new"), Secret("r-2"))
    assert held(store, liar) == tokens
    [(_, form)] = [one for one in liar.asked if one[0] == "/token"]
    assert form == {
        "grant_type": "refresh_token",
        "refresh_token": "r-1",
        "client_id": "keybroker",
    }


def test_a_provider_that_gives_no_new_refresh_token_goes_on_with_the_old(
    liar: Liar, store: Store
) -> None:
    """Neither does an ID token have to come, where it is not what is used."""
    tokens = renewal(liar, store, (200, {k: v for k, v in NEW.items() if k != "refresh_token"}))
    assert (tokens.access, tokens.refresh) == (Secret("new"), Secret("r-1"))


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"id_token": "no.token.atall"},
        {"sub": "bob"},
        {"iss": "https://evil.example"},
        {"exp": 1},
    ],
)
def test_an_id_token_that_is_of_no_use_costs_no_refresh_token(
    liar: Liar, store: Store, answer: dict[str, Any]
) -> None:
    """The old one is used up: what came with the bad ID token is what the next renewal takes."""
    new = dict(NEW)
    if "id_token" in answer:
        new |= answer
    elif answer:
        new |= {"id_token": liar.id_token(**answer)}
    with pytest.raises(SourceInvalid):
        renewal(liar, store, (200, new), token="id")
    assert held(store, liar, token="id").refresh == Secret("r-2")

    liar.answer = (200, NEW | {"refresh_token": "r-3", "id_token": liar.id_token()})
    tokens = login.current(table(liar.issuer, token="id"), {}, store)
    assert tokens.access.reveal() == liar.answer[1]["id_token"]
    assert [form["refresh_token"] for path, form in liar.asked if path == "/token"] == [
        "r-1",
        "r-2",
    ]


def test_a_provider_whose_keys_cannot_be_had_costs_no_refresh_token(
    liar: Liar, store: Store
) -> None:
    liar.failing.add("/keys")
    gives(liar)
    with pytest.raises(SourceUnavailable):
        signed_in(liar, token="id")

    liar.failing.clear()
    gives(liar)
    tokens = signed_in(liar, token="id")
    liar.failing.add("/keys")
    liar.answer = (200, NEW | {"id_token": liar.id_token()})
    provider = Oidc(table(liar.issuer, token="id"), {})
    with closing(provider), pytest.raises(HalfRenewedError) as raised:
        provider.refresh(tokens)
    assert isinstance(raised.value.error, SourceUnavailable)
    assert raised.value.tokens == replace(tokens, refresh=Secret("r-2"))


REFUSALS: list[tuple[int, Any, type[KeybrokerError], str]] = [
    (400, {"error": "invalid_grant"}, LoginNeeded, "HOST has ended the sign-in"),
    (401, {"error": "invalid_grant"}, LoginNeeded, "HOST has ended the sign-in"),
    (400, {"error": "interaction_required"}, LoginNeeded, "HOST has ended the sign-in"),
    (401, {"error": "invalid_client"}, SourceDenied, "HOST will not renew the token (invalid_cli"),
    (400, {"error": "invalid_scope"}, SourceInvalid, "HOST will not renew the token (invalid_sco"),
    (400, {"error": "slow_down"}, SourceUnavailable, "HOST asks to wait"),
    (429, {"error": "slow_down"}, SourceUnavailable, "HOST asks to wait"),
    (400, {"error": "temporarily_unavailable"}, SourceUnavailable, "HOST gave no token (400)"),
    (503, {"error": "invalid_grant"}, SourceUnavailable, "HOST gave no token (503)"),
    (429, {}, SourceUnavailable, "HOST gave no token (429)"),
    (500, b"<html>", SourceUnavailable, "HOST gave no token (500)"),
    (403, b"<html>", SourceInvalid, "HOST gave no token (403)"),
    (200, {}, SourceInvalid, "HOST gave no token"),
    (200, [], SourceInvalid, "HOST gave no token"),
    (200, b"null", SourceInvalid, "HOST gave no token"),
    (200, b"{", SourceInvalid, "HOST gave no token"),
    (200, NEW | {"access_token": ""}, SourceInvalid, "HOST gave a token that cannot be used"),
    (200, NEW | {"access_token": "two words"}, SourceInvalid, "HOST gave a token that cannot be"),
    (200, NEW | {"access_token": 5}, SourceInvalid, "HOST gave a token that cannot be"),
    (200, {"error": "invalid_grant"}, LoginNeeded, "HOST has ended the sign-in"),
]


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"), REFUSALS, ids=[str(n) for n in range(len(REFUSALS))]
)
def test_what_an_answer_to_a_renewal_means(
    liar: Liar, store: Store, status: int, body: Any, kind: type[KeybrokerError], said: str
) -> None:
    """Only the provider's own word ends a sign-in."""
    with pytest.raises(KeybrokerError) as raised:
        renewal(liar, store, (status, body))
    assert type(raised.value) is kind
    assert raised.value.message.startswith(
        f"login corp: {said}".replace("HOST", f"127.0.0.1:{liar.port}")
    )
    ended = held(store, liar).standing.ended
    assert bool(ended) == (kind is LoginNeeded)
    if kind is LoginNeeded:
        assert raised.value.hint == "run: keybroker login corp"
        assert raised.value.exit_status == 77


def test_what_a_provider_says_of_a_token_is_not_repeated(liar: Liar, store: Store) -> None:
    """Its words may hold the token that it does not like."""
    canaries = Canaries()
    token = canaries.new("told")
    body = {"error": token, "error_description": f"{token} is unknown", "error_uri": token}
    for status in (400, 401, 500, 200):
        with pytest.raises(SourceError) as raised:
            renewal(liar, store, (status, body))
        assert canaries.seen_in(f"{raised.value.message} {raised.value.hint}") == []
        liar.answer = (status, body)
        with pytest.raises(SourceError) as raised:
            signed_in(liar)
        assert canaries.seen_in(f"{raised.value.message} {raised.value.hint}") == []


def test_a_sign_in_that_has_ended_asks_nobody(liar: Liar, store: Store) -> None:
    """One clear word, and never a loop."""
    with pytest.raises(LoginNeeded):
        renewal(liar, store, (400, {"error": "invalid_grant"}))
    asked = len(liar.asked)
    for fresh in (False, True):
        for _ in range(3):
            with pytest.raises(LoginNeeded, match="has ended the sign-in"):
                login.current(table(liar.issuer), {}, store, fresh=fresh)
    assert len(liar.asked) == asked


def test_a_token_is_used_to_its_end_when_the_provider_fails(liar: Liar, store: Store) -> None:
    """By what asks something else with it, too; and not when somebody signed out."""
    gives(liar)
    sign_in = table(liar.issuer)
    least = timedelta(seconds=30)
    late = aged(signed_in(liar), timedelta(seconds=250))  # 50 s are left
    store.save(late)
    liar.answer = (503, {})
    with pytest.raises(SourceUnavailable):
        login.current(sign_in, {}, store)
    assert login.usable(sign_in, {}, store, least=timedelta(days=1)) == late
    assert login.usable(sign_in, {}, store, least=least) == late

    liar.answer = (400, {"error": "invalid_grant"})
    assert login.usable(sign_in, {}, store, least=timedelta(days=1)) == late.ended(
        f"127.0.0.1:{liar.port} has ended the sign-in"
    )
    store.save(late)
    login.leave(sign_in, store)
    with pytest.raises(LoginNeeded, match="nobody is signed in"):
        login.usable(sign_in, {}, store, least=least)
    assert login.usable(sign_in, {}, store, least=least, ends=True).access == late.access

    store.save(aged(late))
    with pytest.raises(SourceError):
        login.usable(sign_in, {}, store, least=least)


def test_a_clock_that_was_set_back_has_the_token_renewed(liar: Liar, store: Store) -> None:
    """It says that there is much time left, which nobody knows; a little is no reason."""
    gives(liar)
    sign_in = table(liar.issuer)
    tokens = signed_in(liar)
    liar.answer = (200, NEW)
    store.save(aged(tokens, timedelta(seconds=-30)))
    assert login.current(sign_in, {}, store).access == tokens.access
    assert login.current(sign_in, {}, store, fresh=True).access == tokens.access
    store.save(aged(tokens, timedelta(seconds=-3600)))
    assert login.current(sign_in, {}, store).access == Secret("new")

    liar.answer = (200, NEW | {"access_token": "newer"})
    assert login.current(sign_in, {}, store).access == Secret("new")


def test_a_doubted_token_is_renewed_once(liar: Liar, store: Store) -> None:
    """The second who doubts finds a new one; one that cannot be renewed stays."""
    gives(liar)
    sign_in = table(liar.issuer)
    tokens = signed_in(liar)
    store.save(aged(tokens, timedelta(seconds=11)))
    liar.answer = (200, NEW)
    for _ in range(3):
        assert login.current(sign_in, {}, store, fresh=True).access == Secret("new")
    assert [path for path, _ in liar.asked].count("/token") == 2

    once = replace(aged(tokens, timedelta(seconds=20)), refresh=None)
    store.save(once)
    assert login.current(sign_in, {}, store, fresh=True) == once
    store.save(aged(once))
    with pytest.raises(LoginNeeded, match="the sign-in has ended"):
        login.current(sign_in, {}, store)


def test_a_table_that_asks_for_something_else_has_no_sign_in(liar: Liar, store: Store) -> None:
    """What does not change what it is for keeps it."""
    gives(liar)
    store.save(signed_in(liar))
    same: list[dict[str, Any]] = [
        {"warn": "2h"},
        {"lasts": "8h"},
        {"timeout": "3s"},
        {"port": 8400},
        {"redirect": "http://localhost/x"},
        {"client_secret": {"env": "S"}},
    ]
    assert {key for one in same for key in one} | {"ca"} == set(signin.BESIDE)
    for keys in same:
        login.current(table(liar.issuer, **keys), {}, store)
    for keys in ({"scopes": ["openid"]}, {"client_id": "x"}, {"token": "id"}, {"resource": "r"}):
        with pytest.raises(LoginNeeded, match="nobody is signed in"):
            login.current(table(liar.issuer, **keys), {}, store)


def test_a_redirect_address_is_of_this_machine_and_has_no_port() -> None:
    for good in ("http://localhost", "http://127.0.0.1/", "http://127.0.0.1/a/b-c"):
        table("https://login.example.com", redirect=good)
    for bad in (
        "https://127.0.0.1/callback",
        "http://127.0.0.1:8400/callback",
        "http://example.com/callback",
        "/callback",
        "http://localhost/c?d",
        "http://localhost.evil.example/",
    ):
        with pytest.raises(ConfigError, match="port, if it always has the same"):
            table("https://login.example.com", redirect=bad)


# At a real provider


@pytest.fixture(scope="module")
def client(oidc: Server) -> str:
    return oidc.register(public=True, access_seconds=30).id


def arrive(sign_in: SignIn, browser: Browser | None = None, **variables: str) -> Tokens:
    """Sign in by a code that the browser brings back."""
    with closing(SigningIn(sign_in, variables, [BROWSER])) as begun:
        told = begun.begin()
        page = (browser or Browser()).open(told["url"])
        assert page.url.startswith(told["back"])
        tokens = begun.step(None, 5.0)
        assert tokens is not None
        return tokens


def test_a_browser_signs_somebody_in(oidc: Server, client: str) -> None:
    tokens = arrive(table(oidc.issuer, client_id=client, scopes=WITH_EMAIL), Browser("grace"))
    assert tokens.standing.who == "grace@example.com"
    assert tokens.standing.renewable
    assert life(tokens) == 30


def test_a_person_refuses(oidc: Server, client: str) -> None:
    """In the browser, or where the code is typed."""
    with pytest.raises(SourceDenied) as raised:
        arrive(table(oidc.issuer, client_id=client), Browser(refuses=oidc.issuer))
    assert raised.value.message == (
        "login corp: the sign-in was refused: End-User aborted interaction"
    )
    assert raised.value.hint == "run: keybroker login corp"

    with closing(Oidc(table(oidc.issuer, client_id=client), {})) as provider:
        device = provider.device()
        Browser(refuses=oidc.issuer).open(device.whole)
        with pytest.raises(SourceDenied, match="the sign-in was refused"):
            device.poll(1.0)


def test_a_code_is_typed_on_another_device(oidc: Server, client: str) -> None:
    """Who asks too often is told so, and waits for longer from then on (RFC 8628, 3.5)."""
    with closing(Oidc(table(oidc.issuer, client_id=client), {})) as provider:
        device = provider.device()
        assert (device.interval, device.lasts) == (1.0, 300.0)
        assert device.poll(1.0) == 1.0
        assert device.poll(1.0) == 6.0
        Browser("bob", code=device.code).open(device.url)
        tokens = device.poll(6.0)
        assert isinstance(tokens, Tokens)
        assert tokens.standing.who == "bob"
        with pytest.raises(SourceInvalid, match=r"will not sign in \(invalid_grant"):
            device.poll(6.0)


def test_a_code_that_nobody_types_ends(oidc: Server) -> None:
    client = oidc.register(public=True, device_seconds=1).id
    with closing(Oidc(table(oidc.issuer, client_id=client), {})) as provider:
        device = provider.device()
        ends = time.monotonic() + 10
        with pytest.raises(SourceDenied, match="took longer than its code"):
            while time.monotonic() < ends:
                device.poll(1.0)


def test_a_code_that_is_asked_for_in_vain_is_asked_for_less_often(
    oidc: Server, client: str
) -> None:
    """RFC 8628, section 3.5: after a time-out the interval is doubled."""
    with closing(Oidc(table(oidc.issuer, client_id=client), {})) as provider:
        device = provider.device()
        oidc.front.next(DropBeforeCommit(), path="/token")
        assert device.poll(2.0) == 4.0
        oidc.front.next(Status(503), path="/token")
        assert device.poll(50.0) == 60.0


def test_a_replayed_code_gives_nothing(oidc: Server, client: str, store: Store) -> None:
    """And the provider ends what the first one gave: the next renewal says so."""
    sign_in = table(oidc.issuer, client_id=client)
    with closing(Oidc(sign_in, {})) as provider:
        visit = provider.browser(BACK)
        page = Browser(before=BACK).open(visit.url)
        answer = {name: v[0] for name, v in parse_qs(urlsplit(page.url).query).items()}
        assert answer["state"] == visit.state
        tokens = visit.redeem(answer)
        with pytest.raises(SourceInvalid, match=r"will not sign in \(invalid_grant"):
            visit.redeem(answer)
    store.save(aged(tokens))
    with pytest.raises(LoginNeeded):
        login.current(sign_in, {}, store)


def test_another_s_code_gives_nothing(oidc: Server, client: str) -> None:
    """It was asked for with another verifier."""
    with closing(Oidc(table(oidc.issuer, client_id=client), {})) as provider:
        mine, theirs = provider.browser(BACK), provider.browser(BACK)
        page = Browser("mallory", before=BACK).open(theirs.url)
        answer = {name: v[0] for name, v in parse_qs(urlsplit(page.url).query).items()}
        with pytest.raises(SourceInvalid, match=r"will not sign in \(invalid_grant"):
            mine.redeem({**answer, "state": mine.state})


def test_a_token_for_somebody_is_a_jwt_that_says_so(oidc: Server, client: str) -> None:
    """With `resource`; also with a code that is typed, and after a renewal."""
    sign_in = table(
        oidc.issuer, client_id=client, resource="https://gw.example", scopes=["openid", "api"]
    )

    def audience(tokens: Tokens) -> Any:
        text = tokens.access.reveal().split(".")[1]
        return json.loads(base64.urlsafe_b64decode(text + "=="))["aud"]

    assert audience(arrive(sign_in)) == "https://gw.example"
    with closing(Oidc(sign_in, {})) as provider:
        device = provider.device()
        Browser().open(device.whole)
        tokens = device.poll(1.0)
        assert isinstance(tokens, Tokens)
        assert audience(tokens) == "https://gw.example"


def test_refresh_tokens_are_used_once(oidc: Server, client: str, store: Store) -> None:
    """Each is kept in the place of the one before; one that comes again ends all of it."""
    sign_in = table(oidc.issuer, client_id=client)
    first = arrive(sign_in)
    assert first.refresh is not None
    seen = {first.refresh.fingerprint}
    store.save(aged(first))
    for number in range(2, 5):
        tokens = login.current(sign_in, {}, store)
        assert tokens.refresh is not None
        seen.add(tokens.refresh.fingerprint)
        assert len(seen) == number
        store.save(aged(tokens))

    store.save(aged(first))
    with pytest.raises(LoginNeeded, match="has ended the sign-in"):
        login.current(sign_in, {}, store)
    store.save(aged(tokens))  # the family of it is dead
    with pytest.raises(LoginNeeded, match="has ended the sign-in"):
        login.current(sign_in, {}, store)


@pytest.mark.parametrize("scopes", [["openid"], ["openid", "email"]])
def test_without_offline_access_nothing_is_renewed(oidc: Server, client: str, scopes: Any) -> None:
    assert not arrive(table(oidc.issuer, client_id=client, scopes=scopes)).standing.renewable


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_a_client_with_a_secret(oidc: Server, store: Store, method: str) -> None:
    """Which way it was agreed upon is found out once, and known at each renewal."""
    known = oidc.register(
        application_type="native", public=False, token_endpoint_auth_method=method
    )
    sign_in = table(oidc.issuer, client_id=known.id, client_secret={"env": "S"})
    tokens = arrive(sign_in, S=known.secret)
    store.save(aged(tokens))
    before = len(oidc.front.log)
    login.current(sign_in, {"S": known.secret}, store)
    assert [e.path for e in oidc.front.log[before:] if e.method == "POST"] == ["/token"]
    assert login.end(sign_in, {"S": known.secret}, store)

    with pytest.raises(SourceDenied, match="invalid_client") as raised:
        arrive(sign_in, S="wrong")
    assert raised.value.hint == "see client_id and client_secret of the login"


def test_signing_out_ends_it_at_the_provider(oidc: Server, client: str, store: Store) -> None:
    sign_in = table(oidc.issuer, client_id=client)
    tokens = arrive(sign_in)
    store.save(tokens)
    assert login.end(sign_in, {}, store)
    assert store.load(sign_in) is None

    store.save(aged(tokens))
    with pytest.raises(LoginNeeded, match="has ended the sign-in"):
        login.current(sign_in, {}, store)
    assert not login.end(sign_in, {}, store)  # it had ended


# When it fails on the way

FAULTS: dict[str, Fault] = {
    "nobody there": DropBeforeCommit(),
    "lost on the way back": CommitThenDrop(),
    "half an answer": Truncated(),
    "half a JSON": GarbageJson(),
    "silent": Hang(),
    "a page": Html(),
    "broken": Status(503),
    "elsewhere": Redirect("http://127.0.0.1:1/evil"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/device/auth", "/token"])
def test_whatever_fails_on_the_way_is_said_in_our_words(
    oidc: Server, client: str, name: str, path: str
) -> None:
    """With the provider's host; as a page that a person reads, it is no stack of calls."""
    sign_in = table(oidc.issuer, client_id=client, timeout="400ms")
    way = DEVICE if path == "/device/auth" else BROWSER
    armed = oidc.front.next(FAULTS[name], path=path)
    try:
        begun = SigningIn(sign_in, {}, [way])
        with closing(begun), pytest.raises(SourceError) as raised:
            told = begun.begin()
            page = Browser().open(told["url"])
            assert page.status == 400
            assert "Not signed in" in page.text
            begun.step(None, 5.0)
        assert armed.wait().path == path
    finally:
        oidc.front.clear()
    assert raised.value.message.startswith("login corp: 127.0.0.1:")
    assert len(raised.value.message) < 150


@pytest.mark.parametrize("name", FAULTS)
def test_a_renewal_that_fails_on_the_way_is_no_end(
    oidc: Server, client: str, store: Store, name: str
) -> None:
    """Unless the provider did it, and its answer was lost: then the next one ends it, once."""
    sign_in = table(oidc.issuer, client_id=client, timeout="400ms")
    tokens = aged(arrive(sign_in))
    store.save(tokens)
    oidc.front.next(FAULTS[name], path="/token")
    try:
        with pytest.raises(SourceError) as raised:
            login.current(sign_in, {}, store)
        assert not isinstance(raised.value, LoginNeeded)
        assert store.load(sign_in) == tokens
    finally:
        oidc.front.clear()
    if name in ("lost on the way back", "half an answer"):
        with pytest.raises(LoginNeeded):
            login.current(sign_in, {}, store)
        before = len(oidc.front.log)
        with pytest.raises(LoginNeeded):
            login.current(sign_in, {}, store)
        assert len(oidc.front.log) == before
    else:
        assert login.current(sign_in, {}, store).left(datetime.now(UTC)) > 0
