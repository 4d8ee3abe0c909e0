#!/usr/bin/env python3
"""A swarm of SSE readers in one process: thousands of streams on plain epoll, no greenlet, thread or object per stream.

It talks HTTP only, so it reads any server. Events whose data holds a mark `@T N K ` are timed and checked: T is when it
was published (monotonic, nanoseconds), N grows by one within the series K. A stream that misses an event, has one twice
or has two in the wrong order is counted as disorder.

Run as a program it obeys one JSON command per line on standard input and answers one JSON line each; while it opens it
tells its progress, and after `follow` how many events have come. `Fleet` in fleet.py is the other end. Commands: open,
wait, stats, reset, close, follow. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import math
import os
import re
import resource
import select
import socket
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

MARK = re.compile(rb"@(\d+) (\d+) (\d+) ")
IN_FLIGHT = 256  # connects under way at once
READ = 65_536
SMALL = 512  # larger reads (several events at once) are only counted, but on every SAMPLE-th stream
SAMPLE = 64
CACHE = 4096  # different reads that are remembered
MOST = 32_768  # descriptors of one process; a source address has fewer ports
BUCKETS_PER_E = 50  # latencies are kept in logarithmic buckets of 2 %
BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the port is chosen at connect, so a source has its ports per destination
AGAIN_SECONDS = 1.0
TELL_SECONDS = 1.0
FREE, CONNECTING, ASKED, OPEN = range(4)
UNKNOWN = -1

Parsed = tuple[int, int, tuple[tuple[int, int, int, bool], ...], bytes]


@dataclass(slots=True)
class Stats:
    """What the streams of this process have seen since the last reset. first_at, last_at: when the first and the last
    event came; latency: bucket -> events; errors: what kept streams from opening -> how many (EADDRNOTAVAIL, status 503).
    """

    events: int = 0
    bytes: int = 0
    reads: int = 0
    disorder: int = 0
    ended: int = 0
    failed: int = 0
    first_at: int = 0
    last_at: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


def authority(host: str, port: int) -> str:
    """Host and port as a URL has them: brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@cache
