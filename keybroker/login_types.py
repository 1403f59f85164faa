"""What a `[logins.NAME]` table of each type holds."""

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from keybroker.credential import Reference
from keybroker.fields import (
    DURATION,
    GATEWAY,
    GITHUB,
    LOCAL_REFERENCE,
    MOUNT,
    PATH,
    TABLE,
    TEXT,
    TEXTS,
    URL,
    Field,
    Kind,
    one_of,
    read_local_reference,
    read_table,
)
from keybroker.vault import PLACE

NONE, CLIENT, BEARER, EXCHANGE = "none", "client_credentials", "jwt_bearer", "token_exchange"
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


def read_jwt(value: Any) -> str | Reference:
    """Read where a JWT is, or who gives one."""
    if value == GITHUB:
        return GITHUB
    try:
        return read_local_reference(value)
    except ValueError as error:
        raise ValueError(f'{error}; or "{GITHUB}"') from None


def read_port(value: Any) -> int:
    """Read a port of this machine's."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= HIGHEST_PORT:
        raise ValueError(f"expected a port, from 1 to {HIGHEST_PORT}")
    return value


HIGHEST_PORT = (1 << 16) - 1
PORT = Kind(read_port, {"type": "integer", "minimum": 1, "maximum": HIGHEST_PORT})
JWT = Kind(read_jwt, {"oneOf": [{"const": GITHUB}, LOCAL_REFERENCE.schema]})
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
    "port": Field(PORT, "Where the browser comes back to, on 127.0.0.1; a free one when absent."),
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
    "gateway": {
        **COMMON,
        "url": Field(
            URL,
            "The gateway, as /login of Claude Code takes it: with /claude_code_gateway at LiteLLM, "
            "with /claude-code at Bifrost.",
            required=True,
            example=GATEWAY,
        ),
        "client_id": Field(TEXT, "As which client; the gateways named here want none."),
    },
    "litellm": {
        **COMMON,
        **BROWSER,
        "url": Field(URL, "The proxy.", required=True, example=GATEWAY),
        "team": Field(
            TEXT,
            "Of somebody in several teams who signs in with a code: the one that it is for, by id "
            "or name. In a browser it is chosen on the page.",
        ),
    },
    "workload": {
        **COMMON,
        "jwt": Field(
            JWT, 'What says who this machine is: "github-actions", or where a JWT of it is.'
        ),
        "jwt_audience": Field(TEXT, "Whom the JWT of GitHub's is for."),
        "grant": Field(
            one_of(NONE, CLIENT, BEARER, EXCHANGE),
            "What the provider is asked for; none: the JWT is used as it is.",
            default=NONE,
        ),
        "issuer": Field(URL, "The provider."),
        "token_url": Field(URL, "In place of it, where it gives tokens, should it not say so."),
        "client_id": Field(TEXT, "As which client."),
        "client_secret": Field(LOCAL_REFERENCE, "Where its secret is."),
        "private_key": Field(
            PATH, "In place of a secret, the file of a key that signs for the client: PEM or JWK."
        ),
        "key_id": Field(TEXT, "What the provider calls that key."),
        "jwt_type": Field(
            one_of("jwt", "id_token", "access_token"),
            "As what the JWT is exchanged (token_exchange).",
            default="jwt",
        ),
        "scopes": Field(TEXTS, "What is asked for.", default=()),
        "resource": Field(TEXT, "Whom the token is for (RFC 8707)."),
        "audience": Field(TEXT, "The same in the words of others, and of RFC 8693."),
    },
    "aws-sso": {
        **COMMON,
        "session": Field(TEXT, "The [sso-session NAME] of ~/.aws/config."),
        "start_url": Field(URL, "AWS's page of the company; the session's when absent."),
        "region": Field(TEXT, "Where IAM Identity Center is; the session's when absent."),
        "scopes": Field(TEXTS, "What is asked for; the session's when absent.", default=()),
    },
    "openrouter": {
        **COMMON,
        **BROWSER,
        "url": Field(URL, "OpenRouter itself.", default="https://openrouter.ai"),
    },
    "vault": {
        **COMMON,
        **PLACE,
        "mount": Field(MOUNT, "Where the oidc method is mounted.", default="oidc"),
        "role": Field(TEXT, "The role; the method's default one when absent."),
        "port": Field(
            PORT,
            "Where the browser comes back to, on localhost: as the role's allowed_redirect_uris "
            "have it.",
            default=8250,
        ),
    },
}


def contradictions(kind: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a table that do not go together with the others, and why."""
    if kind == "aws-sso" and settings["session"] is None:
        for name in ("start_url", "region"):
            if settings[name] is None:
                yield name, "is missing; or name the session of ~/.aws/config that has it"
    if kind != "workload":
        return
    grant, jwt = settings["grant"], settings["jwt"]
    given = {name for name, value in settings.items() if value not in (None, ())}
    ours = given & {"client_secret", "private_key"}
    if settings["jwt_audience"] is not None and jwt != GITHUB:
        yield "jwt_audience", f'is for jwt = "{GITHUB}"; who makes another one knows whom it is for'
    if grant == NONE:
        for name in ("issuer", "token_url", "client_id", *ours, "scopes", "resource", "audience"):
            if name in given:
                yield name, f'nobody is asked; say for what: grant = "{CLIENT}" or another'
    elif len(given & {"issuer", "token_url"}) != 1:
        yield "issuer", "give issuer or token_url: who is asked for a token"
    if grant != CLIENT and jwt is None:
        yield "jwt", f'there is nothing that says who this is: jwt = "{GITHUB}" or {{ file = … }}'
    if grant == CLIENT and len(ours | (given & {"jwt"})) != 1:
        yield (
            "grant",
            "needs one of client_secret, private_key and jwt: by what the client is known",
        )
    if len(ours) == 2:
        yield "private_key", "is in place of client_secret; take one of them out"
    if (ours or grant == CLIENT) and "client_id" not in given:
        yield "client_id", "is missing: whose secret, key or JWT it is"
    if "key_id" in given and "private_key" not in given:
        yield "key_id", "is the name of private_key, which is not there"
