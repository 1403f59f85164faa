"""What the documentation says is so: keys and defaults, examples, commands, statuses, links."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from keybroker import aws, client, daemon, guidance, paths, push, server, sessions, starting, wire
from keybroker.cli.base import COMMANDS, keybroker
from keybroker.config import (
    CACHE,
    CLAUDE,
    GENERAL,
    HOOKS,
    PROFILE,
    PUBLISH,
    SERVICE,
    SOURCES,
    parse,
)
from keybroker.connect.line import NATIVE, helper_line
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import CLASSES
from keybroker.fields import Field, show_duration
from keybroker.log import LARGEST
from keybroker.login_types import COMMON, LOGINS
from keybroker.pool import PASSED_ON
from keybroker.vault import AUTH, PLACE
from tests.resident import Resident

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("systemd", "launchd")),
]
README = ROOT / "README.md"
DAEMON = ROOT / "docs" / "daemon.md"
PYTHON = ROOT / "docs" / "python.md"
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
    "`[hooks]`": HOOKS,
    "`[service]`": SERVICE,
    "`[profiles.<name>]`": PROFILE,
    "`[profiles.<name>.claude]`": CLAUDE,
    **{
        f'`[profiles.<name>.source]` with `type = "{kind}"`': {
            name: one for name, one in fields.items() if name not in PLACE or kind != "vault"
        }
        for kind, fields in SOURCES.items()
    },
    **{
        f'`[profiles.<name>.publish]` with `to = "{kind}"`': {
            name: one for name, one in fields.items() if name not in PLACE or kind != "vault"
        }
        for kind, fields in PUBLISH.items()
    },
    "`[logins.<name>]`": COMMON,
    **{
        f'`[logins.<name>]` with `type = "{kind}"`': {
            name: one for name, one in fields.items() if name not in COMMON
        }
        for kind, fields in LOGINS.items()
    },
    "`[aws]`": aws.PLACE,
    "`[vault]`": PLACE,
    **{f'`[vault.auth]` with `method = "{method}"`': one for method, one in AUTH.items() if one},
}
IN_WORDS = {  # defaults that depend on something else
    "hold": "the longer of `15m` and 3 x `helper_ttl` + `10m`",
    "url": "scheme and host of `base_url`",
    "openai_base_url": "`base_url` with `/v1`",
    **{f"{kind}_url": "`base_url`" for kind in ("bedrock", "vertex", "foundry", "aws")},
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
        written = written_default(fields[name])
        if written == "none":
            written = IN_WORDS.get(name, written)
        assert default.strip("`") == written.strip("`")


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


def options(command: click.Command, words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each option, in its longest form, after the command that it is for."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from options(found, [*words, name])
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:  # those are for our helper
            yield " ".join(words), max(option.opts, key=len)


ALL_OPTIONS = list(options(keybroker, []))
IN_GENERAL = {"--json", "--dry-run", "--profile"}  # README.md says which commands have them


@pytest.mark.parametrize(("command", "option"), ALL_OPTIONS)
def test_every_option_is_mentioned(command: str, option: str) -> None:
    """Some page shows it, with its command; those that many commands have are said once."""
    if option in IN_GENERAL:
        assert option in README.read_text()
        return
    shown = [line.split() for _, line in all_lines()]
    assert any(words[1:].count(option) and command in " ".join(words) for words in shown)


# settings.json


def test_the_readme_shows_the_line_that_connect_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word but for the places, which are another machine's; of either helper."""
    monkeypatch.setattr(sysconfig, "get_path", {"scripts": str(tmp_path)}.get)
    [settings] = [json.loads(text) for text in blocks(README.read_text(), "json")]
    environment = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    shown, reference = settings["apiKeyHelper"], helper_line("work", environment)
    place = re.compile(r"'[^']*(/bin)/[^']*'|'[^']*(/keybroker/helper\.py)'")
    [said] = re.findall(r"`(exec '…[^`]*)`", README.read_text())
    assert place.sub(r"\1\2", reference) == place.sub(r"\1\2", said)

    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", {"scripts": str(tmp_path / "bin")}.get)
    (tmp_path / "bin" / NATIVE).touch(0o700)
    printed = helper_line("work", environment)
    socket = re.escape("/run/user/1000/keybroker/s")
    words = re.compile(rf"exec '/[^']*/bin/keybroker-key' '{socket}' 'work' '/[^']*/bin/python3?'")
    assert words.fullmatch(shown)
    assert words.fullmatch(printed)