def resolved(host: str, port: int) -> tuple[int, Any]:
    """The family and the address to connect to; IPv4, as far as there is one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address


@dataclass(frozen=True, slots=True)
class Target:
    """Where stream k goes: `{}` in the path is k, or k modulo `modulo` if that is given. again: a stream that fails or
    is ended by the server is opened again. source: where from, several addresses separated by commas: they take turns.
    token: sent as a bearer token.
    """

    host: str
    port: int
    path: str
    source: str = ""
    modulo: int = 0
    again: bool = False
    token: str = ""

    def request(self, number: int) -> bytes:
        path = self.path.replace("{}", str(number % self.modulo if self.modulo else number))
        authorization = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        return (f"GET {path} HTTP/1.1\r\nHost: {authority(self.host, self.port)}\r\nAccept: text/event-stream\r\n"
                f"{authorization}\r\n").encode()


class Swarm:
    """Streams to one server. `control`: a further descriptor to watch; `commanded` tells that it is ready."""

    def __init__(self, control: int = -1) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(hard, MOST)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        self.stats = Stats()
        self.open_count = 0
        self.opening = 0
        self.commanded = False
        self._target = Target("", 0, "")
        self._sources: list[str] = []
        self._state = bytearray(most)
        self._number = array("i", [0]) * most
        self._last = array("q", [UNKNOWN]) * most  # of series 0
        self._others: dict[int, dict[int, int]] = {}  # of the others
        self._rests: dict[int, bytes] = {}
        self._again: deque[tuple[float, int]] = deque()
        self._cache: dict[bytes, Parsed] = {}
        self._control = control
        self._epoll = select.epoll()
        if control >= 0:
            self._epoll.register(control, select.EPOLLIN)

    # -- opening

    def open(self, target: Target, count: int, first: int = 0, rate: float = 0,
             tell: Callable[[], None] = lambda: None) -> None:
        """Open `count` streams, as fast as they are answered or `rate` a second; return when each is open or has failed.
        A stream counts as open when its response head has come."""
        self._target = target
        self._sources = target.source.split(",") if target.source else []
        begun = told = time.monotonic()
        due, failed = deque(range(first, first + count)), self.stats.failed
        while due or self.opening or self._again:
            now = time.monotonic()
            while due and self.opening < IN_FLIGHT and (not rate or count - len(due) < (now - begun) * rate):
                self._connect(due.popleft())
            self.turn(0.05)
            if now - told >= TELL_SECONDS:
                told = now
                tell()
            if not target.again and self.stats.failed - failed > count // 10 + IN_FLIGHT:
                break  # there is nobody: the rest would fail as well
        tell()

    def _connect(self, number: int) -> None:
        family, address = resolved(self._target.host, self._target.port)
        try:
            connection = socket.socket(family)
        except OSError as error:  # this process has no descriptor left
            self._count_error(error.errno)
            self._give_up(number)
            return
        connection.setblocking(False)
        if self._sources:
            connection.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
            connection.bind((self._sources[number % len(self._sources)], 0))
        code = connection.connect_ex(address)
        fd = connection.detach()
        self._number[fd] = number
        self._last[fd] = UNKNOWN
        self.opening += 1
        self._state[fd] = CONNECTING
        self._epoll.register(fd, select.EPOLLOUT)
        if code not in (0, errno.EINPROGRESS):
            self._count_error(code)
            self._fail(fd)

    def _give_up(self, number: int) -> None:
        self.stats.failed += 1

    def _greet(self, fd: int) -> None:
        """Go on with a stream that is not open yet."""
        try:
            if self._state[fd] == CONNECTING:
                os.write(fd, self._request(self._number[fd]))
                self._state[fd] = ASKED
                self._epoll.modify(fd, select.EPOLLIN)
                return
            data = os.read(fd, READ)
        except OSError as error:
            self._count_error(error.errno)
            self._fail(fd)
            return
        if not data.startswith(b"HTTP/1.1 200"):
            self._count_error(f"status {data[9:12].decode('latin-1')}" if data else "hung up")
            self._fail(fd)
            return
        self._state[fd] = OPEN
        self.opening -= 1
        self.open_count += 1
        self._count(fd, data)

    def _request(self, number: int) -> bytes:
        """What asks for stream `number`."""
        return self._target.request(number)

    def _count_error(self, code: int | str | None) -> None:
        name = code if isinstance(code, str) else errno.errorcode.get(code or 0, str(code))
        self.stats.errors[name] = self.stats.errors.get(name, 0) + 1

    def _fail(self, fd: int) -> None:
        self.stats.failed += 1
        self._drop(fd)

    # -- reading

    def turn(self, timeout: float) -> None:
        """Serve what is ready, and open again what is due."""
        state = self._state
        for fd, _ in self._epoll.poll(timeout, 1024):
            if state[fd] == OPEN:
                self._read(fd)
            elif fd == self._control:
                self.commanded = True
            elif state[fd]:
                self._greet(fd)
        while self._again and self.opening < IN_FLIGHT and self._again[0][0] <= time.monotonic():
            self._connect(self._again.popleft()[1])

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
            self.stats.ended += 1
            self._drop(fd)

    def _count(self, fd: int, data: bytes) -> None:
        """Note the events in `data`. Equal bytes are parsed once: a broadcast reaches all streams as the same bytes."""
        stats = self.stats
        stats.reads += 1
        stats.bytes += len(data)
        if fd in self._rests:
            data = self._rests.pop(fd) + data
        if len(data) > SMALL and self._number[fd] % SAMPLE:
            count, at = data.count(b"@"), _first_at(data)
            self._forget(fd)
        else:
            count, at, runs, rest = self._cache.get(data) or self._parse(data)
            for run in runs:
                self._check(fd, *run)
            if rest:
                self._rests[fd] = rest
        if count:
            now = time.monotonic_ns()
            stats.events += count
            stats.first_at = stats.first_at or now
            stats.last_at = now
            if at:
                bucket = int(math.log(max(1, (now - at) // 1000)) * BUCKETS_PER_E)
                stats.latency[bucket] = stats.latency.get(bucket, 0) + count

    def _parse(self, data: bytes) -> Parsed:
        """How many events there are, when the oldest was published, each series' run (first, last, unbroken), and the
        mark that is cut off at the end."""
        series: dict[int, list[int]] = {}
        marks = [(int(at), int(number), int(key)) for at, number, key in MARK.findall(data)]
        for _, number, key in marks:
            series.setdefault(key, []).append(number)
        runs = tuple((key, numbers[0], numbers[-1], numbers == list(range(numbers[0], numbers[-1] + 1)))
                     for key, numbers in series.items())
        cut = data.rfind(b"@")
        rest = data[cut:] if cut >= 0 and not MARK.match(data, cut) else b""
        if len(self._cache) > CACHE:
            self._cache.clear()
        found = self._cache[data] = len(marks), min((at for at, _, _ in marks), default=0), runs, rest
        return found

    def _check(self, fd: int, key: int, first: int, last: int, unbroken: bool) -> None:
        others = self._others.setdefault(fd, {}) if key else None
        before = self._last[fd] if others is None else others.get(key, UNKNOWN)
        if not unbroken or (before != UNKNOWN and first != before + 1):
            self.stats.disorder += 1
        if others is None:
            self._last[fd] = last
        else:
            others[key] = last

    def _forget(self, fd: int) -> None:
        self._last[fd] = UNKNOWN
        self._others.pop(fd, None)

    # -- closing

    def _drop(self, fd: int) -> None:
        if self._state[fd] == OPEN:
            self.open_count -= 1
        else:
            self.opening -= 1
        self._state[fd] = FREE
        self._rests.pop(fd, None)
        self._forget(fd)
        os.close(fd)
        if self._target.again:
            self._again.append((time.monotonic() + AGAIN_SECONDS, self._number[fd]))

    def close(self, abort: bool = False) -> None:
        """Hang up on all streams; `abort`: by a reset."""
        self._target = Target("", 0, "")  # they are not opened again
        self._again.clear()
        for fd, state in enumerate(self._state):
            if state != FREE:
                if abort:
                    _reset_at_close(fd)
                self._drop(fd)

    def reset(self) -> None:
        """Forget the stats, and which numbers the streams had."""
        self.stats = Stats()
        self._others.clear()
        for fd in range(len(self._last)):
            self._last[fd] = UNKNOWN

    def wait(self, events: int, seconds: float) -> None:
        """Read until `events` have come in all, or for so long."""
        deadline = time.monotonic() + seconds
        while self.stats.events < events and (left := deadline - time.monotonic()) > 0:
            self.turn(min(left, 0.1))


def _reset_at_close(fd: int) -> None:
    connection = socket.socket(fileno=fd)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.detach()


def _first_at(data: bytes) -> int:
    found = MARK.search(data)
    return int(found[1]) if found else 0


def report(swarm: Swarm) -> dict[str, Any]:
    stats = swarm.stats
    return {"open": swarm.open_count, "ended": stats.ended, "failed": stats.failed, "events": stats.events,
            "bytes": stats.bytes, "reads": stats.reads, "disorder": stats.disorder, "first_at": stats.first_at,
            "last_at": stats.last_at, "latency": stats.latency, "errors": stats.errors}


class Follower:
    """Tells how many events have come, some milliseconds apart, when it is asked to."""

    def __init__(self, swarm: Swarm) -> None:
        self.seconds = 0.0
        self._swarm = swarm
        self._told = (0.0, 0)

    def tell(self) -> None:
        at, events = self._told
        now, stats = time.monotonic(), self._swarm.stats
        if self.seconds and now - at >= self.seconds and stats.events != events:
            self._told = now, stats.events
            say({"arrived": stats.events})


def obey(swarm: Swarm, follower: Follower, command: dict[str, Any]) -> dict[str, Any]:
    verb = command.pop("do")
    if verb == "open":
        swarm.open(Target(**command.pop("target")), **command, tell=lambda: say({"progress": swarm.open_count}))
    elif verb in ("wait", "reset", "close"):
        getattr(swarm, verb)(**command)
    elif verb == "follow":
        follower.seconds = command["seconds"]
    elif verb != "stats":
        raise ValueError(f"no such command: {verb}")
    return report(swarm)


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    gc.disable()  # nothing here goes in circles
    commands = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)
    swarm = Swarm(commands.fileno())
    follower = Follower(swarm)
    while True:
        swarm.turn(follower.seconds or 1.0)
        follower.tell()
        if swarm.commanded:
            swarm.commanded = False
            line = commands.readline()
            if not line:
                return
            say(obey(swarm, follower, json.loads(line)))


if __name__ == "__main__":
    main()
