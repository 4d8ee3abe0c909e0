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
from pushsvc.event import Event
from pushsvc.position import Position
from pushsvc.settings import Settings
from tests.support.wait import eventually


@contextlib.contextmanager
def memory(directory: Path) -> Iterator[str]:
    yield "memory:"


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[str]:
    yield f"sqlite:{directory / 'log' / 'push.db'}"


BROKERS: dict[str, Callable[[Path], AbstractContextManager[str]]] = {"memory": memory, "sqlite": sqlite}


class Side:
    """A started broker and all that it has handed over, as a hub would have got it.

    calls: every call in order, a Position for a reset and a list of events for a delivery. events: those of all
    deliveries. Changes are fields of Settings.
    """

    def __init__(self, url: str, **changes: Any) -> None:
        self.settings = Settings(broker_url=url, **changes)
        self.broker = open_broker(self.settings)
        self.calls: list[Position | list[Event]] = []
        self.broker.start(self._deliver, self.calls.append)

    def _deliver(self, events: Sequence[Event]) -> None:
        self.calls.append(list(events))

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
