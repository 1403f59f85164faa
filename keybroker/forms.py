"""What Claude Code sends to a gateway: one token in each form, and all that a session sends.

    POST /v1/messages?beta=true
    anthropic-version: 2023-06-01
    anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14

Without the key, which goes into `authorization`, `x-api-key` or both. Names and values were read at
a recorder before which the real client stood, of 2.1.329; see docs/verify.md.

See: https://code.claude.com/docs/en/llm-gateway-protocol
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keybroker.troubles import MADE_UP_BETA, MADE_UP_VERSION

VERSION = "2023-06-01"
BETAS = "claude-code-20250219,interleaved-thinking-2025-05-14"  # sent whatever is configured
EXPERIMENTAL = (
    "context-management-2025-06-27,thinking-token-count-2026-05-13,advanced-tool-use-2025-11-20"
)
EFFORT = "effort-2025-11-24"
MESSAGES, COUNT, OPENAI = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
MOST_TOKENS = 32_000
THINKING_TOKENS = 2_048  # of the look at thinking alone
TEXT_SIZE, TOOLS = 68_000, 12  # together what the first request of a session is, some 90 KB
# Which thinking is asked of which model.
_NO_THINKING = re.compile(r"claude-(?:3|2|instant)")
_EARLIER = re.compile(r"claude-(?:opus|sonnet|haiku)-4(?:-[0-5])?(?![0-9]|-[0-9](?![0-9]))")
_EFFORT_TOO = re.compile(r"claude-opus-4-5")
_CHOICE = re.compile(r"claude-(?:opus|sonnet)-4-6")  # the setting takes adaptive thinking off these


@dataclass(frozen=True, slots=True)
class Form:
    """
    One request.

    Attributes:
        sent: What it is, in a few words.
        key_in: The headers that have the key.
    """

    sent: str
    key_in: tuple[str, ...] = ("authorization", "x-api-key")


FORMS = {
    "message": Form("message"),
    "authorization": Form("message", ("authorization",)),
    "x-api-key": Form("message", ("x-api-key",)),
    "no key": Form("message", ()),
    "stream": Form("message, streamed"),
    "count_tokens": Form("count_tokens"),
    "openai": Form(OPENAI),
    "session": Form("a session's request"),
    "fields": Form("  context_management"),
    "effort": Form("  output_config"),
    "thinking": Form("  thinking"),
    "tools": Form(f"  {TOOLS} tools"),
    "output": Form("  max_tokens"),
    "text": Form(f"  {TEXT_SIZE // 1000} KB of source"),
    "beta": Form("made-up anthropic-beta"),
    "version": Form("made-up anthropic-version"),
}


def request(
    form: str, claude: Mapping[str, Any], model: str
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """
    Return path, headers and body of a form, without the key.

    Args:
        form: One of `FORMS`.
        claude: What `[profiles.<name>.claude]` has set.
    """
    assert form in FORMS, form
    headers = {"anthropic-version": VERSION, "anthropic-beta": BETAS}
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "hi"}],
    }
    if form == "count_tokens":
        del body["max_tokens"]
        return f"{COUNT}?beta=true", headers, body
    if form == "openai":
        return OPENAI, {}, body
    if form == "stream":
        body["stream"] = True
    elif form == "beta":
        headers["anthropic-beta"] = f"{BETAS},{MADE_UP_BETA}"
    elif form == "version":
        headers["anthropic-version"] = MADE_UP_VERSION
    elif form == "session":
        headers["anthropic-beta"] = _betas(claude, model)
        body |= _session(claude, model)
    elif form in ("fields", "effort", "thinking", "tools", "output", "text"):
        headers["anthropic-beta"] = _betas(claude, model)
        body |= _part(form, claude, model)
    return f"{MESSAGES}?beta=true", headers, body


def parts(claude: Mapping[str, Any], model: str) -> list[str]:
    """Return the forms that a session's request consists of, for when that is refused."""
    found = []
    if not _NO_THINKING.search(model):
        if not claude.get("disable_experimental_betas"):
            found.append("fields")
        found.append("thinking")
    if takes_effort(model):
        found.append("effort")
    return [*found, "tools", "output", "text"]


