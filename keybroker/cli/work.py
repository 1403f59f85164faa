"""A broker for one command: state opened, steps driven until there is an answer."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from keybroker import listening, paths, wire
from keybroker.broker import Broker
from keybroker.cache import WrapKey
from keybroker.carry import decode_session
from keybroker.cli.base import is_system
from keybroker.clock import Clock
from keybroker.config import Config, Profile, load
from keybroker.credential import Issuer, Secret, Session
from keybroker.errors import ConfigError, KeybrokerError, NobodyAnswers
from keybroker.handout import Sealed
from keybroker.journal import Journal
from keybroker.pool import Pool, sessions, variables
from keybroker.slots import replay

LOAD_SECONDS = 10.0
ABOUT_SECONDS = 2.0
NO_SYSTEM_DAEMON = "the daemon of this shared host does not answer, or not to you"
SYSTEM_STATUS = "sudo keybroker service status --system"


@dataclass(slots=True)
class Desk:
    """What a command works with; `lock` is None for one that only reads."""

    config: Config
    state: Path
    pool: Pool
    broker: Broker
    wrap_key: WrapKey
    instance: str
    lost: list[str]  # what the cache could not give, in words

    def call(
        self,
        profile: Profile,
        op: str,
        seconds: float,
        /,
        *,
        at: Issuer | None = None,
        **values: Any,
    ) -> Mapping[str, Any]:
        """
        Have one operation done at a profile's source, and wait.

        Args:
            at: Somewhere else that is asked for it.

        Raises:
            KeybrokerError: What the worker answered, or that it died.
        """
        issuer = at or profile.issuer
        session = self.broker.session(issuer)
        opener = self.broker.opener(issuer)
        answer = self.pool.ask(issuer.type, op, seconds, session=session, **opener, **values)
        self.broker.hold(answer.sessions)
        if answer.error is not None:
            raise answer.error
        return answer.ok or {}


def configuration() -> Config:
    """
    Read the configuration.

    Raises:
        ConfigError: It is wrong, or the file that was named for it is not there.
    """
    named = str(paths.SYSTEM_CONFIG) if is_system() else paths.named_config(os.environ)
    if named and not os.path.exists(named):
        raise ConfigError(f"{named}: does not exist", hint=_named_by())
    return load((Path(named),) if is_system() else paths.config_files(os.environ))


def _named_by() -> str:
    return "see docs/service.md" if is_system() else "KEYBROKER_CONFIG names it"


def state() -> Path:
    """
    Return the state directory.

    Raises:
        ConfigError: It is not this user's, or is that of a shared host's daemon, which nobody
            else reads.
    """
    if is_system():
        raise ConfigError("--system: this is for a user's own daemon alone; nobody reads its files")
    return paths.private_directory(paths.state_directory(os.environ))


def daemon_socket() -> Path | None:
    """
    Return where our daemon answers; None when none runs.

    Raises:
        NobodyAnswers: The one that runs does not answer, or has another configuration or
            another state directory.
    """
    if is_system():
        if not listening.answers(str(paths.SYSTEM_SOCKET)):
            raise NobodyAnswers(NO_SYSTEM_DAEMON, hint=SYSTEM_STATUS)
        return paths.SYSTEM_SOCKET
    where = state()
    owner_of_it = paths.owner(where)
    socket = paths.socket_path(os.environ) if owner_of_it is None else owner_of_it.socket
    if not listening.answers(str(socket)):
        return None
    try:
        about = wire.control(socket, "about", ABOUT_SECONDS)
        its_state, its_config = about["state"], about["config"]
    except (NobodyAnswers, KeyError, TypeError):  # or in words that another version may know
        raise NobodyAnswers(
            f"the daemon at {socket} does not answer", hint="keybroker daemon --stop"
        ) from None
    if its_state != str(where):
        raise NobodyAnswers(
            f"the daemon at {socket} has another state directory",
            hint="give each a runtime directory of its own",
        )
    if its_config != paths.named_config(os.environ):
        raise NobodyAnswers(
            f"the daemon that runs reads {its_config or 'the usual configuration'}",
            hint="keybroker daemon --stop",
        )
    return socket


def have_tried_again(profile: str) -> None:
    """Have a daemon, should one run, try again at once what failed: it was seen to work."""
    with suppress(KeybrokerError):
        if (socket := daemon_socket()) is not None:
            wire.control(socket, "retry", ABOUT_SECONDS, profile=profile)


@contextmanager
def desk(
    config: Config,
    *,
    lock: int | None,
    mints: Collection[Profile] = (),
    only: Profile | None = None,
) -> Iterator[Desk]:
    """
    Open journal and cache.

    Args:
        config: As loaded; an empty one where only the journal matters.
        lock: The owner lock, or None to read only.
        mints: The profiles that new keys may be asked for.
        only: The one profile whose sealed key is read; None: all. An owner reads all of them: it
            acts for every profile, and a key that it could not read would count as lost.

    Raises:
        JournalError: The journal cannot be read.
    """
    where = state()
    journal = Journal(where)
    if lock is not None:
        journal.compact()
    records = journal.read()
    issuers = [one.issuer for slots in replay(records).values() for one in slots.all]
    pool = Pool(where, os.environ, lock, variables(config, issuers))
    try:
        wanted = list(config.profiles.values())
        if only is not None:
            others = [one for one in wanted if one is not only and lock is not None]
            wanted = [only, *others]
        wrap_key, sealed, held, lost = _open_cache(pool, config, wanted, issuers)
        broker = Broker(
            config.profiles.values(),
            records,
            sealed,
            pool,
            instance=paths.instance(where),
            wrap_key=wrap_key.key,
            origin=wrap_key.origin.removeprefix("memory only: "),
            held=held,
            keys=str(paths.runtime_directory(os.environ) / paths.KEYS),
            mints={one.name for one in mints},
            clock=Clock(),
            reread=journal.read,
        )
        yield Desk(config, where, pool, broker, wrap_key, paths.instance(where), lost)
    finally:
        pool.close()


@contextmanager
def owner(seconds: float = 10.0) -> Iterator[int]:
    """
    Hold the owner lock, lent by the daemon if one runs; wait for it a while.

    Raises:
        NobodyAnswers: Another process kept it.
    """
    until = time.monotonic() + seconds
    socket = daemon_socket()
    if socket is not None:
        with closing(wire.watch(socket, "lend")) as lent:
            next(lent)
            with _lock(until) as lock:
                yield lock
        return
    with _lock(until) as lock:
        yield lock


@contextmanager
def _lock(until: float) -> Iterator[int]:
    while (lock := paths.take_owner_lock(state())) is None:
        if time.monotonic() > until:
            raise at_work_elsewhere()
        time.sleep(0.05)
    try:
        yield lock
    finally:
        with suppress(OSError):
            os.close(lock)


def at_work_elsewhere() -> NobodyAnswers:
    return NobodyAnswers(
        "another keybroker is at work on the same state directory",
        hint="try again when it is done",
    )


def drive(
    at: Desk, done: Callable[[], bool], seconds: float, *, patience: float | None = None
) -> bool:
    """
    Do what is due until `done`, or until nothing is due within `patience`.

    Args:
        at: The desk.
        done: Checked before each turn.
        seconds: The longest that this takes, one running operation aside.
        patience: The longest to sleep for the next due time; None: as long as `seconds` allow.

    Returns:
        Whether it is done.
    """
    until = time.monotonic() + seconds
    while not done():
        wake = at.broker.turn()
        left = until - time.monotonic()
        if left <= 0:
            return done()
        if at.broker.busy:
            at.broker.take(at.pool.receive(left))
            continue
        pause = None if wake is None else (wake - at.broker.now()) / timedelta(seconds=1)
        if pause is None or pause > (left if patience is None else patience):
            return done()
        time.sleep(max(0.0, min(pause, left)) + 0.001)
    return True


def sealed_alone(config: Config, profile: Profile) -> Sealed | None:
    """Return what the cache has, whatever the journal says; None when it cannot be opened."""
    pool = Pool(state(), os.environ, None, variables(config))
    try:
        return _open_cache(pool, config, [profile])[1].get(profile.name)
    finally:
        pool.close()


def _open_cache(
    pool: Pool, config: Config, wanted: list[Profile], issuers: Sequence[Issuer] = ()
) -> tuple[WrapKey, dict[str, Sealed], list[Session], list[str]]:
    kind = wanted[0].type if wanted else "cache"
    names = [profile.name for profile in wanted]
    found = pool.call(
        kind,
        "open",
        LOAD_SECONDS,
        kind=config.cache_key,
        profiles=names,
        sessions=sessions(config, issuers),
    )
    wrap_key = WrapKey(Secret(found["key"]) if found["key"] else None, found["origin"])
    held = [decode_session(session) for session in found["sessions"]]
    return wrap_key, Sealed.read_all(found["sealed"]), held, list(found["lost"].values())


def minted(profile: Profile) -> bool:
    return profile.kind.ours
