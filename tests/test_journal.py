"""The journal keeps what was issued and not yet revoked, and never makes a key up."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.chain import Chain
from keybroker.credential import Issuer, Lease, Reference
from keybroker.errors import JournalError
from keybroker.journal import Journal, decode, encode, read_time, write_time
from keybroker.paths import JOURNAL, Disk
from keybroker.slots import Event, Key, Open, Record, Slots, replay

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
ISSUER = Issuer("litellm", "https://llm.example.com", Reference("env", "ADMIN"))

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SOME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ZONES = st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours)))
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1), timezones=ZONES)  # noqa: DTZ001
LENGTHS = st.timedeltas(timedelta(0), timedelta(days=3650))
REFERENCES = st.builds(Reference, st.sampled_from(["env", "file", "keyring"]), SOME) | st.builds(
    Reference, st.just("command"), st.lists(SOME, min_size=1, max_size=3).map(tuple)
)
ISSUERS = st.builds(Issuer, TEXTS, TEXTS, st.none() | REFERENCES, st.none() | TEXTS)
LEASES = st.builds(
    Lease,
    id=TEXTS,
    source=TEXTS,
    issued_at=MOMENTS,
    expires_at=st.none() | MOMENTS,
    renewable=st.just(False),
    revocable=st.booleans(),
)
RECORDS = st.builds(
    Record,
    at=MOMENTS,
    event=st.sampled_from(Event),
    profile=TEXTS,
    label=TEXTS,
    issuer=st.none() | ISSUERS,
    lease=st.none() | LEASES,
    fingerprint=TEXTS,
    lifetime=st.none() | LENGTHS,
    hold=st.none() | LENGTHS,
    revoke_at=st.none() | MOMENTS,
    why=TEXTS,
    boot=st.none() | st.floats(0, 1e9),
    boot_id=st.just(""),
) | st.builds(
    Record,
    at=MOMENTS,
    event=st.sampled_from(Event),
    profile=TEXTS,
    label=TEXTS,
    boot=st.floats(0, 1e9),
    boot_id=TEXTS,
)


def record(minute: int, event: Event, label: str, profile: str = "work", **more: Any) -> Record:
    """Return a record as a worker writes it: what its event has, and no more."""
    at = NOON + timedelta(minutes=minute)
    if event is Event.WANTED:
        more = {"issuer": ISSUER, "lifetime": 12 * HOUR, "hold": HOUR / 4, **more}
    if event is Event.HAVE:
        lease = Lease(f"token-{label}", "litellm", at, at + 12 * HOUR, revocable=True)
        more = {"lease": lease, "fingerprint": f"f-{label}", **more}
    return Record(at, event, profile, label, **more)


LIFE = [
    record(0, Event.WANTED, "a"),
    record(1, Event.HAVE, "a"),
    record(2, Event.SWAP, "a", why="models"),
    record(3, Event.WANTED, "b"),
    record(4, Event.HAVE, "b"),
    record(5, Event.SWAP, "b", why="models", revoke_at=NOON + HOUR),
    record(6, Event.WANTED, "c"),
    record(7, Event.LOOKED, "c"),
]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal with the life of two keys and an open label."""
    found = Journal(tmp_path)
    for one in LIFE:
        found.write(one)
    return found


def chained(state: Path, records: list[Record]) -> Journal:
    """Put records into a journal at once, each as its line has it."""
    Chain(state / JOURNAL, "journal").rewrite(encode(one) for one in records)
    return Journal(state)


def refused(journal: Journal) -> str:
    with pytest.raises(JournalError) as error:
        journal.read()
    return error.value.message


@given(RECORDS)
def test_every_record_comes_back_from_its_line(one: Record) -> None:
    """Each field alone and all together, through JSON, to the microsecond."""
    assert decode(json.loads(json.dumps(encode(one)))) == one


@given(MOMENTS)
def test_a_time_is_written_in_utc(moment: datetime) -> None:
    """Whatever its zone was."""
    assert write_time(moment).endswith("Z")
    assert read_time(write_time(moment)) == moment
    assert read_time(write_time(moment)).tzinfo is UTC


