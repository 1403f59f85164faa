"""The function that Secrets Manager calls: its four steps at a real gateway's API, in any order."""

from __future__ import annotations

import json
import secrets
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from keybroker import rotation_lambda
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError, SourceDenied, SourceInvalid, SourceUnavailable
from keybroker.label import is_label
from keybroker.sources.aws.account import Answer
from keybroker.sources.aws.secret import Kept
from tests.servers.aws import Aws, allow
from tests.servers.awsfaults import Front, refusal
from tests.servers.faults import CommitThenDrop, Reset

STEPS = ("createSecret", "setSecret", "testSecret", "finishSecret")
PERMISSIONS = (
    "DescribeSecret",
    "GetSecretValue",
    "PutSecretValue",
    "UpdateSecretVersionStage",
    "ListSecretVersionIds",
)


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


class Rotated:
    """A secret that is rotated, and what its function needs to have in its environment."""

    def __init__(self, front: Front, aws: Aws, gateway: DevGateway, folder: Path) -> None:
        self.front, self.aws, self.gateway, self.folder = front, aws, gateway, folder
        self.name = f"llm/{secrets.token_hex(6)}"
        self.versions = [aws.put(self.name, json.dumps({"key": "sk-by-hand", "team": "eng"}))]
        self.arn = aws.arn(self.name)
        actions = [f"secretsmanager:{one}" for one in PERMISSIONS]
        self.keys = aws.user(f"rotator-{secrets.token_hex(4)}", allow(actions, self.arn))
        self.configure()

    def configure(self, hold: str = "1m", secret: str = "", field: str = 'field = "/key"') -> None:
        (self.folder / "admin").write_text(self.gateway.master_key)
        (self.folder / "admin").chmod(0o600)
        (self.folder / "config.toml").write_text(
            f"""
            [profiles.work]
            base_url = "{self.gateway.url}"
            hold = "{hold}"
            helper_ttl = "1s"
            source.type = "litellm"
            source.admin = {{ file = "{self.folder}/admin" }}
            source.lifetime = "2h"
            publish.to = "aws"
            publish.secret = "{secret or self.name}"
            publish.{field}
            """
        )

    def step(self, name: str, token: str) -> None:
        event = {"Step": name, "SecretId": self.arn, "ClientRequestToken": token}
        rotation_lambda.handler(event, None)

    def rotate(self) -> str:
        token = new_token()
        for name in STEPS:
            self.step(name, token)
        self.versions.append(token)
        return token

    def value(self, label: str = "AWSCURRENT") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.aws.value(self.name, label))
        return found

    def alive(self) -> set[str]:
        """Fingerprints, by which the gateway names its keys."""
        return {key.token for key in self.gateway.live_keys()}


