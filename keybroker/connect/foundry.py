"""Claude Code through a gateway in place of Microsoft Foundry.

That client takes its key from ANTHROPIC_FOUNDRY_API_KEY alone, sends it as x-api-key, and refuses
to start a request without one. A helper is not asked. No key goes into a settings file, so it is
given at the start, and does not rotate while the session lasts.

See: https://code.claude.com/docs/en/llm-gateway
"""

from dataclasses import replace

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Place, Plan

SCOPES = claude.SCOPES


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """Say what connects it, but for the key."""
    found = claude.plan_with(
        profile,
        place,
        scope,
        guidance.in_format(
            profile,
            CLAUDE_CODE_USE_FOUNDRY="1",
            ANTHROPIC_FOUNDRY_BASE_URL=profile.claude.get("foundry_url", profile.base_url),
        ),
    )
    note = "in this format a helper is not asked: the key is given at the start, and stays as it is"
    start = f'start it as: ANTHROPIC_FOUNDRY_API_KEY="$(keybroker get {profile.name})" claude'
    return replace(found, before=(*found.before, note), after=(start, *found.after[-1:]))
