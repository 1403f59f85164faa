"""connect, disconnect: Claude Code and its relatives, set up and taken back."""

import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from keybroker import guidance, paths, settings, wire
from keybroker.cli.base import coloured, print_json, profiles, progress, say
from keybroker.cli.daemon import end_daemon
from keybroker.cli.draft import File
from keybroker.cli.keys import key_at_hand
from keybroker.cli.models import listed, mapping, still_listed
from keybroker.cli.work import configuration, daemon_socket, state
from keybroker.config import Profile
from keybroker.connect import SURFACES, claude, edit, surface
from keybroker.connect.files import changed_too_often
from keybroker.connect.organisation import organisation, refuse
from keybroker.connect.own import added_in
from keybroker.connect.plan import Keys, Piece, Place, Plan
from keybroker.connect.proof import prove, prove_file
from keybroker.connect.record import Entry, Record, file_of
from keybroker.connect.tokens import VARIABLES, Found, tokens
from keybroker.connect.tokens import take_out as remove
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.values import replace

FOLDER = click.Path(path_type=Path)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would change; change nothing.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
REVOKE_SECONDS = 25.0
INSTEAD = "that is sent instead of the helper's key"


class _Surface(click.Choice[str]):
    """A surface; of what is a profile's name, how that is typed is said."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            with suppress(KeybrokerError):
                if value in configuration().profiles:
                    self.fail(
                        f"{value} is a profile, and is named by --profile {value}", param, ctx
                    )
        return super().convert(value, param, ctx)


SURFACE = _Surface(list(SURFACES))


@click.command("connect")
@click.argument("surfaces", nargs=-1, type=SURFACE, metavar="[SURFACE]...")
@click.option(
    "--profile",
    metavar="PROFILE",
    shell_complete=profiles,
    help="Whose keys; the only or default one.",
)
@click.option(
    "--scope",
    type=click.Choice(["user", "local", "managed"]),
    help="For you (the default), for you in this project, or for everybody on the machine.",
)
@click.option("--follow", is_flag=True, help="Let the daemon mend the TTL when it has to change.")
@click.option(
    "--models",
    type=click.Choice(["auto"]),
    help="Have the tiers stand for models that the gateway lists; written into the configuration.",
)
@click.option(
    "--statusline/--no-statusline",
    default=None,
    help="Show the key's time below Claude Code's prompt, or no more.",
)
@click.option("--force", is_flag=True, help="Replace what others set; disconnect puts it back.")
@click.option(
    "--take-out-keys", is_flag=True, help="Take out keys that would be sent instead; for good."
)
@click.option("--no-check", is_flag=True, help="Do not try the helper afterwards.")
@click.option(
    "--for",
    "system",
    type=click.Choice(["linux", "macos", "windows"]),
    help="Write for machines of this kind (managed).",
)
@click.option("--output", type=FOLDER, help="Write below this folder, not the machine's root.")
@click.option("--installed-in", metavar="FOLDER", help="Where keybroker is on those machines.")
@DRY_RUN
@JSON
def connect_command(
    surfaces: Sequence[str],
    profile: str | None,
    scope: str | None,
    follow: bool,
    models: str | None,
    statusline: bool | None,
    force: bool,
    take_out_keys: bool,
    no_check: bool,
    system: str | None,
    output: Path | None,
    installed_in: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Set up Claude Code, or another SURFACE, to use a profile's keys.

    Only the keys that matter are edited; every other byte of a file stays. `keybroker disconnect`
    takes it back.
    """
    wanted = configuration().profile(profile)
    changes: dict[str, Any] = {"output": output and output.absolute(), "installed_in": installed_in}
    if system is not None:
        changes["system"] = system
    if scope is None:  # what is written for other machines is for everybody there
        scope = "managed" if system or output or installed_in else "user"
    if statusline and (scope == "managed" or surfaces not in ((), ("claude",))):
        raise click.UsageError("--statusline is for claude, in the scopes user and local")
    if models is not None:
        wanted = _mapped(wanted, dry_run=dry_run, quiet=as_json)
    if len(same := [name for name in surfaces if name in claude.FORMATS]) > 1:
        raise click.UsageError(f"{', '.join(same)}: they share a file; name one of them")
    for name in surfaces or ("claude",):
        job = _Job(name, wanted, Place.here(**changes), scope, follow=follow, force=force)
        job.statusline = statusline
        job.run(dry_run=dry_run, check=not no_check, as_json=as_json, take_out=take_out_keys)


