"""The table of troubles, and which of its rows an answer is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from keybroker.config import CLAUDE
from keybroker.guidance import VARIABLES
from keybroker.troubles import MADE_UP_BETA, TROUBLES, VALUES, flags, name, says_model
from tests.canaries import Canaries
from tests.servers import refusals
from tests.servers.upstream import Refusal

JSON = "application/json"
PAGE = "<html><head><title>403 Forbidden</title></head><body>nginx</body></html>"


def error(message: str, kind: str = "invalid_request_error") -> str:
    """An error as the API words it."""
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})


def through_litellm(message: str) -> str:
    """The same as LiteLLM passes it on."""
    inner = error(message)
    tail = "\n\nLiteLLM: model group 'claude-sonnet-4-6' failed with the error above. "
    said = f"litellm.BadRequestError: AnthropicException - {inner}{tail}No fallback was attempted."
    return error(said)


def said_by(refusal: Refusal, **body: object) -> str:
    """What an upstream says of a body that it does not take."""
    said = refusal({"anthropic-beta": MADE_UP_BETA}, body)
    assert said is not None
    return said


CONTEXT = said_by(refusals.context_management, context_management={})
ADAPTIVE = said_by(refusals.adaptive, thinking={"type": "adaptive"})
BETA = said_by(refusals.unknown_betas)
LARGE = said_by(refusals.large_answers, max_tokens=32_000)
LONG = said_by(refusals.long_prompts, messages="x" * 40_000)


def test_the_rows_are_those_of_the_page() -> None:
    """Fourteen, numbered in its order, each with a title, a reason and a remedy of its own."""
    assert [one.row for one in TROUBLES.values()] == list(range(1, 15))
    for what in ("id", "title", "why", "remedy", "shown"):
        values = {getattr(one, what) for one in TROUBLES.values()}
        assert len(values) == 14
        assert all(values)


def test_a_key_of_the_configuration_is_one_that_connect_writes() -> None:
    """What the table says to set is known to the configuration, and set in Claude Code by it."""
    keys = {key for one in TROUBLES.values() for key in one.keys}
    assert keys == set(VALUES)
    assert keys <= set(CLAUDE) & set(VARIABLES)
    for one in TROUBLES.values():
        for key in one.keys:
            assert VARIABLES[key] in one.remedy


def test_what_to_write_is_said_as_the_file_has_it() -> None:
    """The table's name, then a line for each key."""
    assert TROUBLES["fields"].lines("work") == [
        "[profiles.work.claude]",
        "disable_experimental_betas = true",
    ]
    assert TROUBLES["too-long"].lines("work", ["max_output_tokens"]) == [
        "[profiles.work.claude]",
        "max_output_tokens = 8192",
    ]
    assert TROUBLES["firewall"].lines("work") == []


@pytest.mark.parametrize(
    ("status", "message", "row"),
    [
        (400, CONTEXT, 5),
        (400, "tools.0.custom.defer_loading: Extra inputs are not permitted", 5),
        (400, "output_config: Extra inputs are not permitted", 5),
        (400, "thinking.adaptive.display: Extra inputs are not permitted", 5),
        (400, "invalid beta flag", 5),
        (400, BETA, 5),
        (422, "Unknown parameter: 'context_management'", 5),
        (400, ADAPTIVE, 6),
        (400, "This model does not support adaptive thinking", 6),
        (400, "thinking is not supported by this model", 6),
        (400, "`max_tokens` must be greater than `thinking.budget_tokens`", 6),
        (400, LARGE, 7),
        (400, LONG, 7),
        (400, "litellm.ContextWindowExceededError: prompt token count of 9 exceeds it", 7),
        (400, "max_tokens: 32000 > 8192, which is the maximum allowed number for it", 7),
        (400, "input length and `max_tokens` exceed context limit: 193125 + 21333 > 200000", 7),
        (400, "request (24071 tokens) exceeds the available context size (8192 tokens)", 7),
        (400, "Your input exceeds the context window of this model.", 7),
        (401, "invalid x-api-key", 2),
        (403, "the key was blocked", 2),
        (400, "Authentication Error - Expired Key. Key Expiry time 2026-01-01", 2),
    ],
)
@pytest.mark.parametrize("wrap", [error, through_litellm])
def test_an_error_is_named_by_its_words(
    status: int, message: str, row: int, wrap: Callable[[str], str]
) -> None:
    """As the upstream says it and as LiteLLM passes it on, it is the same row."""
    found = name(status, flags(JSON, wrap(message)))
    assert found is not None
    assert found.row == row


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, "model: claude-x", "not_found_error"),
        (400, "Invalid model name passed in model=claude-x.", "invalid_request_error"),
        (400, "There are no healthy deployments for this model", "invalid_request_error"),
        (401, "key not allowed to access model. Tried to access x", "key_model_access_denied"),
        (403, "key not allowed to access model. Tried to access x", "key_model_access_denied"),
        (404, "The model `x` does not exist or you do not have access to it.", "model_not_found"),
    ],
)
def test_a_model_that_nobody_has_is_no_trouble(status: int, message: str, kind: str) -> None:
    """It proves address and key, also where the status is that of a key that is refused."""
    found = flags(JSON, error(message, kind))
    assert says_model(status, found)
    assert name(status, found) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [(404, error("Not Found")), (404, '{"detail": "Not Found"}'), (404, PAGE), (401, PAGE)],
)
def test_a_route_that_is_missing_names_no_model(status: int, text: str) -> None:
    assert not says_model(status, flags(JSON, text))


@pytest.mark.parametrize(
    ("status", "kind", "text", "row"),
    [
        (403, "text/html", PAGE, 12),
        (403, "text/html; charset=utf-8", "", 12),
        (403, "text/plain", "Forbidden", 12),
        (406, "text/html", PAGE, 12),
        (200, "text/html", PAGE, 4),
        (200, JSON, "{}", 4),
        (200, "", "", 4),
        (302, "text/html", "", 4),
        (401, "text/html", PAGE, 2),
    ],
)
def test_an_answer_without_words_is_named_by_its_status(
    status: int, kind: str, text: str, row: int
) -> None:
    """A page, an empty answer, a redirect."""
    found = name(status, flags(kind, text))
    assert found is not None
    assert found.row == row


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Budget has been exceeded! Current cost: 1.0, Max budget: 0.5"),
        (400, "anthropic-version: header is required"),
        (400, "messages: at least one message is required"),
        (429, "slow down"),
        (500, "context_management: Extra inputs are not permitted"),
        (529, "overloaded"),
    ],
)
def test_what_the_table_does_not_have_is_not_named(status: int, message: str) -> None:
    """A budget, an outage, and an error of some other kind."""
    assert name(status, flags(JSON, error(message))) is None


def test_nothing_of_a_body_comes_through() -> None:
    """What is found in it are flags of ours, whatever it says."""
    known = {"html", "json"} | {
        *("adaptive", "thinking", "thought-field", "context_management", "extra", "beta"),
        *("version", "output", "context", "model", "budget", "expired", "made-up"),
    }
    canaries = Canaries()
    secret = canaries.new("key")
    text = error(f"{CONTEXT} {ADAPTIVE} {LARGE} {LONG} {BETA} {secret} budget")
    found = flags(JSON, text)
    assert found <= known
    assert canaries.seen_in(" ".join(found)) == []


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "\0" * 10, "<" * 70_000, "nul"])
def test_a_body_that_is_nothing_is_read(text: str) -> None:
    """Whatever came is looked through in a bounded time, and named by its status."""
    assert flags(JSON, text) <= {"html"}
