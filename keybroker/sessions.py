"""Who was given which key, and whether somebody asks for it again too soon.

Claude Code runs its helper anew at once after a 401, and does not say why. What tells it apart
from an ordinary refresh is that the same session was given the same key a moment ago.
"""

import os
import sys

from keybroker.values import dataclass

MOST_SESSIONS = 4096
# A client notices a change of its settings 0.8 to 1.5 s later; twice that is certainly over.
NOTICED_SECONDS = 3.0
EARLY = 0.9  # of a TTL: a client asks by itself when all of it has passed, or later
SHELLS = frozenset(
    (
        *("sh", "ash", "bash", "busybox", "csh", "dash", "elvish", "fish", "ksh", "ksh93", "lksh"),
        *("mksh", "nu", "pwsh", "rbash", "tcsh", "toybox", "xonsh", "yash", "zsh"),
    )
)
_PROC = "/proc"


@dataclass(frozen=True, slots=True)
class Session:
    """
    One run of a client: a pid is used again, together with its start it is not.

    `started` is in clock ticks since the boot, 0 where the system does not tell; `name` is the
    program's, as the program wants to be called, in printable characters.
    """

    pid: int
    started: int
    name: str


def identify(pid: int) -> Session | None:
    """
    Find the session whose helper asks; a shell between the two is skipped, one only.

    Args:
        pid: The helper's parent, as the helper says; 0 when it does not know.

    Returns:
        None when there is no such process (any more).
    """
    if pid <= 0:
        return None
    if sys.platform != "linux":
        return Session(pid, 0, "?")
    found = _stat(pid)
    if found is None:
        return None if os.path.exists(f"{_PROC}/self/stat") else Session(pid, 0, "?")
    session, parent = found
    if session.name in SHELLS and (above := _stat(parent)) is not None:
        return above[0]
    return session


def _stat(pid: int) -> tuple[Session, int] | None:
    """
    Read a process's line, of which the name may hold blanks and parentheses.

        4711 (a) b (c) S 4242 4711 4711 0 -1 4194560 … 1849302 …

    See: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        descriptor = os.open(f"{_PROC}/{pid}/stat", os.O_RDONLY)
        try:
            line = os.read(descriptor, 1024)  # more than the first 22 of its fields can take
        finally:
            os.close(descriptor)
    except OSError:
        return None
    before, _, after = line.rpartition(b")")
    name = before.partition(b"(")[2].decode("utf-8", "replace")
    fields = after.split()  # from the third on
    if not name.isprintable():
        name = "".join(one if one.isprintable() else "?" for one in name)
    return Session(pid, int(fields[19]), name), int(fields[1])


class Sessions:
    """
    What each session was given last, of each profile. At most 4,096; the oldest are forgotten.

    Times are seconds of the wall clock, which is what files' times are in.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[int, int, str], tuple[str, float]] = {}

    def given(self, session: Session, profile: str, fingerprint: str, at: float) -> None:
        """Note that a session was given a key."""
        key = (session.pid, session.started, profile)
        self._given.pop(key, None)  # the dictionary's order is the order of giving
        self._given[key] = (fingerprint, at)
        if len(self._given) > MOST_SESSIONS:
            del self._given[next(iter(self._given))]

    def suspicious(
        self,
        session: Session,
        profile: str,
        fingerprint: str,
        ttl_ms: int,
        now: float,
        changed_at: float | None,
    ) -> bool:
        """
        Decide whether an ask may mean that the gateway refused the key.

        Args:
            fingerprint: Of the current key.
            ttl_ms: How often this client asks by itself; 0 when unknown.
            changed_at: When a settings file that we know was last changed; a client forgets its
                key then, and asks again without any refusal. None when no file is known.

        Returns:
            True if this session was last given the current key, clearly less than its TTL ago, and
            no settings file changed since. A clock that was set back proves nothing.
        """
        last = self._given.get((session.pid, session.started, profile))
        if last is None or last[0] != fingerprint:
            return False
        passed = now - last[1]
        if not 0 <= passed < EARLY * ttl_ms / 1000:
            return False
        return changed_at is None or changed_at < last[1] - NOTICED_SECONDS
