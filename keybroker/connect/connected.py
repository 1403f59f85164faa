"""What is connected to a profile, and what of it is not what it should be any more."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from keybroker.config import Profile
from keybroker.connect import claude, edit, files, surface
from keybroker.connect.plan import Keys, Line, Piece, Place, Plan
from keybroker.connect.record import FILE, Entry, Record
from keybroker.errors import KeybrokerError
from keybroker.settings import Document, SettingsInvalid


@dataclass(frozen=True, slots=True)
class Connected:
    """
    One file that has our settings.

    Attributes:
        outdated: The keys that connecting again would change.
        problem: Why that cannot be told.
    """

    file: Path
    surface: str
    scope: str
    outdated: tuple[str, ...] = ()
    problem: str = ""

    @property
    def command(self) -> str:
        """What is to be typed, and where, to mend it."""
        scope = "" if self.scope == "user" else f" --scope {self.scope}"
        folder = shlex.quote(str(self.file.parent.parent))
        place = f"cd {folder}; " if self.scope == "local" else ""
        return f"{place}keybroker connect {self.surface}{scope}"


def connected(profile: Profile, state: Path, place: Place) -> list[Connected]:
    """
    Return the files that are connected to a profile.

    Raises:
        CacheError: The record cannot be read.
    """
    entries = Record.read(state / FILE).files.items()
    mine = [(Path(name), one) for name, one in entries if one.profile == profile.name]
    return [_looked_at(file, one, profile, place) for file, one in mine if one.kind != "line"]


def _looked_at(file: Path, entry: Entry, profile: Profile, place: Place) -> Connected:
    if entry.scope == "local":
        place = Place(place.environment, file.parent.parent, place.system)
    try:
        plan: Plan = surface(entry.surface).plan(profile, place, entry.scope)
        piece = next((one for one in plan.pieces if one.file == file), None)
        if isinstance(piece, Keys) and claude.has_status_line(entry):
            piece = claude.with_status_line(piece, profile.name, place)
        outdated = () if piece is None else _outdated(piece, entry)
    except KeybrokerError as error:
        return Connected(file, entry.surface, entry.scope, problem=error.message)
    except SettingsInvalid as error:
        return Connected(file, entry.surface, entry.scope, problem=f"{file}:{error}")
    return Connected(file, entry.surface, entry.scope, outdated)


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
