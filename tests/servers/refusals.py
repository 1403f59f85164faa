"""
Why upstreams refuse what Claude Code sends, in the words of those who were seen to do it.

Each is for `Upstream.refuses`: None where the request is taken.

See: https://docs.claude.com/en/api/errors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Headers = Mapping[str, str]
Body = Mapping[str, Any]

_KNOWN_BETAS = (
    *("claude-code-", "interleaved-thinking-", "context-management-", "effort-"),
    *("thinking-token-count-", "advanced-tool-use-", "prompt-caching-scope-"),
    *("mid-conversation-tool-changes-", "fine-grained-tool-streaming-", "per-turn-control-"),
)


def context_management(_headers: Headers, body: Body) -> str | None:
    """An upstream that has no such field."""
    if "context_management" in body:
        return "context_management: Extra inputs are not permitted"
    return None


def context_management_without_beta(headers: Headers, body: Body) -> str | None:
    """The API itself: the field is there with its beta alone."""
    if "context-management-2025-06-27" in headers.get("anthropic-beta", ""):
        return None
    return context_management(headers, body)


def adaptive(_headers: Headers, body: Body) -> str | None:
    """A model build of before adaptive thinking."""
    if (body.get("thinking") or {}).get("type") == "adaptive":
        return (
            "thinking: Input tag 'adaptive' found using 'type' does not match any of the expected "
            "tags: 'disabled', 'enabled'"
        )
    return None


def effort(_headers: Headers, body: Body) -> str | None:
    """An upstream without efforts."""
    return "output_config: Extra inputs are not permitted" if "output_config" in body else None


def large_answers(_headers: Headers, body: Body) -> str | None:
    """A model of OpenAI's behind a gateway that translates."""
    if (most := body.get("max_tokens", 0)) > 16_384:
        return (
            f"max_tokens is too large: {most}. This model supports at most 16384 completion tokens"
        )
    return None


def long_prompts(_headers: Headers, body: Body) -> str | None:
    """A gateway with a limit of its own."""
    size = len(str(body)) // 4
    if size > 8_000:
        return f"prompt token count of {size} exceeds the limit of 8000"
    return None


def unknown_betas(headers: Headers, _body: Body) -> str | None:
    """The API itself, of a beta that it does not know."""
    for one in filter(None, headers.get("anthropic-beta", "").split(",")):
        if not one.strip().startswith(_KNOWN_BETAS):
            return (
                f"Unexpected value(s) `{one}` for the `anthropic-beta` header. Please consult our "
                "documentation at docs.claude.com or try again without the header."
            )
    return None


def versions(headers: Headers, _body: Body) -> str | None:
    """The API itself, of its version."""
    version = headers.get("anthropic-version")
    if version is None:
        return "anthropic-version: header is required"
    return None if version == "2023-06-01" else f'anthropic-version: "{version}" is not valid'
