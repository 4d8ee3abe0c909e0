"""The ramp: more streams, or more events a second, step by step, until an objective breaks; and which limit it was."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import probe
from fleet import PER_PROCESS, Fleet, Seen
from publisher import Publisher, PublishError, mark, pace
from swarm import Target, authority
from terminal import Progress

from load.metrics import FRESH_SECONDS, metrics_said, values
from load.shape import Event
from load.targets import Form
from load.watch import Watch, descriptors_left, kernel_counters

PUBLISHERS = 16
ARRIVE_SECONDS = 5.0
ENDED_SECONDS = 0.5
OPEN_SECONDS = 120.0
FEW_DESCRIPTORS = 64
BUSY = 0.9  # of a core
ALL_BUSY = 0.95  # of all cores
LITTLE_MEMORY = 0.05  # of all
LEAST_AVAILABLE = 1 << 30  # bytes; below this the ramp stops, whatever was asked for
UNSEEN = "no limit was met that can be seen from here"
FIRST = f"{UNSEEN}: even the first step breaks the objective; a smaller --step or a higher objective tells more"
SLOW, GONE = "slow", "gone"  # reasons of pushsvc_evicted_total; a client that has gone has ended its stream itself
STREAMS, RATE = "streams", "rate"
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Climb:
    """What is raised, and what is kept. raise_: streams or rate (events a second, over all topics). step: how much
    more at each level, from `step` to `most`. hold: seconds of events at each. p99_ms, errors: the objective.
    sources: addresses of this machine that the streams come from, separated by commas; "": see `fleet.sources`. Raises
    ValueError for a climb that would measure nothing."""

    raise_: str
    step: int
    most: int
    streams: int
    rate: float
    topics: int = 1
    hold: float = 5.0
    p99_ms: float = 1000.0
    errors: int = 0
    sources: str = ""

    def __post_init__(self) -> None:
        if self.step > self.most:
            raise ValueError("--step is not above --most")
        if not self.events(float(self.step) if self.raise_ == RATE else self.rate):
            raise ValueError(f"not one event for each of {self.topics} topics in {self.hold:g} s: raise --rate "
                             "(--step with --raise rate) or --hold")

    def levels(self) -> list[int]:
        return [*range(self.step, self.most, self.step), self.most]

    def events(self, rate: float) -> int:
        """How many events of each topic a level of this rate publishes."""
        return int(rate / self.topics * self.hold)


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used up to a moment, or between two. evicted, refused: streams that the server has ended, by its reason,
    and has told to come back later. answers: whether it does, at the end."""

    kernel: dict[str, int]
    evicted: dict[str, float]
    refused: float = 0.0
    answers: bool = True

    def since(self, before: Usage) -> Usage:
        return Usage({name: count - before.kernel[name] for name, count in self.kernel.items()},
                     {reason: count - before.evicted.get(reason, 0) for reason, count in self.evicted.items()},
                     max(0.0, self.refused - before.refused), self.answers)


