"""A short-lived process that does what blocks: network, disk, keyring. JSON lines in and out.

    {"id":1,"op":"issue","profile":{"name":"work",…},"label":"kb-…"}
    {"id":1,"ok":{"credential":{"secret":"sk-…","lease":{…}}},"records":[{"event":"wanted",…},…]}
    {"id":2,"error":{"code":"unavailable","message":"…","unknown":true},"records":[…]}

It appends `wanted` to the journal and syncs, makes the call, appends `have` and syncs, then
answers. It holds the owner lock that it inherited, so that nobody else mints while it may.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from keybroker import asking, export, kernel, sources
from keybroker.audit import Audit
from keybroker.cache import SESSION, Cache, Cached, find_wrap_key
from keybroker.carry import decode_session, encode_session
from keybroker.clock import Clock, Instant
from keybroker.config import Profile, read_profile
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret, Session
from keybroker.document import Where
from keybroker.errors import (
    CANNOT_KEEP,
    CacheError,
    CacheLocked,
    ConfigError,
    JournalError,
    KeybrokerError,
    NobodyAnswers,
    SourceError,
)
from keybroker.guidance import TTL_VARIABLE
from keybroker.journal import (
    Journal,
    decode_issuer,
    decode_lease,
    encode,
    encode_lease,
    read_time,
)
from keybroker.paths import Disk
from keybroker.slots import Event, Record
from keybroker.sources.held import Held
from keybroker.values import dataclass, field, replace

T = TypeVar("T")
IDLE_SECONDS = 7.0  # above the usual short interval of polls
CALL = timedelta(seconds=8)  # the longest one, where no profile says otherwise
MOST_OPEN = 32  # sources, and so connections, at a time
GATHER_SECONDS = 0.005  # polls that can be answered together come one after the other
HELD_SECONDS = 0.5  # an answer is held back for those that follow it
LONGEST_LINE = 1 << 20
# Everything that a worker does to the world, in the words of the crash tests.
EFFECTS = (
    "wanted",
    "issue",
    "have",
    "renew",
    "renewed",
    "answered",
    "staged",
    "stage",
    "recover",
    "verify",
    "promote",
    "seal",
    "swap",
    "export",
    "retired",
    "find",
    "looked",
    "revoke",
    "gone",
    "forget",
    "keep",
    "sign_in",
    "sign_out",
    "hook",
    "answer",
)


UNRECORDED = ("load", "models", "probe")  # whose failures say nothing of a key


def perform(effect: str, call: Callable[[], T]) -> T:
    """Do one effect. All of them pass through here, so that a test can end us on either side."""
    assert effect in EFFECTS
    return call()


@dataclass(slots=True)
class Operations:
    """What a worker can do, each with the records that it wrote on the way."""

    state: Path
    environment: Mapping[str, str]
    clock: Clock = field(default_factory=Clock)
    disk: Disk = field(default_factory=Disk)
    build: Callable[[Profile, Mapping[str, str], Held], sources.Source] = sources.build
    revoker: Callable[[Issuer, Mapping[str, str], float, Held], sources.Source] = sources.revoker
    store: Callable[[Profile, Mapping[str, str], Held], sources.Store] = sources.store
    records: list[Record] = field(default_factory=list)
    held: Held = field(default_factory=Held)
    _opened: dict[str, Any] = field(default_factory=dict)  # what has a `close`

    def issue(self, profile: Profile, label: str) -> dict[str, Any]:
        """Mint a key: label first, key second, lease third, each synced before the next."""
        source = self._source(profile)
        policy = profile.policy
        wanted = Record(
            self._now(),
            Event.WANTED,
            profile.name,
            label,
            issuer=profile.issuer,
            lifetime=policy.lifetime,
            hold=policy.hold,
        )
        self._write("wanted", self._clocked(wanted))
        try:
            credential = perform("issue", lambda: source.issue(label))
        except KeybrokerError as error:
            if not getattr(error, "unknown", False):  # nothing can have been committed
                gone = Record(self._now(), Event.GONE, profile.name, label, why="refused")
                self._write("gone", gone)
            elif getattr(error, "over", False):
                over = Record(self._now(), Event.ANSWERED, profile.name, label)
                self._write("answered", over)
            raise
        have = Record(
            self._now(),
            Event.HAVE,
            profile.name,
            label,
            lease=credential.lease,
            fingerprint=credential.secret.fingerprint,
        )
        try:
            self._write("have", have)
        except JournalError:
            source.revoke(credential.lease)  # we could not promise to do it later
            raise
        sources.check_hand_out(credential.secret, profile)
        self._audit("minted", profile.name, credential.secret.fingerprint, label=label)
        return {"credential": encode_credential(credential)}

    def renew(self, profile: Profile, label: str, lease: Lease) -> dict[str, Any]:
        """Have a lease's end moved."""
        source = self._source(profile)
        moved = perform("renew", lambda: source.renew(lease))
        record = Record(self._now(), Event.RENEWED, profile.name, label, lease=moved)
        self._write("renewed", record)
        return {}

    def renew_session(self, vault: str) -> dict[str, Any]:
        """Renew a session that nobody has asked with for a while."""
        sources.keep_session(vault, self.environment, self.held)
        return {}

    def end_session(self, vault: str) -> dict[str, Any]:
        """End a session that was begun with a sign-in which is over."""
        sources.end_session(vault, self.environment, self.held)
        return {}

    def poll(self, profile: Profile, lease: Lease | None = None) -> dict[str, Any]:
        """
        Read a followed source.

        Args:
            lease: Of the key that is known: it may be enough to hear that it still counts.
        """
        source = self._source(profile)
        known = None if lease is None else source.look(lease)
        if known is not None:
            return {"lease": encode_lease(known)}
        credential = source.issue("")
        sources.check_hand_out(credential.secret, profile)
        return {"credential": encode_credential(credential)}

    def stage(
        self, profile: Profile, label: str, credential: Credential, base: str | None
    ) -> dict[str, Any]:
        """Put a new key beside what others read, whose version is written down before."""
        store = self._store(profile)
        if base is not None and store.recover(label) is not None:
            return {}  # a worker ended after it had done so, or had published it
        if base is None:
            base = store.standing()
            record = Record(self._now(), Event.STAGED, profile.name, label, why=base)
            self._write("staged", record)
        perform("stage", lambda: store.stage(label, credential))
        self._audit("staged", profile.name, credential.secret.fingerprint, label=label)
        return {}

    def recover(self, profile: Profile, label: str) -> dict[str, Any]:
        """Read back what was put there under a label, if it was."""
        secret = perform("recover", lambda: self._store(profile).recover(label))
        return {"secret": None if secret is None else secret.reveal()}

    def published(self, profile: Profile) -> dict[str, Any]:
        """Look at where keys are published, as for one that was lost; nothing is written."""
        store = self._store(profile)
        version = store.standing()
        store.recover(f"{profile.name}-never-was")
        return {"version": version}

    def verify(self, profile: Profile, secret: Secret) -> dict[str, Any]:
        """Look at the gateway once with a key."""
        verdict = perform("verify", lambda: self._source(profile).verify(secret))
        self._audit(
            "verified",
            profile.name,
            secret.fingerprint,
            look=verdict.look.value,
            method=verdict.method,
            reason=verdict.reason,
        )
        return {"look": verdict.look.value, "method": verdict.method, "reason": verdict.reason}

    def publish(
        self,
        profile: Profile,
        label: str,
        credential: Credential,
        verified: str,
        wrap_key: Secret | None,
        anchor: Instant,
        hold: timedelta | None,
        replaces: str = "",
        base: str | None = None,
    ) -> dict[str, Any]:
        """
        Seal the new key, then say that it is current. Only then may the old one's clock run.

        Args:
            base: The version that it takes the place of, where others read it. One that stands
                there instead is somebody else's, who was first: nothing is changed.
        """
        if base is not None:
            store = self._store(profile)
            if not perform("promote", lambda: store.promote(label, credential, base)):
                self._audit("beaten", profile.name, credential.secret.fingerprint, label=label)
                return {"beaten": True}
        cached = Cached(credential, label, profile.issuer, verified, anchor)
        cache = Cache(self.state, wrap_key, self.disk)
        perform("seal", lambda: cache.save(profile.name, cached))
        if profile.kind.ours:
            now = self._now()
            ends = now + hold if hold is not None else None  # of the one that it replaces
            swap = Record(now, Event.SWAP, profile.name, label, why=verified, revoke_at=ends)
            self._write("swap", self._clocked(swap))
        self._audit("published", profile.name, credential.secret.fingerprint, verified=verified)
        if replaces:
            self._audit("retired", profile.name, replaces, why="replaced")
        return {}

    def export(self, profile: str, file: str, secret: Secret | None, keep: str) -> dict[str, Any]:
        """Have the file for programs that run no helper hold this key, or none; see `export`."""
        place = Path(file)
        if perform("export", lambda: export.keep(place, secret, keep, self.disk)) and secret:
            self._audit("exported", profile, secret.fingerprint)
        return {}

    def retire(
        self, profile: str, label: str, fingerprint: str, revoke_at: datetime, why: str
    ) -> dict[str, Any]:
        record = Record(self._now(), Event.RETIRED, profile, label, revoke_at=revoke_at, why=why)
        self._write("retired", self._clocked(record))
        self._audit("retired", profile, fingerprint, label=label, why=why)
        return {}

    def revoke(
        self,
        profile: str,
        label: str,
        fingerprint: str,
        issuer: Issuer,
        lease: Lease,
        timeout: timedelta = CALL,
    ) -> dict[str, Any]:
        """End a key where it was minted, whatever the configuration says now."""
        source = self._revoker(issuer, timeout)
        perform("revoke", lambda: source.revoke(lease))
        self._gone(profile, label, "revoked", fingerprint)
        return {}

    def settle(
        self, profile: str, label: str, issuer: Issuer, last: bool, timeout: timedelta = CALL
    ) -> dict[str, Any]:
        """Look up what an interrupted issue left behind, and revoke it: its secret is lost."""
        source = self._revoker(issuer, timeout)
        if last and not source.capabilities.find:
            self._gone(profile, label, "over by itself, if it ever came to be")
            return {"found": 0}
        found = perform("find", lambda: source.find(label))
        for lease in found:
            perform("revoke", lambda lease=lease: source.revoke(lease))  # type: ignore[misc]
        if found:
            self._gone(profile, label, "found after a crash or a time-out, and revoked")
        elif last:
            self._gone(profile, label, "never came to be")
        else:
            looked = Record(self._now(), Event.LOOKED, profile, label)
            self._write("looked", self._clocked(looked))
        return {"found": len(found)}

    def sweep(self, profile: Profile, prefix: str) -> dict[str, Any]:
        found = self._source(profile).sweep(prefix)
        return {"found": [{"label": label, "lease": encode_lease(at)} for label, at in found]}

    def end(self, profile: Profile, label: str, lease: Lease) -> dict[str, Any]:
        """Revoke what no journal knows."""
        source = self._source(profile)
        perform("revoke", lambda: source.revoke(lease))
        self._audit("revoked", profile.name, "", label=label, why="swept")
        return {}

    def find(self, profile: Profile, label: str) -> dict[str, Any]:
        found = perform("find", lambda: self._source(profile).find(label))
        return {"found": [encode_lease(lease) for lease in found]}

    def unlock(self, kind: str) -> dict[str, Any]:
        """Fetch what seals the cache."""
        found = find_wrap_key(kind, self.state, self.environment)
        return {"key": found.key.reveal() if found.key else None, "origin": found.origin}

    def open(
        self,
        kind: str,
        profiles: list[str],
        sessions: list[str],
        *,
        prune: bool = False,
        keys: str = "",
        exports: list[str] | None = None,
    ) -> dict[str, Any]:
        """
        Fetch what seals the cache, and open all of it: what a process begins with.

        Args:
            prune: Remove the sessions that are not named: nobody will ask with them again.
            keys: The folder from which all files are removed but those of `exports`.
        """
        if keys:
            export.prune(Path(keys), exports or [], self.disk)
        opened: dict[str, Any] = {
            "key": None,
            "sealed": {},
            "sessions": [],
            "lost": {},
            "locked": [],
        }
        try:
            opened.update(self.unlock(kind))
        except ConfigError:
            raise
        except CacheError as error:
            opened.update(origin=f"memory only: {error.message}")
        wrap_key = None if opened["key"] is None else Secret(opened["key"])
        for name in profiles:
            try:
                cached = self.load(name, wrap_key)["cached"]
            except CacheError as error:
                opened["lost"][name] = error.message
                if isinstance(error, CacheLocked) and kind != "memory":
                    opened["locked"].append(name)
            else:
                if cached is not None:
                    opened["sealed"][name] = cached
        for name in sessions:
            with suppress(CacheError):  # the price is one more login
                session = Cache(self.state, wrap_key, self.disk).load_session(name)
                if session is not None:
                    opened["sessions"].append(encode_session(session))
        if prune:
            Cache(self.state, None, self.disk).prune_sessions(sessions)
        return opened

    def keep(self, kept: Session, wrap_key: Secret) -> dict[str, Any]:
        """Seal a session, so that the next process need not log in."""
        perform("keep", lambda: Cache(self.state, wrap_key, self.disk).save_session(kept))
        return {}

    def recall(self, session_key: str, wrap_key: Secret) -> dict[str, Any]:
        """Open a session that another process may have sealed, and hand it over."""
        session = Cache(self.state, wrap_key, self.disk).load_session(session_key)
        if session is not None:
            self.held.tell(session)
        return {}

    def load(self, profile: str, wrap_key: Secret | None) -> dict[str, Any]:
        """Open a profile's sealed credential."""
        cached = Cache(self.state, wrap_key, self.disk).load(profile)
        if cached is None:
            return {"cached": None}
        issuer = encode(Record(cached.anchor.wall, Event.WANTED, "", "", issuer=cached.issuer))
        return {
            "cached": {
                "credential": encode_credential(cached.credential),
                "label": cached.label,
                "issuer": issuer["issuer"],
                "verified": cached.verified,
                "wall": cached.anchor.wall.isoformat(),
                "boot": cached.anchor.boot,
                "boot_id": cached.anchor.boot_id,
            }
        }

    def recognise(
        self, candidates: list[str], root: str, ca: str | None, asked: bool
    ) -> dict[str, Any]:
        """Find out which gateway it is and where it answers, with no key of anybody's."""
        from keybroker.sources.recognise import recognise

        return recognise(candidates, root, ca, asked=asked)

    def try_form(
        self, profile: Profile, secret: Secret, form: str, model: str, timeout: timedelta
    ) -> dict[str, Any]:
        """Send the gateway one request as Claude Code sends it; nothing is repeated of its body."""
        answer: dict[str, Any] = self._messages(profile, timeout).ask(form, secret, model)
        return answer

    def trusts(self, profile: Profile, extra: str | None, timeout: timedelta) -> dict[str, Any]:
        """Say whether Node trusts a gateway's certificate, too."""
        answer: dict[str, Any] = self._messages(profile, timeout).trusts(extra)
        return answer

    def models(self, profile: Profile, secret: Secret) -> dict[str, Any]:
        """List what a gateway has for a key."""
        from keybroker.sources.models import read

        return read(profile, secret)

    def probe(self, profile: Profile, secret: Secret, model: str) -> dict[str, Any]:
        """Have an upstream say how long an answer may be."""
        from keybroker.sources.models import probe

        return probe(profile, secret, model)

    def entrust(self, name: str, secret: Secret, folder: str | None) -> dict[str, Any]:
        """Put a secret where a reference finds it: into the OS keyring, or a file of its own."""
        from keybroker.sources.entrust import entrust

        reference, new = perform("keep", lambda: entrust(name, secret, folder))
        return {"kind": reference.kind, "value": reference.value, "new": new}

    def keyring(self) -> dict[str, Any]:
        """Say why the OS keyring does not work; nothing where it does."""
        from keybroker.sources.entrust import problem

        return {"problem": problem()}

    def withdraw(self, kind: str, value: str) -> dict[str, Any]:
        """Take back what was entrusted and is not needed."""
        from keybroker.sources.entrust import withdraw

        perform("forget", lambda: withdraw(Reference(kind, value)))
        return {}

    def forget(self, profile: str) -> dict[str, Any]:
        perform("forget", lambda: Cache(self.state, None, self.disk).forget(profile))
        return {}

    def forget_session(self, session_key: str) -> dict[str, Any]:
        """Remove a session's file: nobody is to go on with it."""
        cache = Cache(self.state, None, self.disk)
        perform("forget", lambda: cache.forget(SESSION + session_key))
        return {}

    def follow(self, ttls: Mapping[str, str]) -> dict[str, Any]:
        """Mend the TTL in the settings files that were connected to be followed."""
        from keybroker.connect import edit

        path = ("env", TTL_VARIABLE)
        changed, problems = edit.follow(self.state, path, ttls)
        return {"changed": changed, "problems": problems}

    def compact(self) -> dict[str, Any]:
        """Drop from the journal what is over. Nobody else may be writing it."""
        Journal(self.state, self.disk).compact()
        return {}

    def failed(self, message: Mapping[str, Any], error: KeybrokerError) -> None:
        """Put a failure into the audit log, from where `status` has the last one."""
        profile = message.get("profile")
        name = profile.get("name") if isinstance(profile, dict) else profile
        if isinstance(name, str) and message["op"] not in UNRECORDED:
            self._audit("failed", name, "", op=str(message["op"]), message=error.message)

    def unseal(self, key: str | None, *, fresh: bool) -> None:
        """Take what opens the sign-ins, from who may give it; `fresh`: a token is doubted."""
        self.held.fresh = fresh
        if key is not None:
            from keybroker.login.tokens import Store

            self.held.store = Store(self.state, Secret(key), self.disk)

    def sign_in(self, login: str, ways: list[str]) -> dict[str, Any]:
        """
        Begin to sign in.

        Args:
            login: The table's text.
            ways: Those that would do, the best one first.

        Returns:
            What the person is told.
        """
        from keybroker.login.flow import SigningIn
        from keybroker.signin import read_text

        begun = SigningIn(read_text(login), self.environment, ways)
        self._opened["sign_in"] = begun
        return begun.begin()

    def sign_in_step(self, pasted: str | None, wait: float) -> dict[str, Any]:
        """
        Wait a while for the person who signs in.

        Returns:
            When it is done, the key to a sealed file with what it gave, for whoever keeps it, and
            what may be said of it.
        """
        from keybroker.login import tokens as given
        from keybroker.signin import encode_standing

        tokens = self._opened["sign_in"].step(pasted, wait)
        if tokens is None:
            return {"key": None}
        self._opened.pop("sign_in").close()
        key = Secret(os.urandom(32).hex())
        given.incoming(self.state, key, self.disk).save(tokens)
        return {"key": key.reveal(), "standing": encode_standing(tokens.standing)}

    def sign(self, login: str, stage: str, key: str | None = None) -> dict[str, Any]:
        """
        Keep a sign-in that was just done, or sign out.

        Args:
            login: The table's text.
            stage: `check` that one could be kept; `keep` it from a file; `try` what a machine
                does by itself; `leave`, so that nothing new is made with it; `end`, which tells
                the provider and forgets it here; `forget`, which only does the latter.
            key: Opens the file.
        """
        from keybroker import login as logins
        from keybroker.login.tokens import Store, incoming
        from keybroker.signin import encode_standing, read_text

        sign_in = read_text(login)
        store = logins.store_of(sign_in, self.held.sign_ins, self.state)
        if self.held.store is None and sign_in.is_sealed:
            if stage == "forget":  # which needs nothing that opens it
                Store(self.state, None, self.disk).forget(sign_in.name)
                return {"told": False}
            problem = f"login {sign_in.name}: nothing opens the sign-ins here"
            raise CacheLocked(problem, hint=CANNOT_KEEP)
        told = False
        if stage == "keep" and key is not None:
            given = incoming(self.state, Secret(key), self.disk)
            tokens = given.load(sign_in)
            if tokens is None:
                raise CacheError(f"login {sign_in.name}: what the sign-in gave is not there")
            kept = tokens
            with store.alone(sign_in.name):
                perform("sign_in", lambda: store.save(kept))
            given.forget(sign_in.name)
        elif stage == "check":  # whether one could be kept
            return {"told": False}
        elif stage == "try":
            tokens = logins.current(sign_in, self.environment, store, fresh=True)
            return {"told": False, "standing": encode_standing(tokens.standing)}
        elif stage == "leave":
            logins.leave(sign_in, store)
        elif stage == "forget":
            store.forget(sign_in.name)
        elif stage == "end":
            told = perform("sign_out", lambda: logins.end(sign_in, self.environment, store))
        else:
            raise NobodyAnswers("a sign-in is to be changed in words that are not known")
        return {"told": told}

    @property
    def is_signing_in(self) -> bool:
        """Say whether a person is at it, whose command may have been stopped for a while."""
        return "sign_in" in self._opened

    def hook(
        self, command: list[str], facts: Mapping[str, Any], file: str, mark: str
    ) -> dict[str, Any]:
        """
        Run a program that is told what happened, and note that it was.

        Args:
            file: Where that is noted, so that the next daemon tells it no second time.
        """
        from keybroker import hooks

        try:
            perform("hook", lambda: hooks.run(command, facts, self.environment))
        finally:
            with suppress(OSError):
                self.disk.replace(Path(file), mark.encode())
        return {}

    def expect(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Read with few calls what the polls that are waiting in a row will ask for."""
        wanted = [one for one in messages if _type(one) in sources.TOGETHER]
        if len(wanted) < 2:
            return
        for message in wanted:
            if (session := message.get("session")) is not None:
                self.held.take(decode_session(session))
        with suppress(KeybrokerError):  # as each of them will say by itself
            profiles = [decode_profile(message["profile"]) for message in wanted]
            sources.read_together(profiles, self.held)

    def close(self) -> None:
        for source in self._opened.values():
            source.close()
        self._opened.clear()

    def _gone(self, profile: str, label: str, why: str, fingerprint: str = "") -> None:
        self._write("gone", Record(self._now(), Event.GONE, profile, label, why=why))
        self._audit("revoked", profile, fingerprint, label=label, why=why)

    def _clocked(self, record: Record) -> Record:
        instant = self.clock.read()
        return replace(record, at=instant.wall, boot=instant.boot, boot_id=instant.boot_id)

    def _write(self, effect: str, record: Record) -> None:
        perform(effect, lambda: Journal(self.state, self.disk).write(record))
        self.records.append(record)

    def _audit(self, event: str, profile: str, fingerprint: str, **facts: str) -> None:
        if fingerprint:
            facts = {"fingerprint": fingerprint, **facts}
        Audit(self.state, self.disk).write(self._now(), event, profile, **facts)

    def _source(self, profile: Profile) -> sources.Source:
        key = json.dumps([profile.name, profile.raw], sort_keys=True)
        return self._open(key, lambda: self.build(profile, self.environment, self.held))

    def _store(self, profile: Profile) -> sources.Store:
        key = json.dumps(["publish", profile.name, profile.raw], sort_keys=True)
        return self._open(key, lambda: self.store(profile, self.environment, self.held))

    def _messages(self, profile: Profile, timeout: timedelta) -> Any:
        from keybroker.sources.messages import Messages

        key = json.dumps(["messages", profile.name, profile.raw, str(timeout)], sort_keys=True)
        return self._open(key, lambda: Messages(profile, timeout.total_seconds()))

    def _revoker(self, issuer: Issuer, timeout: timedelta) -> sources.Source:
        seconds = timeout.total_seconds()
        return self._open(
            repr((issuer, timeout)),
            lambda: self.revoker(issuer, self.environment, seconds, self.held),
        )

    def _open(self, key: str, build: Callable[[], T]) -> T:
        """Keep the newest sources open, each with its connection to a server."""
        if key not in self._opened:
            if len(self._opened) >= MOST_OPEN:
                self._opened.pop(next(iter(self._opened))).close()
            self._opened[key] = build()
        opened: T = self._opened[key]
        return opened

    def _now(self) -> datetime:
        return self.clock.read().wall


def answer(operations: Operations, message: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a message asks; the answer has the records that were written either way."""
    operations.records = []
    reply: dict[str, Any] = {"id": message.get("id")}
    if (session := message.get("session")) is not None:
        operations.held.take(decode_session(session))
    operations.unseal(message.get("unseals"), fresh=message.get("fresh") is True)
    try:
        method = getattr(operations, str(message["op"]))
        reply["ok"] = method(**_arguments(message))
    except KeybrokerError as error:
        operations.failed(message, error)
        reply["error"] = encode_error(error)
    except Exception as error:  # its text may hold a secret; its type does not
        problem = KeybrokerError(
            f"worker: failed with {type(error).__name__} in {message.get('op')}"
        )
        reply["error"] = {**encode_error(problem), "unknown": True}
    reply["records"] = [encode(record) for record in operations.records]
    if changed := operations.held.changed():
        reply["sessions"] = [encode_session(session) for session in changed]
    return reply


def _arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Read a message's values by their names: the same name is the same kind everywhere."""
    read: dict[str, Callable[[Any], Any]] = {
        "profile": lambda v: v if isinstance(v, str) else decode_profile(v),
        "issuer": decode_issuer,
        "lease": lambda v: None if v is None else decode_lease(v),
        "credential": decode_credential,
        "secret": lambda v: None if v is None else Secret(v),
        "wrap_key": lambda v: None if v is None else Secret(v),
        "kept": decode_session,
        "anchor": lambda v: Instant(read_time(v["wall"]), v["boot"], v["boot_id"]),
        "timeout": lambda v: timedelta(seconds=v),
        "hold": lambda v: None if v is None else timedelta(seconds=v),
        "revoke_at": read_time,
    }
    envelope = ("id", "op", "seconds", "session", "unseals", "fresh")
    rest = {name: value for name, value in message.items() if name not in envelope}
    return {name: read[name](value) if name in read else value for name, value in rest.items()}


def encode_profile(profile: Profile) -> dict[str, Any]:
    return {"name": profile.name, "raw": profile.raw}


def decode_profile(found: Mapping[str, Any]) -> Profile:
    return read_profile(found["name"], found["raw"], Where({}, "config"))


def encode_credential(credential: Credential) -> dict[str, Any]:
    return {"secret": credential.secret.reveal(), "lease": encode_lease(credential.lease)}


def decode_credential(found: Mapping[str, Any]) -> Credential:
    return Credential(Secret(found["secret"]), decode_lease(found["lease"]))


def encode_error(error: KeybrokerError) -> dict[str, Any]:
    values: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
    if isinstance(error, SourceError):
        values.update(unknown=error.unknown, withdrawn=error.withdrawn)
        if error.retry_after is not None:
            values["retry_after_s"] = error.retry_after.total_seconds()
    return values


def main() -> None:
    """Serve the process that started us until it closes our stdin or lets us idle."""
    sys.excepthook = lambda kind, _value, _trace: sys.stderr.write(
        f"keybroker: worker: {kind.__name__}\n"
    )
    parent, state = int(sys.argv[1]), Path(sys.argv[2])
    os.umask(0o077)
    _bind_to_parent(parent)
    operations = Operations(state, dict(os.environ))
    os.environ[asking.WITHIN] = "1"  # of what a library starts: it must not ask us
    requests = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # nor read what we are asked
    serve(requests, operations)


def serve(descriptor: int, operations: Operations) -> None:
    """
    Answer one line after the other, each under a hard timer that ends the process.

    The answers to polls that are waiting in a row go back together: one wake-up of the daemon.
    """
    waiting, patience = b"", IDLE_SECONDS
    held, held_since = b"", 0.0
    expected = 0  # polls in a row that are known of
    while True:
        line, newline, rest = waiting.partition(b"\n")
        if not newline:
            if len(waiting) > LONGEST_LINE:
                break
            if not select.select([descriptor], [], [], patience)[0]:
                if operations.is_signing_in:
                    continue
                if patience and _take_no_more(descriptor):
                    patience = 0.0  # what was sent until now is still done
                    continue
                break
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                break
            waiting += piece
            continue
        waiting = rest
        message = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, float(message.get("seconds", 30)))
        if message.get("op") != "poll":
            expected = 0
        elif expected == 0:
            together = _type(message) in sources.TOGETHER
            waiting = _with_more(descriptor, waiting, GATHER_SECONDS if together else 0.0)
            row = [message, *_polls(waiting)]
            operations.expect(row)
            expected = len(row)
        expected = max(0, expected - 1)
        held_since = held_since if held else time.monotonic()
        held += json.dumps(answer(operations, message)).encode() + b"\n"
        in_a_row = message.get("op") == "poll" and b"\n" in waiting
        if not in_a_row or time.monotonic() - held_since > HELD_SECONDS:
            perform("answer", lambda held=held: _send(held))  # type: ignore[misc]
            held = b""
        signal.setitimer(signal.ITIMER_REAL, 0)
    os.close(descriptor)  # what is sent from now on goes to another
    operations.close()