def connect_profile(name: str, *, force: bool = False) -> None:
    """Connect Claude Code to a profile, for its user."""
    job = _Job("claude", configuration().profile(name), Place.here(), "user", force=force)
    job.run(dry_run=False, check=True, as_json=False, take_out=False)


def _mapped(profile: Profile, *, dry_run: bool, quiet: bool) -> Profile:
    """Have each tier stand for a model that is listed, and write that into the configuration."""
    config = configuration()
    found = listed(profile, key_at_hand(config, profile))
    chosen = mapping(profile, found, flags=still_listed(profile, [one.id for one in found]))
    if any(profile.claude.get(tier) != model for tier, model in chosen.items()):
        file = File.find(os.environ)
        fresh = file.with_claude(profile, chosen, os.environ)
        if not dry_run:
            file.put(fresh)
        if not quiet:
            what = "would be written" if dry_run else "written"
            print(f"tiers {what} into {file.path}", file=sys.stderr)
    if not quiet:
        for tier, model in chosen.items():
            print(f"  {tier:<7} {model}", file=sys.stderr)
    return replace(profile, claude={**profile.claude, **chosen})


class _Job:
    """
    One surface, connected.

    Attributes:
        statusline: Whether its status line is ours; None: as it was.
    """

    def __init__(
        self,
        surface_name: str,
        profile: Profile,
        place: Place,
        scope: str,
        *,
        follow: bool = False,
        force: bool = False,
    ) -> None:
        self.surface, self.profile, self.place, self.scope = surface_name, profile, place, scope
        self.follow, self.force = follow, force
        self.statusline: bool | None = None

    def run(self, *, dry_run: bool, check: bool, as_json: bool, take_out: bool) -> None:
        module = surface(self.surface)
        alone = getattr(module, "STANDS_ALONE", False)  # nothing of Claude Code's counts there
        if not alone:
            self._look_around(quiet=as_json)
        if self.scope not in module.SCOPES:
            raise ConfigError(
                f"{self.surface}: has no scope {self.scope}",
                hint=f"--scope {' or '.join(module.SCOPES)}",
            )
        plan: Plan = module.plan(self.profile, self.place, self.scope)
        if not as_json:
            for text in plan.before:
                print(f"note: {text}", file=sys.stderr)
        record = Record.read(paths.state_directory(os.environ) / paths.CONNECTIONS)
        done = [self._work_out(piece, record) for piece in plan.pieces]  # before any is written
        going = [] if alone else self._pasted(plan, take_out=take_out, dry_run=dry_run)
        stale = [] if alone else self._stale(plan, going)
        tried = None
        if not dry_run:
            done = [self._write(piece) for piece in _without(plan.pieces, going)]
            if check and plan.line is not None:
                tried = _prove(plan, self.place, keeps=bool(going))
            self._take_out(going, plan)
        if as_json:
            files = [_described(one) for one in done]
            print_json({"surface": self.surface, "files": files, "key": tried, "text": plan.text})
            return
        for one in done:
            print(_diff(one) if dry_run else _said(one))
        if plan.text:
            print(plan.text)
        if dry_run:
            return
        if tried is not None:
            print(f"tried: the helper printed the key {tried}, with the daemon up and down")
        if plan.line is not None and guidance.TTL_VARIABLE in plan.environment:
            print(f"{guidance.TTL_VARIABLE}: {guidance.ttl_reason(self.profile)}")
        if plan.after:
            print("\nnow:")
            shell = f"unset {' '.join(stale)} or open a new shell, where it runs" if stale else ""
            for number, text in enumerate(filter(None, (shell, *plan.after)), 1):
                print(f"  {number}. {text}")

    def _pasted(self, plan: Plan, *, take_out: bool, dry_run: bool) -> list[Found]:
        """
        Say which keys would be sent instead of ours; return those that are to be taken out.

        What the plan sets to nothing counts no more, unless it stands in the file itself: what
        that had is recorded, and a key may not be. A project's committed file is never written.

        Raises:
            ConfigError: One of Claude Code's settings files has one, and it stays.
        """
        own = [piece.file for piece in plan.pieces]
        going: list[Found] = []
        if claude.HEADERS not in plan.environment and claude.sends_another_key(self.place):
            file = claude.user_file(self.place)
            print(f"note: {file} has x-api-key in {claude.HEADERS}, and {INSTEAD}", file=sys.stderr)
        for found in tokens(self.place.environment, self.place.folder):
            if found.variable in _pinned(plan) and found.path not in own:
                continue
            if found.path == claude.committed_file(self.place):  # others have it too
                line = f"{found.place} sets {found.variable}, and in this folder {INSTEAD}"
                print(f"note: {line}; keybroker connect --scope local beats it", file=sys.stderr)
                continue
            goes = found.alone and (take_out or (not dry_run and _agreed(found)))
            line = f"{found.place} sets {found.variable}, and {INSTEAD}"
            if not goes and not found.is_settings:
                line += f"; to take it out: {self._again()}" if found.alone else "; take it out"
            print(f"note: {line}", file=sys.stderr)
            if goes:
                going.append(found)
            elif found.is_settings and dry_run:
                unless = f" without --take-out-keys: {self._again()}" if found.alone else ""
                print(f"note: connecting is refused{unless}", file=sys.stderr)
            elif found.is_settings:
                raise ConfigError(
                    f"connect: {found.place}: has {found.variable}, and {INSTEAD}",
                    hint=f"take it out, or: {self._again()}",
                )
            if goes and dry_run:
                print(f"would take {_line_of(found)}, for good", file=sys.stderr)
        return going

    def _stale(self, plan: Plan, going: list[Found]) -> list[str]:
        """Return what shells that are open have of such keys."""
        here = [name for name in VARIABLES if self.place.environment.get(name)]
        here = [name for name in here if name not in _pinned(plan)]
        for name in here:
            print(f"note: {name} is set here, and {INSTEAD}; unset it", file=sys.stderr)
        gone = [one.variable for one in going if not one.is_settings]
        return list(dict.fromkeys([*here, *gone]))

    def _take_out(self, going: list[Found], plan: Plan) -> None:
        """Take keys out, last of all; then it is recorded as if they had never been there."""
        for found in going:
            remove(found)
            print(f"took {_line_of(found)}", file=sys.stderr)
        for piece in plan.pieces if going else ():
            self._write(piece)

    def _again(self) -> str:
        """Return the command that takes keys out, whatever else was typed of it."""
        words = ["keybroker connect"]
        words += [] if self.surface == "claude" else [self.surface]
        words += [f"--profile {self.profile.name}"]
        words += [] if self.scope == "user" else [f"--scope {self.scope}"]
        words += ["--force"] if self.force else []
        return " ".join([*words, "--take-out-keys"])

    def _look_around(self, *, quiet: bool) -> None:
        """Say what the organisation has set, and change nothing over it unless told to."""
        found = organisation(environment=self.place.environment)
        for one in found:
            if not quiet:
                print(f"note: your organisation has set {one}", file=sys.stderr)
        if not self.force and self.place.output is None:
            refuse(found, "connect")

    def _work_out(self, piece: Piece, record: Record) -> edit.Change:
        if isinstance(piece, Keys) and (claude.HELPER,) in piece.values:
            had = claude.has_status_line(record.files.get(str(piece.file)))
            if had if self.statusline is None else self.statusline:
                piece = claude.with_status_line(piece, self.profile.name, self.place)
        return edit.to_connect(
            piece,
            record,
            surface=self.surface,
            profile=self.profile.name,
            scope=self.scope,
            follow=self.follow,
            force=self.force,
            made_for=self.place.made_for,
        )

    def _write(self, piece: Piece) -> edit.Change:
        with Record.open(state()) as record:
            for _ in range(edit.TRIES):
                change = self._work_out(piece, record)
                if edit.commit(change, record):
                    return change
        raise changed_too_often(piece.file)


