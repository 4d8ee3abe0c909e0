"""The sender: one process that publishes a replay's events when they are due, whatever becomes of those before. An event
whose turn is late still counts from when it was due.

It is told what to do by JSON lines on standard input (see `main`), tells each second what it has done, and at the end
when each event was acknowledged.
"""

from __future__ import annotations

import json
import math
import re
import resource
import select
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from publisher import Publisher, PublishError
from swarm import BUCKETS_PER_E, authority

from load.shape import Event, expanded, read_shape
from load.targets import FORMS, Form
from load.wire import data_of

CONNECTIONS = 128  # events under way at once
ANSWER_SECONDS = 15.0
IDLE_SECONDS = 1.0
WAIT_SECONDS = 0.2
STATUS = re.compile(r"HTTP/1\.1 (\d+)")


@dataclass(slots=True)
class Tick:
    """What has happened since the last one. latency: bucket -> events, from due to acknowledged."""

    published: int = 0
    late: float = 0.0
    latency: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


class Sender:
    """Publishes `events` to one server. prefix: what the names of the topics begin with."""

    def __init__(self, events: tuple[Event, ...], form: Form, host: str, port: int, prefix: str) -> None:
        self.tick = Tick()
        self.sent: list[float | None] = [None] * len(events)
        self.acknowledged: list[float | None] = [None] * len(events)
        self._events = events
        self._form = form
        self._address = host, port
        self._host = authority(host, port)
        self._prefix = prefix
        self._next = 0
        self._free = CONNECTIONS
        self._idle: deque[tuple[Publisher, float]] = deque()
        self._busy: dict[Publisher, tuple[int, float]] = {}
        self._begun = 0.0

    def begin(self, at: float) -> None:
        """The replay begins at this time (monotonic, seconds)."""
        self._begun = at

    def now(self) -> float:
        return time.monotonic() - self._begun

    @property
    def is_done(self) -> bool:
        return self._next == len(self._events) and not self._busy

    def work(self) -> None:
        """Send what is due, take what is answered; wait a moment if there is nothing."""
        now = self.now()
        while self._next < len(self._events) and self._events[self._next].at <= now and (self._idle or self._free):
            self._send(self._next)
            self._next += 1
        self._receive(self._pause())

    def stop(self) -> None:
        """Send no more; what is under way may still be answered."""
        self._events = self._events[:self._next]

    def _pause(self) -> float:
        if self._next == len(self._events) or not (self._idle or self._free):
            return WAIT_SECONDS
        return min(WAIT_SECONDS, max(0.0, self._events[self._next].at - self.now()))

    def _send(self, number: int) -> None:
        event, now = self._events[number], time.monotonic()
        self.sent[number] = round(now - self._begun, 4)
        self.tick.late = max(self.tick.late, now - self._begun - event.at)
        data = data_of(int(event.at * 1e6), number, event.bytes)
        try:
            publisher = self._connection(now)
        except OSError as error:
            self.tick.errors[f"publish: {type(error).__name__}"] += 1
            return
        self._busy[publisher] = number, now + ANSWER_SECONDS
        topics = [f"{self._prefix}{topic}" for topic in event.topics]
        try:
            publisher.send(self._form.publish(self._host, topics, data, event))
        except OSError as error:
            self._give_up(publisher, f"publish: {type(error).__name__}")

    def _connection(self, now: float) -> Publisher:
        """One that was used a moment ago, else a new one: servers end what is idle for some seconds."""
        while self._idle and self._idle[0][1] < now - IDLE_SECONDS:
            self._idle.popleft()[0].close()
            self._free += 1
        return self._idle.pop()[0] if self._idle else self._connect()

    def _connect(self) -> Publisher:
        publisher = Publisher(*self._address)
        self._free -= 1
        return publisher

    def _receive(self, pause: float) -> None:
        if not self._busy:
            time.sleep(pause)
            return
        for publisher in select.select(list(self._busy), [], [], pause)[0]:
            try:
                if publisher.receive():
                    number, _ = self._busy.pop(publisher)
                    self._idle.append((publisher, time.monotonic()))
                    self._answered(number)
            except (OSError, PublishError) as error:
                status = STATUS.search(str(error))
                self._give_up(publisher, f"publish: status {status[1]}" if status else "publish: hung up")
        now = time.monotonic()
        for publisher, (_, until) in list(self._busy.items()):
            if now > until:
                self._give_up(publisher, "publish: no answer")

    def _give_up(self, publisher: Publisher, error: str) -> None:
        """Its event is not acknowledged, and its connection is of no use any more."""
        del self._busy[publisher]
        publisher.close()
        self._free += 1
        self.tick.errors[error] += 1

    def _answered(self, number: int) -> None:
        now = self.now()
        self.tick.published += 1
        self.acknowledged[number] = round(now, 4)
        seconds = now - self._events[number].at
        self.tick.latency[int(math.log(max(1.0, seconds * 1e6)) * BUCKETS_PER_E)] += 1

    def take_tick(self) -> dict[str, Any]:
        tick, self.tick = self.tick, Tick()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"published": tick.published, "late": tick.late, "acknowledged": tick.latency, "errors": tick.errors,
                "cpu": usage.ru_utime + usage.ru_stime}

    def close(self) -> None:
        for publisher in (*(each for each, _ in self._idle), *self._busy):
            publisher.close()


def main() -> None:
    """First line: the order, answered with `ready`. Then `begin` (a time). At the end it says for each event when it was
    `sent` and `acknowledged`, seconds since the beginning; null if it was not. A further line ends it early."""
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    shape = expanded(read_shape(Path(order["shape"])), order["times"], order["speed"], order["spread"])
    form = FORMS[order["form"]](order["token"])
    sender = Sender(shape.events, form, order["host"], order["port"], order["prefix"])
    _say({"ready": True})
    line = sys.stdin.readline()
    if line:
        sender.begin(json.loads(line)["begin"])
        _follow(sender)
    sender.close()


def _follow(sender: Sender) -> None:
    second = 0
    while not sender.is_done:
        sender.work()
        if sender.now() >= second + 1:
            _say({"tick": sender.take_tick(), "second": second})
            second = int(sender.now())
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return  # nobody listens any more
                sender.stop()
    _say({"tick": sender.take_tick(), "second": second})
    _say({"sent": sender.sent, "acknowledged": sender.acknowledged})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
