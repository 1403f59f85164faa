"""Append-only JSON lines, each with the hash of the line before it.

A torn last line is a record whose write was cut off: nothing was done on the strength of it, so
it is dropped. Anything else that does not fit is damage, and is said with its line.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from keybroker.credential import sha256
from keybroker.errors import JournalError
from keybroker.paths import Disk

FORMAT = 1
LONGEST_LINE = 1 << 16


class Chain:
    """
    One file of the journal's or the audit log's kind. Its first line names kind and format:

        {"n":0,"format":1,"kind":"journal","prev":""}

    Raises:
        JournalError: From every method: the file cannot be read or written, was damaged, or is
            of a newer format.
    """

    def __init__(self, path: Path, kind: str, disk: Disk | None = None) -> None:
        self.path = path
        self._kind = kind
        self._disk = disk or Disk()

    def read(self) -> list[dict[str, Any]]:
        """Return all records after the first line, checked link by link."""
        try:
            data = self._disk.read(self.path)
        except OSError as error:
            raise self._problem(f"cannot be read ({error.strerror})") from None
        if not data:
            return []
        records: list[dict[str, Any]] = []
        previous = ""
        lines = data.split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
        for number, line in enumerate(lines, 1):
            record = self._parse(line, number)
            if record.get("prev") != previous and number > 1:
                raise self._problem(f"line {number} does not follow the one before it")
            previous = _link(line)
            records.append(record)
        if not records:
            return []
        self._check_first(records[0])
        return records[1:]

    def append(self, *records: Mapping[str, Any], sync: bool) -> None:
        """Add records; with `sync`, return only when they are on the disk."""
        try:
            with self._disk.lock(self.path):
                tail = self._disk.read(self.path, LONGEST_LINE * 2) or b""
                if not tail.endswith(b"\n") and tail:
                    tail = self._drop_torn_line(tail)
                lines = tail.splitlines()
                if not lines:
                    first = _line({"n": 0, "format": FORMAT, "kind": self._kind}, "")
                    self._disk.append(self.path, first + b"\n")
                    lines = [first]
                number = self._parse(lines[-1], 0).get("n")
                if not isinstance(number, int):
                    raise self._problem("the last line is damaged")
                added, line = [], lines[-1]
                for values in records:
                    number += 1
                    line = _line({"n": number, **values}, _link(line))
                    if len(line) >= LONGEST_LINE:
                        raise self._problem("a record is too long to be written")
                    added.append(line + b"\n")
                self._disk.append(self.path, b"".join(added))
                if sync:
                    self._disk.sync(self.path)
        except OSError as error:
            raise self._problem(f"cannot be written ({error.strerror})") from None

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Put these records in place of all others, at once."""
        lines = [_line({"n": 0, "format": FORMAT, "kind": self._kind}, "")]
        for number, record in enumerate(records, 1):
            values = {k: v for k, v in record.items() if k not in ("n", "prev")}
            lines.append(_line({"n": number, **values}, _link(lines[-1])))
        try:
            with self._disk.lock(self.path):
                self._disk.replace(self.path, b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise self._problem(f"cannot be written ({error.strerror})") from None

    def _drop_torn_line(self, tail: bytes) -> bytes:
        whole = tail[: tail.rfind(b"\n") + 1]
        size = len(self._disk.read(self.path) or b"")
        self._disk.truncate(self.path, size - (len(tail) - len(whole)))
        return whole

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"line {number}" if number else "the last line"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise self._problem(f"{where} is damaged") from None
        if not isinstance(record, dict):
            raise self._problem(f"{where} is damaged")
        return record

    def _check_first(self, first: Mapping[str, Any]) -> None:
        if first.get("kind") != self._kind or not isinstance(first.get("format"), int):
            raise self._problem("line 1 is not that of a keybroker file")
        if first["format"] > FORMAT:
            raise self._problem(
                f"is of format {first['format']}; this keybroker knows {FORMAT}",
                hint="use the newer keybroker that wrote it",
            )

    def _problem(self, what: str, hint: str | None = None) -> JournalError:
        meanwhile = (
            "no key depends on it"
            if self._kind == "audit"
            else "nothing is minted until this is mended"
        )
        hint = hint or f"{meanwhile}; see docs/recovery.md"
        return JournalError(f"{self._kind}: {self.path}: {what}", hint=hint)


def _line(values: Mapping[str, Any], previous: str) -> bytes:
    return json.dumps({**values, "prev": previous}, separators=(",", ":")).encode()


def _link(line: bytes) -> str:
    return sha256(line)[:16]
