"""The Redis broker when its connection joins again: what is lost is told however that goes, and what it costs is bound."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal

from pushsvc.errors import BrokerUnavailable
from pushsvc.publisher import Publisher
from tests.support.brokers import Side, data, put
from tests.support.fire import seq_of
from tests.support.redis import Redis
from tests.support.wait import eventually

Open = Callable[..., Side]
TIMEOUT = 30
WIDE = ("a", *(f"t{number}" for number in range(40)))  # an event of so many topics is fetched


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def client(server: Redis) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture
def opened() -> Iterator[Open]:
    with contextlib.ExitStack() as stack:
        def open_side(server: Redis, **changes: Any) -> Side:
            side = Side(server.url, **changes)
            stack.callback(side.broker.close)
            return side

        yield open_side


@pytest.fixture
def publisher(server: Redis) -> Iterator[Publisher]:
    with Publisher(server.url) as publisher:
        yield publisher


def reader_of(side: Side) -> Any:
    return side.broker._reader  # type: ignore[attr-defined]


def line_of(side: Side) -> Any:
    return side.broker._line  # type: ignore[attr-defined]


@contextlib.contextmanager
def away(side: Side, server: Redis) -> Iterator[None]:
    """Its reader has lost its connection, and joins again when the block has ended."""
    reader = reader_of(side)
    join, may_join = reader._join, Signal()
    reader._join = lambda: may_join.wait() and join()
    server.break_listeners()
    eventually(lambda: not reader._live, interval=0.001)
    yield
    may_join.set()


def connect_anew(side: Side, server: Redis) -> None:
    """Both its connections."""
    line_of(side).leave()
    server.break_listeners()


def texts(*numbers: int) -> list[dict[str, Any]]:
    """A batch to the topic a."""
    return [{"topic": "a", "data": str(number)} for number in numbers]


# --- what a server has lost or refuses


def test_a_sequence_that_has_gone_back_in_one_life_of_a_server_begins_a_new_epoch(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    first, _, last = (put(side, text) for text in "123")
    side.heard(3)
    client.hset("pushsvc:log", "seq", first.seq)
    connect_anew(side, server)
    new = eventually(lambda: put(side, "new"), TIMEOUT)
    assert new.epoch > first.epoch
    assert new.seq > last.seq
    eventually(lambda: data(side)[3:] == ["new"], TIMEOUT)
    assert [since for since, _ in side.gaps] == [last]
    assert side.broker.precedes(first.epoch)


def test_a_full_server_that_was_restarted_is_read_and_listened_to(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    before = put(side, "before")
    side.heard(1)
    client.hset("pushsvc:log", "run", "another")
    client.config_set("maxmemory", "1mb")
    connect_anew(side, server)
    head = eventually(side.broker.head, TIMEOUT)
    assert head.epoch > before.epoch
    assert [event.data for event in side.history("a")] == ["before"]
    assert [since for since, _ in side.gaps] == [before]
    with pytest.raises(BrokerUnavailable, match="maxmemory"):
        put(side, "refused")
    client.config_set("maxmemory", "0")
    put(side, "after")
    eventually(lambda: data(side) == ["before", "after"], TIMEOUT)


def test_a_shorter_age_of_history_holds_at_once(server: Redis, opened: Open) -> None:
    side = opened(server, history_seconds=1000)
    put(side, "old")
    gevent.sleep(1.1)
    put(side, "newer")
    assert len(side.history("a")) == 2
    shorter = opened(server, history_seconds=1)
    assert "old" not in [event.data for event in shorter.history("a")]


def test_a_longer_age_of_history_leaves_a_full_server_readable(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server, history_seconds=1)
    put(side, "old")
    gevent.sleep(0.2)
    put(side, "newer")
    longer = opened(server, history_seconds=1000)
    client.hset("pushsvc:log", "due", 1)  # as if the shorter age had passed for the first
    client.config_set("maxmemory", "1mb")
    assert [event.data for event in longer.history("a")] == ["old", "newer"]


def test_an_answer_that_nobody_has_waited_for_is_not_taken_for_the_next(
        server: Redis, publisher: Publisher, client: Any) -> None:
    publisher.publish("a", "0")
    server.freeze()
    try:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
            publisher.publish("a", "1")
        publishing = gevent.spawn(publisher.publish, "a", "2")
        gevent.sleep(0.1)
    finally:
        server.thaw()
    seq = seq_of(publishing.get(timeout=TIMEOUT))
    (_, entry), = client.xrange("pushsvc:t:a", f"{seq}-0", f"{seq}-0")
    assert entry["b"].endswith("\n2")