@pytest.mark.parametrize("year", [1, 999, 1000, 9999])
def test_a_time_of_any_year_can_be_read_back(year: int) -> None:
    """Go's programs, Vault among them, write the year 1 where there is no time."""
    moment = datetime(year, 1, 1, tzinfo=UTC)
    assert read_time(write_time(moment)) == moment


def test_a_line_is_as_it_is_documented() -> None:
    """What is empty is left out."""
    assert encode(LIFE[0]) == {
        "at": "2026-11-21T12:00:00.000000Z",
        "event": "wanted",
        "profile": "work",
        "label": "a",
        "issuer": {
            "type": "litellm",
            "url": "https://llm.example.com",
            "admin": {"env": "ADMIN"},
        },
        "lifetime_s": 43200.0,
        "hold_s": 900.0,
    }


def test_records_are_read_in_the_order_of_their_writing(journal: Journal) -> None:
    """By this process and by the next."""
    assert journal.read() == LIFE


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Nothing was ever minted."""
    assert Journal(tmp_path).read() == []


def test_what_was_written_is_on_the_disk(tmp_path: Path) -> None:
    """Each record is synced before `write` returns: a key is minted on the strength of it."""
    synced: list[bytes] = []

    class Watched(Disk):
        def sync(self, path: Path) -> None:
            super().sync(path)
            synced.append(path.read_bytes())

    for one in LIFE:
        Journal(tmp_path, Watched()).write(one)

    assert [data.count(b"\n") for data in synced] == list(range(2, len(LIFE) + 2))


def test_a_torn_record_is_not_there(journal: Journal, tmp_path: Path) -> None:
    """Nothing was done on the strength of it; the next one takes its place."""
    file = tmp_path / JOURNAL
    file.write_bytes(file.read_bytes()[:-9])

    torn = journal.read()
    journal.write(LIFE[-1])

    assert torn == LIFE[:-1]
    assert journal.read() == LIFE


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"event": "exploded"},
        {"at": "yesterday"},
        {"at": "2026-11-21T12:00:00"},
        {"at": "0001-01-01T00:00:00+14:00"},
        {"at": 7},
        {"profile": None},
        {"label": ["a"]},
        {"issuer": "litellm"},
        {"issuer": {"type": "litellm"}},
        {"issuer": {"type": "litellm", "url": "u", "admin": {}}},
        {"issuer": {"type": "litellm", "url": "u", "admin": {"env": "A", "file": "B"}}},
        {"issuer": {"type": "litellm", "url": "u", "admin": {"command": [1]}}},
        {"lease": {"id": "x"}},
        {"lease": {"id": 7, "source": "s", "issued_at": "2026-11-21T12:00:00Z"}},
        {"lifetime_s": "12h"},
        {"lifetime_s": 1e400},
        {"hold_s": 1e300},
        {"hold_s": None},
        {"revoke_at": "later"},
        {"why": 7},
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    """A chain that holds does not make a record of anything."""
    good = {"at": "2026-11-21T12:00:00Z", "event": "gone", "profile": "p", "label": "l"}
    chain = Chain(tmp_path / JOURNAL, "journal")
    chain.append(good, sync=False)
    chain.append({**good, **values} if values else values, sync=False)

    assert refused(Journal(tmp_path)) == f"journal: {tmp_path / JOURNAL}: line 3 is damaged"


def test_a_journal_on_a_failing_disk_is_an_error(tmp_path: Path) -> None:
    """Nothing may be minted when what was minted cannot be written down."""

    class Full(Disk):
        def append(self, path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(JournalError) as error:
        Journal(tmp_path, Full()).write(LIFE[0])

    assert error.value.message == (
        f"journal: {tmp_path / JOURNAL}: cannot be written (No space left on device)"
    )
    assert Journal(tmp_path).read() == []


# compaction


def essence(slots: Slots) -> dict[str, Any]:
    """Return what must survive: every live label as it stands, and when the newest was wanted."""

    def place(one: Key | Open) -> str:
        if isinstance(one, Open):
            return "open"
        if one is slots.current:
            return "current"
        return "next" if one is slots.next else "retired"

    return {
        "wanted_at": slots.wanted_at,
        "all": {one.label: (place(one), one) for one in slots.all},
    }


def survives(state: Path, records: list[Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compact records however few they are; return what was known before and what is after."""
    journal = chained(state, records)
    before = replay(journal.read())
    journal.compact(above=0)
    after = replay(journal.read())
    return (
        {name: essence(slots) for name, slots in before.items()},
        {name: essence(after.get(name, Slots())) for name in before},
    )


