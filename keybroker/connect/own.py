"""A profile of its own for a program that runs no helper: short keys with a small budget.

    # keybroker connect opencode: a key of its own; `keybroker disconnect` takes this out again
    [profiles.work-opencode]
    base_url = "https://llm.example.com"
    export = "file"
    …

It is a copy of the profile's tables, at the end of the user's configuration file.
"""

import copy
import os
import re
import tomllib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from keybroker import paths
from keybroker.config import Profile, parse
from keybroker.connect.plan import Line, Place
from keybroker.document import read
from keybroker.errors import ConfigError
from keybroker.fields import show_duration
from keybroker.rotation import Kind
from keybroker.tables import table_lines

LONGEST_NAME = 32
BUDGET = 2.0  # in the gateway's money, of each key


@dataclass(frozen=True, slots=True)
class Own:
    """The profile as it is or will be, and what has to be added for it, if anything."""

    profile: Profile
    piece: Line | None

    @property
    def terms(self) -> str:
        """Say what is special about its keys."""
        if self.profile.kind is Kind.FOLLOWED:
            return "the key is the one that all have: its source makes no others"
        if self.profile.kind is Kind.LEASED:
            return "a lease of its own"
        lifetime, budget = self.profile.source["lifetime"], self.profile.source["max_budget"]
        spends = "" if budget is None else f", with a budget of {budget:g} each"
        return f"keys of its own that live for {show_duration(lifetime)}{spends}"


def own(profile: Profile, place: Place, surface: str, export: str, lifetime: timedelta) -> Own:
    """
    Return the profile for a surface; one that is configured already is taken as it is.

    Args:
        export: How its key gets there: file or paste.
        lifetime: The longest that a key of it may live; a third of that is its hold.

    Raises:
        ConfigError: It cannot be added, or is there and exports nothing; or this is such a one.
    """
    if profile.export != "none":
        raise ConfigError(
            f"{profile.name}: is already one for a program that runs no helper",
            hint=f"name another: keybroker connect {surface} --profile PROFILE",
        )
    files = paths.config_files(place.environment)
    document = read(files)
    profiles = document.tables.get("profiles", {})
    name = f"{profile.name[: LONGEST_NAME - len(surface) - 1]}-{surface}"
    table = _table(profiles.get(profile.name, {}), profile, export, lifetime)
    block = _block(surface, name, table)
    file = Path(os.path.realpath(files[-1]))
    piece: Line | None = Line(file, block, 0o600)
    text = _text(file)
    if name in profiles:
        tables = document.tables
        piece = piece if f"\n{block}\n" in f"\n{text}\n" else None
    else:
        tables = {**document.tables, "profiles": {**profiles, name: table}}
        _check_added(file, text, block)
    found = parse(tables, document.where, document.files, place.environment).profiles[name]
    if found.export != export:
        raise ConfigError(
            f'profiles.{name}: has export = "{found.export}"',
            hint=f'write export = "{export}" there, or take its tables out',
        )
    return Own(found, piece)


def added_in(lines: str) -> str | None:
    """Return the name of the profile that was added with some lines."""
    found = re.match(r"# keybroker connect .*\n\[profiles\.([a-z0-9_-]+)\]", lines)
    return None if found is None else found[1]


def _table(
    given: dict[str, Any], profile: Profile, export: str, lifetime: timedelta
) -> dict[str, Any]:
    table: dict[str, Any] = {k: copy.deepcopy(v) for k, v in given.items() if k != "publish"}
    source = table.pop("source", {})
    table |= {"export": export, "push": False}  # no session of Claude Code's has this key
    if profile.kind is Kind.MINTED:
        longest = min(lifetime, profile.source["lifetime"])
        third = timedelta(seconds=longest // timedelta(seconds=3))
        budget = profile.source["max_budget"]
        source["lifetime"] = show_duration(longest)
        source["max_budget"] = BUDGET if budget is None else min(budget, BUDGET)
        table["hold"] = show_duration(third)
    return {**table, "source": source}


def _block(surface: str, name: str, table: dict[str, Any]) -> str:
    first = f"# keybroker connect {surface}: its own key; `keybroker disconnect` takes this out"
    lines = [line for line in table_lines(("profiles", name), table) if line]
    return "\n".join([first, *lines])


def _text(file: Path) -> str:
    try:
        return (paths.Disk().read(file) or b"").decode()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _check_added(file: Path, text: str, block: str) -> None:
    """See that the file is still TOML afterwards: `profiles = { … }` takes no further tables."""
    try:
        tomllib.loads(f"{text}\n{block}\n")
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"{file}: nothing can be added at its end",
            hint=f"write the profile there by hand:\n{block}",
        ) from None
