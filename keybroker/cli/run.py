"""run: a program with a key of its own, for as long as it runs."""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from keybroker import asking, foreign, guidance, tiers, wire
from keybroker.cli import shells
from keybroker.cli.base import Before, Duration, in_words, on_the_clock, profiles, progress
from keybroker.cli.keys import key_at_hand, start_daemon
from keybroker.cli.models import listed, still_listed
from keybroker.cli.models import mapping as assign
from keybroker.cli.open import (
    TOKEN,
    find_program,
    launch_at,
    note,
    profile_at,
    refuse_limits,
    variables_at,
)
from keybroker.cli.work import configuration, daemon_socket
from keybroker.config import SOURCES, Config, Profile
from keybroker.connect import inline
from keybroker.connect.plan import Place
from keybroker.credential import fingerprint
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceError,
)
from keybroker.foreground import NoProgramError, Program, end_as
from keybroker.label import RUN, made_name
from keybroker.rotation import Kind
from keybroker.runs import Limits, made, with_models

KEY_SECONDS = 25.0  # until there is a key, or a reason why not
END_SECONDS = 5.0  # for its revocation, while who typed the command waits
AGAIN_SECONDS = (0.0, 1.0, 30.0)  # between tries to find a daemon: the first, the next, the longest
BUDGET = 2.0  # of a key that is exported, where nobody says otherwise
MODEL = "ANTHROPIC_MODEL"

LIMITS = (
    click.option("--ttl", type=Duration(), help="How long a key lives; 30m."),
    click.option(
        "--budget", type=click.FloatRange(0, min_open=True), help="What one key may spend."
    ),
    click.option("--model", "models", multiple=True, help="The one model; for every tier."),
    click.option("--haiku-model", help="The model of this tier, whatever --model says."),
    click.option("--sonnet-model", help="The same of the sonnet tier."),
    click.option("--opus-model", help="The same of the opus tier."),
    click.option("--keep", multiple=True, metavar="NAME", help="Leave a variable as it is."),
    click.option("-q", "--quiet", is_flag=True, help="No notes on stderr."),
)


def limited(command: Any) -> Any:
    """Let a command take what one key may do less than others."""
    for option in reversed(LIMITS):
        command = option(command)
    return command


