"""models: what a gateway lists, which tier each would stand for, how long its answers may be."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import click

from keybroker import tiers
from keybroker.cli.base import coloured, for_profile, print_json, progress
from keybroker.cli.keys import key_at_hand
from keybroker.cli.work import configuration, state
from keybroker.config import Profile
from keybroker.credential import Secret
from keybroker.errors import ConfigError
from keybroker.pool import Pool

SECONDS = 40.0  # of several pages, each within the source's timeout
PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the list; `limit` is of one answer's tokens, None where nobody says."""

    id: str
    limit: int | None


def listed(profile: Profile, secret: Secret) -> list[Model]:
    """
    Return the models that a gateway lists for a key.

    Raises:
        KeybrokerError: It cannot be asked, or has no list.
    """
    with progress(f"asking {host(profile)}"), _pool() as pool:
        answer = pool.call(profile.type, "models", SECONDS, profile=profile, secret=secret)
    return [Model(one["id"], one["limit"]) for one in answer["models"]]


def host(profile: Profile) -> str:
    return urlsplit(profile.base_url).netloc


def mapping(
    profile: Profile,
    models: Sequence[Model],
    model: str | None = None,
    flags: Mapping[str, str | None] = {},
) -> dict[str, str]:
    """
    Return the model of each tier by flags, else by what the gateway lists. See `tiers.assign`.

    Raises:
        ConfigError, SourceInvalid: One that was asked for is not listed; none is.
    """
    return tiers.assign([one.id for one in models], host(profile), model, flags)


@click.command("models")
@for_profile
@click.option(
    "--probe",
    multiple=True,
    metavar="MODEL",
    help="Have its upstream say how long an answer may be; may cost one of a few tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models_command(profile: str | None, probe: tuple[str, ...], as_json: bool) -> None:
    """List the models that PROFILE's key may use.

    Models that do not answer in words are left out. TIER is what `keybroker connect --models auto`
    would make of them. One whose answers cannot be as long as Claude Code asks for is marked.
    """
    config = configuration()
    wanted = config.profile(profile)
    secret = key_at_hand(config, wanted)
    found = listed(wanted, secret)
    if probe:
        found = _probed(wanted, secret, found, probe)
    most = wanted.claude.get("max_output_tokens") or tiers.ASKED_FOR
    names = [one.id for one in found]
    chosen = mapping(wanted, found, flags=still_listed(wanted, names))
    rows = [
        {
            "id": one.id,
            "tiers": [tier for tier, name in chosen.items() if name == one.id],
            "max_output_tokens": one.limit,
            "too_small": tiers.is_too_small(one.limit, most),
        }
        for one in found
    ]
    gone = [
        {"tier": tier, "id": name}
        for tier, name in _written(wanted).items()
        if not tiers.is_listed(name, names)
    ]
    if as_json:
        print_json({"profile": wanted.name, "asked_for": most, "models": rows, "not_listed": gone})
        return
    _print(rows)
    for row in gone:
        key = f"profiles.{wanted.name}.claude.{row['tier']}"
        print(f"{key}: {row['id']} is not listed any more; keybroker connect --models auto")
    used = [one for one in found if one.id in chosen.values()]
    small = [one.limit for one in used if one.limit and tiers.is_too_small(one.limit, most)]
    if small:
        text = "Claude Code asks for answers of {} tokens, which a model of a tier cannot give;"
        print(f"\n{text.format(most)}")
        table = f"[profiles.{wanted.name}.claude]"
        print(f"max_output_tokens = {min(small)} in {table} has it ask for less")


def _written(profile: Profile) -> dict[str, str]:
    """Return the models of the tiers that the configuration names."""
    return {tier: profile.claude[tier] for tier in tiers.TIERS if profile.claude.get(tier)}


def still_listed(profile: Profile, names: Sequence[str]) -> dict[str, str]:
    """Return the models of the tiers that the configuration names and the gateway lists."""
    written = _written(profile).items()
    return {tier: name for tier, name in written if tiers.is_listed(name, names)}


def _probed(
    profile: Profile, secret: Secret, found: list[Model], asked: Sequence[str]
) -> list[Model]:
    names = [one.id for one in found]
    limits: dict[str, int] = {}
    for name in asked:
        if name not in names:
            tiers.assign(names, host(profile), name)  # says so, unless a pattern has it
            raise ConfigError(f"--probe: {name}: only a pattern of it is listed")
        with progress(f"asking {name}"), _pool() as pool:
            kind, values = profile.type, {"profile": profile, "secret": secret, "model": name}
            limit = pool.call(kind, "probe", PROBE_SECONDS, **values)["limit"]
        if limit is not None:
            limits[name] = limit
    return [Model(one.id, limits.get(one.id, one.limit)) for one in found]


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = [("MODEL", "OUTPUT", "TIER", "")]
    for row in rows:
        limit = "-" if row["max_output_tokens"] is None else str(row["max_output_tokens"])
        mark = "too small for Claude Code" if row["too_small"] else ""
        table.append((row["id"], limit, ", ".join(row["tiers"]) or "-", mark))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        first, limit, tier = (cell.ljust(width) for cell, width in zip(line, widths, strict=False))
        print(
            f"{first}  {limit}  {tier}  {coloured(line[3], 'yellow') if line[3] else ''}".rstrip()
        )


@contextmanager
def _pool() -> Iterator[Pool]:
    pool = Pool(state(), os.environ, None)
    try:
        yield pool
    finally:
        pool.close()
