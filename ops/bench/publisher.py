"""Publishers: kept connections that post events, whatever server it is. An event's data is 100 bytes with a mark that
the swarm times and checks."""

from __future__ import annotations

import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

DATA_BYTES = 100
ANSWER_SECONDS = 30.0
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class PublishError(Exception):
    """A publish was refused, or its connection broke."""


def mark(number: int, series: int = 0, at: float | None = None) -> str:
    """The data of event `number`, published now or due `at` (monotonic, seconds)."""
    nanoseconds = time.monotonic_ns() if at is None else int(at * 1e9)
    return f"@{nanoseconds} {number} {series} ".ljust(DATA_BYTES, "x")


def post(path: str, body: bytes, kind: str, headers: str = "", host: str = "bench") -> bytes:
    """The request that posts `body`. host: what its URL says; a server for many goes by it."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


class Publisher:
    """One kept connection: one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request: bytes) -> None:
        self._socket.sendall(request)

    def receive(self) -> bytes:
        """What has come of the answer: empty until it is whole. Raises PublishError if it is not a success."""
        data = self._socket.recv(1 << 16)
        if not data:
            raise PublishError(f"the server hung up after {self._answer[:200]!r}")
        self._answer += data
        if not _is_whole(self._answer):
            return b""
        answer, self._answer = self._answer, b""
        if not answer.startswith(b"HTTP/1.1 2"):
            raise PublishError(f"a publish was answered {answer[:300]!r}")
        return answer

    def exchange(self, request: bytes) -> bytes:
        self.send(request)
        while not (answer := self.receive()):
            pass
        return answer

    def close(self) -> None:
        self._socket.close()


class News(Protocol):
    """Who knows how many events have arrived at all streams together; `fileno()` is readable when there is news."""

    arrived: int

    def fileno(self) -> int: ...
    def read_news(self) -> None: ...


class Flood:
    """Publishes as fast as it is delivered: each connection sends its next batch when its last one was answered, as long
    as no more than one batch of each has not arrived at the `streams` on average. So nothing piles up without end."""

    def __init__(self, publishers: Sequence[Publisher], batch: int, request: Callable[[Sequence[str]], bytes], news: News,
                 streams: int) -> None:
        self._publishers = publishers
        self._numbers = dict.fromkeys(publishers, 1)
        self._idle = deque(publishers)
        self._batch = batch
        self._request = request
        self._news = news
        self._streams = streams
        self._sent = 0

    def run(self, seconds: float) -> int:
        """How many events were published in this time."""
        sent, until = self._sent, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            while self._idle and self._under_way() <= self._batch * (len(self._publishers) - 1):
                self._send(self._idle.popleft())
            busy = [each for each in self._publishers if each not in self._idle]
            for each in select.select([self._news, *busy], [], [], left)[0]:
                if each is self._news:
                    self._news.read_news()
                elif each.receive():
                    self._idle.append(each)
        return self._sent - sent

    def _under_way(self) -> float:
        return self._sent - self._news.arrived / self._streams

    def _send(self, publisher: Publisher) -> None:
        first = self._numbers[publisher]
        self._numbers[publisher] += self._batch
        self._sent += self._batch
        series = self._publishers.index(publisher)
        publisher.send(self._request([mark(first + place, series) for place in range(self._batch)]))


def pace(publishers: Sequence[Publisher], rate: float, seconds: float,
         requests: Sequence[Callable[[int, float], bytes]]) -> float:
    """Publish at a rate, whatever becomes of it: each of `requests` makes event 1, 2, ... of its topic, `rate` a second,
    the topics in turns. Each event is sent when it is due, on a connection that waits for nothing; by how many seconds
    the latest was sent late."""
    begun, late = time.monotonic(), 0.0
    idle, busy = deque(publishers), set[Publisher]()
    due = deque((begun + (number + place / len(requests)) / rate, number + 1, make)
                for number in range(int(rate * seconds)) for place, make in enumerate(requests))
    while due or busy:
        now = time.monotonic()
        if now > begun + seconds + ANSWER_SECONDS:
            raise PublishError(f"{len(busy)} publishes were not answered")
        if due and idle and due[0][0] <= now:
            at, number, make = due.popleft()
            late = max(late, now - at)
            busy.add(idle[0])
            idle.popleft().send(make(number, at))
            continue
        wait = due[0][0] - now if due and idle else 1.0
        for publisher in select.select(list(busy), [], [], wait)[0]:
            if publisher.receive():
                busy.discard(publisher)
                idle.append(publisher)
    return late


def _is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    if head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        return True
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = LENGTH.search(head + b"\r\n")
    return length is not None and len(body) >= int(length[1])
