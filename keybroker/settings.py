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
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 500  # what compares, copies or writes a value recurses, and ours is not the only one
MISSING = object()

_MARK_OF_ORDER = "\ufeff"
_EOL = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OPEN_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+'
_TOKEN = re.compile(
    rf"""
    (?P<space>[ \t\r\n]+)
    | (?P<comment>//[^\r\n]*|/\*.*?\*/)
    | (?P<string>{_OPEN_STRING}")
    | (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![0-9A-Za-z.])
    | (?P<word>true|false|null)(?![0-9A-Za-z])
    | (?P<mark>[][{{}}:,])
    """,
    re.VERBOSE | re.DOTALL,
)
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_CLOSING = {"{": "}", "[": "]"}


class SettingsInvalid(ValueError):  # noqa: N818  # as the errors of ours, which it becomes
    """A text is not JSON, or has something else where a key should go; says line and column."""

    def __init__(self, text: str, offset: int, problem: str) -> None:
        begins = [found.end() for found in _EOL.finditer(text, 0, offset)]
        begin = begins[-1] if begins else len(_mark_of_order(text))
        line, column = len(begins) + 1, offset - begin + 1
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
    """A number as it is written: nothing of it is lost. It equals that whole number."""

    text: str

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int) and not isinstance(other, bool):
            return self.text == str(other)
        return isinstance(other, Number) and self.text == other.text


@dataclass(frozen=True, slots=True)
class Splice:
    """At `start`, `removed` became `inserted`. Offsets count characters, a mark of order too."""

    start: int
    removed: str
    inserted: str


