"""JSON Web Tokens: what one says of itself, and one that we sign."""

import json
from collections.abc import Mapping
from typing import Any

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}


def read_claims(text: str) -> Mapping[str, Any] | None:
    """
    Return what a token says, unchecked: it is for whoever it is shown to to check.

    None where it is no JWT.
    """
    try:
        found = json.loads(jws.extract_compact(text.encode()).payload)
    except (JoseError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def sign(claims: Mapping[str, Any], key: str, key_id: str | None) -> str:
    """
    Sign claims.

    Args:
        key: A private key, PEM or a JWK, which may say its id itself.

    Raises:
        ValueError: It is none, or of a kind that nobody takes; nothing of it is repeated.
    """
    opened: RSAKey | ECKey
    for kind in (RSAKey, ECKey):
        try:
            opened = kind.import_key(json.loads(key) if key.lstrip().startswith("{") else key)
            break
        except (JoseError, ValueError, TypeError, KeyError):
            continue
    else:
        raise ValueError("no key")
    algorithm = "RS256" if isinstance(opened, RSAKey) else CURVES.get(opened.curve_name, "")
    header = {"alg": algorithm, **({} if key_id is None else {"kid": key_id})}
    try:
        return jwt.encode(header, dict(claims), opened, algorithms=[algorithm])
    except (JoseError, ValueError, TypeError, KeyError):
        raise ValueError("cannot sign") from None
