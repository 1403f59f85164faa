"""get, rotate, revoke, sweep, check: the commands that act on keys."""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from keybroker import asking, outcomes, paths, services, standing, starting, wire
from keybroker.audit import Audit, asker
from keybroker.cache import sealed_at
from keybroker.cli.base import (
    Duration,
    for_profile,
    in_words,
    is_system,
    of_system,
    on_the_clock,
    print_json,
    progress,
)
from keybroker.cli.work import (
    NO_SYSTEM_DAEMON,
    SYSTEM_STATUS,
    Desk,
    at_work_elsewhere,
    configuration,
    daemon_socket,
    desk,
    drive,
    minted,
    owner,
    sealed_alone,
    state,
)
from keybroker.clock import Clock, judge
from keybroker.config import Config, Profile
from keybroker.credential import Credential, Phase, Secret
from keybroker.errors import (
    CLASSES,
    ConfigError,
    JournalError,
    KeybrokerError,
    LoginNeeded,
    NobodyAnswers,
    NotReady,
    SourceDenied,
    SourceUnavailable,
)
from keybroker.journal import Journal, decode_lease, read_time
from keybroker.label import is_label, is_run, prefix
from keybroker.pool import variables
from keybroker.rotation import Kind
from keybroker.slots import Slots, replay

ANSWER_SECONDS = 8.0  # after ten Claude Code says that a helper is slow
AFTERWARDS_SECONDS = 2.0
ACT_SECONDS = 20.0


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("get")
@for_profile
@of_system
@click.option("--no-start", is_flag=True, help="Start no daemon; do what is due here and now.")
@click.option("--unanswered", is_flag=True, hidden=True)  # by the helper, which asked already
def get_command(profile: str | None, no_start: bool, unanswered: bool) -> None:
    """Print the current key of PROFILE and nothing else.

    The daemon has it ready; if none runs, one is started. While the gateway is out of reach the
    current key is printed until its end. Exit status: 0; 69 nobody can answer, 75 try later,
    77 refused, 78 configuration.
    """
    if profile is not None and is_run(profile):
        _ask_for_run(profile)
        return
    if is_system():
        try:
            _ask_daemon(daemon_socket() or paths.SYSTEM_SOCKET, profile or "-")
        except NobodyAnswers:  # whom the configuration does not name is turned away without a word
            raise NobodyAnswers(NO_SYSTEM_DAEMON, hint=SYSTEM_STATUS) from None
        return
    config = configuration()
    wanted = config.profile(profile)
    try:
        if unanswered and not paths.owner_lock_is_free(state()):
            raise NobodyAnswers("the daemon does not answer", hint="keybroker daemon --stop")
        socket = daemon_socket()
        if socket is not None or not no_start:
            _ask_daemon(socket or start_daemon(config), wanted.name)
            return
    except (NobodyAnswers, JournalError) as error:
        # Whatever became of the daemon: what was sealed and is alive is good for its reader.
        problem: KeybrokerError = error
        try:
            found = _from_cache(config, wanted)
        except JournalError as damage:
            problem, found = damage, _from_cache(config, wanted, journal_is_broken=True)
        if found is None:
            raise problem from None
        _hand_out(wanted, found)
        return
    answer(config, wanted)


def start_daemon(config: Config) -> Path:
    """
    Start a daemon, unless another process is the owner; return where it listens.

    Where a service is installed it is that one, else one in the background.

    Raises:
        NobodyAnswers: It did not come up, or somebody else was at work for too long.
        JournalError: The journal is damaged: none can run.
    """
    where, socket = state(), paths.socket_path(os.environ)
    paths.private_directory(socket.parent)
    until = time.monotonic() + ANSWER_SECONDS
    while not paths.owner_lock_is_free(where):
        if (found := daemon_socket()) is not None:
            return found
        if time.monotonic() > until:
            raise at_work_elsewhere()
        time.sleep(0.05)
    service = services.installed(os.environ)
    if service is not None and service.begin():  # not in a container with this HOME
        return daemon_socket() or socket
    named = {name for names in variables(config).values() for name in names}
    pid = starting.start(where, socket, starting.scrubbed(os.environ, named))
    try:
        starting.wait(pid, socket)
    except NobodyAnswers as error:
        Journal(where).read()  # if this is why, it is said
        raise NobodyAnswers(error.message, hint=f"see {starting.log_file(where)}") from None
    return socket


