"""Edits of other programs' JSON by key; every byte outside the edited values stays.

Comments, trailing commas, a byte order mark, indents and line ends are read and kept; a key that
stands twice counts as its last one, as `JSON.parse` has it. An edit is a list of splices, so that
it can be taken back without a copy of the file, which may hold somebody's secrets.

    document = Document('{"env": {}}')
    document.put(("env", "NAME"), "value")
    document.text, document.splices

See: https://www.rfc-editor.org/rfc/rfc8259
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DEEPEST = 500
MISSING = object()

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\n]+)
    | (?P<comment>//[^\r\n]*|/\*.*?\*/)
    | (?P<string>"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*")
    | (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![0-9A-Za-z.])
    | (?P<word>true|false|null)(?![0-9A-Za-z])
    | (?P<mark>[][{}:,])
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


class SettingsInvalid(ValueError):  # noqa: N818  # as the errors of ours, which it becomes
    """A text is not JSON, or has something else where a key should go; says line and column."""

    def __init__(self, text: str, offset: int, problem: str) -> None:
        line = text.count("\n", 0, offset) + 1
        column = offset - (text.rfind("\n", 0, offset) + 1) + 1
        super().__init__(f"{line}:{column}: {problem}")
        self.line, self.column, self.problem = line, column, problem


@dataclass(frozen=True, slots=True)
class Named:
    """One element of a list of objects: the one whose `name` is this."""

    name: str


Part = str | Named
Path = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it is written: nothing of it is lost."""

    text: str


@dataclass(frozen=True, slots=True)
class Splice:
    """At `start`, `removed` became `inserted`. Offsets count characters, a mark of order too."""

    start: int
    removed: str
    inserted: str


@dataclass(slots=True)
class _Entry:
    """A member of an object, or an element of an array, which has no key."""

    key: str | None
    start: int
    node: "_Node"
    comma: int | None = None  # where the comma after it is


@dataclass(slots=True)
class _Node:
    start: int
    end: int = -1
    value: Any = None
    entries: list[_Entry] | None = None  # of an object or array
    is_object: bool = False


