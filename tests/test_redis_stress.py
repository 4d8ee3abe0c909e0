"""The Redis broker where it is easily wrong: pages, numbers that go back, messages that come half, and
all of it at once."""

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal

from pushsvc.brokers import redis_reader
from pushsvc.brokers.redis_address import parse_address
from pushsvc.brokers.redis_link import Link
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft, Event
from pushsvc.publisher import Publisher
from tests.support.brokers import WATCHED, Open, Side, data, put
from tests.support.redis import Redis
from tests.support.server import ROOT
from tests.support.wait import eventually

pytest_plugins = ["tests.support.sides"]
TIMEOUT = 30


# --- history


def test_a_page_ends_where_an_event_has_no_room_also_if_a_later_one_would_have(server: Redis, opened: Open) -> None:
    side = opened(server)
    for number, size in enumerate((100, 600_000, 600_000, 100)):
        put(side, f"{number}" + "x" * size)
    assert [event.data[0] for event in side.history("a")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("setting", "value", "takes_away"), [
    ("maxmemory", "1mb", True), ("min-replicas-to-write", "1", False)])
def test_a_server_that_takes_no_writes_is_read_also_when_events_are_too_old(
        setting: str, value: str, takes_away: bool, server: Redis, opened: Open) -> None:
    side = opened(server, history_seconds=2)
    last = [side.broker.append([Draft(("a", "b"), str(number))])[0] for number in range(5)][-1]
    gevent.sleep(2.1)
    with contextlib.closing(server.client()) as client:
        assert not side.history("c"), "the first look at the time is over"
        late = put(side, "late", "b")
        client.config_set(setting, value)
        with pytest.raises(BrokerUnavailable):
            put(side, "refused")
        assert [event.data for event in side.history("a", "b")] == ["late"]
        assert (side.missing("a"), side.missing("b")) == (last.seq, last.seq)
        assert side.missing("b", after=last.seq) == 0
        gevent.sleep(2.1)
        assert not side.history("a", "b")
        assert side.missing("b") == late.seq
        assert (client.xlen("pushsvc:t:b") == 0) is takes_away


@pytest.mark.parametrize("topic", ["held", "idle"])
def test_a_full_server_goes_on_by_itself_when_its_events_are_too_old(topic: str, server: Redis, opened: Open) -> None:
    """Nobody reads, and what is asked of it is refused: those refusals make room."""
    side = opened(server, history_seconds=1)
    topics = [f"t{number}" for number in range(200)] if topic == "idle" else ["held"]
    side.broker.append([Draft((topics[number % len(topics)],), "x" * 10_000) for number in range(200)])
    put(side, "x" * 10_000, "newer")
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            put(side, "refused", "held")
        assert not side.missing(topics[0]), "nothing leaves before its time"
        eventually(lambda: put(side, "again", "held"), TIMEOUT)
        eventually(lambda: not side.history("newer"), TIMEOUT)
        eventually(lambda: not side.broker.check(), TIMEOUT)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("busy", ["t0", "new"])
def test_a_full_server_goes_on_by_itself_when_history_is_to_hold_fewer_events(
        busy: str, server: Redis, opened: Open) -> None:
    """What is asked of it is refused: those refusals make room, also of topics that nobody publishes to."""
    side = opened(server)
    with contextlib.closing(server.client()) as client:
        client.config_set("stream-node-max-bytes", 512)
        for _ in range(2):
            side.broker.append([Draft((f"t{number % 400}",), "x" * 100) for number in range(8000)])
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 500_000)
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            put(side, "refused", busy)
        assert client.xlen("pushsvc:t:t0") == 40
        fewer = opened(server, history_events=10)
        eventually(lambda: put(fewer, "again", busy), TIMEOUT)
        client.config_set("maxmemory", "100kb")

        def is_thinned() -> bool:
            with pytest.raises(BrokerUnavailable, match="maxmemory"):
                put(fewer, "refused", busy)
            return all(client.xlen(f"pushsvc:t:t{number}") == 10 for number in range(400))

        eventually(is_thinned, TIMEOUT)
        assert not client.hexists("pushsvc:log", "thin"), "once"


