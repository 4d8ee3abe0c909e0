"""The hub: this process's table of topics and subscriptions. It takes events from the broker and offers their frames.

A fan-out goes by groups: what is pending for a group is one bundle of events, and equal bundles are one object, so
bytes are joined once and shared. Large groups are served in slices, small ones first, so that nobody waits for a
broadcast.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Protocol

import gevent
from gevent.event import Event as Signal

from pushsvc.brokers.base import Broker
from pushsvc.bundle import Bundle, GapWire, Payload, Wire
from pushsvc.crowd import Crowd, joined, left
from pushsvc.event import Event
from pushsvc.mailbox import Mailbox
from pushsvc.metrics import Metrics
from pushsvc.position import Position
from pushsvc.recorder import Recorder
from pushsvc.settings import Settings
from pushsvc.subscription import Group, Place, State, Subscription
from pushsvc.wheel import Wheel

SLICE_SECONDS = 0.001  # how long a fan-out runs before it gives way; a publish waits for a few of them
MOST_INCOMING, MOST_INCOMING_BYTES = 10_000, 16 << 20  # events that wait to be noted; then their broker waits for them
TURN_STREAMS = 32  # how many streams of a large group between two looks at the clock
SMALL_GROUP = 64  # groups up to this size go before larger ones, if an event has gone to no more groups than that
TURN_SECONDS = 0.0003  # for those that it has gone to with many others, between two looks at the small ones
TICK_SECONDS = 0.25
LOOK_STREAMS = 200  # streams between two looks at memory, in a storm: a few MB with what the kernel takes
DRAIN_PER_SECOND = 500  # a worker with few streams drains faster than the window
YIELD_SECONDS = 0.00001  # a timer, not sleep(0): the loop polls its sockets in between

GONE, SLOW, ROTATE, EXPIRED, DRAIN, LOST, UNAVAILABLE = (
    "gone", "slow", "rotate", "expired", "drain", "lost", "unavailable")
TRIMMED, EPOCH = "trimmed", "epoch"  # why a gap is told
NOWHERE, SMALL, MANY, LARGE = Place
logger = logging.getLogger(__name__)


class Lot(Protocol):
    """What the hub needs of the parking lot: the streams that have no greenlet to take from a mailbox."""

    def send(self, members: Iterable[Subscription], payload: Payload) -> list[Subscription]: ...
    def beat(self, subscription: Subscription) -> None: ...
    def leave(self, subscription: Subscription) -> None: ...
    def break_off(self, subscription: Subscription) -> None: ...
    @property
    def behind(self) -> int: ...
    @property
    def is_full(self) -> bool: ...


class Hub:
    """`start()` begins to serve, with the broker that it then hears from. Clocks come in: `clock` for spans (seconds),
    `wall` for the tokens' times (seconds since 1970). `is_short`: whether there is no memory for further streams; asked
    once a second, and more often while many open."""

    def __init__(self, settings: Settings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time, is_short: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self.metrics = metrics
        self.clock = clock
        self.wall = wall
        self.epoch = ""
        self.draining = False
        self.short_of_memory = False
        self._is_short = is_short
        self._taken = 0  # streams since memory was last looked at
        self.lot: Lot | None = None  # set by the worker that parks
        self.recorder: Recorder | None = None  # set where the traffic's shape is recorded
        self.now = clock()
        self._topics: dict[str, Crowd[Group]] = {}
        self._groups: tuple[dict[tuple[str, ...], Group], ...] = ({}, {})  # plain, envelope
        self._subscriptions: set[Subscription] = set()
        self._naming = 0
        self._incoming: deque[tuple[Wire, Bundle]] = deque()  # handed over, and not noted for its groups yet
        self._incoming_bytes = 0
        self._small: deque[Group] = deque()
        self._many: deque[Group] = deque()  # some of them may have been served since, as small ones
        self._large: deque[Iterator[int]] = deque()
        self._pending = Signal()
        self._wheel: Wheel[Subscription] = Wheel(TICK_SECONDS, settings.heartbeat_seconds, self.now)
        self._greenlets: list[gevent.Greenlet] = []
        self._broker: Broker | None = None

    def __len__(self) -> int:
        return len(self._subscriptions)

    def start(self, broker: Broker) -> None:
        self._broker = broker
        self._greenlets = [gevent.spawn(self._fan_out), gevent.spawn(self._turn), gevent.spawn(self._measure)]
        broker.start(self.deliver, self.reset)

    def stop(self) -> None:
        gevent.killall(self._greenlets)

    # -- subscriptions

    def subscribe(self, topics: Iterable[str], envelope: bool, **about: object) -> Subscription:
        """A subscription to `topics`, not attached yet. `about`: what Subscription keeps of its client."""
        unique = tuple(dict.fromkeys(topics))
        group = self._groups[envelope].get(unique) or Group(unique, envelope)
        mailbox = Mailbox(self.settings.mailbox_events, self.settings.mailbox_bytes)
        return Subscription(group, mailbox, **about)  # type: ignore[arg-type]

    def attach(self, subscription: Subscription) -> None:
        """From now on every event of its topics is offered to it. Atomic: no switch."""
        group = subscription.group
        group = subscription.group = self._groups[group.envelope].setdefault(group.topics, group)
        if not group.members:
            for topic in group.topics:
                self._join(topic, group)
        group.members = joined(group.members, subscription)
        self._subscriptions.add(subscription)
        self._naming += len(group.topics)
        self.metrics.counts.opened += 1
        if self.recorder is not None:
            self.recorder.opened(subscription)
        self._begin(subscription)
        if self.draining:  # it was admitted before
            self.close(subscription, DRAIN, self.comeback_ms())

    def detach(self, subscription: Subscription) -> None:
        """It is offered nothing any more, and nothing here knows it. Idempotent. Atomic: no switch."""
        if subscription not in self._subscriptions:
            return
        group = subscription.group
        self._subscriptions.discard(subscription)
        subscription.mailbox = subscription.abort = None  # the wheel may keep it for a while
        group.members = left(group.members, subscription)
        self._naming -= len(group.topics)
        if self.recorder is not None:
            self.recorder.closed(subscription)
        if not group.members:
            del self._groups[group.envelope][group.topics]
            for topic in group.topics:
                self._leave(topic, group)

    def close(self, subscription: Subscription, reason: str, retry_ms: int | None = None) -> None:
        """End a stream: its greenlet sends what waits, then the farewell. Idempotent, never raises. Atomic."""
        if subscription.state is State.CLOSED:
            return
        subscription.state = State.CLOSED
        subscription.reason = reason
        subscription.retry_ms = retry_ms
        self.metrics.counts.evicted[reason] += 1
        if reason == SLOW and subscription.mailbox is not None:
            subscription.mailbox.clear()
        if subscription.fd >= 0 and self.lot is not None:
            self.lot.leave(subscription)
        elif subscription.mailbox is not None:
            subscription.mailbox.close()
            if reason == SLOW and subscription.abort is not None:
                subscription.abort()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("stream closed", extra={"reason": reason, "address": subscription.address,
                                                 "user": subscription.user, "cursor": subscription.cursor})

    def evict(self, subscriptions: Iterable[Subscription], reason: str) -> None:
        """Close several at once; their clients come back spread over the come-back time."""
        for subscription in list(subscriptions):
            self.close(subscription, reason, self.comeback_ms())

    def is_full(self) -> bool:
        """Whether a further stream has no place here: a bound is reached, or the worker drains."""
        self._taken += 1
        if self._taken > LOOK_STREAMS:
            self._look_at_memory()
        most = self.settings.max_streams
        return (self.draining or self.short_of_memory or (self.lot is not None and self.lot.is_full)
                or (most > 0 and len(self._subscriptions) >= most))

    def _join(self, topic: str, group: Group) -> None:
        groups = self._topics.get(topic, ())
        self._topics[topic] = joined(groups, group)
        if not groups and self._broker is not None:
            self._broker.watch([topic])

    def _leave(self, topic: str, group: Group) -> None:
        groups = self._topics[topic] = left(self._topics[topic], group)
        if not groups:
            del self._topics[topic]
            if self._broker is not None:
                self._broker.unwatch([topic])

    def _begin(self, subscription: Subscription) -> None:
        subscription.since = subscription.sent = self.now
        self._wheel.add(subscription, self._due(subscription, self.settings.heartbeat_seconds))

    # -- from the broker

    def reset(self, position: Position, since: Position | None = None, upto: int = 0) -> None:
        """What follows does not join what came before: all streams end and resume by id, or are told the gap and go on
        (see brokers.base.Reset). Atomic: no switch."""
        if since is not None:
            self._tell_gap(since, position, position._replace(seq=max(upto, position.seq)))
            return
        if self.epoch:
            logger.warning("log interrupted", extra={"position": str(position), "streams": len(self)})
            self.evict(self._subscriptions, LOST)
        self._incoming.clear()
        self._incoming_bytes = 0
        for groups in self._groups:
            for group in groups.values():
                group.pending = None
        self.epoch = position.epoch

    def _tell_gap(self, since: Position, position: Position, upto: Position) -> None:
        logger.warning("gap", extra={"since": str(since), "position": str(position), "streams": len(self)})
        reason = TRIMMED if since.epoch == position.epoch else EPOCH
        while self._incoming:  # what came before the gap is told before it
            self._note_next()
        self.epoch = position.epoch
        if upto > position:
            # Whoever history or the log's head has brought further, or just brings, would not take it, and may miss more.
            self.evict((each for each in self._subscriptions if each.state is State.OPENING
                        or position.seq <= each.cursor < upto.seq), LOST)
        wire, root = GapWire(since, position, upto, reason, self.wall()), Bundle()
        for groups in self._groups:
            for group in groups.values():
                self._note(group, root, wire, MANY)
        self._pending.set()

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events over, and wake the fan-out. Atomic: no switch."""
        self.metrics.counts.received += len(events)
        if self.recorder is not None:
            self.recorder.delivered(events, self._topics)
        root = Bundle()
        for event in events:
            if any(topic in self._topics for topic in event.topics):
                self._incoming.append((Wire(event, self.epoch), root))
                self._incoming_bytes += len(event.data)
        while len(self._incoming) > MOST_INCOMING or self._incoming_bytes > MOST_INCOMING_BYTES:
            self._note_next()
        if self._incoming or self._small or self._many or self._large:
            self._pending.set()

    def _note_some(self, until: float) -> None:
        """Note events for their groups, one at least, until there are none or the slice ends. Atomic: no switch."""
        self._note_next()
        while self._incoming and self.clock() < until:
            self._note_next()

    def _note_next(self) -> None:
        """Note what is pending for every group of the next event."""
        wire, root = self._incoming.popleft()
        self._incoming_bytes -= len(wire.event.data)
        for topic in wire.event.topics:
            groups = self._topics.get(topic, ())
            place = SMALL if len(groups) <= SMALL_GROUP else MANY
            for group in groups:
                self._note(group, root, wire, place)

    def _note(self, group: Group, root: Bundle, wire: Wire, place: Place) -> None:
        pending = group.pending
        if pending is None:
            group.pending = root.extended(wire)
            if group.place is NOWHERE:
                self._queue(group, place)
        elif pending.wire is not wire:  # not by another of its topics already
            group.pending = pending.extended(wire)
            if place is SMALL and group.place is MANY:
                self._queue(group, SMALL)

    def _queue(self, group: Group, place: Place) -> None:
        if len(group.members) > SMALL_GROUP:
            group.place = LARGE
            self._large.append(self._serve(group))
        else:
            group.place = place
            (self._small if place is SMALL else self._many).append(group)

    # -- the fan-out

    def _fan_out(self) -> None:
        """Note events for their groups, and serve those that have something pending: small ones first, then, in turns,
        large ones and those that an event has gone to with many others; and give way to the loop every few milliseconds.
        Switches."""
        while True:
            self._pending.wait()
            self._pending.clear()
            until = self.clock() + SLICE_SECONDS
            while self._incoming or self._small or self._many or self._large:
                if self._incoming:
                    self._note_some(until)
                if self._small:
                    self._serve_next(self._small, until)
                if self._many:
                    self._serve_next(self._many, self.clock() + TURN_SECONDS)
                if self._large:
                    self._serve_a_turn()
                if self.clock() > until:
                    gevent.sleep(YIELD_SECONDS)
                    until = self.clock() + SLICE_SECONDS

    def _serve_next(self, queue: deque[Group], until: float) -> None:
        """Serve groups that are not large, one at least, until there are none or the time is over. Atomic: no switch."""
        place, oldest, served = SMALL if queue is self._small else MANY, self.wall(), False
        while queue and not (served and self.clock() >= until):
            served = True
            group = queue.popleft()
            if group.place is not place:  # it was served elsewhere
                continue
            bundle, group.pending, group.place = group.pending, None, NOWHERE
            if bundle is not None:
                self._offer(self._with_alike(group, bundle, queue), bundle.payload(group.topics, group.envelope))
                oldest = min(oldest, bundle.first_at)
        self.metrics.sent(self.wall() - oldest)

    def _with_alike(self, group: Group, bundle: Bundle, queue: deque[Group]) -> list[Subscription]:
        """The members of a group, and of those behind it that are to have the same bytes, some at a time."""
        members = list(group.members)
        place = SMALL if queue is self._small else MANY
        while queue and not group.envelope and len(members) < TURN_STREAMS:
            other = queue[0]
            if other.place is place:
                if other.pending is not bundle or other.envelope:
                    break
                other.pending, other.place = None, NOWHERE
                members += other.members
            queue.popleft()
        return members

    def _serve_a_turn(self) -> None:
        """Serve one turn of the first large group. Atomic: no switch."""
        serving = self._large.popleft()
        if next(serving, None):
            self._large.append(serving)

    def _serve(self, group: Group) -> Iterator[int]:
        """Offer what is pending for a large group to its members, some at each step."""
        bundle, group.pending = group.pending, None
        if bundle is None:
            group.place = NOWHERE
            return
        payload = bundle.payload(group.topics, group.envelope)
        members = list(group.members)
        for start in range(0, len(members), TURN_STREAMS):
            if start:
                yield start
            self._offer(members[start : start + TURN_STREAMS], payload)
        self.metrics.sent(self.wall() - bundle.first_at)
        group.place = NOWHERE
        if group.pending is not None:
            self._queue(group, SMALL)

    def _offer(self, members: list[Subscription], payload: Payload) -> None:
        """Write to the parked, fill the mailboxes of the others. Atomic: no switch."""
        letters = payload.letters
        for subscription in self.lot.send(members, payload) if self.lot is not None else members:
            if subscription.state is State.CLOSED:
                continue
            if subscription.offer(letters):
                self.metrics.counts.delivered += len(letters)
            else:
                self.close(subscription, SLOW, self.settings.retry_ms)

    # -- time

    def _turn(self) -> None:
        """The wheel: heartbeats, ages and expiries, spread over the interval. Switches."""
        while True:
            gevent.sleep(TICK_SECONDS)
            self.now = self.clock()
            until = self.now + SLICE_SECONDS
            for subscription in self._wheel.turn(self.now):
                self._look_at(subscription)
                if self.clock() > until:
                    gevent.sleep(YIELD_SECONDS)
                    until = self.clock() + SLICE_SECONDS

    def _look_at(self, subscription: Subscription) -> None:
        if subscription.state is State.CLOSED:
            return
        if subscription.expires and subscription.expires <= self.wall():
            self.close(subscription, EXPIRED, self.settings.retry_ms)
        elif self._rotates(subscription) <= self.now:
            self.close(subscription, ROTATE, self.comeback_ms())
        else:
            silence = self._silence(subscription)
            if self.now - subscription.sent >= silence - TICK_SECONDS:
                silence = self.settings.heartbeat_seconds  # from one to the next
                subscription.sent = self.now
                if subscription.fd >= 0 and self.lot is not None:
                    self.lot.beat(subscription)
                elif subscription.mailbox is not None:
                    subscription.mailbox.nudge()
            self._wheel.add(subscription, self._due(subscription, silence))

    def _due(self, subscription: Subscription, silence: float) -> float:
        """When a stream is to be looked at that may be silent for so long after what was sent last."""
        due = subscription.sent + silence - TICK_SECONDS  # the wheel is up to a tick late
        if subscription.expires:
            due = min(due, self.now + max(0.0, subscription.expires - self.wall()))
        return min(due, self._rotates(subscription))

    def _silence(self, subscription: Subscription) -> float:
        """How long nothing may be sent to a stream after an event: up to a quarter less than the interval, for one that
        went to all would else bring all heartbeats after it in one moment, and from then on."""
        return self.settings.heartbeat_seconds * (1 - _part(subscription) / 4)

    def _rotates(self, subscription: Subscription) -> float:
        """When its age ends a stream: spread by a tenth either way."""
        age = self.settings.rotate_seconds
        return subscription.since + age * (0.9 + 0.2 * _part(subscription)) if age else inf

    def _measure(self) -> None:
        """Once a second: how late the loop is, and the figures for the metrics. Switches."""
        while True:
            due = self.clock() + 1.0
            gevent.sleep(1.0)
            self.metrics.lagged(self.clock() - due)
            self._look_at_memory()
            self.flush()

    def _look_at_memory(self) -> None:
        self._taken = 0
        if self._is_short() != self.short_of_memory:
            self.short_of_memory = not self.short_of_memory
            message = "short of memory" if self.short_of_memory else "memory recovered"
            logger.warning(message, extra={"streams": len(self)})

    def flush(self) -> None:
        """Give the present figures to the metrics. Atomic: no switch."""
        depths = self._broker.depths() if self._broker else {}
        queues = {"fan_out": len(self._incoming) + len(self._small) + len(self._many) + len(self._large), **depths,
                  "behind": self.lot.behind if self.lot is not None else 0}
        self.metrics.gauge(len(self._subscriptions), self._naming, len(self._topics), queues)
        self.metrics.flush()

    # -- the end

    def drain(self) -> None:
        """End every stream, spread over the drain window or faster if they are few, each told another time to come
        back. New streams are refused from the first moment. Switches."""
        self.draining = True
        streams = list(self._subscriptions)
        window = min(self.settings.drain_seconds, len(streams) / DRAIN_PER_SECOND)
        logger.info("draining", extra={"streams": len(streams), "seconds": round(window, 1)})
        begun = self.clock()
        for count, subscription in enumerate(streams):
            pause = begun + window * count / len(streams) - self.clock()
            if pause > 0:
                gevent.sleep(pause)
            self.close(subscription, DRAIN, self.comeback_ms())
        self._break_off(begun + self.settings.drain_seconds)

    def _break_off(self, deadline: float) -> None:
        """Wait until the farewells are sent; break the sends that frozen clients hold up. Switches."""
        while self._subscriptions and self.clock() < deadline:
            gevent.sleep(0.02)
        for subscription in list(self._subscriptions):
            if subscription.fd >= 0 and self.lot is not None:
                self.lot.break_off(subscription)
            elif subscription.abort is not None:
                subscription.abort()
        logger.info("drained", extra={"broken_off": len(self._subscriptions)})

    def comeback_ms(self) -> int:
        return random.randint(1, self.settings.comeback_ms)


def _part(subscription: Subscription) -> float:
    """A number from 0 to 1 that a stream keeps, by where it lies in memory."""
    return (id(subscription) // 16 % 1021) / 1021
