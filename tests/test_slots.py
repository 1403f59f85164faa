"""The journal's facts, folded: each event, what contradicts, and what holds for any sequence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.clock import Instant
from keybroker.credential import Issuer, Lease, Reference
from keybroker.slots import Event, Key, Open, Record, Slots, change, fold, replay, without
from keybroker.values import replace

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
HOLD, LIFETIME = 15 * MINUTE, 12 * HOUR
ISSUER = Issuer("litellm", "https://llm.example.com", Reference("keyring", "admin"))
OTHER = replace(ISSUER, url="https://old.example.com")


def lease(label: str) -> Lease:
    return Lease(f"token-of-{label}", "litellm", NOON, NOON + LIFETIME, revocable=True)


def wanted(label: str, at: datetime = NOON, **more: object) -> Record:
    values = {"issuer": ISSUER, "lifetime": LIFETIME, "hold": HOLD, **more}
    return Record(at, Event.WANTED, "work", label, **values)  # type: ignore[arg-type]


def have(label: str, at: datetime = NOON) -> Record:
    return Record(at, Event.HAVE, "work", label, lease=lease(label), fingerprint=f"f-{label}")


def swap(label: str, at: datetime = NOON, **more: object) -> Record:
    return Record(at, Event.SWAP, "work", label, **{"why": "models", **more})  # type: ignore[arg-type]


def retired(label: str, at: datetime = NOON, **more: object) -> Record:
    return Record(at, Event.RETIRED, "work", label, **{"why": "lost", **more})  # type: ignore[arg-type]


def looked(label: str, at: datetime = NOON, **more: object) -> Record:
    return Record(at, Event.LOOKED, "work", label, **more)  # type: ignore[arg-type]


def gone(label: str, at: datetime = NOON) -> Record:
    return Record(at, Event.GONE, "work", label, why="revoked")


def known(*records: Record) -> Slots:
    return replay(records).get("work", Slots())


def key(label: str, **changes: object) -> Key:
    made = Key(label, ISSUER, lease(label), f"f-{label}", LIFETIME, HOLD)
    return replace(made, **changes)  # type: ignore[arg-type]


# each event


def test_wanted_opens_a_label() -> None:
    """With its issuer and numbers, so that it can be looked up without the configuration."""
    slots = known(wanted("a", boot=7.5, boot_id="boot 1"))
    clocks = Instant(NOON, 7.5, "boot 1")
    assert slots == Slots(open=(Open("a", ISSUER, NOON, LIFETIME, HOLD, clocks),), wanted_at=NOON)


def test_have_makes_it_the_new_key() -> None:
    """Of the issuer that was asked; the gateway is known to be well then."""
    slots = known(wanted("a"), have("a", NOON + SECOND))
    assert slots == Slots(next=key("a"), wanted_at=NOON, accepted_at=NOON + SECOND)


def test_a_first_swap_makes_it_current() -> None:
    """The method that verified it is kept."""
    slots = known(wanted("a"), have("a"), swap("a"))
    assert slots == Slots(current=key("a", verified="models"), wanted_at=NOON, accepted_at=NOON)


CURRENT = (wanted("a"), have("a"), swap("a"))
BOTH = (*CURRENT, wanted("b"), have("b"))


def test_a_swap_retires_the_key_before_it() -> None:
    """Until the time that the record says, else for the old key's own hold."""
    end = NOON + HOUR
    slots = known(*BOTH, swap("b", revoke_at=end, boot=9.0, boot_id="boot 1"))
    assert slots.current == key("b", verified="models")
    assert slots.retired == (
        key(
            "a",
            verified="models",
            revoke_at=end,
            retired=Instant(NOON, 9.0, "boot 1"),
            why="replaced",
        ),
    )
    assert slots.next is None
    [old] = known(*BOTH, swap("b", NOON + MINUTE)).retired
    assert old.revoke_at == NOON + MINUTE + HOLD


def test_a_swap_ends_the_wish_for_one() -> None:
    """Whoever asked for a new key has it."""
    slots = replace(known(*BOTH), rotate=True)
    assert fold(slots, swap("b")).rotate is False


def test_a_swap_starts_anew_what_was_counted() -> None:
    """Failures of the new key before it was published are over; so is its pause."""
    slots = known(*BOTH)
    assert slots.next is not None
    tried = replace(slots, next=replace(slots.next, failures=3, not_before=NOON + HOUR))
    current = fold(tried, swap("b")).current
    assert current is not None
    assert (current.failures, current.not_before) == (0, None)


