"""Plain clients of the shows: many connections on one epoll set, and single requests."""

from __future__ import annotations

import contextlib
import errno
import http.client
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PORT = 8000  # in the namespace nobody else listens
BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the port is chosen at connect, so a source has its ports per destination
READ_BYTES = 65_536


@dataclass(slots=True)
class Client:
    """One connection that asks for `request`. head: what has come first; status 0: nothing has. seconds: from the connect
    to the answer. ended: there will come no more."""

    connection: socket.socket
    request: bytes
    begun: float
    seconds: float = 0.0
    head: bytes = b""
    ended: bool = False

    @property
    def status(self) -> int:
        return int(self.head.split()[1]) if self.head.startswith(b"HTTP/1.1 ") else 0

    @property
    def is_open(self) -> bool:
        """It has a stream that goes on."""
        return self.status == 200 and not self.ended and not self.was_refused

    @property
    def was_refused(self) -> bool:
        """It was told to come back later: 200, a time, and that is all."""
        return self.status == 200 and b"retry: " in self.head and b"\n: full\n" in self.head

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                self.request = self.request[self.connection.send(self.request) :]
            except OSError as error:
                self.ended = error.errno != errno.EAGAIN

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.connection.recv(READ_BYTES)
            except ConnectionError:
                data = b""
            self.ended = self.ended or not data
            self.seconds = self.seconds or time.monotonic() - self.begun
            self.head += data[: READ_BYTES - len(self.head)]
            self.ended = self.ended or self.head.endswith(b"\r\n0\r\n\r\n")


@dataclass(slots=True)
class Crowd:
    """Clients that come together. Use it in a `with` block: they hang up at its end."""

    clients: list[Client] = field(default_factory=list)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self.clients:
            client.connection.close()

    def come(self, paths: Sequence[str], address: tuple[str, int] = ("127.0.0.1", PORT),
             sources: Sequence[str] = ("",)) -> None:
        """One client more for each path, all at once, without waiting. sources: addresses that they take in turn."""
        for number, path in enumerate(paths):
            connection = socket.socket()
            connection.setblocking(False)
            if sources[number % len(sources)]:
                connection.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
                connection.bind((sources[number % len(sources)], 0))
            request = f"GET {path} HTTP/1.1\r\nHost: show\r\nAccept: text/event-stream\r\n\r\n"
            self.clients.append(Client(connection, request.encode(), time.monotonic()))
            connection.connect_ex(address)

    def wait(self, seconds: float, enough: Callable[[Client], bool] = lambda client: bool(client.head)) -> None:
        """Until each of them has had an answer that is `enough`, or has ended, or for so long."""
        waiting = {client.connection.fileno(): client for client in self.clients if not (client.ended or enough(client))}
        deadline = time.monotonic() + seconds
        with select.epoll() as poll:
            for place in waiting:
                poll.register(place, select.EPOLLIN | select.EPOLLOUT)
            while waiting and (left := deadline - time.monotonic()) > 0:
                for place, event in poll.poll(left):
                    client = waiting[place]
                    if event & select.EPOLLOUT and client.request:
                        client.send()
                        poll.modify(place, select.EPOLLIN)
                    if event & ~select.EPOLLOUT:
                        client.read()
                    if client.ended or enough(client):
                        poll.unregister(place)
                        del waiting[place]

    def hear(self, seconds: float) -> None:
        """Read what comes for so long."""
        self.wait(seconds, lambda client: False)

    def opened(self) -> int:
        return sum(client.is_open for client in self.clients)

    def refused(self) -> int:
        return sum(client.was_refused for client in self.clients)

    def answered_within(self, seconds: float) -> int:
        return sum(0 < client.seconds <= seconds and client.status > 0 for client in self.clients)

    def slowest(self) -> float:
        """Seconds until the last of those that were answered."""
        return round(max((client.seconds for client in self.clients if client.status), default=0.0), 3)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str
    seconds: float


def get(path: str, address: tuple[str, int] = ("127.0.0.1", PORT), timeout: float = 5.0,
        body: bytes | None = None) -> Answer | None:
    """The answer to a GET, or to a POST of a form; None if none came in time."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    headers = {"Connection": "close"} | ({"Content-Type": "application/x-www-form-urlencoded"} if body else {})
    try:
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode(errors="replace"), time.monotonic() - begun)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def publish(topic: str, data: str) -> Answer | None:
    return get("/publish", body=f"topic={topic}&data={data}".encode())
