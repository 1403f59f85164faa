"""TOML files that only their owner can write, and the place of every key in them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker import document
from keybroker.document import LARGEST_FILE, Where, key_lines, read
from keybroker.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a configuration goes, in a folder of its owner's."""
    folder = tmp_path / "keybroker"
    folder.mkdir(mode=0o700)
    return folder / "config.toml"


def write(file: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(mode)
    return file


def refused(*files: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        read(files)
    return error.value


def test_files_that_are_not_there_say_nothing(file: Path) -> None:
    """No file is no document; it is not an error to have none."""
    document = read([file, file.with_name("other.toml")])

    assert (document.tables, document.files) == ({}, ())


def test_later_files_are_merged_over_earlier_ones(tmp_path: Path) -> None:
    """Tables key by key, so that a user adds to what the system has."""
    system = write(tmp_path / "system.toml", "[profiles.work]\na = 1\nb = 2\n[cache]\nkey = 'x'\n")
    user = write(tmp_path / "user.toml", "[profiles.work]\nb = 3\n[profiles.home]\nc = 4\n")

    document = read([system, tmp_path / "absent.toml", user])

    assert document.tables == {
        "profiles": {"work": {"a": 1, "b": 3}, "home": {"c": 4}},
        "cache": {"key": "x"},
    }
    assert document.files == (system, user)


@pytest.mark.parametrize("name", document.WHOLE)
def test_a_place_is_replaced_as_a_whole(tmp_path: Path, name: str) -> None:
    """Half of one source and half of another would send a key to the wrong place."""
    system = write(tmp_path / "system.toml", f"[profiles.work.{name}]\ntype = 'a'\nadmin = 'b'\n")
    user = write(tmp_path / "user.toml", f"[profiles.work.{name}]\ntype = 'c'\n")

    assert read([system, user]).tables == {"profiles": {"work": {name: {"type": "c"}}}}


def test_a_key_that_was_replaced_has_its_new_place(tmp_path: Path) -> None:
    """What is said about a key names the file that has it, not one that it was replaced in."""
    system = write(
        tmp_path / "system.toml",
        "[profiles.work]\nkept = 1\n[profiles.work.source]\ntype = 'a'\nlifetime = 'b'\n",
    )
    user = write(tmp_path / "user.toml", "\n[profiles.work.source]\ntype = 'c'\n")

    where = read([system, user]).where
    source = ("profiles", "work", "source")

    assert where.error(("profiles", "work", "kept"), "p").message == (
        f"{system}:2: profiles.work.kept: p"
    )
    assert where.error((*source, "type"), "p").message == f"{user}:3: profiles.work.source.type: p"
    assert where.error((*source, "lifetime"), "p").message == (
        f"{user}:2: profiles.work.source.lifetime: p"
    )


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o1666])
def test_a_file_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    """Who can write it decides where keys are sent; the command that mends it is said."""
    error = refused(write(file, "", mode))

    assert (error.message, error.hint) == (
        f"{file}: others can write it",
        f"type: chmod go-w {file}",
    )


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    """Who can write the folder can put another file in its place."""
    write(file, "")
    file.parent.chmod(mode)

    error = refused(file)

    assert (error.message, error.hint) == (
        f"{file.parent}: others can write it",
        f"type: chmod go-w {file.parent}",
    )


def test_a_sticky_folder_is_taken(file: Path) -> None:
    """In /tmp others cannot replace a file of ours."""
    write(file, "a = 1")
    file.parent.chmod(0o1777)

    assert read([file]).tables == {"a": 1}


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644])
def test_a_file_that_others_can_only_read_is_taken(file: Path, mode: int) -> None:
    """No secret is in it."""
    assert read([write(file, "a = 1", mode)]).tables == {"a": 1}


def test_a_folder_in_the_file_s_place_is_refused(file: Path) -> None:
    """What cannot be read is said with the system's reason."""
    file.mkdir()

    assert refused(file).message == f"{file}: cannot be read (Is a directory)"


def test_a_huge_file_is_refused(file: Path) -> None:
    """A megabyte is more than anyone configures."""
    write(file, b"#" * (LARGEST_FILE + 1))

    assert refused(file).message == f"{file}: larger than 1 MiB"


