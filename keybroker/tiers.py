"""
Which of a gateway's models stands for which of Claude Code's tiers.

A tier has the model of its own flag, else that of `--model`, else a Claude model of this tier that
the gateway lists, else the first that it lists. Ids are never changed: `ollama/qwen3:32b`.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from keybroker.errors import ConfigError, SourceInvalid

TIERS = ("haiku", "sonnet", "opus")
ASKED_FOR = 32_000  # tokens of one answer, where Claude Code is told nothing else
MOST_SHOWN = 12  # ids in a hint
_CLAUDE = re.compile(r"(?:^|[/.:@])claude-([^/:]*)")
_BUILD = re.compile(r"-v[0-9]+$|@.*$|-latest$")
_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,2}(?![0-9])")  # a date has more digits
_WINDOW = re.compile(r"\[[0-9]+m\]$", re.I)  # for the client itself, which does not send it


def assign(
    listed: Sequence[str], host: str, model: str | None = None, flags: Mapping[str, str | None] = {}
) -> dict[str, str]:
    """
    Return the model of each tier.

    Args:
        listed: The models that the gateway lists, in its order.
        host: What messages call it.
        model: For every tier that has no flag of its own.
        flags: A model by its tier.

    Raises:
        ConfigError: One that was asked for is not listed.
        SourceInvalid: None is listed.
    """
    plain = [one for one in listed if "*" not in one]
    if not listed:
        raise SourceInvalid(
            f"models: {host} lists no model for chat",
            hint="no provider is active there, or none that this key may use",
        )
    found: dict[str, str] = {}
    for tier in TIERS:
        asked = flags.get(tier)
        flag = f"--{tier}-model" if asked else "--model"
        chosen = asked or model
        if chosen is None:
            chosen = newest(plain, tier) or (plain[0] if plain else None)
        elif not is_listed(chosen, listed):
            raise ConfigError(
                f"{flag}: {_shown(chosen)} is not listed by {host}", hint=_list(listed)
            )
        if chosen is None:
            raise ConfigError(f"{flag}: {host} lists patterns alone", hint=_list(listed))
        found[tier] = chosen
    return found


def newest(listed: Sequence[str], tier: str) -> str | None:
    """Return the Claude model of a tier with the highest version; of equal ones the first."""
    found = [(version, one) for one in listed if (version := _version(one, tier)) is not None]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def sent(model: str) -> str:
    """Return a model's id as Claude Code sends it, without what is for itself."""
    return _WINDOW.sub("", model)


def is_listed(model: str, listed: Sequence[str]) -> bool:
    """Say whether a gateway has a model; some list patterns, such as `anthropic/*`."""
    bare = sent(model)
    return any(one in (model, bare) or ("*" in one and _fits(bare, one)) for one in listed)


def is_too_small(limit: int | None, wanted: int = ASKED_FOR) -> bool:
    """Say whether a model's answers cannot be as long as Claude Code asks for."""
    return limit is not None and limit < wanted


def _version(model: str, tier: str) -> tuple[int, ...] | None:
    """Return the version of a Claude model of a tier; None of any other model."""
    match = _CLAUDE.search(model.lower())
    if match is None or tier not in re.split(r"[-.@]", match[1]):
        return None
    return tuple(int(one) for one in _NUMBER.findall(_BUILD.sub("", match[1])))


def _fits(model: str, pattern: str) -> bool:
    return fnmatchcase(model, pattern.replace("[", "[[]"))


def _list(listed: Sequence[str]) -> str:
    more = len(listed) - MOST_SHOWN
    shown = ", ".join(listed[:MOST_SHOWN])
    return f"it lists {shown}" + (f" and {more} more: keybroker models" if more > 0 else "")


def _shown(text: str) -> str:
    return text if text.isprintable() and len(text) <= 100 else "what was given"
