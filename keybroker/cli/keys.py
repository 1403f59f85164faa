"""get, rotate, revoke, sweep, check: the commands that act on keys."""

import os
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta

import click

from keybroker import paths
from keybroker.audit import Audit, asker
from keybroker.cache import sealed_at
from keybroker.cli.base import for_profile, in_words, on_the_clock, print_json, progress
from keybroker.cli.work import (
    Desk,
    at_work_elsewhere,
    configuration,
    desk,
    drive,
    minted,
    owner,
    sealed_alone,
    state,
)
from keybroker.clock import Clock, judge
from keybroker.config import Config, Profile
from keybroker.credential import Credential
from keybroker.errors import (
    CLASSES,
    ConfigError,
    JournalError,
    NotReady,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.fields import read_duration
from keybroker.journal import Journal, decode_lease
from keybroker.label import is_label, prefix
from keybroker.rotation import expired
from keybroker.slots import replay

ANSWER_SECONDS = 8.0  # after ten Claude Code says that a helper is slow
AFTERWARDS_SECONDS = 2.0
ACT_SECONDS = 20.0


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


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("get")
@for_profile
def get_command(profile: str | None) -> None:
    """Print the current key of PROFILE and nothing else.

    A key that is due is replaced first; while the gateway is out of reach the current one is
    printed until its end. Exit status: 0; 69 nobody can answer, 75 try later, 77 refused,
    78 configuration.
    """
    config = configuration()
    wanted = config.profile(profile)
    answer(config, wanted)


def answer(config: Config, profile: Profile) -> None:
    """
    Find the key to hand out, print it, then do what else is due.

    Raises:
        KeybrokerError: There is none, and why.
    """
    until = time.monotonic() + ANSWER_SECONDS
    seen = None
    try:
        while (lock := paths.take_owner_lock(state())) is None:
            # Its owner may be waiting for the network, or be about to seal what we wait for.
            written = sealed_at(state(), profile.name)
            if written != seen and (found := _from_cache(config, profile)) is not None:
                _hand_out(profile, found)
                return
            seen = written
            if time.monotonic() > until:
                raise at_work_elsewhere()
            time.sleep(0.05)
        try:
            _as_owner(config, profile, lock)
            return
        finally:
            os.close(lock)
    except JournalError:
        # Nothing may be minted; what was sealed and is alive is still good for its reader.
        kept = _from_cache(config, profile, journal_is_broken=True)
        if kept is None:
            raise
        _hand_out(profile, kept)


def _as_owner(config: Config, profile: Profile, lock: int) -> None:
    with desk(config, lock=lock, mints=[profile], only=profile) as at:
        broker = at.broker
        drive(at, lambda: broker.settled(profile.name), ANSWER_SECONDS)
        # A key that a slow gateway has minted by now is not thrown away for a few seconds.
        drive(at, lambda: not broker.about_to_publish(profile.name), ANSWER_SECONDS)
        found = broker.credential(profile.name)
        if found is None:
            raise broker.why_not(profile.name)
        _hand_out(profile, found)
        # The reader waits for our end. What a gateway that hangs keeps us from doing now, a later
        # command does: a look-up or a revocation that is cut off is done again.
        broker.wind_down()
        with suppress(JournalError):  # it was answered, and is not answered twice
            drive(at, lambda: False, AFTERWARDS_SECONDS, patience=0)
        at.pool.close(at_once=True)


def _from_cache(
    config: Config, profile: Profile, *, journal_is_broken: bool = False
) -> Credential | None:
    """Read the sealed key without being the owner; None when it may not be handed out."""
    if not journal_is_broken:
        with desk(config, lock=None, only=profile) as at:
            return at.broker.credential(profile.name)
    sealed = sealed_alone(config, profile)
    if sealed is None or (sealed.issuer.type, sealed.issuer.url) != (
        profile.issuer.type,
        profile.issuer.url,
    ):
        return None
    reading = judge(sealed.anchor, Clock().read())
    ends = sealed.credential.lease.expires_at
    alive = not reading.doubtful and (ends is None or reading.now < ends)
    return sealed.credential if alive else None


def _hand_out(profile: Profile, credential: Credential) -> None:
    Audit(state()).write(
        Clock().read().wall,
        "given",
        profile.name,
        fingerprint=credential.secret.fingerprint,
        **asker(),
    )
    sys.stdout.write(f"{credential.secret.reveal()}\n")
    sys.stdout.flush()


@click.command("rotate")
@for_profile
@click.option("--all", "every", is_flag=True, help="Every profile.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@JSON
def rotate_command(profile: str | None, every: bool, dry_run: bool, as_json: bool) -> None:
    """Replace the key of PROFILE now.

    The new key is verified before the old one is given up, and the old one is revoked one hold
    later. A source whose keys somebody else rotates is read again.
    """
    _not_both(profile, every)
    config = configuration()
    chosen = list(config.profiles.values()) if every else [config.profile(profile)]
    if dry_run:
        Journal(state()).read()  # damaged, it would stop the real thing
        plan = [
            {"profile": one.name, "mints_at": one.issuer.url if minted(one) else None}
            for one in chosen
        ]
        if as_json:
            print_json(plan)
            return
        for one in chosen:
            what = f"minted at {one.issuer.url}" if minted(one) else "read again"
            print(f"{one.name}: a new key would be {what}")
        return
    results, first_problem = [], None
    with owner() as lock, desk(config, lock=lock, mints=chosen) as at:
        before = {one.name: at.broker.slots(one.name).current for one in chosen}
        for one in chosen:
            at.broker.hurry(one.name)
        with progress("rotating"):
            drive(at, lambda: all(_rotated_or_failed(at, one) for one in chosen), ACT_SECONDS)
        for one in chosen:
            slots = at.broker.slots(one.name)
            old, new = before[one.name], slots.current
            if slots.rotate or new is None:
                problem = at.broker.why_not(one.name)
                first_problem = first_problem or problem
                results.append({"profile": one.name, "rotated": False, "error": problem.message})
                continue
            changed = old is None or old.label != new.label
            results.append(
                {
                    "profile": one.name,
                    "rotated": changed,
                    "fingerprint": new.fingerprint,
                    "replaced": old.fingerprint if old is not None and changed else None,
                    "expires_at": new.lease.expires_at,
                    "revokes_at": next(
                        (k.revoke_at for k in slots.retired if old and k.label == old.label), None
                    ),
                }
            )
        at.broker.wind_down()
        drive(at, lambda: False, AFTERWARDS_SECONDS, patience=0)
        at.pool.close(at_once=True)
    if as_json:
        print_json(results)
    else:
        for result in results:
            _say_rotated(result)
    if first_problem is not None:
        raise first_problem


def _not_both(profile: str | None, every: bool) -> None:
    if every and profile is not None:
        raise click.UsageError("name a profile or give --all, not both")


def _rotated_or_failed(at: Desk, profile: Profile) -> bool:
    slots = at.broker.slots(profile.name)
    return not slots.rotate or slots.failures > 0


def _say_rotated(result: dict[str, object]) -> None:
    name = result["profile"]
    if "error" in result:
        return
    if not result["rotated"]:
        print(f"{name}: still {result['fingerprint']}; its owner has not rotated it")
        return
    old = f"{result['replaced']} → " if result["replaced"] else ""
    line = f"{name}: {old}{result['fingerprint']}"
    now = Clock().read().wall
    if isinstance(ends := result["expires_at"], datetime):
        line += f", valid until {on_the_clock(ends)} ({in_words(ends - now)})"
    if isinstance(at := result["revokes_at"], datetime):
        line += f"; the old key is revoked at {on_the_clock(at)} (in {in_words(at - now)})"
    print(line)


@click.command("revoke")
@for_profile
@click.option("--all", "every", is_flag=True, help="Every profile that the journal knows.")
@click.option("--dry-run", is_flag=True, help="Say which keys would be revoked.")
@JSON
def revoke_command(profile: str | None, every: bool, dry_run: bool, as_json: bool) -> None:
    """End every key of PROFILE at its gateway, at once.

    It works from the journal alone: a configuration that is gone or broken is not needed, only
    the admin key that minted them.
    """
    _not_both(profile, every)
    try:
        config = configuration()
    except ConfigError as error:
        config = Config({}, None, "auto", ())
        print(f"keybroker: {error.message}; going by the journal alone", file=sys.stderr)
    known = replay(Journal(state()).read())
    if every:
        chosen = [name for name, slots in known.items() if slots.keys or slots.open]
    elif profile is not None and (profile in known or profile in config.profiles):
        chosen = [profile]
    elif profile is None and not config.profiles and len(known) == 1:
        chosen = list(known)
    else:
        chosen = [config.profile(profile).name]
    for name in chosen:
        if name in config.profiles and not minted(config.profiles[name]) and name not in known:
            raise SourceInvalid(
                f"{name}: somebody else keeps its key, which is not ours to revoke",
                hint="end it where it was made",
            )
    if dry_run:
        doomed = [(name, key) for name in chosen if name in known for key in known[name].keys]
        if as_json:
            print_json(
                [
                    {"profile": name, "fingerprint": key.fingerprint, "at": str(key.issuer)}
                    for name, key in doomed
                ]
            )
            return
        for name, key in doomed:
            print(f"{name}: {key.fingerprint} at {key.issuer} would be revoked")
        return
    with owner() as lock, desk(config, lock=lock) as at:
        results = [_revoke(at, name) for name in chosen]
        at.pool.close(at_once=True)  # what a gateway that hangs keeps us from is done again
    if as_json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['profile']}: {result['revoked']} revoked")
            if result["unsettled"]:
                what = "calls got no answer and may yet turn out to have made keys"
                print(f"  {result['unsettled']} {what}; later commands look them up")
    left = [result for result in results if result["left"]]
    if left:
        first = left[0]
        kind = CLASSES.get(str(first["code"]), SourceUnavailable)
        raise kind(
            f"{first['profile']}: {first['left']} not yet confirmed: {first['error']}",
            hint=str(first["hint"] or "every later command tries again; see keybroker status"),
        )


def _revoke(at: Desk, name: str) -> dict[str, object]:
    if name not in at.broker.names():
        return {
            "profile": name,
            "revoked": 0,
            "left": 0,
            "unsettled": 0,
            "error": None,
            "code": None,
            "hint": None,
        }
    count = _ours(at, name)
    at.broker.end(name, "revoked by request")
    with progress(f"{name}: revoking"):
        drive(at, lambda: _revoked_or_denied(at, name), ACT_SECONDS)
    at.pool.call("cache", "forget", ACT_SECONDS, profile=name)
    slots = at.broker.slots(name)
    left = _ours(at, name)
    trouble = slots.trouble
    return {
        "profile": name,
        "revoked": count - left,
        "left": left,
        "unsettled": at.broker.unsettled(name),
        "error": trouble.message if trouble else None,
        "code": trouble.code if trouble else None,
        "hint": trouble.hint if trouble else None,
    }


def _ours(at: Desk, name: str) -> int:
    return sum(key.lease.revocable for key in at.broker.slots(name).keys)


def _revoked_or_denied(at: Desk, name: str) -> bool:
    """Say whether trying again now would be no use."""
    slots = at.broker.slots(name)
    denied = slots.trouble is not None and slots.trouble.code != SourceUnavailable.code
    keys = [key for key in slots.keys if key.lease.revocable]
    looked = all(one.looks or one.failures for one in slots.open)
    return looked and (not keys or (denied and all(key.failures for key in keys)))


@click.command("sweep")
@for_profile
@click.option("--yes", is_flag=True, help="Revoke without asking.")
@click.option("--dry-run", is_flag=True, help="Only list them.")
@JSON
def sweep_command(profile: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Revoke keys at the gateway that are this installation's and that no journal knows.

    Only labels that begin with this installation's own prefix are looked at. They are listed
    first; without --yes and without a terminal to ask at, nothing is revoked.
    """
    config = configuration()
    chosen = [config.profile(profile)] if profile else list(config.profiles.values())
    places = {(one.type, one.issuer.url): one for one in chosen if minted(one)}
    if not places:
        raise ConfigError(
            "sweep: no configured profile mints keys, so no gateway can be asked",
            hint="keybroker config path",
        )
    with owner() as lock, desk(config, lock=lock) as at:
        begins = prefix(at.instance)
        known = {one.label for name in at.broker.names() for one in at.broker.slots(name).all}
        orphans = []
        for one in places.values():
            with progress(f"listing keys at {one.issuer.url}"):
                found = at.pool.call(one.type, "sweep", ACT_SECONDS, profile=one, prefix=begins)
            orphans += [
                (one, f["label"], f["lease"])
                for f in found["found"]
                if f["label"] not in known and is_label(f["label"])
            ]
        rows = [
            {"label": label, "at": one.issuer.url, "expires_at": lease.get("expires_at")}
            for one, label, lease in orphans
        ]
        if as_json:
            print_json(rows)
        else:
            for row in rows:
                print(f"{row['label']}  at {row['at']}  ends {row['expires_at'] or 'never'}")
            if not rows:
                print(f"no key begins with {begins} that the journal does not know")
        if dry_run or not orphans:
            return
        if not yes:
            if not sys.stdin.isatty():
                raise NotReady(f"sweep: {len(orphans)} found, none revoked", hint="add --yes")
            click.confirm(f"Revoke {len(orphans)}?", abort=True)
        for one, label, lease in orphans:
            at.pool.call(
                one.type, "end", ACT_SECONDS, profile=one, label=label, lease=decode_lease(lease)
            )
        print(f"{len(orphans)} revoked", file=sys.stderr if as_json else sys.stdout)


@click.command("check")
@for_profile
@click.option(
    "--min-remaining",
    type=Duration(),
    default=timedelta(0),
    help="How long the key must still live, such as 30m.",
)
@JSON
def check_command(profile: str | None, min_remaining: timedelta, as_json: bool) -> None:
    """Exit 0 if PROFILE has a key with enough time left; 75 if not. Asks no gateway."""
    config = configuration()
    wanted = config.profile(profile)
    with desk(config, lock=None, only=wanted) as at:
        now = at.broker.now(wanted.name)
        current = at.broker.slots(wanted.name).current
        held = at.broker.credential(wanted.name) is not None
    left: timedelta | None = None
    if current is not None and held and not expired(current, now):
        ends = current.lease.expires_at
        left = timedelta.max if ends is None else ends - now
    enough = left is not None and left >= min_remaining
    if as_json:
        seconds = None if left is None or left == timedelta.max else left.total_seconds()
        print_json({"profile": wanted.name, "ok": enough, "remaining_s": seconds})
    elif left is not None:
        print(f"{wanted.name}: {'no end' if left == timedelta.max else in_words(left) + ' left'}")
    if not enough:
        what = "no key" if left is None else f"only {in_words(left)} left"
        raise NotReady(f"{wanted.name}: {what}", hint=f"keybroker rotate {wanted.name}")
