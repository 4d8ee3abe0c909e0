"""From a load and what things cost to what the service needs. Pure arithmetic; docs/plan.md has it in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ops.limits.needs import OWN_DESCRIPTORS, descriptors, fullest, workers_holding
from ops.plan.calibration import Costs
from ops.plan.load import Load
from ops.plan.machine import Machine
from pushsvc.settings import MOST_WORKERS, Settings

HOUR = 3600.0
MICRO = 1e-6
PACKET_BYTES = 66  # headers of Ethernet, IPv4 and TCP with timestamps
CONNECT_PACKETS = 4  # each way, without data: a connection's beginning and end
REQUEST_BYTES = 700  # what a browser sends to subscribe
PUBLISH_BYTES = 250  # a publish without its data
ANSWER_BYTES = 250  # to a publish


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of the whole service, in a second."""

    messages: float
    deliveries: float
    connects: float
    heartbeats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a load needs. Processor time in cores; memory in bytes; bandwidth in bytes per second.

    streams_per_worker, descriptors_per_worker: of the fullest. memory_base: the workers without streams. core_use:
    of the cores that the workers can use, the part that is busy. storm_queue: connections that wait at one worker when
    all streams come back at once, at the worst; storm_done_seconds: until all are open again.
    """

    workers: int
    addresses: int
    max_streams: int
    streams_per_worker: int
    descriptors_per_worker: int
    files: int
    ports: int
    memory_workers: float
    memory_base: float
    memory_kernel: float
    out_bytes: float
    in_bytes: float
    cpu_connects: float
    cpu_publishes: float
    cpu_deliveries: float
    cpu_heartbeats: float
    cpu_idle: float
    cpu: float
    core_use: float
    storm_queue: float
    storm_done_seconds: float


def needs(load: Load, costs: Costs, machine: Machine, settings: Settings) -> Needs:
    """What `load` needs there. With `workers` or `addresses` 0 in it: as many as hold its streams, a worker per core at
    least, but no more than the service starts."""
    most = max_streams(machine, settings)
    workers = load.workers or min(MOST_WORKERS, max(machine.cores, workers_holding(load.users, most)))
    addresses = load.addresses or _addresses(load, machine)
    streams = fullest(load.users, workers)
    rate, base = rates(load, settings), costs.service_bytes + (workers - 1) * costs.worker_bytes
    cpu = _cpu(load, costs, rate, workers)
    arrivals, opened = load.users / workers, min(workers, machine.cores) / workers / (connect_us(load, costs) * MICRO)
    return Needs(
        workers=workers, addresses=addresses, max_streams=most, streams_per_worker=streams,
        descriptors_per_worker=descriptors(load.users, workers, settings.max_connections),
        files=load.users * load.sockets + workers * (settings.max_connections + OWN_DESCRIPTORS),
        ports=math.ceil(load.users / max(1, load.proxies * addresses)),
        memory_workers=base + load.users * stream_bytes(load, costs, workers), memory_base=base,
        memory_kernel=load.users * load.sockets * costs.socket_bytes,
        out_bytes=_out(load, costs, rate), in_bytes=_in(load, rate),
        **{f"cpu_{name}": value for name, value in cpu.items()}, cpu=sum(cpu.values()),
        core_use=sum(cpu.values()) / min(workers, machine.cores),
        storm_queue=max(0.0, arrivals - opened * load.storm_seconds),
        storm_done_seconds=max(load.storm_seconds, arrivals / opened))


def _addresses(load: Load, machine: Machine) -> int:
    return math.ceil(load.users / (machine.ports * load.proxies)) if load.proxies else 1


def max_streams(machine: Machine, settings: Settings) -> int:
    """Of one worker, as the service reckons it itself."""
    return settings.max_streams or max(1, machine.descriptors - settings.max_connections - OWN_DESCRIPTORS)


def rates(load: Load, settings: Settings) -> Rates:
    """A stream comes back as often as the load says, and once per rotation. It gets a heartbeat for each interval in
    which it got no event; events come at random."""
    deliveries = load.messages_per_second * load.fan_out
    rotations = 1 / settings.rotate_seconds if settings.rotate_seconds else 0.0
    return Rates(messages=load.messages_per_second, deliveries=deliveries,
                 connects=load.users * (load.reconnects_per_hour / HOUR + rotations),
                 heartbeats=load.users * _silences(deliveries / load.users, settings.heartbeat_seconds))


def _silences(events: float, interval: float) -> float:
    """How often in a second a stream with so many `events` per second was silent for `interval` seconds."""
    expected = events * interval
    if expected > 100:
        return 0.0
    return events / math.expm1(expected) if expected else 1 / interval


def stream_bytes(load: Load, costs: Costs, workers: int) -> float:
    further = max(0, load.topics_per_stream - 2) * costs.topic_bytes
    return costs.stream_bytes + _groups(load, workers) * (costs.own_bytes - costs.stream_bytes + further)


def _groups(load: Load, workers: int) -> float:
    """A stream's part of its group. A group is kept, and its payload made, once in each worker that has one of its
    streams; chance spreads them."""
    return workers * (1 - (1 - 1 / workers) ** load.group) / load.group


def connect_us(load: Load, costs: Costs) -> float:
    return costs.connect_us + (load.topics_per_stream - 1) * costs.connect_topic_us


def _cpu(load: Load, costs: Costs, rate: Rates, workers: int) -> dict[str, float]:
    """In cores. A delivery costs what one of many does, and the first of a message in each worker what the worker needs
    to wake up for it."""
    each = costs.event_us + _groups(load, workers) * max(0.0, costs.apart_us - costs.event_us)
    wake = max(0.0, costs.single_us - each) * min(workers, load.fan_out)
    publish = costs.publish_us + (workers - 1) * costs.receive_us
    used = {"connects": rate.connects * connect_us(load, costs), "publishes": rate.messages * publish,
            "deliveries": rate.deliveries * each + rate.messages * wake,
            "heartbeats": rate.heartbeats * costs.heartbeat_us, "idle": workers * costs.idle_us}
    return {name: spent * MICRO for name, spent in used.items()}


def _out(load: Load, costs: Costs, rate: Rates) -> float:
    return (rate.deliveries * (load.event_bytes + costs.frame_bytes + PACKET_BYTES)
            + rate.heartbeats * (costs.heartbeat_bytes + PACKET_BYTES)
            + rate.connects * (costs.head_bytes + (1 + CONNECT_PACKETS) * PACKET_BYTES)
            + rate.messages * (ANSWER_BYTES + PACKET_BYTES))


def _in(load: Load, rate: Rates) -> float:
    """Every packet that goes out is acknowledged."""
    return (rate.messages * (load.event_bytes + PUBLISH_BYTES + PACKET_BYTES)
            + rate.connects * (REQUEST_BYTES + (1 + CONNECT_PACKETS) * PACKET_BYTES)
            + (rate.deliveries + rate.heartbeats) * PACKET_BYTES)
