"""Stop, reload and the death of a worker, under load: streams end clean and come back, nothing acknowledged is lost."""

import http.client
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import gevent
import pytest
from gevent.pool import Pool

from tests.support.client import Connection, EndOfStream, ProtocolError, Stream, publish
from tests.support.server import Server
from tests.support.wait import eventually

TOPIC = "deploy"
STREAMS = 400
COMEBACK_MS = 2000
DRAIN_SECONDS = 2
GRACEFUL_SECONDS = 20
GONE_SECONDS = 3  # from the last stream's end to the master's exit
PUBLISHERS = 4
PATIENCE = 60  # far more than anything here takes on a busy machine
ENVIRONMENT = {
    "PUSHSVC_COMEBACK_MS": str(COMEBACK_MS),
    "PUSHSVC_DRAIN_SECONDS": str(DRAIN_SECONDS),
    "PUSHSVC_GRACEFUL_SECONDS": str(GRACEFUL_SECONDS),
    "PUSHSVC_HISTORY_EVENTS": "200000",
}


# --- Who publishes ---------------------------------------------------------------------------------------


class Publishers:
    """Clients that publish without a pause, each on a kept connection, and know what was acknowledged.

    With `retry` each event has an Idempotency-Key and is sent until it is acknowledged; without, a broken connection
    gives it up, and one that is refused ends its client.
    """

    def __init__(self, url: str, *, retry: bool, pause: float = 0.0) -> None:
        self.acknowledged: dict[str, str] = {}  # data by id
        self.broken = 0
        self._url = url
        self._retry = retry
        self._pause = pause
        self._stopped = False
        self._greenlets = [gevent.spawn(self._publish_on_and_on, number) for number in range(PUBLISHERS)]

    def stop(self) -> None:
        """Lets each finish what it has begun."""
        self._stopped = True
        gevent.joinall(self._greenlets, PATIENCE, raise_error=True)
        assert all(greenlet.ready() for greenlet in self._greenlets), "a publisher hangs"

    @contextmanager
    def running(self) -> Iterator["Publishers"]:
        eventually(lambda: len(self.acknowledged) >= PUBLISHERS, PATIENCE)
        try:
            yield self
        finally:
            self.stop()

    def _publish_on_and_on(self, number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=PATIENCE)
        for count in itertools.count():
            if self._stopped:
                break
            with suppress(ConnectionRefusedError):
                self._publish(connection, f"{number}-{count}")
                gevent.sleep(self._pause)
                continue
            break
        connection.close()

    def _publish(self, connection: http.client.HTTPConnection, data: str) -> None:
        while True:
            try:
                id = _post(connection, data)
            except (ConnectionError, http.client.HTTPException) as error:
                connection.close()
                self.broken += 1
                if self._retry:
                    gevent.sleep(0.01)
                    continue
                if isinstance(error, ConnectionRefusedError):
                    raise
                return
            assert id not in self.acknowledged, f"{id} acknowledged for {data} and {self.acknowledged[id]}"
            self.acknowledged[id] = data
            return


def _post(connection: http.client.HTTPConnection, data: str) -> str:
    headers = {"Content-Type": "application/json", "Idempotency-Key": data}
    connection.request("POST", "/publish", json.dumps({"topic": TOPIC, "data": data}), headers)
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, (response.status, body)
    return str(json.loads(body)["id"])


# --- Who reads -------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """A client that does as a browser does: after an end it waits as told and comes back with its last id."""

    url: str
    received: list[tuple[str, str]] = field(default_factory=list)
    clean: int = 0
    broken: int = 0
    opened: int = 0
    last_id: str = ""
    stream: Stream | None = None

    def run(self) -> None:
        while True:
            with suppress(ConnectionError, ProtocolError):  # nobody listens now, or not for long
                self._visit()
            gevent.sleep(self._wait())

    def _visit(self) -> None:
        resume = None if self.last_id else "earliest"
        with Stream(self.url, TOPIC, last_event_id=self.last_id or None, query_last_event_id=resume,
                    timeout=PATIENCE) as self.stream:
            self.opened += 1
            with suppress(EndOfStream):
                while True:
                    message = self.stream.next(PATIENCE)
                    self.received.append((message.last_event_id, message.data))
                    self.last_id = message.last_event_id
            self.clean += self.stream.clean_end
            self.broken += not self.stream.clean_end

    def _wait(self) -> float:
        told = self.stream.reader.reconnection_time if self.stream and self.stream.clean_end else None
        return (told or 10) / 1000


