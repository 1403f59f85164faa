"""What the commands say of a profile whose keys are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from keybroker.devgateway import DevGateway
from tests.crash.publisher import ACTIONS, AwsPlace, Publisher
from tests.servers.aws import Aws, allow
from tests.servers.awsfaults import Front

pytestmark = pytest.mark.servers


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as made:
        yield made


@pytest.fixture
def place(aws: Aws, aws_front: Front) -> AwsPlace:
    return AwsPlace(aws, aws_front)


@pytest.fixture
def host(gateway: DevGateway, place: AwsPlace) -> Iterator[Publisher]:
    with Publisher(gateway.url, gateway.master_key, place=place) as made:
        yield made


def say(host: Publisher, *words: str) -> tuple[int, str, str]:
    """Type a command; return its exit status, stdout and stderr."""
    process = host.start(*words)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def said(host: Publisher, *words: str) -> str:
    """Type a command that succeeds and says nothing on stderr; return what it says."""
    status, out, err = say(host, *words)
    assert (status, err) == (0, "")
    return out


def as_who_may_not(action: str, aws: Aws, front: Front, place: AwsPlace) -> None:
    """Go on as a user who may do all but this."""
    allowed = [f"secretsmanager:{one}" for one in ACTIONS if one != action]
    place.variables = aws.environment(aws.user(f"may-not-{action}", allow(allowed)), front.url)


def test_rotate_says_where_it_was_published(host: Publisher, place: AwsPlace) -> None:
    """Beforehand, too: by its region, its name and its field."""
    there = f"aws us-east-1/{place.name}#/key"

    plan = said(host, "rotate", "work", "--dry-run")
    plan_json = json.loads(said(host, "rotate", "work", "--dry-run", "--json"))
    done = said(host, "rotate", "work")
    done_json = json.loads(said(host, "rotate", "work", "--json"))

    assert plan == f"work: a new key would be minted at {host.url} and published at {there}\n"
    assert plan_json == [{"profile": "work", "mints_at": host.url, "publishes_at": there}]
    assert done.endswith(f"\n  published at {there}\n")
    assert done_json[0]["published"] == there


def test_status_says_where_keys_are_published(host: Publisher, place: AwsPlace) -> None:
    there = f"aws us-east-1/{place.name}#/key"

    lines = said(host, "status").splitlines()
    [row] = json.loads(said(host, "status", "--json"))["profiles"]

    assert f"  publishes to {there}" in lines
    assert row["published"] == there


@pytest.mark.parametrize("action", ["DescribeSecret", "PutSecretValue", "UpdateSecretVersionStage"])
def test_a_key_that_cannot_be_published_replaces_nothing(
    gateway: DevGateway, aws: Aws, aws_front: Front, host: Publisher, place: AwsPlace, action: str
) -> None:
    """Who rotates is told what is not allowed, and `status` says it afterwards."""
    first = said(host, "get", "work")
    as_who_may_not(action, aws, aws_front, place)

    status, out, err = say(host, "rotate", "work")
    lines = said(host, "status")

    assert (status, out) == (77, "")
    assert f"may not {action}" in err
    assert f"hint: if its name and region are right, allow it secretsmanager:{action}" in err
    assert f"may not {action}" in lines.partition("last failure")[2]
    assert said(host, "get", "work") == first
    assert place.read()["key"] == first.strip()
    begun = action != "DescribeSecret"  # else nobody can have read it, and it is revoked at once
    assert len(gateway.live_keys()) == 1 + begun


@pytest.mark.parametrize("daemon", [False, True])
def test_revoke_has_another_key_published_at_once(
    gateway: DevGateway, host: Publisher, place: AwsPlace, daemon: bool
) -> None:
    """What was is revoked and counted; the one that others have now is not."""
    said(host, "get", "work")
    said(host, "rotate", "work")
    if daemon:
        host.spawn()
    old = {row.alias for row in gateway.live_keys()}

    out = said(host, "revoke", "work")
    key = said(host, "get", "work") if not daemon else f"{wait(host.ask)}\n"

    first, *rest = out.splitlines()
    assert first == f"work: {len(old)} revoked"
    assert rest[0].startswith("  a new one is published at aws us-east-1/")
    assert place.read()["key"] == key.strip()
    [new] = gateway.live_keys()
    assert new.alias not in old


def wait(call: Callable[[], Any]) -> Any:
    """Ask until there is an answer: a daemon that is asked waits itself."""
    for _ in range(5):
        if (found := call()) is not None:
            return found
    raise AssertionError("there was no answer")


def test_source_test_looks_where_keys_are_published(
    aws_front: Front, host: Publisher, place: AwsPlace
) -> None:
    """And writes nothing there."""
    said(host, "get", "work")
    before, version = place.read(), place.labels()["AWSCURRENT"]
    aws_front.forget()

    rows = json.loads(said(host, "source", "test", "work", "--json"))

    steps = ["keep", "publish", "issue", "verify", "find", "revoke", "refused", "gone"]
    assert [row["step"] for row in rows] == steps
    there = f"aws us-east-1/{place.name}#/key"
    assert rows[1]["seen"] == f"version {version} at {there}; whether we may write is not tried"
    assert {call.operation for call in aws_front.calls} == {"DescribeSecret", "GetSecretValue"}
    assert place.read() == before


@pytest.mark.parametrize("action", ["DescribeSecret", "GetSecretValue"])
def test_source_test_says_what_cannot_be_read(
    gateway: DevGateway,
    aws: Aws,
    aws_front: Front,
    host: Publisher,
    place: AwsPlace,
    action: str,
) -> None:
    """Before a key is minted that could not be published."""
    as_who_may_not(action, aws, aws_front, place)

    status, out, err = say(host, "source", "test", "work")

    assert status == 77
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", "keep"],
        ["failed", "publish"],
    ]
    assert f"may not {action}" in err
    assert gateway.live_keys() == ()
