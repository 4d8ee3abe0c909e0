"""A real chat, faster than it was: four workers, 300 readers that come and go, and workers that are killed under them.

The log's lines are published over HTTP by several clients. What every reader must have is worked out from the ids that
these were answered, and read with the independent reader.
"""

import http.client
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import gevent
import pytest

from tests.support.client import EndOfStream, ProtocolError, Stream, publish, request
from tests.support.reader import Message
from tests.support.server import ROOT, Server
from tests.support.wait import eventually

LOG = ROOT.parent / "shared" / "chat" / "ubuntu-irc-2006-06-01.txt"
SPEED = 200  # times as fast as the channel was: its 97 minutes in half of one
TOPIC = "#ubuntu"
WORKERS = 4
READERS = 300
PUBLISHERS = 4
KILLS = 6
ENVELOPE_EVERY = 10  # one reader in ten asks for envelopes
STAY_SECONDS = (0.5, 8.0)  # how long a restless reader stays
AWAY_SECONDS = (0.0, 0.5)
RETRY_PAUSE = 0.01
PATIENCE = 90  # seconds without anything: far more than a worker's start takes on a busy machine
LAST = "last line"

SPOKEN = re.compile(r"\[([0-9]{2}):([0-9]{2})\] <([^>]+)> (.*)")
TIMED = re.compile(r"\[([0-9]{2}):([0-9]{2})\] ")
PRESENCE = re.compile(r"=== (\S+) \[.*\] +has (joined|left) ")


@dataclass(slots=True)
class Line:
    """One line of the log as an event. `seconds`: since the log's begin. The rest is known once it is published."""

    seconds: float
    event: str
    data: str
    keep: str = "all"
    key: str = ""
    id: str = ""
    started: float = 0.0

    @property
    def seq(self) -> int:
        return int(self.id.rpartition("-")[2])

    @property
    def arrives_as(self) -> tuple[str, str]:
        """Type and data for the reader: `data:` lines know one line end."""
        return self.event, re.sub(r"\r\n|\r", "\n", self.data)

    def fields(self) -> dict[str, str]:
        optional = {"event": self.event.replace("message", ""), "key": self.key, "keep": self.keep}
        return {"topic": TOPIC, "data": self.data, **{name: value for name, value in optional.items() if value}}


# Where each stands among the log's lines, and what it says.
SYNTHETIC = {
    1: "no text at all: the next says nothing",
    2: "",
    50: "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 and one beyond the BMP 𝄞",
    300: "中文：今天发布了新版本。日本語 한국어",
    301: "combining é à̧̀ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    302: "right to left: שלום עולם, مرحبا \u202eoverridden\u202c",
    600: "controls \x00\x01\x02\x07\x08\t\x0b\x0c\x1b[31mred\x1b[0m\x7f\x85\u2028\u2029 end",
    601: "line ends\r\nCRLF\rCR\nLF\n\nand two at the end\r\n\r\n",
    602: "\ufeffa BOM",
    900: " a leading space",
    901: "id: 1\nevent: forged\nretry: 1\n\ndata: a field in data is data",
    902: ": no comment",
    1200: "long " + "é" * 100_000,
}
REFUSED = [
    {"topic": TOPIC, "data": "x", "key": "a\x02key"},
    {"topic": TOPIC, "data": "x", "key": "a\nkey", "keep": "latest"},
    {"topic": "#ubun\x00tu", "data": "x"},
    {"topics": [TOPIC, "#other\x1b"], "data": "x"},
    {"topic": TOPIC, "data": "x", "event": "a\rtype"},
]


# --- The log ---------------------------------------------------------------------------------------------


def chat(text: str) -> list[Line]:
    """The log's lines in order, those of a minute spread evenly over it, and the synthetic ones among them."""
    lines: list[Line] = []
    for minute, texts in enumerate(minutes(text)):
        spread = [60 * (minute + place / len(texts)) for place in range(len(texts))]
        lines += [as_event(seconds, each) for seconds, each in zip(spread, texts, strict=True)]
    for place, data in SYNTHETIC.items():
        lines.insert(place, Line(lines[place].seconds, "message", data, key="a tester"))
    return lines


def minutes(text: str) -> Iterator[list[str]]:
    """The lines of each minute of the log, of quiet ones too. A line without a time is of the minute before it."""
    present = None
    texts: list[str] = []
    for each in text.removesuffix("\n").split("\n"):
        if timed := TIMED.match(each):
            minute = 60 * int(timed[1]) + int(timed[2])
            for _ in range(minute - present if present is not None else 0):
                yield texts
                texts = []
            present = minute
        texts.append(each)
    yield texts


def as_event(seconds: float, text: str) -> Line:
    if spoken := SPOKEN.fullmatch(text):
        return Line(seconds, "message", spoken[4], key=spoken[3])
    if presence := PRESENCE.match(text):
        return Line(seconds, "join" if presence[2] == "joined" else "leave", text, "latest", presence[1])
    return Line(seconds, "notice", text)


# --- Who publishes ---------------------------------------------------------------------------------------


