"""What a `[logins.NAME]` table of each type holds."""

import re
from datetime import timedelta
from typing import Any

from keybroker.fields import (
    COUNT,
    DURATION,
    LOCAL_REFERENCE,
    PATH,
    TABLE,
    TEXT,
    TEXTS,
    URL,
    Field,
    Kind,
    one_of,
    read_table,
)

# What a sign-in's address has of ours: none of it is a wish.
OURS = frozenset(
    (
        *("client_id", "redirect_uri", "response_type", "response_mode", "scope", "state", "nonce"),
        *("code_challenge", "code_challenge_method", "resource", "audience"),
    )
)


def read_redirect(value: Any) -> str:
    """Read an address of this machine that a browser is sent back to."""
    if not isinstance(value, str) or not REDIRECT_TEXT.fullmatch(value):
        raise ValueError(
            'expected an address such as "http://127.0.0.1/callback" or "http://localhost"; its '
            "port, if it always has the same, is in the key port"
        )
    return value


def read_parameters(value: Any) -> dict[str, str]:
    """Read what is sent along to the page where a person signs in."""
    found = read_table(value)
    for name in found:
        if name in OURS:
            raise ValueError(f"{name} is not sent along: it is made for each sign-in")
    return found


REDIRECT_TEXT = re.compile(r"http://(?:127\.0\.0\.1|localhost)(?:/[A-Za-z0-9/_.~-]*)?")
REDIRECT = Kind(read_redirect, {"type": "string", "pattern": f"^{REDIRECT_TEXT.pattern}$"})
PARAMETERS = Kind(read_parameters, TABLE.schema)
COMMON = {
    "warn": Field(
        DURATION,
        "How long before a sign-in ends `status` says so.",
        default=timedelta(hours=1),
    ),
    "lasts": Field(
        DURATION, "How long the provider lets a sign-in last, where it does not say so itself."
    ),
    "timeout": Field(DURATION, "The longest one call takes.", default=timedelta(seconds=8)),
    "ca": Field(PATH, "A PEM file of the authorities that the provider's certificate is from."),
}
BROWSER = {
    "port": Field(COUNT, "Where the browser comes back to, on 127.0.0.1; a free one when absent."),
}
LOGINS: dict[str, dict[str, Field]] = {
    "oidc": {
        **COMMON,
        **BROWSER,
        "issuer": Field(URL, "The provider.", required=True, example='"https://login.example.com"'),
        "client_id": Field(TEXT, "As which client.", default="keybroker"),
        "client_secret": Field(LOCAL_REFERENCE, "Where its secret is, should it have one."),
        "scopes": Field(TEXTS, "What is asked for.", default=("openid", "offline_access")),
        "resource": Field(TEXT, "Whom access tokens are for (RFC 8707)."),
        "audience": Field(TEXT, "The same in the words of some providers, such as Auth0."),
        "parameters": Field(
            PARAMETERS,
            'Sent along to the page, such as access_type = "offline" at Google; prompt = "consent" '
            "is, where offline_access is asked for, unless another is named.",
            default={},
        ),
        "token": Field(one_of("access", "id"), "Which of its tokens is used.", default="access"),
        "redirect": Field(
            REDIRECT,
            "The redirect address that the client has there, without its port.",
            default="http://127.0.0.1/callback",
        ),
    },
}
