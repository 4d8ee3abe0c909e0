"""Events: what is published (a draft, checked here, once) and what the log holds (an event, trusted everywhere)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from pushsvc.errors import BadRequest

KEEP_ALL, KEEP_LATEST, KEEP_NONE = "all", "latest", "none"
KEEPS = (KEEP_ALL, KEEP_LATEST, KEEP_NONE)
DEFAULT_TYPE = "message"
MAX_NAME_BYTES = 255
MAX_TOPICS = 1000
MAX_RETRY_MS = 86_400_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Draft:
    """An event before it has its place in the log. Raises BadRequest where a field breaks the contract.

    topics: 1 to 1,000 different names, each 1 to 255 bytes. data: any text. event: the type, 1 to 255 bytes.
    keep: all, latest (newest per topic and key stays) or none (never in history). key: 0 to 255 bytes.
    retry: reconnection time for the reader in ms, or None to leave it.
    """

    topics: tuple[str, ...]
    data: str
    event: str = DEFAULT_TYPE
    keep: str = KEEP_ALL
    key: str = ""
    retry: int | None = None

    def __post_init__(self) -> None:
        check_topics(self.topics)
        check_name("event", self.event)
        if self.key:
            check_name("key", self.key)
        if self.keep not in KEEPS:
            raise BadRequest(f"keep is all, latest or none, not {self.keep!r}")
        if self.retry is not None and not 0 <= self.retry <= MAX_RETRY_MS:
            raise BadRequest(f"retry is 0 to {MAX_RETRY_MS} milliseconds")
        if not self.data.isascii():
            _check_unicode("data", self.data)


class Event(NamedTuple):
    """An event of the log. `seq` counts from 1 in its epoch; `at` is the time of its append, seconds since 1970.

    A named tuple, not a dataclass: readers make one per row, and it costs a third.
    """

    seq: int
    at: float
    topics: tuple[str, ...]
    event: str
    data: str
    keep: str
    key: str
    retry: int | None


def size_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def check_topics(topics: tuple[str, ...]) -> None:
    if not 1 <= len(topics) <= MAX_TOPICS:
        raise BadRequest(f"an event has 1 to {MAX_TOPICS} topics, not {len(topics)}")
    for topic in topics:
        check_name("topic", topic)
    if len(topics) > 1 and len(set(topics)) < len(topics):
        raise BadRequest("a topic is named twice")


def check_name(field: str, name: str) -> None:
    """A topic, an event type or a key: 1 to 255 bytes of UTF-8 without control characters."""
    _check_unicode(field, name)
    if not name:
        raise BadRequest(f"{field} is empty")
    if len(name) > MAX_NAME_BYTES or (not name.isascii() and len(name.encode()) > MAX_NAME_BYTES):
        raise BadRequest(f"{field} has more than {MAX_NAME_BYTES} bytes")
    if not name.isprintable() and _CONTROL.search(name):
        raise BadRequest(f"{field} has a control character")


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{field} has a lone surrogate, which UTF-8 cannot carry") from None
