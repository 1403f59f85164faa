"""Who we are at AWS: every way of boto3's chain, in a worker process as the daemon starts it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
import termios
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import aws as accounts
from keybroker import paths
from keybroker.config import Config, Profile
from keybroker.credential import Secret, Session
from keybroker.errors import ConfigError, KeybrokerError, SourceDenied, SourceUnavailable
from keybroker.pool import Answer, Pool, variables
from keybroker.worker import decode_credential, encode_profile
from tests.contracts import check_silent, entry
from tests.resident import Home
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Front, refusal
from tests.servers.awsmetadata import Metadata
from tests.servers.faults import Hang, Html, Status
from tests.servers.moto import Moto
from tests.servers.oidc import Oidc
from tests.servers.sso import Sso

pytestmark = pytest.mark.servers

KEY = f"sk-canary-{secrets.token_hex(16)}"


@pytest.fixture(scope="module")
def name(aws: Aws) -> str:
    """A secret that is only read."""
    made = f"llm/{secrets.token_hex(4)}"
    aws.put(made, KEY)
    return made


@pytest.fixture(scope="module")
def reader(aws: Aws) -> Keys:
    return aws.user(f"reader-{secrets.token_hex(4)}", allow("secretsmanager:*"))


@pytest.fixture(scope="module")
def assumer(aws: Aws) -> Keys:
    """A user who may do nothing but take roles."""
    return aws.user(f"assumer-{secrets.token_hex(4)}", allow("sts:AssumeRole"))


class Desk:
    """A home with what AWS's own programs read, and workers that are asked there."""

    def __init__(self, home: Home, front: Front, secret: str) -> None:
        self.home = home
        self.front = front
        self.folder = home.path / ".aws"
        self.folder.mkdir(exist_ok=True)
        self.secret = secret
        self.variables = {
            "AWS_ENDPOINT_URL": front.url,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def config(self, text: str, credentials: str = "") -> None:
        (self.folder / "config").write_text(text)
        (self.folder / "credentials").write_text(credentials)

    def profile(self, **source: Any) -> Profile:
        """Return the profile as a daemon with these variables has it."""
        given = {"type": "aws", "secret": self.secret, **source}
        environment = {**self.home.environment, **self.variables}
        return entry("http://127.0.0.1:9", accounts.with_variables(given, environment))

    @contextmanager
    def workers(self, profile: Profile) -> Iterator[Pool]:
        environment = {**self.home.environment, **self.variables}
        named = variables(Config({"work": profile}, None, "memory", ()))
        state = paths.private_directory(paths.state_directory(environment))
        pool = Pool(state, environment, None, named)
        try:
            yield pool
        finally:
            pool.close(at_once=True)

    def ask(
        self, session: Session | None = None, pool: Pool | None = None, **source: Any
    ) -> Answer:
        """Have a worker read the secret: one of its own, or that of a pool."""
        profile = self.profile(**source)
        if pool is None:
            with self.workers(profile) as pool:
                return self.ask(session, pool, **source)
        more = {} if session is None else {"session": session}
        return pool.ask("aws", "poll", 20.0, profile=profile, lease=None, **more)

    def key(self, session: Session | None = None, **source: Any) -> str:
        answer = self.ask(session, **source)
        assert answer.error is None, (answer.error, answer.error.hint)
        assert answer.ok is not None
        return decode_credential(answer.ok["credential"]).secret.reveal()

    def error(self, *never: str, pool: Pool | None = None, **source: Any) -> KeybrokerError:
        error = self.ask(None, pool, **source).error
        assert error is not None
        check_silent(error, KEY, *never)
        return error


@pytest.fixture
def desk(home: Home, aws_front: Front, name: str) -> Desk:
    return Desk(home, aws_front, name)


def keys_of(keys: Keys, profile: str = "default") -> str:
    """Write keys as a credentials file has them."""
    token = f"aws_session_token = {keys.session_token}\n" if keys.session_token else ""
    return (
        f"[{profile}]\naws_access_key_id = {keys.access_key}\n"
        f"aws_secret_access_key = {keys.secret_key}\n{token}"
    )


def printed(keys: Keys, **more: Any) -> str:
    """Write keys as a credential_process prints them."""
    found = {"Version": 1, "AccessKeyId": keys.access_key, "SecretAccessKey": keys.secret_key}
    found |= {"SessionToken": keys.session_token} if keys.session_token else {}
    return json.dumps({**found, **more})


def program(folder: Path, text: str, name: str = "program") -> str:
    """Write a program; return the command that runs it."""
    file = folder / name
    file.write_text(text)
    return f"{sys.executable} {file}"


# Keys.


def test_keys_in_variables(desk: Desk, reader: Keys) -> None:
    desk.variables |= {
        "AWS_ACCESS_KEY_ID": reader.access_key,
        "AWS_SECRET_ACCESS_KEY": reader.secret_key,
    }
    assert desk.key() == KEY


def test_keys_with_a_token(desk: Desk, aws: Aws, aws_role: str) -> None:
    keys = aws.session(aws_role)
    assert keys.session_token is not None
    desk.variables |= {
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_SESSION_TOKEN": keys.session_token,
    }
    assert desk.key() == KEY


@pytest.mark.parametrize("how", ["configured", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_keys_of_a_profile(desk: Desk, reader: Keys, how: str) -> None:
    """That is configured, or that a variable names; the region is the profile's."""
    del desk.variables["AWS_REGION"]
    desk.config(f"[profile corp]\nregion = {REGION}\n", keys_of(reader, "corp"))
    if how != "configured":
        desk.variables[how] = "corp"
    assert desk.key(**({"profile": "corp"} if how == "configured" else {})) == KEY


def test_files_may_be_elsewhere(desk: Desk, reader: Keys, tmp_path: Path) -> None:
    (tmp_path / "c").write_text(f"[default]\nregion = {REGION}\n")
    (tmp_path / "k").write_text(keys_of(reader))
    desk.variables |= {
        "AWS_CONFIG_FILE": str(tmp_path / "c"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "k"),
    }
    assert desk.key() == KEY


def test_who_goes_first_is_as_everywhere(desk: Desk, reader: Keys) -> None:
    """Keys in variables before a profile that a variable names; one that is configured first."""
    wrong = Keys("AKIAWRONG", "wrong")
    desk.config("", keys_of(wrong, "corp"))
    desk.variables |= {
        "AWS_PROFILE": "corp",
        "AWS_ACCESS_KEY_ID": reader.access_key,
        "AWS_SECRET_ACCESS_KEY": reader.secret_key,
    }
    assert desk.key() == KEY
    desk.config("", keys_of(wrong, "corp") + keys_of(wrong, "other"))
    error = desk.error(profile="other")
    assert type(error) is SourceDenied
    assert error.message == f"aws: profile other, {REGION}: the credentials are not known"


# Addresses.


@pytest.mark.parametrize(
    "how", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SECRETS_MANAGER", "services", "endpoint_url"]
)
def test_an_endpoint_may_be_named(desk: Desk, reader: Keys, how: str) -> None:
    """By a variable, or in the file; nobody else is asked."""
    url = desk.variables.pop("AWS_ENDPOINT_URL")
    text = {
        "services": f"services = x\n[services x]\nsecrets_manager =\n  endpoint_url = {url}\n",
        "endpoint_url": f"endpoint_url = {url}\n",
    }
    desk.config(f"[default]\n{text.get(how, '')}", keys_of(reader))
    desk.variables |= {} if how in text else {how: url}
    assert desk.key() == KEY
    assert desk.front.count("GetSecretValue") == 1


def test_a_region_comes_before_the_profile_s(desk: Desk, reader: Keys) -> None:
    """As it is configured, else by AWS_REGION, AWS_DEFAULT_REGION, the profile."""
    desk.config("[default]\nregion = eu-west-3\n", keys_of(reader))
    desk.secret = "nowhere"
    assert desk.error(region="eu-west-1").message.startswith("aws: the default profile, eu-west-1:")
    desk.variables |= {"AWS_REGION": "eu-west-2", "AWS_DEFAULT_REGION": "eu-north-1"}
    assert desk.error().message.startswith("aws: the default profile, eu-west-2:")
    del desk.variables["AWS_REGION"]
    assert desk.error().message.startswith("aws: the default profile, eu-north-1:")
    del desk.variables["AWS_DEFAULT_REGION"]
    assert desk.error().message.startswith("aws: the default profile, eu-west-3:")


# A program.


def test_a_program_that_prints_keys(desk: Desk, reader: Keys) -> None:
    command = program(desk.folder, f"print({printed(reader)!r})")
    desk.config(f"[default]\ncredential_process = {command}\n")
    assert desk.key() == KEY


def test_a_program_has_nobody_to_ask(desk: Desk, reader: Keys) -> None:
    """What it reads is empty: it is not what the worker is asked."""
    text = f"import sys\nassert sys.stdin.read() == ''\nprint({printed(reader)!r})"
    desk.config(f"[default]\ncredential_process = {program(desk.folder, text)}\n")
    profile = desk.profile()
    with desk.workers(profile) as pool:
        first = pool.send("aws", "poll", 20.0, profile=profile, lease=None)
        second = pool.send("aws", "poll", 20.0, profile=profile, lease=None)
        answers: dict[int, Answer] = {}
        while len(answers) < 2:
            answers |= {one.id: one for one in pool.receive(20.0)}
    assert answers[first].error is None
    assert answers[second].error is None


def test_a_program_that_does_not_end_is_ended(desk: Desk) -> None:
    """One that waits for a finger on a key, say; with all that it started."""
    left = desk.folder / "left"
    text = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(left)!r}, 'w').write(str(child.pid))\ntime.sleep(600)\n"
    )
    desk.config(f"[default]\ncredential_process = {program(desk.folder, text)}\n")
    began = time.monotonic()
    error = desk.error()
    assert 4.5 < time.monotonic() - began < 8
    assert type(error) is SourceUnavailable
    assert error.message.endswith(f"{REGION}: its credential_process did not end in time")
    assert error.hint == "it has 5 s, and nobody to ask"
    ends = time.monotonic() + 5
    while Path(f"/proc/{left.read_text()}").exists():
        assert time.monotonic() < ends
        time.sleep(0.02)


