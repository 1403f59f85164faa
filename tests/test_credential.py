"""A secret shows itself to nobody who does not ask for it by name."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
import pprint
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.credential import (
    LONGEST_SECRET,
    Credential,
    Issuer,
    Lease,
    Reference,
    Secret,
    fingerprint,
    sha256,
)
from keybroker.values import replace

CANARY = "sk-canary-Zx81QpLmWvUt"
SHOWN = f"<secret {hashlib.sha256(CANARY.encode()).hexdigest()[:8]}>"
LEASE = Lease("token-1", "litellm", datetime(2026, 11, 21, tzinfo=UTC))
PRINTABLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)


@pytest.mark.parametrize(
    "show",
    [
        str,
        repr,
        ascii,
        "{}".format,
        "%s".__mod__,
        "%r".__mod__,
        lambda secret: f"{secret}",
        lambda secret: f"{secret!r}",
        pprint.pformat,
    ],
    ids=["str", "repr", "ascii", "format", "%s", "%r", "f", "f!r", "pprint"],
)
def test_a_secret_prints_as_its_fingerprint(show: Callable[[Secret], str]) -> None:
    """Eight digits of its SHA-256 tell two secrets apart and give neither away."""
    assert show(Secret(CANARY)) == SHOWN


def test_what_holds_a_secret_prints_no_more_of_it() -> None:
    """Not in a credential, a container, a log line or a traceback."""
    secret = Secret(CANARY)
    credential = Credential(secret, LEASE)
    record = logging.LogRecord("x", 20, "f", 1, "%s %r", (secret, credential), None)
    try:
        raise RuntimeError(secret, [credential], {secret: credential})
    except RuntimeError as error:
        trace = "".join(traceback.TracebackException.from_exception(error).format())

    shown = [
        repr(credential),
        str([secret]),
        repr({"k": (credential,)}),
        record.getMessage(),
        trace,
    ]

    assert [text for text in shown if CANARY in text] == []
    assert [text for text in shown if SHOWN not in text] == []


@pytest.mark.parametrize(
    "take",
    [
        copy.copy,
        copy.deepcopy,
        json.dumps,
        lambda secret: json.dumps({"key": secret}),
        lambda secret: copy.deepcopy(Credential(secret, LEASE)),
        lambda secret: format(secret, ">40"),
        vars,
        bytes,
        list,
        *(lambda secret, p=p: pickle.dumps(secret, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_a_secret_is_not_taken_along_by_accident(take: Callable[[Secret], object]) -> None:
    """Copying, pickling, JSON, padding and looking inside are refused, without its text."""
    with pytest.raises(TypeError) as refused:
        take(Secret(CANARY))

    assert CANARY not in str(refused.value)


def test_a_secret_is_revealed_to_who_asks() -> None:
    """`reveal` is the one way out."""
    assert Secret(CANARY).reveal() == CANARY


def test_secrets_are_equal_by_their_text() -> None:
    """Two of the same text are one key of a dictionary; text alone is not a secret."""
    assert Secret(CANARY) == Secret(CANARY)
    assert len({Secret(CANARY), Secret(CANARY), Secret("other")}) == 2
    assert (Secret(CANARY) == CANARY, Secret(CANARY) == Secret("other")) == (False, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (f"{CANARY} ", "not one token of printable ASCII"),
        (f"{CANARY}\n", "not one token of printable ASCII"),
        (f"{CANARY}\x00", "not one token of printable ASCII"),
        (f"{CANARY}\x7f", "not one token of printable ASCII"),
        (f"{CANARY}é", "not one token of printable ASCII"),
        (f"{CANARY}\ud800", "not one token of printable ASCII"),
        (f"two {CANARY}", "not one token of printable ASCII"),
        (CANARY + "x" * LONGEST_SECRET, "longer than 16384 characters"),
    ],
    ids=["empty", "space", "newline", "nul", "del", "accent", "surrogate", "words", "long"],
)
def test_what_no_client_could_use_is_refused(text: str, said: str) -> None:
    """One token of printable ASCII of at most 16,384 characters; the text is not repeated."""
    with pytest.raises(ValueError, match=r".") as refused:
        Secret(text)

    assert str(refused.value) == said


def test_the_longest_secret_is_taken() -> None:
    """16,384 characters are what Claude Code takes."""
    assert len(Secret("x" * LONGEST_SECRET).reveal()) == 16_384


@given(st.text())
def test_any_text_is_taken_whole_or_refused_without_a_trace(text: str) -> None:
    """No text raises anything else, and a refusal does not quote it."""
    try:
        secret = Secret(text)
    except ValueError as error:
        assert str(error) in ("empty", "not one token of printable ASCII")
    else:
        assert secret.reveal() == text
        assert text.isascii()
        assert text.isprintable()
        assert " " not in text


@given(st.binary())
def test_our_sha256_is_everybody_s(data: bytes) -> None:
    """The small C module gives what hashlib gives."""
    assert sha256(data) == hashlib.sha256(data).hexdigest()


@given(PRINTABLE)
def test_a_fingerprint_is_the_start_of_the_sha256(text: str) -> None:
    """So that a person can compare it with `sha256sum`."""
    expected = hashlib.sha256(text.encode()).hexdigest()[:8]

    assert (fingerprint(text), Secret(text).fingerprint) == (expected, expected)


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        (Reference("keyring", "litellm-admin"), "keyring:litellm-admin"),
        (Reference("command", ("op", "read", CANARY)), "command:op"),
    ],
)
def test_a_reference_prints_where_a_secret_is(reference: Reference, shown: str) -> None:
    """A program's arguments are left out: people put more into them than they should."""
    assert str(reference) == shown


def test_issuers_are_the_same_when_all_of_them_is() -> None:
    """Another admin key or another authority is another issuer."""
    one = Issuer("litellm", "https://llm.example.com", Reference("env", "ADMIN"))
    others = [
        replace(one, type="bifrost"),
        replace(one, url="https://llm.example.com/two"),
        replace(one, admin=Reference("env", "OTHER")),
        replace(one, ca="/etc/ssl/corp.pem"),
    ]

    assert [other for other in others if other == one] == []
    assert str(one) == "litellm https://llm.example.com"