def test_bytes_that_are_not_text_are_named_by_line(file: Path) -> None:
    """UTF-8 is what TOML is written in."""
    assert refused(write(file, b"a = 1\nb = '\xff'\n")).message == f"{file}:2: not UTF-8"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = = 2\n", 2),
        ("a = 1\na = 2\n", 2),
        ("a = 1\n\n[a]\n", 3),
        ('a = 1\nb = "never ends\n', 2),
        ("a = 1\nb = [1,\n", 3),
        ('"sk-canary-9876" = 1\n"sk-canary-9876" = 2\n', 2),
        ("sk-canary-9876\n", 1),
        ("a = sk-canary-9876\n", 1),
        ('a = "\\sk-canary-9876"\n', 1),
        ('[sk-canary-9876]\n["sk-canary-9876"]\n', 2),
        ('x = {"sk-canary-9876" = 1, "sk-canary-9876" = 2}\n', 1),
        ("a = 1\nb = " + "9" * 5000 + "\n", None),
        ("a = " + "[" * 100_000, None),
    ],
)
def test_a_syntax_error_is_named_by_line_and_quotes_nothing(
    file: Path, text: str, line: int | None
) -> None:
    """The parser's words stay, the file's text does not: it may be a key that was pasted."""
    message = refused(write(file, text)).message

    assert message.startswith(f"{file}:{line or ''}")
    assert "canary" not in message
    assert len(message.removeprefix(str(file))) < 100


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("profiles", "work", "hold"), "c.toml:4: profiles.work.hold: p"),
        (("profiles", "work", "source", "type"), "c.toml:3: profiles.work.source.type: p"),
        (("default",), "c.toml: default: p"),
        ((), "c.toml: p"),
        (("profiles", "sk-canary"), "c.toml: profiles.…: p"),
        (("x" * 41,), "c.toml: …: p"),
        (("3f9A1c02",), "c.toml: …: p"),
        (("two\nlines",), "c.toml: …: p"),
    ],
)
def test_an_error_names_the_nearest_known_place(path: tuple[str, ...], said: str) -> None:
    """The key's own line, else its table's, else the file; a key that may be a secret is not
    shown."""
    where = Where(
        {("profiles", "work"): "c.toml:3", ("profiles", "work", "hold"): "c.toml:4"}, "c.toml"
    )

    assert where.error(path, "p").message == said


DOCUMENTS = {
    "plain": (
        'default = "work"\n\n[profiles.work]\nhold = "15m"\n',
        {("default",): 1, ("profiles", "work"): 3, ("profiles", "work", "hold"): 4},
    ),
    "quoted and dotted": (
        '# c\na."b c".d = 1\n\'e.f\'.g = 2\n["h.i".j]\nk = 3\n"l\\"m" = 4\n',
        {
            ("a", "b c", "d"): 2,
            ("e.f", "g"): 3,
            ("h.i", "j"): 4,
            ("h.i", "j", "k"): 5,
            ("h.i", "j", 'l"m'): 6,
        },
    ),
    "headers with odd characters": (
        "['a#b'] # c\nx = 1\n[ \"c]d\" . e ]\nx = 2\n",
        {("a#b",): 1, ("a#b", "x"): 2, ("c]d", "e"): 3, ("c]d", "e", "x"): 4},
    ),
    "multi-line strings": (
        'a = """\nb = 1\n[c]\n\\""" d = 2\n"""\ne = 3\nf = \'\'\'\ng = """4\n\'\'\'\nh = 5\n',
        {("a",): 1, ("e",): 6, ("f",): 7, ("h",): 10},
    ),
    "quotes within quotes and comments": (
        'a = "\'\'\'"\nb = 1 # """ and \'\'\'\nc = \'"""\'\nd = """"two"""""\ne = 2\n',
        {("a",): 1, ("b",): 2, ("c",): 3, ("d",): 4, ("e",): 5},
    ),
    "arrays of tables": (
        "[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n",
        {("a",): 1, ("a", "b"): 2, ("a", "c"): 5, ("a", "c", "d"): 6},
    ),
    "arrays over many lines": (
        'a = [\n  ["b"],\n  ["c"]\n]\nd = [ # [\n  "e = 1",\n  { f = 2 },\n]\ng = 3\n',
        {("a",): 1, ("d",): 5, ("g",): 9},
    ),
    "inline tables": (
        'a = { b = { c = 1 }, d = "}" }\ne = 2\n',
        {("a",): 1, ("e",): 2},
    ),
    "odd line ends": (
        'a = "\u2028\x85"\r\nb = 2\r\n[c]\r\nd = 3\r\n',
        {("a",): 1, ("b",): 2, ("c",): 3, ("c", "d"): 4},
    ),
    "empty": ("", {}),
}


