"""Whether a stream gets what it should: each event of its topics while it is open, once, in order. Pure.

Events whose first topic is the same are a lane. Within a lane the order is known, but for events that were under way at
the same time: whichever the service takes first is first. What is not `keep=all` may be replaced or dropped by the
service; that is counted apart.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from load.shape import Event

Times = Sequence[float | None]
STALE_SECONDS = 1.0  # an event that was acknowledged so long before a stream was asked for is none of its own


@dataclass(slots=True)
class Expected:
    """The events of some topics. where: event -> its lane and place there. order, dues: of each lane, the events and
    when they are due."""

    where: dict[int, tuple[int, int]] = field(default_factory=dict)
    order: dict[int, list[int]] = field(default_factory=dict)
    dues: dict[int, list[float]] = field(default_factory=dict)

    def add(self, number: int, event: Event) -> None:
        lane = event.topics[0]
        places = self.order.setdefault(lane, [])
        self.where[number] = lane, len(places)
        places.append(number)
        self.dues.setdefault(lane, []).append(event.at)


class Book:
    """What each set of topics is to get, of these events in the order in which they are due."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self._known: dict[tuple[int, ...], Expected] = {}
        self._by_topic: dict[int, list[int]] = {}
        for number, event in enumerate(events):
            for topic in event.topics:
                self._by_topic.setdefault(topic, []).append(number)

    def expected(self, topics: tuple[int, ...]) -> Expected:
        if topics not in self._known:
            expected = self._known[topics] = Expected()
            for number in sorted({number for topic in topics for number in self._by_topic.get(topic, ())}):
                expected.add(number, self._events[number])
        return self._known[topics]


@dataclass(slots=True)
class Track:
    """One client's way through its events, over all reconnects that resume. asked: when it asked for its stream;
    since: from when on nothing may be missing, its head was there; both seconds since the beginning. nexts: the place in
    each lane that comes next; none as long as nothing came. begun: the place that came first. missing: what was passed
    over, and the event that passed it."""

    expected: Expected
    asked: float = 0.0
    since: float = inf
    nexts: dict[int, int] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)

    def is_owed(self, number: int) -> bool:
        """Whether an event was due after the head had come."""
        lane, place = self.expected.where[number]
        return self.expected.dues[lane][place] > self.since


@dataclass(slots=True)
class Tally:
    """What went wrong. lost: event -> how many streams missed it. overdue: the same, of the last ones before a stream was
    ended: later ones did not come either, so they may have been on their way. doubled: events that came again. stray:
    of other topics. swapped: events that came after a later one, and which. firsts: the first event of each stream, and
    when the stream was asked for."""

    received: int = 0
    doubled: int = 0
    stray: int = 0
    swapped: Counter[tuple[int, int]] = field(default_factory=Counter)
    firsts: list[tuple[int, float]] = field(default_factory=list)
    lost: Counter[int] = field(default_factory=Counter)
    overdue: Counter[int] = field(default_factory=Counter)

    def take(self, track: Track, number: int) -> None:
        """Event `number` came."""
        self.received += 1
        place = track.expected.where.get(number)
        if place is None:
            self.stray += 1
            return
        lane, at = place
        due = track.nexts.get(lane, -1)
        if due == at:
            track.nexts[lane] = at + 1
        elif due < 0:
            self._take_first(track, number, lane, at)
        elif at > due:
            self._pass_over(track, number, lane, due, at)
            track.nexts[lane] = at + 1
        elif number in track.missing or at < track.begun[lane]:
            track.missing.pop(number, None)
            self.swapped[number, track.expected.order[lane][due - 1]] += 1
        else:
            self.doubled += 1

    def _take_first(self, track: Track, number: int, lane: int, at: int) -> None:
        self.firsts.append((number, track.asked))
        self._pass_over(track, number, lane, bisect_right(track.expected.dues[lane], track.since), at)
        track.nexts[lane] = at + 1
        track.begun[lane] = at

    def _pass_over(self, track: Track, number: int, lane: int, start: int, stop: int) -> None:
        """Event `number` came before these places of its lane."""
        track.missing.update(dict.fromkeys(track.expected.order[lane][start:stop], number))

    def finish(self, track: Track, until: float, sent: Times, acknowledged: Times) -> None:
        """The track is over: what was acknowledged before `until` should have come; inf: all. So should what one passed
        that was sent when it was acknowledged already. sent, acknowledged: when each event was, seconds; None if it was
        not."""
        last = self.lost if until == inf else self.overdue
        for lane, start, stop in behind(track, until):
            last.update(number for number in track.expected.order[lane][start:stop]
                        if (at := acknowledged[number]) is not None and at < until)
        self.lost.update(number for number, passer in track.missing.items() if track.is_owed(number)
                         and (at := acknowledged[number]) is not None and (at < until or at < (sent[passer] or 0.0)))
        track.missing.clear()

    def reordered(self, sent: Times, acknowledged: Times) -> int:
        """How many events came after one that was sent when they were acknowledged already."""
        return sum(count for (number, later), count in self.swapped.items()
                   if (at := acknowledged[number]) is not None and at < (sent[later] or 0.0))

    def stale(self, acknowledged: Times) -> int:
        """How many streams began with an event from before they were asked for."""
        return sum((at := acknowledged[number]) is not None and at < asked - STALE_SECONDS
                   for number, asked in self.firsts)


def behind(track: Track, until: float) -> Iterable[tuple[int, int, int]]:
    """The lanes in which events due before `until` have not come: lane, first place, place after the last."""
    for lane, dues in track.expected.dues.items():
        start = max(track.nexts.get(lane, 0), bisect_right(dues, track.since))
        stop = bisect_left(dues, until)
        if start < stop:
            yield lane, start, stop
