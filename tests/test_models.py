"""What a gateway lists: both dialects, pages, only what answers in words, and its limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from keybroker.config import Profile, read_profile
from keybroker.credential import Secret
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import SourceDenied, SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources import models as module
from keybroker.sources.models import limit_said, probe, read
from tests.resident import Resident
from tests.servers.faults import refused_url
from tests.servers.litellm import LiteLLM
from tests.servers.ogx import MODELS, Ogx
from tests.servers.web import Handler, LoopbackServer

KEY = Secret("sk-geheim-0123456789")


def profile(url: str, **more: Any) -> Profile:
    """A profile with a placeholder as its key."""
    source = {"type": "static", "placeholder": "x", "timeout": "2s"}
    return read_profile("work", {"base_url": url, "source": source, **more}, Where({}, "test"))


def names(url: str, secret: Secret = KEY, **more: Any) -> list[str]:
    return [one["id"] for one in read(profile(url, **more), secret)["models"]]


def limits(url: str, secret: Secret = KEY) -> dict[str, int | None]:
    return {one["id"]: one["limit"] for one in read(profile(url), secret)["models"]}


class Lists(LoopbackServer):
    """
    Answers by path, with or without what the Anthropic API is asked with.

    Args:
        anthropic: Pages in the dialect of Anthropic's clients, by what they come after.
        openai: The same for all others.
    """

    def __init__(
        self,
        anthropic: Mapping[str, Any] | None = None,
        openai: Mapping[str, Any] | None = None,
        status: int = 200,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(_Lists)
        self.anthropic, self.openai, self.status = anthropic, openai, status
        self.more = more or {}
        self.asked: list[tuple[str, dict[str, str]]] = []


class _Lists(Handler):
    server: Lists

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        server = self.server
        headers = {name.lower(): value for name, value in self.headers.items()}
        server.asked.append((self.path, headers))
        url = httpx.URL(self.path)
        pages = server.anthropic if "anthropic-version" in headers else server.openai
        cursor = url.params.get("after_id") or url.params.get("after") or ""
        status, value = server.status, None
        if url.path in server.more:
            status, value = 200, server.more[url.path]
        elif not url.path.endswith("/models") or pages is None:
            status = 404
        else:
            value = pages[cursor] if isinstance(pages, dict) and cursor in pages else pages
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if server.more:
            self.send_header("x-litellm-version", "1.0")
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:  # noqa: N802
        self.server.asked.append((self.path, {"body": self.body().decode()}))
        data = json.dumps(self.server.more.get("said")).encode()
        self.send_response(400)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def of_anthropic(*ids: str, more: bool = False, **extra: Any) -> dict[str, Any]:
    """A page as Anthropic's API has it."""
    data = [{"type": "model", "id": one, "display_name": one, **extra} for one in ids]
    return {"data": data, "has_more": more, "first_id": ids[0], "last_id": ids[-1]}


def of_openai(*ids: str, **extra: Any) -> dict[str, Any]:
    """A list as OpenAI's API has it."""
    data = [{"id": one, "object": "model", "owned_by": "x", **extra} for one in ids]
    return {"object": "list", "data": data}


# Pages and dialects


def test_pages_are_read_to_their_end() -> None:
    """`has_more` and `last_id`, asked on with `after_id`; each with the key, in both headers."""
    pages = {
        "": of_anthropic("claude-a", "claude-b", more=True),
        "claude-b": of_anthropic("claude-c", more=True),
        "claude-c": of_anthropic("claude-d"),
    }
    with Lists(pages) as server:
        assert names(server.url) == ["claude-a", "claude-b", "claude-c", "claude-d"]
        assert [path for path, _ in server.asked] == [
            "/v1/models?limit=1000",
            "/v1/models?limit=1000&after_id=claude-b",
            "/v1/models?limit=1000&after_id=claude-c",
        ]
        for _, headers in server.asked:
            assert headers["x-api-key"] == KEY.reveal()
            assert headers["authorization"] == f"Bearer {KEY.reveal()}"
            assert headers["anthropic-version"] == "2023-06-01"


