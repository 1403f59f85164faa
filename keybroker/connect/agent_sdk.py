"""The Agent SDK: what a program passes to it, in Python and in TypeScript.

By default it loads the user's settings, so that a user who is connected is done. With
`setting_sources=[]` it loads none and wants them passed. In TypeScript `env` replaces the whole
environment; in Python it is added.

See: https://code.claude.com/docs/en/agent-sdk/overview
"""

import json
from typing import Any

from keybroker import guidance, paths
from keybroker.config import Profile
from keybroker.connect.line import helper_line
from keybroker.connect.plan import Place, Plan

SCOPES = ("user",)
STANDS_ALONE = True
# Either would be sent beside or instead of the helper's key; empty counts as not set.
INSTEAD = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
PYTHON = """\
import asyncio

from claude_agent_sdk import ClaudeAgentOptions, ResultMessage, query
from keybroker import client


async def main() -> None:
    options = ClaudeAgentOptions(setting_sources=[], **client.agent_options({profile}))
    async for message in query(prompt="ping", options=options):
        if isinstance(message, ResultMessage):
            print(message.result)


asyncio.run(main())
"""
TYPESCRIPT = """\
import {{ query }} from "@anthropic-ai/claude-agent-sdk";

const settings = {settings};
const env = {{ ...process.env, {nothing} }};
const options = {{ settingSources: [], settings: JSON.stringify(settings), env }};
for await (const message of query({{ prompt: "ping", options }})) {{
  if ("result" in message) console.log(message.result);
}}
"""


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """Print both, for this profile."""
    found = settings_of(profile, place)
    nothing = ", ".join(f'{name}: ""' for name in INSTEAD)
    python = PYTHON.format(profile=json.dumps(profile.name))
    script = TYPESCRIPT.format(settings=json.dumps(found, indent=2), nothing=nothing)
    return Plan(
        before=(
            "where the SDK loads the user's settings, `keybroker connect` is enough",
            "no key is in these: the helper in them asks for it, again and again",
        ),
        text=f"# Python\n\n{python}\n// TypeScript\n\n{script}",
    )


def settings_of(profile: Profile, place: Place) -> dict[str, Any]:
    """Return what would stand in settings.json."""
    environment = guidance.environment(profile)
    if named := paths.named_config(place.environment):
        environment = {**environment, "KEYBROKER_CONFIG": named}
    return {"apiKeyHelper": helper_line(profile.name, place.environment), "env": environment}


def options_of(profile: Profile, place: Place) -> dict[str, Any]:
    """Return the keyword arguments of `ClaudeAgentOptions`."""
    return {
        "settings": json.dumps(settings_of(profile, place)),
        "env": dict.fromkeys(INSTEAD, ""),
    }
