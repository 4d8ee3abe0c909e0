"""The readers: one process that opens its share of a replay's streams when they are due, reads and verifies them, and
ends them when they are due. A stream that breaks comes back with its last id, as an EventSource does.

It is told what to do by JSON lines on standard input (see `main`), tells each second what it has seen, and at the end
what went wrong. It ends with its standard input.
"""

from __future__ import annotations

import gc
import heapq
import json
import math
import os
import random
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from swarm import AGAIN_SECONDS, BUCKETS_PER_E, IN_FLIGHT, READ, Swarm, Target, authority

from load.shape import Event, Stream, expanded, read_shape
from load.targets import FORMS, Form
from load.verify import Book, Tally, Times, Track, behind
from load.wire import Read, WireError, read

CACHE = 8192
GRACE_SECONDS = 5.0  # what was due so shortly before a stream was ended may be on its way, and so may the stream itself
UNEVEN = 100  # streams that a process may have more than another, so that those of a client are together
LEAST_SECONDS = 0.001  # every stream is opened before it is ended
RETRY_SECONDS = 3.0  # an EventSource without a `retry:`
LOOK_SECONDS = 0.2  # between two looks whether all has come
TURN_SECONDS = 0.05
HEAD_END = b"\r\n\r\n"
CLOSE_IT, OPEN_IT, COME_BACK, BREAK_IT = range(4)  # at the same time, an end goes first


@dataclass(slots=True)
class Session:
    """One stream of the shape. fd: -1 while it has none. due: from when on it should be open; wanted: from when on its
    client asks for it, which waits first where the server has ended it. chunked: None until its head has come. text, raw:
    what is left of the last read. alive: between its opening and its end."""

    stream: Stream
    track: Track | None = None
    last_id: bytes = b""
    fd: int = -1
    due: float = 0.0
    wanted: float = 0.0
    retry: float = RETRY_SECONDS
    chunked: bool | None = None
    text: bytes = b""
    raw: bytes = b""
    alive: bool = False
    waiting: bool = False

    def is_without_stream(self, since: float) -> bool:
        """Whether it has had none since it was wanted, which was by then."""
        return self.alive and self.wanted <= since and (self.fd < 0 or self.chunked is None)


@dataclass(slots=True)
class Tick:
    """What has happened since the last one. latency, opening: bucket -> events, streams."""

    received: int = 0
    opened: int = 0
    resumed: int = 0
    bytes: int = 0
    gaps: int = 0
    late: float = 0.0
    latency: Counter[int] = field(default_factory=Counter)
    opening: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


