"""What holds a connection for long leaves others for publishes and health checks."""

import contextlib
import http.client
import os
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import gevent
import pytest
from gevent import socket as sockets

from tests.support.certificates import certificate
from tests.support.client import Stream, publish, request
from tests.support.server import ROOT, Server, free_port
from tests.support.wait import eventually

CONNECTIONS, LENT = 8, 6
PATIENCE = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS), "PUSHSVC_DEAD_SECONDS": "1", "PUSHSVC_HEARTBEAT_SECONDS": "0.5",
           "PUSHSVC_KEEPALIVE_SECONDS": "1"}
    with Server(tmp_path_factory.mktemp("slots"), workers=1, env=env) as server:
        yield server


def sent(server: Server, text: str) -> socket.socket:
    connection = sockets.create_connection((server.host, server.port), PATIENCE)
    connection.sendall(text.encode())
    return connection


def assert_serves(server: Server) -> None:
    assert request("GET", f"{server.url}/healthz", timeout=PATIENCE).status == 200
    assert publish(server.url, topic="a", data="x")


@pytest.mark.parametrize("way", ["first", "returning"])
def test_streams_that_cannot_be_parked_leave_connections_for_others(way: str, server: Server) -> None:
    if way == "returning":
        Stream(server.url, "a").opened().close()
    eventually(lambda: open_streams(server) == 0, PATIENCE)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(server, "GET /events?topic=a HTTP/1.0\r\n\r\n")) for _ in range(LENT)]
        for each in held:
            assert b"text/event-stream" in each.recv(4096)
        refused = stack.enter_context(sent(server, "GET /events?topic=a HTTP/1.0\r\n\r\n"))
        answer = b""
        while part := refused.recv(4096):
            answer += part
        assert answer.startswith(b"HTTP/1.0 200 ")
        assert b"\n: full\n" in answer
        with Stream(server.url, "a") as stream:
            assert stream.rest(PATIENCE) == []
            assert stream.reader.comments[-1].strip() == "full"
        assert_serves(server)
    eventually(lambda: open_streams(server) == 0, PATIENCE, message="the service has seen that they are gone")
    with Stream(server.url, "free") as stream:
        stream.opened()
        assert publish(server.url, topic="free", data="x") == stream.next().last_event_id


def test_streams_in_a_middleware_leave_connections_for_others(tmp_path: Path) -> None:
    """What wraps the answer's body hides that it is a stream."""
    (tmp_path / "wrapped.py").write_text("""
from app import create_app
from werkzeug.wsgi import ClosingIterator

app = create_app()
inner = app.wsgi_app
app.wsgi_app = lambda environ, start_response: ClosingIterator(inner(environ, start_response))
""")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS)}
    with (Server(tmp_path / "server", workers=1, application="wrapped:app", env=env) as server,
          contextlib.ExitStack() as stack):
        for _ in range(LENT):
            stack.enter_context(Stream(server.url, "a")).opened()
        with Stream(server.url, "a") as refused:
            assert refused.rest(PATIENCE) == []
            assert refused.reader.comments[-1].strip() == "full"
        assert_serves(server)


def test_all_addresses_share_the_connections_of_a_worker(tmp_path: Path) -> None:
    """Each connection takes a descriptor, of which the streams leave so many for all addresses together."""
    port, other = free_port(), free_port()
    env = {"PUSHSVC_BIND": f"127.0.0.1:{port},127.0.0.1:{other}", "PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS),
           "PUSHSVC_KEEPALIVE_SECONDS": "60"}
    with Server(tmp_path, workers=1, port=port, env=env) as server, contextlib.ExitStack() as stack:
        worker, = server.worker_pids()
        before = sockets_of(worker)
        for number in range(CONNECTIONS + 2):
            connection = sockets.create_connection((server.host, (port, other)[number % 2]), PATIENCE)
            stack.enter_context(connection).sendall(b"GET /heal")  # it is accepted when something has come
        assert_serves(server)
        assert sockets_of(worker) <= before + CONNECTIONS


def sockets_of(pid: int) -> int:
    found = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(each).startswith("socket:")
    return found


def open_streams(server: Server) -> float:
    text = request("GET", f"{server.url}/metrics").text
    return sum(map(float, re.findall(r"^pushsvc_streams\{[^}]*\} (\S+)$", text, re.M)))


def test_long_replays_to_slow_readers_leave_connections_for_others(server: Server) -> None:
    """A history of 4 MB is more than a socket takes in: each of these streams opens for as long as its reader waits."""
    for _ in range(16):
        publish(server.url, topic="long", data="x" * 250_000)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Stream(server.url, "long", last_event_id="earliest", receive_buffer=4096))
                for _ in range(LENT)]
        with Stream(server.url, "a") as stream:
            assert stream.rest(PATIENCE) == []
            assert stream.reader.comments[-1].strip() == "full"
        assert_serves(server)
        assert len(slow[0].take(16, PATIENCE)) == 16
        with Stream(server.url, "a") as stream:
            eventually(lambda: is_taken(server), PATIENCE, message="its place is free as soon as it has caught up")


def is_taken(server: Server) -> bool:
    with Stream(server.url, "a") as stream:
        return "content-length" not in stream.headers