@contextmanager
def reading(url: str, count: int) -> Iterator[list[Reader]]:
    readers = [Reader(url) for _ in range(count)]
    greenlets = [gevent.spawn(reader.run) for reader in readers]
    try:
        eventually(lambda: all(reader.opened for reader in readers), PATIENCE)
        yield readers
        assert not any(greenlet.ready() for greenlet in greenlets), [greenlet.exception for greenlet in greenlets]
    finally:
        gevent.killall(greenlets)


def assert_each_has_all(readers: list[Reader], acknowledged: dict[str, str]) -> None:
    """Waits until every reader has as many events as were acknowledged; they must be these, in order, each once."""
    expected = sorted(acknowledged.items(), key=lambda item: seq(item[0]))
    eventually(lambda: all(len(reader.received) >= len(expected) for reader in readers), PATIENCE,
               message=f"not all readers have {len(expected)} events")
    for reader in readers:
        assert reader.received == expected


def seq(id: str) -> int:
    return int(id.rpartition("-")[2])


def all_of_history(url: str, timeout: float = PATIENCE) -> list[tuple[str, str]]:
    """What history holds, up to an event that is published now."""
    last = publish(url, topic=TOPIC, data="the end")
    with Stream(url, TOPIC, query_last_event_id="earliest", timeout=timeout) as stream:
        messages = stream.until(lambda message: message.last_event_id == last, timeout)
    return [(message.last_event_id, message.data) for message in messages[:-1]]


def assert_history_has(acknowledged: dict[str, str], history: list[tuple[str, str]]) -> None:
    assert all(seq(one) < seq(next) for (one, _), (next, _) in pairwise(history))
    held = dict(history)
    lost = {id: data for id, data in acknowledged.items() if held.get(id) != data}
    assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged events are lost: {list(lost.items())[:5]}"
    assert len(set(held.values())) == len(held), "an event is in history twice"


# --- Stop ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class End:
    at: float
    clean: bool
    retry: int | None
    cut_off: bool


def open_stream(url: str) -> Stream:
    return Stream(url, "quiet", timeout=PATIENCE).opened(PATIENCE)


def read_to_the_end(stream: Stream) -> End:
    stream.rest(PATIENCE)
    return End(time.monotonic(), stream.clean_end, stream.reader.reconnection_time, stream.reader.has_incomplete())


def test_stop_ends_each_stream_clean_with_a_retry_of_its_own_and_loses_no_acknowledged_publish(tmp_path: Path) -> None:
    with ExitStack() as stack, Server(tmp_path, env=ENVIRONMENT) as server:
        streams = [stack.enter_context(stream) for stream in Pool(50).map(open_stream, [server.url] * STREAMS)]
        watching = [gevent.spawn(read_to_the_end, stream) for stream in streams]
        publishers = Publishers(server.url, retry=False)
        with publishers.running():
            before = len(publishers.acknowledged)
            told = time.monotonic()
            server.terminate(GRACEFUL_SECONDS)
            gone = time.monotonic()
        ends = [greenlet.get(timeout=PATIENCE) for greenlet in watching]

        assert all(end.clean and not end.cut_off for end in ends)
        assert_spread([end.retry for end in ends])
        last_end = max(end.at for end in ends)
        assert last_end - told < DRAIN_SECONDS + GONE_SECONDS
        assert gone - last_end < GONE_SECONDS
        assert len(publishers.acknowledged) > before, "nobody published during the stop"

        assert "Traceback" not in server.log()

        server.start()
        server.wait_ready()
        assert_history_has(publishers.acknowledged, all_of_history(server.url))
        print(f"{STREAMS} streams ended in {last_end - told:.1f} s, the service was gone {gone - last_end:.1f} s later; "
              f"{len(publishers.acknowledged) - before} publishes acknowledged meanwhile")


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGQUIT, False)],
                         ids=["Ctrl-C", "INT", "QUIT"])