def key_at_hand(config: Config, profile: Profile) -> Secret:
    """
    Return a profile's key, for a command that presents it to the gateway; start a daemon for it.

    Raises:
        KeybrokerError: There is none.
    """
    socket = daemon_socket() or start_daemon(config)
    status, text = asking.read_reply(wire.ask(socket, wire.request(profile.name))) or (69, "")
    if status == 0:
        return Secret(text)
    kinds = {75: NotReady, 77: SourceDenied, 78: ConfigError}
    said = text.removeprefix("keybroker: ") or "the daemon did not answer"
    raise kinds.get(status, NobodyAnswers)(said)


def _ask_for_run(name: str) -> None:
    """Ask for a key that was made for a program: `keybroker run` starts a daemon that ended."""
    until = time.monotonic() + ANSWER_SECONDS
    socket = None
    while socket is None:
        with suppress(NobodyAnswers):
            socket = daemon_socket()
        if socket is None and time.monotonic() > until:
            raise NobodyAnswers(f"{name}: no daemon runs, and no `keybroker run` starts one")
        if socket is None:
            time.sleep(0.05)
    _ask_daemon(socket, name)


def _ask_daemon(socket: Path, name: str) -> None:
    reply = wire.ask(socket, asking.request(name.encode(), dict(os.environb)))
    status, text = asking.read_reply(reply) or (69, "")
    if status == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        return
    sys.stderr.write(f"{text}\n")
    raise click.exceptions.Exit(status)