class Document:
    """
    A text and the edits made to it.

    Attributes:
        text: As it stands.
        splices: What was done, in order; `undone` takes it back.

    Raises:
        SettingsInvalid: The text is not JSON with an object at its top.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.splices: list[Splice] = []
        self._parse()

    @property
    def value(self) -> dict[str, Any]:
        """All of it; numbers as `Number`."""
        found: dict[str, Any] = self._root.value
        return found

    def get(self, path: Path) -> Any:
        """Return the value at a path, or MISSING."""
        node = self._at(path)
        return MISSING if node is None else node.value

    def raw(self, path: Path) -> str | None:
        """Return the JSON text of the value at a path; None when there is none."""
        node = self._at(path)
        return None if node is None else self.text[node.start : node.end]

    def put(self, path: Path, value: Any) -> int:
        """
        Set one value, and make what holds it where that is not there.

        Args:
            value: Text, booleans, and lists and dictionaries of them.

        Returns:
            How many parts of the path were made, the last one included.

        Raises:
            SettingsInvalid: Something else than an object or a list stands on the way.
        """
        node = self._root
        for depth, part in enumerate(path):
            _check_holds(self.text, node, part, path[:depth])
            entry = _find(node, part)
            if entry is None:
                self._insert(node, part, _nested(path[depth + 1 :], value, part))
                self._check(path, value)
                return len(path) - depth
            node = entry.node
        if node.value != value:
            self._splice([(node.start, node.end, self._dumped(value, self._indent_at(node.start)))])
            self._check(path, value)
        return 0

    def put_raw(self, path: Path, text: str) -> None:
        """Replace the value at a path, if it is there, by one as it was written once."""
        if (node := self._at(path)) is not None:
            self._splice([(node.start, node.end, text)])

    def remove(self, path: Path) -> None:
        """Take a key out, as often as it stands there; nothing happens where it does not."""
        while True:
            node, entry = self._root, None
            for part in path:
                entry = _find(node, part)
                if entry is None:
                    return
                node, holder = entry.node, node
            assert entry is not None, "the path is not empty"
            self._splice(_removal(self.text, holder, entry))

    def _at(self, path: Path) -> _Node | None:
        node = self._root
        for part in path:
            if (entry := _find(node, part)) is None:
                return None
            node = entry.node
        return node

    def _parse(self) -> None:
        self._root = _parse(self.text)
        if not self._root.is_object:
            raise SettingsInvalid(self.text, self._root.start, "expected an object, { … }")

    def _check(self, path: Path, value: Any) -> None:
        assert self.get(path) == value, "what was put is what is there"

    def _splice(self, changes: list[tuple[int, int, str]]) -> None:
        before = self.text
        for start, end, new in sorted(changes, reverse=True):
            self.splices.append(Splice(start, self.text[start:end], new))
            self.text = self.text[:start] + new + self.text[end:]
        try:
            self._parse()
        except SettingsInvalid:
            self.text = before
            raise AssertionError("an edit keeps the text valid") from None

    def _insert(self, holder: _Node, part: Part, value: Any) -> None:
        entries = holder.entries or []
        close = holder.end - 1
        content = len(self.text[:close].rstrip(" \t\r\n"))  # after the last value or comment
        newline, unit = self._newline, self._unit
        outer = self._indent_at(holder.start)
        spread = "\n" in self.text[holder.start : entries[0].start] if entries else True
        if not entries and not self._is_spread(holder):
            spread = False
        inner = outer + unit
        if entries and spread:
            inner = self._indent_at(entries[0].start)
        key = "" if isinstance(part, Named) else f"{json.dumps(part, ensure_ascii=False)}: "
        new = key + (self._dumped(value, inner) if spread else _flat(value))
        if not entries:
            if content == holder.start + 1:  # nothing but space between the brackets
                text = f"{newline}{inner}{new}{newline}{outer}" if spread else new
                self._splice([(content, close, text)])
                return
            end = "" if "\n" in self.text[content:close] else f"{newline}{outer}"
            self._splice([(content, content, f"{newline}{inner}{new}{end}")])
            return
        last = entries[-1]
        after = last.node.end if last.comma is None else last.comma + 1
        on_a_line = spread or "//" in self.text[after:content]  # not into a comment
        lead = f"{newline}{inner}" if on_a_line else " "
        if last.comma is not None:
            self._splice([(content, content, f"{lead}{new},")])
        elif content == after:
            self._splice([(content, content, f",{lead}{new}")])
        else:  # a comment between the value and where ours goes
            self._splice([(content, content, f"{lead}{new}"), (after, after, ",")])

    @property
    def _newline(self) -> str:
        if "\r\n" in self.text:
            return "\r\n"
        return "\r" if "\r" in self.text and "\n" not in self.text else "\n"

    @property
    def _unit(self) -> str:
        """Return one step of indent: that of the first key, or two spaces."""
        entries = self._root.entries
        if entries and "\n" in self.text[self._root.start : entries[0].start]:
            return self._indent_at(entries[0].start) or "  "
        return "  "

    def _is_spread(self, holder: _Node) -> bool:
        """Say whether the document has its keys on lines of their own."""
        entries = self._root.entries
        if holder is self._root or not entries:
            return True
        return "\n" in self.text[self._root.start : entries[0].start]

    def _indent_at(self, offset: int) -> str:
        """Return the space that the line of an offset begins with."""
        begin = max(self.text.rfind("\n", 0, offset), self.text.rfind("\r", 0, offset)) + 1
        found = re.match(r"[ \t]*", self.text[begin:offset].removeprefix("\ufeff"))
        return found[0] if found else ""

    def _dumped(self, value: Any, indent: str) -> str:
        if not isinstance(value, dict | list):
            return _flat(value)
        if not self._is_spread(_Node(0)):
            return _flat(value)
        text = json.dumps(value, indent=self._unit, ensure_ascii=False)
        return text.replace("\n", self._newline + indent)


def _flat(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def undone(text: str, splices: Sequence[Splice]) -> str:
    """
    Return a text as it was before these splices, if they were the last that was done to it.

    Raises:
        ValueError: They were not.
    """
    for one in reversed(splices):
        end = one.start + len(one.inserted)
        if text[one.start : end] != one.inserted:
            raise ValueError("not what was inserted")
        text = text[: one.start] + one.removed + text[end:]
    return text


def shown(text: str, plain: Sequence[str]) -> str:
    """
    Return a text for people, line by line, without what may be somebody's secret.

    Args:
        text: JSON as `Document` reads it.
        plain: The strings that may be shown; names of keys always are. Of others and of comments
            an ellipsis is left.
    """
    out, known, pieces = [], set(plain), list(_pieces(text))
    for number, (kind, start, end) in enumerate(pieces):
        piece = text[start:end]
        if kind == "comment":
            opening = piece[:2]
            body = "\n".join("…" for _ in piece.split("\n"))
            piece = f"{opening} {body}" + ("" if opening == "//" else " */")
        elif kind == "string" and json.loads(piece) not in known:
            after = (text[s:e] for k, s, e in pieces[number + 1 :] if k not in ("space", "comment"))
            piece = piece if next(after, "") == ":" else '"…"'
        out.append(piece)
    return "".join(out)


def _nested(rest: Path, value: Any, made: Part) -> Any:
    """Return what is inserted for a part that is missing: a value with what holds it."""
    if rest:
        inner = _nested(rest[1:], value, rest[0])
        value = [inner] if isinstance(rest[0], Named) else {rest[0]: inner}
    if isinstance(made, Named):
        return {"name": made.name, **value}
    return value


def _find(node: _Node, part: Part) -> _Entry | None:
    """Return the entry that counts, which is the last of its name."""
    for entry in reversed(node.entries or []):
        if isinstance(part, Named):
            value = entry.node.value
            if not node.is_object and isinstance(value, dict) and value.get("name") == part.name:
                return entry
        elif node.is_object and entry.key == part:
            return entry
    return None


def _check_holds(text: str, node: _Node, part: Part, path: Path) -> None:
    wants_list = isinstance(part, Named)
    if node.entries is None or node.is_object is wants_list:
        name = ".".join(one if isinstance(one, str) else one.name for one in path)
        expected = "a list, [ … ]" if wants_list else "an object, { … }"
        raise SettingsInvalid(text, node.start, f"{name}: expected {expected}")


def _removal(text: str, holder: _Node, entry: _Entry) -> list[tuple[int, int, str]]:
    """Return the splices that take an entry out, with one comma and the line that it has alone."""
    entries = holder.entries or []
    index = next(n for n, one in enumerate(entries) if one is entry)
    start, end = entry.start, entry.node.end
    changes = []
    if entry.comma is not None and not text[end : entry.comma].strip():
        end = entry.comma + 1
    elif entry.comma is not None:
        changes.append((entry.comma, entry.comma + 1, ""))
    elif index > 0 and (comma := entries[index - 1].comma) is not None:
        changes.append((comma, comma + 1, ""))
    begin = len(text[:start].rstrip(" \t"))
    if begin > 0 and text[begin - 1] in "\r\n":  # alone on its line, as far as it reaches
        begin -= 2 if text[:begin].endswith("\r\n") else 1
        start = begin
    elif index == len(entries) - 1:
        start = begin
    else:
        end += len(text[end:]) - len(text[end:].lstrip(" \t"))
    if changes and changes[0][0] >= start and changes[0][1] <= end:
        changes = []
    return [*changes, (start, end, "")]


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """
    Yield all tokens, space and comments too: kind, start, end.

    Raises:
        SettingsInvalid: Something is none.
    """
    offset = 1 if text.startswith("\ufeff") else 0
    if offset:
        yield "space", 0, 1
    while offset < len(text):
        match = _TOKEN.match(text, offset)
        if match is None or match.end() == offset:
            raise SettingsInvalid(text, offset, _not_a_token(text, offset))
        yield match.lastgroup or "", offset, match.end()
        offset = match.end()


def _not_a_token(text: str, offset: int) -> str:
    if text[offset] == '"':
        return "a text that does not end, or with a character that must be escaped"
    return "a comment that does not end" if text.startswith("/*", offset) else "not JSON"


def _parse(text: str) -> _Node:
    """
    Read a document, without recursion.

    Raises:
        SettingsInvalid: It is not JSON, comments and trailing commas aside, or too deep.
    """
    top: list[_Entry] = []
    held: list[_Node] = [_Node(0, entries=top)]  # what is open; the first holds the document
    key: tuple[str, int] | None = None
    want = "value"
    for kind, start, end in _pieces(text):
        if kind in ("space", "comment"):
            continue
        word, holder = text[start:end], held[-1]
        entries = holder.entries if holder.entries is not None else []
        closes = len(held) > 1 and word == ("}" if holder.is_object else "]")
        if want == "nothing":
            raise SettingsInvalid(text, start, "something after the end")
        if want == "colon":
            if word != ":":
                raise SettingsInvalid(text, start, "expected a colon")
            want = "value"
        elif closes and (want != "value" or key is None):
            holder.end = end
            values = [one.node.value for one in entries]
            names = [one.key for one in entries]
            holder.value = dict(zip(names, values, strict=True)) if holder.is_object else values
            held.pop()
            want = "comma" if len(held) > 1 else "nothing"
        elif want == "comma":
            if word != ",":
                expected = "}" if holder.is_object else "]"
                raise SettingsInvalid(text, start, f"expected a comma or {expected}")
            entries[-1].comma = start
            want = "key" if holder.is_object else "value"
        elif want == "key":
            if kind != "string":
                raise SettingsInvalid(text, start, "expected a key in quotes")
            key, want = (json.loads(word), start), "colon"
        elif kind == "mark" and word not in "{[":
            raise SettingsInvalid(text, start, "expected a value")
        else:
            node = _Node(start, end)
            name, begin = key or (None, start)
            entries.append(_Entry(name, begin, node))
            key, want = None, "comma" if len(held) > 1 else "nothing"
            if kind == "mark":
                node.entries, node.is_object = [], word == "{"
                held.append(node)
                want = "key" if node.is_object else "value"
                if len(held) > DEEPEST:
                    raise SettingsInvalid(text, start, f"nested more than {DEEPEST} deep")
            elif kind == "string":
                node.value = json.loads(word)
            else:
                node.value = _WORDS[word] if kind == "word" else Number(word)
    if want != "nothing":
        raise SettingsInvalid(text, len(text), "ends too early")
    return top[0].node
