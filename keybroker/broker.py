"""One current credential per profile: asks the rule, has its answer done, takes in what came back.

The broker does nothing itself. It sends requests to workers and applies the records they wrote
with the same `fold` that replays the journal.
"""

import heapq
import itertools
import os
from collections.abc import Callable, Container, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from keybroker import rotation
from keybroker.clock import DISAGREEMENT, Clock, Instant, Reading, by_boot, counted, earlier, judge
from keybroker.config import Profile, Publish
from keybroker.credential import (
    Credential,
    Issuer,
    Lease,
    Look,
    Secret,
    Session,
    Verdict,
    sha256,
)
from keybroker.errors import (
    CANNOT_KEEP,
    CLASSES,
    JournalError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.handout import Handout, News, Sealed
from keybroker.journal import decode_lease
from keybroker.label import new_label
from keybroker.logins import Logins
from keybroker.pool import Answer
from keybroker.rotation import Kind, Policy
from keybroker.signin import needed_by
from keybroker.slots import (
    Event,
    Key,
    Record,
    Slots,
    Trouble,
    change,
    end_of,
    fold,
    replay,
    without,
)
from keybroker.values import dataclass, field, replace

RENEWAL_SECONDS = 8.0  # of a session
STORE_CALLS = 4  # the most that one step of publishing takes
EXTRA_SECONDS = 4.0  # a worker's hard timer beyond its calls' own deadlines
EXPORT_SECONDS = 4.0  # to write a file of a few bytes
EXPORT_AGAIN = timedelta(seconds=30)  # after the disk did not have it
ASKED_AGAIN = timedelta(seconds=5)  # who asks in vain has a failed call tried again this early
_NEVER = datetime.max.replace(tzinfo=UTC)
ROUNDED = timedelta(seconds=60)  # due times of profiles with shorter holds are not rounded


class Workers(Protocol):
    """What the broker needs of a pool."""

    def send(
        self, kind: str, op: str, seconds: float, /, *, urgent: bool = False, **values: Any
    ) -> int: ...


@dataclass(slots=True)
class _Profile:
    """A profile at work. Without `profile` it is one that the configuration has no more."""

    name: str
    profile: Profile | None
    policy: Policy
    slots: Slots
    anchor: Instant  # the clocks when the current key's times were read, or when we began
    new_anchor: Instant | None = None  # the same, of the next one
    secrets: dict[str, Credential] = field(default_factory=dict)  # by label
    doubt: bool = False  # the clocks disagree: verify the current key before it is printed
    drift: timedelta = timedelta()  # by how much, when the gateway last took the key all the same
    busy: "tuple[int, rotation.Step, str] | None" = None  # request, step, label
    due: datetime | None = None  # when it is looked at again
    ending: str = ""  # why all its keys are given up
    dropped: bool = False  # what somebody else keeps is not to be handed out any more
    exported: bool = False  # its key is somebody's until its end, and there is no other
    absent: set[str] = field(default_factory=set)  # labels that are not where keys are published
    resting: bool = False  # they were: nothing is minted before somebody asks
    asked: bool = False  # somebody waits
    check: bool = False  # look at the current key: somebody may have been refused with it
    unsealed: bool = False  # its key is in memory only
    filed: str | None = ""  # the label of the key in its file; None: that is not known
    file_at: datetime | None = None  # the file could not be written: it is tried again then
    tried_at: datetime | None = None  # an issue or poll last failed
    fresh: bool = False  # somebody wants another token, not the one that is known
    again: bool = False  # something changed while it was tried: its answer may be an old one's
    patient: bool = False  # by a denial, or with a wish of the server's when to come back
    late: bool = False  # it was said that a replacement is late
    published: str = ""  # the label of the key that was handed out last


class Broker:
    """
    All profiles of one process that holds the owner lock.

    Args:
        profiles: As configured.
        records: The journal, replayed.
        sealed: What the cache had, by profile.
        wrap_key: What seals the cache; None keeps keys in memory only.
        origin: Where it is from, or why there is none.
        held: Sessions that were sealed.
        locked: The profiles whose sealed key could not be opened for now; it is not lost.
        keeps: Minted keys may be kept in memory alone, as a resident process does.
        keys: The folder of the files for programs that run no helper; empty: none are kept.
        mints: The profiles that new keys may be asked for; for all, what is left over is
            cleared away.
        reread: Reads the journal again, after a worker died.
    """

    def __init__(
        self,
        profiles: Iterable[Profile],
        records: Iterable[Record],
        sealed: Mapping[str, Sealed],
        workers: Workers,
        *,
        instance: str,
        wrap_key: Secret | None,
        origin: str = "there is no keyring",
        held: Iterable[Session] = (),
        locked: Container[str] = (),
        keeps: bool = False,
        keys: str = "",
        mints: Container[str],
        clock: Clock | None = None,
        roll: Callable[[], float] | None = None,
        reread: Callable[[], Iterable[Record]],
    ) -> None:
        self._clock = clock or Clock()
        self._workers = workers
        self._instance = instance
        self._wrap_key = wrap_key
        self._origin = origin
        self._locked = locked
        self._keeps = keeps
        self._keys = keys
        self._mints = mints
        self._roll = roll or _chance
        self._reread = reread
        self._profiles: dict[str, _Profile] = {}
        self._asked: dict[int, _Profile] = {}  # by request
        self._heap: list[tuple[datetime, str]] = []
        self._logins = Logins(held)
        self._changed: dict[str, None] = {}  # to be looked at now, in this order
        self.ready: dict[str, Handout] = {}
        self.news: list[News] = []
        known = list(records)
        self._newest = known[-1].at if known else None
        slots = replay(known)
        for profile in profiles:
            at_work = _Profile(
                profile.name,
                profile,
                profile.policy,
                slots.pop(profile.name, Slots()),
                self._clock.read(),
            )
            self._profiles[profile.name] = at_work
            self._forget_export(at_work)
            self._adopt(at_work, sealed.get(profile.name))
            if at_work.slots.current is not None:
                at_work.published = at_work.slots.current.label
        for name, left in slots.items():  # no longer configured, but not forgotten
            first = next((one.issuer for one in left.all), None)
            if first is not None:
                hold = max((k.hold for k in left.keys), default=timedelta())
                policy = Policy(Kind.MINTED, first, hold)
                self._profiles[name] = _Profile(name, None, policy, left, self._clock.read())
        self._logins.know(one.policy.issuer for one in self._profiles.values())
        self.replan()

    def now(self, name: str | None = None) -> datetime:
        """Return the time to reckon with: for a profile, the later of its clocks."""
        instant = self._clock.read()
        return instant.wall if name is None else judge(self._profiles[name].anchor, instant).now

    def slots(self, name: str) -> Slots:
        return self._profiles[name].slots

    def names(self) -> list[str]:
        return list(self._profiles)

    def unsettled(self, name: str) -> int:
        """Count the calls without an answer that may yet turn out to have made a key."""
        at_work = self._profiles[name]
        settled = replace(at_work.slots, open=())
        return self._live(at_work, at_work.slots) - self._live(at_work, settled)

    def full(self, name: str) -> bool:
        """Say whether nothing can be minted because the most keys allowed may be alive."""
        at_work = self._profiles[name]
        live = self._live(at_work, at_work.slots)
        return at_work.busy is None and live >= at_work.policy.max_live

    def hurry(self, name: str) -> None:
        """Ask for a new key at once."""
        at_work = self._profiles[name]
        self._forgive(at_work)
        at_work.fresh = True
        self._hurry(at_work)

    def ask(self, name: str) -> None:
        """
        Note that somebody waits for a key that is not there.

        A call that failed is tried again sooner than it would be, unless the server wished
        otherwise, or denied to mint; so is a look at a key that the clocks disagree about.
        """
        at_work = self._profiles[name]
        at_work.asked = True
        at_work.resting = False
        put_off = at_work.slots.not_before
        if put_off is not None and at_work.tried_at is not None and not at_work.patient:
            sooner = min(put_off, at_work.tried_at + ASKED_AGAIN)
            at_work.slots = replace(at_work.slots, not_before=sooner)
        current = at_work.slots.current
        if at_work.doubt and current is not None and current.not_before is not None:
            soon = self._plan_time(at_work, self._clock.read()) + ASKED_AGAIN
            look = replace(current, not_before=min(current.not_before, soon))
            at_work.slots = change(at_work.slots, look)
        self._change(at_work)

    def check(self, name: str) -> None:
        """Have the gateway look at the current key: somebody may have been refused with it."""
        at_work = self._profiles[name]
        at_work.check = at_work.asked = at_work.policy.verify
        if at_work.policy.kind is Kind.FOLLOWED:  # its owner may have rotated it
            at_work.slots = rotation.hurried(at_work.slots)
        self._change(at_work)

    def checked(self, name: str) -> bool:
        """Say whether that look was taken, and a key that was refused is replaced if it can be."""
        at_work = self._profiles[name]
        looking = at_work.busy and isinstance(at_work.busy[1], rotation.Verify | rotation.Poll)
        if at_work.check or looking:
            return False
        slots = at_work.slots
        if slots.failures > 0 or self.full(name):
            return True
        if at_work.policy.kind is Kind.FOLLOWED:  # read anew, and a new value is out
            return not slots.rotate and slots.next is None
        return slots.current is None or slots.current.refused_at is None

    def published_at(self, name: str) -> str | None:
        """Say where a profile's keys are put for others to read; None: nowhere."""
        profile = self._profiles[name].profile
        return None if profile is None or profile.publish is None else str(profile.publish.issuer)

    def exported_to(self, name: str) -> str | None:
        """Say where programs that run no helper find a profile's key; None: nowhere."""
        profile = self._profiles[name].profile
        if profile is None or profile.export == "none":
            return None
        return "pasted by hand" if profile.export == "paste" else f"{self._keys}/{name}"

    def export_again(self, lost: Callable[[str], bool]) -> None:
        """Make the files anew that are lost, which is asked of each."""
        for at_work in self._profiles.values():
            there = at_work.filed in at_work.secrets  # or it could not be made anew
            if there and lost(f"{self._keys}/{at_work.name}"):
                self._forget_export(at_work)
                self._change(at_work)

    def rests(self, name: str) -> bool:
        """Say whether nothing is minted before somebody asks, since all was revoked."""
        return self._profiles[name].resting

    def unlock(
        self,
        wrap_key: Secret,
        origin: str,
        sealed: Mapping[str, Sealed],
        held: Iterable[Session] = (),
    ) -> None:
        """Take the key of the cache, and what it opened, now that the keyring is open."""
        self._wrap_key, self._origin, self._locked = wrap_key, origin, ()
        for session in held:
            self._logins.take(session)
        for session in self._logins:
            self._keep(session)
        for at_work in self._profiles.values():
            self._forget_export(at_work)
            current = at_work.slots.current
            if current is None or current.label not in at_work.secrets:
                self._adopt(at_work, sealed.get(at_work.name))
        self.replan()

    @property
    def locked(self) -> bool:
        """Say whether keys are in memory only because a keyring could not be opened yet."""
        return self._wrap_key is None

    def configure(self, profiles: Iterable[Profile]) -> None:
        """
        Go on with another configuration.

        The keys of a profile that is gone, or that mints elsewhere now, are given up and revoked
        where they were minted.
        """
        wanted = {profile.name: profile for profile in profiles}
        for name, profile in wanted.items():
            known = self._profiles.get(name)
            if known is None:
                fresh = _Profile(name, profile, profile.policy, Slots(), self._clock.read())
                self._profiles[name] = fresh
                self._forget_export(fresh)
            elif known.profile != profile:
                if known.profile is not None and known.profile.publish != profile.publish:
                    self._publish_elsewhere(known, profile.publish)
                if known.policy.issuer != profile.issuer:  # what the other one said is over
                    known.slots = replace(known.slots, trouble=None, withdrawn=False)
                    known.tried_at = None
                known.profile, known.policy = profile, profile.policy
                known.slots = rotation.at_once(known.slots)
                known.resting = known.patient = False
        for name, at_work in list(self._profiles.items()):
            if name not in wanted:
                at_work.profile = None
                self._clean(at_work)
        self._logins.know(one.policy.issuer for one in self._profiles.values())
        self.replan()

    def _publish_elsewhere(self, at_work: _Profile, publish: Publish | None) -> None:
        """What was begun at one place is not ended at another: there is another key, soon."""
        at_work.absent.clear()
        new = at_work.slots.next
        if publish is not None and at_work.slots.current is not None:
            at_work.slots = rotation.hurried(at_work.slots)
        if new is not None and new.base is not None:
            at_work.slots = change(at_work.slots, replace(new, beaten=rotation.ELSEWHERE))

    def retry(self, only: str | None = None, *, by_hand: bool = False) -> None:
        """
        Try again what failed, read anew what others keep: something may be better now.

        Args:
            only: The one profile that it may be better for; None: all.
            by_hand: A person says so, for whom a refused login is tried once more. One that is
                made with something else now is tried in any case.
        """
        for at_work in self._profiles.values():
            if only not in (None, at_work.name):
                continue
            if by_hand:
                self._forgive(at_work)
            at_work.again = at_work.busy is not None
            self._retry(at_work)

    def reread(self) -> None:
        """
        Take in what another process wrote while it had the owner lock: the journal, and sessions.

        What can be had only once may be in a session that it began: nobody logs in before that
        was read.
        """
        known = replay(self._reread())
        for at_work in self._profiles.values():
            self._refresh(at_work, known.get(at_work.name, Slots()))
            self._forget_export(at_work)
        if self._wrap_key is None:
            return
        for name, issuer in self._logins.wanted.items():
            number = self._workers.send(
                issuer.type, "recall", EXTRA_SECONDS, session_key=name, wrap_key=self._wrap_key
            )
            self._logins.recall(number, name)

    def clock_was_set(self) -> None:
        """Forget what was put off by another clock; or the machine woke up, and may do better."""
        for at_work in self._profiles.values():
            now = self._plan_time(at_work, self._clock.read())
            at_work.slots = rotation.at_set_clock(at_work.slots, now)
            at_work.tried_at = None
        self.replan()

    def replan(self) -> None:
        """Look at every profile anew."""
        for at_work in self._profiles.values():
            self._change(at_work)

    def handout(self, name: str) -> Handout | None:
        """Return what may be printed for a profile, to be kept until it is no longer alive."""
        found = self.ready.get(name)
        instant = self._clock.read()
        if found is not None and found.alive(instant.wall.timestamp(), instant.boot):
            return found
        self.ready.pop(name, None)
        credential = self.credential(name)
        if credential is None:
            return None
        at_work = self._profiles[name]
        ends = credential.lease.expires_at
        made = Handout(
            credential.secret,
            None if ends is None else ends.timestamp(),
            at_work.anchor.wall.timestamp() - at_work.anchor.boot,
            at_work.drift.total_seconds(),
        )
        if not made.alive(instant.wall.timestamp(), instant.boot):
            return None
        self.ready[name] = made
        return made

    def credential(self, name: str) -> Credential | None:
        """Return what may be handed out now, however old."""
        at_work = self._profiles[name]
        current = at_work.slots.current
        usable = rotation.usable(current, at_work.policy, self.now(name))
        if at_work.ending or not usable or self._doubtful(at_work):
            return None
        return at_work.secrets.get(current.label) if current is not None else None

    def settled(self, name: str) -> bool:
        """
        Say whether an answer is there, and nothing is under way that would make a better one.

        That no key was to be had is an answer: who asks will ask again sooner than we would.
        """
        at_work = self._profiles[name]
        step = self._step(at_work) if at_work.busy is None else at_work.busy[1]
        if self.credential(name) is not None:
            after = rotation.Wait | rotation.Revoke | rotation.Settle | rotation.Export
            return isinstance(step, after)
        if not isinstance(step, rotation.Wait):
            return False
        if at_work.slots.next is not None:
            return self._is_stuck(at_work)
        soon = self._clock.read().wall + 2 * at_work.policy.retry_min
        return at_work.slots.failures > 0 or step.until is None or step.until > soon

    def about_to_publish(self, name: str) -> bool:
        """Say whether nothing can be handed out yet, but a new key is on its way."""
        at_work = self._profiles[name]
        minting = at_work.busy is not None and isinstance(at_work.busy[1], rotation.Issue)
        coming = at_work.slots.next is not None and not self._is_stuck(at_work)
        under_way = minting or coming
        return self.credential(name) is None and under_way

    def why_not(self, name: str) -> KeybrokerError:
        """Return what to tell somebody who asked for a key and gets none."""
        at_work = self._profiles[name]
        if at_work.profile is None:
            return NotReady(f"{name}: is not configured any more")
        if self._cannot_keep(at_work):
            return NobodyAnswers(
                f"{name}: a minted key could not be kept: {self._origin}",
                hint=CANNOT_KEEP,
            )
        if at_work.doubt:
            return NotReady(
                f"{name}: the clock was set and the gateway could not confirm the key",
                hint="check the date, then try again",
            )
        slots, policy, now = at_work.slots, at_work.policy, self.now(name)
        live = self._live(at_work, slots)
        if live >= policy.max_live:
            unsure = self.unsettled(name)
            if unsure:
                return NotReady(
                    f"{name}: {unsure} calls got no answer and may have made keys",
                    hint="they are looked up for a minute; then try again",
                )
            reckoned = _by_clocks(slots, self._clock.read(), now)
            room = rotation.room_at(reckoned, policy, now)
            left = "" if room is None else f" for {_in_words(room - now)} more"
            why = "" if slots.trouble is None else f" ({slots.trouble.message})"
            return NotReady(
                f"{name}: {live} keys are unrevoked at {policy.issuer.url}, the most allowed"
                f"{left}{why}",
                hint=f"wait, or end them all: keybroker revoke {name}",
            )
        new = slots.next.verdict if slots.next is not None else None
        if new is not None and new.look is Look.UNDECIDED:
            return NotReady(
                f"{name}: there is a new key, but the gateway did not say that it takes it "
                f"({new.reason})",
                hint=f"keybroker source test {name}",
            )
        if slots.trouble is not None:
            kind = CLASSES.get(slots.trouble.code, NotReady)
            hint = slots.trouble.hint or f"keybroker source test {name}"
            return kind(f"{name}: {slots.trouble.message}", hint=hint)
        return NotReady(f"{name}: no key yet", hint="try again, or see keybroker status")

    def turn(self, most: int | None = None) -> datetime | None:
        """
        Start what is due for every profile that is not busy; return when to come back.

        Args:
            most: The most profiles to look at before coming back, of those that changed or fell
                due; None: all there are.
        """
        if most is None:
            self.replan()
            most = len(self._profiles)
        now = self._clock.read().wall
        while self._heap and self._heap[0][0] <= now:
            due, name = heapq.heappop(self._heap)
            if name in self._profiles and self._profiles[name].due == due:
                self._changed[name] = None
        for name in list(itertools.islice(self._changed, most)):
            del self._changed[name]
            if name in self._profiles:
                self._look(self._profiles[name])
        while self._heap and not self._is_due(*self._heap[0]):
            heapq.heappop(self._heap)
        renewal = self._renew_sessions(now)
        if self._changed:
            return now
        times = [self._heap[0][0]] if self._heap else []
        return min(times if renewal is None else [*times, renewal], default=None)

    @property
    def busy(self) -> bool:
        return bool(self._asked)

    def take(self, answers: Iterable[Answer]) -> None:
        """Take in what workers answered; one that cannot be taken in keeps nobody else's."""
        broken: Exception | None = None
        for answer in answers:
            self.hold(answer.sessions)
            for name in self._logins.answered(answer.id):
                if name in self._profiles:
                    self._change(self._profiles[name])
            at_work = self._asked.pop(answer.id, None)
            if at_work is None or at_work.busy is None:
                continue
            _, step, label = at_work.busy
            at_work.busy = None
            before = at_work.slots.trouble
            try:
                self._apply(at_work, answer)
                self._finish(at_work, step, label, answer)
            except Exception as error:  # a mistake of ours: it is tried again, and it is said
                self._fail(at_work, KeybrokerError(f"broker: {type(error).__name__} in an answer"))
                broken = error
            self._report(at_work, before)
            if at_work.again:
                at_work.again = False
                self._retry(at_work)
            self._change(at_work)
        if broken is not None:
            raise broken

    def end(self, name: str, why: str) -> None:
        """Give up every key of a profile, to be revoked at once: no reader gets a hold."""
        at_work = self._profiles[name]
        at_work.ending = why
        for key in at_work.slots.keys:  # whatever was put off until now is over
            at_work.slots = change(at_work.slots, replace(key, failures=0, not_before=None))
        at_work.slots = replace(at_work.slots, trouble=None)
        at_work.resting = not at_work.policy.publishes  # there are others who read it
        self._change(at_work)

    def drop(self, name: str) -> None:
        """Hand out no longer what somebody else keeps: a token whose person signed out."""
        at_work = self._profiles[name]
        at_work.dropped = True
        self._change(at_work)

    def export(self, name: str) -> None:
        """Let go of a key that somebody has for good: it is revoked at its end, none follows."""
        at_work = self._profiles[name]
        at_work.exported = at_work.resting = True
        self._change(at_work)

    def has(self, name: str) -> bool:
        """Say whether anything is known to be left of a profile, a call that is open included."""
        at_work = self._profiles.get(name)
        return at_work is not None and (bool(at_work.slots.all) or at_work.busy is not None)

    def forget(self, name: str) -> bool:
        """Forget a profile that is not configured any more, when nothing is left of it."""
        at_work = self._profiles.get(name)
        if at_work is None:
            return True
        if at_work.profile is not None or at_work.busy is not None or at_work.slots.all:
            return False
        del self._profiles[name]
        self.ready.pop(name, None)
        return True

    def wind_down(self) -> None:
        """Ask for no more keys; what is left may be interrupted at any time."""
        self._mints = ()
        self.replan()

    # deciding

    def _retry(self, at_work: _Profile) -> None:
        if at_work.file_at is not None:
            at_work.file_at = None
            self._change(at_work)
        if at_work.policy.kind is Kind.FOLLOWED and at_work.profile is not None:
            at_work.slots = rotation.hurried(at_work.slots)
            self._change(at_work)
        elif at_work.slots.failures or (at_work.slots.next and at_work.slots.next.failures):
            at_work.slots = rotation.at_once(at_work.slots)
            at_work.patient = False
            self._change(at_work)

    def _hurry(self, at_work: _Profile) -> None:
        at_work.slots = rotation.hurried(at_work.slots)
        at_work.resting = False
        self._change(at_work)

    def _change(self, at_work: _Profile) -> None:
        self._changed[at_work.name] = None
        self.ready.pop(at_work.name, None)

    def _is_due(self, due: datetime, name: str) -> bool:
        return name in self._profiles and self._profiles[name].due == due

    def _look(self, at_work: _Profile) -> None:
        """Start what is due for a profile, or note when something will be."""
        at_work.due = None
        if at_work.busy is not None:
            return
        step = self._step(at_work)
        if not isinstance(step, rotation.Wait):
            self._start(at_work, step)
            return
        at_work.asked = at_work.asked and self.credential(at_work.name) is None
        times = (step.until, self._late_at(at_work), self._export_due(at_work))
        due = min(filter(None, times), default=None)
        if due is not None:
            due = _rounded(due, at_work, self._instance)
            at_work.due = due
            heapq.heappush(self._heap, (due, at_work.name))

    def _late_at(self, at_work: _Profile) -> datetime | None:
        """Return when the current key should have been replaced at the latest; say so once."""
        current = at_work.slots.current
        if at_work.late or current is None or not at_work.policy.kind.ours:
            return None
        if current.lease.expires_at is None or at_work.profile is None:
            return None
        latest = current.lease.expires_at - rotation.hold_of(current, at_work.policy)
        if self.now(at_work.name) < latest:
            return latest
        at_work.late = True
        self.news.append(News(at_work.name, "late", current.lease.expires_at.isoformat()))
        return None

    def _export_wanted(self, at_work: _Profile) -> str:
        """Return the label of the key that the file should hold; empty: there should be none."""
        profile, current = at_work.profile, at_work.slots.current
        if profile is None or profile.export != "file" or at_work.ending or current is None:
            return ""
        usable = rotation.usable(current, at_work.policy, self.now(at_work.name))
        return current.label if usable else ""

    def _export(self, at_work: _Profile, now: datetime) -> rotation.Export | None:
        """
        Say what the file should hold, if that is not what it holds.

        This comes before all else: no key is revoked while the file still has it.
        """
        if not self._keys or (at_work.file_at is not None and at_work.file_at > now):
            return None
        wanted = self._export_wanted(at_work)
        return None if wanted == at_work.filed else rotation.Export(wanted)

    def _export_due(self, at_work: _Profile) -> datetime | None:
        """Return when the file has to be looked at: it is to be tried again, or its key ends."""
        current, filed = at_work.slots.current, at_work.filed
        if not self._keys or filed == "":
            return at_work.file_at
        if filed is None or current is None or current.lease.expires_at is None:
            return at_work.file_at
        return self._clock.read().wall + (current.lease.expires_at - self.now(at_work.name))

    def _forget_export(self, at_work: _Profile) -> None:
        """What is in the file is not known: it is looked at, and made anew if need be."""
        if at_work.filed or (at_work.profile is not None and at_work.profile.export == "file"):
            at_work.filed = at_work.file_at = None

    def _report(self, at_work: _Profile, before: Trouble | None) -> None:
        trouble = at_work.slots.trouble
        if trouble is not None and (before is None or before.message != trouble.message):
            hint = f"; {trouble.hint}" if trouble.hint else ""
            self.news.append(News(at_work.name, "trouble", f"{trouble.message}{hint}"))
        elif trouble is None and before is not None:
            self.news.append(News(at_work.name, "recovered"))

    def _doubtful(self, at_work: _Profile) -> bool:
        """Say whether the clocks disagree about the current key by more than was seen before."""
        if at_work.doubt:
            return True
        instant = self._clock.read()
        passed = by_boot(at_work.anchor, instant)
        if passed is None or at_work.slots.current is None:
            return False
        at_work.doubt = abs(instant.wall - passed - at_work.drift) > DISAGREEMENT
        return at_work.doubt

    def _step(self, at_work: _Profile) -> rotation.Step:
        slots, policy = at_work.slots, at_work.policy
        instant = self._clock.read()
        now = self._plan_time(at_work, instant)
        if (export := self._export(at_work, instant.wall)) is not None:
            return export
        slots = _by_clocks(slots, instant, now)
        put_off: list[datetime] = []
        if at_work.ending:
            left = [k for k in slots.keys if k.lease.revocable and (k.revoke_at or _NEVER) > now]
            for one in left:
                if (one.not_before or now) <= now:
                    return rotation.Retire(one.label, at_work.ending)
                put_off.append(one.not_before or now)
            if not left:  # a key that is to end at once does not wait for the next one
                doomed = [k for k in slots.retired if k.why == at_work.ending and not k.failures]
                if doomed:
                    return rotation.Revoke(doomed[0].label)
                at_work.ending = ""
        if at_work.dropped:
            for one in slots.keys:
                return rotation.Retire(one.label, rotation.SIGNED_OUT)
            at_work.dropped = False
        if at_work.exported and slots.current is not None:
            later = slots.current.not_before or now
            if later <= now:
                return rotation.Retire(slots.current.label, rotation.EXPORTED)
            return rotation.Wait(instant.wall + (later - now))
        # A key whose secret is nowhere cannot be handed out: its readers get their hold.
        locked_away = False
        for key in (slots.next, slots.current):
            if key is not None and key.label not in at_work.secrets:
                locked = at_work.profile is not None and (
                    self._cannot_keep(at_work) or at_work.name in self._locked
                )
                if key.not_before is None or key.not_before <= now:
                    # while it is only locked away, no reader is made to wait for what nobody needs
                    if (not locked or at_work.asked) and self._can_recover(at_work, key):
                        return rotation.Recover(key.label)
                    if not locked:
                        return rotation.Retire(key.label, _why_lost(at_work))
                if key.not_before is not None and key.not_before > now:
                    put_off.append(key.not_before)
                locked_away = locked_away or locked
                slots = without(slots, key.label)
                policy = replace(policy, max_live=policy.max_live - 1)
        known = slots.current  # one that is condemned is not handed out, whatever a look would say
        if known is not None and not known.condemned and self._doubtful(at_work):
            again = known.not_before
            if again is None or again <= now:
                return rotation.Verify(known.label)
            put_off.append(again)
        if at_work.check and slots.current is not None and at_work.profile is not None:
            return rotation.Verify(slots.current.label)
        if at_work.unsealed and self._wrap_key is not None and slots.current is not None:
            return rotation.Publish(slots.current.label)
        may_issue = (
            at_work.name in self._mints and not at_work.resting and not self._cannot_keep(at_work)
        )
        if locked_away:  # the key is handed out once it can be read: no other, unless one is needed
            may_issue = may_issue and (at_work.asked or slots.rotate)
        step = rotation.next_step(slots, policy, now)
        may_poll = at_work.name in self._mints and at_work.profile is not None
        if isinstance(step, rotation.Poll) and not may_poll:
            read = replace(slots, polled_at=now, rotate=False)
            step = rotation.next_step(read, replace(policy, poll=timedelta(days=1)), now)
        if isinstance(step, rotation.Issue) and not (may_issue and at_work.profile is not None):
            step = rotation.next_step(slots, replace(policy, max_live=0), now)
        if isinstance(step, rotation.Wait):
            if step.until is not None:
                put_off.append(step.until)
            until = min(put_off, default=None)
            return rotation.Wait(None if until is None else instant.wall + (until - now))
        return step

    def _is_stuck(self, at_work: _Profile) -> bool:
        """Say whether a new key cannot be put where others read it, before something is mended."""
        new, trouble = at_work.slots.next, at_work.slots.trouble
        stuck = at_work.policy.publishes and new is not None and new.failures > 0
        return stuck and trouble is not None and trouble.code != SourceUnavailable.code

    def _live(self, at_work: _Profile, slots: Slots) -> int:
        """Count what of these may be alive at the gateway."""
        instant = self._clock.read()
        now = judge(at_work.anchor, instant).now
        return rotation.live(_by_clocks(slots, instant, now), at_work.policy, now)

    def _plan_time(self, at_work: _Profile, instant: Instant) -> datetime:
        """A new key's times are by the wall clock; the current one's by the later of both."""
        if at_work.slots.next is not None:
            return instant.wall
        return judge(at_work.anchor, instant).now

    def _can_recover(self, at_work: _Profile, key: Key) -> bool:
        """Say whether a key whose secret was lost here may be where keys are published."""
        begun = at_work.policy.publishes and key.base is not None and at_work.profile is not None
        return begun and key.label not in at_work.absent and rotation.fits(key, at_work.policy)

    def _cannot_keep(self, at_work: _Profile) -> bool:
        return self._wrap_key is None and not self._keeps and at_work.policy.kind.ours

    def _adopt(self, at_work: _Profile, sealed: Sealed | None) -> None:
        """
        Take over what the cache had, if the journal agrees that it is ours and alive.

        A sealed key was verified. One that the journal has as minted but not yet as current was
        interrupted between the two: it is current now. One that is retired or gone is not.
        """
        if sealed is None:
            return
        slots = at_work.slots
        if at_work.policy.kind is Kind.FOLLOWED:
            key = _followed(sealed.label, sealed.credential, sealed.issuer, at_work.policy)
            if not rotation.fits(key, at_work.policy) or slots.current is not None:
                return  # of another source; or the journal has a key that is to be retired first
            slots = replace(
                slots,
                current=replace(key, verified=sealed.verified),
                polled_at=sealed.credential.lease.issued_at,
            )
        else:
            known = slots.key(sealed.label)
            if known is None or known.revoke_at is not None or known.issuer != sealed.issuer:
                return
            # a renewal is in the journal alone
            sealed = replace(sealed, credential=Credential(sealed.credential.secret, known.lease))
            if known is slots.next:
                verified = Verdict(Look.ALIVE, sealed.verified)
                staged = known.base is not None
                slots = replace(slots, next=replace(known, verdict=verified, staged=staged))
        at_work.slots = slots
        at_work.secrets[sealed.label] = sealed.credential
        at_work.anchor = at_work.new_anchor = sealed.anchor
        at_work.drift = timedelta()
        reading = judge(sealed.anchor, self._clock.read())
        at_work.doubt = reading.doubtful or self._before_last_record(reading)

    def _before_last_record(self, reading: Reading) -> bool:
        return self._newest is not None and reading.now < self._newest

    # doing

    def _start(self, at_work: _Profile, step: rotation.Step) -> None:
        slots, profile = at_work.slots, at_work.profile
        calls = at_work.policy.timeout.total_seconds()
        if isinstance(step, rotation.Settle):
            found = next(o for o in slots.open if o.label == step.label)
            self._send(
                at_work,
                step,
                step.label,
                "settle",
                3 * calls,
                profile=at_work.name,
                label=step.label,
                issuer=found.issuer,
                timeout=at_work.policy.timeout,
                last=step.last,
            )
            return
        if isinstance(step, rotation.Revoke):
            key = _known(slots, step.label)
            self._send(
                at_work,
                step,
                step.label,
                "revoke",
                calls,
                profile=at_work.name,
                label=step.label,
                fingerprint=key.fingerprint,
                issuer=key.issuer,
                timeout=at_work.policy.timeout,
                lease=key.lease,
            )
            return
        if isinstance(step, rotation.Retire):
            self._retire(at_work, step)
            return
        if isinstance(step, rotation.Export):
            credential = at_work.secrets.get(step.label)
            self._send(
                at_work,
                step,
                step.label,
                "export",
                EXPORT_SECONDS,
                profile=at_work.name,
                file=f"{self._keys}/{at_work.name}",
                secret=None if credential is None else credential.secret,
                keep=_known(slots, step.label).fingerprint if step.label else "",
            )
            return
        assert profile is not None
        if isinstance(step, rotation.Issue):
            label = new_label(self._instance, profile.name, self._clock.read().wall)
            self._send(at_work, step, label, "issue", 2 * calls, profile=profile, label=label)
        elif isinstance(step, rotation.Poll):
            current = slots.current  # who is in a hurry wants it read, whatever the labels say
            known = current is not None and current.label in at_work.secrets and not slots.rotate
            lease = current.lease if current is not None and known else None
            doubted = current is not None and current.refused_at is not None
            doubted = doubted or at_work.fresh
            at_work.fresh = False
            values = {"fresh": True} if doubted and profile.type == "login" else {}
            self._send(at_work, step, "", "poll", calls, profile=profile, lease=lease, **values)
        elif isinstance(step, rotation.Stage):
            self._send(
                at_work,
                step,
                step.label,
                "stage",
                STORE_CALLS * calls,
                profile=profile,
                label=step.label,
                credential=at_work.secrets[step.label],
                base=_known(slots, step.label).base,
            )
        elif isinstance(step, rotation.Recover):
            self._send(
                at_work, step, step.label, "recover", calls, profile=profile, label=step.label
            )
        elif isinstance(step, rotation.Renew):
            lease = _known(slots, step.label).lease
            self._send(
                at_work,
                step,
                step.label,
                "renew",
                calls,
                profile=profile,
                label=step.label,
                lease=lease,
            )
        elif isinstance(step, rotation.Verify):
            secret = at_work.secrets[step.label].secret
            self._send(
                at_work, step, step.label, "verify", 2 * calls, profile=profile, secret=secret
            )
        elif isinstance(step, rotation.Publish):
            key = _known(slots, step.label)
            again = key is slots.current  # to be sealed, now that it can be
            base = None if again or not at_work.policy.publishes else key.base
            self._send(
                at_work,
                step,
                step.label,
                "publish",
                calls if base is None else STORE_CALLS * calls,
                profile=profile,
                label=step.label,
                credential=at_work.secrets[step.label],
                verified=key.verified if again else _how_verified(key),
                wrap_key=self._wrap_key,
                anchor=at_work.anchor if again else self._anchor_of_new(at_work),
                hold=None if again else _hold_of_old(at_work),
                replaces="" if again or slots.current is None else slots.current.fingerprint,
                base=base,
            )

    def _retire(self, at_work: _Profile, step: rotation.Retire) -> None:
        """Retire a key: at once if nobody was given it, else after its hold."""
        key = _known(at_work.slots, step.label)
        if not key.lease.revocable:  # somebody else keeps it
            at_work.slots = fold(
                at_work.slots,
                Record(self.now(), Event.GONE, at_work.name, step.label, why=step.why),
            )
            if step.why in (rotation.MOVED, rotation.SIGNED_OUT):  # no failure: it is read at once
                at_work.slots = rotation.hurried(at_work.slots)
            else:
                before = at_work.slots.trouble
                problem = f"{key.lease.source}: a key was given up: {step.why}"
                self._fail(at_work, SourceInvalid(problem))
                self._report(at_work, before)
            self._clean(at_work)
            self._change(at_work)  # nobody's answer will
            return
        revoke_at = self._clock.read().wall
        out = key is at_work.slots.current or key.base is not None
        if step.why == rotation.EXPORTED:
            revoke_at = end_of(key)
        elif out and not at_work.ending:  # it was handed out, or may have been read by others
            revoke_at += rotation.hold_of(key, at_work.policy)
            if _may_be_read(at_work, key):
                revoke_at = max(revoke_at, end_of(key))
        self._send(
            at_work,
            step,
            step.label,
            "retire",
            at_work.policy.timeout.total_seconds(),
            profile=at_work.name,
            label=step.label,
            fingerprint=key.fingerprint,
            revoke_at=revoke_at,
            why=step.why,
        )

    def _send(
        self,
        at_work: _Profile,
        step: rotation.Step,
        label: str,
        op: str,
        calls: float,
        /,
        **values: Any,
    ) -> None:
        # of the key, or of the profile
        issuer: Issuer = values.get("issuer", at_work.policy.issuer)
        if isinstance(step, rotation.Verify):
            at_work.check = False
        now = self._clock.read().wall
        within = rotation.Verify | rotation.Publish | rotation.Export | rotation.Retire
        asks = not isinstance(step, within)
        puts = isinstance(step, rotation.Stage | rotation.Recover) or values.get("base") is not None
        if puts and at_work.profile is not None and at_work.profile.publish is not None:
            issuer, asks = at_work.profile.publish.issuer, True
        if asks and self._logins.must_wait(issuer, at_work.name):
            return
        if asks:
            values.update(session=self.session(issuer), **self.opener(issuer))
        seconds = calls + EXTRA_SECONDS
        if asks:  # who is ended while a token is renewed has lost the next refresh token
            seconds += sum(one.seconds for one in needed_by(issuer))
        number = self._workers.send(issuer.type, op, seconds, urgent=at_work.asked, **values)
        at_work.busy = (number, step, label)
        self._asked[number] = at_work
        if asks:
            self._logins.asked(issuer, number, now)

    # sessions of sources

    def _forgive(self, at_work: _Profile) -> None:
        """A person wants to know now: a login that failed, or has too few rights, is tried anew."""
        trouble = at_work.slots.trouble
        denied = trouble is not None and trouble.code == SourceDenied.code
        forgiven = self._logins.forgive(at_work.policy.issuer, anew=denied)
        if forgiven is not None:  # who is lent the lock goes on from there
            self._keep(forgiven)

    def session(self, issuer: Issuer) -> Session | None:
        """Return what an issuer is asked with, where it wants a session."""
        return self._logins.of(issuer)

    def opener(self, issuer: Issuer) -> dict[str, Any]:
        """Return what opens the sign-ins that an issuer is asked with, where it needs any."""
        if self._wrap_key is None or not any(needed_by(issuer)):
            return {}
        return {"unseals": self._wrap_key}

    def hold(self, sessions: Iterable[Session]) -> None:
        """Keep what a worker began or renewed, sealed where that is possible."""
        for session in sessions:
            if self._logins.take(session):
                self._keep(session)

    def end_session(self, issuer: Issuer) -> Session | None:
        """Ask an issuer no more with the session that there is; return that, if there was one."""
        ended = self._logins.end(issuer)
        if ended is not None:
            self._workers.send("cache", "forget_session", EXTRA_SECONDS, session_key=ended.key)
        return ended

    def _renew_sessions(self, now: datetime) -> datetime | None:
        """Have those renewed that nobody asks with; return when the next one is due."""
        if not self._mints:
            return None
        late, due = self._logins.due(now)
        for issuer in late:
            self._workers.send(
                issuer.type,
                "renew_session",
                RENEWAL_SECONDS + EXTRA_SECONDS,
                vault=issuer.vault,
                session=self.session(issuer),
                **self.opener(issuer),
            )
            self._logins.renewing(issuer, now)
        return due

    def _keep(self, session: Session) -> None:
        """Have it sealed: a token, and that a password was refused, outlive this process."""
        if self._wrap_key is not None:
            self._workers.send(
                "cache", "keep", EXTRA_SECONDS, kept=session, wrap_key=self._wrap_key
            )

    # taking in

    def _apply(self, at_work: _Profile, answer: Answer) -> None:
        if answer.records is None:  # the worker died: only the journal knows how far it came
            try:
                fresh = replay(self._reread())
            except JournalError as error:  # it was damaged meanwhile: what we know, we know
                at_work.slots = replace(at_work.slots, trouble=_trouble(error))
            else:
                self._refresh(at_work, fresh.get(at_work.name, Slots()))
            return
        for record in answer.records:
            at_work.slots = fold(at_work.slots, record)

    def _refresh(self, at_work: _Profile, fresh: Slots) -> None:
        """Go on with what the journal knows, and with what only this process does."""
        if at_work.policy.kind is Kind.FOLLOWED:
            return
        slots = at_work.slots
        at_work.slots = replace(
            fresh,
            failures=slots.failures,
            not_before=slots.not_before,
            rotate=slots.rotate,
            trouble=slots.trouble,
        )
        self._change(at_work)

    def _finish(self, at_work: _Profile, step: rotation.Step, label: str, answer: Answer) -> None:
        now, policy = self._plan_time(at_work, self._clock.read()), at_work.policy
        if answer.error is not None:
            if isinstance(step, rotation.Issue | rotation.Poll):
                gone = isinstance(answer.error, SourceError) and answer.error.withdrawn
                at_work.slots = replace(at_work.slots, withdrawn=gone)
                if gone:  # so is the one that was being tried
                    at_work.slots = replace(at_work.slots, next=None)
                self._fail(at_work, answer.error)
            elif isinstance(step, rotation.Renew) and _is_final(answer.error):
                at_work.slots = rotation.not_renewable(at_work.slots, label)
                if isinstance(answer.error, SourceInvalid):  # it is no more
                    self._hurry(at_work)
                at_work.slots = replace(at_work.slots, trouble=_trouble(answer.error))
            elif isinstance(step, rotation.Export):
                died = answer.records is None
                again = policy.retry_min if died else EXPORT_AGAIN
                at_work.filed, at_work.file_at = None, self._clock.read().wall + again
                first = at_work.slots.trouble or _trouble(answer.error)
                at_work.slots = replace(at_work.slots, trouble=first)
            else:
                at_work.slots = rotation.put_off(at_work.slots, label, policy, now, self._roll())
                first = at_work.slots.trouble or _trouble(answer.error)
                at_work.slots = replace(at_work.slots, trouble=first)
            return
        ok = answer.ok or {}
        if isinstance(step, rotation.Issue):
            at_work.secrets[label] = _credential(ok["credential"])
            at_work.new_anchor = self._clock.read()
        elif isinstance(step, rotation.Poll) and "lease" in ok:
            self._polled_the_same(at_work, decode_lease(ok["lease"]), now)
        elif isinstance(step, rotation.Poll):
            self._polled(at_work, _credential(ok["credential"]), now)
        elif isinstance(step, rotation.Stage):
            key = replace(_known(at_work.slots, label), staged=True, failures=0, not_before=None)
            at_work.slots = change(at_work.slots, key)
        elif isinstance(step, rotation.Export):
            at_work.filed, at_work.file_at = step.label, None
            trouble = at_work.slots.trouble
            if trouble is not None and trouble.message.startswith("export: "):
                at_work.slots = replace(at_work.slots, trouble=None)
        elif isinstance(step, rotation.Recover):
            self._recovered(at_work, _known(at_work.slots, label), ok["secret"])
        elif isinstance(step, rotation.Renew):
            key = _known(at_work.slots, label)
            at_work.secrets[label] = replace(at_work.secrets[label], lease=key.lease)
            at_work.anchor, at_work.drift = self._clock.read(), timedelta()
            at_work.slots = rotation.worked(at_work.slots)
        elif isinstance(step, rotation.Verify):
            verdict = Verdict(Look(ok["look"]), ok["method"], ok["reason"])
            at_work.slots = rotation.judged(
                at_work.slots, label, verdict, policy, now, self._roll()
            )
            self._clear_doubt(at_work, label, verdict, now)
        elif isinstance(step, rotation.Publish) and ok.get("beaten"):
            at_work.slots = change(
                at_work.slots, replace(_known(at_work.slots, label), beaten=rotation.BEATEN)
            )
        elif isinstance(step, rotation.Publish):
            self._published(at_work, _known(at_work.slots, label))
            at_work.slots = rotation.worked(at_work.slots)
            if policy.kind is Kind.FOLLOWED:
                swap = Record(now, Event.SWAP, at_work.name, label, why="")
                verified = _how_verified(_known(at_work.slots, label))
                slots = fold(at_work.slots, swap)
                current = slots.current
                if current is not None:
                    current = replace(current, verified=verified)
                minted = tuple(key for key in slots.retired if key.lease.revocable)
                at_work.slots = replace(slots, current=current, retired=minted)
        elif isinstance(step, rotation.Retire) and step.bad:
            problem = f"{policy.issuer.type}: a new key was given up: {step.why}"
            self._fail(at_work, SourceUnavailable(problem))
        self._clean(at_work)

    def _published(self, at_work: _Profile, key: Key) -> None:
        if key.label != at_work.published:
            at_work.anchor, at_work.drift = self._anchor_of_new(at_work), timedelta()
        at_work.doubt = at_work.late = False
        at_work.file_at = None  # another key: it is tried at once
        at_work.unsealed = self._wrap_key is None
        if key.label != at_work.published:  # else it was sealed, now that it could be
            what = "replaced" if at_work.published else "published"
            self.news.append(News(at_work.name, what, key.fingerprint))
        at_work.published = key.label

    def _anchor_of_new(self, at_work: _Profile) -> Instant:
        """
        Return the clocks when the next key's times were read.

        When they were set since, its end is by a clock that was wrong: it will be in doubt.
        """
        return at_work.new_anchor or self._clock.read()

    def _clean(self, at_work: _Profile) -> None:
        """Let go of the secrets that are handed out no more."""
        kept = {k.label for k in (at_work.slots.current, at_work.slots.next) if k is not None}
        if at_work.profile is None:
            kept = set()
        at_work.secrets = {k: v for k, v in at_work.secrets.items() if k in kept}
        at_work.absent &= kept

    def _recovered(self, at_work: _Profile, key: Key, text: str | None) -> None:
        """A key whose secret was lost here was looked for where keys are published."""
        if text is None or Secret(text).fingerprint != key.fingerprint:
            at_work.absent.add(key.label)
            return
        at_work.secrets[key.label] = Credential(Secret(text), key.lease)
        found = replace(key, staged=True, failures=0, not_before=None)
        at_work.slots = change(at_work.slots, found)
        began = key.wanted or self._clock.read()
        if at_work.slots.current is not None and at_work.slots.current.label == key.label:
            at_work.anchor, at_work.drift, at_work.unsealed = began, timedelta(), True
        else:
            at_work.new_anchor = began

    def _polled_the_same(self, at_work: _Profile, lease: Lease, now: datetime) -> None:
        """A followed source was looked at: the key that is known still counts."""
        slots = replace(at_work.slots, polled_at=now, withdrawn=False)
        current = slots.current
        if current is not None and lease.id == current.lease.id:
            slots = replace(slots, current=replace(current, lease=lease))
            if slots.next is not None and not _is_older(lease, slots.next.lease):
                slots = replace(slots, next=None)  # its owner took it back
            at_work.secrets[current.label] = replace(at_work.secrets[current.label], lease=lease)
        at_work.slots = rotation.worked(slots)

    def _polled(self, at_work: _Profile, credential: Credential, now: datetime) -> None:
        """A followed source was read: the same key lives on, another is tried; no older one."""
        slots = replace(at_work.slots, polled_at=now, withdrawn=False)
        current = slots.current
        known = [key for key in (current, slots.next) if key is not None]
        if any(_is_older(credential.lease, key.lease) for key in known):
            at_work.slots = slots
            if slots.rotate or not rotation.usable(current, at_work.policy, now):
                problem = f"{credential.lease.source}: an older version was answered"
                hint = "by a standby that is behind; it is asked again"
                self._fail(at_work, SourceUnavailable(problem, hint=hint))
            return
        label = f"{at_work.name}:{credential.secret.fingerprint}"
        if current is not None and current.label == label and not current.condemned:
            lease = replace(credential.lease, issued_at=current.lease.issued_at)
            current = replace(current, lease=lease)
            slots = replace(slots, current=current, next=None, rotate=False)
            slots = rotation.worked(slots)
        elif slots.next is None or slots.next.label != label:
            key = _followed(label, credential, at_work.policy.issuer, at_work.policy)
            at_work.new_anchor = self._clock.read()
            if current is not None and current.label == label:  # condemned: it is tried anew
                key = replace(key, refused_at=current.refused_at or now)
                slots = without(slots, label)
            slots = replace(slots, next=key)
        at_work.secrets[label] = credential
        at_work.slots = slots

    def _clear_doubt(self, at_work: _Profile, label: str, verdict: Verdict, now: datetime) -> None:
        """A key that the gateway still takes is alive, whatever the clocks say."""
        current = at_work.slots.current
        if not at_work.doubt or current is None or current.label != label:
            return
        at_work.doubt = verdict.look is not Look.ALIVE
        instant = self._clock.read()
        passed = by_boot(at_work.anchor, instant)
        if not at_work.doubt and passed is not None:
            at_work.drift = instant.wall - passed
        if verdict.look in (Look.ALIVE, Look.UNVERIFIED):
            self._hurry(at_work)  # the next key's times will be by the clocks as they are now
        if at_work.doubt and verdict.look is not Look.REFUSED:
            later = rotation.put_off(at_work.slots, label, at_work.policy, now, self._roll())
            at_work.slots = later

    def _fail(self, at_work: _Profile, error: KeybrokerError) -> None:
        final = _is_final(error)
        retry_after = error.retry_after if isinstance(error, SourceError) else None
        at_work.tried_at = self._plan_time(at_work, self._clock.read())
        reads = at_work.policy.kind is Kind.FOLLOWED  # to read once more makes nothing
        at_work.patient = retry_after is not None or (final and not reads)
        at_work.slots = rotation.failed(
            at_work.slots,
            at_work.policy,
            self._plan_time(at_work, self._clock.read()),
            self._roll(),
            _trouble(error),
            retry_after=retry_after,
            final=final or not isinstance(error, SourceError),
        )


def _in_words(length: timedelta) -> str:
    seconds = -int(-length.total_seconds() // 1)
    if seconds > 7200:
        return f"{-(-seconds // 3600)} h"
    return f"{seconds} s" if seconds <= 120 else f"{-(-seconds // 60)} min"


def _rounded(due: datetime, at_work: _Profile, instance: str) -> datetime:
    """
    Put what is due together, a little later: many profiles, one wake-up.

    Each installation reads what others keep at seconds of its own: many hosts, no rush.
    """
    slots, policy = at_work.slots, at_work.policy
    if policy.hold < ROUNDED:
        return due
    seconds = 1.0
    current = slots.current
    ends = None if current is None else current.lease.expires_at
    good = current is not None and current.refused_at is None and not current.condemned
    good = good and (ends is None or due < ends)
    calm = good and slots.failures == 0 and slots.next is None and not slots.rotate
    reread_at = None if current is None else current.lease.reread_at
    named = reread_at is not None and reread_at <= due  # its keeper chose the moment
    if policy.kind is Kind.FOLLOWED and calm and not named:
        seconds = rotation.slack(policy).total_seconds()
        if not seconds:
            return due
    own = int(sha256(instance.encode())[:8], 16) % seconds
    stamp = -(-(due.timestamp() - own) // seconds) * seconds + own
    return datetime.fromtimestamp(stamp, UTC)


def _by_clocks(slots: Slots, instant: Instant, now: datetime) -> Slots:
    """
    Let `now` count readers' holds by the earlier of the clocks, all else by the one nobody sets.

    A wall clock that was set forward has not used up anybody's hold, nor ended a key at the
    gateway; one that was set back puts off no look-up.
    """
    for key in slots.keys:
        slots = change(slots, replace(key, behind=now - counted(key.wanted, instant)))
    retired = [
        replace(key, revoke_at=key.revoke_at + (now - earlier(key.retired, instant)))
        for key in slots.retired
        if key.revoke_at is not None
    ]
    opened = []
    for one in slots.open:
        since = one.since + (now - counted(one.clocks, instant))
        looked_at = one.looked_at
        if looked_at is not None:
            looked_at += now - counted(one.looked_clocks, instant)
        opened.append(replace(one, since=since, looked_at=looked_at))
    return replace(slots, retired=tuple(retired), open=tuple(opened))


def _chance() -> float:
    """Draw a number from 0 to 1 (`random` would load OpenSSL)."""
    return int.from_bytes(os.urandom(4), "big") / 0x1_0000_0000


def _trouble(error: KeybrokerError) -> Trouble:
    return Trouble(error.code, error.message, error.hint or "")


def _is_final(error: KeybrokerError) -> bool:
    """Say whether trying again is no use until something changes."""
    denied = isinstance(error, SourceDenied | SourceInvalid)
    return denied and not getattr(error, "unknown", False)


def _is_older(lease: Lease, than: Lease) -> bool:
    """Say whether a key was written before another: who answered with it is behind."""
    written, known = lease.written_at, than.written_at
    return written is not None and known is not None and written < known


def _why_lost(at_work: _Profile) -> str:
    if at_work.profile is None:
        return "the profile is not configured any more"
    return "its secret was lost"


def _how_verified(key: Key) -> str:
    """Return the method that said that a new key is alive, or how it came to be published."""
    if key.verdict is None:
        return "untried"
    return key.verdict.method if key.verdict.look is Look.ALIVE else key.verdict.look.value


def _hold_of_old(at_work: _Profile) -> timedelta | None:
    """How long readers of the key that is replaced may keep it."""
    current = at_work.slots.current
    if current is not None:
        return rotation.hold_of(current, at_work.policy)
    return at_work.policy.hold if at_work.slots.retired else None


def _may_be_read(at_work: _Profile, key: Key) -> bool:
    """
    Say whether a key may be what others read, until one of ours takes its place.

    Not one that was seen not to be there, or that the gateway refuses.
    """
    elsewhere = key.beaten or key.label in at_work.absent
    return key.base is not None and not elsewhere and key.refused_at is None


def _known(slots: Slots, label: str) -> Key:
    key = slots.key(label)
    assert key is not None, "a step names a key that is there"
    return key


def _credential(found: Mapping[str, Any]) -> Credential:
    return Credential(Secret(found["secret"]), decode_lease(found["lease"]))


def _followed(label: str, credential: Credential, issuer: Issuer, policy: Policy) -> Key:
    lease: Lease = credential.lease
    life = timedelta() if lease.expires_at is None else lease.expires_at - lease.issued_at
    return Key(label, issuer, lease, credential.secret.fingerprint, life, policy.hold)
