"""The Redis broker beyond the contract: several processes on one log, interest, breaks, and what is lost is told."""

import contextlib
import enum
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal
from redis.connection import Connection, SSLConnection
from redis.exceptions import ResponseError

from pushsvc.brokers import redis_address, redis_reader
from pushsvc.brokers.redis_address import parse_address, parse_url
from pushsvc.brokers.redis_link import Link
from pushsvc.draft import draft_of
from pushsvc.errors import BadRequest, BrokerUnavailable, SettingsError
from pushsvc.event import Draft
from pushsvc.position import Position
from pushsvc.publisher import Publisher
from pushsvc.settings import Settings, hide
from tests.support.brokers import Open, Side, data, put
from tests.support.client import Stream, publish, request
from tests.support.fire import epoch_of, seq_of
from tests.support.redis import Redis
from tests.support.server import ROOT, Server
from tests.support.wait import eventually

pytest_plugins = ["tests.support.sides"]
TIMEOUT = 30


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path / "redis", durable=True) as server:
        yield server


def put_until_it_goes(side: Side, text: str) -> Position:
    """As a client does that is told to come back."""
    return eventually(lambda: put(side, text), TIMEOUT)


def subscribers(server: Redis, topic: str) -> int:
    with contextlib.closing(server.client()) as client:
        return int(client.execute_command("PUBSUB", "NUMSUB", f"pushsvc:0:{topic}")[1])


# --- several processes


def test_two_processes_hear_each_other_in_one_order(server: Redis, opened: Open) -> None:
    one, two = opened(server), opened(server)
    jobs = [gevent.spawn(put, side, f"{number}", topic) for number in range(100)
            for side, topic in ((one, "a"), (two, "b"))]
    positions = sorted(job.get() for job in jobs)
    assert [event.seq for event in one.heard(200)] == [position.seq for position in positions]
    assert two.heard(200) == one.events
    assert one.resets == two.resets[:1]


def test_a_key_is_answered_by_every_process(server: Redis, opened: Open, publisher: Publisher) -> None:
    one = opened(server)
    first = publisher.publish("a", "1", idempotency_key="key")
    assert one.broker.append([Draft(("a",), "2")], "\nkey") == [Position(epoch_of(first), seq_of(first))]
    assert len(one.heard(1)) == 1


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("count", [2, 32, 33, 1000])
def test_an_event_of_many_topics_comes_once_with_all_of_them(server: Redis, opened: Open, count: int, keep: str) -> None:
    side, other = opened(server), opened(server)
    topics = tuple(f"t{number}" for number in range(count))
    side.watch(*topics)
    other.watch(topics[-1])
    position, = side.broker.append([Draft(topics, "all", keep=keep)])
    put(side, "next")
    for each in (side, other):
        event, _ = each.heard(2)
        assert (event.seq, event.topics, event.data, event.keep) == (position.seq, topics, "all", keep)
        assert data(each) == ["all", "next"]


# --- interest


def test_only_what_is_watched_is_listened_to(server: Redis, opened: Open) -> None:
    one, two = opened(server), opened(server)
    two.watch("private")
    put(one, "1", "private")
    put(one, "2")
    assert [event.data for event in two.heard(2)] == ["1", "2"]
    assert [event.data for event in one.heard(1)] == ["2"]
    assert subscribers(server, "private") == 1


def test_what_nobody_watches_any_more_is_left_after_a_delay(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.5)
    side = opened(server)
    side.watch("x", "y")
    assert subscribers(server, "x") == subscribers(server, "y") == 1
    side.broker.unwatch(["x", "y"])
    side.watch("y")
    assert subscribers(server, "x") == 1, "clients come back"
    eventually(lambda: subscribers(server, "x") == 0)
    gevent.sleep(1.2)
    assert subscribers(server, "y") == 1


def test_a_topic_that_is_left_and_watched_again_is_heard(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.0)
    side = opened(server)
    for number in range(100):
        side.watch("x")
        put(side, str(number), "x")
        eventually(lambda: len(side.events) > number, interval=0.001)  # noqa: B023
        side.broker.unwatch(["x"])
        if number % 10 == 0:
            gevent.sleep(0.01)
    assert data(side) == [str(number) for number in range(100)]


def test_a_hundred_thousand_topics_are_watched_and_left(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server)
    topics = [f"user-{number}" for number in range(100_000)]
    side.broker.watch(topics)
    eventually(side.broker.head, TIMEOUT)
    put(side, "1", "user-0")
    put(side, "2", "user-99999")
    assert [event.data for event in side.heard(2)] == ["1", "2"]
    monkeypatch.setattr(redis_reader, "UNWATCH_SECONDS", 0.0)
    side.broker.unwatch(topics)
    with contextlib.closing(server.client()) as client:
        eventually(lambda: len(client.execute_command("PUBSUB", "CHANNELS", "*user-*")) == 0, TIMEOUT)
    put(side, "3")
    assert [event.data for event in side.heard(3)][-1] == "3"


