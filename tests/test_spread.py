"""Streams live for hours: what lands on one worker stays there. So connections must be spread evenly from the start."""

import re
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gevent.pool import Pool

from tests.support.client import Stream, publish, request
from tests.support.server import Server
from tests.support.wait import eventually

STREAMS = 4000
DESCRIPTORS = STREAMS + 500
TOLERANCE = 0.10
CLIENTS_AT_ONCE = 100
PATIENCE = 60

GAUGE = re.compile(r'^pushsvc_streams\{pid="([0-9]+)"\} ([0-9.e+]+)$', re.MULTILINE)


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"a process may hold {hard} descriptors here, this takes {DESCRIPTORS}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def streams_by_worker(server: Server) -> dict[int, int]:
    text = request("GET", f"{server.url}/metrics", timeout=PATIENCE).text
    return {int(pid): int(float(count)) for pid, count in GAUGE.findall(text)}


def open_streams(stack: ExitStack, url: str) -> list[Stream]:
    def opened(number: int) -> Stream:
        stream = stack.enter_context(Stream(url, "spread", timeout=PATIENCE, wire_limit=0))
        assert stream.status == 200
        return stream.opened(PATIENCE)

    return Pool(CLIENTS_AT_ONCE).map(opened, range(STREAMS))


def is_even(counts: dict[int, int], workers: int) -> bool:
    fair = STREAMS / workers
    return all(abs(count - fair) <= TOLERANCE * fair for count in counts.values())


@pytest.mark.parametrize("workers", [2, 4])
def test_thousands_of_streams_are_spread_evenly_and_each_gets_a_broadcast(workers: int, tmp_path: Path) -> None:
    with Server(tmp_path, workers=workers) as server:
        counts = draw(server)
        if not is_even(counts, workers):  # the kernel draws a worker per connection: by chance once in a thousand tests
            counts = draw(server)

    print(f"{STREAMS} streams over {workers} workers: {counts}")
    assert is_even(counts, workers), f"not within {TOLERANCE:.0%} of {STREAMS // workers} each: {counts}"


def draw(server: Server) -> dict[int, int]:
    """Opens the streams, sends them one event, and closes them; how many each worker had."""
    eventually(lambda: sum(streams_by_worker(server).values()) == 0, PATIENCE, message="streams of before are left")
    with ExitStack() as stack:
        streams = open_streams(stack, server.url)
        eventually(lambda: sum(streams_by_worker(server).values()) == STREAMS, PATIENCE, interval=0.2,
                   message="the metrics do not know all streams")
        counts = streams_by_worker(server)
        assert sorted(counts) == server.worker_pids()

        id = publish(server.url, topic="spread", data="to all")
        messages = Pool(CLIENTS_AT_ONCE).map(lambda stream: stream.next(PATIENCE), streams)
        assert {(message.data, message.last_event_id) for message in messages} == {("to all", id)}
    return counts