FAILS = {
    "ends badly": f"import sys; print({KEY!r}, file=sys.stderr); sys.exit(3)",
    "prints nothing": "",
    "prints no JSON": f"print({KEY!r})",
    "prints a list": "print('[]')",
    "another version": "print('{\"Version\": 2}')",
    "prints half": 'print(\'{"Version": 1, "AccessKeyId": "x"}\')',
    "prints no UTF-8": "import sys; sys.stdout.buffer.write(b'\\xff')",
    "a time that is none": (
        'print(\'{"Version": 1, "AccessKeyId": "x", "SecretAccessKey": "x", \''
        '\'"Expiration": "soon"}\')'
    ),
}


def test_a_program_that_fails_is_named(desk: Desk) -> None:
    """Nothing of what it printed is said."""
    with desk.workers(desk.profile(profile="corp")) as pool:
        for which, text in FAILS.items():
            command = program(desk.folder, text)
            desk.config(f"[profile corp]\ncredential_process = {command}\n")
            error = desk.error(pool=pool, profile="corp")
            assert (which, type(error), error.message) == (
                which,
                SourceUnavailable,
                f"aws: profile corp, {REGION}: its credential_process failed",
            )
            assert error.hint == "try what ~/.aws/config names there"


def test_a_program_that_is_not_there_is_named(desk: Desk) -> None:
    desk.config("[default]\ncredential_process = /nowhere/program\n")
    assert desk.error().message.endswith("its credential_process failed")


