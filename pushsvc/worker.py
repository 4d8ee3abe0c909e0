"""PushWorker: gunicorn's gevent worker that parks idle streams, and drains them when it is told to stop.

gunicorn's master imports this module; the application's own modules are imported in the worker only, so that a reload
brings their new code.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

import gevent
from gevent import socket
from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from pushsvc.errors import UNREAD
from pushsvc.express import Express, LateSocket, is_possible
from pushsvc.listener import Client, Endpoint, Listener, Raw, Room, SecureClient

TICK_SECONDS = 0.05
NOTIFY_SECONDS = 1.0
IDLE_SECONDS = 0.25  # a request that is under way arrives within this time
QUIESCE_SECONDS = 0.1  # so does the handshake of a connection that has begun, and its request
TCP_NOTSENT_LOWAT = 25  # linux/tcp.h
MOST_UNSENT = 1 << 30  # bytes; the kernel takes an int
MOST_PATHS = 64  # paths of streams that are remembered
HUNG_UP = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def watch_stop(worker: Any) -> None:
    """For gunicorn's own gevent worker, which tells its streams nothing: drain them when it is told to stop. Called in
    the worker, after its application was loaded."""
    service = _service_of(worker.wsgi)

    def watch() -> None:
        while worker.alive:
            gevent.sleep(TICK_SECONDS)
        service.drain()

    gevent.spawn(watch)


def _service_of(application: Any) -> Any:
    """The service that create_app() has put into its application. Exits if this is another."""
    try:
        return application.extensions["pushsvc"]
    except (AttributeError, KeyError):
        kind = type(application).__name__
        print(f"pushsvc: the application has to be what create_app() makes, not a {kind}; middleware goes around its "
              "wsgi_app: app.wsgi_app = ProxyFix(app.wsgi_app)", file=sys.stderr)
        sys.exit(Arbiter.APP_LOAD_ERROR)


def tell_problems() -> None:
    """What gunicorn refuses before the application sees it is told as all other errors are: as a problem (RFC 9457), and
    not as a page of HTML. Called in each worker; gunicorn has no setting for it."""
    util.write_error = _write_problem


def _write_problem(sock: Any, status: int, reason: str, message: str) -> None:
    body = json.dumps({"title": reason, "status": status, "detail": message or reason})
    head = (f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/problem+json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    util.write_nonblock(sock, (head + body).encode())


class Idle(gevent.Timeout):  # type: ignore[misc]
    """The wait of a kept connection for its next request: ends by itself after `seconds`, or by `end()`.

    Entered in the connection's greenlet, whose `client` it is."""

    def __init__(self, waiting: OrderedDict[Idle, float], seconds: float) -> None:
        super().__init__(seconds, False)
        self._waiting = waiting

    def __enter__(self) -> Any:
        self._greenlet = gevent.getcurrent()
        self._waits = True
        self._waiting[self] = time.monotonic()
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> Any:
        self._waits = False
        self._waiting.pop(self, None)
        return super().__exit__(kind, value, trace)

    def end(self) -> bool:
        """Unless the request has come: then it is answered; whether it ends. Atomic: no switch."""
        client = self._greenlet.client
        if isinstance(client, Client) and client.has_unread():
            return False
        self._waiting.pop(self, None)
        gevent.get_hub().loop.run_callback(self._throw)
        return True

    def _throw(self) -> None:
        if self._waits:
            self._greenlet.throw(self)

    __hash__ = object.__hash__


