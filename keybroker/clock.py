"""What time it is, by clocks that do not agree.

The wall clock can be set, the monotonic clock stands still while a laptop sleeps, the boot clock
counts sleep but starts anew at each boot. A key is alive while both the wall clock and the boot
clock say so; when they disagree by more than a minute it is verified before it is printed.
"""

import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from keybroker.values import dataclass

DISAGREEMENT = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Instant:
    """One reading of all clocks. `boot` is in seconds; `boot_id` names the boot it counts from."""

    wall: datetime
    boot: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What time to reckon with, and whether the clocks behind it are to be believed."""

    now: datetime
    doubtful: bool


class Clock:
    """The machine's clocks, read at once."""

    def __init__(self) -> None:
        self._boot_id = _boot_id()

    def read(self) -> Instant:
        return Instant(datetime.now(UTC), _boot_seconds(), self._boot_id)


def judge(anchor: Instant, now: Instant) -> Reading:
    """
    Compare the present with an instant that was sealed beside a credential.

    Args:
        anchor: Read when the credential was issued.
        now: Read just now.

    Returns:
        The later of the two clocks, so that a key is alive only while both say so. It is doubtful
        when they drifted apart within one boot, or when a reboot came out before the anchor.
    """
    counted = by_boot(anchor, now)
    if counted is None:
        return Reading(now.wall, doubtful=now.wall < anchor.wall)
    return Reading(max(now.wall, counted), doubtful=abs(now.wall - counted) > DISAGREEMENT)


def earlier(since: Instant | None, now: Instant) -> datetime:
    """Return the earlier of the clocks: holds count by it, since a reader may go by either."""
    return min(now.wall, counted(since, now))


def counted(since: Instant | None, now: Instant) -> datetime:
    """Return the time as it passed since an instant, however the wall clock was set meanwhile."""
    passed = None if since is None else by_boot(since, now)
    return now.wall if passed is None else passed


def by_boot(anchor: Instant, now: Instant) -> datetime | None:
    """Return the time as the boot clock counts it from an anchor; None across a reboot."""
    if now.boot_id != anchor.boot_id or not now.boot_id:
        return None
    return anchor.wall + timedelta(seconds=now.boot - anchor.boot)


def _boot_seconds() -> float:
    # Linux counts suspend in CLOCK_BOOTTIME only; macOS counts it in CLOCK_MONOTONIC.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot_id() -> str:
    if sys.platform == "darwin":
        return _sysctl("kern.bootsessionuuid")
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""  # unknown: every comparison is one across a reboot


def _sysctl(name: str) -> str:
    import ctypes

    value, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    done: int = ctypes.CDLL(None).sysctlbyname(
        name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return value.value.decode("ascii") if done == 0 else ""
