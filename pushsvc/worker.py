"""PushWorker: gunicorn's gevent worker that parks idle streams, and drains them when it is told to stop.

gunicorn's master imports this module; the application's own modules are imported in the worker only, so that a reload
brings their new code.
"""

from __future__ import annotations

import errno
import os
import time
from _socket import AF_INET, SHUT_RDWR, SOCK_STREAM
from _socket import socket as RawSocket  # for a moment only: it wraps a descriptor that stays another's
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import gevent
from gevent import socket
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from pushsvc.express import READ_BYTES, Express, is_possible

TICK_SECONDS = 0.05
NOTIFY_SECONDS = 1.0
IDLE_SECONDS = 0.25  # a request that is under way arrives within this time
MOST_PATHS = 64  # paths of streams that are remembered
WRITE = 2  # of gevent's io watchers
ACCEPTS = 64  # connections accepted at once; other workers have queues of their own


def watch_stop(worker: Any) -> None:
    """For gunicorn's own gevent worker, which tells its streams nothing: drain them when it is told to stop. Called in
    the worker, after its application was loaded."""
    service = worker.wsgi.extensions["pushsvc"]

    def watch() -> None:
        while worker.alive:
            gevent.sleep(TICK_SECONDS)
        service.drain()

    gevent.spawn(watch)


class Idle(gevent.Timeout):  # type: ignore[misc]
    """The wait of a kept connection for its next request: ends by itself after `seconds`, or by `end()`."""

    def __init__(self, waiting: OrderedDict[Idle, float], seconds: float) -> None:
        super().__init__(seconds, False)
        self._waiting = waiting

    def __enter__(self) -> Any:
        self._greenlet = gevent.getcurrent()
        self._waiting[self] = time.monotonic()
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> Any:
        self._waiting.pop(self, None)
        return super().__exit__(kind, value, trace)

    def end(self) -> None:
        if self._waiting.pop(self, None) is not None:
            gevent.kill(self._greenlet, self)  # does not wait

    __hash__ = object.__hash__


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
                hub.wait(hub.loop.io(self.fd, WRITE))

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
            os.close(self.detach())


class Client(socket.socket):  # type: ignore[misc]
    """gevent's socket, which gives the bytes that were read before it was made first."""

    ahead = b""

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        received: bytes = super().recv(size, flags)
        return received


class Listener(StreamServer):  # type: ignore[misc]
    """A listening socket with at most `most` connections that are served now; more wait in the kernel's queue.

    `serve(raw, address)` runs in a raw greenlet per connection: a pool's greenlets cost a tenth of a connect. A
    connection that finds no descriptor is not accepted in a spin: it waits for one.
    """

    max_accept = ACCEPTS

    def __init__(self, sock: Any, serve: Callable[[Raw, Any], None], most: int) -> None:
        super().__init__(sock, handle=serve)
        self.serve = serve
        self.most = most
        self.serving = 0

    def full(self) -> bool:
        return self.serving >= self.most

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
            self._timer = self.loop.timer(TICK_SECONDS)
            self._timer.start(self._start_accepting_if_started)
            return None

    def do_handle(self, fd: int, address: Any) -> None:
        self.serving += 1
        gevent.spawn_raw(self._serve, Raw(fd), address)

    def _serve(self, raw: Raw, address: Any) -> None:
        try:
            self.serve(raw, address)
        finally:
            raw.close()
            self.serving -= 1
            if self.serving == self.most - 1:
                self._start_accepting_if_started()

    def accept_waiting(self) -> None:
        """Take what waits in the queue: whoever closes the socket resets them."""
        for _ in range(self.most):
            waiting = None if self.full() else self.do_read()
            if not waiting:
                return
            self.do_handle(*waiting)


