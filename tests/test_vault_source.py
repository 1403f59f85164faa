"""What is read in Vault: when it was written, when it ends, and what is no key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile
from keybroker.credential import Lease, Reference, Secret, Session, fingerprint
from keybroker.errors import SourceDenied, SourceError, SourceInvalid, SourceUnavailable
from keybroker.journal import decode_lease, encode_lease
from keybroker.rotation import Kind
from keybroker.sources import Source
from keybroker.sources.held import Held
from keybroker.sources.vault.place import read_reference
from keybroker.sources.vault.source import Vault
from keybroker.values import replace
from tests.contracts import entry
from tests.scripted import (
    CANARY,
    DENIED,
    TOKEN,
    Answer,
    Script,
    fails,
    granted,
    looked,
    profile,
    refused,
    table,
)

KV2, KV1, CREDS = "secret/data/llm/key", "kv/llm/key", "database/creds/kb"
STATIC = "database/static-creds/kb"
REVOKE, RENEW = "sys/leases/revoke", "sys/leases/renew"
SELF = "auth/token/lookup-self"
KEY = f"sk-{CANARY}key"
ENVIRONMENT = {"KB_TOKEN": TOKEN}
LEASE = "database/creds/kb/abc"


def ago(**how: float) -> str:
    return (datetime.now(UTC) - timedelta(**how)).isoformat()


def near(moment: datetime | None, **how: float) -> bool:
    """Tell whether a moment is so far from now, within a few seconds."""
    assert moment is not None
    return abs(moment - (datetime.now(UTC) + timedelta(**how))) < timedelta(seconds=5)


def versioned(
    data: dict[str, Any] | None = None, headers: dict[str, str] | None = None, **meta: Any
) -> Answer:
    """Answer as KV 2 does."""
    about = {
        "created_time": ago(minutes=10),
        "custom_metadata": None,
        "deletion_time": "",
        "destroyed": False,
        "version": 7,
        **meta,
    }
    inner = {"data": {"key": KEY} if data is None else data, "metadata": about}
    return Answer(200, {"request_id": "r", "lease_id": "", "data": inner}, headers or {})


def leased(seconds: int = 600, data: dict[str, Any] | None = None, **more: Any) -> Answer:
    """Answer with a lease."""
    body = {"request_id": "r", "lease_id": LEASE, "lease_duration": seconds, "renewable": True}
    return Answer(200, {**body, "data": {"key": KEY} if data is None else data, **more})


def kept(data: dict[str, Any], seconds: int = 2_764_800) -> Answer:
    """Answer as KV 1 does."""
    body = {"request_id": "r", "lease_id": "", "lease_duration": seconds, "renewable": False}
    return Answer(200, {**body, "data": data})


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as script:
        script.says(SELF, looked())
        script.says(KV2, versioned())
        script.says(CREDS, leased())
        script.says(REVOKE, Answer(204))
        yield script


Make = Callable[..., Source]


@pytest.fixture
def make(script: Script) -> Iterator[Make]:
    """Build a source in front of the script."""
    made: list[Source] = []

    def make(path: str = KV2, held: Held | None = None, **more: Any) -> Source:
        one = profile(script.url, path, **more)
        made.append(sources.build(one, ENVIRONMENT, held))
        return made[-1]

    yield make
    for source in made:
        source.close()


def invalid(source: Source, words: str) -> SourceInvalid:
    """Return the error of an issue, which names the path."""
    error = fails(SourceInvalid, lambda: source.issue(""))
    assert words in error.message
    assert error.message.startswith("vault: 127.0.0.1:")
    assert isinstance(error, SourceInvalid)
    return error


AHEAD = {"date": "Sat, 27 Nov 2128 14:00:00 GMT"}  # by a clock that is far ahead of ours
BEHIND = {"date": "Wed, 27 Nov 1974 14:00:00 GMT"}
FIRST, LAST = "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"


@pytest.mark.parametrize(
    ("answer", "more", "ends"),
    [
        (versioned({"key": KEY, "ttl": "12h"}, created_time=LAST), {}, LAST),
        (versioned(headers=BEHIND, deletion_time=LAST), {}, LAST),
        (versioned(headers=AHEAD, created_time=FIRST), {}, None),
        (
            Answer(
                200,
                {
                    "data": {
                        "key": KEY,
                        "ttl": 0,
                        "rotation_period": 5,
                        "last_vault_rotation": FIRST,
                    }
                },
                AHEAD,
            ),
            {"engine": "static-role"},
            None,
        ),
    ],
)
def test_a_time_at_an_end_of_the_calendar_is_only_a_time(
    make: Make, script: Script, answer: Answer, more: dict[str, Any], ends: str | None
) -> None:
    """Go's programs write the year 1, and people 9999, for never; nothing overflows."""
    script.says(KV2, answer)
    lease = make(**more).issue("").lease
    assert lease.expires_at == (None if ends is None else datetime.fromisoformat(ends))
    assert decode_lease(encode_lease(lease)) == lease


