"""
Which models a gateway lists for a key, and how long their answers may be.

Asked as Claude Code asks, and where that gives no list, as OpenAI's clients do. What makes no
answers in words is left out: embeddings, rerankers, pictures, speech.

See: https://docs.anthropic.com/en/api/models-list, https://docs.litellm.ai/docs/proxy/model_management
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from keybroker.config import Profile
from keybroker.credential import Secret
from keybroker.errors import SourceDenied, SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources.http import Http, Reply

PAGE = "1000"
MOST_PAGES = 50
TOO_MANY = 10_000_000  # tokens of one answer, which no model has
LONGEST_ID = 200
LARGEST_LIMIT = 100_000_000

# What a gateway may say of a model's kind, wherever it says it.
WORDS = frozenset({"chat", "completion", "completions", "responses", "llm", "vlm", "text", "model"})
_OTHERS = re.compile(
    r"(?:^|[/._:-])(?:\w*embed\w*|\w*rerank\w*|bge|gte|e5|minilm|whisper|tts|stt|asr|dall-e|imagen"
    r"|flux|sora|veo|stable-diffusion\w*|sdxl|moderation|ocr|\w*transcribe|text-search|clip)"
    r"(?:$|[/._:-])|stable-diffusion|gpt-image|-image(?:$|-)|speech",
    re.I,
)
# In whose words an upstream says how long an answer may be, and what is to be added to its number.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern, re.I), added)
    for pattern, added in (
        (r"at most ([0-9,]+) (?:completion|output) tokens", 0),
        (r"> ?([0-9,]+), which is the maximum allowed number of output tokens", 0),
        (r"exceeds? the model limit of ([0-9,]+)", 0),
        (r"less than or equal to `?([0-9,]+)", 0),
        (r"\(inclusive\) to ([0-9,]+) \(exclusive\)", -1),
        (r"\[ ?1, ?([0-9,]+) ?\]", 0),
        (r"maximum context length (?:is|of) ([0-9,]+)", 0),
    )
)


def read(profile: Profile, secret: Secret) -> dict[str, Any]:
    """
    Return what is listed: `models`, each an `id` and a `limit` (None: not known), in its order.

    Raises:
        SourceUnavailable: Nobody is there, or they do not answer in time.
        SourceDenied: The key is refused.
        SourceInvalid: There is no list.
    """
    http = _http(profile, profile.base_url)
    try:
        rows, seen = _rows(profile, http, secret)
        known = _litellm(profile, http, secret) if _is_litellm(profile, seen) else {}
    finally:
        http.close()
    models: dict[str, int | None] = {}
    for row in rows:
        name = str(row["id"])
        kinds, limit = known.get(name, (set(), None))
        if _answers_in_words(name, kinds | set(_kinds(row))):
            models.setdefault(name, limit or _limit(row))
    return {"models": [{"id": name, "limit": limit} for name, limit in models.items()]}


def probe(profile: Profile, secret: Secret, model: str) -> dict[str, Any]:
    """
    Ask a model for a longer answer than any has, and read from the refusal how long it may be.

    Returns:
        `limit`; None where the upstream did not say, or answered.

    Raises:
        SourceError: There was no whole answer.
    """
    body = {
        "model": model,
        "max_tokens": TOO_MANY,
        "messages": [{"role": "user", "content": "Answer with one word."}],
    }
    http = _http(profile, profile.base_url)
    try:
        reply = http.call("POST", "/v1/messages", headers=_headers(secret), body=body)
    finally:
        http.close()
    if reply.status == 200:
        return {"limit": None}
    return {"limit": limit_said(_text(reply.value))}


def limit_said(text: str) -> int | None:
    """Read from an upstream's refusal how many tokens an answer may have."""
    for pattern, added in _LIMITS:
        if (match := pattern.search(text)) is not None:
            return _number(int(match[1].replace(",", "")[:12] or 0) + added)
    return None


def _http(profile: Profile, url: str) -> Http:
    seconds = profile.source["timeout"].total_seconds()
    return Http("gateway", url, ca=profile.ca, headers=profile.headers, seconds=seconds)


def _headers(secret: Secret, *, anthropic: bool = True) -> dict[str, str]:
    key = secret.reveal()
    headers = {"authorization": f"Bearer {key}", "x-api-key": key}
    return {**headers, "anthropic-version": "2023-06-01"} if anthropic else headers