def thinking(claude: Mapping[str, Any], model: str, most: int) -> dict[str, Any] | None:
    """Return how Claude Code has a model think, by its name; None: not at all."""
    if _NO_THINKING.search(model):
        return None
    more = {} if claude.get("disable_experimental_betas") else {"display": "omitted"}
    off = claude.get("disable_adaptive_thinking") and may_choose(model)
    if _EARLIER.search(model) or off:
        return {"type": "enabled", "budget_tokens": most - 1, **more}
    return {"type": "adaptive", **more}


def may_choose(model: str) -> bool:
    """Say whether CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING counts for a model."""
    return _CHOICE.search(model) is not None


def takes_effort(model: str) -> bool:
    """Say whether Claude Code asks a model for an effort."""
    if _NO_THINKING.search(model):
        return False
    return _EARLIER.search(model) is None or _EFFORT_TOO.search(model) is not None


def _betas(claude: Mapping[str, Any], model: str) -> str:
    found = [BETAS]
    if not claude.get("disable_experimental_betas"):
        found.append(EXPERIMENTAL)
    if takes_effort(model):
        found.append(EFFORT)
    return ",".join(found)


def _session(claude: Mapping[str, Any], model: str) -> dict[str, Any]:
    most = int(claude.get("max_output_tokens", MOST_TOKENS))
    thinks = _thinks(claude, model, most)
    whole: dict[str, Any] = {
        "system": [{"type": "text", "text": "Answer with one word."}],
        **_part("text", claude, model),
        **_part("tools", claude, model),
        **_part("output", claude, model),
        **thinks,
        "stream": True,
    }
    if thinks and not claude.get("disable_experimental_betas"):
        edit = {"type": "clear_thinking_20251015", "keep": "all"}
        whole["context_management"] = {"edits": [edit]}
    return whole | (_part("effort", claude, model) if takes_effort(model) else {})


def _part(form: str, claude: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return what one part of a session's body has beside the smallest one's."""
    if form == "fields":  # alone it must not depend on thinking, which may be what is refused
        return {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}
    if form == "effort":
        return {"output_config": {"effort": "low"}}
    if form == "thinking":
        return {"max_tokens": THINKING_TOKENS, **_thinks(claude, model, THINKING_TOKENS)}
    if form == "tools":
        return {"tools": list(_tools())}
    if form == "output":
        return {"max_tokens": int(claude.get("max_output_tokens", MOST_TOKENS)), "stream": True}
    return {"messages": [{"role": "user", "content": _text()}]}


def _thinks(claude: Mapping[str, Any], model: str, most: int) -> dict[str, Any]:
    found = thinking(claude, model, most)
    return {} if found is None else {"thinking": found}


def _tools() -> Iterator[dict[str, Any]]:
    """Yield definitions as a session has them: long descriptions, schemas with many words."""
    for number in range(TOOLS):
        says = f"Looks at file number {number} and says what is in it. "
        path = {"type": "string", "description": "The absolute path of the file to look at."}
        limit = {"type": "integer", "description": "The most lines to return.", "minimum": 1}
        yield {
            "name": f"Look{number}",
            "description": says * 24,
            "input_schema": {
                "type": "object",
                "properties": {"path": path, "limit": limit},
                "required": ["path"],
                "additionalProperties": False,
            },
        }


# What a coding session is full of, and what rules against attacks are written for.
_SOURCE = """\
<system-reminder>
The file below is an example. Do not change it.
</system-reminder>
<example number="{number}">
<script type="text/javascript">
  document.cookie = "theme=dark"; window.location = "/?q=" + encodeURIComponent(location.hash);
  document.getElementById("out").innerHTML = "<img src=x onerror=alert({number})>";
</script>
<form action="/search" onsubmit="return check(this)"><input name="q" onfocus="alert(1)"></form>
SELECT name, price FROM goods WHERE id = {number} OR 1 = 1; -- all of them
for f in $(ls ../../etc); do cat "$f" | grep -c root; done
def handler(request): return eval(request.args["expression"])
</example>
"""


def _text() -> str:
    """Write a prompt of the size and the kind that a session's are; its answer is short."""
    text = "Answer with the one word: yes. What follows is there for its size alone.\n"
    number = 0
    while len(text) < TEXT_SIZE:
        number += 1
        text += _SOURCE.format(number=number)
    return text
