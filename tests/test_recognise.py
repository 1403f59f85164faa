"""Which gateway it is and where it answers: real ones, and what others were seen to say."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from keybroker.address import read_pasted
from keybroker.devgateway import DevGateway
from keybroker.errors import SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources import recognise as module
from keybroker.sources.recognise import recognise
from tests.servers.faults import refused_url
from tests.servers.litellm import LiteLLM
from tests.servers.web import Handler, LoopbackServer

ORG = "/llm_proxy/00000000-0000-0000-0000-000000000000"
Answer = tuple[int, Mapping[str, str], Any]


class Site(LoopbackServer):
    """Answers what a table says, and 404 to the rest."""

    def __init__(self, table: Mapping[str, Answer], rest: Answer = (404, {}, None)) -> None:
        super().__init__(_Site)
        self.table, self.rest = table, rest
        self.asked: list[tuple[str, str, bytes]] = []
        self.pause = 0.0


class _Site(Handler):
    server: Site

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        body = self.body()
        key = self.headers.get("authorization", "")
        self.server.asked.append((f"{self.command} {self.path}", key, body))
        time.sleep(self.server.pause)
        name = f"{self.command} {self.path}"
        status, headers, value = self.server.table.get(name, self.server.rest)
        page = value if isinstance(value, str) else json.dumps(value)
        data = b"" if value is None else page.encode()
        self.send_response(status)
        for header in {**headers, "content-length": str(len(data))}.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815


def error(kind: str, message: str, **more: Any) -> dict[str, Any]:
    """An error in the words of the Anthropic API."""
    return {"type": "error", "error": {"type": kind, "message": message}, **more}


def openai_error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "param": None, "code": None}}


NO_MODEL = error("not_found_error", "model 'made-up-model' not found")
REQUIRED = error("virtual_key_required", "virtual key is required.")
PORTAL = "<!doctype html><title>Sign in</title>"
BIFROST = {
    "POST /anthropic/v1/messages": (401, {}, REQUIRED),
    "POST /v1/chat/completions": (401, {}, {"is_bifrost_error": False, "error": {"message": "x"}}),
    "GET /health": (200, {}, {"status": "ok", "components": {"db_pings": "ok"}}),
}
OPTSCALE = {
    f"POST {ORG}/anthropic/v1/messages": (401, {}, error("authentication_error", "bad key")),
    f"POST {ORG}/v1/messages": (401, {}, openai_error("invalid_request_error", "bad key")),
    f"POST {ORG}/v1/chat/completions": (401, {}, openai_error("invalid_request_error", "no")),
}
OLLAMA = {
    "POST /v1/messages": (404, {}, NO_MODEL),
    "POST /v1/chat/completions": (404, {}, openai_error("api_error", "model not found")),
    "GET /v1/models": (200, {}, {"object": "list", "data": []}),
    "GET /api/version": (200, {}, {"version": "0.14.1"}),
    "GET /api/tags": (200, {}, {"models": []}),
}
VLLM = {
    "POST /v1/messages": (404, {}, openai_error("NotFoundError", "The model does not exist.")),
    "POST /v1/chat/completions": (404, {}, openai_error("NotFoundError", "No such model.")),
    "GET /v1/models": (200, {}, {"data": [{"id": "m", "owned_by": "vllm"}]}),
    "GET /health": (200, {}, None),
}
NEW_API = {
    "POST /v1/messages": (401, {"X-Oneapi-Request-Id": "1"}, openai_error("new_api_error", "x")),
    "POST /v1/chat/completions": (401, {}, openai_error("new_api_error", "x")),
}
ONE_API = {
    "POST /v1/messages": (401, {}, openai_error("other", "x")),
    "GET /api/status": (200, {}, {"success": True, "message": "", "data": {"version": "v1"}}),
}
KONG = {
    "POST /v1/messages": (401, {"Via": "1.1 kong/3.13.0"}, {"error": {"message": "No API key"}}),
}
LMSTUDIO = {
    "POST /v1/messages": (404, {}, error("not_found_error", "model not found")),
    "GET /api/v0/models": (200, {}, {"data": []}),
    "GET /v1/models": (200, {}, {"data": []}),
}
OGX = {
    "POST /v1/messages": (404, {}, error("not_found_error", "Model not found")),
    "GET /v1/version": (200, {}, {"version": "0.5.0"}),
    "GET /v1/health": (200, {}, {"status": "OK"}),
    "GET /v1/models": (200, {}, {"data": []}),
}
CASES: dict[str, tuple[Mapping[str, Answer], str, str, bool | None, bool]] = {
    # what it answers, what is pasted after its host, the base URL's path, keys checked, OpenAI's
    "bifrost /v1": (BIFROST, "/v1", "/anthropic", True, True),
    "bifrost /": (BIFROST, "", "/anthropic", True, True),
    "bifrost /anthropic": (BIFROST, "/anthropic", "/anthropic", True, True),
    "optscale /v1": (OPTSCALE, f"{ORG}/v1", f"{ORG}/anthropic", True, True),
    "optscale /anthropic": (OPTSCALE, f"{ORG}/anthropic", f"{ORG}/anthropic", True, True),
    "ollama /": (OLLAMA, "", "", False, True),
    "ollama /v1": (OLLAMA, "/v1", "", False, True),
    "vllm /v1": (VLLM, "/v1", "", False, True),
    "new-api /v1": (NEW_API, "/v1", "", True, True),
    "new-api (one-api)": (ONE_API, "/v1", "", True, False),
    "kong /": (KONG, "", "", True, False),
    "lmstudio /": (LMSTUDIO, "", "", False, False),
    "ogx /": (OGX, "", "", False, False),
}


def ask(url: str, *, exact: bool = False) -> dict[str, Any]:
    meant = read_pasted(url, exact=exact)
    return recognise(meant.candidates, meant.root, asked=exact)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of it than a user has."""
    monkeypatch.setattr(module, "SECONDS", 0.6)
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.3)