class Readers(Swarm):
    """Some of the streams of a shape, in one process. prefix: what the names of this replay's topics begin with. breaks:
    after how many seconds, on average, a stream is broken and resumed; 0: never."""

    def __init__(self, streams: Iterable[Stream], events: Sequence[Event], form: Form, target: Target, prefix: str,
                 breaks: float, control: int) -> None:
        super().__init__(control)
        self.tick = Tick()
        self.tally = Tally()
        self._target = target
        self._sources = target.source.split(",") if target.source else []
        self._form = form
        self._host = authority(target.host, target.port)
        self._prefix = prefix
        self._breaks = breaks
        self._events = events
        self._book = Book(events)
        self._sessions = [Session(stream) for stream in streams]
        self._by_fd: dict[int, Session] = {}
        self._left: dict[tuple[int, tuple[int, ...]], list[tuple[Session, float]]] = {}
        self._latest: dict[tuple[int, tuple[int, ...]], Session] = {}
        self._agenda: list[tuple[float, int, int]] = []
        self._waiting: deque[int] = deque()
        self._reads: tuple[dict[bytes, Read], dict[bytes, Read]] = ({}, {})
        self._chance = random.Random(1)
        self._begun = 0.0
        self._unopened = 0

    # -- time

    def begin(self, at: float) -> None:
        """The replay begins at this time (monotonic, seconds)."""
        self._begun = at
        self._agenda = agenda(session.stream for session in self._sessions)

    def now(self) -> float:
        return time.monotonic() - self._begun

    def work(self) -> None:
        """Do what is due, and read what is there."""
        now = self.now()
        if self._agenda and self._agenda[0][0] <= now:
            self.tick.late = max(self.tick.late, now - self._agenda[0][0])
        while self._agenda and self._agenda[0][0] <= now:
            at, what, number = heapq.heappop(self._agenda)
            (self._end, self._open, self._back, self._break)[what](number, at)
        while self._waiting and self.opening < IN_FLIGHT:
            self._ask(self._waiting.popleft())
        self.turn(min(TURN_SECONDS, max(0.0, self._agenda[0][0] - now)) if self._agenda else TURN_SECONDS)

    def _open(self, number: int, at: float) -> None:
        session = self._sessions[number]
        session.alive = True
        if session.stream.resumed:
            self._take_over(session)
        self._latest[_key(session.stream)] = session
        session.due = session.wanted = at
        self._wait(number)

    def _back(self, number: int, at: float) -> None:
        session = self._sessions[number]
        if session.alive and session.fd < 0 and not session.waiting:
            self._wait(number)

    def _take_over(self, session: Session) -> None:
        """A stream that resumes goes on where the last one of the same client and topics has ended, or, if none has,
        where another stands now."""
        if left := self._left.get(_key(session.stream)):
            before, _ = left.pop()
            session.track, session.last_id = before.track, before.last_id
        elif (other := self._latest.get(_key(session.stream))) and other.alive and other.track and other.last_id:
            session.last_id = other.last_id
            session.track = replace(other.track, nexts=dict(other.track.nexts),
                                    begun=dict(other.track.begun), missing={})

    def _wait(self, number: int) -> None:
        self._sessions[number].waiting = True
        self._waiting.append(number)

    def _ask(self, number: int) -> None:
        session = self._sessions[number]
        session.waiting = False
        if session.alive:
            if session.track is None:
                session.track = Track(self._book.expected(session.stream.topics), self.now())
            session.chunked, session.text, session.raw = None, b"", b""
            self._connect(number)

    def _end(self, number: int, at: float) -> None:
        session = self._sessions[number]
        self._unopened += session.is_without_stream(at - GRACE_SECONDS)
        session.alive = False
        if session.fd >= 0:
            self._drop(session.fd)
        if session.track is not None:
            self._left.setdefault(_key(session.stream), []).append((session, at))

    def _break(self, number: int, at: float) -> None:
        session = self._sessions[number]
        if session.alive and session.fd >= 0:
            self._drop(session.fd)
            session.due = session.wanted = self.now()
            self._wait(number)

    def _come_back(self, session: Session, number: int, seconds: float) -> None:
        if session.alive:
            heapq.heappush(self._agenda, (self.now() + seconds, COME_BACK, number))

    # -- what the swarm calls

    def _request(self, number: int) -> bytes:
        session = self._sessions[number]
        topics = [f"{self._prefix}{topic}" for topic in session.stream.topics]
        return self._form.subscribe(self._host, topics, session.last_id)

    def _give_up(self, number: int) -> None:
        super()._give_up(number)
        self._come_back(self._sessions[number], number, AGAIN_SECONDS)

    def _fail(self, fd: int) -> None:
        number = self._number[fd]
        super()._fail(fd)
        self._come_back(self._sessions[number], number, AGAIN_SECONDS)

    def _count_error(self, code: int | str | None) -> None:
        super()._count_error(code)
        self.tick.errors.update(self.stats.errors)
        self.stats.errors.clear()

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._count(fd, data)
        else:
            self._lost(fd, "broken off" if self._by_fd[fd].chunked else "ended")

    def _count(self, fd: int, data: bytes) -> None:
        """Take what has come; the head first."""
        session = self._by_fd.get(fd) or self._seat(fd)
        if not session.alive:  # its end was due before its head came
            self._drop(fd)
            return
        self.tick.bytes += len(data)
        if session.chunked is None:
            head, end, data = (session.raw + data).partition(HEAD_END)
            if not end:
                session.raw = head
                return
            self._on_head(session, head)
        try:
            found = self._parsed(session, data)
        except WireError:
            self._lost(fd, "bad framing")
            return
        self._take(session, found)
        if found.ended:
            self._lost(fd, "ended")

    def _seat(self, fd: int) -> Session:
        session = self._by_fd[fd] = self._sessions[self._number[fd]]
        session.fd = fd
        return session

    def _on_head(self, session: Session, head: bytes) -> None:
        now, track = self.now(), session.track
        assert track is not None, "it was asked for"
        session.chunked, session.raw = b"transfer-encoding: chunked" in head.lower(), b""
        track.since = min(track.since, now)
        self.tick.opened += 1
        self.tick.resumed += bool(session.last_id)
        self.tick.opening[_bucket(now - session.due)] += 1
        if self._breaks:
            after = self._breaks * self._chance.uniform(0.5, 1.5)
            heapq.heappush(self._agenda, (now + after, BREAK_IT, self._number[session.fd]))

    def _parsed(self, session: Session, data: bytes) -> Read:
        """Equal bytes are read once: a broadcast reaches all streams as the same bytes."""
        assert session.chunked is not None, "its head has come"
        if session.text or session.raw:
            return read(data, session.chunked, session.text, session.raw)
        cache = self._reads[session.chunked]
        found = cache.get(data)
        if found is None:
            if len(cache) > CACHE:
                cache.clear()
            found = cache[data] = read(data, session.chunked)
        return found

    def _take(self, session: Session, found: Read) -> None:
        session.text, session.raw = found.text, found.raw
        if found.last_id is not None:
            session.last_id = found.last_id
        if found.retry is not None:
            session.retry = found.retry / 1000
        self.tick.gaps += found.gaps
        if found.marks:
            tally, track, latency = self.tally, session.track, self.tick.latency
            assert track is not None, "it was asked for"
            now = self.now()
            self.tick.received += len(found.marks)
            for due, number in found.marks:
                tally.take(track, number)
                latency[_bucket(now - max(due / 1e6, session.due))] += 1  # what was missed waited for the client

    def _lost(self, fd: int, how: str) -> None:
        """The server has ended a stream."""
        number, session = self._number[fd], self._by_fd[fd]
        self.tick.errors[how] += 1
        session.due = self.now()
        session.wanted = session.due + session.retry
        self._drop(fd)
        self._come_back(session, number, session.retry)

    def _drop(self, fd: int) -> None:
        session = self._by_fd.pop(fd, None)
        if session is not None:
            session.fd = -1
        super()._drop(fd)

    # -- the end

    def is_caught_up(self, asked: float, failed: set[int]) -> bool:
        """Whether all streams are open that were wanted when the end was asked for, and all that live ones wait for has
        come, but for `failed`, what was never published."""
        for session in self._sessions:
            if session.is_without_stream(asked):
                return False
            if session.alive and session.track is not None:
                order = session.track.expected.order
                for lane, start, stop in behind(session.track, inf):
                    if not failed.issuperset(order[lane][start:stop]):
                        return False
        return True

    def verdict(self, asked: float, sent: Times, acknowledged: Times) -> dict[str, Any]:
        """What went wrong, all in all. asked: when the end was asked for. sent, acknowledged: when each event was,
        seconds; None if it was not."""
        tally = self.tally
        unopened = self._unopened + sum(session.is_without_stream(asked) for session in self._sessions)
        for session in self._sessions:
            if session.alive and session.track is not None:
                tally.finish(session.track, inf, sent, acknowledged)
        for session, closed in (each for left in self._left.values() for each in left):
            if session.track is not None:
                tally.finish(session.track, closed - GRACE_SECONDS, sent, acknowledged)
        lost = {number: count for number, count in tally.lost.items() if acknowledged[number] is not None}
        replaced = sum(count for number, count in lost.items() if self._events[number].keep != "all")
        overdue = sum(count for number, count in tally.overdue.items() if self._events[number].keep == "all")
        return {"received": tally.received, "unopened": unopened, "lost": sum(lost.values()) - replaced,
                "overdue": overdue, "replaced": replaced, "doubled": tally.doubled,
                "reordered": tally.reordered(sent, acknowledged), "stray": tally.stray,
                "stale": tally.stale(acknowledged)}

    def take_tick(self) -> dict[str, Any]:
        tick, self.tick = self.tick, Tick()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"received": tick.received, "opened": tick.opened, "resumed": tick.resumed, "bytes": tick.bytes,
                "gaps": tick.gaps, "late": tick.late, "latency": tick.latency, "opening": tick.opening,
                "errors": tick.errors, "open": self.open_count, "cpu": usage.ru_utime + usage.ru_stime}


