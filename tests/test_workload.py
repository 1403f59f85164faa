"""A machine that signs in by itself: what it shows, what it is given for it, and who is told."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from joserfc.jwk import ECKey, RSAKey

from keybroker import login
from keybroker.config import parse
from keybroker.credential import Secret
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import (
    CacheError,
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.jwt import read_claims
from keybroker.login.provider import now
from keybroker.login.tokens import Store, Tokens
from keybroker.pool import variables
from keybroker.signin import GITHUB_VARIABLES, SignIn, file_of, read_login, standing_of
from keybroker.sources.held import Memory
from keybroker.values import replace
from tests.canaries import Watch
from tests.contracts import check_silent
from tests.resident import Resident, until
from tests.servers.exchange import TOKEN, Actions, Answer, Exchange
from tests.servers.faults import refused_url
from tests.servers.oidc import Oidc
from tests.servers.signer import Signer
from tests.servers.vault import OpenBao
from tests.test_http import no_variables as no_variables
from tests.test_reference import private

pytestmark = pytest.mark.usefixtures("no_variables")

AUDIENCE = "https://llm.example.com"
POD = "system:serviceaccount:default:builder"
JOB = "repo:acme/app:ref:refs/heads/main"
GRANTS = ("client_credentials", "jwt_bearer", "token_exchange")


def table(**settings: Any) -> SignIn:
    """Read a table of a machine's."""
    return read_login("ci", {"type": "workload", **settings}, Where({}, "config"))


def shown(sign_in: SignIn, environment: Mapping[str, str] = os.environ) -> Tokens:
    """Have a machine sign in, with nobody else about."""
    return login.current(sign_in, environment, Memory())  # type: ignore[arg-type]


@pytest.fixture
def cluster() -> Signer:
    """Who signs the tokens of pods."""
    return Signer("https://kubernetes.default.svc")


@pytest.fixture
def provider(cluster: Signer) -> Iterator[Exchange]:
    """A provider that trusts it."""
    with Exchange(cluster) as server:
        yield server


@pytest.fixture
def actions() -> Iterator[Actions]:
    """GitHub's server for a job."""
    with Actions(JOB) as server:
        yield server