@click.command("disconnect")
@click.argument("surfaces", nargs=-1, type=SURFACE, metavar="[SURFACE]...")
@click.option(
    "--profile",
    metavar="PROFILE",
    shell_complete=profiles,
    help="Only what was connected to this profile.",
)
@click.option(
    "--scope",
    type=click.Choice(["user", "local", "managed"]),
    help="Only this scope; local: only this folder.",
)
@DRY_RUN
@JSON
def disconnect_command(
    surfaces: Sequence[str], profile: str | None, scope: str | None, dry_run: bool, as_json: bool
) -> None:
    """Take back what connect wrote: all of it, or that of each SURFACE.

    A file that nobody changed since becomes what it was, byte for byte. In others our keys are
    taken out, and what they replaced is put back. What was written to be handed out to other
    machines is removed by --scope managed alone.
    """
    done: list[edit.Change] = []
    problems: list[KeybrokerError] = []
    ended: list[str] = []  # profiles that were added for a surface
    local = _names_here() if scope == "local" else []
    with Record.open(state()) as record:
        there = dict(record.files)
        if profile is not None and all(one.profile != profile for one in there.values()):
            configuration().profile(profile)  # it may be a slip
        for name, entry in reversed(list(record.files.items())):
            here = scope != "local" or name in local
            if here and _is_meant(entry, surfaces, profile, scope):
                try:
                    done.append(_take_back(name, record, dry_run=dry_run))
                    if done[-1].is_one and (profile_of_it := added_in(done[-1].line)) is not None:
                        ended.append(profile_of_it)
                except KeybrokerError as error:  # of one file; the others are taken back
                    problems.append(error)
    said = {name: _end_keys(name, dry_run=dry_run) for name in ended}
    if as_json:
        print_json(
            {"files": [_described(one) for one in done], **({"profiles": said} if said else {})}
        )
    else:
        for one in done:
            print(_diff(one) if dry_run else _said(one))
        if not done and not problems:
            print("nothing is connected" if not there else "nothing of that is connected, but:")
            commands = [
                _command(name, one)
                for name, one in there.items()
                if (one.kind, one.scope) != ("line", "local")  # it goes with the file
            ]
            for command in dict.fromkeys(commands):
                print(f"  {command}")
        for name, text in said.items():
            print(f"{name}: {text}")
    for problem in problems[:-1]:
        say(problem)
    if problems:
        raise problems[-1]