def agenda(streams: Iterable[Stream]) -> list[tuple[float, int, int]]:
    """When each of these streams opens and ends, in order of time: seconds, what, number."""
    found = []
    for number, stream in enumerate(streams):
        found.append((stream.opened, OPEN_IT, number))
        if stream.closed is not None:
            found.append((max(stream.closed, stream.opened + LEAST_SECONDS), CLOSE_IT, number))
    return sorted(found)


def places_of(streams: Sequence[Stream], places: int) -> list[int]:
    """Which process has which stream: all have as many, but that a stream that resumes is where that one was whose place
    it takes (see `_take_over`), or where another stands, unless that process has many more than the others."""
    found, counts = [0] * len(streams), [0] * places
    left: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    latest: dict[tuple[int, tuple[int, ...]], int] = {}
    for _, what, number in agenda(streams):
        key = _key(streams[number])
        if what == CLOSE_IT:
            left.setdefault(key, []).append(number)
            continue
        place = counts.index(min(counts))
        if streams[number].resumed and left.get(key):
            place = found[left[key].pop()]
        elif streams[number].resumed and key in latest and counts[found[latest[key]]] - counts[place] < UNEVEN:
            place = found[latest[key]]
        found[number], latest[key] = place, number
        counts[place] += 1
    return found


