"""What is connected to a profile, and what of it is not what it should be any more."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keybroker import paths
from keybroker.config import Profile
from keybroker.connect import claude, edit, files, surface
from keybroker.connect.plan import Keys, Line, Piece, Place, Plan
from keybroker.connect.record import Entry, Record
from keybroker.errors import KeybrokerError
from keybroker.settings import Document, SettingsInvalid

_OPTIONS = {"system": "--for", "output": "--output", "installed_in": "--installed-in"}


@dataclass(frozen=True, slots=True)
class Connected:
    """
    One file that has our settings.

    Attributes:
        made_for: What was typed of the machines that it is for, if they are others.
        outdated: The keys that connecting again would change.
        problem: Why that cannot be told.
    """

    file: Path
    surface: str
    scope: str
    profile: str
    made_for: Mapping[str, str]
    outdated: tuple[str, ...] = ()
    problem: str = ""

    @property
    def command(self) -> str:
        """What is to be typed, and where, to mend it."""
        words = ["keybroker connect", self.surface, f"--profile {self.profile}"]
        words += [] if self.scope == "user" else [f"--scope {self.scope}"]
        words += [f"{_OPTIONS[k]} {shlex.quote(v)}" for k, v in self.made_for.items()]
        folder = shlex.quote(str(self.file.parent.parent))
        return f"{f'cd {folder}; ' if self.scope == 'local' else ''}{' '.join(words)}"


def connected(profile: Profile, state: Path, place: Place) -> list[Connected]:
    """
    Return the files that are connected to a profile.

    Raises:
        CacheError: The record cannot be read.
    """
    entries = Record.read(state / paths.CONNECTIONS).files.items()
    mine = [(Path(name), one) for name, one in entries if one.profile == profile.name]
    return [_looked_at(file, one, profile, place) for file, one in mine if one.kind != "line"]


def _looked_at(file: Path, entry: Entry, profile: Profile, place: Place) -> Connected:
    found = Connected(file, entry.surface, entry.scope, profile.name, entry.made_for)
    if entry.is_handed_out and not file.exists():
        return found  # it went where it was made for
    if entry.scope == "local":
        place = replace(place, folder=file.parent.parent)
    place = replace(place, **_typed(entry.made_for))
    try:
        plan: Plan = surface(entry.surface).plan(profile, place, entry.scope)
        piece = next((one for one in plan.pieces if one.file == file), None)
        if isinstance(piece, Keys) and claude.has_status_line(entry):
            piece = claude.with_status_line(piece, profile.name, place)
        return found if piece is None else replace(found, outdated=_outdated(piece, entry))
    except KeybrokerError as error:
        return replace(found, problem=error.message)
    except SettingsInvalid as error:
        return replace(found, problem=f"{file}:{error}")


def _typed(made_for: Mapping[str, str]) -> dict[str, Any]:
    return {k: Path(v) if k == "output" else v for k, v in made_for.items()}


def _outdated(piece: Piece, entry: Entry) -> tuple[str, ...]:
    target = files.read(piece.file)
    if isinstance(piece, Keys):
        text = (target.text or "").strip("\ufeff \t\r\n")
        document = Document(text or "{}")
        wrong = [path for path, value in piece.values.items() if document.get(path) != value]
        others = [key for key in entry.keys if key.path not in piece.values]
        wrong += [key.path for key in others if document.get(key.path) == key.value]
        return tuple(edit.name_of(path) for path in wrong)
    return () if isinstance(piece, Line) or target.data == piece.data else ("all of it",)
