"""A plan as text and as JSON, with every assumption in it. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ops.limits.needs import UNEVEN
from ops.plan.calibration import Calibration
from ops.plan.kernel import command
from ops.plan.load import Load
from ops.plan.machine import Machine
from ops.plan.needs import HOUR, PACKET_BYTES, PUBLISH_BYTES, REQUEST_BYTES, Needs, rates
from ops.plan.walls import CPU_USABLE, MEMORY_USABLE, Wall
from pushsvc.settings import Settings

USED = ("backlog", "max_streams", "max_connections", "heartbeat_seconds", "rotate_seconds")  # the settings that count


def assumptions(load: Load, machine: Machine, settings: Settings, calibration: Calibration) -> list[str]:
    """Sentences. What is not measured, not given and not a limit of the machine is here."""
    costs, rate, many = calibration.costs, rates(load, settings), "s" * (load.sockets > 1)
    alone = ", so no two share a payload" if load.group == 1 else ""
    rotation = f"one per {settings.rotate_seconds / HOUR:g} h" if settings.rotate_seconds else "none"
    return [
        f"Costs: measured {calibration.date} with {calibration.streams:,} streams ({calibration.version}), on loopback, "
        "without TLS, tokens, presence or a proxy. On loopback the service pays for the reader's half of a packet too; "
        "a network card costs something else.",
        f"Machine: {machine.cores} cores, {_bytes(machine.memory_bytes)}, {machine.descriptors:,} descriptors per "
        f"process. The service has it for itself, and may use {CPU_USABLE:.0%} of each core and {MEMORY_USABLE:.0%} of "
        "the memory.",
        f"Messages: {load.messages_per_second:g}/s of all users together, each to {load.fan_out:g} open streams, with "
        f"{load.event_bytes:,} bytes of data (below 1 KB they do not change the processor time), one by one: batches "
        "are cheaper.",
        f"Streams: {load.topics_per_stream} topics each, {load.group} with the same topics{alone}. The fullest worker "
        f"has {UNEVEN:g} times its even share.",
        f"Reconnects: {load.reconnects_per_hour:g} per stream and hour, and {rotation} by PUSHSVC_ROTATE_SECONDS. They "
        "find nothing to replay.",
        f"Bandwidth: a request has {REQUEST_BYTES} bytes, a publish {PUBLISH_BYTES} and its data, a packet "
        f"{PACKET_BYTES} of headers; each packet is acknowledged, none is sent twice.",
        f"Heartbeats: after {settings.heartbeat_seconds:g} s of silence (PUSHSVC_HEARTBEAT_SECONDS). Events come at "
        f"random, {rate.deliveries / load.users * HOUR:.3g} per stream and hour.",
        f"Storm: all streams come back within {load.storm_seconds:g} s, evenly, while the cores do nothing else.",
        f"Kernel: {load.sockets} socket{many} of each stream on this machine, {costs.socket_bytes:,.0f} bytes each, "
        "idle. What waits in their buffers comes on top, and so does a proxy's own memory.",
        _proxies(load, machine),
        "Distance: users, messages and reconnects grow together, workers and addresses stay as planned.",
    ]


def _proxies(load: Load, machine: Machine) -> str:
    if not load.proxies:
        return "Ports: clients connect themselves, each from its own address."
    return (f"Ports: proxies connect from {load.proxies} address{'es' * (load.proxies > 1)}, with a connection for each "
            f"stream; between two addresses there can be {machine.ports:,} (net.ipv4.ip_local_port_range).")


def _kernel(load: Load, need: Needs, small: Sequence[str]) -> str:
    told = f"too small on this machine: {'; '.join(small)}" if small else "none too small on this machine"
    return f"Settings of the kernel: `{command(load, need)}` has to find all enough; {told}."


def as_json(load: Load, machine: Machine, settings: Settings, calibration: Calibration, need: Needs,
            found: list[Wall], small: Sequence[str] = ()) -> dict[str, Any]:
    """Bytes, cores, seconds. small: settings of the kernel that are. A wall's `reach` null: no such load meets it.
    first_wall: nearest; first_hard_wall: the nearest that no setting moves."""
    hard = next(wall for wall in found if not wall.is_setting)
    return {"fits": fits(found), "load": asdict(load), "machine": asdict(machine),
            "settings": {name: getattr(settings, name) for name in USED}, "calibration": asdict(calibration),
            "rates": asdict(rates(load, settings)), "needs": asdict(need), "walls": [_wall(load, wall) for wall in found],
            "first_wall": found[0].name, "first_hard_wall": hard.name,
            "assumptions": [*assumptions(load, machine, settings, calibration), _kernel(load, need, small)]}


def _wall(load: Load, wall: Wall) -> dict[str, Any]:
    if math.isinf(wall.reach):
        return asdict(wall) | {"reach": None, "users": None}
    return asdict(wall) | {"users": int(load.users * wall.reach)}


def fits(found: list[Wall]) -> bool:
    return found[0].reach >= 1


def as_text(load: Load, machine: Machine, settings: Settings, calibration: Calibration, need: Needs,
            found: list[Wall], small: Sequence[str] = ()) -> str:
    facts = _rows(_facts(load, machine, settings, need))
    table = _rows([("wall", "reach", "users", "need", "limit", "setting"), *(_line(load, wall) for wall in found)])
    assumed = [*assumptions(load, machine, settings, calibration), _kernel(load, need, small)]
    notes = "\n".join(f"- {each}" for each in assumed)
    return f"{facts}\n\n{table}\n\n{verdict(load, found)}\n\nAssumed:\n{notes}"


def verdict(load: Load, found: list[Wall]) -> str:
    first, hard = found[0], next(wall for wall in found if not wall.is_setting)
    if first.reach < 1:
        names = "; ".join(f"{wall.name}: {wall.setting}" for wall in found if wall.reach < 1)
        text = f"Does not fit as it is. In the way: {names}."
    else:
        text = f"Fits. The first wall is {first.name}, at {_reach(first.reach)} this load: {first.setting}."
    if hard is not first:
        text += f" The first that no setting moves is {hard.name}, at {_reach(hard.reach)} this load: {hard.setting}."
    return text


def _facts(load: Load, machine: Machine, settings: Settings, need: Needs) -> list[tuple[str, ...]]:
    parts = {name: getattr(need, f"cpu_{name}") for name in ("publishes", "deliveries", "connects", "heartbeats", "idle")}
    rate = rates(load, settings)
    return [
        ("load", f"{load.users:,} streams; {rate.messages:,.4g} messages, {rate.deliveries:,.4g} deliveries, "
         f"{rate.connects:,.4g} connects, {rate.heartbeats:,.4g} heartbeats a second"),
        ("workers", f"{need.workers} (WEB_CONCURRENCY), {need.streams_per_worker:,} streams in the fullest, "
         f"at most {need.max_streams:,}"),
        ("addresses", f"{need.addresses} to listen on (PUSHSVC_BIND), {need.ports:,} connections from each proxy address"
         if load.proxies else "1 to listen on"),
        ("memory, ours", f"{_bytes(need.memory_workers)}, of it {_bytes(need.memory_base)} without streams"),
        ("memory, kernel's", _bytes(need.memory_kernel)),
        ("bandwidth", f"out {_bytes(need.out_bytes)}/s, in {_bytes(need.in_bytes)}/s"),
        ("descriptors", f"{need.descriptors_per_worker:,} in the fullest worker, {need.files:,} in all"),
        ("cpu", f"{need.core_use:.1%} of each of {min(need.workers, machine.cores)} cores: "
         + ", ".join(f"{name} {value:.3f}" for name, value in parts.items())),
        ("storm", f"all are back after {need.storm_done_seconds:.1f} s; "
         f"at most {need.storm_queue:,.0f} wait at a worker"),
    ]


def _line(load: Load, wall: Wall) -> tuple[str, ...]:
    users = "" if math.isinf(wall.reach) else f"{int(load.users * wall.reach):,}"
    need, limit = _amount(wall, wall.need), _amount(wall, wall.limit) + _unit(wall)
    return wall.name, _reach(wall.reach), users, need, limit, wall.setting


def _reach(reach: float) -> str:
    return "never" if math.isinf(reach) else f"{reach:,.2f}x"


def _unit(wall: Wall) -> str:
    return "" if wall.unit == "bytes" else f" {wall.unit}"


def _amount(wall: Wall, count: float) -> str:
    if wall.unit == "bytes":
        return _bytes(count)
    return f"{count:.3g}" if wall.unit == "cores" else f"{count:,.0f}"


def _rows(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
