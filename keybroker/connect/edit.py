"""Do what a plan wants to one file, and take it back: byte for byte, or by key."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keybroker import settings
from keybroker.connect import files
from keybroker.connect.files import changed_too_often
from keybroker.connect.plan import Keys, Line, Piece, Whole
from keybroker.connect.record import Entry, Key, Record, digest, file_of, now
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.settings import MISSING, Document, Named, SettingsInvalid, Splice

TRIES = 5
# The helpers by their files, or the command that stands in for them.
_OURS = re.compile(r"""keybroker-key|/keybroker/helper\.py|keybroker(?:\.exe)?['"]? ['"]?get\b""")


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written, worked out; nothing is written yet."""

    target: files.Target
    data: bytes | None
    entry: Entry | None
    old: Entry | None
    mode: int = 0o600
    kept: tuple[str, ...] = ()  # keys of ours that somebody changed since
    exact: bool = True
    replaced: tuple[str, ...] = ()  # foreign values that give way
    line: str = ""  # the one that it is about, in a file of lines

    @property
    def name(self) -> str:
        """What it is recorded under."""
        return record_name(self.target.file, self.line)

    @property
    def is_one(self) -> bool:
        return self.data != self.target.data


def to_connect(
    piece: Piece,
    record: Record,
    *,
    surface: str,
    profile: str,
    scope: str,
    follow: bool = False,
    force: bool = False,
    made_for: Mapping[str, str] | None = None,
) -> Change:
    """
    Work out what connects one file, as if it had not been connected before.

    Raises:
        ConfigError: The file cannot be edited, or has what only `force` replaces.
    """
    target = files.read(piece.file)
    if target.data is None:
        files.check_folder(target)
    line = piece.line if isinstance(piece, Line) else ""
    old = record.files.get(record_name(piece.file, line))
    if old is not None and old.profile != profile and not force:
        raise ConfigError(
            f"{piece.file}: is connected to the profile {old.profile}",
            hint=f"keybroker disconnect {old.surface} --scope {old.scope}, or --force; or another "
            "--scope",
        )
    if isinstance(piece, Keys) and piece.lent_by is not None and old is not None:
        if old.surface not in (surface, piece.lent_by):
            return Change(target, target.data, old, old)
        surface = old.surface
    kind = {Keys: "keys", Line: "line", Whole: "whole"}[type(piece)]
    follow = follow or (old is not None and old.follow)
    entry = Entry(kind, surface, profile, scope, now(), None, None, follow=follow)
    entry = replace(entry, made_for=made_for or {})
    if isinstance(piece, Whole):
        change = _with_whole(piece, target, entry, old, force=force)
    elif isinstance(piece, Line):
        change = _with_line(piece, target, entry, old)
    else:
        base, _, _ = _taken_back(target, old)
        text = replace(target, data=base).text or ""
        entry = replace(entry, before=digest(base))
        change = _with_keys(piece, target, text, entry, old, force=force)
    assert change.entry is not None, "what is connected is recorded"
    if old is not None and replace(change.entry, at=old.at, folders=old.folders) == old:
        return replace(change, entry=old)
    return change


def to_disconnect(name: str, record: Record) -> Change:
    """
    Work out what takes back all that is recorded under a name.

    Raises:
        ConfigError: The file cannot be edited.
    """
    target = files.read(file_of(name))
    old = record.files[name]
    data, kept, exact = _taken_back(target, old)
    return Change(target, data, None, old, kept=kept, exact=exact, line=name.partition("\n")[2])


def commit(change: Change, record: Record) -> bool:
    """
    Write a change down, do it, and note that it is done.

    Returns:
        False when the file was changed meanwhile: work it out anew.

    Raises:
        ConfigError: The disk will not have it.
    """
    entry, old, folder = change.entry, change.old, change.target.real.parent
    folders = old.folders if old is not None else ()
    if entry is not None:
        made = tuple(map(str, files.missing(folder)))
        folders = (*made, *(one for one in folders if one not in made))
        entry = replace(entry, folders=folders)
        record.announce(change.name, entry)
        files.make_folder(folder, _folder_mode(change.mode))
    if not files.replace(change.target, change.data, mode=change.mode):
        return False
    if entry is None and change.data is None:
        _remove_folders(change.name, folders, record)
    record.settle(change.name, entry)
    return True


def _remove_folders(name: str, folders: Sequence[str], record: Record) -> None:
    """Remove what was made for a file. With another one of ours in it, it goes with that one."""
    for number, folder in enumerate(folders):
        try:
            Path(folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # somebody has put something into it
            for other, entry in record.files.items():
                if other != name and file_of(other).is_relative_to(folder):
                    left = (*entry.folders, *folders[number:])
                    record.files[other] = replace(entry, folders=left)
                    break
            return


def _taken_back(
    target: files.Target, old: Entry | None
) -> tuple[bytes | None, tuple[str, ...], bool]:
    """Return a file as it was, which keys of ours were changed since, and if it is exact."""
    data = target.data
    if old is None or digest(data) == old.before or data is None:
        return data, (), True
    if digest(data) == old.after:
        if old.kind == "whole":
            return None if old.was is None else base64.b64decode(old.was), (), True
        with suppress(ValueError):
            text = settings.undone(target.text or "", old.splices)
            restored = None if old.before is None else text.encode()
            if digest(restored) == old.before:
                return restored, (), True
    if old.kind == "whole":
        return data, ("all of it",), False
    kept: tuple[str, ...] = ()
    if old.kind == "line":
        line = old.splices[-1].inserted.strip("\r\n") if old.splices else ""
        text = _without_lines(target.text or "", line)
        if "\n" in line and text == target.text:  # somebody changed some of them
            kept = (f"what begins with `{line.partition(chr(10))[0]}`",)
    else:
        document = _document(target, target.text or "")
        kept = _remove_keys(document, old.keys)
        text = document.text
    if old.before is None and not set(text) - set("\ufeff{} \t\r\n"):  # nothing is left in it
        return None, kept, False
    return text.encode(), kept, False


def _remove_keys(document: Document, keys: Sequence[Key]) -> tuple[str, ...]:
    """Put back what each key was, unless somebody changed it since; return the names of those."""
    kept = []
    for key in reversed(keys):
        raw = document.raw(key.path)
        if raw is not None and raw == key.was:
            continue
        if raw is not None and document.get(key.path) != key.value:
            kept.append(name_of(key.path))
        elif raw is not None and key.was is not None:
            document.put_raw(key.path, key.was)
        else:
            document.remove(key.path)
            for length in range(len(key.path) - 1, len(key.path) - key.made, -1):
                part = key.path[length - 1]
                empty: list[Any] = [{"name": part.name}] if isinstance(part, Named) else [{}, []]
                if document.get(key.path[:length]) in empty:
                    document.remove(key.path[:length])
    return tuple(kept)


def _with_whole(
    piece: Whole, target: files.Target, entry: Entry, old: Entry | None, *, force: bool
) -> Change:
    data = target.data
    if old is not None and old.kind == "whole" and digest(data) in (old.before, old.after):
        entry = replace(entry, before=old.before, was=old.was)
    elif data in (None, piece.data) or force:
        was = None if data is None else base64.b64encode(data).decode()
        entry = replace(entry, before=digest(data), was=was)
    else:
        what = "was changed since it was connected" if old else "is there already, and not ours"
        raise ConfigError(f"{piece.file}: {what}", hint="--force replaces it")
    entry = replace(entry, after=digest(piece.data))
    return Change(target, piece.data, entry, old, piece.mode)


def _with_line(piece: Line, target: files.Target, entry: Entry, old: Entry | None) -> Change:
    text = target.text or ""
    if _without_lines(text, piece.line) != text:
        found = digest(target.data)
        entry = replace(entry, before=found, after=found)
        if old is not None:
            entry = replace(entry, before=old.before, after=old.after, splices=old.splices)
        return Change(target, target.data, entry, old, line=piece.line)
    inserted = f"{'' if not text or text.endswith(chr(10)) else chr(10)}{piece.line}\n"
    splice = Splice(len(text), "", inserted)
    data = (text + inserted).encode()
    entry = replace(entry, before=digest(target.data), after=digest(data), splices=(splice,))
    return Change(target, data, entry, old, piece.mode, line=piece.line)


def _without_lines(text: str, lines: str) -> str:
    """Return a text without a line, wherever it stands, or without several that are in a row."""
    wanted = lines.split("\n") if lines else []
    found = text.splitlines(keepends=True)
    at = 0
    while wanted and at <= len(found) - len(wanted):
        if [one.strip("\r\n") for one in found[at : at + len(wanted)]] == wanted:
            del found[at : at + len(wanted)]
        else:
            at += 1
    return "".join(found)


def _with_keys(
    piece: Keys, target: files.Target, text: str, entry: Entry, old: Entry | None, *, force: bool
) -> Change:
    splices: list[Splice] = []
    begin = text.removeprefix("\ufeff")
    if not begin.strip():  # nobody has written anything yet
        splices.append(Splice(len(text) - len(begin), begin, "{}\n"))
        text = text.removesuffix(begin) + "{}\n"
    document = _document(target, text)
    if piece.strict:
        _check_strict(target, text)
    held = () if old is None else _held(target, old)
    for path in piece.guarded:
        found = document.get(path)
        free = found in (MISSING, piece.values[path]) or is_ours(found) or path in held
        if not free and not force:
            raise ConfigError(
                f"{target.file}: has another {name_of(path)}",
                hint="--force replaces it; `keybroker disconnect` puts it back",
            )
    keys, replaced = [], []
    for path, value in piece.values.items():
        was = document.raw(path)
        try:
            made = document.put(path, value)
        except SettingsInvalid as error:
            raise ConfigError(f"{target.file}:{error}; nothing was changed") from None
        keys.append(Key(path, was, value, made))
        if was is not None and document.raw(path) != was:
            replaced.append(name_of(path))
    splices += document.splices
    data = document.text.encode()
    entry = replace(entry, after=digest(data), splices=tuple(splices), keys=tuple(keys))
    return Change(target, data, entry, old, piece.mode, replaced=tuple(replaced))


def _held(target: files.Target, old: Entry) -> list[settings.Path]:
    """Return the keys that have what we gave them, perhaps by force; it was agreed to."""
    if target.data is None:
        return []
    document = _document(target, target.text or "")
    return [key.path for key in old.keys if document.get(key.path) == key.value]


def is_ours(helper: object) -> bool:
    """Say whether an `apiKeyHelper` is a line of ours, which somebody may have pasted."""
    return isinstance(helper, str) and _OURS.search(helper) is not None


def name_of(path: settings.Path) -> str:
    return ".".join(part if isinstance(part, str) else part.name for part in path)


def _document(target: files.Target, text: str) -> Document:
    try:
        return Document(text)
    except SettingsInvalid as error:
        raise ConfigError(f"{target.file}:{error}; nothing was changed") from None


def _check_strict(target: files.Target, text: str) -> None:
    """Refuse what its reader ignores as a whole: a key in it would never be seen."""
    try:
        json.loads(text.removeprefix("\ufeff"), parse_int=str)  # of any length
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise ConfigError(
            f"{target.file}:{line}:{column}: a comment or a comma too many: what reads it ignores "
            "the whole file",
            hint="take it out, then connect again; nothing was changed",
        ) from None
    except RecursionError:
        pass  # deeper than this reader goes, and valid for the one above


def _folder_mode(mode: int) -> int:
    return 0o755 if mode & 0o044 else 0o700


def value_shown(value: Any) -> list[str]:
    """Return all strings in a value, which are ours and may be shown."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in value_shown(one)]
    if isinstance(value, list):
        return [text for one in value for text in value_shown(one)]
    return [value] if isinstance(value, str) else []