class Ramp:
    """One ramp against one server. pids: its processes, if it runs here."""

    def __init__(self, climb: Climb, form: Form, host: str, port: int, pids: list[int], progress: Progress) -> None:
        self._climb = climb
        self._form = form
        self._host, self._port = host, port
        self._pids = pids
        self._progress = progress
        self._prefix = f"ramp-{os.getpid()}-{time.time_ns() // 1_000_000:x}-"
        self._refused = ""
        self._errors = Counter[str]()

    def run(self) -> Found:
        """All levels until the objective breaks."""
        climb = self._climb
        levels: list[Found] = []
        limits: list[str] = []
        most = climb.most if climb.raise_ == STREAMS else climb.streams
        with Fleet(math.ceil(most / PER_PROCESS)) as fleet:
            self._server, self._client = Watch(self._pids), Watch(fleet.pids)
            for level in climb.levels():
                found, limits = self._level(fleet, level)
                levels.append(found)
                self._progress.say(f"{level} {climb.raise_}: p99 {found['p99_ms']} ms, failed {found['failed']}, "
                                   f"ended {found['ended']}, lost {found['lost']}")
                if found["broken"] or limits:
                    break
                if probe.available_bytes() < LEAST_AVAILABLE:
                    limits = ["the ramp stops: the machine has less than 1 GiB of memory left"]
                    break
        return told(climb.raise_, levels, limits)

    # -- one level

    def _level(self, fleet: Fleet, level: int) -> tuple[Found, list[str]]:
        climb, before, begun, busy = self._climb, self._usage(), time.monotonic(), probe.busy_seconds()
        streams, rate = (level, climb.rate) if climb.raise_ == STREAMS else (climb.streams, float(level))
        fleet.reset()
        self._refused = ""
        opened = fleet.stats()
        if streams > opened.open:
            opened = fleet.open(streams - opened.open, self._target(), seconds=OPEN_SECONDS,
                                progress=lambda count: self._show(level, f"{count} streams open"))
        self._show(level, f"{opened.open} streams open, {rate:g} events/s for {climb.hold:g} s")
        late = self._publish(rate)
        expected = self._expected(rate, opened.open)
        seen = self._arrived(fleet, expected)
        self._errors = seen.errors
        used, client, took = self._server.look(), self._client.look(), time.monotonic() - begun
        if seen.ended:
            time.sleep(FRESH_SECONDS)
        spent = self._usage().since(before)
        found: Found = {climb.raise_: level, "open": seen.open, **seen.latencies(), "failed": seen.failed,
                        "ended": seen.ended, "lost": max(0, expected - seen.events),
                        "sender_late_ms": round(late * 1e3, 1),
                        "machine": round((probe.busy_seconds() - busy) / took / (os.cpu_count() or 1), 2),
                        "server_cores": round(used["cpu"] / took, 2), "busiest": round(used["busiest"] / took, 2),
                        "client_busiest": round(client["busiest"] / took, 2), "server_memory": int(used["memory"]),
                        "publish": self._refused}
        found["broken"] = broken(found, climb)
        return found, limits_of(found, spent, dict(self._errors), descriptors_left(self._pids), memory_left(),
                                bool(found["broken"]))

    def _show(self, level: int, text: str) -> None:
        climb = self._climb
        self._progress.hint(f"{level} of {climb.most} {climb.raise_}: {text}", level - climb.step, climb.most)

    def _usage(self) -> Usage:
        said = metrics_said(self._host, self._port, self._form.token)
        return Usage(kernel_counters(), values(said or "", "pushsvc_evicted_total"),
                     sum(values(said or "", "pushsvc_streams_refused_total").values()), said is not None)

    def _target(self) -> Target:
        path = self._form.path([f"{self._prefix}TOPIC"]).replace("TOPIC", "{}")
        return Target(self._host, self._port, path, self._climb.sources, self._climb.topics, token=self._form.token)

    def _publish(self, rate: float) -> float:
        """Events for the time of a level; by how many seconds the latest was sent late."""
        try:
            publishers = [Publisher(self._host, self._port) for _ in range(PUBLISHERS)]
        except OSError as error:
            self._refused = f"no connection for a publisher: {error.strerror}"
            return 0.0
        try:
            return pace(publishers, rate / self._climb.topics, self._climb.hold,
                        [partial(self._request, topic) for topic in range(self._climb.topics)])
        except (OSError, PublishError) as error:
            self._refused = str(error)[:200]
            return 0.0
        finally:
            for publisher in publishers:
                publisher.close()

    def _request(self, topic: int, number: int, at: float) -> bytes:
        return self._form.publish(authority(self._host, self._port), [f"{self._prefix}{topic}"], mark(number, 0, at),
                                  Event(0.0, (topic,), 100))

    def _expected(self, rate: float, streams: int) -> int:
        return self._climb.events(rate) * streams

    def _arrived(self, fleet: Fleet, expected: int) -> Seen:
        deadline = time.monotonic() + ARRIVE_SECONDS
        while (seen := fleet.stats()).events < expected and time.monotonic() < deadline:
            if seen.ended:  # they will not all come
                deadline = min(deadline, time.monotonic() + ENDED_SECONDS)
            time.sleep(0.1)
        return seen


def told(raised: str, levels: list[Found], limits: list[str]) -> Found:
    """The result of these levels, the last of which may be broken. limits: what that one has met."""
    last = levels[-1]
    held = max((level[raised] for level in levels if not level["broken"]), default=0)
    text = f"holds at {held} {raised}"
    if last["broken"]:
        text += f", breaks at {last[raised]}: {last['broken']}"
    if not held:
        text = (f"holds at none: the first step, {last[raised]} {raised}, breaks the objective already: {last['broken']} "
                f"(measured: p50 {last['p50_ms']} ms, p99 {last['p99_ms']} ms, longest {last['max_ms']} ms)")
        limits = [FIRST if limit == UNSEEN else limit for limit in limits]
    return {"kind": "ramp", "levels": levels, "limits": limits, "broken": bool(last["broken"]), "held": held,
            "verdict_text": text}