def test_pages_that_go_round_in_a_circle_end() -> None:
    """A gateway that does not know `after_id` gives the same page again."""
    with Lists(of_anthropic("claude-a", more=True)) as server:
        assert names(server.url) == ["claude-a"]
        assert len(server.asked) == 2


def test_an_endless_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many pages."""
    monkeypatch.setattr(module, "MOST_PAGES", 2)
    pages = {"": of_anthropic("a", more=True), "a": of_anthropic("b", more=True)}
    with Lists(pages) as server, pytest.raises(SourceInvalid, match="more models than can be read"):
        names(server.url)


def test_the_list_in_openai_s_dialect_is_read_as_well() -> None:
    """Many gateways give it, whoever asks."""
    both = of_openai("gpt-4o", "ollama/qwen3:32b")
    with Lists(both) as server:
        assert names(server.url) == ["gpt-4o", "ollama/qwen3:32b"]


@pytest.mark.parametrize("first", [None, {"data": []}, {"error": "no such route"}, [], "page"])
def test_who_has_no_list_for_anthropic_s_clients_is_asked_as_openai_s(first: Any) -> None:
    """At `openai_base_url`, or /v1 below the gateway's address; pages come after `after`."""
    pages = {"": {**of_openai("a"), "has_more": True, "last_id": "a"}, "a": of_openai("b")}
    with Lists(first, pages) as server:
        assert names(server.url) == ["a", "b"]
        assert server.asked[-1][0] == "/v1/models?limit=1000&after=a"
        assert "anthropic-version" not in server.asked[-1][1]
    with Lists(first, pages) as server:
        url = f"{server.url}/anthropic"
        assert names(url, openai_base_url=f"{server.url}/v2") == ["a", "b"]
        assert [path.split("?")[0] for path, _ in server.asked] == [
            *("/anthropic/v1/models", "/v2/models", "/v2/models")
        ]


def test_headers_of_the_profile_are_sent() -> None:
    """A gateway may route by them."""
    with Lists(of_anthropic("a")) as server:
        names(server.url, headers={"x-team": "blue"})
        assert server.asked[0][1]["x-team"] == "blue"


# What is left out


@pytest.mark.parametrize(
    "extra",
    [
        {"custom_metadata": {"model_type": "embedding"}},
        {"model_type": "rerank"},
        {"type": "embeddings"},
        {"mode": "embedding"},
        {"mode": "image_generation"},
        {"mode": "audio_transcription"},
        {"mode": "rerank"},
        {"metadata": {"type": "moderation"}},
        {"model_info": {"mode": "audio_speech"}},
        {"architecture": {"output_modalities": ["image"]}},
    ],
)
def test_what_says_that_it_is_something_else_is_left_out(extra: Mapping[str, Any]) -> None:
    """Wherever the gateway says it, and whatever its name."""
    with Lists(of_openai("gpt-4o", **extra)) as server:
        assert names(server.url) == []


@pytest.mark.parametrize(
    "extra",
    [
        {"custom_metadata": {"model_type": "llm"}},
        {"mode": "chat"},
        {"mode": "responses"},
        {"type": "vlm"},
        {"architecture": {"output_modalities": ["image", "text"]}},
    ],
)
def test_what_says_that_it_is_for_chat_stays(extra: Mapping[str, Any]) -> None:
    """Even with a name like another's."""
    with Lists(of_openai("embed-chat", **extra)) as server:
        assert names(server.url) == ["embed-chat"]