@dataclass(slots=True)
class _Node:
    """A value, with the key before it and the comma after it, where there are any."""

    begin: int  # of the key
    start: int
    end: int
    key: str | None = None
    value: Any = None
    comma: int | None = None
    opening: str = ""  # the bracket of what holds others
    entries: list["_Node"] = field(default_factory=list)
    content: int = 0  # where the last thing before the closing bracket ends, a comment too


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
        self._root = _parse_object(text)

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
            value: Text, booleans, whole numbers, and lists and dictionaries of them; for a Named,
                a dictionary, which need not repeat the name.

        Returns:
            How many parts of the path were made, the last one included.

        Raises:
            SettingsInvalid: Something else than an object or a list stands on the way.
        """
        value = _named(path[-1], value)
        node, depth = self._root, 0
        for depth, part in enumerate(path):
            _check_holds(self.text, node, part, path[:depth])
            if (found := _find(node, part)) is None:
                self._splice(self._insertion(node, part, _holding(path[depth:], value)))
                break
            node = found
        else:
            depth = len(path)
            if node.value != value:
                spread, indent = self._is_spread(node.start), self._indent(node.start)
                self._splice([(node.start, node.end, self._written(value, spread, indent))])
        assert self.get(path) == value, "what was put is what is there"
        return len(path) - depth

    def put_raw(self, path: Path, text: str) -> None:
        """
        Replace the value at a path, if it is there, by one as it was written once.

        Raises:
            SettingsInvalid: The text is something else than one value.
        """
        value = _parse(text)
        if (value.start, value.end) != (0, len(text)):
            raise SettingsInvalid(text, 0, "expected a value and nothing else")
        node = self._at(path)
        if node is not None and self.text[node.start : node.end] != text:
            self._splice([(node.start, node.end, text)])

    def remove(self, path: Path) -> None:
        """Take a key out, as often as it stands there; nothing happens where it does not."""
        while (node := self._at(path)) is not None:
            holder = self._at(path[:-1])
            assert holder is not None, "what is held has a holder"
            self._splice(_removal(self.text, holder, node))

    def _at(self, path: Path) -> _Node | None:
        node: _Node | None = self._root
        for part in path:
            node = _find(node, part) if node is not None else None
        return node

    def _splice(self, changes: list[tuple[int, int, str]]) -> None:
        text, done = self.text, []
        for start, end, new in sorted(changes, reverse=True):
            done.append(Splice(start, text[start:end], new))
            text = text[:start] + new + text[end:]
        self._root = _parse_object(text)
        self.text = text
        self.splices += done

    def _insertion(self, holder: _Node, part: Part, value: Any) -> list[tuple[int, int, str]]:
        """Return the splices that add an entry as the last, laid out as the one before it is."""
        text, content, close = self.text, holder.content, holder.end - 1
        outer = self._indent(holder.start)
        inner = outer + self._unit
        last = holder.entries[-1] if holder.entries else None
        if last is None:
            spread = self._is_spread(holder.start) or content > holder.start + 1  # by a comment
        else:
            before = holder.entries[-2].end if len(holder.entries) > 1 else holder.start
            spread = _breaks(text, before, last.begin) or _breaks(text, last.end, close)
            if _breaks(text, holder.start, last.begin):
                inner = self._indent(last.begin)
        new = "" if isinstance(part, Named) else f"{_json(part)}: "
        new += self._written(value, spread, inner)
        if spread:
            new = f"{self._newline}{inner}{new}"
        if last is None:
            end = f"{self._newline}{outer}" if spread else ""
            return [(content, close, new + end)]
        new = new if spread else f" {new}"
        if last.comma is not None:
            return [(content, content, f"{new},")]
        if content == last.end:
            return [(content, content, f",{new}")]
        return [(last.end, last.end, ","), (content, content, new)]  # a comment is between them

    @property
    def _newline(self) -> str:
        found = _EOL.search(self.text)
        return found[0] if found else "\n"

    @property
    def _unit(self) -> str:
        """Return one step of indent: that of the first key, or two spaces."""
        root = self._root
        if not root.entries or not _breaks(self.text, root.start, root.entries[0].begin):
            return "  "
        inner = self._indent(root.entries[0].begin)
        return inner.removeprefix(self._indent(root.start)) or "  "

    def _is_spread(self, offset: int) -> bool:
        """Say whether what begins here goes over several lines: where others did before it."""
        return offset == self._root.start or _breaks(self.text, self._root.start, offset)

    def _indent(self, offset: int) -> str:
        """Return the space that the line of an offset begins with."""
        begin = max(self.text.rfind("\n", 0, offset), self.text.rfind("\r", 0, offset)) + 1
        found = re.compile(r"[ \t]*").match(self.text, begin or len(_mark_of_order(self.text)))
        return found[0] if found else ""

    def _written(self, value: Any, spread: bool, indent: str) -> str:
        text = _json(value, self._unit if spread else None)
        return text.replace("\n", self._newline + indent)


def undone(text: str, splices: Sequence[Splice]) -> str:
    """
    Return a text as it was before these splices, if they were the last that was done to it.

    Raises:
        ValueError: What they inserted is not there. Of what only took something out nothing can
            be seen; who may have another text compares it first.
    """
    for one in reversed(splices):
        if one.start < 0 or not text.startswith(one.inserted, one.start):
            raise ValueError("not what was inserted")
        text = text[: one.start] + one.removed + text[one.start + len(one.inserted) :]
    return text


def shown(text: str, plain: Sequence[str]) -> str:
    """
    Return a text for people, line by line, without what may be somebody's secret.

    Args:
        text: JSON as `Document` reads it.
        plain: The strings that may be shown; names of keys always are. Of others and of comments
            an ellipsis is left.
    """
    out, known, follows = [], set(plain), ""
    for kind, start, end in reversed(list(_pieces(text))):
        piece = text[start:end]
        if kind == "comment":
            body = re.sub(r"[^\r\n]+", "…", piece[2:-2])
            out.append("// …" if piece.startswith("//") else f"/* {body} */")
        elif kind == "string" and follows != ":" and json.loads(piece) not in known:
            out.append('"…"')
        else:
            out.append(piece)
        if kind not in ("space", "comment"):
            follows = piece
    return "".join(reversed(out))


def _json(value: Any, indent: str | None = None) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # UTF-8 has no such


def _named(part: Part, value: Any) -> Any:
    return {"name": part.name, **value} if isinstance(part, Named) else value


def _holding(path: Path, value: Any) -> Any:
    """Return what is put where the first part of a path goes: the value, in what holds it."""
    for holder, part in zip(path[-2::-1], path[:0:-1], strict=True):
        value = _named(holder, [value] if isinstance(part, Named) else {part: value})
    return value


def _find(node: _Node, part: Part) -> _Node | None:
    """Return the entry that counts, which is the last of its name."""
    for entry in reversed(node.entries):
        if isinstance(part, Named):
            value = entry.value
            if node.opening == "[" and isinstance(value, dict) and value.get("name") == part.name:
                return entry
        elif node.opening == "{" and entry.key == part:
            return entry
    return None


def _check_holds(text: str, node: _Node, part: Part, path: Path) -> None:
    if node.opening != ("[" if isinstance(part, Named) else "{"):
        name = ".".join(one if isinstance(one, str) else one.name for one in path)
        expected = "a list, [ … ]" if isinstance(part, Named) else "an object, { … }"
        raise SettingsInvalid(text, node.start, f"{name}: expected {expected}")


def _removal(text: str, holder: _Node, entry: _Node) -> list[tuple[int, int, str]]:
    """Return the splices that take an entry out, with one comma and the line that it has alone."""
    index = next(number for number, one in enumerate(holder.entries) if one is entry)
    start, end, comma = entry.begin, entry.end, entry.comma
    if comma is None and index:  # the last one takes the comma before it
        comma = holder.entries[index - 1].comma
    others = []
    if comma is not None:
        between = text[end:comma] if comma >= end else text[comma + 1 : start]
        if between.strip():
            others = [(comma, comma + 1, "")]
        else:
            start, end = min(start, comma), max(end, comma + 1)
    left, right = text[holder.start + 1 : start], text[end : holder.end - 1]
    if not (left + right).strip():
        return [(holder.start + 1, holder.end - 1, "")]
    before = start - (len(left) - len(left.rstrip(" \t")))
    after = end + (len(right) - len(right.lstrip(" \t")))
    line_end = _EOL.match(text, after)
    if line_end and text[before - 1] in "\r\n":
        start, end = before, line_end.end()
    elif line_end or after == holder.end - 1:
        start = before
    else:
        end = after
    return [*others, (start, end, "")]


def _breaks(text: str, start: int, end: int) -> bool:
    return _EOL.search(text, start, end) is not None


def _mark_of_order(text: str) -> str:
    return _MARK_OF_ORDER if text.startswith(_MARK_OF_ORDER) else ""


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """
    Yield all tokens, space and comments too: kind, start, end.

    Raises:
        SettingsInvalid: Something is none.
    """
    offset = len(_mark_of_order(text))
    if offset:
        yield "space", 0, offset
    while offset < len(text):
        match = _TOKEN.match(text, offset)
        if match is None:
            raise _not_a_token(text, offset)
        yield match.lastgroup or "", offset, match.end()
        offset = match.end()


def _not_a_token(text: str, offset: int) -> SettingsInvalid:
    if text.startswith("/*", offset):
        return SettingsInvalid(text, offset, "a comment that does not end")
    if found := re.compile(_OPEN_STRING).match(text, offset):
        wrong = text[found.end() : found.end() + 1]
        if wrong == "\\":
            return SettingsInvalid(text, found.end(), "an escape that JSON does not have")
        if wrong not in ("", "\r", "\n"):
            return SettingsInvalid(text, found.end(), "a character that must be escaped")
        return SettingsInvalid(text, offset, "a text that does not end on its line")
    return SettingsInvalid(text, offset, "not JSON")


def _parse_object(text: str) -> _Node:
    root = _parse(text)
    if root.opening != "{":
        raise SettingsInvalid(text, root.start, "expected an object, { … }")
    return root


def _parse(text: str) -> _Node:
    """
    Read a document, without recursion.

    Raises:
        SettingsInvalid: It is not JSON, comments and trailing commas aside, or too deep.
    """
    top = _Node(0, 0, 0)
    held = [top]  # what is open; the first holds the document
    key, begin, want = None, 0, "value"
    for kind, start, end in _pieces(text):
        holder = held[-1]
        if kind == "space":
            continue
        if kind == "comment":
            holder.content = end
            continue
        word = text[start:end]
        if want == "end":
            raise SettingsInvalid(text, start, "something after the end")
        if want == "colon":
            if word != ":":
                raise SettingsInvalid(text, start, "expected a colon")
            want = "value"
        elif word == _CLOSING.get(holder.opening) and key is None:
            holder.end = end
            values = [one.value for one in holder.entries]
            holder.value = values
            if holder.opening == "{":
                holder.value = dict(zip((one.key for one in holder.entries), values, strict=True))
            held.pop()
            want = "comma" if len(held) > 1 else "end"
        elif want == "comma":
            if word != ",":
                expected = _CLOSING[holder.opening]
                raise SettingsInvalid(text, start, f"expected a comma or {expected}")
            holder.entries[-1].comma = start
            want = "key" if holder.opening == "{" else "value"
        elif want == "key":
            if kind != "string":
                raise SettingsInvalid(text, start, "expected a key in quotes")
            key, begin, want = json.loads(word), start, "colon"
        elif kind == "mark" and word not in _CLOSING:
            raise SettingsInvalid(text, start, "expected a value")
        else:
            node = _Node(start if key is None else begin, start, end, key)
            holder.entries.append(node)
            key, want = None, "comma" if len(held) > 1 else "end"
            if kind == "mark":
                if len(held) > DEEPEST:
                    raise SettingsInvalid(text, start, f"nested more than {DEEPEST} deep")
                node.opening, node.content = word, end
                held.append(node)
                want = "key" if word == "{" else "value"
            elif kind == "string":
                node.value = json.loads(word)
            else:
                node.value = _WORDS[word] if kind == "word" else Number(word)
        held[-1].content = end
    if want != "end":
        raise SettingsInvalid(text, len(text), "ends too early")
    return top.entries[0]