# --- breaks


def test_after_a_broken_connection_nothing_is_missing_or_doubled(server: Redis, opened: Open) -> None:
    one, two = opened(server), opened(server)
    for number in range(300):
        put(one, str(number), "abc"[number % 3])
        if number % 50 == 25:
            server.break_listeners()
    for side in (one, two):
        side.heard(300, TIMEOUT)
        assert data(side) == [str(number) for number in range(300)]
        assert len(side.resets) == 1, "nobody needs to know"


def test_a_break_while_the_history_goes_is_told(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened(server, history_events=5)
    first = put(side, "first")
    side.heard(1)
    reader: Any = side.broker._reader  # type: ignore[attr-defined]
    join, may_join = reader._join, Signal()
    monkeypatch.setattr(reader, "_join", lambda: may_join.wait() and join())
    server.break_listeners()
    eventually(lambda: not reader._live)
    with Publisher(server.url) as publisher:
        for number in range(20):
            publisher.publish("a", str(number))
    may_join.set()
    eventually(lambda: side.gaps, TIMEOUT)
    put(side, "last")
    eventually(lambda: "last" in data(side), TIMEOUT)
    assert side.gaps == [(first, first._replace(seq=first.seq + 15))]
    assert data(side) == ["first", *map(str, range(15, 20)), "last"]
    assert side.calls[2] == first._replace(seq=first.seq + 1), "the gap goes before what is behind it"


def test_a_message_that_did_not_arrive_is_noticed_by_the_next(server: Redis, opened: Open) -> None:
    side = opened(server)
    first = put(side, "first")
    side.heard(1)
    with Publisher(server.url) as publisher:
        publisher.publish("other", "opens the connection")
        publisher._link.channels = "nobody:"
        publisher.publish("a", "lost")
    put(side, "next")
    eventually(lambda: side.gaps and "next" in data(side), TIMEOUT)
    assert side.gaps[0][0] == first
    assert data(side) == ["first", "lost", "next"]


def test_a_connection_that_falls_silent_is_given_up(
        server: Redis, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "ECHO_SECONDS", 0.2)
    side = opened(server, publish_timeout_seconds=0.5)
    put(side, "1")
    side.heard(1)
    server.freeze()
    try:
        with pytest.raises(BrokerUnavailable, match="not known"):
            put(side, "2")
        eventually(lambda: not side.broker._reader._live)  # type: ignore[attr-defined]
        with pytest.raises(BrokerUnavailable):
            side.broker.check()
    finally:
        server.thaw()
    put_until_it_goes(side, "3")
    eventually(lambda: data(side)[-1] == "3", TIMEOUT)
    assert data(side) in (["1", "2", "3"], ["1", "3"])
    assert len(side.resets) == 1


# --- the end of a server


@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "without its data"])
def test_after_a_restart_the_log_goes_on_in_a_new_epoch_and_the_gap_is_told(
        tmp_path: Path, opened: Open, keeps: bool) -> None:
    with Redis(tmp_path / "redis", durable=keeps) as server:
        one, two = opened(server), opened(server)
        old = put(one, "old")
        two.heard(1)
        server.kill()
        with pytest.raises(BrokerUnavailable):
            put(one, "refused")
        server.start()
        new = put_until_it_goes(one, "new")
        for side in (one, two):
            eventually(lambda: data(side) == ["old", "new"], TIMEOUT)  # noqa: B023
            (since, goes_on), = side.gaps
            assert since == old
            assert goes_on.epoch == new.epoch > old.epoch
            assert old.seq < goes_on.seq
            assert side.broker.precedes(old.epoch)
            assert [event.data for event in side.history("a")] == (["old", "new"] if keeps else ["new"])
            assert [event.data for event in side.history("a", after=old.seq)] == ["new"]


def test_a_server_that_was_emptied_is_a_new_log_that_goes_on(server: Redis, opened: Open) -> None:
    one, two = opened(server), opened(server)
    old = put(one, "old")
    two.heard(1)
    with contextlib.closing(server.client()) as client:
        client.flushall()
    new = put_until_it_goes(one, "new")
    assert new.epoch > old.epoch
    assert new.seq > old.seq
    put(one, "newer")
    for side in (one, two):
        eventually(lambda: data(side)[-1] == "newer", TIMEOUT)  # noqa: B023
        assert side.gaps