def test_every_way_to_stop_ends_the_streams_clean(number: signal.Signals, to_all: bool, tmp_path: Path) -> None:
    """A Ctrl-C goes to all processes of the terminal."""
    with Server(tmp_path, env=ENVIRONMENT) as server, ExitStack() as stack:
        streams = [stack.enter_context(open_stream(server.url)) for _ in range(20)]
        (os.killpg if to_all else os.kill)(server.pid, number)
        for stream in streams:
            stream.rest(PATIENCE)
            assert stream.clean_end
            assert 1 <= (stream.reader.reconnection_time or 0) <= COMEBACK_MS
        server.wait_gone(GRACEFUL_SECONDS)
        assert "Traceback" not in server.log()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_second_ctrl_c_ends_it_at_once(first: signal.Signals, second: signal.Signals, tmp_path: Path) -> None:
    """A client that reads nothing would hold up the stop for the drain window."""
    patient = {**ENVIRONMENT, "PUSHSVC_MAILBOX_BYTES": str(64 << 20), "PUSHSVC_DRAIN_SECONDS": "500",
               "PUSHSVC_GRACEFUL_SECONDS": "600"}
    with Server(tmp_path, env=patient) as server, Stream(server.url, TOPIC, receive_buffer=4096) as frozen:
        frozen.opened(PATIENCE)
        for number in range(16):
            publish(server.url, topic=TOPIC, data=f"{number} " + "x" * 500_000)
        os.killpg(server.pid, first)
        eventually(lambda: "draining" in server.log(), PATIENCE)
        os.killpg(server.pid, second)
        server.wait_gone(PATIENCE)


def assert_spread(retries: list[int | None]) -> None:
    """As 400 draws from the come-back time look: each quarter has its share, few are equal."""
    assert all(retry is not None and 1 <= retry <= COMEBACK_MS for retry in retries), retries
    quarters = [sum(retry is not None and quarter < 4 * retry / (COMEBACK_MS + 1) <= quarter + 1 for retry in retries)
                for quarter in range(4)]
    assert min(quarters) > len(retries) / 8, quarters
    assert len(set(retries)) > len(retries) / 2, "many come back at the same moment"


def test_stop_is_not_held_up_by_an_idle_kept_connection(tmp_path: Path) -> None:
    lasting = {**ENVIRONMENT, "PUSHSVC_KEEPALIVE_SECONDS": "60"}
    with Server(tmp_path, env=lasting) as server, Connection(server.url) as idle:
        idle.publish(topic=TOPIC, data="before")
        assert server.terminate(GRACEFUL_SECONDS) < DRAIN_SECONDS + GONE_SECONDS
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("froze", ["live", "in its replay"])
def test_client_that_reads_nothing_delays_the_stop_by_no_more_than_the_drain_window(froze: str, tmp_path: Path) -> None:
    roomy = {**ENVIRONMENT, "PUSHSVC_MAILBOX_BYTES": str(64 << 20)}  # it shall be frozen, not closed for being slow
    with Server(tmp_path, workers=1, env=roomy) as server, ExitStack() as stack:
        frozen = stack.enter_context(Stream(server.url, TOPIC, receive_buffer=4096)) if froze == "live" else None
        reader = stack.enter_context(Stream(server.url, TOPIC)).opened(PATIENCE)
        ids = [publish(server.url, topic=TOPIC, data=f"{number} " + "x" * 500_000) for number in range(16)]
        if frozen is None:
            frozen = stack.enter_context(Stream(server.url, TOPIC, query_last_event_id="earliest", receive_buffer=4096))
        assert [message.last_event_id for message in reader.take(len(ids), PATIENCE)] == ids

        took = server.terminate(GRACEFUL_SECONDS)

        assert took < DRAIN_SECONDS + GONE_SECONDS
        reader.rest(PATIENCE)
        assert reader.clean_end
        got = frozen.rest(PATIENCE)
        assert not frozen.clean_end
        assert [message.last_event_id for message in got] == ids[: len(got)]
        assert len(got) < len(ids), "the kernel has taken all of it: nobody was frozen"

        server.start()
        server.wait_ready()
        last = frozen.last_event_id
        back = stack.enter_context(Stream(server.url, TOPIC, last_event_id=last or None,
                                          query_last_event_id=None if last else "earliest"))
        rest = back.take(len(ids) - len(got), PATIENCE)
        assert [message.last_event_id for message in rest] == ids[len(got) :]


