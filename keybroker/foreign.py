"""Variables that lead a client elsewhere than to the gateway, or give it somebody else's key.

One list for whoever starts a client, and for whoever prepares a shell for one.
"""

import re
from collections.abc import Collection, Iterable, Mapping

# Other formats and hosts that Claude Code can be switched to: CLAUDE_CODE_USE_<mode>.
MODES = ("BEDROCK", "VERTEX", "FOUNDRY", "ANTHROPIC_AWS", "MANTLE", "ANTHROPIC_GOOGLE_CLOUD")
# Taken out by name, whether they are there or not.
NAMES = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN_FILE_DESCRIPTOR",
    "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR",
    *(f"CLAUDE_CODE_USE_{mode}" for mode in MODES),
    "ANTHROPIC_BEDROCK_BASE_URL",
    "ANTHROPIC_BEDROCK_SESSION_TOKEN",
    "AWS_BEARER_TOKEN_BEDROCK",
    "ANTHROPIC_VERTEX_BASE_URL",
    "ANTHROPIC_VERTEX_PROJECT_ID",
    "CLOUD_ML_REGION",
    "ANTHROPIC_FOUNDRY_API_KEY",
    "ANTHROPIC_FOUNDRY_BASE_URL",
    "ANTHROPIC_FOUNDRY_RESOURCE",
    "ANTHROPIC_AWS_BASE_URL",
    "ANTHROPIC_AWS_WORKSPACE_ID",
)
# And whatever else there is of these.
_PATTERN = re.compile(
    r"ANTHROPIC_(?:BEDROCK|VERTEX|FOUNDRY|AWS|GOOGLE_CLOUD)_\w+"
    r"|ANTHROPIC_(?:\w+_)?BASE_URL|ANTHROPIC_\w*(?:API_KEY|AUTH_TOKEN)\w*"
    r"|CLAUDE_CODE_USE_\w+|CLAUDE_CODE_SKIP_\w+_AUTH|CLAUDE_CODE_OAUTH_\w+"
    r"|VERTEX_REGION_\w+|AWS_\w+"
)


def is_foreign(name: str) -> bool:
    return name in NAMES or _PATTERN.fullmatch(name) is not None


def found(environment: Iterable[str], keep: Collection[str] = ()) -> list[str]:
    """Return the variables of an environment that are to go, by name."""
    return sorted(name for name in environment if is_foreign(name) and name not in keep)


def without(environment: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """Return an environment with nothing foreign in it."""
    gone = set(found(environment, keep))
    return {name: value for name, value in environment.items() if name not in gone}
