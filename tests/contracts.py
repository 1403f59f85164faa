"""
What every source that mints promises, whichever server it mints at.

A test class inherits `MintedSourceContract` and says with `place` where to mint. What a test
asserts of keys comes from the gateway's own books, and of requests from the proxy in between.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile, read_profile
from keybroker.credential import Lease, Look, Secret
from keybroker.document import Where
from keybroker.errors import (
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.journal import Journal
from keybroker.pool import Pool
from keybroker.slots import Event
from keybroker.sources import Source
from tests.servers.faults import (
    CommitLate,
    CommitThenDrop,
    DropBeforeCommit,
    Fault,
    Faults,
    GarbageJson,
    Hang,
    Html,
    Huge,
    Redirect,
    Reset,
    Status,
    Trickle,
    TrickleBody,
    Truncated,
    refused_url,
    too_many,
)
from tests.servers.processes import wait_until

ADMIN = "KB_TEST_ADMIN"  # the variable that the profiles of these tests name
SHORT = "500ms"  # the time-out of a call that is meant to run into it
NO_DURATION = b"Invalid duration format"
NO_LICENCE = b"Regenerating Virtual Keys is an Enterprise feature, You must be a LiteLLM user"


def entry(base_url: str, source: Mapping[str, Any], **changes: Any) -> Profile:
    """Read a profile as the configuration file would have it."""
    return read_profile(
        "work", {"base_url": base_url, "source": source, **changes}, Where({}, "test")
    )


def ask(
    url: str, method: str, path: str, key: str, body: object = None
) -> tuple[int, dict[str, Any]]:
    """Call a gateway without any code of ours; proxy variables are not read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")
    finally:
        connection.close()


def problem(call: Callable[[], object], *never: str) -> SourceError:
    """Return the error that a call ends with: it is one of ours, and shows no key and no hash."""
    with pytest.raises(SourceError) as caught:
        call()
    check_silent(caught.value, *never)
    return caught.value


def check_silent(error: KeybrokerError, *never: str) -> None:
    """Fail if an error shows a key, the hash of a key, or one of the texts given."""
    printed = "".join(traceback.format_exception(error))
    shown = f"{error.message} {error.hint} {error!r} {error.args} {printed}"
    assert not re.search(r"sk-(?!ant-…)[\w-]|\b[0-9a-f]{64}\b", shown)
    assert [text for text in never if text in shown] == []
    assert len(error.message) <= 200
    assert "\n" not in error.message


def envelope(status: int, kind: str, message: bytes) -> Status:
    """Make an error answer in LiteLLM's shape."""
    body = b'{"error":{"message":"%s","type":"%s","param":null,"code":"%d"}}'
    headers = {"content-type": "application/json"}
    return Status(status, headers, body % (message, kind.encode(), status))


class Place(ABC):
    """A gateway with keys, and its own books."""

    url: str
    admin: str

    @abstractmethod
    def books(self) -> Mapping[str, str | None]:
        """Return id and label of the keys that exist, by the gateway's own account."""

    def labelled(self, label: str) -> list[str]:
        return [token for token, found in self.books().items() if found == label]

    def mint(self, label: str | None, **wish: Any) -> str:
        """Mint past the code under test."""
        given = {"key_alias": label, "duration": "1h", "key_type": "llm_api", **wish}
        status, answer = ask(self.url, "POST", "/key/generate", self.admin, given)
        assert status == 200
        key: str = answer["key"]
        return key

    def block(self, key: str) -> None:
        status, _ = ask(self.url, "POST", "/key/block", self.admin, {"key": key})
        assert status == 200

    def takes(self, key: str) -> bool:
        """Whether the data plane accepts a key; any status but 200 and 401 fails the test."""
        status, _ = ask(self.url, "GET", "/v1/models", key)
        assert status in (200, 401)
        return status == 200


Make = Callable[..., Source]

