"""Three front machines, HAProxy and Redis, each in a network namespace of its own: what is promised of one machine holds
of several, and what fails is told. The configurations are those that ops/machines/ ships."""

import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import gevent
import jwt
import pytest

from pushsvc.publisher import Publisher
from tests.support.client import Stream, publish, request
from tests.support.fire import seq_of
from tests.support.machines import (
    PASSWORD,
    PATIENCE,
    REDIS_PASSWORD,
    SHIPPED,
    Balancer,
    Fronts,
    Listener,
    Load,
    Log,
    Machine,
    Sentinel,
    changed,
    net,
    place_of,
    program,
)
from tests.support.reader import Message
from tests.support.server import ROOT, free_port
from tests.support.wait import eventually
from tests.test_chat_replay import LOG, TOPIC, Line, Oracle, Publishers, Reader, chat

RATE = 500  # publishes a second under faults
LISTENERS = 18
TOPICS = 6
CHAT_SPEED = 3  # times that of the replay on one machine
CHAT_READERS = 60


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, Machine]]:
    with net(front1=1, front2=1, front3=1, proxy=2, redis1=1, redis2=1) as made:
        yield made


@pytest.fixture(scope="module")
def log(machines: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    with Log(tmp_path_factory.mktemp("redis"), machines["redis1"]) as log:
        yield log


@pytest.fixture(scope="module")
def fronts(machines: dict[str, Machine], log: Log, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    with Fronts(tmp_path_factory.mktemp("fronts"), fronts_of(machines), machines["proxy"], log.url) as fronts:
        yield fronts


def fronts_of(machines: dict[str, Machine]) -> list[Machine]:
    return [machines[name] for name in ("front1", "front2", "front3")]


# --- As one ----------------------------------------------------------------------------------------------


def test_what_is_published_on_any_machine_comes_from_all_in_one_order(fronts: Fronts) -> None:
    urls = [server.url for server in fronts.servers]
    streams = [Stream(url, ["one", "two"]).opened() for url in (*urls, fronts.url)]
    gevent.joinall([gevent.spawn(lambda url=url: [
        publish(url, topics=["one", "two"][: 1 + number % 2], data=f"{url} {number}") for number in range(40)])
        for url in (*urls, fronts.url)], raise_error=True)
    got = [[(each.last_event_id, each.data) for each in stream.take(160, PATIENCE)] for stream in streams]
    assert all(each == got[0] for each in got), "the machines do not agree on one order"
    assert len(set(got[0])) == 160
    assert sorted(got[0], key=lambda pair: seq_of(pair[0])) == got[0]
    for stream in streams:
        stream.quiet(0.1)
        stream.close()


def test_a_machine_says_where_it_listens(fronts: Fronts) -> None:
    for server in fronts.servers:
        assert f"pushsvc listens on {server.url}\n" in server.log()


def test_a_stream_resumes_on_another_machine(fronts: Fronts) -> None:
    first, second, third = (server.url for server in fronts.servers)
    with Stream(first, "resume").opened() as stream:
        publish(third, topic="resume", data="seen")
        seen = stream.next().last_event_id
    missed = publish(first, topic="resume", data="missed")
    with Stream(second, "resume", last_event_id=seen) as stream:
        assert stream.next() == Message("message", "missed", missed)


def test_a_machine_without_streams_of_a_topic_receives_no_byte_of_it(
        fronts: Fronts, log: Log, machines: dict[str, Machine]) -> None:
    name, size, count = "busy", 1000, 1000
    with Stream(fronts.servers[0].url, name).opened() as stream, Stream(fronts.servers[1].url, "calm").opened(), \
            Publisher(log.url) as publisher, contextlib.closing(log.client()) as client:
        before, sent = bytes_by_machine(log, machines), bytes_by_redis(client)
        publisher.publish_batch({"topic": name, "data": "x" * size} for _ in range(count))
        assert len(stream.take(count, PATIENCE)) == count
        grown = [now - then for now, then in zip(bytes_by_machine(log, machines), before, strict=True)]
        sent = bytes_by_redis(client) - sent
    print(f"Redis sent, for {count} events of {size} bytes to a topic of the first machine: {grown} bytes to each")
    print(f"and {sent} bytes in all, by its own count")
    assert grown[0] > size * count
    assert max(grown[1:]) < 2000, "what is left is health checks"
    assert size * count < sent < 1.5 * size * count, "it was sent once"


def bytes_by_machine(log: Log, machines: dict[str, Machine]) -> list[int]:
    """What Redis has sent to each front machine, by the kernel's own count of each connection."""
    return [machines["redis1"].sent_to(machine.address) for machine in fronts_of(machines)]


def bytes_by_redis(client: Any) -> int:
    """What Redis has sent to everybody, by its own count."""
    return int(client.info("stats")["total_net_output_bytes"])


def test_the_balancer_spreads_streams_and_uses_all_its_addresses(fronts: Fronts, machines: dict[str, Machine]) -> None:
    before = fronts.counted("pushsvc_streams")
    streams = [Stream(fronts.url, f"spread-{number}").opened() for number in range(60)]
    try:
        opened = [now - then for now, then in zip(fronts.counted("pushsvc_streams"), before, strict=True)]
        assert sum(opened) == 60
        assert min(opened) >= 15, opened
        for source in machines["proxy"].addresses:
            assert machines["front1"].sent_to(source) > 0, f"nothing goes by {source}"
    finally:
        for stream in streams:
            stream.close()
    eventually(lambda: fronts.counted("pushsvc_streams") == before, message="haproxy tells that a client has hung up")


def test_when_no_machine_answers_a_stream_is_told_to_come_back_and_a_publisher_the_truth(
        fronts: Fronts, machines: dict[str, Machine], tmp_path: Path) -> None:
    """By a HAProxy before a port on which nobody listens."""
    fronts.balancer.__exit__(None, None, None)
    try:
        with Balancer(tmp_path, machines["proxy"], fronts_of(machines), port=8999) as balancer:
            for _ in range(2):  # at once, and when its checks have failed
                with Stream(balancer.url, "nobody", timeout=20) as stream:
                    assert stream.rest() == []
                    assert (stream.status, stream.reader.reconnection_time) == (200, 5000)
                    assert stream.headers["content-type"] == "text/event-stream"
                answer = request("POST", f"{balancer.url}/publish", "topic=a&data=b",
                                 {"Content-Type": "application/x-www-form-urlencoded"}, timeout=20)
                assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
                assert answer.json()["status"] == 503
                eventually(lambda: "no server available" in balancer.log(), message="the checks have failed")
    finally:
        fronts.balancer.__enter__()


def test_a_publish_that_was_read_and_not_answered_is_sent_again_if_it_has_a_key_and_is_small(tmp_path: Path) -> None:
    read: list[str] = []

    class Faltering(Answering):
        """Reads every publish and answers each second one."""

        def do_POST(self) -> None:
            read.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            if len(read) % 2 == 0:
                self.do_GET()

    here = Machine("", "", ["127.0.0.1", "127.0.0.2"])
    with Serving(Faltering) as front, \
            Balancer(tmp_path, here, [here] * 3, port=front.port, listen=free_port()) as balancer:
        for size, key, status in [(100, True, 200), (14_000, True, 200), (20_000, True, 502), (100, False, 502)]:
            read.clear()
            assert publish_in_parts(balancer.url, "x" * size, {"Idempotency-Key": "k"} if key else {}) == status
            assert read == ["x" * size] * (2 if status == 200 else 1), (size, key)


def publish_in_parts(url: str, body: str, headers: dict[str, str]) -> int:
    """As many clients do: first the head, then the body. The status."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        connection.putrequest("POST", "/publish")
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders()
        gevent.sleep(0.1)
        connection.send(body.encode())
        return connection.getresponse().status


# --- The chat --------------------------------------------------------------------------------------------


class ChatReader(Reader):
    """A reader of the chat that is done when it has the last line."""

    def run(self) -> None:
        with contextlib.suppress(gevent.GreenletExit):
            super().run()

    def _take(self, message: Message) -> None:
        super()._take(message)
        if self.has_all:
            raise gevent.GreenletExit


def test_readers_that_change_machines_have_the_whole_chat(fronts: Fronts) -> None:
    if not LOG.exists():
        pytest.skip(f"the chat log is not at {LOG}")
    lines = chat(LOG.read_text(encoding="utf-8"))
    for line in lines:
        line.seconds /= CHAT_SPEED
    before, began = fronts.counted("pushsvc_streams_opened_total"), time.monotonic()
    readers = [ChatReader(fronts.url, number, restless=number % 5 > 0, envelope=number % 10 == 0)
               for number in range(CHAT_READERS)]
    reading = [gevent.spawn(reader.run) for reader in readers]
    eventually(lambda: all(reader.opened for reader in readers), PATIENCE, message="not all readers have opened")
    publishers = Publishers(fronts.url, lines)
    gevent.joinall(publishers.start(time.monotonic()), raise_error=True)
    end = Line(0.0, "message", "last line", started=time.monotonic())
    end.id = publish(fronts.url, **end.fields())
    lines.append(end)
    gevent.joinall(reading, timeout=60, raise_error=True)
    assert all(reader.has_all for reader in readers), "not all readers have the last line"

    publishers.assert_each_in_order()
    oracle = Oracle(lines)
    for reader in readers:
        oracle.check(reader)
    opened = [now - then for now, then in zip(fronts.counted("pushsvc_streams_opened_total"), before, strict=True)]
    assert min(opened) > CHAT_READERS / 6, f"hardly a stream went to one machine: {opened}"
    assert sum(reader.hung_up for reader in readers) > CHAT_READERS
    print(f"{len(lines)} events of {TOPIC}, {len(readers)} readers, {sum(reader.hung_up for reader in readers)} "
          f"changes, streams by machine {opened}, {time.monotonic() - began:.1f} s")


# --- Faults ----------------------------------------------------------------------------------------------


class Outcome:
    """What became of a load and its listeners. lost: of each listener, how many acknowledged events it did not get."""

    def __init__(self, name: str, load: Load, listeners: list[Listener], began: float, ended: float) -> None:
        self.listeners = listeners
        self.failed = load.failed
        self.lost = [listener.check(load.acknowledged) for listener in listeners]
        self.gaps = [len(listener.gaps) for listener in listeners]
        self.visits = [listener.visits for listener in listeners]
        silences = sorted(listener.longest_silence(began) for listener in listeners)
        print(f"{name}: {len(load.acknowledged)} publishes acknowledged, {len(load.failed)} not; no publish for "
              f"{load.longest_stop:.2f} s; streams silent for {silences[len(silences) // 2]:.2f} s (median), "
              f"{silences[-1]:.2f} s (longest), all heard "
              f"again {max(listener.first_after(ended) for listener in listeners):.2f} s after the repair; "
              f"{sum(self.visits) - len(listeners)} reconnects, {sum(self.gaps)} gaps told, acknowledged and lost "
              f"{sum(self.lost)}")


def endure(url: str, name: str, fault: Callable[[], None]) -> Outcome:
    """Publish and listen, through the balancer, before, while and after `fault` runs, until all hear again."""
    topics = [f"{name}-{number}" for number in range(TOPICS)]
    start = publish(url, topics=topics, data="start")
    chosen = [[topics[number % TOPICS], topics[(number + 2) % TOPICS]] for number in range(LISTENERS - 1)]
    listeners = [Listener(url, each, start) for each in (*chosen, topics)]
    with contextlib.ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        eventually(lambda: all(listener.visits for listener in listeners), PATIENCE, message="all have opened")
        with Load(url, topics, RATE) as load:
            load.wait(RATE // 2)
            began = time.monotonic()
            fault()
            ended = time.monotonic()
            load.wait(RATE // 2)
        end = eventually(lambda: publish(url, topics=topics, data="end"), PATIENCE, message="an event is published")
        eventually(lambda: all(listener.newest >= seq_of(end) for listener in listeners), PATIENCE,
                   message="all have the last event")
    return Outcome(name, load, listeners, began, ended)


def assert_nothing_lost_nor_told(outcome: Outcome) -> None:
    assert sum(outcome.lost) == 0
    assert sum(outcome.gaps) == 0, [listener.gaps for listener in outcome.listeners if listener.gaps]


def test_a_worker_that_is_killed_costs_its_streams_a_reconnect(fronts: Fronts) -> None:
    server = fronts.servers[1]

    def kill() -> None:
        worker, = server.worker_pids()
        server.kill_worker(worker)
        server.wait_ready()

    outcome = endure(fronts.url, "worker killed", kill)
    assert_nothing_lost_nor_told(outcome)
    assert sum(visits > 1 for visits in outcome.visits) >= LISTENERS // 6, "nobody listened on that machine"
    assert sum(visits == 1 for visits in outcome.visits) >= LISTENERS // 3, "others were disturbed"


def test_a_machine_that_is_restarted_loses_nothing_and_breaks_no_publish(fronts: Fronts) -> None:
    server = fronts.servers[2]
    outcome = endure(fronts.url, "machine restarted", server.restart)
    assert_nothing_lost_nor_told(outcome)
    assert not outcome.failed, f"broken off: {outcome.failed}\n{fronts.balancer.log()[-4000:]}"
    assert sum(visits > 1 for visits in outcome.visits) >= LISTENERS // 6, "nobody listened on that machine"
    assert "Exception" not in server.log()


def test_a_machine_that_is_cut_off_loses_its_streams_to_the_others_and_takes_part_again(
        fronts: Fronts, machines: dict[str, Machine]) -> None:
    cable, before = machines["front1"], len(fronts.balancer.log())

    def cut() -> None:
        cable.cut()
        try:
            eventually(lambda: "streams/front1 is DOWN" in fronts.balancer.log()[before:], message="haproxy has noticed")
            gevent.sleep(0.5)
        finally:
            cable.join()
        fronts.servers[0].wait_ready()

    outcome = endure(fronts.url, "machine cut off", cut)
    assert_nothing_lost_nor_told(outcome)
    assert sum(visits > 1 for visits in outcome.visits) >= LISTENERS // 6, "nobody listened on that machine"
    with Stream(fronts.servers[0].url, "back").opened() as stream:
        publish(fronts.servers[2].url, topic="back", data="again")
        assert stream.next().data == "again"


def assert_told_to_come_back(url: str) -> None:
    """While Redis is away: 503 for publishers and checks, 200 and the end for new streams."""
    assert_refused(url)
    with Stream(url, "a", timeout=20) as stream:
        assert stream.rest(20) == []
        assert (stream.status, stream.reader.reconnection_time is not None) == (200, True)


def test_redis_that_is_killed_and_comes_back_with_its_data_costs_one_gap_and_no_stream(fronts: Fronts, log: Log) -> None:
    def restart() -> None:
        log.kill()
        assert_told_to_come_back(fronts.servers[0].url)
        assert_told_to_come_back(fronts.url)
        log.start()

    outcome = endure(fronts.url, "redis restarted with its data", restart)
    assert sum(outcome.lost) == 0, "what was acknowledged was in its file"
    assert set(outcome.gaps) == {1}, outcome.gaps
    assert {gap["reason"] for listener in outcome.listeners for gap in listener.gaps} == {"epoch"}
    assert set(outcome.visits) == {1}, "streams did not stay open"


@pytest.mark.parametrize("way", ["restarted empty", "flushed"])
def test_redis_that_is_empty_costs_one_gap_and_no_stream_and_ids_go_on(way: str, fronts: Fronts, log: Log) -> None:
    def lose() -> None:
        if way == "flushed":
            with contextlib.closing(log.client()) as client:
                client.flushall()
            return
        log.kill()
        log.forget()
        log.start()

    seen = publish(fronts.url, topic="away", data="seen")
    publish(fronts.url, topic="away", data="lost to who is away")
    outcome = endure(fronts.url, f"redis {way}", lose)
    assert set(outcome.gaps) == {1}, outcome.gaps
    assert {gap["reason"] for listener in outcome.listeners for gap in listener.gaps} == {"epoch"}
    assert set(outcome.visits) == {1}, "streams did not stay open"
    with Listener(fronts.url, ["away"], seen) as back:  # a machine that has not noticed yet tells it to come again
        eventually(lambda: back.received, message="who was away is told")
    (_, told), = back.received
    assert (told.type, json.loads(told.data)["from"]) == ("gap", seen)
    assert place_of(told.last_event_id) > place_of(seen)


@pytest.mark.parametrize(("setting", "value"), [("maxmemory", "1mb"), ("min-replicas-to-write", "1")])
def test_redis_that_takes_no_writes_refuses_publishes_and_nothing_else(
        setting: str, value: str, fronts: Fronts, log: Log) -> None:
    """It is full, or has lost its replica where it must have one."""
    seen = publish(fronts.url, topic=setting, data="seen")
    missed = publish(fronts.url, topic=setting, data="missed")
    with contextlib.closing(log.client()) as client, Stream(fronts.url, setting).opened() as stream:
        before = client.config_get(setting)[setting]
        client.config_set(setting, value)
        try:
            assert_refused(fronts.servers[0].url)
            with Stream(fronts.servers[1].url, setting, last_event_id=seen) as resumed:
                assert resumed.next().last_event_id == missed
            stream.quiet(0.1)
        finally:
            client.config_set(setting, before)
        eventually(lambda: publish(fronts.url, topic=setting, data="again"), message="it is published again")
        assert stream.next().data == "again"


def assert_refused(url: str) -> None:
    answer = request("POST", f"{url}/publish", '{"topic": "a", "data": "b"}', {"Content-Type": "application/json"})
    assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
    assert request("GET", f"{url}/readyz").status == 503


def test_a_worker_that_hangs_is_cut_off_by_redis_and_misses_nothing_when_it_goes_on(fronts: Fronts, log: Log) -> None:
    server, data = fronts.servers[1], "x" * 500_000
    worker, = server.worker_pids()
    start = publish(fronts.url, topic="large", data="start")
    with contextlib.closing(log.client()) as client, Publisher(log.url) as publisher, \
            Listener(server.url, ["large"], start) as listener:
        client.config_set("client-output-buffer-limit", "pubsub 8mb 4mb 10")
        eventually(lambda: listener.visits, message="the stream is open")
        assert listens(client, server.host)
        os.kill(worker, signal.SIGSTOP)
        try:
            ids = [publisher.publish("large", f"{number} {data}") for number in range(60)]
            assert not listens(client, server.host), "it was not cut off"
        finally:
            os.kill(worker, signal.SIGCONT)
        eventually(lambda: listener.newest >= seq_of(ids[-1]), PATIENCE, message="the stream has the last event")
    assert [message.last_event_id for _, message in listener.received] == ids


def listens(client: Any, host: str) -> bool:
    """Whether Redis has a connection from that machine that is subscribed to something."""
    return any(each["addr"].startswith(f"{host}:") for each in client.client_list("pubsub"))


@pytest.mark.parametrize("way", ["killed", "cut off"])
def test_a_failover_by_sentinel_costs_one_gap_and_no_stream(way: str, machines: dict[str, Machine], fronts: Fronts,
                                                            log: Log, tmp_path: Path) -> None:
    """The service starts anew for it, and finds its Redis by Sentinel."""
    with contextlib.ExitStack() as stack:
        replica = stack.enter_context(Log(tmp_path / "replica", machines["redis2"],
                                          args=["--replicaof", f"{log.host} {log.port}"]))
        sentinels = [stack.enter_context(Sentinel(tmp_path / f"sentinel-{name}", machines[name], log))
                     for name in ("proxy", "redis2", "front1")]
        with contextlib.closing(log.client()) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        with contextlib.closing(replica.client()) as client:
            eventually(lambda: client.info("replication")["master_link_status"] == "up", PATIENCE)
        eventually(lambda: all(knows_all(each) for each in sentinels), PATIENCE, message="the Sentinels know all")
        stack.callback(fronts.__enter__)
        stack.callback(log.start)
        stack.callback(log.kill)
        stack.callback(machines["redis1"].join)
        fronts.__exit__(None, None, None)
        hosts = ",".join(f"{each.host}:{each.port}" for each in sentinels)
        url = f"redis+sentinel://pushsvc:{PASSWORD}@{hosts}/mymaster/0"
        fault = {"killed": log.kill, "cut off": machines["redis1"].cut}[way]
        with Fronts(tmp_path / "fronts", fronts_of(machines), machines["proxy"], url) as again:
            outcome = endure(again.url, f"sentinel failover, master {way}", lambda: promote(fault, replica))
            assert set(outcome.gaps) == {1}, outcome.gaps
            assert {gap["reason"] for listener in outcome.listeners for gap in listener.gaps} == {"epoch"}
            assert set(outcome.visits) == {1}, "streams did not stay open"


def promote(fault: Callable[[], None], replica: Log) -> None:
    fault()
    with contextlib.closing(replica.client()) as client:
        eventually(lambda: client.info("replication")["role"] == "master", PATIENCE, message="the replica is promoted")


def knows_all(sentinel: Sentinel) -> bool:
    with contextlib.closing(sentinel.client()) as client:
        master = client.sentinel_master("mymaster")
    return (master["num-slaves"], master["num-other-sentinels"]) == (1, 2)


def test_the_commands_of_the_runbook_for_redis_work_as_written(machines: dict[str, Machine], tmp_path: Path) -> None:
    """On machines that have no Redis otherwise, at the addresses that these have here."""
    master, other = machines["front2"], machines["front3"]
    page = (ROOT / "docs" / "machines.md").read_text()
    commands = re.findall(r"\bredis-cli [^`\n]+", page)
    assert len(commands) == page.count("redis-cli") > 3
    with Log(tmp_path / "master", master) as log, \
            Log(tmp_path / "replica", other, args=["--replicaof", f"{log.host} {log.port}"]) as replica, \
            Sentinel(tmp_path / "sentinel", other, log) as sentinel:
        with contextlib.closing(replica.client()) as client:
            eventually(lambda: client.info("replication")["master_link_status"] == "up", PATIENCE)
        for command in sorted(commands, key=lambda each: "FAILOVER" in each):  # when the Sentinel knows the replica
            here = command.replace("10.0.0.21", log.host).replace("10.0.0.31", sentinel.host)
            eventually(lambda here=here: succeeds(here, machines["proxy"]), PATIENCE, message=f"{command} works")
        with contextlib.closing(replica.client()) as client:
            eventually(lambda: client.info("replication")["role"] == "master", PATIENCE)


def succeeds(command: str, machine: Machine) -> bool:
    """Whether redis-cli has an answer that is no error, and nothing to complain of."""
    words = [*machine.prefix, program("redis-cli"), "-e", *command.split()[1:]]
    password = PASSWORD if "--user pushsvc" in command else REDIS_PASSWORD
    done = subprocess.run(words, input=f"{password}\n", capture_output=True, text=True, timeout=20)
    return done.returncode == 0 and bool(done.stdout) and not done.stderr


# --- What is shipped beside the configurations -----------------------------------------------------------


def test_redis_in_a_container_has_the_folder_that_its_configuration_names() -> None:
    """Redis does not start where `dir` is missing, whatever its command says of another one."""
    folder, = re.findall(r"^dir (\S+)$", (SHIPPED / "redis.conf").read_text(), re.M)
    compose = (SHIPPED / "compose.yaml").read_text()
    for name in ("redis1", "redis2"):
        service, = re.findall(rf"^  {name}:\n((?:    .*\n)+)", compose, re.M)
        assert f"{name}:{folder}]" in service
        assert f"working_dir: {folder}" in service


def test_memory_per_event_is_measured_and_a_smaller_node_makes_small_topics_cheaper() -> None:
    program("redis-server")
    small, large = (memory("--events", "2000", "--topics", "100", "--node-bytes", str(size)) for size in (512, 4096))
    for found in small[:4]:
        assert found["of_data"] < found["bytes_each"] < 20 * found["of_data"]
    assert "1 in each" in small[3]["what"]
    assert small[3]["bytes_each"] < large[3]["bytes_each"] / 3
    assert "stream-node-max-bytes 512\n" in (SHIPPED / "redis.conf").read_text()


def memory(*options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SHIPPED / "memory.py"), "--json", *options]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return found


KEY = "a key of the tests that has more than 32 bytes"


@pytest.fixture(scope="module")
def cells_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a HAProxy before two cells, each of which answers with its name."""
    cells, port = [Serving(type("Cell", (Answering,), {"text": f"cell {number}"})) for number in range(2)], free_port()
    config = tmp_path_factory.mktemp("cells") / "cells.cfg"
    ports = {f"10.0.{cell}.1{front}:8000": f"127.0.0.1:{cells[cell].port}" for cell in (0, 1) for front in (1, 2)}
    config.write_text(changed("cells.cfg", ports | {"127.0.0.1:8080": f"127.0.0.1:{port}"}))
    with contextlib.ExitStack() as stack:
        for each in cells:
            stack.enter_context(each)
        process = subprocess.Popen([program("haproxy"), "-db", "-f", str(config)], start_new_session=True)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        url = f"http://127.0.0.1:{port}/events?topic=a"
        eventually(lambda: request("GET", url).status == 401, message="haproxy refuses who has no token")
        yield url


@pytest.fixture(scope="module")
def cell_of() -> Callable[[str], int]:
    """The function of that name in docs/machines.md: where the application publishes to a user."""
    page = (ROOT / "docs" / "machines.md").read_text()
    code, = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def cell_of" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    return names["cell_of"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("user", [*(f"user-{number}" for number in range(20)), "a/b", 'say "hi"', "back\\slash", "~ %s"])
def test_a_user_goes_to_the_cell_of_his_number_wherever_his_token_is(
        user: str, cells_url: str, cell_of: Callable[[str], int]) -> None:
    token, other = (jwt.encode({"sub": name}, KEY) for name in (user, user + "x"))
    cookie = {"Cookie": f"pushsvc_token={other}"}
    answers = [request("GET", cells_url, headers={"Authorization": f"Bearer {token}"} | cookie),
               request("GET", f"{cells_url}&access_token={token}", headers=cookie),
               request("GET", cells_url, headers={"Cookie": f"other=1; pushsvc_token={token}"})]
    assert [answer.text for answer in answers] == [f"cell {cell_of(user)}"] * 3


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("user", ["josé", "Zoë", "Łukasz", "Ж", "李", "\N{GRINNING FACE}", "tab\t", "end\n", "nul\0", ""])
def test_a_user_whose_name_is_not_plain_ascii_is_refused_by_both_sides(
        user: str, escaped: bool, cells_url: str, cell_of: Callable[[str], int]) -> None:
    payload = json.dumps({"sub": user}, ensure_ascii=escaped).encode()
    token = jwt.PyJWS().encode(payload, KEY)
    for headers in ({"Authorization": f"Bearer {token}"}, {"Cookie": f"pushsvc_token={token}"}):
        answer = request("GET", cells_url, headers=headers)
        assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
        assert "ASCII" in answer.json()["detail"]
    with pytest.raises(ValueError, match="ASCII"):
        cell_of(user)


def test_a_preflight_is_answered_by_a_cell(cells_url: str) -> None:
    assert request("OPTIONS", cells_url).text == "cell 0"


class Serving:
    """An HTTP server on a port of this machine, with this handler."""

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._greenlet = gevent.spawn(self._server.serve_forever, 0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._greenlet.join(5)


class Answering(http.server.BaseHTTPRequestHandler):
    """Gives all requests one answer."""

    text = "ok"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text.encode())

    do_OPTIONS = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass
