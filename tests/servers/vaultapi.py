"""
Vault's HTTP API, asked without a client library: for setting servers up and for looking at them.

See: https://openbao.org/api-docs/
"""

from __future__ import annotations

import http.client
import json
import secrets
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers.authority import Authority, Certificate
from tests.servers.processes import wait_until


class RefusedError(Exception):
    """A server refused what a test set up; the message is its own."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: header names are in lower case, no body is an empty one."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]


class Api:
    """
    The HTTP API at one address.

    Args:
        url: The address.
        token: What is presented unless a call says otherwise, for most a root token.
        ca_file: The authority that its certificate is of; None without TLS.
    """

    def __init__(self, url: str, token: str = "", ca_file: Path | None = None) -> None:
        self.url = url
        self.token = token
        self.ca_file = ca_file

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        token: str | None = None,
        namespace: str | None = None,
        certificate: Certificate | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float = 10,
    ) -> Answer:
        """
        Ask once, without following where an answer leads.

        Args:
            method: Of HTTP; `LIST` is one here.
            path: Below `/v1/`.
            body: Sent as JSON.
            token: Presented instead of `self.token`; empty for none.
            namespace: As `X-Vault-Namespace`.
            certificate: The client's, over TLS.
            headers: Sent beside these.
            patience: How many seconds to wait for an answer.

        Raises:
            OSError: There was none.
        """
        sent = dict(headers or {})
        if presented := self.token if token is None else token:
            sent["X-Vault-Token"] = presented
        if namespace:
            sent["X-Vault-Namespace"] = namespace
        connection = self._connection(certificate, patience)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, f"/v1/{path}", body=data, headers=sent)
            answer = connection.getresponse()
            said = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        names = {name.lower(): value for name, value in answer.getheaders()}
        is_json = names.get("content-type", "").startswith("application/json") and said
        return Answer(answer.status, names, json.loads(said) if is_json else {})

    def _connection(
        self, certificate: Certificate | None, patience: float
    ) -> http.client.HTTPConnection:
        where = urlsplit(self.url).netloc
        if not self.ca_file:
            return http.client.HTTPConnection(where, timeout=patience)
        context = ssl.create_default_context(cafile=self.ca_file)
        if certificate:
            context.load_cert_chain(certificate.file, certificate.key)
        return http.client.HTTPSConnection(where, timeout=patience, context=context)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        token: str | None = None,
        namespace: str | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Ask as `ask` does; returns the status and the body."""
        answer = self.ask(method, path, body, token=token, namespace=namespace)
        return answer.status, answer.body

    def do(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        namespace: str | None = None,
    ) -> dict[str, Any]:
        """
        Ask for what has to succeed.

        Raises:
            RefusedError: It did not.
        """
        status, said = self.request(method, path, body, namespace=namespace)
        if status >= 300:
            raise RefusedError(f"{method} {path}: {status} {said.get('errors')}")
        return said

    def health(self, patience: float = 10) -> dict[str, Any]:
        """What it says of itself, sealed and standing by included; empty if it says nothing."""
        with suppress(OSError):
            return self.ask("GET", "sys/health", token="", patience=patience).body
        return {}

    def kv(self, mount: str | None = None, version: int = 2) -> Kv:
        """Mount a key-value engine, under a name of its own unless one is given."""
        kv = Kv(self, mount or f"kv-{secrets.token_hex(4)}", version)
        engine = {"type": "kv", "options": {"version": str(version)}}
        self.do("POST", f"sys/mounts/{kv.mount}", engine)
        if version == 2:  # it makes itself ready, which takes a busy machine a while
            config = f"{kv.mount}/config"
            ready = wait_until(lambda: self.request("GET", config)[0] == 200, seconds=20)
            assert ready, f"{kv.mount} is not ready"
        return kv

    def policy(self, name: str, rules: Mapping[str, Sequence[str]]) -> str:
        """Write a policy: capabilities by path. Returns its name."""
        paths = {path: {"capabilities": list(allowed)} for path, allowed in rules.items()}
        self.do("PUT", f"sys/policies/acl/{name}", {"policy": json.dumps({"path": paths})})
        return name

    def new_token(self, policies: Sequence[str] = ("default",), **options: Any) -> dict[str, Any]:
        """Create a token without a parent; returns `client_token`, `accessor`, …"""
        made = self.do("POST", "auth/token/create-orphan", {"policies": list(policies), **options})
        auth: dict[str, Any] = made["auth"]
        return auth

    def enable_auth(self, kind: str, mount: str | None = None, **options: Any) -> str:
        """Enable an auth method unless it is; returns the name of its mount."""
        mount = mount or kind
        if f"{mount}/" not in self.do("GET", "sys/auth")["data"]:
            self.do("POST", f"sys/auth/{mount}", {"type": kind, **options})
        return mount

    def approle(
        self, role: str, policies: Sequence[str], mount: str = "approle", **options: Any
    ) -> tuple[str, str]:
        """Write a role, as `token_ttl="5s"` and the like say; returns role_id and a secret_id."""
        path = f"auth/{self.enable_auth('approle', mount)}/role/{role}"
        self.do("POST", path, {"token_policies": list(policies), **options})
        return self.do("GET", f"{path}/role-id")["data"]["role_id"], self.secret_id(role, mount)

    def secret_id(self, role: str, mount: str = "approle", **options: Any) -> str:
        """Make another secret_id for a role."""
        path = f"auth/{mount}/role/{role}/secret-id"
        made: str = self.do("POST", path, options)["data"]["secret_id"]
        return made

    def wrapped_secret_id(self, role: str, mount: str = "approle", ttl: str = "15m") -> str:
        """Make another secret_id, and return the token that unwraps it once."""
        path = f"auth/{mount}/role/{role}/secret-id"
        answer = self.ask("POST", path, {}, headers={"X-Vault-Wrap-TTL": ttl})
        return str(answer.body["wrap_info"]["token"])

    def userpass(self, user: str, password: str, policies: Sequence[str], **options: Any) -> str:
        """Write a user; returns the path to log in at."""
        path = f"auth/{self.enable_auth('userpass')}"
        options = {"password": password, "token_policies": list(policies), **options}
        self.do("POST", f"{path}/users/{user}", options)
        return f"{path}/login/{user}"

    def jwt(
        self,
        role: str,
        policies: Sequence[str],
        audience: str,
        mount: str = "jwt",
        *,
        config: Mapping[str, Any],
        **options: Any,
    ) -> str:
        """
        Let bearers of a JWT log in; returns the path to log in at.

        Args:
            role: The role's name.
            policies: Of the tokens.
            audience: What a JWT must be for.
            mount: Where the method is enabled.
            config: `jwt_validation_pubkeys` or `oidc_discovery_url`, and `bound_issuer`.
            options: Added to the role.
        """
        path = f"auth/{self.enable_auth('jwt', mount)}"
        self.do("POST", f"{path}/config", config)
        options = {
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": [audience],
            "token_policies": list(policies),
            **options,
        }
        self.do("POST", f"{path}/role/{role}", options)
        return f"{path}/login"

    def cert(self, role: str, policies: Sequence[str], authority: Authority, **options: Any) -> str:
        """Let bearers of an authority's certificates log in; returns the path to log in at."""
        path = f"auth/{self.enable_auth('cert')}"
        trusted = {"certificate": authority.file.read_text(), "token_policies": list(policies)}
        self.do("POST", f"{path}/certs/{role}", {**trusted, **options})
        return f"{path}/login"

    def namespace(self, name: str) -> str:
        """Make a namespace; returns its name."""
        self.do("POST", f"sys/namespaces/{name}")
        return name

    def rate_limit(
        self,
        name: str,
        path: str = "",
        *,
        rate: float = 1,
        interval: str = "1s",
        block: str = "0s",
        headers: bool = True,
    ) -> None:
        """
        Answer 429 to more requests than `rate` in an interval.

        Args:
            name: What `end_rate_limit` takes.
            path: Requests below it are limited; empty for all.
            rate: How many are let through.
            interval: The time they are counted in.
            block: For how long a client is refused that asked too often. Without one, the
                `Retry-After` is 0.
            headers: Whether answers have a `Retry-After`. This is so for all limits of a server.
        """
        config = {
            "enable_rate_limit_response_headers": headers,
            "enable_rate_limit_audit_logging": True,
        }
        self.do("POST", "sys/quotas/config", config)
        options = {"path": path, "rate": rate, "interval": interval, "block_interval": block}
        self.do("POST", f"sys/quotas/rate-limit/{name}", options)

    def end_rate_limit(self, name: str) -> None:
        """Let all requests through again."""
        self.do("DELETE", f"sys/quotas/rate-limit/{name}")

    def leases(self, prefix: str) -> list[str]:
        """The leases that exist below a path such as `database/creds/llm`."""
        status, said = self.request("LIST", f"sys/leases/lookup/{prefix.rstrip('/')}/")
        return [f"{prefix}/{key}" for key in said["data"]["keys"]] if status == 200 else []


@dataclass(frozen=True, slots=True)
class Kv:
    """A key-value engine of a server."""

    api: Api
    mount: str
    version: int

    def path(self, name: str, kind: str = "data") -> str:
        """Where a secret is read; version 2 has `metadata`, `delete`, `destroy`, … beside it."""
        return f"{self.mount}/{name}" if self.version == 1 else f"{self.mount}/{kind}/{name}"

    def put(self, name: str, /, **fields: str) -> int:
        """Write a secret; returns its version, of an engine that has versions."""
        if self.version == 1:
            self.api.do("POST", self.path(name), fields)
            return 1
        written = self.api.do("POST", self.path(name), {"data": fields})
        version: int = written["data"]["version"]
        return version

    def describe(self, name: str, **metadata: Any) -> None:
        """Set `custom_metadata`, `delete_version_after`, … of a secret."""
        self.api.do("POST", self.path(name, "metadata"), metadata)

    def delete(self, name: str) -> None:
        """Delete the newest version, which `undelete` brings back; version 1 forgets it."""
        self.api.do("DELETE", self.path(name))

    def undelete(self, name: str, version: int) -> None:
        """Bring a deleted version back."""
        self.api.do("POST", self.path(name, "undelete"), {"versions": [version]})

    def destroy(self, name: str, version: int) -> None:
        """Delete a version for good."""
        self.api.do("POST", self.path(name, "destroy"), {"versions": [version]})

    def forget(self, name: str) -> None:
        """Delete all versions and that there ever were any."""
        self.api.do("DELETE", self.path(name, "metadata"))
