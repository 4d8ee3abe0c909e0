"""Measures what things cost: the real service on loopback, opened and published to by the clients of ops/bench.

Three starts. One worker: streams that share one topic. One worker: streams that also have a topic of their own. Two
workers: what the second one adds, streams of eight topics, heartbeats. The kernel's part is what the second half of the
streams adds, for the first finds memory that the kernel kept from before; the median of the three, for the kernel counts
what the whole machine does.
"""

from __future__ import annotations

import operator
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))  # its programs find each other by their bare names

import probe  # noqa: E402
from fleet import PER_PROCESS, FleetError, Seen  # noqa: E402
from measures import TOPIC, Cores, MeasureError, Rig, one_by_one, rigged  # noqa: E402
from publisher import DATA_BYTES, PublishError, mark  # noqa: E402
from servers import Pushsvc, ServerError  # noqa: E402

from ops.bench.terminal import Progress  # noqa: E402
from ops.plan.calibration import Calibration, Costs  # noqa: E402
from ops.plan.errors import PlanError  # noqa: E402
from ops.plan.machine import this_machine  # noqa: E402

SHARED, OWN = TOPIC, f"{TOPIC}&topic=user-{{}}"
NOBODY = "nobody-{}"
TOPICS = 8
MANY = OWN + "".join(f"&topic=user-{{}}-{number}" for number in range(2, TOPICS))
QUIET_SECONDS, HEARTBEAT_SECONDS = 3600, 1
WORKERS_SECONDS = 30.0
SETTLE_SECONDS = 0.3
ARRIVE_SECONDS = 30.0
ROUNDS = 5
LEAST_STREAMS = 100
STARTS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """How much of everything; it takes the longer, the more streams."""

    streams: int = 12_000

    @property
    def events(self) -> int:
        """Each goes to all streams."""
        return 5 if self.streams > 2000 else 3

    @property
    def singles(self) -> int:
        """Events that go to one stream each, and events that go to nobody."""
        return 500 if self.streams > 2000 else 50

    @property
    def seconds(self) -> float:
        """How long it is looked at when nothing happens, and when only heartbeats do."""
        return 2.0 if self.streams > 2000 else 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a stream takes; socket_bytes: each end of it, in the kernel."""

    bytes: float
    socket_bytes: float
    us: float
    head_bytes: float


def calibrate(sample: Sample, progress: Progress) -> Calibration:
    """Takes about half a minute with the sample's default. Raises PlanError."""
    if not LEAST_STREAMS <= sample.streams <= PER_PROCESS:
        raise PlanError(f"a calibration opens {LEAST_STREAMS} to {PER_PROCESS} streams, not {sample.streams}")
    begun, machine = time.monotonic(), this_machine()
    try:
        first, shared = _shared(sample, _told(progress, 0, f"{sample.streams:,} streams on one topic"))
        second, own = _own(sample, shared, _told(progress, 1, f"{sample.streams:,} streams with a topic of their own"))
        third, two = _two_workers(sample, own, _told(progress, 2, f"{sample.streams:,} streams of {TOPICS} topics at two "
                                                                  "workers"))
        socket = statistics.median(each.socket_bytes for each in (first, second, third))
        costs = Costs(**shared, **own, **two, socket_bytes=socket)
    except (ServerError, FleetError, MeasureError, PublishError, OSError) as error:
        raise PlanError(f"the calibration failed: {error}") from error
    return Calibration(date=probe.now(), version=Pushsvc().version(), streams=sample.streams, machine=machine,
                       seconds=round(time.monotonic() - begun, 1), costs=costs)


def _told(progress: Progress, start: int, text: str) -> Callable[[str], None]:
    """Tell that a start begins; what tells how it goes on."""
    progress.show(text, start, STARTS)
    return lambda more: progress.hint(f"{text}: {more}", start, STARTS)


def _shared(sample: Sample, tell: Callable[[str], None]) -> tuple[Opened, dict[str, float]]:
    with _service(1, QUIET_SECONDS, sample, tell) as rig:
        idle, service = _idle(rig, sample.seconds), probe.pss_bytes(rig.pids)
        opened = _open(rig, sample.streams, SHARED, idle)
        publish = _publishes(rig, sample.singles)
        seen, spent = _events(rig, sample.events)
    return opened, {
        "service_bytes": service, "stream_bytes": opened.bytes, "connect_us": opened.us, "idle_us": idle,
        "event_us": _part(spent - publish * sample.events, seen.events), "head_bytes": opened.head_bytes,
        "frame_bytes": seen.bytes / seen.events - DATA_BYTES}


def _own(sample: Sample, shared: dict[str, float], tell: Callable[[str], None]) -> tuple[Opened, dict[str, float]]:
    with _service(1, QUIET_SECONDS, sample, tell) as rig:
        opened = _open(rig, sample.streams, OWN, shared["idle_us"])
        publish, single = _singles(rig, sample.singles)
        seen, spent = _events(rig, sample.events)
    apart = _part(spent - publish * sample.events, seen.events)
    return opened, {
        "own_bytes": max(opened.bytes, shared["stream_bytes"]), "publish_us": publish, "apart_us": apart,
        "connect_topic_us": max(0.0, opened.us - shared["connect_us"]), "single_us": max(apart, single)}


