"""The recordings of all workers of a service become one shape. Their format: pushsvc/recorder.py.

An event that several workers have seen is one event, whose fan-outs are summed. A worker that was killed has a file
without an end: its streams are taken to have ended with its last line. If a file was full, the shape ends there.

Each run of a service hashes with a key of its own. So files that were not written at the same time as the others and
have no name in common with them are of another run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from load.shape import Event, Shape, ShapeError, Stream, numbered, read_line, shaped

FORMAT = 1
LENGTHS = {"open": 6, "close": 4, "event": 9, "end": 3}
FULL, GONE = "full", "gone"


@dataclass(slots=True)
class _File:
    """One worker's. ended: how, or "" if it was cut off; until: the time of its last line."""

    path: Path
    rows: list[list[Any]] = field(default_factory=list)
    since: float = 0.0
    until: float = 0.0
    ended: str = ""

    def names(self) -> set[str]:
        """The hashes of its clients and topics."""
        lists = ([row[3], *row[4]] if row[0] == "open" else row[3] for row in self.rows if row[0] != "close")
        return {name for names in lists for name in names}


def read_recording(folder: Path) -> Shape:
    """The shape that the files of a folder hold together. Raises ShapeError."""
    files = [_read(path) for path in sorted(folder.glob("*.jsonl"))]
    if not files:
        raise ShapeError(f"{folder} has no recording (*.jsonl)")
    _check_run(files)
    begun = min(file.since for file in files)
    until = min((file.until for file in files if file.ended == FULL), default=max(file.until for file in files))
    streams = [stream for file in files for stream in _streams(file, begun, until)]
    events = _events(files, begun, until)
    return _renumbered(shaped(until - begun, streams, events, "recording"))


def _check_run(files: list[_File]) -> None:
    """Raises ShapeError if they are of several runs."""
    parts: list[tuple[_File, set[str]]] = []  # the files of each were written at the same time
    until = -math.inf
    for file in sorted(files, key=lambda each: each.since):
        if file.since > until:
            parts.append((file, set()))
        parts[-1][1].update(file.names())
        until = max(until, file.until)
    known = set[str]()
    for first, names in parts:
        if known and names and known.isdisjoint(names):
            raise ShapeError(f"{first.path} is of another run than the files before it: nobody and nothing is in both. "
                             "Give each run a folder of its own")
        known |= names


def _read(path: Path) -> _File:
    file = _File(path)
    try:
        first, *lines = path.read_text().split("\n")
    except OSError as error:
        raise ShapeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ShapeError(f"{path} is not UTF-8") from None
    read_line(path, 1, first, partial(_begin, file))
    for number, line in enumerate(lines[:-1], 2):  # what follows the last line feed was cut off
        read_line(path, number, line, partial(_take, file))
    return file


def _begin(file: _File, head: list[Any]) -> None:
    if head[:2] != ["shape", FORMAT]:
        raise ValueError(f"this is no recording of format {FORMAT}")
    file.since = file.until = head[2]


def _take(file: _File, row: list[Any]) -> None:
    if len(row) != LENGTHS.get(row[0]):
        raise ValueError(f"this is none of {', '.join(LENGTHS)}, or not all of one")
    if row[0] == "end":
        file.ended = row[2]
    else:
        file.rows.append(row)
    file.until = max(file.until, row[1])


def _streams(file: _File, begun: float, until: float) -> list[Stream]:
    ends = {row[2]: (row[1], row[3]) for row in file.rows if row[0] == "close"}
    if not file.ended:
        ends = {row[2]: (file.until, GONE) for row in file.rows if row[0] == "open"} | ends
    found = []
    for _, at, number, client, topics, resumed in (row for row in file.rows if row[0] == "open" and row[1] <= until):
        closed, reason = ends.get(number, (None, ""))
        over = closed is None or closed > until
        opened = max(0.0, at - begun)
        found.append(Stream(opened, None if over else max(opened, closed - begun), client, tuple(topics), bool(resumed),
                            "" if over else reason))
    return found


def _events(files: list[_File], begun: float, until: float) -> list[Event]:
    """Each once, whoever has seen it: sequence and time name it."""
    seen: dict[tuple[int, float], list[Any]] = {}
    for row in (row for file in files for row in file.rows if row[0] == "event" and begun <= row[1] <= until):
        known = seen.get((row[2], row[1]))
        if known is None:
            seen[row[2], row[1]] = list(row)
        else:
            known[8] += row[8]
    return [Event(row[1] - begun, tuple(row[3]), row[4], row[5], row[6], row[7], row[8]) for row in seen.values()]


def _renumbered(shape: Shape) -> Shape:
    """Numbers for the hashes, so that not even those stay."""
    clients = numbered(each.client for each in shape.streams)
    topics = numbered(topic for each in (*shape.streams, *shape.events) for topic in each.topics)
    kinds = numbered(each.kind for each in shape.events if each.kind) | {"": 0}
    keys = numbered(each.key for each in shape.events if each.key) | {"": 0}
    streams = [Stream(each.opened, each.closed, clients[each.client], tuple(topics[name] for name in each.topics),
                      each.resumed, each.reason) for each in shape.streams]
    events = [Event(each.at, tuple(topics[name] for name in each.topics), each.bytes, kinds[each.kind], each.keep,
                    keys[each.key], each.fan_out) for each in shape.events]
    return Shape(shape.seconds, tuple(streams), tuple(events), shape.source)