def test_a_newer_epoch_of_another_server_is_followed(tmp_path: Path, opened: Open) -> None:
    """A failover by hand: the replica becomes master, and the old master its replica, with a lost tail."""
    with Redis(tmp_path / "one") as master, Redis(tmp_path / "two") as replica:
        with contextlib.closing(replica.client()) as client:
            client.replicaof(master.host, master.port)
            eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
        side = opened(master)
        kept = put(side, "kept")
        with contextlib.closing(replica.client()) as client:
            eventually(lambda: client.hget("pushsvc:log", "seq") == str(kept.seq))
            client.replicaof("NO", "ONE")
        lost, = side.broker.append([Draft(("a",), "lost")], "\nkey")
        side.heard(2)
        master.kill()
        follow = ["--replicaof", replica.host, str(replica.port)]
        with Redis(tmp_path / "three", port=master.port, args=follow) as successor:
            with contextlib.closing(successor.client()) as client:
                eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
                with pytest.raises(BrokerUnavailable):
                    put(side, "refused")
                client.replicaof("NO", "ONE")
            new = put_until_it_goes(side, "new")
            eventually(lambda: data(side) == ["kept", "lost", "new"], TIMEOUT)
            assert new.seq > lost.seq
            assert side.gaps[0][0] == lost
            assert side.broker.precedes(kept.epoch)
            assert [event.data for event in side.history("a")] == ["kept", "new"]
            again, = side.broker.append([Draft(("a",), "lost")], "\nkey")
            assert again > new
            assert [event.data for event in side.history("a")] == ["kept", "new", "lost"], "its key was lost with it"
            assert [event.seq for event in side.heard(4)] == [kept.seq, lost.seq, new.seq, again.seq]


# --- a server that refuses


def test_a_full_server_refuses_and_goes_on_when_it_has_room(server: Redis, opened: Open) -> None:
    side = opened(server)
    put(side, "before")
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory", "1mb")
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            side.broker.append([Draft(("a", "b"), "refused"), Draft(("a",), "refused")], "key")
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            side.broker.check()
        assert [event.data for event in side.history("a", "b")] == ["before"], "reading goes on"
        client.config_set("maxmemory", "0")
    side.broker.check()
    side.broker.append([Draft(("a",), "after")], "key")
    side.heard(2)
    assert data(side) == ["before", "after"]


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_would_evict_keys_is_refused_until_it_does_not(
        policy: str, server: Redis, opened: Open, publisher: Publisher) -> None:
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory-policy", policy)
        publisher.publish("a", "without a maxmemory nothing is evicted")
        side = opened(server)
        client.config_set("maxmemory", "100mb")
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
        words = f"maxmemory-policy has to be noeviction, not {policy}"
        eventually(lambda: words in refusal(side.broker.check), TIMEOUT)
        eventually(lambda: words in refusal(lambda: publisher.publish("a", "refused")), TIMEOUT)
        client.config_set("maxmemory-policy", "noeviction")
        put_until_it_goes(side, "after")
        eventually(lambda: not refusal(side.broker.check), TIMEOUT)
        assert [event.data for event in side.history("a")][1:] == ["after"]
    assert len(side.resets) == 1, "no gap: nothing was lost"


def refusal(attempt: Callable[[], Any]) -> str:
    """What it is refused with; empty if it is not."""
    try:
        attempt()
    except BrokerUnavailable as error:
        return error.detail
    return ""


def test_a_process_that_starts_at_a_full_server_reads_and_listens(server: Redis, opened: Open) -> None:
    first = put(opened(server), "before")
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory", "1mb")
        late = opened(server)
        assert late.broker.head() == first
        assert [event.data for event in late.history("a")] == ["before"]
        client.config_set("maxmemory", "0")
    put(late, "after")
    assert [event.data for event in late.heard(1)] == ["after"]


def test_a_read_only_server_refuses_and_goes_on_when_it_is_master_again(server: Redis, opened: Open) -> None:
    side = opened(server)
    put(side, "before")
    with contextlib.closing(server.client()) as client:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(BrokerUnavailable, match=r"read only|not a master"):
            put(side, "refused")
        with pytest.raises(BrokerUnavailable):
            side.broker.check()
        client.replicaof("NO", "ONE")
    put_until_it_goes(side, "after")
    eventually(lambda: data(side) == ["before", "after"], TIMEOUT)


def test_an_event_that_too_few_replicas_have_is_not_acknowledged(server: Redis, opened: Open) -> None:
    side = opened(server, redis_replicas=1, publish_timeout_seconds=1)
    with pytest.raises(BrokerUnavailable, match="0 of 1 replicas"):
        put(side, "alone")
    with Redis(server.directory / "replica") as replica, contextlib.closing(replica.client()) as client:
        client.replicaof(server.host, server.port)
        eventually(lambda: client.info("replication")["master_link_status"] == "up", TIMEOUT)
        position = put_until_it_goes(side, "both")
        assert client.hget("pushsvc:log", "seq") == str(position.seq)


def test_a_server_that_is_not_there_is_unavailable_and_then_used(tmp_path: Path, opened: Open) -> None:
    server = Redis(tmp_path / "redis")
    side = opened(server)
    with pytest.raises(BrokerUnavailable, match="refused"):
        put(side, "1")
    with pytest.raises(BrokerUnavailable):
        side.broker.head()
    with server:
        position = put_until_it_goes(side, "2")
        eventually(lambda: side.resets, TIMEOUT)
        last = put(side, "3")
        eventually(lambda: data(side)[-1:] == ["3"], TIMEOUT)
        assert last.seq == position.seq + 1


