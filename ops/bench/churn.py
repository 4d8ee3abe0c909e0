#!/usr/bin/env python3
"""Connects and disconnects in waves, then looks whether anything is left in the workers of pushsvc.

Every other wave is hung up on by a reset. Before (after some waves to warm up) and after it are compared: what `/metrics`
says of streams, subscriptions and topics; descriptors in /proc; greenlets, subscriptions and sockets among the objects
of each worker; memory.

Exit codes: 0 nothing is left; 1 something is, or not all streams opened; 2 the service did not start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import probe
import report
from fleet import Fleet, FleetError, say_progress
from fleet import run as run_program
from servers import APPS, HOST, ROOT, Pushsvc, ServerError, running
from swarm import Target

CLIENTS = 4
TOPICS = 1000
GAUGES = ("pushsvc_streams", "pushsvc_subscriptions", "pushsvc_topics", "pushsvc_queue_depth")
EMPTY_SECONDS = 60.0
SETTLE_SECONDS = 18.0  # closed streams leave the wheel with their next heartbeat, after 15; kept connections after 5
COUNT_SECONDS = 30.0
GROWTH_PER_WORKER = 8 << 20  # bytes: what the allocator may keep
MEMORY = "memory_bytes"


class Churn:
    """Waves of streams to a service that runs."""

    def __init__(self, service: Pushsvc, fleet: Fleet) -> None:
        self.service = service
        self.fleet = fleet
        self.missing = 0

    def wave(self, count: int, abort: bool) -> None:
        target = Target(HOST, self.service.port, "/events?topic=wave-{}&topic=all", modulo=TOPICS)
        before = self.fleet.stats()
        seen = self.fleet.open(count, target)
        self.missing += count - seen.open + seen.ended - before.ended
        self.fleet.close(abort)

    def warm(self, count: int) -> None:
        """Waves until the wheel holds as many closed streams as it ever will: what is allocated once is allocated."""
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until:
            self.wave(count, abort=False)

    def left(self) -> dict[str, int]:
        """What the workers hold, when the streams have gone."""
        until = time.monotonic() + EMPTY_SECONDS
        while self.service.metrics()["pushsvc_streams"] and time.monotonic() < until:
            time.sleep(0.5)
        time.sleep(SETTLE_SECONDS)
        pids = self.service.worker_pids()
        descriptors, memory = sum(map(probe.descriptors, pids)), probe.own_bytes(pids)
        objects = sum(map(_objects, pids, [self.service.folder] * len(pids)), Counter())
        metrics = self.service.metrics()
        return {"descriptors": descriptors, **{name: int(metrics[name]) for name in GAUGES},
                **{f"{name}_objects": count for name, count in objects.items()}, MEMORY: memory}


def _objects(pid: int, folder: Path) -> Counter[str]:
    """The worker's own count of what it holds: apps/counted.conf.py is its configuration."""
    file = folder / f"counts-{pid}.json"
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    until = time.monotonic() + COUNT_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            raise ServerError(f"worker {pid} does not count")
        time.sleep(0.05)
    return Counter(json.loads(file.read_text()))


def run(total: int, wave: int, workers: int) -> dict[str, Any]:
    service = Pushsvc(workers=workers, configuration=APPS / "counted.conf.py")
    with running(service), Fleet(CLIENTS) as fleet:
        service.wait_for_workers(60.0)
        churn = Churn(service, fleet)
        churn.warm(wave)
        before, begun = churn.left(), time.monotonic()
        cpu = probe.cpu_seconds(service.worker_pids())
        for number, first in enumerate(range(0, total, wave)):
            churn.wave(min(wave, total - first), abort=number % 2 == 1)
            say_progress(f"  {min(first + wave, total):,} of {total:,}, {first / (time.monotonic() - begun):,.0f}/s")
        took, spent = time.monotonic() - begun, probe.cpu_seconds(service.worker_pids()) - cpu
        after = churn.left()
    found = {"total": total, "wave": wave, "workers": workers, "seconds": round(took, 1), "missing": churn.missing,
             "cpu_us": round(spent / total * 1e6, 1), "before": before, "after": after}
    return found | _judged(found)


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    before, after = found["before"], found["after"]
    more = [name for name in before if name != MEMORY and after[name] > before[name]]
    growth = after[MEMORY] - before[MEMORY]
    if growth > GROWTH_PER_WORKER * found["workers"]:
        more.append(MEMORY)
    verdict = f"Left behind: {', '.join(more)}." if more else "Nothing is left behind."
    if found["missing"]:
        verdict += f" {found['missing']:,} streams did not open or did not stay."
    verdict += f" Memory grew by {growth / 1e6:.1f} MB in {found['workers']} workers."
    return {"left": more, "memory_growth_bytes": growth, "verdict": verdict}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python ops/bench/churn.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=100_000, help="connects in all (default %(default)s)")
    parser.add_argument("--wave", type=int, default=10_000, help="streams of one wave (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="default %(default)s")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where bench/churn.json and BENCHMARKS.md go")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of text")
    options = parser.parse_args(arguments)
    try:
        found = {"date": probe.now(), "command": " ".join(["python", "ops/bench/churn.py", *sys.argv[1:]]),
                 **run(options.total, options.wave, options.workers)}
    except (ServerError, FleetError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else f"{report.plain(report.churn_rows(found))}\n\n"
          f"{found['total']:,} in {found['seconds']:,.0f} s. {found['verdict']}")
    report.keep(options.docs, report.CHURN, found)
    return 1 if found["left"] or found["missing"] else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
