"""The resident process: builds the pieces; signals, readiness, the loop.

One thread, one selector: the listening socket, the workers' pool, a pipe of signals, what the
kernel tells of clocks and files. Every turn ends with the time of the next; in between there is
nothing to wake up for.
"""

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import keybroker
from keybroker import (
    __version__,
    aws,
    document,
    guidance,
    kernel,
    listening,
    outcomes,
    paths,
    signin,
    standing,
    starting,
    vault,
    wire,
)
from keybroker.answering import Answers, Job
from keybroker.audit import Audit
from keybroker.broker import Broker
from keybroker.carry import decode_session
from keybroker.clock import Clock
from keybroker.config import load
from keybroker.credential import Issuer, Secret
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    place,
)
from keybroker.handout import Sealed
from keybroker.journal import COMPACT_ABOVE, Journal, write_time
from keybroker.label import is_made, is_run
from keybroker.listening import Begun
from keybroker.log import Log
from keybroker.ownership import Ownership
from keybroker.paths import Disk
from keybroker.pool import Answer, Pool, sessions, variables
from keybroker.push import Push, SettingsFiles
from keybroker.rotation import Kind
from keybroker.server import Client, Server, peer_uid
from keybroker.slots import REPLACED, replay

NEVER = float("inf")  # `math` is a library more
TURN_SECONDS = 20.0  # a turn that takes longer kills the process
REARM_SECONDS = 1.0  # while there is no sleep between turns
AT_A_TIME = 8  # profiles that a turn looks at before clients get theirs
OPEN_SECONDS = 10.0
OPENS = 3  # times that a worker may die of it before we go on without
UNLOCK_SECONDS = (60.0, 3600.0)  # between two looks at a locked keyring: at first, at most
ACT_SECONDS = 20.0  # for a command's request
BORROWED_SECONDS = 0.1  # between two looks whether the lock is free again
COMPACT_SECONDS = 30.0
HOOK_SECONDS = 20.0  # a worker's hard timer; the program gets less
MEND_SECONDS = 0.5  # until guidance that somebody removed is written anew; it may all be going
LISTEN_SECONDS = 2.0  # between two tries to listen where that cannot be done for now
MOST_WRITTEN = 10 * COMPACT_ABOVE  # records; then nothing is begun until the journal is compacted
STOP_SECONDS = 5.0  # for what is under way when the daemon is told to end
FINISH_SECONDS = 60.0  # the same before another version takes over, for which nobody waits
SETTLE_SECONDS = 2.0  # after an installation's last change to our files
LONGEST_PAUSE = 300.0  # between two tries to load it; then it is not tried any more
TRIED_SECONDS = 0.1  # between two looks whether the other version could be loaded
TICK_SECONDS = 30.0  # where a wake-up cannot be told from sleep
FAILED_SECONDS = 1.0  # until the next turn, after one that failed
LONGEST_SLEEP = 86_400.0
JUST_NOW = 0.1  # a file's times are by a clock that goes in steps
PACKAGE = Path(keybroker.__file__)  # written anew by each installation
MOST_WATCHERS = 16
WATCH_APART = 0.2
CLAIM_SECONDS = 10.0  # after a start, until keys are revoked that no program's `run` came for
OVER = "its program has ended"

TYPE_CHECKING = False
if TYPE_CHECKING:  # what most daemons are never asked for costs them nothing
    from keybroker.endings import Ending, Endings
    from keybroker.runs import Runs


def run(begun: Begun, state: str, path: str, form: str) -> int:
    """Serve until told to end; return the exit status."""
    if form == "text" and os.environ.get("JOURNAL_STREAM"):
        form = "journal"
    file = starting.log_file(Path(state))
    log = Log(2, form, str(file) if listening.in_place(2, str(file)) else None)
    try:
        return Daemon(begun, Path(state), path, log).serve()
    except KeybrokerError as error:
        problem = error
    except Exception as error:  # its text may hold a secret; its type does not
        problem = KeybrokerError(f"internal error: {type(error).__name__} at {place(error)}")
    log.say("error", wire.one_line(problem).removeprefix("keybroker: "))
    if begun.inherited:
        owners = (os.geteuid(), 0)
        line = wire.error_line(problem)
        listening.refuse(begun.sockets, line, lambda one: peer_uid(one) in owners)
    else:
        with suppress(OSError):
            os.unlink(path)
    return problem.exit_status


