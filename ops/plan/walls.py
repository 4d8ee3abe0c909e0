"""What a growing load meets first. Pure: each wall is a need held against a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ops.limits.needs import workers_holding
from ops.plan.calibration import Costs
from ops.plan.load import Load
from ops.plan.machine import Machine
from ops.plan.needs import MICRO, Needs, connect_us
from pushsvc.settings import MOST_WORKERS, Settings

CPU_USABLE = 0.7  # of a core: above it whatever comes in a bunch waits long
MEMORY_USABLE = 0.8  # the rest is for buffers under load, the disk's cache and the system


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """name: its word. need, limit: in `unit`. reach: by what the load can be multiplied (users and messages alike)
    until it is met; below 1 it is in the way. setting: what moves it. is_setting: a setting does, no other machine is
    wanted."""

    name: str
    need: float
    limit: float
    unit: str
    reach: float
    setting: str
    is_setting: bool


def walls(load: Load, costs: Costs, machine: Machine, settings: Settings, need: Needs) -> list[Wall]:
    """The nearest first."""
    found = [_cpu(machine, need), _memory(machine, need), _descriptors(load, settings, need), _files(load, machine, need),
             _backlog(load, costs, machine, settings, need), *_ports(load, machine, need)]
    return sorted(found, key=lambda wall: wall.reach)


def _cpu(machine: Machine, need: Needs) -> Wall:
    cores = min(need.workers, machine.cores)
    usable = cores * CPU_USABLE
    most = min(machine.cores, MOST_WORKERS)
    more = need.workers < most
    return Wall(name="cpu", need=need.cpu, limit=usable, unit="cores",
                reach=_reach(usable - need.cpu_idle, need.cpu - need.cpu_idle),
                setting=f"WEB_CONCURRENCY={most}" if more else "more cores, or a further machine",
                is_setting=more)


def _memory(machine: Machine, need: Needs) -> Wall:
    usable, whole = machine.memory_bytes * MEMORY_USABLE, need.memory_workers + need.memory_kernel
    return Wall(name="memory", need=whole, limit=usable, unit="bytes",
                reach=_reach(usable - need.memory_base, whole - need.memory_base),
                setting="more memory, or a further machine", is_setting=False)


def _descriptors(load: Load, settings: Settings, need: Needs) -> Wall:
    workers = max(workers_holding(load.users, need.max_streams), need.workers + 1)
    more = (f"WEB_CONCURRENCY={workers}" if workers <= MOST_WORKERS else
            f"{math.ceil(workers / MOST_WORKERS)} machines, for one has {MOST_WORKERS:,} workers at most")
    own = f"PUSHSVC_MAX_STREAMS={need.streams_per_worker}" if settings.max_streams else "LimitNOFILE (ulimit -n)"
    return Wall(name="descriptors", need=need.streams_per_worker, limit=need.max_streams, unit="streams of a worker",
                reach=_reach(need.max_streams, need.streams_per_worker), setting=f"{more}, or {own}", is_setting=True)


def _files(load: Load, machine: Machine, need: Needs) -> Wall:
    streams = load.users * load.sockets
    return Wall(name="files", need=need.files, limit=machine.files, unit="descriptors of all processes",
                reach=_reach(machine.files - (need.files - streams), streams),
                setting=f"fs.file-max={_above(need.files, machine.files)}", is_setting=True)


def _ports(load: Load, machine: Machine, need: Needs) -> Iterator[Wall]:
    """Only behind a proxy: it is one client, with one address or a few."""
    if load.proxies:
        more = max(need.addresses + 1, math.ceil(load.users / (machine.ports * load.proxies)))
        yield Wall(name="ports", need=need.ports, limit=machine.ports, unit="connections of two addresses",
                   reach=_reach(machine.ports, need.ports),
                   setting=f"PUSHSVC_BIND with {more} addresses, all named in the proxy", is_setting=True)


def _backlog(load: Load, costs: Costs, machine: Machine, settings: Settings, need: Needs) -> Wall:
    """While all streams come back, those that cannot be opened yet wait in the queue of their worker."""
    limit = min(settings.backlog, machine.backlog)
    opened = min(need.workers, machine.cores) / need.workers / (connect_us(load, costs) * MICRO) * load.storm_seconds
    size = _above(need.storm_queue, limit)
    return Wall(name="backlog", need=need.storm_queue, limit=limit, unit="connections that wait at a worker",
                reach=_reach(limit + opened, load.users / need.workers),
                setting=f"PUSHSVC_BACKLOG={size} and net.core.somaxconn={size}", is_setting=True)


def _reach(limit: float, need: float) -> float:
    return max(0.0, limit) / need if need > 0 else math.inf


def _above(need: float, limit: int) -> int:
    """A power of two that is more than both."""
    return 1 << max(12, int(max(need, limit)).bit_length())
