"""
Vault's AWS auth method, which OpenBao does not have, in front of a real OpenBao.

    client -> AwsLogin -> OpenBao        everything else passes through
                 `-> the check that Vault leaves to AWS STS, with keys that the test knows

A client proves who it is by a request that it has signed and not sent. This server does what Vault
does with it, and what STS would, and has the OpenBao behind it make the token.

See: https://developer.hashicorp.com/vault/api-docs/auth/aws#login
See: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlsplit

from tests.servers.vaultapi import Api
from tests.servers.web import Handler, LoopbackServer

ACCESS_KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SERVER_ID_HEADER = "X-Vault-AWS-IAM-Server-ID"

_ACCOUNT = "123456789012"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/([^/]+)/aws4_request, ?"
    r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)


class _RefusedError(Exception):
    """A login is refused with this text, and status 400."""


def signature(
    secret: str,
    scope: str,
    method: str,
    url: str,
    headers: Mapping[str, str],
    signed: Sequence[str],
    body: bytes,
) -> str:
    """
    Sign a request as AWS does, with Signature Version 4.

    Args:
        secret: The secret key.
        scope: Day, region, service and `aws4_request`, with slashes between them.
        method: Of HTTP.
        url: With its query.
        headers: By their names in lower case; `x-amz-date` is one.
        signed: The names of those that the signature is over, sorted.
        body: The request's.
    """
    where = urlsplit(url)
    query = sorted(
        f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
        for name, value in parse_qsl(where.query, keep_blank_values=True)
    )
    canonical = [
        method,
        quote(where.path or "/", safe="/-_.~"),
        "&".join(query),
        *(f"{name}:{' '.join(headers[name].split())}" for name in signed),
        "",
        ";".join(signed),
        hashlib.sha256(body).hexdigest(),
    ]
    hashed = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, hashed])
    key = f"AWS4{secret}".encode()
    for part in [*scope.split("/"), text]:
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()


class AwsLogin(LoopbackServer):
    """
    The server, as a context; clients talk to its `url`.

    Args:
        behind: The OpenBao, over plain HTTP.
        mount: Where the method is.
        server_id: What the header `X-Vault-AWS-IAM-Server-ID` has to say, if anything.
        region: Of the STS that Vault would ask.
        session_token: What belongs to the access key, if it is a temporary one.

    Attributes:
        logins: How many there were, refused ones included.
    """

    def __init__(
        self,
        behind: Api,
        *,
        mount: str = "aws",
        server_id: str | None = None,
        region: str = "us-east-1",
        session_token: str | None = None,
    ) -> None:
        super().__init__(_Login)
        self.behind = behind
        self.login_path = f"auth/{mount}/login"
        self.logins = 0
        self._server_id = server_id
        self._region = region
        self._session_token = session_token
        self._roles: dict[str, dict[str, Any]] = {}

    def role(self, name: str, policies: Sequence[str], **options: Any) -> str:
        """Let whoever has the access key log in to this role; returns the path to log in at."""
        self._roles[name] = {"policies": list(policies), **options}
        return self.login_path

    def log_in(self, asked: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a login; returns the status and the body."""
        self.logins += 1
        try:
            self._check(asked)
            name = asked.get("role") or "kb-test"  # Vault takes the name of the AWS role
            if name not in self._roles:
                raise _RefusedError(f"entry for role {name} not found")
        except _RefusedError as refused:
            return 400, {"errors": [str(refused)]}
        auth = self.behind.new_token(
            **self._roles[name], display_name=f"aws-{name}", meta=_metadata()
        )
        return 200, {"lease_id": "", "renewable": False, "lease_duration": 0, "auth": auth}

    def _check(self, asked: Mapping[str, Any]) -> None:
        """
        Check a signed request as Vault does, then as STS does.

        Raises:
            _RefusedError: It does not prove who sent it.
        """
        if asked.get("iam_http_request_method") != "POST":
            raise _RefusedError(
                "invalid iam_http_request_method; currently only 'POST' is supported"
            )
        url = _decoded(asked, "iam_request_url").decode()
        body = _decoded(asked, "iam_request_body")
        headers = _headers(asked)
        found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        signed = found[5].split(";") if found else []
        if self._server_id:
            problem = self._server_id_problem(headers, signed)
            if problem:
                raise _RefusedError(f"error validating {SERVER_ID_HEADER} header: {problem}")
        problem = self._sts_problem(url, headers, body, found, signed)
        if problem:
            xml = f"<ErrorResponse><Error><Code>{problem}</Code></Error></ErrorResponse>"
            raise _RefusedError(
                f"error making upstream request: received error code 403 from STS: {xml}"
            )

    def _server_id_problem(self, headers: Mapping[str, str], signed: Sequence[str]) -> str | None:
        given = headers.get(SERVER_ID_HEADER.lower())
        if not given:
            return f'missing header "{SERVER_ID_HEADER}"'
        if given != self._server_id:
            return f'expected "{self._server_id}" but got "{given}"'
        return None if SERVER_ID_HEADER.lower() in signed else "vault header wasn't signed"

    def _sts_problem(
        self,
        url: str,
        headers: dict[str, str],
        body: bytes,
        authorization: re.Match[str] | None,
        signed: list[str],
    ) -> str | None:
        """What STS would say of the request, if it were sent to the STS of our region."""
        where = urlsplit(url)
        hosts = {f"sts.{self._region}.amazonaws.com"}
        if self._region == "us-east-1":
            hosts.add("sts.amazonaws.com")
        headers.setdefault("host", where.netloc)
        if not authorization or not {"host", "x-amz-date"} <= set(signed) <= headers.keys():
            return "IncompleteSignature"
        if headers["host"] not in hosts or where.netloc not in hosts:
            return "SignatureDoesNotMatch"
        access_key, day, region, service, _, given = authorization.groups()
        if access_key != ACCESS_KEY or headers.get("x-amz-security-token") != self._session_token:
            return "InvalidClientTokenId"
        if (region, service) != (self._region, "sts") or not headers["x-amz-date"].startswith(day):
            return "SignatureDoesNotMatch"
        scope = f"{day}/{region}/{service}/aws4_request"
        wanted = signature(SECRET_KEY, scope, "POST", url, headers, signed, body)
        if not hmac.compare_digest(wanted, given) or _age(headers) > timedelta(minutes=15):
            return "SignatureDoesNotMatch"
        action = parse_qs(where.query) | parse_qs(body.decode())
        return None if action.get("Action") == ["GetCallerIdentity"] else "InvalidAction"