def _key(stream: Stream) -> tuple[int, tuple[int, ...]]:
    return stream.client, stream.topics


def _bucket(seconds: float) -> int:
    return int(math.log(max(1.0, seconds * 1e6)) * BUCKETS_PER_E)


def made(order: dict[str, Any], control: int) -> Readers:
    """The readers of process `place` of `places`: what they are told first (see `main`)."""
    shape = expanded(read_shape(Path(order["shape"])), order["times"], order["speed"], order["spread"])
    target = Target(order["host"], order["port"], "", order["source"])
    places = places_of(shape.streams, order["places"])
    mine = (stream for stream, place in zip(shape.streams, places, strict=True) if place == order["place"])
    return Readers(mine, shape.events, FORMS[order["form"]](order["token"]), target, order["prefix"], order["breaks"],
                   control)


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """First line: what `made` needs, answered with `ready`. Then `begin` (a time). When all was sent, `sent` and
    `acknowledged` (when each event was) and `by` (until when to wait for the last ones), answered with `verdict`."""
    commands = sys.stdin.buffer
    line = commands.readline()
    if not line:
        return
    readers = made(json.loads(line), commands.fileno())
    gc.disable()  # nothing here goes in circles
    gc.freeze()
    say({"ready": True})
    line = commands.readline()
    if line:
        readers.begin(json.loads(line)["begin"])
        follow(readers, commands)
    readers.close()


def follow(readers: Readers, commands: Any) -> None:
    """Until the verdict is told, or nobody listens any more."""
    finish: dict[str, Any] | None = None
    asked = 0.0
    failed: set[int] = set()
    second, looked = 0, 0.0
    while True:
        readers.work()
        now = readers.now()
        if now >= second + 1:
            say({"tick": readers.take_tick(), "second": second})
            second = int(now)
        if readers.commanded:
            readers.commanded = False
            line = commands.readline()
            if not line:
                return
            finish, asked = json.loads(line), readers.now()
            failed = {number for number, at in enumerate(finish["acknowledged"]) if at is None}
        if finish and now - looked >= LOOK_SECONDS:
            looked = now
            if now >= finish["by"] or readers.is_caught_up(asked, failed):
                say({"tick": readers.take_tick(), "second": second})
                say({"verdict": readers.verdict(asked, finish["sent"], finish["acknowledged"])})
                return
