"""What the data plane's answers say about a key, and by which method it is asked."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from keybroker import sources
from keybroker.credential import LONGEST_SECRET, Look, Secret, Verdict
from keybroker.devgateway import DevGateway
from keybroker.sources import gateway
from keybroker.sources.gateway import Gateway, classify, made_up
from keybroker.sources.http import Http, Reply
from tests.contracts import entry
from tests.servers.faults import Fault, Faults, Hang, Html, Status

GOOD = Secret("sk-good-0123456789abcdef")


def openai(kind: object, message: object = "Authentication Error", code: str = "401") -> Any:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(kind: str, message: str = "invalid x-api-key") -> Any:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


_NOT_FOUND = (
    "Authentication Error, Invalid proxy server token passed. Received API Key = sk-...2Tcg, Key "
    f"Hash (Token) ={'a' * 64}. Unable to find token in cache or `LiteLLM_VerificationTokenTable`"
)
_ENDED = "Authentication Error - Expired Key. Key Expiry time 2026-11-21 and current time 2026"
_BLOCKED = "Authentication Error, Key is blocked. Update via `/key/unblock` if you're an admin."
_ADMIN = "Only proxy admin can be used to generate, delete, update info. Your role=unknown"
_ROUTE = "Virtual key is not allowed to call this route. Only allowed to call: ['llm_api_routes']"
_JWT = "JWT Auth is an enterprise only feature."
_DOWN = "Service Unavailable, the authentication database is temporarily unreachable."
_MONEY = "Budget has been exceeded! Current cost: 2, Max budget: 1"

REFUSED = {
    "unknown key": (401, openai("token_not_found_in_db", _NOT_FOUND)),
    "expired": (401, openai("expired_key", _ENDED)),
    "expired, older": (400, openai("expired_key", _ENDED, "400")),
    "expired, oldest": (400, openai("auth_error", _ENDED, "400")),
    "blocked": (401, openai("auth_error", _BLOCKED)),
    "not a key at all": (401, openai("auth_error", "LiteLLM Virtual Key expected. Received=****")),
    "Anthropic": (401, anthropic("authentication_error")),
    "apps gateway": (401, anthropic("authentication_error", "invalid token")),
    "OGX": (401, {"error": {"message": "Invalid JWT token"}}),
    "OpenAI": (401, openai("invalid_api_key", "Incorrect API key provided: sk-…")),
}
UNDECIDED = {
    "no key": (401, openai("auth_error", "Authentication Error, No api key passed in.")),
    "no right": (401, openai("auth_error", _ADMIN)),
    "team": (401, openai("auth_error", "Team is blocked.")),
    "budget 401": (401, openai("auth_error", _MONEY)),
    "page 401": (401, None),
    "text 401": (401, "no"),
    "list 401": (401, []),
    "empty 401": (401, {}),
    "other shape 401": (401, {"error": "unauthorized"}),
    "detail 401": (401, {"detail": "Not authenticated"}),
    "route": (403, {"detail": _ROUTE}),
    "model": (403, openai("key_model_access_denied", "The requested model 'x' …", "403")),
    "permission": (403, anthropic("permission_error", "no access")),
    "licence": (403, openai("auth_error", _JWT, "403")),
    "policy page": (403, None),
    "expired behind 403": (403, openai("expired_key", _ENDED, "403")),
    "bad request": (400, openai("invalid_request_error", "messages: too short", "400")),
    "payment": (402, openai("billing", "pay", "402")),
    "not found": (404, {"detail": "Not Found"}),
    "model not found": (404, anthropic("not_found_error", "model: claude-x")),
    "method": (405, {"detail": "Method Not Allowed"}),
    "budget": (422, openai("budget_exceeded", _MONEY, "422")),
    "budget, older": (429, openai("budget_exceeded", _MONEY, "429")),
    "rate": (429, anthropic("rate_limit_error", "slow down")),
    "error": (500, openai("internal_server_error", "x", "500")),
    "proxy": (502, None),
    "database": (503, openai("no_db_connection", _DOWN, "503")),
    "overloaded": (529, anthropic("overloaded_error", "Overloaded")),
    "portal": (200, None),
    "200 of another": (200, {"ok": True}),
    "200 list": (200, ["data"]),
    "200 error": (200, openai("token_not_found_in_db", _NOT_FOUND)),
    "201": (201, {"data": []}),
    "204": (204, None),
}


def read(status: int, value: Any) -> tuple[Look, str]:
    return classify(Reply(status, httpx.Headers(), value, datetime.now(UTC)), "data")


@pytest.mark.parametrize("case", REFUSED)
def test_what_refuses_the_key_itself(case: str) -> None:
    """These answers are about the key and nothing else."""
    status, value = REFUSED[case]
    look, reason = read(status, value)
    assert look is Look.REFUSED
    assert reason.startswith(f"{status} ")


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_says_nothing_about_the_key(case: str) -> None:
    """Model, route, budget, policy, right, page, throttling, failure: never a refused key."""
    status, value = UNDECIDED[case]
    look, reason = read(status, value)
    assert look is Look.UNDECIDED
    assert reason.startswith(f"{status}")


@pytest.mark.parametrize("value", [{"data": []}, {"data": [{"id": "claude"}], "has_more": False}])
def test_only_the_real_answer_is_alive(value: Any) -> None:
    """A 200 with the member that was asked for."""
    assert read(200, value) == (Look.ALIVE, "200")


@pytest.mark.parametrize("case", [*REFUSED, *UNDECIDED])
def test_a_reason_repeats_nothing_of_the_answer(case: str) -> None:
    """A reason is a status and a word of ours: an answer may hold a key or a hash."""
    status, value = {**REFUSED, **UNDECIDED}[case]
    canary = f"sk-{secrets.token_hex(8)}"
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        changed = {**value["error"], "message": f"{value['error'].get('message')} {canary}"}
        kind = changed.get("type")
        value = {**value, "error": {**changed, "type": kind or canary}}
    _, reason = read(status, value)
    assert canary not in reason
    assert len(reason) < 60


@pytest.mark.parametrize("kind", ["sk-canary-0123456789", None, 7, ["x"], {"a": 1}])
def test_a_type_that_is_not_known_is_not_repeated(kind: object) -> None:
    """A gateway that puts anything into its type cannot put it into our log."""
    assert read(401, openai(kind, "bad key"))[1] == "401 error"


# A key that nobody issued.


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("sk-Zk3vT0y9m2QxL8dR1uWbZk3vT0y9m2QxL8dR1uWb", "sk-"),
        ("sk-ant-api03-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "sk-ant-api03-"),
        ("sk-bf-0b8a5b3a0b8a5b3a0b8a5b3a0b8a5b3a", "sk-bf-"),
        ("0123456789abcdef0123456789abcdef0", ""),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg", ""),
        ("ollama", ""),
        ("sk-x", "sk-"),
        ("x" * LONGEST_SECRET, ""),
        ("sk-" + "x" * (LONGEST_SECRET - 3), "sk-"),
        ("sk-" + "x" * (LONGEST_SECRET - 4), "sk-"),
    ],
)
def test_a_made_up_key_has_the_shape_of_the_real_one(text: str, start: str) -> None:
    """Same beginning, same length from a certain length on, and otherwise nothing in common."""
    one, two = made_up(Secret(text)).reveal(), made_up(Secret(text)).reveal()
    assert one != two
    assert text not in (one, two)
    assert one.startswith(start)
    assert len(one) == max(len(text), len(start) + 32)
    assert one[len(start) :].isalnum()


# Which method is asked.


class Plane:
    """A gateway that answers each method as it is told, and remembers."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def paths(self) -> list[str]:
        return [entry.path for entry in self.faults.log]

    def answer(self, path: str, fault: Fault, times: int | None = None) -> None:
        self.faults.next(fault, path=path, times=times)


