"""
Secrets Manager, IAM, STS and KMS by a real server of AWS's protocols, ministack.

    with Aws() as aws:
        version = aws.put("llm", "sk-…")
        keys = aws.user("reader", allow("secretsmanager:GetSecretValue", aws.arn("llm")))
        run(..., env={**home.environment, **aws.environment(*keys)})
        assert aws.client("secretsmanager").describe_secret(SecretId="llm")

It checks signatures, policies and the ends of sessions. Where it is not as AWS is, see
`tests/test_servers.py`; `Front` in `awsfaults` corrects what matters for labels of versions.

See: https://github.com/ministackorg/ministack
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Self

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

from tests.servers.install import installed, ministack_folder
from tests.servers.processes import Child, Port, StartError

REGION = "us-east-1"
_FAKETIME = ("usr/lib/*/faketime/libfaketime.so.1", "usr/local/lib/faketime/libfaketime.so.1")
_ROOT = ("test", "test")


@dataclass(frozen=True, slots=True)
class Keys:
    """What a client signs with."""

    access_key: str
    secret_key: str
    session_token: str | None = None
    expiration: datetime | None = None


def allow(actions: str | list[str], resources: str | list[str] = "*") -> dict[str, Any]:
    """Write a policy that allows this and nothing else."""
    return statement("Allow", actions, resources)


def statement(
    effect: str, actions: str | list[str], resources: str | list[str], **more: Any
) -> dict[str, Any]:
    """Write a policy of one statement."""
    said = {"Effect": effect, "Action": actions, "Resource": resources, **more}
    return {"Version": "2012-10-17", "Statement": [said]}


def connect(service: str, url: str, keys: Keys, region: str = REGION, **config: Any) -> Any:
    """Make a client that asks once, and asks nobody but this URL."""
    options = {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": {"total_max_attempts": 1},
        "proxies": {},
        **config,
    }
    return _session().create_client(
        service,
        region_name=region,
        endpoint_url=url,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        aws_session_token=keys.session_token,
        config=Config(**options),
    )


@cache
def _session() -> Any:
    """What keeps the descriptions of services, and reads nothing of whoever runs the tests."""
    nothing = (None, None, os.devnull, None)
    return Session({"profile": (None,) * 4, "config_file": nothing, "credentials_file": nothing})


def _faketime() -> str:
    for place in _FAKETIME:
        for found in Path("/").glob(place):
            return str(found)
    raise StartError("no libfaketime.so.1; type: apt-get install faketime")


class Aws:
    """
    The server, as a context. `stop` and `start` keep the port; what it knew is lost.

    Args:
        own_clock: Whether `set_clock` can be used.

    Attributes:
        url: Its address, for all services.
        account: Its number, which no other server has.
        root: Keys that are allowed everything; the signature is not checked. Users' are.
    """

    def __init__(self, *, own_clock: bool = False) -> None:
        self._own_clock = own_clock
        self.account = f"{secrets.randbelow(10**12):012d}"
        self.root = Keys(*_ROOT)
        self._clients: dict[str, Any] = {}
        self._child: Child | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="keybroker-aws-")
            self.folder = Path(stack.enter_context(temporary))
            self._port = stack.enter_context(Port()).number
            self.url = f"http://127.0.0.1:{self._port}"
            (self.folder / "none").touch()
            self.set_clock(timedelta())
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for client in self._clients.values():
            client.close()

    def start(self) -> None:
        """Start it and wait until it answers for an account that nobody else has."""
        settings = {
            "PATH": os.defpath,
            "HOME": str(self.folder),
            "AUTH": "true",
            "MINISTACK_ACCOUNT_ID": self.account,
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self._port),
            "SERVICES": "secretsmanager,sts,iam,imds,kms",
            "LOG_LEVEL": "WARNING",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self._own_clock:
            settings |= {
                "LD_PRELOAD": _faketime(),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DISABLE_SHM": "1",
                "FAKETIME_TIMESTAMP_FILE": str(self.folder / "clock"),
            }
        command = [str(installed(ministack_folder()) / "bin" / "ministack")]
        log = self.folder / "ministack.log"
        self._child = Child(command, log=log, environment=settings)
        self._child.wait_until(self._is_ours, 60)

    def _is_ours(self) -> bool:
        try:
            identity = self.client("sts").get_caller_identity()
        except (BotoCoreError, ClientError):
            return False
        if identity["Account"] != self.account:
            raise StartError(f"{self.url} is of {identity['Account']}, not {self.account}")
        return True

    def set_clock(self, ahead: timedelta) -> None:
        """Let its clock be ahead of ours, or behind. Users sign by a clock that is as wrong."""
        new = self.folder / "clock.new"
        new.write_text(f"{ahead.total_seconds():+.0f}s\n")
        new.replace(self.folder / "clock")

    @property
    def pid(self) -> int:
        """Its process."""
        return self._running().pid

    def _running(self) -> Child:
        assert self._child
        return self._child

    def stop(self) -> None:
        """End it: clients are refused. Stopping twice is fine."""
        if self._child:
            self._child.stop()
            for left in Path("/dev/shm").glob(f"*faketime*_{self._child.pid}"):
                left.unlink()

    def kill(self) -> None:
        """End it at once. Killing twice is fine."""
        self._running().kill()

    def pause(self) -> None:
        """Let it hang."""
        self._running().pause()

    def resume(self) -> None:
        """End a pause."""
        self._running().resume()

    def client(self, service: str, keys: Keys | None = None, **config: Any) -> Any:
        """Make a client; without keys, the one client of the service that may do everything."""
        if keys or config:
            return connect(service, self.url, keys or self.root, **config)
        if service not in self._clients:
            self._clients[service] = connect(service, self.url, self.root)
        return self._clients[service]

    def environment(self, keys: Keys | None = None, url: str | None = None) -> dict[str, str]:
        """
        What a client's program needs, and nothing of the files in a HOME.

        Args:
            keys: It signs with; without, it has to find some elsewhere.
            url: Asked instead of the server itself.
        """
        nothing = str(self.folder / "none")
        said = {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": nothing,
            "AWS_SHARED_CREDENTIALS_FILE": nothing,
        }
        if keys:
            said["AWS_ACCESS_KEY_ID"] = keys.access_key
            said["AWS_SECRET_ACCESS_KEY"] = keys.secret_key
        if keys and keys.session_token:
            said["AWS_SESSION_TOKEN"] = keys.session_token
        return said

    # Secrets.

    def put(self, name: str, value: str | bytes, **options: Any) -> str:
        """
        Write the value of a secret, which is made if need be; returns the version's id.

        `VersionStages` and `ClientRequestToken` are those of PutSecretValue.
        """
        manager = self.client("secretsmanager")
        content: dict[str, Any] = {"SecretString": value}
        if isinstance(value, bytes):
            content = {"SecretBinary": value}
        try:
            made = manager.put_secret_value(SecretId=name, **content, **options)
        except manager.exceptions.ResourceNotFoundException:
            made = manager.create_secret(Name=name, **content)
        version: str = made["VersionId"]
        return version

    def secret(self, name: str) -> dict[str, Any]:
        """What is known of a secret, without its values; `VersionIdsToStages` and the like."""
        found: dict[str, Any] = self.client("secretsmanager").describe_secret(SecretId=name)
        return found

    def arn(self, name: str) -> str:
        """The full name of a secret, as policies have it."""
        arn: str = self.secret(name)["ARN"]
        return arn

    def value(self, name: str, stage: str = "AWSCURRENT") -> str:
        """The text that a label of a secret is at."""
        manager = self.client("secretsmanager")
        value: str = manager.get_secret_value(SecretId=name, VersionStage=stage)["SecretString"]
        return value

    def labels(self, name: str) -> dict[str, str]:
        """The versions of a secret by their labels."""
        versions = self.secret(name)["VersionIdsToStages"]
        return {label: version for version, labels in versions.items() for label in labels}

    def move(self, name: str, to: str, from_: str | None = None, label: str = "AWSCURRENT") -> None:
        """Move a label to another version."""
        options = {"RemoveFromVersionId": from_} if from_ else {}
        self.client("secretsmanager").update_secret_version_stage(
            SecretId=name, VersionStage=label, MoveToVersionId=to, **options
        )

    # Who may do what.

    def user(self, name: str, policy: Mapping[str, Any] | None = None) -> Keys:
        """Make a user with this policy, or none; another call is another key."""
        iam = self.client("iam")
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_user(UserName=name)
        if policy:
            iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=json.dumps(policy))
        made = iam.create_access_key(UserName=name)["AccessKey"]
        return Keys(made["AccessKeyId"], made["SecretAccessKey"])

    def role(
        self,
        name: str,
        policy: Mapping[str, Any] | None = None,
        trust: Mapping[str, Any] | None = None,
    ) -> str:
        """
        Make a role with this policy, or none; returns its ARN.

        Args:
            name: Of the role.
            policy: What it may do.
            trust: Who may take it; anybody of the account unless it says otherwise.
        """
        anybody = {
            "Effect": "Allow",
            "Principal": {"AWS": f"arn:aws:iam::{self.account}:root"},
            "Action": "sts:AssumeRole",
        }
        document = trust or {"Version": "2012-10-17", "Statement": [anybody]}
        iam = self.client("iam")
        made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(document))
        if policy:
            iam.put_role_policy(RoleName=name, PolicyName="only", PolicyDocument=json.dumps(policy))
        arn: str = made["Role"]["Arn"]
        return arn

    def web_role(
        self, name: str, issuer: str, audience: str, policy: Mapping[str, Any] | None = None
    ) -> str:
        """Make a role for bearers of a provider's tokens; returns its ARN."""
        iam = self.client("iam")
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_open_id_connect_provider(Url=issuer, ClientIDList=[audience])
        host = issuer.partition("://")[2]
        bearers = {
            "Effect": "Allow",
            "Principal": {"Federated": f"arn:aws:iam::{self.account}:oidc-provider/{host}"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {"StringEquals": {f"{host}:aud": audience}},
        }
        return self.role(name, policy, {"Version": "2012-10-17", "Statement": [bearers]})

    def session(self, role: str, seconds: int = 900, keys: Keys | None = None) -> Keys:
        """
        Take a role, for 15 minutes at least.

        Keys that end within 15 minutes are such as botocore asks for anew before each request.
        """
        sts = self.client("sts", keys)
        made = sts.assume_role(RoleArn=role, RoleSessionName="session", DurationSeconds=seconds)[
            "Credentials"
        ]
        return Keys(
            made["AccessKeyId"],
            made["SecretAccessKey"],
            made["SessionToken"],
            made["Expiration"].astimezone(UTC),
        )
