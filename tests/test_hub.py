"""The hub: who gets what, in which order, and who has to wait for whom. Its clocks are the tests'."""

import gc
import random
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import gevent
import pytest

from pushsvc import hub
from pushsvc.brokers.base import Broker, Deliver, Page, Reset
from pushsvc.event import Draft, Event
from pushsvc.hub import DRAIN, EXPIRED, GONE, LOST, ROTATE, SLICE_SECONDS, SLOW, SMALL_GROUP, Hub
from pushsvc.mailbox import Letter
from pushsvc.metrics import Metrics
from pushsvc.position import Position
from pushsvc.settings import Settings
from pushsvc.subscription import State, Subscription
from tests.support.wait import eventually

EPOCH = "18bcfe56800"
LARGE = 20_000
STEP = SLICE_SECONDS / 3  # a fan-out looks at such a clock three times before it gives way


class Clock:
    """Stands still, or goes on by `step` at each look."""

    def __init__(self, now: float, step: float = 0.0) -> None:
        self.now = now
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Quiet(Broker):
    """A broker that says only what a test makes it say. watched: how often each topic is watched now."""

    def __init__(self) -> None:
        self.watched: Counter[str] = Counter()
        self.seq = 0
        self.deliver: Deliver
        self.reset: Reset

    def start(self, deliver: Deliver, reset: Reset) -> None:
        self.deliver, self.reset = deliver, reset
        reset(Position(EPOCH, 0))

    def event(self, *topics: str, **fields: Any) -> Event:
        self.seq += 1
        about = {"event": "message", "data": str(self.seq), "keep": "all", "key": "", "retry": None} | fields
        return Event(self.seq, 0.0, topics, **about)

    def say(self, *topics: str, **fields: Any) -> int:
        """One event to `topics`; its sequence."""
        self.deliver([self.event(*topics, **fields)])
        return self.seq

    def watch(self, topics: Sequence[str]) -> None:
        self.watched.update(topics)

    def unwatch(self, topics: Sequence[str]) -> None:
        self.watched.subtract(topics)

    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        raise NotImplementedError

    def head(self) -> Position:
        return Position(EPOCH, self.seq)

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Noted(Subscription):
    """A stream that notes what it is offered, and in `notes` that it was its turn."""

    def __init__(self, *about: Any, notes: list[str], name: str, **more: Any) -> None:
        super().__init__(*about, **more)
        self.notes = notes
        self.name = name
        self.seqs: list[int] = []

    def offer(self, letters: list[Letter]) -> bool:
        self.notes.append(self.name)
        self.seqs += [letter.seq for letter in letters]
        return True


