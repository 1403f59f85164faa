"""Values behave as the standard library's dataclasses do, where the package relies on it."""

import dataclasses
from typing import Any

import pytest

from keybroker import values


def _made(module: Any) -> tuple[Any, Any]:
    @module.dataclass(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 2
        tags: list[str] = module.field(default_factory=list, repr=False)

        @property
        def sum(self) -> int:
            return self.x + self.y

    @module.dataclass(slots=True)
    class Holder:
        point: Point
        note: str = module.field(default="", repr=False)

    return Point, Holder


@pytest.mark.parametrize(
    "look",
    [
        lambda point, holder: repr(point(1)).split(".")[-1],
        lambda point, holder: repr(holder(point(1), "x")).split("point=")[0].split(".")[-1],
        lambda point, holder: (point(1) == point(1, 2), point(1) == point(2), point(1) == 1),
        lambda point, holder: point(1).tags is point(1).tags,
        lambda point, holder: point(1, tags=["a"]).tags,
        lambda point, holder: point(3, 4).sum,
        lambda point, holder: hash(holder) == hash(holder),
        lambda point, holder: holder.__hash__,
        lambda point, holder: hasattr(point(1), "__dict__"),
        lambda point, holder: point.__match_args__,
        lambda point, holder: point.__name__,
    ],
)
def test_a_value_is_as_the_original_makes_it(look: Any) -> None:
    """Fields, defaults, factories, comparison, repr and slots."""
    assert look(*_made(values)) == look(*_made(dataclasses))


def test_equal_frozen_values_have_one_hash() -> None:
    """They are found in a set by what they are."""

    @values.dataclass(frozen=True, slots=True)
    class Name:
        text: str

    assert len({Name("a"), Name("a"), Name("b")}) == 2


def test_what_is_frozen_stays_so() -> None:
    """Neither set nor deleted; a copy with a change leaves the first as it was."""
    point, holder = _made(values)
    one = point(1)

    with pytest.raises(AttributeError):
        one.x = 5
    with pytest.raises(AttributeError):
        del one.x
    with pytest.raises(AttributeError):
        one.z = 5
    assert values.replace(one, y=9) == point(1, 9)
    assert one == point(1)
    open_ = holder(one)
    open_.note = "changed"
    assert open_.note == "changed"


def test_wrong_arguments_are_refused() -> None:
    """As any function refuses them."""
    point, _ = _made(values)
    for wrong in ({}, {"x": 1, "z": 2}):
        with pytest.raises(TypeError):
            point(**wrong)
    with pytest.raises(TypeError):
        values.replace(point(1), z=1)
