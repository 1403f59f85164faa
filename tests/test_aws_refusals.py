"""What Secrets Manager, STS and botocore say when they say no, in words of ours."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3.exceptions
import botocore.credentials
import botocore.discovery
import botocore.exceptions as problems
import botocore.httpsession
import botocore.loaders
import botocore.parsers
import botocore.session
import botocore.tokens
import pytest

from keybroker import sources
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.sources import Source
from keybroker.sources.aws import refusals
from keybroker.sources.aws.account import Account
from keybroker.sources.held import Held
from tests.contracts import check_silent, entry
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Dated, Front, refusal
from tests.servers.faults import (
    CommitThenDrop,
    DropBeforeCommit,
    Fault,
    GarbageJson,
    Hang,
    Html,
    Redirect,
    Reset,
    Status,
    Truncated,
    refused_url,
)
from tests.servers.vault import OpenBao

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[None]:
    """Have botocore read its descriptions of services once, not for each client."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.loaders.create_loader))
        yield


CANARY = f"canary-{secrets.token_hex(16)}"
WHO = f"aws: the default profile, {REGION}: "


@pytest.fixture(scope="module")
def reader(aws: Aws) -> Keys:
    return aws.user(f"reader-{secrets.token_hex(4)}", allow("secretsmanager:*"))


@pytest.fixture(scope="module")
def name(aws: Aws) -> str:
    """A secret that is only read."""
    made = f"llm/{secrets.token_hex(4)}"
    aws.put(made, f"sk-{CANARY}")
    return made


Set = Callable[[Mapping[str, str]], None]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Set:
    """Have the variables of a worker, and nothing else of AWS's."""

    def setting(variables: Mapping[str, str]) -> None:
        for one in [*os.environ]:
            if one.startswith("AWS_") or one.lower().endswith("_proxy"):
                monkeypatch.delenv(one)
        monkeypatch.setenv("HOME", str(tmp_path))
        for one, value in variables.items():
            monkeypatch.setenv(one, value)

    return setting


@pytest.fixture
def make(setting: Set, aws: Aws, aws_front: Front, reader: Keys, name: str) -> Iterator[Any]:
    """Build a source that asks through the proxy."""
    setting(aws.environment(reader, aws_front.url))
    made: list[Account] = []

    def make(secret: str = name, **more: Any) -> Source:
        profile = entry("http://127.0.0.1:9", {"type": "aws", "secret": secret, **more})
        held = Held()
        assert profile.account is not None
        made.append(Account.of(profile.account, held))
        return sources.build(profile, {}, held)

    yield make
    for one in made:
        one.close()


def problem(call: Callable[[], object], *never: str) -> KeybrokerError:
    """Return the error of a call, which shows nothing that is a secret or AWS's own words."""
    with pytest.raises(KeybrokerError) as caught:
        call()
    check_silent(caught.value, CANARY, *never)
    return caught.value


SAYS = f"{CANARY}: please see your {CANARY}"
TOO_LATE = "Signature expired: 20261127T120000Z is now earlier than 20261127T121500Z"
TOO_EARLY = "Signature not yet current: 20261127T123000Z is still later than 20261127T121500Z"
KMS = "Access to KMS is not allowed"
DOWN, NO, NEVER = SourceUnavailable, SourceDenied, SourceInvalid