def test_an_event_that_is_published_again_is_acknowledged_only_when_replicas_have_it(
        server: Redis, opened: Open) -> None:
    with Redis(server.directory / "replica") as replica, contextlib.closing(replica.client()) as client:
        client.replicaof(server.host, server.port)
        eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
        sides = [opened(server, redis_replicas=1, publish_timeout_seconds=1) for _ in "12"]
        for side in sides:
            eventually(lambda: put(side, "both have it"), TIMEOUT)  # noqa: B023
        eventually(lambda: put(sides[1], "so that its connection has written last"), TIMEOUT)
        replica.freeze()
        try:
            for side in sides:
                with pytest.raises(BrokerUnavailable, match="0 of 1 replicas"):
                    side.broker.append([Draft(("a",), "alone")], "key")
        finally:
            replica.thaw()
        first, second = [eventually(lambda: side.broker.append([Draft(("a",), "")], "key"), TIMEOUT)  # noqa: B023
                         for side in sides]
        assert first == second


def test_a_repeat_sends_something_to_replicas_for_which_a_wait_can_wait(server: Redis, opened: Open) -> None:
    """Newer servers wait for the last that its connection has sent to replicas, not for all that they have."""
    with Redis(server.directory / "replica") as replica, contextlib.closing(replica.client()) as client, \
            contextlib.closing(server.client()) as master:
        master.config_set("repl-ping-replica-period", 3600)
        client.replicaof(server.host, server.port)
        eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
        side = opened(server)
        first = side.broker.append([Draft(("a",), "once")], "key")
        before = master.info("replication")["master_repl_offset"]
        assert side.broker.append([Draft(("a",), "twice")], "key") == first
        assert master.info("replication")["master_repl_offset"] > before
        put(side, "next")
        side.heard(2)
        assert data(side) == ["once", "next"]
        assert not side.gaps


@pytest.mark.parametrize(("setting", "value"), [("maxmemory", "1mb"), ("min-replicas-to-write", "1")])
def test_a_repeat_is_answered_by_a_server_that_takes_no_writes(
        setting: str, value: str, server: Redis, opened: Open) -> None:
    side = opened(server)
    first = side.broker.append([Draft(("a",), "once")], "key")
    with contextlib.closing(server.client()) as client:
        client.config_set(setting, value)
        with pytest.raises(BrokerUnavailable):
            put(side, "refused")
        assert side.broker.append([Draft(("a",), "twice")], "key") == first


# --- the reader


WIDE = ("a", *(f"t{number}" for number in range(40)))  # an event of so many topics is fetched


def test_what_came_before_an_event_that_cannot_be_fetched_is_handed_over_first(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server)
    put(side, "0")
    side.heard(1)
    reader: Any = side.broker._reader  # type: ignore[attr-defined]
    fetch, failures = reader._fetch, [BrokerUnavailable("once")]

    def fail_once(*arguments: Any) -> Event:
        if failures:
            raise failures.pop()
        return fetch(*arguments)

    monkeypatch.setattr(reader, "_fetch", fail_once)
    publisher.publish_batch([{"topic": "a", "data": "1"}, {"topics": list(WIDE), "data": "2"},
                             {"topic": "a", "data": "3"}])
    eventually(lambda: "3" in data(side), TIMEOUT)
    assert data(side) == ["0", "1", "2", "3"]
    assert not side.gaps


def test_a_topic_that_is_left_during_a_fetch_and_watched_again_is_heard(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.0)
    side = opened(server)
    side.watch("t1")
    reader: Any = side.broker._reader  # type: ignore[attr-defined]
    fetch = reader._fetch

    def fetch_late(*arguments: Any) -> Event:
        side.broker.unwatch(["t1"])
        eventually(lambda: "t1" not in reader._topics)
        return fetch(*arguments)

    monkeypatch.setattr(reader, "_fetch", fetch_late)
    side.broker.append([Draft(("t1", *(f"u{number}" for number in range(40))), "wide")])
    side.heard(1)
    side.watch("t1")
    put(side, "next", "t1")
    eventually(lambda: data(side) == ["wide", "next"])


def test_a_newer_event_in_the_place_of_one_that_was_to_be_fetched_is_no_gap(
        server: Redis, opened: Open, publisher: Publisher) -> None:
    side = opened(server)
    put(side, "0")
    publisher.publish_batch([{"topics": list(WIDE), "data": data, "keep": "latest", "key": "k"} for data in "1234"])
    put(side, "5")
    eventually(lambda: "5" in data(side), TIMEOUT)
    assert data(side) == ["0", "4", "5"]
    assert not side.gaps


