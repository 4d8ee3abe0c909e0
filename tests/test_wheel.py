"""The timing wheel: each thing is looked at when it is due, once."""

import random

import pytest

from pushsvc.wheel import Wheel

TICK, SPAN = 0.25, 15.0


def wheel(now: float = 0.0) -> Wheel[str]:
    return Wheel(TICK, SPAN, now)


@pytest.mark.parametrize(("due", "not_yet", "then"), [
    (1.0, 1.0, 1.25),
    (1.1, 1.1, 1.25),
    (1.24, 1.24, 1.25),
    (0.0, 0.0, 0.25),
    (14.9, 14.9, 15.0),
    (15.0, 15.0, 15.25),
])
def test_a_thing_is_looked_at_when_it_is_due_or_up_to_a_tick_later(due: float, not_yet: float, then: float) -> None:
    turning = wheel()
    turning.add("x", due)
    assert list(turning.turn(not_yet)) == []
    assert list(turning.turn(then)) == ["x"]
    assert list(turning.turn(then + SPAN)) == []


@pytest.mark.parametrize("due", [-100.0, 0.0, 99.9, 100.0])
def test_what_is_overdue_is_looked_at_with_the_next_tick(due: float) -> None:
    turning = wheel(100.0)
    turning.add("x", due)
    assert list(turning.turn(100.2)) == []
    assert list(turning.turn(100.25)) == ["x"]


@pytest.mark.parametrize("due", [SPAN + 1, 1000.0, float("inf")])
def test_what_is_due_beyond_the_span_is_looked_at_at_its_end(due: float) -> None:
    turning = wheel()
    turning.add("x", min(due, 1e12))
    assert list(turning.turn(SPAN)) == []
    assert list(turning.turn(SPAN + TICK)) == ["x"]


def test_a_turn_that_comes_late_brings_all_that_was_due_in_order() -> None:
    turning = wheel()
    for due in (3.0, 1.0, 60.0, 2.0):
        turning.add(f"{due}", due)
    assert list(turning.turn(1000.0)) == ["1.0", "2.0", "3.0", "60.0"]
    assert list(turning.turn(2000.0)) == []


@pytest.mark.parametrize("turned_to", [1.0, 10.0, 1000.0])
def test_what_is_added_during_a_turn_waits_for_the_next(turned_to: float) -> None:
    turning = wheel()
    turning.add("first", 0.5)
    seen = []
    for item in turning.turn(turned_to):
        seen.append(item)
        turning.add("again", 0.0)
    assert seen == ["first"]
    assert list(turning.turn(turned_to + TICK)) == ["again"]


def test_a_clock_that_stands_or_goes_back_brings_nothing() -> None:
    turning = wheel(100.0)
    turning.add("x", 100.1)
    assert [*turning.turn(100.0), *turning.turn(50.0), *turning.turn(100.24)] == []
    assert list(turning.turn(100.3)) == ["x"]


@pytest.mark.parametrize("seed", range(5))
def test_however_it_is_turned_nothing_is_lost_doubled_early_or_late(seed: int) -> None:
    chance = random.Random(seed)
    now, number = chance.uniform(0, 1e6), 0
    turning: Wheel[tuple[int, float]] = Wheel(TICK, SPAN, now)
    waiting: dict[int, float] = {}
    for _ in range(2000):
        for _ in range(chance.randrange(3)):
            number += 1
            waiting[number] = now + chance.uniform(0, SPAN)
            turning.add((number, waiting[number]), waiting[number])
        pause = chance.choice([0.1, TICK, 1.0])
        now += pause
        for item, due in turning.turn(now):
            assert waiting.pop(item) == due
            assert due <= now <= due + 2 * TICK + pause
    now += SPAN + TICK
    assert {item for item, _ in turning.turn(now)} == waiting.keys()
