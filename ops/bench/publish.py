#!/usr/bin/env python
"""What a publish costs, measured on the real service: it is started here, on its embedded log or on a Redis that is
started as well, and ended afterwards.

  latency   single publishes at a fixed rate, each counted from when it was due (not from when it was sent, which would
            hide a stall) to when each subscriber had it
  singles   single publishes per second, each connection's next when its last is answered
  batches   events per second that NDJSON batches put into the log
  cpu       processor time of the workers per single publish, beside that of a Flask route that does nothing under the
            same gunicorn configuration; measured in turns, because a machine is not equally fast all the time

With --broker sqlite,redis each measurement is made with the one and then with the other. Needs what the service needs,
for Redis a redis-server, and nothing else. The figures hold for the machine, and for what else it did meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from gevent import socket as green

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ("latency", "singles", "batches", "cpu")
SQLITE, REDIS = "sqlite", "redis"
BATCHES_TARGET = {SQLITE: 30_000, REDIS: 15_000}  # events/s
CPU_TARGET = 2.5  # times the route that does nothing
BATCH_TOPICS = 100
START_SECONDS = 30
ANSWER_SECONDS = 30
SETTLE_SECONDS = 1.0
WARM_UP_REQUESTS = 500
TICKS = os.sysconf("SC_CLK_TCK")
DATA = "x" * 64

LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)
NUMBERED = re.compile(rb"\ndata: ([0-9]+) ")
IDENTIFIER = '{"id":"019e0000000-1000000"}'

NOOP_APP = f"""
from flask import Flask, Response

app = Flask("noop", static_folder=None)

@app.post("/publish")
def publish():
    return Response({IDENTIFIER!r}, content_type="application/json")
"""

# The service's own configuration, but for what needs the service.
NOOP_CONFIGURATION = """
import runpy

HOOKS = ("post_fork", "post_worker_init", "child_exit", "worker_exit", "when_ready", "on_exit")
globals().update({name: value for name, value in runpy.run_path(__CONF__).items()
                  if not name.startswith("_") and name not in HOOKS})
worker_class = "gevent"
"""


# --- The service and the route that does nothing ---------------------------------------------------------


class Service:
    """One gunicorn master and its workers on a port of 127.0.0.1, ready when the block begins, gone after it.

    log_url: of its log. keeper: the process that keeps the log, if that is another one.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, workers: int, log_url: str,
                 keeper: int | None = None) -> None:
        self.address = ("127.0.0.1", free_port())
        self._keeper = keeper
        self._log = folder / f"{self.address[1]}.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSVC_", "GUNICORN_"))}
        environment = inherited | {
            "PUSHSVC_BIND": "{}:{}".format(*self.address),
            "PUSHSVC_BROKER_URL": log_url,
            "WEB_CONCURRENCY": str(workers),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        }
        with self._log.open("wb") as log:
            self._master = subprocess.Popen([sys.executable, "-m", "gunicorn", *arguments], cwd=ROOT, env=environment,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> Service:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._master.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                sys.exit(f"the service did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.05)
        time.sleep(SETTLE_SECONDS)
        return self

    def __exit__(self, *exc: object) -> None:
        self._master.send_signal(signal.SIGTERM)
        try:
            self._master.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._master.pid, signal.SIGKILL)
            self._master.wait()

    def cpu_seconds(self) -> float:
        """User and system time of all workers so far."""
        return sum(cpu_ticks(pid) for pid in self.worker_pids()) / TICKS

    def keeper_cpu_seconds(self) -> float:
        """The same of the log's own process; 0 if it has none."""
        return cpu_ticks(self._keeper) / TICKS if self._keeper else 0.0

    def worker_pids(self) -> list[int]:
        master = self._master.pid
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]

    def _is_ready(self) -> bool:
        """Whether a publish is answered; the route that does nothing has no other."""
        try:
            with socket.create_connection(self.address, timeout=2) as connection:
                exchange(connection, publish_request(self.address, "ready", "?"))
        except OSError:
            return False
        return True


@contextmanager
def started(options: argparse.Namespace) -> Iterator[Service]:
    arguments = ["-c", str(ROOT / "gunicorn.conf.py"), "wsgi:app"]
    with folder() as place, log_of(options.broker, place) as (url, keeper), \
            Service(arguments, place, options.workers, url, keeper) as service:
        yield service


@contextmanager
def log_of(broker: str, place: Path) -> Iterator[tuple[str, int | None]]:
    """The URL of an empty log, and the pid of the process that keeps it. Redis as ops/machines/ sets it up."""
    if broker == SQLITE:
        yield f"sqlite:{place / 'bench.db'}", None
        return
    program, port = shutil.which("redis-server"), free_port()
    if program is None:
        sys.exit("redis-server is not installed")
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(place), "--save", "", "--appendonly", "yes",
         "--appendfsync", "everysec", "--stream-node-max-bytes", "512"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"redis://127.0.0.1:{port}/0", process.pid
    finally:
        process.terminate()
        process.wait(ANSWER_SECONDS)