@pytest.mark.parametrize("label", ["a", "b"])
def test_retired_takes_a_key_out(label: str) -> None:
    """The current one or the new one; the other stays."""
    slots = known(*BOTH, retired(label, NOON + MINUTE))
    [old] = slots.retired
    assert (old.label, old.revoke_at, old.why) == (label, NOON + MINUTE + HOLD, "lost")
    left = {one.label for one in (slots.current, slots.next) if one is not None}
    assert left == {"a", "b"} - {label}


def test_a_later_retirement_moves_the_date() -> None:
    """`revoke` does not wait for the hold."""
    [old] = known(*CURRENT, retired("a"), retired("a", revoke_at=NOON)).retired
    assert old.revoke_at == NOON


def test_looked_counts_and_keeps_the_label_open() -> None:
    """And what failed before is forgotten."""
    slots = known(wanted("a"), wanted("b"))
    slots = replace(
        slots, open=tuple(replace(o, failures=2, not_before=NOON + HOUR) for o in slots.open)
    )
    slots = fold(slots, looked("a", NOON + MINUTE, boot=60.0, boot_id="boot 1"))
    first, second = slots.open
    assert (first.looks, first.looked_at, first.failures, first.not_before) == (
        1,
        NOON + MINUTE,
        0,
        None,
    )
    assert first.looked_clocks == Instant(NOON + MINUTE, 60.0, "boot 1")
    assert (second.looks, second.looked_at, second.failures) == (0, None, 2)


@pytest.mark.parametrize(
    "records",
    [
        pytest.param((wanted("a"),), id="open"),
        pytest.param((wanted("a"), have("a")), id="new"),
        pytest.param(CURRENT, id="current"),
        pytest.param((*CURRENT, retired("a")), id="retired"),
    ],
)
def test_gone_ends_a_label_wherever_it_stands(records: tuple[Record, ...]) -> None:
    """Nothing of it is left but when it was wanted."""
    slots = known(*records, gone("a"))
    assert slots.all == ()
    assert slots.wanted_at == NOON


def test_a_new_key_whose_process_ended_is_retired_by_the_next() -> None:
    """Nobody was given it: it is due at once."""
    slots = known(wanted("a"), have("a"), wanted("b"), have("b", NOON + MINUTE))
    assert slots.next == key("b")
    [lost] = slots.retired
    assert (lost.label, lost.revoke_at, lost.why) == ("a", NOON + MINUTE, "never handed out")


def staged(label: str, base: str = "v-1", at: datetime = NOON) -> Record:
    return Record(at, Event.STAGED, "work", label, why=base)


@pytest.mark.parametrize("base", ["v-1", ""])
def test_staged_says_what_the_key_is_to_take_the_place_of(base: str) -> None:
    """Nothing may be what stands there, which is not the same as nothing being begun."""
    slots = known(wanted("a"), have("a"), staged("a", base))
    assert slots.next == key("a", base=base)
    assert known(staged("a")) == Slots()


def test_a_new_key_that_others_may_read_is_kept_until_its_end() -> None:
    """Its process ended, and nobody knows whether it is what is published."""
    slots = known(wanted("a"), have("a"), staged("a"), wanted("b"), have("b", NOON + MINUTE))
    [lost] = slots.retired
    assert (lost.label, lost.revoke_at, lost.why) == ("a", NOON + LIFETIME, "never handed out")


LOST = (wanted("a"), have("a"), staged("a"), retired("a", revoke_at=NOON + LIFETIME))


def test_a_key_that_others_may_read_has_its_hold_after_the_next_is_published() -> None:
    """By the clocks of that moment; the hold is what the swap says, else its own."""
    published = (*LOST, wanted("b"), have("b"), staged("b", "v-2"))
    [old] = known(*published, swap("b", NOON + HOUR, boot=9.0, boot_id="boot 1")).retired
    assert (old.revoke_at, old.why) == (NOON + HOUR + HOLD, "lost")
    assert old.retired == Instant(NOON + HOUR, 9.0, "boot 1")
    [longer] = known(*published, swap("b", NOON + HOUR, revoke_at=NOON + 2 * HOUR)).retired
    assert longer.revoke_at == NOON + 2 * HOUR


