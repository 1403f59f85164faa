"""One thing that is wrong: what, why it matters, and the command that mends it.

    error: ANTHROPIC_AUTH_TOKEN is set in /home/jo/.claude/settings.json:4 (a1b2c3d4); it is sent …
           fix: keybroker connect --take-out-keys

No secret is in any of it: a credential is named by its fingerprint, or not at all.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Severity(StrEnum):
    """How bad it is: requests fail or go elsewhere; they will, or may; good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of ours that mends it, and the folder in which it is typed."""

    words: tuple[str, ...]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Remove:
    """A file that is made anew by whoever reads it."""

    file: Path


@dataclass(frozen=True, slots=True)
class Close:
    """A file or folder that others can enter or read."""

    path: Path
    mode: int


Mend = Command | Remove | Close


@dataclass(frozen=True, slots=True)
class Kind:
    """
    What one kind of finding is.

    Attributes:
        why: What follows from it.
        row: Of the table in Claude Code's page on connecting to a gateway.
    """

    severity: Severity
    why: str
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One finding.

    Attributes:
        id: Of KINDS.
        what: What was seen, and where.
        fix: What to type; in words where that is not one command.
        mend: The same, where it can be done without asking; None: it cannot.
        worse: Another severity than its kind has.
        because: Another `why` than its kind has.
    """

    id: str
    what: str
    fix: str
    mend: Mend | None = None
    worse: Severity | None = None
    because: str = ""

    @property
    def severity(self) -> Severity:
        return self.worse or KINDS[self.id].severity

    @property
    def why(self) -> str:
        return self.because or KINDS[self.id].why

    @property
    def row(self) -> int | None:
        return KINDS[self.id].row


