"""
A stand-in for the API behind a gateway: every message is answered with `pong`.

`python -m tests.servers.upstream` runs it alone and prints its address.

See: https://docs.anthropic.com/en/api/messages-streaming
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from threading import Lock
from typing import Any

from tests.servers.web import Handler, LoopbackServer

MODEL = "claude-sonnet-4-5"


Refusal = Callable[[Mapping[str, str], Mapping[str, Any]], str | None]


class Upstream(LoopbackServer):
    """
    The server; remembers which credentials and models it was asked with.

    Attributes:
        refuses: Each is asked, with headers and body, why a request is refused with 400; None: it
            is not.
        message_id: What its messages are called.
        request_id: What it calls every request.
    """

    def __init__(self, handler: type[Handler] | None = None, host: str = "127.0.0.1") -> None:
        super().__init__(handler or UpstreamHandler, host)
        self.refuses: tuple[Refusal, ...] = ()
        self.message_id = "msg_test"
        self.request_id = "req_test"
        self._seen: list[dict[str, Any]] = []
        self._seen_guard = Lock()

    def requests(self) -> list[dict[str, Any]]:
        """Every POST so far: path, authorization, x-api-key, model, stream, time (aware UTC)."""
        with self._seen_guard:
            return list(self._seen)

    def remember(self, request: dict[str, Any]) -> None:
        """Add to what `requests` tells."""
        with self._seen_guard:
            self._seen.append(request)


class UpstreamHandler(Handler):
    """Answers one connection."""

    server: Upstream

    def do_HEAD(self) -> None:  # noqa: N802, the standard library's name
        self.send(b"", "application/json")

    def do_GET(self) -> None:  # noqa: N802
        model = {"type": "model", "id": MODEL, "display_name": "Sonnet"}
        model["created_at"] = "2025-09-29T00:00:00Z"
        self.send_json({"data": [model], "has_more": False, "first_id": MODEL, "last_id": MODEL})

    def do_POST(self) -> None:  # noqa: N802
        self.answer(self.read_json(self.body()))

    def answer(self, request: dict[str, Any]) -> None:
        """Remember a request, and answer it."""
        self.server.remember(
            {
                "path": self.path,
                "authorization": self.headers.get("authorization"),
                "x-api-key": self.headers.get("x-api-key"),
                "model": request.get("model"),
                "stream": bool(request.get("stream")),
                "max_tokens": request.get("max_tokens"),
                "time": datetime.now(UTC),
            }
        )
        self.reply(request)

    def reply(self, request: dict[str, Any]) -> None:
        """Answer a request that is remembered."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        said = next(filter(None, (one(headers, request) for one in self.server.refuses)), None)
        if said is not None:
            error = {"type": "invalid_request_error", "message": said}
            self.send_json({"type": "error", "error": error, "request_id": "req_test"}, 400)
        elif self.path.split("?")[0].endswith("/count_tokens"):
            self.send_json({"input_tokens": 7})
        elif request.get("stream"):
            self.send(events(request.get("model"), self.server.message_id), "text/event-stream")
        else:
            content = [{"type": "text", "text": "pong"}]
            message = _message(request.get("model"), self.server.message_id)
            self.send_json({**message, "content": content, "stop_reason": "end_turn"})

    def send_json(self, answer: dict[str, Any], status: int = 200) -> None:
        """Answer with JSON."""
        self.send(json.dumps(answer).encode(), "application/json", status)

    def send(self, body: bytes, kind: str, status: int = 200) -> None:
        """Answer with some bytes of a type."""
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("request-id", self.server.request_id)
        self.end_headers()
        self.wfile.write(body)


def _message(model: str | None, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 1},
    }


def events(model: str | None, name: str = "msg_test") -> bytes:
    """Return the answer `pong` as a stream."""
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    said: list[dict[str, Any]] = [
        {"type": "message_start", "message": _message(model, name)},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "pong"},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    return "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in said).encode()


if __name__ == "__main__":
    with Upstream() as alone:
        print(alone.url, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
