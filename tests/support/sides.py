"""Fixtures for tests of the Redis broker: a server of its own for each test, and who speaks to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pushsvc.publisher import Publisher
from tests.support.brokers import Open, Side
from tests.support.redis import Redis


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


@pytest.fixture
def publisher(server: Redis) -> Iterator[Publisher]:
    with Publisher(server.url) as publisher:
        yield publisher
