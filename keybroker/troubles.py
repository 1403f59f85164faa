"""What goes wrong between Claude Code and a gateway: a table, and which of its rows an answer is.

    400 application/json  {"error": {"message": "context_management: Extra inputs are not …"}}
      ->  flags: context_management, extra, json  ->  row 5, `fields`

The rows are those of the page on connecting, in its order. What an answer's body says is looked
for here and leaves as flags alone: a body may hold a key, and nothing of it is repeated.

See: https://code.claude.com/docs/en/llm-gateway-connect#troubleshoot-gateway-errors
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LOOKED_AT = 1 << 16  # characters of a body; an error is said at its beginning
MADE_UP_BETA = "made-up-by-keybroker-2000-01-01"
MADE_UP_VERSION = "2000-01-01"


@dataclass(frozen=True, slots=True)
class Trouble:
    """
    One row.

    Attributes:
        id: How other modules name it.
        row: Its number in the page's table.
        title: What it is, in a few words.
        shown: What Claude Code shows, the newest wording first; a part of the line.
        why: What is behind it.
        remedy: What to do, in words.
        keys: Those of `[profiles.<name>.claude]` that do it, written by `connect`.
    """

    id: str
    row: int
    title: str
    shown: tuple[str, ...]
    why: str
    remedy: str
    keys: tuple[str, ...] = ()

    def lines(self, profile: str, keys: Sequence[str] | None = None) -> list[str]:
        """
        Return what to write into a profile's configuration; empty where no key helps.

        Args:
            keys: Those of its keys that are meant; None: all.
        """
        values = [f"{key} = {VALUES[key]}" for key in (self.keys if keys is None else keys)]
        return [f"[profiles.{profile}.claude]", *values] if values else []


# What a key is set to against a trouble; a number is a beginning, since only people know theirs.
VALUES = {
    "disable_experimental_betas": "true",
    "disable_adaptive_thinking": "true",
    "auto_compact_window": "100000",
    "max_output_tokens": "8192",
    "discovery": "true",
}
_ROWS = (
    Trouble(
        "two-sources",
        1,
        "two credentials at once",
        ("auth may not work as expected", "Auth conflict: Both a token ("),
        "two credentials are set, and one of them, or a login, is not the helper's",
        "unset the variable, or type /logout in Claude Code, so that the helper alone is left",
    ),
    Trouble(
        "key-refused",
        2,
        "the key is refused",
        ("Invalid API key", "401"),
        "the key is not one that this gateway issued, or is in a header that it does not read",
        "have the key replaced (keybroker rotate), or set the right one where its owner keeps it",
    ),
    Trouble(
        "nobody-there",
        3,
        "nothing answers",
        ("ECONNREFUSED", "Unable to connect to API (ConnectionRefused)"),
        "nothing answers at the address: it is wrong, or a VPN or a firewall is in the way",
        "try the address with curl, and ask who runs the gateway",
    ),
    Trouble(
        "no-api",
        4,
        "what answers is no API",
        ("empty or malformed response (HTTP 200)",),
        "something answers that is no API: a page to log in, a proxy, another route",
        "have the route of /v1/messages mended, or set base_url to the address of the API",
    ),
    Trouble(
        "fields",
        5,
        "fields that the upstream refuses",
        ("context_management", "Extra inputs are not permitted"),
        "what is behind the gateway refuses fields or betas that Claude Code sends",
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS=1; if one is still refused, the variable "
        "CLAUDE_CODE_USE_… of the provider behind it, so that only what that takes is sent",
        ("disable_experimental_betas",),
    ),
    Trouble(
        "thinking",
        6,
        "adaptive thinking is refused",
        ("Input tag 'adaptive' found", "thinking"),
        "the model build behind the gateway knows no adaptive thinking",
        "a newer one behind the gateway; with Opus 4.6 and Sonnet 4.6, and no other, "
        "CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING=1 does it too",
        ("disable_adaptive_thinking",),
    ),
    Trouble(
        "too-long",
        7,
        "fewer tokens than the model has",
        ("ContextWindowExceededError", "exceeds the limit of", "max_tokens"),
        "the gateway allows fewer tokens than the model, and says so in words of its own, after "
        "which Claude Code does not compact by itself",
        "/compact saves the session; CLAUDE_CODE_AUTO_COMPACT_WINDOW with the gateway's limit "
        "(taken as at least 100000, and at most the model's window), and "
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS below that of one answer",
        ("auto_compact_window", "max_output_tokens"),
    ),
    Trouble(
        "models-missing",
        8,
        "models are missing",
        ("/model",),
        "the gateway's names of models are not among those that Claude Code knows",
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY=1 lists those that begin with claude or "
        "anthropic; others by haiku, sonnet and opus in the same table",
        ("discovery",),
    ),
    Trouble(
        "login-screen",
        9,
        "a login is asked for",
        ("Select login method", "Not logged in"),
        "no credential is where the first run reads it; a project's file counts after it",
        "set the helper for the user: keybroker connect --scope user",
    ),
    Trouble(
        "key-declined",
        10,
        "the key was declined once",
        ("Use custom API key",),
        "ANTHROPIC_API_KEY was declined once, and is ignored since then without a question",
        "in Claude Code /config, Use custom API key; or unset it, and use the helper",
    ),
    Trouble(
        "first-party",
        11,
        "a first-party login is required",
        ("This machine's managed settings require a first-party login",),
        "managed settings hold forceLoginMethod or forceLoginOrgUUID, which from 2.1.146 on allow "
        "no credential of a gateway",
        "ask who manages this machine to take them out; both together are not possible",
    ),
    Trouble(
        "firewall",
        12,
        "a firewall refuses what a session sends",
        ("Failed to authenticate. API Error: 403", "403 Forbidden"),
        "a web application firewall before the gateway takes what Claude Code sends, tags and "
        "source text, for an attack; the gateway never sees it",
        "ask who runs it to exempt /v1/messages from looking at bodies: on AWS the rule "
        "CrossSiteScripting_Body, with ModSecurity the core rule set's for bodies",
    ),
    Trouble(
        "certificate",
        13,
        "the certificate is not trusted",
        ("SSL certificate", "Self-signed certificate detected"),
        "Claude Code does not trust the authority that the gateway's certificate is from",
        "NODE_EXTRA_CA_CERTS with that authority's PEM file, as `ca` of the profile sets it",
    ),
    Trouble(
        "helper-fails",
        14,
        "the helper fails",
        ("Your apiKeyHelper script is failing",),
        "the line of apiKeyHelper ended with an error, or printed no key",
        "run the line in settings.json through sh, and read what it says: keybroker get",
    ),
)
TROUBLES = {one.id: one for one in _ROWS}

# What a body names, by the words of the upstreams and gateways that are known to say it.
_FLAGS = {
    "thought-field": r"thinking(?:\.\w+)+: extra inputs",
    "adaptive": r"\badaptive\b",
    "thinking": r"\bthinking\b",
    "context_management": r"context[_-]management",
    "extra": r"extra inputs are not permitted|extra fields not permitted|invalid beta flag"
    r"|un(?:known|recognized|supported|expected) (?:\w+ )?(?:argument|field|parameter|property|key)"
    r"|unexpected value\(s\)",
    "beta": r"anthropic[-_]beta|beta flag|beta header",
    "version": r"anthropic[-_]version",
    "output": r"max_(?:completion_|output_)?tokens\b.{0,120}?"
    r"(?:too large|at most|exceed|greater|maximum|less than|must be|larger|>)",
    "context": r"context ?window|context[ _](?:length|size|limit)|prompt is too long"
    r"|(?:token count|tokens?)\b.{0,60}?exceeds? the |input is too long|too many (?:input )?tokens"
    r"|maximum (?:context|prompt)",
    "model": r"(?:invalid|unknown|unsupported|no such|unrecognized) model"
    r"|\bmodels?\b.{0,100}?(?:not found|not exist|not available|not allowed|unknown|no access)"
    r"|not allowed to access model|no healthy deployments|model_(?:not_found|access_denied)"
    r"|model_group_not_found|^model:",
    "budget": r"budget(?!_tokens)|quota|credit balance|insufficient (?:funds|credit)|billing",
    "expired": r"expired[ _]key|key (?:has |is )?expired",
    "made-up": re.escape(MADE_UP_BETA),
}
_PATTERNS = {name: re.compile(words, re.I | re.S) for name, words in _FLAGS.items()}
_PAGE = re.compile(r"\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body)\b", re.I | re.S)


def flags(content_type: str, text: str) -> frozenset[str]:
    """
    Say what is to be found in an answer's body.

    Returns:
        `html` or `json`, or neither, and of `_FLAGS` those that its beginning names.
    """
    start = text[:LOOKED_AT]
    found = set()
    if "html" in content_type.lower() or _PAGE.match(start):
        found.add("html")
    said = start
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        found.add("json")
        said = _message(value) or start
    for name, pattern in _PATTERNS.items():
        if pattern.search(said if name == "model" else start):
            found.add(name)
    return frozenset(found)


def name(status: int, found: Collection[str]) -> Trouble | None:
    """
    Name the row of an answer that was not what was asked for.

    Args:
        status: Its status.
        found: What `flags` says of its body.

    Returns:
        None where the table has no such row: a model that nobody has, a budget, an outage.
    """
    if 200 <= status < 400:
        return TROUBLES["no-api"]
    if says_model(status, found) or (status != 401 and "budget" in found):
        return None
    if status == 401 or "expired" in found:
        return TROUBLES["key-refused"]
    if status == 403:
        return TROUBLES["firewall" if "json" not in found else "key-refused"]
    if status == 406 and "json" not in found:  # as ModSecurity says it where it was told to
        return TROUBLES["firewall"]
    if status in (400, 413, 422):
        return _of_body(found)
    return None


def says_model(status: int, found: Collection[str]) -> bool:
    """Say whether the model was refused, and with it the key and the address taken."""
    if status in (400, 422):
        return "model" in found and _of_body(found) is None
    return status in (401, 403, 404) and "model" in found and "json" in found


def _of_body(found: Collection[str]) -> Trouble | None:
    """Name what was refused of a request's body; the words that are surest come first."""
    for names, row in (
        ({"thought-field"}, "fields"),
        ({"adaptive"}, "thinking"),
        ({"context_management", "extra", "beta", "made-up"}, "fields"),
        ({"thinking"}, "thinking"),
        ({"context", "output"}, "too-long"),
    ):
        if names & set(found):
            return TROUBLES[row]
    return None


def _message(value: dict[str, object]) -> str:
    """Return what an error's JSON says, as the Anthropic API, OpenAI's and FastAPI have it."""
    problem = value.get("error", value)
    if isinstance(problem, dict):
        parts = (problem.get(one) for one in ("message", "type", "code", "detail"))
        return "\n".join(str(one) for one in parts if one)
    return str(problem)
