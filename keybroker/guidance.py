"""What Claude Code should be told of each profile, kept current in files. No secret is in them.

    {"profiles": {"work": {"base_url": "https://llm.example.com", "helper_ttl_ms": 60000,
      "reason": "Claude Code asks again every 1m, …", "environment": {
        "ANTHROPIC_BASE_URL": "https://llm.example.com",
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "60000"}}}, "default": "work"}

`guidance.json` has all profiles, `guidance-<profile>.env` one, for a shell to source, and
`guidance.env` the default or only one.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from keybroker.config import Profile, only_one
from keybroker.fields import show_duration
from keybroker.paths import Disk
from keybroker.rotation import Kind

JSON = "guidance.json"
ENV = "guidance.env"
TTL_VARIABLE = "CLAUDE_CODE_API_KEY_HELPER_TTL_MS"


# How a key of `[profiles.X.claude]` is told to Claude Code.
VARIABLES = {
    "haiku": "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "sonnet": "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "opus": "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "discovery": "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY",
    "auto_compact_window": "CLAUDE_CODE_AUTO_COMPACT_WINDOW",
    "max_output_tokens": "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "disable_experimental_betas": "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS",
    "disable_adaptive_thinking": "CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING",
    "disable_nonessential_traffic": "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
}


def environment(profile: Profile) -> dict[str, str]:
    """Return the variables that Claude Code should have, in its settings or from a shell."""
    return {
        "ANTHROPIC_BASE_URL": profile.base_url,
        TTL_VARIABLE: str(_milliseconds(profile)),  # a plain decimal integer, or it is ignored
        **extras(profile),
    }


def in_format(profile: Profile, **variables: str) -> dict[str, str]:
    """Return the variables for a gateway that speaks a provider's format."""
    return {**variables, TTL_VARIABLE: str(_milliseconds(profile)), **extras(profile)}


def extras(profile: Profile) -> dict[str, str]:
    """Return those of the variables that hold for every format that a gateway may speak."""
    found = {}
    for key, variable in VARIABLES.items():
        if (value := profile.claude.get(key)) is not None:
            found[variable] = "1" if value is True else str(value)
    if profile.headers:
        lines = (f"{name}: {value}" for name, value in profile.headers.items())
        found["ANTHROPIC_CUSTOM_HEADERS"] = "\n".join(lines)
    if profile.ca is not None:
        found["NODE_EXTRA_CA_CERTS"] = profile.ca
    return found


def ttl_reason(profile: Profile) -> str:
    """Say in one sentence why the TTL is what it is, and what follows from it."""
    every = f"Claude Code asks again every {show_duration(profile.helper_ttl)}, in the background"
    if profile.kind is Kind.FOLLOWED:
        return f"{every}, and so follows its owner"
    if profile.kind is Kind.LEASED:
        return f"{every}, long before a lease that was replaced is revoked"
    lifetime: timedelta = profile.source["lifetime"]
    share = "well under" if profile.helper_ttl <= lifetime / 8 else "not more than"
    hold = show_duration(profile.hold)
    outcome = f"so a replaced key is dropped long before its hold of {hold} ends"
    if profile.hold < 3 * profile.helper_ttl:  # somebody wrote a hold of their own
        outcome = (
            f"but a replaced key is revoked after its hold of {hold}, which may cost a session "
            "one 401 that it retries by itself"
        )
    return f"{every}; {share} a quarter of the key's {show_duration(lifetime)}, {outcome}"


def names(profiles: Iterable[str]) -> list[str]:
    """Return the names of the files that `write` brings up to date."""
    return [JSON, ENV, *map(_name, profiles)]


def write(runtime: Path, profiles: Iterable[Profile], default: str | None, disk: Disk) -> bool:
    """
    Bring the files up to date: those that differ are replaced, those of no profile removed.

    Args:
        runtime: The runtime directory, which exists and is ours.
        default: The profile that the configuration names as the default one.

    Returns:
        Whether anything was written or removed.

    Raises:
        OSError: The disk will not have it.
    """
    known = {profile.name: profile for profile in profiles}
    if default is None and (only := only_one(known.values())) is not None:
        default = only.name
    files = {_name(name): _script(profile) for name, profile in known.items()}
    files[ENV] = _script(known[default]) if default in known else _choice(list(files))
    files[JSON] = json.dumps(_document(known, default), indent=2) + "\n"
    changed = False
    for name, text in files.items():
        if _read(disk, runtime / name) != text.encode():
            disk.replace(runtime / name, text.encode())
            changed = True
    for path in runtime.glob(_name("*")):
        if path.name not in files:
            disk.remove(path)
            changed = True
    return changed


def _document(known: Mapping[str, Profile], default: str | None) -> dict[str, object]:
    profiles = {
        name: {
            "base_url": profile.base_url,
            "helper_ttl_ms": _milliseconds(profile),
            "reason": ttl_reason(profile),
            "environment": environment(profile),
        }
        for name, profile in known.items()
    }
    return {"profiles": profiles, "default": default if default in known else None}


def _script(profile: Profile) -> str:
    """Write what a shell sources: `export NAME='value'`, with the reason above it."""
    lines = [f"# {profile.name}: {ttl_reason(profile)}"]
    lines += [f"export {name}={_quoted(value)}" for name, value in environment(profile).items()]
    return "\n".join(lines) + "\n"


def _choice(files: list[str]) -> str:
    """Write the comment that stands where nobody knows which profile is meant."""
    if not files:
        return "# no profile is configured\n"
    return f"# several profiles and no default: source one of {', '.join(files)}\n"


def _quoted(value: str) -> str:
    """Quote for any shell of the Bourne kind: nothing but the quote itself is special inside."""
    return "'" + value.replace("'", "'\"'\"'") + "'"


def _name(profile: str) -> str:
    return f"guidance-{profile}.env"


def _read(disk: Disk, path: Path) -> bytes | None:
    with suppress(OSError):  # not a file of ours: replaced
        return disk.read(path)
    return None


def _milliseconds(profile: Profile) -> int:
    return profile.helper_ttl // timedelta(milliseconds=1)