def test_a_program_whose_keys_have_ended(desk: Desk, reader: Keys) -> None:
    """Or a clock by which they have."""
    ends = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    text = f"print({printed(reader, SessionToken='x', Expiration=ends)!r})"
    desk.config(f"[default]\ncredential_process = {program(desk.folder, text)}\n")
    error = desk.error()
    assert error.message.endswith("the credentials that it was given have ended")
    assert error.hint == "is the clock right?"


def test_a_program_that_is_keybroker_is_told_so_and_why(desk: Desk) -> None:
    """It refuses, as it sees who asks; and the reason is in the hint."""
    keybroker = Path(sys.executable).parent / "keybroker"
    for command in (f"{keybroker} get work", f"/usr/bin/env {keybroker} get work"):
        desk.config(f"[default]\ncredential_process = {command}\n")
        began = time.monotonic()
        error = desk.error()
        assert time.monotonic() - began < 4
        assert error.message.endswith("its credential_process failed")
        assert error.hint == "it is keybroker, which would wait for itself; see ~/.aws/config"


# A role.


def assuming(role: str, more: str = "") -> str:
    return f"[profile corp]\nrole_arn = {role}\nsource_profile = base\n{more}"


def test_a_role_is_taken_and_kept_for_the_next_worker(
    desk: Desk, aws_role: str, assumer: Keys
) -> None:
    """One AssumeRole for its whole life; what is kept is a session of the broker's."""
    desk.config(assuming(aws_role), keys_of(assumer, "base"))
    answer = desk.ask(profile="corp")
    assert answer.error is None
    [session] = answer.sessions
    assert session.key == accounts.session_of(json.dumps({"profile": "corp"}))
    assert session.expires_at is not None
    assert timedelta(minutes=50) < session.expires_at - datetime.now(UTC) < timedelta(minutes=61)
    assert desk.front.count("AssumeRole") == 1

    again = desk.ask(session, profile="corp")
    assert again.error is None
    assert again.sessions == []
    assert desk.front.count("AssumeRole") == 1
    assert desk.key(profile="corp") == KEY  # one that is handed nothing takes it anew
    assert desk.front.count("AssumeRole") == 2


