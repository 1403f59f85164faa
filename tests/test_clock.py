"""A key is alive while both clocks say so; clocks that disagree are said to be doubtful."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.clock import DISAGREEMENT, Clock, Instant, judge

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
ANCHOR = Instant(NOON, 1000.0, "boot-1")
MOMENTS = st.integers(0, 5_000_000).map(lambda minutes: NOON + timedelta(minutes=minutes))
BOOTS = st.floats(0, 1e9)


def after(wall: float, boot: float, boot_id: str = "boot-1") -> Instant:
    """Return an instant so many seconds after the anchor, by each clock."""
    return Instant(NOON + timedelta(seconds=wall), 1000.0 + boot, boot_id)


@pytest.mark.parametrize(
    ("now", "seconds", "doubtful"),
    [
        pytest.param(after(0, 0), 0, False, id="at once"),
        pytest.param(after(3600, 3600), 3600, False, id="an hour passed"),
        pytest.param(after(28800, 28800), 28800, False, id="a night asleep, counted by both"),
        pytest.param(after(3630, 3600), 3630, False, id="the wall clock is 30 s ahead"),
        pytest.param(after(3570, 3600), 3600, False, id="the wall clock is 30 s behind"),
        pytest.param(after(3660, 3600), 3660, False, id="a minute is still agreement"),
        pytest.param(after(3661, 3600), 3661, True, id="set forward by more than a minute"),
        pytest.param(after(3539, 3600), 3600, True, id="set back by more than a minute"),
        pytest.param(after(-7200, 3600), 3600, True, id="set back to before the anchor"),
        pytest.param(after(3600, 0), 3600, True, id="asleep, with a clock that does not count it"),
        pytest.param(after(3600, -990, "boot-2"), 3600, False, id="a reboot"),
        pytest.param(after(-1, -990, "boot-2"), -1, True, id="a reboot into the past"),
        pytest.param(after(0, -990, "boot-2"), 0, False, id="a reboot at the same moment"),
        pytest.param(after(3600, 3600, ""), 3600, False, id="no boot id, later"),
        pytest.param(after(-1, 3600, ""), -1, True, id="no boot id, earlier"),
    ],
)
def test_an_instant_is_judged_by_its_anchor(now: Instant, seconds: int, doubtful: bool) -> None:
    """Within one boot the later clock counts; across boots only the wall clock is left."""
    reading = judge(ANCHOR, now)

    assert reading.now == NOON + timedelta(seconds=seconds)
    assert reading.doubtful is doubtful


def test_two_unknown_boots_are_not_the_same_boot() -> None:
    """Where the system names no boot, the boot clock is never compared."""
    anchor = Instant(NOON, 1000.0, "")

    assert judge(anchor, after(10, 5_000_000, "")).now == NOON + timedelta(seconds=10)


@given(MOMENTS, BOOTS, MOMENTS, BOOTS, st.sampled_from(["boot-1", "boot-2", ""]))
def test_no_reading_is_earlier_than_the_wall_clock(
    issued: datetime, boot: float, wall: datetime, boot_now: float, boot_id: str
) -> None:
    """Whatever the clocks do, a key ends no later than the wall clock says."""
    reading = judge(Instant(issued, boot, "boot-1"), Instant(wall, boot_now, boot_id))

    assert reading.now >= wall


@given(MOMENTS, st.floats(0, 1e8), st.floats(-1e6, 1e6))
def test_drift_within_a_boot_is_doubtful_beyond_a_minute(
    issued: datetime, passed: float, step: float
) -> None:
    """A step of the wall clock is seen whichever way it goes."""
    anchor = Instant(issued, 0.0, "boot-1")
    by_boot = issued + timedelta(seconds=passed)
    wall = by_boot + timedelta(seconds=step)

    reading = judge(anchor, Instant(wall, passed, "boot-1"))

    assert reading.doubtful is (abs(wall - by_boot) > DISAGREEMENT)
    assert reading.now == max(wall, by_boot)


def test_the_machine_s_clocks_are_read() -> None:
    """The wall clock is aware and UTC, the boot clock runs, and one boot has one name."""
    earlier, before = datetime.now(UTC), time.clock_gettime(time.CLOCK_MONOTONIC)
    clock = Clock()
    first, second = clock.read(), clock.read()
    later = datetime.now(UTC)

    assert earlier <= first.wall <= second.wall <= later
    assert first.wall.tzinfo is UTC
    assert before <= first.boot <= second.boot
    assert first.boot_id == second.boot_id == Clock().read().boot_id
    assert judge(first, second).doubtful is False