class Bench:
    """A hub that runs, and a broker to speak to it. `notes`: whose turn it was, in order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
                 **changes: Any) -> None:
        self.hub = Hub(Settings(**changes), Metrics(), clock=clock, wall=wall)
        self.broker = Quiet()
        self.notes: list[str] = []
        self.hub.start(self.broker)

    def stream(self, *topics: str, envelope: bool = False, behind: bool = True, **about: Any) -> Subscription:
        """An attached stream with its mailbox; `behind`: its replay is over."""
        subscription = self.hub.subscribe(topics, envelope, **about)
        self.hub.attach(subscription)
        if behind:
            subscription.state = State.BEHIND
        return subscription

    def noted(self, name: str, *topics: str, envelope: bool = False) -> Noted:
        plain = self.hub.subscribe(topics, envelope)
        noted = Noted(plain.group, plain.mailbox, notes=self.notes, name=name)
        self.hub.attach(noted)
        return noted

    def crowd(self, name: str, count: int, *topics: str) -> list[Noted]:
        return [self.noted(name, *topics) for _ in range(count)]

    def leave(self, subscription: Subscription) -> None:
        """What a stream does at its end."""
        self.hub.close(subscription, GONE)
        self.hub.detach(subscription)

    def is_idle(self) -> bool:
        """Whether the fan-out has served all."""
        return not (self.hub._incoming or self.hub._small or self.hub._many or self.hub._large)

    def settle(self) -> None:
        eventually(self.is_idle, 60, message="the fan-out comes to its end")


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    opened: list[Bench] = []

    def open_bench(*clocks: Callable[[], float], **changes: Any) -> Bench:
        opened.append(Bench(*clocks, **changes))
        return opened[-1]

    yield open_bench
    for each in opened:
        each.hub.stop()


def seqs(subscription: Subscription) -> list[int]:
    """What waits in its mailbox."""
    assert subscription.mailbox is not None
    return list(subscription.mailbox.queue)


def taken(subscription: Subscription) -> str:
    return subscription.take_waiting(0.0).decode()


# --- who gets what


def test_events_go_to_the_streams_of_their_topics(bench: Callable[..., Bench]) -> None:
    here = bench()
    a, b, both = here.stream("a"), here.stream("b"), here.stream("a", "b")
    for topic in "abca":
        here.broker.say(topic)
    here.settle()
    assert (seqs(a), seqs(b), seqs(both)) == ([1, 4], [2], [1, 2, 4])


@pytest.mark.parametrize("envelope", [False, True])
@pytest.mark.parametrize("count", [1, SMALL_GROUP + 1])
def test_an_event_on_several_topics_comes_once(bench: Callable[..., Bench], envelope: bool, count: int) -> None:
    here = bench()
    streams = [here.stream("c", "b", "a", envelope=envelope) for _ in range(count)]
    here.broker.deliver([here.broker.event("a", "b"), here.broker.event("b", "c", "a"), here.broker.event("x", "a")])
    here.settle()
    assert {tuple(seqs(stream)) for stream in streams} == {(1, 2, 3)}


def test_an_envelope_names_the_topic_that_matched(bench: Callable[..., Bench]) -> None:
    here = bench()
    streams = {topic: here.stream(topic, envelope=True) for topic in "ab"}
    here.broker.say("a", "b")
    here.settle()
    for topic, stream in streams.items():
        assert f'"topic":"{topic}"' in taken(stream)


def test_a_topic_that_is_named_twice_counts_once(bench: Callable[..., Bench]) -> None:
    here = bench()
    stream = here.stream("a", "a", "b", "a")
    here.broker.say("a")
    here.settle()
    assert seqs(stream) == [1]
    assert stream.group is here.stream("a", "b").group


def test_streams_that_want_the_same_share_their_bytes(bench: Callable[..., Bench]) -> None:
    here = bench()
    one, two, other = here.stream("a"), here.stream("a"), here.stream("a", "b")
    here.broker.say("a")
    here.settle()
    frames = [stream.mailbox.queue[1].frame for stream in (one, two, other) if stream.mailbox]
    assert frames[0] is frames[1] is frames[2]


def test_what_a_stream_has_had_is_not_offered_again(bench: Callable[..., Bench]) -> None:
    here = bench()
    here.broker.deliver([here.broker.event("a") for _ in range(3)])  # delivered, not served yet when it attaches
    stream = here.stream("a")
    stream.cursor = here.broker.head().seq
    here.broker.say("a")
    here.settle()
    assert seqs(stream) == [4]


def test_a_detached_or_closed_stream_is_offered_nothing(bench: Callable[..., Bench]) -> None:
    here = bench()
    gone, closed, stays = here.stream("a"), here.stream("a"), here.stream("a")
    here.broker.say("a")
    here.hub.detach(gone)
    here.hub.detach(gone)
    here.hub.close(closed, GONE)
    here.settle()
    assert (gone.mailbox, seqs(closed), seqs(stays)) == (None, [], [1])


# --- too slow


def test_a_stream_that_falls_behind_is_closed_and_others_still_receive(bench: Callable[..., Bench]) -> None:
    here = bench(mailbox_events=5)
    broken = []
    slow, quick = here.stream("a", abort=lambda: broken.append("slow")), here.stream("a")
    got = []
    for _ in range(10):
        here.broker.say("a")
        here.settle()
        got.append(taken(quick))
    assert all(got)
    assert (slow.state, slow.reason, slow.retry_ms) == (State.CLOSED, SLOW, here.hub.settings.retry_ms)
    assert slow.mailbox is not None
    assert (slow.mailbox.closed, seqs(slow), broken) == (True, [], ["slow"])
    assert quick.state is State.BEHIND


def test_a_stream_that_replays_is_not_too_slow_but_reads_history_again(bench: Callable[..., Bench]) -> None:
    here = bench(mailbox_events=5)
    stream = here.stream("a", behind=False)
    for _ in range(10):
        here.broker.say("a")
    here.settle()
    assert (stream.state, stream.overflowed, seqs(stream)) == (State.OPENING, True, [])
    stream.overflowed = False
    stream.cursor = 8
    here.broker.deliver([here.broker.event("a")])
    here.settle()
    assert seqs(stream) == [11]


def test_burst_larger_than_its_mailbox_closes_no_stream_that_had_taken_all(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(1000.0), mailbox_events=5)  # that stands still: the burst is noted in one slice
    quick = here.stream("a")
    here.broker.deliver([here.broker.event("a") for _ in range(12)])
    here.settle()
    assert (quick.state, seqs(quick)) == (State.BEHIND, list(range(1, 13)))
    here.broker.say("a")
    here.settle()
    assert quick.reason == SLOW


def test_burst_of_more_bytes_than_its_mailbox_has_closes_no_stream_that_had_taken_all(
        bench: Callable[..., Bench]) -> None:
    here = bench(Clock(1000.0), mailbox_bytes=2048)
    stream = here.stream("a")
    here.broker.deliver([here.broker.event("a", data="x" * 1000) for _ in range(4)])
    here.settle()
    assert (stream.state, seqs(stream)) == (State.BEHIND, [1, 2, 3, 4])
    here.broker.say("a")
    here.settle()
    assert stream.reason == SLOW


def test_passing_events_close_nobody(bench: Callable[..., Bench]) -> None:
    here = bench(mailbox_events=5)
    stream = here.stream("a")
    for number in range(50):
        here.broker.say("a", keep="none", key=str(number))
        here.broker.say("a", keep="latest", key="k")
    here.settle()
    assert stream.state is State.BEHIND
    assert seqs(stream)[-1] == 100
    assert len(seqs(stream)) <= 5


# --- the order, and who waits for whom


def test_each_stream_gets_its_events_in_order_however_large_its_groups(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    rooms = [f"r{number}" for number in range(6)]
    groups = [(500, ("r0",)), (300, ("r1", "r0")), (100, ("r2",)), (10, ("r0", "r3")), (1, tuple(rooms)), (3, ("r4",)),
              (200, ("r5", "r2"))]
    streams = [(topics, stream) for size, topics in groups for stream in here.crowd("", size, *topics)]
    said: list[tuple[str, ...]] = []
    for _ in range(60):
        batch = [tuple(random.sample(rooms, random.choice([1, 1, 2, 3]))) for _ in range(random.choice([1, 1, 5, 20]))]
        said += batch
        here.broker.deliver([here.broker.event(*topics) for topics in batch])
        gevent.sleep(0)  # the fan-out of these and of earlier ones goes on meanwhile
    here.settle()
    for topics, stream in streams:
        assert stream.seqs == [seq for seq, on in enumerate(said, 1) if not set(on).isdisjoint(topics)]


def test_a_broadcast_keeps_neither_small_groups_nor_timers_waiting(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    here.crowd("large", LARGE, "everybody")
    here.crowd("small", 3, "few")
    here.broker.say("everybody")
    eventually(lambda: here.notes, interval=0)
    gevent.spawn(here.notes.append, "greenlet")
    gevent.spawn_later(0, here.notes.append, "timer")
    here.broker.say("few")
    here.settle()
    count = Counter(here.notes)
    assert count == {"large": LARGE, "small": 3, "greenlet": 1, "timer": 1}
    for name in ("small", "greenlet", "timer"):
        assert here.notes.index(name) < LARGE / 10, f"{name} waits for the broadcast"


def test_a_broadcast_to_streams_with_a_topic_of_their_own_keeps_no_other_waiting(bench: Callable[..., Bench]) -> None:
    """Each of them is a small group. One that gets an event of its own has both, in order, and does not wait either."""
    here = bench(Clock(0.0, STEP))
    owners = [here.noted("own", "all", f"user-{number}") for number in range(LARGE)]
    here.crowd("small", 3, "few")
    here.broker.say("all")
    eventually(lambda: here.notes, interval=0)
    here.broker.say("few")
    here.broker.say(f"user-{LARGE - 1}")
    last = owners[-1]
    eventually(lambda: len(last.seqs) == 2, interval=0)
    assert len(here.notes) < LARGE / 2
    here.settle()
    assert Counter(here.notes) == {"own": LARGE, "small": 3}, "both events of the last one went together"
    assert here.notes.index("small") < LARGE / 10
    assert last.seqs == [1, 3]
    assert all(owner.seqs == [1] for owner in owners[:-1])


def test_many_small_groups_keep_no_timer_waiting_either(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    topics = [f"user-{number}" for number in range(1000)]
    for topic in topics:
        here.crowd("user", 2, topic)
    here.broker.say(*topics)
    eventually(lambda: here.notes, interval=0)
    gevent.spawn_later(0, here.notes.append, "timer")
    here.settle()
    assert here.notes.count("user") == 2000
    assert here.notes.index("timer") < 1000


def test_many_events_for_many_groups_keep_no_timer_waiting(bench: Callable[..., Bench]) -> None:
    """Each stream with topics of its own is a group, and each event is noted for each of them."""
    here = bench(Clock(0.0, STEP))
    streams = [here.noted("user", "all", f"user-{number}") for number in range(100)]
    left: list[int] = []

    def look() -> None:
        left.append(len(here.hub._incoming))
        if left[-1]:
            gevent.spawn_later(0.00001, look)

    gevent.spawn_later(0.00001, look)
    here.broker.deliver([here.broker.event("all") for _ in range(200)])
    here.settle()
    assert len(set(left)) > 20, left
    assert all(stream.seqs == list(range(1, 201)) for stream in streams)


def test_what_waits_to_be_noted_is_bounded(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MOST_INCOMING", 50)
    monkeypatch.setattr(hub, "MOST_INCOMING_BYTES", 10_000)
    here = bench()
    stream = here.noted("a", "a")
    for size, most in ((1, 50), (1000, 10)):
        here.broker.deliver([here.broker.event("a", data="x" * size) for _ in range(200)])
        assert len(here.hub._incoming) == most
    here.settle()
    assert stream.seqs == list(range(1, 401))
    assert here.hub._incoming_bytes == 0


def test_what_nobody_has_asked_for_does_not_wait(bench: Callable[..., Bench]) -> None:
    here = bench()
    here.stream("a")
    here.broker.deliver([here.broker.event("b"), here.broker.event("a")])
    assert len(here.hub._incoming) == 1


def test_gap_comes_behind_what_was_handed_over_before_it(bench: Callable[..., Bench]) -> None:
    here = bench()
    stream = here.stream("a")
    here.broker.say("a")
    here.broker.reset(Position("18bcfe56900", 7), Position(EPOCH, 1))
    here.broker.seq = 7
    here.broker.say("a")
    here.settle()
    assert seqs(stream) == [1, 7, 8]
    assert re.findall("id: (.*)", taken(stream)) == [f"{EPOCH}-1", "18bcfe56900-7", "18bcfe56900-8"]


def test_gap_ends_streams_that_are_further_and_may_miss_what_is_behind_them(bench: Callable[..., Bench]) -> None:
    here = bench()
    streams = [here.stream("a") for _ in range(5)]
    for stream, cursor in zip(streams, (4, 5, 8, 9, 0), strict=True):
        stream.cursor = cursor
    streams[-1].state = State.OPENING  # a page of history is on its way
    here.broker.reset(Position(EPOCH, 5), Position(EPOCH, 4), 9)
    here.settle()
    assert [stream.reason for stream in streams] == ["", LOST, LOST, "", LOST]
    assert [seqs(stream) for stream in streams] == [[5], [], [], [], []]
    assert f'id: {EPOCH}-5\ndata: {{"from":"{EPOCH}-4","to":"{EPOCH}-9","reason":"trimmed"}}' in taken(streams[0])


def test_large_groups_take_turns(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    here.crowd("first", LARGE, "a")
    here.crowd("second", 1000, "b")
    here.broker.deliver([here.broker.event("a"), here.broker.event("b")])
    here.settle()
    assert len(here.notes) - here.notes[::-1].index("second") < LARGE / 2


def test_small_groups_without_end_do_not_starve_a_large_one(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    here.crowd("large", 1000, "everybody")
    here.crowd("small", 1, "few")
    here.broker.say("everybody")
    eventually(lambda: here.broker.say("few") and here.notes.count("large") == 1000, 60, interval=0.0001)


def test_what_comes_during_a_broadcast_follows_it_joined_whoever_joins_meanwhile(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    streams = here.crowd("early", 1000, "a")
    here.broker.say("a")
    eventually(lambda: here.notes, interval=0)
    late = here.crowd("late", 5000, "a")
    for _ in range(5):
        here.broker.say("a")
    here.settle()
    assert all(stream.seqs == [1, 2, 3, 4, 5, 6] for stream in streams)
    assert all(stream.seqs == [2, 3, 4, 5, 6] for stream in late)
    assert Counter(here.notes) == {"early": 2 * 1000, "late": 5000}, "one turn for the first, one for all others"


# --- nothing is left


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_of_streams_that_have_gone(bench: Callable[..., Bench], seed: int) -> None:
    chance = random.Random(seed)
    clock = Clock(1000.0)
    here = bench(clock, heartbeat_seconds=1.0)
    streams: list[Noted] = []
    for _ in range(1500):
        if streams and chance.random() < 0.45:
            here.leave(streams.pop(chance.randrange(len(streams))))
        else:
            topics = chance.choices("abcdefgh", k=chance.randint(1, 4))
            streams.append(here.noted("", *topics, envelope=chance.random() < 0.3))
        if chance.random() < 0.1:
            here.broker.say(*set(chance.choices("abcdefgh", k=2)))
        if chance.random() < 0.02:
            gevent.sleep(0)
        assert len(here.hub) == len(streams)
        assert +here.broker.watched == Counter({topic for each in streams for topic in each.group.topics})
    references = [weakref.ref(each) for each in streams]
    while streams:
        here.leave(streams.pop())
    here.settle()
    assert len(here.hub) == here.hub._naming == 0
    assert not here.hub._topics
    assert not any(here.hub._groups)
    assert not +here.broker.watched
    clock.now += 10  # the wheel forgets when it turns, all but the one that it looked at last
    eventually(lambda: gc.collect() >= 0 and sum(each() is not None for each in references) <= 1)


def test_events_leave_nothing_behind(bench: Callable[..., Bench]) -> None:
    here = bench()
    stream = here.stream("a")
    told = [Told("a") for _ in range(3)]
    references = [weakref.ref(each) for each in told]
    while told:
        here.broker.deliver([here.broker.event("a", data=told.pop())])
    here.settle()
    assert taken(stream)
    gc.collect()
    assert not any(each() for each in references)


class Told(str):
    """A text that can be watched for its end."""

    __slots__ = ("__weakref__",)


# --- resets


def test_a_reset_ends_all_streams_and_forgets_what_was_pending(bench: Callable[..., Bench]) -> None:
    here = bench(comeback_ms=1000)
    streams = [here.stream("a") for _ in range(50)]
    here.broker.say("a")
    here.broker.reset(Position("18bcfe56900", 7))
    here.settle()
    assert {(stream.state, stream.reason) for stream in streams} == {(State.CLOSED, LOST)}
    retries = [stream.retry_ms or 0 for stream in streams]
    assert len(set(retries)) > 25, "they come back spread"
    assert all(1 <= retry <= 1000 for retry in retries)
    assert all(seqs(stream) == [] for stream in streams)
    fresh = here.stream("a")
    here.broker.say("a")
    here.settle()
    assert "id: 18bcfe56900-2\n" in taken(fresh)


def test_a_reset_in_the_middle_of_a_broadcast_keeps_the_old_from_those_who_come_back(bench: Callable[..., Bench]) -> None:
    here = bench(Clock(0.0, STEP))
    old = here.crowd("old", 1000, "a")
    here.broker.say("a")
    eventually(lambda: here.notes, interval=0)
    here.broker.say("a")
    here.broker.reset(Position("18bcfe56900", 2))
    new = here.crowd("new", 1000, "a")
    here.broker.say("a")
    here.settle()
    assert here.notes.count("old") < 1000, "who is closed is passed over"
    assert all(2 not in stream.seqs for stream in old)
    assert all(stream.seqs == [3] for stream in new)


def test_the_first_reset_is_the_beginning_and_ends_nobody(bench: Callable[..., Bench]) -> None:
    fresh = Hub(Settings(), Metrics())
    subscription = fresh.subscribe(["a"], False)
    fresh.attach(subscription)
    fresh.reset(Position(EPOCH, 0))
    assert subscription.state is State.OPENING


# --- time


def ticked(here: Bench, clock: Clock) -> None:
    """The wheel has turned to the clock's time, and once more: what it had to do is done."""
    eventually(lambda: here.hub.now == clock.now)
    clock.now += 0.00001
    eventually(lambda: here.hub.now == clock.now)


