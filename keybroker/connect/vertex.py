"""Claude Code through a gateway that speaks Google Vertex AI's format.

The helper's key goes out as a bearer token, and the helper is asked again after a 401; 2.1.197
does not ask again, and goes on with the key until its TTL is over or its settings are touched.

See: https://code.claude.com/docs/en/llm-gateway
"""

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Place, Plan

SCOPES = claude.SCOPES


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects it; the gateway has the credentials of the project.

    Raises:
        ConfigError: The profile does not say which project and region requests name.
    """
    return claude.plan_with(
        profile,
        place,
        scope,
        guidance.in_format(
            profile,
            CLAUDE_CODE_USE_VERTEX="1",
            CLAUDE_CODE_SKIP_VERTEX_AUTH="1",
            ANTHROPIC_VERTEX_BASE_URL=profile.claude.get("vertex_url", profile.base_url),
            ANTHROPIC_VERTEX_PROJECT_ID=claude.wanted(profile, "vertex_project"),
            CLOUD_ML_REGION=claude.wanted(profile, "vertex_region"),
        ),
    )
