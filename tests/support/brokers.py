"""Every broker by name, and one process's side of one: what the contract suite runs over.

A further broker needs one function in BROKERS: it gives the URL of a fresh log that lives until the `with` ends, and
skips (locally) or fails (in CI) where its server is missing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pushsvc.brokers import open_broker
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft, Event
from pushsvc.position import Position
from pushsvc.settings import Settings
from tests.support.redis import Redis
from tests.support.wait import eventually


@contextlib.contextmanager
def memory(directory: Path) -> Iterator[str]:
    yield "memory:"


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[str]:
    yield f"sqlite:{directory / 'log' / 'push.db'}"


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[str]:
    with Redis(directory / "redis") as server:
        yield server.url


BROKERS: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "memory": memory, "sqlite": sqlite, "redis": redis}
WATCHED = ("a", "b", "c", "one", "two")


def data(side: "Side") -> list[str]:
    """The data of all that a side has heard."""
    return [event.data for event in side.events]


def put(side: "Side", text: str, topic: str = "a", **fields: Any) -> Position:
    """Publish one event of one topic."""
    return side.broker.append([Draft((topic,), text, **fields)])[0]


class Side:
    """A started broker and all that it has handed over of the topics in WATCHED, as a hub would have got it.

    calls: every call in order, a Position for a reset and a list of events for a delivery. events: those of all
    deliveries. gaps: of the resets that tell one, after what and up to where. Changes are fields of Settings.
    """

    def __init__(self, url: str, **changes: Any) -> None:
        self.settings = Settings(broker_url=url, **changes)
        self.broker = open_broker(self.settings)
        self.calls: list[Position | list[Event]] = []
        self.gaps: list[tuple[Position, Position]] = []
        self.broker.start(self._deliver, self._reset)
        self.watch(*WATCHED)

    def _deliver(self, events: Sequence[Event]) -> None:
        self.calls.append(list(events))

    def _reset(self, position: Position, since: Position | None = None, upto: int = 0) -> None:
        self.calls.append(position)
        if since is not None:
            self.gaps.append((since, position._replace(seq=max(upto, position.seq))))

    def watch(self, *topics: str) -> None:
        """From now on what is published to `topics` is heard, if the broker can be reached at all."""
        self.broker.watch(topics)
        with contextlib.suppress(BrokerUnavailable):
            self.broker.head()

    @property
    def events(self) -> list[Event]:
        return [event for call in self.calls if isinstance(call, list) for event in call]

    @property
    def resets(self) -> list[Position]:
        return [call for call in self.calls if isinstance(call, Position)]

    def heard(self, count: int, timeout: float = 20) -> list[Event]:
        """All events that were delivered, once there are `count`."""
        eventually(lambda: len(self.events) >= count, timeout, message=f"{count} events are delivered")
        return self.events

    def history(self, *topics: str, after: int = 0) -> list[Event]:
        """All that history holds for `topics` after a sequence, page by page."""
        events: list[Event] = []
        more = True
        while more:
            page = self.broker.history(topics, events[-1].seq if events else after, 100)
            assert page.events or not page.more, "more was promised, none came"
            events += page.events
            more = page.more
        return events

    def missing(self, *topics: str, after: int = 0) -> int:
        return self.broker.history(topics, after, 1).missing


Open = Callable[..., Side]  # a Side of a server, with changed settings