# By name: what comes instead of an answer, and what is made of it: class, words, hint.
CATALOGUE: dict[str, tuple[Fault, type[SourceError], str, str | None]] = {
    "throttled": (refusal("ThrottlingException", SAYS), DOWN, "asks to wait", None),
    "throttled otherwise": (refusal("TooManyRequestsException", SAYS, 429), DOWN, "wait", None),
    "429 alone": (Status(429), DOWN, "asks to wait", None),
    "failed": (refusal("InternalServiceError", SAYS, 500), DOWN, "failed", None),
    "500 alone": (Status(500, {}, SAYS.encode()), DOWN, "failed", None),
    "503 of a balancer": (Html(503), DOWN, "failed", None),
    "502 in HTML": (Html(502), DOWN, "failed", None),
    "closed": (DropBeforeCommit(), DOWN, "ended the connection without an answer", None),
    "closed afterwards": (CommitThenDrop(), DOWN, "ended the connection", None),
    "reset": (Reset(), DOWN, "ended the connection without an answer", None),
    "cut off": (Truncated(), DOWN, "not as Secrets Manager does", "login page"),
    "garbage": (GarbageJson(), DOWN, "not as Secrets Manager does", "login page"),
    "a portal": (Html(200), DOWN, "not as Secrets Manager does", "login page"),
    "a proxy's 403": (Html(403), DOWN, "answers 403, but not as AWS does", "proxy"),
    "a proxy's 407": (Html(407), DOWN, "answers 407, but not as AWS does", "proxy"),
    "a page that is missing": (Html(404), DOWN, "answers 404, but not as AWS does", "proxy"),
    "a redirect": (Redirect("http://127.0.0.1:9/"), DOWN, "answers 302, but not", "login page"),
    "expired": (refusal("ExpiredTokenException", SAYS), NO, "the credentials have ended", "sts"),
    "expired, elsewhere": (refusal("ExpiredToken", SAYS, 403), NO, "have ended", "sts"),
    "unknown key": (refusal("UnrecognizedClientException", SAYS), NO, "are not known", "sts"),
    "unknown token": (refusal("InvalidClientTokenId", SAYS, 403), NO, "are not known", "sts"),
    "bad signature": (
        refusal("InvalidSignatureException", SAYS),
        NO,
        "the secret access key is wrong",
        "try: aws sts get-caller-identity",
    ),
    "clock behind": (
        refusal("InvalidSignatureException", TOO_LATE),
        DOWN,
        "refuses what this clock signs",
        "set the clock",
    ),
    "clock ahead": (
        refusal("InvalidSignatureException", TOO_EARLY),
        DOWN,
        "refuses what this clock signs",
        "set the clock",
    ),
    "too skewed": (refusal("RequestTimeTooSkewed", SAYS, 403), DOWN, "clock", "set the clock"),
    "denied": (
        refusal("AccessDeniedException", SAYS),
        NO,
        "may not DescribeSecret",
        "if its name and region are right, allow it secretsmanager:DescribeSecret",
    ),
    "KMS": (
        refusal("AccessDeniedException", KMS),
        NO,
        "may not use the key that encrypts it",
        "kms:",
    ),
    "decryption": (
        refusal("DecryptionFailure", SAYS),
        NO,
        "may not use the key that encrypts it",
        "kms:",
    ),
    "not signed up": (refusal("OptInRequired", SAYS, 403), NO, "is not signed up", "region"),
    "parameter": (refusal("InvalidParameterException", SAYS), NEVER, "does not take", "secret"),
    "validation": (refusal("ValidationException", SAYS), NEVER, "does not take", "secret"),
    "as it stands": (refusal("InvalidRequestException", SAYS), NEVER, "as it stands", "describe"),
    "of next year": (refusal("TeapotException", SAYS, 418), NEVER, "will not do that (418)", "sts"),
}


@pytest.mark.parametrize("which", CATALOGUE)
def test_a_refusal_says_what_to_do(make: Any, aws_front: Front, name: str, which: str) -> None:
    """By its class; who asked for what, and what to type, by its words."""
    fault, kind, words, hint = CATALOGUE[which]
    aws_front.fault(fault, "DescribeSecret")
    error = problem(lambda: make().issue(""))
    assert type(error) is kind
    assert error.exit_status == {DOWN: 75, NO: 77, NEVER: 77}[kind]
    assert error.message.startswith(WHO)
    assert words in error.message
    assert (error.hint is None) if hint is None else hint in str(error.hint)
    assert isinstance(error, SourceError)
    assert not error.withdrawn
    about_one = kind is not NO or "may not " in error.message
    assert (f": {name}: " in error.message) == about_one