def test_a_key_that_others_read_lives_on_when_the_next_is_not_published() -> None:
    """Its profile publishes no more: they have it to its end."""
    published = (wanted("a"), have("a"), staged("a"), swap("a"), wanted("b"), have("b"))
    [old] = known(*published, swap("b", revoke_at=NOON + HOUR)).retired
    assert old.revoke_at == NOON + LIFETIME
    [old] = known(*published, staged("b"), swap("b", revoke_at=NOON + HOUR)).retired
    assert old.revoke_at == NOON + HOUR


def test_a_key_that_is_not_published_changes_nothing_for_others() -> None:
    """Nor does one that is shorten what has less time left."""
    [old] = known(*LOST, wanted("b"), have("b"), swap("b", NOON + HOUR)).retired
    assert old.revoke_at == NOON + LIFETIME
    soon = (*LOST[:-1], retired("a", revoke_at=NOON + MINUTE), wanted("b"), have("b"))
    [old] = known(*soon, staged("b"), swap("b")).retired
    assert old.revoke_at == NOON + MINUTE


def test_numbers_that_the_record_lacks_are_none() -> None:
    """A journal without lifetime and hold still knows the label."""
    [one] = known(wanted("a", lifetime=None, hold=None)).open
    assert (one.lifetime, one.hold, one.clocks) == (timedelta(0), timedelta(0), None)


# what contradicts


@pytest.mark.parametrize(
    ("before", "record"),
    [
        pytest.param((), have("a"), id="have what was never wanted"),
        pytest.param((), swap("a"), id="swap to what is not known"),
        pytest.param((), retired("a"), id="retire what is not known"),
        pytest.param((), looked("a"), id="look up what is not open"),
        pytest.param((), gone("a"), id="end what is not known"),
        pytest.param((wanted("a"),), swap("a"), id="swap to an open label"),
        pytest.param((wanted("a"),), retired("a"), id="retire an open label"),
        pytest.param(BOTH, have("b"), id="have twice"),
        pytest.param(BOTH, have("a"), id="have what is current"),
        pytest.param(BOTH, looked("b"), id="look up what is there"),
        pytest.param((*CURRENT, retired("a")), swap("a"), id="swap back to a retired key"),
        pytest.param((*CURRENT, gone("a")), swap("a"), id="swap to what is gone"),
        pytest.param((*CURRENT, gone("a")), have("a"), id="have what is gone"),
        pytest.param((wanted("a"),), replace(have("a"), lease=None), id="have without a lease"),
        pytest.param((), replace(wanted("a"), issuer=None), id="wanted without an issuer"),
        pytest.param((wanted("a"),), wanted("a"), id="wanted twice"),
        pytest.param(CURRENT, wanted("a"), id="wanted what is current"),
        pytest.param((*CURRENT, retired("a")), wanted("a"), id="wanted what is retired"),
    ],
)
def test_a_contradiction_changes_nothing(before: tuple[Record, ...], record: Record) -> None:
    """The journal is believed in its order; what does not follow is no news."""
    slots = known(*before)
    assert fold(slots, record) == slots


@pytest.mark.parametrize(
    ("before", "record"),
    [
        pytest.param((), wanted("a"), id="wanted"),
        pytest.param((wanted("a"),), have("a"), id="have"),
        pytest.param((wanted("a"), have("a")), swap("a"), id="first swap"),
        pytest.param(BOTH, swap("b"), id="swap"),
        pytest.param(BOTH, retired("a"), id="retired"),
        pytest.param(BOTH, gone("a"), id="gone"),
    ],
)
def test_the_same_record_twice_is_as_once(before: tuple[Record, ...], record: Record) -> None:
    """A worker that died after writing may have its record read and reported."""
    once = known(*before, record)
    assert fold(once, record) == once


# reading a journal


def test_replay_groups_by_profile() -> None:
    """Each profile's records are its own, in their order."""
    elsewhere = [replace(record, profile="home") for record in (wanted("h"), have("h"))]
    mixed = [wanted("a"), elsewhere[0], have("a"), elsewhere[1], swap("a")]
    assert replay(mixed) == {"work": known(*CURRENT), "home": Slots(next=key("h"), **TIMES)}
    assert replay([]) == {}


