"""Listening sockets and connections that are closed so that no client is reset that has asked for something."""

import contextvars
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from gevent import monkey, select
from gevent import socket as sockets
from gevent.event import Event

from pushsvc import listener as listeners
from pushsvc.listener import Client, Endpoint, Listener, Raw, Room
from tests.support.server import Server
from tests.support.wait import eventually

HOSTS = {"IPv4": (socket.AF_INET, "127.0.0.1"), "IPv6": (socket.AF_INET6, "::1")}
PATIENCE = 10.0
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(params=HOSTS)
def listening(request: pytest.FixtureRequest) -> Iterator[Listener]:
    """Answers the first bytes of a connection, as upper case, and closes it."""
    family, host = HOSTS[request.param]
    if family == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    sock = sockets.socket(family)
    sock.bind((host, 0))
    sock.listen(16)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 10)
    endpoint = Endpoint.of(sock)

    def serve(raw: Raw, address: object) -> None:
        client = Client(endpoint, raw)
        client.sendall(client.recv(100).upper())
        client.close()

    room = Room(10)
    server = Listener(sock, serve, room)
    server.address = endpoint.getsockname()[:2]
    server.start()
    yield server
    server.close()
    eventually(lambda: not room.taken)


def connected(server: Listener, timeout: float = PATIENCE) -> socket.socket:
    return sockets.create_connection(server.address, timeout)


def test_connection_that_is_made_before_a_quiesce_is_served_and_none_is_made_after_it(listening: Listener) -> None:
    silent, early = connected(listening), connected(listening)
    early.sendall(b"early")
    listening.quiesce()
    with pytest.raises(TimeoutError):
        connected(listening, 0.3)
    silent.sendall(b"late")
    assert [each.recv(100) for each in (early, silent)] == [b"EARLY", b"LATE"]
    listening.close()
    with pytest.raises(ConnectionRefusedError):
        connected(listening)
    early.close()
    silent.close()


def test_connection_that_waits_in_the_queue_is_served_though_the_socket_is_closed(listening: Listener) -> None:
    listening.stop_accepting()
    waiting = connected(listening)
    waiting.sendall(b"waiting")
    eventually(lambda: is_readable(listening.socket), message="the connection is in the queue")
    listening.quiesce()
    listening.accept_waiting()
    listening.close()
    assert waiting.recv(100) == b"WAITING"
    waiting.close()


def is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_quiesce_of_a_unix_socket_changes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    sock = sockets.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(4)
    server = Listener(sock, lambda raw, address: raw.sendall(b"here"), Room(10))
    server.start()
    server.quiesce()
    client = sockets.socket(socket.AF_UNIX)
    client.connect(path)
    assert client.recv(10) == b"here"
    client.close()
    server.close()


# --- Greenlets -------------------------------------------------------------------------------------------


