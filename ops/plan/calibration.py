"""What things cost on a machine: measured by calibrate.py, kept in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ops.plan.errors import PlanError
from ops.plan.machine import Machine

SHAPE = 1  # of the file; another one is refused
LEAST = {"connect_us": 0.001} | {each.name: 1 for each in fields(Machine)}  # what something is divided by
MOST = (1 << 63) - 1  # Linux's own for fs.file-max


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Memory in bytes, processor time (user and system, of all the service's processes) in microseconds.

    service_bytes: the master and one worker without streams; worker_bytes: each further worker. stream_bytes: a stream
    whose topics all others have too; own_bytes: one that shares one topic and has one of its own; topic_bytes: each
    further one of its own. socket_bytes: the kernel's part of one end of a connection.

    connect_us: a stream opens; connect_topic_us: more for each further topic. publish_us: an event is accepted, with
    the reading of one worker; receive_us: the reading of each further worker. event_us: an event goes to one of many
    streams that have the same topics; apart_us: of many that have different ones; single_us: to the only one that it is
    for. heartbeat_us: a heartbeat. idle_us: one worker without load, in a second.

    head_bytes, frame_bytes, heartbeat_bytes: on the wire, for a stream's head, an event without its data, a heartbeat.
    """

    service_bytes: float
    worker_bytes: float
    stream_bytes: float
    own_bytes: float
    topic_bytes: float
    socket_bytes: float
    connect_us: float
    connect_topic_us: float
    publish_us: float
    receive_us: float
    event_us: float
    apart_us: float
    single_us: float
    heartbeat_us: float
    idle_us: float
    head_bytes: float
    frame_bytes: float
    heartbeat_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """streams: how many were opened at a time. seconds: what it took."""

    date: str
    version: str
    streams: int
    seconds: float
    machine: Machine
    costs: Costs


def check_place(path: Path) -> None:
    """Raises PlanError if a calibration cannot be kept there."""
    if path.is_dir():
        raise PlanError(f"the calibration could not be written: {path} is a directory")
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise PlanError(f"the calibration could not be written: {error}") from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def save(calibration: Calibration, path: Path) -> None:
    """Write it as a whole or not at all. Raises PlanError."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"shape": SHAPE, **asdict(calibration)}, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise PlanError(f"the calibration cannot be written: {error}") from error


def load(path: Path) -> Calibration:
    """Raises PlanError: what is wrong with the file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no calibration: {error}") from error
    if not isinstance(found, dict) or found.get("shape") != SHAPE:
        raise PlanError(f"{path} is no calibration of this version: make a new one with --calibrate")
    return Calibration(date=_text(path, found, "date"), version=_text(path, found, "version"),
                       streams=int(_number(path, found, "streams")), seconds=_number(path, found, "seconds"),
                       machine=Machine(**{name: int(value) for name, value in _all(path, found, Machine).items()}),
                       costs=Costs(**_all(path, found, Costs)))


def _all(path: Path, found: dict[str, Any], kind: type[Costs] | type[Machine]) -> dict[str, float]:
    part = found.get(kind.__name__.lower())
    if not isinstance(part, dict):
        raise PlanError(f"{path} has no {kind.__name__.lower()}")
    return {each.name: _number(path, part, each.name) for each in fields(kind)}


def _number(path: Path, found: dict[str, Any], name: str) -> float:
    value, least = found.get(name), LEAST.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST:
        raise PlanError(f"{path}: {name} is a number of {least:g} or more, not {str(value)[:40]!r}")
    return value


def _text(path: Path, found: dict[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str):
        raise PlanError(f"{path}: {name} is a text, not {value!r}")
    return value
