"""The stream: what one client reads, as a generator. Head, replay, live, farewell.

Attach, then replay, then live: the subscription is in the hub, with its mailbox, before history is read; what the
mailbox holds at or before the cursor is dropped. So there is no gap and no double, whatever is published meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from pushsvc import hub as hubs
from pushsvc import sse
from pushsvc.brokers.base import Broker, Page
from pushsvc.bundle import Wire
from pushsvc.errors import BrokerUnavailable
from pushsvc.hub import Hub
from pushsvc.position import EARLIEST, Position, parse_position
from pushsvc.subscription import State, Subscription

PAGE_EVENTS = 500


class Stream:
    """The body of one response to a subscriber.

    asked: the id to resume after, `earliest`, or "" for live only. Iterating it attaches the subscription; what ends
    the iteration (the client, the hub, the server) detaches it. Switches.
    """

    def __init__(self, hub: Hub, broker: Broker, subscription: Subscription, asked: str) -> None:
        self.hub = hub
        self.broker = broker
        self.subscription = subscription
        self.asked = asked
        self.on_close: Sequence[Callable[[], object]] = ()
        self._running: Generator[bytes, None, None] | None = None

    def __iter__(self) -> Iterator[bytes]:
        self._running = self._run()
        return self._running

    def close(self) -> None:
        """What a WSGI server calls when it is done with the response, however it ended (PEP 3333), or has parked it:
        calls `on_close`, once. Idempotent."""
        if self._running is not None:
            self._running.close()
        callbacks, self.on_close = self.on_close, ()
        for callback in callbacks:
            callback()

    def _run(self) -> Generator[bytes, None, None]:
        subscription = self.subscription
        self.hub.attach(subscription)
        try:
            if (yield from self.opening()):
                yield from self._live()
            yield sse.farewell(subscription.reason, subscription.retry_ms)
        finally:
            self.hub.close(subscription, hubs.GONE)
            self.hub.detach(subscription)

    def opening(self) -> Generator[bytes, None, bool]:
        """Head and replay; whether the mailbox goes on where the cursor stands. Switches."""
        try:
            head = self.broker.head()
            after, lost = self._start(head)
            self.subscription.cursor = after
            stands_at = "" if lost or self.asked == EARLIEST else str(Position(head.epoch, after))
            yield sse.head(self.hub.settings.retry_ms, stands_at)
            # What came while the head was sent may be more than the mailbox holds: then it is read from history.
            if (self.asked or self.subscription.overflowed) and not (yield from self._replay(head.epoch, lost)):
                return False
            # What is up to the head and was not in history is in none: this stream came after it.
            self.subscription.cursor = max(self.subscription.cursor, head.seq)
        except BrokerUnavailable:
            # Any answer but 200 ends an EventSource for good: this one comes back.
            self.hub.close(self.subscription, hubs.UNAVAILABLE, self.hub.settings.retry_ms)
            return False
        if self.subscription.state is State.OPENING:
            self.subscription.state = State.BEHIND
        return True

    def _replay(self, epoch: str, gap: str) -> Generator[bytes, None, bool]:
        """History after the asked position, with a gap event where it has one; False if closed before its end.
        Switches."""
        subscription, topics = self.subscription, self.subscription.group.topics
        # The newest loss that is not to be told, or not again: who asks for all that is held is not told what is not.
        known: int | None = None if self.asked == EARLIEST else 0
        while subscription.state is State.OPENING:
            subscription.overflowed = False
            page = self.broker.history(topics, subscription.cursor, PAGE_EVENTS)
            if subscription.state is not State.OPENING:  # closed meanwhile: the log may be another by now
                return False
            if self.hub.epoch != epoch:  # and the page may be one of the next epoch, behind the gap
                self.hub.close(subscription, hubs.LOST, self.hub.settings.retry_ms)
                return False
            known = page.missing if known is None else known
            if gap or page.missing > known:
                yield self._gap(page, epoch, gap)
            if page.events:
                subscription.cursor = page.events[-1].seq
                yield self._frames(page, epoch)
            gap, known = "", max(known, page.missing)
            if not page.more and not subscription.overflowed:
                return True
        return False

    def _start(self, head: Position) -> tuple[int, str]:
        """The sequence to go on after, and the id to tell as lost if it belongs to no history of ours. Switches."""
        if not self.asked:
            return head.seq, ""
        if self.asked == EARLIEST:
            return 0, ""
        position = parse_position(self.asked)
        if position is None or (position.epoch != head.epoch and not self.broker.precedes(position.epoch)):
            return 0, self.asked
        if position.epoch != head.epoch:  # the numbers went on, but the end of that epoch may be lost
            return min(position.seq, head.seq), self.asked
        if position.seq > head.seq:  # the log has lost its end: go on where it stands now
            return head.seq, self.asked
        return position.seq, ""

    def _gap(self, page: Page, epoch: str, asked: str) -> bytes:
        after = self.subscription.cursor
        missing = max(page.missing, after)
        goes_on = min(missing, page.events[0].seq - 1) if page.events else missing
        self.subscription.cursor = goes_on
        return sse.gap(asked or str(Position(epoch, after)), str(Position(epoch, missing)),
                       hubs.EPOCH if asked else hubs.TRIMMED, str(Position(epoch, goes_on)))

    def _frames(self, page: Page, epoch: str) -> bytes:
        group = self.subscription.group
        wires = [Wire(event, epoch) for event in page.events]
        letters = [wire.letter_for(group.topics) if group.envelope else wire.letter() for wire in wires]
        return b"".join(letter.frame for letter in letters)

    def _live(self) -> Iterator[bytes]:
        """What the mailbox holds, joined; a comment when it is nudged; until it is closed. Switches."""
        subscription, mailbox = self.subscription, self.subscription.mailbox
        assert mailbox is not None, "only the parking lot takes a mailbox away"
        while True:
            mailbox.peek()
            nudged, mailbox.nudged = mailbox.nudged, False
            if data := subscription.take_waiting(self.hub.now):
                yield data
            elif nudged:
                yield sse.HEARTBEAT
            if mailbox.closed and not mailbox.queue:
                return


def refusal(retry_ms: int) -> Sequence[bytes]:
    """The whole stream of a client that is to come back later: 200, a `retry:` and the end."""
    return [sse.head(retry_ms), sse.farewell("full", None)]