@pytest.fixture
def pod(tmp_path: Path, cluster: Signer, provider: Exchange) -> Path:
    """The file that Kubernetes projects into a pod: open to all that is in it."""
    return private(tmp_path / "token", cluster.token(POD, provider.url, 600), 0o644)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Where tokens are kept, sealed."""
    return Store(private_folder(tmp_path / "state"), Secret(secrets.token_hex(32)))


def private_folder(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


# the table

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to show": ({}, "ci.jwt: there is nothing that says who this is"),
    "a token itself": ({"jwt": "eyJhbGciOi"}, 'or "github-actions"'),
    "nobody to ask": (
        {"jwt": "github-actions", "grant": "token_exchange"},
        "ci.issuer: give issuer or token_url",
    ),
    "two to ask": (
        {
            "jwt": "github-actions",
            "grant": "token_exchange",
            "issuer": "https://a.example",
            "token_url": "https://a.example/token",
        },
        "ci.issuer: give issuer or token_url",
    ),
    "asked for nothing": (
        {"jwt": "github-actions", "issuer": "https://a.example"},
        "ci.issuer: nobody is asked",
    ),
    "a client that nothing knows": (
        {"grant": "client_credentials", "issuer": "https://a.example", "client_id": "ci"},
        "ci.grant: needs one of client_secret, private_key and jwt",
    ),
    "known twice": (
        {
            "grant": "client_credentials",
            "issuer": "https://a.example",
            "client_id": "ci",
            "client_secret": {"env": "A"},
            "jwt": {"env": "B"},
        },
        "ci.grant: needs one of",
    ),
    "a secret and a key": (
        {
            "grant": "jwt_bearer",
            "issuer": "https://a.example",
            "client_id": "ci",
            "client_secret": {"env": "A"},
            "private_key": "/b",
            "jwt": {"env": "B"},
        },
        "ci.private_key: is in place of client_secret",
    ),
    "a secret of nobody": (
        {
            "grant": "jwt_bearer",
            "issuer": "https://a.example",
            "client_secret": {"env": "A"},
            "jwt": {"env": "B"},
        },
        "ci.client_id: is missing",
    ),
    "a name of no key": (
        {
            "grant": "client_credentials",
            "issuer": "https://a.example",
            "client_id": "ci",
            "client_secret": {"env": "A"},
            "key_id": "k",
        },
        "ci.key_id: is the name of private_key",
    ),
    "an audience that nobody can be told": (
        {"jwt": {"file": "/t"}, "jwt_audience": "https://a.example"},
        "ci.jwt_audience: is for",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_said(case: str) -> None:
    """With the key that is wrong."""
    settings, words = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        table(**settings)
    assert words in caught.value.message


def test_nobody_but_who_asks_github_has_its_variables() -> None:
    """A worker for another kind of source does not, nor one for another login."""
    config = parse(
        {
            "logins": {
                "job": {"type": "workload", "jwt": "github-actions"},
                "pod": {"type": "workload", "jwt": {"file": "/t"}},
            },
            "profiles": {
                "a": {"base_url": AUDIENCE, "source": {"type": "login", "login": "pod"}},
                "b": {"base_url": AUDIENCE, "source": {"type": "litellm", "login": "job"}},
                "c": {"base_url": AUDIENCE, "source": {"type": "command", "command": ["true"]}},
            },
        },
        Where({}, "config"),
    )
    named = variables(config)
    assert named["litellm"] == set(GITHUB_VARIABLES)
    assert named["command"] == set()
    assert named["login"] == set(GITHUB_VARIABLES)  # who signs in by hand


# what is given


@pytest.mark.parametrize("grant", GRANTS)
def test_a_pod_s_token_is_exchanged(grant: str, pod: Path, provider: Exchange) -> None:
    """In each of three ways, with what each RFC wants sent and no more."""
    client = {"client_id": POD} if grant == "client_credentials" else {}
    tokens = shown(
        table(
            jwt={"file": str(pod)},
            grant=grant,
            issuer=provider.url,
            audience=AUDIENCE,
            scopes=["llm", "models"],
            **client,
        )
    )
    jwt, [form] = pod.read_text(), provider.asked
    urn = "urn:ietf:params:oauth"
    wanted = {
        "client_credentials": {
            "grant_type": "client_credentials",
            "client_id": POD,
            "client_assertion_type": f"{urn}:client-assertion-type:jwt-bearer",
            "client_assertion": jwt,
        },
        "jwt_bearer": {"grant_type": f"{urn}:grant-type:jwt-bearer", "assertion": jwt},
        "token_exchange": {
            "grant_type": f"{urn}:grant-type:token-exchange",
            "subject_token": jwt,
            "subject_token_type": f"{urn}:token-type:jwt",
            "requested_token_type": f"{urn}:token-type:access_token",
        },
    }
    assert form == {**wanted[grant], "scope": "llm models", "audience": AUDIENCE}
    claims = provider.signer.claims(tokens.access.reveal())
    assert claims is not None
    assert (claims["sub"], claims["aud"]) == (POD, AUDIENCE)
    standing = tokens.standing
    assert standing.access_ends is not None
    assert (standing.access_ends - standing.since).total_seconds() == 600
    assert (standing.who, standing.renewable, standing.ends_at) == (POD, True, None)


def test_a_client_may_be_known_by_a_secret_as_well(pod: Path, provider: Exchange) -> None:
    """Where tokens are exchanged for clients alone; whose secret is wrong is told so."""
    provider.clients["ci"] = "s%c:r et"
    sign_in = table(
        jwt={"file": str(pod)},
        grant="token_exchange",
        token_url=provider.token_url,
        client_id="ci",
        client_secret={"env": "CI_SECRET"},
        audience=AUDIENCE,
    )
    with pytest.raises(ConfigError, match="not one token"):
        shown(sign_in, {"CI_SECRET": "s%c:r et"})
    provider.clients["ci"] = "s%c:r&et"
    assert shown(sign_in, {"CI_SECRET": "s%c:r&et"}).standing.who == POD
    wrong = secrets.token_hex(12)
    with pytest.raises(SourceDenied) as caught:
        shown(sign_in, {"CI_SECRET": wrong})
    check_silent(caught.value, wrong, pod.read_text())
    assert "gives no token (invalid_client)" in caught.value.message


def test_a_job_of_github_s_is_shown_as_it_is(actions: Actions) -> None:
    """Its JWT is the token; whom it is for is asked for."""
    sign_in = table(jwt="github-actions", jwt_audience=f"{AUDIENCE}/a?b&c")
    tokens = shown(sign_in, actions.variables)
    claims = actions.signer.claims(tokens.access.reveal())
    assert claims is not None
    assert (claims["sub"], claims["aud"]) == (JOB, f"{AUDIENCE}/a?b&c")
    assert tokens.standing.who == JOB
    assert 290 < tokens.left(now()) <= 300

    ours = shown(table(jwt="github-actions"), actions.variables)
    claims = actions.signer.claims(ours.access.reveal())
    assert claims is not None
    assert claims["aud"] == "https://github.com/acme"


def test_a_job_s_jwt_is_exchanged(actions: Actions, provider: Exchange) -> None:
    """By who trusts GitHub."""
    provider.trusted.append(actions.signer)
    tokens = shown(
        table(
            jwt="github-actions",
            jwt_audience=provider.url,
            grant="jwt_bearer",
            token_url=provider.token_url,
        ),
        actions.variables,
    )
    claims = provider.signer.claims(tokens.access.reveal())
    assert claims is not None
    assert claims["sub"] == JOB


def test_a_program_that_prints_a_jwt_is_one(cluster: Signer) -> None:
    """And what is in a variable, as GitLab has it."""
    jwt = cluster.token("job", AUDIENCE, 60)
    printed = shown(table(jwt={"command": ["echo", jwt]}), {"PATH": os.defpath})
    given = shown(table(jwt={"env": "ID_TOKEN"}), {"ID_TOKEN": jwt})
    assert printed.access == given.access == Secret(jwt)


def private_keys() -> Iterator[tuple[str, Any]]:
    yield "RS256", rsa.generate_private_key(65537, 2048)
    yield "ES256", ec.generate_private_key(ec.SECP256R1())


@pytest.mark.servers
@pytest.mark.parametrize("form", ["pem", "jwk"])
def test_a_client_signs_for_itself(oidc: Oidc, tmp_path: Path, form: str) -> None:
    """At a real provider, which checks it, with keys of each kind, in either form."""
    kinds = {"RS256": RSAKey, "ES256": ECKey}
    for algorithm, key in private_keys():
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        jwk = kinds[algorithm].import_key(pem)
        client = oidc.register(
            redirect_uris=[],
            response_types=[],
            grant_types=["client_credentials"],
            application_type="web",
            token_endpoint_auth_method="private_key_jwt",
            token_endpoint_auth_signing_alg=algorithm,
            jwks={"keys": [{**jwk.as_dict(private=False), "kid": "one"}]},
        )
        text = pem if form == "pem" else json.dumps(jwk.as_dict(private=True), indent=1)
        file = private(tmp_path / f"{algorithm}.{form}", text)
        sign_in = table(
            grant="client_credentials",
            issuer=oidc.issuer,
            client_id=client.id,
            private_key=str(file),
            key_id="one",
            resource=oidc.audience,
        )
        tokens = shown(sign_in)
        assert plain(tokens)["client_id"] == client.id
        wrong = private(tmp_path / f"other-{algorithm}", _pem(next(private_keys())[1]))
        with pytest.raises(SourceDenied, match="invalid_client"):
            shown(table(**{**_settings(sign_in), "private_key": str(wrong)}))


def _settings(sign_in: SignIn) -> dict[str, Any]:
    return {name: value for name, value in sign_in.raw.items() if name != "type"}


def _pem(key: Any) -> str:
    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return text.decode()


def plain(tokens: Tokens) -> Mapping[str, Any]:
    claims = read_claims(tokens.access.reveal())
    assert claims is not None
    return claims


@pytest.mark.servers
def test_a_client_with_a_secret_at_a_real_provider(oidc: Oidc) -> None:
    """By its description, or by its address alone."""
    common = {
        "grant": "client_credentials",
        "client_id": oidc.client,
        "client_secret": {"env": "SECRET"},
    }
    for where in ({"issuer": oidc.issuer}, {"token_url": f"{oidc.issuer}/token"}):
        tokens = shown(table(**common, **where), {"SECRET": oidc.secret})
        assert (plain(tokens)["client_id"], plain(tokens)["aud"]) == (oidc.client, oidc.audience)
        assert 50 < tokens.left(now()) <= 60
    with pytest.raises(SourceDenied, match="invalid_client"):
        shown(table(**common, issuer=oidc.issuer), {"SECRET": "another"})


# what may go wrong


def test_who_is_not_trusted_hears_who_they_said_they_are(
    provider: Exchange, cluster: Signer, tmp_path: Path
) -> None:
    """The provider's word, and what it was shown: one of these it does not trust."""
    for signer, audience, words in (
        (Signer("https://forger.example"), provider.url, "not trusted"),
        (cluster, "https://another.example", "for somebody else"),
    ):
        jwt = signer.token(POD, audience, 600)
        file = private(tmp_path / secrets.token_hex(4), jwt)
        with pytest.raises(SourceDenied) as caught:
            shown(table(jwt={"file": str(file)}, grant="jwt_bearer", issuer=provider.url))
        check_silent(caught.value, jwt)
        assert f"gives no token (invalid_grant: {words})" in caught.value.message
        told = f"it was shown iss {signer.issuer}, sub {POD}, aud {audience}"
        assert caught.value.hint == told


