"""env: what a shell sets and unsets for a client."""

import os
from datetime import timedelta

import click

from keybroker import guidance
from keybroker.cli import shells
from keybroker.cli.base import for_profile, on_the_clock
from keybroker.cli.open import TOKEN
from keybroker.cli.run import Lease, Notes, as_named, in_variables, limited, with_flags
from keybroker.cli.work import configuration
from keybroker.config import Profile
from keybroker.label import ENV
from keybroker.rotation import Kind
from keybroker.runs import Limits


@click.command("env")
@for_profile
@click.option("--shell", type=click.Choice(list(shells.SHELLS)), help="Whose language; yours.")
@click.option("--print-key", is_flag=True, help="A key too, made for this; it cannot rotate.")
@limited
def env_command(
    profile: str | None,
    shell: str | None,
    print_key: bool,
    ttl: timedelta | None,
    budget: float | None,
    models: tuple[str, ...],
    haiku_model: str | None,
    sonnet_model: str | None,
    opus_model: str | None,
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
    flags = {"haiku": haiku_model, "sonnet": sonnet_model, "opus": opus_model}
    limits, notes = Limits(ttl, budget, with_flags(models, flags)), Notes(quiet)
    chosen = shell or shells.yours()
    values = {**guidance.environment(of), **in_variables(as_named(models, flags), models)}
    if print_key:
        lease = Lease(config, of, limits, f"{chosen} {os.getppid()}", exported=True, what=ENV)
        try:
            values[TOKEN] = lease.begin_exported()
            shells.print_environment(chosen, values, keep)
        except BaseException:
            lease.end()  # nobody was given it
            raise
        lease.let_go()
        _say_exported(notes, lease, of)
        return
    shells.print_environment(chosen, values, keep)


def _say_exported(notes: Notes, lease: Lease, of: Profile) -> None:
    key = f"key {lease.fingerprint}" + (f" until {on_the_clock(lease.ends)}" if lease.ends else "")
    if of.kind is Kind.FOLLOWED:
        notes.always(f"{key} is that of {of.name}, which is not made here; it cannot rotate")
        return
    budget = "" if lease.limits.budget is None else f", with a budget of {lease.limits.budget:g}"
    notes.always(f"{key}{budget}; it cannot rotate; keybroker revoke {lease.name} ends it")