# --- what is left


def keys(server: Redis) -> set[str]:
    with contextlib.closing(server.client()) as client:
        return {key.removeprefix("pushsvc:").partition(":")[0] for key in client.scan_iter()}


def test_what_is_too_old_leaves_nothing_behind(server: Redis, opened: Open) -> None:
    side = opened(server, history_seconds=1, idempotency_seconds=1)
    for number in range(100):
        keep = ["all", "latest", "none"][number % 3]
        side.broker.append([Draft((f"t{number}", "all"), "x", keep=keep, key="k")], "key")
        put(side, "x", f"u{number}", keep="latest", key="k")
    gevent.sleep(1.1)

    def is_swept() -> bool:
        put(side, "x", "new", keep="none")
        with contextlib.closing(server.client()) as client:
            return keys(server) <= {"log", "ages", "last", "lost"} and int(client.zcard("pushsvc:last")) <= 1

    eventually(is_swept)


def test_an_event_of_several_topics_is_held_until_the_last_of_them_lets_it_go(server: Redis, opened: Open) -> None:
    side = opened(server, history_events=2)
    side.broker.append([Draft(("a", "b"), "both")])
    for _ in range(2):
        put(side, "x")
    assert "e" in keys(server)
    assert [event.data for event in side.history("b")] == ["both"]
    for _ in range(2):
        put(side, "x", "b")
    assert "e" not in keys(server)


def test_prefixes_and_databases_do_not_mix(server: Redis, opened: Open) -> None:
    sides = [opened(server), opened(server, redis_prefix="other:"), Side(server.url.removesuffix("0") + "1")]
    try:
        for number, side in enumerate(sides):
            put(side, str(number))
        for number, side in enumerate(sides):
            side.heard(1)
            gevent.sleep(0.05)
            assert data(side) == [str(number)]
    finally:
        sides[2].broker.close()


# --- the whole service


@pytest.fixture
def service(tmp_path: Path, durable: Redis) -> Iterator[Server]:
    settings = {"PUSHSVC_BROKER_URL": durable.url, "PUSHSVC_HEARTBEAT_SECONDS": "0.5"}
    with Server(tmp_path / "service", workers=2, env=settings) as server:
        yield server


@pytest.mark.parametrize("key", ["key", "\N{LATIN SMALL LETTER E WITH ACUTE}-7"])
def test_a_key_is_the_same_for_http_and_for_the_publisher(key: str, service: Server, durable: Redis) -> None:
    header = {"Idempotency-Key": key.encode().decode("latin-1")}  # http.client sends it so
    first = publish(service.url, topic="a", data="1", headers=header)
    with Publisher(durable.url) as publisher:
        assert publisher.publish("a", "1", idempotency_key=key) == first
        second = publisher.publish("a", "2", idempotency_key=f"{key}2")
    header = {"Idempotency-Key": f"{key}2".encode().decode("latin-1")}
    assert publish(service.url, topic="a", data="2", headers=header) == second


def post(service: Server, text: str, topic: str = "a") -> Any:
    return request("POST", f"{service.url}/publish", json.dumps({"topic": topic, "data": text}),
                   {"Content-Type": "application/json"}, timeout=TIMEOUT)


def test_while_redis_restarts_streams_stay_open_and_are_told_the_gap(service: Server, durable: Redis) -> None:
    with Stream(service.url, "a") as plain, Stream(service.url, "a", envelope=True) as envelope:
        before = post(service, "before").json()["id"]
        assert plain.next(timeout=TIMEOUT).data == "before"
        durable.kill()
        answer = post(service, "refused")
        assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
        assert answer.headers["retry-after"] == "1"
        ready = request("GET", f"{service.url}/readyz", timeout=TIMEOUT)
        assert ready.status == 503
        assert "redis" in ready.json()["detail"]
        beats = len(plain.reader.comments)
        plain.quiet(1.5)
        assert len(plain.reader.comments) > beats, "it is kept alive"
        durable.start()
        after = eventually(lambda: post(service, "after").json()["id"], TIMEOUT)
        gap, event = plain.next(timeout=TIMEOUT), plain.next(timeout=TIMEOUT)
        assert gap.type == "gap"
        assert json.loads(gap.data) == {"from": before, "to": gap.last_event_id, "reason": "epoch"}
        assert (event.data, event.last_event_id) == ("after", after)
        envelope.next(timeout=TIMEOUT)
        assert envelope.next(timeout=TIMEOUT).type == "gap"
    with Stream(service.url, "a", last_event_id=before) as stream:
        gap, event = stream.next(timeout=TIMEOUT), stream.next(timeout=TIMEOUT)
        assert (gap.type, json.loads(gap.data)["reason"]) == ("gap", "epoch")
        assert (event.data, event.last_event_id) == ("after", after)
    with Stream(service.url, "a", last_event_id=gap.last_event_id) as stream:
        assert stream.next(timeout=TIMEOUT).data == "after"