def test_storm_of_openings_is_served_beyond_the_connections(server: Server) -> None:
    """Streams that can be parked hold a connection for a moment only."""
    with contextlib.ExitStack() as stack:
        streams = [gevent.spawn(lambda: stack.enter_context(Stream(server.url, "storm")).opened(PATIENCE))
                   for _ in range(20 * CONNECTIONS)]
        opened = [each.get() for each in streams]
        assert publish(server.url, topic="storm", data="x") == opened[0].next(PATIENCE).last_event_id
        assert all(stream.next(PATIENCE).data == "x" for stream in opened[1:])


BODILESS = "POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{fields}\r\n\r\n"
FORM = "application/x-www-form-urlencoded"


def ended(connection: socket.socket) -> bytes:
    """All up to the end of the connection."""
    got = b""
    while part := connection.recv(4096):
        got += part
    return got


@pytest.mark.parametrize(("fields", "part"), [("Content-Length: 100", ""), ("Content-Length: 100", "topic="),
                                          ("Transfer-Encoding: chunked", "5\r\ntop")], ids=["none", "a part", "chunked"])
def test_body_that_does_not_come_is_a_problem_after_a_while_and_holds_up_nobody(
    fields: str, part: str, server: Server
) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(server, BODILESS.format(kind=FORM, fields=fields) + part))
                for _ in range(CONNECTIONS)]
        assert_serves(server)
        for each in held:
            answer = ended(each)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"application/problem+json" in answer
            assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(("kind", "status"), [(FORM, b"408"), ("text/plain", b"415")])
def test_body_that_comes_in_drops_has_no_more_time_than_one_that_does_not_come(
    kind: str, status: bytes, server: Server
) -> None:
    """Also one that is refused: it is read so that its client sees the answer, but not for ever."""
    with contextlib.closing(sent(server, BODILESS.format(kind=kind, fields="Content-Length: 1000"))) as connection:
        dripping = gevent.spawn(drip, connection)
        answer = ended(connection)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b"\r\nConnection: close\r\n" in answer
        dripping.kill()


def drip(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(b"x")
            gevent.sleep(0.05)


def test_refused_body_that_does_not_come_holds_up_nobody(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(server, BODILESS.format(kind="text/plain", fields="Content-Length: 100")))
                for _ in range(CONNECTIONS)]
        assert_serves(server)
        for each in held:
            assert ended(each).startswith(b"HTTP/1.1 415 ")


def test_refused_body_that_comes_leaves_the_connection_for_the_next_request(server: Server) -> None:
    with contextlib.closing(http.client.HTTPConnection(server.host, server.port, PATIENCE)) as kept:
        kept.request("POST", "/publish", "12345", {"Content-Type": "text/plain"})
        with kept.getresponse() as response:
            assert response.status == 415
            assert response.read()
        connection = kept.sock
        kept.request("GET", "/healthz")
        with kept.getresponse() as response:
            assert response.status == 200
        assert kept.sock is connection


# --- TLS -------------------------------------------------------------------------------------------------


class Secure(Server):
    """With TLS of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        made = certificate(directory)
        super().__init__(directory / "server", workers=1,
                         env={"PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS), "PUSHSVC_KEEPALIVE_SECONDS": "1"},
                         args=["--certfile", str(made.certificate), "--keyfile", str(made.key)])
        self.context = ssl.create_default_context(cafile=str(made.certificate))

    def __enter__(self) -> Self:
        self.start()
        eventually(self.is_healthy, PATIENCE, message="it answers over TLS")
        return self

    def is_healthy(self) -> bool:
        with self.connected() as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.1 200 ")

    @contextlib.contextmanager
    def connected(self) -> Iterator[ssl.SSLSocket]:
        with contextlib.closing(sockets.create_connection((self.host, self.port), PATIENCE)) as plain, \
                self.context.wrap_socket(plain, server_hostname=self.host) as connection:
            yield connection


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    with Secure(tmp_path_factory.mktemp("secure")) as secure:
        yield secure


def test_tls_handshakes_that_stop_half_way_hold_up_nobody(secure: Secure) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(secure, "\x16\x03\x01")) for _ in range(CONNECTIONS)]
        assert secure.is_healthy()
        assert all(ended(each) == b"" for each in held)


def test_cause_of_a_failed_tls_handshake_is_in_the_log_once(secure: Secure) -> None:
    def told() -> list[str]:
        return [line for line in secure.log().splitlines() if "Invalid request" in line]

    before = told()
    with contextlib.closing(sent(secure, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")) as plain, contextlib.suppress(OSError):
        ended(plain)
    eventually(lambda: told() != before, PATIENCE)
    line, = told()[len(before):]
    assert "HTTP_REQUEST" in line


def test_streams_over_tls_leave_connections_for_others(secure: Secure) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(LENT):
            connection = stack.enter_context(secure.connected())
            connection.sendall(b"GET /events?topic=a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"text/event-stream" in connection.recv(4096)
        connection = stack.enter_context(secure.connected())
        connection.sendall(b"GET /events?topic=a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"\n: full\n" in ended(connection)
        assert secure.is_healthy()
