"""LiteLLM's key API, at a real proxy with its database and at the development gateway."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from keybroker import sources
from keybroker.config import Profile
from keybroker.credential import Look, Secret
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError, SourceDenied, SourceInvalid, SourceUnavailable
from tests.contracts import (
    ADMIN,
    Make,
    MintedSourceContract,
    Place,
    ask,
    check_silent,
    entry,
    problem,
)
from tests.servers.faults import CommitThenDrop, Faults, Html, Status
from tests.servers.litellm import LiteLLM
from tests.servers.upstream import MODEL


class Proxy(Place):
    """The real proxy; its books are its database."""

    def __init__(self, server: LiteLLM) -> None:
        self.server = server
        self.url, self.admin = server.url, server.master_key

    def books(self) -> Mapping[str, str | None]:
        return {row["token"]: row["key_alias"] for row in self.server.key_rows()}

    def row(self, label: str) -> dict[str, Any]:
        [row] = [row for row in self.server.key_rows() if row["key_alias"] == label]
        return row


class Ours(Place):
    """The development gateway."""

    def __init__(self, server: DevGateway) -> None:
        self.server = server
        self.url, self.admin = server.url, server.master_key

    def books(self) -> Mapping[str, str | None]:
        return {key.token: key.alias for key in self.server.live_keys()}


@pytest.mark.servers
class TestProxy(MintedSourceContract):
    """The contract at a real LiteLLM."""

    @pytest.fixture
    def place(self, litellm: LiteLLM) -> Iterator[Proxy]:
        yield Proxy(litellm)

    def test_the_wishes_arrive_in_the_database(self, place: Proxy, make: Make, label: str) -> None:
        """Models, budget, limits, metadata and owner are in the key's row, as configured."""
        user, team = f"user-{label}", f"team-{label}"
        for path, body in (
            ("/user/new", {"user_id": user, "auto_create_key": False}),
            ("/team/new", {"team_id": team, "team_alias": team}),
        ):
            assert ask(place.url, "POST", path, place.admin, body)[0] == 200
        wish = {
            "models": [MODEL],
            "max_budget": 1.5,
            "budget_duration": "24h",
            "rpm_limit": 60,
            "tpm_limit": 9000,
            "max_parallel_requests": 3,
            "user_id": user,
            "team_id": team,
        }
        credential = make(source={**wish, "metadata": {"host": "laptop7"}}).issue(label)

        row = place.row(label)

        assert {name: row[name] for name in wish} == wish
        assert row["metadata"] == {"host": "laptop7", "keybroker": label}
        assert row["token"] == credential.lease.id
        assert row["allowed_routes"] == ["llm_api_routes"]
        assert row["blocked"] in (None, False)
        assert row["auto_rotate"] in (None, False)
        assert credential.secret.reveal() not in json.dumps(row, default=str)

    def test_nothing_is_wished_that_was_not_configured(
        self, place: Proxy, make: Make, label: str
    ) -> None:
        """Without a wish a key has no limit of its own, but an end and a label."""
        make(source={"key_type": "default"}).issue(label)
        row = place.row(label)
        unset = ("max_budget", "budget_duration", "rpm_limit", "tpm_limit", "team_id")
        assert [row[name] for name in unset] == [None] * len(unset)
        assert (row["models"], row["allowed_routes"]) == ([], [])
        assert row["metadata"] == {"keybroker": label}
        left = row["expires"] - datetime.now(UTC)
        assert timedelta(minutes=59) < left <= timedelta(hours=1)

    def test_the_lease_ends_no_later_than_the_row(
        self, place: Proxy, make: Make, label: str
    ) -> None:
        """We never believe in a key for longer than its gateway does."""
        lease = make().issue(label).lease
        assert lease.expires_at is not None
        assert lease.expires_at <= place.row(label)["expires"] + timedelta(milliseconds=1)

    def test_a_minted_key_is_not_an_admin_key(self, place: Proxy, make: Make, label: str) -> None:
        """A key of the type that we ask for opens no key API, not even for itself."""
        key = make().issue(label).secret.reveal()
        status, answer = ask(place.url, "GET", "/key/info", key)
        assert status == 403
        assert "llm_api_routes" in answer["detail"]
        assert ask(place.url, "POST", "/key/generate", key, {})[0] in (401, 403)

    def test_a_key_without_its_model_is_not_condemned(self, make: Make, label: str) -> None:
        """A refusal that names the model says nothing about the key."""
        source = make(source={"models": [MODEL]}, verify="message", verify_model="claude-opus-4-6")
        assert source.verify(source.issue(label).secret).look is Look.UNDECIDED

    def test_a_wish_that_the_proxy_refuses_is_final(
        self, place: Proxy, make: Make, label: str
    ) -> None:
        """A budget's duration that the proxy does not know makes no key, and says whose fault."""
        source = make(source={"max_budget": 1.0, "budget_duration": "soon"})
        error = problem(lambda: source.issue(label), place.admin)
        assert (type(error), error.unknown) == (SourceInvalid, False)
        assert place.labelled(label) == []

    def test_without_its_database_nothing_is_decided_and_all_recovers(
        self, place: Proxy, make: Make, label: str
    ) -> None:
        """An outage is "try again", and for a mint "look it up"; afterwards everything works."""
        key = make().issue(label)
        with place.server.outage():
            source = make(source={"timeout": "20s"})
            minting = problem(lambda: source.issue(f"{label}-2"), place.admin)
            revoking = problem(lambda: source.revoke(key.lease), place.admin, key.lease.id)
            finding = problem(lambda: source.find(label), place.admin)
            nobody = source.verify(Secret(f"sk-{secrets.token_urlsafe(32)}"))
        assert (type(minting), minting.unknown) == (SourceUnavailable, True)
        assert type(revoking) is SourceUnavailable
        assert type(finding) is SourceUnavailable
        assert nobody.look is Look.UNDECIDED

        source = make(source={"timeout": "20s"})
        assert [lease.id for lease in source.find(label)] == [key.lease.id]
        found = source.find(f"{label}-2")
        assert [lease.id for lease in found] == place.labelled(f"{label}-2")
        assert source.verify(key.secret).look is Look.ALIVE
        source.revoke(key.lease)
        assert not place.takes(key.secret.reveal())

    def test_a_user_who_may_mint_needs_no_master_key(
        self, place: Proxy, make: Make, label: str
    ) -> None:
        """A key of an internal user mints, finds and revokes keys of that user."""
        user = f"user-{label}"
        body = {"user_id": user, "user_role": "internal_user", "auto_create_key": False}
        assert ask(place.url, "POST", "/user/new", place.admin, body)[0] == 200
        mine = place.mint(f"admin-{label}", user_id=user, key_type="default")
        source = make(admin=mine, source={"user_id": user})

        key = source.issue(label)

        assert [lease.id for lease in source.find(label)] == [key.lease.id]
        assert place.row(label)["user_id"] == user
        source.revoke(key.lease)
        assert place.labelled(label) == []
        other = make(admin=mine, source={"user_id": "somebody-else"})
        assert type(problem(lambda: other.issue(label), mine)) is SourceDenied


