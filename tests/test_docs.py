"""What the documentation says is so: keys and defaults, examples, commands, statuses, links."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from keybroker.cli.base import COMMANDS, keybroker
from keybroker.config import CACHE, GENERAL, PROFILE, SOURCES, parse
from keybroker.document import Where
from keybroker.errors import CLASSES
from keybroker.fields import Field, show_duration

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("systemd", "launchd")),
]
CONFIGURATION = ROOT / "docs" / "configuration.md"
EXIT_STATUS = ROOT / "docs" / "exit-status.md"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(keybroker [^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks of these languages."""
    for found in FENCED.finditer(text):
        if found[1] in languages:
            yield found[2]


# configuration.md


def tables(text: str) -> Mapping[str, Mapping[str, list[str]]]:
    """Return the cells after each key of a table, by the heading that the table stands under."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif row := re.match(r"\| `(\w+)` \| (.*) \|$", line):
            cells = [cell.strip() for cell in row[2].split(" | ")]
            found.setdefault(heading, {})[row[1]] = cells
    return found


def written_default(field: Field) -> str:
    """Return a key's default as the page has it."""
    if field.required:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, timedelta):
        return "60s" if field.default == timedelta(minutes=1) else show_duration(field.default)
    if isinstance(field.default, str):
        return str(field.default)
    return json.dumps(field.default)


HEADINGS: dict[str, Mapping[str, Field]] = {
    "Top level": GENERAL,
    "`[cache]`": CACHE,
    "`[profiles.<name>]`": PROFILE,
    **{f'`[profiles.<name>.source]` with `type = "{kind}"`': SOURCES[kind] for kind in SOURCES},
}
IN_WORDS = {  # defaults that depend on something else
    "hold": "the longer of `15m` and 3 x `helper_ttl` + `10m`",
    "url": "scheme and host of `base_url`",
}


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_key_is_described_with_its_default(heading: str) -> None:
    """No key is missing, none is invented, and the defaults are those of the code."""
    rows = tables(CONFIGURATION.read_text())[heading]
    fields = HEADINGS[heading]
    if heading == "`[profiles.<name>]`":  # the ways to verify have a table of their own there
        rows = {name: cells for name, cells in rows.items() if len(cells) == 3}

    assert list(rows) == list(fields)
    for name, (_, default, _) in rows.items():
        assert default.strip("`") == IN_WORDS.get(name, written_default(fields[name])).strip("`")


# Examples


def examples() -> list[tuple[str, str]]:
    return [(named(page), text) for page in PAGES for text in blocks(page.read_text(), "toml")]


@pytest.mark.parametrize(("page", "text"), examples())
def test_every_example_is_a_valid_configuration(page: str, text: str) -> None:
    """What is copied from a page works."""
    parse(tomllib.loads(text), Where({}, page))


def test_there_are_examples() -> None:
    assert {page for page, _ in examples()} >= {"README.md", "docs/configuration.md"}


def test_settings_are_valid_json() -> None:
    """The lines for settings.json can be pasted."""
    found = [json.loads(text) for text in blocks((ROOT / "README.md").read_text(), "json")]
    assert [sorted(one) for one in found] == [["apiKeyHelper", "env"]]


# Commands


def command_lines(text: str) -> Iterator[str]:
    """Yield what a page tells to type, in its blocks and in its sentences."""
    for block in blocks(text, "", "sh"):
        for line in block.splitlines():
            typed = line.removeprefix("$ ")
            if typed.startswith("keybroker "):
                yield typed
    for found in INLINE.finditer(FENCED.sub("", text)):
        yield found[1].replace("\\|", "|")


def check_line(line: str) -> None:
    """
    Parse a command line as the program does, and run nothing.

    Raises:
        click.UsageError: There is no such command or option.
    """
    words = shlex.split(line, comments=True)[1:]
    for end in ("|", ">", ";"):
        words = words[: words.index(end)] if end in words else words
    command: click.Command = keybroker
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        context = click.Context(command)
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]}")
        command, words = found, words[1:]
    if not words:
        return
    try:
        command.make_context(command.name, words).close()
    except click.exceptions.Exit:  # --help, --version
        return


def all_lines() -> list[tuple[str, str]]:
    return [(named(page), line) for page in PAGES for line in command_lines(page.read_text())]


@pytest.mark.parametrize(("page", "line"), sorted(set(all_lines())))
def test_every_command_line_can_be_typed(
    page: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command exists, and so do its options."""
    check_line(line)


@pytest.mark.parametrize(
    "line", ["keybroker gett", "keybroker get --now", "keybroker config chek", "keybroker get a b"]
)
def test_a_line_that_cannot_be_typed_is_seen(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_line(line)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_mentioned(command: str) -> None:
    """README.md has a word on each."""
    assert f"`keybroker {command}`" in (ROOT / "README.md").read_text()


# Statuses


def test_every_error_is_in_the_table_with_its_status() -> None:
    """docs/exit-status.md has a line for each class, with the status of the code."""
    said = {
        name: int(status)
        for names, status in re.findall(
            r"^\| (`\w+Error`.*|`\w+`.*) \| (\d+) \|$", EXIT_STATUS.read_text(), re.MULTILINE
        )
        for name in re.findall(r"`(\w+)`", names)
    }
    assert said == {kind.__name__: kind.exit_status for kind in CLASSES.values()}


def test_every_status_is_explained() -> None:
    """So are those that click and the shell know."""
    rows = re.findall(r"^\| (\d+) \| (.+) \| .* \|$", EXIT_STATUS.read_text(), re.MULTILINE)
    used = {kind.exit_status for kind in CLASSES.values()}
    assert {int(status) for status, _ in rows} == used | {0, 2, 130, 141}


# Links


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links() -> list[tuple[str, str]]:
    return [
        (named(page), link)
        for page in PAGES
        for link in LINK.findall(FENCED.sub("", page.read_text()))
        if not link.startswith("https://")
    ]


@pytest.mark.parametrize(("page", "link"), links())
def test_every_link_leads_somewhere(page: str, link: str) -> None:
    """To a file of this repository, and to a heading that it has."""
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.is_file()
    assert not anchor or anchor in anchors(target.read_text())


def test_every_page_that_the_code_names_is_there() -> None:
    """A hint that says where to read on is kept."""
    sources = [*(ROOT / "keybroker").rglob("*.py"), ROOT / "pyproject.toml"]
    pages = {page for file in sources for page in re.findall(r"docs/[\w-]+\.md", file.read_text())}
    assert pages
    assert {page for page in pages if not (ROOT / page).is_file()} == set()


def test_every_page_is_linked_from_the_readme() -> None:
    said: Any = {link.partition("#")[0] for page, link in links() if page == "README.md"}
    assert {named(page) for page in PAGES if page.parent.name == "docs"} <= said