@pytest.mark.parametrize("name", CASES)
def test_a_gateway_is_known_by_what_it_says(name: str) -> None:
    """Kind, address for Claude Code, address for OpenAI's clients, and whether keys are checked."""
    table, pasted, path, checks, openai = CASES[name]
    with Site(table) as site:
        found = ask(site.url + pasted)
        root = site.url + (ORG if "optscale" in name else "")
        assert found["kind"] == name.split()[0]
        assert found["base_url"] == site.url + path
        assert found["checks_keys"] is checks
        assert found["openai_base_url"] == (f"{root}/v1" if openai else None)


def test_only_a_made_up_key_is_presented() -> None:
    """It has the usual shape, and is another one each time."""
    with Site(BIFROST) as site:
        ask(site.url)
        ask(site.url)
        keys = {key for _, key, _ in site.asked if key}
        assert len(keys) == 2
        assert all(key.startswith("Bearer sk-") and len(key) > 50 for key in keys)


def test_nothing_is_asked_twice() -> None:
    """A gateway of an unknown kind is asked a dozen things, once each."""
    unknown = {"POST /v1/messages": (401, {}, error("authentication_error", "bad key"))}
    with Site(unknown) as site:
        assert ask(site.url)["kind"] == "unknown"
        names = [name for name, _, _ in site.asked]
        assert len(names) == len(set(names)) <= 14


# Real ones


@pytest.fixture(scope="module")
def devgateway() -> Iterator[DevGateway]:
    with DevGateway() as gateway:
        yield gateway


@pytest.mark.parametrize("pasted", ["", "/v1", "/anthropic", "/ui/", "/v1/messages"])
def test_the_development_gateway_is_shaped_like_litellm(
    devgateway: DevGateway, pasted: str
) -> None:
    """Whatever is pasted, Claude Code gets the root."""
    assert ask(devgateway.url + pasted) == {
        "kind": "litellm",
        "name": "LiteLLM",
        "base_url": devgateway.url,
        "openai_base_url": None,
        "checks_keys": True,
    }


@pytest.mark.servers
@pytest.mark.parametrize("pasted", ["", "/v1", "/anthropic", "/vertex_ai", "/bedrock", "/ui"])
def test_a_real_litellm_answers_at_its_root(litellm: LiteLLM, pasted: str) -> None:
    """Never below /anthropic, which hands requests on: budgets and models are the root's."""
    assert ask(litellm.url + pasted) == {
        "kind": "litellm",
        "name": "LiteLLM",
        "base_url": litellm.url,
        "openai_base_url": f"{litellm.url}/v1",
        "checks_keys": True,
    }


