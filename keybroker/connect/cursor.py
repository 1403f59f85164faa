"""Cursor's own models: it runs no helper and reads no file, so a person pastes a key of its own.

Its servers make the requests, with the key that was pasted. Claude Code in Cursor is another
thing: that is connected as in VS Code.

See: https://docs.cursor.com/settings/api-keys
"""

from datetime import timedelta

from keybroker.config import Profile
from keybroker.connect.opencode import models_of
from keybroker.connect.own import own
from keybroker.connect.plan import Place, Plan
from keybroker.fields import show_duration

SCOPES = ("user",)
STANDS_ALONE = True
LIFETIME = timedelta(hours=24)


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what is to be pasted, and add a profile for its key.

    Raises:
        ConfigError: The profile of its own cannot be added.
    """
    mine = own(profile, place, "cursor", "paste", LIFETIME)
    models, _ = models_of(profile)
    hold = show_duration(mine.profile.hold)
    text = f"""\
Cursor cannot be connected: it runs no helper and reads no file. In Cursor Settings > Models:

  OpenAI API Key            what this prints: keybroker get {mine.profile.name}
  Override OpenAI Base URL  {profile.openai_url}
  Add model                 {", ".join(models)}
"""
    return Plan(
        () if mine.piece is None else (mine.piece,),
        (
            f"profile {mine.profile.name}: {mine.terms}",
            "Cursor's servers make the requests: they have the key, and must reach the gateway",
            "only chat uses the key; the override is for all of its OpenAI models",
        ),
        (
            f"paste a new key when one is refused: each holds for {hold} at least",
            "Claude Code in Cursor is connected with: keybroker connect vscode",
        ),
        text=text,
    )
