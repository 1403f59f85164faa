"""Manual pages, one for each command, from what its `--help` says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from keybroker import __version__
from keybroker.cli.base import COMMANDS, keybroker

WIDTH = 76
COMMON = """
.SH EXIT STATUS
.TP
.B 0
It worked.
.TP
.B 2
The command line is wrong.
.TP
.B 69
Nobody here can answer.
.TP
.B 75
Not now; trying again may help.
.TP
.B 77
Refused; trying again does not help.
.TP
.B 78
The configuration is missing or wrong.
.PP
Others are rare, and say on stderr what they mean.
"""
PLACES = """
.SH FILES
.TP
.I /etc/keybroker/config.toml\\fR, \\fI~/.config/keybroker/config.toml
The configuration; the second goes over the first.
.TP
.I ~/.local/state/keybroker/
The journal, the audit log, and the keys, sealed.
.TP
.I $XDG_RUNTIME_DIR/keybroker/s
Where the daemon answers.
.SH ENVIRONMENT
.TP
.B KEYBROKER_CONFIG
One file in place of all others.
.TP
.B NO_COLOR
No colours on a terminal.
"""


def write(folder: Path, date: int) -> None:
    """
    Write the pages of all commands into a folder.

    Args:
        date: What they are dated, in seconds since 1970.
    """
    day = datetime.fromtimestamp(date, UTC).strftime("%Y-%m-%d")
    for context in commands(opened(keybroker)):
        name = context.command_path.replace(" ", "-")
        (folder / f"{name}.1").write_text(page(context, day))


def commands(context: click.Context) -> Iterator[click.Context]:
    """Yield a command and all below it, but those that are hidden."""
    yield context
    for command in below(context):
        yield from commands(opened(command, context))


def opened(command: click.Command, parent: click.Context | None = None) -> click.Context:
    """Return a command as click has it when it is typed."""
    return click.Context(command, parent, command.name, **command.context_settings)


def below(context: click.Context) -> list[click.Command]:
    """Return a group's commands; a plain command has none."""
    group = context.command
    if not isinstance(group, click.Group):
        return []
    found = (group.get_command(context, name) for name in group.list_commands(context))
    return [command for command in found if command is not None and not command.hidden]


def page(context: click.Context, day: str) -> str:
    """Write the page of one command, in the macros that man and mandoc know."""
    path, command = context.command_path, context.command
    name = path.replace(" ", "-")
    top = context.parent is None
    lines = [
        f'.TH {plain(name.upper())} 1 {day} "keybroker {__version__}" "keybroker"',
        ".nh",  # what may be typed is not broken
        ".ad l",
        ".SH NAME",
        f"{plain(name)} \\- {plain(short(context))}",
        ".SH SYNOPSIS",
        f".B {plain(path)}",
        " ".join(map(placeholders, command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *prose(command.help or ""),
    ]
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    lines.append(".SH OPTIONS")
    for shown, text in filter(None, records):
        if shown.startswith("-"):
            lines += [".TP", placeholders(shown), *wrapped(text)]
    if found := below(context):
        lines.append(".SH COMMANDS")
        for one in found:
            text = wrapped(f"{short(opened(one, context))}.")
            lines += [".TP", f"\\fB{plain(one.name or '')}\\fR", *text]
    lines += (COMMON + (PLACES if top else "")).strip().splitlines()
    others = [f"{name}-{one.name}" for one in found]
    if context.parent is not None:
        others.insert(0, context.parent.command_path.replace(" ", "-"))
    lines += [".SH SEE ALSO", *(f".BR {plain(one)} (1)," for one in others)]
    lines[-1] = lines[-1].rstrip(",")
    return "\n".join(lines) + "\n"


def short(context: click.Context) -> str:
    """Return a command in one line, as the list of commands has it."""
    if context.parent is not None and context.parent.parent is None:
        text = COMMANDS[context.info_name or ""][1]
    else:
        text = (context.command.help or "").partition("\n")[0]
    first = re.split(r"(?<=\w)[.:] ", text, maxsplit=1)[0] if context.parent is None else text
    return first.strip().rstrip(".")


def prose(text: str) -> Iterator[str]:
    r"""Write a help text, whose paragraphs after a `\b` stay as they are."""
    for index, paragraph in enumerate(text.strip().split("\n\n")):
        lines = textwrap.dedent(paragraph).splitlines()
        if lines[:1] == ["\b"]:
            yield from (".PP", ".nf", *map(start, map(plain, lines[1:])), ".fi")
        else:
            yield from (*([".PP"] if index else []), *wrapped(" ".join(lines)))


def wrapped(text: str) -> list[str]:
    """Return a text in lines that an editor shows whole."""
    lines = textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)
    return [start(plain(line)) for line in lines]


def placeholders(text: str) -> str:
    """Write a usage: what is typed bold, what stands for something else slanted."""

    def shown(word: re.Match[str]) -> str:
        face = "B" if word[0].startswith("-") else "I"
        return f"\\f{face}{plain(word[0])}\\fR"

    return re.sub(r"--?[a-z][\w-]*|[A-Z][A-Z_=]+", shown, plain_but_hyphens(text))


def plain(text: str) -> str:
    """Write what troff would take for something of its own as what it is."""
    return plain_but_hyphens(text).replace("-", "\\-")


def plain_but_hyphens(text: str) -> str:
    text = text.replace("\\", "\\e").replace("'", "\\(aq").replace("`", "\\(ga")
    return "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in text)


def start(line: str) -> str:
    """Keep a line that begins with a full stop from being an order."""
    return f"\\&{line}" if line.startswith(".") else line
