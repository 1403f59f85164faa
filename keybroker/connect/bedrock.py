"""Claude Code through a gateway that speaks Amazon Bedrock's format.

The helper's key goes out as a bearer token, and the helper is asked again after a 401.

See: https://code.claude.com/docs/en/llm-gateway
"""

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Place, Plan

SCOPES = claude.SCOPES


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """Say what connects it; the gateway signs, and holds the credentials for that."""
    return claude.plan_with(
        profile,
        place,
        scope,
        guidance.in_format(
            profile,
            CLAUDE_CODE_USE_BEDROCK="1",
            CLAUDE_CODE_SKIP_BEDROCK_AUTH="1",
            ANTHROPIC_BEDROCK_BASE_URL=profile.claude.get("bedrock_url", profile.base_url),
        ),
    )