def test_only_streams_that_were_silent_get_a_heartbeat(bench: Callable[..., Bench]) -> None:
    clock = Clock(1000.0)
    here = bench(clock, heartbeat_seconds=10.0)
    silent, busy = here.stream("a"), here.stream("b")
    assert silent.mailbox is not None
    assert busy.mailbox is not None
    clock.now += 6.0
    ticked(here, clock)
    here.broker.say("b")
    here.settle()
    assert busy.take_waiting(here.hub.now)
    assert not silent.mailbox.nudged
    clock.now += 4.5
    ticked(here, clock)
    assert (silent.mailbox.nudged, busy.mailbox.nudged) == (True, False)
    silent.mailbox.nudged = False
    clock.now += 6.0
    ticked(here, clock)
    assert (silent.mailbox.nudged, busy.mailbox.nudged) == (False, True)
    clock.now += 4.5
    ticked(here, clock)
    assert silent.mailbox.nudged


def test_heartbeats_are_an_interval_apart(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    tick, clock = 0.03, Clock(1000.1)
    monkeypatch.setattr(hub, "TICK_SECONDS", tick)
    here = bench(clock, heartbeat_seconds=8 * tick)
    stream = here.stream("a")
    beats = []
    for _ in range(50):
        clock.now += tick
        ticked(here, clock)
        if stream.mailbox is not None and stream.mailbox.nudged:
            stream.mailbox.nudged = False
            beats.append(clock.now)
    assert [later - earlier for earlier, later in pairwise(beats)] == pytest.approx(
        [8 * tick] * (len(beats) - 1), abs=tick / 2)
    assert len(beats) >= 5


def test_heartbeats_after_an_event_to_all_are_spread(bench: Callable[..., Bench]) -> None:
    clock = Clock(1000.0)
    here = bench(clock, heartbeat_seconds=100.0)
    streams = [here.stream("a") for _ in range(500)]
    clock.now += 50.0
    ticked(here, clock)
    here.broker.say("a")
    here.settle()
    assert all(stream.take_waiting(here.hub.now) for stream in streams)
    beaten = []
    for seconds in (74.0, 6.5, 6.5, 6.5, 7.0):  # of silence: up to three quarters of the interval, then the last one
        clock.now += seconds
        ticked(here, clock)
        beaten.append(sum(stream.mailbox.nudged for stream in streams if stream.mailbox is not None))
    assert beaten[0] == 0
    assert beaten[-1] == 500, "none is silent for longer than the interval"
    assert all(later - earlier < 250 for earlier, later in pairwise(beaten)), beaten


def test_streams_end_at_their_age_spread_by_a_tenth_either_way(bench: Callable[..., Bench]) -> None:
    clock = Clock(1000.0)
    here = bench(clock, rotate_seconds=100.0, comeback_ms=1000)
    streams = [here.stream("a") for _ in range(500)]
    ended = []
    for until in (1089.0, 1100.0, 1111.0):
        clock.now = until
        ticked(here, clock)
        ended.append(sum(stream.state is State.CLOSED for stream in streams))
    assert ended[0] == 0
    assert 100 < ended[1] < 400
    assert ended[2] == 500
    assert {stream.reason for stream in streams} == {ROTATE}
    assert all(1 <= (stream.retry_ms or 0) <= 1000 for stream in streams)


def test_without_an_age_streams_stay(bench: Callable[..., Bench]) -> None:
    clock = Clock(1000.0)
    here = bench(clock, rotate_seconds=0.0)
    stream = here.stream("a")
    clock.now += 1e6
    ticked(here, clock)
    assert stream.state is State.BEHIND


def test_a_stream_ends_when_its_token_does(bench: Callable[..., Bench]) -> None:
    clock, wall = Clock(1000.0), Clock(5000.0)
    here = bench(clock, wall, heartbeat_seconds=10.0)
    soon, later, never = here.stream("a", expires=5003.0), here.stream("a", expires=5060.0), here.stream("a")
    clock.now, wall.now = 1002.9, 5002.9
    ticked(here, clock)
    assert soon.state is State.BEHIND
    clock.now, wall.now = 1003.5, 5003.5
    ticked(here, clock)
    assert (soon.reason, soon.retry_ms) == (EXPIRED, here.hub.settings.retry_ms)
    assert later.state is State.BEHIND
    clock.now, wall.now = 1061.0, 5061.0
    ticked(here, clock)
    assert later.reason == EXPIRED
    assert never.state is State.BEHIND


def test_a_wall_clock_that_is_set_ahead_ends_tokens_and_nothing_else(bench: Callable[..., Bench]) -> None:
    clock, wall = Clock(1000.0), Clock(5000.0)
    here = bench(clock, wall, heartbeat_seconds=1.0, rotate_seconds=100.0)
    token, plain = here.stream("a", expires=9000.0), here.stream("a")
    wall.now = 9000.0
    clock.now += 1.5
    ticked(here, clock)
    assert token.reason == EXPIRED
    assert plain.state is State.BEHIND


# --- bounds and the end


def test_a_worker_that_has_all_it_may_have_is_full(bench: Callable[..., Bench]) -> None:
    here = bench(max_streams=2)
    first, _ = here.stream("a"), here.stream("b")
    assert here.hub.is_full()
    here.hub.detach(first)
    assert not here.hub.is_full()


def test_close_says_its_first_reason_and_never_raises(bench: Callable[..., Bench]) -> None:
    here = bench()
    stream = here.stream("a")
    here.hub.close(stream, ROTATE, 7)
    here.hub.close(stream, GONE)
    assert (stream.reason, stream.retry_ms) == (ROTATE, 7)
    assert stream.mailbox is not None
    assert stream.mailbox.closed


def test_a_drain_refuses_at_once_spreads_the_ends_and_closes_all(bench: Callable[..., Bench]) -> None:
    here = bench(drain_seconds=20.0, comeback_ms=1000)
    streams = [here.stream("a") for _ in range(100)]
    ends: dict[Subscription, float] = {}

    def leave(stream: Subscription) -> None:
        assert stream.mailbox is not None
        stream.mailbox.take()
        ends[stream] = time.monotonic()
        here.hub.detach(stream)

    for stream in streams:
        gevent.spawn(leave, stream)
    draining = gevent.spawn(here.hub.drain)
    gevent.sleep(0)
    assert here.hub.is_full()
    draining.get(timeout=15)  # a worker with few streams is faster than the window
    assert {(stream.state, stream.reason) for stream in streams} == {(State.CLOSED, DRAIN)}
    retries = {stream.retry_ms or 0 for stream in streams}
    assert len(retries) > 50
    assert all(1 <= retry <= 1000 for retry in retries)
    assert max(ends.values()) - min(ends.values()) > 0.1, "not all in one moment"
    assert len(here.hub) == 0


def test_a_stream_that_was_admitted_before_a_drain_and_attaches_after_it_is_told_too(bench: Callable[..., Bench]) -> None:
    here = bench(comeback_ms=1000)
    late = here.hub.subscribe(["a"], False)
    here.hub.drain()
    here.hub.attach(late)
    assert (late.state, late.reason) == (State.CLOSED, DRAIN)
    assert 1 <= late.retry_ms <= 1000
    here.leave(late)
    assert not len(here.hub)


def test_a_drain_breaks_off_whoever_does_not_take_its_farewell(bench: Callable[..., Bench]) -> None:
    here = bench(drain_seconds=0.3)
    broken: list[str] = []
    for name in "abc":
        here.stream(name, abort=lambda name=name: broken.append(name))  # type: ignore[misc]
    gevent.spawn(here.hub.drain).get(timeout=15)
    assert sorted(broken) == ["a", "b", "c"]


def test_a_drain_without_streams_is_over_at_once(bench: Callable[..., Bench]) -> None:
    here = bench()
    here.hub.drain()
    assert here.hub.is_full()


def test_counts_and_depths_are_of_the_present(bench: Callable[..., Bench]) -> None:
    here = bench()
    streams = [here.stream("a", "b"), here.stream("b", "c", "d"), here.stream("a", "b")]
    here.broker.say("b")
    here.settle()
    here.hub.close(streams[0], GONE)
    here.hub.detach(streams[0])
    here.hub.flush()
    lines = dict(line.rsplit(" ", 1) for line in here.hub.metrics.exposition().decode().splitlines() if line[0] != "#")
    expected = {"streams": 2, "subscriptions": 5, "topics": 4, 'queue_depth{queue="fan_out"}': 0,
                "streams_opened_total": 3, "received_total": 1, "delivered_total": 3, 'evicted_total{reason="gone"}': 1}
    for name, value in expected.items():
        assert float(lines[f"pushsvc_{name}"]) == value, name


def test_a_hub_that_was_stopped_serves_no_more(bench: Callable[..., Bench]) -> None:
    here = bench()
    stream = here.stream("a")
    here.hub.stop()
    here.broker.say("a")
    gevent.sleep(0.01)
    assert seqs(stream) == []