class Publishers:
    """Several clients, each with speakers of its own, so that everybody's lines stay in order."""

    def __init__(self, url: str, lines: list[Line]) -> None:
        self.url = url
        self.retries = 0
        self.late = 0.0
        self._shares: list[list[Line]] = [[] for _ in range(PUBLISHERS)]
        for line in lines:
            self._shares[zlib.crc32(line.key.encode()) % PUBLISHERS].append(line)

    def start(self, begun: float) -> list[gevent.Greenlet]:
        return [gevent.spawn(self._publish_share, number, begun) for number in range(PUBLISHERS)]

    def assert_each_in_order(self) -> None:
        for share in self._shares:
            assert all(one.seq < next.seq for one, next in pairwise(share)), "a client's publishes changed places"

    def _publish_share(self, number: int, begun: float) -> None:
        for count, line in enumerate(self._shares[number]):
            due = begun + line.seconds / SPEED
            gevent.sleep(max(0.0, due - time.monotonic()))
            self.late = max(self.late, time.monotonic() - due)
            line.started = time.monotonic()
            line.id = self._publish(line, f"{number}/{count}")

    def _publish(self, line: Line, key: str) -> str:
        """Until it is acknowledged: whether a broken connection had taken the event with it is not known."""
        while True:
            try:
                return publish(self.url, headers={"Idempotency-Key": key}, **line.fields())
            except (ConnectionError, http.client.HTTPException):
                self.retries += 1


# --- Who reads -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Received:
    id: str
    event: str
    data: str
    at: float

    @property
    def seq(self) -> int:
        return int(self.id.rpartition("-")[2])


@dataclass
class Reader:
    """One reader from before the first line to the server's stop. A restless one hangs up now and then."""

    url: str
    number: int
    restless: bool
    envelope: bool
    received: list[Received] = field(default_factory=list)
    opened: int = 0
    hung_up: int = 0
    broken: int = 0
    ended: int = 0
    last_id: str = ""
    has_all: bool = False
    farewell: bool = False

    def __post_init__(self) -> None:
        self._chance = random.Random(self.number)

    def run(self) -> None:
        while not self.farewell:
            try:
                self._visit()
            except (ConnectionError, ProtocolError):  # its worker was killed before the head
                self.broken += 1
                gevent.sleep(RETRY_PAUSE)

    def _visit(self) -> None:
        with self._connect() as stream:
            self.opened += 1
            until = time.monotonic() + self._chance.uniform(*STAY_SECONDS) if self.restless else float("inf")
            if self._read(stream, until):
                return
            self.last_id = stream.last_event_id
            self.hung_up += 1
            if self._chance.random() < 0.5:
                stream.reset()
        gevent.sleep(self._chance.uniform(*AWAY_SECONDS))

    def _connect(self) -> Stream:
        first = None if self.last_id else "earliest"
        return Stream(self.url, TOPIC, last_event_id=self.last_id or None, query_last_event_id=first,
                      envelope=self.envelope, timeout=PATIENCE, wire_limit=0)

    def _read(self, stream: Stream, until: float) -> bool:
        """Reads until `until`, or to the end once it has all; whether the stream ended."""
        try:
            while self.has_all or time.monotonic() < until:
                self._take(stream.next(PATIENCE if self.has_all else max(0.0, min(PATIENCE, until - time.monotonic()))))
                self.last_id = stream.last_event_id
        except TimeoutError:
            assert self.restless, f"{stream!r}: silent for {PATIENCE} s"
            return False
        except EndOfStream:
            self.broken += not stream.clean_end
            self.ended += stream.clean_end
            self.farewell = self.has_all
            assert not (stream.clean_end and stream.reader.has_incomplete()), "a clean end cut a frame"
            return True
        return False

    def _take(self, message: Message) -> None:
        event, data = message.type, message.data
        if self.envelope:
            body = json.loads(data)
            assert (body["topic"], body["event"], body["id"]) == (TOPIC, event, message.last_event_id)
            data = re.sub(r"\r\n|\r", "\n", body["data"])
        self.received.append(Received(message.last_event_id, event, data, time.monotonic()))
        self.has_all = self.has_all or data == LAST


# --- What each must have ---------------------------------------------------------------------------------


