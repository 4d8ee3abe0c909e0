"""A reader of event streams (WHATWG HTML, section 9.2.6), as far as the doctor needs one. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Event:
    """data: its lines, joined. id: the last one that the stream has named; "" for none."""

    data: str
    id: str


class Reader:
    """Takes the bytes of a stream, however they are cut. events: all so far. comments: without their colon."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.comments: list[str] = []
        self._rest = b""
        self._data: list[str] = []
        self._id = ""
        self._after_cr = False

    def feed(self, data: bytes) -> None:
        if self._after_cr:
            data = data.removeprefix(b"\n")  # the second half of a CRLF, whose CR has ended the line
        self._after_cr = data.endswith(b"\r") if data else self._after_cr
        *lines, self._rest = _LINE_END.split(self._rest + data)
        for line in lines:
            self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        if line.startswith(":"):
            self.comments.append(line[1:].strip())
            return
        if not line:
            self._dispatch()
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id":
            self._id = value

    def _dispatch(self) -> None:
        if self._data:
            self.events.append(Event("\n".join(self._data), self._id))
        self._data = []
