"""What is measured, one function each: a server is started for it, loaded, and ended. All figures are the server's own
processor time and memory, but for latencies and deliveries, which are the client's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import probe
import servers
from fleet import PER_PROCESS, Fleet, Seen
from publisher import Flood, Publisher, mark, pace
from servers import HOST, Server
from swarm import Target

SETTLE_SECONDS = 2.0
TELL_SECONDS = 3.0
IDLE_SECONDS = 2.0
EVENT_SECONDS = 60.0  # an event that has not come by then is lost
PAUSE_SECONDS = 0.02  # between an event's last delivery and the next event
WARM_EVENTS = 3
RAMP_SECONDS = 1.0
NEWS_SECONDS = 0.002
BUSY_NICE = 10
PACERS = 8  # connections of a publisher that does not wait for answers
TOPIC = "bench"
Progress = Callable[[str], None]
Found = dict[str, Any]


class MeasureError(Exception):
    """A server did not do what is measured; the text says what."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much of everything."""

    streams: int = 15_000
    warm_streams: int = 300
    events: int = 20
    flat_streams: int = 1000
    flat_seconds: float = 8.0
    mixed_rate: float = 20.0
    mixed_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Cores:
    """A core for the server, the others for clients and publishers; None: the kernel's choice."""

    server: frozenset[int] | None = None
    client: frozenset[int] | None = None

    @classmethod
    def apart(cls) -> Cores:
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(others)) if others else cls()