def test_a_worker_that_redis_drops_for_being_slow_misses_nothing(tmp_path: Path, durable: Redis) -> None:
    settings = {"PUSHSVC_BROKER_URL": durable.url, "PUSHSVC_MAILBOX_BYTES": str(64 << 20)}  # no stream is slow here
    with (Server(tmp_path / "service", workers=1, env=settings) as service,
          Stream(service.url, "a") as stream, contextlib.closing(durable.client()) as client,
          Publisher(durable.url) as publisher):
        publisher.publish("a", "first")
        assert stream.next(timeout=TIMEOUT).data == "first"
        client.config_set("client-output-buffer-limit", "pubsub 200kb 0 0")
        worker, = service.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            count = 0
            while client.execute_command("PUBSUB", "NUMSUB", "pushsvc:0:a")[1]:
                publisher.publish("a", f"{count} " + "x" * 10_000)
                count += 1
                assert count < 2000, "Redis keeps the connection"
        finally:
            os.kill(worker, signal.SIGCONT)
        publisher.publish("a", "last")
        seen = [stream.next(timeout=TIMEOUT).data.split(" ")[0] for _ in range(count + 1)]
        assert seen == [*map(str, range(count)), "last"]


def test_streams_are_told_a_gap_before_what_is_behind_it_also_where_nothing_can_be_written(
        tmp_path: Path, server: Redis) -> None:
    settings = {"PUSHSVC_BROKER_URL": server.url, "PUSHSVC_HISTORY_EVENTS": "20"}
    with (Server(tmp_path / "service", workers=1, env=settings) as service, Stream(service.url, "a") as stream,
          contextlib.closing(server.client()) as client, Publisher(server.url) as publisher):
        first = publisher.publish("a", "first")
        assert stream.next(timeout=TIMEOUT).data == "first"
        worker, = service.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            server.break_listeners()
            ids = publisher.publish_batch({"topic": "a", "data": str(number)} for number in range(60))
            client.config_set("min-replicas-to-write", 1)
        finally:
            os.kill(worker, signal.SIGCONT)
        gap, *events = stream.take(21, TIMEOUT)
        assert (gap.type, json.loads(gap.data)) == ("gap", {"from": first, "to": ids[39], "reason": "trimmed"})
        assert [event.data for event in events] == [*map(str, range(40, 60))]
        with Stream(service.url, "a", last_event_id=gap.last_event_id) as again:
            gap, event = again.take(2, TIMEOUT)
            assert (gap.type, event.data) == ("gap", "40")
        with Stream(service.url, "a", last_event_id=event.last_event_id) as again:
            assert again.next(TIMEOUT).data == "41"


def test_where_redis_cannot_write_its_file_streams_open_and_history_is_read(service: Server, durable: Redis) -> None:
    """It refuses even a PING then."""
    with Stream(service.url, "a") as stream, contextlib.closing(durable.client()) as client:
        first, _ = (post(service, text).json()["id"] for text in ("first", "second"))
        assert [event.data for event in stream.take(2, TIMEOUT)] == ["first", "second"]
        in_the_way = durable.directory / "dump.rdb"
        in_the_way.mkdir()
        client.config_set("save", "3600 1")
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(ResponseError, match="MISCONF"):
            client.ping()
        durable.break_listeners()
        answer = post(service, "refused")
        assert answer.status == 503
        assert "MISCONF" in answer.json()["detail"]
        with Stream(service.url, ["a", "new"], last_event_id=first) as again:
            assert again.next(TIMEOUT).data == "second"
            ready = request("GET", f"{service.url}/readyz", timeout=TIMEOUT)
            assert (ready.status, "MISCONF" in ready.json()["detail"]) == (503, True)
            in_the_way.rmdir()
            client.bgsave()
            eventually(lambda: post(service, "after").status == 200, TIMEOUT)
            assert again.next(TIMEOUT).data == stream.next(TIMEOUT).data == "after"


def connections(client: Any) -> dict[str, list[bool]]:
    """Of each worker, by the name of its connections: for each of them whether it listens."""
    found: dict[str, list[bool]] = {}
    for each in client.client_list():
        if each["name"]:
            found.setdefault(each["name"], []).append("P" in each["flags"])
    return found


def test_a_worker_has_one_connection_that_listens_and_one_that_asks_for_however_many_streams(
        service: Server, durable: Redis) -> None:
    workers = sorted(f"pushsvc-{pid}" for pid in service.worker_pids())
    with contextlib.ExitStack() as streams, contextlib.closing(durable.client()) as client:
        first = streams.enter_context(Stream(service.url, ["t0", "all"]))
        one = eventually(lambda: sum(map(len, (found := connections(client)).values())) >= 4 and found, TIMEOUT)
        others = [streams.enter_context(Stream(service.url, [f"t{number}", "all"])) for number in range(1, 100)]
        post(service, "to all", "all")
        assert {stream.next(timeout=TIMEOUT).data for stream in (first, *others)} == {"to all"}
        many = connections(client)
        assert sorted(one) == sorted(many) == workers
        assert [len(each) for each in one.values()] == [len(each) for each in many.values()] == [2, 2]
        assert [sum(each) for each in many.values()] == [1, 1]