OTHERS = [
    *("text-embedding-3-small", "ollama/nomic-embed-text", "voyage/voyage-embed", "bge-m3"),
    *("BAAI/bge-reranker-v2-m3", "cohere/rerank-v3.5", "jina-reranker-v2", "all-minilm"),
    *("whisper-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-transcribe", "azure/speech", "clip"),
    *("dall-e-3", "gpt-image-1", "imagen-4", "black-forest/flux", "stable-diffusion-xl", "sora"),
    *("omni-moderation-latest", "multilingual-e5-large", "gemini-2.5-flash-image", "mistral-ocr"),
]
CHATS = [
    *(
        "claude-sonnet-4-5",
        "gpt-4o",
        "o1",
        "ollama/qwen3:32b",
        "vllm/Qwen/Qwen3-8B",
        "llama3.3:70b",
    ),
    *("gemini-2.5-pro", "mistral-large", "deepseek-chat", "command-r-plus", "imaginary", "texta"),
]


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_the_name_of_something_else_is_left_out(name: str) -> None:
    """Of gateways that say no more than a name."""
    with Lists(of_anthropic(name, "x")) as server:
        assert names(server.url) == ["x"]


def test_what_has_the_name_of_a_chat_model_stays() -> None:
    with Lists(of_anthropic(*CHATS)) as server:
        assert names(server.url) == CHATS


@pytest.mark.parametrize("name", ["", "a b", "a\n", "\x1b[2J", "x" * 201, None, 7, ["a"]])
def test_a_name_that_cannot_be_typed_is_left_out(name: Any) -> None:
    """Nor shown: it would steer a terminal."""
    page = {"data": [{"id": name}, {"id": "good"}, "no object", None]}
    with Lists(page) as server:
        assert names(server.url) == ["good"]


# What goes wrong


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, SourceDenied, "does not list models for this key (401)"),
        (403, SourceDenied, "does not list models for this key (403)"),
        (404, SourceInvalid, "answers 404 at /v1/models"),
        (429, SourceUnavailable, "fails to list models (429)"),
        (503, SourceUnavailable, "fails to list models (503)"),
    ],
)
def test_a_refusal_is_said_by_its_status(status: int, kind: type[SourceError], said: str) -> None:
    """Nothing of its text is repeated."""
    page = {"error": {"message": f"bad key {KEY.reveal()}"}}
    with Lists(page, page, status) as server, pytest.raises(kind) as caught:
        names(server.url)
    assert caught.value.message.endswith(said)
    assert "geheim" not in f"{caught.value.message}{caught.value.hint}"


def test_an_answer_that_is_no_list_is_said() -> None:
    with Lists({"data": 7}, {"models": []}) as server, pytest.raises(SourceInvalid) as caught:
        names(server.url)
    assert caught.value.message.endswith("answers with no list of models at /v1/models")


def test_nobody_there_is_said() -> None:
    """With the address, and what to look at."""
    with pytest.raises(SourceUnavailable, match="could not be reached") as caught:
        names(refused_url())
    assert caught.value.hint == "is it running? see base_url"


# Limits


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        ({"max_output_tokens": 64000}, 64000),
        ({"max_tokens": 8192, "max_input_tokens": 200000}, 8192),
        ({"max_tokens": 200000, "max_output_tokens": 4096}, 4096),
        ({"top_provider": {"max_completion_tokens": 16384}}, 16384),
        ({"max_output_tokens": 64000.0}, 64000),
        ({"max_model_len": 32768}, None),
        *(({"max_output_tokens": one}, None) for one in (0, -1, True, "8192", None, 10**9)),
    ],
)
def test_a_limit_in_the_list_is_read(extra: Mapping[str, Any], limit: int | None) -> None:
    """As Anthropic, LiteLLM and OpenRouter have it; what is no number is not known."""
    with Lists(of_openai("m", **extra)) as server:
        assert limits(server.url) == {"m": limit}


def test_litellm_s_own_list_has_kind_and_limit() -> None:
    """The shortest of several upstreams of one name; its mode decides, not the name."""
    info = {
        "data": [
            {"model_name": "a", "model_info": {"mode": "chat", "max_output_tokens": 64000}},
            {"model_name": "a", "model_info": {"mode": "chat", "max_output_tokens": 8192}},
            {"model_name": "b", "model_info": {"mode": "embedding"}},
            {"model_name": "rerank-talk", "model_info": {"mode": "chat"}},
            {"model_name": "c", "model_info": None},
            "no object",
        ]
    }
    with Lists(of_anthropic("a", "b", "c", "rerank-talk"), more={"/model/info": info}) as server:
        assert limits(server.url) == {"a": 8192, "c": None, "rerank-talk": None}


