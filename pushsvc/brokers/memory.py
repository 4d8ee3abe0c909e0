"""`memory:` the log of one process, for tests and for a single worker that may forget. Same promises, no disk."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import gevent

from pushsvc.brokers.base import CLOSED, MOST_MARKS, Broker, Deliver, Page, Reset, page_of
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import KEEP_LATEST, KEEP_NONE, Draft, Event, size_of
from pushsvc.position import Position, new_epoch
from pushsvc.settings import Settings

EVENT_BYTES = 500  # what an event takes beside its data, and each of its topics
TOPIC_BYTES = 100


class MemoryBroker(Broker):
    """One dict of events, one list of sequences per topic."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._epoch = new_epoch(time.time_ns() // 1_000_000)
        self._seq = 0
        self._events: OrderedDict[int, Event] = OrderedDict()
        self._holders: dict[int, int] = {}  # how many topics' histories hold it
        self._topics: defaultdict[str, list[int]] = defaultdict(list)
        self._latest: dict[tuple[str, str], int] = {}
        self._missing: dict[str, int] = {}
        self._floor = 0
        self._answers: OrderedDict[str, tuple[float, range]] = OrderedDict()
        self._waiting: list[Event] = []
        self._bytes = 0
        self._closed = False
        self._deliver: Deliver = lambda events: None

    def start(self, deliver: Deliver, reset: Reset) -> None:
        self._deliver = deliver
        reset(self.head())

    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        self._check_open()
        now = time.time()
        self._forget_answers(now)
        if key is not None and key in self._answers:
            return self._positions(self._answers[key][1])
        events = [_event(seq, now, draft) for seq, draft in enumerate(drafts, self._seq + 1)]
        stretch = range(self._seq + 1, self._seq + 1 + len(events))
        self._seq += len(events)
        for event in events:
            self._hold(event)
        self._retain(now)
        if key is not None:
            self._answers[key] = (now, stretch)
        if events and not self._waiting:
            gevent.spawn(self._hand_over)
        self._waiting += events
        return self._positions(stretch)

    def head(self) -> Position:
        self._check_open()
        return Position(self._epoch, self._seq)

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        self._check_open()
        self._retain(time.time())
        found: set[int] = set()
        for topic in topics:
            held = self._topics.get(topic, [])
            start = bisect_right(held, after)
            found.update(held[start : start + limit + 1])
        seqs = sorted(found)
        events, _ = page_of(self._events[seq] for seq in seqs[:limit])
        missing = max((self._missing.get(topic, self._floor) for topic in topics), default=0)
        return Page(events, len(events) < len(seqs), missing if missing > after else 0)

    def check(self) -> None:
        self._check_open()

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(CLOSED)

    def _positions(self, stretch: range) -> list[Position]:
        return [Position(self._epoch, seq) for seq in stretch]

    def _hold(self, event: Event) -> None:
        if event.keep == KEEP_NONE:
            return
        self._events[event.seq] = event
        self._holders[event.seq] = len(event.topics)
        self._bytes += _cost(event)
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
        self._holders[seq] -= 1
        if not self._holders[seq]:
            self._bytes -= _cost(event)
            del self._events[seq], self._holders[seq]

    def _forget_answers(self, now: float) -> None:
        while self._answers:
            key, (at, _) = next(iter(self._answers.items()))
            if now - at < self._settings.idempotency_seconds:
                return
            del self._answers[key]

    def _hand_over(self) -> None:
        events, self._waiting = self._waiting, []
        self._deliver(events)


def _event(seq: int, now: float, draft: Draft) -> Event:
    return Event(seq, now, draft.topics, draft.event, draft.data, draft.keep, draft.key, draft.retry)


def _cost(event: Event) -> int:
    return size_of(event.data) + EVENT_BYTES + TOPIC_BYTES * len(event.topics)