def names_in(path: settings.Path) -> list[str]:
    """Return the names that a path picks elements of lists by; ours too, and may be shown."""
    return [part.name for part in path if isinstance(part, Named)]


def follow(
    state: Path, path: settings.Path, wanted: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """
    Bring one key up to date in every file that was connected to be followed.

    Args:
        wanted: The key's value by profile.

    Returns:
        The files that were changed, and in words why others could not be.

    Raises:
        KeybrokerError: The record cannot be read or written.
    """
    changed, problems = [], []
    with Record.open(state) as record:
        for name, entry in list(record.files.items()):
            value = wanted.get(entry.profile)
            if not entry.follow or value is None:
                continue
            try:
                if _followed(name, path, value, record):
                    changed.append(name)
            except KeybrokerError as error:
                problems.append(error.message)
    return changed, problems


def _followed(name: str, path: settings.Path, value: str, record: Record) -> bool:
    """Give a key another value, if it still has the one that we gave it."""
    entry = record.files[name]
    key = next((key for key in entry.keys if key.path == path), None)
    if key is None or key.value == value:
        return False
    for _ in range(TRIES):
        target = files.read(file_of(name))
        if target.data is None:
            return False
        document = _document(target, target.text or "")
        if document.get(path) != key.value:  # somebody else's by now
            return False
        document.put(path, value)
        data = document.text.encode()
        untouched = digest(target.data) == entry.after
        fresh = replace(
            entry,
            keys=tuple(replace(key, value=value) if one is key else one for one in entry.keys),
            splices=(*entry.splices, *document.splices) if untouched else (),
            after=digest(data),
        )
        if commit(Change(target, data, fresh, entry), record):
            return True
    raise changed_too_often(target.file)


def record_name(file: Path, line: str = "") -> str:
    return f"{file}\n{line}" if line else str(file)