@pytest.mark.parametrize("info", [None, {"detail": "no"}, {"data": 7}, []])
def test_litellm_that_tells_no_more_is_enough(info: Any) -> None:
    """A key may not be let see it."""
    with Lists(of_anthropic("a"), more={"/model/info": info}) as server:
        assert limits(server.url) == {"a": None}


SAID = {
    "max_tokens is too large: 32000. This model supports at most 16384 completion tokens": 16384,
    "BadRequestError: max_tokens is too large: 32000. This model supports at most 4,096 completion "
    "tokens, whereas you provided 32000.": 4096,
    "max_tokens: 10000000 > 64000, which is the maximum allowed number of output tokens for claude-"
    "sonnet-4-5": 64000,
    "The maximum tokens you requested exceeds the model limit of 8192. Try again with a maximum "
    "tokens value that is lower than 8192.": 8192,
    "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less "
    "than the `context_window` for this model": 8192,
    "Unable to submit request because it has a maxOutputTokens value of 10000000 but the supported "
    "range is from 1 (inclusive) to 65537 (exclusive).": 65536,
    "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]": 8192,
    "max_tokens is too large: 9. This model's maximum context length is 32768 tokens": 32768,
    "Overloaded": None,
    "model not found": None,
    "at most 0 completion tokens": None,
    "at most ,,, completion tokens": None,
    f"at most {'9' * 400} completion tokens": None,
}


@pytest.mark.parametrize("text", SAID)
def test_a_limit_is_read_from_an_upstream_s_refusal(text: str) -> None:
    """In the words of OpenAI, Anthropic, Bedrock, Groq, Vertex AI, DeepSeek and vLLM."""
    assert limit_said(text) == SAID[text]


def test_a_probe_asks_for_more_than_any_model_gives() -> None:
    """And takes from the answer the number alone."""
    with Ogx(limits={"openai/gpt-4o": 16384}) as server:
        assert probe(profile(server.url), KEY, "openai/gpt-4o") == {"limit": 16384}
        assert probe(profile(server.url), KEY, "ollama/qwen3:32b") == {"limit": None}
        assert probe(profile(server.url), KEY, "nobody/has-this") == {"limit": None}
        assert [one["max_tokens"] for one in server.requests()] == [10_000_000] * 3


@pytest.mark.parametrize("said", [None, [], "text", {"error": "at most 5 output tokens"}, {"x": 1}])
def test_a_probe_reads_any_answer(said: Any) -> None:
    with Lists(more={"said": said}) as server:
        found = probe(profile(server.url), KEY, "m")["limit"]
        assert found == (5 if isinstance(said, dict) and "error" in said else None)


# Real ones


@pytest.fixture(scope="module")
def ogx() -> Iterator[Ogx]:
    with Ogx() as server:
        yield server


def test_an_ogx_lists_its_language_models(ogx: Ogx) -> None:
    """`ogx connect claude` filters embeddings and rerankers as well."""
    assert names(ogx.url) == [one for one, kind in MODELS.items() if kind == "llm"]


def test_the_development_gateway_lists_its_models() -> None:
    """Those that the key may use; without one it lists nothing."""
    with DevGateway(models=["claude-sonnet-4-5", "claude-haiku-4-5"]) as gateway:
        admin = Secret(gateway.master_key)
        assert names(gateway.url, admin) == ["claude-sonnet-4-5", "claude-haiku-4-5"]
        with pytest.raises(SourceDenied):
            names(gateway.url, KEY)


