"""The broker contract, on one screen. One suite of contract tests runs over every broker.

A publish goes out by `append` and comes back by the callables given to `start`, also to its own process: one path,
one order. A broker never imports the hub.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from pushsvc.event import Draft, Event, size_of
from pushsvc.position import Position

CLOSED = "the broker is closed"
PAGE_BYTES = 1 << 20  # the data of one page of history, or of one stretch handed over; one event at least
MOST_MARKS = 100_000  # topics whose losses are remembered one by one; the rest share one mark
Deliver = Callable[[Sequence[Event]], None]


class Reset(Protocol):
    """`since`: None when nothing is known of what follows: streams end and resume by id. Else the position after which
    events may be lost, up to the sequence `upto` (0: that of `position`); what follows is all that the log holds after
    `position`, which no event handed over has: streams go on, and are told the gap."""

    def __call__(self, position: Position, since: Position | None = None, upto: int = 0) -> None: ...


class Page(NamedTuple):
    """A stretch of history, read at one moment. `events`: in order. `more`: whether history went on then.
    `missing`: the newest sequence after the asked one whose event retention has taken from these topics; 0 for none."""

    events: list[Event]
    more: bool
    missing: int


def page_of(events: Iterable[Event]) -> tuple[list[Event], bool]:
    """The first of `events` that fill a page, one at least; whether that was the reason to stop."""
    page: list[Event] = []
    total = 0
    for event in events:
        total += size_of(event.data)
        if total > PAGE_BYTES and page:
            return page, True
        page.append(event)
    return page, False


class Broker(ABC):
    """The log of one deployment. All of it raises BrokerUnavailable when the log cannot be reached."""

    @abstractmethod
    def start(self, deliver: Deliver, reset: Reset) -> None:
        """Begin to hand over. `reset(position)`: first, and whenever what follows does not join what came before:
        another epoch, or events that were lost to this reader. Then `deliver(events)`: every event after that
        position of the topics that are watched (of others too, if that is cheaper), once, in order, whatever its
        `keep`. Both are called in a greenlet and do not switch."""

    @abstractmethod
    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        """Put `drafts` at the end of the log, all or none, in one stretch of the order; their positions.
        Returns when they outlive this process. With a `key` seen within the idempotency window nothing is appended
        and the first answer is given again. Switches."""

    @abstractmethod
    def head(self) -> Position:
        """The position of the newest event that anybody was told of before this call. Switches."""

    @abstractmethod
    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        """The first at most `limit` events after `after` (of the present epoch) that history holds for any of
        `topics`, each once. Pages are also bounded in bytes. Switches."""

    @abstractmethod
    def check(self) -> None:
        """Try whether the log can be written and read now; raises BrokerUnavailable with the reason. Switches."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was accepted, give everything back. Idempotent. Switches."""

    def watch(self, topics: Sequence[str]) -> None:
        """This process has streams for `topics` from now on. Brokers that hand over everything ignore it. What is
        published after the next `head()` or `history()` has begun is handed over. Atomic: no switch."""
        return

    def unwatch(self, topics: Sequence[str]) -> None:
        """This process has no more streams for `topics`. Atomic: no switch."""
        return

    def precedes(self, epoch: str) -> bool:
        """Whether the log went through `epoch` before the present one, and its numbers went on. Switches."""
        return False

    def depths(self) -> dict[str, int]:
        """How much waits in each of the broker's queues, for the metrics. Atomic: no switch."""
        return {}