class PushWorker(GeventWorker):  # type: ignore[misc]
    """The worker that gunicorn.conf.py names. A request is served as in gunicorn's gevent worker; but when the answer
    is a stream on a plain chunked connection, the parking lot takes it over."""

    def load_wsgi(self) -> None:
        from pushsvc.parking import ParkingLot
        from pushsvc.stream import Stream

        # gunicorn looks its settings up by __getattr__, a dozen times a request: found as attributes they cost nothing
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().load_wsgi()
        self.application = self.app.wsgi()  # gunicorn keeps it: the same object again
        self.service = self.application.extensions["pushsvc"]
        self.lot = ParkingLot(self.service.hub)
        self.wsgi = self._parking
        self._paths: set[bytes] = set()  # that have answered with a stream
        self._idle: OrderedDict[Idle, float] = OrderedDict()

        self._stream = Stream

    def _parking(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The application, but a stream that the lot takes does not come back from it."""
        body = self.application(environ, start_response)
        if type(body) is self._stream:
            response, connection = start_response.__self__, environ["gunicorn.socket"]
            if response.chunked and isinstance(connection, Client):
                if len(self._paths) < MOST_PATHS:
                    self._paths.add(environ["RAW_URI"].partition("?")[0].encode("latin-1"))
                begun = datetime.now()
                self.lot.run(body, response, connection)
                self.log.access(response, response.req, environ, datetime.now() - begun)
                raise StopIteration  # gunicorn's word for: this connection is done with
        return body

    def timeout_ctx(self) -> Idle:
        return Idle(self._idle, self.cfg.keepalive)

    def _serve(self, listener: Any, express: Express | None, raw: Raw, address: Any) -> None:
        """One connection: the short way if its first request can take it, else gunicorn's."""
        data = b""
        if express is not None:
            data = raw.first_bytes()
            prepared = express.prepare(data, address)
            if prepared is not None:
                self._serve_express(listener, raw, address, *prepared)
                return
        client = Client(listener.family, listener.type, listener.proto, fileno=raw.detach())
        client.ahead = data
        self._serve_on(listener, client, address)

    def _serve_on(self, listener: Any, client: Any, address: Any) -> None:
        """Requests on a connection, gunicorn's way, to its end."""
        if self._idle and any(server.full() for server in self._servers):
            next(iter(self._idle)).end()  # the longest idle makes room
        if self.cfg.is_ssl:
            client = self._ssl.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        self.handle(listener, client, address)

    def _serve_express(self, listener: Any, raw: Raw, address: Any, environ: dict[str, Any], response: Any) -> None:
        self.nr += 1
        alive = bool(self.alive)  # type: ignore[has-type]
        if self.nr >= self.max_requests and alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = alive = False
        if not alive:
            response.force_close()
        body = self.application(environ, response.start_response)
        if type(body) is self._stream and response.chunked:
            body.subscription.abort = raw.abort
            with suppress(OSError):
                self.lot.run(body, response, raw)
            return
        client = Client(listener.family, listener.type, listener.proto, fileno=raw.detach())
        response.sock = client
        try:
            for part in body:
                response.write(part)
            response.close()
        except OSError:
            response.force_close()
        finally:
            if hasattr(body, "close"):
                body.close()
        if response.should_close():
            client.close()
        else:
            self._serve_on(listener, client, address)

    def run(self) -> None:
        self._servers = [self._listen(each) for each in self.sockets]
        for _ in self._ticks():
            if not self.alive:
                break
        self._stop()

    def _listen(self, sock: Any) -> Listener:
        sock.setblocking(True)
        express = None
        if sock.family != socket.AF_UNIX:  # accepted connections inherit it
            milliseconds = int(self.service.settings.dead_seconds * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            # Accept a connection when its request has come: no greenlet waits for those that stay silent.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, self.cfg.keepalive)
            if is_possible(self.cfg, os.environ.get("SCRIPT_NAME", "")):
                express = Express(self.cfg, sock.getsockname(), self._paths)
        if self.cfg.is_ssl:
            self._ssl = ssl_context(self.cfg)
        server = Listener(sock, partial(self._serve, sock, express), self.service.settings.max_connections)
        server.start()
        return server

    def _ticks(self) -> Iterator[float]:
        """The time, every tick; the master is told that we live. Switches."""
        told = 0.0
        while True:
            now = time.monotonic()
            if now - told >= NOTIFY_SECONDS:
                told = now
                self.notify()
            yield now
            gevent.sleep(TICK_SECONDS)

    def _stop(self) -> None:
        """Take no new connections, end the streams, finish the requests; return when all are gone. Switches."""
        self.service.hub.draining = True
        for server in self._servers:
            server.accept_waiting()
            server.close()
        draining = gevent.spawn(self.service.drain)
        begun = time.monotonic()
        for now in self._ticks():
            if draining.dead:
                self._end_idle(now - IDLE_SECONDS)
                if not any(server.serving for server in self._servers):
                    return
            if now - begun > self.cfg.graceful_timeout:
                self.log.warning("Requests broken off after the graceful timeout (pid:%s)", self.pid)
                return

    def _end_idle(self, since: float) -> None:
        for idle, began in list(self._idle.items()):
            if began < since:
                idle.end()
