"""The mailbox: what waits for one stream while its greenlet is busy, as a bounded gevent queue.

It is filled by the hub, which never waits (`offer`), and emptied by the stream's greenlet, which does (`take`).
It belongs to a stream that has a greenlet: one that opens, or whose socket is full.
"""

from __future__ import annotations

from typing import NamedTuple

from gevent.queue import SimpleQueue

from pushsvc.event import KEEP_ALL, KEEP_NONE


class Letter(NamedTuple):
    """One frame on its way to one stream. `same`: what a newer letter must share to take this one's place, or None."""

    seq: int
    frame: bytes
    keep: str
    same: tuple[object, ...] | None


class Mailbox(SimpleQueue):  # type: ignore[misc]
    """Letters in position order, at most `most_events` of `most_bytes` together. Never waits when full: it says so.

    What leaves first when room is needed: letters that are in no history (`keep: none`), oldest first.
    A letter with `same` takes the place of the one that waits with an equal `same` (`keep: latest` and `none`).
    """

    def __init__(self, most_events: int, most_bytes: int) -> None:
        self.most_events = most_events
        self.most_bytes = most_bytes
        self.bytes = 0
        self.latest: dict[tuple[object, ...], int] = {}
        self.closed = False
        self.nudged = False
        super().__init__()

    def _create_queue(self, items: object = ()) -> dict[int, Letter]:
        return {}

    def _put(self, letter: Letter | None) -> None:
        if letter is not None:
            self.queue[letter.seq] = letter

    def _qsize(self) -> int:
        return len(self.queue) or int(self.nudged or self.closed)

    def _peek(self) -> None:
        return None

    def offer(self, letter: Letter, whole: bool = False) -> bool:
        """Add `letter`; False if it does not fit, and then the mailbox is as it was, but for passing ones that have made
        room. `whole`: it belongs to what an empty mailbox is given at once, of which only the passing ones are bounded.
        Atomic: no switch."""
        older = self.queue.get(self.latest.get(letter.same)) if letter.same is not None else None
        if not self._make_room(letter, older, whole and letter.keep != KEEP_NONE):
            return letter.keep == KEEP_NONE
        if older is not None:
            self._drop(older)
        if letter.same is not None:
            self.latest[letter.same] = letter.seq
        self.bytes += len(letter.frame)
        self.put(letter, block=False)
        return True

    def take(self) -> list[Letter]:
        """All that waits, in position order; waits for the first. Empty after a nudge or when closed. Switches."""
        self.peek()
        self.nudged = False
        letters = list(self.queue.values())
        self.clear()
        return letters

    def clear(self) -> None:
        """Forget what waits. Atomic: no switch."""
        self.queue.clear()
        self.latest.clear()
        self.bytes = 0

    def close(self) -> None:
        """Wake the one that takes; what waits can still be taken. Idempotent. Atomic: no switch."""
        if not self.closed:
            self.closed = True
            self.put(None, block=False)

    def nudge(self) -> None:
        """Wake the one that takes, with nothing: it is time for a heartbeat. Atomic: no switch."""
        self.nudged = True
        self.put(None, block=False)

    def _make_room(self, letter: Letter, older: Letter | None, whole: bool) -> bool:
        """Room for `letter` in the place of `older`."""
        if self._has_room(letter, older, whole):
            return True
        for passing in [each for each in self.queue.values() if each.keep == KEEP_NONE and each is not older]:
            self._drop(passing)
            if self._has_room(letter, older, whole):
                return True
        return False

    def _has_room(self, letter: Letter, older: Letter | None, whole: bool) -> bool:
        # One letter larger than the bound still goes through an empty mailbox: else such an event could never arrive.
        others = len(self.queue) - (older is not None)
        size = self.bytes + len(letter.frame) - (len(older.frame) if older is not None else 0)
        return not others or whole or (others < self.most_events and size <= self.most_bytes)

    def _drop(self, letter: Letter) -> None:
        del self.queue[letter.seq]
        self.bytes -= len(letter.frame)
        if letter.same is not None:
            self.latest.pop(letter.same, None)


def replaces(event_topics: tuple[str, ...], key: str, keep: str) -> tuple[object, ...] | None:
    """What makes two letters the same for a mailbox: keep, topics and key of `latest` and `none`; None for `all`.

    A `none` never takes the place of a `latest`: who resumes behind it would not get that one any more.
    """
    return None if keep == KEEP_ALL else (keep, event_topics, key)