def test_a_new_log_with_lower_numbers_is_heard_from_its_first_event(
        server: Redis, opened: Open, publisher: Publisher) -> None:
    """A process that knows of no log gets to an emptied server before those that do, and its clock has gone back."""
    side = opened(server)
    ahead = 4 * 10**15  # us: in the year 2096
    with contextlib.closing(server.client()) as client:
        client.hset("pushsvc:log", "seq", ahead)
        for number in range(20):
            put(side, str(number))
        side.heard(20)
        client.flushall()
    publisher.publish("a", "new")
    eventually(lambda: len(side.resets) == 2, TIMEOUT)
    for number in range(3):
        put(side, f"newer {number}")
    eventually(lambda: data(side)[-1] == "newer 2", TIMEOUT)
    assert data(side)[20:] in (["new", "newer 0", "newer 1", "newer 2"], ["newer 0", "newer 1", "newer 2"])
    assert side.events[-1].seq < ahead
    assert not side.gaps


def test_a_process_that_has_left_its_last_topic_is_still_ready(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.0)
    side = opened(server)
    side.broker.unwatch(WATCHED)
    eventually(lambda: not side.broker._reader._topics)  # type: ignore[attr-defined]
    side.broker.check()
    side.watch("a")
    put(side, "heard")
    assert [event.data for event in side.heard(1)] == ["heard"]
    assert len(side.resets) == 1


