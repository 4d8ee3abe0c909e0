"""A worker's listening sockets, and the connections that they accept.

To close a socket is to reset what the kernel still holds for it: connections that were made and not accepted, requests
that came and were not read. So a listener is quiesced before it is closed, and a connection lingers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
from _socket import AF_INET, AF_UNIX, MSG_DONTWAIT, MSG_PEEK, SHUT_RDWR, SHUT_WR, SOCK_STREAM, SOL_SOCKET
from _socket import socket as RawSocket  # for a moment only: it wraps a descriptor that stays another's
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from posix import close as close_descriptor  # gevent's os.close is dear, and waits for the loop's next pass
from typing import Any
from weakref import getweakrefs

import gevent
from gevent import socket, ssl
from gevent.server import StreamServer

from pushsvc.express import READ_BYTES

TURN_SECONDS = 0.002  # for which connections are served before the loop goes on
REST_SECONDS = 0.00001  # a timer: after sleep(0) the loop would not look at its sockets
RETRY_SECONDS = 0.05  # until a descriptor may be free again
LINGER_SECONDS = 1.0  # how long a client may take to close its end
WRITE = 2  # of gevent's io watchers
ACCEPTS = 64  # connections accepted at once; other workers have queues of their own
SO_ATTACH_FILTER = 26
# A filter for a listening socket (classic BPF): drop a segment whose flags are SYN without ACK, take any other.
# Each instruction: code, jump if true, jump if false, k. The flags are byte 13 of the segment (RFC 9293, section 3.1).
_NO_SYN = b"".join(struct.pack("=HBBI", *each) for each in (
    (0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)))
_INSTRUCTION_BYTES = 8


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is asked of a listening socket for each of its connections, and must be known when it is closed already."""

    family: int
    type: int
    proto: int
    name: Any

    @classmethod
    def of(cls, sock: Any) -> Endpoint:
        return cls(sock.family, sock.type, sock.proto, sock.getsockname())

    def getsockname(self) -> Any:
        """As gunicorn asks for it."""
        return self.name


class Raw:
    """An accepted connection that is no more than its descriptor. Owned by whoever holds it: `detach` gives it away."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def first_bytes(self) -> bytes:
        """What has come already; empty for nothing, also where the connection has broken."""
        try:
            return os.read(self.fd, READ_BYTES)
        except OSError:
            return b""

    def sendall(self, data: bytes) -> None:
        """Write all. Raises OSError. Switches only if the socket is full."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:
                hub = gevent.get_hub()
                with hub.loop.io(self.fd, WRITE) as watcher:
                    hub.wait(watcher)

    def abort(self) -> None:
        """Break it off: a `sendall` that waits raises. Atomic: no switch."""
        if self.fd >= 0:
            connection = RawSocket(AF_INET, SOCK_STREAM, 0, fileno=self.fd)
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
            connection.detach()

    def detach(self) -> int:
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            close_descriptor(self.detach())


class Client(socket.socket):  # type: ignore[misc]
    """gevent's socket of a connection that came by `endpoint`. What was read before it was made (`ahead`) comes first."""

    def __init__(self, endpoint: Endpoint, raw: Raw, ahead: bytes = b"") -> None:
        super().__init__(endpoint.family, endpoint.type, endpoint.proto, fileno=raw.detach())
        self.ahead = ahead

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        received: bytes = super().recv(size, flags)
        return received

    def has_unread(self) -> bool:
        """Whether something has come that was not read. Atomic: no switch."""
        try:
            return bool(self.ahead or self._sock.recv(1, MSG_PEEK | MSG_DONTWAIT))
        except OSError:
            return False

    def close(self) -> None:
        """A lingering close (RFC 9112, section 9.6): say that nothing follows, and read until the client has closed too,
        or for a moment. To close with a request in the buffer, or on its way, would reset the connection: the client
        would lose the answer before it, and a proxy would not know that it may ask elsewhere. Switches."""
        with suppress(OSError):
            self.shutdown(SHUT_WR)
            until = time.monotonic() + LINGER_SECONDS
            while (left := until - time.monotonic()) > 0:
                self.settimeout(left)
                if not super().recv(READ_BYTES):
                    break
        super().close()


