"""A stream that comes back with any id of the log continues exactly, whatever is published meanwhile."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from tests.support.client import Stream, publish_lines, request
from tests.support.fire import Fire, Follower, Published, assert_exact, seq_of
from tests.support.reader import Message
from tests.support.server import Server
from tests.support.wait import eventually

TOPICS = [f"t{number}" for number in range(5)]
PUBLISHERS = 3
CLIENTS = 3
TIMEOUT = 120  # for one client's whole way; the machine may be busy

BROKERS = {
    "memory, one worker": {"workers": 1, "env": {"PUSHSVC_BROKER_URL": "memory:"}},
    "sqlite, three workers": {"workers": 3},
}


@contextlib.contextmanager
def server(directory: Path, broker: str, **settings: object) -> Iterator[Server]:
    about: dict[str, Any] = BROKERS[broker]
    env = {**about.get("env", {}), **{f"PUSHSVC_{name.upper()}": str(value) for name, value in settings.items()}}
    with Server(directory, workers=about["workers"], env={"PUSHSVC_COMEBACK_MS": "50", **env}) as server:
        yield server


def preload(url: str, count: int, size: int = 0) -> dict[int, Published]:
    """Publish a history, in batches; by sequence what was acknowledged."""
    events = [{"topics": random.sample(TOPICS, random.choice([1, 1, 2])), "data": f"before {number}" + "x" * size}
              for number in range(count)]
    step = max(1, 500_000 // (size + 1000))
    ids = [id for start in range(0, count, step) for id in publish_lines(url, events[start : start + step])]
    pairs = zip(ids, events, strict=True)
    return {seq_of(id): Published(id, tuple(event["topics"]), event["data"], "") for id, event in pairs}


class Resumes:
    """Clients that come back again and again at ids of the log; what they read is judged when all is acknowledged.

    read: (topics, the sequence that was asked for, the messages that came) of each time.
    """

    def __init__(self, url: str, fire: Fire) -> None:
        self.url = url
        self.fire = fire
        self.read: list[tuple[list[str], int, list[Message]]] = []

    def run(self, times: int) -> None:
        """So many times each of the clients. Switches."""
        jobs = [gevent.spawn(self._client, times) for _ in range(CLIENTS)]
        gevent.joinall(jobs, timeout=TIMEOUT, raise_error=True)
        assert all(job.ready() for job in jobs)

    def follow(self, client: Follower) -> list[Message]:
        """All that a client reads until it has left the replay behind. Switches."""
        client.upto(self.fire.newest, TIMEOUT)
        return client.upto(self.fire.newest + 20, TIMEOUT)

    def judge(self) -> None:
        """Exactly the events of their topics after the asked id, up to where they stopped."""
        for topics, after, messages in self.read:
            assert_exact(messages, self.fire.on(topics, after, seq_of(messages[-1].last_event_id)))

    def _client(self, times: int) -> None:
        for _ in range(times):
            topics = random.sample(TOPICS, random.randint(1, 3))
            after = random.choice(sorted(self.fire.acknowledged)[-random.choice([20, 500, 3000]) :])
            with Follower(self.url, topics, self.fire.acknowledged[after].id) as client:
                self.read.append((topics, after, self.follow(client)))


@pytest.mark.parametrize("broker", BROKERS)
def test_streams_that_come_back_at_random_ids_have_no_gap_and_no_double(tmp_path: Path, broker: str) -> None:
    with server(tmp_path, broker) as service:
        before = preload(service.url, 3000)
        with Fire(service.url, TOPICS, connections=PUBLISHERS) as fire:
            fire.acknowledged.update(before)
            resumes = Resumes(service.url, fire)
            resumes.run(30)
        resumes.judge()
        assert max(len(messages) for _, _, messages in resumes.read) > 500, "some replays have several pages"
        assert not fire.failed


@pytest.mark.parametrize("mailbox_events", [5, 1000], ids=["a mailbox that overflows", "one that does not"])
@pytest.mark.parametrize(("held", "size"), [(4, 900_000), (2000, 3000)], ids=["in its last page", "before"])
@pytest.mark.parametrize("broker", BROKERS)
def test_a_replay_that_stands_still_while_others_publish_is_exact(
        tmp_path: Path, broker: str, held: int, size: int, mailbox_events: int) -> None:
    """The kernel takes about 3 MB of a replay that nobody reads; a page of history has at most 1 MiB."""
    with server(tmp_path, broker, mailbox_events=mailbox_events) as service:
        before = preload(service.url, held, size)
        with Fire(service.url, TOPICS, connections=PUBLISHERS, pause=0.005) as fire:
            fire.acknowledged.update(before)
            resumes = Resumes(service.url, fire)
            with Follower(service.url, TOPICS, "earliest", receive_buffer=4096) as client:
                client.open()  # and read nothing: the replay stands still in the socket
                overtaken = fire.newest + 30
                eventually(lambda: fire.newest > overtaken, timeout=TIMEOUT)
                resumes.read.append((TOPICS, 0, resumes.follow(client)))
        resumes.judge()


@pytest.mark.parametrize("broker", BROKERS)
def test_earliest_brings_all_that_history_holds_and_goes_on_live(tmp_path: Path, broker: str) -> None:
    with server(tmp_path, broker) as service:
        before = preload(service.url, 1200)
        with Fire(service.url, TOPICS, connections=PUBLISHERS) as fire:
            fire.acknowledged.update(before)
            resumes = Resumes(service.url, fire)
            for _ in range(10):
                topics = random.sample(TOPICS, 2)
                with Follower(service.url, topics, "earliest") as client:
                    resumes.read.append((topics, 0, resumes.follow(client)))
        resumes.judge()


def test_an_id_is_good_on_every_worker_the_moment_it_is_answered(tmp_path: Path) -> None:
    with server(tmp_path, "sqlite, three workers") as service, \
            Fire(service.url, TOPICS, connections=PUBLISHERS) as fire:
        eventually(lambda: fire.newest)
        for _ in range(100):
            newest = fire.newest
            with Follower(service.url, TOPICS, fire.acknowledged[newest].id) as client:
                first = client.upto(newest + 1)[0]
            assert first.type != "gap"
            assert seq_of(first.last_event_id) == newest + 1


@pytest.mark.parametrize("broker", BROKERS)
def test_a_frozen_client_is_closed_as_slow_while_others_receive_and_resumes_with_everything(
        tmp_path: Path, broker: str) -> None:
    with server(tmp_path, broker, mailbox_events=50, mailbox_bytes=200_000) as service:
        fire = Fire(service.url, ["room"])  # for its books only
        with Follower(service.url, ["room"], receive_buffer=4096) as frozen, Follower(service.url, ["room"]) as healthy:
            frozen.open()
            healthy.open()
            for number in range(2000):
                ids = publish_lines(service.url, [{"topic": "room", "data": f"{number} {part}" + "x" * 20_000}
                                                  for part in range(5)])
                for part, id in enumerate(ids):
                    fire.acknowledged[seq_of(id)] = Published(id, ("room",), f"{number} {part}" + "x" * 20_000, "")
                healthy.upto(fire.newest)
                if closed_as_slow(service):
                    break
            assert eventually(lambda: closed_as_slow(service)) == 1
            assert healthy.connections == 1
            assert_exact(healthy.messages, fire.on(["room"]))
            assert_exact(frozen.upto(fire.newest), fire.on(["room"]))
            assert frozen.connections > 1


def closed_as_slow(service: Server) -> float:
    lines = request("GET", f"{service.url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith('pushsvc_evicted_total{reason="slow"}')]
    return sum(float(line.rpartition(" ")[2]) for line in found)


# --- under retention


def has_lost(url: str, before: dict[int, Published]) -> bool:
    """Whether retention has taken the first event."""
    first = before[min(before)]
    with Stream(url, first.topics, last_event_id=first.id.rpartition("-")[0] + "-0") as stream:
        return stream.next().type == "gap"


def judge_gaps(fire: Fire, topics: list[str], after: int, messages: list[Message]) -> int:
    """All that is missing lies within the gaps that were told, and each gap begins where the stream stood and ends at
    an event that retention took; the number of gaps."""
    expected = {seq_of(each.id): each for each in fire.on(topics, after, seq_of(messages[-1].last_event_id))}
    events = [message for message in messages if message.type != "gap"]
    seqs = [seq_of(event.last_event_id) for event in events]
    assert seqs == sorted(set(seqs)), "a double, or out of order"
    assert all(expected[seq].data == event.data for seq, event in zip(seqs, events, strict=True))
    missing = expected.keys() - set(seqs)
    stood, told = after, 0
    for message in messages:
        if message.type == "gap":
            gap = json.loads(message.data)
            assert gap["reason"] == "trimmed"
            assert seq_of(gap["from"]) == stood < seq_of(gap["to"])
            assert stood <= seq_of(message.last_event_id) <= seq_of(gap["to"])
            # An event of several topics may have left the history of one only: it comes by the other.
            assert seq_of(gap["to"]) in missing or len(expected[seq_of(gap["to"])].topics) > 1
            missing -= set(range(stood + 1, seq_of(gap["to"]) + 1))
            told += 1
        else:
            assert seq_of(message.last_event_id) > stood, "after the position that the gap gave"
        stood = seq_of(message.last_event_id)
    assert not missing, f"missing and not told: {sorted(missing)[:5]} of {len(expected)}"
    return told


@pytest.mark.parametrize("broker", BROKERS)
def test_what_retention_took_is_told_exactly_under_fire(tmp_path: Path, broker: str) -> None:
    with server(tmp_path, broker, history_events=300) as service:
        before = preload(service.url, 3000)
        with Fire(service.url, TOPICS, connections=PUBLISHERS) as fire:
            fire.acknowledged.update(before)
            resumes = Resumes(service.url, fire)
            eventually(lambda: has_lost(service.url, before), timeout=TIMEOUT)
            resumes.run(30)
        gaps = [judge_gaps(fire, *each) for each in resumes.read]
        assert max(gaps) >= 1, "retention had something to take"
        assert min(gaps) == 0, "and left something"


@pytest.mark.parametrize(("asked", "gaps"), [("id", 1), ("earliest", 0)])
def test_one_loss_is_told_once_however_many_pages_of_another_topic_follow(tmp_path: Path, asked: str, gaps: int) -> None:
    with server(tmp_path, "memory, one worker", history_events=1300, max_batch_events=2000) as service:
        kept = publish_lines(service.url, ({"topic": "b", "data": str(number)} for number in range(1200)))
        lost, *_ = publish_lines(service.url, ({"topic": "a", "data": str(number)} for number in range(1301)))
        last_event_id = kept[5] if asked == "id" else asked
        with Stream(service.url, ["a", "b"], last_event_id=last_event_id) as stream:
            messages = stream.take(gaps + (1194 if asked == "id" else 1200) + 1300)
        told = [json.loads(message.data) for message in messages if message.type == "gap"]
        assert told == [{"from": kept[5], "to": lost, "reason": "trimmed"}] * gaps
