"""A log of a chat as a table becomes a shape: one stream per person, one topic for the channel, an event per message.

The table is CSV with the columns `seconds`, `kind` (join, leave or message), `who` and `bytes`; times do not go back.
Whoever speaks or leaves without having joined was there from the beginning, or from then on if that is known to be
untrue. A join of somebody who is there means that their end was not logged: the stream breaks, and resumes at once.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

from load.shape import MOST_BYTES, Event, Shape, ShapeError, Stream, numbered, shaped, with_fan_outs

COLUMNS = ("seconds", "kind", "who", "bytes")
JOIN, LEAVE, MESSAGE = "join", "leave", "message"
GONE = "gone"
CHANNEL = 1


@dataclass(slots=True)
class _People:
    """Who is there since when, and the streams of those who were."""

    numbers: dict[str, int]
    here: dict[str, float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    streams: list[Stream] = field(default_factory=list)
    resumed: set[str] = field(default_factory=set)

    def come(self, who: str, at: float) -> None:
        self.leave(who, at)
        self.here[who] = at
        if who in self.known:
            self.resumed.add(who)
        self.known.add(who)

    def be(self, who: str, at: float) -> None:
        """It is seen to be there."""
        if who not in self.here:
            self.come(who, at if who in self.known else 0.0)

    def leave(self, who: str, at: float | None) -> None:
        if who in self.here:
            opened = self.here.pop(who)
            self.streams.append(Stream(opened, at, self.numbers[who], (CHANNEL,), who in self.resumed,
                                       GONE if at is not None else ""))


def read_table(path: Path) -> Shape:
    """The shape of a table. Raises ShapeError, which names the line."""
    rows = _rows(path)
    people = _People(numbered(who for _, _, who, _ in rows))
    events = []
    for at, kind, who, size in rows:
        if kind == JOIN:
            people.come(who, at)
        else:
            people.be(who, at)
        if kind == LEAVE:
            people.leave(who, at)
        elif kind == MESSAGE:
            events.append(Event(at, (CHANNEL,), size))
    for who in list(people.here):
        people.leave(who, None)
    return with_fan_outs(shaped(rows[-1][0] if rows else 0.0, people.streams, events, "table"))


def _rows(path: Path) -> list[tuple[float, str, str, int]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ShapeError(f"{path}: the columns are {', '.join(COLUMNS)}")
            return _checked(path, reader)
    except OSError as error:
        raise ShapeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ShapeError(f"{path} is not UTF-8") from None
    except csv.Error as error:
        raise ShapeError(f"{path} is no CSV: {error}") from None


def _checked(path: Path, reader: csv.DictReader[str]) -> list[tuple[float, str, str, int]]:
    rows: list[tuple[float, str, str, int]] = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            read = float(row["seconds"]), row["kind"], row["who"], int(row["bytes"])
        except (TypeError, ValueError):
            raise ShapeError(f"{where}: seconds and bytes are numbers") from None
        if read[1] not in (JOIN, LEAVE, MESSAGE):
            raise ShapeError(f"{where}: kind is {JOIN}, {LEAVE} or {MESSAGE}")
        if not 0 <= read[0] < float("inf") or read[3] < 0 or not read[2]:
            raise ShapeError(f"{where}: a value is missing or negative")
        if read[3] > MOST_BYTES:
            raise ShapeError(f"{where}: bytes are {MOST_BYTES} at most")
        if rows and read[0] < rows[-1][0]:
            raise ShapeError(f"{where}: the time goes back")
        rows.append(read)
    return rows
