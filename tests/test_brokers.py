"""The broker contract (pushsvc/brokers/base.py), sentence by sentence, over every broker; then what only some have."""

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.select
import pytest

from pushsvc.brokers import open_broker, sqlite_keeper
from pushsvc.brokers.doorbell import Doorbell
from pushsvc.brokers.sqlite_keeper import BITE, Keeper
from pushsvc.brokers.sqlite_log import FileLock, Log, lock_path
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft, Event
from pushsvc.position import Position
from pushsvc.settings import Settings
from tests.support.brokers import BROKERS, Open, Side
from tests.support.wait import eventually

LINES = ["", "\n", "\r", "\r\n", "\na\n", "a\r\rb\n\n", " leading and trailing ", "\ufeff", "a\x00b\x00", "\x00",
         "\u2028\x85\x0b"]
LETTERS = ["é", "日本語", "😀" * 1000, "\U0010ffff", "{\"json\": null}", "'\"--; DROP TABLE events", "x" * 900_000]
NAMES = ["a", "room 7", "user-7:*", "日本", "😀", "%_*?[a-z]", "'\"\\", "x" * 255]


@pytest.fixture(params=BROKERS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with BROKERS[request.param](tmp_path) as url:
        yield url


@pytest.fixture
def side(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens brokers over one log, each as a process of its own would; afterwards nothing of them may be left."""
    monkeypatch.setattr("pushsvc.brokers.sqlite.ROUND_SECONDS", 0.05)
    gevent.sleep(0)  # gevent's own descriptors are there before we count
    before = belongings()
    with contextlib.ExitStack() as stack:
        def open_side(**changes: Any) -> Side:
            opened = Side(url, **changes)
            stack.callback(opened.broker.close)
            return opened

        yield open_side
    eventually(lambda: belongings() <= before, interval=0.002, message="descriptors or threads are left behind")


@pytest.fixture
def fresh(side: Open) -> Side:
    return side()


def belongings() -> tuple[int, int]:
    """How many descriptors and native threads this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def draft(data: str = "x", topic: str = "a", **fields: Any) -> Draft:
    return Draft(fields.pop("topics", (topic,)), data, **fields)


def drafts(count: int, topic: str = "a", **fields: Any) -> list[Draft]:
    return [draft(f"{topic}{number}", topic, **fields) for number in range(count)]


def data(events: list[Event]) -> list[str]:
    return [event.data for event in events]


def seqs(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


# --- start and deliver


def test_reset_comes_first_with_the_head_and_then_every_event_once_and_in_order(fresh: Side) -> None:
    head = fresh.broker.head()
    for number in range(50):
        fresh.broker.append([draft(str(number))])
    assert data(fresh.heard(50)) == [str(number) for number in range(50)]
    assert fresh.calls[0] == head
    assert len(fresh.resets) == 1
    assert seqs(fresh.events) == list(range(head.seq + 1, head.seq + 51))


def test_what_many_publish_at_once_is_delivered_in_the_order_of_its_positions(fresh: Side) -> None:
    answers = [job.get() for job in [gevent.spawn(fresh.broker.append, drafts(size % 7 + 1)) for size in range(100)]]
    given = sorted(position.seq for positions in answers for position in positions)
    assert given == list(range(given[0], given[0] + len(given)))
    assert seqs(fresh.heard(len(given))) == given


def test_delivery_brings_what_no_history_holds_too(fresh: Side) -> None:
    fresh.broker.append([draft("1", keep="latest", key="k"), draft("2", keep="none"), draft("3", keep="latest", key="k")])
    assert data(fresh.heard(3)) == ["1", "2", "3"]


def test_an_event_is_delivered_with_all_its_fields(fresh: Side) -> None:
    asked = Draft(("a", "b"), "data", "typed", "latest", "key", 1234)
    before = gevent.get_hub().loop.now()
    position, = fresh.broker.append([asked])
    event, = fresh.heard(1)
    assert event == Event(position.seq, event.at, ("a", "b"), "typed", "data", "latest", "key", 1234)
    assert before - 60 < event.at < before + 60
    assert fresh.history("b") == [event]


# --- append


def test_a_batch_has_one_contiguous_stretch_and_positions_grow(fresh: Side) -> None:
    first = fresh.broker.append(drafts(5))
    second = fresh.broker.append(drafts(3))
    assert [position.seq for position in first + second] == list(range(first[0].seq, first[0].seq + 8))
    assert {position.epoch for position in first + second} == {fresh.broker.head().epoch}


def test_batches_published_at_once_do_not_mix(fresh: Side) -> None:
    jobs = [gevent.spawn(fresh.broker.append, drafts(40, str(number))) for number in range(10)]
    for number, positions in enumerate(job.get() for job in jobs):
        assert [event.seq for event in fresh.history(str(number))] == [position.seq for position in positions]
        assert positions[-1].seq == positions[0].seq + 39


def test_a_batch_that_fails_leaves_nothing_and_no_hole(fresh: Side) -> None:
    before, = fresh.broker.append([draft("before")])
    with pytest.raises((BrokerUnavailable, AttributeError)):
        fresh.broker.append([draft("1"), None, draft("3")])  # type: ignore[list-item]
    after, = fresh.broker.append([draft("after")])
    assert after.seq == before.seq + 1
    assert data(fresh.heard(2)) == data(fresh.history("a")) == ["before", "after"]


def test_an_empty_append_publishes_nothing(fresh: Side) -> None:
    head = fresh.broker.head()
    assert fresh.broker.append([]) == []
    assert fresh.broker.head() == head


@pytest.mark.parametrize("text", LINES + LETTERS, ids=lambda text: ascii(text[:12]))
def test_data_comes_back_as_it_was(fresh: Side, text: str) -> None:
    fresh.broker.append([draft(text)])
    assert data(fresh.heard(1)) == data(fresh.history("a")) == [text]


def test_names_are_only_names(fresh: Side) -> None:
    fresh.watch(*NAMES)
    for name in NAMES:
        fresh.broker.append([Draft((name,), name, name, "latest", name)])
    assert data(fresh.heard(len(NAMES))) == NAMES
    for name in NAMES:
        event, = fresh.history(name)
        assert (event.topics, event.event, event.key) == ((name,), name, name)


def test_retry_of_zero_is_not_no_retry(fresh: Side) -> None:
    fresh.broker.append([draft(retry=0), draft()])
    assert [event.retry for event in fresh.history("a")] == [0, None]


# --- head


def test_the_head_is_the_newest_position_whatever_became_of_its_event(fresh: Side) -> None:
    begin = fresh.broker.head()
    assert fresh.broker.append([draft(keep="none")]) == [fresh.broker.head()]
    assert fresh.broker.append(drafts(3))[-1] == fresh.broker.head() == Position(begin.epoch, begin.seq + 4)


def test_the_head_of_a_new_log_has_seen_nothing(fresh: Side) -> None:
    begin = fresh.broker.head()
    assert fresh.history("a") == []
    assert fresh.missing("a") == 0
    assert fresh.broker.append([draft()]) == [Position(begin.epoch, begin.seq + 1)]
    assert [event.seq for event in fresh.history("a")] == [begin.seq + 1]


# --- history


def test_history_is_by_topic_after_a_position(fresh: Side) -> None:
    positions = [fresh.broker.append([draft(str(number), "ab"[number % 2])])[0] for number in range(6)]
    assert data(fresh.history("a")) == ["0", "2", "4"]
    assert data(fresh.history("a", after=positions[0].seq)) == ["2", "4"]
    assert data(fresh.history("a", after=positions[1].seq)) == ["2", "4"]
    assert fresh.history("a", after=positions[5].seq) == []
    assert fresh.history("c") == []


def test_history_of_several_topics_is_in_order_and_brings_each_event_once(fresh: Side) -> None:
    fresh.broker.append([draft("1", topics=("a",)), draft("2", topics=("b", "a")), draft("3", topics=("c",)),
                         draft("4", topics=("a", "b", "c")), draft("5", topics=("b",))])
    assert data(fresh.history("a", "b")) == ["1", "2", "4", "5"]
    assert data(fresh.history("b", "a", "c", "none")) == ["1", "2", "3", "4", "5"]
    assert fresh.history("a", "b")[1].topics == ("b", "a")


def test_an_event_of_a_thousand_topics_is_in_all_of_them(fresh: Side) -> None:
    topics = tuple(f"user-{number}" for number in range(1000))
    fresh.broker.append([draft("all", topics=topics)])
    assert all(data(fresh.history(topic)) == ["all"] for topic in (topics[0], topics[500], topics[999]))
    assert data(fresh.history(*topics)) == ["all"]


@pytest.mark.parametrize(("held", "limit", "more"), [(0, 1, False), (1, 1, False), (2, 1, True), (5, 6, False),
                                                     (6, 6, False), (7, 6, True)])
def test_a_page_has_at_most_limit_events_and_says_whether_more_follow(
        fresh: Side, held: int, limit: int, more: bool) -> None:
    fresh.broker.append(drafts(held))
    page = fresh.broker.history(["a"], 0, limit)
    assert data(page.events) == [f"a{number}" for number in range(min(held, limit))]
    assert page.more is more


def test_pages_of_several_topics_join_without_gap_or_double(fresh: Side) -> None:
    names = [("a",), ("b",), ("a", "b"), ("c",)]
    fresh.broker.append([draft(str(number), topics=names[number % 4]) for number in range(100)])
    found: list[Event] = []
    while (page := fresh.broker.history(["b", "a"], found[-1].seq if found else 0, 7)).more:
        assert len(page.events) == 7
        found += page.events
    assert data(found + page.events) == [str(number) for number in range(100) if number % 4 != 3]


@pytest.mark.parametrize("text", ["x" * 300_000, "日" * 100_000, "😀" * 75_000], ids=["ascii", "cjk", "astral"])
def test_a_page_is_bounded_in_bytes(fresh: Side, text: str) -> None:
    fresh.broker.append([draft(text) for _ in range(10)])
    page = fresh.broker.history(["a"], 0, 500)
    assert page.more
    assert 1 <= sum(len(each.data.encode()) for each in page.events) <= 1 << 20
    assert len(fresh.history("a")) == 10


def test_an_event_larger_than_a_page_still_comes(fresh: Side) -> None:
    fresh.broker.append([draft("x" * 3_000_000), draft("y")])
    assert [len(each.data) for each in fresh.history("a")] == [3_000_000, 1]


# --- what an event asks to be kept


def test_keep_none_is_in_no_history(fresh: Side) -> None:
    fresh.broker.append([draft("1"), draft("2", keep="none"), draft("3", keep="none", key="k"), draft("4")])
    assert data(fresh.history("a")) == ["1", "4"]
    assert fresh.missing("a") == 0


def test_of_keep_latest_history_holds_the_newest_per_topic_and_key(fresh: Side) -> None:
    fresh.broker.append([draft("1", "a", keep="latest", key="k"), draft("2", "a", keep="latest", key="l"),
                         draft("3", "b", keep="latest", key="k"), draft("4", "a", keep="latest")])
    fresh.broker.append([draft("5", "a", keep="latest", key="k"), draft("6", "a", keep="latest")])
    assert data(fresh.history("a")) == ["2", "5", "6"]
    assert data(fresh.history("b")) == ["3"]
    assert fresh.missing("a", "b") == 0


def test_within_one_batch_too_the_newest_of_keep_latest_stays(fresh: Side) -> None:
    fresh.broker.append(drafts(600, keep="latest", key="k"))
    assert data(fresh.history("a")) == ["a599"]


def test_keep_latest_leaves_other_events_of_its_key_alone(fresh: Side) -> None:
    fresh.broker.append([draft("1", key="k"), draft("2", keep="latest", key="k"), draft("3", keep="none", key="k"),
                         draft("4", key="k")])
    assert data(fresh.history("a")) == ["1", "2", "4"]


def test_keep_latest_on_several_topics_goes_topic_by_topic(fresh: Side) -> None:
    fresh.broker.append([draft("1", topics=("a", "b", "c"), keep="latest", key="k")])
    fresh.broker.append([draft("2", topics=("b", "d"), keep="latest", key="k")])
    assert data(fresh.history("a")) == ["1"]
    assert data(fresh.history("b")) == ["2"]
    assert data(fresh.history("a", "b")) == ["1", "2"]
    fresh.broker.append([draft("3", topics=("a", "c"), keep="latest", key="k")])
    assert data(fresh.history("a", "b", "c", "d")) == ["2", "3"]


# --- retention


def test_a_topic_keeps_its_newest_events_and_tells_exactly_what_is_missing(side: Open) -> None:
    here = side(history_events=5)
    here.broker.append(drafts(3, "b"))
    positions = here.broker.append(drafts(8, "a"))
    trimmed = positions[2].seq
    eventually(lambda: here.missing("a") == trimmed)
    assert data(here.history("a")) == ["a3", "a4", "a5", "a6", "a7"]
    assert here.missing("a", after=trimmed - 1) == trimmed
    assert here.missing("a", after=trimmed) == 0
    assert here.missing("b") == here.missing("never") == 0
    assert here.missing("b", "a") == trimmed
    assert data(here.history("b")) == ["b0", "b1", "b2"]


def test_an_event_that_one_topic_lost_is_still_in_the_history_of_another(side: Open) -> None:
    here = side(history_events=2)
    position, = here.broker.append([draft("both", topics=("a", "b"))])
    here.broker.append(drafts(2, "a"))
    eventually(lambda: here.missing("a") == position.seq)
    assert data(here.history("a")) == ["a0", "a1"]
    assert data(here.history("b")) == ["both"]
    assert here.missing("b") == 0


def test_neither_superseded_nor_passing_events_count_as_missing_or_push_others_out(side: Open) -> None:
    here = side(history_events=3)
    here.broker.append([draft("1"), draft("2")])
    for number in range(20):
        here.broker.append([draft(str(number), keep="latest", key="k"), draft("typing", keep="none")])
    other = here.broker.append(drafts(5, "b"))
    eventually(lambda: here.missing("b") == other[1].seq)  # so the trimming had its turn
    assert data(here.history("a")) == ["1", "2", "19"]
    assert here.missing("a") == 0


def test_a_key_whose_latest_was_trimmed_starts_anew(side: Open) -> None:
    here = side(history_events=2)
    position, = here.broker.append([draft("old", keep="latest", key="k")])
    here.broker.append(drafts(2))
    eventually(lambda: here.missing("a") == position.seq)
    here.broker.append([draft("new", keep="latest", key="k")])
    eventually(lambda: data(here.history("a")) == ["a1", "new"])


def test_events_leave_at_their_age_without_anybody_publishing(side: Open) -> None:
    here = side(history_seconds=1)
    positions = here.broker.append([*drafts(3), draft("none", keep="none"), draft("l", "b", keep="latest")])
    eventually(lambda: here.missing("a") == positions[2].seq and here.missing("b") == positions[4].seq)
    assert here.history("a", "b") == []
    assert here.missing("a", after=positions[2].seq) == 0
    assert here.broker.head() == positions[4]


@pytest.mark.parametrize("url", ["memory", "sqlite"], indirect=True)  # Redis has its own bound, and then refuses
def test_the_oldest_events_leave_when_the_log_is_full(side: Open) -> None:
    most = 4 << 20
    here = side(history_bytes=most)
    positions = [here.broker.append([draft("x" * 100_000, f"t{number % 3}")])[0] for number in range(100)]
    eventually(lambda: sum(len(each.data) for each in here.history("t0", "t1", "t2")) <= most)
    held = seqs(here.history("t0", "t1", "t2"))
    assert held == [position.seq for position in positions[-len(held):]], "the newest stay, without a hole"
    assert len(held) >= 25, "no more goes than must"
    assert here.missing("t0", "t1", "t2") == held[0] - 1


# --- idempotency


def test_a_key_seen_before_is_answered_as_before_and_publishes_nothing(fresh: Side) -> None:
    first = fresh.broker.append([draft("1")], "key")
    assert fresh.broker.append([draft("2")], "key") == first
    assert fresh.broker.append([draft("3")], "other") != first
    assert fresh.broker.append([draft("4")]) != first
    assert data(fresh.heard(3)) == data(fresh.history("a")) == ["1", "3", "4"]


def test_a_batch_has_its_key_as_a_whole(fresh: Side) -> None:
    first = fresh.broker.append(drafts(5), "key")
    assert fresh.broker.append(drafts(5), "key") == first
    assert len(fresh.history("a")) == 5


def test_the_same_key_at_the_same_time_publishes_once(fresh: Side) -> None:
    jobs = [gevent.spawn(fresh.broker.append, drafts(2), f"key-{number % 3}") for number in range(60)]
    answers = [tuple(job.get()) for job in jobs]
    assert len(set(answers)) == 3
    assert all(answer == answers[number % 3] for number, answer in enumerate(answers))
    assert len(fresh.history("a")) == 6


def test_a_key_outlives_its_event(side: Open) -> None:
    here = side(history_events=1)
    first = here.broker.append([draft("1")], "key")
    here.broker.append([draft("2")])
    eventually(lambda: here.missing("a") == first[0].seq)
    assert here.broker.append([draft("3")], "key") == first


def test_after_the_window_a_key_publishes_again(side: Open) -> None:
    here = side(idempotency_seconds=1)
    first = here.broker.append([draft("1")], "key")
    for number in range(20):  # many others expire with it
        here.broker.append([draft("other", "b")], str(number))
    assert here.broker.append([draft("1")], "key") == first
    again = eventually(lambda: [each for each in here.broker.append([draft("2")], "key") if [each] != first])
    assert here.broker.append([draft("3")], "key") == again
    assert data(here.history("a")) == ["1", "2"]


# --- the rest of the contract


def test_check_passes_and_leaves_no_trace(fresh: Side) -> None:
    head = fresh.broker.head()
    fresh.broker.check()
    assert fresh.broker.head() == head
    assert fresh.events == []


def test_watching_topics_changes_nothing_of_what_is_promised(fresh: Side) -> None:
    fresh.broker.watch(["a", "b"])
    fresh.broker.unwatch(["b"])
    fresh.broker.append([draft("1")])
    fresh.broker.unwatch(["a"])
    assert data(fresh.heard(1)) == ["1"]


def test_depths_are_numbers_by_name_and_empty_queues_are_zero(fresh: Side) -> None:
    fresh.broker.append(drafts(10))
    fresh.heard(10)
    assert all(type(name) is str and depth == 0 for name, depth in fresh.broker.depths().items())


def test_a_closed_broker_is_unavailable(fresh: Side) -> None:
    fresh.broker.append([draft()])
    fresh.broker.close()
    fresh.broker.close()
    for call in (lambda: fresh.broker.append([draft()]), lambda: fresh.broker.append([], "key"), fresh.broker.head,
                 lambda: fresh.broker.history(["a"], 0, 1), fresh.broker.check):
        with pytest.raises(BrokerUnavailable, match="closed"):
            call()


def test_close_finishes_what_was_accepted(fresh: Side) -> None:
    jobs = [gevent.spawn(fresh.broker.append, drafts(50)) for _ in range(20)]
    gevent.sleep(0)  # all are under way
    fresh.broker.close()
    assert [len(job.get()) for job in jobs] == [50] * 20


def test_one_that_was_never_started_can_be_closed(url: str) -> None:
    broker = open_broker(Settings(broker_url=url))
    broker.close()
    broker.close()


# --- memory only


def test_a_memory_broker_forgets_with_its_process(tmp_path: Path) -> None:
    first = Side("memory:")
    first.broker.append([draft()])
    time.sleep(0.002)  # the epoch counts milliseconds
    second = Side("memory:")
    assert second.broker.head().seq == 0
    assert second.broker.head().epoch > first.broker.head().epoch


# --- sqlite only: several workers, one file

sqlite_only = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def rows(side: Side) -> list[str]:
    """The data of all that is in the file, held by a history or not."""
    with contextlib.closing(sqlite3.connect(side.broker.path)) as connection:  # type: ignore[attr-defined]
        return [text for text, in connection.execute("SELECT data FROM events ORDER BY seq")]


def doorbells(side: Side) -> Path:
    path: Path = side.broker.path  # type: ignore[attr-defined]
    return path.with_name(path.name + ".doorbells")


@sqlite_only
def test_two_workers_hear_each_other_in_one_order(side: Open) -> None:
    one, two = side(poll_seconds=60), side(poll_seconds=60)
    jobs = [gevent.spawn(each.broker.append, drafts(number % 5 + 1, topic)) for number in range(50)
            for each, topic in ((one, "one"), (two, "two"))]
    positions = sorted(position for job in jobs for position in job.get())
    assert seqs(one.heard(len(positions))) == [position.seq for position in positions]
    assert two.heard(len(positions)) == one.events
    assert len(one.resets) == len(two.resets) == 1


@sqlite_only
def test_the_head_knows_at_once_what_another_worker_acknowledged(side: Open) -> None:
    one, two = side(), side()
    for _ in range(100):
        two.broker.head()
        position, = one.broker.append([draft()])
        assert two.broker.head() == position


@sqlite_only
def test_a_key_is_answered_by_every_worker(side: Open) -> None:
    one, two = side(), side()
    first = one.broker.append(drafts(3), "key")
    assert two.broker.append(drafts(3), "key") == first


@sqlite_only
def test_passing_events_reach_the_other_worker_and_are_swept_later(side: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_keeper, "PASSING_SECONDS", 1.0)
    one, two = side(), side()
    passing = ["none", "old"]
    one.broker.append([draft("none", keep="none"), draft("old", keep="latest"), draft("new", keep="latest")])
    one.broker.append([draft("kept")])
    assert data(two.heard(4)) == [*passing, "new", "kept"]
    assert rows(one) == [*passing, "new", "kept"], "they stay a while for readers that are behind"
    eventually(lambda: rows(one) == ["new", "kept"])
    assert two.missing("a") == 0


@sqlite_only
def test_a_lost_doorbell_costs_a_poll_interval_and_is_hung_up_again(side: Open) -> None:
    one, two = side(poll_seconds=0.5), side(poll_seconds=0.5)
    one.broker.append([draft("1")])
    two.heard(1)
    hung = set(os.listdir(doorbells(one)))
    for name in hung:
        os.unlink(doorbells(one) / name)
    one.broker.append([draft("2")])
    assert data(two.heard(2)) == ["1", "2"]
    assert eventually(lambda: len(os.listdir(doorbells(one))) == 2)
    assert len(one.resets) == len(two.resets) == 1


@sqlite_only
def test_a_doorbell_wakes_who_would_poll_only_in_a_minute(side: Open) -> None:
    one, two = side(poll_seconds=60), side(poll_seconds=60)
    for number in range(5):
        (one, two)[number % 2].broker.append([draft(str(number))])
        assert len(one.heard(number + 1)) == len(two.heard(number + 1))


@sqlite_only
def test_a_reader_that_retention_overtook_is_told_by_a_reset(side: Open) -> None:
    one = side(history_events=5)
    others = set(os.listdir(doorbells(one)))
    two = side(history_events=5, poll_seconds=60)
    one.broker.append([draft("seen")])
    two.heard(1)
    for name in set(os.listdir(doorbells(one))) - others:
        os.unlink(doorbells(one) / name)  # now nothing wakes it but its own publishes
    positions = one.broker.append(drafts(20))
    eventually(lambda: one.missing("a") == positions[14].seq)
    assert two.calls[1:] == [two.events]
    last, = two.broker.append([draft("last", "b")])
    assert data(two.heard(7)) == ["seen", *(f"a{number}" for number in range(15, 20)), "last"]
    assert two.resets[1:] == [Position(last.epoch, positions[14].seq)]
    assert two.calls.index(two.resets[1]) == 2, "before what follows"


@sqlite_only
def test_a_swept_event_is_no_reason_for_a_reset(side: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_keeper, "PASSING_SECONDS", 0.0)
    here = side()
    here.broker.append([draft("1"), draft("passing", keep="none"), draft("2")])
    eventually(lambda: rows(here) == ["1", "2"])
    late = side()
    late.broker._last = Position(late.broker.head().epoch, 1)  # type: ignore[attr-defined]
    here.broker.append([draft("3")])
    assert data(late.heard(2)) == ["2", "3"]
    assert len(late.resets) == 1


@sqlite_only
def test_the_log_outlives_its_processes(side: Open) -> None:
    first = side()
    positions = first.broker.append([draft("1"), draft("2", keep="none"), draft("3", topics=("a", "b"))], "key")
    first.broker.close()
    second = side()
    assert second.calls == [positions[-1]], "it begins at the head, and hands over nothing old"
    assert data(second.history("a")) == ["1", "3"]
    assert second.broker.append([draft("again")], "key") == positions
    assert second.broker.append([draft("4")]) == [Position(positions[0].epoch, positions[-1].seq + 1)]


@sqlite_only
def test_sequences_go_on_although_the_newest_events_are_gone(side: Open) -> None:
    first = side(history_seconds=1)
    position, = first.broker.append([draft()])
    eventually(lambda: rows(first) == [])
    first.broker.close()
    assert side().broker.append([draft()])[0].seq == position.seq + 1


@sqlite_only
def test_a_deleted_log_begins_a_new_epoch_for_all_workers(side: Open) -> None:
    one, two = side(poll_seconds=0.1), side(poll_seconds=0.1)
    old = one.broker.append([draft("old")])[0]
    two.heard(1)
    os.unlink(one.broker.path)  # type: ignore[attr-defined]
    eventually(lambda: len(one.resets) == len(two.resets) == 2)
    assert one.resets[1] == two.resets[1] == Position(one.broker.head().epoch, 0)
    assert one.resets[1].epoch > old.epoch
    assert one.broker.append([draft("1")])[0].seq == 1
    assert two.broker.append([draft("2")])[0].seq == 2
    assert data(one.heard(3)) == data(two.heard(3)) == ["old", "1", "2"]
    assert one.history("a") == two.history("a") == one.events[1:]


@pytest.mark.parametrize(("place", "path"), [
    ("{}/a.db", "a.db"), ("//{}/a.db", "a.db"), ("{}/", "pushsvc.db"), ("//{}", "pushsvc.db"), ("{}", "pushsvc.db")])
def test_a_log_is_named_by_its_path_or_its_folder(tmp_path: Path, place: str, path: str) -> None:
    broker = open_broker(Settings(broker_url="sqlite:" + place.format(tmp_path)))
    assert broker.path == tmp_path / path  # type: ignore[attr-defined]


# --- the keeper


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with contextlib.closing(Log(tmp_path / "push.db", 1000.0)) as log:
        yield log


@pytest.fixture
def keeper(log: Log) -> Iterator[Keeper]:
    with contextlib.closing(Keeper(log.path, Settings(), lambda seconds: None)) as keeper:
        yield keeper


def count(log: Log, table: str) -> int:
    return int(log.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def add(log: Log, events: list[Draft], now: float) -> None:
    with log.transaction():
        log.add(events, now)


def test_one_round_sweeps_all_passing_events_however_many(log: Log, keeper: Keeper) -> None:
    add(log, drafts(50, "kept"), 1000.0)
    add(log, drafts(20 * BITE, keep="none"), 1000.0)
    add(log, [draft(topic=f"t{number % 10}", keep="latest") for number in range(20 * BITE)], 1000.0)
    keeper.round(1005.0)
    assert count(log, "events") == 50 + 40 * BITE
    keeper.round(1011.0)
    assert count(log, "events") == count(log, "history") == 60


def test_superseded_events_behind_many_that_are_held_are_swept_in_a_few_rounds(log: Log, keeper: Keeper) -> None:
    add(log, [draft(topic=f"t{number}", keep="latest") for number in range(25 * BITE)], 1000.0)
    add(log, drafts(10, keep="latest"), 1000.0)
    for _ in range(2):
        keeper.round(1011.0)
    assert count(log, "events") == count(log, "history") == 25 * BITE + 1


def test_expired_keys_go_however_many(log: Log, keeper: Keeper) -> None:
    with log.transaction():
        for number in range(3 * BITE + 1):
            log.remember(str(number), log.add([], 0), 1000.0 if number else 90_000.0)
    keeper.round(90_000.0)
    assert count(log, "answers") == 1


def test_only_one_process_keeps_and_another_takes_over(log: Log, keeper: Keeper, tmp_path: Path) -> None:
    with contextlib.closing(Keeper(log.path, Settings(), lambda seconds: None)) as other:
        keeper.round(1000.0)
        add(log, drafts(1, keep="none"), 1000.0)
        other.round(2000.0)
        assert count(log, "events") == 1
        keeper.close()
        other.round(2000.0)
        assert count(log, "events") == 0


def test_a_long_reader_of_a_large_wal_does_not_hold_up_publishes(log: Log, keeper: Keeper,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_keeper, "WAL_BYTES", 1 << 20)
    with contextlib.closing(sqlite3.connect(log.path, isolation_level=None)) as reader:
        add(log, [draft("x" * 1000)], 1000.0)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        add(log, drafts(1000) + [draft("x" * 1_000_000) for _ in range(3)], 1000.0)
        begun = time.monotonic()
        keeper.round(1000.0)
        assert time.monotonic() - begun < 3, "a busy timeout of the log is 5 s"
        reader.execute("COMMIT")
    keeper.round(1000.0)
    assert log.wal_bytes() == 0


def test_counts_of_topics_are_bounded_and_still_right(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_keeper, "MOST_COUNTS", 10)
    with contextlib.closing(Keeper(log.path, Settings(history_events=4), lambda seconds: None)) as keeper:
        for _ in range(9):
            add(log, [draft(topic=f"t{number}") for number in range(30)], 1000.0)
            keeper.round(1000.0)
        assert len(keeper._counts) <= 30
    assert count(log, "history") == count(log, "events") == 30 * 4


# --- locks and doorbells


def test_a_deleted_lock_is_taken_where_everybody_else_takes_it(tmp_path: Path) -> None:
    path = lock_path(tmp_path / "folder" / "push.db")
    with contextlib.closing(FileLock(path)) as old, contextlib.closing(FileLock(path)) as new:
        with old:
            pass
        path.unlink()
        path.parent.rmdir()
        with new:
            assert not old.try_take()
        assert old.try_take()
        assert not new.try_take()


def test_a_doorbell_rings_at_all_others_and_clears_away_the_dead(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)  # a Unix socket's path has at most 107 bytes
    with contextlib.ExitStack() as stack:
        bells = [stack.enter_context(contextlib.closing(Doorbell(folder))) for _ in range(3)]
        dead = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.chdir(folder):
            dead.bind("1.3.sock")
        dead.close()
        bells[0].ring()
        assert [len(select_readable(bell)) for bell in bells] == [0, 1, 1]
        bells[1].answer()
        assert [len(select_readable(bell)) for bell in bells] == [0, 0, 1]
        assert len(os.listdir(folder)) == 3
    assert os.listdir(folder) == []


def select_readable(bell: Doorbell) -> list[int]:
    return gevent.select.select([bell.fileno()], [], [], 0)[0]


def test_a_doorbell_that_nobody_answers_holds_up_nobody(tmp_path: Path) -> None:
    with contextlib.closing(Doorbell(tmp_path)) as one, contextlib.closing(Doorbell(tmp_path)) as deaf:
        for _ in range(10_000):
            one.ring()
        deaf.answer()
        assert select_readable(deaf) == []