@contextmanager
def started_noop(workers: int) -> Iterator[Service]:
    with folder() as place, log_of(SQLITE, place) as (url, _):  # which nothing is published to
        configuration = NOOP_CONFIGURATION.replace("__CONF__", repr(str(ROOT / "gunicorn.conf.py")))
        (place / "noop_conf.py").write_text(configuration)
        (place / "noop_app.py").write_text(NOOP_APP)
        with Service(["-c", str(place / "noop_conf.py"), "noop_app:app"], place, workers, url) as service:
            yield service


@contextmanager
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="pushsvc-bench-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- HTTP, as little as will do --------------------------------------------------------------------------


def publish_request(address: tuple[str, int], topic: str, data: str) -> bytes:
    return request_of(address, "application/json", json.dumps({"topic": topic, "data": data}).encode())


def request_of(address: tuple[str, int], kind: str, body: bytes) -> bytes:
    head = (f"POST /publish HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def exchange(connection: Any, request: bytes) -> None:
    """One request and its whole answer, which must be 200."""
    connection.sendall(request)
    answer = b""
    while not is_whole(answer):
        data = connection.recv(1 << 16)
        if not data:
            raise ConnectionError(f"closed after {answer[:500]!r}")
        answer += data


def is_whole(answer: bytes) -> bool:
    """Whether an answer is complete. Exits the program for one that is not 200: then there is nothing to measure."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    length = LENGTH.search(head + b"\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or length is None:
        sys.exit(f"a publish was answered {answer[:500]!r}")
    return len(body) >= int(length[1])


def drive(address: tuple[str, int], requests: Sequence[bytes], connections: int) -> float:
    """Send all requests over kept connections, each one's next when its last is answered; the seconds that took."""
    waiting = iter(requests)

    def client() -> None:
        with green.create_connection(address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for request in waiting:
                exchange(connection, request)

    begun = time.perf_counter()
    gevent.joinall([gevent.spawn(client) for _ in range(connections)], raise_error=True)
    return time.perf_counter() - begun


# --- Latency ---------------------------------------------------------------------------------------------


class Subscribers:
    """Streams that note, for each event, how long after its due time it was there."""

    def __init__(self, address: tuple[str, int], count: int, topics: int,
                 watch: Callable[[socket.socket], None]) -> None:
        self.latencies: list[float] = []
        self.due: list[float] = []
        self._rests: dict[int, bytes] = {}
        self._sockets = {}
        for number in range(count):
            connection = socket.create_connection(address, timeout=ANSWER_SECONDS)
            target = f"/events?topic=bench-{number % topics}"
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {address[0]}\r\n\r\n".encode())
            rest = b""
            while b"\nretry: " not in rest:
                rest += connection.recv(1 << 16)
            connection.setblocking(False)
            self._sockets[connection.fileno()] = connection
            self._rests[connection.fileno()] = rest
            watch(connection)

    def owns(self, fd: int) -> bool:
        return fd in self._sockets

    def receive(self, fd: int) -> None:
        data = self._rests[fd] + self._sockets[fd].recv(1 << 18)
        now = time.perf_counter()
        end = data.rfind(b"\n")
        self.latencies += [now - self.due[int(number)] for number in NUMBERED.findall(data[:end])]
        self._rests[fd] = data[end:]

    def close(self) -> None:
        for connection in self._sockets.values():
            connection.close()


class Publishers:
    """Kept connections, one request at a time on each."""

    def __init__(self, address: tuple[str, int], count: int, watch: Callable[[socket.socket], None]) -> None:
        self.idle: deque[socket.socket] = deque()
        self.most_waiting = 0.0
        self._busy: dict[int, tuple[socket.socket, bytes]] = {}
        for _ in range(count):
            connection = socket.create_connection(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.idle.append(connection)
            watch(connection)

    def send(self, request: bytes) -> None:
        connection = self.idle.popleft()
        connection.sendall(request)
        self._busy[connection.fileno()] = connection, b""

    def receive(self, fd: int) -> None:
        if fd not in self._busy:
            sys.exit("the service has closed a publisher's connection")
        connection, answer = self._busy.pop(fd)
        answer += connection.recv(1 << 16)
        if is_whole(answer):
            self.idle.append(connection)
        else:
            self._busy[fd] = connection, answer

    def close(self) -> None:
        for connection in [*self.idle, *(connection for connection, _ in self._busy.values())]:
            connection.close()


def measure_latency(options: argparse.Namespace) -> dict[str, Any]:
    with started(options) as service:
        polled = select.epoll()
        subscribers = Subscribers(service.address, options.streams, options.topics,
                                  lambda each: polled.register(each, select.EPOLLIN))
        publishers = Publishers(service.address, options.connections, lambda each: polled.register(each, select.EPOLLIN))
        late = publish_at_rate(service.address, options, polled, subscribers, publishers)
        subscribers.close()
        publishers.close()
        polled.close()
    latencies = sorted(subscribers.latencies)
    return {"publishes_per_second": options.rate, "seconds": options.seconds, "streams": options.streams,
            "topics": options.topics, "connections": options.connections, "received": len(latencies),
            "p50_ms": at(latencies, 0.5), "p99_ms": at(latencies, 0.99), "max_ms": at(latencies, 1.0),
            "client_late_max_ms": round(late * 1000, 2)}


def publish_at_rate(address: tuple[str, int], options: argparse.Namespace, polled: select.epoll,
                    subscribers: Subscribers, publishers: Publishers) -> float:
    """Publish each event when it is due, whatever became of the one before, and read until every subscriber has all;
    by how many seconds the latest was sent late."""
    count = int(options.rate * options.seconds)
    requests = [publish_request(address, f"bench-{number % options.topics}", f"{number} {DATA}")
                for number in range(count)]
    expected = sum(len(range(number % options.topics, options.streams, options.topics)) for number in range(count))
    begun = time.perf_counter() + 0.1
    subscribers.due = [begun + number / options.rate for number in range(count)]
    deadline = begun + options.seconds + ANSWER_SECONDS
    sent, late = 0, 0.0
    while len(subscribers.latencies) < expected:
        now = time.perf_counter()
        while sent < count and publishers.idle and subscribers.due[sent] <= now:
            late = max(late, now - subscribers.due[sent])
            publishers.send(requests[sent])
            sent += 1
        if now > deadline:
            sys.exit(f"{len(subscribers.latencies)} of {expected} events were received")
        wait = subscribers.due[sent] - time.perf_counter() if sent < count and publishers.idle else 1.0
        select.select([polled], [], [], max(0.0, wait))  # in microseconds, where epoll counts milliseconds
        for fd, _ in polled.poll(0):
            (subscribers if subscribers.owns(fd) else publishers).receive(fd)
    return late


def at(sorted_seconds: Sequence[float], part: float) -> float:
    """The value below which `part` of all lie, in milliseconds."""
    return round(sorted_seconds[min(len(sorted_seconds) - 1, int(part * len(sorted_seconds)))] * 1000, 2)


# --- Singles ---------------------------------------------------------------------------------------------


def measure_singles(options: argparse.Namespace) -> dict[str, Any]:
    with started(options) as service:
        request = publish_request(service.address, "bench", DATA)
        drive(service.address, [request] * WARM_UP_REQUESTS, options.connections)
        before, keeper = service.cpu_seconds(), service.keeper_cpu_seconds()
        took = drive(service.address, [request] * options.singles, options.connections)
        cpu, keeper = service.cpu_seconds() - before, service.keeper_cpu_seconds() - keeper
    return {"requests": options.singles, "connections": options.connections, "seconds": round(took, 2),
            "publishes_per_second": round(options.singles / took), "cpu_us": round(cpu / options.singles * 1e6, 1),
            "keeper_cpu_us": round(keeper / options.singles * 1e6, 1)}


# --- Batches ---------------------------------------------------------------------------------------------


def measure_batches(options: argparse.Namespace) -> dict[str, Any]:
    lines = [json.dumps({"topic": f"bench-{number % BATCH_TOPICS}", "data": f"{number} {DATA}"})
             for number in range(options.batch)]
    body = "\n".join(lines).encode() + b"\n"
    batches = options.events // options.batch
    with started(options) as service:
        request = request_of(service.address, "application/x-ndjson", body)
        drive(service.address, [request] * 4, 4)
        before, keeper = service.cpu_seconds(), service.keeper_cpu_seconds()
        took = drive(service.address, [request] * batches, 4)
        cpu, keeper = service.cpu_seconds() - before, service.keeper_cpu_seconds() - keeper
    rate, target = batches * options.batch / took, BATCHES_TARGET[options.broker]
    return {"events": batches * options.batch, "events_per_batch": options.batch, "bytes_per_event": len(lines[-1]),
            "topics": BATCH_TOPICS, "connections": 4, "seconds": round(took, 2), "events_per_second": round(rate),
            "cpu_us_per_event": round(cpu / (batches * options.batch) * 1e6, 1),
            "keeper_cpu_us_per_event": round(keeper / (batches * options.batch) * 1e6, 1),
            "target": target, "met": rate >= target}


# --- CPU -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    publish_us: float
    noop_us: float

    @property
    def ratio(self) -> float:
        return self.publish_us / self.noop_us


def measure_cpu(options: argparse.Namespace) -> dict[str, Any]:
    with started(options) as service, started_noop(options.workers) as noop:
        for each in (service, noop):
            cpu_per_request(each, WARM_UP_REQUESTS, options.connections)
        rounds = [Round(cpu_per_request(service, options.requests, options.connections),
                        cpu_per_request(noop, options.requests, options.connections)) for _ in range(options.rounds)]
    ratio = statistics.median(each.ratio for each in rounds)
    return {"requests": options.requests, "rounds": options.rounds, "connections": options.connections,
            "publish_us": round(statistics.median(each.publish_us for each in rounds), 1),
            "noop_us": round(statistics.median(each.noop_us for each in rounds), 1),
            "ratios": [round(each.ratio, 2) for each in rounds], "ratio": round(ratio, 2),
            "target": CPU_TARGET, "met": ratio <= CPU_TARGET}


def cpu_per_request(service: Service, requests: int, connections: int) -> float:
    """Microseconds of all workers' processor time per request."""
    request = publish_request(service.address, "bench", DATA)
    before = service.cpu_seconds()
    drive(service.address, [request] * requests, connections)
    return (service.cpu_seconds() - before) / requests * 1e6


# --- The command -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release(),
            "load_average": round(os.getloadavg()[0], 2), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


TEXTS = {
    "machine": """\
machine   {cores} cores, Python {python}, Linux {kernel}, load {load_average} before, {at}""",
    "latency": """\
latency   p50 {p50_ms} ms, p99 {p99_ms} ms, max {max_ms} ms from due to received
          {publishes_per_second:g} publishes/s for {seconds:g} s over {connections} connections; {streams} streams,
          {topics} topics ({received} received; this client was at most {client_late_max_ms} ms late)""",
    "singles": """\
singles   {publishes_per_second} publishes/s; CPU of the workers {cpu_us} us each, of the log's process {keeper_cpu_us} us
          {requests} publishes over {connections} connections""",
    "batches": """\
batches   {events_per_second} events/s (target {target}: {verdict})
          CPU of the workers {cpu_us_per_event} us each, of the log's process {keeper_cpu_us_per_event} us
          {events} events of {bytes_per_event} bytes, {events_per_batch} a batch, over {connections} connections""",
    "cpu": """\
cpu       {publish_us} us per publish, {noop_us} us per request to a route that does nothing: {ratio} times
          (target {target}: {verdict}; rounds {ratios}, {requests} requests each over {connections} connections)""",
}


def text_of(name: str, found: dict[str, Any]) -> str:
    text = TEXTS[name].format(**found, verdict="met" if found.get("met") else "MISSED")
    return f"{text}\n          on {found['broker']}" if "broker" in found else text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python ops/bench/publish.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="*", metavar="measurement",
                        help=f"{', '.join(MEASUREMENTS)}; all if none is named")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--broker", default=SQLITE, help="sqlite, redis, or sqlite,redis: the one after the other "
                        "(default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the service (default %(default)s)")
    parser.add_argument("--connections", type=int, default=8, help="of publishers, but for batches (default %(default)s)")
    parser.add_argument("--rate", type=float, default=500, help="latency: publishes per second (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="latency: for how long (default %(default)s)")
    parser.add_argument("--streams", type=int, default=100, help="latency: subscribers (default %(default)s)")
    parser.add_argument("--topics", type=int, default=10, help="latency: of the subscribers (default %(default)s)")
    parser.add_argument("--singles", type=int, default=10_000, help="singles: how many in all (default %(default)s)")
    parser.add_argument("--events", type=int, default=200_000, help="batches: how many in all (default %(default)s)")
    parser.add_argument("--batch", type=int, default=500, help="batches: events of each (default %(default)s)")
    parser.add_argument("--requests", type=int, default=5000, help="cpu: of each round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="cpu: turns of both (default %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.measure) - set(MEASUREMENTS):
        parser.error(f"{', '.join(sorted(unknown))}: the measurements are {', '.join(MEASUREMENTS)}")
    options.brokers = options.broker.split(",")
    if unknown := set(options.brokers) - {SQLITE, REDIS}:
        parser.error(f"{', '.join(sorted(unknown))}: the brokers are {SQLITE} and {REDIS}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))  # as Ctrl-C: what was started ends
    measure = {"latency": measure_latency, "singles": measure_singles, "batches": measure_batches, "cpu": measure_cpu}
    results: dict[str, Any] = {"machine": machine()}
    if not options.json:
        print(text_of("machine", results["machine"]), flush=True)
    for name in options.measure or MEASUREMENTS:
        results[name] = []
        for broker in options.brokers:
            options.broker = broker
            found = {"broker": broker} | measure[name](options)
            results[name].append(found)
            if not options.json:
                print(text_of(name, found), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
