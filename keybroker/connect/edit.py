"""Do what a plan wants to one file, and take it back: byte for byte, or by key."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keybroker import settings
from keybroker.connect import files
from keybroker.connect.plan import Keys, Line, Piece, Whole
from keybroker.connect.record import Entry, Key, Record, digest, now
from keybroker.errors import ConfigError, NotReady
from keybroker.settings import MISSING, Document, Named, SettingsInvalid, Splice

TRIES = 5


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
) -> Change:
    """
    Work out what connects one file, as if it had not been connected before.

    Raises:
        ConfigError: The file cannot be edited, or has what only `force` replaces.
    """
    target = files.read(piece.file)
    old = record.entry(piece.file, target.data)
    if old is not None and old.profile != profile and not force:
        raise ConfigError(
            f"{piece.file}: is connected to the profile {old.profile}",
            hint=f"keybroker disconnect {old.surface}, or --force; or another --scope",
        )
    kind = {Keys: "keys", Line: "line", Whole: "whole"}[type(piece)]
    entry = Entry(kind, surface, profile, scope, now(), None, None, follow=follow)
    if isinstance(piece, Whole):
        if old is None and target.data not in (None, piece.data) and not force:
            raise ConfigError(f"{piece.file}: is there already, and not ours", hint="--force")
        was = old.was if old is not None else _kept(target.data)
        before = old.before if old is not None else digest(target.data)
        entry = replace(entry, before=before, after=digest(piece.data), was=was)
        return Change(target, piece.data, entry, old, piece.mode)
    base, _, _ = _taken_back(target, old)
    entry = replace(entry, before=digest(base))
    text = "" if base is None else base.decode("utf-8")
    if isinstance(piece, Line):
        after, splices = _with_line(text, piece.line)
        entry = replace(entry, after=digest(after.encode()), splices=splices)
        return Change(target, after.encode(), entry, old)
    return _with_keys(piece, target, text, entry, old, force=force)


def to_disconnect(file: Path, record: Record) -> Change:
    """
    Work out what takes back all that was done to one file.

    Raises:
        ConfigError: The file cannot be edited.
    """
    target = files.read(file)
    old = record.entry(file, target.data)
    assert old is not None, "only what is recorded is taken back"
    data, kept, exact = _taken_back(target, old)
    return Change(target, data, None, old, kept=kept, exact=exact)


def commit(change: Change, record: Record) -> bool:
    """
    Write a change down, do it, and note that it is done.

    Returns:
        False when the file was changed meanwhile: work it out anew.

    Raises:
        ConfigError: The disk will not have it.
    """
    file, entry = change.target.file, change.entry
    if entry is not None:
        made = files.make_folder(change.target.real.parent, _folder_mode(change.mode))
        folders = change.old.folders if change.old is not None else tuple(map(str, made))
        entry = replace(entry, folders=folders)
        record.announce(file, entry)
    if change.is_one and not files.replace(change.target, change.data, mode=change.mode):
        return False
    if entry is None and change.old is not None and change.data is None:
        for folder in change.old.folders:
            try:
                Path(folder).rmdir()
            except OSError:  # somebody has put something into it
                break
    record.settle(file, entry)
    return True


def changed_too_often(file: Path) -> NotReady:
    return NotReady(f"{file}: is being changed by another program", hint="try again")


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
        text = settings.undone(target.text or "", old.splices)
        restored = None if old.before is None else text.encode()
        if digest(restored) == old.before:
            return restored, (), True
    if old.kind == "whole":
        return data, ("all of it",), False
    if old.kind == "line":
        if not old.splices:
            return data, (), True
        line = old.splices[-1].inserted.strip("\r\n")
        lines = (target.text or "").splitlines(keepends=True)
        return "".join(one for one in lines if one.strip("\r\n") != line).encode(), (), False
    document = _document(target, target.text or "")
    kept = _remove_keys(document, old.keys)
    return document.text.encode(), kept, False


def _remove_keys(document: Document, keys: Sequence[Key]) -> tuple[str, ...]:
    """Put back what each key was, unless somebody changed it since; return the names of those."""
    kept = []
    for key in reversed(keys):
        value = document.get(key.path)
        if value is MISSING:
            continue
        if value != key.value:
            kept.append(name_of(key.path))
        elif key.was is not None:
            document.put_raw(key.path, key.was)
        else:
            document.remove(key.path)
            for length in range(len(key.path) - 1, len(key.path) - key.made, -1):
                part = key.path[length - 1]
                empty = {"name": part.name} if isinstance(part, Named) else None
                if document.get(key.path[:length]) in ({}, [], empty):
                    document.remove(key.path[:length])
    return tuple(kept)


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
    for path in piece.guarded:
        found = document.get(path)
        pasted = isinstance(found, str) and is_ours(found)
        if found not in (MISSING, piece.values[path]) and not pasted and not force:
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
    return Change(target, data, entry, old, replaced=tuple(replaced))


def is_ours(helper: str) -> bool:
    """Say whether a helper is a line of ours, which somebody may have pasted."""
    return "keybroker-key" in helper or "/keybroker/helper.py" in helper


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
        json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise ConfigError(
            f"{target.file}:{line}:{column}: a comment or a comma too many: Claude Code ignores "
            "the whole file",
            hint="take it out, then connect again; nothing was changed",
        ) from None
    except RecursionError:
        pass  # deeper than this reader goes, and valid for the one above


def _with_line(text: str, line: str) -> tuple[str, tuple[Splice, ...]]:
    if line in text.splitlines():
        return text, ()
    lead = "" if not text or text.endswith("\n") else "\n"
    inserted = f"{lead}{line}\n"
    return text + inserted, (Splice(len(text), "", inserted),)


def _kept(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _folder_mode(mode: int) -> int:
    return 0o755 if mode & 0o044 else 0o700


def value_shown(value: Any) -> list[str]:
    """Return all strings in a value, which are ours and may be shown."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in value_shown(one)]
    if isinstance(value, list):
        return [text for one in value for text in value_shown(one)]
    return [value] if isinstance(value, str) else []


def follow(state: Path, path: settings.Path, wanted: Mapping[str, str]) -> list[str]:
    """
    Bring one key up to date in every file that was connected to be followed.

    Args:
        wanted: The key's value by profile.

    Returns:
        The files that were changed.

    Raises:
        KeybrokerError: The record or a file cannot be read or written.
    """
    changed = []
    with Record.open(state) as record:
        for name, entry in list(record.files.items()):
            value = wanted.get(entry.profile)
            if entry.follow and value is not None and _followed(Path(name), path, value, record):
                changed.append(name)
    return changed


def _followed(file: Path, path: settings.Path, value: str, record: Record) -> bool:
    """Give a key another value, if it still has the one that we gave it."""
    for _ in range(TRIES):
        target = files.read(file)
        entry = record.entry(file, target.data)
        key = next((key for key in entry.keys if key.path == path), None) if entry else None
        if entry is None or key is None or key.value == value or target.data is None:
            return False
        document = _document(target, target.text or "")
        if document.get(path) != key.value:  # somebody else's by now
            return False
        document.put(path, value)
        data = document.text.encode()
        untouched = digest(target.data) == entry.after
        keys = tuple(replace(key, value=value) if one is key else one for one in entry.keys)
        fresh = replace(
            entry,
            keys=keys,
            splices=(*entry.splices, *document.splices),
            after=digest(data) if untouched else None,
        )
        if commit(Change(target, data, fresh, entry), record):
            return True
    raise changed_too_often(file)