class PushWorker(GeventWorker):  # type: ignore[misc]
    """The worker that gunicorn.conf.py names. A request is served as in gunicorn's gevent worker; but when the answer
    is a stream on a plain chunked connection, the parking lot takes it over."""

    _told: frozenset[int] = frozenset()  # the signals that have told it to end

    def load_wsgi(self) -> None:
        from pushsvc.parking import ParkingLot
        from pushsvc.stream import Stream

        # gunicorn looks its settings up by __getattr__, a dozen times a request: found as attributes they cost nothing
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().load_wsgi()
        self.application = self.app.wsgi()  # gunicorn keeps it: the same object again
        self.service = _service_of(self.application)
        self.lot = ParkingLot(self.service.hub)
        self.wsgi = self._parking
        self._paths: set[bytes] = set()  # that have answered with a stream
        self._idle: OrderedDict[Idle, float] = OrderedDict()

        self._stream = Stream

    def _parking(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The application, but a stream that the lot takes does not come back from it."""
        body = self.application(environ, start_response)
        response, connection = start_response.__self__, environ["gunicorn.socket"]
        if type(body) is not self._stream:
            if UNREAD in environ:
                response.force_close()
            return body
        if not (response.chunked and isinstance(connection, Client)):
            return body
        if len(self._paths) < MOST_PATHS:
            self._paths.add(environ["RAW_URI"].partition("?")[0].encode("latin-1"))
        begun = datetime.now()
        try:
            self.lot.run(body, response, connection)
            self.log.access(response, response.req, environ, datetime.now() - begun)
        finally:
            body.close()
        raise StopIteration  # gunicorn's word for: this connection is done with

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._told |= {sig}
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """INT and QUIT stop in order, as TERM does; the second time, or after a TERM, at once. A Ctrl-C comes as both: as
        INT from the terminal, as QUIT from the master."""
        at_once = not self._told.isdisjoint({sig, signal.SIGTERM})
        self._told |= {sig}
        if at_once:
            super().handle_quit(sig, frame)
        self.alive = False

    def timeout_ctx(self) -> Idle:
        return Idle(self._idle, self.cfg.keepalive)

    def _serve(self, endpoint: Endpoint, express: Express | None, raw: Raw, address: Any) -> None:
        """One connection: the short way if its first request can take it, else gunicorn's."""
        data = b""
        if express is not None:
            data = raw.first_bytes()
            prepared = express.prepare(data, address)
            if prepared is not None:
                self._serve_express(endpoint, raw, address, *prepared)
                return
        self._serve_on(endpoint, Client(endpoint, raw, data), address)

    def _serve_on(self, endpoint: Endpoint, client: Any, address: Any) -> None:
        """Requests on a connection, gunicorn's way, to its end."""
        gevent.getcurrent().client = client
        if self._idle and self._room.is_full():
            next((True for idle in list(self._idle) if idle.end()), None)  # the longest idle makes room
        if self.cfg.is_ssl:
            client = self._ssl.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        self.handle(endpoint, client, address)

    def _serve_express(self, endpoint: Endpoint, raw: Raw, address: Any, environ: dict[str, Any],
                       response: Any) -> None:
        """A request that came the short way; what comes of it, and of an error, is as on gunicorn's. Switches."""
        connection = environ["gunicorn.socket"] = LateSocket(Client, endpoint, raw, response)
        environ["wsgi.early_hints"] = connection.send_early_hints
        goes_on = False
        self.nr += 1
        alive = bool(self.alive)
        if self.nr >= self.max_requests and alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = alive = False
        if not (alive and self.cfg.keepalive):
            response.force_close()
        try:
            body = self.application(environ, response.start_response)
            try:
                if type(body) is self._stream and response.chunked:
                    if connection.made is None:
                        body.subscription.abort = raw.abort
                    self.lot.run(body, response, connection.made or raw)
                else:
                    response.sock = connection.now()
                    for part in body:
                        response.write(part)
                    response.close()
            finally:
                if hasattr(body, "close"):
                    body.close()
            goes_on = response.sock is not None and not response.should_close()  # the lot's does not come back
        except StopIteration:  # gunicorn's word for: this connection is done with
            pass
        except OSError as error:
            if error.errno not in HUNG_UP:
                self.log.exception("Socket error processing request.")
        except BaseException as error:
            if response.headers_sent:  # nothing can follow what the client has of the answer
                self.log.exception("Error handling request")
            elif isinstance(error, (SystemExit, gevent.GreenletExit)):  # the request ends, and the worker does not
                goes_on = bool(self.cfg.keepalive)
            else:
                self.handle_error(response.req, connection, address, error)
        if goes_on:
            self._serve_on(endpoint, connection.now(), address)
        elif connection.made is not None:
            connection.made.close()

    def run(self) -> None:
        self._room = Room(self.service.settings.max_connections)
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
            # What waits for a stream is bounded in the kernel too: its buffers would grow to 4 MiB each. With no more
            # than a mailbox, streams whose clients share a busy core fall behind in a flood, and some are closed.
            unsent = min(2 * self.service.settings.mailbox_bytes, MOST_UNSENT)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, unsent)
            # Accept a connection when its request has come: no greenlet waits for those that stay silent.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, self.cfg.keepalive)
            if is_possible(self.cfg, os.environ.get("SCRIPT_NAME", "")):
                express = Express(self.cfg, sock.getsockname(), self._paths)
        if self.cfg.is_ssl:
            self._ssl = ssl_context(self.cfg)
            self._ssl.sslsocket_class = partial(SecureClient, self.cfg.keepalive)
        server = Listener(sock, partial(self._serve, Endpoint.of(sock), express), self._room)
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
            server.quiesce()
        gevent.sleep(QUIESCE_SECONDS)
        for server in self._servers:
            server.accept_waiting()
            server.close()
        draining = gevent.spawn(self.service.drain)
        begun = time.monotonic()
        for now in self._ticks():
            if draining.dead:
                self._end_idle(now - IDLE_SECONDS)
                if not self._room.taken:
                    return
            if now - begun > self.cfg.graceful_timeout:
                self.log.warning("Requests broken off after the graceful timeout (pid:%s)", self.pid)
                return

    def _end_idle(self, since: float) -> None:
        for idle, began in list(self._idle.items()):
            if began < since:
                idle.end()