def test_a_short_journal_is_left_alone(journal: Journal, tmp_path: Path) -> None:
    """Rewriting is for those that grew."""
    before = (tmp_path / JOURNAL).read_bytes()

    journal.compact()

    assert (tmp_path / JOURNAL).read_bytes() == before


def test_what_is_over_is_dropped(tmp_path: Path) -> None:
    """A long life of keys leaves the live ones, and the chain goes on."""
    records = []
    for n in range(120):
        label = f"k-{n:03}"
        records += [
            record(10 * n, Event.WANTED, label),
            record(10 * n + 1, Event.HAVE, label),
            record(10 * n + 2, Event.SWAP, label, revoke_at=NOON + timedelta(minutes=10 * n + 20)),
        ]
        if n > 1:
            records.append(record(10 * n + 3, Event.GONE, f"k-{n - 2:03}"))
    journal = chained(tmp_path, records)
    before = essence(replay(journal.read())["work"])
    journal.compact()
    compacted = journal.read()
    journal.write(record(5000, Event.GONE, "k-118"))

    assert essence(replay(compacted)["work"]) == before
    assert list(before["all"]) == ["k-119", "k-118"]
    assert len(compacted) < 10
    assert max(one.at for one in compacted) == max(one.at for one in records)
    assert list(essence(replay(journal.read())["work"])["all"]) == ["k-119"]


def test_a_key_whose_replacement_is_gone_first_stays_retired(tmp_path: Path) -> None:
    """The one that replaced it was revoked at once, its own revocation is still refused."""
    records = [
        *LIFE[:6],
        record(6, Event.RETIRED, "b", revoke_at=NOON, why="by request"),
        record(7, Event.GONE, "b"),
        record(8, Event.WANTED, "c"),
    ]

    before, after = survives(tmp_path, records)

    assert before["work"]["all"]["a"][0] == "retired"
    assert after == before


def test_what_is_known_of_a_key_that_is_published_is_kept(tmp_path: Path) -> None:
    """What stood there before it, and that another took the place of one that was lost."""
    records = [
        *(record(0, Event.WANTED, "a"), record(1, Event.HAVE, "a")),
        record(2, Event.STAGED, "a"),
        record(3, Event.RETIRED, "a", revoke_at=NOON + timedelta(hours=9), why="lost"),
        *(record(4, Event.WANTED, "b"), record(5, Event.HAVE, "b")),
        record(6, Event.STAGED, "b", why="6d0f3c1e"),
        record(7, Event.SWAP, "b"),
        *(record(8, Event.WANTED, "c"), record(9, Event.GONE, "c")),
    ]

    before, after = survives(tmp_path, records)

    keys = after["work"]["all"]
    assert {label: one[1].base for label, one in keys.items()} == {"a": "", "b": "6d0f3c1e"}
    assert keys["a"][1].revoke_at < NOON + timedelta(hours=9)
    assert after == before


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """Draw what may happen to a few keys: mostly what can, now and then what should not."""
    records: list[Record] = []
    known: list[tuple[str, str]] = []  # profile and label
    for minute in range(draw(st.integers(1, 24))):
        event = draw(st.sampled_from([*Event, Event.WANTED, Event.GONE, Event.GONE]))
        if event is Event.WANTED or not known:
            known.append((draw(st.sampled_from(["work", "home"])), f"k-{minute}"))
            records.append(record(minute, Event.WANTED, known[-1][1], known[-1][0]))
            usual = [Event.HAVE, Event.SWAP][: draw(st.sampled_from([2, 2, 2, 1, 0]))]
            records += [record(minute, one, known[-1][1], known[-1][0]) for one in usual]
            continue
        profile, label = draw(st.sampled_from(known))
        later = NOON + timedelta(minutes=minute + 7)
        dated = event in (Event.SWAP, Event.RETIRED) and draw(st.booleans())
        more: dict[str, Any] = {"revoke_at": later} if dated else {}
        if draw(st.booleans()):
            more |= {"boot": 60.0 * minute, "boot_id": "boot-1"}
        records.append(record(minute, event, label, profile, **more))
    return records


