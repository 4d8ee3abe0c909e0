"""The sender: one process that publishes a replay's events when they are due, whatever becomes of those before. An event
whose turn is late still counts from when it was due. Events of one lane (the same first topic) go one after the other.

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
from swarm import BUCKETS_PER_E

from load.shape import Event, expanded, read_shape
from load.targets import FORMS, Form
from load.wire import data_of

CONNECTIONS = 32
ANSWER_SECONDS = 15.0
IDLE_SECONDS = 1.0
TICK_SECONDS = 1.0
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
        self.acknowledged: list[float | None] = [None] * len(events)
        self._events = events
        self._form = form
        self._address = host, port
        self._prefix = prefix
        self._next = 0
        self._lanes: dict[int, deque[int]] = {}
        self._ready: deque[int] = deque()
        self._free = CONNECTIONS
        self._idle: deque[tuple[Publisher, float]] = deque()
        self._busy: dict[Publisher, tuple[int, float]] = {}
        self._begun = 0.0

    def begin(self, at: float) -> None:
        """The replay begins at this time (monotonic, seconds)."""
        self._begun = at

    @property
    def is_done(self) -> bool:
        return self._next == len(self._events) and not self._lanes

    def work(self) -> None:
        """Send what is due, take what is answered; wait a moment if there is nothing."""
        now = time.monotonic() - self._begun
        while self._next < len(self._events) and self._events[self._next].at <= now:
            self._queue(self._next)
            self._next += 1
        while self._ready and (self._idle or self._free):
            self._send(self._ready.popleft())
        self._receive(self._pause())

    def _queue(self, number: int) -> None:
        lane = self._events[number].topics[0]
        if lane in self._lanes:
            self._lanes[lane].append(number)
        else:
            self._lanes[lane] = deque([number])
            self._ready.append(lane)

    def _pause(self) -> float:
        if self._next == len(self._events):
            return WAIT_SECONDS
        return min(WAIT_SECONDS, max(0.0, self._events[self._next].at - (time.monotonic() - self._begun)))

    def _send(self, lane: int) -> None:
        number = self._lanes[lane][0]
        event = self._events[number]
        now = time.monotonic()
        self.tick.late = max(self.tick.late, now - self._begun - event.at)
        data = data_of(int(event.at * 1e6), number, event.bytes)
        try:
            publisher = self._connection(now)
            self._busy[publisher] = lane, now + ANSWER_SECONDS
            publisher.send(self._form.publish([f"{self._prefix}{topic}" for topic in event.topics], data, event))
        except OSError as error:
            for publisher in [each for each, (its, _) in self._busy.items() if its == lane]:
                self._give_up(publisher)
            self._answered(lane, type(error).__name__)

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
            lane, _ = self._busy[publisher]
            try:
                if publisher.receive():
                    del self._busy[publisher]
                    self._idle.append((publisher, time.monotonic()))
                    self._answered(lane)
            except (OSError, PublishError) as error:
                self._give_up(publisher)
                status = STATUS.search(str(error))
                self._answered(lane, f"publish: status {status[1]}" if status else "publish: hung up")
        now = time.monotonic()
        for publisher, (lane, until) in list(self._busy.items()):
            if now > until:
                self._give_up(publisher)
                self._answered(lane, "publish: no answer")

    def _give_up(self, publisher: Publisher) -> None:
        del self._busy[publisher]
        publisher.close()
        self._free += 1

    def _answered(self, lane: int, error: str = "") -> None:
        """The first event of a lane is done with."""
        number = self._lanes[lane].popleft()
        if self._lanes[lane]:
            self._ready.append(lane)
        else:
            del self._lanes[lane]
        if error:
            self.tick.errors[error] += 1
            return
        self.tick.published += 1
        now = time.monotonic() - self._begun
        self.acknowledged[number] = round(now, 3)
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
    """First line: the order, answered with `ready`. Then `begin` (a time). At the end it says `sent`: for each event when
    it was acknowledged, seconds since the beginning, or null."""
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
    told = time.monotonic()
    while not sender.is_done:
        sender.work()
        if time.monotonic() - told >= TICK_SECONDS:
            told = time.monotonic()
            _say({"tick": sender.take_tick()})
            if select.select([sys.stdin], [], [], 0)[0]:
                return  # nobody listens any more
    _say({"tick": sender.take_tick()})
    _say({"sent": sender.acknowledged})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
