"""Metrics: plain counters on the hot path, given to prometheus_client once a second and at each scrape.

With several workers, prometheus_client's multiprocess mode joins them by files in PROMETHEUS_MULTIPROC_DIR (set by
gunicorn.conf.py before anything here is imported), so that any worker answers for all.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import InfoMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from pushsvc import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(slots=True)
class Counts:
    """What the hot path counts. Everything in it is emptied into the metrics by `Metrics.flush`."""

    published: int = 0
    refused: int = 0
    received: int = 0
    delivered: int = 0
    opened: int = 0
    turned_away: int = 0
    evicted: Tally[str] = field(default_factory=Tally)


class Metrics:
    """The metrics of one process. Its registry is its own: two applications in one process do not meet."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.registry = CollectorRegistry()
        self._published = self._counter("published", "Events that this service acknowledged.")
        self._refused = self._counter("publish_failures", "Publishes that the broker did not take.")
        self._received = self._counter("received", "Events that workers took from the broker, once per worker.")
        self._delivered = self._counter("delivered", "Events handed to streams, once per stream.")
        self._opened = self._counter("streams_opened", "Streams opened.")
        self._turned_away = self._counter("streams_refused", "Streams told to come back later: the worker was full.")
        self._evicted = self._counter("evicted", "Streams ended, by reason.", ["reason"])
        self._streams = self._gauge("streams", "Open streams, per worker.")
        self._subscriptions = self._gauge("subscriptions", "Topics that open streams name, summed, per worker.")
        self._topics = self._gauge("topics", "Different topics with a stream, per worker.")
        self._queue = self._gauge("queue_depth", "What waits in a queue, per worker.", ["queue"])
        self._lag = Histogram("pushsvc_loop_lag_seconds", "How late the worker's loop runs what is due.",
                              buckets=_LAG_BUCKETS, registry=self.registry)
        self._latency = Histogram("pushsvc_publish_to_send_seconds", "From an event's append to its last local send.",
                                  buckets=_LATENCY_BUCKETS, registry=self.registry)

    def sent(self, seconds: float) -> None:
        """An event was handed to all its local streams, `seconds` after its append."""
        self._latency.observe(max(0.0, seconds))

    def lagged(self, seconds: float) -> None:
        self._lag.observe(max(0.0, seconds))

    def gauge(self, streams: int, subscriptions: int, topics: int, queues: dict[str, int]) -> None:
        self._streams.set(streams)
        self._subscriptions.set(subscriptions)
        self._topics.set(topics)
        for name, depth in queues.items():
            self._queue.labels(name).set(depth)

    def flush(self) -> None:
        """Move the counts into the metrics. Atomic: no switch."""
        counts, self.counts = self.counts, Counts()
        self._published.inc(counts.published)
        self._refused.inc(counts.refused)
        self._received.inc(counts.received)
        self._delivered.inc(counts.delivered)
        self._opened.inc(counts.opened)
        self._turned_away.inc(counts.turned_away)
        for reason, count in counts.evicted.items():
            self._evicted.labels(reason).inc(count)

    def exposition(self) -> bytes:
        """All metrics of all workers as Prometheus text."""
        registry = self.registry
        if MULTIPROC in os.environ:
            registry = CollectorRegistry()
            _Workers(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry) + generate_latest(_BUILD)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"pushsvc_{name}", text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(f"pushsvc_{name}", text, labels or [], registry=self.registry, multiprocess_mode="liveall")


class _Build(Collector):
    """What answers: the same in all workers, so none of them has to write it into a file."""

    def collect(self) -> Iterator[InfoMetricFamily]:
        yield InfoMetricFamily("pushsvc_build", "The version of this service.", {"version": __version__})


_BUILD = CollectorRegistry()
_BUILD.register(_Build())


class _Workers(MultiProcessCollector):
    """The metrics of all workers, from their files."""

    def collect(self) -> Any:
        """Passes over the files that a worker makes at this moment: prometheus_client fails at one that is empty yet."""
        files = [str(path) for path in Path(os.environ[MULTIPROC]).glob("*.db") if _has_content(path)]
        return self.merge(files, accumulate=True)  # type: ignore[no-untyped-call]


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # of a worker that has gone
        return False


def forget_worker(pid: int) -> None:
    """Take a dead worker's gauges out; its counters stay, for they are part of the sums."""
    if MULTIPROC in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]

