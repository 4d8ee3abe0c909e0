"""A shape: what traffic looked like, without what it said. When streams came and went, what events came, and to how many.

Everything is a number: clients, topics, types and keys are numbered at random, and the table is thrown away. The file is
JSON lines (docs/load.md); in memory a stream is one record from its opening to its end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

FORMAT = 1
KEEPS = ("all", "latest", "none")
MOST = 1 << 53  # of a number in a file: larger ones are not exact in JSON
MOST_BYTES = 1 << 26  # of an event's data: a replay has some of them in memory at once
Checked = TypeVar("Checked")


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
    """Read the file. Raises ShapeError, which names the line."""
    try:
        with path.open(encoding="utf-8") as file:
            head = read_line(path, 1, file.readline(), _checked_head)
            course = _Course(head["seconds"])
            return _assembled(head, [read_line(path, number, line, course.taken) for number, line in enumerate(file, 2)])
    except OSError as error:
        raise ShapeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ShapeError(f"{path} is not UTF-8") from None


def read_line(path: Path, number: int, line: str, check: Callable[[Any], Checked]) -> Checked:
    """What `check` makes of one line of JSON. Raises ShapeError, which names the line, for what is none, and for what
    `check` raises."""
    try:
        return check(json.loads(line.rstrip("\n")))
    except json.JSONDecodeError as error:
        raise ShapeError(f"{path}, line {number}, column {error.colno}: no JSON: {error.msg}") from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ShapeError(f"{path}, line {number}: {error}") from None


def _checked_head(head: Any) -> dict[str, Any]:
    """The first line. Raises ValueError."""
    if not isinstance(head, dict) or head.get("shape") != FORMAT:
        raise ValueError(f"this is no shape of format {FORMAT}")
    if not _is_time(head.get("seconds")) or not isinstance(head.get("source"), str):
        raise ValueError("the first line has `seconds`, a number of 0 or more, and `source`, a text")
    return head


def _checked(row: Any) -> list[Any]:
    """Any other line. Raises ValueError."""
    kind = row[0] if isinstance(row, list) and row else None
    columns = COLUMNS.get(kind) if isinstance(kind, str) else None
    if columns is None:
        raise ValueError(f"it is {', '.join(COLUMNS)}: an array that begins with one of these words")
    if len(row) != len(columns) + 1:
        raise ValueError(f"`{kind}` is followed by {', '.join(columns)}")
    for name, value in zip(columns, row[1:], strict=True):
        wanted, is_good = VALUES.get(name, NUMBER)
        if not is_good(value):
            raise ValueError(f"{name} is {wanted}, not {json.dumps(value)[:40]}")
    return row


class _Course:
    """What the lines before tell of the next one. seconds: how long the shape takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = 0.0
        self._opened: set[int] = set()
        self._open: set[int] = set()

    def taken(self, row: Any) -> list[Any]:
        """The next line, checked. Raises ValueError."""
        found = _checked(row)
        kind, at, stream = found[:3]
        if at < self._at:
            raise ValueError(f"it is at {at:g} s, before the line above, at {self._at:g} s")
        if at > self._seconds:
            raise ValueError(f"it is at {at:g} s, after the {self._seconds:g} s that the shape takes")
        self._at = at
        if kind == "open" and stream in self._opened:
            raise ValueError(f"stream {stream} is opened a second time")
        if kind == "close" and stream not in self._open:
            raise ValueError(f"stream {stream} ends, and is not open")
        if kind == "open":
            self._opened.add(stream)
            self._open.add(stream)
        elif kind == "close":
            self._open.remove(stream)
        return found


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MOST


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _are_topics(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


NUMBER = "a whole number of 0 or more", _is_number
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "at": ("a number of 0 or more", _is_time), "topics": ("an array of one whole number or more", _are_topics),
    "resumed": ("0 or 1", lambda value: value in (0, 1)), "reason": ("a text", lambda value: isinstance(value, str)),
    "bytes": (f"a whole number of 0 to {MOST_BYTES}", lambda value: _is_number(value) and value <= MOST_BYTES),
    "keep": (", ".join(KEEPS), lambda value: value in KEEPS)}
COLUMNS = {"open": ("at", "stream", "client", "topics", "resumed"), "close": ("at", "stream", "reason"),
           "event": ("at", "topics", "bytes", "type", "keep", "key", "fan_out")}


def _assembled(head: dict[str, Any], rows: list[list[Any]]) -> Shape:
    ends = {row[2]: (row[1], row[3]) for row in rows if row[0] == "close"}
    streams = [Stream(row[1], ends.get(row[2], (None, ""))[0], row[3], tuple(row[4]), bool(row[5]),
                      ends.get(row[2], (None, ""))[1]) for row in rows if row[0] == "open"]
    events = [Event(row[1], tuple(row[2]), *row[3:]) for row in rows if row[0] == "event"]
    return shaped(float(head["seconds"]), streams, events, head["source"])


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