def _decoded(asked: Mapping[str, Any], name: str) -> bytes:
    if not asked.get(name):
        raise _RefusedError(f"missing {name}")
    try:
        return base64.b64decode(asked[name], validate=True)
    except ValueError:
        raise _RefusedError(f"failed to base64 decode {name}") from None


def _headers(asked: Mapping[str, Any]) -> dict[str, str]:
    """Read headers: a JSON object, in base64 or as it is, of texts or lists of them."""
    given = asked.get("iam_request_headers")
    if not isinstance(given, dict):
        try:
            given = json.loads(_decoded(asked, "iam_request_headers"))
        except ValueError:
            raise _RefusedError("failed to JSON decode iam_request_headers") from None
    return {
        name.lower(): value if isinstance(value, str) else ",".join(value)
        for name, value in given.items()
    }


def _age(headers: Mapping[str, str]) -> timedelta:
    """How far from now a request was signed, before or after."""
    signed = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return abs(datetime.now(UTC) - signed)


def _metadata() -> dict[str, str]:
    """What Vault tells of whoever logged in."""
    return {
        "account_id": _ACCOUNT,
        "auth_type": "iam",
        "canonical_arn": f"arn:aws:iam::{_ACCOUNT}:role/kb-test",
        "client_arn": f"arn:aws:sts::{_ACCOUNT}:assumed-role/kb-test/session",
        "client_user_id": "AROAEXAMPLE",
    }


_HOP_BY_HOP = ("connection", "content-length", "host", "transfer-encoding")


class _Login(Handler):
    server: AwsLogin

    def do_GET(self) -> None:  # noqa: N802, the standard library's names
        body = self.body()
        if self.path == f"/v1/{self.server.login_path}" and self.command in ("POST", "PUT"):
            status, said = self.server.log_in(json.loads(body))
            self._send(status, {"content-type": "application/json"}, json.dumps(said).encode())
            return
        behind = http.client.HTTPConnection(urlsplit(self.server.behind.url).netloc, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        try:
            behind.request(self.command, self.path, body or None, headers)
            answer = behind.getresponse()
            self._send(answer.status, dict(answer.getheaders()), answer.read())
        except (OSError, http.client.HTTPException):
            self.close_connection = True
        finally:
            behind.close()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_LIST = do_GET  # noqa: N815

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
