"""
JSON Web Tokens signed with a key of the tests' own.

See: https://datatracker.ietf.org/doc/html/rfc7519
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

_HASH = hashes.SHA256()


class Signer:
    """
    Signs tokens and recognizes its own.

    Args:
        issuer: The claim `iss` of its tokens.
        algorithm: `ES256` or `RS256`.
    """

    def __init__(self, issuer: str = "https://issuer.example", algorithm: str = "ES256") -> None:
        self.issuer = issuer
        self._algorithm = algorithm
        self._key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
        if algorithm == "ES256":
            self._key = ec.generate_private_key(ec.SECP256R1())
        else:
            self._key = rsa.generate_private_key(65537, 2048)

    @property
    def public_key(self) -> str:
        """The key to check its tokens with, PEM."""
        public = self._key.public_key()
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return public.public_bytes(serialization.Encoding.PEM, form).decode()

    def token(
        self, subject: str, audience: str, seconds: float = 60, early: float = 0, **claims: Any
    ) -> str:
        """
        Sign a token.

        Args:
            subject: Its `sub`.
            audience: Its `aud`.
            seconds: How long it lives from now; of one that has ended, less than none.
            early: How long from now until it is valid.
            claims: Others, or these otherwise.
        """
        now = int(time.time())
        times = {"iat": now, "nbf": int(now + early), "exp": int(now + seconds)}
        return self.sign({"iss": self.issuer, "sub": subject, "aud": audience, **times, **claims})

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Sign these claims and no others."""
        head = {"alg": self._algorithm, "typ": "JWT"}
        signed = ".".join(_encode(json.dumps(part).encode()) for part in (head, claims))
        if isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(signed.encode(), padding.PKCS1v15(), _HASH)
        else:
            r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(_HASH)))
            signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return f"{signed}.{_encode(signature)}"

    def claims(self, token: str) -> dict[str, Any] | None:
        """What a token says; None if it is not ours or its time is over."""
        try:
            signed, _, signature = token.rpartition(".")
            self._check(signed.encode(), _decode(signature))
            claims: dict[str, Any] = json.loads(_decode(signed.partition(".")[2]))
        except (ValueError, InvalidSignature):
            return None
        return claims if claims["exp"] > time.time() else None

    def _check(self, signed: bytes, signature: bytes) -> None:
        if isinstance(self._key, rsa.RSAPrivateKey):
            self._key.public_key().verify(signature, signed, padding.PKCS1v15(), _HASH)
            return
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        der = utils.encode_dss_signature(r, s)
        self._key.public_key().verify(der, signed, ec.ECDSA(_HASH))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
