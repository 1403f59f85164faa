"""A daemon and Secrets Manager: keys that others rotate, what is kept of roles, and who is down."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from keybroker.devgateway import DevGateway
from tests.canaries import Canaries, Watch, descendants, process, write
from tests.resident import Resident, until
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Front, refusal
from tests.servers.faults import Exchange, Fault, Hang
from tests.servers.sso import Sso

pytestmark = pytest.mark.servers

READ = ["secretsmanager:DescribeSecret", "secretsmanager:GetSecretValue"]


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


def minted(gateway: DevGateway) -> str:
    """Have the gateway make a key that somebody may put into a secret."""
    return str(_ask(gateway, "/key/generate", {"duration": "1h"})["key"])


def ended(gateway: DevGateway, key: str) -> None:
    _ask(gateway, "/key/delete", {"keys": [key]})


def _ask(gateway: DevGateway, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{gateway.url}{path}",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.fixture
def name() -> str:
    return f"llm/{secrets.token_hex(4)}"


@pytest.fixture
def reader(aws: Aws) -> Keys:
    """A user with the documented policy for all secrets of the test."""
    return aws.user(f"reader-{secrets.token_hex(4)}", allow([*READ, "secretsmanager:Batch*"]))


def source(
    base_url: str, secret: str, more: str = 'poll = "1s"', settings: str = "", name: str = "work"
) -> str:
    return (
        f'[profiles.{name}]\nbase_url = "{base_url}"\n{settings}\n'
        f'[profiles.{name}.source]\ntype = "aws"\nsecret = "{secret}"\n{more}\n'
    )


def config(resident: Resident, text: str, credentials: str = "") -> None:
    """Write what AWS's own programs read."""
    write(resident.home.path / ".aws/config", text)
    write(resident.home.path / ".aws/credentials", credentials)


def keys_of(keys: Keys, profile: str = "default") -> str:
    return (
        f"[{profile}]\naws_access_key_id = {keys.access_key}\n"
        f"aws_secret_access_key = {keys.secret_key}\n"
    )