# How an answer to "mint a key" gets lost, and whether the gateway has made the key.
LOST: dict[str, tuple[Fault, bool]] = {
    "commits, then drops": (CommitThenDrop(), True),
    "drops before it commits": (DropBeforeCommit(), False),
    "commits, then resets": (Reset(commit=True), True),
    "resets before it commits": (Reset(), False),
    "commits, then hangs": (Hang(commit=True), True),
    "hangs before it commits": (Hang(), False),
    "trickles its body": (TrickleBody(0.05), True),
    "cuts its body off": (Truncated(), True),
    "commits behind a page": (Html(commit=True), True),
    "is a portal": (Html(), False),
    "commits, then garbles": (GarbageJson(commit=True), True),
    "answers garbage": (GarbageJson(), False),
    "commits, then never ends": (Huge(commit=True), True),
    "never ends": (Huge(), False),
    "commits, then 500": (Html(500, commit=True), True),
    "502 of a proxy in front": (Html(502), False),
    "commits, then 503": (envelope(503, "no_db_connection", b"Service Unavailable"), False),
    "commits, then 504": (Html(504, commit=True), True),
}

# Answers to "mint a key" that rule out that one was made: status or fault, and the class of error.
FINAL: dict[str, tuple[Fault, type[SourceError]]] = {
    "no duration": (envelope(500, "internal_server_error", NO_DURATION), SourceInvalid),
    "no licence": (envelope(500, "internal_server_error", NO_LICENCE), SourceInvalid),
    "over the bound": (
        envelope(
            400,
            "internal_server_error",
            b"{'error': 'duration is over max limit set in config - user_value=60d; max_value=1d'}",
        ),
        SourceInvalid,
    ),
    "not a gateway": (Html(404), SourceInvalid),
    "not a key API": (Html(405), SourceInvalid),
    "bad field": (Status(422, {}, b'{"detail":[{"type":"x","loc":["body"]}]}'), SourceInvalid),
    "forbidden": (Html(403), SourceDenied),
    "refused": (Html(401), SourceDenied),
    "throttled": (too_many(7), SourceUnavailable),
    "moved": (Redirect("http://127.0.0.1:9/", 301), SourceInvalid),
}