def test_what_is_kept_is_let_go_when_aws_does_not_take_it(
    desk: Desk, aws_role: str, assumer: Keys
) -> None:
    """Ended by an administrator, or earlier than our clock has it: the next poll begins anew."""
    desk.config(assuming(aws_role), keys_of(assumer, "base"))
    for code in ("ExpiredTokenException", "UnrecognizedClientException", "AccessDeniedException"):
        [session] = desk.ask(profile="corp").sessions
        desk.front.fault(refusal(code), "DescribeSecret")
        answer = desk.ask(session, profile="corp")
        assert type(answer.error) is SourceDenied
        [session] = answer.sessions
        assert session.secret is None
        assert desk.key(session, profile="corp") == KEY


def test_what_is_kept_may_be_of_another_version(desk: Desk, aws_role: str, assumer: Keys) -> None:
    """What cannot be read is not there."""
    desk.config(assuming(aws_role), keys_of(assumer, "base"))
    name = accounts.session_of(json.dumps({"profile": "corp"}))
    odd = [
        "{}",
        "[]",
        "null",
        '{"x": {}}',
        '{"x": {"Credentials": {"Expiration": "soon"}}}',
        "\xff",
    ]
    kept = [b64encode(text.encode("latin-1")).decode() for text in odd]
    with desk.workers(desk.profile(profile="corp")) as pool:
        for serial, text in enumerate([*kept, "%%not-base64%%"]):
            session = Session(name, 10 * serial + 10, Secret(text))
            assert desk.ask(session, pool, profile="corp").error is None, text


def test_a_role_that_is_refused_is_named(desk: Desk, aws: Aws, aws_role: str, reader: Keys) -> None:
    """By its ARN; the user may read secrets, and not take it."""
    desk.config(assuming(aws_role), keys_of(reader, "base"))
    desk.front.fault(refusal("AccessDenied", KEY, 403, sts=True), "AssumeRole")
    error = desk.error(profile="corp", secret=desk.secret)
    assert type(error) is SourceDenied
    who = f"aws: profile corp, {REGION}"
    assert error.message == f"{who}: its credentials may not assume {aws_role}"
    hint = "allow it sts:AssumeRole, and have the role trust it; see ~/.aws/config"
    assert error.hint == hint
    assert desk.front.count("GetCallerIdentity") == 0


def test_roles_in_a_row(desk: Desk, aws_role: str, assumer: Keys) -> None:
    """The second is taken with the first."""
    text = assuming(aws_role) + f"[profile far]\nrole_arn = {aws_role}\nsource_profile = corp\n"
    desk.config(text, keys_of(assumer, "base"))
    desk.front.fault(refusal("AccessDenied", KEY, 403, sts=True), "AssumeRole")
    error = desk.error(profile="far")
    assert error.message.endswith("its credentials may not assume a role")


def test_nobody_is_asked_for_a_code_of_a_second_factor(
    desk: Desk, aws_role: str, assumer: Keys
) -> None:
    """Neither at the terminal, if there is one, nor at all; the role is not tried without."""
    more = "mfa_serial = arn:aws:iam::123456789012:mfa/alice\n"
    desk.config(assuming(aws_role, more), keys_of(assumer, "base"))
    controller, terminal = os.openpty()
    profile = desk.profile(profile="corp")
    message = {"id": 1, "op": "poll", "profile": encode_profile(profile), "lease": None}
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "keybroker.worker", str(os.getpid()), str(desk.home.path)],
        env={**desk.home.environment, **desk.variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(2, termios.TIOCSCTTY, 0)),
    ) as worker:
        said, _ = worker.communicate(json.dumps(message).encode() + b"\n", timeout=20)
    os.close(terminal)
    os.set_blocking(controller, False)
    with pytest.raises(OSError, match="Input/output error"):
        assert os.read(controller, 100) == b"", "somebody was asked"
    os.close(controller)
    error = json.loads(said)["error"]
    assert error["code"] == "denied"
    assert error["message"].endswith("its role wants a code of a second factor")
    assert desk.front.count() == 0


