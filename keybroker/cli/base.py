"""The command line's frame: which module has which command, how errors are said."""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from errno import ENOSPC
from functools import wraps
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from keybroker import __version__, wire
from keybroker.errors import ConfigError, KeybrokerError, OutputLost, place
from keybroker.fields import read_duration
from keybroker.kernel import close_to_debuggers

COMMANDS = {
    "init": ("init", "Set up a profile: find the gateway, write the configuration, get a key."),
    "login": ("login", "Sign in, once; keys are had with it from then on."),
    "logout": ("login", "Sign out: end the keys that were had with it, then the sign-in."),
    "whoami": ("login", "Show who is signed in where, and until when."),
    "get": ("keys", "Print the current key of a profile, for apiKeyHelper."),
    "rotate": ("keys", "Replace a key now; the old one is revoked after its hold."),
    "revoke": ("keys", "End every key of a profile at once."),
    "sweep": ("keys", "Revoke keys of this installation that no journal knows."),
    "check": ("keys", "Exit 0 if a key has enough time left, else 75."),
    "models": ("models", "List a gateway's models, their tiers and their output limits."),
    "daemon": ("daemon", "Run the daemon, which has keys ready and replaces them in time."),
    "reload": ("daemon", "Have the daemon read its configuration again."),
    "service": ("service", "Have the system keep the daemon running."),
    "status": ("status", "Show every profile's key, what comes next, and what to paste."),
    "verify": ("verify", "Try a profile's key at its gateway, as Claude Code uses it."),
    "run": ("run", "Run a program with a key of its own, which ends with it."),
    "env": ("environment", "Print what a shell has to set and unset; a key only if asked."),
    "statusline": ("status", "Print one short line for Claude Code's status line."),
    "doctor": ("doctor", "Say where requests go, and what is wrong on the way."),
    "connect": ("connect", "Set up Claude Code to use a profile's keys."),
    "disconnect": ("connect", "Take back what connect wrote."),
    "audit": ("audit", "Show who was given which key, and what became of it."),
    "config": ("configuration", "Check, show and describe the configuration."),
    "source": ("source", "Try a source against the real thing."),
    "demo": ("demo", "Watch keys being minted, used, rotated and revoked."),
}


class _NobodyReadsError(Exception):
    """Our stdout is a pipe without a reader; click would make a plain 1 of BrokenPipeError."""


class _Commands(click.Group):
    """Imports a command's module when it is typed, so that --help costs nothing."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            raise _NobodyReadsError from None
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is not tried again at exit
            raise OutputLost("output: cannot be written (No space left on device)") from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = not args or args[0] in COMMANDS or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:  # which is when a shell completes
            from difflib import get_close_matches  # only where something is wrong

            for name in get_close_matches(args[0], COMMANDS, 1):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {name!r}?")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        known = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*known, *click.Command.shell_complete(self, ctx, incomplete)]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"keybroker.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="keybroker")
def keybroker() -> None:
    """Keys for an LLM gateway: minted, verified, handed out, rotated and revoked.

    \b
    keybroker demo      see it work, with a gateway of its own
    keybroker init      set up your own gateway
    keybroker connect   set up Claude Code to use it
    keybroker status    how your keys stand
    """


@dataclass(frozen=True, slots=True)
class Before:
    """What a program that we start gets back: the umask, and how large a core may be."""

    umask: int
    core: int


class Duration(click.ParamType[timedelta]):
    """A duration as the configuration file has it: 90s, 30m, 12h."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        if isinstance(value, timedelta):
            return value
        try:
            return read_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Count(click.ParamType[int]):
    """A whole number, from zero on."""

    name = "count"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            self.fail("expected a whole number", param, ctx)
        return int(text)


def names_of(table: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what completes the names of a table of the configuration."""

    def complete(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        from keybroker.cli.names import names  # only when a shell asks

        return [name for name in names(table, system=is_system()) if name.startswith(incomplete)]

    return complete


profiles = names_of("profiles")
logins = names_of("logins")


def for_profile(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take its profile as an argument or as --profile."""

    @click.argument("profile", required=False, shell_complete=profiles)
    @click.option(
        *("--profile", "named"),
        metavar="PROFILE",
        shell_complete=profiles,
        help="The same as the argument.",
    )
    @wraps(command)
    def with_profile(*rest: Any, profile: str | None, named: str | None, **values: Any) -> None:
        if profile is not None and named is not None:
            raise click.UsageError("the profile is named twice")
        command(*rest, profile=profile or named, **values)

    return with_profile


class _Whose:
    """Which daemon a command is about: the user's own, or that of a shared host."""

    system = False


def use_system() -> None:
    """Have this command be about the daemon of a shared host."""
    if sys.platform != "linux":
        raise ConfigError("--system: the daemon of a shared host needs systemd")
    _Whose.system = True


def is_system() -> bool:
    return _Whose.system


def _of_system(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        use_system()


of_system = click.option(
    "--system",
    is_flag=True,
    expose_value=False,
    callback=_of_system,
    help="Of the daemon of a shared host: docs/service.md.",
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; return the exit status."""
    before = Before(os.umask(0o077), resource.getrlimit(resource.RLIMIT_CORE)[0])
    close_to_debuggers(for_good=arguments[:1] != ["run"])  # this process holds keys
    try:
        status = keybroker.main(
            args=list(arguments), prog_name="keybroker", standalone_mode=False, obj=before
        )
        return status if isinstance(status, int) else 0  # of `click.exceptions.Exit`
    except click.UsageError as error:
        if arguments[:1] == ["get"]:  # one line, whatever happens
            say(
                KeybrokerError(
                    f"get: {error.format_message().rstrip('.')}", hint="keybroker get --help"
                ),
                one_line=True,
            )
        else:
            error.show()
        return 2
    except click.Abort:
        return 130
    except KeybrokerError as error:
        return say(error, one_line=arguments[:1] == ["get"])
    except _NobodyReadsError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # its text may hold a secret; its type does not
        return say(KeybrokerError(f"internal error: {type(error).__name__} at {place(error)}"))


def say(error: KeybrokerError, *, one_line: bool = False) -> int:
    """Write an error to stderr; return its exit status."""
    hint = error.hint
    if one_line:
        print(wire.one_line(error), file=sys.stderr)
    else:
        print(f"keybroker: {error.message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
    return error.exit_status


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def coloured(text: str, colour: str) -> str:
    """Colour text on a terminal, unless NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show that something is under way, on a terminal's stderr, and take it away after."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def in_words(length: timedelta) -> str:
    """Write a length of time as a person says it: 11h 59m, 14m, 8s."""
    seconds = int(length.total_seconds() + 0.5)
    if seconds < 0:
        return f"-{in_words(-length)}"
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            rest = seconds % size // small
            return (
                f"{seconds // size}{unit} {rest}{smaller}" if rest else f"{seconds // size}{unit}"
            )
    return f"{seconds // 60}m" if seconds >= 120 else f"{seconds}s"


def on_the_clock(moment: datetime) -> str:
    """Write a time in the local zone, with its day when that is not today."""
    local = moment.astimezone()
    today = datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M")