@click.command(
    "run", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False}
)
@click.option(
    *("--profile", "name"),
    metavar="PROFILE",
    shell_complete=profiles,
    help="Of which its key is made.",
)
@limited
@click.option("--host", metavar="HOST", help="In place of a profile: what checks no key. localhost")
@click.option(
    "--port", type=click.IntRange(1, 65_535), help="Its port. 8321, or what OGX_PORT says."
)
@click.option("--print-env", is_flag=True, help="Print what a shell has to set; run nothing.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="PROGRAM [ARG]…")
@click.pass_obj
def run_command(
    before: Before,
    name: str | None,
    ttl: timedelta | None,
    budget: float | None,
    models: tuple[str, ...],
    haiku_model: str | None,
    sonnet_model: str | None,
    opus_model: str | None,
    keep: tuple[str, ...],
    quiet: bool,
    host: str | None,
    port: int | None,
    print_env: bool,
    words: tuple[str, ...],
) -> None:
    """Run PROGRAM with a key of its own, minted for it and revoked when it ends.

    `claude` is told of the helper by --settings: no key is in its environment, and it rotates. Any
    other program has the key in ANTHROPIC_AUTH_TOKEN, where it cannot. Exit status and signals
    are the program's; 126 it cannot be run, 127 there is none, else as for `get`.

    \b
    keybroker run -- claude
    keybroker run --ttl 2h --budget 5 -- python agent.py
    keybroker run --host localhost --model ollama/qwen3:32b -- claude
    """
    if not words and not print_env:
        raise click.UsageError("name a program after --, such as: keybroker run -- claude")
    file = "" if print_env else _program(words[0])
    flags = {"haiku": haiku_model, "sonnet": sonnet_model, "opus": opus_model}
    if host is not None or port is not None:
        refuse_limits({"--profile": name, "--ttl": ttl, "--budget": budget})
        there = profile_at(host, port)
        variables = variables_at(there, models, flags)
        if print_env:
            shells.print_environment(shells.yours(), variables, keep)
            return
        Notes(quiet).note(note(there, variables))
        status = launch_at(there, file, words, variables, before, keep=keep)
        raise click.exceptions.Exit(end_as(status))
    config = configuration()
    profile = config.profile(name)
    mapping = tier_models(config, profile, models, flags)
    if print_env:
        refuse_limits({"--ttl": ttl, "--budget": budget})
        values = {**guidance.environment(profile), **in_variables(mapping, models)}
        shells.print_environment(shells.yours(), values, keep)
        return
    limits = Limits(ttl, budget, with_flags(models, flags))
    more = in_variables(mapping, models)
    status = launch(config, profile, words, limits, before, more, keep=keep, quiet=quiet)
    raise click.exceptions.Exit(end_as(status))


def tier_models(
    config: Config, profile: Profile, models: Sequence[str], flags: Mapping[str, str | None]
) -> dict[str, str]:
    """
    Return the model of each tier where the command line names any; else nothing.

    Raises:
        ConfigError: One that it names is not listed.
        KeybrokerError: The gateway had to be asked for the rest, and did not answer.
    """
    named = as_named(models, flags)
    if not named:
        return {}
    try:
        found = listed(profile, key_at_hand(config, profile))
    except SourceError:
        if len(named) < len(tiers.TIERS):
            raise
        return named  # what it does not list, it may answer all the same
    for one in models[1:]:
        assign(profile, found, one)  # says what is not listed
    written = {} if models else still_listed(profile, [one.id for one in found])
    given = {tier: name for tier, name in flags.items() if name}
    return assign(profile, found, next(iter(models), None), {**written, **given})


def as_named(models: Sequence[str], flags: Mapping[str, str | None]) -> dict[str, str]:
    """Return the models of those tiers for which the command line names one."""
    first = next(iter(models), None)
    chosen = {tier: flags.get(tier) or first for tier in tiers.TIERS}
    return {tier: name for tier, name in chosen.items() if name}


def in_variables(mapping: Mapping[str, str], models: Sequence[str]) -> dict[str, str]:
    """Return what tells Claude Code of the models that the command line names."""
    first = {MODEL: models[0]} if models else {}
    return {guidance.VARIABLES[tier]: model for tier, model in mapping.items()} | first


def with_flags(models: Sequence[str], flags: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return all models that a key has to be for; none where it may use any of its profile's."""
    named = (*models, *filter(None, flags.values())) if models else ()
    return tuple(dict.fromkeys(map(tiers.sent, named)))


def _program(word: str) -> str:
    """
    Return the file of a program.

    Raises:
        click.UsageError: It is none, but a profile.
        NoProgramError, NotRunnableError: As `foreground.find`.
    """
    try:
        return find_program(word)
    except NoProgramError:
        with suppress(KeybrokerError):
            if word in configuration().profiles:
                text = f"{word} is a profile, and is named by --profile {word} before the program"
                raise click.UsageError(text) from None
        raise


def launch(
    config: Config,
    profile: Profile,
    words: Sequence[str],
    limits: Limits,
    before: Before,
    more: Mapping[str, str],
    *,
    keep: Collection[str] = (),
    quiet: bool = False,
) -> int:
    """
    Run a program with a key of its own; return its status as wait(2) has it.

    Args:
        profile: What its key is made of.
        words: The program and its arguments.
        more: Variables beside those of the profile.
        keep: Foreign variables that it keeps.

    Raises:
        KeybrokerError: It was not run, and why.
    """
    file = find_program(words[0])
    short = os.path.basename(words[0])
    rotates = short == inline.NAME
    notes = Notes(quiet)
    environment = foreign.without(os.environ, keep)
    lease = Lease(config, profile, limits, short, exported=not rotates)
    try:
        if rotates:
            ours = inline.settings(lease.profile, Place.here(), more)
            arguments = inline.told(words[1:], ours)
            with progress("getting a key"):
                lease.begin()
        else:
            arguments = list(words[1:])
            with progress("getting a key"):
                key = lease.begin_exported()
            variables = guidance.environment(lease.profile) | dict(more)
            variables.pop(guidance.TTL_VARIABLE)  # there is no helper
            environment |= {**variables, TOKEN: key}
        _say(notes, lease, short, keep, rotates=rotates)
        program = Program(
            file, [words[0], *arguments], environment, umask=before.umask, core=before.core
        )
        environment.clear()
        _stay(lease, program, short)
        assert program.status is not None
        return program.status
    finally:
        for text in lease.end():
            notes.always(text)


class Notes:
    """What is said on stderr: all of it on a terminal, what has to be said elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self.full = not quiet and sys.stderr.isatty()

    def always(self, text: str) -> None:
        if not self._quiet:
            print(f"keybroker: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self.full:
            self.always(text)


class Lease:
    """
    A profile for one program, as long as this lasts.

    Args:
        config: The file's, for a daemon that has to be started.
        of: The profile of the file.
        program: Its name, for `status`.
        exported: The program is given the key itself.
        what: What the name says that it is for.

    Attributes:
        profile: What was made; `of` itself where its keys are not ours to make.
        ends: When the key ends, as far as is known.
    """

    def __init__(
        self,
        config: Config,
        of: Profile,
        limits: Limits,
        program: str,
        *,
        exported: bool,
        what: str = RUN,
    ) -> None:
        self._config, self._of = config, of
        self.own = of.kind is not Kind.FOLLOWED
        if not self.own and (limits.ttl is not None or limits.budget is not None):
            option = "budget" if limits.ttl is None else "ttl"
            raise ConfigError(
                f"profiles.{of.name}: --{option}: its key is not made here, and cannot be limited"
            )
        if exported and limits.budget is None and "max_budget" in SOURCES[of.type] and self.own:
            most = of.source["max_budget"]
            limits = Limits(limits.ttl, min(BUDGET, most or BUDGET), limits.models)
        name = made_name(of.name, what) if self.own else of.name
        self.profile = made(of, name, limits) if self.own else with_models(of, limits.models)
        self.limits, self._exported = limits, exported
        self.name = name
        self.ends: datetime | None = None
        self.fingerprint = ""
        self.lost = False  # its key was revoked while the program had it
        self._values: dict[str, Any] = {
            "name": name,
            "profile": of.name,
            "program": program,
            "pid": os.getpid(),
            "exported": exported,
            "ttl_s": None if limits.ttl is None else int(limits.ttl.total_seconds()),
            "budget": limits.budget,
            "models": list(limits.models),
        }
        self._connection: Connection | None = None
        self._given = False

    def begin(self) -> None:
        """
        Have the key made; return when it is there.

        Raises:
            KeybrokerError: It could not be made.
        """
        socket = daemon_socket() or start_daemon(self._config)
        self._connection = Connection(socket, self._values)
        try:
            told = self._connection.first(KEY_SECONDS)
        except KeybrokerError as error:
            message, hint = (
                (text or "").replace(self.name, self._of.name)
                for text in (error.message, error.hint)
            )
            raise type(error)(message, hint=hint or None) from None
        self._given = self.own
        if told["expires_at"] is not None:
            self.ends = datetime.fromisoformat(told["expires_at"])

    def begin_exported(self) -> str:
        """
        Have the key made, and return it: it is revoked at its end, or with the program.

        Raises:
            KeybrokerError: It could not be made.
        """
        self.begin()
        assert self._connection is not None
        socket = self._connection.socket
        request = wire.request(self.name, os.getpid())
        status, text = asking.read_reply(wire.ask(socket, request)) or (69, "")
        if status != 0:
            raise NotReady(text.removeprefix("keybroker: "))
        self.fingerprint = fingerprint(text)
        if self.own:
            wire.control(socket, "export", KEY_SECONDS, profile=self.name)
            self._values["again"] = True
        return text

    def fileno(self) -> int | None:
        """Return what is readable when the daemon has ended; None: there is none now."""
        return None if self._connection is None else self._connection.fileno()

    def hear(self) -> None:
        """Take what the daemon says, or that it is gone."""
        assert self._connection is not None
        try:
            gone = self._connection.hear()
        except NotReady:
            gone, self.lost = True, self._exported and self.own
        except KeybrokerError:  # it is asked again
            gone = True
        if gone:
            self._connection.close()
            self._connection = None

    def again(self) -> bool:
        """Find a daemon, or start one, that goes on with it; say whether one is asked."""
        with suppress(KeybrokerError):
            self._connection = Connection(
                daemon_socket() or start_daemon(self._config), self._values
            )
        return self._connection is not None

    def end(self) -> list[str]:
        """Have the key revoked; return what there is to say about that."""
        said = self._revoke() if self._given else []
        self.let_go()
        return said

    def let_go(self) -> None:
        """Say no more: a key that somebody has for good is revoked at its end, others now."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _revoke(self) -> list[str]:
        why = ""
        for _ in range(2):
            try:
                socket = daemon_socket() or start_daemon(self._config)
                [done] = wire.control(socket, "revoke", END_SECONDS, profiles=[self.name])
                if not done["left"]:
                    return []
                why = done["error"] or "no answer yet"
                break
            except NobodyAnswers as error:  # it may just have ended
                why = error.message
            except KeybrokerError as error:
                why = error.message
                break
        until = "" if self.ends is None else f"; it ends by itself at {on_the_clock(self.ends)}"
        return [f"its key is not revoked yet ({why}); the daemon goes on trying{until}"]


class Connection:
    """A connection to the daemon that something lasts for."""

    def __init__(self, socket: Path, values: dict[str, Any]) -> None:
        self.socket = socket
        try:
            self._connection = wire.hold(socket, "run", values)
        except ValueError:
            raise ConfigError("run: what was asked for is too long", hint="fewer --model") from None
        self._heard = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def first(self, seconds: float) -> dict[str, Any]:
        """
        Wait for the first line.

        Raises:
            KeybrokerError: The one that it tells of.
        """
        self._connection.settimeout(seconds)
        try:
            while b"\n" not in self._heard:
                piece = self._connection.recv(1 << 16)
                if not piece:
                    raise NobodyAnswers("the daemon ended", hint="try again")
                self._heard += piece
        except OSError:
            raise NobodyAnswers("the daemon does not answer", hint="try again") from None
        line, _, self._heard = self._heard.partition(b"\n")
        return wire.read_told(self.socket, line)

    def hear(self) -> bool:
        """
        Take what came; say whether it was the end.

        Raises:
            KeybrokerError: A line tells of it.
        """
        try:
            piece = self._connection.recv(1 << 16)
        except OSError:
            return True
        *lines, self._heard = (self._heard + piece).split(b"\n")
        for line in lines:
            wire.read_told(self.socket, line)
        return not piece

    def close(self) -> None:
        self._connection.close()


def _stay(lease: Lease, program: Program, short: str) -> None:
    """Wait for the end of a program; when the daemon ends, find another."""
    pause, told = AGAIN_SECONDS[0], False
    while program.status is None:
        if lease.lost:
            if not told:
                told = True
                text = f"{short}: its key was revoked while no daemon was there"
                print(f"keybroker: {text}", file=sys.stderr, flush=True)
            program.wait()
        elif (descriptor := lease.fileno()) is not None:
            if program.wait(other=descriptor):
                lease.hear()
                pause = AGAIN_SECONDS[0] if lease.fileno() is not None else pause
        else:
            program.wait(pause)
            pause = min(max(2 * pause, AGAIN_SECONDS[1]), AGAIN_SECONDS[2])
            if program.status is None:
                lease.again()


def _say(notes: Notes, lease: Lease, short: str, keep: Collection[str], *, rotates: bool) -> None:
    """Say what the program has, and what it has no more."""
    for text in about(lease, short, rotates=rotates, full=notes.full):
        notes.always(text) if not rotates else notes.note(text)
    if gone := foreign.found(os.environ, keep):
        names = ", ".join(gone)
        notes.note(f"taken out of its environment: {names} (--keep NAME leaves one in)")


def about(lease: Lease, short: str, *, rotates: bool, full: bool) -> list[str]:
    """Return in words what sort of key a program has."""
    of = lease.profile.name if not lease.own else lease.name
    if rotates:
        if not lease.own:
            return [f"{short} has the key of {of}, which is not made here and is not revoked"]
        life = lease.profile.source.get("lifetime")
        each = "" if life is None else f", {in_words(life)} each"
        said = [f"{short} has keys of its own ({of}{each}), which end with it"]
        if lease.limits.budget is not None:
            said.append("--budget is for each key: it starts anew when one is replaced")
        return said
    until = "" if lease.ends is None else f" until {on_the_clock(lease.ends)}"
    key = f"{lease.fingerprint}{until}"
    if not lease.own:
        what = f"the key of {of}, which is not made here and is not revoked"
        return [f"{short} has {what}: {key}; it cannot rotate there"]
    if not full:
        return [f"{short} has a key of its own, {key}; it cannot rotate"]
    budget = "" if lease.limits.budget is None else f", with a budget of {lease.limits.budget:g}"
    return [
        f"{short} has a key of its own in {TOKEN}: {key}{budget}",
        "it cannot rotate there, and ends with the program; --ttl lets it live longer",
    ]
