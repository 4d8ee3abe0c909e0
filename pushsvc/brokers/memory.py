"""`memory:` the log of one process, for tests and for a single worker that may forget. Same promises, no disk."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import islice

import gevent

from pushsvc.brokers.base import Broker, Deliver, Page, Reset
from pushsvc.event import KEEP_LATEST, KEEP_NONE, Draft, Event
from pushsvc.position import Position, new_epoch
from pushsvc.settings import Settings

PAGE_BYTES = 1 << 20
MOST_MARKS = 100_000  # topics whose losses are remembered one by one


class MemoryBroker(Broker):
    """One dict of events, one list of sequences per topic."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._epoch = new_epoch(time.time_ns() // 1_000_000)
        self._seq = 0
        self._events: OrderedDict[int, Event] = OrderedDict()
        self._topics: defaultdict[str, list[int]] = defaultdict(list)
        self._latest: dict[tuple[str, str], int] = {}
        self._missing: dict[str, int] = {}
        self._floor = 0
        self._answers: OrderedDict[str, tuple[float, list[Position]]] = OrderedDict()
        self._waiting: list[Event] = []
        self._bytes = 0
        self._deliver: Deliver = lambda events: None

    def start(self, deliver: Deliver, reset: Reset) -> None:
        self._deliver = deliver
        reset(self.head())

    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        now = time.time()
        self._forget_answers(now)
        if key is not None and key in self._answers:
            return self._answers[key][1]
        events = [self._event(draft, now) for draft in drafts]
        for event in events:
            self._hold(event)
        self._retain(now)
        positions = [Position(self._epoch, event.seq) for event in events]
        if key is not None:
            self._answers[key] = (now, positions)
        if not self._waiting:
            gevent.spawn(self._hand_over)
        self._waiting += events
        return positions

    def head(self) -> Position:
        return Position(self._epoch, self._seq)

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        found: set[int] = set()
        for topic in topics:
            held = self._topics.get(topic, [])
            start = bisect_right(held, after)
            found.update(held[start : start + limit + 1])
        seqs = sorted(found)
        events = [self._events[seq] for seq in _within_bytes(seqs[:limit], self._events)]
        missing = max((self._missing.get(topic, self._floor) for topic in topics), default=0)
        return Page(events, len(events) < len(seqs), missing if missing > after else 0)

    def check(self) -> None:
        return None

    def close(self) -> None:
        return None

    def _event(self, draft: Draft, now: float) -> Event:
        self._seq += 1
        return Event(self._seq, now, draft.topics, draft.event, draft.data, draft.keep, draft.key, draft.retry)

    def _hold(self, event: Event) -> None:
        if event.keep == KEEP_NONE:
            return
        self._events[event.seq] = event
        self._bytes += len(event.data)
        for topic in event.topics:
            if event.keep == KEEP_LATEST:
                older = self._latest.get((topic, event.key))
                if older is not None:
                    self._drop(topic, older)
                self._latest[topic, event.key] = event.seq
            self._topics[topic].append(event.seq)
            if len(self._topics[topic]) > self._settings.history_events:
                self._trim(topic, self._topics[topic][0])

    def _retain(self, now: float) -> None:
        while self._events:
            oldest = next(iter(self._events.values()))
            if now - oldest.at < self._settings.history_seconds and self._bytes <= self._settings.history_bytes:
                return
            for topic in oldest.topics:
                if self._holds(topic, oldest.seq):
                    self._trim(topic, oldest.seq)

    def _trim(self, topic: str, seq: int) -> None:
        if len(self._missing) >= MOST_MARKS:
            self._floor = max(self._missing.values())
            self._missing.clear()
        self._missing[topic] = seq
        self._drop(topic, seq)

    def _holds(self, topic: str, seq: int) -> bool:
        held = self._topics.get(topic, [])
        at = bisect_left(held, seq)
        return at < len(held) and held[at] == seq

    def _drop(self, topic: str, seq: int) -> None:
        """Take one event out of one topic's history; out of the log when that was its last topic."""
        event = self._events[seq]
        held = self._topics[topic]
        del held[bisect_left(held, seq)]
        if not held:
            del self._topics[topic]
        if self._latest.get((topic, event.key)) == seq:
            del self._latest[topic, event.key]
        if not any(self._holds(each, seq) for each in event.topics):
            self._bytes -= len(event.data)
            del self._events[seq]

    def _forget_answers(self, now: float) -> None:
        for key, (at, _) in list(islice(self._answers.items(), 2)):
            if now - at > self._settings.idempotency_seconds:
                del self._answers[key]

    def _hand_over(self) -> None:
        events, self._waiting = self._waiting, []
        self._deliver(events)


def _within_bytes(seqs: list[int], events: dict[int, Event]) -> list[int]:
    total = 0
    for count, seq in enumerate(seqs):
        total += len(events[seq].data)
        if total > PAGE_BYTES and count:
            return seqs[:count]
    return seqs
