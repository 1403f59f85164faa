"""A label is our name for one issue: unique, sorted by time, known by its shape."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.config import NAME
from keybroker.label import LETTERS, is_label, new_label, prefix

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
INSTANCE = "50337698"
GOOD = "kb-50337698-work-01m7zeppq60nxge04zbh7s1w6p"


def test_its_parts_are_installation_profile_and_ulid() -> None:
    """What a person can read off a list of keys at the gateway."""
    label = new_label(INSTANCE, "work", NOON)
    assert label.startswith("kb-50337698-work-")
    assert len(label.removeprefix("kb-50337698-work-")) == 26
    assert label.startswith(prefix(INSTANCE))


@given(st.integers(-20_000, 1_000_000), st.from_regex(NAME, fullmatch=True))
def test_any_label_that_we_make_is_known(days: int, profile: str) -> None:
    """At any time, of any profile that the configuration allows."""
    label = new_label(INSTANCE, profile, NOON + timedelta(days=days))
    assert is_label(label)
    assert label.startswith(f"{prefix(INSTANCE)}{profile}-")


def test_labels_of_one_moment_differ() -> None:
    """Ten thousand in the same millisecond are ten thousand."""
    assert len({new_label(INSTANCE, "work", NOON) for _ in range(10_000)}) == 10_000


def test_the_time_is_the_ulids() -> None:
    """Its first ten letters are the milliseconds since 1970, in Crockford's alphabet."""
    label = new_label(INSTANCE, "work", NOON + timedelta(microseconds=123_999))
    number = 0
    for letter in label[-26:-16]:
        number = number * 32 + LETTERS.index(letter)
    assert number == int(NOON.timestamp()) * 1000 + 123


@given(st.lists(st.integers(0, 10**14), min_size=2, max_size=20, unique=True))
def test_labels_sort_by_time(milliseconds: list[int]) -> None:
    """As text, to the millisecond."""
    start = datetime(1970, 1, 1, tzinfo=UTC)
    moments = [start + timedelta(milliseconds=at) for at in sorted(milliseconds)]
    labels = [new_label(INSTANCE, "work", moment) for moment in moments]
    assert labels == sorted(labels)


def test_the_alphabet_has_no_letters_that_look_alike() -> None:
    """32 of them, in order, without i, l, o and u."""
    assert len(LETTERS) == 32
    assert sorted(LETTERS) == list(LETTERS)
    assert set("ilou") & set(LETTERS) == set()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kb-",
        GOOD.upper(),
        GOOD[1:],
        GOOD[:-1],
        f"{GOOD}a",
        f"{GOOD}\n",
        f" {GOOD}",
        GOOD.replace("50337698", "5033769"),
        GOOD.replace("50337698", "503376981"),
        GOOD.replace("work", ""),
        GOOD.replace("work", "-work"),
        GOOD.replace("work", "w" * 33),
        GOOD.replace("work", "wörk"),
        GOOD.replace("work", "\x1b[31mwork"),
        GOOD.replace("kb-", "sk-"),
        "sk-1234567890abcdef",
    ],
)
def test_other_text_is_no_label(text: str) -> None:
    """A gateway's list has other people's names, and perhaps a terminal's control codes."""
    assert not is_label(text)


def test_a_good_one() -> None:
    """The one of the documentation, and one of the longest name."""
    assert is_label(GOOD)
    assert is_label(GOOD.replace("work", "w" * 32))
