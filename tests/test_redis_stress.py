"""The Redis broker where it is easily wrong: pages, numbers that go back, and messages that come half."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pushsvc.event import Draft
from pushsvc.position import Position
from tests.support.brokers import Side
from tests.support.redis import Redis

Open = Callable[..., Side]
TIMEOUT = 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Open]:
    with contextlib.ExitStack() as stack:
        def open_side(server: Redis, **changes: Any) -> Side:
            side = Side(server.url, **changes)
            stack.callback(side.broker.close)
            return side

        yield open_side


def data(side: Side) -> list[str]:
    return [event.data for event in side.events]


def put(side: Side, text: str, topic: str = "a", **fields: Any) -> Position:
    return side.broker.append([Draft((topic,), text, **fields)])[0]


# --- history


def test_a_page_ends_where_an_event_has_no_room_also_if_a_later_one_would_have(server: Redis, opened: Open) -> None:
    side = opened(server)
    for number, size in enumerate((100, 600_000, 600_000, 100)):
        put(side, f"{number}" + "x" * size)
    assert [event.data[0] for event in side.history("a")] == ["0", "1", "2", "3"]
