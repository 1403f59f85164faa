"""OpenCode: a provider in its configuration, with a key of its own in a file.

    {"provider": {"keybroker-work": {"npm": "@ai-sdk/openai-compatible", "name": "work",
      "options": {"baseURL": "https://llm.example.com/v1", "apiKey": "{file:/run/…/work-opencode}"},
      "models": {"claude-sonnet-4-5": {}}}}}

OpenCode (1.18.33) reads the file once, when it starts, and goes on with that key: the hold of the
profile is how long a session of it may last.

See: https://opencode.ai/docs/config and https://opencode.ai/docs/providers
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

from keybroker import paths, settings
from keybroker.config import Profile
from keybroker.connect.line import helper_line
from keybroker.connect.own import own
from keybroker.connect.plan import Keys, Piece, Place, Plan
from keybroker.fields import show_duration

SCOPES = ("user",)
STANDS_ALONE = True
NPM = "@ai-sdk/openai-compatible"
LIFETIME = timedelta(hours=6)


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects OpenCode.

    Raises:
        ConfigError: The profile of its own cannot be added.
    """
    mine = own(profile, place, "opencode", "file", LIFETIME)
    name = mine.profile.name
    key = paths.runtime_directory(place.environment) / paths.KEYS / name
    models, known = models_of(profile)
    provider = f"keybroker-{profile.name}"
    values: dict[str, Any] = {
        "npm": NPM,
        "name": profile.name,
        "options.baseURL": profile.openai_url,
        "options.apiKey": f"{{file:{key}}}",
    }
    keys: dict[settings.Path, Any] = {
        ("provider", provider, *path.split(".")): value for path, value in values.items()
    }
    if profile.headers:
        keys["provider", provider, "options", "headers"] = dict(profile.headers)
    keys |= {("provider", provider, "models", model): {} for model in models}
    pieces: tuple[Piece, ...] = (Keys(config_file(place), keys, strict=False),)
    if mine.piece is not None:
        pieces = (mine.piece, *pieces)
    before = [
        f"profile {name}: {mine.terms}; it is in {key}, mode 0600, kept current by the daemon",
        "a project's own opencode.json can lead the key elsewhere: OpenCode merges it over this",
    ]
    if not known:
        before.append(f"the profile names no models: add yours below provider.{provider}.models")
    if profile.ca is not None:
        before.append(f"start OpenCode with NODE_EXTRA_CA_CERTS={profile.ca}")
    named = paths.named_config(place.environment)
    hold = show_duration(mine.profile.hold)
    return Plan(
        pieces,
        tuple(before),
        (
            "start OpenCode anew: it reads the key when it starts, and never again",
            f"try: opencode run -m {provider}/{models[0]} ping",
            f"a key holds for {hold} at least; a session that outlives it is refused: restart it",
            "without a daemon there may be no file, and OpenCode does not start: keybroker status",
        ),
        line=helper_line(name, place.environment),
        environment={"KEYBROKER_CONFIG": named} if named else {},
        key=key,
    )


def config_file(place: Place) -> Path:
    """Return its own configuration: with comments, if there is such a one."""
    named = place.environment.get("XDG_CONFIG_HOME", "")
    folder = (Path(named) if named.startswith("/") else place.home / ".config") / "opencode"
    commented = folder / "opencode.jsonc"
    return commented if commented.exists() else folder / "opencode.json"


def models_of(profile: Profile) -> tuple[list[str], bool]:
    """Return the models that a profile names, the best first, and whether it names any."""
    tiers = (profile.claude.get(tier) for tier in ("sonnet", "opus", "haiku"))
    found = list(dict.fromkeys([*filter(None, tiers), *profile.source.get("models", ())]))
    return found or [profile.verify_model], bool(found)
