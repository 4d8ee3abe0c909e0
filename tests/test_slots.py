"""What holds a connection for long leaves others for publishes and health checks."""

import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gevent import socket as sockets

from tests.support.client import Stream, publish, request
from tests.support.programs import program
from tests.support.server import Server
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


def open_streams(server: Server) -> float:
    text = request("GET", f"{server.url}/metrics").text
    return sum(map(float, re.findall(r"^pushsvc_streams\{[^}]*\} (\S+)$", text, re.M)))


@pytest.mark.parametrize("head", ["Content-Length: 100\r\n\r\n", "Content-Length: 100\r\n\r\ntopic=",
                                  "Transfer-Encoding: chunked\r\n\r\n5\r\ntop"], ids=["none", "a part", "chunked"])
def test_body_that_does_not_come_is_a_problem_after_a_while_and_holds_up_nobody(head: str, server: Server) -> None:
    start = f"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n{head}"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(server, start)) for _ in range(CONNECTIONS)]
        assert_serves(server)
        for each in held:
            answer = each.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"application/problem+json" in answer


def test_refused_body_that_does_not_come_holds_up_nobody(server: Server) -> None:
    start = "POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\n"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(sent(server, start)) for _ in range(CONNECTIONS)]
        assert_serves(server)
        for each in held:
            assert each.recv(4096).startswith(b"HTTP/1.1 415 ")


def test_tls_handshakes_that_stop_half_way_hold_up_nobody(tmp_path: Path) -> None:
    subprocess.run([program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key",
                    "-out", tmp_path / "chain", "-days", "1", "-subj", "/CN=localhost"], check=True, capture_output=True)
    server = Server(tmp_path / "server", workers=1,
                    env={"PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS), "PUSHSVC_KEEPALIVE_SECONDS": "1"},
                    args=["--certfile", str(tmp_path / "chain"), "--keyfile", str(tmp_path / "key")])
    context = ssl.create_default_context(cafile=str(tmp_path / "chain"))
    context.check_hostname = False

    def is_healthy() -> bool:
        with contextlib.closing(sockets.create_connection((server.host, server.port), PATIENCE)) as plain, \
                context.wrap_socket(plain) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.1 200 ")

    server.start()
    try:
        eventually(is_healthy, PATIENCE, message="it answers over TLS")
        with contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(sent(server, "\x16\x03\x01"))
            assert is_healthy()
    finally:
        server.stop()