@dataclass(slots=True)
class Rig:
    """A server that runs, and a fleet of clients."""

    server: Server
    pids: list[int]
    fleet: Fleet
    progress: Progress

    def target(self, topic: str = TOPIC) -> Target:
        return Target(HOST, self.server.port, self.server.path.replace("{topic}", topic))

    def cpu(self) -> float:
        return probe.cpu_seconds(self.pids)

    def open(self, count: int, topic: str = TOPIC) -> Seen:
        seen = self.fleet.open(count, self.target(topic), progress=self._tell(count))
        if seen.open < count:
            raise MeasureError(f"only {seen.open} of {count} streams opened")
        return seen

    def _tell(self, count: int) -> Callable[[int], None]:
        told = time.monotonic()

        def tell(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                self.progress(f"{done} of {count} streams")

        return tell

    def warm(self, count: int) -> None:
        """Open some streams and close them again: what is allocated once is allocated."""
        self.open(count)
        self.fleet.close()
        time.sleep(SETTLE_SECONDS)
        self.fleet.reset()

    def idle_cpu(self) -> float:
        """What the server needs for nothing: seconds per second."""
        before = self.cpu()
        time.sleep(IDLE_SECONDS)
        return (self.cpu() - before) / IDLE_SECONDS


@contextmanager
def rigged(server: Server, cores: Cores, streams: int, progress: Progress) -> Iterator[Rig]:
    with servers.running(server, cores.server) as pids, Fleet(math.ceil(streams / PER_PROCESS), cores.client) as fleet:
        yield Rig(server, pids, fleet, progress)


def one_topic(server: Server, load: Load, cores: Cores, progress: Progress) -> Found:
    """Memory per idle stream, processor time per connect and per delivered event, latency of one event at a time."""
    with rigged(server, cores, load.streams, progress) as rig:
        rig.warm(load.warm_streams)
        found = _opening(rig, load.streams, TOPIC)
        progress(f"{load.events} events to {load.streams} streams")
        return found | _single_events(rig, load)


def many_topics(server: Server, load: Load, cores: Cores, progress: Progress) -> Found:
    """Memory per idle stream when each has a topic of its own."""
    with rigged(server, cores, load.streams, progress) as rig:
        rig.warm(load.warm_streams)
        found = _opening(rig, load.streams, "user-{}")
        return {"topics_memory_kb": found["memory_kb"], "topics_connect_us": found["connect_us"]}


def _opening(rig: Rig, streams: int, topic: str) -> Found:
    idle, memory = rig.idle_cpu(), probe.own_bytes(rig.pids)
    begun, cpu = time.monotonic(), rig.cpu()
    rig.open(streams, topic)
    spent = rig.cpu() - cpu - idle * (time.monotonic() - begun)
    time.sleep(SETTLE_SECONDS)
    growth = probe.own_bytes(rig.pids) - memory
    return {"memory_kb": growth / streams / 1024, "connect_us": spent / streams * 1e6}


def _single_events(rig: Rig, load: Load) -> Found:
    publisher = rig.server.publisher()
    one_by_one(rig, publisher, WARM_EVENTS)
    before = rig.cpu()
    seen = one_by_one(rig, publisher, load.events)
    spent = rig.cpu() - before
    publisher.close()
    if seen.events < load.events * load.streams:
        raise MeasureError(f"{seen.events} of {load.events * load.streams} events were delivered")
    return {"event_us": spent / seen.events * 1e6, "disorder": seen.disorder, "ended": seen.ended} | seen.latencies()


def one_by_one(rig: Rig, publisher: Publisher, events: int) -> Seen:
    rig.fleet.reset()
    seen = Seen()
    for number in range(1, events + 1):
        rig.server.publish(publisher, TOPIC, mark(number))
        seen = rig.fleet.wait(number, EVENT_SECONDS)
        time.sleep(PAUSE_SECONDS)
    return seen


def flat_out(server: Server, load: Load, cores: Cores, progress: Progress) -> Found:
    """Deliveries per second when publishers send as fast as it is delivered, to streams of one topic."""
    with rigged(server, cores, load.flat_streams, progress) as rig:
        rig.open(load.flat_streams)
        rig.fleet.reset()
        rig.fleet.follow(NEWS_SECONDS)
        progress(f"as fast as it goes to {load.flat_streams} streams")
        publishers = [server.publisher() for _ in range(server.connections)]
        flood = Flood(publishers, server.batch, partial(server.request, TOPIC), rig.fleet, load.flat_streams)
        flood.run(RAMP_SECONDS)
        found = _during(rig, lambda: flood.run(load.flat_seconds))
        for publisher in publishers:
            publisher.close()
        return found


def _during(rig: Rig, run: Callable[[], int]) -> Found:
    before, begun, cpu, client = rig.fleet.stats(), time.monotonic(), rig.cpu(), probe.cpu_seconds(rig.fleet.pids)
    published = run()
    seen = rig.fleet.stats()
    took = time.monotonic() - begun
    seen.latency.subtract(before.latency)
    return {"flat_per_second": (seen.events - before.events) / took, "flat_published_per_second": published / took,
            "flat_p50_ms": seen.percentile_ms(0.5), "flat_p99_ms": seen.percentile_ms(0.99),
            "flat_reads_per_second": (seen.reads - before.reads) / took, "flat_disorder": seen.disorder,
            "flat_ended": seen.ended, "flat_server_cpu": (rig.cpu() - cpu) / took,
            "flat_client_cpu": (probe.cpu_seconds(rig.fleet.pids) - client) / took}


def mixed(server: Server, load: Load, cores: Cores, progress: Progress) -> Found:
    """The latency of a topic with one stream, while another topic with all the others is busy on the same worker."""
    with rigged(server, cores, load.streams, progress) as rig, Fleet(1, cores.client) as single:
        rig.warm(load.warm_streams)
        rig.open(load.streams - 1)
        single.open(1, rig.target("single"))
        rig.fleet.reset()
        progress(f"{load.mixed_rate:g} events/s to {load.streams - 1} streams, and to one, for {load.mixed_seconds:g} s")
        for pid in rig.fleet.pids:  # else the latency would be that of the clients' own core
            os.setpriority(os.PRIO_PROCESS, pid, BUSY_NICE)
        publishers = [server.publisher() for _ in range(PACERS)]
        before, client = rig.cpu(), probe.cpu_seconds(rig.fleet.pids)
        late = pace(publishers, load.mixed_rate, load.mixed_seconds,
                    [event_of(server, TOPIC), event_of(server, "single")])
        events = int(load.mixed_rate * load.mixed_seconds)
        alone, all_others = single.wait(events, EVENT_SECONDS), rig.fleet.wait(events, EVENT_SECONDS)
        spent, spent_client = rig.cpu() - before, probe.cpu_seconds(rig.fleet.pids) - client
        for publisher in publishers:
            publisher.close()
        return {"single_p50_ms": alone.percentile_ms(0.5), "single_p99_ms": alone.percentile_ms(0.99),
                "single_max_ms": alone.percentile_ms(1), "single_events": alone.events,
                "busy_p50_ms": all_others.percentile_ms(0.5), "busy_p99_ms": all_others.percentile_ms(0.99),
                "busy_events": all_others.events, "busy_lost": events * (load.streams - 1) - all_others.events,
                "publisher_late_ms": late * 1000,
                "mixed_server_cpu": spent / load.mixed_seconds, "mixed_client_cpu": spent_client / load.mixed_seconds}


def event_of(server: Server, topic: str) -> Callable[[int, float], bytes]:
    return lambda number, at: server.request(topic, [mark(number, 0, at)])
