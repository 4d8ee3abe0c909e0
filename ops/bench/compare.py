#!/usr/bin/env python3
"""Servers of event streams side by side on this machine, under the same load, in one run.

Per round, server after server:
  one topic   memory per idle stream, CPU per connect, CPU per delivered event, latency of one event at a time
  flat out    deliveries per second to 1,000 streams when publishers send as fast as they are answered
  and for pushsvc
  many topics memory per idle stream when each has a topic of its own
  mixed       latency of a topic with one stream, beside a busy topic with all the others on the same worker

The medians over the rounds go into docs/bench/results.json (written anew after each measurement), and from there into
docs/BENCHMARKS.md and its pictures. Servers that cannot be had here are skipped, with the reason.

Exit codes: 0 measured; 1 a server did not do what was measured, or (with --strict) a target was missed; 2 wrong options;
130 broken off (what was measured until then is in results.json).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import build
import measures
import probe
import report
from fleet import FleetError, run, say_progress
from measures import Cores, Load, MeasureError
from publisher import PublishError
from servers import ALL, ROOT, Server, ServerError

QUICK = Load(streams=2000, events=10, flat_seconds=3, mixed_seconds=4)
QUIET = 0.15  # cores in use by others at which the machine counts as quiet
OURS = "pushsvc"
TROUBLES = (MeasureError, FleetError, PublishError, ServerError, build.BuildError, OSError, subprocess.SubprocessError)
Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement of one server."""

    server: Server
    measure: Measure

    @property
    def name(self) -> str:
        return f"{self.server.name}, {self.measure.__name__.replace('_', ' ')}"


class Comparison:
    """The results, as they come in. file: where they are kept meanwhile, or None."""

    def __init__(self, options: argparse.Namespace, load: Load, file: Path | None) -> None:
        self.load = load
        self.cores = Cores() if options.no_pin else Cores.apart()
        self.patience = options.patience
        self._file = file
        self.results: dict[str, Any] = {
            "command": " ".join(["python", "ops/bench/compare.py", *sys.argv[1:]]), "date": probe.now(),
            "machine": probe.machine(), "pinned": self.cores.server is not None, "rounds": options.rounds,
            "load": asdict(load), "servers": {}}

    def admit(self, server: Server) -> bool:
        """Whether it can be had here. Builds or fetches it if need be."""
        say_progress(f"{server.name}: looking for it")
        entry = self.results["servers"][server.name] = {"title": server.title, "rounds": [], "troubles": []}
        try:
            entry["version"] = server.version()
            server.command(Path(self._scratch()))
        except build.BuildError as error:
            entry["skipped"] = str(error)
            say_progress(f"{server.name}: skipped, {error}")
        self.save()
        return "skipped" not in entry

    def take(self, number: int, step: Step) -> None:
        """Make one measurement and note what it found, or why it found nothing."""
        _wait_for_quiet(self.patience)
        entry = self.results["servers"][step.server.name]
        begun, busy, own = time.monotonic(), probe.busy_seconds(), probe.own_seconds()
        try:
            found = step.measure(step.server, self.load, self.cores, lambda text: say_progress(f"  {text}"))
        except TROUBLES as error:
            say_progress(f"{step.name}: {error}")
            entry["troubles"].append(f"round {number}, {step.measure.__name__}: {error}".splitlines()[0])
            found = {}
        others = probe.busy_seconds() - busy - (probe.own_seconds() - own)
        found[f"{step.measure.__name__}_others_cpu"] = max(0.0, others / (time.monotonic() - begun))
        rounds = entry["rounds"]
        if len(rounds) < number:
            rounds.append({})
        rounds[-1] |= {name: _rounded(value) for name, value in found.items()}
        entry["median"] = _medians(rounds)
        self.save()

    def save(self) -> None:
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.results, indent=1) + "\n")

    def _scratch(self) -> str:
        folder = build.DEFAULT_CACHE / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in rounds for name in each)
    return {name: _rounded(statistics.median(each[name] for each in rounds if each.get(name) is not None))
            for name in names if any(each.get(name) is not None for each in rounds)}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if value >= 1000 else float(f"{value:.4g}")


def _wait_for_quiet(seconds: float) -> None:
    """Others may use the machine, too: wait until they pause, but not for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        busy, own, begun = probe.busy_seconds(), probe.own_seconds(), time.monotonic()
        time.sleep(1.0)
        took = time.monotonic() - begun
        if (probe.busy_seconds() - busy - probe.own_seconds() + own) / took < QUIET:
            return


def steps_of(server: Server) -> list[Measure]:
    steps: list[Measure] = [measures.one_topic, measures.flat_out]
    return [*steps, measures.many_topics, measures.mixed] if server.name == OURS else steps


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python ops/bench/compare.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in ALL]
    parser.add_argument("servers", nargs="*", metavar="server", help=f"{', '.join(names)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all servers (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2,000 streams, short, one round; writes nothing to docs/")
    parser.add_argument("--streams", type=int, help="instead of 15,000")
    parser.add_argument("--no-pin", action="store_true", help="do not give the server and the client a core each")
    parser.add_argument("--patience", type=float, default=30, metavar="S",
                        help="how long to wait for a quiet machine before each measurement (default %(default)s)")
    parser.add_argument("--cache", type=Path, default=build.DEFAULT_CACHE, help="where what is built is kept")
    parser.add_argument("--docs", type=Path, help="where BENCHMARKS.md and bench/ are written (default docs)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of text")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    options = parser.parse_args(arguments)
    if unknown := set(options.servers) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: the servers are {', '.join(names)}")
    if options.quick:
        options.rounds = 1
    elif options.docs is None:
        options.docs = ROOT / "docs"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    load = QUICK if options.quick else Load()
    if options.streams:
        load = Load(**asdict(load) | {"streams": options.streams})
    comparison = Comparison(options, load, options.docs / report.RESULTS if options.docs else None)
    named = [each(options.cache) for each in ALL if each.name in (options.servers or [each.name])]
    admitted = [server for server in named if comparison.admit(server)]
    for number in range(1, options.rounds + 1):
        for step in [Step(server, measure) for server in admitted for measure in steps_of(server)]:
            say_progress(f"round {number} of {options.rounds}: {step.name}")
            comparison.take(number, step)
    results = comparison.results
    results["targets"] = report.targets(results)
    comparison.save()
    print(json.dumps(results, indent=1) if options.json else report.text(results))
    if options.docs:
        report.write(options.docs)
    troubles = any(each["troubles"] for each in results["servers"].values())
    missed = any(not each["met"] for each in results["targets"])
    return 1 if troubles or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(run(main))