class MintedSourceContract(ABC):
    """
    What the broker relies on.

    Attributes:
        MINT, FIND, REVOKE: Method and path of each call of the key API.
    """

    MINT = ("POST", "/key/generate")
    FIND = ("GET", "/key/list")
    REVOKE = ("POST", "/key/delete")

    @pytest.fixture
    @abstractmethod
    def place(self) -> Iterator[Place]:
        """Where to mint."""

    @pytest.fixture
    def faults(self, place: Place) -> Iterator[Faults]:
        with Faults(place.url, admin=place.admin) as faults:
            yield faults
        assert faults.errors == []

    @pytest.fixture
    def label(self) -> str:
        return f"kb-test-{secrets.token_hex(8)}"

    @pytest.fixture
    def make(self, place: Place, faults: Faults) -> Iterator[Make]:
        """Build a source in front of the faults; `source` changes its table, the rest its entry."""
        made: list[Source] = []

        def make(
            admin: str = place.admin, base_url: str = faults.url, **changes: Any
        ) -> sources.Source:
            profile = self.profile(base_url, **changes)
            made.append(sources.build(profile, {ADMIN: admin}))
            return made[-1]

        yield make
        for source in made:
            source.close()

    def profile(
        self, base_url: str, source: Mapping[str, Any] | None = None, **changes: Any
    ) -> Profile:
        table = {"type": "litellm", "admin": {"env": ADMIN}, "lifetime": "1h", **(source or {})}
        return entry(base_url, table, **changes)

    def arm(
        self, faults: Faults, call: tuple[str, str], fault: Fault, times: int | None = 1
    ) -> Any:
        method, path = call
        return faults.next(fault, method=method, path=path, times=times)

    # A key's life.

    def test_a_new_key_is_taken_and_has_an_end_and_an_id(
        self, place: Place, make: Make, label: str
    ) -> None:
        """A key opens the data plane, ends when asked to, and is known by its SHA-256."""
        before = datetime.now(UTC)
        credential = make().issue(label)
        lease, key = credential.lease, credential.secret.reveal()

        assert place.takes(key)
        assert lease.id == sha256(key.encode()).hexdigest()
        assert place.labelled(label) == [lease.id]
        assert before <= lease.issued_at <= datetime.now(UTC)
        assert lease.expires_at is not None
        assert timedelta(minutes=59) < lease.expires_at - before <= timedelta(hours=1, seconds=9)
        assert lease.expires_at - lease.issued_at <= timedelta(hours=1)
        assert lease.revocable

    def test_each_key_is_another(self, make: Make, label: str) -> None:
        """Two issues give two keys with two ids."""
        source = make()
        one, two = source.issue(f"{label}-1"), source.issue(f"{label}-2")
        assert one.secret != two.secret
        assert one.lease.id != two.lease.id

    def test_a_key_is_found_by_its_label_and_by_nothing_like_it(
        self, place: Place, make: Make, label: str
    ) -> None:
        """Neither a longer label, nor a shorter, nor another case is mistaken for it."""
        source = make()
        lease = source.issue(label).lease
        others = [f"{label}-2", label[:-1], label.upper(), f"x{label}", f"{label} "]
        for other in others:
            place.mint(other)

        [found] = source.find(label)

        assert found.id == lease.id
        assert found.revocable
        assert abs(found.issued_at - lease.issued_at) < timedelta(seconds=30)
        assert found.expires_at is not None
        assert lease.expires_at is not None
        assert abs(found.expires_at - lease.expires_at) < timedelta(seconds=30)
        assert [lease.id for lease in source.find(f"{label}-2")] == place.labelled(f"{label}-2")

    def test_nothing_is_found_under_a_label_that_was_never_used(
        self, make: Make, label: str
    ) -> None:
        """Part of a label that exists finds nothing."""
        source = make()
        source.issue(f"{label}-used")
        assert list(source.find(label)) == []

    def test_a_revoked_key_is_refused_and_gone(self, place: Place, make: Make, label: str) -> None:
        """Revoking ends a key at once, and it is not found any more."""
        source = make()
        credential = source.issue(label)
        source.revoke(credential.lease)

        assert not place.takes(credential.secret.reveal())
        assert place.labelled(label) == []
        assert list(source.find(label)) == []
        assert source.verify(credential.secret).look is Look.REFUSED

    def test_revoking_twice_is_fine(self, make: Make, label: str) -> None:
        """What is gone already is a success."""
        source = make()
        lease = source.issue(label).lease
        source.revoke(lease)
        source.revoke(lease)

    def test_revoking_what_was_never_known_is_fine(self, make: Make) -> None:
        """The gateway's own words that it knows no such key are a success."""
        nobody = sha256(secrets.token_bytes(8)).hexdigest()
        make().revoke(Lease(nobody, "litellm", datetime.now(UTC), revocable=True))

    def test_revoking_one_key_leaves_the_others(self, place: Place, make: Make, label: str) -> None:
        """A key goes alone."""
        source = make()
        one, two = source.issue(f"{label}-1"), source.issue(f"{label}-2")
        source.revoke(one.lease)
        assert place.takes(two.secret.reveal())

    def test_the_journal_s_record_is_enough_to_find_and_revoke(
        self, place: Place, make: Make, faults: Faults, label: str
    ) -> None:
        """A profile may be gone from the configuration before its keys are."""
        lease = make().issue(label).lease
        source = sources.revoker(self.profile(faults.url).issuer, {ADMIN: place.admin})
        assert [found.id for found in source.find(label)] == [lease.id]
        source.revoke(lease)
        source.close()
        assert place.labelled(label) == []

    def test_a_sweep_finds_every_page_and_no_stranger(
        self, place: Place, make: Make, faults: Faults, label: str
    ) -> None:
        """More keys than one page are all found by their prefix; look-alikes are not."""
        ours = {f"{label}-{number}" for number in range(103)}
        for each in [*ours, f"x{label}-1", label.upper()]:
            place.mint(each)

        found = make().sweep(f"{label}-")

        assert sorted(label for label, _ in found) == sorted(ours)
        assert {lease.id: label for label, lease in found}.items() <= place.books().items()
        assert len([entry for entry in faults.log if entry.path.startswith(self.FIND[1])]) == 2

    def test_a_lifetime_is_kept(self, place: Place, make: Make, label: str) -> None:
        """A key that was asked for one second is refused when it is over, and not before."""
        brief = {"lifetime": "1s"}
        source = make(source=brief, hold="300ms", helper_ttl="100ms")
        credential = source.issue(label)
        end = credential.lease.expires_at
        assert end is not None
        assert end - credential.lease.issued_at <= timedelta(seconds=1)

        assert wait_until(lambda: not place.takes(credential.secret.reveal()), 20)

        assert datetime.now(UTC) >= end
        assert source.verify(credential.secret).look is Look.REFUSED

    # Verdicts.

    @pytest.mark.parametrize("mode", ["auto", "models", "count_tokens", "info", "message"])
    def test_a_good_key_is_alive_and_a_bad_one_is_not(
        self, place: Place, make: Make, label: str, mode: str
    ) -> None:
        """Each method tells a good key from a revoked, a blocked and a made-up one."""
        source = make(verify=mode)
        good, blocked, revoked = (source.issue(f"{label}-{n}") for n in range(3))
        place.block(blocked.secret.reveal())
        source.revoke(revoked.lease)
        nobody = Secret(f"sk-{secrets.token_urlsafe(32)}")

        seen = [source.verify(one.secret) for one in (good, blocked, revoked)]
        seen.append(source.verify(nobody))

        assert [verdict.look for verdict in seen] == [Look.ALIVE, *[Look.REFUSED] * 3]
        assert {verdict.method for verdict in seen} == {"models" if mode == "auto" else mode}
        shown = repr(seen)
        assert not re.search(r"sk-\w|[0-9a-f]{64}", shown)

    def test_verifying_tries_a_made_up_key_first(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """A good key is called alive only by a method that refused another key just before."""
        source = make()
        key = source.issue(label)
        before = len(faults.log)

        source.verify(key.secret)

        shown = [dict(entry.headers)["x-api-key"] for entry in faults.log[before:]]
        assert len(shown) == 2
        assert shown[0] != shown[1] == key.secret.fingerprint

    def test_a_gateway_that_is_away_decides_nothing(self, make: Make, label: str) -> None:
        """A key is not refused because nobody answers."""
        key = make().issue(label)
        verdict = make(base_url=refused_url()).verify(key.secret)
        assert verdict.look is Look.UNDECIDED

    def test_a_gateway_that_hangs_costs_one_time_out(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """However many methods there are, a silent gateway is given up after one time-out."""
        key = make().issue(label)
        before = len(faults.log)
        faults.next(Hang(), times=None)

        verdict = make(source={"timeout": SHORT}).verify(key.secret)

        assert verdict.look is Look.UNDECIDED
        assert len(faults.log) - before == 1

    @pytest.mark.parametrize(
        "fault",
        [Html(), Html(401), Html(403), Html(503), GarbageJson(), Truncated(), too_many(3), Huge()],
        ids=lambda fault: f"{type(fault).__name__} {getattr(fault, 'status', '')}".strip(),
    )
    def test_an_answer_about_something_else_decides_nothing(
        self, make: Make, faults: Faults, label: str, fault: Fault
    ) -> None:
        """Pages, throttling and broken answers neither condemn a key nor call it alive."""
        key = make().issue(label)
        faults.next(fault, path="/v1/*", times=None)
        verdict = make(verify="models").verify(key.secret)
        assert verdict.look is Look.UNDECIDED

    # The admin credential.

    def test_a_wrong_admin_key_is_denied(self, place: Place, make: Make, label: str) -> None:
        """Every operation says so, by its own class of error, and shows no key."""
        wrong = f"sk-{secrets.token_urlsafe(24)}"
        lease = make().issue(label).lease
        source = make(admin=wrong)
        calls: Sequence[Callable[[], object]] = (
            lambda: source.issue(f"{label}-2"),
            lambda: source.find(label),
            lambda: source.sweep(label),
            lambda: source.revoke(lease),
        )
        for call in calls:
            error = problem(call, wrong, place.admin, lease.id)
            assert type(error) is SourceDenied
            assert not error.unknown
        assert place.labelled(label) == [lease.id]

    def test_an_admin_key_without_the_right_is_denied(
        self, place: Place, make: Make, label: str
    ) -> None:
        """A good key that may not mint is told from one that is not known."""
        mere = place.mint(label)
        error = problem(lambda: make(admin=mere).issue(f"{label}-2"), mere, place.admin)
        assert type(error) is SourceDenied
        assert "no right" in error.message

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_credentials_do_not_follow_a_redirect(
        self, place: Place, make: Make, faults: Faults, label: str, status: int
    ) -> None:
        """Whoever a gateway redirects to sees neither the admin key nor a minted one."""
        key = make().issue(label)
        with Faults(place.url, admin=place.admin) as elsewhere:
            faults.next(Redirect(f"{elsewhere.url}/key/generate", status), times=None)
            source = make()
            errors = [
                problem(lambda: source.issue(f"{label}-2")),
                problem(lambda: source.find(label)),
                problem(lambda: source.revoke(key.lease)),
            ]
            verdict = source.verify(key.secret)
        assert elsewhere.log == ()
        assert {(type(error), error.unknown) for error in errors} == {(SourceInvalid, False)}
        assert verdict.look is Look.UNDECIDED
        assert place.labelled(label) == [key.lease.id]

    def test_each_key_goes_where_it_belongs(self, place: Place, make: Make, label: str) -> None:
        """Where key API and data plane are two hosts, the admin key reaches only the first."""
        with (
            Faults(place.url, admin=place.admin) as keys,
            Faults(place.url, admin=place.admin) as data,
        ):
            source = make(base_url=f"{data.url}", source={"url": keys.url})
            key = source.issue(label)
            assert source.verify(key.secret).look is Look.ALIVE
            source.find(label)
            source.revoke(key.lease)
        assert [entry.admin_seen for entry in data.log] == [False, False]
        assert {entry.path for entry in data.log} == {"/v1/models"}
        shown = {dict(entry.headers).get("x-api-key") for entry in keys.log}
        assert shown == {None}
        assert all(entry.admin_seen for entry in keys.log)

    # Answers that get lost.

    @pytest.mark.parametrize("how", LOST)
    def test_a_lost_answer_is_unknown_and_the_label_tells(
        self, place: Place, make: Make, faults: Faults, label: str, how: str
    ) -> None:
        """After an answer that settles nothing, the label finds the key if there is one."""
        fault, made = LOST[how]
        armed = self.arm(faults, self.MINT, fault)

        error = problem(lambda: make(source={"timeout": SHORT}).issue(label), place.admin)

        assert isinstance(error, SourceUnavailable | SourceInvalid)
        assert error.unknown
        armed.wait()
        source = make()
        found = source.find(label)
        assert [lease.id for lease in found] == place.labelled(label)
        assert len(found) == made
        for lease in found:
            source.revoke(lease)
        assert place.labelled(label) == []

    def test_a_key_made_after_our_deadline_is_found_later(
        self, place: Place, make: Make, faults: Faults, label: str
    ) -> None:
        """What is not there at once may be there after a while, and is found then."""
        self.arm(faults, self.MINT, CommitLate())
        error = problem(lambda: make(source={"timeout": SHORT}).issue(label), place.admin)
        source = make()
        at_once = list(source.find(label))

        faults.commit_late()

        later = [lease.id for lease in source.find(label)]
        assert error.unknown
        assert isinstance(error, SourceUnavailable)
        assert (at_once, later) == ([], place.labelled(label))
        assert len(later) == 1

    @pytest.mark.parametrize("how", FINAL)
    def test_a_final_answer_is_not_unknown(
        self, place: Place, make: Make, faults: Faults, label: str, how: str
    ) -> None:
        """An answer that rules out a key is an error of its class, with nothing to look up."""
        fault, kind = FINAL[how]
        self.arm(faults, self.MINT, fault)
        error = problem(lambda: make().issue(label), place.admin)
        assert (type(error), error.unknown) == (kind, False)
        assert place.labelled(label) == []

    def test_a_connection_that_is_refused_made_no_key(self, make: Make, label: str) -> None:
        """What was never sent is not unknown."""
        error = problem(lambda: make(base_url=refused_url()).issue(label))
        assert (type(error), error.unknown) == (SourceUnavailable, False)
        assert "could not be reached" in error.message

    def test_a_second_key_under_a_label_is_not_made(
        self, place: Place, make: Make, label: str
    ) -> None:
        """A label that is taken is refused, as something that has to be looked up."""
        source = make()
        lease = source.issue(label).lease
        error = problem(lambda: source.issue(label), place.admin)
        assert (type(error), error.unknown) == (SourceInvalid, True)
        assert place.labelled(label) == [lease.id]

    @pytest.mark.parametrize("wish", ["seconds", "a date", "nothing"])
    def test_a_gateway_s_wish_to_wait_is_kept(
        self, make: Make, faults: Faults, label: str, wish: str
    ) -> None:
        """Retry-After counts in seconds and as a date; without one it is a few seconds."""
        asked, least, most = {
            "seconds": (too_many(7), 7, 7),
            "a date": (too_many(datetime.now(UTC) + timedelta(seconds=90)), 80, 90),
            "nothing": (too_many(), 1, 60),
        }[wish]
        self.arm(faults, self.MINT, asked)
        error = problem(lambda: make().issue(label))
        assert isinstance(error, SourceUnavailable)
        assert not error.unknown
        assert error.retry_after is not None
        assert least <= error.retry_after.total_seconds() <= most

    def test_a_wish_to_wait_is_kept_with_any_status(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """A 503 may say when to come back, too."""
        self.arm(faults, self.MINT, Status(503, {"retry-after": "11"}))
        assert problem(lambda: make().issue(label)).retry_after == timedelta(seconds=11)

    # Revocations that are not confirmed.

    @pytest.mark.parametrize(
        "fault",
        [
            Html(404),
            Status(404, {}, b'{"detail":"Not Found"}'),
            Html(),
            GarbageJson(),
            Status(200, {}, b'{"deleted_keys":[]}'),
            Status(200, {}, b'{"deleted_keys":["another"]}'),
            Status(204),
            Html(403),
            Html(500),
            DropBeforeCommit(),
            Reset(),
            too_many(1),
        ],
        ids=lambda fault: f"{type(fault).__name__} {getattr(fault, 'status', '')}".strip(),
    )
    def test_only_the_gateway_s_own_word_is_a_revocation(
        self, place: Place, make: Make, faults: Faults, label: str, fault: Fault
    ) -> None:
        """A page with 404, a 200 that confirms nothing, a dropped call: the key still lives."""
        source = make()
        lease = source.issue(label).lease
        self.arm(faults, self.REVOKE, fault)
        problem(lambda: source.revoke(lease), place.admin, lease.id)
        assert place.labelled(label) == [lease.id]
        source.revoke(lease)
        assert place.labelled(label) == []

    def test_a_revocation_whose_answer_is_lost_is_confirmed_by_the_next(
        self, place: Place, make: Make, faults: Faults, label: str
    ) -> None:
        """Asked again, a gateway that has done it says that it knows no such key."""
        source = make()
        lease = source.issue(label).lease
        self.arm(faults, self.REVOKE, CommitThenDrop())
        problem(lambda: source.revoke(lease), place.admin, lease.id)
        assert place.labelled(label) == []
        source.revoke(lease)

    @pytest.mark.parametrize(
        "fault",
        [Html(), Html(404), GarbageJson(), Status(200, {}, b"[]"), Html(502), Truncated(), Huge()],
        ids=lambda fault: f"{type(fault).__name__} {getattr(fault, 'status', '')}".strip(),
    )
    def test_a_list_that_cannot_be_read_is_not_an_empty_one(
        self, make: Make, faults: Faults, label: str, fault: Fault
    ) -> None:
        """Nothing but a list of keys says that a label has no key."""
        self.arm(faults, self.FIND, fault, times=None)
        source = make()
        problem(lambda: source.find(label))
        problem(lambda: source.sweep(label))

    # Through a worker.

    def test_a_head_that_trickles_is_ended_by_the_hard_timer(
        self, place: Place, make: Make, faults: Faults, label: str, tmp_path: Path
    ) -> None:
        """No read ever times out, so the worker is ended; the key that was made can be found."""
        armed = self.arm(faults, self.MINT, Trickle(0.2))
        with self.pool(tmp_path, place) as pool, pytest.raises(SourceUnavailable) as caught:
            pool.call("litellm", "issue", 3.0, profile=self.profile(faults.url), label=label)

        check_silent(caught.value, place.admin)
        assert caught.value.unknown
        assert armed.wait().forwarded
        assert [r.event for r in Journal(tmp_path).read()] == [Event.WANTED]
        source = make()
        [lease] = source.find(label)
        source.revoke(lease)

    def test_a_worker_mints_writes_verifies_and_revokes(
        self, place: Place, faults: Faults, label: str, tmp_path: Path
    ) -> None:
        """What a source promises holds on the other side of a worker's pipe."""
        profile = self.profile(faults.url)
        with self.pool(tmp_path, place) as pool:
            answer = pool.call("litellm", "issue", 30.0, profile=profile, label=label)
            secret = Secret(answer["credential"]["secret"])
            seen = pool.call("litellm", "verify", 30.0, profile=profile, secret=secret)
            found = pool.call("litellm", "find", 30.0, profile=profile, label=label)
            lease = Lease(found["found"][0]["id"], "litellm", datetime.now(UTC))
            pool.call(
                *("litellm", "revoke", 30.0),
                profile="work",
                label=label,
                fingerprint=secret.fingerprint,
                issuer=profile.issuer,
                lease=lease,
            )
        assert seen["look"] == "alive"
        assert lease.id == sha256(secret.reveal().encode()).hexdigest()
        assert place.labelled(label) == []
        events = [record.event for record in Journal(tmp_path).read()]
        assert events == [Event.WANTED, Event.HAVE, Event.GONE]

    def test_a_final_answer_closes_the_label_and_a_lost_one_leaves_it_open(
        self, place: Place, faults: Faults, label: str, tmp_path: Path
    ) -> None:
        """The journal knows which labels have to be looked up."""
        profile = self.profile(faults.url)
        with self.pool(tmp_path, place) as pool:
            for fault, each in ((Html(404), "final"), (CommitThenDrop(), "lost")):
                self.arm(faults, self.MINT, fault)
                with pytest.raises(SourceError) as caught:
                    pool.call("litellm", "issue", 30.0, profile=profile, label=f"{label}-{each}")
                assert caught.value.unknown is (each == "lost")
                check_silent(caught.value, place.admin)
        records = [(r.label.removeprefix(f"{label}-"), r.event) for r in Journal(tmp_path).read()]
        assert records == [
            ("final", Event.WANTED),
            ("final", Event.GONE),
            ("lost", Event.WANTED),
        ]

    @contextmanager
    def pool(self, state: Path, place: Place) -> Iterator[Pool]:
        pool = Pool(state, {ADMIN: place.admin}, None, {"litellm": {ADMIN}})
        try:
            yield pool
        finally:
            pool.close()
