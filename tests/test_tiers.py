"""Which model stands for which tier: by flags, by names, by order; never one that is not listed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.errors import ConfigError, SourceInvalid
from keybroker.tiers import TIERS, assign, is_listed, is_too_small, newest

HOST = "127.0.0.1:8321"
OGX = ["ollama/qwen3:32b", "openai/gpt-4o-mini", "openai/gpt-4o", "openai/o1"]
CLAUDE = [
    "gpt-4o",
    "anthropic/claude-3-5-haiku-20241022",
    "anthropic/claude-haiku-4-5-20251001",
    "anthropic/claude-sonnet-4-5-20250929",
    "anthropic/claude-opus-4-1-20250805",
]


def all_of(model: str) -> dict[str, str]:
    return dict.fromkeys(TIERS, model)


# The table of flags of `ogx connect claude`.


@pytest.mark.parametrize("name", OGX)
def test_model_is_for_every_tier(name: str) -> None:
    """`--model`: the model to map to all three tiers; its id is not changed."""
    assert assign(OGX, HOST, name) == all_of(name)


def test_without_flags_it_is_the_first_listed() -> None:
    """`--model`, default: the first available model."""
    assert assign(OGX, HOST) == all_of("ollama/qwen3:32b")


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_s_own_flag_overrides_model(tier: str) -> None:
    """`--haiku-model`, `--sonnet-model`, `--opus-model`; the others have the value of `--model`."""
    found = assign(OGX, HOST, "openai/gpt-4o", {tier: "openai/o1"})
    assert found == {**all_of("openai/gpt-4o"), tier: "openai/o1"}


def test_each_tier_its_own() -> None:
    """The example of three flags."""
    flags = {"haiku": "openai/gpt-4o-mini", "sonnet": "openai/gpt-4o", "opus": "openai/o1"}
    assert assign(OGX, HOST, None, flags) == flags


def test_without_flags_a_tier_has_its_claude_model() -> None:
    """Behind any prefix, the newest; the order of the tiers is that of Claude Code."""
    found = assign(CLAUDE, HOST)
    assert list(found) == ["haiku", "sonnet", "opus"]
    assert found == {
        "haiku": "anthropic/claude-haiku-4-5-20251001",
        "sonnet": "anthropic/claude-sonnet-4-5-20250929",
        "opus": "anthropic/claude-opus-4-1-20250805",
    }


def test_a_tier_without_a_claude_model_has_the_first_listed() -> None:
    """A gateway may offer only some of them."""
    assert assign(["gpt-4o", "claude-sonnet-4-5"], HOST) == {
        "haiku": "gpt-4o",
        "sonnet": "claude-sonnet-4-5",
        "opus": "gpt-4o",
    }


# Names


@pytest.mark.parametrize(
    "name",
    [
        "claude-haiku-4-5",
        "claude-haiku-4-5-20251001",
        "claude-3-5-haiku-latest",
        "anthropic/claude-haiku-4-5",
        "anthropic.claude-haiku-4-5-20251001-v1:0",
        "us.anthropic.claude-haiku-4-5-20251001-v1:0",
        "bedrock/eu.anthropic.claude-haiku-4-5-20251001-v1:0",
        "vertex_ai/claude-haiku-4-5@20251001",
        "openrouter/anthropic/claude-haiku-4.5",
        "all:claude-haiku-4-5",
    ],
)
def test_a_claude_model_is_known_behind_any_prefix(name: str) -> None:
    """As gateways and clouds write them."""
    assert newest(["gpt-4o", name], "haiku") == name
    assert newest(["gpt-4o", name], "opus") is None


@pytest.mark.parametrize(
    "name",
    ["my-haiku-writer", "haiku", "notclaude-haiku-4", "claudette-haiku-4", "claude-haikus-4"],
)
def test_a_name_like_it_is_not_one(name: str) -> None:
    """The word alone does not make it a model of Anthropic's."""
    assert newest([name], "haiku") is None


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("claude-3-5-haiku-20241022", "claude-haiku-4-5-20251001"),
        ("claude-3-haiku-20240307", "claude-3-5-haiku-20241022"),
        ("claude-opus-4-20250514", "claude-opus-4-1-20250805"),
        ("claude-opus-4-6", "claude-opus-4-10"),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", "claude-sonnet-4-5"),
        ("claude-sonnet-4@20250514", "claude-sonnet-4-5@20250929"),
    ],
)
def test_the_newest_of_a_tier_is_chosen(older: str, newer: str) -> None:
    """By its version, wherever it is listed; a date and a build's number are no version."""
    tier = next(one for one in TIERS if one in older)
    assert newest([older, newer], tier) == newer
    assert newest([newer, older], tier) == newer


