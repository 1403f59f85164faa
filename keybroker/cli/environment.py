"""env: what a shell sets and unsets for a client."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import click

from keybroker import foreign, guidance
from keybroker.cli.base import for_profile, on_the_clock
from keybroker.cli.run import MODEL, TOKEN, Lease, Notes, limited
from keybroker.cli.work import configuration
from keybroker.config import Profile
from keybroker.label import ENV
from keybroker.rotation import Kind
from keybroker.runs import Limits, with_models

_SINGLE_QUOTES = "'\u2018\u2019\u201a\u201b"


def _sh(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _fish(text: str) -> str:
    """Only the quote and the backslash mean something. See fish-language, Quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell(text: str) -> str:
    """Five characters are single quotes, and each is doubled. See about_Quoting_Rules."""
    return "'" + "".join(one * 2 if one in _SINGLE_QUOTES else one for one in text) + "'"


# How a shell sets a variable, and how it takes one out that may not be there.
SHELLS: dict[str, tuple[Callable[[str, str], str], Callable[[str], str]]] = {
    "sh": (lambda name, value: f"export {name}={_sh(value)}", lambda name: f"unset {name}"),
    "fish": (
        lambda name, value: f"set -gx {name} {_fish(value)}",
        lambda name: f"set -e {name}",
    ),
    "powershell": (
        lambda name, value: f"$env:{name} = {_powershell(value)}",
        lambda name: f"Remove-Item Env:{name} -ErrorAction SilentlyContinue",
    ),
}


@click.command("env")
@for_profile
@click.option("--shell", type=click.Choice(list(SHELLS)), help="Whose language; yours.")
@click.option("--print-key", is_flag=True, help="A key too, made for this; it cannot rotate.")
@limited
def env_command(
    profile: str | None,
    shell: str | None,
    print_key: bool,
    ttl: timedelta | None,
    budget: float | None,
    models: tuple[str, ...],
    keep: tuple[str, ...],
    quiet: bool,
) -> None:
    """Print what a shell exports for PROFILE, and unsets of what leads elsewhere.

    No key is among it, unless --print-key says so: then one is made for this, with an end of its
    own, a small budget, and a line in `status`.

    \b
    eval "$(keybroker env)"                     sh, bash, zsh
    keybroker env --shell fish | source
    keybroker env --shell powershell | Out-String | Invoke-Expression
    """
    config = configuration()
    of = config.profile(profile)
    if not print_key and (ttl is not None or budget is not None):
        raise click.UsageError("--ttl and --budget are for --print-key")
    limits, notes = Limits(ttl, budget, models), Notes(quiet)
    chosen = shell or _yours()
    values = dict(guidance.environment(with_models(of, models)))
    if models:
        values[MODEL] = models[0]
    if print_key:
        lease = Lease(config, of, limits, f"{chosen} {os.getppid()}", exported=True, what=ENV)
        try:
            values[TOKEN] = lease.begin_exported()
            _print(chosen, values, keep)
        except BaseException:
            lease.end()  # nobody was given it
            raise
        lease.let_go()
        _say_exported(notes, lease, of)
        return
    _print(chosen, values, keep)


def _print(shell: str, values: dict[str, str], keep: tuple[str, ...]) -> None:
    export, unset = SHELLS[shell]
    names = dict.fromkeys([*foreign.NAMES, *foreign.found(os.environ)])
    lines = [unset(name) for name in names if name not in values and name not in keep]
    lines += [export(name, value) for name, value in values.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _say_exported(notes: Notes, lease: Lease, of: Profile) -> None:
    key = f"key {lease.fingerprint}" + (f" until {on_the_clock(lease.ends)}" if lease.ends else "")
    if of.kind is Kind.FOLLOWED:
        notes.always(f"{key} is that of {of.name}, which is not made here; it cannot rotate")
        return
    budget = "" if lease.limits.budget is None else f", for at most {lease.limits.budget:g}"
    notes.always(f"{key}{budget}; it cannot rotate; keybroker revoke {lease.name} ends it")


def _yours() -> str:
    """Return whose language the user's shell speaks, as far as SHELL says."""
    name = os.path.basename(os.environ.get("SHELL", ""))
    return {"fish": "fish", "pwsh": "powershell"}.get(name, "sh")