def test_worker_that_drains_is_not_ready_over_a_kept_connection_and_refuses_streams_for_now(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, env=ENVIRONMENT) as server, Stream(server.url, TOPIC) as stream:
        stream.opened(PATIENCE)
        kept = [http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE) for _ in range(2)]
        assert [ask(connection, "/readyz")[0] for connection in kept] == [200, 200]

        os.kill(server.pid, signal.SIGTERM)
        stream.rest(PATIENCE)

        status, headers, body = ask(kept[0], "/readyz")
        assert (status, headers["content-type"]) == (503, "application/problem+json")
        assert json.loads(body)["status"] == 503
        status, headers, body = ask(kept[1], f"/events?topic={TOPIC}")
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert body.startswith(b"retry: ")
        for connection in kept:
            connection.close()


def ask(connection: http.client.HTTPConnection, target: str) -> tuple[int, dict[str, str], bytes]:
    connection.request("GET", target)
    response = connection.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


# --- Reload ----------------------------------------------------------------------------------------------


def test_reload_under_load_replaces_all_workers_and_every_reader_has_every_event_once(tmp_path: Path) -> None:
    with Server(tmp_path, env=ENVIRONMENT) as server, reading(server.url, 100) as readers:
        publishers = Publishers(server.url, retry=True, pause=0.01)
        with publishers.running():
            before = set(server.worker_pids())
            server.reload()
            eventually(lambda: len(now := set(server.worker_pids())) == server.workers and not now & before, PATIENCE,
                       message="the workers have not been replaced")
            eventually(lambda: all(reader.opened > 1 for reader in readers), PATIENCE, message="a stream did not move")
            seen = len(publishers.acknowledged)
            eventually(lambda: len(publishers.acknowledged) > seen + PUBLISHERS, PATIENCE)

        assert_each_has_all(readers, publishers.acknowledged)
        assert [reader.broken for reader in readers] == [0] * len(readers), "a stream did not end clean"
        assert_history_has(publishers.acknowledged, all_of_history(server.url))
        print(f"{len(publishers.acknowledged)} events, {publishers.broken} publishes met a closed connection, "
              f"{sum(reader.opened for reader in readers)} streams by {len(readers)} readers")


# --- Death -----------------------------------------------------------------------------------------------


def test_killed_worker_breaks_its_own_streams_only_and_they_resume_by_id_without_loss(tmp_path: Path) -> None:
    with Server(tmp_path, env=ENVIRONMENT) as server, reading(server.url, 60) as readers:
        publishers = Publishers(server.url, retry=True, pause=0.01)
        with publishers.running():
            before = server.worker_pids()
            server.kill_worker(before[0])
            eventually(broken := lambda: [reader for reader in readers if reader.broken], PATIENCE)
            eventually(lambda: all(reader.opened > 1 for reader in broken()), PATIENCE, message="a stream did not resume")
            eventually(lambda: len(now := server.worker_pids()) == server.workers and before[0] not in now, PATIENCE)
            seen = len(publishers.acknowledged)
            eventually(lambda: len(publishers.acknowledged) > seen + PUBLISHERS, PATIENCE)

        assert_each_has_all(readers, publishers.acknowledged)
        assert 0 < len(broken()) < len(readers)
        assert all(reader.opened == 1 + reader.broken for reader in readers)
        assert sum(reader.clean for reader in readers) == 0
        assert_history_has(publishers.acknowledged, all_of_history(server.url))
