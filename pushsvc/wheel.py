"""The timing wheel: when each stream is looked at again, without a timer per stream. Pure: time comes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Wheel(Generic[T]):
    """Slots of `tick` seconds, `span` seconds in all; what is due later than that is due at its end."""

    def __init__(self, tick: float, span: float, now: float) -> None:
        self.tick = tick
        self._slots: list[list[T]] = [[] for _ in range(int(span / tick) + 2)]
        self._turned = int(now / tick)

    def add(self, item: T, due: float) -> None:
        """Look at `item` at `due`, or up to a tick later."""
        slot = max(self._turned + 1, min(int(due / self.tick) + 1, self._turned + len(self._slots) - 1))
        self._slots[slot % len(self._slots)].append(item)

    def turn(self, now: float) -> Iterator[T]:
        """What has become due; what is added meanwhile is not among it."""
        due: list[T] = []
        while self._turned < int(now / self.tick):
            self._turned += 1
            slot = self._turned % len(self._slots)
            due += self._slots[slot]
            self._slots[slot] = []
        return iter(due)
