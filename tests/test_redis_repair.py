"""The Redis broker when it joins the log again: what is lost is told however that goes, and what it costs is bound."""

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal

from pushsvc.brokers import redis_reader
from pushsvc.brokers.redis_address import parse_address
from pushsvc.brokers.redis_link import Link
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft
from pushsvc.position import Position, new_epoch
from pushsvc.publisher import Publisher
from tests.support.brokers import Open, Side, data, put
from tests.support.fire import seq_of
from tests.support.redis import Redis
from tests.support.wait import eventually

pytest_plugins = ["tests.support.sides"]
TIMEOUT = 30
WIDE = ("a", *(f"t{number}" for number in range(40)))  # an event of so many topics is fetched


@pytest.fixture
def client(server: Redis) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


def reader_of(side: Side) -> Any:
    return side.broker._reader  # type: ignore[attr-defined]


def line_of(side: Side) -> Any:
    return side.broker._line  # type: ignore[attr-defined]


@contextlib.contextmanager
def away(side: Side, server: Redis) -> Iterator[None]:
    """Its reader has lost its connection, and joins again when the block has ended."""
    reader = reader_of(side)
    join, may_join = reader._join, Signal()
    reader._join = lambda: may_join.wait() and join()
    server.break_listeners()
    eventually(lambda: not reader._live, interval=0.001)
    yield
    may_join.set()


def before_the_next(owner: Any, method: str, act: Callable[[], object]) -> Signal:
    """Let something happen just before the next call of a method, only that one; set when it has."""
    call, happened = getattr(owner, method), Signal()

    def act_first(*arguments: Any) -> Any:
        setattr(owner, method, call)
        act()
        happened.set()
        return call(*arguments)

    setattr(owner, method, act_first)
    return happened


def connect_anew(side: Side, server: Redis) -> None:
    """Both its connections."""
    line_of(side).leave()
    server.break_listeners()


def texts(*numbers: int) -> list[dict[str, Any]]:
    """A batch to the topic a."""
    return [{"topic": "a", "data": str(number)} for number in numbers]


# --- what is lost is told


def test_publishes_do_not_break_off_a_reader_that_joins(server: Redis, opened: Open) -> None:
    side = opened(server)
    put(side, "old")
    side.heard(1)
    reader = reader_of(side)
    subscribe, joins, may_go = reader._subscribe_all, [], Signal()

    def subscribe_late() -> Any:
        joins.append(reader._link.epoch)
        may_go.wait()
        return subscribe()

    reader._subscribe_all = subscribe_late
    server.kill()
    server.start()
    eventually(lambda: joins, TIMEOUT)
    new = eventually(lambda: put(side, "new"), TIMEOUT)
    may_go.set()
    eventually(lambda: data(side) == ["old", "new"], TIMEOUT)
    assert joins == [new.epoch]


def test_a_gap_is_told_also_when_the_repair_that_found_it_breaks_off(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 5)
    side = opened(server, history_events=20)
    first = put(side, "first")
    side.heard(1)
    line, pages = line_of(side), []
    ask = line.ask

    def fail_at_the_second_page(script: str, *arguments: Any, **options: Any) -> Any:
        if script == "history":
            pages.append(arguments)
            if len(pages) == 2:
                raise BrokerUnavailable("once")
        return ask(script, *arguments, **options)

    with away(side, server):
        publisher.publish_batch(texts(*range(30)))
        line.ask = fail_at_the_second_page
    eventually(lambda: len(side.events) == 21 and reader_of(side)._live, TIMEOUT)
    assert data(side) == ["first", *map(str, range(10, 30))]
    assert side.gaps == [(first, first._replace(seq=first.seq + 10))]
    assert side.resets[-1].seq == first.seq + 1


