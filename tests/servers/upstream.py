"""
A stand-in for the API behind a gateway: every message is answered with `pong`.

`python -m tests.servers.upstream` runs it alone and prints its address.

See: https://docs.anthropic.com/en/api/messages-streaming
"""

from __future__ import annotations

import json
import signal
from datetime import UTC, datetime
from threading import Lock
from typing import Any

from tests.servers.web import Handler, LoopbackServer

MODEL = "claude-sonnet-4-5"


class Upstream(LoopbackServer):
    """The server; remembers which credentials and models it was asked with."""

    def __init__(self) -> None:
        super().__init__(_Upstream)
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


class _Upstream(Handler):
    server: Upstream

    def do_HEAD(self) -> None:  # noqa: N802, the standard library's name
        self._send(b"", "application/json")

    def do_GET(self) -> None:  # noqa: N802
        model = {"type": "model", "id": MODEL, "display_name": "Sonnet"}
        model["created_at"] = "2025-09-29T00:00:00Z"
        self._send_json({"data": [model], "has_more": False, "first_id": MODEL, "last_id": MODEL})

    def do_POST(self) -> None:  # noqa: N802
        request = json.loads(self.body() or b"{}")
        self.server.remember(
            {
                "path": self.path,
                "authorization": self.headers.get("authorization"),
                "x-api-key": self.headers.get("x-api-key"),
                "model": request.get("model"),
                "stream": bool(request.get("stream")),
                "time": datetime.now(UTC),
            }
        )
        if self.path.split("?")[0].endswith("/count_tokens"):
            self._send_json({"input_tokens": 7})
        elif request.get("stream"):
            self._send(_events(request.get("model")), "text/event-stream")
        else:
            content = [{"type": "text", "text": "pong"}]
            message = _message(request.get("model"))
            self._send_json({**message, "content": content, "stop_reason": "end_turn"})

    def _send_json(self, answer: dict[str, Any]) -> None:
        self._send(json.dumps(answer).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("request-id", "req_test")
        self.end_headers()
        self.wfile.write(body)


def _message(model: str | None) -> dict[str, Any]:
    return {
        "id": "msg_test",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 1},
    }


def _events(model: str | None) -> bytes:
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": _message(model)},
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
    return "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()


if __name__ == "__main__":
    with Upstream() as alone:
        print(alone.url, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
