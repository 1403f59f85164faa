"""
A stand-in for the part of Kubernetes that says whose service account token it was given.

See: https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers.authority import Authority
from tests.servers.signer import Signer
from tests.servers.vaultapi import Api
from tests.servers.web import Handler, LoopbackServer


class Kubernetes(LoopbackServer):
    """
    Signs service account tokens and reviews them.

    Attributes:
        refuses: While true, it says of every token that it is none.
        is_down: While true, it ends connections without an answer.
        reviews: How many tokens it was asked about.
    """

    def __init__(self) -> None:
        super().__init__(_Review)
        self._signer = Signer("https://kubernetes.default.svc")
        self.refuses = False
        self.is_down = False
        self.reviews = 0

    def service_account_token(
        self, name: str, namespace: str = "default", seconds: float = 600
    ) -> str:
        """Sign a token as a pod finds it in a file."""
        account = {"name": name, "uid": secrets.token_hex(16)}
        more: dict[str, Any] = {
            "aud": [self._signer.issuer],  # a list, even of one
            "kubernetes.io": {"namespace": namespace, "serviceaccount": account},
        }
        who = f"system:serviceaccount:{namespace}:{name}"
        return self._signer.token(who, self._signer.issuer, seconds, **more)

    def enable(
        self,
        server: Api,
        role: str,
        policies: Sequence[str],
        account: str,
        namespace: str = "default",
        mount: str = "kubernetes",
    ) -> str:
        """Let a service account log in at a server; returns the path to log in at."""
        path = f"auth/{server.enable_auth('kubernetes', mount)}"
        with tempfile.TemporaryDirectory() as folder:
            unused = Authority(Path(folder)).file.read_text()
        config = {
            "kubernetes_host": self.url,
            "kubernetes_ca_cert": unused,  # it must have one, though this is not TLS
            "disable_local_ca_jwt": True,
        }
        server.do("POST", f"{path}/config", config)
        options = {
            "bound_service_account_names": [account],
            "bound_service_account_namespaces": [namespace],
            "token_policies": list(policies),
        }
        server.do("POST", f"{path}/role/{role}", options)
        return f"{path}/login"

    def review(self, token: str) -> dict[str, Any]:
        """Say whose token this is."""
        self.reviews += 1
        claims = None if self.refuses else self._signer.claims(token)
        if claims is None:
            return {"authenticated": False, "error": "[invalid bearer token]"}
        about = claims["kubernetes.io"]
        user = {
            "username": claims["sub"],
            "uid": about["serviceaccount"]["uid"],
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{about['namespace']}"],
        }
        return {"authenticated": True, "user": user, "audiences": claims["aud"]}


class _Review(Handler):
    server: Kubernetes

    def do_POST(self) -> None:  # noqa: N802, the standard library's name
        asked = json.loads(self.body())
        if self.server.is_down:
            self.close_connection = True
            return
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        status = 201 if self.path == path and self.headers.get("authorization") else 401
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "status": self.server.review(asked["spec"]["token"]),
        }
        body = json.dumps(review).encode() if status == 201 else b"{}"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