@pytest.mark.parametrize(("text", "lines"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_keys_are_found_where_they_are(text: str, lines: dict[tuple[str, ...], int]) -> None:
    """Every key that begins a line, by its path; nothing that only looks like one."""
    tomllib.loads(text)

    assert key_lines(text) == lines


NAMES = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(['"', "'", "'''", '"""', "[", "]]", "#", "a.b", " ", "=", "\\", ""]),
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(['"""', "'''", "[a]\nb = 1", "# no", "x = 1\n", "]", "\\", '"']),
)
LEAVES = st.one_of(
    st.booleans(), st.integers(-99, 99), TEXTS, st.lists(TEXTS, max_size=3), st.just({"x": "="})
)
TABLES = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(LEAVES, inner), max_size=4),
    max_leaves=12,
)


class Writer:
    """Writes nested tables as TOML in one of its many ways, and notes where it put each key."""

    def __init__(self, draw: st.DataObject) -> None:
        self.lines: list[str] = []
        self.places: dict[tuple[str, ...], int] = {}
        self._draw = draw

    def table(self, path: tuple[str, ...], values: Mapping[str, Any]) -> None:
        """Write the values that are no tables first, as TOML wants it."""
        tables = {k: v for k, v in values.items() if isinstance(v, dict) and v != {"x": "="}}
        for name, value in values.items():
            if name not in tables:
                self._noise()
                self.places[(*path, name)] = self._line()
                self._write(f"{self._key(name)}{self._space()}= {self._value(value)}")
        for name, inner in tables.items():
            self._noise()
            self.places[(*path, name)] = self._line()
            header = f"{self._space()}.{self._space()}".join(map(self._key, (*path, name)))
            self._write(f"{self._space()}[{self._space()}{header}{self._space()}]")
            self.table((*path, name), inner)

    def _line(self) -> int:
        return 1 + sum(text.count("\n") + 1 for text in self.lines)

    def _write(self, text: str) -> None:
        self.lines.append(text + self._one_of("", "  ", " # [c] = '''", '\t# """'))

    def _noise(self) -> None:
        self.lines += self._one_of([], [""], ["# a = 1 [b] '''"], ["", '  # """'])

    def _key(self, name: str) -> str:
        ways = [quoted(name)]
        if name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name):
            ways.append(name)
        if literal(name):
            ways.append(f"'{name}'")
        return self._one_of(*ways)

    def _value(self, value: Any) -> str:
        if isinstance(value, dict):
            return '{ x = "=" }'
        if isinstance(value, list):
            gap = self._one_of(" ", "\n  ", " # ]\n")
            return f"[{gap}" + "".join(f"{self._value(v)},{gap}" for v in value) + "]"
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        ways = [quoted(value), f'"""\n{quoted(value)[1:-1]}"""', f'"""{lines_kept(value)}"""']
        if literal(value):
            ways += [f"'{value}'", f"'''\n{value}'''"]
        return self._one_of(*ways)

    def _space(self) -> str:
        return self._one_of("", " ", "\t")

    def _one_of(self, *ways: Any) -> Any:
        return self._draw.draw(st.sampled_from(ways))


def quoted(text: str) -> str:
    """Write a basic string; JSON escapes all that TOML forbids but DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def lines_kept(text: str) -> str:
    """Write what goes into a multi-line string, its line ends as they are."""
    return "\n".join(quoted(line)[1:-1] for line in text.split("\n"))


def literal(text: str) -> bool:
    return "'" not in text and all(c.isprintable() for c in text)


def paths(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict) and value != {"x": "="}:
            yield from paths(value, (*above, name))


@given(TABLES, st.data())
def test_every_key_of_every_document_is_found(values: dict[str, Any], data: st.DataObject) -> None:
    """However a document is written, each key is found in the line where it was put."""
    writer = Writer(data)
    writer.table((), values)
    text = "\n".join(writer.lines)

    assert set(paths(values)) == set(writer.places)
    assert set(paths(tomllib.loads(text))) == set(writer.places)
    assert key_lines(text) == writer.places


def test_what_was_read_ahead_is_read_once(tmp_path: Path) -> None:
    """It is the same as without; a file that was written since is read anew."""
    file = tmp_path / "config.toml"
    file.write_text('default = "work"\n')
    document.read_ahead([file])
    [known] = [one for _, one in document._ahead.values()]
    assert document.read([file]) is known
    assert document._ahead == {}
    assert document.read([file]) is not known
    document.read_ahead([file])
    file.write_text('default = "other"\n')
    assert document.read([file]).tables == {"default": "other"}