class Daemon:
    """All of it. See `serve`."""

    def __init__(self, begun: Begun, state: Path, path: str, log: Log) -> None:
        self._begun, self._state, self._path, self._log = begun, state, path, log
        self._keys = str(Path(path).parent / paths.KEYS)
        self._clock = Clock()
        self._selector = selectors.DefaultSelector()
        self._signals = _Signals()
        self._journal = Journal(state)
        self._ownership = Ownership(begun.lock, state, begun.place, log)
        self._files = SettingsFiles(state)
        self._files.load()
        self._push = Push(self._files)
        self._watch = kernel.Watch()
        self._timer = kernel.clock_set_timer()
        self._named = paths.named_config(os.environ)
        self._config_files = paths.config_files(os.environ)
        self._file = self._config = load(self._config_files)  # of the second, programs have some
        self._runs: Runs | None = None
        self._claim_until: float | None = NEVER  # None: nobody is waited for any more
        document.forget_reader()
        self._endings = self._logins_that_end()
        self._hooked: set[int] = set()  # requests to tell a program
        self._pool = Pool(state, os.environ, begun.lock)
        self._broker: Broker | None = None
        self._name_variables()
        operations = {
            "about": self._about,
            "status": self._status,
            "glance": self._glance,
            "rotate": self._rotate,
            "revoke": self._revoke,
            "reload": self._reload,
            "retry": self._retry,
            "watch": self._watching,
            "stop": self._stop,
            "lend": self._lend,
            "run": self._run,
            "export": self._export,
            "sign": self._sign,
        }
        self._answers = Answers(self._config, Audit(state), self._files, operations)
        self._answers.excuse = self._lent_out
        self._answers.expects = self._expects
        self._server = Server(
            begun.sockets,
            self._selector,
            self._who_may_ask(),
            self._answers.at_once,
            self._answers.later,
            self._stranger,
        )
        self._seen_package = _content(PACKAGE)
        self._seen_files = document.states(self._config_files)
        self._seen_keys = document.states(self._credential_files())
        self._seen_guidance = document.states(self._guidance_files())
        self._origin = ""
        self._opening: int | None = None  # the request that opens the cache
        self._opens = 0  # times that it had to be sent again
        self._compacting: int | None = None  # the request that compacts the journal
        self._following: int | None = None  # the request that mends settings
        self._follows = True  # it is to be sent
        self._signing: dict[int, Callable[[Answer], None]] = {}  # requests about sign-ins
        self._written = 0  # records since the last time
        self._unlock_at, self._unlock_after = NEVER, UNLOCK_SECONDS[0]
        self._listen_at = NEVER  # the socket is gone and could not be made again
        self._mend_at = NEVER  # somebody changed the guidance
        self._ends_at: float | None = None  # it was told to end
        self._upgrade = Upgrade()
        self._becomes = False  # another version, instead of an end
        self._watchers: list[Client] = []
        self._told_at, self._tell_at = 0.0, NEVER
        self._failures = 0  # turns that ended with an exception
        self._since = self._clock.read().wall

    def serve(self) -> int:
        """
        Answer, rotate and revoke, until a signal or a request ends it.

        Raises:
            JournalError: The journal cannot be read: nothing could be promised.
            OSError: The version that was installed meanwhile cannot be run.
        """
        self._journal.compact()
        self._journal.read()  # damaged, it is said now
        self._register()
        self._write_guidance()
        self._open_cache()
        listening.notify("READY=1")
        self._log.say("info", f"keybroker {__version__} listens at {self._begun.place}")
        wake, armed_at = 0.0, -NEVER
        while not self._over():
            events = self._selector.select(0)
            if not events:
                signal.setitimer(signal.ITIMER_REAL, 0)
                armed_at = -NEVER
                sleep = min(max(0.0, wake - time.monotonic()), LONGEST_SLEEP)
                events = self._selector.select(sleep)
            now = time.monotonic()
            if now - armed_at > REARM_SECONDS:
                signal.setitimer(signal.ITIMER_REAL, TURN_SECONDS)  # its action is death
                armed_at = now
            quiet = True
            try:
                for key, mask in events:
                    quiet = key.data(mask) is True and quiet
                if not quiet or self._answers.stirred or now >= wake:
                    wake = self._turn()
            except Exception as error:  # a fault of ours must not cost anybody a key
                wake = self._failed(error)
        self._end()
        return 0

    # the loop

    def _register(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        read = selectors.EVENT_READ
        self._selector.register(self._signals.fileno(), read, self._signalled)
        self._selector.register(self._pool.fileno(), read, lambda mask: None)
        if self._timer is not None:
            self._selector.register(self._timer, read, self._clock_was_set)
        if self._watch.fd is not None:
            self._selector.register(self._watch.fd, read, self._files_changed)
        self._watch_directories()
        self._look_at_files()

    def _turn(self) -> float:
        """Do what is due; return when to come back, by the monotonic clock."""
        now = time.monotonic()
        self._take(self._pool.receive(0.0))
        if self._broker is not None:
            self._part_with_runs(self._broker, now)
        wake = []
        if self._timer is None or self._watch.fd is None:
            self._look_at_files()
            wake.append(now + TICK_SECONDS)
        if self._broker is not None and not self._ownership.check(self._broker.reread):
            wake.append(now + BORROWED_SECONDS)
        elif self._broker is not None and not self._compacts():
            due = self._broker.turn(AT_A_TIME)
            if due is not None:
                wake.append(now + (due - self._clock.read().wall).total_seconds())
        if self._broker is not None:
            self._tell_news(self._broker)
        if self._endings is not None and self._ends_at is None:
            wake.append(now + self._tell_endings(self._endings))
        if now >= self._unlock_at and not self._ownership.promised:
            self._open_cache()
        if now >= self._listen_at:
            self._listen_at = NEVER
            self._look_at_files()
            self._watch_directories()
        if now >= self._mend_at:
            self._write_guidance()
        if self._upgrade.due is not None and now >= self._upgrade.due:
            self._take_over(now)
        if self._follows and self._following is None and not self._ownership.promised:
            self._follow()
        self._server.tidy(now)
        self._answers.settle()
        if self._answers.named:
            self._answers.named = False
            self._files.save()
            self._watch_directories()
        for file, reason in self._push.run(time.monotonic()):
            self._log.once("warning", f"{file} {reason}: {NOT_TOLD}", about=file)
        self._tell_watchers(now)
        times = [self._pool.limit, self._unlock_at, self._listen_at, self._mend_at, self._ends_at]
        times += [self._push.due(), self._server.due, self._answers.due, self._claim_until]
        times.append(self._upgrade.due)
        wake += [at for at in times if at is not None]
        if self._watchers:
            wake.append(self._tell_at)
        return min(wake)

    def _failed(self, error: Exception) -> float:
        """Say where a turn failed, without its text, which may hold a secret; go on in a while."""
        text = f"internal error: {type(error).__name__} at {place(error)}"
        if isinstance(error, KeybrokerError):
            text = error.message
        self._failures += 1
        self._log.once("error", text, about="turn")
        time.sleep(min(1.0, 0.01 * self._failures))  # never a hot loop
        return time.monotonic() + FAILED_SECONDS

    def _over(self) -> bool:
        if self._ends_at is None:
            return False
        busy = self._broker is not None and self._broker.busy
        busy = busy or self._compacting is not None
        if self._becomes:  # nobody is to notice
            busy = busy or self._answers.busy or self._server.busy
            if self._ownership.promised:  # or the lock would be another's
                self._ends_at = time.monotonic() + BORROWED_SECONDS
                return False
        return not busy or time.monotonic() >= self._ends_at

    def _end(self) -> None:
        """Leave nothing half done that can be finished soon, and nothing that says we listen."""
        self._answers.give_up(NotReady("the daemon was stopped", hint="try again"))
        self._answers.write_audit()
        self._pool.close(at_once=True)
        if self._becomes:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it would outlive us
            command = starting.command(self._state, Path(self._path), self._log.form)
            listening.become(self._server.listeners, self._begun, command)
        self._server.close()
        if not self._begun.inherited:
            with suppress(OSError):
                os.unlink(self._path)
        self._log.say("info", "stopped")

    # the cache, at the beginning and when a locked keyring may have been opened

    def _open_cache(self) -> None:
        self._unlock_at = NEVER
        self._opening = self._pool.send(
            self._kind(),
            "open",
            OPEN_SECONDS,
            urgent=True,
            kind=self._config.cache_key,
            profiles=list(self._config.profiles),
            sessions=sessions(self._config, self._issuers()),
            prune=True,
            keys=self._keys,
            exports=[p.name for p in self._config.profiles.values() if p.export == "file"],
        )

    def _take(self, answers: list[Answer]) -> None:
        for answer in answers:
            self._written += len(answer.records or ())
            if answer.id == self._opening:
                self._opening = None
                self._opened(answer)
            elif answer.id == self._compacting:
                self._compacting = None
                if answer.error is not None:
                    self._log.once("warning", answer.error.message, about="compaction")
            elif answer.id in self._signing:
                self._signing.pop(answer.id)(answer)
                self._look_at_endings()
            elif answer.id in self._hooked:
                self._hooked.discard(answer.id)
                if answer.error is not None:
                    self._log.say("warning", answer.error.message)
            elif answer.id == self._following:
                self._following = None
                if answer.error is not None:
                    self._log.once("warning", answer.error.message, about="settings")
                found = answer.ok or {}
                for problem in found.get("problems", ()):
                    self._log.say("warning", f"{problem}; its TTL is not the new one")
                for file in found.get("changed", ()):
                    self._log.say("info", f"{file} has the new TTL")
        if self._broker is not None and answers:
            self._broker.take(answers)
            self._broker.export_again(_is_gone)  # removed before its folder was watched
            self._something_changed()

    def _compacts(self) -> bool:
        """Have a long journal compacted when nobody writes it; say if nothing else may begin."""
        due = self._written > COMPACT_ABOVE and self._ends_at is None
        if self._compacting is None and due and self._pool.quiet:
            self._written = 0
            self._compacting = self._pool.send(self._kind(), "compact", COMPACT_SECONDS)
        return self._compacting is not None or self._written > MOST_WRITTEN

    def _kind(self) -> str:
        """Return the kind of a worker that is there anyway, for what any can do."""
        return next((p.type for p in self._config.profiles.values()), "cache")

    def _opened(self, answer: Answer) -> None:
        if answer.records is None and self._opens < OPENS:  # its worker died
            self._opens += 1
            self._open_cache()
            return
        self._opens = 0
        found = answer.ok or {}
        problem = answer.error.message if answer.error is not None else ""
        self._origin = found.get("origin", f"memory only: {problem}")
        key = found.get("key")
        wrap_key = None if key is None else Secret(key)
        if wrap_key is None and self._config.cache_key != "memory":
            self._unlock_at = time.monotonic() + self._unlock_after
            self._unlock_after = min(2 * self._unlock_after, UNLOCK_SECONDS[1])
            self._log.once("warning", self._origin, about="cache")
        else:
            self._unlock_after = UNLOCK_SECONDS[0]
            self._log.over(f"keys are sealed with the {self._origin}", about="cache")
        for message in found.get("lost", {}).values():
            self._log.once("warning", message, about=message)
        sealed = Sealed.read_all(found.get("sealed", {}))
        held = [decode_session(one) for one in found.get("sessions", ())]
        if self._broker is None:
            self._broker = Broker(
                self._config.profiles.values(),
                self._journal.read(),
                sealed,
                self._pool,
                instance=paths.instance(self._state),
                wrap_key=wrap_key,
                origin=self._origin.removeprefix("memory only: "),
                locked=found.get("locked", list(self._config.profiles)),
                held=held,
                keeps=True,
                keys=self._keys,
                mints=_Everything(),
                clock=self._clock,
                reread=self._journal.read,
            )
            self._claim_until = time.monotonic() + CLAIM_SECONDS
            self._answers.begin(self._broker)
            self._push_what_was_cut_off(self._broker)
            kernel.trim()
        elif wrap_key is not None:
            self._broker.unlock(wrap_key, self._origin, sealed, held)

    def _push_what_was_cut_off(self, broker: Broker) -> None:
        """Tell clients of a key that was replaced when no daemon was there, or one that ended."""
        told = self._files.changed_at()
        if told is None:
            return
        for profile in self._config.profiles.values():
            for key in broker.slots(profile.name).retired:
                if key.why != REPLACED or key.retired is None or not profile.push:
                    continue
                if key.retired.wall.timestamp() > told + JUST_NOW:
                    self._push.replaced(time.monotonic())

    # what the outside says

    def _signalled(self, mask: int) -> None:
        came = set(self._signals.read())  # however often
        if came & {signal.SIGTERM, signal.SIGINT}:
            self._begin_to_end()
        elif signal.SIGHUP in came:
            self._configure()

    def _begin_to_end(self) -> None:
        if self._ends_at is None or self._becomes:
            self._becomes = False
            listening.notify("STOPPING=1")
            self._ends_at = time.monotonic() + STOP_SECONDS
            if self._broker is not None:
                self._broker.wind_down()

    def _take_over(self, now: float) -> None:
        """Become the version that was installed, if it can be loaded; else go on."""
        found = self._upgrade.look(now)
        if found is False:
            text = "keybroker was replaced by what cannot be loaded; this one goes on"
            self._log.once("error", text, about="upgrade")
        elif found and self._ends_at is None:
            self._log.say("info", "keybroker was replaced; what is installed now takes over")
            listening.notify(_reloading())
            self._becomes = True
            self._ends_at = now + FINISH_SECONDS

    def _clock_was_set(self, mask: int) -> None:
        assert self._timer is not None
        kernel.rearm_clock_set_timer(self._timer)
        if self._broker is not None:
            self._broker.clock_was_set()

    def _files_changed(self, mask: int) -> None:
        self._watch.read()
        self._watch_directories()  # first: what is written into a folder from now on is told
        self._look_at_files()

    def _look_at_files(self) -> None:
        """Read what is new: configuration, credentials. Listen anew where the socket is gone."""
        files, keys = document.states(self._config_files), document.states(self._credential_files())
        if (package := _content(PACKAGE)) not in (self._seen_package, None):
            self._seen_package = package
            self._upgrade.seen(time.monotonic())
        if files != self._seen_files:
            self._seen_files = files
            self._configure()
        if keys != self._seen_keys:
            self._seen_keys = keys
            if self._broker is not None:
                self._broker.retry()
        if self._seen_guidance != document.states(self._guidance_files()):
            self._mend_at = min(self._mend_at, time.monotonic() + MEND_SECONDS)
        if not self._begun.inherited and self._ends_at is None and not os.path.exists(self._path):
            self._listen_again()
        if self._broker is not None:
            self._broker.export_again(_is_gone)

    def _listen_again(self) -> None:
        """The socket's file is gone: make another, or nobody could ask."""
        try:
            paths.private_directory(Path(self._path).parent)
            self._server.replace(listening.listen(self._path))
            self._watch_directories()  # the folder may be another
            self._write_guidance()
            self._log.say("warning", f"{self._path} was removed; it was made again")
        except (OSError, ConfigError) as error:  # a logout took the folder; a login makes another
            self._listen_at = time.monotonic() + LISTEN_SECONDS
            self._log.once("error", f"{self._path}: cannot listen ({error})", about="socket")

    def _watch_directories(self) -> None:
        wanted = {Path(self._path).parent}
        wanted |= {Path(self._keys)} if os.path.isdir(self._keys) else set()
        for file in (*self._config_files, *self._credential_files()):
            # a link, and what it leads to, if not back to itself
            wanted |= {file.parent, Path(os.path.realpath(file)).parent}
            wanted |= {file} if file.is_dir() else set()
        used = [file.parent for file in (*self._config.files, *self._credential_files(), PACKAGE)]
        places: set[Path] = set()
        while (now := wanted.union(map(_standing, used))) != places:  # one came meanwhile
            places = now
            self._watch.directories(places)

    def _credential_files(self) -> list[Path]:
        """Return the files that credentials are read from."""
        named = [name for one in self._file.logins.values() for name in one.files]
        for issuer in (one for p in self._config.profiles.values() for one in p.asked):
            admin = issuer.admin
            named += [str(admin.value)] if admin is not None and admin.kind == "file" else []
            named += vault.files(issuer.vault) if issuer.vault else []
            named += aws.files(os.environ) if issuer.aws else []
        return [Path(name).expanduser() for name in named]

    def _configure(self) -> ConfigError | None:
        """Read the configuration again; a bad one changes nothing."""
        listening.notify(_reloading())
        try:
            fresh = load(self._config_files)
            for file in self._file.files:
                if file not in fresh.files:  # moved for a moment, by an editor; or for good
                    raise ConfigError(f"{file}: is gone")
        except ConfigError as error:
            text = f"{error.message}; the configuration before it stays in use"
            self._log.once("error", text, about="config")
            return error
        finally:
            document.forget_reader()
            listening.notify("READY=1")
        self._log.over("the configuration is good again", about="config")
        changed = fresh != self._file
        cache_changed = fresh.cache_key != self._file.cache_key
        self._file = fresh
        self._files.off.clear()
        if changed:
            self._endings = self._logins_that_end()
            self._log.say("info", f"configuration read, {len(fresh.profiles)} profiles")
        self._use()
        if cache_changed:
            self._open_cache()
        self._write_guidance()
        self._follows = True
        self._watch_directories()
        return None

    def _use(self) -> None:
        """Go on with the file's profiles, and with those that programs have."""
        with_runs = self._file if self._runs is None else self._runs.over(self._file)
        self._config = self._answers.config = with_runs
        self._server.uids = self._who_may_ask()
        self._name_variables()
        if self._broker is not None:
            self._broker.configure(self._config.profiles.values())

    def _who_may_ask(self) -> frozenset[int]:
        """Return the uids that are answered; what each of the others may have is noted."""
        owners = {os.geteuid(), 0} if self._file.shared else {os.geteuid()}
        theirs: dict[int, set[str]] = {}
        for profile in self._file.profiles.values():
            for name in profile.users:
                uid = _uid_of(name)
                if uid is None:
                    text = f"profiles.{profile.name}.users: nobody is called {name!r}"
                    self._log.once("warning", text, about=text)
                elif uid not in owners:
                    theirs.setdefault(uid, set()).add(profile.name)
        self._answers.owners = frozenset(owners)
        self._answers.others = {uid: self._file.of(names) for uid, names in theirs.items()}
        return frozenset(owners.union(theirs))

    def _name_variables(self) -> None:
        self._pool.named = variables(self._config, self._issuers())

    def _issuers(self) -> list[Issuer]:
        """Return where the keys that are not gone were minted."""
        if self._broker is None:
            known = replay(self._journal.read())
        else:
            known = {name: self._broker.slots(name) for name in self._broker.names()}
        return [one.issuer for slots in known.values() for one in slots.all]

    def _stranger(self, uid: int) -> None:
        self._log.once("warning", f"user {uid} was turned away", about=f"uid {uid}")

    # what it tells

    def _tell_news(self, broker: Broker) -> None:
        news, broker.news = broker.news, []
        for one in news:
            if one.what in ("published", "replaced"):
                self._log.say("info", f"key {one.text} is handed out", one.profile)
                profile = self._config.profiles.get(one.profile)
                if one.what == "replaced" and profile is not None and profile.push:
                    self._push.replaced(time.monotonic())
            elif one.what == "trouble":
                self._look_at_endings()  # a sign-in may be what ended
                self._log.once("warning", one.text, one.profile, about="trouble")
            elif one.what == "recovered":
                self._log.over("works again", one.profile, about="trouble")
            elif one.what == "late":
                text = f"its key ends at {one.text} and could not be replaced yet"
                self._log.say("error", text, one.profile)
        if news:
            listening.notify(f"STATUS={self._summary(broker)}")

    def _logins_that_end(self) -> "Endings | None":
        """Return who knows when sign-ins end, where there are any."""
        if not self._file.logins:
            return None
        from keybroker.endings import Endings

        return Endings(self._state, self._file)

    def _look_at_endings(self) -> None:
        if self._endings is not None:
            self._endings.hurry()

    def _soon(self) -> "dict[str, Ending]":
        return {} if self._endings is None else self._endings.soon

    def _tell_endings(self, endings: "Endings") -> float:
        """Say which sign-ins end, once each; return the seconds until it is due again."""
        from keybroker.endings import EVENT, file_of_told

        wall = self._clock.read().wall
        command = self._file.hooks.get(EVENT)
        for one in endings.look(wall):
            self._something_changed()
            if not one.standing.ended:  # which its profiles say
                self._log.say("warning", f"{one.text}; run: {one.command}")
            if command is not None:
                file = file_of_told(self._state, one.login)
                number = self._pool.send(
                    "hooks",
                    "hook",
                    HOOK_SECONDS,
                    command=command,
                    facts=one.facts,
                    file=str(file),
                    mark=one.mark,
                )
                self._hooked.add(number)
        return (endings.due - wall).total_seconds()

    def _summary(self, broker: Broker) -> str:
        ready = sum(broker.credential(name) is not None for name in self._config.profiles)
        return f"{ready} of {len(self._config.profiles)} profiles have a key"

    def _write_guidance(self) -> None:
        self._mend_at = NEVER
        try:
            folder = Path(self._path).parent
            guidance.write(folder, self._file.profiles.values(), self._file.default, Disk())
        except OSError as error:
            text = f"guidance cannot be written ({error.strerror})"
            self._log.once("warning", text, about="guidance")
        self._seen_guidance = document.states(self._guidance_files())

    def _follow(self) -> None:
        """Have the TTL mended in settings files that were connected so, if there are any."""
        self._follows = False
        with suppress(OSError):
            record = Disk().read(self._state / paths.CONNECTIONS) or b""
            if b'"follow": true' in record:
                profiles = self._file.profiles
                ttls = {
                    name: guidance.environment(one)[guidance.TTL_VARIABLE]
                    for name, one in profiles.items()
                }
                self._following = self._pool.send(self._kind(), "follow", ACT_SECONDS, ttls=ttls)

    def _guidance_files(self) -> list[Path]:
        folder = Path(self._path).parent
        return [folder / name for name in guidance.names(self._file.profiles)]

    # control

    def _lent_out(self) -> KeybrokerError | None:
        if not self._ownership.promised:
            return None
        return NotReady("another command is at work", hint="try again when it is done")

    def _ready(self) -> Broker:
        if self._broker is None:
            raise NotReady("the daemon is still starting", hint="try again")
        if (lent := self._lent_out()) is not None:
            raise lent
        return self._broker

    def _chosen(self, asked: Mapping[str, Any], every: Iterable[str]) -> list[str]:
        names = asked.get("profiles")
        if names == wire.EVERY:
            return list(every)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise NobodyAnswers("the daemon was asked in words it does not know")
        known = self._ready().names()
        for name in names:
            if name not in known:
                self._config.profile(name)
        return names

    def _status(self, asked: Mapping[str, Any], client: Client) -> Job:
        def result(late: bool) -> dict[str, Any] | None:
            if self._broker is None:
                return None if not late else self._standing(self._ready(), client.uid)
            return self._standing(self._broker, client.uid)

        return Job(client, result, time.monotonic() + OPEN_SECONDS)

    def _glance(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        client.send(wire.answer(self._at_a_glance(asked, client.uid)), last=True)
        return None

    def _at_a_glance(self, asked: Mapping[str, Any], uid: int) -> str:
        """Say in a line how one profile stands, or why that cannot be told."""
        config = self._answers.config_of(uid)
        if uid in self._answers.owners and asked.get("config", self._named) != self._named:
            return "keybroker ! the daemon has another configuration"
        name = asked.get("profile")
        try:
            profile = config.profile(name if isinstance(name, str) and name else None)
        except ConfigError:
            return "keybroker ! no such profile"
        if self._broker is None:
            return f"{profile.name} starting"
        [row] = standing.rows(self._broker, [profile], self._soon())
        locked = self._broker.locked and self._config.cache_key != "memory"
        return standing.glance(row, locked=locked)

    def _standing(self, broker: Broker, uid: int) -> dict[str, Any]:
        """Say how everything stands, or how that stands which another user may have."""
        config = self._answers.config_of(uid)
        found: dict[str, Any] = {
            "daemon": self._who(),
            "cache": self._origin,
            "profiles": standing.rows(broker, config.profiles.values(), self._soon()),
            "unconfigured": [],
            "runs": [],
            "push": {"known": [], "off": {}, "others": self._file.shared},
        }
        if uid in self._answers.owners:
            found["unconfigured"] = standing.unconfigured(broker, config.profiles)
            found["runs"] = [run.row() for run in self._runs or ()]
            found["push"] |= {"known": self._files.known(), "off": self._files.off}
        return found

    def _about(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        client.send(wire.answer(self._who()), last=True)
        return None

    def _who(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": __version__,
            "since": self._since.isoformat(),
            "socket": self._begun.place,
            "state": str(self._state),
            "config": self._named,
        }

    def _rotate(self, asked: Mapping[str, Any], client: Client) -> Job:
        broker, names = self._ready(), self._chosen(asked, self._config.profiles)
        before = {name: broker.slots(name).current for name in names}
        for name in names:
            if name not in self._config.profiles:
                raise NotReady(f"{name}: is not configured any more")
            broker.hurry(name)

        def result(late: bool) -> list[dict[str, Any]] | None:
            if not late and not all(outcomes.rotated_or_failed(broker, name) for name in names):
                return None
            return [outcomes.rotated(broker, name, before[name]) for name in names]

        return Job(client, result, time.monotonic() + ACT_SECONDS)

    def _revoke(self, asked: Mapping[str, Any], client: Client) -> Job:
        broker = self._ready()
        slots = {name: broker.slots(name) for name in broker.names()}
        ours = [name for name, one in slots.items() if outcomes.ours(broker, name) or one.open]
        names = self._chosen(asked, ours)
        labels = {name: outcomes.ours(broker, name) for name in names}
        for name in names:
            profile = self._config.profiles.get(name)
            followed = profile is not None and profile.kind is Kind.FOLLOWED
            if profile is not None and followed and not outcomes.has_ours(broker.slots(name)):
                raise outcomes.not_ours(profile)
            broker.end(name, "revoked by request")

        def result(late: bool) -> list[dict[str, Any]] | None:
            done = (outcomes.revoked_or_denied(broker, name, labels[name]) for name in names)
            if not late and not all(done):
                return None
            for name in names:
                if broker.slots(name).current is None:  # or it is sealed already
                    self._pool.send("cache", "forget", ACT_SECONDS, profile=name)
            return [outcomes.revoked(broker, name, labels[name]) for name in names]

        return Job(client, result, time.monotonic() + ACT_SECONDS)

    def _reload(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        problem = self._configure()
        if problem is not None:
            raise problem
        if self._broker is not None:
            self._broker.retry(by_hand=True)
        if self._unlock_at < NEVER:
            self._open_cache()
        client.send(wire.answer({"profiles": sorted(self._file.profiles)}), last=True)
        return None

    def _retry(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        """Somebody has seen that a profile's source works."""
        if self._broker is not None:
            self._broker.retry(str(asked.get("profile")), by_hand=True)
        client.send(wire.answer({}), last=True)
        return None

    def _sign(self, asked: Mapping[str, Any], client: Client) -> Job:
        """Keep a sign-in that a command did, or sign out; we are who can seal it."""
        broker, name = self._ready(), str(asked.get("login"))
        sign_in = signin.one_named(name, self._file.logins)
        stage, key = asked.get("stage"), asked.get("key")
        number = self._pool.send(
            "login",
            "sign",
            ACT_SECONDS + sign_in.seconds,
            urgent=True,
            login=sign_in.text,
            stage=stage,
            key=key,
            **broker.opener(sign_in.issuer),
        )
        answered: list[Answer] = []
        ended: list[Answer] = []  # sessions that were begun with it
        waited = self._end_sessions(name, stage, ended)

        def take(answer: Answer) -> None:  # whether or not the command is still there
            answered.append(answer)
            for profile in self._config.profiles.values() if answer.error is None else ():
                if not any(one.name == name for one in profile.logins):
                    continue
                if stage in ("keep", "try"):
                    broker.retry(profile.name, by_hand=True)
                elif stage != "check" and not profile.kind.ours:  # the token itself
                    broker.drop(profile.name)
                    self._pool.send("cache", "forget", ACT_SECONDS, profile=profile.name)

        def result(late: bool) -> Any | None:
            if not late and (not answered or len(ended) < waited):
                return None
            if not answered:
                raise NotReady("the daemon is busy", hint="try again")
            if answered[0].error is not None:
                raise answered[0].error
            left = [one.error.message for one in ended if one.error is not None]
            return {**(answered[0].ok or {}), "left": left}

        self._signing[number] = take
        return Job(client, result, time.monotonic() + ACT_SECONDS + sign_in.seconds)

    def _end_sessions(self, login: str, stage: Any, ended: list[Answer]) -> int:
        """End the sessions that were begun at a Vault with a sign-in which is over; count them."""
        if stage not in ("end", "forget"):
            return 0
        issuers = [one for profile in self._config.profiles.values() for one in profile.asked]
        waited = 0
        for issuer in issuers:
            begins = issuer.vault and vault.logs_in(issuer.vault)  # else it is the sign-in's own
            if not begins or not any(one.name == login for one in signin.needed_by(issuer)):
                continue
            session = self._ready().end_session(issuer)
            if session is None or stage == "forget":
                continue
            number = self._pool.send(
                "vault", "end_session", ACT_SECONDS, vault=issuer.vault, session=session
            )
            self._signing[number] = ended.append
            waited += 1
        return waited

    def _stop(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        client.send(wire.answer({"pid": os.getpid()}), last=True)
        self._begin_to_end()
        return None

    def _watching(self, asked: Mapping[str, Any], client: Client) -> Job | None:
        if len(self._watchers) >= MOST_WATCHERS:
            for one in self._watchers:
                one.ready()  # it may be gone, and its end not be read yet
            self._watchers = [one for one in self._watchers if not one.closed]
        if len(self._watchers) >= MOST_WATCHERS:
            raise NotReady(f"{MOST_WATCHERS} programs watch already", hint="end one of them")
        self._watchers.append(client)
        self._tell_at = 0.0
        return None

    def _tell_watchers(self, now: float) -> None:
        """Send how things stand to those who watch, a few times a second at the most."""
        self._watchers = [client for client in self._watchers if not client.closed]
        if self._watchers and self._broker is not None and now >= self._tell_at:
            self._told_at, self._tell_at = now, NEVER
            line = wire.told(self._standing(self._broker, os.geteuid()))
            for client in self._watchers:
                client.send(line)

    def _something_changed(self) -> None:
        self._tell_at = min(self._tell_at, self._told_at + WATCH_APART)

    # programs with keys of their own

    def _programs(self) -> "Runs":
        """Return who is connected for a program."""
        from keybroker.runs import Runs

        if self._runs is None:
            self._runs = Runs()
        return self._runs

    def _expects(self, name: str) -> bool:
        """Say whether somebody may yet connect who is the one for this profile."""
        early = self._claim_until is not None and time.monotonic() < self._claim_until
        return early and is_run(name) and (self._runs is None or name not in self._runs.seen)

    def _run(self, asked: Mapping[str, Any], client: Client) -> Job:
        """Make a profile for a program, and tell when it has a key; it lasts as the connection."""
        run = self._programs().add(self._file, asked, client, early=self._claim_until is not None)
        name, waits = run.name, True
        if run.profile is not None:
            self._use()

        def result(late: bool) -> dict[str, Any] | None:
            nonlocal waits
            if not late and (self._broker is None or self._ownership.promised):
                return None
            broker = self._ready()
            if waits and name in self._config.profiles:
                waits = False
                broker.ask(name)
            if run.profile is None and name != run.of:  # it has its key, if it was not revoked
                if not (broker.has(name) and broker.slots(name).keys):
                    raise NotReady(f"{name}: its key was revoked meanwhile")
                return {"profile": name, "expires_at": None}
            if not late and not broker.settled(name):
                return None
            current = broker.slots(name).current
            if current is None or broker.credential(name) is None:
                raise self._lent_out() or broker.why_not(name)
            ends = current.lease.expires_at
            return {"profile": name, "expires_at": None if ends is None else write_time(ends)}

        return Job(client, result, time.monotonic() + ACT_SECONDS, lasts=True)

    def _export(self, asked: Mapping[str, Any], client: Client) -> Job:
        """Let a program have its key for good: it is revoked at its end, or with its program."""
        broker, run = self._ready(), self._programs().give(str(asked.get("profile")))
        if run is None:
            raise NobodyAnswers("the daemon was asked in words it does not know")
        broker.export(run.name)
        self._use()
        self._pool.send("cache", "forget", ACT_SECONDS, profile=run.name)

        def result(late: bool) -> dict[str, Any] | None:
            if broker.slots(run.name).current is None:
                return {}
            if late:
                raise broker.why_not(run.name)
            return None

        return Job(client, result, time.monotonic() + ACT_SECONDS)

    def _part_with_runs(self, broker: Broker, now: float) -> None:
        """Revoke the keys of programs that are gone, and of those that nobody came for."""
        over: list[str] = []
        if self._claim_until is not None and now >= self._claim_until:
            if self._ownership.promised:
                self._claim_until = now + CLAIM_SECONDS
                return
            self._claim_until = None
            left = set(filter(is_made, broker.names())).difference(self._config.profiles)
            if left:
                runs = self._programs()
                runs.leaving |= left.difference(run.name for run in runs)
                over += filter(is_run, runs.leaving)
            if self._runs is not None:
                self._runs.seen.clear()
        if self._runs is None or self._ownership.promised:
            return
        gone = self._runs.part()
        over += [run.name for run in gone if is_run(run.name) or run.profile is not None]
        if any(run.profile is not None for run in gone):
            self._use()
        for name in over:
            if broker.has(name):
                broker.end(name, OVER)
            self._pool.send("cache", "forget", ACT_SECONDS, profile=name)
        if self._runs.leaving and not self._answers.commanded:
            self._runs.leaving -= {name for name in self._runs.leaving if broker.forget(name)}

    def _lend(self, asked: Mapping[str, Any], client: Client) -> Job:
        """Let a command be the owner of the state directory while its connection lasts."""
        broker = self._ready()
        self._ownership.promise(client)

        def result(late: bool) -> dict[str, Any] | None:
            busy = broker.busy or not self._pool.quiet
            if busy and not late:
                return None
            if busy:
                self._ownership.keep()
                raise NotReady("the daemon is busy", hint="try again")
            self._pool.close()
            self._ownership.lend()
            return {}

        return Job(client, result, time.monotonic() + ACT_SECONDS, lasts=True)


NOT_TOLD = "sessions that watch it take a new key at their next refresh, or after one 401"


def _reloading() -> str:
    """Return what a service manager is told before a READY=1 that is not the first."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def _standing(folder: Path) -> Path:
    """Return a folder, or the one above it in which it would have to be made again."""
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _uid_of(name: str) -> int | None:
    import pwd  # shared hosts alone have a use for it

    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, OSError):
        return None


def _is_gone(file: str) -> bool:
    return not os.path.exists(file)


def _content(file: Path) -> bytes | None:
    with suppress(OSError):
        return file.read_bytes()
    return None


class _Everything:
    """Contains whatever is asked about."""

    def __contains__(self, item: object) -> bool:
        return True


class Upgrade:
    """
    Whether another version was installed, and can be loaded.

    Attributes:
        due: When to look again, by the monotonic clock; None: nothing was installed.
    """

    def __init__(self) -> None:
        self.due: float | None = None
        self._trial: int | None = None  # a process that loads it
        self._pause = SETTLE_SECONDS

    def seen(self, now: float) -> None:
        """Know that a file of ours was replaced; others may follow."""
        self.due, self._pause = now + SETTLE_SECONDS, SETTLE_SECONDS
        if self._trial is not None:  # of files that were not all there
            os.kill(self._trial, signal.SIGKILL)
            os.waitpid(self._trial, 0)
            self._trial = None

    def look(self, now: float) -> bool | None:
        """Say whether it can be loaded; None when that is not known yet."""
        try:
            self._trial = self._trial or starting.try_out(os.environ)
            ended, status = os.waitpid(self._trial, os.WNOHANG)
        except OSError:  # there is no interpreter
            ended, status = 1, 1
        if not ended:
            self.due = now + TRIED_SECONDS
            return None
        self._trial = self.due = None
        if status != 0 and self._pause < LONGEST_PAUSE:  # not all of it may be there yet
            self._pause *= 2
            self.due = now + self._pause
        return status == 0


class _Signals:
    """A pipe that says which signals came."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in self.NUMBERS:
            signal.signal(number, lambda number, frame: None)

    def fileno(self) -> int:
        return self._read

    def read(self) -> bytes:
        """Return the numbers of the signals that came, without waiting."""
        try:
            return os.read(self._read, 256)
        except BlockingIOError:
            return b""