STS: dict[str, tuple[Any, type[KeybrokerError], str]] = {
    "throttled": (refusal("Throttling", KEY, sts=True), SourceUnavailable, "asks to wait"),
    "down": (Status(503), SourceUnavailable, "AssumeRole failed"),
    "a portal": (Html(200), SourceUnavailable, "not as Secrets Manager does"),
    "empty": (Status(200), SourceUnavailable, ""),
    "expired": (
        refusal("ExpiredToken", KEY, 403, sts=True),
        SourceDenied,
        "the credentials have ended",
    ),
    "too long": (
        refusal("ValidationError", KEY, sts=True),
        KeybrokerError,
        "AssumeRole does not take what was asked",
    ),
    "disabled": (refusal("RegionDisabledException", KEY, 403, sts=True), SourceDenied, "region"),
}


def test_what_sts_says_is_said(desk: Desk, aws_role: str, assumer: Keys) -> None:
    desk.config(assuming(aws_role), keys_of(assumer, "base"))
    with desk.workers(desk.profile(profile="corp")) as pool:
        for which, (fault, kind, words) in STS.items():
            desk.front.clear()
            desk.front.forget()
            desk.front.fault(fault, "AssumeRole", times=None)
            error = desk.error(assumer.secret_key, pool=pool, profile="corp")
            assert isinstance(error, kind), (which, error)
            assert words in error.message
            assert desk.front.count("AssumeRole") == 1


def test_sts_that_hangs_is_left_after_five_seconds(
    desk: Desk, aws_role: str, assumer: Keys
) -> None:
    desk.config(assuming(aws_role), keys_of(assumer, "base"))
    desk.front.fault(Hang(), "AssumeRole", times=None)
    began = time.monotonic()
    error = desk.error(profile="corp")
    assert time.monotonic() - began < 7
    assert error.message.endswith(f"{REGION}: did not answer in time")
    assert desk.front.count() == 1


def test_a_role_by_way_of_a_program(desk: Desk, aws_role: str, assumer: Keys) -> None:
    """The program has the same limits there."""
    text = f"import sys\nassert sys.stdin.read() == ''\nprint({printed(assumer)!r})"
    command = program(desk.folder, text)
    desk.config(assuming(aws_role) + f"[profile base]\ncredential_process = {command}\n")
    assert desk.key(profile="corp") == KEY


# A web identity.


@pytest.fixture
def identity(desk: Desk, aws: Aws, oidc: Oidc) -> tuple[str, Path]:
    """A role for the bearers of a real provider's tokens, and a file with such a token."""
    role = aws.web_role(
        f"web-{secrets.token_hex(4)}", oidc.issuer, oidc.audience, allow("secretsmanager:*")
    )
    file = desk.home.path / "token"
    file.write_text(oidc.token())
    return role, file


@pytest.mark.parametrize("how", ["variables", "profile"])
def test_a_web_identity(desk: Desk, identity: tuple[str, Path], how: str) -> None:
    """As in Kubernetes: a token of the cluster's, which STS takes; kept like any role."""
    role, file = identity
    named = {}
    if how == "variables":
        desk.variables |= {"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": str(file)}
    else:
        desk.config(f"[profile web]\nrole_arn = {role}\nweb_identity_token_file = {file}\n")
        named = {"profile": "web"}
    answer = desk.ask(**named)
    assert answer.error is None
    [session] = answer.sessions
    assert desk.key(session, **named) == KEY
    assert desk.front.count("AssumeRoleWithWebIdentity") == 1


def test_a_web_identity_that_is_refused(desk: Desk, identity: tuple[str, Path]) -> None:
    """The token is not said, nor what STS says of it."""
    role, file = identity
    token = file.read_text()
    desk.variables |= {"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": str(file)}
    desk.front.fault(refusal("InvalidIdentityToken", token, sts=True), "AssumeRoleWithWebIdentity")
    error = desk.error(token)
    assert (type(error), error.hint) == (SourceDenied, "see AWS_WEB_IDENTITY_TOKEN_FILE")
    assert error.message.endswith("the web identity token was refused")
    file.write_text("garbage")
    error = desk.error()
    assert type(error) is SourceDenied
    assert error.message.endswith(f"its credentials may not assume {role}")
    file.unlink()
    error = desk.error()
    assert (type(error), error.exit_status) == (ConfigError, 78)
    assert error.message.endswith("its web identity token cannot be read")