FAULTS: dict[str, tuple[Answer | None, type[SourceError], str]] = {
    "no answer": (None, SourceUnavailable, "broke off its answer"),
    "an error of its own": ((500, {}), SourceUnavailable, "gave no token (500)"),
    "a busy one": ((503, {"error": "temporarily_unavailable"}), SourceUnavailable, "(503)"),
    "too often": ((429, {}), SourceUnavailable, "gave no token (429)"),
    "no token": ((200, {"token_type": "Bearer"}), SourceInvalid, "gave no token"),
    "a token that is none": (
        (200, {"access_token": "two words", "token_type": "Bearer", "issued_token_type": "x"}),
        SourceInvalid,
        "gave a token that cannot be used",
    ),
    "no kind": (
        (200, {"access_token": "opaque", "token_type": "Bearer"}),
        SourceInvalid,
        "gave another kind of token (unnamed)",
    ),
    "another kind": (
        (
            200,
            {
                "access_token": "opaque",
                "token_type": "N_A",
                "issued_token_type": f"{TOKEN}:refresh_token",
            },
        ),
        SourceInvalid,
        f"gave another kind of token ({TOKEN}:refresh_token)",
    ),
    "somebody else's words": ((400, {"message": "no"}), SourceInvalid, "gave no token (400)"),
    "a target that is unknown": (
        (400, {"error": "invalid_target"}),
        SourceDenied,
        "invalid_target",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_provider_that_fails_is_told_apart(case: str, pod: Path, provider: Exchange) -> None:
    """What may pass by itself from what does not; nothing of an answer is repeated."""
    answer, kind, words = FAULTS[case]
    provider.fails = [answer]
    sign_in = table(
        jwt={"file": str(pod)},
        grant="token_exchange",
        token_url=provider.token_url,
        audience=AUDIENCE,
    )
    with pytest.raises(KeybrokerError) as caught:
        shown(sign_in)
    assert type(caught.value) is kind, caught.value.message
    assert words in caught.value.message
    check_silent(caught.value, pod.read_text(), "two words", "opaque")


def test_a_machine_without_a_token_says_what_is_missing(
    actions: Actions, cluster: Signer, tmp_path: Path
) -> None:
    """Each in words of its own."""
    job = table(jwt="github-actions")
    url, secret = GITHUB_VARIABLES
    ended = private(tmp_path / "ended", cluster.token(POD, AUDIENCE, -1))
    none = private(tmp_path / "none", "no.jwt")
    cases: list[tuple[SignIn, Mapping[str, str], type[KeybrokerError], str]] = [
        (job, {}, ConfigError, f"login ci: {url} is not set"),
        (job, {url: actions.url}, ConfigError, f"login ci: {secret} is not set"),
        (job, {**actions.variables, secret: "x"}, SourceDenied, "will not say who this job is"),
        (job, {url: f"{refused_url()}/?a=b", secret: "x"}, SourceUnavailable, "be reached"),
        (table(jwt={"file": "/nowhere"}), {}, ConfigError, "cannot be read"),
        (table(jwt={"file": str(ended)}), {}, SourceUnavailable, "the token has ended already"),
        (table(jwt={"file": str(none)}), {}, SourceInvalid, "is no JWT"),
    ]
    for sign_in, environment, kind, words in cases:
        with pytest.raises(KeybrokerError) as caught:
            shown(sign_in, environment)
        assert type(caught.value) is kind, caught.value.message
        assert words in caught.value.message
    actions.fails = [(500, {"message": "oops"})]
    with pytest.raises(SourceUnavailable, match=r"failed to say who this job is \(500\)"):
        shown(job, actions.variables)
    actions.fails = [(200, {"value": "not a\nJWT"})]
    with pytest.raises(SourceInvalid, match="the job's JWT is not one token"):
        shown(job, actions.variables)


def test_a_key_that_signs_is_our_own(tmp_path: Path, provider: Exchange) -> None:
    """Others cannot read it, and it is one."""
    key = private(tmp_path / "key", _pem(next(private_keys())[1]), 0o644)
    sign_in = table(
        grant="client_credentials",
        issuer=provider.url,
        client_id="ci",
        private_key=str(key),
    )
    with pytest.raises(ConfigError, match="others can read it"):
        shown(sign_in)
    key.chmod(0o600)
    for text in ("no key", "{}", '{"kty":"oct","k":"c2VjcmV0"}', "-----BEGIN PRIVATE KEY-----"):
        key.write_text(text)
        with pytest.raises(ConfigError, match="is no private key") as caught:
            shown(sign_in)
        check_silent(caught.value, "c2VjcmV0")


# how long it is used


def test_a_token_that_is_replaced_in_its_file_is_taken_before_its_end(
    cluster: Signer, tmp_path: Path
) -> None:
    """The one that was read is used while it is good; a third before its end its file is read."""
    first, second = cluster.token(POD, AUDIENCE, 4), cluster.token(POD, AUDIENCE, 600)
    file = private(tmp_path / "token", first)
    sign_in, kept = table(jwt={"file": str(file)}), Memory()

    def used() -> str:
        return login.current(sign_in, {}, kept).access.reveal()  # type: ignore[arg-type]

    assert used() == first
    file.write_text(second)
    assert used() == first
    until(lambda: used() == second, 4)
    assert cluster.claims(first) is not None
    file.unlink()
    assert used() == second


def test_one_that_is_doubted_is_had_anew_but_not_again_and_again(
    provider: Exchange, pod: Path
) -> None:
    """Who was refused with it gets another one; twice in ten seconds it is the same."""
    sign_in = table(
        jwt={"file": str(pod)}, grant="jwt_bearer", token_url=provider.token_url, timeout="2s"
    )
    kept = Memory()
    first = login.current(sign_in, {}, kept)  # type: ignore[arg-type]
    same = login.current(sign_in, {}, kept, fresh=True)  # type: ignore[arg-type]
    assert (same.access, len(provider.asked)) == (first.access, 1)
    old = replace(
        first, standing=replace(first.standing, refreshed_at=now() - timedelta(minutes=1))
    )
    kept.save(old)
    again = login.current(sign_in, {}, kept, fresh=True)  # type: ignore[arg-type]
    assert (again.access != first.access, len(provider.asked)) == (True, 2)


def test_a_token_without_an_end_lasts_as_the_table_says(pod: Path, provider: Exchange) -> None:
    """Where neither says, it is used until it is refused."""
    provider.seconds = None
    common = {"jwt": {"file": str(pod)}, "grant": "jwt_bearer", "token_url": provider.token_url}
    said = shown(table(**common, lasts="90s"))
    assert said.access.reveal().startswith("opaque-")
    assert 85 < said.left(now()) <= 90
    assert shown(table(**common)).standing.access_ends is None


def test_it_is_used_to_its_end_when_the_provider_fails(pod: Path, provider: Exchange) -> None:
    """By who asks something else with it."""
    provider.seconds = 3
    sign_in = table(jwt={"file": str(pod)}, grant="jwt_bearer", token_url=provider.token_url)
    kept: Any = Memory()

    def used() -> Tokens:
        return login.usable(sign_in, {}, kept, least=timedelta(seconds=30))

    first = used()
    provider.fails = [(503, {})]
    until(lambda: len(provider.asked) > 1 or used().access != first.access, 4)
    assert used().access == first.access
    until(lambda: first.left(now()) <= 0, 4)
    with pytest.raises(SourceUnavailable):
        used()


# where it is kept


def test_four_processes_ask_once(
    store: Store, provider: Exchange, pod: Path, tmp_path: Path
) -> None:
    """One of them asks, and the others have what it was given."""
    program = """
import sys
from pathlib import Path
from keybroker import login
from keybroker.credential import Secret
from keybroker.login.provider import now
from keybroker.login.tokens import Store
from keybroker.signin import read_text
sys.stdin.readline()
store = Store(Path(sys.argv[1]), Secret(sys.argv[2]))
print(login.current(read_text(sys.argv[3]), {}, store).access.fingerprint)
"""
    sign_in = table(jwt={"file": str(pod)}, grant="jwt_bearer", token_url=provider.token_url)
    key = secrets.token_hex(32)
    command = [sys.executable, "-c", program, str(tmp_path / "state"), key, sign_in.text]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for one in running:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    found = {one.communicate(timeout=30)[0] for one in running}
    assert [one.returncode for one in running] == [0, 0, 0, 0]
    assert (len(found), len(provider.asked)) == (1, 1)


def test_what_cannot_be_kept_is_used_all_the_same(
    store: Store, provider: Exchange, pod: Path, tmp_path: Path
) -> None:
    """A file of another key, a folder that takes none: a machine asks once more."""
    sign_in = table(jwt={"file": str(pod)}, grant="jwt_bearer", token_url=provider.token_url)
    first = login.current(sign_in, {}, store)
    standing = standing_of(tmp_path / "state", sign_in)
    assert standing == first.standing
    assert login.current(sign_in, {}, store).access == first.access

    other = Store(tmp_path / "state", Secret(secrets.token_hex(32)))
    second = login.current(sign_in, {}, other)
    assert second.access != first.access
    assert login.current(sign_in, {}, other).access == second.access

    class Full(Store):
        def save(self, tokens: Tokens) -> None:
            del tokens
            raise CacheError("login: no room")

    full = Full(private_folder(tmp_path / "full"), Secret("x"))
    assert login.current(sign_in, {}, full).access not in (first.access, second.access)
    assert len(provider.asked) == 3


# a daemon with it

PROFILE = """
[profiles.{name}]
base_url = "{url}"
{more}
[profiles.{name}.source]
type = "{type}"
login = "ci"
"""


def configured(resident: Resident, text: str, *names: str, url: str = "http://127.0.0.1:9") -> None:
    more = 'verify = "none"'
    profiles = [PROFILE.format(name=one, url=url, type="login", more=more) for one in names]
    resident.configure("".join(profiles) + text)


def test_a_fresh_container_has_a_key_and_keeps_nothing(
    resident: Resident, provider: Exchange, pod: Path
) -> None:
    """No keyring, no person, no key file: two profiles share what one request gave."""
    configured(
        resident,
        f'[logins.ci]\ntype = "workload"\ngrant = "jwt_bearer"\njwt = {{ file = "{pod}" }}\n'
        f'issuer = "{provider.url}"\n[cache]\nkey = "memory"\n',
        "one",
        "two",
    )
    resident.start()
    assert resident.key("one") == resident.key("two")
    assert provider.signer.claims(resident.key("one")) is not None
    assert len(provider.asked) == 1
    signature = resident.key("one").rpartition(".")[2].encode()
    files = [one for one in resident.home.path.rglob("*") if one.is_file()]
    assert [one for one in files if signature in one.read_bytes()] == []


def test_a_job_s_variables_reach_who_asks_and_nobody_else(
    resident: Resident, actions: Actions, tmp_path: Path
) -> None:
    """The first `keybroker get` of a job starts the daemon, which has them; so has one worker."""
    seen = tmp_path / "environment"
    configured(
        resident,
        '[logins.ci]\ntype = "workload"\njwt = "github-actions"\n'
        '[profiles.other]\nbase_url = "http://127.0.0.1:9"\nverify = "none"\n'
        '[profiles.other.source]\ntype = "command"\n'
        f'command = ["sh", "-c", "env > {seen}; echo sk-of-another-program"]\n',
        "work",
    )
    resident.environment.update(actions.variables, OTHER="not for the daemon")
    with Watch() as watch:
        status, key, stderr = resident.cli("get", "work")
        assert (status, stderr) == (0, "")
        until(seen.exists)
        watch.look()
    claims = actions.signer.claims(key.strip())
    assert claims is not None
    assert claims["sub"] == JOB
    secret = actions.secret.encode()
    having = {
        one.command for one in watch.seen.values() if one.environment and secret in one.environment
    }
    assert actions.secret not in seen.read_text()
    workers = [one for one in having if b"keybroker.worker" in one]
    daemons = [one for one in having if b"keybroker.listening" in one]
    assert (len(workers), len(daemons)) == (1, 1)
    for one in watch.seen.values():
        assert secret not in one.command
    told = resident.said() + "".join(map(str, resident.cli("status", "--json")))
    assert actions.secret not in told
    assert key.strip().rpartition(".")[2] not in told


def test_the_daemon_follows_a_token_that_is_rotated_under_it(
    resident: Resident, cluster: Signer
) -> None:
    """As Kubernetes does: a link to another folder, before the end of what was there."""
    place = resident.home.path / "tokens"
    place.mkdir()
    first, second = cluster.token(POD, AUDIENCE, 12), cluster.token(POD, AUDIENCE, 600)
    for name, text in (("one", first), ("two", second)):
        (place / name).mkdir()
        (place / name / "token").write_text(text)
    (place / "data").symlink_to("one")
    configured(
        resident,
        f'[logins.ci]\ntype = "workload"\njwt = {{ file = "{place}/data/token" }}\n',
        "work",
    )
    resident.start()
    assert resident.key() == first
    (place / "next").symlink_to("two")
    (place / "next").rename(place / "data")
    until(lambda: resident.key() == second, 15)
    assert cluster.claims(first) is not None


def test_a_machine_mints_keys_of_litellm_s_shape(
    resident: Resident, provider: Exchange, pod: Path
) -> None:
    """With what it was given in place of an admin key; its keys end when it signs out."""
    with DevGateway() as gateway:
        provider.give = lambda: gateway.master_key
        resident.configure(
            PROFILE.format(name="work", url=gateway.url, type="litellm", more="")
            + f'[logins.ci]\ntype = "workload"\ngrant = "token_exchange"\naudience = "{AUDIENCE}"\n'
            f'jwt = {{ file = "{pod}" }}\ntoken_url = "{provider.token_url}"\n'
        )
        resident.start()
        key = resident.key()
        assert len(gateway.live_keys()) == 1

        assert resident.cli("whoami") == (0, f"ci: {POD}; renewed by itself\n", "")
        status, said, stderr = resident.cli("logout", "ci")
        assert (status, stderr) == (0, "")
        assert said == (
            "Signed out of ci. 1 key revoked.\n"
            "This machine signs in again by itself when a key is asked for.\n"
            "The provider was not told: what it gave ends by itself.\n"
        )
        assert gateway.live_keys() == ()
        assert resident.cli("whoami", "ci") == (0, "ci: nobody has to sign in\n", "")
        assert resident.key() != key

    status, said, stderr = resident.cli("logout", "ci")  # the gateway is gone
    assert (status, said) == (75, "")
    assert stderr.startswith("keybroker: work: 1 not yet confirmed: litellm: ")
    assert stderr.endswith("\nhint: sign out all the same: keybroker logout --force ci\n")
    assert file_of(resident.state, "ci").exists()
    status, said, stderr = resident.cli("logout", "ci", "--force")
    assert (status, stderr) == (0, "")
    left = "Not known to be revoked: 1. They end by themselves, see keybroker status."
    assert said.split("\n")[:2] == ["Signed out of ci.", left]


def test_nobody_has_to_sign_in_and_login_says_so(
    resident: Resident, provider: Exchange, pod: Path
) -> None:
    """It tries it, with a daemon and without; what is wrong is said, and no page is opened."""
    configured(
        resident,
        f'[logins.ci]\ntype = "workload"\ngrant = "jwt_bearer"\njwt = {{ file = "{pod}" }}\n'
        f'issuer = "{provider.url}"\n',
        "work",
    )
    for runs in (False, True):
        if runs:
            resident.start()
        status, said, stderr = resident.cli("login")
        first, second, end = said.split("\n")
        assert (status, stderr, end) == (0, "", "")
        assert first == "Nobody has to sign in to ci: this machine does by itself."
        assert second.startswith(f"It works as {POD}. The token ends ")
    [row] = json.loads(resident.cli("whoami", "--json")[1])
    assert (row["unattended"], row["signed_in"], row["who"]) == (True, True, POD)
    resident.stop()

    provider.trusted.clear()
    resident.cli("logout", "ci", "--force")
    status, said, stderr = resident.cli("login", "ci")
    assert (status, said) == (77, "")
    assert "gives no token (invalid_grant: not trusted)\nhint: it was shown iss " in stderr


def test_a_provider_that_is_down_costs_no_key_that_lives(
    resident: Resident, provider: Exchange, pod: Path
) -> None:
    """The current one serves; who asks without one hears 75, and a key as soon as it is back."""
    configured(
        resident,
        f'[logins.ci]\ntype = "workload"\ngrant = "jwt_bearer"\njwt = {{ file = "{pod}" }}\n'
        f'token_url = "{provider.token_url}"\n',
        "work",
    )
    provider.fails = [(503, {})]
    resident.start()
    status, _, stderr = resident.helper()
    assert (status, "gave no token (503)" in stderr) == (75, True)
    provider.fails = []
    key = until(lambda: resident.helper()[1].strip(), 15)
    provider.fails = [None]
    file_of(resident.state, "ci").unlink()
    assert resident.cli("rotate", "work")[0] == 75
    assert resident.helper() == (0, f"{key}\n", "")


@pytest.mark.servers
def test_a_machine_logs_in_to_vault(
    resident: Resident, openbao: OpenBao, oidc: Oidc, tmp_path: Path
) -> None:
    """A real provider's token, had by client credentials, is what OpenBao's jwt method takes."""
    kv, name = openbao.kv(), f"workload-{secrets.token_hex(4)}"
    kv.put("llm", key="sk-kept-in-vault-0123456789")
    policy = openbao.policy(name, {kv.path("llm"): ["read"]})
    config = {"oidc_discovery_url": oidc.issuer, "bound_issuer": oidc.issuer}
    openbao.jwt(name, [policy], oidc.audience, name, config=config)
    secret = private(tmp_path / "secret", oidc.secret)
    resident.configure(
        f"""
[profiles.work]
base_url = "http://127.0.0.1:9"
verify = "none"
[profiles.work.source]
type = "vault"
path = "{kv.path("llm")}"
[vault]
address = "{openbao.url}"
auth = {{ method = "jwt", mount = "{name}", role = "{name}", jwt = {{ login = "ci" }} }}
[logins.ci]
type = "workload"
grant = "client_credentials"
issuer = "{oidc.issuer}"
client_id = "{oidc.client}"
client_secret = {{ file = "{secret}" }}
"""
    )
    resident.start()
    assert resident.key() == "sk-kept-in-vault-0123456789"
    [row] = json.loads(resident.cli("whoami", "--json")[1])
    assert row["who"] == oidc.client
    status, said, stderr = resident.cli("logout")
    assert (status, stderr) == (0, "")
    assert said.endswith("The provider was not told: what it gave ends by itself.\n")


def test_init_asks_for_no_admin_key_where_a_login_mints(
    resident: Resident, provider: Exchange, pod: Path
) -> None:
    """It tries the new profile with that login first; a login that nobody did is said."""
    with DevGateway() as gateway:
        provider.give = lambda: gateway.master_key
        machine = (
            f'[logins.ci]\ntype = "workload"\ngrant = "jwt_bearer"\njwt = {{ file = "{pod}" }}\n'
            f'token_url = "{provider.token_url}"\n'
        )
        person = f'[logins.corp]\ntype = "oidc"\nissuer = "{provider.url}"\n'
        resident.configure(machine + person)
        words = ["init", "--base-url", gateway.url, "--source", "litellm", "--no-connect"]
        before = resident.file.read_text()
        status, _, stderr = resident.cli(*words, "--set", "source.login=corp")
        assert (status, resident.file.read_text()) == (77, before)
        assert (
            "login corp: nobody is signed in; nothing was written\nhint: run: keybroker " in stderr
        )

        status, said, stderr = resident.cli(*words, "--set", "source.login=ci")
        assert (status, stderr) == (0, "")
        assert "\nwritten   [profiles.work] in ~/.config/keybroker/config.toml\n" in said
        assert resident.file.read_text().endswith('type = "litellm"\nlogin = "ci"\n')
        assert len(gateway.live_keys()) == 1
