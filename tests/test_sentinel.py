"""Who is master, by Sentinels of which some are wrong, hang or are gone: the first that is right is enough."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.server import StreamServer

from pushsvc.brokers import redis_link
from pushsvc.errors import BrokerUnavailable
from pushsvc.publisher import Publisher
from tests.support.brokers import Side, put
from tests.support.redis import Redis
from tests.support.server import free_port

pytest_plugins = ["tests.support.sides"]
TIMEOUT = 30
MASTER = "mymaster"


class Sentinel:
    """Answers as a Sentinel does for which 127.0.0.1:`named` is the master; None: it never answers. asked: how often."""

    def __init__(self, named: int | None) -> None:
        self.named = named
        self.asked = 0
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._server.start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.stop(timeout=0)

    def _serve(self, sock: Any, _: Any) -> None:
        while sock.recv(4096):
            self.asked += 1
            if self.named is not None:
                port = str(self.named)
                sock.sendall(f"*2\r\n$9\r\n127.0.0.1\r\n${len(port)}\r\n{port}\r\n".encode())


Start = Callable[..., list[Sentinel]]  # a Sentinel for each port that one names


@pytest.fixture
def sentinels() -> Iterator[Start]:
    with contextlib.ExitStack() as stack:
        def start(*named: int | None) -> list[Sentinel]:
            return [stack.enter_context(contextlib.closing(Sentinel(port))) for port in named]

        yield start


def url_of(sentinels: list[Sentinel]) -> str:
    return f"redis+sentinel://{','.join(each.place for each in sentinels)}/{MASTER}"


def counts(sentinels: list[Sentinel]) -> list[int]:
    return [each.asked for each in sentinels]


def test_a_sentinel_that_names_a_dead_server_is_passed_over_and_asked_last_next_time(
        server: Redis, sentinels: Start) -> None:
    asked = sentinels(free_port(), server.port, server.port)
    with Publisher(url_of(asked)) as publisher:
        first = publisher.publish("a", "1")
        assert counts(asked) == [1, 1, 0]
        publisher.close()
        assert publisher.publish("a", "2") > first
        assert counts(asked) == [1, 2, 0]


def test_a_sentinel_that_names_a_replica_is_passed_over(server: Redis, sentinels: Start, tmp_path: Path) -> None:
    with Redis(tmp_path / "replica", args=["--replicaof", server.host, str(server.port)]) as replica:
        asked = sentinels(replica.port, server.port)
        side = Side(url_of(asked))
        with contextlib.closing(side.broker):
            put(side, "1")
            assert [event.data for event in side.heard(1)] == ["1"]


def test_a_sentinel_that_hangs_is_passed_over_long_before_a_reply_of_redis_would_be_given_up(
        server: Redis, sentinels: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "CONNECT_SECONDS", 0.2)
    asked = sentinels(None, server.port)
    with Publisher(url_of(asked), timeout=10 * TIMEOUT) as publisher, gevent.Timeout(TIMEOUT):
        publisher.publish("a", "1")
    assert counts(asked) == [1, 1]


def test_a_server_that_failed_is_not_tried_again_for_each_sentinel_that_names_it(
        sentinels: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = free_port()
    asked, tried = sentinels(dead, dead, dead), []
    connection_of = redis_link.connection_of

    def connection_and_note(options: dict[str, Any], seconds: float) -> Any:
        tried.append(options["port"])
        return connection_of(options, seconds)

    monkeypatch.setattr(redis_link, "connection_of", connection_and_note)
    told = pytest.raises(BrokerUnavailable, match=f"no Sentinel names .*:{dead}: .*refused")
    with Publisher(url_of(asked)) as publisher, told:
        publisher.publish("a", "1")
    assert counts(asked) == [1, 1, 1]
    assert tried.count(dead) == 1
