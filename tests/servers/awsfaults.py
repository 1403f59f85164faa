"""
A proxy in front of `Aws` that counts calls, breaks chosen ones, and corrects what ministack misses.

    with Front(aws) as front:
        front.fault(CommitThenDrop(), "PutSecretValue")
        front.fault(refusal("ThrottlingException"), "GetSecretValue", nth=2)
        ...                                   # the client talks to front.url
        assert front.count("PutSecretValue") == 2

Requests go on as they came, with the host that their signature is over. What a fault answers
without forwarding needs no valid signature.

See: https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_Operations.html
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from botocore.exceptions import BotoCoreError, ClientError

from tests.servers.aws import Aws
from tests.servers.faults import Armed, Entry, Exchange, Fault, Faults, Request, Status

_JSON = {"content-type": "application/x-amz-json-1.1"}
_BATCH = 20


class Call(NamedTuple):
    """
    One request: its operation, and which secret it is about.

    The secret is as the client named it: a name or an ARN. For BatchGetSecretValue it is those in
    the request, with commas between them; for other services it is empty.
    """

    operation: str
    secret: str


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """AWS has done it at once, and the answer comes later."""

    seconds: float

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        if exchange.pause(self.seconds):
            return False
        exchange.client.sendall(response.raw)
        return response.keeps_alive


@dataclass(frozen=True, slots=True)
class Dated(Fault):
    """The answer says of itself that it is of another time."""

    shift: timedelta

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        date = format_datetime(datetime.now(UTC) + self.shift, usegmt=True)
        head = re.sub(rb"(?i)\r\ndate:[^\r]*", b"", response.head)
        head = head[:-2] + f"date: {date}\r\n\r\n".encode()
        exchange.client.sendall(head + response.body)
        return response.keeps_alive


def refusal(code: str, message: str = "", status: int = 400, *, sts: bool = False) -> Status:
    """
    Make an answer that refuses, as the Secrets Manager writes it.

    Args:
        code: `ThrottlingException`, `InternalServiceError`, `DecryptionFailure`,
            `ExpiredTokenException`, ….
        message: For people.
        status: Of HTTP; 500 for what is AWS's fault.
        sts: As STS writes it.
    """
    if not sts:
        body = json.dumps({"__type": code, "Message": message}).encode()
        return Status(status, {**_JSON, "x-amzn-errortype": code}, body)
    error = f"<Type>Sender</Type><Code>{code}</Code><Message>{escape(message)}</Message>"
    space = "https://sts.amazonaws.com/doc/2011-06-15/"
    text = f'<ErrorResponse xmlns="{space}"><Error>{error}</Error></ErrorResponse>'
    return Status(status, {"content-type": "text/xml"}, text.encode())


class Front(Faults):
    """
    The proxy, as a context.

    It corrects what ministack does otherwise than AWS:

    - A refusal by a policy is 400 in the Secrets Manager, not 403.
    - A value under a known `ClientRequestToken` is ignored if it is the same, and is
      ResourceExistsException if it is another.
    - PutSecretValue takes its labels from the versions that had them.
    - AWSCURRENT can be moved and cannot be removed.
    - BatchGetSecretValue takes 20 names.

    Changes of labels wait for each other, so two clients see one order.
    """

    def __init__(self, aws: Aws) -> None:
        super().__init__(aws.url, keep_host=True)
        self._manager = aws.client("secretsmanager", read_timeout=5)
        self._calls: list[Call] = []
        self._from = 0
        self._described: dict[str, Mapping[str, Any]] = {}
        self._order = threading.Lock()

    def close(self) -> None:
        super().close()
        self._manager.close()

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every request that arrived, in order, broken ones included."""
        with self._changed:
            return tuple(self._calls[self._from :])

    def count(self, operation: str | None = None, secret: str | None = None) -> int:
        """How many requests there were for an operation, about a secret."""
        return sum(_is_about(call, operation, secret) for call in self.calls)

    def forget(self) -> None:
        """Count from here."""
        with self._changed:
            self._from = len(self._calls)

    def fault(
        self,
        fault: Fault,
        operation: str | None = None,
        *,
        secret: str | None = None,
        nth: int = 1,
        times: int | None = 1,
        before: Callable[[Entry], object] | None = None,
        after: Callable[[Entry], object] | None = None,
    ) -> Armed:
        """
        Arm a fault; `clear()` disarms all.

        Args:
            fault: What happens: of `tests.servers.faults`, of this module, or a `refusal`.
            operation: Only to this one: `GetSecretValue`, `AssumeRole`, ….
            secret: Only to requests that name the secret so.
            nth: From the n-th such request on, counted from now.
            times: How often; None is always.
            before: Called when a request has matched.
            after: Called when the fault is over.
        """
        with self._changed:
            start = len(self._calls)

        def where(request: Request) -> bool:
            if not _is_about(_call(request), operation, secret):
                return False
            seen = sum(_is_about(call, operation, secret) for call in self._calls[start:])
            return seen + 1 >= nth

        return self.next(fault, where=where, times=times, before=before, after=after)

    def describe(self, name: str, **fields: Any) -> None:
        """
        Have DescribeSecret say more of a secret than ministack knows.

        Times such as `NextRotationDate` and `LastRotatedDate` are seconds since 1970.
        """
        self._described[name] = fields

    def _entry(self, request: Request, armed: Armed | None) -> Entry:
        self._calls.append(_call(request))
        return super()._entry(request, armed)

    def _relay(self, request: Request, entry: Entry, send: Callable[[bytes], object]) -> bool:
        operation, _ = _call(request)
        if operation in ("PutSecretValue", "UpdateSecretVersionStage"):
            with self._order:
                return self._answer(request, entry, send, operation)
        return self._answer(request, entry, send, operation)

    def _answer(
        self, request: Request, entry: Entry, send: Callable[[bytes], object], operation: str
    ) -> bool:
        asked = _asked(request)
        ours = self._instead(operation, asked)
        if ours:
            send(_head(ours.status, ours.headers, len(ours.body)))
            send(ours.body)
            return True
        parts: list[bytes] = []
        keeps_alive = super()._relay(request, entry, parts.append)
        head, body = parts[0], b"".join(parts[1:])
        status = int(head.split(b" ", 2)[1])
        if status == 403 and b"AccessDeniedException" in body:
            head = head.replace(b" 403 ", b" 400 ", 1)
        if status == 200 and operation == "PutSecretValue":
            self._take_labels(asked, json.loads(body))
        if status == 200 and operation == "DescribeSecret" and self._described:
            said = json.loads(body)
            body = json.dumps(said | dict(self._described.get(said["Name"], {}))).encode()
            head = re.sub(rb"(?i)content-length: *\d+", b"content-length: %d" % len(body), head)
        send(head)
        send(body)
        return keeps_alive

    def _instead(self, operation: str, asked: Mapping[str, Any]) -> Status | None:
        """What AWS would answer and ministack would not."""
        if operation == "BatchGetSecretValue" and len(asked.get("SecretIdList", [])) > _BATCH:
            return refusal(
                "InvalidParameterException", f"You can't request more than {_BATCH} secrets."
            )
        if (
            operation == "UpdateSecretVersionStage"
            and asked.get("VersionStage") == "AWSCURRENT"
            and not asked.get("MoveToVersionId")
        ):
            return refusal(
                "InvalidParameterException",
                "You can only move staging label AWSCURRENT to a different secret version. "
                "It can't be completely removed.",
            )
        if operation == "PutSecretValue" and asked.get("ClientRequestToken"):
            return self._known_version(asked)
        return None

    def _known_version(self, asked: Mapping[str, Any]) -> Status | None:
        token = asked["ClientRequestToken"]
        try:
            found = self._manager.get_secret_value(SecretId=asked["SecretId"], VersionId=token)
        except ClientError:
            return None
        except BotoCoreError as error:
            raise ConnectionAbortedError("no answer") from error
        given = asked.get("SecretString"), base64.b64decode(asked.get("SecretBinary") or "")
        if given != (found.get("SecretString"), found.get("SecretBinary", b"")):
            return refusal(
                "ResourceExistsException",
                f"You can't modify the existing version {token} of the secret.",
            )
        said = {name: found[name] for name in ("ARN", "Name", "VersionId", "VersionStages")}
        return Status(200, _JSON, json.dumps(said).encode())

    def _take_labels(self, asked: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Take the labels of a new version from the others."""
        described = self._manager.describe_secret(SecretId=made["ARN"])["VersionIdsToStages"]
        for label in asked.get("VersionStages", []):
            for version, labels in described.items():
                if version != made["VersionId"] and label in labels:
                    self._manager.update_secret_version_stage(
                        SecretId=made["ARN"], VersionStage=label, RemoveFromVersionId=version
                    )


def _is_about(call: Call, operation: str | None, secret: str | None) -> bool:
    return operation in (None, call.operation) and secret in (None, call.secret)


def _call(request: Request) -> Call:
    headers = {name.lower(): value for name, value in request.headers}
    target = headers.get("x-amz-target", "").rpartition(".")[2]
    asked = _asked(request)
    if not target:
        form = parse_qs(request.body.decode("latin-1"))
        return Call(form.get("Action", [""])[0], "")
    names = asked.get("SecretIdList") or [asked.get("SecretId") or asked.get("Name") or ""]
    return Call(target, ",".join(names))


def _asked(request: Request) -> dict[str, Any]:
    try:
        asked = json.loads(request.body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _head(status: int, headers: Mapping[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode("latin-1")
