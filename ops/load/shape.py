"""A shape: what traffic looked like, without what it said. When streams came and went, what events came, and to how many.

Everything is a number: clients, topics, types and keys are numbered at random, and the table is thrown away. The file is
JSON lines (docs/load.md); in memory a stream is one record from its opening to its end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

FORMAT = 1
KEEPS = ("all", "latest", "none")


class ShapeError(Exception):
    """A file is not what it should be; the text says which, where and why."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream. opened, closed: seconds since the beginning; closed None: open at the end. resumed: came with an id.
    reason: why it ended, as the service says it; "" if nobody knows."""

    opened: float
    closed: float | None
    client: int
    topics: tuple[int, ...]
    resumed: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One event. at: seconds since the beginning. kind, key: 0 for the default type, for no key. fan_out: how many
    streams it was for."""

    at: float
    topics: tuple[int, ...]
    bytes: int
    kind: int = 0
    keep: str = "all"
    key: int = 0
    fan_out: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """All of it: streams by their opening, events by their time. seconds: how long it took. source: where it is from."""

    seconds: float
    streams: tuple[Stream, ...]
    events: tuple[Event, ...]
    source: str = ""


def numbered(names: Iterable[Hashable]) -> dict[Any, int]:
    """Numbers from 1 for the different names, drawn at random: they tell nothing about the names or their order."""
    unique = list(dict.fromkeys(names))
    random.SystemRandom().shuffle(unique)
    return {name: number for number, name in enumerate(unique, 1)}


def shaped(seconds: float, streams: Iterable[Stream], events: Iterable[Event], source: str) -> Shape:
    """A shape in order of time."""
    return Shape(seconds, tuple(sorted(streams, key=attrgetter("opened"))), tuple(sorted(events, key=attrgetter("at"))),
                 source)


def expanded(shape: Shape, times: int = 1, speed: float = 1.0, spread: float = 0.1) -> Shape:
    """`times` copies of the population, each with clients, topics and keys of its own, begun one after the other over
    `spread` of the shape's duration, so that no two do the same at the same time; and all of it `speed` times as fast."""
    shifts = [shape.seconds * spread * copy / times for copy in range(times)]
    sizes = {"client": _most(each.client for each in shape.streams), "key": _most(each.key for each in shape.events),
             "topic": _most(topic for each in (*shape.streams, *shape.events) for topic in each.topics)}
    streams = (_copied_stream(each, copy, shift, speed, sizes) for copy, shift in enumerate(shifts)
               for each in shape.streams)
    events = (_copied_event(each, copy, shift, speed, sizes) for copy, shift in enumerate(shifts)
              for each in shape.events)
    return shaped((shape.seconds + max(shifts)) / speed, streams, events, shape.source)


def _most(numbers: Iterable[int]) -> int:
    return max(numbers, default=0)


def _copied_stream(stream: Stream, copy: int, shift: float, speed: float, sizes: dict[str, int]) -> Stream:
    return replace(stream, opened=(stream.opened + shift) / speed, client=stream.client + copy * sizes["client"],
                   closed=None if stream.closed is None else (stream.closed + shift) / speed,
                   topics=tuple(topic + copy * sizes["topic"] for topic in stream.topics))


def _copied_event(event: Event, copy: int, shift: float, speed: float, sizes: dict[str, int]) -> Event:
    return replace(event, at=(event.at + shift) / speed, key=event.key and event.key + copy * sizes["key"],
                   topics=tuple(topic + copy * sizes["topic"] for topic in event.topics))


# -- the file


def write_shape(path: Path, shape: Shape) -> None:
    """Write the file. Raises OSError."""
    with path.open("w") as file:
        file.write(json.dumps({"shape": FORMAT, "seconds": round(shape.seconds, 3), "source": shape.source}) + "\n")
        for row in _rows(shape):
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def _rows(shape: Shape) -> list[list[Any]]:
    rows: list[list[Any]] = [["event", round(each.at, 3), list(each.topics), each.bytes, each.kind, each.keep, each.key,
                              each.fan_out] for each in shape.events]
    for number, each in enumerate(shape.streams, 1):
        rows.append(["open", round(each.opened, 3), number, each.client, list(each.topics), int(each.resumed)])
        if each.closed is not None:
            rows.append(["close", round(each.closed, 3), number, each.reason])
    return sorted(rows, key=lambda row: row[1])


def read_shape(path: Path) -> Shape:
    """Read the file. Raises ShapeError."""
    try:
        with path.open() as file:
            head = json.loads(file.readline())
            if head.get("shape") != FORMAT:
                raise ShapeError(f"{path} is no shape of format {FORMAT}")
            return _assembled(head, [json.loads(line) for line in file])
    except OSError as error:
        raise ShapeError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ShapeError(f"{path} is not a shape: {error}") from None


def _assembled(head: dict[str, Any], rows: list[list[Any]]) -> Shape:
    ends = {row[2]: (row[1], row[3]) for row in rows if row[0] == "close"}
    streams = [Stream(row[1], ends.get(row[2], (None, ""))[0], row[3], tuple(row[4]), bool(row[5]),
                      ends.get(row[2], (None, ""))[1]) for row in rows if row[0] == "open"]
    events = [Event(row[1], tuple(row[2]), *row[3:]) for row in rows if row[0] == "event"]
    return shaped(float(head["seconds"]), streams, events, str(head["source"]))


def with_fan_outs(shape: Shape) -> Shape:
    """The same shape with each event's fan-out counted from the streams that were open."""
    changes = sorted(_changes(shape), key=lambda change: change[0])
    here: dict[int, set[int]] = {}
    events, at = [], 0
    for event in shape.events:
        while at < len(changes) and changes[at][0] <= event.at:
            _, topics, stream, there = changes[at]
            for topic in topics:
                (here.setdefault(topic, set()).add if there else here.setdefault(topic, set()).discard)(stream)
            at += 1
        reached = set().union(*(here.get(topic, set()) for topic in event.topics))
        events.append(replace(event, fan_out=len(reached)))
    return replace(shape, events=tuple(events))


def _changes(shape: Shape) -> Iterator[tuple[float, tuple[int, ...], int, bool]]:
    for number, stream in enumerate(shape.streams):
        yield stream.opened, stream.topics, number, True
        if stream.closed is not None:
            yield stream.closed, stream.topics, number, False
