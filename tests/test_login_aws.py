"""Signing in at IAM Identity Center, as AWS's own programs have it; roles by a login's token."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

from keybroker.aws import session_of
from keybroker.config import Config, parse
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    LoginNeeded,
    SourceDenied,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.aws import IdentityCenter
from keybroker.login.provider import Device
from keybroker.login.tokens import Tokens
from keybroker.signin import read_login
from keybroker.sources.aws.account import Account
from keybroker.sources.aws.refusals import SIGN_IN, Problem
from keybroker.sources.held import Held
from tests.canaries import Canaries
from tests.resident import Resident, until
from tests.servers.aws import REGION, Aws, allow
from tests.servers.awsfaults import Front, refusal
from tests.servers.browser import Browser, command
from tests.servers.oidc import Oidc
from tests.servers.sso import START_URL, Sso
from tests.test_aws_daemon import gateway as gateway
from tests.test_aws_daemon import minted, source
from tests.typed import Signing

pytestmark = pytest.mark.servers

LOGIN = '[logins.corp]\ntype = "aws-sso"\nsession = "corp"\n'
BY_PROFILE = '[aws]\nprofile = "corp"\n'
OURS = "corp: signed in; renewed by itself\n"


@pytest.fixture
def secret(aws: Aws, gateway: DevGateway) -> tuple[str, str]:
    """The name of a secret, and the key that somebody keeps in it."""
    name, key = f"llm/{secrets.token_hex(4)}", minted(gateway)
    aws.put(name, key)
    return name, key


@pytest.fixture
def person(
    resident: Resident, aws_front: Front, sso: Sso, gateway: DevGateway, secret: tuple[str, str]
) -> Resident:
    """Somebody whose profile needs a sign-in that nobody has done yet."""
    home = resident.home.path
    sso.interval = 0
    sso.write(home).unlink()
    resident.environment |= {
        **{k: v for k, v in sso.environment(home).items() if k.startswith("AWS_ENDPOINT")},
        "AWS_ENDPOINT_URL": aws_front.url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    resident.configure(BY_PROFILE + LOGIN + source(gateway.url, secret[0]))
    resident.start()
    return resident


def file_of(resident: Resident, name: str = "corp") -> Path:
    """Return where AWS's own programs keep a sign-in."""
    digest = sha1(name.encode(), usedforsecurity=False).hexdigest()
    return resident.home.path / ".aws/sso/cache" / f"{digest}.json"


def signed_in(person: Resident) -> str:
    """Sign in as a person does; return what was said."""
    with Signing(person, ()) as signing:
        Browser(code=signing.code()).open(signing.url())
        status, said, shown = signing.ended()
    assert status == 0, shown
    return said + shown