@pytest.fixture
def server() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server
    assert server.failures == ()


@pytest.fixture
def plane(server: DevGateway) -> Iterator[Plane]:
    with Faults(server.url, admin=server.master_key) as faults:
        yield Plane(faults)
    assert faults.errors == []


@pytest.fixture
def look(plane: Plane) -> Iterator[Callable[..., Gateway]]:
    """Open the data plane in a mode."""
    opened: list[Http] = []

    def look(mode: str = "auto", info: gateway.Method | None = None, **how: Any) -> Gateway:
        opened.append(Http("gateway", how.pop("url", plane.faults.url), **how))
        return Gateway(opened[-1], mode, "claude-sonnet-4-5", info)

    yield look
    for http in opened:
        http.close()


Looks = Callable[..., Gateway]
REFUSES = Status(401, {}, json.dumps(openai("token_not_found_in_db", "no")).encode())


def test_models_is_asked_first(plane: Plane, server: DevGateway, look: Looks) -> None:
    """Where /v1/models tells keys apart, nothing else is asked."""
    key = Secret(server.master_key)
    assert look().verify(key) == Verdict(Look.ALIVE, "models", "200")
    assert plane.paths() == ["/v1/models"] * 2


def test_the_next_method_is_asked_where_one_takes_every_key(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """An open /v1/models proves nothing; count_tokens may."""
    plane.answer("/v1/models", Status(200, {}, b'{"data":[]}'))
    assert look().verify(Secret(server.master_key)).method == "count_tokens"
    assert plane.paths() == ["/v1/models", *["/v1/messages/count_tokens"] * 2]


@pytest.mark.parametrize("fault", [Html(404), Html(405), Html(503), Html(200)])
def test_the_next_method_is_asked_where_one_says_nothing(
    plane: Plane, server: DevGateway, look: Looks, fault: Fault
) -> None:
    """A route that is missing or broken leaves the other."""
    plane.answer("/v1/models", fault)
    verdict = look().verify(Secret(server.master_key))
    assert (verdict.look, verdict.method) == (Look.ALIVE, "count_tokens")


def test_the_key_api_is_asked_last(plane: Plane, server: DevGateway, look: Looks) -> None:
    """Only when no method of the data plane tells keys apart."""
    server.options.accept_every_key = True
    asked: list[Secret] = []

    def info(secret: Secret) -> Verdict:
        asked.append(secret)
        return Verdict(Look.ALIVE if secret == GOOD else Look.REFUSED, "info")

    assert look(info=info).verify(GOOD) == Verdict(Look.ALIVE, "info")
    assert len(asked) == 2
    assert plane.paths() == ["/v1/models", "/v1/messages/count_tokens"]


def test_where_no_method_refuses_nothing_is_verified(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """A gateway that takes every key is never said to have accepted one."""
    server.options.accept_every_key = True
    assert look().verify(GOOD).look is Look.UNVERIFIED
    fooled = look(info=lambda _: Verdict(Look.ALIVE, "info"))
    assert fooled.verify(GOOD).look is Look.UNVERIFIED


def test_routes_that_are_not_there_verify_nothing(plane: Plane, look: Looks) -> None:
    """404 everywhere is a gateway without the routes, not one that is away."""
    plane.answer("*", Html(404))
    assert look().verify(GOOD).look is Look.UNVERIFIED


@pytest.mark.parametrize("fault", [Html(503), Html(401), Status(429)])
def test_a_missing_route_does_not_hide_trouble_at_another(
    plane: Plane, look: Looks, fault: Fault
) -> None:
    """404 from one method and an outage of the other is undecided, not unverified."""
    plane.answer("/v1/models", Html(404))
    plane.answer("/v1/messages/count_tokens", fault)
    verdict = look().verify(GOOD)
    assert (verdict.look, verdict.method) == (Look.UNDECIDED, "count_tokens")


@pytest.mark.parametrize(
    ("mode", "path"),
    [
        ("models", "/v1/models"),
        ("count_tokens", "/v1/messages/count_tokens"),
        ("message", "/v1/messages"),
    ],
)
def test_a_method_that_was_chosen_is_the_only_one(
    plane: Plane, server: DevGateway, look: Looks, mode: str, path: str
) -> None:
    """`verify` names it, and no other is tried even when it says nothing."""
    key = Secret(server.master_key)
    assert look(mode).verify(key) == Verdict(Look.ALIVE, mode, "200")
    plane.answer(path, Html(503))
    assert look(mode).verify(key).look is Look.UNDECIDED
    assert set(plane.paths()) == {path}


def test_a_message_costs_one_token(plane: Plane, server: DevGateway, look: Looks) -> None:
    """It asks for no more, with the model that the profile names."""
    bodies: list[Any] = []

    class Keep(Fault):
        def __call__(self, exchange: Any) -> None:
            bodies.append(json.loads(exchange.request.body))
            exchange.answer(401, "application/json", REFUSES.body)

    plane.answer("/v1/messages", Keep())
    look("message").verify(GOOD)
    assert [(body["max_tokens"], body["model"]) for body in bodies] == [
        (1, "claude-sonnet-4-5")
    ] * 2


@pytest.mark.parametrize("mode", ["none", "info"])
def test_without_a_method_nothing_is_asked(plane: Plane, look: Looks, mode: str) -> None:
    """No method is "unverified", and no call."""
    assert look(mode).verify(GOOD).look is Look.UNVERIFIED
    assert plane.paths() == []


def test_a_key_is_shown_as_claude_code_shows_it(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """In both headers, since a gateway may read either."""
    key = Secret(server.master_key)
    look().verify(key)
    headers = plane.faults.log[-1].headers
    assert headers["x-api-key"] == key.fingerprint
    assert headers["authorization"] == f"Bearer {key.fingerprint}"
    assert "anthropic-version" in headers


def test_a_method_that_is_known_to_tell_is_not_tried_again(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """The second look at a key costs one call."""
    opened = look()
    opened.verify(Secret(server.master_key))
    opened.verify(GOOD)
    assert plane.paths() == ["/v1/models"] * 3


def test_a_second_look_has_as_much_time_as_the_first(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """A look that ran out of time leaves the next one its own."""
    opened = look(seconds=0.3)
    plane.answer("*", Hang(), times=1)
    assert opened.verify(Secret(server.master_key)).look is Look.UNDECIDED
    again = look(seconds=8)
    again.verify(Secret(server.master_key))
    assert again.verify(Secret(server.master_key)).look is Look.ALIVE


def test_refused_at_first_and_undecided_afterwards_is_undecided(
    plane: Plane, server: DevGateway, look: Looks
) -> None:
    """A gateway that breaks between the made-up key and the real one decides nothing."""
    plane.answer("/v1/models", REFUSES, times=1)
    plane.answer("/v1/models", Html(503), times=1)
    assert look().verify(Secret(server.master_key)).look is Look.UNDECIDED


# Placeholders.


def test_a_placeholder_asks_only_whether_somebody_is_there(plane: Plane, look: Looks) -> None:
    """Any answer about keys or routes will do; the value is no key."""
    opened = look()
    assert opened.answers(Secret("ollama")) == Verdict(
        Look.UNVERIFIED, "answers", "401: this gateway checks keys"
    )
    for status in (400, 401, 403, 404, 405, 429):
        plane.answer("/v1/models", Html(status), times=1)
        assert opened.answers(Secret("ollama")).look is Look.UNVERIFIED
    plane.answer("/v1/models", Status(200, {}, b'{"data":[]}'), times=1)
    assert opened.answers(Secret("ollama")) == Verdict(
        Look.UNVERIFIED, "answers", "a placeholder is not checked"
    )


@pytest.mark.parametrize("fault", [Html(500), Html(502), Html(200), Status(302)])
def test_a_gateway_in_trouble_is_not_there(plane: Plane, look: Looks, fault: Fault) -> None:
    """A failure, a portal, a redirect: undecided."""
    plane.answer("/v1/models", fault)
    assert look().answers(Secret("ollama")).look is Look.UNDECIDED


@pytest.mark.parametrize("host", ["llm.example.com", "40.1.2.3", "404.example.com"])
def test_nobody_is_not_there_whatever_its_name(
    look: Looks, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """An address that begins like a status is not one."""

    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    opened = look(url=f"http://{host}")
    assert opened.answers(Secret("ollama")).look is Look.UNDECIDED
    assert opened.verify(GOOD).look is Look.UNDECIDED


# From the profile.


def test_a_profile_s_headers_time_out_and_path_are_used(plane: Plane, server: DevGateway) -> None:
    """What the file says of the gateway holds for looks at it."""
    static = {"type": "static", "placeholder": "x", "timeout": "300ms"}
    profile = entry(f"{plane.faults.url}/llm", static, headers={"X-Org-Route": "eng"})
    source = sources.build(profile, {})
    plane.answer("/llm/v1/models", Hang())
    assert source.verify(Secret("x")).look is Look.UNDECIDED
    source.close()
    [seen] = plane.faults.log
    assert seen.path == "/llm/v1/models"
    assert seen.headers["x-org-route"] == "eng"
