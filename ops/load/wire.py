"""What comes on the wire, read without a clock or a socket: chunks, events, and in an event the number of the replay.

The data of an event is `@DUE NUMBER ` filled up with x to its size: when it was due, in microseconds since the replay
began, and which event it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MARK = re.compile(rb"^data: ?@(\d+) (\d+) ", re.MULTILINE)
ID = re.compile(rb"^id(?:: ?([^\n]*))?$", re.MULTILINE)
GAP = re.compile(rb"^event: ?gap$", re.MULTILINE)
RETRY = re.compile(rb"^retry: ?(\d+)$", re.MULTILINE)


class WireError(Exception):
    """The bytes are not HTTP as it should be."""


class Read(NamedTuple):
    """What some bytes held. marks: (due in microseconds, number) of each event of the replay, in order. last_id: the
    newest, None if there was none. gaps: how many were told. retry: in ms, or None. text, raw: what is left for the next
    read, of an event and of a chunk. ended: the body is over."""

    marks: tuple[tuple[int, int], ...]
    last_id: bytes | None
    gaps: int
    retry: int | None
    text: bytes
    raw: bytes
    ended: bool


def data_of(due_us: int, number: int, size: int) -> str:
    """The data of event `number`, filled up to `size` bytes; longer if its mark is."""
    return f"@{due_us} {number} ".ljust(size, "x")


def read(data: bytes, chunked: bool, text: bytes = b"", raw: bytes = b"") -> Read:
    """What `data` holds; text, raw: what the read before left. Raises WireError."""
    body, raw, ended = _dechunked(raw + data) if chunked else (data, b"", False)
    body = text + body
    held = b"\r" if body.endswith(b"\r") else b""  # a line feed may follow
    if b"\r" in body:
        body = body[: len(body) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    cut = body.rfind(b"\n\n") + 2
    whole, rest = (body[:cut], body[cut:]) if cut > 1 else (b"", body)
    ids, retries = ID.findall(whole), RETRY.findall(whole)
    marks = tuple((int(due), int(number)) for due, number in MARK.findall(whole))
    return Read(marks, ids[-1] if ids else None, len(GAP.findall(whole)), int(retries[-1]) if retries else None,
                rest + held, raw, ended)


def _dechunked(data: bytes) -> tuple[bytes, bytes, bool]:
    """The content of all whole chunks, what is left behind them, and whether the last one was among them (RFC 9112,
    section 7.1)."""
    parts: list[bytes] = []
    at = 0
    while (end := data.find(b"\r\n", at)) >= 0:
        try:
            size = int(data[at:end].partition(b";")[0], 16)
        except ValueError:
            raise WireError(f"no chunk begins with {data[at : at + 20]!r}") from None
        if size == 0:
            return b"".join(parts), b"", True
        start = end + 2
        if len(data) < start + size + 2:
            break
        parts.append(data[start : start + size])
        at = start + size + 2
    return b"".join(parts), data[at:], False