# The machine.


def test_a_container_s_credentials(desk: Desk, aws_metadata: Metadata) -> None:
    desk.variables |= aws_metadata.container()
    assert desk.key() == KEY
    assert aws_metadata.handed_out == 1


@pytest.mark.parametrize("way", ["down", "400"])
def test_a_container_without_credentials(desk: Desk, aws_metadata: Metadata, way: str) -> None:
    """It is asked once: the next time is the broker's to choose."""
    desk.variables |= aws_metadata.container()
    if way == "down":
        aws_metadata.is_down = True
    else:
        aws_metadata.status = 400
    began = time.monotonic()
    error = desk.error()
    assert time.monotonic() - began < 2
    assert type(error) is SourceUnavailable
    assert error.message.endswith("the credentials of its container could not be had")
    assert error.hint == "see AWS_CONTAINER_CREDENTIALS_FULL_URI"


def test_an_instance_s_credentials(desk: Desk, aws_metadata: Metadata) -> None:
    desk.variables |= aws_metadata.instance()
    assert desk.key() == KEY
    assert aws_metadata.handed_out >= 1


def test_an_instance_without_credentials(desk: Desk, aws_metadata: Metadata) -> None:
    desk.variables |= aws_metadata.instance()
    aws_metadata.is_down = True
    error = desk.error()
    assert error.message.endswith("there are no credentials")


# A sign-in.


@pytest.fixture
def signed(desk: Desk, sso: Sso) -> Sso:
    """What `aws sso login` leaves behind."""
    sso.write(desk.home.path)
    named = sso.environment(desk.home.path)
    desk.variables |= {k: v for k, v in named.items() if k.startswith("AWS_ENDPOINT")}
    return sso


def test_a_sign_in_and_what_is_kept_of_it(desk: Desk, signed: Sso) -> None:
    """Credentials of the role for an access token: once in their life."""
    answer = desk.ask(profile="corp")
    assert answer.error is None
    [session] = answer.sessions
    assert desk.key(session, profile="corp") == KEY
    assert (signed.handed_out, signed.refreshes) == (1, 0)


def test_an_access_token_that_has_ended_is_refreshed(desk: Desk, signed: Sso) -> None:
    """And written where AWS's own programs find it."""
    file = signed.write(desk.home.path, timedelta(minutes=-5))
    before = json.loads(file.read_text())
    assert desk.key(profile="corp") == KEY
    assert signed.refreshes == 1
    assert json.loads(file.read_text())["accessToken"] != before["accessToken"]
    assert file.stat().st_mode & 0o077 == 0
    assert desk.key(profile="corp") == KEY
    assert signed.refreshes == 1


SIGN_INS = {
    "nobody": "nobody is signed in",
    "no refresh": "its sign-in has ended",
    "refresh refused": "its sign-in has ended",
    "client ended": "its sign-in has ended",
    "token refused": "its sign-in has ended",
    "file is garbage": "its sign-in cannot be used",
}


def test_a_sign_in_that_is_over_says_what_to_type(desk: Desk, signed: Sso) -> None:
    """With the profile in it; no token is said."""
    ended = timedelta(minutes=-5)
    with desk.workers(desk.profile(profile="corp")) as pool:
        for which, words in SIGN_INS.items():
            file = signed.write(desk.home.path, ended)
            token = json.loads(file.read_text())
            signed.refresh_has_expired = which == "refresh refused"
            signed.refuses = which == "token refused"
            if which == "nobody":
                file.unlink()
            elif which == "no refresh":
                signed.write(desk.home.path, ended, refresh=False)
            elif which == "client ended":
                signed.write(desk.home.path, ended, timedelta(days=-1))
            elif which == "token refused":
                signed.write(desk.home.path)
            elif which == "file is garbage":
                file.write_text("{")
            tokens = (token["accessToken"], token["refreshToken"])
            error = desk.error(*tokens, pool=pool, profile="corp")
            assert (which, type(error), error.exit_status) == (which, SourceDenied, 77)
            assert error.message == f"aws: profile corp, {REGION}: {words}"
            assert error.hint == "type: aws sso login --profile corp"