@pytest.fixture
def rotated(
    aws: Aws,
    aws_front: Front,
    gateway: DevGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Rotated:
    made = Rotated(aws_front, aws, gateway, tmp_path)
    for name, value in aws.environment(made.keys, aws_front.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEYBROKER_CONFIG", str(tmp_path / "config.toml"))
    return made


def new_token() -> str:
    return f"{secrets.token_hex(16)}"


def delete(gateway: DevGateway, token: str) -> None:
    """As an administrator does, by hand."""
    request = urllib.request.Request(
        f"{gateway.url}/key/delete",
        json.dumps({"keys": [token]}).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=5) as reply:
        assert reply.status == 200


def token_of(key: str) -> str:
    """How the gateway lists a key."""
    return sha256(key.encode()).hexdigest()


def test_four_steps_rotate_a_secret(rotated: Rotated, capfd: pytest.CaptureFixture[str]) -> None:
    """The new key is minted, tried and current; the fields beside it stay; no key is printed."""
    token = rotated.rotate()
    value = rotated.value()
    assert rotated.aws.labels(rotated.name)["AWSCURRENT"] == token
    assert value["team"] == "eng"
    assert datetime.fromisoformat(value["expires_at"]) > datetime.now(UTC) + timedelta(hours=1.9)
    assert rotated.alive() == {token_of(value["key"])}
    assert [is_label(key.alias or "") for key in rotated.gateway.live_keys()] == [True]
    printed = capfd.readouterr()
    assert value["key"] not in printed.out + printed.err
    assert printed.err.count("keybroker: ") == 4


def test_every_step_may_be_called_again(rotated: Rotated) -> None:
    """As Secrets Manager does after a time-out: nothing is minted twice, nothing is taken back."""
    token = new_token()
    for name in STEPS:
        for _ in range(2):
            rotated.step(name, token)
    for name in STEPS[:1] + STEPS[3:]:
        rotated.step(name, token)
    assert rotated.aws.labels(rotated.name)["AWSCURRENT"] == token
    assert len(rotated.alive()) == 1
    assert rotated.front.count("PutSecretValue") == 1


def test_the_key_before_is_kept_and_the_one_before_that_is_revoked(rotated: Rotated) -> None:
    """Who read the secret a moment ago still uses AWSPREVIOUS."""
    keys = []
    for _ in range(3):
        rotated.rotate()
        keys.append(rotated.value()["key"])
    assert rotated.alive() == {token_of(key) for key in keys}  # the first was replaced just now
    rotated.configure(hold="1ms")
    rotated.rotate()
    keys.append(rotated.value()["key"])
    assert rotated.alive() == {token_of(key) for key in keys[-2:]}


def test_a_key_is_previous_however_long_it_was_replaced(rotated: Rotated) -> None:
    """Its hold is over, and it is AWSPREVIOUS: it lives, and the one before it does not."""
    rotated.configure(hold="1ms")
    keys = []
    for _ in range(3):
        rotated.rotate()
        keys.append(rotated.value()["key"])
        time.sleep(1.1)  # the server counts whole seconds
    assert rotated.alive() == {token_of(key) for key in keys[-2:]}


def test_all_versions_are_looked_at() -> None:
    """Page by page, and those without a label too: AWS leaves both out unless it is asked."""
    made, asked = datetime.now(UTC), []

    class Pages:
        account = property(lambda self: self)
        secret = "llm"

        def ask(self, operation: str, secret: str, **given: Any) -> Answer:
            asked.append((operation, secret, given))
            number = len(asked)
            more = {"NextToken": f"to-{number + 1}"} if number < 3 else {}
            page = [{"CreatedDate": made, "VersionId": f"v{number}"}]
            return Answer({"Versions": page, **more}, made, timedelta())

    found = list(rotation_lambda._versions(cast(Kept, Pages())))

    assert found == [(made, f"v{number}", set()) for number in (1, 2, 3)]
    every = {"IncludeDeprecated": True}
    pages = [every, {**every, "NextToken": "to-2"}, {**every, "NextToken": "to-3"}]
    assert asked == [("ListSecretVersionIds", "llm", page) for page in pages]


def test_a_rotation_that_was_finished_late_leaves_a_hold(rotated: Rotated) -> None:
    """What was read until a moment ago is not revoked since its successor was made long ago."""
    rotated.configure(hold="2s")
    rotated.rotate()
    one, token = rotated.value()["key"], new_token()
    rotated.step("createSecret", token)
    time.sleep(4)
    for name in STEPS[1:]:
        rotated.step(name, token)
    rotated.front.describe(rotated.name, LastRotatedDate=time.time())  # as AWS has it now
    rotated.rotate()
    assert token_of(one) in rotated.alive()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        (Reset(), "DescribeSecret"),
        (Reset(), "GetSecretValue"),
        (CommitThenDrop(), "PutSecretValue"),
        (refusal("InternalServiceError", status=500), "PutSecretValue"),
        (CommitThenDrop(), "UpdateSecretVersionStage"),
        (refusal("ThrottlingException"), "UpdateSecretVersionStage"),
    ],
)
def test_a_step_that_was_interrupted_is_done_again(
    rotated: Rotated, step: str, fault: Any, operation: str
) -> None:
    """Half done or not at all: the rotation ends as if nothing had been; no key is left over."""
    token = new_token()
    for name in STEPS:
        if name == step:
            rotated.front.fault(fault, operation)
            with suppress(SourceUnavailable):
                rotated.step(name, token)
            rotated.front.clear()
        rotated.step(name, token)
    assert rotated.aws.labels(rotated.name)["AWSCURRENT"] == token
    assert rotated.alive() == {token_of(rotated.value()["key"])}


def test_a_key_whose_answer_was_lost_is_found_by_its_label(rotated: Rotated) -> None:
    """The function was ended after the gateway had minted: the next call revokes that one."""
    token = new_token()
    with pytest.MonkeyPatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(rotation_lambda, "put_pending", die)
        with pytest.raises(KeyboardInterrupt):
            rotated.step("createSecret", token)
    [lost] = rotated.alive()
    for name in STEPS:
        rotated.step(name, token)
    assert rotated.alive() == {token_of(rotated.value()["key"])}
    assert lost not in rotated.alive()


def test_a_key_that_the_gateway_refuses_is_never_current(rotated: Rotated) -> None:
    """It is revoked, the step fails by name, and the value that is read stays."""
    before = rotated.value()
    token = new_token()
    rotated.step("createSecret", token)
    [key] = rotated.gateway.live_keys()
    delete(rotated.gateway, key.token)
    with pytest.raises(SourceInvalid, match=r"the gateway did not take [0-9a-f]{8} "):
        rotated.step("testSecret", token)
    assert rotated.value() == before
    assert rotated.alive() == set()
    rotated.rotate()


