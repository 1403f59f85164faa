"""
Figures that hold on another machine.

Times vary by machine and by minute, ratios hardly: what is compared is measured in turn, in a
new order each round, and a figure is the median of the ratios within the rounds.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Round = dict[str, T]

BEGIN = "<!-- figures: `make bench` writes what is between here -->"
END = "<!-- and here -->"


class UnmeasurableError(Exception):
    """A figure could not be taken. The message says why, and what to type if that helps."""


@dataclass(frozen=True, slots=True)
class Figure:
    """
    One line of the table.

    Attributes:
        name: Of the file of results; it stays the same from version to version.
        about: What was measured, and what it is a multiple of.
        value: In `unit`.
        unit: `x` for a ratio.
        n: From how many measurements.
        at_most, at_least: The goal; neither when there is none.
    """

    name: str
    about: str
    value: float
    n: int
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"

    @property
    def goal(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    @property
    def shown(self) -> str:
        """The value with three digits, and its unit."""
        digits = 0 if self.value >= 100 or self.value == int(self.value) else 2
        digits = 1 if 10 <= self.value < 100 and digits else digits
        return f"{self.value:.{digits}f} {self.unit}".rstrip()


def interleaved(
    calls: Mapping[str, Callable[[], T]], rounds: int, *, warm: bool = True
) -> list[Round[T]]:
    """
    Make each call once a round, in an order that chance draws.

    Args:
        warm: Make each call once before, and drop what it returned.
    """
    if warm:
        for call in calls.values():
            call()
    found = []
    for _ in range(rounds):
        order = random.sample(sorted(calls), len(calls))
        found.append({name: calls[name]() for name in order})
    return found


def ratio(
    rounds: Sequence[Round[T]], of: str, to: str, by: Callable[[T], float] | None = None
) -> float:
    """Return the median of the ratios within the rounds. `by` makes a number of a measurement."""
    number = by or (lambda found: float(found))  # type: ignore[arg-type]
    return statistics.median(number(found[of]) / number(found[to]) for found in rounds)


def save(
    figures: Sequence[Figure], machine: Mapping[str, str], path: Path, *, all_of_them: bool = False
) -> list[Figure]:
    """
    Write the file of results.

    Args:
        all_of_them: Figures that the file has and that were not taken this time are dropped;
            otherwise they stay as they are.

    Returns:
        All that the file holds now.
    """
    known = {} if all_of_them else {one.name: one for one in load(path)}
    known.update({one.name: one for one in figures})
    lines = [
        json.dumps(
            {**asdict(one), "value": round(one.value, 4), "goal": one.goal, "met": one.met},
            ensure_ascii=False,
        )
        for one in known.values()
    ]
    text = ",\n  ".join(lines)
    path.write_text(f'{{"machine": {json.dumps(machine)},\n "figures": [\n  {text}\n]}}\n', "utf-8")
    return list(known.values())


def load(path: Path) -> list[Figure]:
    """Read a file of results; a missing one has none."""
    if not path.exists():
        return []
    names = Figure.__slots__
    found = json.loads(path.read_text("utf-8"))["figures"]
    return [Figure(**{name: one[name] for name in names}) for one in found]


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| what | figure | goal | | n |", "| --- | ---: | ---: | --- | ---: |"]
    for one in figures:
        verdict = {True: "met", False: "**missed**", None: ""}[one.met]
        lines.append(f"| {one.about} | {one.shown} | {one.goal} | {verdict} | {one.n:,} |")
    return "\n".join(lines)


def insert(text: str, between: str) -> str:
    """
    Return a page with what is between its two marks replaced.

    Raises:
        UnmeasurableError: It does not have both marks, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UnmeasurableError(f"README.md: the marks are missing\nhint: {BEGIN} … {END}")
    return f"{before}{begin}\n\n{between}\n\n{end}{after}"
