#!/usr/bin/env python3
"""Opens very many streams to pushsvc, all on this machine, and publishes to them.

As many workers as descriptors demand, some more because connections do not spread evenly; a stream that is refused
(200, a `retry:`, the end) is opened again by the client. Each stream names two topics: `all`, and one of `user-0`,
`user-1`, ..., ten streams to each. Measured are one event to `all` (three times: the median), 1,000 events to one
user's topic each, and the memory of everybody. Kernel settings are raised as root, and put back at the end.

Exit codes: 0 none failed, all were open and had every event, and (from a million streams on) all workers together
took 1.5 KB per stream at most; 1 not; 2 this machine cannot (memory, descriptors, root).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kernel
import probe
import report
from fleet import Fleet, FleetError, Seen, say_progress
from fleet import run as run_program
from publisher import Publisher, PublishError, mark, pace
from servers import HOST, ROOT, Pushsvc, ServerError, running
from swarm import Target

MILLION = 1_000_000
KEPT = 1064  # descriptors that a worker keeps for other things than streams
HEADROOM = 1.015  # the kernel spreads connections by chance: a few per thousand either way
PER_CLIENT = 17_500
STREAMS_PER_TOPIC = 100
BROADCASTS = 3
BROADCAST_SECONDS = 300.0
SINGLES = 1000
SINGLES_PER_SECOND = 100.0
CONNECTIONS = 8
SLOWEST_PER_SECOND = 250  # streams opened
SETTLE_SECONDS = 60.0
IDLE_SECONDS = 10.0
LEAST_BYTES = 1_500_000_000


class NotHere(Exception):
    """This machine cannot; the text says why."""


def watch_memory() -> None:
    if probe.available_bytes() < LEAST_BYTES:
        raise NotHere(f"less than {LEAST_BYTES / 1e9:g} GB of memory is left")


def workers_for(streams: int) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 2 * KEPT:
        raise NotHere(f"a process may have only {hard} descriptors")
    return max(1, math.ceil(streams * HEADROOM / (hard - KEPT)))


def progress(total: int) -> Callable[[int], None]:
    """Says how far it is, every five seconds."""
    begun = told = time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 5:
            told = now
            say_progress(f"  {count:,} of {total:,} streams, {count / (now - begun):,.0f}/s, "
                         f"{probe.available_bytes() / 1e9:.1f} GB of memory left")

    return tell


def run(options: argparse.Namespace, changes: dict[str, dict[str, str]]) -> dict[str, Any]:
    streams, workers = options.streams, options.workers or workers_for(options.streams)
    topics, clients = max(1, streams // STREAMS_PER_TOPIC), math.ceil(streams / PER_CLIENT)
    found: dict[str, Any] = {
        "date": probe.now(), "command": " ".join(["python", "ops/bench/million.py", *sys.argv[1:]]),
        "machine": probe.machine(), "streams": streams, "workers": workers, "clients": clients, "topics": topics,
        "heartbeat": options.heartbeat, "kernel": changes}
    service = Pushsvc(workers=workers, settings={"PUSHSVC_HEARTBEAT_SECONDS": str(options.heartbeat)})
    kernel_before, available = probe.kernel_memory(), probe.available_bytes()
    say_progress(f"{workers} workers start")
    with running(service) as pids:
        service.wait_for_workers(workers * 10.0)
        with Fleet(clients, watch=watch_memory) as fleet:
            pids = service.pids()
            found["memory_at_start"] = {"workers": probe.pss_bytes(pids), "clients": probe.pss_bytes(fleet.pids)}
            found |= _open(service, fleet, streams, topics)
            found["idle_cpu"] = _idle_cpu(pids)
            found["broadcast"] = _broadcast(service, fleet)
            found["singles"] = _singles(service, fleet, streams, topics)
            say_progress("memory is added up")
            found["memory"] = _memory(pids, fleet, kernel_before, available)
            found["open"] = fleet.stats().open
            found["told_by_metrics"] = service.metrics()["pushsvc_streams"]
            say_progress("the clients hang up")
    return found


def _open(service: Pushsvc, fleet: Fleet, streams: int, topics: int) -> dict[str, Any]:
    target = Target(HOST, service.port, "/events?topic=all&topic=user-{}", modulo=topics, again=True)
    begun, cpu = time.monotonic(), probe.cpu_seconds(service.pids())
    seen = fleet.open(streams, target, progress=progress(streams), seconds=120 + streams / SLOWEST_PER_SECOND)
    until = time.monotonic() + SETTLE_SECONDS
    while seen.open < streams and time.monotonic() < until:  # those that were refused come back
        time.sleep(0.5)
        seen = fleet.stats()
    took = time.monotonic() - begun
    say_progress(f"{seen.open:,} streams are open after {took:.0f} s")
    return {"open_seconds": round(took, 1), "failed": seen.failed, "refused": seen.ended,
            "connect_us": round((probe.cpu_seconds(service.pids()) - cpu) / streams * 1e6, 1)}


def _idle_cpu(pids: Sequence[int]) -> float:
    before = probe.cpu_seconds(pids)
    time.sleep(IDLE_SECONDS)
    return round((probe.cpu_seconds(pids) - before) / IDLE_SECONDS, 3)


def _broadcast(service: Pushsvc, fleet: Fleet) -> dict[str, Any]:
    """One event to all of them, some times: the one with the median time until the last stream has it."""
    rounds = []
    for number in range(BROADCASTS):
        fleet.reset()
        publisher, cpu = service.publisher(), probe.cpu_seconds(service.pids())
        begun = time.monotonic_ns()
        service.publish(publisher, "all", mark(1))
        seen = fleet.wait(1, BROADCAST_SECONDS)
        publisher.close()
        took = (seen.last_at - begun) / 1e9
        spent = probe.cpu_seconds(service.pids()) - cpu
        say_progress(f"broadcast {number + 1}: {seen.events:,} streams have it after {took:.2f} s")
        rounds.append({"events": seen.events, "disorder": seen.disorder, "seconds": round(took, 3),
                       "event_us": round(spent / max(1, seen.events) * 1e6, 2)} | seen.latencies())
    seconds = [each["seconds"] for each in rounds]
    middle = rounds[seconds.index(statistics.median_low(seconds))]
    return middle | {"all_seconds": seconds}


def _singles(service: Pushsvc, fleet: Fleet, streams: int, topics: int) -> dict[str, Any]:
    fleet.reset()
    count = min(SINGLES, topics)
    chosen = [number * topics // count for number in range(count)]
    wanted = sum(len(range(topic, streams, topics)) for topic in chosen)
    publishers = [service.publisher() for _ in range(CONNECTIONS)]
    begun = time.monotonic_ns()

    def request(number: int, at: float) -> bytes:
        return service.request(f"user-{chosen[number % count]}", [mark(1, 1, at)])

    late = pace(publishers, SINGLES_PER_SECOND, count / SINGLES_PER_SECOND, [request])
    seen = _wait_for(fleet, wanted)
    _close(publishers)
    say_progress(f"{count:,} events to one topic each: {seen.events:,} deliveries")
    found = {"events": count, "wanted": wanted, "deliveries": seen.events, "disorder": seen.disorder,
             "per_second": SINGLES_PER_SECOND, "seconds": round((seen.last_at - begun) / 1e9, 3),
             "publisher_late_ms": round(late * 1000, 1)}
    return found | seen.latencies()


def _close(publishers: Sequence[Publisher]) -> None:
    for publisher in publishers:
        publisher.close()


def _wait_for(fleet: Fleet, events: int) -> Seen:
    until = time.monotonic() + SETTLE_SECONDS
    while (seen := fleet.stats()).events < events and time.monotonic() < until:
        time.sleep(0.2)
    return seen


def _memory(pids: Sequence[int], fleet: Fleet, before: dict[str, int], available: int) -> dict[str, int]:
    now = probe.kernel_memory()
    return {"workers": probe.pss_bytes(pids), "clients": probe.pss_bytes(fleet.pids),
            "kernel_slab_growth": now["slab_bytes"] - before["slab_bytes"], "kernel_tcp_buffers": now["tcp_buffer_bytes"],
            "all_that_the_machine_has_less": available - probe.available_bytes()}


def text(found: dict[str, Any]) -> str:
    facts = [["streams", f"{found['open']:,} of {found['streams']:,} open"],
             ["opened in", f"{found['open_seconds']:,.0f} s, {found['connect_us']:,.0f} us of the workers' CPU each, "
              f"{found['refused']:,} told to come back, {found['failed']:,} failed"],
             ["workers", f"{found['workers']}, {found['idle_cpu']:.2f} cores when idle"],
             ["kernel", "; ".join(report.million_kernel(found))]]
    tables = [report.plain(rows(found)) for rows in (report.million_target_rows, report.million_latencies,
                                                     report.million_memory)]
    return "\n\n".join(["\n".join(f"{name:11}{value}" for name, value in facts), *tables])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python ops/bench/million.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=MILLION, help="default %(default)s; a tenth is a good first try")
    parser.add_argument("--workers", type=int, default=0, help="instead of what the descriptors demand")
    parser.add_argument("--heartbeat", type=float, default=45, help="seconds of silence before one (default %(default)s)")
    parser.add_argument("--docs", type=Path, help="where bench/million.json and BENCHMARKS.md are written (default docs "
                        "from a million streams on; else nowhere)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of text")
    options = parser.parse_args(arguments)
    if options.docs is None and options.streams >= MILLION:
        options.docs = ROOT / "docs"
    try:
        watch_memory()
        with kernel.raised(kernel.wanted(options.streams), say_progress) as changes:
            found = run(options, changes)
    except (NotHere, kernel.KernelError, ServerError) as error:
        print(error, file=sys.stderr)
        return 2
    except (FleetError, PublishError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if options.json else text(found))
    if options.docs:
        report.keep(options.docs, report.MILLION, found)
    return 0 if all(each["met"] for each in report.million_targets(found)) else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
