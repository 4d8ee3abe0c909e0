"""Parked streams: a stream that waits needs its descriptor and its subscription, nothing else.

A greenlet is lent to a stream while it has something to wait for (its request, its replay, a full socket) and taken
back when it is caught up. Here are the parked ones, and those that are behind: written to directly, looked after by
one epoll set for hang-ups, which gevent's loop watches in turn.

A stream of the lot is in exactly one state; every change of state below is made without a greenlet switch inside.
"""

from __future__ import annotations

import os
import struct
import time
from _socket import AF_INET, MSG_DONTWAIT, SHUT_WR, SO_LINGER, SOCK_STREAM, SOL_SOCKET
from _socket import socket as RawSocket  # plain descriptors: gevent's sockets would bring a watcher each
from collections.abc import Iterable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from typing import Any

import gevent
from gevent import monkey

from pushsvc import sse
from pushsvc.bundle import Payload
from pushsvc.hub import GONE, SLOW, Hub
from pushsvc.mailbox import Mailbox
from pushsvc.stream import Stream
from pushsvc.subscription import State, Subscription

EPOLL: Any = monkey.get_original("select", "epoll")
EPOLLIN, EPOLLRDHUP, EPOLLET = 0x1, 0x2000, 1 << 31
WATCHED = EPOLLIN | EPOLLRDHUP | EPOLLET
HANGUPS = 256  # hang-ups taken at once
UNASKED_BYTES = 131_072  # of what a client sends after its request, read away at once
WRITE = 2  # of gevent's io watchers
LENT_SHARE = 0.75  # of the connections of a worker that streams may hold; the others are for publishes and health checks
BEAT = sse.chunk(sse.HEARTBEAT)
_LINGER_RESET = struct.pack("ii", 1, 0)