def _is_meant(
    entry: Entry, surfaces: Sequence[str], profile: str | None, scope: str | None
) -> bool:
    return (
        (not surfaces or entry.surface in surfaces)
        and profile in (None, entry.profile)
        and scope in (None, entry.scope)
        and (scope is not None or not entry.is_handed_out)
    )


def _names_here() -> list[str]:
    """Return what the local settings of this folder are recorded under."""
    place = Place.here()
    line = claude.ignoring(place.folder)
    names = [] if line is None else [edit.record_name(line.file, line.line)]
    return [*names, str(claude.local_file(place))]


def _command(name: str, entry: Entry) -> str:
    """Return what takes one back, as it is typed: what is local, in its folder."""
    command = f"keybroker disconnect {entry.surface} --profile {entry.profile}"
    folder = shlex.quote(str(file_of(name).parent.parent))
    place = f"cd {folder}; " if entry.scope == "local" else ""
    return f"{place}{command} --scope {entry.scope}"


def _take_back(name: str, record: Record, *, dry_run: bool) -> edit.Change:
    for _ in range(edit.TRIES):
        change = edit.to_disconnect(name, record)
        if dry_run or edit.commit(change, record):
            return change
    raise changed_too_often(file_of(name))


def _end_keys(name: str, *, dry_run: bool) -> str:
    """Have the keys of a profile ended that is configured no more: nobody is left to use them."""
    by_hand = f"its keys end by themselves; at once: keybroker revoke {name}"
    if dry_run:
        return "its keys would be revoked"
    try:
        if (socket := daemon_socket()) is None:
            return by_hand
        [result] = wire.control(socket, "revoke", REVOKE_SECONDS, profiles=[name])
    except (KeybrokerError, ValueError):
        return by_hand
    return by_hand if result["left"] else f"{result['revoked']} revoked"


def _agreed(found: Found) -> bool:
    question = f"Take {found.variable} out of {found.path}, for good?"
    return sys.stdin.isatty() and click.confirm(question, err=True)