class Served:
    """A listener that notes in which greenlet each connection was served; `serve` is what it does with each."""

    def __init__(self, serve: Callable[[bytes], None]) -> None:
        self.by: dict[bytes, object] = {}
        self._serve = serve
        sock = sockets.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 10)
        self.address = sock.getsockname()
        self.room = Room(64)
        self.listener = Listener(sock, self._note, self.room)

    def _note(self, raw: Raw, address: object) -> None:
        name = raw.first_bytes()
        self.by[name] = gevent.getcurrent()
        self._serve(name)
        raw.sendall(name)

    def answers(self, count: int) -> list[bytes]:
        """What so many connections get that are all made before the first is served."""
        clients = [sockets.create_connection(self.address) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        self.listener.start()
        with gevent.Timeout(PATIENCE):
            found = [client.recv(10) for client in clients]
        for client in clients:
            client.close()
        eventually(lambda: not self.room.taken)
        self.listener.close()
        return found


NAMES = [b"%d" % number for number in range(20)]


def test_connections_that_are_there_at_once_share_a_greenlet() -> None:
    served = Served(lambda name: None)
    assert served.answers(20) == NAMES
    assert len(set(served.by.values())) < 10


def test_connection_that_waits_holds_up_no_other() -> None:
    others = Event()

    def serve(name: bytes) -> None:
        if name == b"0":
            others.wait()
        elif len(served.by) == 20:
            others.set()

    served = Served(serve)
    assert served.answers(20) == NAMES


def test_connection_that_keeps_the_loop_busy_is_not_followed_by_others_in_one_turn() -> None:
    """So timers and the other sockets come in between."""
    ticks: list[int] = []
    busy = monkey.get_original("time", "sleep")
    served = Served(lambda name: busy(0.003))
    ticking = gevent.spawn(lambda: [(gevent.sleep(0.001), ticks.append(len(served.by))) for _ in range(200)])
    assert served.answers(20) == NAMES
    ticking.kill()
    assert len({count for count in ticks if 0 < count < 20}) > 3, ticks


def test_error_while_one_connection_is_served_does_not_reach_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def serve(name: bytes) -> None:
        if name == b"3":
            raise ValueError("a fault")

    assert Served(serve).answers(20) == [name if name != b"3" else b"" for name in NAMES]
    assert "a fault" in capsys.readouterr().err


# --- The end of a connection -----------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Client, socket.socket]]:
    """A connection's two ends: as the service has it, and the client's. It lingers for longer than a test takes."""
    monkeypatch.setattr(listeners, "LINGER_SECONDS", 3 * PATIENCE)
    door = socket.create_server(("127.0.0.1", 0))
    far = sockets.create_connection(door.getsockname())
    near, _ = door.accept()
    near.setblocking(False)
    yield Client(Endpoint.of(near), Raw(near.detach())), far
    far.close()
    door.close()


def test_request_that_crosses_the_close_does_not_reset_the_connection(pair: tuple[Client, socket.socket]) -> None:
    client, far = pair
    closing = gevent.spawn(client.close)
    assert far.recv(10) == b""
    far.sendall(b"POST /publish HTTP/1.1\r\n")
    gevent.sleep(0.05)
    assert far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert not closing.ready(), "it waits for the client"
    far.close()
    closing.join(PATIENCE)
    assert client.fileno() == -1


def test_answer_before_a_close_arrives_though_the_request_was_not_read_whole(pair: tuple[Client, socket.socket]) -> None:
    client, far = pair
    far.sendall(b"x" * 100_000)
    client.sendall(b"too large")
    closing = gevent.spawn(client.close)
    gevent.sleep(0.05)
    assert far.recv(100) == b"too large"
    assert far.recv(100) == b""
    assert far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    far.close()
    closing.join(PATIENCE)


def test_client_that_does_not_close_its_end_is_left_after_a_moment(
        pair: tuple[Client, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "LINGER_SECONDS", 0.1)
    client, far = pair
    sending = gevent.spawn(send_until_it_fails, far)
    client.close()
    assert client.fileno() == -1
    sending.join(PATIENCE)
    assert sending.ready(), "the connection is still open"


def send_until_it_fails(sock: socket.socket) -> None:
    while True:
        try:
            sock.sendall(b"x")
        except OSError:
            return
        gevent.sleep(0.01)


def test_close_of_a_connection_that_is_gone_raises_nothing(pair: tuple[Client, socket.socket]) -> None:
    client, far = pair
    raw = Raw(client.detach())
    raw.close()
    raw.close()
    client.close()
    client.close()
    assert far.recv(10) == b""


def test_what_has_come_and_was_not_read_is_known_and_comes_first(pair: tuple[Client, socket.socket]) -> None:
    client, far = pair
    assert not client.has_unread()
    far.sendall(b"new")
    eventually(client.has_unread)
    client.ahead = b"old"
    assert (client.recv(2), client.recv(10), client.recv(10)) == (b"ol", b"d", b"new")
    assert not client.has_unread()
    far.close()
    eventually(lambda: client.recv(10) == b"")
    assert not client.has_unread()
    client.close()


def test_kept_connection_that_becomes_too_old_is_closed_without_a_reset(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, env={"PUSHSVC_KEEPALIVE_SECONDS": "1"}) as server:
        eventually(lambda: is_closed_without_a_reset(server), 30, message="it is reset each time")


def is_closed_without_a_reset(server: Server) -> bool:
    """Whether a request that is sent right after the service has closed its end is taken. (A machine that is so busy that
    the moment is over by then makes it False, too.)"""
    with sockets.create_connection((server.host, server.port), PATIENCE) as kept:
        kept.sendall(REQUEST)
        assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert kept.recv(1000) == b"", "it was not closed"
        kept.sendall(REQUEST)
        gevent.sleep(0.1)
        return not kept.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


# --- What is a client's own ------------------------------------------------------------------------------


def test_no_connection_sees_the_context_or_the_thread_locals_of_another() -> None:
    """Not even where they share a greenlet."""
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable", default=b"")
    local = threading.local()
    seen: list[tuple[bytes, bytes]] = []

    def serve(name: bytes) -> None:
        has_locals = int(name) % 2  # to look is to have them
        seen.append((variable.get(), getattr(local, "name", b"") if has_locals else b""))
        variable.set(name)
        if has_locals:
            local.name = name

    served = Served(serve)
    assert served.answers(20) == NAMES
    assert seen == [(b"", b"")] * 20
    assert len(set(served.by.values())) < 20, "and some have shared one"