_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
ANTHROPIC = "https://api.anthropic.com"
KINDS: dict[str, Kind] = {
    # where requests go
    "not-connected": Kind(
        _WARNING, f"requests go to {ANTHROPIC} with a login, and the gateway sees none"
    ),
    "elsewhere": Kind(_ERROR, "requests go to another address, and the gateway sees none"),
    "export-only": Kind(
        _WARNING,
        "an export is seen by programs of that terminal alone, not by an app started from a dock",
    ),
    "provider": Kind(_ERROR, "requests go around the gateway, to that provider"),
    "project": Kind(
        _ERROR,
        "what a repository sets beats what you set: its owner decides where your key goes",
    ),
    "other-helper": Kind(_ERROR, "that line's key is sent, not the one that keybroker keeps"),
    # credentials beside the helper's
    "two-sources": Kind(
        _ERROR,
        "it is sent instead of the helper's key, is not rotated, and Claude Code says "
        "`auth may not work as expected`",
        1,
    ),
    "key-about": Kind(
        _WARNING, "it is sent instead of the helper's key by whatever is started with it", 1
    ),
    "saved-login": Kind(
        _WARNING,
        "the helper's key is sent, but Claude Code says `auth may not work as expected`, and the "
        "login is sent to the address as soon as there is no helper",
        1,
    ),
    "gateway-session": Kind(
        _WARNING, "that sign-in has an address of its own, and may be used instead of the helper"
    ),
    "custom-headers": Kind(_ERROR, "it replaces the helper's key in that header, for good", 2),
    "login-screen": Kind(
        _ERROR,
        "Claude Code asks for a login though the address works: nothing that the first run reads "
        "has a credential",
        9,
    ),
    "key-declined": Kind(
        _WARNING, "it was declined once, and is ignored without a question since then", 10
    ),
    "first-party": Kind(
        _ERROR,
        "`This machine's managed settings require a first-party login`: from 2.1.146 on no "
        "credential of a gateway is taken beside it",
        11,
    ),
    "helper-fails": Kind(_ERROR, "`Your apiKeyHelper script is failing`: there is no key", 14),
    # settings
    "broken-settings": Kind(_ERROR, "Claude Code ignores the whole of such a file"),
    "bad-address": Kind(_ERROR, "no request can be sent to it"),
    "plain-http": Kind(_WARNING, "keys and prompts are readable for everybody on the way"),
    "ttl": Kind(
        _WARNING,
        "anything but a plain number of milliseconds above 0 counts as five minutes, or as always",
    ),
    "login-forced": Kind(_NOTE, "a login, should one be asked for, is of that kind alone"),
    "outdated": Kind(_WARNING, "Claude Code goes on with what was right before"),
    "moved": Kind(_ERROR, "the line runs nothing, and Claude Code has no key", 14),
    "old-client": Kind(_WARNING, "a key that was replaced is not asked for anew in time"),
    "old-discovery": Kind(_WARNING, "the gateway's models are not asked for", 8),
    "no-discovery": Kind(
        _WARNING, "discovery asks for models in Anthropic's format only, never on this route", 8
    ),
    "models-missing": Kind(
        _NOTE, "`/model` lists the names alone that Claude Code knows, until discovery is on", 8
    ),
    "models-unnamed": Kind(
        _NOTE, "discovery keeps names alone that begin with claude or anthropic", 8
    ),
    "models-of-another": Kind(_NOTE, "`/model` may list what another gateway has", 8),
    "desktop": Kind(_ERROR, "Claude Desktop says `Gateway was unreachable`, or goes elsewhere"),
    # the gateway
    "key-refused": Kind(_ERROR, "every request is answered 401", 2),
    "one-header": Kind(_WARNING, "a key in the other header is answered 401", 2),
    "nobody-there": Kind(_ERROR, "Claude Code tries for minutes, then says ConnectionRefused", 3),
    "no-api": Kind(_ERROR, "`API returned an empty or malformed response (HTTP 200)`", 4),
    "fields": Kind(_ERROR, "requests are answered 400: what is behind it refuses fields", 5),
    "thinking": Kind(_ERROR, "requests are answered 400: the model knows no adaptive thinking", 6),
    "too-long": Kind(
        _ERROR, "the limit is in the gateway's words, so Claude Code does not compact by itself", 7
    ),
    "firewall": Kind(_ERROR, "the gateway itself never sees it", 12),
    "certificate": Kind(_ERROR, "Node has a list of authorities of its own", 13),
    "refusal": Kind(
        _WARNING, "Claude Code asks for a new key after a 401 alone, and from 2.1.246 after a 403"
    ),
    "unwell": Kind(_WARNING, "requests that are answered so fail, or are tried again for minutes"),
    "proxy": Kind(_WARNING, "what is started without it reaches the gateway in another way"),
    "clock": Kind(_WARNING, "a key's end is told by the clock"),
    # keybroker
    "configuration": Kind(_ERROR, "no command but the helper works until it is mended"),
    "no-profile": Kind(_NOTE, "keybroker has no key to hand out"),
    "folder": Kind(_ERROR, "keybroker uses no folder that others can enter"),
    "daemon": Kind(_ERROR, "keys are handed out from the disk alone, and are not replaced"),
    "versions": Kind(_WARNING, "the daemon is of another version than what asks it"),
    "unit": Kind(_WARNING, "the system cannot start the daemon"),
    "not-kept": Kind(_WARNING, "keys are lost with the daemon: each start mints anew"),
    "login-needed": Kind(
        _WARNING, "the current key is used until its end, and not replaced before somebody signs in"
    ),
    "login-ending": Kind(_WARNING, "no key is replaced after it, unless somebody signs in again"),
    "failing": Kind(_WARNING, "the current key is used until its end, and not replaced"),
    "no-key": Kind(_ERROR, "there is nothing to hand out"),
    "unrevoked": Kind(_WARNING, "a key that nobody should use any more still works"),
    "not-told": Kind(_NOTE, "running sessions take a replaced key's successor late"),
    "not-looked-at": Kind(_WARNING, "what it would have found is not known"),
}


def typed(hint: str) -> str:
    """Return what a hint has somebody type."""
    return hint.removeprefix("run: ")