def test_a_gateway_that_is_down_undoes_nothing(rotated: Rotated) -> None:
    """The step fails, and is done when it is called again."""
    token = new_token()
    rotated.step("createSecret", token)
    rotated.gateway.close()
    with pytest.raises(SourceUnavailable):
        rotated.step("testSecret", token)
    rotated.gateway.start()
    for name in STEPS[1:]:
        rotated.step(name, token)
    assert len(rotated.alive()) == 1


def test_what_somebody_wrote_meanwhile_stays(rotated: Rotated) -> None:
    """The new version does not have it: its key is revoked; the next rotation has it."""
    rotated.rotate()
    before, token = rotated.alive(), new_token()
    rotated.step("createSecret", token)
    time.sleep(1)  # the server counts whole seconds
    rotated.aws.put(rotated.name, json.dumps({**rotated.value(), "team": "ops"}))
    rotated.step("testSecret", token)

    with pytest.raises(SourceInvalid, match="another version was made current meanwhile"):
        rotated.step("finishSecret", token)

    assert rotated.value()["team"] == "ops"
    assert rotated.alive() == before
    assert "AWSPENDING" not in rotated.aws.labels(rotated.name)
    rotated.rotate()
    assert rotated.value()["team"] == "ops"
    assert token_of(rotated.value()["key"]) in rotated.alive() - before


def test_of_two_rotations_one_is_the_first(rotated: Rotated) -> None:
    """A version that lost AWSPENDING to another cannot be created any more; it changes nothing."""
    first, second = new_token(), new_token()
    rotated.step("createSecret", first)
    rotated.step("createSecret", second)
    with pytest.raises(SourceInvalid, match="not AWSPENDING any more"):
        rotated.step("testSecret", first)
    with pytest.raises(SourceInvalid, match="not AWSPENDING any more"):
        rotated.step("finishSecret", first)
    for name in STEPS[1:]:
        rotated.step(name, second)
    assert rotated.aws.labels(rotated.name)["AWSCURRENT"] == second


@pytest.mark.parametrize("missing", PERMISSIONS)
def test_each_permission_is_needed_and_named(
    rotated: Rotated, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy of the documentation is enough, and no more than that."""
    actions = [f"secretsmanager:{one}" for one in PERMISSIONS if one != missing]
    keys = rotated.aws.user(f"less-{secrets.token_hex(4)}", allow(actions, rotated.arn))
    for name, value in rotated.aws.environment(keys, rotated.front.url).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceDenied, match=f"user/less-.* may not {missing}"):
        rotated.rotate()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda event: event.pop("Step"), "there is no step None"),
        (lambda event: event.update(Step="dropSecret"), "there is no step 'dropSecret'"),
        (lambda event: event.pop("SecretId"), "no SecretId"),
        (lambda event: event.update(ClientRequestToken=""), "no ClientRequestToken"),
        (lambda event: event.update(SecretId="llm/other"), "another secret"),
    ],
)
def test_an_event_that_is_none_of_ours_is_refused(
    rotated: Rotated, change: Callable[[dict[str, str]], object], words: str
) -> None:
    event = {"Step": "createSecret", "SecretId": rotated.arn, "ClientRequestToken": new_token()}
    change(event)
    with pytest.raises(ConfigError, match=words):
        rotation_lambda.handler(event, None)
    assert rotated.alive() == set()


def test_what_to_do_is_in_the_log_too(rotated: Rotated, capfd: pytest.CaptureFixture[str]) -> None:
    """Of an exception that is raised, Lambda shows the message alone."""
    rotated.configure(field='field = "/team/key"')
    with pytest.raises(SourceInvalid, match="has no place for /team/key"):
        rotated.step("createSecret", new_token())
    assert "\nhint: it is no JSON object; see field\n" in capfd.readouterr().err
    assert rotated.alive() == set()


def test_a_configuration_that_was_not_packed_is_named(
    rotated: Rotated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is easily forgotten."""
    monkeypatch.setenv("KEYBROKER_CONFIG", "/nonexistent/config.toml")
    with pytest.raises(ConfigError, match=r"nonexistent/config\.toml: does not exist"):
        rotated.step("createSecret", new_token())


def test_a_secret_without_fields_is_the_key_alone(rotated: Rotated) -> None:
    rotated.configure(field='poll = "60s"')
    rotated.rotate()
    assert rotated.alive() == {token_of(rotated.aws.value(rotated.name))}