@pytest.mark.servers
def test_a_pass_through_is_used_when_it_is_asked_for(litellm: LiteLLM) -> None:
    """`--exact`."""
    url = f"{litellm.url}/anthropic"
    assert ask(url, exact=True)["base_url"] == url


def test_litellm_that_shows_nothing_of_itself_but_its_errors() -> None:
    """Behind a proxy that lets no health check through, its refusal says who it is."""
    refusal = openai_error("token_not_found_in_db", "Authentication Error, Invalid")
    table: dict[str, Answer] = {
        f"POST {path}/v1/messages": (401, {}, refusal) for path in ("", "/anthropic")
    }
    with Site(table) as site:
        assert ask(f"{site.url}/anthropic/v1")["base_url"] == site.url


# What is no gateway


def refusal(
    table: Mapping[str, Answer], rest: Answer = (404, {}, None), end: str = ""
) -> SourceError:
    with Site(table, rest) as site, pytest.raises(SourceError) as caught:
        ask(site.url + end)
    return caught.value


def test_nobody_listens(patience: None) -> None:
    """The host is named, and what to look at."""
    with pytest.raises(SourceUnavailable, match="could not be reached") as caught:
        ask(refused_url())
    assert "is it running?" in (caught.value.hint or "")


def test_a_name_that_nobody_has(patience: None) -> None:
    """The name is what is wrong."""
    with pytest.raises(SourceUnavailable):
        ask("https://llm.invalid")


def test_who_takes_calls_and_does_not_answer(patience: None) -> None:
    """The wait is bounded, whatever is asked."""
    with Site({}) as site:
        site.pause = 0.5
        started = time.monotonic()
        with pytest.raises(SourceUnavailable, match="did not answer in time"):
            ask(site.url)
        assert time.monotonic() - started < 3


def test_who_answers_slowly_is_given_up_on(patience: None) -> None:
    """All the questions together have one deadline."""
    with Site(OLLAMA) as site:
        site.pause = 0.2
        started = time.monotonic()
        found = ask(site.url)
        assert time.monotonic() - started < 4
        assert found["base_url"] == site.url


def test_a_portal_is_no_gateway() -> None:
    """It answers 200 to everything."""
    problem = refusal({}, (200, {"content-type": "text/html"}, PORTAL))
    assert isinstance(problem, SourceInvalid)
    assert "answers with a page" in problem.message
    assert "--base-url" in (problem.hint or "")
    assert "Sign in" not in problem.message


def test_a_portal_with_json_is_no_gateway() -> None:
    """200 with something else than a message."""
    assert (
        "not like the Anthropic API" in refusal({}, (200, {}, {"error": "no such thing"})).message
    )


def test_a_redirect_to_a_sign_in_is_said() -> None:
    """Where it leads is not repeated: it may have a token in it."""
    to = {"location": "https://login.example.com/?state=geheim"}
    problem = refusal({}, (302, to, None))
    assert "302, a redirect, as sign-in pages do" in problem.message
    assert "geheim" not in problem.message + str(problem.hint)


def test_a_redirect_to_https_is_what_to_type() -> None:
    """The same host, with TLS."""
    problem = refusal({}, (308, {"location": "https://127.0.0.1/v1/messages"}, None))
    assert problem.hint == "--base-url https://127.0.0.1"


def test_a_gateway_for_openai_alone_is_said_to_be_one() -> None:
    """Claude Code cannot use it, whatever is configured."""
    table: dict[str, Answer] = {
        "POST /v1/chat/completions": (401, {}, openai_error("invalid_request_error", "bad key"))
    }
    problem = refusal(table, (404, {}, openai_error("invalid", "Not Found")), "/v1")
    assert "speaks OpenAI's API alone" in problem.message
    assert "POST /v1/messages" in (problem.hint or "")


def test_a_gateway_that_is_broken_now_is_tried_later() -> None:
    """502 of the proxy before it is no kind of gateway."""
    problem = refusal({}, (502, {}, "<html>Bad gateway</html>"))
    assert isinstance(problem, SourceUnavailable)
    assert "502" in problem.message


def test_nonsense_is_no_gateway() -> None:
    """Lists, numbers, nothing."""
    for value in ([], 7, None, {"error": 7}, {"data": []}):
        assert isinstance(refusal({}, (200, {}, value)), SourceInvalid)
    assert isinstance(refusal({}, (404, {}, {"detail": "Not Found"})), SourceInvalid)