class SecureClient(ssl.SSLSocket):  # type: ignore[misc]
    """gevent's TLS socket of a client, whose handshake has to come to its end within `seconds`."""

    def __init__(self, seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seconds = seconds

    def do_handshake(self) -> None:
        """Raises SSLError. Switches."""
        try:
            with gevent.Timeout(self._seconds, TimeoutError):
                super().do_handshake()
        except TimeoutError:
            raise ssl.SSLError(ssl.SSL_ERROR_EOF, f"the TLS handshake took more than {self._seconds:g} s") from None


class Room:
    """The connections that a worker serves now, of all its listeners: at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self.listeners: list[Listener] = []

    def is_full(self) -> bool:
        return self.taken >= self.most

    def leave(self) -> None:
        self.taken -= 1
        if self.taken == self.most - 1:
            for listener in self.listeners:
                listener.start_accepting_again()


class Listener(StreamServer):  # type: ignore[misc]
    """A listening socket, which accepts as long as there is `room`; more connections wait in the kernel's queue.

    `serve(raw, address)` runs in a raw greenlet, which then takes the next connection that is there: to make a greenlet
    for each (it maps memory for its frames) costs a sixth of a connect. While one has to wait, another goes on. Each
    connection has a context of its own, and a greenlet that has got thread-local values ends with its connection: no
    client sees what is another's. A connection that finds no descriptor is not accepted in a spin: it waits for one.
    """

    max_accept = ACCEPTS

    def __init__(self, sock: Any, serve: Callable[[Raw, Any], None], room: Room) -> None:
        super().__init__(sock, handle=serve)
        self.serve = serve
        self._room = room
        room.listeners.append(self)
        self._waiting: deque[tuple[Raw, Any]] = deque()
        self._starting = self._resting = False

    def full(self) -> bool:
        return self._room.is_full()

    def start_accepting_again(self) -> None:
        self._start_accepting_if_started()

    def do_read(self) -> Any:
        try:
            fd, address = self.socket._accept()
            os.set_blocking(fd, False)  # accepted connections do not inherit it, and one blocked write stops the worker
            return fd, address
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.stop_accepting()
            self._timer = self.loop.timer(RETRY_SECONDS)
            self._timer.start(self._start_accepting_if_started)
            return None

    def do_handle(self, fd: int, address: Any) -> None:
        self._room.taken += 1
        self._waiting.append((Raw(fd), address))
        self._start_serving()

    def _start_serving(self) -> None:
        if self._waiting and not self._starting and not self._resting:
            self._starting = True
            gevent.spawn_raw(self._serve_waiting)

    def _serve_waiting(self) -> None:
        """Serve connections until none waits, and let the loop go on after each turn. Switches."""
        self._starting = False
        until = time.monotonic() + TURN_SECONDS
        try:
            while self._waiting and not self._resting:
                raw, address = self._waiting.popleft()
                self._start_serving()  # the next ones, if this one has to wait
                Context().run(self._serve, raw, address)
                if _has_thread_locals(gevent.getcurrent()):
                    return
                if time.monotonic() > until:
                    self._rest()
                    until = time.monotonic() + TURN_SECONDS
        finally:
            self._start_serving()

    def _rest(self) -> None:
        self._resting = True
        try:
            gevent.sleep(REST_SECONDS)
        finally:
            self._resting = False

    def _serve(self, raw: Raw, address: Any) -> None:
        try:
            self.serve(raw, address)
        finally:
            raw.close()
            self._room.leave()

    def quiesce(self) -> None:
        """Let no new connection begin; those that are being made still come. Who tries anew is not answered, and tries
        again after a second: then another has the port, or he is refused. Atomic: no switch."""
        if self.socket.family != AF_UNIX:
            code = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
            program = struct.pack("HP", len(_NO_SYN) // _INSTRUCTION_BYTES, ctypes.addressof(code))
            self.socket.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, program)

    def accept_waiting(self) -> None:
        """Take what waits in the queue: whoever closes the socket resets them."""
        for _ in range(self._room.most):
            waiting = None if self.full() else self.do_read()
            if not waiting:
                return
            self.do_handle(*waiting)


def _has_thread_locals(greenlet: Any) -> bool:
    """gevent's thread-local objects hold a weak reference with a callback to each greenlet that has values of them."""
    return any(reference.__callback__ is not None for reference in getweakrefs(greenlet))
