"""What the development gateway says instead of calling a model, in Anthropic's shapes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keybroker.devgateway import refusals
from keybroker.devgateway.refusals import Json

GREETING = "Hello from the development gateway: your key works, and no model was asked."


def check(body: Mapping[str, Any]) -> None:
    """Refuse a message that names no model or says nothing."""
    if not isinstance(body.get("model"), str):
        said = "litellm.BadRequestError: You passed in model=None."
        kind = "invalid_request_error"
        raise refusals.anthropic(
            400, kind, f"{said} There are no healthy deployments for this model"
        )
    if not isinstance(body.get("messages"), list):
        said = "anthropic_messages: Missing required parameter: 'messages'."
        raise refusals.anthropic(400, "invalid_request_error", said)


def message(body: Mapping[str, Any], input_tokens: int) -> Json:
    """Greet in one piece, whatever was said: nothing of the request but its model is repeated."""
    limit = body.get("max_tokens")
    words = GREETING.split(" ")
    said = words[:limit] if isinstance(limit, int) and limit > 0 else words
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": " ".join(said)}],
        "stop_reason": "end_turn" if len(said) == len(words) else "max_tokens",
        "stop_sequence": None,
        "usage": {"input_tokens": input_tokens, "output_tokens": len(said)},
    }


def events(whole: Json) -> Iterator[Json]:
    """Cut a message into the events of Anthropic's stream."""
    usage = {**whole["usage"], "output_tokens": 1}
    start = {**whole, "content": [], "stop_reason": None, "usage": usage}
    yield {"type": "message_start", "message": start}
    block = {"type": "text", "text": ""}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "ping"}
    for piece in re.findall(r"\S+\s*", whole["content"][0]["text"]):
        delta = {"type": "text_delta", "text": piece}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
        "usage": {"output_tokens": whole["usage"]["output_tokens"]},
    }
    yield {"type": "message_stop"}


def models(names: Sequence[str], anthropic: bool) -> Json:
    """List models in Anthropic's shape, which Claude Code reads, or in OpenAI's."""
    if not anthropic:
        entry = {"object": "model", "created": 1677610602, "owned_by": "openai"}
        return {"data": [{"id": name, **entry} for name in names], "object": "list"}
    created = {"created_at": "2023-02-28T18:56:42Z"}
    return {
        "data": [{"type": "model", "id": name, "display_name": name, **created} for name in names],
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }
