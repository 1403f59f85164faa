"""Claude Code through a gateway in place of Microsoft Foundry.

With CLAUDE_CODE_SKIP_FOUNDRY_AUTH and no ANTHROPIC_FOUNDRY_API_KEY a client of today (2.1.329)
sends the helper's key as a bearer token, and asks again after a 401. One of before (2.1.197)
sends nothing without that variable, and with it a client of today sends it alone, as x-api-key.
No key goes into a settings file, so who needs it gives it at the start.

See: https://code.claude.com/docs/en/llm-gateway
"""

from dataclasses import replace

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Place, Plan

SCOPES = claude.SCOPES


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """Say what connects it, and how where the key has to be x-api-key."""
    found = claude.plan_with(
        profile,
        place,
        scope,
        guidance.in_format(
            profile,
            CLAUDE_CODE_USE_FOUNDRY="1",
            CLAUDE_CODE_SKIP_FOUNDRY_AUTH="1",
            ANTHROPIC_FOUNDRY_BASE_URL=profile.claude.get("foundry_url", profile.base_url),
        ),
    )
    start = (
        "where the gateway reads x-api-key alone, or Claude Code is older than this: start it as "
        f'ANTHROPIC_FOUNDRY_API_KEY="$(keybroker get {profile.name})" claude; that key stays as it '
        "is until the session ends"
    )
    return replace(found, after=(*found.after, start))