@settings(max_examples=60)  # each of them rewrites a synced file twice
@given(histories())
def test_compaction_forgets_nothing_that_is_alive(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    """Whatever happened in whatever order: what was known before is known after, and again."""
    state = tmp_path_factory.mktemp("j")
    before, after = survives(state, records)
    newest = Journal(state).read()[-1]
    Journal(state).compact(above=0)
    again = replay(Journal(state).read())

    assert after == before
    assert {name: essence(again.get(name, Slots())) for name in before} == before
    assert newest == records[-1]


# damage


WHOLE = [
    *LIFE,
    record(8, Event.WANTED, "d", "home"),
    record(9, Event.HAVE, "d", "home"),
    record(10, Event.SWAP, "d", "home"),
    record(11, Event.RETIRED, "a", revoke_at=NOON, why="by request"),
    record(12, Event.GONE, "a", why="revoked"),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("journal")
    chained(state, WHOLE)
    return state


@pytest.fixture(scope="module")
def whole(scratch: Path) -> bytes:
    return (scratch / JOURNAL).read_bytes()


@given(st.data())
def test_a_flipped_bit_never_makes_a_key_up(
    scratch: Path, whole: bytes, data: st.DataObject
) -> None:
    """All lines but the last are guarded by the next: records are as they were, or an error."""
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    (scratch / JOURNAL).write_bytes(flipped)
    last_line = whole.rindex(b"\n", 0, -1) + 1
    try:
        found = Journal(scratch).read()
    except JournalError as error:
        assert error.message.startswith(f"journal: {scratch / JOURNAL}: ")
    else:
        assert at >= last_line
        assert found[: len(WHOLE) - 1] == WHOLE[:-1]
        assert len(found) <= len(WHOLE)
        labels = {key.label for slots in replay(found).values() for key in slots.keys}
        assert labels <= {"a", "b", "c", "d"}


@given(st.data())
def test_any_cut_leaves_a_beginning(scratch: Path, whole: bytes, data: st.DataObject) -> None:
    """A file that ends early has the first records, each whole."""
    length = data.draw(st.integers(0, len(whole)))
    (scratch / JOURNAL).write_bytes(whole[:length])

    found = Journal(scratch).read()

    assert found == WHOLE[: len(found)]
    assert len(found) == max(0, whole[:length].count(b"\n") - 1)


@given(st.data(), st.binary(max_size=20))
def test_bytes_put_in_anywhere_make_no_key(
    scratch: Path, whole: bytes, data: st.DataObject, extra: bytes
) -> None:
    """Neither rubbish in the middle nor a piece that was copied to another place."""
    at = data.draw(st.integers(0, len(whole)))
    start = data.draw(st.integers(0, len(whole)))
    piece = extra or whole[start : start + data.draw(st.integers(1, 400))]
    (scratch / JOURNAL).write_bytes(whole[:at] + piece + whole[at:])
    try:
        found = Journal(scratch).read()
    except JournalError:
        return
    keys = {key.label for slots in replay(found).values() for key in slots.keys}
    assert keys <= {"b", "d", "a"}
    assert found[: len(WHOLE) - 1] == WHOLE[:-1]


@given(st.binary(max_size=300))
def test_any_bytes_are_no_keys(scratch: Path, data: bytes) -> None:
    """What nobody wrote is an empty journal or an error."""
    (scratch / JOURNAL).write_bytes(data)
    try:
        found = Journal(scratch).read()
    except JournalError:
        return
    assert found == []
