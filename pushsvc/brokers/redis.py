"""`redis:` the log of several machines, in Redis or Valkey. The scripts beside this file do what must be done at once;
`log.lua` has the keys, `redis_line` the connection that asks, `redis_reader` the one that listens."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pushsvc.brokers.base import CLOSED, PAGE_BYTES, Broker, Deliver, Page, Reset, page_of
from pushsvc.brokers.redis_address import parse_address
from pushsvc.brokers.redis_codec import events_of, positions_of, publish_arguments
from pushsvc.brokers.redis_line import HISTORY, PUBLISH, Line
from pushsvc.brokers.redis_link import Link, Refused
from pushsvc.brokers.redis_reader import READER, Reader
from pushsvc.brokers.trouble import Trouble
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft
from pushsvc.position import Position
from pushsvc.settings import Settings, hide

JOIN_SECONDS = 2.0  # how long a stream that opens waits for its topics to be listened to
CHECK_SECONDS = 2.0


class RedisBroker(Broker):
    """The log in the Redis that `settings.broker_url` names. Raises SettingsError for an address that is none."""

    def __init__(self, settings: Settings) -> None:
        address = parse_address(settings.broker_url)
        limits = (settings.history_events, round(settings.history_seconds * 1000),
                  max(1, round(settings.idempotency_seconds)))
        seconds, prefix = settings.publish_timeout_seconds, settings.redis_prefix
        self._trouble = Trouble(time.monotonic, (OSError, Refused, BrokerUnavailable))

        def new_link() -> Link:
            return Link(address, prefix, seconds, limits)

        def new_line(replicas: int, publisher: Line | None = None) -> Line:
            return Line(new_link(), hide(settings.broker_url), seconds, replicas, self._known, self._trouble, publisher)

        replicas = settings.redis_replicas
        self._line = new_line(0, new_line(replicas)) if replicas else new_line(0)
        self._link = new_link()
        self._reader: Reader | None = None
        self._acknowledged = Position("", 0)
        self._closed = False

    def start(self, deliver: Deliver, reset: Reset) -> None:
        self._reader = Reader(self._link, self._line, self._trouble, deliver, reset)
        self._line.start()
        self._reader.start()

    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        return self._append(drafts, key)

    def head(self) -> Position:
        self._check_open()
        reader = self._reader
        if reader is None or not reader.await_watches(JOIN_SECONDS):
            raise self._line.unavailable("listen to", self._trouble.of(READER) or "not connected")
        head = self._line.head()
        self._check_epoch(head.epoch)
        return head

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        self._check_open()
        epoch, missing, more, *entries = self._line.ask(HISTORY, after, 0, limit, PAGE_BYTES, *topics)
        self._check_epoch(epoch.decode())
        events, cut = page_of(events_of(entries))
        return Page(events, bool(more) or cut, int(missing) if int(missing) > after else 0)

    def check(self) -> None:
        self._append([], None, CHECK_SECONDS)
        self.head()
        if error := self._trouble.of(READER):
            raise self._line.unavailable("listen to", error) from error

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._reader is not None:
            self._line.close()
            self._reader.close()

    def watch(self, topics: Sequence[str]) -> None:
        if self._reader is not None:
            self._reader.watch(topics)

    def unwatch(self, topics: Sequence[str]) -> None:
        if self._reader is not None:
            self._reader.unwatch(topics)

    def precedes(self, epoch: str) -> bool:
        if self._reader is None:
            return False
        # One that its server has lost is told of by who knew it, perhaps after our reader has joined.
        return epoch in self._reader.past or bool(
            self._line.command("HEXISTS", f"{self._line.link.prefix}past", epoch))

    def depths(self) -> dict[str, int]:
        return {"append": len(self._line), "subscribe": self._reader.orders if self._reader is not None else 0}

    def _append(self, drafts: Sequence[Draft], key: str | None, seconds: float = 0) -> list[Position]:
        self._check_open()
        arguments = publish_arguments(self._line.link.channels, key, drafts)
        positions = positions_of(self._line.ask(PUBLISH, *arguments, seconds=seconds))
        if positions:
            self._acknowledged = max(self._acknowledged, positions[-1])
            if self._reader is not None and self._reader.epoch and positions[-1].epoch > self._reader.epoch:
                self._reader.leave()  # it may listen to a server that is cut off
        return positions

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(CLOSED)

    def _known(self) -> Position:
        """The newest position that this process has heard of."""
        reader = self._reader
        return max(self._acknowledged, Position(reader.epoch, reader.last)) if reader is not None else \
            self._acknowledged

    def _check_epoch(self, epoch: str) -> None:
        """What was read must be of the epoch that the reader hands over: the two connections may be to two servers."""
        reader = self._reader
        assert reader is not None, "head() and history() come after start()"
        if epoch != reader.epoch:
            if epoch < reader.epoch:
                self._line.leave()
            else:
                reader.leave()
            raise self._line.unavailable("read", "it begins a new epoch")