class Oracle:
    """The log as it was acknowledged, in order of its ids."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = sorted(lines, key=lambda line: line.seq)
        self.by_id = {line.id: line for line in lines}
        assert len(self.by_id) == len(lines), "two lines were given one id"
        self._next_of_key: dict[str, Line] = {}
        newest: dict[str, Line] = {}
        for line in self.lines:
            if line.keep == "latest":
                if line.key in newest:
                    self._next_of_key[newest[line.key].id] = line
                newest[line.key] = line

    def check(self, reader: Reader) -> int:
        """Asserts that a reader has the log; returns how many superseded lines it was spared."""
        for got in reader.received:
            line = self.by_id.get(got.id)
            assert line is not None, f"reader {reader.number} has {got}, which nobody published"
            assert (got.event, got.data) == line.arrives_as, f"reader {reader.number}: {got} is not {line}"
        for one, next in pairwise(reader.received):
            assert one.seq < next.seq, f"reader {reader.number} has {next} after {one}"
        return self._check_missing(reader)

    def _check_missing(self, reader: Reader) -> int:
        """Nothing may be missing but a `latest` line that another one of its key had taken the place of when the reader
        was next sent anything after it."""
        seen = {got.id for got in reader.received}
        missing = [line for line in self.lines if line.id not in seen]
        for line in missing:
            successor = self._next_of_key.get(line.id)
            assert successor is not None, f"reader {reader.number} lost {line}"
            after = next(got for got in reader.received if got.seq > line.seq)
            assert after.at >= successor.started, f"reader {reader.number} lost {line}, which was the latest of its key"
        return len(missing)


def kill_now_and_then(server: Server, spread: Callable[[int], float]) -> int:
    """Kills the workers one after another, each time after the one before has been replaced; returns how many.

    One is spared, so that there are readers who were connected all the time.
    """
    queue = server.worker_pids()[1:]
    for count in range(KILLS):
        gevent.sleep(max(0.0, spread(count) - time.monotonic()))
        before = set(server.worker_pids())
        server.kill_worker(queue.pop(0))
        queue += eventually(lambda before=before: set(server.worker_pids()) - before, PATIENCE,
                            message="the master has not replaced a killed worker")
    return KILLS


def assert_refused(url: str, fields: dict[str, Any]) -> None:
    answer = request("POST", f"{url}/publish", json.dumps(fields), {"Content-Type": "application/json"})
    assert answer.status == 400, (fields, answer)
    assert answer.headers["content-type"] == "application/problem+json"


def replay(server: Server, lines: list[Line], readers: list[Reader]) -> tuple[Publishers, int]:
    """Publishes the log under kills, with the readers there from the begin until they have the last line."""
    reading = [gevent.spawn(reader.run) for reader in readers]
    eventually(lambda: all(reader.opened for reader in readers), PATIENCE, message="not all readers have opened")
    publishers = Publishers(server.url, lines)
    begun = time.monotonic()
    span = lines[-1].seconds / SPEED
    refusing = [gevent.spawn_later(span * part / len(REFUSED), assert_refused, server.url, fields)
                for part, fields in enumerate(REFUSED)]
    publishing = publishers.start(begun)
    kills = kill_now_and_then(server, lambda count: begun + span * (count + 0.5) / KILLS)
    gevent.joinall(publishing + refusing, raise_error=True)
    end = Line(lines[-1].seconds, "message", LAST, started=time.monotonic())
    end.id = publish(server.url, **end.fields())
    lines.append(end)
    eventually(lambda: all(reader.has_all or greenlet.ready() for reader, greenlet in zip(readers, reading, strict=True)),
               PATIENCE, message="not all readers have the last line")
    server.stop()
    gevent.joinall(reading, timeout=PATIENCE, raise_error=True)
    assert all(greenlet.ready() for greenlet in reading), "a stream has not ended with the server"
    return publishers, kills


@pytest.fixture
def log() -> str:
    if not LOG.exists():
        pytest.skip(f"the chat log is not at {LOG}")
    return LOG.read_text(encoding="utf-8", errors="strict")


def test_log_has_every_kind_of_line_and_its_minutes_are_spread(log: str) -> None:
    lines = chat(log)

    assert len(lines) == log.count("\n") + len(SYNTHETIC)
    kinds = {kind: sum(line.event == kind for line in lines) for kind in ("message", "join", "leave", "notice")}
    assert min(kinds.values()) > 20, kinds
    assert all(one.seconds <= next.seconds for one, next in pairwise(lines))
    assert 5000 < lines[-1].seconds < 7200


def test_readers_that_come_and_go_have_the_whole_chat_though_workers_are_killed(log: str, tmp_path: Path) -> None:
    lines = chat(log)
    began = time.monotonic()
    with Server(tmp_path, workers=WORKERS, env={"PUSHSVC_DRAIN_SECONDS": "2"}) as server:
        readers = [Reader(server.url, number, restless=number % 3 == 0, envelope=number % ENVELOPE_EVERY == 0)
                   for number in range(READERS)]
        publishers, kills = replay(server, lines, readers)

    publishers.assert_each_in_order()
    oracle = Oracle(lines)
    spared = {reader.number: oracle.check(reader) for reader in readers}
    steady = [reader for reader in readers if reader.opened == 1]
    assert steady, "nobody was connected all the time"
    assert all(reader.hung_up for reader in readers if reader.restless), "a restless reader never hung up"
    assert sum(reader.broken for reader in readers) >= KILLS, "killed workers had no readers"
    print(f"{len(lines)} events at {SPEED} times their speed, {len(readers)} readers ({len(steady)} connected all the "
          f"time), {sum(reader.opened for reader in readers) - len(readers)} reconnects "
          f"({sum(reader.hung_up for reader in readers)} hung up, {sum(reader.broken for reader in readers)} broken), "
          f"{kills} kills, {publishers.retries} publishes retried, publishers at most {publishers.late:.1f} s late, "
          f"superseded and not sent: {sum(spared.values())} ({sum(spared[reader.number] for reader in steady)} of them "
          f"to readers connected all the time), {time.monotonic() - began:.1f} s")