# The daemon


def test_every_signal_and_operation_is_named() -> None:
    """docs/daemon.md has the signals, docs/how-it-works.md what can be asked on the socket."""
    signals = re.findall(r"SIG[A-Z]+", DAEMON.read_text())
    assert set(signals) == {number.name for number in daemon._Signals.NUMBERS}

    source = Path(daemon.__file__).read_text().partition("operations = {")[2].partition("}")[0]
    operations = set(re.findall(r'^ +"(\w+)": self\._\w+,$', source, re.MULTILINE))
    assert operations >= {"status", "stop", "reload"}
    page = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())
    said = page.partition("Operations: ")[2].partition(", which gives")[0]
    assert set(re.findall(r"`(\w+)`", said)) == operations


def test_every_file_is_named() -> None:
    """docs/daemon.md says where each file is that a daemon keeps."""
    rows = re.findall(r"^\| (`.*`) \| .* \|$", DAEMON.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named >= {
        paths.SOCKET,
        paths.OWNER_LOCK,
        starting.LOG,
        f"{starting.LOG}.1",
        push.RECORD,
        guidance.JSON,
        guidance.ENV,
        guidance._name("<profile>"),
    }


def test_every_variable_that_is_kept_is_named() -> None:
    """The list in docs/daemon.md is that of the code; proxies go by one word."""
    said = DAEMON.read_text().partition("## Its environment")[2].partition("\n## ")[0]
    listed = [line for line in said.splitlines() if line.startswith("- ")]
    named = set(re.findall(r"`([A-Z_]{2,})`", "\n".join(listed)))
    kept = {name for name in (*PASSED_ON, *starting._OURS) if "PROXY" not in name.upper()}
    assert named == kept
    assert "the proxy variables" in said


@pytest.mark.parametrize(
    "limit",
    [
        f"{server.MOST_CLIENTS:,}, or as many",
        f"{server.LATE_SECONDS:.0f} s; the oldest",
        f"{wire.LONGEST_REQUEST:,} bytes",
        f"{wire.LONGEST_KEY:,} characters",
        f"remembered | {sessions.MOST_SESSIONS:,}",
        f"at most {daemon.MOST_WATCHERS} may watch",
        f"at most {push.MOST_DIRECTORIES} folders",
        f"room for {paths.LONGEST_SOCKET_PATH} bytes",
        f"gets {daemon.STOP_SECONDS:.0f} s",
        f"{daemon.TURN_SECONDS:.0f} s kills it",
        f"within {push.APART_SECONDS:.0f} s",
        f"min, doubling up to {daemon.UNLOCK_SECONDS[1] / 3600:.0f} h",
        f"larger than {LARGEST >> 20} MiB",
    ],
)
def test_limits_are_those_of_the_code(limit: str) -> None:
    assert limit.lower() in " ".join(DAEMON.read_text().split()).lower()


def test_the_readme_claims_no_times() -> None:
    """What is fast and small is in the table that the benchmarks write, and nowhere else."""
    text = FENCED.sub("", README.read_text())
    text = re.sub(r"<!-- figures.*?<!-- and here -->", "", text, flags=re.DOTALL)
    assert re.findall(r"\b\d[\d.,]* ?(?:ms|µs|MB|MiB|times (?:as|faster)\b)", text) == []


# Python


def test_the_python_example_works(resident: Resident) -> None:
    """It is run as it is written, with a daemon and a gateway."""
    [example] = blocks(PYTHON.read_text(), "python")
    with DevGateway() as gateway:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(
            f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
            'type = "litellm"\nadmin = { env = "ADMIN" }\n'
        )
        resident.start()
        done = subprocess.run(
            [sys.executable, "-c", example],
            env=resident.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert re.fullmatch(r"<secret [0-9a-f]{8}> 200\n", done.stdout), done.stderr


def test_every_function_for_python_is_described() -> None:
    """docs/python.md has a line for each, and for each error that it can raise."""
    public = {
        name
        for name, one in vars(client).items()
        if callable(one) and getattr(one, "__module__", "") == client.__name__ and name[0] != "_"
    }
    rows = re.findall(r"^\| `([\w.]+)", PYTHON.read_text(), re.MULTILINE)
    errors = {kind.__name__ for kind in client._BY_STATUS.values()} | {"ValueError"}
    assert {name.removeprefix("client.") for name in rows} == public | errors


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
    assert {int(status) for status, _ in rows} == used | {0, 2, 126, 127, 130, 141}


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