def test_an_address_that_is_none_stops_the_start(tmp_path: Path) -> None:
    server = Server(tmp_path / "service", workers=1, env={"PUSHSVC_BROKER_URL": "redis+sentinel://host:1"})
    server.start()
    try:
        eventually(lambda: "names no master" in server.log(), TIMEOUT)
        eventually(lambda: not server._runs(), TIMEOUT)
    finally:
        server.stop()


# --- the publisher


def test_the_publisher_publishes_from_a_process_without_gevent(server: Redis, opened: Open) -> None:
    side = opened(server)
    code = f"""
import sys
from pushsvc.publisher import Publisher
with Publisher({server.url!r}) as publisher:
    print(publisher.publish("a", "text"))
    print(publisher.publish(["a", "b"], {{"n": 1}}, event="typed", keep="latest", key="k"))
    print(*publisher.publish_batch([{{"topic": "a", "data": str(n)}} for n in range(3)]))
assert "gevent" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    side.heard(5)
    assert done.stdout.split() == [str(Position(side.resets[0].epoch, event.seq)) for event in side.events]
    assert data(side) == ["text", '{"n":1}', "0", "1", "2"]
    assert side.events[1][2:4] == (("a", "b"), "typed")


def test_the_publisher_does_with_an_older_redis_py(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(Connection):
        """As before 7.2: it has no driver_info."""

        def __init__(self, *, lib_name: str = "redis-py", lib_version: str = "5.0.1", **options: Any) -> None:
            assert "driver_info" not in options
            super().__init__(**options)

    class OlderTls(SSLConnection):
        """As before 6: it asks for no host name."""

        def __init__(self, ssl_check_hostname: bool = False, **options: Any) -> None:
            super().__init__(ssl_check_hostname=ssl_check_hostname, **options)

    monkeypatch.setattr(redis_address, "Connection", Older)
    with Publisher(server.url) as publisher:
        assert publisher.publish("a", "1")
    monkeypatch.setattr(redis_address, "SSLConnection", OlderTls)
    for query, checked in (("", True), ("?ssl_cert_reqs=none", False), ("?ssl_check_hostname=false", False)):
        options = {**parse_url(f"rediss://127.0.0.1/0{query}"), "connection_class": OlderTls}
        assert redis_address.connection_of(options, 1).check_hostname is checked


@pytest.mark.parametrize(("fields", "words"), [
    ({"topic": "", "data": "x"}, "topic is empty"), ({"topic": "a"}, "data is missing"),
    ({"topic": "a", "data": "x", "tpic": "b"}, "nearest is 'topic'"),
    ({"topic": "a", "data": "x", "keep": "no"}, "keep is"),
    ({"topic": "a", "topics": ["b"], "data": "x"}, "either"), ({"topic": "a\n", "data": "x"}, "control character"),
    ({"topic": "a", "data": {1, 2}}, "JSON can carry"), ({"topic": "a", "data": [b"x"]}, "JSON can carry"),
    ({"topic": "a", "data": float("nan")}, "JSON can carry"), ({"topic": "a", "data": "x", "retry": True}, "retry"),
    ({"topic": "a", "data": "x", 5: "x"}, "no field '5'"), ({"topics": {"b": 1}, "data": "x"}, "topics is a list"),
    (5, "event 2: it is no mapping"), ("text", "event 2: it is no mapping")])
def test_the_publisher_refuses_what_the_http_api_refuses_and_changes_nothing(
        publisher: Publisher, server: Redis, fields: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        publisher.publish_batch([{"topic": "a", "data": "good"}, fields])
    assert "t" not in keys(server)


@pytest.mark.parametrize(("topic", "key", "words"), [
    (None, None, "topics is a list of strings"), (5, None, "topics is a list of strings"),
    (b"a", None, "topics is a list of strings"), (["a", None], None, "topics is a list of strings"),
    ("a", 5, "idempotency_key is a string"), ("a", b"key", "idempotency_key is a string")])
def test_the_publisher_refuses_a_topic_and_a_key_that_are_no_text(
        publisher: Publisher, server: Redis, topic: Any, key: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        publisher.publish(topic, "x", idempotency_key=key)
    assert "t" not in keys(server)


@pytest.mark.parametrize("events", [None, 5])
def test_the_publisher_refuses_a_batch_that_is_no_list(publisher: Publisher, events: Any) -> None:
    with pytest.raises(BadRequest, match="events is a list of events"):
        publisher.publish_batch(events)


def test_the_publisher_takes_topics_as_a_list_and_as_a_tuple(publisher: Publisher, server: Redis, opened: Open) -> None:
    side = opened(server)
    for topics in (("a", "b"), ["a", "b"]):
        publisher.publish(topics, "x")
        publisher.publish_batch([{"topics": topics, "data": "x"}])
    assert [event.topics for event in side.heard(4)] == [("a", "b")] * 4


@pytest.mark.parametrize("options", [
    {"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"timeout": "5"},
    {"timeout": None}, {"replicas": -1}, {"replicas": 101}, {"replicas": "1"}, {"replicas": None},
    {"prefix": ""}, {"prefix": "app"}, {"prefix": "a\nb:"}])
def test_a_publisher_is_not_made_with_what_cannot_be_meant(options: dict[str, Any]) -> None:
    name, = options
    with pytest.raises(SettingsError, match=f"(?i){name} (is|has|ends with) "):
        Publisher("redis://127.0.0.1/0", **options)


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.0004, 1), (0.001, 1), (0.01, 5), (10.0, 5000)])
def test_replicas_are_never_waited_for_without_an_end(seconds: float, milliseconds: int) -> None:
    link = Link(parse_address("redis://127.0.0.1/0"), "pushsvc:", seconds)
    assert link.await_replicas(1) == ("WAIT", 1, milliseconds)


@pytest.mark.parametrize(("fields", "count", "words"), [
    ({"topic": "a", "data": ""}, 10_001, "10000 events"),
    ({"topics": [f"t{number}" for number in range(1000)], "data": ""}, 101, "100000 topics together, not 101000"),
    ({"topic": "a", "data": "x" * 600_000}, 2, "1048576 bytes")], ids=["events", "topics", "bytes"])
def test_the_publisher_refuses_too_much_at_once_and_changes_nothing(
        publisher: Publisher, server: Redis, fields: dict[str, Any], count: int, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        publisher.publish_batch([fields] * count)
    assert "t" not in keys(server)


def test_the_publisher_takes_what_is_a_string_of_another_class_for_its_text(
        publisher: Publisher, server: Redis, opened: Open) -> None:
    class Name(enum.StrEnum):
        A = "a"

    class Safe(str):
        __slots__ = ()

        def __str__(self) -> str:
            return self

    side = opened(server)
    publisher.publish(Name.A, Safe("<b>"), event=Name.A, keep=Safe("latest"), key=Name.A)
    publisher.publish([Name.A, Safe("b")], Name.A)
    one, two = side.heard(2)
    assert one[2:7] == (("a",), "a", "<b>", "latest", "a")
    assert (two.topics, two.data) == (("a", "b"), "a")
    draft = draft_of({"topics": [Safe("a")], "data": Safe("x"), "event": Safe("e"), "keep": Safe("all"), "key": Name.A})
    assert {type(text) for text in (*draft.topics, draft.data, draft.event, draft.keep, draft.key)} == {str}


def test_the_publisher_publishes_once_more_where_nothing_was_done(publisher: Publisher, server: Redis) -> None:
    first = publisher.publish("a", "1")
    with contextlib.closing(server.client()) as client:
        client.script_flush()
        second = publisher.publish("a", "2")
        assert seq_of(second) == seq_of(first) + 1
        client.flushall()
        third = publisher.publish("a", "3")
        assert third > second
        assert int(client.xlen("pushsvc:t:a")) == 1
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(BrokerUnavailable, match="not a master"):
            publisher.publish("a", "refused")
        client.replicaof("NO", "ONE")
        assert publisher.publish("a", "4") > third


def test_the_publisher_says_that_the_log_is_away_and_finds_it_again(durable: Redis) -> None:
    with Publisher(durable.url, timeout=5) as publisher:
        first = publisher.publish("a", "1")
        durable.kill()
        with pytest.raises(BrokerUnavailable, match="cannot reach"):
            publisher.publish("a", "2")
        durable.start()
        second = publisher.publish("a", "3", idempotency_key="once")
        assert second > first
        assert publisher.publish("a", "4", idempotency_key="once") == second
    assert publisher.publish_batch([]) == []


def test_a_forked_process_has_a_connection_of_its_own(publisher: Publisher, server: Redis, opened: Open) -> None:
    side = opened(server)
    publisher.publish("a", "parent")
    code = f"""
