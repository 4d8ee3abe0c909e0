"""The checks of the process: each takes what was seen and yields what is to be changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import host
from finding import Finding
from host import Limits, Log, Service

from ops.limits import needs
from ops.limits.unit import Unit

STOP_MARGIN = 5  # seconds that the master needs after its workers
STOP_TIMEOUTS = ("TimeoutStopSec", "TimeoutSec")  # the later one counts
SYSTEMD_STOP_SECONDS = 90.0  # its default
WORKER = "PushWorker"
LOOPBACK = ("127.", "::1", "localhost")
UNIT_SECONDS = {"": 1, "s": 1, "sec": 1, "ms": 0.001, "m": 60, "min": 60, "h": 3600}
TIME = re.compile(r"([\d.]+)\s*(ms|sec|s|min|m|h|)(?![\w.])\s*")
VARIABLE = re.compile(r"\b(?:PUSHSVC_\w+|WEB_CONCURRENCY)\b")
SYSCTL = "/etc/sysctl.d/60-pushsvc.conf"  # as ops/limits writes it


@dataclass(frozen=True, slots=True)
class Asked:
    """config: gunicorn's. env, unit: files, "" for none. streams: how many are expected at once. behind: whether a proxy
    stands before it. told: what env and unit say."""

    config: str
    env: str = ""
    unit: str = ""
    streams: int = 10_000
    behind: bool = False
    told: Unit = field(default_factory=Unit)

    def place_of(self, variable: str) -> tuple[str, int]:
        """File and line that set a variable of the environment; "" and 0 where none of them does."""
        line = self.told.variable(variable)
        return (line.file, line.number) if line else ("", 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """All that the checks judge. broker: why it cannot be used, "" if it can. parser: whether the one in C is installed.
    arguments: of gunicorn, from the environment."""

    asked: Asked
    service: Service
    limits: Limits
    log: Log
    broker: str
    parser: bool
    arguments: str

    def of_gunicorn(self, name: str) -> tuple[str, int]:
        """Where a setting of gunicorn is set: file and line, 0 where it is not named there."""
        option = re.escape(f"--{name.replace('_', '-')}")
        if not re.search(rf"{option}\b", self.arguments):
            return self.asked.config, host.line_of(self.asked.config, rf"^{name}\s*=")
        return self.of_service("GUNICORN_CMD_ARGS")

    def of_service(self, variable: str) -> tuple[str, int]:
        """Where a variable of the environment is, or belongs."""
        file, line = self.asked.place_of(variable)
        return (file, line) if line else (self.asked.env or f"environment: {variable}", 0)

    def of_unit(self, name: str) -> tuple[str, int]:
        line = self.asked.told.last(name)
        return (line.file, line.number) if line else (self.asked.unit, 0)


def streams_of(seen: Seen) -> int:
    """How many streams one worker takes."""
    asked, connections = int(seen.service.settings["max_streams"]), int(seen.service.settings["max_connections"])
    most = max(1, _descriptors_of(seen) - connections - needs.OWN_DESCRIPTORS)
    return min(asked or most, most)


def _descriptors_of(seen: Seen) -> int:
    return min(seen.limits.descriptors, seen.limits.nr_open)


def _needed(seen: Seen) -> int:
    """Descriptors that each worker needs for the streams that are expected, and for those that it is told to take."""
    asked, connections = int(seen.service.settings["max_streams"]), int(seen.service.settings["max_connections"])
    return max(needs.descriptors(seen.asked.streams, _workers(seen), connections),
               needs.descriptors(asked, 1, connections))


def _workers(seen: Seen) -> int:
    """Those that there are, or at least should be."""
    return max(1, int(seen.service.gunicorn["workers"]))


def _start(seen: Seen) -> Iterator[Finding]:
    if seen.service.stopped:
        yield stopped(seen.asked, seen.service.stopped)


def stopped(asked: Asked, message: str) -> Finding:
    """The service does not start, in its own words; where stands the variable that they name."""
    return Finding("start", f"the service does not start: {message}", "there is no service", "what the message says",
                   *_place_of_named(asked, message))


def _place_of_named(asked: Asked, message: str) -> tuple[str, int]:
    for variable in VARIABLE.findall(message):
        file, line = asked.place_of(variable)
        if line:
            return file, line
        if variable in os.environ:
            return f"environment: {variable}", 0
    return asked.env or asked.config, 0


def _worker(seen: Seen) -> Iterator[Finding]:
    name = seen.service.gunicorn["worker_class_str"]
    if name.endswith(WORKER):
        return
    yield Finding("worker_class", f"worker_class is {name}",
                  "a stream keeps a greenlet and 20 KB instead of less than 1 KB" if "gevent" in name else
                  "a stream keeps a thread or a whole worker: after a few streams nobody is served",
                  'worker_class = "pushsvc.worker.PushWorker"', *seen.of_gunicorn("worker_class"))


def _reuse_port(seen: Seen) -> Iterator[Finding]:
    gunicorn = seen.service.gunicorn
    unix = any(isinstance(address, str) for address in gunicorn["addresses"])
    if not gunicorn["reuse_port"] and gunicorn["workers"] > 1 and not unix:
        yield Finding("reuse_port", "reuse_port is off", "streams pile up on one worker while the others idle",
                      "reuse_port = True", *seen.of_gunicorn("reuse_port"))


def _max_requests(seen: Seen) -> Iterator[Finding]:
    most = seen.service.gunicorn["max_requests"]
    if most:
        yield Finding("max_requests", f"max_requests is {most}",
                      f"after {most} requests a worker ends under its streams, and all of them reconnect",
                      "max_requests = 0; PUSHSVC_ROTATE_SECONDS renews streams one by one",
                      *seen.of_gunicorn("max_requests"))


def _preload(seen: Seen) -> Iterator[Finding]:
    if seen.service.gunicorn["preload_app"] and not seen.service.stopped:
        yield Finding("preload", "preload_app is on",
                      "the application is made before the fork and before gevent's patch: its threads, connections and "
                      "locks do not work in the workers", "preload_app = False", *seen.of_gunicorn("preload_app"))


def _patch(seen: Seen) -> Iterator[Finding]:
    file, gunicorn = seen.asked.config, seen.service.gunicorn
    if gunicorn["patched"]:
        yield Finding("monkey_patch", "the configuration patches the master",
                      "the workers inherit the master's loop across the fork; they patch themselves",
                      "no gevent.monkey in the configuration", file, host.line_of(file, r"^[^#]*\bmonkey\.patch"))
    if gunicorn["threads"]:
        yield Finding("monkey_patch", f"the configuration starts threads: {', '.join(gunicorn['threads'])}",
                      "they do not survive the fork, and a lock that one of them holds is held for ever",
                      "no threads before the fork", file, host.line_of(file, r"^[^#]*\b(\w*Thread|ThreadPoolExecutor)\("))


def _descriptors(seen: Seen) -> Iterator[Finding]:
    workers, each, wanted = _workers(seen), streams_of(seen), seen.asked.streams
    asked, fullest = seen.service.settings["max_streams"], needs.fullest(wanted, workers)
    if each >= max(fullest, asked):
        return
    bounded = each == asked
    raised = f" and sysctl fs.nr_open={_needed(seen)}" if _needed(seen) > seen.limits.nr_open else ""
    yield Finding("descriptors", f"{workers} workers take {each} streams each; of the {wanted} that are expected the "
                  f"fullest gets {fullest}; a worker may have {_descriptors_of(seen)} descriptors "
                  f"({seen.limits.descriptors_from})",
                  "clients beyond that are told to come back, for ever",
                  f"PUSHSVC_MAX_STREAMS={fullest}" if bounded else
                  f"LimitNOFILE={_needed(seen)}{raised}; or WEB_CONCURRENCY={needs.workers_holding(wanted, each)}",
                  *(seen.of_service("PUSHSVC_MAX_STREAMS") if bounded else seen.of_unit("LimitNOFILE")))


def _file_max(seen: Seen) -> Iterator[Finding]:
    needed = _workers(seen) * _needed(seen)
    if needed > seen.limits.file_max:
        yield Finding("file_max", f"fs.file-max is {seen.limits.file_max}; the workers need {needed} descriptors",
                      "no process of the machine can open anything any more", f"fs.file-max = {2 * needed}", SYSCTL)


def _ports(seen: Seen) -> Iterator[Finding]:
    """A Unix socket, where there is one, needs none."""
    addresses = seen.service.gunicorn["addresses"]
    if any(isinstance(address, str) for address in addresses):
        return
    ports = seen.limits.ports * len(addresses)
    if seen.asked.behind and seen.asked.streams > ports:
        yield Finding("ports", f"a proxy has {ports} ports to the service; {seen.asked.streams} streams are expected",
                      "when they are used up the proxy answers 502",
                      "more addresses, each named in the proxy: PUSHSVC_BIND=127.0.0.1:8000,127.0.0.2:8000",
                      *seen.of_service("PUSHSVC_BIND"))


def _backlog(seen: Seen) -> Iterator[Finding]:
    backlog, most = seen.service.gunicorn["backlog"], seen.limits.somaxconn
    if backlog > most:
        yield Finding("backlog", f"backlog is {backlog}, net.core.somaxconn is {most}: the kernel takes the smaller",
                      "when all clients come back at once, connections are dropped and tried again seconds later",
                      f"net.core.somaxconn = {backlog}", SYSCTL)


def _graceful(seen: Seen) -> Iterator[Finding]:
    graceful, drain = seen.service.gunicorn["graceful_timeout"], seen.service.settings["drain_seconds"]
    if graceful <= drain:
        yield Finding("graceful", f"graceful_timeout is {graceful} s, the drain window {drain:g} s",
                      "a stop breaks off streams that were to be told when to come back: all reconnect at once",
                      f"more than {drain:g}: PUSHSVC_GRACEFUL_SECONDS", *seen.of_gunicorn("graceful_timeout"))


def _unit(seen: Seen) -> Iterator[Finding]:
    graceful, told = seen.service.gunicorn["graceful_timeout"], seen.asked.told
    line = next((line for line in reversed(told.lines) if line.name in STOP_TIMEOUTS and line.value), None)
    waits = _seconds(line.value) if line else SYSTEMD_STOP_SECONDS if seen.asked.unit else None
    if waits and waits < graceful + STOP_MARGIN:  # to systemd 0 is no bound
        yield Finding("graceful", f"{line.name if line else 'the default of TimeoutStopSec'} is {waits:g} s, "
                      f"graceful_timeout {graceful} s", "systemd kills what is still draining",
                      f"TimeoutStopSec={graceful + STOP_MARGIN}",
                      *((line.file, line.number) if line else (seen.asked.unit, 0)))


def _seconds(text: str) -> float | None:
    """A span of time as systemd.time(7) has it; None for no bound and for what is not understood."""
    spans = TIME.findall(text)
    if not spans or TIME.sub("", text).strip():
        return None
    return sum(float(number) * UNIT_SECONDS[unit] for number, unit in spans)


def _broker(seen: Seen) -> Iterator[Finding]:
    if seen.broker:
        yield Finding("broker", f"the broker cannot be used: {seen.broker}", "every publish is answered 503",
                      "PUSHSVC_BROKER_URL, or what the message names", *seen.of_service("PUSHSVC_BROKER_URL"))


def _disk(seen: Seen) -> Iterator[Finding]:
    log = seen.log
    wanted = 2 * seen.service.settings["history_bytes"] - log.held
    if log.free < wanted:
        yield Finding("disk", f"{_size(log.free)} are free in {log.folder}; the log may take {_size(wanted)} more",
                      "a full disk refuses every publish with 503",
                      f"PUSHSVC_HISTORY_BYTES={(log.free + log.held) // 2}, or more room",
                      *seen.of_service("PUSHSVC_HISTORY_BYTES"))
    if log.kind in host.NETWORK:
        yield Finding("disk", f"{log.folder} is on {log.kind}",
                      "the workers share the log by locks and memory, which do not work over a network",
                      "a local disk, or a broker for several machines (redis:)", *seen.of_service("PUSHSVC_BROKER_URL"))


def _access(seen: Seen) -> Iterator[Finding]:
    settings = seen.service.settings
    outside = [each for each in seen.service.gunicorn["addresses"] if not _is_loopback(each)]
    if settings["jwt_key"] or seen.service.stopped or not (outside or seen.asked.behind):
        return
    where = (f"it listens on {outside[0]}" if outside else
             "to the service, all that comes from a proxy on its machine comes from loopback")
    yield Finding("access", f"there is no key, and {where}", "anybody may subscribe to and publish everything",
                  "PUSHSVC_JWT_KEY", *seen.of_service("PUSHSVC_AUTH" if settings["auth"] else "PUSHSVC_JWT_KEY"))


def _is_loopback(address: str | list[object]) -> bool:
    return not isinstance(address, str) and str(address[0]).startswith(LOOPBACK)


def _parser(seen: Seen) -> Iterator[Finding]:
    if not seen.parser:
        yield Finding("parser", "gunicorn-h1c is not installed",
                      "requests cost more, and one for a stream of many topics (a line over 8190 bytes) is refused",
                      "pip install --require-hashes -r requirements-fast.txt")


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


CHECKS: tuple[Callable[[Seen], Iterator[Finding]], ...] = (
    _start, _worker, _reuse_port, _max_requests, _preload, _patch, _descriptors, _file_max, _ports, _backlog, _graceful,
    _unit, _broker, _disk, _access, _parser)
