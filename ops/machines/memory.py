#!/usr/bin/env python3
"""How much memory of Redis the log takes: per event, per topic, per remembered Idempotency-Key.

It starts a redis-server of its own on a Unix socket in a temporary folder, fills it by the very scripts of the service,
reads `used_memory` before and after, and ends it. Exit codes: 0 measured, 1 there is no redis-server, or it failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from redis import ConnectionError as NotThere  # noqa: E402
from redis import Redis  # noqa: E402

from pushsvc.publisher import Publisher  # noqa: E402

BATCH = 1000
START_SECONDS = 10.0
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """bytes_each: growth of used_memory per unit. of_data: the part of it that is the events' own data."""

    what: str
    units: int
    bytes_each: float
    of_data: int


def answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except NotThere:
        return False


@contextmanager
def fresh(node_bytes: int) -> Iterator[tuple[str, Any]]:
    """The URL of an empty Redis, and a client of it. `node_bytes`: its stream-node-max-bytes."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="pushsvc-memory-") as folder:
        path = Path(folder, "redis.sock")
        process = subprocess.Popen([program, "--port", "0", "--unixsocket", str(path), "--dir", folder, "--save", "",
                                    "--stream-node-max-bytes", str(node_bytes)],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_SECONDS
            with Redis(unix_socket_path=str(path)) as client:
                while not answers(client):
                    if process.poll() is not None or time.monotonic() > deadline:
                        sys.exit("redis-server did not start")
                    time.sleep(0.01)
                yield f"unix://{path}", client
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


class Scale:
    """Redis with so many bytes for each node of a stream, filled anew for each measurement."""

    def __init__(self, node_bytes: int) -> None:
        self._node_bytes = node_bytes

    def growth(self, fill: Callable[[Publisher], None]) -> float:
        """Bytes by which used_memory grows from a log without events to one that `fill` has filled."""
        with fresh(self._node_bytes) as (url, client), Publisher(url) as publisher:
            publisher.publish("first", "")
            before = client.info("memory")["used_memory"]
            fill(publisher)
            return float(client.info("memory")["used_memory"] - before)

    def event(self, events: int, topics: int, size: int, spread: int = 1) -> Found:
        """Events of `size` bytes, each to `spread` of `topics` topics."""

        def fill(publisher: Publisher) -> None:
            for start in range(0, events, BATCH):
                publisher.publish_batch(
                    {"topics": [f"user-{(number * spread + place) % topics}" for place in range(spread)],
                     "data": "x" * size} for number in range(start, min(start + BATCH, events)))

        what = f"event of {size:,} bytes to {spread} topic{'s' * (spread > 1)}, {events * spread // topics:,} in each"
        return Found(what, events, self.growth(fill) / events, size)

    def topic(self, topics: int) -> Found:
        """Topics that have had one event, with `keep=none`: what is remembered of a topic without a history."""

        def fill(publisher: Publisher) -> None:
            for start in range(0, topics, BATCH):
                publisher.publish_batch({"topic": f"user-{number}", "data": "", "keep": "none"}
                                        for number in range(start, min(start + BATCH, topics)))

        return Found("topic without a history", topics, self.growth(fill) / topics, 0)

    def key(self, keys: int) -> Found:
        """Idempotency keys as long as a UUID, of events that no history holds."""

        def fill(publisher: Publisher) -> None:
            for number in range(keys):
                publisher.publish("first", "", keep="none", idempotency_key=f"{number:036}")

        return Found("Idempotency-Key of 36 bytes", keys, self.growth(fill) / keys, 0)


def measure(events: int, topics: int, node_bytes: int) -> list[Found]:
    scale = Scale(node_bytes)
    return [scale.event(events, topics, 100), scale.event(events, topics, 1000), scale.event(events, topics, 100, 10),
            scale.event(topics, topics, 100), scale.topic(topics), scale.key(events // 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000, help="how many (default %(default)s)")
    parser.add_argument("--topics", type=int, default=1000, help="to how many topics, evenly (default %(default)s)")
    parser.add_argument("--node-bytes", type=int, default=512, help="stream-node-max-bytes (default %(default)s, as "
                        "redis.conf beside this file; Redis's own is 4096)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    found = measure(options.events, options.topics, options.node_bytes)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    print("| one | measured with | bytes of Redis |\n| --- | --- | --- |")
    for each in found:
        print(f"| {each.what} | {each.units:,} | {each.bytes_each:,.0f} |")


if __name__ == "__main__":
    main()