def _rows(profile: Profile, http: Http, secret: Secret) -> tuple[list[dict[str, Any]], Reply]:
    """Return what is listed, in the one dialect or the other, and an answer to tell whose it is."""
    try:
        found = _pages(http, "/v1/models", _headers(secret), "after_id")
        if found[0]:
            return found
        problem: SourceError | None = None
    except (SourceDenied, SourceInvalid) as error:
        problem = error
    url = profile.openai_base_url or f"{profile.base_url}/v1"
    other = _http(profile, url)
    try:
        return _pages(other, "/models", _headers(secret, anthropic=False), "after")
    except SourceError:
        if problem is None:  # it was a list, of nothing
            return found
        raise problem from None
    finally:
        other.close()


def _pages(
    http: Http, path: str, headers: Mapping[str, str], cursor: str
) -> tuple[list[dict[str, Any]], Reply]:
    rows: dict[str, dict[str, Any]] = {}
    query = {"limit": PAGE}
    for _ in range(MOST_PAGES):
        reply = http.call("GET", path, query=query, headers=headers)
        page = _page(reply, http.host)
        new = {name: row for row in page if (name := str(row["id"])) not in rows}
        rows.update(new)
        last = reply.value.get("last_id")
        if reply.value.get("has_more") is not True or not new or not isinstance(last, str):
            return list(rows.values()), reply
        query = {"limit": PAGE, cursor: last}
    raise SourceInvalid(f"gateway: {http.host} lists more models than can be read")


def _page(reply: Reply, host: str) -> list[dict[str, Any]]:
    """Return the models of one page, those whose ids can be shown and typed."""
    status = reply.status
    if status in (401, 403):
        raise SourceDenied(
            f"gateway: {host} does not list models for this key ({status})", hint="keybroker status"
        )
    if status == 429 or status >= 500:
        raise SourceUnavailable(
            f"gateway: {host} fails to list models ({status})", retry_after=reply.retry_after
        )
    found = reply.value.get("data") if isinstance(reply.value, dict) else None
    if status != 200 or not isinstance(found, list):
        what = "with no list of models" if status == 200 else str(status)
        raise SourceInvalid(
            f"gateway: {host} answers {what} at /v1/models", hint="see base_url, openai_base_url"
        )
    return [one for one in found if isinstance(one, dict) and _can_be_typed(one.get("id"))]


def _can_be_typed(name: object) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST_ID
        and name.isprintable()
        and not any(one.isspace() for one in name)
    )


def _is_litellm(profile: Profile, reply: Reply) -> bool:
    named = any(name.lower().startswith("x-litellm-") for name in reply.headers)
    return profile.type == "litellm" or named


def _litellm(
    profile: Profile, http: Http, secret: Secret
) -> dict[str, tuple[set[str], int | None]]:
    """Return kind and limit by model, as LiteLLM knows them; nothing where it does not say."""
    found: dict[str, tuple[set[str], int | None]] = {}
    with suppress(SourceError):
        reply = http.call("GET", "/model/info", headers=_headers(secret))
        rows = reply.value.get("data") if isinstance(reply.value, dict) else None
        for row in rows if isinstance(rows, list) else ():
            info = row.get("model_info") if isinstance(row, dict) else None
            if not isinstance(info, dict):
                continue
            name = str(row.get("model_name"))
            kinds, before = found.get(name, (set(), None))
            limits = [one for one in (before, _limit(info)) if one is not None]
            # one of several upstreams answers: the shortest is what can be relied on
            found[name] = (kinds | set(_kinds(info)), min(limits, default=None))
    return found


def _kinds(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield in lower case what a gateway says of a model's kind."""
    below = [row.get(name) for name in ("custom_metadata", "metadata", "model_info")]
    for table in (row, *(one for one in below if isinstance(one, dict))):
        for name in ("model_type", "type", "mode"):
            if isinstance(table.get(name), str):
                yield table[name].lower()
    shape = row.get("architecture")
    made = shape.get("output_modalities") if isinstance(shape, dict) else None
    if isinstance(made, list):
        yield "text" if "text" in made else "other"


def _answers_in_words(name: str, kinds: set[str]) -> bool:
    """Say whether it is a model to talk to; the list itself calls every one of them a model."""
    said = kinds - {"model"}
    if said:
        return bool(said & WORDS)
    return _OTHERS.search(name) is None


def _limit(row: Mapping[str, Any]) -> int | None:
    first = row.get("top_provider")
    for table in (row, first if isinstance(first, dict) else {}):
        for name in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
            if (found := _number(table.get(name))) is not None:
                return found
    return None


def _number(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 < value <= LARGEST_LIMIT else None


def _text(value: object) -> str:
    """Return an error's text, to be searched alone: it may hold a key."""
    problem = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(problem, dict):
        problem = problem.get("message", problem.get("detail"))
    return problem if isinstance(problem, str) else ""