@pytest.mark.parametrize(
    "other",
    [
        "vertex_ai/claude-opus-4-5@20251101",
        "us.anthropic.claude-opus-4-5-20251101-v1:0",
        "claude-opus-4-5-v2",
        "claude-opus-4-5@12",
    ],
)
def test_of_one_version_the_first_is_chosen(other: str) -> None:
    """The gateway's order is its owner's; a build's number makes none newer."""
    both = [other, "anthropic/claude-opus-4-5"]
    assert newest(both, "opus") == both[0]
    assert newest(both[::-1], "opus") == both[1]


# What is refused


def test_one_that_is_not_listed_is_refused_with_the_list() -> None:
    """The flag is named, and what could have been typed."""
    with pytest.raises(ConfigError) as caught:
        assign(OGX, HOST, "openai/gpt-5")
    assert caught.value.message == "--model: openai/gpt-5 is not listed by 127.0.0.1:8321"
    assert caught.value.hint == f"it lists {', '.join(OGX)}"
    with pytest.raises(ConfigError, match=r"--opus-model: claude-opus-4-6 is not listed"):
        assign(OGX, HOST, "openai/gpt-4o", {"opus": "claude-opus-4-6"})


@pytest.mark.parametrize("name", ["qwen3:32b", "OLLAMA/QWEN3:32B", "ollama/qwen3", "openai", ""])
def test_an_id_is_taken_as_a_whole(name: str) -> None:
    """No part of one and no other spelling counts; an empty flag is no flag."""
    if not name:
        assert assign(OGX, HOST, None, {"haiku": name}) == all_of(OGX[0])
        return
    with pytest.raises(ConfigError):
        assign(OGX, HOST, name)


def test_a_long_list_is_cut() -> None:
    """And says how to see the rest."""
    many = [f"model-{number}" for number in range(30)]
    with pytest.raises(ConfigError) as caught:
        assign(many, HOST, "x")
    assert caught.value.hint == f"it lists {', '.join(many[:12])} and 18 more: keybroker models"


def test_what_steers_a_terminal_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        assign(OGX, HOST, "\x1b[2Jgone")
    assert caught.value.message == "--model: what was given is not listed by 127.0.0.1:8321"


def test_no_model_at_all_is_said() -> None:
    """It is up, and has no provider, or none for this key."""
    with pytest.raises(SourceInvalid) as caught:
        assign([], HOST)
    assert caught.value.message == "models: 127.0.0.1:8321 lists no model for chat"
    assert caught.value.hint == "no provider is active there, or none that this key may use"


def test_a_pattern_lets_its_models_pass_and_is_none_itself() -> None:
    """LiteLLM and others may list `anthropic/*`."""
    listed = ["anthropic/*", "gpt-4o"]
    assert assign(listed, HOST) == all_of("gpt-4o")
    assert assign(listed, HOST, "anthropic/claude-x") == all_of("anthropic/claude-x")
    with pytest.raises(ConfigError, match=r"--model: 127.0.0.1:8321 lists patterns alone"):
        assign(["anthropic/*"], HOST)
    assert not is_listed("x", ["[x]*"])


def test_the_client_s_own_suffix_is_not_the_gateway_s() -> None:
    """`[1m]` asks Claude Code for the large window; it is passed on to it."""
    assert assign(["claude-sonnet-4-5"], HOST, "claude-sonnet-4-5[1m]") == all_of(
        "claude-sonnet-4-5[1m]"
    )
    assert not is_listed("claude-sonnet-4-5[other]", ["claude-sonnet-4-5"])


def test_a_limit_is_too_small_below_what_is_asked_for() -> None:
    """32,000 tokens are what Claude Code asks for; what is not known is not said to be small."""
    assert [is_too_small(one) for one in (None, 16384, 31_999, 32_000, 64_000)] == [
        *(False, True, True, False, False)
    ]
    assert is_too_small(16384, 16384) is False


IDS = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="*"), min_size=1
)


@given(st.lists(IDS, min_size=1, max_size=20), st.data())
def test_what_is_chosen_is_always_listed(listed: list[str], data: st.DataObject) -> None:
    """Whatever they are called, and unchanged."""
    model = data.draw(st.none() | st.sampled_from(listed))
    flags = {tier: data.draw(st.none() | st.sampled_from(listed)) for tier in TIERS}
    found = assign(listed, HOST, model, flags)
    assert list(found) == list(TIERS)
    for tier, name in found.items():
        assert name in listed
        assert name == (flags[tier] or model or name)