class TestOurs(MintedSourceContract):
    """The contract at the development gateway, and what a real proxy is not configured for."""

    @pytest.fixture
    def place(self) -> Iterator[Ours]:
        with DevGateway() as gateway:
            yield Ours(gateway)
        assert gateway.failures == ()

    def test_a_proxy_that_makes_the_keys_itself(
        self, place: Ours, make: Make, faults: Faults, label: str
    ) -> None:
        """Where chosen keys are forbidden, the proxy's own is taken, known by its SHA-256."""
        place.server.options.disable_custom_api_keys = True
        source = make()
        key = source.issue(label)
        assert place.takes(key.secret.reveal())
        assert place.labelled(label) == [key.lease.id]
        assert [entry.path for entry in faults.log] == ["/key/generate"] * 2
        source.revoke(key.lease)
        assert place.labelled(label) == []

    def test_a_key_that_the_proxy_made_and_nobody_heard_of_is_found(
        self, place: Ours, make: Make, faults: Faults, label: str
    ) -> None:
        """Its secret is lost, but not the key."""
        place.server.options.disable_custom_api_keys = True
        self.arm(faults, self.MINT, Status(403, {}, _DISABLED))
        self.arm(faults, self.MINT, CommitThenDrop())
        source = make()
        error = problem(lambda: source.issue(label), place.admin)
        assert error.unknown
        [lease] = source.find(label)
        source.revoke(lease)
        assert place.labelled(label) == []

    def test_a_data_plane_that_takes_every_key_proves_nothing(
        self, place: Ours, make: Make, label: str
    ) -> None:
        """No method of the data plane refused a made-up key: alive only by the key API."""
        place.server.options.accept_every_key = True
        source = make()
        key, gone = source.issue(f"{label}-1"), source.issue(f"{label}-2")
        source.revoke(gone.lease)
        assert place.takes("sk-nobody-has-minted-this")

        by_data_plane = [
            make(verify=mode).verify(key.secret).look
            for mode in ("models", "count_tokens", "message")
        ]
        alive, revoked = source.verify(key.secret), source.verify(gone.secret)

        assert by_data_plane == [Look.UNVERIFIED] * 3
        assert (alive.look, alive.method) == (Look.ALIVE, "info")
        assert (revoked.look, revoked.method) == (Look.REFUSED, "info")

    def test_a_version_that_lists_look_alikes_finds_no_stranger(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """Some versions search for parts of an alias; only the very label is ours."""
        names = [label, f"{label}-2", label.upper(), f"x{label}", None]
        rows = [{"key_alias": name, "token": str(name)} for name in names]
        body = json.dumps({"keys": [*rows, "a-hash", {"key_alias": label}]}).encode()
        self.arm(faults, self.FIND, Status(200, {}, body))
        assert [lease.id for lease in make().find(label)] == [label]

    def test_two_keys_under_one_label_are_both_found(
        self, place: Ours, make: Make, label: str
    ) -> None:
        """A proxy lets concurrent creates share an alias; none of them is forgotten."""
        place.server.options.unique_aliases = False
        source = make()
        ids = {source.issue(label).lease.id for _ in range(2)}
        assert {lease.id for lease in source.find(label)} == ids

    @pytest.mark.parametrize("ahead", [timedelta(minutes=10), -timedelta(minutes=10)])
    def test_a_gateway_whose_clock_is_off_does_not_move_the_end(
        self, place: Ours, make: Make, label: str, ahead: timedelta
    ) -> None:
        """An end is corrected by the skew of the Date header, and never later than asked for."""
        place.server.options.date_skew = ahead
        lease = make().issue(label).lease
        assert lease.expires_at is not None
        off = lease.expires_at - (lease.issued_at + timedelta(hours=1))
        assert -timedelta(seconds=31) < off <= timedelta(0)

    def test_a_gateway_that_gives_less_is_believed(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """A shorter life than was asked for is the lease's end."""
        key = f"sk-{'k' * 43}"
        soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        body = json.dumps({"key": key, "expires": soon}).encode()
        self.arm(faults, self.MINT, Status(403, {}, _DISABLED))
        self.arm(faults, self.MINT, Status(200, {}, body))
        lease = make().issue(label).lease
        assert lease.expires_at == datetime.fromisoformat(soon)

    @pytest.mark.parametrize(
        "value",
        [
            {"key": "two words"},
            {"key": ""},
            {"key": None},
            {"key": "sk-ümlaut"},
            {"key": "k" * 16_385},
            {"key": f"sk-{'k' * 43}", "expires": "soon"},
            {"key": f"sk-{'k' * 43}", "expires": "2026-11-21T16:00:00"},
            {},
            [],
        ],
    )
    def test_an_unusable_key_of_the_proxy_is_unknown(
        self, make: Make, faults: Faults, label: str, value: object
    ) -> None:
        """A 200 with something that cannot be handed out has to be looked up."""
        self.arm(faults, self.MINT, Status(403, {}, _DISABLED))
        self.arm(faults, self.MINT, Status(200, {}, json.dumps(value).encode()))
        error = problem(lambda: make().issue(label))
        assert (type(error), error.unknown) == (SourceInvalid, True)

    def test_a_key_that_was_not_asked_for_is_not_taken(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """A 200 that repeats another key is no success."""
        body = json.dumps({"key": f"sk-{'k' * 43}"}).encode()
        self.arm(faults, self.MINT, Status(200, {}, body))
        error = problem(lambda: make().issue(label))
        assert (type(error), error.unknown) == (SourceInvalid, True)

    @pytest.mark.parametrize(
        ("status", "message", "words"),
        [
            (400, "duration is over max limit set in config - user_value=60d", "upper bound"),
            (500, "Invalid duration format", "duration"),
            (500, "x is an Enterprise feature, you need sk-1234567890abcdef", "licence"),
            (400, "model sk-1234567890abcdef is not known", "model"),
            (403, "User can only create keys for themselves.", "no right"),
            (401, "Only proxy admin can be used to generate keys", "no right"),
            (401, "Invalid proxy server token passed, sk-...2Tcg", "refused the admin key"),
        ],
    )
    def test_what_the_proxy_objects_to_is_said_in_our_words(
        self, make: Make, faults: Faults, label: str, status: int, message: str, words: str
    ) -> None:
        """People see what to change, and never the answer itself."""
        body = {"error": {"message": message, "type": "x", "param": None, "code": str(status)}}
        self.arm(faults, self.MINT, Status(status, {}, json.dumps(body).encode()))
        error = problem(lambda: make().issue(label), message)
        assert words in error.message
        assert not error.unknown

    def test_an_admin_reference_that_is_not_there_makes_no_call(
        self, faults: Faults, label: str
    ) -> None:
        """Without the admin key nothing is sent, and the variable is named."""
        source = sources.build(self.profile(faults.url), {})
        with pytest.raises(ConfigError) as caught:
            source.issue(label)
        source.close()
        check_silent(caught.value)
        assert ADMIN in caught.value.message
        assert faults.log == ()

    def test_a_key_is_asked_for_once(self, make: Make, faults: Faults, label: str) -> None:
        """A lost answer is not asked for again: the label is looked up instead."""
        self.arm(faults, self.MINT, CommitThenDrop())
        problem(lambda: make().issue(label))
        assert [entry.path for entry in faults.log] == ["/key/generate"]

    def test_info_says_refused_of_a_key_that_has_expired(
        self, place: Ours, make: Make, label: str
    ) -> None:
        """A key API that still knows an expired key does not call it alive."""
        source = make(verify="info")
        expired = Secret(place.mint(label, duration="0s"))
        assert source.verify(expired).look is Look.REFUSED

    @pytest.mark.parametrize("info", [{"expires": "2020-01-01T00:00:00Z"}, {"blocked": True}])
    def test_info_of_a_version_without_a_status_is_read_too(
        self, make: Make, faults: Faults, label: str, info: dict[str, Any]
    ) -> None:
        """An end that has passed, or a block, is enough."""
        source = make(verify="info")
        key = source.issue(label)
        source.verify(key.secret)
        body = json.dumps({"key": "x", "info": info}).encode()
        faults.next(Status(200, {}, body), path="/key/info")
        assert source.verify(key.secret).look is Look.REFUSED

    def test_a_portal_in_front_of_the_key_api_says_nothing_of_a_key(
        self, make: Make, faults: Faults, label: str
    ) -> None:
        """A page with 404 from the key API is not "no such key"."""
        source = make(verify="info")
        key = source.issue(label)
        faults.next(Html(404), path="/key/info", times=None)
        assert source.verify(key.secret).look is not Look.REFUSED


def test_the_admin_key_is_read_anew_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed credential is used at once."""
    with DevGateway() as gateway:
        environment = {ADMIN: "sk-wrong-wrong-wrong"}
        source = sources.build(_profile(gateway), environment)
        problem(lambda: source.find("kb-x"))
        environment[ADMIN] = gateway.master_key
        assert list(source.find("kb-x")) == []
        source.close()


def _profile(gateway: DevGateway | Faults) -> Profile:
    return entry(gateway.url, {"type": "litellm", "admin": {"env": ADMIN}, "lifetime": "1h"})


_DISABLED = json.dumps(
    {
        "error": {
            "message": "{'error': 'Custom API key values are disabled by your administrator.'}",
            "type": "internal_server_error",
            "param": None,
            "code": "403",
        }
    }
).encode()


@pytest.mark.parametrize(
    ("status", "body", "over"),
    [
        (500, b'{"error": {"message": "Internal Server Error.", "code": "500"}}', True),
        (503, b'{"error": {"message": "no database", "code": "503"}}', True),
        (500, b'{"error": {"message": "of a load balancer"}}', False),
        (502, b'{"error": {"message": "bad gateway"}}', False),
        (504, b"<html>", False),
        (500, b"<html>", False),
    ],
)
def test_a_call_is_over_when_the_proxy_itself_said_so(status: int, body: bytes, over: bool) -> None:
    """What answered in its place, or with another's words, may have left it at work."""
    with DevGateway() as gateway, Faults(gateway.url) as faults:
        faults.next(Status(status, body=body), path="/key/generate")
        source = sources.build(_profile(faults), {ADMIN: gateway.master_key})
        with pytest.raises(SourceUnavailable) as caught:
            source.issue("kb-00000000-work-01m7zeppq60nxge04zbh7s1w6p")
        source.close()
    assert (caught.value.unknown, caught.value.over) == (True, over)