def broken(found: Found, climb: Climb) -> str:
    """What of the objective a level breaks; "" for nothing."""
    if found["publish"]:
        return f"a publish failed: {found['publish']}"
    wrong = found["failed"] + found["ended"] + found["lost"]
    if wrong > climb.errors:
        return f"{found['failed']} streams failed to open, {found['ended']} were ended, {found['lost']} deliveries lost"
    if found["p99_ms"] is not None and found["p99_ms"] > climb.p99_ms:
        return f"p99 is {found['p99_ms']:g} ms, above {climb.p99_ms:g} ms"
    return ""


def limits_of(found: Found, spent: Usage, errors: dict[str, int], descriptors: int | None, memory: float,
              is_broken: bool) -> list[str]:
    """Which limits a broken level has met; empty if it is not broken. spent: between its beginning and its end."""
    if not is_broken:
        return []
    limits = []
    if errors.get("EADDRNOTAVAIL"):
        limits.append(f"the client's ports: {errors['EADDRNOTAVAIL']} connects found none free (EADDRNOTAVAIL)")
    if errors.get("EMFILE"):
        limits.append(f"the client's descriptors: {errors['EMFILE']} connects found none (EMFILE)")
    overflows = spent.kernel.get("TcpExt.ListenOverflows", 0)
    if overflows:
        limits.append(f"the accept queue: {overflows} connections found it full (backlog, net.core.somaxconn)")
    if queue := spent.kernel.get("TcpExt.TCPReqQFullDrop", 0) + spent.kernel.get("TcpExt.TCPReqQFullDoCookies", 0):
        limits.append(f"the SYN queue: {queue} found it full (net.ipv4.tcp_max_syn_backlog)")
    if descriptors is not None and descriptors < FEW_DESCRIPTORS:
        limits.append(f"the server's descriptors: a process has {descriptors} left (ulimit -n)")
    limits += _ended(found["ended"], spent)
    if statuses := sum(count for error, count in errors.items() if error.startswith("status")):
        limits.append(f"the server refused {statuses} streams: {', '.join(sorted(errors))}")
    if errors.get("ECONNREFUSED") or errors.get("ECONNRESET"):
        limits.append("the server refused or reset connections")
    return limits + _busy(found, spent, memory) or [UNSEEN]


def _ended(ended: int, spent: Usage) -> list[str]:
    """Why so many streams have ended, as far as the server says it."""
    if not spent.answers:
        return ["the server no longer answers" + (f", and {ended} streams have ended" if ended else "")]
    if not ended:
        return []
    limits = []
    reasons = {reason: int(count) for reason, count in spent.evicted.items() if count > 0 and reason != GONE}
    if slow := reasons.get(SLOW):
        limits.append(f"slow clients: the server has ended {slow} streams as slow")
    if refused := int(spent.refused):
        limits.append(f"the server's own bound: it has told {refused} streams to come back later (max_streams, "
                      "descriptors or memory)")
    limits += [f"the server has ended {count} streams: {reason}" for reason, count in reasons.items() if reason != SLOW]
    if (unsaid := ended - refused - sum(reasons.values())) > 0:
        limits.append(f"the server ended {unsaid} streams and does not say why")
    return limits


def _busy(found: Found, spent: Usage, memory: float) -> list[str]:
    limits = []
    if found["busiest"] >= BUSY:
        limits.append(f"the server's processor: one of its processes used {found['busiest']:.0%} of a core")
    if found["client_busiest"] >= BUSY:
        limits.append(f"the client's own processor: one of its processes used {found['client_busiest']:.0%} of a core")
    if found["machine"] >= ALL_BUSY:
        limits.append(f"the machine's processors: {found['machine']:.0%} busy, the server with "
                      f"{found['server_cores']:g} cores of it")
    if memory < LITTLE_MEMORY:
        limits.append(f"memory: {memory:.0%} of the machine's is left")
    if spent.kernel.get("TcpExt.TCPMemoryPressures") or spent.kernel.get("TcpExt.TCPAbortOnMemory"):
        limits.append("memory of the kernel's TCP (net.ipv4.tcp_mem)")
    return limits


def memory_left() -> float:
    """The part of the machine's memory that is available."""
    return probe.available_bytes() / (probe.machine()["memory_gib"] * (1 << 30))


