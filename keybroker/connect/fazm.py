"""Fazm and other hosts that wrap Claude Code: one field for an address, and no place for a key.

See: https://fazm.ai
"""

from keybroker.config import Profile, is_loopback
from keybroker.connect.plan import Place, Plan

SCOPES = ("user",)
STANDS_ALONE = True
NOTES = (
    "the host sends a placeholder as x-api-key (Fazm: sk-fazm-custom-endpoint), and no key of ours",
    "the gateway has to answer without one",
    "models of Gemini and Codex bypass the gateway, whatever is pasted: choose a Claude model",
)


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """Say what is to be pasted, and what the gateway gets to see."""
    before = list(NOTES)
    if profile.base_url.startswith("http://") and not is_loopback(profile.base_url):
        before.append("http:// sends what you ask in clear")
    if profile.headers:
        before.append("the profile's headers cannot be given there")
    text = f"""\
In Fazm: Settings > Advanced > AI Chat > Custom API Endpoint

  {profile.base_url}

All of it, {profile.base_url.partition("//")[0]}// too: without that the host goes on with its own
endpoint, and says so in its log alone.
"""
    return Plan(before=tuple(before), text=text)
