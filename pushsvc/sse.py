"""The wire format of server-sent events (WHATWG HTML, section 9.2.5), out only. Pure: text in, bytes out.

A frame is an event's ready bytes, encoded once per wire form and shared by every stream that takes that form.
"""

from __future__ import annotations

import json
import re
from typing import Final

from pushsvc.event import DEFAULT_TYPE, Event

CONTENT_TYPE: Final = "text/event-stream"
HEARTBEAT: Final = b":\n\n"
# "Lines must be separated by either CRLF, a single LF, or a single CR": only these three end a line of data.
_LINE_END = re.compile(r"\r\n|\r|\n")


def head(retry_ms: int) -> bytes:
    """What opens a stream at once: the reconnection time, and a comment so that the browser's `open` fires."""
    return b"retry: %d\n: open\n\n" % retry_ms


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
    comment = f": {reason}\n\n"
    return (comment if retry_ms is None else f"retry: {retry_ms}\n{comment}").encode()


def _frame(event: Event, epoch: str, text: str) -> bytes:
    kind = "" if event.event == DEFAULT_TYPE else f"event: {event.event}\n"
    retry = "" if event.retry is None else f"retry: {event.retry}\n"
    if "\n" in text or "\r" in text:
        text = "\ndata: ".join(_LINE_END.split(text))
    return f"{kind}id: {epoch}-{event.seq}\ndata: {text}\n{retry}\n".encode()