def test_a_version_that_was_to_end_in_the_year_1_has_ended(make: Make, script: Script) -> None:
    """By whichever clock."""
    script.says(KV2, versioned(headers=AHEAD, deletion_time=FIRST))
    invalid(make(), "has ended on")


# What it is.


@pytest.mark.parametrize(
    ("engine", "kind", "revoke"),
    [
        ("kv", Kind.FOLLOWED, False),
        ("static-role", Kind.FOLLOWED, False),
        ("dynamic", Kind.LEASED, True),
    ],
)
def test_what_it_can_do_depends_on_the_engine(
    make: Make, engine: str, kind: Kind, revoke: bool
) -> None:
    """What is made for us is ours to end; the rest is somebody else's."""
    source = make("database/x/y", engine=engine)
    assert source.capabilities == sources.Capabilities(
        kind, find=False, revoke=revoke, enforces_expiry=revoke
    )
    assert source.find("kb-x") == ()
    assert source.sweep("kb-") == ()
    if not revoke:
        lease = Lease("x", "vault", datetime.now(UTC))
        fails(SourceInvalid, lambda: source.revoke(lease))
        fails(SourceDenied, lambda: source.renew(lease))


# KV 2.


def test_a_version_is_read(make: Make, script: Script) -> None:
    """Its number names it; when it was written is by the server that wrote it."""
    written = "2026-11-21T10:00:00.123456789Z"
    script.says(KV2, versioned(created_time=written))
    credential = make().issue("")
    assert credential.secret == Secret(KEY)
    lease = credential.lease
    assert (lease.id, lease.source) == ("version 7", "vault")
    assert lease.written_at == datetime(2026, 11, 21, 10, 0, 0, 123456, tzinfo=UTC)
    assert (lease.expires_at, lease.reread_at) == (None, None)
    assert not lease.revocable
    assert near(lease.issued_at)
    assert script.asked[-1].query == {}


def test_a_pinned_version_is_asked_for(make: Make, script: Script) -> None:
    """That one, and no other."""
    make(version=3).issue("")
    assert script.asked[-1].query == {"version": "3"}


def test_a_poll_is_one_request(make: Make, script: Script) -> None:
    """After the login."""
    source = make()
    for _ in range(3):
        source.issue("")
    assert script.paths() == [SELF, KV2, KV2, KV2]


# By name: what is answered, made at that time, and when the key ends.
ENDS: dict[str, tuple[Callable[[], Answer], dict[str, float] | None]] = {
    "none": (lambda: versioned(), None),
    "expires_at": (lambda: versioned({"key": KEY, "expires_at": ago(hours=-2)}), {"hours": 2}),
    "of the metadata": (
        lambda: versioned(custom_metadata={"expires_at": ago(hours=-3)}),
        {"hours": 3},
    ),
    "the data count first": (
        lambda: versioned(
            {"key": KEY, "expires_at": ago(hours=-4)}, custom_metadata={"expires_at": "x"}
        ),
        {"hours": 4},
    ),
    "ttl in seconds": (lambda: versioned({"key": KEY, "ttl": 3600}), {"minutes": 50}),
    "ttl in digits": (lambda: versioned({"key": KEY, "ttl": "3600"}), {"minutes": 50}),
    "ttl as a duration": (lambda: versioned(custom_metadata={"ttl": "2h"}), {"minutes": 110}),
    "deletion": (lambda: versioned(deletion_time=ago(minutes=-7)), {"minutes": 7}),
    "the earliest": (
        lambda: versioned(
            {"key": KEY, "ttl": "2h", "expires_at": ago(hours=-1)}, deletion_time=ago(hours=-9)
        ),
        {"hours": 1},
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_when_a_version_ends_may_stand_in_several_places(
    make: Make, script: Script, name: str
) -> None:
    """The earliest of what is said; a ttl counts from when it was written."""
    answer, end = ENDS[name]
    script.says(KV2, answer())
    expires_at = make().issue("").lease.expires_at
    assert expires_at is None if end is None else near(expires_at, **end)


def test_the_servers_clock_is_corrected(make: Make, script: Script) -> None:
    """What counts by it ends when it does so here; when it was written stays as it is said."""
    ahead = timedelta(hours=5)
    stamp = format_datetime(datetime.now(UTC) + ahead, usegmt=True)
    written = datetime.now(UTC) + ahead
    script.says(
        KV2,
        versioned({"key": KEY, "ttl": "1h"}, {"Date": stamp}, created_time=written.isoformat()),
        versioned(None, {"Date": stamp}, deletion_time=(written + ahead).isoformat()),
    )
    source = make()
    first, second = source.issue("").lease, source.issue("").lease
    assert near(first.expires_at, hours=1)
    assert first.written_at == written
    assert near(second.expires_at, hours=5)


NO_END = ["tomorrow", "2027-01-01T00:00:00", 5, "2027-99-01T00:00:00Z", ["x"]]


@pytest.mark.parametrize("value", NO_END)
def test_an_end_that_cannot_be_read_is_no_end_for_ever(
    make: Make, script: Script, value: Any
) -> None:
    """A key must not live longer because somebody misspelt its end."""
    script.says(KV2, versioned({"key": KEY, "expires_at": value}))
    invalid(make(), f"{KV2}: expires_at cannot be read")


@pytest.mark.parametrize("value", ["soon", -5, True, "1 h", [1]])
def test_a_ttl_that_cannot_be_read_is_none(make: Make, script: Script, value: Any) -> None:
    """Neither for ever nor for no time."""
    script.says(KV2, versioned({"key": KEY, "ttl": value}))
    invalid(make(), f"{KV2}: ttl cannot be read")


def test_a_key_that_has_ended_is_said_with_its_day(make: Make, script: Script) -> None:
    """It is not handed out."""
    script.says(KV2, versioned({"key": KEY, "expires_at": "2026-01-02T03:04:05Z"}))
    assert "has ended on 2026-01-02 03:04Z" in invalid(make(), KV2).message


GONE = {
    "deleted": ({"deletion_time": "2026-01-02T03:04:05Z"}, "version 7 was deleted on 2026-01-02"),
    "destroyed": ({"destroyed": True}, "version 7 was destroyed"),
}


@pytest.mark.parametrize("name", GONE)
def test_a_version_that_is_gone_is_said(make: Make, script: Script, name: str) -> None:
    """Vault answers 404 with what is left of it."""
    meta, words = GONE[name]
    body = versioned(**meta).body
    body["data"]["data"] = None
    script.says(KV2, Answer(404, body))
    invalid(make(), f"{KV2}: {words}")


NOTHING: dict[str, tuple[str, Answer, dict[str, Any], str, str]] = {
    "no secret": (KV2, refused(404), {}, "nothing at this path", "see path"),
    "no version": (KV2, refused(404), {"version": 9}, "there is no version 9", "newest"),
    "no mount": (
        KV2,
        refused(404, 'no handler for route "secret/data/llm/key". route entry not found.'),
        {},
        "nothing is mounted there",
        "secrets list",
    ),
    "no namespace": (KV2, refused(404, "namespace not found"), {}, "no such namespace", ""),
    "KV 1 path": (
        KV1,
        Answer(
            404,
            {"errors": [], "warnings": ["Invalid path for a versioned K/V secrets engine. See x"]},
        ),
        {},
        "what is mounted there is KV 2",
        "kv/data/llm/key",
    ),
    "cannot be read": (KV1, refused(405, "unsupported operation"), {}, "(405)", "engine"),
    "refused otherwise": (KV1, refused(400, f"{CANARY}"), {}, "(400)", "bao read"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_read_is_said_by_path(make: Make, script: Script, name: str) -> None:
    """With what to type."""
    path, answer, more, words, hint = NOTHING[name]
    script.says(path, answer)
    error = invalid(make(path, **more), f"{path}: ")
    assert words in error.message
    assert hint in (error.hint or "")


# Fields.

BAD = {
    "missing": ({"password": KEY, "user": "u", f"sk-{CANARY}": "x"}, "has no field key"),
    "empty table": ({}, "has no field key"),
    "number": ({"key": 5}, "field key is no text"),
    "table": ({"key": {"a": KEY}}, "field key is no text"),
    "null": ({"key": None}, "field key is no text"),
    "empty": ({"key": ""}, "field key is empty"),
    "blank": ({"key": f"{KEY} x"}, "field key is not one token"),
    "blank before": ({"key": f" {KEY}"}, "field key is not one token"),
    "two lines": ({"key": f"{KEY}\nx"}, "field key is not one token"),
    "a line end alone": ({"key": "\n"}, "field key is empty"),
    "other alphabet": ({"key": f"{KEY}ü"}, "field key is not one token"),
    "too long": ({"key": "x" * 20_000}, "field key is longer than"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("engine", ["kv", "dynamic"])
def test_what_is_no_key_is_refused_by_path_and_field(
    make: Make, script: Script, name: str, engine: str
) -> None:
    """Never by its value; a lease of it is given back."""
    data, words = BAD[name]
    script.says(KV2, versioned(data))
    script.says(CREDS, leased(data=data))
    path = KV2 if engine == "kv" else CREDS
    error = invalid(make(path, engine=engine), f"{path}: {words}")
    if name == "missing":
        assert error.hint == "it has password, user; see field"
    assert not error.unknown
    assert (REVOKE in script.paths()) is (engine == "dynamic")


def test_another_field_may_hold_the_key(make: Make, script: Script) -> None:
    """It is configuration."""
    script.says(KV2, versioned({"password": KEY}))
    assert make(field="password").issue("").secret == Secret(KEY)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_line_end_after_a_key_is_not_part_of_it(make: Make, script: Script, end: str) -> None:
    """`echo` writes one."""
    script.says(KV2, versioned({"key": f"{KEY}{end}"}))
    assert make().issue("").secret == Secret(KEY)


# KV 1.


def test_a_secret_of_kv_1_has_a_fingerprint_for_a_version(make: Make, script: Script) -> None:
    """Nothing says when it was written."""
    script.says(KV1, kept({"key": KEY}))
    lease = make(KV1).issue("").lease
    assert (lease.id, lease.expires_at, lease.reread_at) == (fingerprint(KEY), None, None)
    assert lease.written_at is None


@pytest.mark.parametrize(("seconds", "again"), [(30, 30), (1, 5)])
def test_a_ttl_of_kv_1_is_advice(make: Make, script: Script, seconds: int, again: int) -> None:
    """When to read it again, not when it ends, and never as fast as one can."""
    script.says(KV1, kept({"key": KEY, "ttl": f"{seconds}s"}, seconds))
    lease = make(KV1).issue("").lease
    assert lease.reread_at == lease.issued_at + timedelta(seconds=again)
    assert lease.expires_at is None


def test_an_end_in_kv_1_is_an_end(make: Make, script: Script) -> None:
    """If the data say so."""
    script.says(KV1, kept({"key": KEY, "expires_at": ago(hours=-1)}))
    assert near(make(KV1).issue("").lease.expires_at, hours=1)


def test_a_secret_of_kv_1_in_a_folder_named_data_is_read(make: Make, script: Script) -> None:
    """What was answered says which kind it is, not the path."""
    script.says(KV2, kept({"key": KEY}))
    assert make().issue("").lease.id == fingerprint(KEY)


def test_a_dynamic_engine_under_kv_is_not_polled_into_a_heap_of_leases(
    make: Make, script: Script
) -> None:
    """The lease is given back, and the hint says what to set."""
    error = invalid(make(CREDS), "is made anew for each reader")
    assert error.hint == 'set engine = "dynamic"'
    assert error.retry_after == timedelta(hours=1)
    assert script.asked[-1].body == {"lease_id": LEASE, "sync": True}


# Leases.


def test_a_lease_is_made(make: Make, script: Script) -> None:
    """With its name, its end, and the token that it ends with."""
    held = Held()
    source = make(CREDS, held, engine="dynamic")
    credential = source.issue("kb-label")
    lease = credential.lease
    assert credential.secret == Secret(KEY)
    assert (lease.id, lease.renewable, lease.revocable) == (LEASE, True, True)
    assert lease.expires_at == lease.issued_at + timedelta(seconds=600)
    assert lease.session == fingerprint(TOKEN)
    assert near(lease.session_ends, hours=1)
    assert script.asked[-1].method == "GET"


def test_a_lease_ends_with_its_token(make: Make, script: Script) -> None:
    """Vault revokes it then, whatever was promised."""
    script.says(SELF, looked(300, creation_ttl=300))
    lease = make(CREDS, engine="dynamic").issue("").lease
    assert lease.expires_at == lease.session_ends
    assert near(lease.expires_at, seconds=300)


@pytest.mark.parametrize("parameters", [{}, {"ttl": "1h"}])
def test_parameters_are_written(make: Make, script: Script, parameters: dict[str, str]) -> None:
    """Even none: some engines want their path written."""
    make(CREDS, engine="dynamic", parameters=parameters).issue("")
    assert (script.asked[-1].method, script.asked[-1].body) == ("POST", parameters)


def test_what_pki_makes_ends_when_it_says(make: Make, script: Script) -> None:
    """Its lease cannot be renewed, and `expiration` counts where it is earlier."""
    ends = int(datetime.now(UTC).timestamp()) + 60
    script.says(CREDS, leased(data={"key": KEY, "expiration": ends}, renewable=False))
    lease = make(CREDS, engine="dynamic").issue("").lease
    assert near(lease.expires_at, seconds=60)
    assert not lease.renewable


def test_what_is_no_lease_is_said(make: Make, script: Script) -> None:
    """Nothing was made."""
    error = invalid(make(KV2, engine="dynamic"), "is no lease")
    assert str(error.hint).startswith('set engine = "kv" or "static-role"')
    assert not error.unknown


def test_a_lease_of_more_than_a_day_is_given_back(make: Make, script: Script) -> None:
    """One whose answer is lost would live as long, and nobody knew its name."""
    script.says(CREDS, leased(90_000))
    error = invalid(make(CREDS, engine="dynamic"), "leases of more than 24h")
    assert "allow_orphans" in str(error.hint)
    assert script.paths()[-1] == REVOKE
    taken = make(CREDS, engine="dynamic", allow_orphans=True).issue("")
    assert taken.lease.expires_at is not None


def test_a_lease_without_an_end_is_given_back(make: Make, script: Script) -> None:
    """Nobody could tell when it is over."""
    script.says(CREDS, leased(0))
    invalid(make(CREDS, engine="dynamic"), "without an end")
    assert script.paths()[-1] == REVOKE


def test_a_lease_that_could_not_be_given_back_may_be_alive(make: Make, script: Script) -> None:
    """The broker reckons with it."""
    script.says(CREDS, leased(data={}))
    script.says(REVOKE, refused(503, "x"))
    error = invalid(make(CREDS, engine="dynamic"), "has no field key")
    assert (error.unknown, error.over) == (True, True)


@pytest.mark.parametrize(
    "answer",
    [
        refused(400, "unknown role: kb"),
        refused(500, 'failed to find entry for connection with name: "pg"'),
    ],
)
def test_a_role_that_is_not_there_is_said(make: Make, script: Script, answer: Answer) -> None:
    """A 500 that is final; nothing was made."""
    script.says(CREDS, answer)
    error = invalid(make(CREDS, engine="dynamic"), "has no such role, or no connection for it")
    assert not error.unknown


def test_an_answer_that_is_lost_may_have_made_one(make: Make, script: Script) -> None:
    """It is not asked for a second time."""
    script.says(CREDS, Answer(200, "<html>"))
    error = fails(SourceUnavailable, lambda: make(CREDS, engine="dynamic").issue(""))
    assert isinstance(error, SourceError)
    assert error.unknown
    assert script.paths().count(CREDS) == 1


# Renewals of leases.


def granted_ago(seconds: float, life: float = 600, **more: Any) -> Lease:
    """A lease that was granted so long ago."""
    at = datetime.now(UTC) - timedelta(seconds=seconds)
    ends = at + timedelta(seconds=life)
    base = Lease(LEASE, "vault", at, ends, renewable=True, revocable=True)
    return replace(base, **{"session": fingerprint(TOKEN), **more})


def renewed(seconds: int, renewable: bool = True) -> Answer:
    body = {"request_id": "r", "lease_id": LEASE, "data": None}
    return Answer(200, {**body, "lease_duration": seconds, "renewable": renewable})


def test_a_lease_is_renewed_by_what_it_was_granted(make: Make, script: Script) -> None:
    """Counted from now."""
    script.says(RENEW, renewed(600))
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert script.asked[-1].body == {"lease_id": LEASE, "increment": 600}
    assert near(lease.expires_at, seconds=600)
    assert near(lease.renewed_at)
    assert near(lease.issued_at, seconds=-300)
    assert lease.renewable


def test_a_lease_is_renewed_by_what_is_configured(make: Make, script: Script) -> None:
    """If anything is."""
    script.says(RENEW, renewed(3600))
    make(CREDS, engine="dynamic", lifetime="1h").renew(granted_ago(300))
    assert script.asked[-1].body == {"lease_id": LEASE, "increment": 3600}


@pytest.mark.parametrize(("answered", "again"), [(600, True), (540, True), (539, False)])
def test_a_renewal_that_is_cut_short_is_the_last(
    make: Make, script: Script, answered: int, again: bool
) -> None:
    """There is a maximum behind it."""
    script.says(RENEW, renewed(answered))
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert near(lease.expires_at, seconds=answered)
    assert lease.renewable is again


@pytest.mark.parametrize(
    "answer",
    [
        refused(400, "lease is not renewable"),
        refused(500, "past the max TTL, cannot renew"),
        renewed(0),
        renewed(600, renewable=False),
    ],
)
def test_a_lease_that_cannot_be_renewed_lives_to_its_end(
    make: Make, script: Script, answer: Answer
) -> None:
    """It is no failure."""
    script.says(RENEW, answer)
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert not lease.renewable
    assert lease.expires_at is not None
    assert lease.expires_at > datetime.now(UTC) + timedelta(seconds=290)


@pytest.mark.parametrize("text", ["lease not found", "invalid lease"])
def test_a_lease_that_is_gone_is_said(make: Make, script: Script, text: str) -> None:
    """Somebody ended it."""
    script.says(RENEW, refused(400, text))
    error = fails(SourceInvalid, lambda: make(CREDS, engine="dynamic").renew(granted_ago(300)))
    assert error.message.endswith(": has ended the lease")


def test_the_token_is_renewed_before_its_lease(make: Make, script: Script) -> None:
    """The lease would end with it otherwise."""
    script.says(SELF, looked(1000, creation_ttl=3600))
    script.says("auth/token/renew-self", granted(seconds=3600))
    script.says(RENEW, renewed(600))
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert script.paths() == [SELF, "auth/token/renew-self", RENEW]
    assert near(lease.session_ends, hours=1)


def test_a_lease_never_outlives_its_token(make: Make, script: Script) -> None:
    """And is not renewed for nothing where the token cannot be."""
    script.says(SELF, looked(300, creation_ttl=300, renewable=False))
    script.says(RENEW, renewed(600))
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert near(lease.expires_at, seconds=300)
    assert not lease.renewable


def test_a_token_that_can_be_renewed_is_no_last_end(make: Make, script: Script) -> None:
    """The lease goes on as the token does."""
    script.says(SELF, looked(300, creation_ttl=300))
    script.says(RENEW, renewed(600))
    lease = make(CREDS, engine="dynamic").renew(granted_ago(300))
    assert near(lease.expires_at, seconds=300)
    assert lease.renewable


def test_a_lease_of_another_token_ends_with_that(make: Make, script: Script) -> None:
    """The one of a login before this one."""
    script.says(RENEW, renewed(600))
    theirs = datetime.now(UTC) + timedelta(seconds=120)
    before = granted_ago(300, session="0a1b2c3d", session_ends=theirs)
    lease = make(CREDS, engine="dynamic").renew(before)
    assert (lease.expires_at, lease.session_ends, lease.renewable) == (theirs, theirs, False)


# Ends of leases.


def revoker(script: Script) -> Source:
    """Return what ends a lease by the journal's record alone."""
    issuer = profile(script.url, CREDS, engine="dynamic").issuer
    return sources.revoker(issuer, ENVIRONMENT, 4.0, Held())


def test_a_lease_is_revoked_and_waited_for(script: Script) -> None:
    """Sync: when it is said to be over it is; another configuration makes no difference."""
    source = revoker(script)
    source.revoke(granted_ago(10))
    source.close()
    assert script.asked[-1].body == {"lease_id": LEASE, "sync": True}
    assert source.capabilities.revoke


@pytest.mark.parametrize("text", ["invalid lease", "lease not found"])
def test_a_lease_that_is_over_already_is_a_success(make: Make, script: Script, text: str) -> None:
    """Nothing is left to end."""
    script.says(REVOKE, refused(400, text))
    make(CREDS, engine="dynamic").revoke(granted_ago(10))


def test_a_lease_that_ended_by_itself_is_not_asked_about(make: Make, script: Script) -> None:
    """After a minute, by a server whose clock may be behind."""
    source = make(CREDS, engine="dynamic")
    source.revoke(granted_ago(700))
    assert script.asked == []
    source.revoke(granted_ago(630))
    assert script.paths()[-1] == REVOKE


def test_a_policy_that_forbids_to_revoke_is_said(make: Make, script: Script) -> None:
    """With the line to add."""
    script.says(REVOKE, Answer(403, DENIED))
    source = make(CREDS, engine="dynamic")
    error = fails(SourceDenied, lambda: source.revoke(granted_ago(10)))
    assert error.hint == (
        'add to its policy: path "sys/leases/revoke" { capabilities = ["update"] }'
    )


def test_a_revocation_that_was_not_confirmed_is_none(make: Make, script: Script) -> None:
    """Whatever else was answered."""
    source = make(CREDS, engine="dynamic")
    for answer, kind in ((refused(400, "x"), SourceInvalid), (refused(500), SourceUnavailable)):
        script.says(REVOKE, answer)
        fails(kind, lambda: source.revoke(granted_ago(10)))


# Static roles.


def rotated(**data: Any) -> Answer:
    return kept({"password": KEY, "username": "u", **data}, 0)


@pytest.mark.parametrize(
    ("data", "written", "again"),
    [
        ({"ttl": 30}, None, 31),
        ({"ttl": 0}, None, 5),
        ({}, None, 5),
        ({"ttl": 0, "rotation_period": 60}, 65, 5),
        ({"ttl": 0, "rotation_period": 60}, 160, 50),
        ({"ttl": 0}, 10, 5),
    ],
)
def test_a_static_role_is_read_again_when_it_is_its_turn(
    make: Make, script: Script, data: dict[str, Any], written: int | None, again: int
) -> None:
    """Its ttl stays at 0 until Vault gets round to it: never a hot loop, and ever slower."""
    if written is not None:
        data = {**data, "last_vault_rotation": ago(seconds=written)}
    script.says(STATIC, rotated(**data))
    lease = make(STATIC, engine="static-role", field="password").issue("").lease
    assert lease.reread_at is not None
    off = lease.reread_at - lease.issued_at - timedelta(seconds=again)
    assert abs(off) < timedelta(seconds=0.5 if written is None else 3)
    assert lease.reread_at >= lease.issued_at + timedelta(seconds=5)
    assert lease.expires_at is None
    assert written is None or near(lease.written_at, seconds=-written)


def test_a_static_role_that_is_not_there_is_said(make: Make, script: Script) -> None:
    """By its path."""
    script.says(STATIC, refused(400, "unknown role: kb"))
    invalid(make(STATIC, engine="static-role"), f"{STATIC}: has no such role")


# References.


def test_a_reference_is_a_path_and_a_field(script: Script) -> None:
    """Of either kind of KV, with the session that is held."""
    vault, held = table(script.url), Held()
    script.says(KV1, kept({"token": KEY}))
    for path in (f"{KV2}#key", f"{KV1}#token"):
        found = read_reference(Reference("vault", path), vault, ENVIRONMENT, held)
        assert found == Secret(KEY)
    assert script.paths() == [SELF, KV2, KV1]
    error = fails(
        SourceInvalid,
        lambda: read_reference(Reference("vault", f"{KV2}#none"), vault, ENVIRONMENT, held),
    )
    assert error.hint == "it has key; see the part after #"


def test_a_reference_to_a_dynamic_engine_leaves_no_lease_behind(script: Script) -> None:
    """It would be read for each call at the gateway: the lease is given back, and it is said."""
    one = with_admin_in_vault(script, {"type": "litellm", "admin": {"vault": f"{CREDS}#key"}})
    source = sources.build(one, ENVIRONMENT)
    error = fails(SourceInvalid, lambda: source.find("kb-x"))
    source.close()
    assert f"{CREDS}: is made anew for each reader" in error.message
    assert script.asked[-1].body == {"lease_id": LEASE, "sync": True}


def with_admin_in_vault(script: Script, source: dict[str, Any]) -> Profile:
    """A profile of another source, whose secret is in Vault."""
    auth = {"method": "token", "token": {"env": "KB_TOKEN"}}
    return entry(script.url, source, vault={"address": script.url, "auth": auth})


def test_a_static_key_may_be_in_vault(script: Script) -> None:
    """And is followed there."""
    one = with_admin_in_vault(script, {"type": "static", "key": {"vault": f"{KV2}#key"}})
    source = sources.build(one, ENVIRONMENT)
    assert source.issue("").secret == Secret(KEY)
    source.close()


def test_an_admin_key_may_be_in_vault(script: Script) -> None:
    """To mint and, by the journal alone, to revoke."""
    table_of = {"type": "litellm", "admin": {"vault": f"{KV2}#key"}}
    one = with_admin_in_vault(script, table_of)
    made = sources.build(one, ENVIRONMENT), sources.revoker(one.issuer, ENVIRONMENT, 4.0)
    for source in made:
        fails(SourceInvalid, lambda source=source: source.find("kb-x"))  # type: ignore[misc]
        source.close()
    asked = [one for one in script.asked if one.path == "/key/list"]
    assert [one.headers["authorization"] for one in asked] == [f"Bearer {KEY}"] * 2


def test_an_admin_key_that_cannot_be_read_leaves_nothing_unknown(script: Script) -> None:
    """Vault was asked, the gateway was not."""
    script.says(KV2, Answer(504, "<html>"))
    table_of = {"type": "litellm", "admin": {"vault": f"{KV2}#key"}}
    source = sources.build(with_admin_in_vault(script, table_of), ENVIRONMENT)
    error = fails(SourceUnavailable, lambda: source.issue("kb-x"))
    source.close()
    assert isinstance(error, SourceError)
    assert not error.unknown


# Sessions.


def test_all_sources_of_one_vault_share_a_session(make: Make, script: Script) -> None:
    """One login, whichever of them comes first."""
    held = Held()
    for path, engine in ((KV2, "kv"), (CREDS, "dynamic")):
        make(path, held, engine=engine).issue("")
    assert script.paths().count(SELF) == 1
    assert [one.secret for one in held.changed()] == [Secret(TOKEN)]


def test_a_source_is_given_the_sessions_of_its_worker(make: Make, script: Script) -> None:
    """What the broker handed over is used."""
    one = profile(script.url, KV2)
    assert one.vault is not None
    now = datetime.now(UTC)
    held = Held()
    held.take(
        Session(
            one.vault.session,
            serial=1,
            secret=Secret(f"{TOKEN}-x"),
            issued_at=now,
            expires_at=now + timedelta(hours=1),
        )
    )
    source = make(KV2, held)
    assert isinstance(source, Vault)
    source.issue("")
    assert [one.token for one in script.asked] == [f"{TOKEN}-x"]