def test_a_sign_in_to_which_the_role_is_not_given(desk: Desk, signed: Sso) -> None:
    """Signing in again would not help."""
    signed.role = "another"
    error = desk.error(profile="corp")
    assert type(error) is SourceDenied
    assert error.message.endswith("its sign-in has no such role")
    assert error.hint == "see sso_account_id and sso_role_name in ~/.aws/config"


@pytest.mark.parametrize("lifetime", [timedelta(hours=1), timedelta(minutes=-5)])
def test_a_sign_in_that_cannot_be_asked(desk: Desk, signed: Sso, lifetime: timedelta) -> None:
    """Nobody is told to sign in because the network is down."""
    signed.write(desk.home.path, lifetime)
    signed.is_down = True
    error = desk.error(profile="corp")
    assert type(error) is SourceUnavailable
    assert error.message.endswith("ended the connection without an answer")


def test_what_aws_login_leaves_is_looked_for(desk: Desk) -> None:
    """It needs a library that is not ours to install."""
    desk.config("[profile new]\nlogin_session = arn:aws:iam::123456789012:user/alice\n")
    error = desk.error(profile="new")
    assert isinstance(error, SourceDenied | ConfigError)
    assert "sign" in error.message


# A worker.


def test_a_worker_has_what_the_chain_reads_and_no_more(desk: Desk) -> None:
    """A worker of another kind has none of it."""
    profile = desk.profile()
    named = variables(Config({"work": profile}, None, "memory", ()))
    assert set(named) == {"aws"}
    assert named["aws"] == set(accounts.VARIABLES)
    assert {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SECRETS_MANAGER", "AWS_PROFILE"} <= named["aws"]


def test_files_that_a_sign_in_writes_are_watched(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, which changes with a new file; and each file, which may be written over."""
    folder = home.path / ".aws/sso/cache"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "b.tmp").write_text("")
    monkeypatch.setenv("HOME", str(home.path))
    found = accounts.files(
        {"AWS_CONFIG_FILE": "/elsewhere/config", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token"}
    )
    assert found == [
        "/var/token",
        "/elsewhere/config",
        "~/.aws/credentials",
        "~/.aws/sso/cache",
        "~/.aws/login/cache",
        "~/.aws/sso/cache/a.json",
    ]


# A second opinion.


def test_moto_is_read_as_ministack_is(desk: Desk, moto: Moto) -> None:
    """Where it is asked with a label: without one, it answers what was current before."""
    manager = moto.client("secretsmanager")
    secret = f"llm/{secrets.token_hex(4)}"
    first = manager.create_secret(Name=secret, SecretString="sk-first")["VersionId"]
    second = manager.put_secret_value(
        SecretId=secret, SecretString=KEY, VersionStages=["AWSPENDING"]
    )["VersionId"]
    desk.variables |= {k: v for k, v in moto.environment().items() if "_FILE" not in k}
    desk.secret = secret
    assert desk.key() == "sk-first"
    manager.update_secret_version_stage(
        SecretId=secret,
        VersionStage="AWSCURRENT",
        MoveToVersionId=second,
        RemoveFromVersionId=first,
    )
    assert desk.key() == KEY
    assert manager.get_secret_value(SecretId=secret)["SecretString"] == "sk-first"  # it is wrong
    manager.delete_secret(SecretId=secret, RecoveryWindowInDays=7)
    assert "is marked for deletion (DeletedDate " in desk.error().message
    desk.secret = "nowhere"  # 404 there, 400 at AWS: the code counts
    assert "there is no such secret" in desk.error().message


def test_moto_s_refusals_are_not_aws_s(desk: Desk, moto: Moto) -> None:
    """XML with 403, of which botocore makes the code 403. AWS answers 400 with a code."""
    body = (
        b"<ErrorResponse><Errors><Error><Code>AccessDenied</Code></Error></Errors></ErrorResponse>"
    )
    desk.variables |= {k: v for k, v in moto.environment().items() if "KEY" in k}
    desk.front.fault(Status(403, {"content-type": "text/xml"}, body), "DescribeSecret")
    assert desk.error().message.endswith("answers 403, but not as AWS does")
    desk.front.fault(refusal("AccessDeniedException"), "DescribeSecret")
    assert desk.error().message.endswith(":root may not DescribeSecret")