def _two_workers(sample: Sample, own: dict[str, float], tell: Callable[[str], None]) -> tuple[Opened, dict[str, float]]:
    with _service(2, HEARTBEAT_SECONDS, sample, tell) as rig:
        idle, workers = _idle(rig, sample.seconds), [_private_bytes(pid) for pid in rig.pids[1:]]
        publish = _publishes(rig, sample.singles)
        opened = _open(rig, sample.streams, MANY, idle)
        seen, spent = _heartbeats(rig, sample.seconds, idle)
    return opened, {
        "worker_bytes": statistics.mean(workers), "receive_us": max(0.0, publish - own["publish_us"]),
        "topic_bytes": max(0.0, (opened.bytes - own["own_bytes"]) / (TOPICS - 2)),
        "heartbeat_us": _part(spent, seen.reads), "heartbeat_bytes": seen.bytes / seen.reads}


@contextmanager
def _service(workers: int, heartbeat: float, sample: Sample, tell: Callable[[str], None]) -> Iterator[Rig]:
    """It runs, and what is allocated once is allocated."""
    settings = {"PUSHSVC_HEARTBEAT_SECONDS": str(heartbeat), "PUSHSVC_DRAIN_SECONDS": "0"}
    server = Pushsvc(workers=workers, settings=settings)
    with rigged(server, Cores(), sample.streams, tell) as rig:
        server.wait_for_workers(WORKERS_SECONDS)
        rig.pids = server.pids()
        _publishes(rig, sample.singles)
        time.sleep(SETTLE_SECONDS)
        yield rig


def _idle(rig: Rig, seconds: float) -> float:
    """Microseconds in a second."""
    before = rig.cpu()
    time.sleep(seconds)
    return float((rig.cpu() - before) / seconds * 1e6)


def _open(rig: Rig, streams: int, topic: str, idle: float) -> Opened:
    rig.fleet.reset()
    memory, cpu, begun, half = probe.own_bytes(rig.pids), rig.cpu(), time.monotonic(), streams // 2
    rig.open(half, topic)
    kernel = probe.kernel_memory()
    seen = rig.open(streams - half, topic)
    spent = (rig.cpu() - cpu) * 1e6 - idle * (time.monotonic() - begun)
    if seen.open < streams:
        raise MeasureError(f"only {seen.open} of {streams} streams stayed")
    time.sleep(SETTLE_SECONDS)
    return Opened(bytes=_part(probe.own_bytes(rig.pids) - memory, streams), socket_bytes=_socket_bytes(kernel),
                  us=_part(spent, streams), head_bytes=seen.bytes / seen.open)


def _events(rig: Rig, events: int) -> tuple[Seen, float]:
    """What arrived, and microseconds for all of it."""
    publisher = rig.server.publisher()
    one_by_one(rig, publisher, 1)
    before = rig.cpu()
    seen = one_by_one(rig, publisher, events)
    spent = rig.cpu() - before
    publisher.close()
    if seen.events < events * seen.open or seen.ended:
        raise MeasureError(f"{seen.events} of {events * seen.open} events were delivered, {seen.ended} streams ended")
    return seen, spent * 1e6


def _publishes(rig: Rig, count: int) -> float:
    """Microseconds for an event that nobody gets: the median of some rounds."""
    return statistics.median(_publish(rig, NOBODY, each) / len(each) for each in _rounds(count)) * 1e6


def _singles(rig: Rig, count: int) -> tuple[float, float]:
    """Microseconds for an event that nobody gets, and how many more for one that a single stream gets. In turns: the
    second is small beside the first, which the rest of the machine makes larger and smaller."""
    rig.fleet.reset()
    nobody, single = [], []
    for each in _rounds(count):
        nobody.append(_publish(rig, NOBODY, each) / len(each) * 1e6)
        single.append((_publish(rig, "user-{}", each) + _rest(rig, each.stop)) / len(each) * 1e6)
    return statistics.median(nobody), statistics.median(map(operator.sub, single, nobody))


def _rest(rig: Rig, events: int) -> float:
    """Processor time in seconds until so many events have arrived."""
    before, until = rig.cpu(), time.monotonic() + ARRIVE_SECONDS
    while (seen := rig.fleet.stats()).events < events and time.monotonic() < until:
        time.sleep(0.02)
    if seen.events != events:
        raise MeasureError(f"{seen.events} of {events} events to one stream each were delivered")
    return float(rig.cpu() - before)


def _rounds(count: int) -> list[range]:
    return [range(first, first + count // ROUNDS) for first in range(0, count, count // ROUNDS)]


def _publish(rig: Rig, topic: str, numbers: range) -> float:
    """Processor time in seconds of an event to each of these topics, one after the other; `{}` in it is its number."""
    publisher, before = rig.server.publisher(), rig.cpu()
    for number in numbers:
        rig.server.publish(publisher, topic.format(number), mark(1))
    publisher.close()
    return float(rig.cpu() - before)


def _heartbeats(rig: Rig, seconds: float, idle: float) -> tuple[Seen, float]:
    """What arrived, and microseconds for all of it."""
    rig.fleet.reset()
    begun, before = time.monotonic(), rig.cpu()
    time.sleep(seconds + HEARTBEAT_SECONDS)
    seen, took = rig.fleet.stats(), time.monotonic() - begun
    if not seen.reads:
        raise MeasureError("no heartbeat came")
    return seen, (rig.cpu() - before) * 1e6 - idle * took


def _private_bytes(pid: int) -> int:
    """Memory that a process shares with no other: what it adds."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty):\s*(\d+) kB$", text, re.MULTILINE))) * 1024


def _socket_bytes(before: dict[str, int]) -> float:
    now = probe.kernel_memory()
    return _part(now["slab_bytes"] - before["slab_bytes"], now["tcp_sockets"] - before["tcp_sockets"])


def _part(whole: float, count: int) -> float:
    """Of each. Raises MeasureError for what cannot be: something else on the machine has spoilt it."""
    if whole <= 0 or count <= 0:
        raise MeasureError(f"{whole:g} for {count:,} is no measurement: something else disturbs this machine")
    return whole / count
