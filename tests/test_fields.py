"""The kinds of value that a configuration holds; no refusal repeats what was refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker import fields
from keybroker.credential import Reference
from keybroker.fields import read_duration, read_reference, read_url, show_duration

CANARY = "sk-canary-Zx81QpLmWvUt"


def refusal(read: Callable[[Any], Any], value: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        read(value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("250ms", timedelta(milliseconds=250)),
        ("1s", timedelta(seconds=1)),
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("1.5h", timedelta(minutes=90)),
        ("30d", timedelta(days=30)),
        ("0.001ms", timedelta(microseconds=1)),
        ("3650d", timedelta(days=3650)),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, length: timedelta) -> None:
    """ms, s, m, h or d."""
    assert read_duration(text) == length


@pytest.mark.parametrize(
    "value",
    [
        *("", "15", "m", "15 m", "15M", "1h30m", "-1s", "+1s", ".5s", "1e3s", "٣s", "15m\n"),
        *("1234567890s", "1.1234567s", 15, 1.5, True, None, ["15m"], CANARY),
    ],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    """The message says how one is written."""
    said = 'expected a duration such as "90s", "15m" or "12h"'

    assert refusal(read_duration, value) == said


@pytest.mark.parametrize("text", ["0s", "0.000001ms", "3651d", "999999999d", "999999999.999999d"])
def test_a_duration_has_bounds(text: str) -> None:
    """None at all, or longer than anyone will be here, is a slip of the finger."""
    said = "expected a duration above zero and of at most ten years"

    assert refusal(read_duration, text) == said


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (timedelta(milliseconds=1500), "1500ms"),
        (timedelta(seconds=90), "90s"),
        (timedelta(minutes=90), "90m"),
        (timedelta(hours=12), "12h"),
        (timedelta(days=30), "30d"),
        (timedelta(microseconds=100), "0.0001s"),
        (timedelta(seconds=1234, microseconds=567891), "1234.567891s"),
    ],
)
def test_a_duration_is_shown_in_its_largest_whole_unit(length: timedelta, text: str) -> None:
    """As a person would have typed it."""
    assert show_duration(length) == text


@given(st.timedeltas(timedelta(microseconds=1), timedelta(days=3650)))
def test_a_duration_that_is_shown_can_be_typed_back(length: timedelta) -> None:
    """What an error suggests, and what `config show` prints, is read as the same length."""
    assert read_duration(show_duration(length)) == length


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("https://llm.example.com", "https://llm.example.com"),
        ("https://llm.example.com/", "https://llm.example.com"),
        ("http://127.0.0.1:4000/a/b/", "http://127.0.0.1:4000/a/b"),
        ("http://[::1]:4000", "http://[::1]:4000"),
    ],
)
def test_an_address_keeps_its_path(value: str, url: str) -> None:
    """Only slashes at its end are dropped."""
    assert read_url(value) == url


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("llm.example.com", "begin with https:// or http://"),
        ("ftp://llm.example.com", "begin with https:// or http://"),
        ("file:///etc/passwd", "begin with https:// or http://"),
        ("https://", "expected an address"),
        ("https://:4000", "expected an address"),
        ("https://llm.example.com:0", "expected an address"),
        ("https://llm.example.com:99999", "expected an address"),
        ("https://llm.example.com:http", "expected an address"),
        ("https://[llm.example.com", "expected an address"),
        ("https://llm example.com", "expected an address"),
        ("https://llm.example.com\r\nx: y", "expected an address"),
        ("https://llm.exämple.com", "expected an address"),
        (f"https://me:{CANARY}@llm.example.com", "must not hold a user name or a password"),
        (f"https://{CANARY}@llm.example.com", "must not hold a user name or a password"),
        (f"https://llm.example.com/?key={CANARY}", "must not hold ? or #"),
        (f"https://llm.example.com/#{CANARY}", "must not hold ? or #"),
        (CANARY, "begin with https:// or http://"),
        (443, "expected an address"),
        (None, "expected an address"),
    ],
)
def test_what_is_no_address_is_refused(value: object, said: str) -> None:
    """An address holds a scheme, a host, perhaps a port and a path; nothing that may be secret."""
    message = refusal(read_url, value)

    assert said in message
    assert CANARY not in message


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ({"env": "ADMIN"}, Reference("env", "ADMIN")),
        ({"file": "~/admin"}, Reference("file", "~/admin")),
        ({"keyring": "litellm-admin"}, Reference("keyring", "litellm-admin")),
        ({"command": ["op", "read", "x"]}, Reference("command", ("op", "read", "x"))),
    ],
)
def test_a_reference_says_where_a_secret_is(value: object, reference: Reference) -> None:
    """A variable, a file, an entry of the keyring, or a program that prints it."""
    assert read_reference(value) == reference


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (CANARY, "never a key itself"),
        ([CANARY], "never a key itself"),
        (None, "never a key itself"),
        ({}, "expected exactly one of env, file, keyring, command, credential, login, vault"),
        (
            {"env": "A", "file": CANARY},
            "expected exactly one of env, file, keyring, command, credential, login, vault",
        ),
        (
            {CANARY: "x"},
            "expected exactly one of env, file, keyring, command, credential, login, vault",
        ),
        (
            {"gcp": CANARY},
            "expected exactly one of env, file, keyring, command, credential, login, vault, aws",
        ),
        ({"aws": CANARY}, "never a key itself"),
        ({"aws": "llm admin"}, "expected a name or an ARN after aws"),
        ({"aws": "llm/admin#key"}, "expected a name or an ARN after aws"),
        ({"aws": "llm/admin#/"}, "expected a name or an ARN after aws"),
        ({"aws": ""}, "expected text after aws"),
        ({"vault": "secret/data/llm/key"}, "expected a path and a field after vault"),
        ({"vault": "/v1/secret/data/llm#key"}, "expected a path and a field after vault"),
        ({"env": CANARY}, "never a key itself"),
        ({"file": CANARY}, "never a key itself"),
        ({"keyring": CANARY}, "never a key itself"),
        ({"env": "TWO WORDS"}, "never a key itself"),
        ({"env": ""}, "expected text after env"),
        ({"keyring": 7}, "expected text after keyring"),
        ({"file": "a\x00b"}, "expected text after file"),
        ({"command": CANARY}, "expected a program and its arguments"),
        ({"command": []}, "expected a program and its arguments"),
        ({"command": ["op", 1]}, "expected a program and its arguments"),
    ],
)
def test_what_is_no_reference_is_refused(value: object, said: str) -> None:
    """A key that was pasted in a reference's place is not repeated."""
    message = refusal(read_reference, value)

    assert said in message
    assert CANARY not in message


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (fields.read_text, ["x", "two words"], ["", "a\x00", 1, None, ["x"]]),
        (fields.read_boolean, [True, False], [0, 1, "true", None]),
        (fields.read_count, [1, 99], [0, -1, 1.0, True, "1", None]),
        (fields.read_amount, [1, 0.5], [0, -1, True, "1", float("nan"), float("inf"), 1e12]),
        (fields.read_texts, [[], ["a", "b"]], ["a", [""], [1], {"a": "b"}]),
        (fields.read_table, [{}, {"a": "b"}], [{"a": 1}, {"a": ""}, ["a"], "a"]),
        (fields.read_headers, [{"X-Org-Route": "eng"}], [{"X Y": "z"}, {"": "z"}, {"X": "é"}]),
        (fields.one_of("a", "b").read, ["a", "b"], ["c", "", None, 1, ["a"], {"a": "b"}]),
    ],
    ids=["text", "boolean", "count", "amount", "texts", "table", "headers", "one of"],
)
def test_a_kind_takes_its_values_and_no_others(
    read: Callable[[Any], Any], good: list[object], bad: list[object]
) -> None:
    """A value of another type is refused, never converted."""
    taken = [read(value) for value in good]

    assert [list(t) if isinstance(t, tuple) else t for t in taken] == good
    assert all(
        refusal(read, value).startswith(("expected", "a header", "the value")) for value in bad
    )


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "COOKIE", "Proxy-Authorization"])
def test_a_header_that_carries_a_credential_is_refused(name: str) -> None:
    """The file holds no secret; the source sends what is needed."""
    message = refusal(fields.read_headers, {name: "abc-canary"})

    assert message == f"header {name} would carry a secret; the source sends it itself"


@pytest.mark.parametrize(
    "headers", [{"X-Key": CANARY}, {CANARY: "é"}, {"X-Key": f"Bearer {CANARY}"}]
)
def test_a_header_does_not_smuggle_a_key(headers: dict[str, str]) -> None:
    """A header's value that looks like a key is refused and not repeated."""
    assert CANARY not in refusal(fields.read_headers, headers)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(CANARY),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("command"), inner),
    max_leaves=6,
)
KINDS = [
    fields.TEXT,
    fields.TEXTS,
    fields.TABLE,
    fields.HEADERS,
    fields.BOOLEAN,
    fields.COUNT,
    fields.AMOUNT,
    fields.URL,
    fields.DURATION,
    fields.COMMAND,
    fields.REFERENCE,
    fields.one_of("a", "b"),
]


@given(st.sampled_from(KINDS), JSON)
def test_any_value_is_read_or_refused_without_being_repeated(
    kind: fields.Kind, value: object
) -> None:
    """Nothing but ValueError comes out of a kind, and never a key that was put in."""
    try:
        kind.read(value)
    except ValueError as error:
        assert CANARY not in str(error)