@pytest.fixture
def signed(resident: Resident, aws_front: Front, reader: Keys) -> Resident:
    """A daemon whose user has a key of AWS's."""
    resident.environment |= {
        "AWS_ENDPOINT_URL": aws_front.url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    config(resident, f"[default]\nregion = {REGION}\n", keys_of(reader))
    return resident


@pytest.fixture
def following(signed: Resident, gateway: DevGateway, aws: Aws, name: str) -> Resident:
    """A daemon whose key somebody else keeps."""
    aws.put(name, json.dumps({"key": minted(gateway)}))
    signed.configure(source(gateway.url, name, 'poll = "1s"\nfield = "/key"'))
    signed.start()
    return signed


def put(aws: Aws, name: str, key: str) -> str:
    return aws.put(name, json.dumps({"key": key}))


# Somebody rotates it.


def test_a_key_that_somebody_rotates_is_followed_and_so_is_its_way_back(
    following: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """Verified before it is handed out; also one that was current before."""
    first = following.key()
    second = minted(gateway)
    put(aws, name, second)
    until(lambda: following.key() == second)
    assert following.row()["verified"] == "models"
    assert following.row()["expires_at"] is None

    labels = aws.labels(name)
    aws.move(name, labels["AWSPREVIOUS"], labels["AWSCURRENT"])
    until(lambda: following.key() == first)
    assert following.row()["trouble"] is None


def test_a_version_that_the_gateway_does_not_know_yet_waits(
    following: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """The key in use stays until it does; a wrong one that is taken back is forgotten."""
    first = following.key()
    put(aws, name, "sk-not-there-yet-0123456789abcdef")
    until(lambda: "refused" in str(following.row()["trouble"]), 30)
    assert following.key() == first

    again = minted(gateway)
    put(aws, name, again)
    until(lambda: following.key() == again, 30)
    assert following.row()["trouble"] is None


def test_a_refused_session_has_the_secret_read_at_once(
    signed: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """A key ended behind our back costs one retry, however long the interval is."""
    first, second = minted(gateway), minted(gateway)
    aws.put(name, first)
    signed.configure(source(gateway.url, name, 'poll = "1h"'))
    signed.start()
    me = threading.get_native_id()
    assert signed.ask("work", me, 60_000) == f"ok {first}"
    aws.put(name, second)
    ended(gateway, first)

    began = time.monotonic()
    assert signed.ask("work", me, 60_000) == f"ok {second}"
    assert time.monotonic() - began < 6


def test_a_rotation_is_read_when_it_is_due(
    signed: Resident, gateway: DevGateway, aws: Aws, aws_front: Front, name: str
) -> None:
    """However long the interval is; one that is late is no reason to ask all the time."""
    first, second = minted(gateway), minted(gateway)
    aws.put(name, first)
    due = time.time() + 1
    aws_front.describe(name, NextRotationDate=due, RotationEnabled=True)
    signed.configure(source(gateway.url, name, 'poll = "1h"'))
    signed.start()
    assert signed.key() == first
    aws.put(name, second)
    until(lambda: signed.key() == second, 15)
    assert time.time() > due
    aws_front.forget()
    time.sleep(2)
    assert aws_front.count() <= 2


def test_a_secret_that_is_to_be_deleted_is_said_and_its_key_goes_on(
    following: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """Until it is refused: then nobody is left who could say that it is good."""
    key = following.key()
    aws.client("secretsmanager").delete_secret(SecretId=name, RecoveryWindowInDays=7)
    until(lambda: "is marked for deletion" in str(following.row()["trouble"]))
    assert following.key() == key
    status, printed, _ = following.cli("status")
    assert status == 0
    assert "is marked for deletion (DeletedDate" in printed

    ended(gateway, key)
    me = threading.get_native_id()
    following.ask("work", me, 60_000)
    until(lambda: following.ask("work", me, 60_000).startswith("error "), 30)
    status, printed, said = following.helper()
    assert (status, printed) == (77, "")
    assert f"{name}: is marked for deletion" in said

    aws.client("secretsmanager").restore_secret(SecretId=name)
    put(aws, name, minted(gateway))
    assert following.cli("rotate", "work")[0] == 0
    assert following.key() != key


# Several of them.


def test_several_profiles_are_read_with_one_call(
    signed: Resident, gateway: DevGateway, aws: Aws, aws_front: Front
) -> None:
    """All that are due together; each follows its own secret."""
    names = [f"p{n}" for n in range(4)]
    kept = {one: f"many/{secrets.token_hex(4)}" for one in names}
    for one in names:
        aws.put(kept[one], minted(gateway))
    poll = 'poll = "4s"'
    signed.configure("".join(source(gateway.url, kept[one], poll, name=one) for one in names))
    signed.start()
    assert len({signed.key(one) for one in names}) == 4

    aws_front.forget()
    until(lambda: any(call.secret.count(",") == 3 for call in aws_front.calls))
    assert {call.operation for call in aws_front.calls} == {"BatchGetSecretValue"}
    following = minted(gateway)
    aws.put(kept["p2"], following)
    until(lambda: signed.key("p2") == following)
    assert len({signed.key(one) for one in names}) == 4


# It is down.


def test_an_aws_that_is_down_changes_nothing_but_what_is_said(
    resident: Resident, gateway: DevGateway
) -> None:
    """Killed, hanging, and back: the key is handed out all the time."""
    with Aws() as own:
        first, second = minted(gateway), minted(gateway)
        own.put("llm", first)
        resident.environment |= own.environment(own.user("reader", allow(READ)))
        resident.configure(source(gateway.url, "llm"))
        resident.start()
        assert resident.key() == first
        own.pause()
        until(lambda: "did not answer in time" in str(resident.row()["trouble"]), 20)
        assert resident.key() == first
        own.resume()
        own.put("llm", second)
        until(lambda: resident.key() == second, 20)
        own.kill()
        until(lambda: "could not be reached" in str(resident.row()["trouble"]), 20)
        assert resident.key() == second
        resident.kill()
        resident.start()
        assert resident.key() == second  # as it was sealed


def test_one_that_throttles_is_asked_no_more_often(
    following: Resident, aws_front: Front, name: str
) -> None:
    """Than it takes: five seconds later."""
    key = following.key()
    aws_front.fault(refusal("ThrottlingException"), times=None)
    until(lambda: "asks to wait" in str(following.row()["trouble"]))
    aws_front.forget()
    time.sleep(2)
    assert aws_front.count() <= 1
    assert following.key() == key


# Who we are.


def assuming(role: str) -> str:
    return (
        f"[profile corp]\nregion = {REGION}\nrole_arn = {role}\nsource_profile = base\n"
        f"[profile base]\nregion = {REGION}\n"
    )


def test_a_role_is_taken_once_in_its_life(
    signed: Resident, gateway: DevGateway, aws: Aws, aws_front: Front, aws_role: str, name: str
) -> None:
    """By many polls and workers, and by a daemon that is started again: it is kept, sealed."""
    base = aws.user(f"base-{secrets.token_hex(4)}", allow("sts:AssumeRole"))
    config(signed, assuming(aws_role), keys_of(base, "base"))
    aws.put(name, minted(gateway))
    signed.configure('[aws]\nprofile = "corp"\n' + source(gateway.url, name))
    signed.start()
    first = signed.key()
    until(lambda: aws_front.count("DescribeSecret") >= 3)
    assert aws_front.count("AssumeRole") == 1
    sealed = until(lambda: next(signed.state.rglob("session.*.sealed"), None))
    assert sealed.stat().st_mode & 0o777 == 0o600

    for _ in range(2):  # further workers
        for one in until(lambda: worker_pids(signed)):
            os.kill(one, signal.SIGKILL)
        before = aws_front.count("DescribeSecret")
        until(lambda: aws_front.count("DescribeSecret") > before)  # noqa: B023, it is called here
    signed.kill()
    signed.start()
    assert signed.key() == first
    before = aws_front.count("DescribeSecret")
    until(lambda: aws_front.count("DescribeSecret") >= before + 2)
    assert signed.cli("source", "test", "work")[0] == 0
    assert aws_front.count("AssumeRole") == 1


def worker_pids(resident: Resident) -> list[int]:
    """Return the workers of a daemon."""
    assert resident.process is not None
    below = map(process, descendants(resident.process.pid))
    return [one.pid for one in below if one is not None and one.name == "worker"]


def test_a_sign_in_is_noticed(
    signed: Resident, gateway: DevGateway, aws: Aws, sso: Sso, name: str
) -> None:
    """It has ended; somebody types what the hint says, and the key is there."""
    key = minted(gateway)
    aws.put(name, key)
    file = sso.write(signed.home.path)
    text = file.read_text()
    file.unlink()
    named = sso.environment(signed.home.path)
    signed.environment |= {k: v for k, v in named.items() if k.startswith("AWS_ENDPOINT")}
    signed.configure('[aws]\nprofile = "corp"\n' + source(gateway.url, name))
    signed.start()
    reply = signed.ask("work")
    assert reply.startswith("error 77 ")
    assert "nobody is signed in" in reply
    status, printed, said = signed.helper()
    assert (status, printed) == (77, "")
    assert "aws sso login --profile corp" in said

    draft = file.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(file)  # as `aws sso login` does
    until(lambda: signed.ask("work") == f"ok {key}", 10)
    assert sso.handed_out == 1


def test_keys_that_are_configured_are_noticed(
    signed: Resident, gateway: DevGateway, aws: Aws, reader: Keys, name: str
) -> None:
    """By `aws configure`, into a folder that was not there."""
    key = minted(gateway)
    aws.put(name, key)
    for file in ("config", "credentials"):
        (signed.home.path / ".aws" / file).unlink()
    (signed.home.path / ".aws").rmdir()
    signed.configure(f'[aws]\nregion = "{REGION}"\n' + source(gateway.url, name))
    signed.start()
    assert "there are no credentials" in signed.ask("work")
    config(signed, "", keys_of(reader))
    until(lambda: signed.ask("work") == f"ok {key}", 10)


def test_a_credential_process_that_is_keybroker_ends_at_once(
    signed: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """It would wait for the daemon that waits for it; a loop is no dead end but an error."""
    aws.put(name, minted(gateway))
    keybroker = Path(sys.executable).parent / "keybroker"
    config(signed, f"[default]\nregion = {REGION}\ncredential_process = {keybroker} get work\n")
    signed.configure(source(gateway.url, name))
    signed.start()
    began = time.monotonic()
    reply = signed.ask("work")
    assert time.monotonic() - began < 5
    assert reply.startswith("error ")
    assert "its credential_process failed" in reply
    status, printed, said = signed.cli("get", "work")
    assert printed == ""
    assert status in (75, 77)
    assert "it is keybroker, which would wait for itself" in said


def test_keybroker_is_not_started_by_its_own_workers(signed: Resident) -> None:
    """78 and one line, before anything is loaded."""
    signed.environment["KEYBROKER_WORKER"] = "1"
    for arguments in (("get", "work"), ("status",), ("daemon",), ("--help",)):
        said = "keybroker: was asked by keybroker itself; see credential_process in ~/.aws/config\n"
        assert signed.cli(*arguments) == (78, "", said)


def test_a_command_of_a_profile_may_be_keybroker(
    signed: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """Another profile's key is no loop: what a profile names is not told who asks."""
    key = minted(gateway)
    aws.put(name, key)
    keybroker = Path(sys.executable).parent / "keybroker"
    names = ["XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"]
    signed.configure(
        source(gateway.url, name, name="kept")
        + f'[profiles.again]\nbase_url = "{gateway.url}"\n[profiles.again.source]\n'
        f'type = "command"\ncommand = ["{keybroker}", "get", "kept"]\n'
        f"environment = {json.dumps(names)}\n"
    )
    signed.start()
    assert signed.key("kept") == key
    assert signed.key("again") == key


# References.


def test_a_key_s_reference_may_lead_to_aws(
    signed: Resident, gateway: DevGateway, aws: Aws, name: str
) -> None:
    """An admin key, and one that is handed out as it is; another region by its ARN."""
    fixed = minted(gateway)
    aws.put(name, json.dumps({"admin": gateway.master_key, "key": fixed}))
    arn = aws.arn(name)
    config(
        signed,
        "[default]\nregion = eu-central-1\n",
        (signed.home.path / ".aws/credentials").read_text(),
    )
    signed.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        f'type = "litellm"\nadmin = {{ aws = "{arn}#/admin" }}\n'
        f'[profiles.fixed]\nbase_url = "{gateway.url}"\n[profiles.fixed.source]\n'
        f'type = "static"\nkey = {{ aws = "{arn}#/key" }}\npoll = "1s"\n'
    )
    signed.start()
    first = signed.key("work")
    assert signed.key("fixed") == fixed
    status, _, said = signed.cli("rotate", "work")
    assert status == 0, said
    assert signed.key("work") != first
    another = minted(gateway)
    aws.put(name, json.dumps({"admin": gateway.master_key, "key": another}))
    until(lambda: signed.key("fixed") == another)
    status, _, said = signed.cli("revoke", "work")
    assert status == 0, said
    everything = b"".join(one.read_bytes() for one in signed.state.rglob("*") if one.is_file())
    assert gateway.master_key.encode() not in everything


def test_a_reference_that_leads_nowhere_is_said(
    signed: Resident, gateway: DevGateway, name: str
) -> None:
    signed.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        f'type = "static"\nkey = {{ aws = "{name}#/key" }}\n'
    )
    signed.start()
    assert f"{name}: there is no such secret" in signed.ask("work")


# Nothing leaves.


class Known(Fault):
    """Knows the credentials that STS gives, before anybody else has them."""

    def __init__(self, canaries: Canaries) -> None:
        self.canaries = canaries

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        for tag in ("SecretAccessKey", "SessionToken"):
            [found] = re.findall(f"<{tag}>([^<]+)<", response.payload.decode())
            self.canaries.know(f"{tag} of a role", found)
        exchange.client.sendall(response.raw)
        return response.keeps_alive


@pytest.mark.parametrize("way", ["role", "process"])
def test_nothing_of_aws_s_leaves(
    signed: Resident,
    gateway: DevGateway,
    aws: Aws,
    aws_front: Front,
    aws_role: str,
    name: str,
    way: str,
) -> None:
    """No key, secret access key or token is in a file, a line, an argument or a variable."""
    canaries = Canaries()
    aws.put(name, canaries.know("key", minted(gateway)))
    folder = signed.home.path / ".aws"
    if way == "role":
        base = aws.user(f"base-{secrets.token_hex(4)}", allow("sts:AssumeRole"))
        canaries.know("keys", base.secret_key)
        config(signed, assuming(aws_role).replace("profile corp", "default"), keys_of(base, "base"))
        planted = {folder / "credentials": "keys"}
        aws_front.fault(Known(canaries), "AssumeRole", times=None)
    else:
        keys = aws.session(aws_role)
        assert keys.session_token is not None
        canaries.know("keys", keys.session_token)
        canaries.know("keys", keys.secret_key)
        found = {"Version": 1, "AccessKeyId": keys.access_key}
        found |= {"SecretAccessKey": keys.secret_key, "SessionToken": keys.session_token}
        file = write(folder / "printed", json.dumps(found))
        config(signed, f"[default]\nregion = {REGION}\ncredential_process = /bin/cat {file}\n")
        planted = {file: "keys"}
    signed.configure(source(gateway.url, name))
    with Watch() as watch:
        signed.start()
        signed.key()
        said = [*signed.cli("status"), *signed.cli("rotate", "work")]
        said += [*signed.cli("source", "test", "work"), *signed.cli("config", "show")]
        aws.put(name, canaries.know("blanks", f"sk-with blanks-{secrets.token_hex(20)}"))
        until(lambda: "not one token" in str(signed.row()["trouble"]))
        said += [*signed.cli("rotate", "work"), *signed.cli("status", "--json")]
        text = canaries.know("message", f"message-{secrets.token_hex(20)}")
        for fault in (refusal("TeapotException", text), refusal("AccessDeniedException", text)):
            aws_front.fault(fault, "DescribeSecret", times=2)
            said += [*signed.cli("rotate", "work"), signed.helper()[2], *signed.cli("status")]
        signed.kill()
        signed.start()
        said += [*signed.cli("audit"), signed.said(), json.dumps(signed.status())]
        seen = watch.look() + list(watch.seen.values())
    printed = "\n".join(str(one) for one in said)
    assert canaries.seen_in(printed) == []
    assert canaries.below(signed.home.path, planted) == []
    for one in seen:
        assert canaries.seen_in(one.command) == []
        assert canaries.seen_in(one.environment or b"") == []
    if way == "role":
        assert "SessionToken of a role" in canaries.planted
        assert next(signed.state.rglob("session.*.sealed"))


def test_what_a_user_set_in_the_environment_goes_to_aws_s_worker_alone(
    resident: Resident, gateway: DevGateway, aws: Aws, reader: Keys, name: str
) -> None:
    """The daemon has what it was started with; workers for other things have none of it."""
    canaries = Canaries()
    canaries.know("secret access key", reader.secret_key)
    aws.put(name, minted(gateway))
    resident.environment |= aws.environment(reader)
    resident.configure(source(gateway.url, name))
    with Watch() as watch:
        resident.start()
        resident.key()
        until(lambda: [*resident.state.rglob("*.sealed")])
        watch.look()
    assert resident.process is not None
    shown = {
        (one.pid == resident.process.pid, one.name)
        for one in watch.seen.values()
        if one.environment is not None and canaries.seen_in(one.environment)
    }
    # a worker lets nobody look, once it has begun
    assert {name for is_daemon, name in shown if not is_daemon} <= {"worker"}
    assert canaries.below(resident.home.path) == []


def test_an_answer_that_hangs_keeps_nobody_from_a_key(
    following: Resident, aws_front: Front
) -> None:
    """The helper is answered at once while AWS is asked."""
    key = following.key()
    aws_front.fault(Hang(), times=None)
    until(lambda: aws_front.count() and aws_front.log[-1].fault == "Hang")
    began = time.monotonic()
    assert following.key() == key
    assert time.monotonic() - began < 1