def test_a_throttled_client_waits(make: Any, aws_front: Front) -> None:
    """AWS does not say how long; and it is asked once, whatever botocore would do."""
    aws_front.fault(refusal("ThrottlingException", SAYS), times=None)
    error = problem(lambda: make().issue(""))
    assert isinstance(error, SourceError)
    assert error.retry_after == timedelta(seconds=5)
    assert aws_front.count() == 1


@pytest.mark.parametrize(("minutes", "way"), [(20, "behind"), (-20, "ahead"), (3000, "behind")])
def test_a_wrong_clock_is_said_with_its_minutes(
    make: Any, aws_front: Front, minutes: int, way: str
) -> None:
    """By the Date of the refusal."""
    date = (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    said = refusal("InvalidSignatureException", TOO_LATE)
    headers = {**said.headers, "date": date}
    aws_front.fault(Status(400, headers, said.body))
    error = problem(lambda: make().issue(""))
    assert f"refuses what this clock signs: it is {abs(minutes)} min {way}" in error.message
    assert error.hint == "set the clock"


def test_a_clock_that_is_wrong_in_truth(setting: Set, name: str) -> None:
    """A server whose own clock is 20 minutes ahead."""
    with Aws(own_clock=True) as aws:
        aws.put(name, f"sk-{CANARY}")
        keys = aws.user("reader", allow("secretsmanager:*"))
        aws.set_clock(timedelta(minutes=20))
        setting(aws.environment(keys))
        profile = entry("http://127.0.0.1:9", {"type": "aws", "secret": name})
        held = Held()
        error = problem(lambda: sources.build(profile, {}, held).issue(""), keys.secret_key)
        assert profile.account is not None
        Account.of(profile.account, held).close()
    assert type(error) is SourceUnavailable
    assert "refuses what this clock signs: it is 20 min behind" in error.message


def test_a_server_that_hangs_is_left_after_five_seconds(make: Any, aws_front: Front) -> None:
    """One attempt: the next one is the broker's to make."""
    aws_front.fault(Hang(), times=None)
    source = make()
    began = time.monotonic()
    error = problem(lambda: source.issue(""))
    assert 4 < time.monotonic() - began < 6.5
    assert type(error) is SourceUnavailable
    assert error.message.endswith("did not answer in time")
    assert aws_front.count() == 1


NOT_THERE = {
    "nobody listens": ("http://127.0.0.1:9", "could not be reached"),
    "no such host": ("http://keybroker.invalid", "could not be reached"),
}


@pytest.mark.parametrize("which", NOT_THERE)
def test_a_server_that_is_not_there(make: Any, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """It is about no secret; what to look at is named."""
    url, words = NOT_THERE[which]
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    error = problem(lambda: make().issue(""))
    assert (type(error), error.message) == (SourceUnavailable, f"{WHO}{words}")
    assert error.hint


def test_a_certificate_is_checked(
    make: Any, openbao_tls: OpenBao, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AWS_CA_BUNDLE, where there is one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", openbao_tls.url)
    error = problem(lambda: make().issue(""))
    assert error.message == f"{WHO}has a certificate that is not trusted"
    assert error.hint == "see AWS_CA_BUNDLE"
    monkeypatch.setenv("AWS_CA_BUNDLE", str(openbao_tls.ca_file))
    assert "not as AWS does" in problem(lambda: make().issue("")).message


def test_a_proxy_that_is_not_there(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the proxy that is named."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://keybroker.invalid")
    monkeypatch.setenv("HTTP_PROXY", refused_url())
    error = problem(lambda: make().issue(""))
    assert (type(error), error.message) == (
        SourceUnavailable,
        f"{WHO}could not be reached through the proxy",
    )
    assert error.hint == "see HTTPS_PROXY, NO_PROXY"


# What is in variables and files.

CONFIGS: dict[str, tuple[dict[str, str], str, str, str]] = {
    "no region": ({"AWS_REGION": "", "AWS_DEFAULT_REGION": ""}, "", "no region", "region"),
    "no such region": ({}, "region = nowhere 1\n", "no such region", "region"),
    "no endpoint": ({"AWS_ENDPOINT_URL": "nonsense"}, "", "cannot be used", "AWS_ENDPOINT_URL"),
    "a bundle that is missing": ({"AWS_CA_BUNDLE": "/nowhere"}, "", "", ""),
    "no configuration": ({}, "nonsense [\n", "~/.aws/config cannot be read", "~/.aws/config"),
    "not UTF-8": ({}, "\udcff\udcfe", "~/.aws/config cannot be read", "~/.aws/config"),
    "half of the keys": ({"AWS_SECRET_ACCESS_KEY": ""}, "", "are not complete", "~/.aws/config"),
    "a metadata time that is none": (
        {"AWS_METADATA_SERVICE_TIMEOUT": "soon"},
        "",
        "cannot be used",
        "~/.aws/config",
    ),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_setting_that_cannot_work_is_the_file_s(
    setting: Set, aws: Aws, reader: Keys, tmp_path: Path, which: str
) -> None:
    """Somebody has to edit it: 78, and what to look at."""
    variables, text, words, hint = CONFIGS[which]
    file = tmp_path / "config"
    file.write_bytes(f"[default]\n{text}".encode("utf-8", "surrogateescape"))
    given = {**aws.environment(reader), "AWS_CONFIG_FILE": str(file), **variables}
    if "region =" in text:
        given = {k: v for k, v in given.items() if "REGION" not in k}
    setting({k: v for k, v in given.items() if v})
    profile = entry("http://127.0.0.1:9", {"type": "aws", "secret": "llm"})
    call = sources.build(profile, {}, Held()).issue
    if which == "a bundle that is missing":  # nothing is read of it over HTTP
        problem(lambda: call(""))
        return
    error = problem(lambda: call(""), reader.secret_key)
    assert (type(error), error.exit_status) == (ConfigError, 78)
    assert words in error.message
    assert hint in str(error.hint)


PROFILES: dict[str, tuple[str, str, str]] = {
    "nowhere": ("", "there is no such profile in ~/.aws/config", "AWS_PROFILE"),
    "round": (
        (
            "[profile round]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = round2\n"
            "[profile round2]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = round\n"
        ),
        "its profile leads back to itself",
        "source_profile",
    ),
    "orphan": (
        "[profile orphan]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = none\n",
        "its profile is not valid",
        "~/.aws/config",
    ),
    "half": ("[profile half]\nrole_arn = arn:aws:iam::1:role/r\n", "are not complete", "config"),
    "strange": (
        "[profile strange]\nrole_arn = arn:aws:iam::1:role/r\ncredential_source = Moon\n",
        "its profile is not valid",
        "~/.aws/config",
    ),
    "sso": ("[profile sso]\nsso_session = none\nsso_account_id = 1\n", "not valid", "config"),
}


@pytest.mark.parametrize("which", PROFILES)
def test_a_profile_that_leads_nowhere_is_named(
    setting: Set, aws: Aws, tmp_path: Path, which: str
) -> None:
    text, words, hint = PROFILES[which]
    file = tmp_path / "config"
    file.write_text(text)
    setting({**aws.environment(), "AWS_CONFIG_FILE": str(file)})
    given = {"type": "aws", "secret": "llm", "profile": which, "region": REGION}
    error = problem(lambda: sources.build(entry("http://127.0.0.1:9", given), {}, Held()).issue(""))
    assert (type(error), error.exit_status) == (ConfigError, 78)
    assert error.message.startswith(f"aws: profile {which}, {REGION}: ")
    assert words in error.message
    assert hint in str(error.hint)


def test_nobody_is_signed_in(setting: Set, aws: Aws) -> None:
    """No way of the chain has credentials."""
    setting(aws.environment())
    profile = entry("http://127.0.0.1:9", {"type": "aws", "secret": "llm"})
    error = problem(lambda: sources.build(profile, {}, Held()).issue(""))
    assert (type(error), error.message) == (ConfigError, f"{WHO}there are no credentials")
    assert error.hint == "try: aws sts get-caller-identity; see [aws]"


def test_a_long_name_leaves_room_for_what_is_wrong(make: Any, aws_front: Front) -> None:
    """It is cut; what is said of it is not."""
    aws_front.fault(refusal("AccessDeniedException"), times=1)
    error = problem(lambda: make("n" * 400).issue(""))
    assert error.message.endswith("may not DescribeSecret")
    assert len(error.message) <= 200
    arn = f"arn:aws:secretsmanager:{REGION}:{'1' * 12}:secret:{'a' * 150}-AbCdEf"
    error = problem(lambda: make(arn).issue(""))
    assert "…" in error.message
    assert "a-AbCdEf: " in error.message


# Who may do what: the policy of docs/aws.md, and each of its statements missing.

BOTH = ["secretsmanager:DescribeSecret", "secretsmanager:GetSecretValue"]


def policy(*statements: tuple[str | list[str], str]) -> dict[str, Any]:
    said = [
        {"Effect": "Allow", "Action": actions, "Resource": resource}
        for actions, resource in statements
    ]
    return {"Version": "2012-10-17", "Statement": said}


def user(aws: Aws, setting: Set, front: Front, said: dict[str, Any]) -> str:
    """Be a user with a policy; return their ARN."""
    who = f"one-{secrets.token_hex(4)}"
    setting(aws.environment(aws.user(who, said), front.url))
    return f"arn:aws:iam::{aws.account}:user/{who}"


def test_the_documented_policy_is_enough(
    make: Any, setting: Set, aws: Aws, aws_front: Front, name: str
) -> None:
    """Two actions on the one secret."""
    user(aws, setting, aws_front, policy((BOTH, aws.arn(name))))
    source = make()
    credential = source.issue("")
    assert source.look(credential.lease) == credential.lease
    assert source.issue("").secret == credential.secret


@pytest.mark.parametrize("action", ["DescribeSecret", "GetSecretValue"])
def test_what_is_missing_in_a_policy_is_named(
    make: Any, setting: Set, aws: Aws, aws_front: Front, name: str, action: str
) -> None:
    """With who may not do it, and for which secret."""
    rest = [one for one in BOTH if not one.endswith(action)]
    who = user(aws, setting, aws_front, policy((rest, aws.arn(name))))
    error = problem(lambda: make().issue(""))
    assert type(error) is SourceDenied
    assert error.message == f"{WHO}{name}: {who} may not {action}"
    assert error.hint == f"if its name and region are right, allow it secretsmanager:{action}"


def test_a_policy_for_another_secret_is_none(
    make: Any, setting: Set, aws: Aws, aws_front: Front, name: str
) -> None:
    who = user(aws, setting, aws_front, policy((BOTH, aws.arn(name)[:-3] + "xyz")))
    assert problem(lambda: make().issue("")).message.endswith(f"{who} may not DescribeSecret")


def test_who_cannot_be_named_is_not(make: Any, aws_front: Front) -> None:
    """STS does not answer: the rest is said all the same, within a second or two."""
    aws_front.fault(refusal("AccessDeniedException", SAYS), "DescribeSecret", times=None)
    for fault in (Hang(), Html(200), Status(200, {}, b"<x/>"), Status(500), Dated(timedelta(1))):
        aws_front.fault(fault, "GetCallerIdentity")
        began = time.monotonic()
        error = problem(lambda: make().issue(""))
        assert " may not DescribeSecret" in error.message
        assert time.monotonic() - began < 3


# Every exception of the library.


def below(kind: type[Exception]) -> list[type[Exception]]:
    found = []
    for one in kind.__subclasses__():
        found += [one, *below(one)]
    return found


# What cannot be raised by what is done here: other services, paging, waiting, a test's stub.
ELSEWHERE = {
    *("AliasConflictParameterError", "RangeError", "UnknownKeyError", "UnknownParameterError"),
    *("PaginationError", "OperationNotPageableError", "WaiterError", "WaiterConfigError"),
    *("StubResponseError", "StubAssertionError", "UnStubbedResponseError"),
    *("UnsupportedS3ArnError", "UnsupportedS3ControlArnError", "UnsupportedS3ConfigurationError"),
    *("UnsupportedS3AccesspointConfigurationError", "UnsupportedS3ControlConfigurationError"),
    *("UnsupportedOutpostResourceError", "UnseekableStreamError", "AwsChunkedWrapperError"),
    *("MD5UnavailableError", "CapacityNotAvailableError", "InvalidDNSNameError"),
    *("InvalidExpressionError", "UnknownServiceStyle", "UnknownClientMethodError"),
    *("EndpointDiscoveryException", "EndpointDiscoveryRequired", "EndpointDiscoveryRefreshFailed"),
    *("ResourceNotExistsError",),
}


def test_every_exception_of_botocore_is_mapped_on_purpose() -> None:
    """One that is new in the next version fails here, not at a user's."""
    by_accident = {
        kind.__name__
        for kind in below(problems.BotoCoreError)
        if next(one for one in refusals.EXCEPTIONS if issubclass(kind, one))
        is problems.BotoCoreError
    }
    assert by_accident - ELSEWHERE == set()


def test_no_row_of_the_table_is_hidden_by_one_above_it() -> None:
    """The first that fits counts."""
    rows = list(refusals.EXCEPTIONS)
    hidden = {
        lower.__name__
        for n, lower in enumerate(rows)
        for upper in rows[:n]
        if issubclass(lower, upper)
    }
    assert hidden == set()


def outside(module: ModuleType) -> set[str]:
    """Return the names of a module's exceptions that BotoCoreError does not cover."""
    return {
        one.__name__
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, Exception)
        and one.__module__ == module.__name__
        and not issubclass(one, problems.BotoCoreError)
    }


def test_what_is_no_botocore_error_is_known() -> None:
    """What else these libraries can raise where we call them."""
    assert outside(problems) == {
        *("ClientError", "EventStreamError"),  # the former is what an answer with an error is
        *("MissingServiceIdError", "UndefinedModelAttributeError"),  # of a broken installation
        *("UnsupportedTLSVersionWarning", "ImminentRemovalWarning"),
    }
    assert outside(botocore.parsers) == {"ResponseParserError"}
    for module in (botocore.credentials, botocore.tokens, botocore.httpsession):
        assert outside(module) == set()
    assert issubclass(problems.EventStreamError, problems.ClientError)
    assert outside(boto3.exceptions) == {  # of resources, transfers and DynamoDB
        *("Boto3Error", "ResourceLoadException", "NoVersionFound", "RetriesExceededError"),
        *("S3TransferFailedError", "S3UploadFailedError", "DynamoDBNeedsConditionError"),
        *("DynamoDBOperationNotSupportedError", "DynamoDBNeedsKeyConditionError"),
        *("PythonDeprecationWarning", "InvalidCrtTransferConfigError", "UnknownAPIVersionError"),
    } - {"UnknownAPIVersionError"}


def test_what_the_table_says_can_be_printed() -> None:
    """In one line, lower case, without a full stop, and short."""
    rows = [*refusals.EXCEPTIONS.values(), *refusals.CODES.values(), *refusals.PROVIDERS.values()]
    for row in rows:
        assert issubclass(row.kind, KeybrokerError)
        for text in (row.words, row.hint or "x"):
            assert "\n" not in text
            assert not text.endswith(".")
            assert 0 < len(text) <= 80


@pytest.mark.parametrize("code", sorted(refusals.CODES))
def test_every_code_is_known_whatever_its_status(code: str) -> None:
    """Secrets Manager and STS differ in it."""
    for status in (400, 403, 500):
        found = refusals.of_answer(code, status, "")
        assert found == refusals.CODES[code]
