"""What was written into whose file, so that it can be taken back. In the state directory:

    {"v": 1, "files": {"/home/you/.claude/settings.json": {"surface": "claude", "profile": "work",
      "scope": "user", "follow": false, "at": "2026-11-27T20:00:00Z", "before": "…", "after": "…",
      "splices": [[1, "", "\\n  \\"apiKeyHelper\\": \\"exec …\\"\\n"]], "keys": [
        {"path": ["apiKeyHelper"], "was": null, "value": "exec …", "made": 1}], "folders": []}}}

`before` and `after` are SHA-256 of the file; null: there was none. A line in a text file is
recorded under the file's name, a line break, and the line: others of ours may be in it. No copy
of what somebody else wrote is kept, for secrets may be in it, but for what we took the place of.

What was made for other machines has `made_for`: {"system": "macos", "output": "/tmp/out", …}, as
it was typed, so that it can be looked at in the same way. It counts for nothing here.

`coming` has what is about to be done. Whoever reads it next looks if it was.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keybroker.connect.files import content, tidy
from keybroker.credential import sha256
from keybroker.errors import CacheError
from keybroker.paths import CONNECTIONS, Disk, private_directory
from keybroker.settings import Named, Splice
from keybroker.settings import Path as KeyPath


@dataclass(frozen=True, slots=True)
class Key:
    """One value that was set. `made`: how many parts of its path were not there before."""

    path: KeyPath
    was: str | None
    value: Any
    made: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What was done to one file."""

    kind: str  # keys, line or whole
    surface: str
    profile: str
    scope: str
    at: str
    before: str | None
    after: str | None
    splices: tuple[Splice, ...] = ()
    keys: tuple[Key, ...] = ()
    folders: tuple[str, ...] = ()
    was: str | None = None  # of a whole file that was replaced
    follow: bool = False
    made_for: Mapping[str, str] = field(default_factory=dict)  # see `Place.made_for`

    @property
    def is_handed_out(self) -> bool:
        """Whether it is a file for other machines, which nothing reads here."""
        return "output" in self.made_for or "system" in self.made_for


def file_of(name: str) -> Path:
    """Return the file that something is recorded of."""
    return Path(name.partition("\n")[0])


def digest(data: bytes | None) -> str | None:
    return None if data is None else sha256(data)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Record:
    """All of it, read; `save` writes it back. Kept under a lock between the two."""

    path: Path
    files: dict[str, Entry] = field(default_factory=dict)
    coming: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, state: Path) -> Iterator["Record"]:
        """
        Read it, and let nobody else write it meanwhile.

        Raises:
            CacheError: It cannot be read: what it says cannot be taken back by guessing.
        """
        path = private_directory(state) / CONNECTIONS
        with Disk().lock(path):
            record = cls.read(path)
            if record.coming:
                for name in record.coming:
                    tidy(file_of(name))
                record.coming = {}
                record.save()
            yield record

    @classmethod
    def read(cls, path: Path) -> "Record":
        """
        Read it as it is; see `open`.

        Raises:
            CacheError: It cannot be read.
        """
        try:
            found = json.loads(Disk().read(path) or b'{"v": 1, "files": {}}')
            if found["v"] != 1:
                raise CacheError(f"{path}: of a newer keybroker")
            files = {name: _decode(one) for name, one in found["files"].items()}
            coming = {name: _decode(one) for name, one in found.get("coming", {}).items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CacheError(
                f"{path}: cannot be read",
                hint="move it away; then `keybroker connect` starts anew",
            ) from None
        record = cls(path, files, coming)
        record._look_what_came()
        return record

    def _look_what_came(self) -> None:
        """Take for done what was about to be done, if it was: somebody may have been ended."""
        for name, entry in self.coming.items():
            done = False
            with suppress(OSError):
                done = digest(content(file_of(name))) == entry.after
            if done:
                self.files[name] = entry
            elif entry.folders:  # those were made, perhaps
                nothing = replace(entry, keys=(), splices=(), after=entry.before)
                old = self.files.get(name, nothing)
                self.files[name] = replace(old, folders=entry.folders)

    def announce(self, name: str, entry: Entry) -> None:
        """Write down what is about to be done."""
        self.coming[name] = entry
        self.save()

    def settle(self, name: str, entry: Entry | None) -> None:
        """Write down what was done; None: it was taken back."""
        self.coming.pop(name, None)
        if entry is None:
            self.files.pop(name, None)
        else:
            self.files[name] = entry
        self.save()

    def save(self) -> None:
        document = {
            "v": 1,
            "files": {name: _encode(one) for name, one in self.files.items()},
            "coming": {name: _encode(one) for name, one in self.coming.items()},
        }
        Disk().replace(self.path, (json.dumps(document, indent=1) + "\n").encode())


def _encode(entry: Entry) -> dict[str, Any]:
    splices = [[one.start, one.removed, one.inserted] for one in entry.splices]
    keys = [{**asdict(key), "path": [_part(one) for one in key.path]} for key in entry.keys]
    return {**asdict(entry), "splices": splices, "keys": keys}


def _decode(value: Mapping[str, Any]) -> Entry:
    splices = tuple(Splice(int(a), str(b), str(c)) for a, b, c in value["splices"])
    keys = tuple(Key(**{**one, "path": _path(one["path"])}) for one in value["keys"])
    folders = tuple(value["folders"])
    return Entry(**{**value, "splices": splices, "keys": keys, "folders": folders})


def _part(part: str | Named) -> Any:
    return part if isinstance(part, str) else {"name": part.name}


def _path(parts: Sequence[Any]) -> KeyPath:
    return tuple(one if isinstance(one, str) else Named(one["name"]) for one in parts)