import os
from pushsvc.publisher import Publisher
publisher = Publisher({server.url!r})
publisher.publish("a", "before")
child = os.fork()
for number in range(50):
    publisher.publish("a", f"{{'parent' if child else 'child'}}")
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    side.heard(102)
    assert (data(side).count("child"), data(side).count("parent")) == (50, 51)


# --- addresses


@pytest.mark.parametrize(("url", "sentinels", "master", "db"), [
    ("redis://127.0.0.1", (), "", 0), ("redis://u:p@host:6380/3", (), "", 3), ("rediss://host/1", (), "", 1),
    ("valkey://host/2", (), "", 2), ("unix:///run/redis.sock?db=4", (), "", 4),
    ("redis+sentinel://a:1,b:2/mymaster", (("a", 1), ("b", 2)), "mymaster", 0),
    ("redis+sentinel://u:p@a,b:2/mymaster/5", (("a", 26379), ("b", 2)), "mymaster", 5),
    ("rediss+sentinel://a/mymaster?sentinel_password=x&ssl_cert_reqs=none", (("a", 26379),), "mymaster", 0),
    ("redis-sentinel://a,b/7#mymaster", (("a", 26379), ("b", 26379)), "mymaster", 7), ("redis://host/", (), "", 0),
    ("redis://host/?db=3", (), "", 3), ("redis://host/1?db=3", (), "", 3),
    ("redis+sentinel://a/mymaster?db=3", (("a", 26379),), "mymaster", 3),
    ("redis+sentinel://a/mymaster/5?db=3", (("a", 26379),), "mymaster", 3)])