def test_a_gap_is_told_where_the_first_loss_is_and_before_what_is_behind_it(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 5)
    side = opened(server, history_events=20)
    put(side, "first")
    side.heard(1)
    with away(side, server):
        *_, last = publisher.publish_batch([{"topic": "b", "data": str(number)} for number in range(7)])
        publisher.publish_batch(texts(*range(7, 37)))
    side.heard(28)
    place = side.calls.index(side.resets[-1])
    before, behind = ([event.data for events in calls if isinstance(events, list) for event in events]
                      for calls in (side.calls[:place], side.calls[place:]))
    assert before == ["first", *map(str, range(7))]
    assert behind == [*map(str, range(17, 37))]
    assert [(since.seq, upto.seq) for since, upto in side.gaps] == [(seq_of(last), seq_of(last) + 10)]
    assert side.resets[-1].seq == seq_of(last) + 1


def test_what_history_lost_of_an_epoch_that_has_ended_is_told_before_what_is_behind_it(
        server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    side = opened(server, history_events=20)
    first = put(side, "first")
    side.heard(1)
    with away(side, server):
        publisher.publish_batch(texts(*range(30)))
        client.hset("pushsvc:log", "run", "another")
    eventually(lambda: reader_of(side)._live, TIMEOUT)
    trimmed, ended = side.gaps
    assert trimmed == (first, first._replace(seq=first.seq + 10))
    assert ended == (first, side.resets[-1])
    assert ended[1].epoch > first.epoch
    assert [len(call) if isinstance(call, list) else call.seq for call in side.calls[2:]] == [
        first.seq + 1, 20, ended[1].seq]


def test_what_was_lost_with_an_epoch_is_told_before_what_is_of_the_next_though_that_has_ended_too(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    first = put(side, "first")
    side.heard(1)
    with away(side, server):
        client.save()
        for text in ("lost", "second", "third"):
            with Publisher(server.url) as publisher:
                publisher.publish("a", text)
            if text == "second":
                client.save()
            if text != "third":
                server.kill()
                server.start()
    side.heard(3)
    assert data(side) == ["first", "second", "third"]
    (since, upto), = side.gaps
    assert since == first
    assert [call.seq if isinstance(call, Position) else [event.data for event in call] for call in side.calls[2:]] == [
        side.resets[-1].seq, ["second", "third"]]
    assert first.seq < side.resets[-1].seq < side.events[1].seq < upto.seq < side.events[2].seq
    assert upto.epoch > first.epoch


def test_what_another_topic_still_holds_is_not_lost(server: Redis, opened: Open, publisher: Publisher) -> None:
    side = opened(server, history_events=1)
    put(side, "0")
    side.heard(1)
    with away(side, server):
        publisher.publish_batch([{"topics": ["a", "b"], "data": "1"}, *texts(2)])
    side.heard(3)
    assert data(side) == ["0", "1", "2"]
    assert not side.gaps


@pytest.mark.parametrize("seed", range(6))
def test_whoever_leaves_at_any_moment_has_been_told_of_all_losses_before_its_id(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 4)
    chance = random.Random(seed)
    side = opened(server, history_events=chance.choice((1, 3, 10)))
    put(side, "first")
    side.heard(1)
    reader, topics = reader_of(side), ("a", "b", "c", "other")
    drafts = [{"topics": chance.sample(topics, chance.choice((1, 1, 2, 3))), "data": "x"} for _ in range(60)]
    with away(side, server):
        published = [seq_of(each) for each in publisher.publish_batch(drafts)]
        ask = line_of(side).ask

        def ask_late(*arguments: Any) -> Any:
            """Retention takes more during the repair."""
            draft = {"topics": chance.sample(topics, 2), "data": "x"}
            published.extend(map(seq_of, publisher.publish_batch([draft])))
            drafts.append(draft)
            return ask(*arguments)

        line_of(side).ask = ask_late
    eventually(lambda: reader._live, TIMEOUT)
    line_of(side).ask = ask
    put(side, "end")
    eventually(lambda: data(side)[-1] == "end", TIMEOUT)
    came = {event.seq for event in side.events}
    lost = {seq for seq, draft in zip(published, drafts, strict=True) if set(draft["topics"]) - {"other"}} - came
    assert lost
    gaps, told, numbers = iter(side.gaps), set[int](), [0]
    for call in side.calls[1:]:
        if isinstance(call, Position):
            since, upto = next(gaps)
            told |= {seq for seq in lost if since.seq < seq <= upto.seq}
            numbers.append(call.seq)
        for event in call if isinstance(call, list) else []:
            assert {seq for seq in lost if seq < event.seq} <= told, event.seq
            numbers.append(event.seq)
    assert numbers == sorted(set(numbers)), "in order, and no gap has the number of an event"


def test_a_gap_waits_for_a_number_that_is_free(server: Redis, opened: Open, publisher: Publisher) -> None:
    side = opened(server)
    publisher.publish("other", "opens the connection")
    first = put(side, "first")
    side.heard(1)
    reader, failures = reader_of(side), [BrokerUnavailable("once")]
    burn = reader._burn

    def fail_once() -> int:
        if failures:
            raise failures.pop()
        return burn()

    reader._burn = fail_once
    publisher._link.channels, channels = "nobody:", publisher._link.channels
    publisher.publish("a", "does not arrive")
    publisher._link.channels = channels
    publisher.publish("a", "tells that")
    eventually(lambda: side.gaps and reader._live, TIMEOUT)
    assert not failures
    assert data(side) == ["first", "does not arrive", "tells that"]
    assert [(since, upto.seq) for since, upto in side.gaps] == [(first, first.seq + 3)]


def test_a_topic_that_is_left_during_a_repair_is_subscribed_to_again(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 2)
    side = opened(server)
    put(side, "first")
    side.heard(1)
    reader, line = reader_of(side), line_of(side)
    command = line.command

    def leave_behind_the_first_page(*arguments: Any) -> Any:
        reply = command(*arguments)
        if arguments[0] == "ZMSCORE" and "a" in arguments and "a" in reader._topics:
            monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.0)
            side.broker.unwatch(["a"])
            reader._drop_idle()
        return reply

    with away(side, server):
        publisher.publish_batch([*texts(1), *({"topic": f"other{number}", "data": "x"} for number in range(10))])
        line.command = leave_behind_the_first_page
    eventually(lambda: reader._live and not reader.orders, TIMEOUT)
    line.command = command
    assert "a" not in reader._topics
    side.watch("a")
    put(side, "last")
    eventually(lambda: data(side)[-1] == "last", TIMEOUT)


def test_a_gap_is_told_also_by_a_full_server(
        server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    side = opened(server, history_events=20)
    first = put(side, "first")
    side.heard(1)
    with away(side, server):
        publisher.publish_batch(texts(*range(30)))
        client.config_set("maxmemory", "1mb")
    eventually(side.broker.head, TIMEOUT)
    assert [since for since, _ in side.gaps] == [first]
    assert len(side.events) == 21


def test_after_a_lost_end_of_the_log_one_gap_is_told_and_no_second(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    first, last = put(side, "first"), put(side, "in the end that is lost")
    side.heard(2)
    client.xdel("pushsvc:t:a", f"{last.seq}-0")
    client.zadd("pushsvc:last", {"a": first.seq})
    client.hset("pushsvc:log", mapping={"seq": first.seq, "run": "another"})
    connect_anew(side, server)
    eventually(lambda: side.gaps, TIMEOUT)
    eventually(lambda: put(side, "next"), TIMEOUT)
    side.heard(3)
    side.broker.head()
    assert [since for since, _ in side.gaps] == [last]
    assert data(side)[2:] == ["next"]


def test_an_event_of_many_topics_that_is_trimmed_before_it_is_fetched_is_told(
        server: Redis, opened: Open, publisher: Publisher) -> None:
    side = opened(server, history_events=3)
    put(side, "0")
    side.heard(1)

    def trim() -> None:
        for topics in (WIDE[:20], WIDE[20:]):
            publisher.publish_batch([{"topics": list(topics), "data": "newer"} for _ in range(4)])

    before_the_next(reader_of(side), "_fetch", trim)
    trimmed, = side.broker.append([Draft(WIDE, "trimmed", keep="latest", key="k")])
    eventually(lambda: side.gaps, TIMEOUT)
    (since, upto), = side.gaps
    assert since.seq < trimmed.seq < upto.seq
    assert "trimmed" not in data(side)


def test_a_passing_event_of_many_topics_that_is_gone_before_it_is_fetched_is_no_loss(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    put(side, "first")
    side.heard(1)
    before_the_next(reader_of(side), "_fetch", lambda: client.delete(*client.keys("pushsvc:e:*")))
    side.broker.append([Draft(WIDE, "gone", keep="none")])
    put(side, "next")
    side.heard(2)
    assert data(side) == ["first", "next"]
    assert not side.gaps


def test_a_loss_is_told_also_when_it_is_forgotten_of_which_topic(
        server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    """A topic that nobody publishes to leaves, and of very many marks of loss the oldest become one."""
    side = opened(server)
    first = put(side, "first")
    side.heard(1)
    with away(side, server):
        lost = seq_of(publisher.publish("a", "lost"))
        client.delete("pushsvc:t:a")
        client.zrem("pushsvc:last", "a")
        client.hset("pushsvc:log", "floor", lost)
        publisher.publish("other", "next")
    eventually(lambda: reader_of(side)._live, TIMEOUT)
    assert data(side) == ["first"]
    assert [since for since, _ in side.gaps] == [first]


# --- what a server has lost or refuses


@pytest.mark.parametrize("first", ["a publisher", "another worker"])
def test_who_knows_of_no_log_and_comes_first_to_an_emptied_server_begins_one_that_goes_on(
        first: str, server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    side = opened(server, history_events=100, history_seconds=3600)
    old = put(side, "old")
    side.heard(1)
    client.flushall()
    if first == "a publisher":
        new = publisher.publish("a", "new")
        assert client.hmget("pushsvc:log", "events", "age") == [None, None], "it has no say in retention"
    else:
        new = str(put(opened(server, history_events=100, history_seconds=3600), "new"))
    eventually(lambda: data(side) == ["old", "new"], TIMEOUT)
    (since, goes_on), = side.gaps
    assert since == old
    assert old.seq < goes_on.seq < seq_of(new)
    assert len(side.resets) == 2, "nothing else is told"
    assert side.broker.precedes(old.epoch)
    assert client.hmget("pushsvc:log", "events", "age") == ["100", "3600000"]


def test_what_was_in_a_log_that_is_lost_during_a_repair_is_within_the_gap(
        server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    side = opened(server)
    first = put(side, "first")
    side.heard(1)
    with away(side, server):
        publisher.publish_batch(texts(1, 2, 3))
        is_lost = before_the_next(line_of(side), "command", client.flushall)
    eventually(lambda: is_lost.is_set() and put(side, "new"), TIMEOUT)
    eventually(lambda: data(side) == ["first", "new"], TIMEOUT)
    assert [since for since, _ in side.gaps] == [first]


def test_an_event_that_is_lost_with_its_log_before_it_is_fetched_is_within_the_gap(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    first = put(side, "first")
    side.heard(1)
    is_lost = before_the_next(reader_of(side), "_fetch", client.flushall)
    lost, = side.broker.append([Draft(WIDE, "lost", keep="latest", key="k")])
    eventually(lambda: is_lost.is_set() and put(side, "new"), TIMEOUT)
    eventually(lambda: data(side) == ["first", "new"], TIMEOUT)
    (since, _), = side.gaps
    assert first.seq <= since.seq < lost.seq


def test_a_log_of_which_nobody_has_told_the_retention_has_that_of_the_defaults(
        server: Redis, publisher: Publisher, client: Any) -> None:
    for start in (0, 6000):
        publisher.publish_batch(texts(*range(start, start + 6000)))
    assert client.xlen("pushsvc:t:a") == 10_000
    publisher.publish("a", "x", idempotency_key="key")
    assert 86_000 < client.ttl("pushsvc:i:\nkey") <= 86_400


def test_a_sequence_that_has_gone_back_in_one_life_of_a_server_begins_a_new_epoch(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    first, _, last = (put(side, text) for text in "123")
    side.heard(3)
    client.hset("pushsvc:log", "seq", first.seq)
    connect_anew(side, server)
    new = eventually(lambda: put(side, "new"), TIMEOUT)
    assert new.epoch > first.epoch
    assert new.seq > last.seq
    eventually(lambda: data(side)[3:] == ["new"], TIMEOUT)
    assert [since for since, _ in side.gaps] == [last]
    assert side.broker.precedes(first.epoch)


def test_a_full_server_that_was_restarted_is_read_and_listened_to(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server)
    before = put(side, "before")
    side.heard(1)
    client.hset("pushsvc:log", "run", "another")
    client.config_set("maxmemory", "1mb")
    connect_anew(side, server)
    head = eventually(side.broker.head, TIMEOUT)
    assert head.epoch > before.epoch
    assert [event.data for event in side.history("a")] == ["before"]
    assert [since for since, _ in side.gaps] == [before]
    with pytest.raises(BrokerUnavailable, match="maxmemory"):
        put(side, "refused")
    client.config_set("maxmemory", "0")
    put(side, "after")
    eventually(lambda: data(side) == ["before", "after"], TIMEOUT)


def test_an_epoch_that_only_another_knew_and_told_later_precedes_too(server: Redis, opened: Open) -> None:
    side = opened(server)
    lost = new_epoch(int(side.broker.head().epoch, 16) - 1)
    assert not side.broker.precedes(lost)
    with contextlib.closing(Link(parse_address(server.url), "pushsvc:", TIMEOUT)) as link:
        link.open(lost, 1)
    assert side.broker.precedes(lost)


def test_an_epoch_that_another_has_begun_can_be_joined_where_nothing_can_be_written(
        server: Redis, opened: Open, publisher: Publisher, client: Any) -> None:
    side = opened(server)
    before = put(side, "before")
    side.heard(1)
    with away(side, server):
        line_of(side).leave()
        client.hset("pushsvc:log", "run", "another")
        publisher.publish("a", "after")
        client.config_set("min-replicas-to-write", 1)
    eventually(lambda: data(side) == ["before", "after"], TIMEOUT)
    assert [since for since, _ in side.gaps] == [before]
    assert side.broker.precedes(before.epoch)
    assert [event.data for event in side.history("a", after=before.seq)] == ["after"]


def test_a_shorter_age_of_history_holds_at_once(server: Redis, opened: Open) -> None:
    side = opened(server, history_seconds=1000)
    put(side, "old")
    gevent.sleep(1.1)
    put(side, "newer")
    assert len(side.history("a")) == 2
    shorter = opened(server, history_seconds=1)
    assert "old" not in [event.data for event in shorter.history("a")]


def test_a_longer_age_of_history_leaves_a_full_server_readable(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server, history_seconds=10)
    put(side, "old")
    gevent.sleep(0.2)
    put(side, "newer")
    longer = opened(server, history_seconds=1000)
    client.hset("pushsvc:log", "due", 1)  # as if the shorter age had passed for the first
    client.config_set("maxmemory", "1mb")
    assert [event.data for event in longer.history("a")] == ["old", "newer"]


def test_an_answer_that_nobody_has_waited_for_is_not_taken_for_the_next(
        server: Redis, publisher: Publisher, client: Any) -> None:
    publisher.publish("a", "0")
    server.freeze()
    try:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
            publisher.publish("a", "1")
        publishing = gevent.spawn(publisher.publish, "a", "2")
        gevent.sleep(0.1)
    finally:
        server.thaw()
    seq = seq_of(publishing.get(timeout=TIMEOUT))
    (_, entry), = client.xrange("pushsvc:t:a", f"{seq}-0", f"{seq}-0")
    assert entry["b"].endswith("\n2")


def test_while_a_server_loads_its_file_it_is_known_that_nothing_was_published(tmp_path: Path, opened: Open) -> None:
    args = ["--enable-debug-command", "yes", "--loading-process-events-interval-bytes", "1024"]
    with (Redis(tmp_path / "redis", args=args) as server, contextlib.closing(server.client()) as client,
          Publisher(server.url) as publisher):
        side = opened(server)
        put(side, "1")
        publisher.publish("a", "2")
        client.mset({f"other:{number}": "x" * 1000 for number in range(1000)})
        client.config_set("key-load-delay", 5000)  # us for each key
        loading = gevent.spawn(client.execute_command, "DEBUG", "RELOAD")
        with contextlib.closing(server.client()) as other:
            eventually(lambda: other.info("persistence")["loading"], interval=0.001)
            for publish in (lambda: put(side, "refused"), lambda: publisher.publish("a", "refused")):
                with pytest.raises(BrokerUnavailable, match="loading") as caught:
                    publish()
                assert "not known" not in str(caught.value)
            assert other.info("persistence")["loading"]
            other.config_set("key-load-delay", 0)
        loading.get(timeout=TIMEOUT)
        eventually(lambda: put(side, "3"), TIMEOUT)
        publisher.publish("a", "4")
        assert [event.data for event in side.history("a")] == ["1", "2", "3", "4"]


# --- what it costs is bound


def test_only_topics_that_are_due_to_be_left_are_looked_at(server: Redis, opened: Open) -> None:
    looked_at = []

    class Watched(OrderedDict[str, float]):
        def items(self) -> Any:
            for item in super().items():
                looked_at.append(item)
                yield item

    side = opened(server)
    reader = reader_of(side)
    reader._idle = Watched()
    idle = [f"t{number}" for number in range(100)]
    side.watch(*idle)
    side.broker.unwatch(idle)
    reader._drop_idle()
    assert len(looked_at) == 1


def test_a_topic_that_is_left_again_is_left_later(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server)
    reader = reader_of(side)
    side.broker.unwatch(["a", "b"])
    side.broker.unwatch(["a"])
    assert list(reader._idle) == ["b", "a"]


def test_a_repair_asks_for_each_page_only_topics_that_have_more(
        server: Redis, opened: Open, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 10)
    side = opened(server)
    few = [f"few{number}" for number in range(20)]
    side.watch(*few)
    line, asked = line_of(side), []
    ask = line.ask

    def ask_and_note(script: str, *arguments: Any, **options: Any) -> Any:
        if script == "history":
            asked.append(arguments[4:])
        return ask(script, *arguments, **options)

    with away(side, server):
        publisher.publish_batch([{"topic": topic, "data": topic} for topic in few] + texts(*range(50)))
        line.ask = ask_and_note
    side.heard(70)
    assert data(side) == [*few, *map(str, range(50))]
    assert len(asked) >= 7
    assert set(asked[3:]) == {("a",)}


def test_a_join_reads_the_confirmations_of_some_topics_before_it_asks_for_more(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "MOST_TOGETHER", 10)
    side = opened(server)
    topics = [f"t{number}" for number in range(100)]
    side.watch(*topics)
    link, unread, most = reader_of(side)._link, [0], [0]
    send, receive = link.send, link.receive

    def send_and_count(commands: Sequence[Sequence[Any]]) -> None:
        unread[0] += sum(len(command) - 1 for command in commands if command[0] == "SUBSCRIBE")
        most[0] = max(most[0], unread[0])
        send(commands)

    def receive_and_count(seconds: float) -> Any:
        item = receive(seconds)
        unread[0] -= item is not None and item[0] == b"subscribe"
        return item

    with away(side, server):
        link.send, link.receive = send_and_count, receive_and_count
    eventually(lambda: reader_of(side)._live, TIMEOUT)
    assert 0 < most[0] <= 10
    for topic in (topics[0], topics[-1]):
        put(side, topic, topic)
    assert [event.data for event in side.heard(2)] == [topics[0], topics[-1]]


def test_few_pages_of_history_are_asked_for_at_a_time_and_publishes_go_before_them(
        server: Redis, opened: Open) -> None:
    side = opened(server)
    put(side, "0")
    line, asked = line_of(side), []
    exchange, names = line.link.exchange, {digest: name for name, digest in line.link._scripts.digests.items()}

    def exchange_and_note(commands: Sequence[Sequence[Any]]) -> Any:
        asked.append([names.get(command[1], command[0]) for command in commands])
        return exchange(commands)

    line.link.exchange = exchange_and_note
    reading = [gevent.spawn(side.history, "a") for _ in range(20)]
    writing = [gevent.spawn(put, side, "1") for _ in range(5)]
    gevent.joinall(reading + writing, timeout=TIMEOUT, raise_error=True)
    assert asked == [["publish"] * 5, ["history"] * 8, ["history"] * 8, ["history"] * 4]


def test_a_wait_for_replicas_keeps_no_stream_from_opening(server: Redis, opened: Open) -> None:
    side = opened(server, redis_replicas=1, publish_timeout_seconds=5)
    side.broker.head()
    putting = gevent.spawn(put, side, "nobody else has it")
    event, = eventually(lambda: side.history("a"))
    assert side.broker.head().seq == event.seq
    assert not putting.ready()
    with pytest.raises(BrokerUnavailable, match="0 of 1 replicas"):
        putting.get(timeout=TIMEOUT)


# --- what others publish


def test_repair_asks_for_no_names_of_others_and_hands_over_a_page_at_a_time(
        server: Redis, opened: Open, client: Any, publisher: Publisher) -> None:
    """Redis has the newest sequence of all topics of all workers: a break must not bring them to each."""
    many = [f"own-{number}" for number in range(2000)]
    side, sizes = opened(server), list[int]()
    side.broker.watch(many)
    put(side, "first")
    side.heard(1)
    reader = reader_of(side)
    deliver = reader._deliver
    with away(side, server):
        publisher.publish_batch({"topic": topic, "data": "x" * 2000} for topic in many[:500])
        for start in range(0, 40_000, 10_000):
            publisher.publish_batch({"topic": f"{'others' * 30}-{start + number}", "data": "x", "keep": "none"}
                                    for number in range(10_000))
        for start in range(500, 2000, 500):
            publisher.publish_batch({"topic": topic, "data": "x" * 2000} for topic in many[start : start + 500])
        reader._deliver = lambda events: (sizes.append(sum(len(event.data) for event in events)), deliver(events))
        before = client.info("stats")["total_net_output_bytes"]
    eventually(lambda: reader._live and reader.last == side.broker.head().seq, TIMEOUT)
    sent = client.info("stats")["total_net_output_bytes"] - before
    assert sum(sizes) == 2000 * 2000
    assert max(sizes) <= redis_reader.PAGE_BYTES + 2000
    assert sent < 2 * sum(sizes) + 1_000_000, "a page may be read twice; the names of the others have 7.6 MB"


# --- retention


def test_new_topics_leave_as_fast_as_they_come(server: Redis, opened: Open, client: Any, publisher: Publisher) -> None:
    opened(server, history_seconds=1)
    most = 0
    for number in range(4):
        publisher.publish_batch({"topic": f"{number}-{topic}", "data": "x"} for topic in range(500))
        most = max(most, client.zcard("pushsvc:last"))
        gevent.sleep(1.1)
    publisher.publish_batch({"topic": f"last-{topic}", "data": "x"} for topic in range(500))
    assert client.zcard("pushsvc:last") <= 1000
    assert most <= 1000
    assert sum(1 for _ in client.scan_iter("pushsvc:t:*")) == client.zcard("pushsvc:last")


def test_one_script_takes_away_so_much_and_the_next_ones_the_rest(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server, history_seconds=3)
    for _ in range(3):
        side.broker.append([Draft((topic,), "x") for topic in "abcd" for _ in range(2000)])
    gevent.sleep(3.1)
    assert not side.history("a", "b", "c", "d"), "what is too old is in no page"
    left = sum(client.xlen(f"pushsvc:t:{topic}") for topic in "abcd")
    assert 3000 <= left <= 5000, "20,000 of 24,000 have left"
    for topic in "abcd":
        assert side.missing(topic)
    assert not side.history("a", "b", "c", "d")
    assert not sum(client.xlen(f"pushsvc:t:{topic}") for topic in "abcd")


def test_one_script_takes_away_so_much_of_what_are_too_many_and_the_next_ones_the_rest(
        server: Redis, opened: Open, client: Any) -> None:
    side = opened(server, history_events=10_000)
    for start in range(0, 6000, 2000):
        side.broker.append([Draft((topic,), str(start + number)) for topic in "abcd" for number in range(2000)])
    fewer = opened(server, history_events=10)

    def lengths() -> list[int]:
        return [client.xlen(f"pushsvc:t:{topic}") for topic in "abcd"]

    fewer.broker.append([Draft((topic,), "6000") for topic in "abcd"])
    assert 3900 <= sum(lengths()) <= 4100, "20,000 of 24,000 have left"
    for topic, length in zip("abcd", lengths(), strict=True):
        held = fewer.history(topic)
        assert [event.data for event in held] == [str(number) for number in range(6001 - length, 6001)]
        assert fewer.missing(topic) < held[0].seq, "a page begins behind what it tells as missing"
        assert not fewer.missing(topic, after=held[0].seq)
    assert fewer.missing("a")
    fewer.broker.append([Draft((topic,), "6001") for topic in "abcd"])
    assert lengths() == [10] * 4


def test_clock_that_goes_back_keeps_nothing_beyond_its_age(server: Redis, opened: Open, client: Any) -> None:
    side = opened(server, history_seconds=1)
    first = put(side, "of the hour that was ahead")
    ahead = int(client.time()[0]) * 1000 + 3_600_000
    client.hset("pushsvc:log", mapping={"at": ahead, "check": ahead, "due": ahead})
    client.rpush("pushsvc:ages", f"{first.seq} {ahead}")

    def is_rid_of_it() -> bool:
        put(side, "x")
        return "of the hour that was ahead" not in [event.data for event in side.history("a")]

    eventually(is_rid_of_it, TIMEOUT, interval=0.2)


def test_who_connects_again_does_not_set_the_retention_back(server: Redis, opened: Open, client: Any) -> None:
    older = opened(server, history_events=500)
    assert client.hget("pushsvc:log", "events") == "500"
    opened(server, history_events=100)
    eventually(lambda: client.hget("pushsvc:log", "events") == "100")
    connect_anew(older, server)
    eventually(lambda: put(older, "x"))
    eventually(lambda: reader_of(older)._live)
    assert client.hget("pushsvc:log", "events") == "100"
    client.flushall()
    connect_anew(older, server)
    eventually(lambda: put(older, "x"), TIMEOUT)
    assert client.hget("pushsvc:log", "events") in ("500", "100"), "a log that has none is given one"


# --- a master that was not one for a while


def test_master_that_followed_another_for_a_while_begins_an_epoch(tmp_path: Path, server: Redis, opened: Open) -> None:
    """Its run id is the same, but what it had taken last may be gone: the number after it would be given twice."""
    with Redis(tmp_path / "other") as other, contextlib.closing(server.client()) as here, \
            contextlib.closing(other.client()) as there:
        side = opened(server)
        put(side, "kept")
        follow(there, server)
        there.replicaof("NO", "ONE")
        lost = put(side, "lost")
        follow(here, other)
        here.replicaof("NO", "ONE")
        with Publisher(server.url) as publisher:
            new = publisher.publish("a", "new")
        assert new.partition("-")[0] > lost.epoch
        assert seq_of(new) > lost.seq
        eventually(lambda: "new" in data(side), TIMEOUT)
        assert [since.seq for since, _ in side.gaps] == [lost.seq]


def test_message_with_a_number_that_was_given_before_is_seen(tmp_path: Path, server: Redis, opened: Open) -> None:
    """The same, and the connections of the one that publishes stay."""
    with Redis(tmp_path / "other") as other, contextlib.closing(server.client()) as here, \
            contextlib.closing(other.client()) as there:
        side = opened(server)
        put(side, "kept")
        follow(there, server)
        there.replicaof("NO", "ONE")
        side.heard(1)
        lost = put(side, "lost")
        side.heard(2)
        follow(here, other)
        here.replicaof("NO", "ONE")
        eventually(lambda: put(side, "given twice"), TIMEOUT)
        eventually(lambda: side.gaps, TIMEOUT)
        assert side.gaps[0][0].seq == lost.seq
        put(side, "end")
        eventually(lambda: data(side)[-1] == "end", TIMEOUT)


def follow(client: Any, master: Redis) -> None:
    client.config_set("repl-diskless-sync-delay", 0)
    with contextlib.closing(master.client()) as its:
        its.config_set("repl-diskless-sync-delay", 0)
    client.replicaof(master.host, master.port)
    eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
