"""The development gateway answers as a real LiteLLM does; the bodies were taken from one."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import Any

import pytest

from keybroker.devgateway import DevGateway

MASTER = "sk-master-of-the-tests"
KEY = "sk-canary-0123456789"
TOKEN = sha256(KEY.encode()).hexdigest()
NOON = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)
MESSAGE = {
    "model": "claude-sonnet-4-6",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
}


@dataclass
class Clock:
    """A clock that moves when told to."""

    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str
    body: Any = field(init=False)

    def __post_init__(self) -> None:
        is_json = self.headers.get("content-type") == "application/json" and self.text
        self.body = json.loads(self.text) if is_json else None

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]


class Caller:
    """Calls one gateway, with the master key unless told otherwise."""

    def __init__(self, gateway: DevGateway) -> None:
        self.gateway = gateway

    def __call__(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = MASTER,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if key is not None:
            sent.setdefault("Authorization", f"Bearer {key}")
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.gateway.url.removeprefix("http://"), timeout=5)
        try:
            connection.request(method, path, content, sent)
            response = connection.getresponse()
            text = response.read().decode()
            seen = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, seen, text)
        finally:
            connection.close()

    def mint(self, **fields: Any) -> Answer:
        return self("POST", "/key/generate", {"key": KEY, **fields})

    def message(self, key: str | None = KEY, **fields: Any) -> Answer:
        return self("POST", "/v1/messages?beta=true", {**MESSAGE, **fields}, key=key)

    def models(self, key: str = KEY) -> Answer:
        return self("GET", "/v1/models", key=key)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gateway(clock: Clock) -> Iterator[DevGateway]:
    with DevGateway(MASTER, clock=clock) as gateway:
        yield gateway
    assert gateway.failures == ()


@pytest.fixture
def call(gateway: DevGateway) -> Caller:
    return Caller(gateway)


# Minting.


def test_the_reply_holds_the_key_and_its_hash(call: Caller) -> None:
    body = call.mint(key_alias="kb-1", metadata={"host": "laptop"}).body
    assert (body["key"], body["token"], body["token_id"]) == (KEY, TOKEN, TOKEN)
    assert (body["key_alias"], body["key_name"]) == ("kb-1", "sk-...6789")
    assert body["metadata"] == {"host": "laptop"}


def test_a_key_of_the_servers_own_choice_starts_with_sk(call: Caller) -> None:
    body = call("POST", "/key/generate", {}).body
    assert re.fullmatch(r"sk-[\w-]{22}", body["key"])
    assert body["token"] == sha256(body["key"].encode()).hexdigest()


def test_a_key_without_a_duration_never_ends(call: Caller) -> None:
    assert call.mint().body["expires"] is None
    assert call.mint(duration=None).body["expires"] is None


def test_the_reply_has_microseconds_and_the_table_milliseconds(call: Caller) -> None:
    assert call.mint(duration="1h").body["expires"] == "2026-11-21T13:00:00.123456Z"
    info = call("GET", f"/key/info?key={TOKEN}").body["info"]
    assert info["expires"] == "2026-11-21T13:00:00.123000+00:00"


@pytest.mark.parametrize(
    ("duration", "lifetime"),
    [
        ("30s", timedelta(seconds=30)),
        ("30m", timedelta(minutes=30)),
        ("8h", timedelta(hours=8)),
        ("2d", timedelta(days=2)),
        ("1w", timedelta(weeks=1)),
        ("1mo", timedelta(days=30)),
        ("hourly", timedelta(hours=1)),
        ("Daily", timedelta(days=1)),
        ("weekly", timedelta(weeks=1)),
        ("monthly", timedelta(days=30)),
        ("0s", timedelta(0)),
        ("8hours", timedelta(hours=8)),
        ("500ms", timedelta(minutes=500)),  # a prefix is enough, and it is the wrong one
    ],
)
def test_a_duration_is_read_as_litellm_reads_it(
    call: Caller, duration: str, lifetime: timedelta
) -> None:
    assert datetime.fromisoformat(call.mint(duration=duration).body["expires"]) == NOON + lifetime


@pytest.mark.parametrize("duration", ["abc", "-1", "", " 5s"])
def test_a_duration_that_is_none_is_a_500(call: Caller, duration: str) -> None:
    answer = call.mint(duration=duration)
    assert answer.status == 500
    assert answer.error == {
        "message": "Invalid duration format",
        "type": "internal_server_error",
        "param": None,
        "code": "500",
    }


@pytest.mark.parametrize("duration", ["30", "1.5h"])
def test_a_duration_without_a_unit_is_a_500(call: Caller, duration: str) -> None:
    expected = f"Unsupported duration unit, passed duration: {duration}"
    assert call.mint(duration=duration).error["message"] == expected


def test_a_duration_beyond_the_calendar_is_a_500(call: Caller) -> None:
    assert call.mint(duration="99999999999d").status == 500
    assert call.mint(duration="999999mo").status == 500


def test_an_unknown_field_is_ignored(call: Caller) -> None:
    assert call.mint(colour="green").status == 200


def test_a_repeated_create_echoes_the_request_and_keeps_the_row(call: Caller) -> None:
    call.mint(key_alias="first", duration="1h", metadata={"n": 1})
    again = call.mint(key_alias="second", duration="9h", metadata={"n": 2}).body
    assert (again["key_alias"], again["metadata"]) == ("second", {"n": 2})
    assert again["expires"] == "2026-11-21T21:00:00.123456Z"
    info = call("GET", f"/key/info?key={TOKEN}").body["info"]
    assert (info["key_alias"], info["metadata"]) == ("first", {"n": 1})
    assert info["expires"] == "2026-11-21T13:00:00.123000+00:00"


def test_an_alias_that_is_taken_is_a_400_even_for_the_same_key(call: Caller) -> None:
    call.mint(key_alias="kb-1")
    answer = call.mint(key_alias="kb-1")
    assert answer.status == 400
    assert answer.error == {
        "message": "Key with alias 'kb-1' already exists. "
        "Unique key aliases across all keys are required.",
        "type": "bad_request_error",
        "param": "key_alias",
        "code": "400",
    }


def test_aliases_can_be_shared_where_the_check_is_a_race(gateway: DevGateway, call: Caller) -> None:
    gateway.options.unique_aliases = False
    call("POST", "/key/generate", {"key_alias": "kb-1"})
    call("POST", "/key/generate", {"key_alias": "kb-1"})
    assert [key.alias for key in gateway.live_keys()] == ["kb-1", "kb-1"]


@pytest.mark.parametrize("alias", ["a/../b", "a\x01b"])
def test_an_alias_that_could_be_a_path_or_a_control_is_a_400(call: Caller, alias: str) -> None:
    answer = call.mint(key_alias=alias)
    assert (answer.status, answer.error["message"]) == (400, "Invalid key_alias")


RULE = "{'error': \"Invalid key format. LiteLLM Virtual Key must"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "sk-short",
            f"{RULE} be at least 16 characters long.'}}".replace('"', "'"),
        ),
        (
            "abcdefghijklmnopqrstuvwxyz",
            f"{RULE} start with 'sk-'. Received: abcd****wxyz\"}}",
        ),
    ],
)
def test_a_chosen_key_has_rules(call: Caller, key: str, message: str) -> None:
    answer = call("POST", "/key/generate", {"key": key})
    assert (answer.status, answer.error["type"]) == (400, "internal_server_error")
    assert answer.error["message"] == message


def test_a_chosen_key_can_be_forbidden(gateway: DevGateway, call: Caller) -> None:
    gateway.options.disable_custom_api_keys = True
    answer = call.mint()
    assert (answer.status, answer.error["type"]) == (403, "internal_server_error")
    assert "Keys must be auto-generated" in answer.error["message"]
    assert call("POST", "/key/generate", {}).status == 200


def test_fields_of_the_wrong_type_are_a_422_in_fastapis_shape(call: Caller) -> None:
    answer = call.mint(key_alias=5, models="x", metadata=[], rpm_limit="abc", max_budget={})
    assert answer.status == 422
    assert {(d["type"], d["loc"][1]) for d in answer.body["detail"]} == {
        ("string_type", "key_alias"),
        ("list_type", "models"),
        ("dict_type", "metadata"),
        ("int_parsing", "rpm_limit"),
        ("float_type", "max_budget"),
    }


def test_an_unknown_key_type_is_a_422(call: Caller) -> None:
    assert call.mint(key_type="zzz").body["detail"][0]["type"] == "enum"


def test_a_body_that_is_not_json_is_a_422(call: Caller) -> None:
    answer = call("POST", "/key/generate", raw=b"{nope")
    problem = {"type": "json_invalid", "loc": ["body", 1], "msg": "JSON decode error"}
    assert (answer.status, answer.body) == (422, {"detail": [problem]})


def test_a_body_that_is_not_an_object_is_a_500_without_a_code(call: Caller) -> None:
    answer = call("POST", "/key/generate", [1])
    expected = {"message": "Internal server error", "type": "internal_server_error"}
    assert (answer.status, answer.error) == (500, expected)


def test_a_bad_budget_duration_is_a_400(call: Caller) -> None:
    assert call.mint(budget_duration="zz").status == 400


# Looking keys up.


def test_info_takes_the_hash_or_the_key(call: Caller) -> None:
    call.mint(key_alias="kb-1")
    by_hash = call("GET", f"/key/info?key={TOKEN}").body
    by_key = call("GET", f"/key/info?key={KEY}").body
    assert (by_hash["key"], by_key["key"]) == (TOKEN, KEY)
    assert by_hash["info"] == by_key["info"]
    assert (by_hash["info"]["status"], by_hash["info"]["key_alias"]) == ("active", "kb-1")
    assert "token" not in by_hash["info"]


def test_info_of_an_unknown_key_is_a_404(call: Caller) -> None:
    answer = call("GET", f"/key/info?key={TOKEN}")
    assert answer.status == 404
    assert answer.error == {
        "message": "Key not found in database",
        "type": "not_found_error",
        "param": "key",
        "code": "404",
    }


def test_info_of_a_deleted_key_is_answered_from_the_archive(call: Caller) -> None:
    call.mint(key_alias="kb-1")
    call("POST", "/key/delete", {"keys": [TOKEN]})
    info = call("GET", f"/key/info?key={TOKEN}").body["info"]
    assert (info["status"], info["key_alias"]) == ("deleted", "kb-1")


@pytest.mark.parametrize(
    ("path", "status"), [("/key/block", "revoked"), ("/key/unblock", "active")]
)
def test_info_tells_a_blocked_key(call: Caller, path: str, status: str) -> None:
    call.mint()
    assert call("POST", path, {"key": TOKEN}).body["blocked"] is (status == "revoked")
    assert call("GET", f"/key/info?key={TOKEN}").body["info"]["status"] == status


def test_info_tells_an_expired_key(call: Caller, clock: Clock) -> None:
    call.mint(duration="1s")
    clock.advance(seconds=2)
    assert call("GET", f"/key/info?key={TOKEN}").body["info"]["status"] == "expired"


def test_list_pages_newest_first(call: Caller, clock: Clock) -> None:
    tokens = []
    for _ in range(3):
        tokens.append(call("POST", "/key/generate", {}).body["token"])
        clock.advance(seconds=1)
    first = call("GET", "/key/list?page=1&size=2").body
    assert first == {
        "keys": [tokens[2], tokens[1]],
        "total_count": 3,
        "current_page": 1,
        "total_pages": 2,
    }
    assert call("GET", "/key/list?page=2&size=2").body["keys"] == [tokens[0]]


def test_list_by_alias_is_exact_unless_told_otherwise(call: Caller) -> None:
    call.mint(key_alias="kb-laptop-1")
    assert call("GET", "/key/list?key_alias=kb-laptop").body["keys"] == []
    assert call("GET", "/key/list?key_alias=kb-laptop-1").body["keys"] == [TOKEN]
    query = "key_alias=LAPTOP&substring_matching=true"
    assert call("GET", f"/key/list?{query}").body["keys"] == [TOKEN]


def test_list_gives_objects_on_request(call: Caller) -> None:
    call.mint(key_alias="kb-1")
    found = call("GET", f"/key/list?key_hash={TOKEN}&return_full_object=true").body["keys"]
    assert [(row["token"], row["key_alias"]) for row in found] == [(TOKEN, "kb-1")]


@pytest.mark.parametrize("status", ["active", "expired", "revoked", "deleted"])
def test_list_by_status(call: Caller, clock: Clock, status: str) -> None:
    call.mint(duration="1s" if status == "expired" else "1h")
    clock.advance(seconds=2)
    if status == "revoked":
        call("POST", "/key/block", {"key": KEY})
    if status == "deleted":
        call("POST", "/key/delete", {"keys": [KEY]})
    states = ("active", "expired", "revoked", "deleted")
    counts = {s: call("GET", f"/key/list?status={s}").body["total_count"] for s in states}
    assert counts == {s: int(s == status) for s in states}


def test_list_refuses_a_page_of_more_than_a_hundred(call: Caller) -> None:
    answer = call("GET", "/key/list?size=101&page=0")
    types = [problem["type"] for problem in answer.body["detail"]]
    assert (answer.status, types) == (422, ["greater_than_equal", "less_than_equal"])


def test_list_refuses_an_unknown_status(call: Caller) -> None:
    answer = call("GET", "/key/list?status=zzz")
    assert (answer.status, answer.error["param"]) == (400, "None")


def test_aliases_contain_the_search_text(call: Caller) -> None:
    call.mint(key_alias="kb-laptop-1")
    call("POST", "/key/generate", {"key_alias": "other"})
    assert call("GET", "/key/aliases?search=KB-").body == {
        "aliases": ["kb-laptop-1"],
        "total_count": 1,
        "current_page": 1,
        "total_pages": 1,
        "size": 50,
    }


def test_a_list_can_lag_behind_while_info_does_not(
    gateway: DevGateway, call: Caller, clock: Clock
) -> None:
    gateway.options.list_lag = 5
    call.mint(key_alias="kb-1")
    assert call("GET", "/key/list?key_alias=kb-1").body["keys"] == []
    assert call("GET", f"/key/info?key={TOKEN}").status == 200
    clock.advance(seconds=6)
    assert call("GET", "/key/list?key_alias=kb-1").body["keys"] == [TOKEN]


# Changing and ending keys.


def test_delete_names_what_was_sent(call: Caller) -> None:
    call.mint()
    answer = call("POST", "/key/delete", {"keys": [KEY]})
    assert (answer.status, answer.body) == (200, {"deleted_keys": [KEY]})


def test_delete_by_alias_frees_the_alias(call: Caller) -> None:
    call.mint(key_alias="kb-1")
    assert call("POST", "/key/delete", {"key_aliases": ["kb-1"]}).status == 200
    assert call("POST", "/key/generate", {"key_alias": "kb-1"}).status == 200


def test_delete_of_one_known_and_one_unknown_key_reports_both(call: Caller) -> None:
    call.mint()
    named = [KEY, "0" * 64]
    assert call("POST", "/key/delete", {"keys": named}).body == {"deleted_keys": named}


@pytest.mark.parametrize("body", [{"keys": [TOKEN]}, {"key_aliases": ["kb-1"]}])
def test_delete_of_nothing_known_is_a_404_with_a_dict_as_text(
    call: Caller, body: dict[str, list[str]]
) -> None:
    answer = call("POST", "/key/delete", body)
    assert answer.status == 404
    assert answer.error == {
        "message": "{'error': 'No keys found'}",
        "type": "internal_server_error",
        "param": None,
        "code": "404",
    }


def test_delete_of_nothing_named_is_a_422(call: Caller) -> None:
    assert call("POST", "/key/delete", {"keys": []}).status == 422


def test_a_deleted_key_can_be_made_again(call: Caller) -> None:
    call.mint()
    call("POST", "/key/delete", {"keys": [KEY]})
    call.mint()
    assert call.message().status == 200


def test_update_counts_the_duration_from_now(call: Caller, clock: Clock) -> None:
    call.mint(duration="1h")
    clock.advance(hours=2)
    assert call.message().status == 401
    answer = call("POST", "/key/update", {"key": TOKEN, "duration": "1h"})
    assert answer.body["expires"] == "2026-11-21T15:00:00.123000+00:00"
    assert call.message().status == 200


@pytest.mark.parametrize("never", ["-1", None])
def test_update_can_remove_the_end(call: Caller, never: str | None) -> None:
    call.mint(duration="1h")
    answer = call("POST", "/key/update", {"key": KEY, "duration": never})
    assert answer.body["expires"] is None


def test_update_without_a_duration_keeps_the_end(call: Caller) -> None:
    call.mint(duration="1h")
    answer = call("POST", "/key/update", {"key": KEY, "metadata": {"n": 2}})
    assert answer.body["metadata"] == {"n": 2}
    assert answer.body["expires"] == "2026-11-21T13:00:00.123000+00:00"


def test_a_bad_duration_is_a_400_on_update(call: Caller) -> None:
    call.mint()
    answer = call("POST", "/key/update", {"key": KEY, "duration": "zz"})
    assert (answer.status, answer.error["type"]) == (400, "auth_error")


@pytest.mark.parametrize("path", ["/key/update", "/key/block", "/key/unblock"])
def test_changing_an_unknown_key_is_a_404(call: Caller, path: str) -> None:
    answer = call("POST", path, {"key": TOKEN})
    assert (answer.status, answer.error["message"]) == (404, "Key not found.")


@pytest.mark.parametrize("path", [f"/key/{TOKEN}/regenerate", "/key/regenerate"])
def test_regenerate_without_a_licence_is_a_500(call: Caller, path: str) -> None:
    answer = call("POST", path, {"key": TOKEN})
    assert (answer.status, answer.error["type"]) == (500, "internal_server_error")
    assert answer.error["message"].startswith("Regenerating Virtual Keys is an Enterprise feature")


# Who may ask.


def test_a_wrong_master_key_is_an_unknown_key(call: Caller) -> None:
    answer = call("GET", "/key/list", key=KEY)
    assert answer.status == 401
    assert answer.error == {
        "message": "Authentication Error, Invalid proxy server token passed. "
        f"Received API Key = sk-...6789, Key Hash (Token) ={TOKEN}. "
        "Unable to find token in cache or `LiteLLM_VerificationTokenTable`",
        "type": "token_not_found_in_db",
        "param": "key",
        "code": "401",
    }


@pytest.mark.parametrize("path", ["/key/generate", "/key/delete", "/key/update", "/key/block"])
def test_a_key_without_the_right_gets_a_401_and_not_a_403(call: Caller, path: str) -> None:
    call.mint()
    answer = call("POST", path, {"key": KEY}, key=KEY)
    assert (answer.status, answer.error["type"]) == (401, "auth_error")
    assert "Only proxy admin can be used to generate" in answer.error["message"]
    assert f"Route={path}." in answer.error["message"]


def test_an_llm_key_may_not_ask_about_itself(call: Caller) -> None:
    call.mint(key_type="llm_api")
    answer = call("GET", "/key/info", key=KEY)
    assert answer.status == 403
    assert answer.body == {
        "detail": "Virtual key is not allowed to call this route. Only allowed to call routes: "
        "['llm_api_routes']. Tried to call route: /key/info"
    }


@pytest.mark.parametrize(
    ("key_type", "message", "models", "info"),
    [
        ("default", 200, 200, 200),
        ("llm_api", 200, 200, 403),
        ("management", 403, 403, 200),
        ("read_only", 403, 200, 200),
    ],
)
def test_a_key_type_confines_a_key(
    call: Caller, key_type: str, message: int, models: int, info: int
) -> None:
    call.mint(key_type=key_type)
    statuses = (
        call.message().status,
        call.models().status,
        call("GET", "/key/info", key=KEY).status,
    )
    assert statuses == (message, models, info)


def test_a_key_may_not_ask_about_another_users_key(call: Caller) -> None:
    call.mint(user_id="ann")
    other = call("POST", "/key/generate", {"user_id": "bob"}).body["key"]
    answer = call("GET", f"/key/info?key={TOKEN}", key=other)
    assert (answer.status, answer.error["type"]) == (403, "internal_server_error")


def test_a_key_may_not_list_keys(call: Caller) -> None:
    call.mint()
    answer = call("GET", "/key/list", key=KEY)
    assert (answer.status, answer.error["param"]) == (403, "user_id")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-litellm-api-key": f"Bearer {KEY}"}, 200),
        ({"x-litellm-api-key": KEY, "Authorization": "Bearer sk-unknown-000000000"}, 200),
        ({"Authorization": f"Bearer {KEY}", "x-api-key": "sk-unknown-000000000"}, 200),
        ({"Authorization": "Bearer sk-unknown-000000000", "x-api-key": KEY}, 401),
        ({"Authorization": "", "x-api-key": KEY}, 200),
        ({"Authorization": KEY}, 401),
        ({"x-api-key": f"Bearer {KEY}"}, 401),
    ],
)
def test_the_headers_have_an_order(call: Caller, headers: dict[str, str], status: int) -> None:
    call.mint()
    assert call("GET", "/v1/models", key=None, headers=headers).status == status


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "Authentication Error, No api key passed in."),
        ({"x-api-key": ""}, "Authentication Error, No api key passed in."),
        (
            {"Authorization": "Bearer ", "x-api-key": ""},
            "Authentication Error, Malformed API Key passed in. Ensure Key has `Bearer ` prefix.",
        ),
        (
            {"Authorization": "Bearer abc"},
            "LiteLLM Virtual Key expected. Received=****, expected to start with 'sk-'.",
        ),
        (
            {"Authorization": "Bearer abcdefghijklmnop"},
            "LiteLLM Virtual Key expected. Received=abcd****mnop, expected to start with 'sk-'.",
        ),
    ],
)
def test_what_is_no_key_gets_a_401(call: Caller, headers: dict[str, str], message: str) -> None:
    answer = call("POST", "/v1/messages", MESSAGE, key=None, headers=headers)
    assert answer.status == 401
    expected = {"message": message, "type": "auth_error", "param": "None", "code": "401"}
    assert answer.error == expected


# The data plane.


def test_a_message_is_answered_with_a_greeting(call: Caller) -> None:
    call.mint()
    body = call.message().body
    assert (body["type"], body["role"], body["model"]) == (
        "message",
        "assistant",
        "claude-sonnet-4-6",
    )
    assert body["content"][0]["text"].startswith("Hello")
    assert body["stop_reason"] == "end_turn"


def test_a_greeting_stops_at_max_tokens(call: Caller) -> None:
    call.mint()
    body = call.message(max_tokens=1).body
    assert (body["content"][0]["text"], body["stop_reason"]) == ("Hello", "max_tokens")


def test_a_greeting_repeats_nothing_that_was_said(call: Caller) -> None:
    call.mint()
    secret = "sk-in-the-prompt-0123"
    for stream in (False, True):
        answer = call.message(messages=[{"role": "user", "content": secret}], stream=stream)
        assert secret not in answer.text
        assert KEY not in answer.text


def test_a_stream_has_anthropics_events(call: Caller) -> None:
    call.mint()
    whole = call.message().body["content"][0]["text"]
    answer = call.message(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    records = [record.split("\n") for record in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in records]
    names = [name.removeprefix("event: ") for name, _ in records]
    assert names == [event["type"] for event in events]
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for e in events[3:-3]) == whole


def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection(
    gateway: DevGateway, call: Caller
) -> None:
    call.mint()
    content = json.dumps({**MESSAGE, "stream": True}).encode()
    head = f"POST /v1/messages HTTP/1.0\r\nx-api-key: {KEY}\r\nContent-Length: {len(content)}\r\n"
    with connect(gateway) as client:
        client.sendall(head.encode() + b"\r\n" + content)
        answer = read_all(client)
    assert b"chunked" not in answer.lower()
    assert answer.endswith(b'data: {"type": "message_stop"}\n\n')


def test_tokens_are_counted(call: Caller) -> None:
    call.mint()
    answer = call("POST", "/v1/messages/count_tokens", MESSAGE, key=KEY)
    assert answer.body["input_tokens"] > 0


def test_models_are_listed_as_openai_does(call: Caller) -> None:
    call.mint()
    body = call.models().body
    assert body["object"] == "list"
    assert "claude-sonnet-4-6" in [model["id"] for model in body["data"]]


def test_models_are_listed_as_anthropic_does_for_its_clients(call: Caller) -> None:
    call.mint(models=["claude-sonnet-*"])
    headers = {"anthropic-version": "2023-06-01"}
    body = call("GET", "/v1/models?limit=1000", key=KEY, headers=headers).body
    assert [model["type"] for model in body["data"]] == ["model", "model"]
    assert body["has_more"] is False
    assert (body["first_id"], body["last_id"]) == ("claude-sonnet-4-6", "claude-sonnet-4-5")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"messages": []}, "invalid_request_error"),
        ({"model": "claude-sonnet-4-6"}, "invalid_request_error"),
    ],
)
def test_a_message_with_a_part_missing_is_refused_in_anthropics_shape(
    call: Caller, body: dict[str, Any], kind: str
) -> None:
    call.mint()
    answer = call("POST", "/v1/messages", body, key=KEY)
    assert (answer.status, answer.body["type"]) == (400, "error")
    assert answer.error["type"] == kind


def test_a_message_that_is_not_json_is_a_400(call: Caller) -> None:
    call.mint()
    answer = call("POST", "/v1/messages", raw=b"{nope", key=KEY)
    assert (answer.status, answer.error["param"]) == (400, "request_body")


def test_an_expired_key_is_a_401_with_both_times(call: Caller, clock: Clock) -> None:
    call.mint(duration="1h")
    clock.advance(hours=1, seconds=5)
    answer = call.message()
    assert answer.status == 401
    assert answer.error == {
        "message": "Authentication Error - Expired Key. "
        "Key Expiry time 2026-11-21 13:00:00.123000+00:00 "
        "and current time 2026-11-21 13:00:05.123456+00:00",
        "type": "expired_key",
        "param": "sk-...6789",
        "code": "401",
    }


def test_an_expired_key_is_a_400_on_older_servers(
    gateway: DevGateway, call: Caller, clock: Clock
) -> None:
    gateway.options.expired_status = 400
    call.mint(duration="1h")
    clock.advance(hours=2)
    answer = call.message()
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        400,
        "expired_key",
        "400",
    )


def test_a_deleted_key_is_an_unknown_key(call: Caller) -> None:
    call.mint()
    call("POST", "/key/delete", {"keys": [TOKEN]})
    answer = call.message()
    assert (answer.status, answer.error["type"]) == (401, "token_not_found_in_db")


def test_a_blocked_key_is_a_401(call: Caller) -> None:
    call.mint()
    call("POST", "/key/block", {"key": KEY})
    answer = call.message()
    assert answer.status == 401
    assert answer.error == {
        "message": "Authentication Error, Key is blocked. "
        "Update via `/key/unblock` if you're an admin.",
        "type": "auth_error",
        "param": "None",
        "code": "401",
    }


def test_a_model_that_the_key_may_not_call_is_a_403(call: Caller) -> None:
    call.mint(models=["claude-sonnet-*"])
    assert call.message().status == 200
    answer = call.message(model="claude-opus-4-6")
    assert (answer.status, answer.error["type"]) == (403, "key_model_access_denied")
    assert (answer.error["param"], answer.error["code"]) == ("model", "403")


def test_a_wrong_model_is_found_before_the_end_of_the_key(call: Caller, clock: Clock) -> None:
    call.mint(models=["claude-sonnet-4-6"], duration="1s")
    clock.advance(seconds=2)
    assert call.message(model="claude-opus-4-6").status == 403


def test_a_budget_can_be_exceeded(gateway: DevGateway, call: Caller) -> None:
    gateway.options.message_cost = 0.5
    call.mint(max_budget=1, key_alias="kb-1")
    assert [call.message().status for _ in range(3)] == [200, 200, 422]
    assert call.message().error == {
        "message": "Budget has been exceeded! Key=kb-1 (sk-...6789) "
        "Current cost: 1.0, Max budget: 1.0",
        "type": "budget_exceeded",
        "param": None,
        "code": "422",
    }


def test_a_budget_exceeded_is_a_429_on_older_servers(gateway: DevGateway, call: Caller) -> None:
    gateway.options.budget_status = 429
    call.mint(max_budget=0)
    assert call.models().status == 429


def test_a_rate_is_a_429_that_says_when_to_come_back(call: Caller, clock: Clock) -> None:
    call.mint(rpm_limit=1)
    assert call.message().status == 200
    clock.advance(seconds=18.5)
    answer = call.message()
    assert (answer.status, answer.headers["retry-after"]) == (429, "42")
    assert (answer.body["type"], answer.error["type"]) == ("error", "rate_limit_error")
    clock.advance(seconds=41.5)
    assert call.message().status == 200


def test_a_rate_can_be_set_for_every_key(gateway: DevGateway, call: Caller) -> None:
    gateway.options.rate = 0
    call.mint()
    assert (call.message().status, call.models().status) == (429, 200)


def test_a_gateway_can_accept_every_key(gateway: DevGateway, call: Caller) -> None:
    gateway.options.accept_every_key = True
    assert call.message(key="made-up").status == 200
    assert call.message(key=None).status == 200
    assert call("GET", "/key/list", key="made-up").status == 401


@pytest.mark.parametrize(
    ("path", "body"), [("/key/delete", {"keys": [KEY]}), ("/key/block", {"key": KEY})]
)
def test_a_revoked_key_lives_on_in_the_cache(
    gateway: DevGateway, call: Caller, clock: Clock, path: str, body: dict[str, Any]
) -> None:
    gateway.options.cache_tail = 60
    call.mint()
    call("POST", path, body)
    clock.advance(seconds=59)
    assert call.message().status == 200
    assert call("GET", "/key/info", key=KEY).status == 401
    clock.advance(seconds=1)
    assert call.message().status == 401


def test_a_clock_that_is_wrong_shows_in_the_date_and_in_the_end(clock: Clock) -> None:
    ahead = timedelta(minutes=7)
    with DevGateway(MASTER, clock=clock, date_skew=ahead) as gateway:
        answer = Caller(gateway).mint(duration="1h")
    assert parsedate_to_datetime(answer.headers["date"]) == (NOON + ahead).replace(microsecond=0)
    assert datetime.fromisoformat(answer.body["expires"]) == NOON + ahead + timedelta(hours=1)


# Health, and what is not there.


@pytest.mark.parametrize("path", ["/health/liveliness", "/health/liveness"])
def test_a_live_gateway_says_so_in_json(call: Caller, path: str) -> None:
    assert call("GET", path, key=None).body == "I'm alive!"


def test_a_ready_gateway_says_so(call: Caller) -> None:
    expected = {"status": "healthy", "db": "connected"}
    assert call("GET", "/health/readiness", key=None).body == expected


def test_head_needs_no_key(call: Caller) -> None:
    answer = call("HEAD", "/", key=None)
    assert (answer.status, answer.text) == (200, "")


def test_an_unknown_path_is_a_404(call: Caller) -> None:
    answer = call("GET", "/nope")
    assert (answer.status, answer.body) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_wrong_method_is_a_405(call: Caller, method: str) -> None:
    answer = call(method, "/key/generate")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


# The server.


def connect(gateway: DevGateway) -> socket.socket:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def test_it_listens_on_loopback_only(gateway: DevGateway) -> None:
    assert gateway.url.startswith("http://127.0.0.1:")


def test_a_connection_is_kept_alive(gateway: DevGateway) -> None:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=5)
    connection.connect()
    first = connection.sock.getsockname()
    for _ in range(2):
        connection.request("GET", "/health/liveliness")
        assert connection.getresponse().read() == b'"I\'m alive!"'
    assert connection.sock.getsockname() == first
    connection.close()


def test_a_close_ends_kept_alive_connections(clock: Clock) -> None:
    gateway = DevGateway(MASTER, clock=clock).start()
    with connect(gateway) as client:
        client.sendall(b"HEAD / HTTP/1.1\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        gateway.close()
        assert client.recv(1) == b""


def test_keys_and_port_outlive_a_close(clock: Clock) -> None:
    gateway = DevGateway(MASTER, clock=clock)
    with gateway:
        url = gateway.url
        Caller(gateway).mint()
    with pytest.raises(ConnectionRefusedError):
        connect(gateway)
    with gateway:
        assert gateway.url == url
        assert Caller(gateway).message().status == 200


def test_a_port_that_is_taken_is_an_error(gateway: DevGateway) -> None:
    port = int(gateway.url.rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        DevGateway(MASTER, port).start()


def test_a_close_without_a_start_does_nothing() -> None:
    DevGateway().close()


def test_a_body_that_is_too_large_is_not_read() -> None:
    with DevGateway(MASTER, max_body=10) as gateway, connect(gateway) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 11\r\n\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer


@pytest.mark.parametrize("header", ["Transfer-Encoding: chunked", "Content-Length: ten"])
def test_a_body_without_a_length_is_not_read(gateway: DevGateway, header: str) -> None:
    with connect(gateway) as client:
        client.sendall(f"POST /v1/messages HTTP/1.1\r\n{header}\r\n\r\n".encode())
        assert read_all(client).startswith(b"HTTP/1.1 411")


def test_a_silent_client_is_dropped() -> None:
    with DevGateway(MASTER, read_timeout=0.05) as gateway, connect(gateway) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf")
        assert read_all(client) == b""


def test_a_client_that_goes_away_leaves_no_trace(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with DevGateway(MASTER, clock=clock) as gateway:
        for sent in (
            b"",
            b"\x16\x03\x01",
            b"POST /v1/messages HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
        ):
            with connect(gateway) as client:
                client.sendall(sent)
        with connect(gateway) as client:
            reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n" * 50)
        assert Caller(gateway)("GET", "/nope").status == 404
    assert gateway.failures == ()
    assert capfd.readouterr() == ("", "")


def test_many_clients_are_served_at_once(gateway: DevGateway, call: Caller) -> None:
    call.mint()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(call.message().status)) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 20
    assert gateway.requests == 20


def test_one_alias_is_given_once_however_many_ask(gateway: DevGateway, call: Caller) -> None:
    statuses: list[int] = []

    def mint() -> None:
        statuses.append(call("POST", "/key/generate", {"key_alias": "kb-1"}).status)

    threads = [threading.Thread(target=mint) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [400] * 7


# What a test can see.


def test_requests_and_refusals_of_the_data_plane_are_counted(
    gateway: DevGateway, call: Caller
) -> None:
    call.mint()
    call.message()
    call.models()
    call.message(key="sk-unknown-000000000")
    assert (gateway.requests, gateway.refused) == (3, 1)


def test_the_log_holds_fingerprints_and_no_key(gateway: DevGateway, call: Caller) -> None:
    call.mint()
    call("GET", f"/key/info?key={KEY}", key=KEY)
    call("POST", f"/key/{KEY}/regenerate", {})
    call("HEAD", "/", key=None)
    master = sha256(MASTER.encode()).hexdigest()[:8]
    assert [(s.method, s.path, s.status, s.fingerprint) for s in gateway.seen()] == [
        ("POST", "/key/generate", 200, master),
        ("GET", "/key/info", 200, TOKEN[:8]),
        ("POST", "/key/sk-.../regenerate", 500, master),
        ("HEAD", "/", 200, ""),
    ]
    assert {seen.at for seen in gateway.seen()} == {NOON}


def test_live_keys_are_those_that_would_be_accepted(
    gateway: DevGateway, call: Caller, clock: Clock
) -> None:
    call.mint(key_alias="live", duration="2h")
    for alias in ("expired", "blocked", "deleted"):
        duration = "1s" if alias == "expired" else "2h"
        call("POST", "/key/generate", {"key_alias": alias, "duration": duration})
    blocked = next(key.token for key in gateway.live_keys() if key.alias == "blocked")
    call("POST", "/key/block", {"key": blocked})
    call("POST", "/key/delete", {"key_aliases": ["deleted"]})
    clock.advance(minutes=1)
    (live,) = gateway.live_keys()
    ends = (NOON + timedelta(hours=2)).replace(microsecond=123000)
    assert (live.alias, live.token, live.expires) == ("live", TOKEN, ends)


def test_a_repr_shows_no_secret(gateway: DevGateway) -> None:
    assert repr(gateway) == f"<DevGateway {gateway.url}>"


def test_a_master_key_is_made_up_if_none_is_given() -> None:
    first, second = DevGateway(), DevGateway()
    assert re.fullmatch(r"sk-[\w-]{32}", first.master_key)
    assert first.master_key != second.master_key


def test_an_option_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        DevGateway(colour="green")


# The command.


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "keybroker.devgateway", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(end: signal.Signals) -> None:
    process = run(KEYBROKER_DEVGATEWAY_MASTER_KEY=MASTER)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.request("GET", "/key/list", headers={"Authorization": f"Bearer {MASTER}"})
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(end)
    said = f'base_url = "{url}"\nadmin = {{ env = "KEYBROKER_DEVGATEWAY_MASTER_KEY" }}\n'
    said += f"or type: keybroker init --base-url {url} --admin env:KEYBROKER_DEVGATEWAY_MASTER_KEY"
    said += " --source litellm\n"
    assert process.communicate(timeout=5) == ("", said)
    assert process.returncode == 0


def test_the_command_writes_the_master_key_to_a_private_file(tmp_path: Any) -> None:
    path = tmp_path / "master-key"
    keys = []
    for _ in range(2):
        process = run("--master-key-file", str(path))
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        process.terminate()
        said = f'base_url = "{url}"\nadmin = {{ file = "{path}" }}\n'
        said += f"or type: keybroker init --base-url {url} --admin file:{path} --source litellm\n"
        assert process.communicate(timeout=5) == ("", said)
        keys.append(path.read_text())
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys[0].startswith("sk-")
    assert keys[0] == keys[1]


def test_the_command_refuses_a_master_key_that_others_can_read(tmp_path: Any) -> None:
    path = tmp_path / "master-key"
    path.write_text("sk-open-to-all-0000\n")
    path.chmod(0o644)
    out, err = run("--master-key-file", str(path)).communicate(timeout=5)
    assert (out, err) == ("", f"devgateway: others can read {path}\nhint: chmod 600 {path}\n")


def test_the_command_says_what_is_in_its_way(tmp_path: Any) -> None:
    """A folder that is not there, what is no file, and a port that somebody else has."""
    path = tmp_path / "nowhere" / "admin-key"
    process = run("--master-key-file", str(path))
    assert process.communicate(timeout=5) == (
        "",
        f"devgateway: {path.parent} does not exist\nhint: mkdir -p {path.parent}\n",
    )
    err = run("--master-key-file", str(tmp_path)).communicate(timeout=5)[1]
    assert err == f"devgateway: {tmp_path} cannot be used (Is a directory)\n"
    with DevGateway() as other:
        port = other.url.rpartition(":")[2]
        process = run("--port", port, KEYBROKER_DEVGATEWAY_MASTER_KEY=MASTER)
        said = f"devgateway: port {port} is in use\nhint: name another, or leave --port out\n"
        assert process.communicate(timeout=5) == ("", said)
    assert process.returncode == 78


def test_the_command_needs_a_master_key() -> None:
    process = run(KEYBROKER_DEVGATEWAY_MASTER_KEY="")
    out, err = process.communicate(timeout=5)
    assert (out, process.returncode) == ("", 78)
    assert err.startswith("devgateway: no master key\nhint: ")