def test_addresses(url: str, sentinels: tuple[tuple[str, int], ...], master: str, db: int) -> None:
    address = parse_address(url)
    assert (address.sentinels, address.master, address.db) == (sentinels, master, db)
    assert parse_url(address.url).get("db", 0) == db, "what is named by it is where the connections go"


@pytest.mark.parametrize("url", ["redis:", "redis://", "redis://host:port", "redis+sentinel://host", "http://host",
                                 "redis+sentinel:///mymaster", "redis+sentinel://a/m/x", "redis://host/prod",
                                 "redis://host/1/2", "redis://host/-1", "redis://host/+1", "redis://host/1_0",
                                 "redis://host//1", "redis://host?db=-1", "unix:///redis.sock?db=-1",
                                 "redis+sentinel://a/m/-1", "redis+sentinel://a/m/1_0", "redis+sentinel://a/m/1/2"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(url)


@pytest.mark.parametrize(("url", "words"), [
    ("rediss://host/0?ssl_ca_cert=/ca.pem", "ssl_ca_cert is no parameter"),
    ("redis://host/0?ssl_ca_certs=/ca.pem", "ssl_ca_certs is no parameter"),
    ("rediss://host/0?ssl_cert_reqs=perhaps", "perhaps"), ("redis://host/0?socket_timeout=soon", "socket_timeout"),
    ("redis://host/0?socket_timeout=0", "socket_timeout is more"), ("redis://host/0?socket_timeout=nan", "more than 0"),
    ("redis+sentinel://host/m?socket_connect_timeout=-1", "socket_connect_timeout is more"),
    ("redis://host/0?max_connections=5", "max_connections is no parameter"),
    ("redis://user:secret@host/0?decode_responses=true", "decode_responses is no parameter"),
    ("redis://host/0?protocol=3", "protocol is no parameter"), ("unix:///redis?ssl_keyfile=x", "ssl_keyfile is no"),
    ("rediss+sentinel://host/m?ssl_ca_cert=/ca.pem", "ssl_ca_cert is no parameter"),
    ("redis+sentinel://host/m?sentinel_pasword=x", "sentinel_pasword is no parameter")])
def test_parameters_that_cannot_be_meant_are_refused_at_once(url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        parse_address(url)
    assert "secret" not in str(caught.value)


def test_parameters_of_an_address_by_sentinel_reach_its_connections_as_they_are() -> None:
    address = parse_address("rediss+sentinel://u:p%40@a/m?ssl_ca_certs=/a%2Bb%26c/ca.pem&sentinel_password=x%26y")
    options = parse_url(address.url)
    assert (options["ssl_ca_certs"], options["password"]) == ("/a+b&c/ca.pem", "p@")
    assert address.sentinel_options == (("password", "x&y"),)


@pytest.mark.parametrize(("url", "shown"), [
    ("redis://user:secret@host/0?password=secret2&x=1", "redis://user:***@host/0?password=***&x=1"),
    ("redis://:secret@host", "redis://:***@host"), ("redis://user:se@cret@host:1/0", "redis://user:***@host:1/0"),
    ("redis://user:sec/ret@host/0", "redis://user:***@host/0"), ("redis://u:se:cret@host", "redis://u:***@host"),
    ("redis://user:sec?ret@host/0", "redis://user:***@host/0"), ("redis://host:6379/0", "redis://host:6379/0"),
    ("redis://u:p@host/0?client_name=a@b", "redis://u:***@host/0?client_name=a@b"),
    ("redis+sentinel://u:secret@a:1,b:2/m?sentinel_password=x@y", "redis+sentinel://u:***@a:1,b:2/m?sentinel_password=***")])
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert hide(url) == shown


@pytest.mark.parametrize("url", ["http://user:secret@host", "redis://user:secret/x@host/0", "redis://u:x?secret@host/0",
                                 "redis+sentinel://u:secret/x@a:1/m/0", "redis://u:x?secret=1@host/0",
                                 "redis://u:1/secret@host/0"])
def test_passwords_are_in_no_message(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_address(Settings(broker_url=url).broker_url)
    assert "secret" not in str(caught.value)