TIMES = {"wanted_at": NOON, "accepted_at": NOON}


def test_keys_and_all() -> None:
    """Every key, newest standing first, then what is open."""
    slots = known(*BOTH, swap("b"), wanted("c"), have("c"), wanted("d"))
    assert [one.label for one in slots.keys] == ["b", "c", "a"]
    assert [one.label for one in slots.all] == ["b", "c", "a", "d"]
    assert slots.key("c") == key("c")
    assert slots.key("d") is None


@pytest.mark.parametrize("label", ["a", "b", "c"])
def test_change_puts_a_key_back_where_it_stood(label: str) -> None:
    """Current, new or retired."""
    slots = known(*BOTH, swap("b"), wanted("c"), have("c"))
    before = slots.key(label)
    assert before is not None
    changed = change(slots, replace(before, failures=9))
    after = changed.key(label)
    assert after == replace(before, failures=9)
    assert [one.label for one in changed.keys] == [one.label for one in slots.keys]
    assert change(changed, before) == slots


def test_change_of_what_is_not_there_changes_nothing() -> None:
    """The key went meanwhile."""
    slots = known(*BOTH)
    assert change(slots, key("x")) == slots


def test_without_takes_a_key_out_of_every_place() -> None:
    """And leaves open labels alone."""
    slots = known(*BOTH, wanted("c"))
    for label in ("a", "b"):
        slots = without(slots, label)
    assert [one.label for one in slots.all] == ["c"]


# any sequence

LABELS = st.sampled_from(["a", "b", "c", "d"])
MOMENTS = st.integers(-90_000, 90_000).map(lambda seconds: NOON + seconds * SECOND)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A record of any event with anything in it or missing."""
    label = draw(LABELS)
    return Record(
        draw(MOMENTS),
        draw(st.sampled_from(Event)),
        "work",
        label,
        issuer=draw(st.sampled_from([None, ISSUER, OTHER])),
        lease=draw(st.sampled_from([None, lease(label)])),
        lifetime=draw(st.sampled_from([None, LIFETIME])),
        hold=draw(st.sampled_from([None, HOLD])),
        revoke_at=draw(st.none() | MOMENTS),
        why=draw(st.sampled_from(["", "models"])),
        boot=draw(st.sampled_from([None, 0.0, 1e9])),
        boot_id=draw(st.sampled_from(["", "boot 1"])),
    )


ANY = settings(max_examples=300)


@ANY
@given(st.lists(records(), max_size=25))
def test_no_label_stands_in_two_places(sequence: list[Record]) -> None:
    """Whatever is in the journal: a label is open or one key, never two things."""
    slots = Slots()
    for record in sequence:
        slots = fold(slots, record)
        labels = [one.label for one in slots.all]
        assert len(labels) == len(set(labels))
        assert all(one.revoke_at is not None for one in slots.retired)
        assert all(one.revoke_at is None for one in (slots.current, slots.next) if one)


@ANY
@given(st.lists(records(), max_size=25))
def test_what_is_gone_stays_gone(sequence: list[Record]) -> None:
    """Unless it is wanted again, which nobody does: labels are unique."""
    slots, over = Slots(), set()
    for record in sequence:
        slots = fold(slots, record)
        if record.event is Event.GONE:
            over.add(record.label)
        elif record.event is Event.WANTED:
            over.discard(record.label)
        assert over & {one.label for one in slots.all} == set()


@ANY
@given(st.lists(records(), max_size=25))
def test_a_key_is_lost_only_by_gone(sequence: list[Record]) -> None:
    """Promise 3: no other record makes a label disappear."""
    slots = Slots()
    for record in sequence:
        before = {one.label for one in slots.all}
        slots = fold(slots, record)
        lost = before - {one.label for one in slots.all}
        assert lost <= ({record.label} if record.event is Event.GONE else set())


@ANY
@given(st.lists(records(), max_size=25))
def test_a_key_is_revoked_where_it_was_minted(sequence: list[Record]) -> None:
    """The issuer of a key is that of its label's wanted record, whatever others say."""
    slots, issuers = Slots(), {}
    for record in sequence:
        if record.event is Event.WANTED and record.label not in {o.label for o in slots.all}:
            issuers[record.label] = record.issuer
        slots = fold(slots, record)
        assert all(one.issuer == issuers[one.label] for one in slots.all)