def answer(config: Config, profile: Profile) -> None:
    """
    Find the key to hand out, print it, then do what else is due; without a daemon.

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
@of_system
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
            {
                "profile": one.name,
                "mints_at": one.issuer.url if minted(one) else None,
                "publishes_at": None if one.publish is None else str(one.publish.issuer),
            }
            for one in chosen
        ]
        if as_json:
            print_json(plan)
            return
        for one in chosen:
            what = "the source would be read again"
            if minted(one):
                what = f"a new key would be minted at {one.issuer.url}"
            if one.publish is not None:
                what += f" and published at {one.publish.issuer}"
            print(f"{one.name}: {what}")
        return
    names = [one.name for one in chosen]
    with progress("rotating"):
        socket = daemon_socket()
        if socket is not None:
            results = wire.control(
                socket, "rotate", ACT_SECONDS + 5, profiles=wire.EVERY if every else names
            )
        else:
            results = _rotate(config, chosen)
    if as_json:
        print_json(results)
    else:
        for result in results:
            _say_rotated(result)
    for result in results:
        if "error" in result:
            raise CLASSES.get(result["code"], NotReady)(result["error"], hint=result["hint"])


def _rotate(config: Config, chosen: list[Profile]) -> list[dict[str, Any]]:
    """Rotate without a daemon."""
    with owner() as lock, desk(config, lock=lock, mints=chosen) as at:
        broker = at.broker
        before = {one.name: broker.slots(one.name).current for one in chosen}
        for name in before:
            broker.hurry(name)
        names = list(before)
        drive(at, lambda: all(outcomes.rotated_or_failed(broker, n) for n in names), ACT_SECONDS)
        results = [outcomes.rotated(broker, name, old) for name, old in before.items()]
        broker.wind_down()
        drive(at, lambda: False, AFTERWARDS_SECONDS, patience=0)
        at.pool.close(at_once=True)
    return results


def _not_both(profile: str | None, every: bool) -> None:
    if every and profile is not None:
        raise click.UsageError("name a profile or give --all, not both")


def _say_rotated(result: dict[str, Any]) -> None:
    name = result["profile"]
    if "error" in result:
        return
    if not result["rotated"]:
        print(f"{name}: {result['fingerprint']} is what the source has; there is no newer one")
        if result.get("refused"):  # a daemon of before says nothing of it
            print("  the gateway refuses it: write a new one there")
        return
    old = f"{result['replaced']} → " if result["replaced"] else ""
    line = f"{name}: {old}{result['fingerprint']}"
    now = Clock().read().wall
    if result["expires_at"]:
        ends = read_time(result["expires_at"])
        line += f", valid until {on_the_clock(ends)} ({in_words(ends - now)})"
    if result["revokes_at"]:
        at = read_time(result["revokes_at"])
        line += f"; the old key is revoked at {on_the_clock(at)} (in {in_words(at - now)})"
    print(line)
    if result.get("published"):  # a daemon of before says nothing of it
        print(f"  published at {result['published']}")


@click.command("revoke")
@for_profile
@of_system
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
        if is_system():
            raise
        config = Config({}, None, "auto", ())
        print(f"keybroker: {error.message}; going by the journal alone", file=sys.stderr)
    if is_system() and not dry_run:  # its journal is read by that daemon alone
        known: dict[str, Slots] = {}
    else:
        known = dict(replay(Journal(state()).read()))
    if every and is_system():
        chosen = list(config.profiles)
    elif every:
        chosen = [name for name, slots in known.items() if slots.keys or slots.open]
    elif profile is not None and (profile in known or profile in config.profiles):
        chosen = [profile]
    elif profile is None and not config.profiles and len(known) == 1:
        chosen = list(known)
    else:
        chosen = [config.profile(profile).name]
    for name in chosen:
        followed = name in config.profiles and not minted(config.profiles[name])
        if followed and not is_system() and not outcomes.has_ours(known.get(name, Slots())):
            raise outcomes.not_ours(config.profiles[name])
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
        for name in chosen:
            publish = config.profiles[name].publish if name in config.profiles else None
            if publish is not None:
                print(f"{name}: a new key would be published at {publish.issuer}")
        return
    results = end_keys(config, chosen, every=every)
    if as_json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['profile']}: {result['revoked']} revoked")
            if result.get("published"):  # a daemon of before says nothing of it
                print(f"  a new one is published at {result['published']}; who reads it there")
                print("  is refused until then, and until they look again")
            if result["unsettled"]:
                what = "calls got no answer and may yet turn out to have made keys"
                print(f"  {result['unsettled']} {what}; later commands look them up")
    raise_what_is_left(results)


def end_keys(config: Config, names: list[str], *, every: bool = False) -> list[dict[str, Any]]:
    """
    Revoke all keys of some profiles; return one row a profile.

    Args:
        every: All profiles that the daemon knows are meant.
    """
    with progress("revoking"):
        socket = daemon_socket()
        if socket is not None:
            asked = wire.EVERY if every else names
            found = wire.control(socket, "revoke", ACT_SECONDS + 5, profiles=asked)
            return list(found)
        known = [config.profiles[name] for name in names if name in config.profiles]
        others = [one for one in known if one.publish is not None]  # read what is published
        with owner() as lock, desk(config, lock=lock, mints=others) as at:
            results = [_revoke(at, name) for name in names]
            at.pool.close(at_once=True)  # what a gateway that hangs keeps us from is done again
        return results


def raise_what_is_left(results: list[dict[str, Any]]) -> None:
    """
    Say what was not revoked.

    Raises:
        KeybrokerError: Of the class that the first one failed with.
    """
    left = [result for result in results if result["left"]]
    if left:
        first = left[0]
        kind = CLASSES.get(str(first["code"]), SourceUnavailable)
        raise kind(
            f"{first['profile']}: {first['left']} not yet confirmed: {first['error']}",
            hint=str(first["hint"] or "every later command tries again; see keybroker status"),
        )


def _revoke(at: Desk, name: str) -> dict[str, Any]:
    """Revoke without a daemon."""
    broker = at.broker
    if name not in broker.names():
        return {"profile": name, "revoked": 0, "left": 0, "unsettled": 0, "error": None}
    labels = outcomes.ours(broker, name)
    broker.end(name, "revoked by request")
    drive(at, lambda: outcomes.revoked_or_denied(broker, name, labels), ACT_SECONDS)
    if broker.slots(name).current is None:  # or it is sealed already
        at.pool.call("cache", "forget", ACT_SECONDS, profile=name)
    result = outcomes.revoked(broker, name, labels)
    if broker.published_at(name) is not None:
        drive(at, lambda: broker.settled(name), ACT_SECONDS)
    return result


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
    places = {(one.type, one.issuer.url): one for one in chosen if one.kind is Kind.MINTED}
    if not places:
        raise ConfigError(
            "sweep: no configured profile mints keys, so no gateway can be asked",
            hint="keybroker config path",
        )
    with desk(config, lock=None) as at:  # nothing of the journal's is written
        begins = prefix(at.instance)
        orphans = []
        for one in places.values():
            with progress(f"listing keys at {one.issuer.url}"):
                found = at.call(one, "sweep", ACT_SECONDS, profile=one, prefix=begins)
            # Read after they were listed: a key is in the journal before it is minted.
            known = {o.label for s in replay(Journal(at.state).read()).values() for o in s.all}
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
            at.call(one, "end", ACT_SECONDS, profile=one, label=label, lease=decode_lease(lease))
        print(f"{len(orphans)} revoked", file=sys.stderr if as_json else sys.stdout)


@click.command("check")
@for_profile
@click.option(
    "--min-remaining",
    type=Duration(),
    default=timedelta(0),
    help="How long the key must still live, such as 30m.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing at all; the exit status says it.")
@JSON
def check_command(
    profile: str | None, min_remaining: timedelta, quiet: bool, as_json: bool
) -> None:
    """Exit 0 if PROFILE has a key with enough time left; 75 if not. Asks no gateway.

    77 where there is none because nobody is signed in.

    A key that the gateway was seen to refuse is none, though it is handed out while it is
    replaced.
    """
    if quiet and as_json:
        raise click.UsageError("--quiet prints nothing, and --json prints JSON")
    try:
        _check(profile, min_remaining, quiet=quiet, as_json=as_json)
    except KeybrokerError as error:
        if not quiet:
            raise
        raise click.exceptions.Exit(error.exit_status) from None


def _check(profile: str | None, min_remaining: timedelta, *, quiet: bool, as_json: bool) -> None:
    config = configuration()
    wanted = config.profile(profile)
    row, locked = _row(config, wanted)
    left = _remaining(row)
    refused = row["phase"] == Phase.SUSPECT.value
    enough = left is not None and left >= min_remaining and not refused
    if as_json:
        needed = standing.needs(row, locked=locked)
        print_json(
            {
                "profile": wanted.name,
                "ok": enough,
                "remaining_s": None if left in (None, timedelta.max) else left,
                "phase": row["phase"],
                "fingerprint": row["fingerprint"],
                "expires_at": row["expires_at"],
                "needs": None if needed is None else ": ".join(needed),
            }
        )
    elif left is not None and not quiet:
        print(f"{wanted.name}: {'no end' if left == timedelta.max else in_words(left) + ' left'}")
    if enough:
        return
    if left is None and row["code"] == LoginNeeded.code:
        raise LoginNeeded(row["trouble"], hint=row["hint"])
    if left is None:
        raise NotReady(f"{wanted.name}: no key", hint=f"keybroker get {wanted.name}")
    if refused:
        owner = "its owner has to write a new one" if not minted(wanted) else "it is being replaced"
        raise NotReady(
            f"{wanted.name}: the gateway refused the key; {owner}",
            hint=f"keybroker status {wanted.name}",
        )
    lifetime = wanted.source.get("lifetime")
    better = lifetime is not None and min_remaining < lifetime
    raise NotReady(
        f"{wanted.name}: only {in_words(left)} left",
        hint=f"keybroker rotate {wanted.name}" if better else None,
    )


def _row(config: Config, wanted: Profile) -> tuple[dict[str, Any], bool]:
    """Return how a profile stands, and whether a keyring could not be opened."""
    found: dict[str, Any] = {}
    with suppress(NobodyAnswers):  # what is on disk is good enough then
        if (socket := daemon_socket()) is not None:
            found = wire.control(socket, "status", ACT_SECONDS)
    rows = [row for row in found.get("profiles", ()) if row["profile"] == wanted.name]
    origin = found.get("cache", "")
    if not rows:
        with desk(config, lock=None, only=wanted) as at:
            from keybroker.cli.sign_ins import endings_of

            soon = endings_of(config, state()).soon
            rows, origin = standing.rows(at.broker, [wanted], soon), at.wrap_key.origin
    locked = str(origin).startswith("memory only") and config.cache_key != "memory"
    return {"code": None, **rows[0]}, locked  # a daemon of before says no code


def _remaining(row: dict[str, Any]) -> timedelta | None:
    """Return how long the current key has left; None without one, `max` for one without an end."""
    if not row["held"]:
        return None
    seconds = row["survives_outage_s"]
    return timedelta.max if seconds is None else timedelta(seconds=seconds)