class ParkingLot:
    """The parked streams of one worker. `hub`: it tells what to send, and is told who has gone."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        hub.lot = self
        self._settings = hub.settings
        self._streams: dict[int, Subscription] = {}
        self._behind: dict[Subscription, gevent.Greenlet] = {}
        self._most_lent = max(1, int(LENT_SHARE * self._settings.max_connections))
        self._epoll = EPOLL()
        self._loop = gevent.get_hub().loop
        self._watcher = self._loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self._on_hangups)

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def behind(self) -> int:
        """How many streams have a greenlet because their socket is full."""
        return len(self._behind)

    @property
    def is_full(self) -> bool:
        """Whether streams hold as many of the worker's connections as they may: those that open, and those that cannot
        be parked."""
        return len(self._hub) - len(self._streams) >= self._most_lent

    def close(self) -> None:
        """Give everything back; the streams should have ended before."""
        for subscription in list(self._streams.values()):
            self._hub.close(subscription, GONE)
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()

    def run(self, stream: Stream, response: Any, connection: Any) -> None:
        """Open a stream on its request's connection, and park it when it is caught up. `response`: gunicorn's, whose
        head is not sent yet; `connection`: gevent's socket, which loses its descriptor if the stream parks. Switches.
        """
        hub, subscription = self._hub, stream.subscription
        hub.attach(subscription)
        try:
            if self._open(stream, response, connection):
                self.park(subscription, connection.detach())
            else:
                connection.sendall(_head(response) + _farewell(subscription))
        finally:
            if subscription.fd < 0:
                hub.close(subscription, GONE)
                hub.detach(subscription)

    def _open(self, stream: Stream, response: Any, connection: Any) -> bool:
        """Write the head, the replay and what came meanwhile; whether the stream can be parked: between its last look
        at the mailbox and the parking there is no switch. Switches."""
        opening = stream.opening()
        try:
            while True:
                part = next(opening)
                connection.sendall(_head(response) + sse.chunk(part))
        except StopIteration as end:
            if not end.value:
                return False
        subscription = stream.subscription
        while data := subscription.take_waiting(self._hub.now):
            connection.sendall(sse.chunk(data))
        return subscription.state is not State.CLOSED

    def park(self, subscription: Subscription, fd: int) -> None:
        """Take over an attached subscription that is caught up, and its descriptor. Atomic: no switch."""
        self._streams[fd] = subscription
        subscription.fd = fd
        subscription.abort = None
        self._rest(subscription)
        self._epoll.register(fd, WATCHED)

    def send(self, members: Iterable[Subscription], payload: Payload) -> list[Subscription]:
        """Write a payload to those of `members` that are parked; the others. Atomic: no switch."""
        write, parked, now = os.write, State.PARKED, self._hub.now
        chunk, first, last = payload.chunk, payload.first, payload.last
        size, others, sent = len(chunk), [], 0
        for subscription in members:
            if subscription.state is not parked:
                others.append(subscription)
                continue
            data = chunk
            if subscription.cursor >= first and not (data := payload.chunk_after(subscription.cursor)):
                continue
            try:
                written = write(subscription.fd, data)
            except BlockingIOError:
                written = 0
            except OSError:
                self._hub.close(subscription, GONE)
                continue
            subscription.cursor = last
            subscription.sent = now
            sent += 1
            if written != size and written != len(data):
                self._fall_behind(subscription, memoryview(data)[written:])
        self._hub.metrics.counts.delivered += sent * len(payload.letters)
        return others

    def beat(self, subscription: Subscription) -> None:
        """A heartbeat, if the stream has nothing else to read. Atomic: no switch."""
        if subscription.state is State.PARKED:
            try:
                written = os.write(subscription.fd, BEAT)
            except BlockingIOError:
                written = 0
            except OSError:
                self._hub.close(subscription, GONE)
                return
            if written < len(BEAT):
                self._fall_behind(subscription, memoryview(BEAT)[written:])

    def leave(self, subscription: Subscription) -> None:
        """End a stream of the lot that the hub has closed: at once, or behind what waits for it. Atomic: no switch."""
        greenlet = self._behind.get(subscription)
        if greenlet is None:
            if subscription.reason != GONE:
                with suppress(OSError):  # a farewell that finds no room is not worth a wait
                    os.write(subscription.fd, _farewell(subscription))
            self._release(subscription)
        elif subscription.reason in (GONE, SLOW):
            greenlet.kill(block=False)
        elif subscription.mailbox is not None:
            subscription.mailbox.close()

    def break_off(self, subscription: Subscription) -> None:
        """Do not wait any longer for a stream that is behind. Atomic: no switch."""
        greenlet = self._behind.get(subscription)
        if greenlet is not None:
            greenlet.kill(block=False)

    # -- behind

    def _rest(self, subscription: Subscription) -> None:
        subscription.mailbox = None
        subscription.state = State.PARKED

    def _fall_behind(self, subscription: Subscription, rest: memoryview) -> None:
        """Lend a greenlet to a stream whose socket is full. Atomic: no switch."""
        subscription.state = State.BEHIND
        subscription.mailbox = Mailbox(self._settings.mailbox_events, self._settings.mailbox_bytes)
        self._lend(subscription, rest)

    def _lend(self, subscription: Subscription, rest: memoryview) -> None:
        greenlet = gevent.Greenlet(self._catch_up, subscription, rest)
        self._behind[subscription] = greenlet
        greenlet.rawlink(partial(self._on_caught_up, subscription))
        greenlet.start()

    def _catch_up(self, subscription: Subscription, rest: memoryview) -> bool:
        """Write what is left and what comes meanwhile; True when the mailbox is empty. Switches."""
        watcher = self._loop.io(subscription.fd, WRITE)
        try:
            while rest:
                rest = self._write(subscription.fd, rest, watcher)
                if not rest:
                    rest = memoryview(self._next(subscription))
        except OSError:
            return False
        finally:
            watcher.close()
        return True

    def _write(self, fd: int, data: memoryview, watcher: Any) -> memoryview:
        try:
            return data[os.write(fd, data) :]
        except BlockingIOError:
            gevent.get_hub().wait(watcher)
            return data

    def _next(self, subscription: Subscription) -> bytes:
        """What waits for a stream that is behind, as one chunk; its farewell when that was all and it was closed."""
        if data := subscription.take_waiting(self._hub.now):
            return sse.chunk(data)
        if subscription.state is State.CLOSED and not subscription.parted:
            subscription.parted = True
            return _farewell(subscription)
        return b""

    def _on_caught_up(self, subscription: Subscription, greenlet: gevent.Greenlet) -> None:
        """The greenlet of a stream that was behind has ended: back to the parked, or out."""
        del self._behind[subscription]
        if greenlet.value is True and subscription.reason not in (GONE, SLOW):
            if rest := self._next(subscription):  # something came since its last look, or it was closed
                self._lend(subscription, memoryview(rest))
                return
            if subscription.state is State.BEHIND:
                self._rest(subscription)
                return
        self._hub.close(subscription, GONE)
        self._release(subscription)

    # -- the end

    def _on_hangups(self) -> None:
        for fd, event in self._epoll.poll(0, HANGUPS):
            subscription = self._streams.get(fd)
            if subscription is None:
                continue
            if event == EPOLLIN:
                self._read_away(fd)
                continue
            self._hub.close(subscription, GONE)
            self.break_off(subscription)  # it may have been closed already, and its farewell has nobody to go to

    def _read_away(self, fd: int) -> None:
        """A client sends more after its request. Left in a full buffer it would hide that the client hangs up."""
        with suppress(OSError):
            if len(os.read(fd, UNASKED_BYTES)) == UNASKED_BYTES:
                self._epoll.modify(fd, WATCHED)  # there may be more: then it is reported again

    def _release(self, subscription: Subscription) -> None:
        """Close the descriptor and forget the stream: the one place that does. Idempotent. Atomic: no switch."""
        fd = subscription.fd
        if self._streams.get(fd) is not subscription:
            return
        del self._streams[fd]
        connection = RawSocket(AF_INET, SOCK_STREAM, 0, fileno=fd)
        with suppress(OSError):
            if subscription.reason in (GONE, SLOW):
                # What its kernel buffer still holds will not be read in time: give the memory back at once.
                connection.setsockopt(SOL_SOCKET, SO_LINGER, _LINGER_RESET)
            else:
                # Unread input would turn the close into a reset, and the farewell would be lost.
                connection.shutdown(SHUT_WR)
                while connection.recv(65536, MSG_DONTWAIT):
                    pass
        connection.close()
        subscription.fd = -1
        self._hub.detach(subscription)


def _farewell(subscription: Subscription) -> bytes:
    return sse.chunk(sse.farewell(subscription.reason, subscription.retry_ms)) + sse.LAST_CHUNK


class _Date:
    """The Date field (RFC 9110, section 6.6.1), made once a second."""

    at = 0
    text = ""

    @classmethod
    def now(cls) -> str:
        second = int(time.time())
        if second != cls.at:
            cls.at, cls.text = second, formatdate(second, usegmt=True)
        return cls.text


def _head(response: Any) -> bytes:
    """gunicorn's response head, byte for byte, once: it goes out together with the first chunk."""
    if response.headers_sent:
        return b""
    response.headers_sent = True
    request = response.req
    fields = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
    return (f"HTTP/{request.version[0]}.{request.version[1]} {response.status}\r\nServer: {response.version}\r\n"
            f"Date: {_Date.now()}\r\nConnection: {'close' if response.should_close() else 'keep-alive'}\r\n"
            f"Transfer-Encoding: chunked\r\n{fields}\r\n").encode("latin-1")