@pytest.mark.servers
def test_a_real_litellm_lists_for_a_minted_key(litellm: LiteLLM, resident: Resident) -> None:
    """Kinds and limits from its /model/info, which a key for inference may see."""
    admin = resident.home.path / "admin"
    admin.touch(0o600)
    admin.write_text(litellm.master_key)
    resident.configure(
        f"""
        [profiles.work]
        base_url = "{litellm.url}"
        [profiles.work.source]
        type = "litellm"
        admin = {{ file = "{admin}" }}
        """
    )
    resident.start()
    status, out, err = resident.cli("models", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found == {
        "profile": "work",
        "asked_for": 32000,
        "models": [
            {
                "id": "claude-sonnet-4-5",
                "tiers": ["haiku", "sonnet", "opus"],
                "max_output_tokens": 64000,
                "too_small": False,
            },
            {"id": "gpt-4o", "tiers": [], "max_output_tokens": 16384, "too_small": True},
        ],
        "not_listed": [],
    }


# The command

LOCAL = """
[profiles.local]
base_url = "{url}"
[profiles.local.source]
type = "static"
placeholder = "ogx"
"""


def test_the_command_marks_what_is_too_small(resident: Resident) -> None:
    """By what is asked for: the configuration may say less. A probe finds what no list says."""
    with Ogx(limits={"openai/gpt-4o": 16384}) as server:
        resident.configure(LOCAL.format(url=server.url))
        status, out, err = resident.cli("models")
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            "MODEL               OUTPUT  TIER",
            "ollama/qwen3:32b    -       haiku, sonnet, opus",
            "openai/gpt-4o-mini  -       -",
            "openai/gpt-4o       -       -",
        ]
        status, out, err = resident.cli("models", "local", "--probe", "openai/gpt-4o")
        assert (status, err) == (0, "")
        assert out.splitlines()[3] == (
            "openai/gpt-4o       16384   -                    too small for Claude Code"
        )
        gone = "profiles.local.claude.haiku: gone/away is not listed any more;"
        more = '[profiles.local.claude]\nopus = "openai/gpt-4o"\nhaiku = "gone/away"\n'
        resident.configure(LOCAL.format(url=server.url) + more)
        status, out, err = resident.cli("models", "--probe", "openai/gpt-4o")
        assert (status, err) == (0, "")
        assert out.splitlines()[1:] == [
            "ollama/qwen3:32b    -       haiku, sonnet",
            "openai/gpt-4o-mini  -       -",
            "openai/gpt-4o       16384   opus           too small for Claude Code",
            f"{gone} keybroker connect --models auto",
            "",
            "Claude Code asks for answers of 32000 tokens, which a model of a tier cannot give;",
            "max_output_tokens = 16384 in [profiles.local.claude] has it ask for less",
        ]
        resident.configure(LOCAL.format(url=server.url) + f"{more}max_output_tokens = 16384\n")
        status, out, _ = resident.cli("models", "--probe", "openai/gpt-4o", "--json")
        found = json.loads(out)
        assert (status, found["asked_for"]) == (0, 16384)
        assert not any(one["too_small"] for one in found["models"])
        assert found["not_listed"] == [{"tier": "haiku", "id": "gone/away"}]


def test_the_command_says_what_is_wrong(resident: Resident) -> None:
    """No model, one to probe that is not there, no gateway: one line each, and what to do."""
    with Ogx({"ollama/nomic-embed-text": "embedding"}) as server:
        resident.configure(LOCAL.format(url=server.url))
        host = server.url.removeprefix("http://")
        said = f"keybroker: models: {host} lists no model for chat\n"
        said += "hint: no provider is active there, or none that this key may use\n"
        assert resident.cli("models") == (77, "", said)
    with Ogx() as server:
        resident.configure(LOCAL.format(url=server.url))
        status, out, err = resident.cli("models", "--probe", "openai/o9")
        assert (status, out) == (78, "")
        assert "openai/o9 is not listed by" in err
    url = refused_url()
    resident.configure(LOCAL.format(url=url))
    status, out, err = resident.cli("models")
    assert (status, out) == (75, "")
    assert err.startswith(f"keybroker: gateway: {url.removeprefix('http://')} could not be reached")
    assert resident.row("local")["trouble"] is None
