"""What is read in Secrets Manager: which version, when it ends, and what is no key."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.session
import pytest

from keybroker import aws as accounts
from keybroker import sources
from keybroker.credential import Lease, Secret
from keybroker.errors import KeybrokerError, SourceDenied, SourceError, SourceInvalid
from keybroker.rotation import Kind
from keybroker.sources import Capabilities, Source
from keybroker.sources.aws.account import Account
from keybroker.sources.held import Held
from keybroker.values import replace
from tests.contracts import check_silent, entry
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Dated, Front, refusal
from tests.servers.faults import Exchange, Fault, Html, PassThrough, Status

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[None]:
    """Have botocore read its descriptions of services once, not for each client."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.loaders.create_loader))
        yield


KEY = f"sk-canary-{secrets.token_hex(16)}"


@pytest.fixture(scope="module")
def reader(aws: Aws) -> Keys:
    """A user who may read all secrets, several at once too."""
    return aws.user(f"reader-{secrets.token_hex(4)}", allow("secretsmanager:*"))


@pytest.fixture(autouse=True)
def variables(
    aws: Aws, aws_front: Front, reader: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a worker would have, and nothing else of AWS's."""
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in aws.environment(reader, aws_front.url).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def name() -> str:
    """A secret of the test's own, on a server that is shared."""
    return f"llm/{secrets.token_hex(4)}"


Make = Callable[..., Source]


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def make(held: Held, name: str) -> Iterator[Make]:
    """Build the sources of one worker."""
    profiles: list[Any] = []

    def make(secret: str = "", field: str | None = None, **more: Any) -> Source:
        given = {"type": "aws", "secret": secret or name, "region": REGION, **more}
        given |= {} if field is None else {"field": field}
        profiles.append(entry("http://127.0.0.1:9", given))
        return sources.build(profiles[-1], {}, held)

    make.profiles = profiles  # type: ignore[attr-defined]
    yield make
    for one in profiles:
        Account.of(one.account, held).close()


def read(source: Source) -> str:
    return source.issue("").secret.reveal()


def problem(call: Callable[[], object], kind: type[KeybrokerError] = SourceInvalid) -> Any:
    """Return the error of a call, which shows no secret of this test's."""
    with pytest.raises(kind) as caught:
        call()
    check_silent(caught.value, KEY, "canary")
    return caught.value


def near(moment: datetime | None, **how: float) -> bool:
    """Tell whether a moment is so far from now, within a few seconds."""
    assert moment is not None
    return abs(moment - (datetime.now(UTC) + timedelta(**how))) < timedelta(seconds=8)


# What it is.


def test_its_keys_are_somebody_else_s(make: Make) -> None:
    """It finds, renews and ends none of them, and asks nobody for that."""
    source = make()
    lease = Lease("x", "aws", datetime.now(UTC))
    assert source.capabilities == Capabilities(Kind.FOLLOWED)
    assert (source.find("kb-x"), source.sweep("kb-")) == ((), ())
    with pytest.raises(SourceDenied):
        source.renew(lease)
    with pytest.raises(SourceInvalid):
        source.revoke(lease)


def test_the_version_names_the_lease(make: Make, aws: Aws, name: str) -> None:
    """When it was changed is by AWS's clock; no end was promised."""
    version = aws.put(name, KEY)
    credential = make().issue("")
    assert credential.secret == Secret(KEY)
    lease = credential.lease
    assert (lease.id, lease.source) == (version, "aws")
    assert lease.written_at == aws.secret(name)["LastChangedDate"]
    assert (lease.expires_at, lease.reread_at) == (None, None)
    assert near(lease.issued_at)


def test_it_is_read_by_its_arn_too_and_in_the_region_that_this_says(
    make: Make, aws: Aws, name: str
) -> None:
    """Whatever region is configured."""
    aws.put(name, KEY)
    source = make(aws.arn(name), region="eu-central-1")
    assert read(source) == KEY
    assert make.profiles[-1].account.region == REGION  # type: ignore[attr-defined]


class Seen(Fault):
    """Keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, exchange: Exchange) -> bool:
        self.asked.append(json.loads(exchange.request.body))
        return PassThrough()(exchange)


def test_a_label_is_always_asked_for(make: Make, aws: Aws, aws_front: Front, name: str) -> None:
    """What comes without one differs between servers."""
    current = aws.put(name, KEY)
    pending = aws.put(name, "sk-canary-not-yet", VersionStages=["AWSPENDING"])
    seen = Seen()
    aws_front.fault(seen, "GetSecretValue", times=None)
    assert read(make()) == KEY
    aws.move(name, pending, current)
    assert read(make()) == "sk-canary-not-yet"
    assert seen.asked == [{"SecretId": name, "VersionStage": "AWSCURRENT"}] * 2


# What is a key.

VALUES: dict[str, tuple[str | bytes, str | None, str]] = {
    "a string": (KEY, None, KEY),
    "of echo": (f"{KEY}\n", None, KEY),
    "of Windows": (f"{KEY}\r\n", None, KEY),
    "bytes": (KEY.encode(), None, KEY),
    "bytes with JSON": (json.dumps({"key": KEY}).encode(), "/key", KEY),
    "a field": (json.dumps({"key": KEY, "other": "x"}), "/key", KEY),
    "deep": (json.dumps({"a": {"b": {"key": KEY}}}), "/a/b/key", KEY),
    "with ~1": (json.dumps({"a/b": KEY}), "/a~1b", KEY),
    "with ~0": (json.dumps({"a~b": KEY}), "/a~0b", KEY),
    "with ~01": (json.dumps({"a~1b": KEY, "a/b": "x"}), "/a~01b", KEY),
    "of a list": (json.dumps({"keys": ["x", KEY]}), "/keys/1", KEY),
    "of a list itself": (json.dumps([KEY]), "/0", KEY),
    "a number's name": (json.dumps({"01": KEY}), "/01", KEY),
    "a minus": (json.dumps({"-": KEY}), "/-", KEY),
    "not ASCII": (json.dumps({"schlüssel": KEY}), "/schlüssel", KEY),
    "a blank in the name": (json.dumps({"my key": KEY}), "/my key", KEY),
    "like JSON": ("{sk-canary-1", None, "{sk-canary-1"),
    "a number": ("1234567890", None, "1234567890"),
}


@pytest.mark.parametrize("which", VALUES)
def test_a_key_is_the_value_or_a_field_of_it(make: Make, aws: Aws, name: str, which: str) -> None:
    """By RFC 6901, in text or bytes."""
    value, field, key = VALUES[which]
    aws.put(name, value)
    assert read(make(field=field)) == key


NO_KEY: dict[str, tuple[str | bytes, str | None, str, str | None]] = {
    "blanks": (f"{KEY} x", None, "its value is not one token", "printable ASCII"),
    "a blank before it": (f" {KEY}", None, "its value is not one token", "printable ASCII"),
    "only a newline": ("\n", None, "its value is empty", "printable ASCII"),
    "not ASCII": (f"{KEY}ü", None, "its value is not one token", "printable ASCII"),
    "no UTF-8": (b"\xff\xfe" + KEY.encode(), None, "its value is not one token", "printable ASCII"),
    "too long": ("k" * 16_385, None, "its value is", "printable ASCII"),
    "JSON of its own": (json.dumps({"key": KEY}), None, "its value is JSON", 'field = "/…"'),
    "JSON without blanks": (f'{{"key":"{KEY}"}}', None, "its value is JSON", 'field = "/…"'),
    "a list": (f'["{KEY}"]', None, "its value is JSON", 'field = "/…"'),
    "no JSON": (KEY, "/key", "is no JSON, so it has no fields", "leave field out"),
    "JSON text": (json.dumps(KEY), "/key", "has no field /key", "see field"),
    "deeper than JSON goes": ("[" * 60_000, "/0", "is no JSON", "leave field out"),
    "another field": (json.dumps({"Key": KEY}), "/key", "has no field /key", "see field"),
    "null": (json.dumps({"key": None}), "/key", "has no field /key", "see field"),
    "a number": (json.dumps({"key": 5}), "/key", "field /key is no text", "see field"),
    "a table": (json.dumps({"key": {"x": KEY}}), "/key", "field /key is no text", "see field"),
    "empty": (json.dumps({"key": ""}), "/key", "field /key is empty", "printable ASCII"),
    "through text": (json.dumps({"a": KEY}), "/a/b", "has no field /a/b", "see field"),
    "leading zero": (json.dumps([KEY, KEY]), "/01", "has no field /01", "see field"),
    "beyond the list": (json.dumps([KEY]), "/1", "has no field /1", "see field"),
    "after the last": (json.dumps([KEY]), "/-", "has no field /-", "see field"),
    "a huge index": (json.dumps([KEY]), "/" + "9" * 5000, "has no field", "see field"),
    "another digit": (json.dumps([KEY, KEY]), "/¹", "has no field /¹", "see field"),
}


@pytest.mark.parametrize("which", NO_KEY)
def test_what_is_no_key_is_said_without_it(make: Make, aws: Aws, name: str, which: str) -> None:
    """With the secret, what is wrong, and what to look at."""
    value, field, words, hint = NO_KEY[which]
    aws.put(name, value)
    error = problem(lambda: make(field=field).issue(""))
    assert error.message.startswith(f"aws: the default profile, {REGION}: {name}: ")
    assert words in error.message
    assert hint in str(error.hint)
    assert not error.withdrawn


# When it ends.


ENDS: dict[str, tuple[dict[str, Any], dict[str, float] | None]] = {
    "nothing": ({}, None),
    "expires_at": ({"expires_at": timedelta(hours=2)}, {"hours": 2}),
    "ttl in seconds": ({"ttl": 3600}, {"hours": 1}),
    "ttl in digits": ({"ttl": "3600"}, {"hours": 1}),
    "ttl as a duration": ({"ttl": "12h"}, {"hours": 12}),
    "the earlier": ({"ttl": "12h", "expires_at": timedelta(hours=1)}, {"hours": 1}),
    "the other": ({"ttl": "1h", "expires_at": timedelta(hours=9)}, {"hours": 1}),
    "empty ones": ({"ttl": 0, "expires_at": ""}, None),
}


@pytest.mark.parametrize("which", ENDS)
def test_an_end_stands_beside_the_key(make: Make, aws: Aws, name: str, which: str) -> None:
    """In the same table as the field; a ttl counts from when the version was made."""
    given, end = ENDS[which]
    now = datetime.now(UTC)
    beside = {k: (now + v).isoformat() if isinstance(v, timedelta) else v for k, v in given.items()}
    aws.put(name, json.dumps({"gateway": {"key": KEY, **beside}, "ttl": "soon"}))
    expires_at = make(field="/gateway/key").issue("").lease.expires_at
    assert expires_at is None if end is None else near(expires_at, **end)


@pytest.mark.parametrize("value", ["tomorrow", "2027-01-01T00:00:00", 5, True, ["x"], {"a": 1}])
def test_an_end_that_cannot_be_read_is_no_end_for_ever(
    make: Make, aws: Aws, name: str, value: Any
) -> None:
    """A key must not live longer because somebody misspelt its end."""
    aws.put(name, json.dumps({"key": KEY, "expires_at": value}))
    error = problem(lambda: make(field="/key").issue(""))
    assert "expires_at cannot be read" in error.message


@pytest.mark.parametrize("value", ["soon", -5, True, "1 h", [1]])
def test_a_ttl_that_cannot_be_read_is_none(make: Make, aws: Aws, name: str, value: Any) -> None:
    """Neither for ever nor for no time."""
    aws.put(name, json.dumps({"key": KEY, "ttl": value}))
    assert "ttl cannot be read" in problem(lambda: make(field="/key").issue("")).message


def test_a_key_that_has_ended_is_said_with_its_day(make: Make, aws: Aws, name: str) -> None:
    """It is not handed out, and its owner is who withdrew it; also of a version that is known."""
    aws.put(name, json.dumps({"key": KEY, "expires_at": "2026-01-02T03:04:05Z"}))
    source = make(field="/key")
    error = problem(lambda: source.issue(""))
    assert "has ended on 2026-01-02 03:04Z" in error.message
    assert error.withdrawn
    known = Lease("v", "aws", datetime.now(UTC), datetime(2026, 1, 2, tzinfo=UTC))
    assert source.look(known) is None


def test_a_clock_that_is_off_moves_what_counts_by_it(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """A ttl counts from when the version was made, by AWS's clock; the Date header has it."""
    aws.put(name, json.dumps({"key": KEY, "ttl": "12h"}))
    aws_front.fault(Dated(timedelta(hours=5)), times=None)
    assert near(make(field="/key").issue("").lease.expires_at, hours=7)


def test_a_clock_that_is_nearly_right_is_right(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """The header counts whole seconds, and the answer took its time: an end does not waver."""
    aws.put(name, json.dumps({"key": KEY, "ttl": "12h"}))
    ends = set()
    for seconds in (-20, 0, 20):
        aws_front.clear()
        aws_front.fault(Dated(timedelta(seconds=seconds)), times=None)
        ends.add(make(field="/key").issue("").lease.expires_at)
    assert len(ends) == 1


@pytest.mark.parametrize("date", ["", "nonsense", "Fri, 31 Dec 9999 23:59:59 GMT", "1"])
def test_a_date_that_says_nothing_moves_nothing(
    make: Make, aws: Aws, aws_front: Front, name: str, date: str
) -> None:
    """Of a proxy that writes its own, or none."""
    body = {"ARN": "arn:x", "VersionId": "v" * 32, "SecretString": KEY, "CreatedDate": 1e9}
    body |= {"VersionIdsToStages": {"v" * 32: ["AWSCURRENT"]}, "NextRotationDate": 253402300799}
    headers = {"content-type": "application/x-amz-json-1.1", "date": date}
    aws_front.fault(Status(200, headers, json.dumps(body).encode()), times=None)
    assert read(make()) == KEY


# Its owner rotates it.

SOON = timedelta(seconds=5)


def rotation(aws_front: Front, name: str, **when: float) -> None:
    """Have AWS say when a secret is rotated."""
    due = datetime.now(UTC) + timedelta(**when)
    aws_front.describe(name, NextRotationDate=due.timestamp(), RotationEnabled=True)


@pytest.mark.parametrize(
    ("when", "least", "most"),
    [
        ({"hours": 2}, 7200, 7210),
        ({"seconds": 20}, 20, 30),
        ({"seconds": -1}, 1, 10),
        ({"seconds": -60}, 50, 70),
        ({"minutes": -30}, 1700, 1900),
    ],
)
def test_it_is_read_again_shortly_after_its_owner_rotates_it(
    make: Make, aws: Aws, aws_front: Front, name: str, when: dict[str, float], least: int, most: int
) -> None:
    """One that is late is awaited less and less often: never a loop without a pause."""
    aws.put(name, KEY)
    rotation(aws_front, name, **when)
    source = make()
    lease = source.issue("").lease
    for found in (lease, source.look(lease)):
        assert found is not None
        assert found.reread_at is not None
        ahead = (found.reread_at - datetime.now(UTC)).total_seconds()
        assert least - 2 < ahead < most


@pytest.mark.parametrize("fields", ["late", "off", "never", "strange"])
def test_a_date_that_promises_nothing_is_none(
    make: Make, aws: Aws, aws_front: Front, name: str, fields: str
) -> None:
    """Far gone, of a rotation that is switched off, before the first one, or at no time."""
    then = (datetime.now(UTC) - timedelta(days=3)).timestamp()
    said: dict[str, dict[str, Any]] = {
        "late": {"NextRotationDate": then, "RotationEnabled": True},
        "off": {"LastRotatedDate": then, "RotationRules": {"AutomaticallyAfterDays": 7}},
        "never": {"RotationEnabled": True, "RotationRules": {"AutomaticallyAfterDays": 7}},
        "strange": {
            "RotationEnabled": True,
            "LastRotatedDate": then,
            "RotationRules": {"AutomaticallyAfterDays": 10**9},
        },
    }
    aws.put(name, KEY)
    aws_front.describe(name, **said[fields])
    assert make().issue("").lease.reread_at is None


def test_a_rule_is_as_good_as_a_date(make: Make, aws: Aws, aws_front: Front, name: str) -> None:
    """The last rotation and the days that lie between two."""
    aws.put(name, KEY)
    last = datetime.now(UTC) - timedelta(days=2)
    aws_front.describe(
        name,
        RotationEnabled=True,
        LastRotatedDate=last.timestamp(),
        RotationRules={"AutomaticallyAfterDays": 7},
    )
    assert near(make().issue("").lease.reread_at, days=5)


def test_a_look_reads_no_value(make: Make, aws: Aws, aws_front: Front, name: str) -> None:
    """One DescribeSecret: nothing is decrypted, nothing is billed as a use of the key."""
    aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    aws_front.forget()
    assert source.look(lease) == lease
    assert [call.operation for call in aws_front.calls] == ["DescribeSecret"]


def test_a_version_that_replaced_it_is_news(make: Make, aws: Aws, name: str) -> None:
    aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    aws.put(name, "sk-canary-next")
    assert source.look(lease) is None
    assert read(source) == "sk-canary-next"


def test_an_owner_who_goes_back_is_followed(make: Make, aws: Aws, name: str) -> None:
    """The version before counts again; what it is older than is AWSPREVIOUS now."""
    first = aws.put(name, "sk-canary-first")
    second = aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    assert lease.id == second
    aws.move(name, first, second)
    assert source.look(lease) is None
    back = source.issue("")
    assert (back.lease.id, back.secret.reveal()) == (first, "sk-canary-first")
    assert back.lease.written_at is not None
    assert lease.written_at is not None
    assert back.lease.written_at >= lease.written_at  # else it would pass for out of date


def test_an_answer_that_is_behind_changes_nothing(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """A replica that has not heard of the version yet, or has it as pending."""
    first = aws.put(name, "sk-canary-first")
    second = aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    before = datetime.now(UTC).timestamp() - 3600
    aws_front.describe(
        name, LastChangedDate=before, VersionIdsToStages={first: ["AWSCURRENT"], "x": ["Y"]}
    )
    assert source.look(lease) == lease
    aws_front.describe(name, VersionIdsToStages={first: ["AWSCURRENT"], second: ["AWSPENDING"]})
    assert source.look(lease) == lease
    aws_front.describe(name, LastChangedDate=before)
    assert source.look(lease) == lease  # and does not make what it knows older


def test_a_version_that_was_gone_back_from_while_a_rotation_goes_on_is_replaced(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """It has a rotation's label still, and that of the version before: so it was current."""
    first = aws.put(name, "sk-canary-first")
    second = aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    both = {first: ["AWSCURRENT"], second: ["AWSPENDING", "AWSPREVIOUS"]}
    aws_front.describe(name, VersionIdsToStages=both)
    assert source.look(lease) is None


def test_a_value_of_a_replica_that_is_behind_is_known_by_its_time(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """The broker compares: an older one does not replace a newer one."""
    aws.put(name, KEY)
    before = datetime.now(UTC).timestamp() - 3600
    aws_front.describe(name, LastChangedDate=before)
    lease = make().issue("").lease
    assert near(lease.written_at, hours=-1)


# It is gone.


def test_a_secret_that_is_marked_for_deletion_is_said(make: Make, aws: Aws, name: str) -> None:
    """Its keeper has withdrawn the key; the command that brings it back is named."""
    aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    aws.client("secretsmanager").delete_secret(SecretId=name, RecoveryWindowInDays=7)
    for call in (lambda: source.look(lease), lambda: source.issue("")):
        error = problem(call)
        assert f"{name}: is marked for deletion (DeletedDate 2" in error.message
        assert error.hint == f"aws secretsmanager restore-secret --secret-id {name}"
        assert error.withdrawn
    aws.client("secretsmanager").restore_secret(SecretId=name)
    assert read(source) == KEY


def test_a_secret_that_is_not_there_is_said(make: Make, name: str) -> None:
    error = problem(lambda: make().issue(""))
    assert error.message.endswith(f"{name}: there is no such secret")
    assert error.hint == "see secret, region and profile; aws secretsmanager list-secrets"
    assert error.withdrawn


def test_a_secret_without_a_value_is_said(
    make: Make, aws: Aws, aws_front: Front, name: str
) -> None:
    """Somebody made it and has put nothing there."""
    aws.put(name, KEY)
    aws_front.describe(name, VersionIdsToStages={"x": ["AWSPENDING"]})
    text = "Secrets Manager can't find the specified secret value for staging label: AWSCURRENT"
    aws_front.fault(refusal("ResourceNotFoundException", text), "GetSecretValue")
    error = problem(lambda: make().issue(""))
    assert error.message.endswith(f"{name}: has no value yet")
    assert error.hint == "aws secretsmanager put-secret-value …"
    assert error.withdrawn


# Several at once.


def together(make: Make, held: Held) -> None:
    """Have a worker read what its next polls ask for."""
    sources.read_together(make.profiles, held)  # type: ignore[attr-defined]


@pytest.fixture
def names() -> list[str]:
    return [f"many/{secrets.token_hex(4)}" for _ in range(3)]


def test_several_are_read_with_one_call(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held
) -> None:
    """One more for each that is read for the first time; later one for all."""
    for n, name in enumerate(names):
        aws.put(name, f"sk-canary-{n}")
    made = [make(name) for name in names[:2]] + [make(aws.arn(names[2]))]
    aws_front.forget()
    together(make, held)
    keys = [one.issue("") for one in made]
    assert [key.secret.reveal() for key in keys] == [f"sk-canary-{n}" for n in range(3)]
    assert aws_front.count("BatchGetSecretValue") == 1
    assert aws_front.count("GetSecretValue") == 0
    assert all(key.lease.written_at is not None for key in keys)

    for _ in range(2):
        aws_front.forget()
        together(make, held)
        assert [one.look(key.lease) for one, key in zip(made, keys, strict=True)] == [
            key.lease for key in keys
        ]
        assert [call.operation for call in aws_front.calls] == ["BatchGetSecretValue"]

    aws.put(names[1], KEY)
    together(make, held)
    assert [one.look(key.lease) is None for one, key in zip(made, keys, strict=True)] == [
        False,
        True,
        False,
    ]
    assert read(made[1]) == KEY


def test_two_fields_of_one_secret_are_one_reading(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held
) -> None:
    aws.put(names[0], json.dumps({"a": "sk-canary-a", "b": "sk-canary-b"}))
    aws.put(names[1], KEY)
    made = [make(names[0], "/a"), make(names[0], "/b"), make(names[1])]
    together(make, held)
    assert [read(one) for one in made] == ["sk-canary-a", "sk-canary-b", KEY]
    assert aws_front.count("GetSecretValue") == 0


def test_a_rotation_that_is_due_is_asked_about(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held
) -> None:
    """The call for several does not say when the next one is."""
    made = []
    for name in names:
        aws.put(name, KEY)
        made.append(make(name))
    leases = [one.issue("").lease for one in made]
    leases[0] = replace(leases[0], reread_at=datetime.now(UTC) - timedelta(seconds=1))
    leases[1] = replace(leases[1], reread_at=datetime.now(UTC) + timedelta(hours=1))
    rotation(aws_front, names[0], hours=5)
    aws_front.forget()
    together(make, held)
    found = [one.look(lease) for one, lease in zip(made, leases, strict=True)]
    assert found[1:] == leases[1:]
    assert found[0] is not None
    assert near(found[0].reread_at, hours=5)
    assert aws_front.count("DescribeSecret") == 1


def test_a_value_that_was_replaced_meanwhile_is_read_again(
    make: Make, aws: Aws, names: list[str], held: Held
) -> None:
    """Or one that was read a while ago, or before others were."""
    made = []
    for name in names:
        aws.put(name, "sk-canary-before")
        made.append(make(name))
    together(make, held)
    aws.put(names[0], KEY)
    assert read(made[0]) == KEY


def test_what_was_read_together_is_not_kept(
    make: Make,
    aws: Aws,
    aws_front: Front,
    names: list[str],
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asks later, or after another reading, is not told what was."""
    for name in names:
        aws.put(name, KEY)
        make(name)
    shared = Account.of(make.profiles[0].account, held)  # type: ignore[attr-defined]
    shared.foresee(names)
    assert shared.foreseen(names[0]) is not None
    assert shared.foreseen(names[0]) is None
    shared.foresee(names[:2])
    assert shared.foreseen(names[2]) is None
    monkeypatch.setattr("keybroker.sources.aws.account.FORESEEN_FOR", timedelta())
    assert shared.foreseen(names[1]) is None


def test_more_than_twenty_are_read_by_twenties(
    make: Make, aws: Aws, aws_front: Front, held: Held
) -> None:
    """As many as AWS takes."""
    names = [f"crowd/{secrets.token_hex(4)}" for _ in range(43)]
    for name in names:
        aws.put(name, f"sk-canary-{name[-8:]}")
    made = [make(name) for name in names]
    aws_front.forget()
    together(make, held)
    assert [len(call.secret.split(",")) for call in aws_front.calls] == [20, 20, 3]
    leases = [one.issue("").lease for one in made]
    aws_front.forget()
    together(make, held)
    for one, lease in zip(made, leases, strict=True):
        assert one.look(lease) == lease
    assert aws_front.count() == 3


def test_one_that_is_missing_has_its_own_error(
    make: Make, aws: Aws, names: list[str], held: Held
) -> None:
    """The others are not touched by it, nor by one that is marked for deletion."""
    for name in names[1:]:
        aws.put(name, KEY)
    aws.client("secretsmanager").delete_secret(SecretId=names[2], RecoveryWindowInDays=7)
    made = [make(name) for name in names]
    together(make, held)
    assert "there is no such secret" in problem(lambda: made[0].issue("")).message
    assert read(made[1]) == KEY
    assert "is marked for deletion" in problem(lambda: made[2].issue("")).message


def test_who_may_not_read_several_at_once_reads_them_one_by_one(
    make: Make,
    aws: Aws,
    aws_front: Front,
    names: list[str],
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked for once in the life of a worker, and nobody is asked who that is."""
    rights = allow(["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"])
    keys = aws.user(f"one-{secrets.token_hex(4)}", rights)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    for name in names:
        aws.put(name, KEY)
    made = [make(name) for name in names]
    for _ in range(3):
        together(make, held)
        assert [read(one) for one in made] == [KEY] * 3
    assert aws_front.count("BatchGetSecretValue") == 1
    assert aws_front.count("GetCallerIdentity") == 0


def test_what_fails_for_all_is_tried_once(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held
) -> None:
    """A server that is down, or credentials that have ended: each profile says so."""
    made = []
    for name in names:
        aws.put(name, KEY)
        made.append(make(name))
    aws_front.forget()
    aws_front.fault(refusal("InternalServiceError", "canary", 500), times=None)
    together(make, held)
    errors = [problem(lambda one=one: one.issue(""), SourceError) for one in made]  # type: ignore[misc]
    assert {error.message for error in errors} == {f"aws: the default profile, {REGION}: failed"}
    assert aws_front.count() == 1
    aws_front.clear()
    together(make, held)
    assert [read(one) for one in made] == [KEY] * 3


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'"x"', b'{"SecretV'])
def test_an_answer_for_several_that_is_none_is_an_error(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held, body: bytes
) -> None:
    """Not an empty one."""
    made = []
    for name in names:
        aws.put(name, KEY)
        made.append(make(name))
    aws_front.fault(Status(200, {}, body), "BatchGetSecretValue")
    together(make, held)
    for one in made:
        error = problem(lambda one=one: one.issue(""), SourceError)  # type: ignore[misc]
        assert "not as Secrets Manager does" in error.message


def test_values_that_are_strange_are_read_one_by_one(
    make: Make, aws: Aws, aws_front: Front, names: list[str], held: Held
) -> None:
    """A list with members that are nobody's."""
    made = []
    for name in names:
        aws.put(name, KEY)
        made.append(make(name))
    body = b'{"SecretValues":[{},{"Name":"other","SecretString":"sk-other"}],"Errors":[]}'
    aws_front.fault(Status(200, {}, body), "BatchGetSecretValue")
    together(make, held)
    assert [read(one) for one in made] == [KEY] * 3


def test_one_worker_has_one_client_for_an_account(
    make: Make, aws: Aws, names: list[str], held: Held
) -> None:
    """And so one connection."""
    for name in names:
        aws.put(name, KEY)
        assert read(make(name)) == KEY
    accounts_ = {id(Account.of(one.account, held)) for one in make.profiles}  # type: ignore[attr-defined]
    assert len(accounts_) == 1


# What is not Secrets Manager's.


@pytest.mark.parametrize("operation", ["DescribeSecret", "GetSecretValue"])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b"null", b"7", b'"x"', b'{"ARN"', b'{"ARN":7}', b"[[[[", b"\xff\xfe"),
        *(b'{"ARN":"arn:x"}', b'{"ARN":"arn:x","CreatedDate":"soon","LastChangedDate":[]}'),
        *(b'{"ARN":"arn:x","SecretBinary":"%%"}', b'{"ARN":"arn:x","SecretString":["x"]}'),
        b'{"ARN":"arn:x","VersionIdsToStages":["x"]}',
        b'{"ARN":"arn:x","VersionIdsToStages":{"x":"AWSCURRENT"}}',
        b'{"ARN":"arn:x","SecretString":""}',
    ],
)
def test_a_body_that_is_no_answer_is_an_error(
    make: Make, aws: Aws, aws_front: Front, name: str, operation: str, body: bytes
) -> None:
    """Whatever it is: of a portal, cut off, or of something else; never an empty key."""
    aws.put(name, KEY)
    source = make()
    lease = source.issue("").lease
    aws_front.fault(Status(200, {}, body), operation)
    try:
        found = source.issue("")
    except SourceError as error:
        check_silent(error, KEY)
        assert not error.withdrawn
    else:
        assert found.secret.reveal() == KEY  # read all the same, by what else was answered
    aws_front.clear()
    assert source.look(lease) == lease


def test_a_portal_s_page_is_an_error(make: Make, aws: Aws, aws_front: Front, name: str) -> None:
    aws.put(name, KEY)
    aws_front.fault(Html(200))
    error = problem(lambda: make().issue(""), SourceError)
    assert error.message.endswith("answers 200, but not as Secrets Manager does")
    assert error.hint == "is a login page or a proxy in between?"
    assert (error.code, error.exit_status) == ("unavailable", 75)


def test_sessions_serve_all_regions() -> None:
    """Credentials are of a profile, wherever it asks with them."""
    place = accounts.Account("corp", "eu-west-1")
    other = accounts.account_of(f"arn:aws:secretsmanager:us-east-1:{'1' * 12}:secret:x", place)
    assert other == accounts.Account("corp", "us-east-1")
    assert accounts.session_of(place.text) == accounts.session_of(other.text)
    assert accounts.session_of(place.text) != accounts.session_of("{}")
    assert accounts.account_of("llm/key", place) == place
