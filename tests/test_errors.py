"""An error says what to do next, and arrives on the other side of a pipe as what it was."""

from __future__ import annotations

from datetime import timedelta

import pytest

from keybroker import errors
from keybroker.errors import CLASSES, KeybrokerError, SourceError, SourceUnavailable
from keybroker.pool import decode_error
from keybroker.worker import encode_error

EXIT_STATUS = {
    "ConfigError": 78,
    "SourceUnavailable": 75,
    "SourceDenied": 77,
    "LoginNeeded": 77,
    "SourceInvalid": 77,
    "CacheError": 69,
    "CacheLocked": 69,
    "CacheUnreadable": 69,
    "JournalError": 69,
    "NotReady": 75,
    "NobodyAnswers": 69,
    "OutputLost": 74,
    "KeybrokerError": 70,
}


def descendants(kind: type[KeybrokerError]) -> set[type[KeybrokerError]]:
    """Return a class and all below it that this package defines."""
    found = {kind}
    for child in kind.__subclasses__():
        found |= descendants(child)
    return {one for one in found if one.__module__ == errors.__name__}


def test_each_class_has_its_documented_exit_status() -> None:
    """69 nobody answers, 75 later, 77 refused, 78 configuration, 70 our own mistake."""
    statuses = {kind.__name__: kind.exit_status for kind in CLASSES.values()}

    assert statuses == EXIT_STATUS


def test_every_class_is_found_by_its_code() -> None:
    """A class that is raised can be named in a worker's answer; SourceError itself is not."""
    assert set(CLASSES.values()) == descendants(KeybrokerError) - {SourceError}
    assert all(CLASSES[kind.code] is kind for kind in CLASSES.values())


def test_a_message_and_its_hint_are_kept_apart() -> None:
    """`str` of an error is its message; the hint is for another line."""
    error = KeybrokerError("vault: permission denied", hint="type: vault login")

    assert (str(error), error.message, error.hint) == (
        "vault: permission denied",
        "vault: permission denied",
        "type: vault login",
    )


@pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda kind: kind.code)
def test_an_error_comes_out_of_a_worker_as_it_went_in(kind: type[KeybrokerError]) -> None:
    """Class, message and hint cross the pipe."""
    sent = kind("litellm: it is so", hint="do this")

    received = decode_error(encode_error(sent))

    assert type(received) is kind
    assert (received.message, received.hint) == ("litellm: it is so", "do this")


def test_what_a_source_said_about_trying_again_crosses_the_pipe() -> None:
    """Whether a call may have been committed, and how long the server asks to wait."""
    sent = SourceUnavailable("litellm: busy", unknown=True, retry_after=timedelta(seconds=90))

    received = decode_error(encode_error(sent))

    assert isinstance(received, SourceUnavailable)
    assert (received.unknown, received.retry_after) == (True, timedelta(seconds=90))


def test_an_unknown_code_is_an_error_of_our_own() -> None:
    """A worker of another version cannot raise what we do not know."""
    received = decode_error({"code": "from-the-future", "message": "m"})

    assert (type(received), received.message) == (KeybrokerError, "m")
