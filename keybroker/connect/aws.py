"""Claude Code through a gateway in place of Claude Platform on AWS.

The helper's key goes out as a bearer token, and the helper is asked again after a 401.

See: https://code.claude.com/docs/en/llm-gateway
"""

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Place, Plan

SCOPES = claude.SCOPES


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects it; the gateway has the credentials of the account.

    Raises:
        ConfigError: The profile does not say which workspace requests name.
    """
    return claude.plan_with(
        profile,
        place,
        scope,
        guidance.in_format(
            profile,
            CLAUDE_CODE_USE_ANTHROPIC_AWS="1",
            CLAUDE_CODE_SKIP_ANTHROPIC_AWS_AUTH="1",
            ANTHROPIC_AWS_BASE_URL=profile.claude.get("aws_url", profile.base_url),
            ANTHROPIC_AWS_WORKSPACE_ID=claude.wanted(profile, "aws_workspace"),
        ),
    )
