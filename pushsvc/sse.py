"""The wire format of server-sent events (WHATWG HTML, section 9.2.5), out only. Pure: text in, bytes out.

A frame is an event's ready bytes, encoded once per wire form and shared by every stream that takes that form.
"""

from __future__ import annotations

import json
import re
from typing import Final

from pushsvc.event import DEFAULT_TYPE, Event

CONTENT_TYPE: Final = "text/event-stream"
# A comment without a blank line: a blank line sets the reader's last event id to what this connection has brought so
# far (section 9.2.6, dispatch, step 1), so before the first `id:` it would make a resuming reader forget where it was.
HEARTBEAT: Final = b":\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
# "Lines must be separated by either CRLF, a single LF, or a single CR": only these three end a line of data.
_LINE_END = re.compile(r"\r\n|\r|\n")


def head(retry_ms: int, stands_at: str = "") -> bytes:
    """What opens a stream at once: the reconnection time, and a comment so that the browser's `open` fires.

    `stands_at`: the position that the stream begins at. It goes out as an `id:` without data, which no reader shows,
    so that one whose connection breaks before its first event comes back with it and misses nothing.
    """
    return b"retry: %d\n: open\n" % retry_ms + (f"id: {stands_at}\n\n".encode() if stands_at else b"")


def encode(event: Event, epoch: str) -> bytes:
    """The frame of `event` in the plain form: event (not for `message`), id, data, retry (if the event has one)."""
    return _frame(event, epoch, event.data)


def encode_envelope(event: Event, epoch: str, topic: str) -> bytes:
    """The frame of `event` as one JSON object that names `topic`, the one of the stream's topics that matched."""
    body = {"id": f"{epoch}-{event.seq}", "topic": topic, "event": event.event, "data": event.data}
    return _frame(event, epoch, json.dumps(body, ensure_ascii=False, separators=(",", ":")))


def gap(missing_from: str, missing_to: str, reason: str, goes_on: str) -> bytes:
    """Tells that events after `missing_from` up to `missing_to` are not in history; the stream goes on from `goes_on`."""
    body = json.dumps({"from": missing_from, "to": missing_to, "reason": reason}, separators=(",", ":"))
    return f"event: gap\nid: {goes_on}\ndata: {body}\n\n".encode()


def farewell(reason: str, retry_ms: int | None) -> bytes:
    """The last bytes of a stream that we end: a comment with the reason and, unless None, when to come back."""
    comment = f": {reason}\n"
    return (comment if retry_ms is None else f"retry: {retry_ms}\n{comment}").encode()


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body (RFC 9112, section 7.1)."""
    return b"%X\r\n%b\r\n" % (len(data), data)


def _frame(event: Event, epoch: str, text: str) -> bytes:
    kind = "" if event.event == DEFAULT_TYPE else f"event: {event.event}\n"
    retry = "" if event.retry is None else f"retry: {event.retry}\n"
    if "\n" in text or "\r" in text:
        text = "\ndata: ".join(_LINE_END.split(text))
    return f"{kind}id: {epoch}-{event.seq}\ndata: {text}\n{retry}\n".encode()
