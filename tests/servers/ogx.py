"""
What an OGX server answers, as far as `ogx connect claude` and Claude Code ask: models in OpenAI's
shape with their type beside, messages in Anthropic's, no key that is checked.

See: https://ogx-ai.github.io/docs/building_applications/claude_code_integration
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.servers.upstream import Upstream, UpstreamHandler

MODELS: Mapping[str, str] = {
    "ollama/qwen3:32b": "llm",
    "ollama/nomic-embed-text": "embedding",
    "openai/gpt-4o-mini": "llm",
    "openai/gpt-4o": "llm",
    "openai/text-embedding-3-small": "embedding",
    "cohere/rank-v3": "rerank",
}


class Ogx(Upstream):
    """
    The server.

    Args:
        models: What it lists, each with its type, in this order.
        limits: The most tokens of one answer, of the models that have such a limit.
    """

    def __init__(
        self, models: Mapping[str, str] = MODELS, limits: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(_Ogx)
        self.models, self.limits = models, limits or {}
        self.lists: list[str] = []  # the paths that were asked for lists


class _Ogx(UpstreamHandler):
    server: Ogx

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        path = self.path.split("?")[0]
        if path == "/v1/models":
            self.server.lists.append(self.path)
            self.send_json({"data": _listed(self.server.models)})
        elif path in ("/v1/version", "/v1/health"):
            self.send_json({"version": "0.5.0"} if path.endswith("version") else {"status": "OK"})
        else:
            self.send_json({"detail": "Not Found"}, 404)

    def reply(self, request: dict[str, Any]) -> None:
        """Refuse a model that is not listed, and answers that are too long."""
        model, most = request.get("model"), request.get("max_tokens", 0)
        limit = self.server.limits.get(str(model))
        if model not in self.server.models:
            self._refuse(404, "not_found_error", f"Model '{model}' not found")
        elif limit is not None and most > limit:
            said = (
                f"max_tokens is too large: {most}. This model supports at most {limit} completion"
            )
            said += f" tokens, whereas you provided {most}."
            self._refuse(400, "invalid_request_error", said)
        else:
            super().reply(request)

    def _refuse(self, status: int, kind: str, said: str) -> None:
        self.send_json({"type": "error", "error": {"type": kind, "message": said}}, status)


def _listed(models: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": 1764000000,
            "owned_by": "ogx",
            "custom_metadata": {"model_type": kind, "provider_id": name.partition("/")[0]},
        }
        for name, kind in models.items()
    ]