def _pinned(plan: Plan) -> list[str]:
    """Return the variables for a key that the plan sets to nothing, whoever else sets them."""
    return [name for name in VARIABLES if plan.environment.get(name) == ""]


def _line_of(found: Found) -> str:
    return f"{found.variable} out of {found.path}"


def _without(pieces: Sequence[Piece], going: Sequence[Found]) -> Iterator[Piece]:
    """Yield what is written while keys are there yet: in place of none, so none is recorded."""
    for piece in pieces:
        there = {("env", one.variable) for one in going if one.path == piece.file}
        if isinstance(piece, Keys) and there:
            values = {path: value for path, value in piece.values.items() if path not in there}
            piece = replace(piece, values=values)
        yield piece


def _prove(plan: Plan, place: Place, *, keeps: bool) -> str:
    """Run the line with the daemon up and with it down, which starts one."""
    assert plan.line is not None, "there is something to try"
    try:
        with progress("trying the helper"):
            up = daemon_socket() is not None
            first = prove(plan.line, plan.environment, place.environment)
            if up:
                end_daemon()
            second = prove(plan.line, plan.environment, place.environment)
            if plan.key is not None:
                prove_file(plan.key, second)
    except KeybrokerError as error:
        raise type(error)(
            f"connected, but {error.message}" + ("; no key was taken out" if keeps else ""),
            hint=error.hint or "keybroker status; to take it back: keybroker disconnect",
        ) from None
    return first


def _said(change: edit.Change) -> str:
    """Say what was done to a file, in a line or a few."""
    file = change.target.file
    if change.entry is not None:
        lines = [f"{'wrote' if change.is_one else 'as it was'}  {file}"]
        if change.old is not None and change.old.surface != change.entry.surface:
            lines.append(f"  in place of {change.old.surface}")
        lines += [f"  {name}: replaced; disconnect puts it back" for name in change.replaced]
        return "\n".join(lines)
    if change.target.data is None:
        return f"gone  {file}: somebody removed it"
    if change.data is None:
        return f"removed  {file}, which was not there before"
    if change.exact:
        return f"restored  {file}, byte for byte"
    lines = [f"restored  {file}: it was changed since, so ours alone was taken out"]
    lines += [f"  {name}: changed since, and stays" for name in change.kept]
    return "\n".join(lines)


def _described(change: edit.Change) -> dict[str, Any]:
    return {
        "file": str(change.target.file),
        "changed": change.is_one,
        "removed": change.is_one and change.data is None,
        "exact": change.exact,
        "kept": list(change.kept),
        "replaced": list(change.replaced),
    }


def _diff(change: edit.Change) -> str:
    """Show a change; of strings that are not ours only an ellipsis is shown."""
    file = str(change.target.file)
    if not change.is_one:
        return f"{file}: nothing to change"
    entry = change.entry or change.old
    assert entry is not None, "it is to be recorded or is"
    keys = [key for one in (change.entry, change.old) if one for key in one.keys]
    plain = [
        text for key in keys for text in (*edit.value_shown(key.value), *edit.names_in(key.path))
    ]
    whole = change.data if change.entry else change.target.data  # ours, if any is

    def lines(data: bytes | None) -> list[str]:
        text = "" if data is None else data.decode(_encoding(data), "replace")
        if entry.kind == "keys":
            text = settings.shown(text, plain) if text.strip("\ufeff \t\r\n") else text
            return [line.rstrip("\r\n") for line in text.splitlines()]
        ours = {*change.line.split("\n")} if entry.kind == "line" else {*text.splitlines()}
        ours = ours if entry.kind == "line" or data == whole else set()
        return [line if line in ours else "…" for line in text.splitlines()]

    before, after = lines(change.target.data), lines(change.data)
    found = difflib.unified_diff(before, after, file, file, lineterm="", n=2)
    colours = {"+": "green", "-": "red"}
    return "\n".join(
        coloured(line, colours[line[0]]) if line[:1] in colours else line for line in found
    )


def _encoding(data: bytes) -> str:
    """Return what a file of text is written in: the registry's are in UTF-16."""
    return "utf-16" if data.startswith(b"\xff\xfe") else "utf-8"
