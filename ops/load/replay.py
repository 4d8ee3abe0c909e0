"""A replay: a shape as real streams and real events against a server, and what became of them."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import probe
from fleet import PER_PROCESS, percentile_ms, sources
from swarm import BUCKETS_PER_E
from terminal import Progress

from load.crew import Crew, CrewError, Member
from load.figures import figures, peak
from load.interrupt import Interrupt
from load.shape import Shape, expanded, read_shape
from load.watch import Watch

FORMAT = 1
LEAD_SECONDS = 0.5  # until all processes have been told when to begin
LOOK_SECONDS = 1.0
PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
Found = dict[str, Any]
Times = list[float | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to replay, and where. spread: see `expanded`. breaks: after how many seconds, on average, each stream is
    broken and resumed; 0: never. processes: of readers. settle: how long the last events and streams may take, seconds.
    sources: addresses of this machine that the streams come from, separated by commas; "": see `fleet.sources`."""

    shape: Path
    host: str
    port: int
    form: str = "pushsvc"
    token: str = ""
    label: str = ""
    speed: float = 1.0
    times: int = 1
    spread: float = 0.1
    breaks: float = 0.0
    processes: int = 2
    settle: float = 15.0
    sources: str = ""


@dataclass(slots=True)
class Second:
    """One second of a replay. server_cpu: cores in use; server_memory: bytes; None if nobody looked. latency: bucket ->
    events."""

    open: int = 0
    opened: int = 0
    published: int = 0
    received: int = 0
    server_cpu: float | None = None
    server_memory: int | None = None
    latency: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class Log:
    """What the crew has told. late: how late the sender and the readers were at worst, seconds. sent, acknowledgements:
    when each event was; sent is None as long as there is more to send. interrupted: after how many seconds; None: not."""

    seconds: list[Second] = field(default_factory=list)
    latency: Counter[int] = field(default_factory=Counter)
    acknowledged: Counter[int] = field(default_factory=Counter)
    opening: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    late: dict[str, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    verdicts: list[dict[str, int]] = field(default_factory=list)
    server_cpu: float = 0.0
    sent: Times | None = None
    interrupted: float | None = None
    acknowledgements: Times = field(default_factory=list)

    def at(self, seconds: float) -> Second:
        while len(self.seconds) <= int(seconds):
            self.seconds.append(Second(open=sum(self.open.values())))
        return self.seconds[int(seconds)]

    def take(self, member: Member, answer: Found) -> None:
        if "tick" in answer:
            self._take_tick(member, answer["tick"], self.at(answer["second"]))
        elif "sent" in answer:
            self.sent, self.acknowledgements = answer["sent"], answer["acknowledged"]
        elif "verdict" in answer:
            self.verdicts.append(answer["verdict"])

    def _take_tick(self, member: Member, tick: Found, second: Second) -> None:
        self.cpu[member.pid] = tick["cpu"]
        self.late[member.role] = max(self.late.get(member.role, 0.0), tick["late"])
        self.errors.update(tick["errors"])
        for name in ("published", "received", "opened"):
            setattr(second, name, getattr(second, name) + tick.get(name, 0))
        self.totals.update({name: tick.get(name, 0) for name in ("published", "received", "opened", "resumed", "gaps",
                                                                 "bytes")})
        for mine, its in ((self.latency, "latency"), (self.acknowledged, "acknowledged"), (self.opening, "opening"),
                          (second.latency, "latency")):
            mine.update({int(bucket): count for bucket, count in tick.get(its, {}).items()})
        if "open" in tick:
            self.open[member.pid] = tick["open"]
            second.open = sum(self.open.values())


def replay(plan: Plan, pids: list[int], progress: Progress, about: Found | None = None) -> Found:
    """Run it; what was found, as the report takes it. pids: the server's, if it runs here. about: what else is to stand
    in the report (versions). A Ctrl-C ends it early: then `interrupted` says after how many seconds. Raises ShapeError,
    CrewError."""
    shape = expanded(read_shape(plan.shape), plan.times, plan.speed, plan.spread)
    processes = max(plan.processes, math.ceil(peak(shape) / PER_PROCESS))
    log = Log()
    with Crew(_orders(plan, processes)) as crew:
        progress.say(f"{len(shape.streams)} streams, {len(shape.events)} events in {shape.seconds:.0f} s")
        crew.wait_ready()
        watch, client = Watch(pids), Watch([os.getpid()])
        with Interrupt() as interrupt:
            begun = time.monotonic() + LEAD_SECONDS
            for member in crew.members:
                member.tell({"begin": begun})
            _follow(crew, log, watch, shape, begun, plan.settle, progress, interrupt)
        log.cpu[0] = client.look()["cpu"]
    return _found(plan, shape, log, processes, pids, about or {})


def _orders(plan: Plan, processes: int) -> list[tuple[str, Found]]:
    order = {"shape": str(plan.shape), "times": plan.times, "speed": plan.speed, "spread": plan.spread,
             "form": plan.form, "token": plan.token, "host": plan.host, "port": plan.port,
             "prefix": f"load-{os.getpid()}-{time.time_ns() // 1_000_000:x}-", "breaks": plan.breaks, "places": processes}
    readers = [order | {"place": place, "source": plan.sources or sources(plan.host, place)}
               for place in range(processes)]
    return [("sender", order), *(("readers", each) for each in readers)]


def _follow(crew: Crew, log: Log, watch: Watch, shape: Shape, begun: float, settle: float, progress: Progress,
            interrupt: Interrupt) -> None:
    """Take what the crew tells, once a second look at the server, and ask for the verdict when all has been sent, or when
    it is interrupted."""
    readers, asked = crew.of("readers"), False
    while len(log.verdicts) < len(readers):
        for member, answer in crew.said(LOOK_SECONDS):
            log.take(member, answer)
        now = time.monotonic() - begun
        look = watch.look()
        if now < 0:
            continue
        log.server_cpu += look["cpu"]
        if watch.pids:
            second = log.at(now)
            second.server_cpu, second.server_memory = round(look["cores"], 3), int(look["memory"])
        progress.show(_line(log, now, shape), now, shape.seconds)
        if interrupt.asked and log.interrupted is None:
            log.interrupted = round(now, 1)
            progress.say(f"broken off after {now:.0f} of {shape.seconds:.0f} s: what was sent is verified, then the "
                         "streams end; a second Ctrl-C ends them at once")
            _stop_sending(crew)
        if log.sent is not None and not asked and (now >= shape.seconds or interrupt.asked):
            asked = True
            for member in readers:
                member.tell({"sent": log.sent, "acknowledged": log.acknowledgements, "by": now + settle})


def _stop_sending(crew: Crew) -> None:
    for member in crew.of("sender"):
        if not member.done:
            with suppress(CrewError):  # it has just ended by itself, or died: what it has said last tells
                member.tell({"stop": True})


def _line(log: Log, now: float, shape: Shape) -> str:
    second = log.at(max(0.0, now - 2))  # of which all have told
    return (f"{now:5.0f} of {shape.seconds:.0f} s  {sum(log.open.values())} streams  {second.published} events/s  "
            f"{second.received} deliveries/s  p99 {percentile_ms(second.latency, 0.99)} ms  "
            f"errors {sum(log.errors.values())}")


def _found(plan: Plan, shape: Shape, log: Log, processes: int, pids: list[int], about: Found) -> Found:
    wrong = Counter[str]()
    for verdict in log.verdicts:
        wrong.update(verdict)
    failed = sum(at is None and sent is not None for sent, at in zip(log.sent or (), log.acknowledgements, strict=True))
    totals = {"streams": len(shape.streams), "events": len(shape.events), **log.totals, "failed": failed}
    return {
        "load": FORMAT, "kind": "replay", "label": plan.label or plan.form, "at": probe.now(), "machine": probe.machine(),
        "interrupted": log.interrupted,
        "settings": {"shape": plan.shape.name, "server": plan.form, "speed": plan.speed, "times": plan.times,
                     "spread": plan.spread, "breaks": plan.breaks, "readers": processes, "settle": plan.settle,
                     "sources": plan.sources},
        "about": about, "shape": figures(shape), "totals": totals, "wrong": dict(wrong),
        "verdict": verdict_of(wrong, totals), "errors": dict(log.errors.most_common()),
        "latency": percentiles(log.latency), "acknowledged": percentiles(log.acknowledged),
        "opening": percentiles(log.opening), "histogram": _histogram(log.latency),
        "late_ms": {role: round(seconds * 1000, 1) for role, seconds in log.late.items()},
        "client_cpu_seconds": round(sum(log.cpu.values()), 2),
        "server_cpu_seconds": round(log.server_cpu, 2) if pids else None,
        "seconds": [_second(number, second) for number, second in enumerate(log.seconds)]}


def verdict_of(wrong: Counter[str], totals: Found) -> dict[str, bool]:
    """complete: every stream opened, and got every event that was acknowledged. ordered: each once, in order, and none of
    others."""
    return {"complete": not any(wrong[name] for name in ("unopened", "lost", "overdue")) and totals["received"] > 0,
            "ordered": not any(wrong[name] for name in ("doubled", "reordered", "stray", "stale")),
            "published": totals["failed"] == 0}


def percentiles(latency: Counter[int]) -> dict[str, float | None]:
    return {name: percentile_ms(latency, part) for name, part in PERCENTILES.items()}


def _histogram(latency: Counter[int]) -> list[tuple[float, int]]:
    """Upper ends in ms, doubling, and how many events are under each and over the one before."""
    found = Counter[int]()
    for bucket, count in latency.items():
        found[max(0, math.ceil(math.log2(math.exp((bucket + 1) / BUCKETS_PER_E) / 125)))] += count
    return [(0.125 * 2**place, found[place]) for place in range(max(found, default=-1) + 1)]


def _second(number: int, second: Second) -> Found:
    return {"at": number, "open": second.open, "opened": second.opened, "published": second.published,
            "received": second.received, "p50_ms": percentile_ms(second.latency, 0.5),
            "p99_ms": percentile_ms(second.latency, 0.99), "max_ms": percentile_ms(second.latency, 1.0),
            "server_cpu": second.server_cpu, "server_memory": second.server_memory}
