"""The parking lot and a stream's opening in this process, at the moments that a real client meets once in a million."""

import os
import socket
from collections.abc import Callable, Iterator
from itertools import count

import gevent
import pytest

from pushsvc.brokers.memory import MemoryBroker
from pushsvc.bundle import Wire
from pushsvc.event import Draft, Event
from pushsvc.hub import DRAIN, ROTATE, Hub
from pushsvc.metrics import Metrics
from pushsvc.parking import ParkingLot
from pushsvc.position import Position
from pushsvc.settings import Settings
from pushsvc.stream import Stream
from pushsvc.subscription import State, Subscription
from tests.support.wait import eventually

LARGE = "x" * 400_000  # more than the kernel takes at once


class Yard:
    """A hub with a lot and a fan-out, and streams on socket pairs."""

    def __init__(self, **changes: int) -> None:
        self.hub = Hub(Settings(**changes), Metrics())  # type: ignore[arg-type]
        self.lot = ParkingLot(self.hub)
        self._seqs = count(1)
        self._greenlet = gevent.spawn(self.hub._fan_out)
        self.hub.reset(Position("18bcfe56800", 0))

    def close(self) -> None:
        self._greenlet.kill()
        self.lot.close()

    def parked(self) -> tuple[Subscription, socket.socket]:
        """A stream and its client's end, which does not block."""
        near, far = socket.socketpair()
        for each in (near, far):
            each.setblocking(False)
        subscription = self.hub.subscribe(["a"], False)
        self.hub.attach(subscription)
        self.lot.park(subscription, near.detach())
        return subscription, far

    def say(self, data: str) -> None:
        self.hub.deliver([Event(next(self._seqs), 0.0, ("a",), "message", data, "all", "", None)])
        eventually(lambda: not self.hub._incoming and not self.hub._small)


@pytest.fixture
def yard() -> Iterator[Yard]:
    yard = Yard()
    yield yard
    yard.close()


def read(far: socket.socket) -> bytes:
    """What has come; nothing waits for more."""
    got = b""
    try:
        while part := os.read(far.fileno(), 1 << 16):
            got += part
    except BlockingIOError:
        pass
    return got


def caught_up(yard: Yard, subscription: Subscription, far: socket.socket) -> bytes:
    """What was read until the greenlet of a stream that is behind has ended; its link has not run yet."""
    greenlet = yard.lot._behind[subscription]
    got = b""
    while not greenlet.dead:
        got += read(far)
        if not greenlet.dead:
            gevent.sleep(0)
    return got


def is_gone(yard: Yard, subscription: Subscription) -> Callable[[], bool]:
    return lambda: subscription.fd < 0 and not yard.lot.behind and not len(yard.hub)


def test_stream_that_is_told_its_end_while_it_is_behind_and_then_hangs_up_is_released_at_once(yard: Yard) -> None:
    """Its client has not read what waits, so its farewell would wait, too."""
    subscription, far = yard.parked()
    yard.say(LARGE)
    assert subscription.state is State.BEHIND
    yard.hub.close(subscription, ROTATE, 100)
    gevent.sleep(0.01)
    assert yard.lot.behind == 1
    far.shutdown(socket.SHUT_WR)
    eventually(is_gone(yard, subscription), message="it is released")
    far.close()


def test_stream_that_is_closed_in_the_pass_in_which_it_has_caught_up_ends_clean(yard: Yard) -> None:
    subscription, far = yard.parked()
    yard.say(LARGE)
    got = caught_up(yard, subscription, far)
    assert subscription in yard.lot._behind, "its link has not run"
    yard.hub.close(subscription, DRAIN, 123)
    eventually(is_gone(yard, subscription), message="it is released")
    got += read(far)
    assert b"retry: 123\n: drain\n" in got
    assert got.endswith(b"0\r\n\r\n")
    far.close()


def test_event_in_the_pass_in_which_a_stream_has_caught_up_is_not_lost(yard: Yard) -> None:
    subscription, far = yard.parked()
    yard.say(LARGE)
    caught_up(yard, subscription, far)
    assert subscription.mailbox is not None
    late = Event(next(yard._seqs), 0.0, ("a",), "message", "late", "all", "", None)
    subscription.offer([Wire(late, yard.hub.epoch).letter()])
    eventually(lambda: subscription.state is State.PARKED)
    assert b"data: late" in read(far)
    yard.say("next")
    assert b"data: next" in read(far)
    far.close()
    eventually(is_gone(yard, subscription))


# --- The opening -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["", "earliest"])
def test_stream_that_is_overrun_while_it_opens_reads_history_and_misses_nothing(asked: str) -> None:
    settings = Settings(broker_url="memory:", mailbox_events=5)
    hub, broker = Hub(settings, Metrics()), MemoryBroker(settings)
    hub.start(broker)
    try:
        subscription = hub.subscribe(["a"], False)
        stream = Stream(hub, broker, subscription, asked)
        hub.attach(subscription)
        opening = stream.opening()
        next(opening)  # its head is on its way, and its socket is slow
        for number in range(20):
            broker.append([Draft(("a",), f"{number}.")])
        eventually(lambda: subscription.overflowed)
        text = b"".join(opening)
        assert [f"data: {number}.\n".encode() in text for number in range(20)] == [True] * 20
        assert (subscription.overflowed, subscription.state) == (False, State.BEHIND)
        broker.append([Draft(("a",), "live")])
        eventually(lambda: b"data: live" in subscription.take_waiting(0.0))
    finally:
        hub.stop()
        broker.close()


@pytest.mark.parametrize("asked", ["earliest", "id"])
def test_stream_that_came_after_an_event_of_no_history_is_not_given_it(asked: str) -> None:
    """The event is acknowledged, and this worker's hub is handed it only now."""
    settings = Settings(broker_url="memory:")
    hub, broker = Hub(settings, Metrics()), MemoryBroker(settings)
    hub.start(broker)
    try:
        kept, = broker.append([Draft(("a",), "kept")])
        subscription = hub.subscribe(["a"], False)
        hub.attach(subscription)
        before, = broker.append([Draft(("a",), "passing", keep="none")])
        text = b"".join(Stream(hub, broker, subscription, str(kept) if asked == "id" else asked).opening())
        late, = broker.append([Draft(("a",), "passing", keep="none")])
        assert b"passing" not in text
        assert subscription.cursor == before.seq
        eventually(lambda: subscription.mailbox is not None and late.seq in subscription.mailbox.queue)
        assert subscription.take_waiting(hub.now).count(b"data: passing") == 1
    finally:
        hub.stop()
        broker.close()


# --- what stays of a stream that has ended


def test_a_stream_that_has_ended_leaves_nothing_that_waited_for_it(yard: Yard) -> None:
    """The wheel keeps it until it was to be looked at again."""
    stream, far = yard.parked()
    while stream.state is State.PARKED:
        yard.say(LARGE)
    yard.say(LARGE)
    assert stream.mailbox is not None
    assert stream.mailbox.bytes
    far.close()
    eventually(lambda: not yard.lot)
    assert stream.mailbox is None
