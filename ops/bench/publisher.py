"""Publishers: kept connections that post events, whatever server it is. An event's data is 100 bytes with a mark that
the swarm times and checks."""

from __future__ import annotations

import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

DATA_BYTES = 100
ANSWER_SECONDS = 30.0
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class PublishError(Exception):
    """A publish was refused, or its connection broke."""


def mark(number: int, series: int = 0, at: float | None = None) -> str:
    """The data of event `number`, published now or due `at` (monotonic, seconds)."""
    nanoseconds = time.monotonic_ns() if at is None else int(at * 1e9)
    return f"@{nanoseconds} {number} {series} ".ljust(DATA_BYTES, "x")


def post(path: str, body: bytes, kind: str, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
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


def flood(host: str, port: int, connections: int, seconds: float, requests: Callable[[int], Iterator[bytes]]) -> int:
    """Publish as fast as the server answers: `requests(k)` are those of connection k, each sent when the one before was
    answered; how many were."""
    publishers = [Publisher(host, port) for _ in range(connections)]
    streams = [requests(place) for place in range(connections)]
    answered, until = 0, time.monotonic() + seconds
    for publisher, stream in zip(publishers, streams, strict=True):
        publisher.send(next(stream))
    while (left := until - time.monotonic()) > 0:
        for publisher in select.select(publishers, [], [], left)[0]:
            if publisher.receive():
                answered += 1
                publisher.send(next(streams[publishers.index(publisher)]))
    for publisher in publishers:
        publisher.close()
    return answered


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
