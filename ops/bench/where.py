#!/usr/bin/env python3
"""Where the processor time of a pushsvc worker goes: a sampling profile of what compare.py measures.

  connect   while streams open
  event     while one event at a time goes to all of them
  mixed     while a topic with all but one of them gets 20 events/s, and a topic with one stream as many

Time in C (system calls, gevent's loop, the JSON and HTTP parsers) is counted for the Python function that called it.
Exit codes: 0 done, 2 the service or the load did not work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleet import Fleet, FleetError, run, say_progress
from measures import PACERS, TOPIC, Cores, Load, MeasureError, Rig, event_of, one_by_one, rigged
from publisher import PublishError, pace
from servers import APPS, Pushsvc, ServerError

WRITTEN_SECONDS = 20.0
UNITS = {"connect": "per connect", "event": "per delivered event", "mixed": "per event of each topic"}


@contextmanager
def sampled(rig: Rig, folder: Path, found: dict[str, Any]) -> Iterator[None]:
    """The worker's profile of what happens in the block."""
    worker, before = rig.pids[1], rig.cpu()
    os.kill(worker, signal.SIGUSR2)
    yield
    spent = rig.cpu() - before
    os.kill(worker, signal.SIGUSR2)
    file, until = folder / f"profile-{worker}.json", time.monotonic() + WRITTEN_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            raise ServerError("the worker wrote no profile")
        time.sleep(0.05)
    found |= json.loads(file.read_text()) | {"cpu_seconds": spent}


def connect(rig: Rig, load: Load, cores: Cores, found: dict[str, Any]) -> int:
    with sampled(rig, rig.server.folder, found):
        rig.open(load.streams)
    return load.streams


def event(rig: Rig, load: Load, cores: Cores, found: dict[str, Any]) -> int:
    rig.open(load.streams)
    publisher = rig.server.publisher()
    with sampled(rig, rig.server.folder, found):
        seen = one_by_one(rig, publisher, load.events)
    publisher.close()
    return seen.events


def mixed(rig: Rig, load: Load, cores: Cores, found: dict[str, Any]) -> int:
    rig.open(load.streams - 1)
    publishers = [rig.server.publisher() for _ in range(PACERS)]
    requests = [event_of(rig.server, TOPIC), event_of(rig.server, "single")]
    with Fleet(1, cores.client) as single:
        single.open(1, rig.target("single"))
        with sampled(rig, rig.server.folder, found):
            pace(publishers, load.mixed_rate, load.mixed_seconds, requests)
        say_progress(f"  the topic with one stream: {single.stats().latencies()}")
    for publisher in publishers:
        publisher.close()
    return int(load.mixed_rate * load.mixed_seconds)


Phase = Callable[[Rig, Load, Cores, dict[str, Any]], int]
PHASES: dict[str, Phase] = {"connect": connect, "event": event, "mixed": mixed}


def table(counts: Sequence[tuple[str, int]], samples: int, unit_us: float, rows: int) -> str:
    shares = [(place, count / samples) for place, count in counts[:rows]]
    return "\n".join(f"{share:7.1%} {share * unit_us:9.2f} us  {place}" for place, share in shares)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python ops/bench/where.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--streams", type=int, default=Load().streams, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=30, help="of each table (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="the samples as JSON instead of text")
    options = parser.parse_args(arguments)
    load, cores, found = Load(streams=options.streams), Cores.apart(), dict[str, Any]()
    try:
        with rigged(Pushsvc(configuration=APPS / "profiled.conf.py"), cores, load.streams, say_progress) as rig:
            rig.warm(load.warm_streams)
            units = PHASES[options.phase](rig, load, cores, found)
    except (ServerError, FleetError, MeasureError, PublishError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"phase": options.phase, "units": units, **found}, indent=1))
        return 0
    unit_us = found["cpu_seconds"] / units * 1e6
    print(f"{options.phase}: {unit_us:.1f} us, {found['samples']} samples; {UNITS[options.phase]}")
    for title, name in (("in the function itself", "own"), ("in it and what it calls", "within")):
        print(f"\n{title}\n{table(found[name], found['samples'], unit_us, options.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
