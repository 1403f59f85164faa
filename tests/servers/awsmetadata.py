"""
Credentials of the machine a program runs on: those of a container, or of an instance of EC2.

    GET  /credentials                                         of a container
    PUT  /latest/api/token                                    of an instance, before all else
    GET  /latest/meta-data/iam/security-credentials/          the name of its role
    GET  /latest/meta-data/iam/security-credentials/<role>    its credentials

ministack has both, with keys that it does not take itself.

See: https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
See: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable

from tests.servers.aws import Keys
from tests.servers.web import Handler, LoopbackServer

_ROLE = "machine"
_ROLES = "/latest/meta-data/iam/security-credentials/"


class Metadata(LoopbackServer):
    """
    Gives credentials to whoever runs here, as a context.

    Args:
        issue: Makes them, so that an `Aws` takes them.

    Attributes:
        is_down: While true, it ends connections without an answer.
        status: What it answers instead of 200, if anything.
        handed_out: How many credentials were given.
    """

    def __init__(self, issue: Callable[[], Keys]) -> None:
        super().__init__(_Answer)
        self._issue = issue
        self.is_down = False
        self.status = 200
        self.handed_out = 0
        self._token = secrets.token_urlsafe(32)

    def container(self) -> dict[str, str]:
        """What a program in a container is given."""
        return {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.url}/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": self._token,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def instance(self) -> dict[str, str]:
        """What keeps a program from asking the instance it really runs on, if any."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url,
            "AWS_EC2_METADATA_DISABLED": "false",
        }

    def answer(self, method: str, path: str, token: str | None) -> tuple[int, str]:
        """
        Answer a request; returns the status and the body.

        Args:
            method: Of HTTP.
            path: What is asked for.
            token: The container's, or the instance's.
        """
        if self.status != 200:
            return self.status, ""
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, self._token
        if token != self._token:
            return 401, ""
        if path == _ROLES:
            return 200, _ROLE
        if path in ("/credentials", _ROLES + _ROLE):
            return 200, json.dumps(self._credentials())
        return 404, ""

    def _credentials(self) -> dict[str, str | None]:
        self.handed_out += 1
        keys = self._issue()
        assert keys.expiration
        return {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": keys.access_key,
            "SecretAccessKey": keys.secret_key,
            "Token": keys.session_token,
            "Expiration": f"{keys.expiration:%Y-%m-%dT%H:%M:%SZ}",
        }


class _Answer(Handler):
    server: Metadata

    def do_GET(self) -> None:  # noqa: N802, the standard library's names
        self.body()
        if self.server.is_down:
            self.close_connection = True
            return
        token = self.headers.get("x-aws-ec2-metadata-token", self.headers.get("authorization"))
        status, text = self.server.answer(self.command, self.path, token)
        self.send_response(status)
        self.send_header("content-type", "text/plain" if "{" not in text else "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_PUT = do_GET  # noqa: N815
