"""What a `[logins.NAME]` table of each type holds."""

from datetime import timedelta

from keybroker.fields import (
    COUNT,
    DURATION,
    LOCAL_REFERENCE,
    PATH,
    TEXT,
    TEXTS,
    URL,
    Field,
    one_of,
)

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
        "token": Field(one_of("access", "id"), "Which of its tokens is used.", default="access"),
        "redirect": Field(
            TEXT, "The path of the redirect address that the client has there.", default="/callback"
        ),
    },
}