def as_others_do(person: Resident, secret: str) -> subprocess.CompletedProcess[str]:
    """Read a secret with boto3, in a program that knows nothing of us."""
    program = (
        "import boto3, sys; session = boto3.Session(profile_name='corp');"
        "print(session.client('secretsmanager').get_secret_value(SecretId=sys.argv[1])"
        "['SecretString'])"
    )
    return subprocess.run(
        [sys.executable, "-c", program, secret],
        env=person.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def is_kept(person: Resident) -> bool:
    """Say whether a role's credentials were sealed, for the next process."""
    return any(person.home.path.rglob("session.*.sealed"))


# One sign-in


def test_a_sign_in_is_aws_s_own_too(person: Resident, sso: Sso, secret: tuple[str, str]) -> None:
    """A code on any device; then the profile works, here and in every program of AWS's."""
    name, key = secret
    refused = person.helper()
    said = signed_in(person)

    assert (refused[0], "run: keybroker login corp" in refused[2]) == (77, True)
    assert "Signed in to corp. It is renewed by itself." in said
    assert f"or open {sso.url}/device?user_code=" in said
    assert sso.scopes == ["sso:account:access"]
    assert until(lambda: person.helper()[1]) == f"{key}\n"
    assert as_others_do(person, name).stdout == f"{key}\n"
    assert person.cli("whoami") == (0, OURS, "")
    kept = json.loads(file_of(person).read_text())
    assert {*kept} == {
        *("startUrl", "region", "accessToken", "expiresAt", "refreshToken"),
        *("clientId", "clientSecret", "registrationExpiresAt"),
    }
    assert (kept["startUrl"], kept["region"]) == (START_URL, REGION)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", kept["expiresAt"])
    assert file_of(person).stat().st_mode & 0o777 == 0o600


def test_it_goes_on_where_nothing_seals(
    person: Resident, gateway: DevGateway, secret: tuple[str, str]
) -> None:
    """AWS's programs keep what it gives, so a keyring that is locked is no trouble."""
    person.kill()
    memory = '[cache]\nkey = "memory"\n'
    person.configure(memory + BY_PROFILE + LOGIN + source(gateway.url, secret[0]))
    signed_in(person)
    assert person.cli("whoami") == (0, OURS, "")
    person.start()
    signed_in(person)

    assert until(lambda: person.helper()[1]) == f"{secret[1]}\n"


def test_whoami_says_what_others_did_with_it(person: Resident, sso: Sso) -> None:
    """`aws sso login` and `logout` beside us, and a session that has ended by itself."""
    home = person.home.path
    sso.write(home)
    assert person.cli("whoami") == (0, OURS, "")
    sso.write(home, refresh=False)
    status, said, _ = person.cli("whoami")
    assert (status, said.startswith("corp: signed in; until ")) == (0, True)
    sso.write(home, timedelta(minutes=-1), refresh=False)
    assert person.cli("whoami")[:2] == (77, "corp: signed in; it has ended\n")
    sso.write(home, timedelta(minutes=-1), timedelta(days=-1))
    assert person.cli("whoami")[:2] == (77, "corp: signed in; it has ended\n")
    file_of(person).write_text("{")
    assert person.cli("whoami")[:2] == (77, "corp: nobody is signed in\n")
    file_of(person).unlink()
    assert person.cli("whoami")[:2] == (77, "corp: nobody is signed in\n")
    assert person.cli("logout") == (0, "Nobody was signed in to corp.\n", "")


def test_how_long_it_lasts_is_known_of_our_own(
    person: Resident, sso: Sso, gateway: DevGateway, secret: tuple[str, str]
) -> None:
    """`lasts` counts from when we began it, over AWS's renewals; of another's it says nothing."""
    person.configure(BY_PROFILE + LOGIN + 'lasts = "8h"\n' + source(gateway.url, secret[0]))
    began = datetime.now(UTC)
    assert "It lasts until" in signed_in(person)
    kept = json.loads(file_of(person).read_text())
    past = f"{began - timedelta(minutes=1):%Y-%m-%dT%H:%M:%SZ}"
    file_of(person).write_text(json.dumps({**kept, "expiresAt": past}))
    assert as_others_do(person, secret[0]).stdout == f"{secret[1]}\n"
    assert sso.refreshes == 1
    [row] = json.loads(person.cli("whoami", "--json")[1])
    ends = datetime.fromisoformat(row["until"]) - began
    sso.write(person.home.path)
    [others] = json.loads(person.cli("whoami", "--json")[1])

    assert row["signed_in"]
    assert abs(ends - timedelta(hours=8)) < timedelta(minutes=1)
    assert (others["signed_in"], others["until"]) == (True, None)


def test_signing_out_is_for_all(person: Resident, sso: Sso, secret: tuple[str, str]) -> None:
    """AWS is told, its programs are signed out as well, and no key is handed out any more."""
    signed_in(person)
    until(lambda: person.helper()[1])

    assert person.cli("logout") == (0, "Signed out of corp.\n", "")
    assert sso.signed_out == 1
    assert not file_of(person).exists()
    assert not (person.state / "logins/corp.json").exists()
    status, said, shown = until(lambda: [person.helper()] if person.helper()[0] else [])[0]
    assert (status, said, "run: keybroker login corp" in shown) == (77, "", True)
    assert "SSOTokenLoadError" in as_others_do(person, secret[0]).stderr


def test_aws_is_not_said_to_be_told_when_it_was_not(person: Resident, sso: Sso) -> None:
    """It does not know an access token that has ended; what renews it is removed here."""
    signed_in(person)
    sso.refuses = True
    sso._access.clear()
    status, said, _ = person.cli("logout")

    assert (status, said.splitlines()[1]) == (
        0,
        "The provider was not told: what it gave ends by itself.",
    )
    assert not file_of(person).exists()


def test_a_sign_out_that_failed_has_changed_nothing(person: Resident, sso: Sso) -> None:
    """AWS's programs go on with it, so it is not said to be over."""
    signed_in(person)
    sso.is_down = True
    status, _, shown = person.cli("logout")

    assert (status, "keybroker logout --force corp" in shown) == (75, True)
    assert person.cli("whoami") == (0, OURS, "")
    assert file_of(person).exists()


def test_what_was_kept_of_one_person_is_not_used_for_another(
    person: Resident, sso: Sso, secret: tuple[str, str]
) -> None:
    """The role's credentials are kept for as long as they live: of this sign-in alone."""
    signed_in(person)
    until(lambda: person.helper()[1])
    until(lambda: is_kept(person))
    person.kill()
    person.start()
    until(lambda: person.helper()[1])
    assert sso.handed_out == 1

    assert person.cli("logout")[0] == 0
    until(lambda: person.helper()[0])
    signed_in(person)
    until(lambda: person.helper()[1])
    assert sso.handed_out == 2


def test_a_session_that_ended_is_said_with_what_to_type(
    person: Resident, sso: Sso, secret: tuple[str, str]
) -> None:
    """The key goes on; who asks for the reason is told of our command, since there is one."""
    signed_in(person)
    until(lambda: person.helper()[1])
    sso.refresh_has_expired = True
    sso.write(person.home.path, timedelta(minutes=-5))

    trouble = until(lambda: person.row()["trouble"])
    assert "its sign-in has ended" in str(trouble)
    status, _, shown = person.cli("source", "test", "work")
    assert (status, "run: keybroker login corp" in shown) == (77, True)
    assert person.helper()[1] == f"{secret[1]}\n"


def test_no_token_is_where_it_does_not_belong(
    person: Resident, sso: Sso, secret: tuple[str, str]
) -> None:
    """It is in AWS's own file, which is as AWS has it, and nowhere else."""
    canaries = Canaries()
    said = signed_in(person)
    until(lambda: person.helper()[1])
    kept = json.loads(file_of(person).read_text())
    for name in ("accessToken", "refreshToken", "clientSecret"):
        canaries.know("token", kept[name])
    person.stop()

    assert canaries.seen_in(said) == []
    assert canaries.below(person.home.path, {file_of(person): "token"}) == []


# The provider


@pytest.fixture
def center(sso: Sso, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[IdentityCenter]:
    """A login without a file of AWS's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO_OIDC", sso.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", sso.url)
    raw = {"type": "aws-sso", "start_url": START_URL, "region": REGION, "timeout": "2s"}
    with closing(IdentityCenter(read_login("corp", raw, Where({}, "test")), {})) as provider:
        yield provider


def refused(device: Device) -> KeybrokerError:
    with pytest.raises(KeybrokerError) as caught:
        device.poll(1.0)
    return caught.value


def test_a_code_is_asked_for_as_often_as_is_wanted(center: IdentityCenter, sso: Sso) -> None:
    """Not yet, too soon, and then a token that is renewed."""
    sso.interval = 60
    device = center.device()
    assert (device.interval, device.lasts) == (60.0, 600.0)
    assert [device.poll(60.0), device.poll(60.0)] == [60.0, 65.0]
    sso.interval = 0
    assert sso.type(device.code, "allow")
    given = device.poll(1.0)

    assert isinstance(given, Tokens)
    assert given.refresh is not None
    assert given.standing.renewable
    assert given.standing.access_ends is not None
    life = given.standing.access_ends - given.standing.since
    assert life == timedelta(seconds=sso.seconds)


def test_a_code_that_was_refused_or_came_too_late(center: IdentityCenter, sso: Sso) -> None:
    device = center.device()
    sso.type(device.code, "deny")
    no = refused(device)
    sso.code_seconds = -1
    late = refused(center.device())

    assert (type(no), no.message) == (SourceDenied, "login corp: the sign-in was refused")
    assert late.message == "login corp: the sign-in took longer than its code"
    assert no.hint == late.hint == "run: keybroker login corp"


def test_who_does_not_answer_may_do_so_later(center: IdentityCenter, sso: Sso) -> None:
    """While a person is at it; at the beginning it is said."""
    device = center.device()
    sso.is_down = True
    assert device.poll(4.0) == 8.0
    with pytest.raises(SourceUnavailable) as down:
        center.device()
    assert "IAM Identity Center ended the connection without an answer" in down.value.message


def test_a_start_page_that_is_wrong_is_said(sso: Sso, center: IdentityCenter) -> None:
    raw = {"type": "aws-sso", "start_url": "https://other.example/start", "region": REGION}
    other = IdentityCenter(read_login("corp", raw, Where({}, "test")), {})
    with closing(other), pytest.raises(SourceInvalid) as wrong:
        other.device()
    assert "does not let anybody sign in so (InvalidRequestException)" in wrong.value.message
    assert wrong.value.hint is not None
    assert "start_url" in wrong.value.hint


def test_a_session_that_is_not_in_the_file_is_said(center: IdentityCenter) -> None:
    raw = {"type": "aws-sso", "session": "nowhere"}
    other = IdentityCenter(read_login("corp", raw, Where({}, "test")), {})
    with closing(other), pytest.raises(ConfigError) as missing:
        other.device()
    assert "~/.aws/config has no [sso-session nowhere]" in missing.value.message


# A role by the token of a login


@pytest.fixture
def audience() -> str:
    return f"https://{secrets.token_hex(4)}.example"


@pytest.fixture
def bearer(
    resident: Resident,
    aws: Aws,
    aws_front: Front,
    oidc: Oidc,
    gateway: DevGateway,
    secret: tuple[str, str],
    audience: str,
) -> Resident:
    """Somebody who has a role of AWS's by their company's sign-in, with no file of AWS's."""
    name = f"web-{secrets.token_hex(4)}"
    role = aws.web_role(name, oidc.issuer, audience, allow("secretsmanager:*"))
    resident.environment |= {
        "BROWSER": command("ada"),
        "AWS_ENDPOINT_URL": aws_front.url,
        "AWS_PROFILE": "of-another-shell",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    resident.configure(
        f'[aws]\nregion = "{REGION}"\nrole_arn = "{role}"\nweb_identity = {{ login = "sso" }}\n'
        f'[logins.sso]\ntype = "oidc"\nissuer = "{oidc.issuer}"\nresource = "{audience}"\n'
        + source(gateway.url, secret[0])
    )
    resident.start()
    return resident


def test_the_token_of_a_login_takes_a_role(
    bearer: Resident, aws_front: Front, secret: tuple[str, str]
) -> None:
    """Once in the life of the role's session, which is kept as others are."""
    refused = bearer.helper()
    assert (refused[0], "run: keybroker login sso" in refused[2]) == (77, True)
    assert aws_front.count("AssumeRoleWithWebIdentity") == 0
    status, _, shown = bearer.cli("login")
    assert status == 0, shown
    assert until(lambda: bearer.helper()[1]) == f"{secret[1]}\n"
    until(lambda: is_kept(bearer))
    bearer.kill()
    bearer.start()
    read = aws_front.count("DescribeSecret")
    until(lambda: aws_front.count("DescribeSecret") > read)

    assert bearer.helper()[1] == f"{secret[1]}\n"
    assert aws_front.count("AssumeRoleWithWebIdentity") == 1
    assert bearer.cli("whoami")[0] == 0


def test_a_token_that_aws_does_not_take(
    bearer: Resident, aws: Aws, aws_front: Front, oidc: Oidc
) -> None:
    """It is said whose it is, and no token is in what is said."""
    text = bearer.file.read_text()
    bearer.configure(re.sub(r'resource = "[^"]*"', 'resource = "https://other.example"', text))
    assert bearer.cli("login")[0] == 0
    status, _, shown = bearer.cli("source", "test", "work")
    assert status == 77
    assert "the token of login:sso does not give arn:aws:iam::" in shown
    wrong = refusal("InvalidIdentityToken", "eyJ", sts=True)
    aws_front.fault(wrong, "AssumeRoleWithWebIdentity", times=None)
    status, _, shown = bearer.cli("source", "test", "work")
    assert status == 77
    assert "the web identity token was refused" in shown
    assert "see the token of login:sso" in shown
    assert "eyJ" not in shown


# The tables


SSO = {"type": "aws-sso", "session": "corp"}
OIDC = {"type": "oidc", "issuer": "https://login.example"}
ROLE = "arn:aws:iam::123456789012:role/llm"
SECRET = {"type": "aws", "secret": "llm"}
WORK = {"base_url": "https://llm.example", "source": SECRET}


def read(
    account: Mapping[str, Any],
    logins: Mapping[str, Any],
    folder: Path | None = None,
    work: Mapping[str, Any] = WORK,
) -> Config:
    environment = {} if folder is None else {"AWS_CONFIG_FILE": str(folder / "config")}
    tables = {"aws": account, "logins": logins, "profiles": {"work": work}}
    return parse(tables, Where({}, "x"), (), environment)


FILE = """
[default]
region = eu-west-1
sso_session = corp
[profile direct]
sso_session = corp
[profile "with space"]
sso_session = corp
[profile role]
role_arn = arn:aws:iam::1:role/x
source_profile = direct
[profile loop]
source_profile = loop
[profile old]
sso_start_url = https://corp.example/start
[profile other]
sso_session = other
[profile keys]
aws_access_key_id = x
"""


@pytest.mark.parametrize(
    ("profile", "login"),
    [
        (None, "corp"),
        ("default", "corp"),
        ("direct", "corp"),
        ("with space", "corp"),
        ("role", "corp"),
        ("old", "legacy"),
        *((one, None) for one in ("other", "keys", "loop", "nowhere")),
    ],
)
def test_the_login_of_a_profile_is_found(
    tmp_path: Path, profile: str | None, login: str | None
) -> None:
    """By its session or its start page, also where it begins with another profile."""
    (tmp_path / "config").write_text(FILE)
    legacy = {"type": "aws-sso", "start_url": "https://corp.example/start", "region": "eu-west-1"}
    account = {} if profile is None else {"profile": profile}
    config = read(account, {"corp": SSO, "legacy": legacy}, tmp_path)
    assert [one.name for one in config.profiles["work"].logins] == ([login] if login else [])


@pytest.mark.parametrize("text", ["[broken", "\xff", None])
def test_a_file_of_aws_s_that_cannot_be_read_is_for_aws_to_say(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config").write_bytes(text.encode("latin-1"))
    assert read({}, {"corp": SSO}, tmp_path).profiles["work"].logins == ()


def test_a_login_may_be_named(tmp_path: Path) -> None:
    """Where the file does not tell; and a role of its own is asked for by none of [aws]."""
    named = read({"profile": "x", "login": "corp"}, {"corp": SSO}, tmp_path)
    assert [one.name for one in named.profiles["work"].logins] == ["corp"]
    own = {**SECRET, "role_arn": ROLE, "web_identity": {"login": "sso"}}
    config = read(
        {"profile": "x", "region": "eu-west-1", "login": "corp"},
        {"corp": SSO, "sso": OIDC},
        tmp_path,
        {**WORK, "source": own},
    )
    account = config.profiles["work"].account
    assert account is not None
    assert (account.profile, account.region, account.login) == (None, "eu-west-1", None)
    assert [one.name for one in config.profiles["work"].logins] == ["sso"]
    assert str(account) == "role llm, eu-west-1"


def test_only_a_sign_in_is_mended_by_one() -> None:
    """Who has to sign in is told our command; what a sign-in does not mend is said as before."""
    place = read({"profile": "x", "login": "corp"}, {"corp": SSO}).profiles["work"].account
    assert place is not None
    account = Account(place, Held())
    ended = account._for_us(Problem(SourceDenied, "its sign-in has ended", SIGN_IN))
    other = Problem(SourceDenied, "the credentials are not known", "try: aws sts")

    assert (ended.kind, ended.hint) == (LoginNeeded, "run: keybroker login corp")
    assert account._for_us(other) == other


def test_what_is_kept_of_a_role_is_for_that_role_and_login() -> None:
    def kept(role: str, login: str, region: str = REGION) -> str:
        table = {"role_arn": role, "web_identity": {"login": login}, "region": region}
        account = read(table, {"a": OIDC, "b": OIDC}).profiles["work"].account
        assert account is not None
        return session_of(account.text)

    names = [kept(ROLE, "a"), kept(ROLE, "b"), kept(f"{ROLE}2", "a"), session_of("{}")]
    assert len({*names}) == 4
    assert kept(ROLE, "a", "eu-west-1") == names[0]


@pytest.mark.parametrize(
    ("account", "wanted"),
    [
        ({"role_arn": ROLE}, "x: aws: role_arn and web_identity belong together"),
        ({"web_identity": {"login": "sso"}}, "x: aws: role_arn and web_identity belong together"),
        (
            {"role_arn": ROLE, "web_identity": {"login": "sso"}, "profile": "x"},
            "x: aws.role_arn: is in place of a profile",
        ),
        (
            {"role_arn": "llm", "web_identity": {"login": "sso"}},
            "x: aws.role_arn: expected the ARN",
        ),
        (
            {"role_arn": ROLE, "web_identity": {"login": "corp"}},
            "x: aws.web_identity.login: a login of type aws-sso is for [aws]",
        ),
        ({"role_arn": ROLE, "web_identity": {"file": "/t"}}, "x: aws.web_identity: expected exact"),
        ({"login": "sso"}, "x: aws.login: expected a login of type aws-sso"),
        ({"login": "nobody"}, "x: aws.login: no login 'nobody'; logins: corp, sso"),
        ({"logins": "corp"}, "x: aws.logins: logins is a table of its own"),
        ({"profil": "corp"}, "x: aws.profil: unknown key; did you mean profile?"),
    ],
)
def test_a_table_that_cannot_work_is_refused(account: Mapping[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(account, {"corp": SSO, "sso": OIDC})
    assert error.value.message.startswith(wanted)


@pytest.mark.parametrize("name", ["start_url", "region"])
def test_a_login_says_where_it_is(name: str) -> None:
    whole = {"type": "aws-sso", "start_url": START_URL, "region": REGION}
    with pytest.raises(ConfigError) as error:
        read({}, {"corp": {k: v for k, v in whole.items() if k != name}})
    assert error.value.message == (
        f"x: logins.corp.{name}: is missing; or name the session of ~/.aws/config that has it"
    )


def test_a_sign_in_at_aws_is_no_key() -> None:
    with pytest.raises(ConfigError) as error:
        read({}, {"corp": SSO}, None, {**WORK, "source": {"type": "login", "login": "corp"}})
    assert "a login of type aws-sso is for [aws]" in error.value.message