def test_a_message_that_comes_half_keeps_nobody_waiting(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    side = opened(server)
    side.broker.head()
    monkeypatch.setattr(redis_reader, "ECHO_SECONDS", 0.1)
    monkeypatch.setattr(side.broker._reader._link, "has_more", lambda: True)  # type: ignore[attr-defined]
    for number in range(3):
        put(side, str(number))
        side.heard(number + 1)
    assert data(side) == ["0", "1", "2"]
    assert "broker failing" not in caplog.messages


def test_a_server_is_left_also_while_it_is_asked(server: Redis, opened: Open) -> None:
    side = opened(server)
    put(side, "0")
    line: Any = side.broker._line  # type: ignore[attr-defined]
    connection = line.link._connection
    putting = gevent.spawn(put, side, "1")
    while not line._talking:
        gevent.sleep(0)
    line.leave()
    putting.get(timeout=TIMEOUT)
    put(side, "2")
    assert line.link._connection is not connection
    side.heard(3)
    assert data(side) == ["0", "1", "2"]


def test_what_another_server_holds_is_not_taken_for_what_was_missed(tmp_path: Path, opened: Open) -> None:
    """For a while the two connections of a process are to two servers, as after a failover."""
    with Redis(tmp_path / "one") as one, Redis(tmp_path / "two") as two, Publisher(one.url) as publisher:
        side = opened(one)
        first = put(side, "first")
        side.heard(1)
        channels, publisher._link.channels = publisher._link.channels, "nobody:"
        publisher.publish("a", "lost")
        publisher._link.channels = channels
        line: Any = side.broker._line  # type: ignore[attr-defined]
        line.link.address = parse_address(two.url)
        line.leave()
        publisher.publish("a", "next")
        with contextlib.closing(two.client()) as client:
            eventually(lambda: client.exists("pushsvc:log"), TIMEOUT)
        gevent.sleep(0.2)
        assert not side.gaps
        line.link.address = parse_address(one.url)
        line.leave()
        eventually(lambda: data(side) == ["first", "lost", "next"] and side.gaps, TIMEOUT)
        (since, goes_on), = side.gaps
        assert since == first
        assert side.events[-1].seq < goes_on.seq < first.seq + 100


def test_what_is_published_before_a_topic_is_listened_to_is_no_loss(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server)
    side.broker.head()
    reader: Any = side.broker._reader  # type: ignore[attr-defined]
    repair = reader._repair

    def watch_and_repair(*arguments: Any) -> Any:
        publisher.publish("late", "1")
        side.broker.watch(["late"])
        missing = repair(reader._head(), *arguments[1:])
        publisher.publish("late", "2")
        return missing

    monkeypatch.setattr(reader, "_repair", watch_and_repair)
    server.break_listeners()
    eventually(lambda: not reader._live, interval=0.001)
    eventually(side.broker.head)
    publisher.publish("late", "3")
    eventually(lambda: "3" in data(side), TIMEOUT)
    gevent.sleep(0.1)
    assert not side.gaps


def test_what_could_not_be_sent_in_time_is_taken_back(server: Redis, opened: Open) -> None:
    side = opened(server, publish_timeout_seconds=1)
    line: Any = side.broker._line  # type: ignore[attr-defined]
    put(side, "0")
    side.heard(1)
    refused = []

    def try_to_put(text: str) -> None:
        try:
            put(side, text)
        except BrokerUnavailable as error:
            if "not known" not in str(error):
                refused.append(text)

    server.freeze()
    try:
        for number in range(2):
            gevent.joinall([gevent.spawn(try_to_put, f"{number} {other}") for other in range(400)], timeout=TIMEOUT)
        assert not line._jobs
    finally:
        server.thaw()
    eventually(lambda: put(side, "end"), TIMEOUT)
    eventually(lambda: data(side)[-1] == "end", TIMEOUT)
    assert refused
    assert not set(refused) & set(data(side))


def test_a_loss_is_told_also_for_a_topic_that_has_left_meanwhile(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server, history_seconds=1)
    first = put(side, "first")
    side.heard(1)
    reader: Any = side.broker._reader  # type: ignore[attr-defined]
    join, may_join = reader._join, Signal()
    monkeypatch.setattr(reader, "_join", lambda: may_join.wait() and join())
    server.break_listeners()
    eventually(lambda: not reader._live)
    publisher.publish("a", "lost")
    with contextlib.closing(server.client()) as client:
        def has_left() -> bool:
            publisher.publish("other", "x")
            return client.zscore("pushsvc:last", "a") is None

        eventually(has_left, interval=0.05)
    may_join.set()
    eventually(lambda: side.gaps, TIMEOUT)
    assert side.gaps[0][0] == first


# --- the publisher


def test_a_process_that_is_forked_while_a_thread_publishes_can_publish(server: Redis, opened: Open) -> None:
    side = opened(server)
    code = f"""
import os, signal, threading
from pushsvc.publisher import Publisher
publisher = Publisher({server.url!r})
held, publish = threading.Event(), publisher._talk
def publish_until_forked(*arguments):
    held.set()
    forked.wait()
    return publish(*arguments)
forked = threading.Event()
publisher._talk = publish_until_forked
thread = threading.Thread(target=publisher.publish, args=("a", "parent"))
thread.start()
held.wait()
child = os.fork()
publisher._talk = publish
if child:
    assert os.waitpid(child, 0)[1] == 0
    forked.set()
    thread.join()
else:
    signal.alarm(10)
    publisher.publish("a", "child")
    publisher.close()
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=TIMEOUT, check=True)
    side.heard(2)
    assert data(side) == ["child", "parent"]


def test_a_thread_that_gets_no_turn_in_time_has_published_nothing(server: Redis) -> None:
    with Publisher(server.url, timeout=0.2) as shared, contextlib.closing(server.client()) as client:
        talk, begun, may_go = shared._talk, Signal(), Signal()

        def talk_late(*arguments: Any) -> Any:
            begun.set()
            may_go.wait()
            return talk(*arguments)

        shared._talk = talk_late  # type: ignore[method-assign]
        first = gevent.spawn(shared.publish, "a", "first")
        begun.wait()
        with pytest.raises(BrokerUnavailable, match="nothing was published"):
            gevent.spawn(shared.publish, "a", "second").get(timeout=TIMEOUT)
        may_go.set()
        with pytest.raises(BrokerUnavailable, match="in time"):  # nor has it any time left
            first.get(timeout=TIMEOUT)
        assert not client.exists("pushsvc:t:a")


@pytest.mark.parametrize("part", ["connection", "reply", "replicas"])
def test_one_deadline_holds_for_all_that_a_publish_waits_for(part: str, server: Redis) -> None:
    link = Link(parse_address(server.url), "pushsvc:", 1000)
    link.open()
    server.freeze()
    try:
        link.deadline = time.monotonic() + 0.2
        if part == "replicas":
            assert link.await_replicas(1)[2] <= 100
        elif part == "reply":
            with pytest.raises(TimeoutError):
                link.call("PING")
        else:
            with pytest.raises(TimeoutError):
                link.open()
            with pytest.raises(TimeoutError):
                link.open()
    finally:
        server.thaw()
        link.close()


def test_a_publisher_is_closed_also_while_a_thread_of_it_hangs(server: Redis) -> None:
    with Publisher(server.url, timeout=0.2) as hanging:
        hanging.publish("a", "0")
        hanging._talk = lambda *_: hanging._link.receive(1000)  # type: ignore[method-assign]
        publishing = gevent.spawn(hanging.publish, "a", "1")
        gevent.sleep(0)
        gevent.spawn(hanging.close).get(timeout=TIMEOUT)
        with pytest.raises(BrokerUnavailable, match="cannot reach"):
            publishing.get(timeout=TIMEOUT)


# --- all at once


class Storm:
    """Three processes that publish to random topics while connections break, scripts are forgotten and topics come and
    go. acknowledged: sequence -> draft."""

    TOPICS = tuple(f"t{number}" for number in range(60))
    WATCHED, COMING = TOPICS[:8], TOPICS[50:]

    def __init__(self, server: Redis, sides: list[Side], seed: int) -> None:
        self.server = server
        self.sides = sides
        self.random = random.Random(seed)
        self.acknowledged: dict[int, Draft] = {}
        for side in sides:
            side.watch(*self.WATCHED)

    def blow(self, batches: int) -> None:
        """Until each of two publishers on each side has had so many batches acknowledged or refused."""
        publishers = [gevent.spawn(self._publish, side, batches) for side in self.sides for _ in "12"]
        others = [gevent.spawn(self._come_and_go, side) for side in self.sides] + [gevent.spawn(self._break)]
        try:
            for greenlet in gevent.joinall(publishers, timeout=TIMEOUT, raise_error=True):
                greenlet.get(block=False)
        finally:
            gevent.killall(publishers + others)

    def end(self) -> int:
        """Publish what all will hear last; its sequence."""
        seq = eventually(lambda: put(self.sides[0], "end", self.WATCHED[0]), TIMEOUT).seq
        for side in self.sides:
            eventually(lambda: side.events and side.events[-1].seq >= seq, TIMEOUT)  # noqa: B023
        return seq

    def missed(self, side: Side) -> list[int]:
        """What was acknowledged for watched topics, is told by no gap, and did not come. What comes is checked."""
        heard = {event.seq: event for event in side.events}
        missed = []
        for seq, draft in self.acknowledged.items():
            if event := heard.get(seq):
                assert (event.topics, event.data, event.keep) == (draft.topics, draft.data, draft.keep)
            elif draft.keep == "all" and set(draft.topics) & set(self.WATCHED):
                missed.append(seq)
        return [seq for seq in missed if not any(since.seq < seq <= upto.seq for since, upto in side.gaps)]

    def _publish(self, side: Side, batches: int) -> None:
        for _ in range(batches):
            drafts = [self._draft() for _ in range(self.random.choice((1, 1, 2, 5)))]
            try:
                positions = side.broker.append(drafts)
            except BrokerUnavailable:
                gevent.sleep(0.01)
                continue
            for position, draft in zip(positions, drafts, strict=True):
                assert position.seq not in self.acknowledged, "a number is given twice"
                self.acknowledged[position.seq] = draft

    def _draft(self) -> Draft:
        choice = self.random.choice
        topics = tuple(self.random.sample(self.TOPICS, choice((1, 1, 1, 2, 3, 40))))
        text = str(self.random.random()) + "x" * choice((0, 100, 20_000))
        return Draft(topics, text, keep=choice(("all", "all", "latest", "none")), key=choice(("", "k")))

    def _come_and_go(self, side: Side) -> None:
        while True:
            topics = self.random.sample(self.COMING, 3)
            side.broker.watch(topics)
            gevent.sleep(self.random.uniform(0, 0.1))
            side.broker.unwatch(topics)

    def _break(self) -> None:
        commands = ("CLIENT KILL TYPE pubsub", "CLIENT KILL TYPE pubsub", "CLIENT KILL TYPE normal", "SCRIPT FLUSH")
        while True:
            gevent.sleep(self.random.uniform(0, 0.2))
            with contextlib.closing(self.server.client()) as client:
                client.execute_command(*self.random.choice(commands).split())


def test_in_a_storm_nothing_is_lost_doubled_or_out_of_order(
        tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.05)
    with Redis(tmp_path / "redis", durable=True, args=["--appendfsync", "always"]) as server:
        sides = [opened(server) for _ in range(3)]
        storm = Storm(server, sides, seed=1)
        storm.blow(40)
        storm.end()
        for side in sides:
            assert not side.gaps
            assert len(side.resets) == 1
            assert not storm.missed(side)
        server.kill()
        server.start()
        storm.blow(25)
        end = storm.end()
        for side in sides:
            numbers = [event.seq for event in side.events]
            assert numbers == sorted(set(numbers)), "in order, each once"
            assert not storm.missed(side)
            assert [since.epoch < goes_on.epoch for since, goes_on in side.gaps] == [True], "of the restart"
        held = [event.seq for event in sides[0].history(*storm.WATCHED)]
        kept = {seq for seq, draft in storm.acknowledged.items()
                if draft.keep == "all" and set(draft.topics) & set(storm.WATCHED)}
        assert kept | {end} <= set(held)
        for after in held[:: len(held) // 10]:
            assert [event.seq for event in sides[1].history(*storm.WATCHED, after=after)] == \
                [seq for seq in held if seq > after]