def _with_more(descriptor: int, waiting: bytes, seconds: float) -> bytes:
    """Take what was sent meanwhile as well, or is being sent."""
    while len(waiting) <= LONGEST_LINE and select.select([descriptor], [], [], seconds)[0]:
        piece = os.read(descriptor, 1 << 16)
        if not piece:  # it was closed, as the next read will find
            break
        waiting += piece
    return waiting


def _polls(waiting: bytes) -> Iterator[Mapping[str, Any]]:
    """Yield the polls that wait in a row, whole lines alone."""
    *lines, _ = waiting.split(b"\n")
    for line in lines:
        message = json.loads(line)
        if message.get("op") != "poll":
            return
        yield message


def _type(message: Mapping[str, Any]) -> str:
    """Return the type of the source that a poll asks; empty where the message makes no sense."""
    with suppress(KeyError, TypeError):
        return str(message["profile"]["raw"]["source"]["type"])
    return ""


def _take_no_more(descriptor: int) -> bool:
    """Have what is sent from now on go to another; False where stdin is no socket."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as stdin:
            stdin.shutdown(socket.SHUT_RD)
    except OSError:
        return False
    return True


def _send(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _bind_to_parent(parent: int) -> None:
    """Die with the parent, leave no core, be closed to debuggers (Linux)."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever a shell had us ignore or block
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    kernel.close_to_debuggers()
    kernel.die_with_parent()
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


if __name__ == "__main__":
    main()
