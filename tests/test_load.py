"""Load tests with the shape of real traffic: what a shape keeps, what a replay detects, when ramp and dark test stop."""

import fcntl
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from math import inf
from pathlib import Path
from posix import close as close_descriptor  # gevent's waits for its loop
from socket import MSG_PEEK, SHUT_RDWR
from typing import Any
from unittest.mock import MagicMock

import gevent
import pytest
from gevent.lock import Semaphore
from gevent.server import StreamServer
from gevent.socket import socket as Socket

from pushsvc import __version__
from tests.support.client import Stream as Client
from tests.support.client import request
from tests.support.programs import missing, program
from tests.support.server import ROOT, Server
from tests.support.wait import eventually
from tests.test_access import SECRET, token
from tests.test_console import start_browser  # noqa: F401

sys.path += [str(ROOT / "ops"), str(ROOT / "ops" / "bench")]

import probe
from build import NCHAN_MODULE
from load.cli import main as command_line
from load.cli import replay_text, told_value
from load.dark import Dark, OrderError, Site
from load.dark import Test as DarkTest
from load.dark import told as dark_told
from load.figures import differences, figures
from load.metrics import version_said
from load.ramp import Climb, Usage, broken, limits_of, told
from load.readers import Readers, places_of
from load.recording import read_recording
from load.report import page
from load.shape import Event, Shape, ShapeError, Stream, expanded, read_shape, write_shape
from load.table import read_table
from load.targets import FORMS
from load.verify import Book, Tally, Track, behind
from load.wire import data_of, read
from swarm import Target, authority
from terminal import Progress, bar

LOAD = [sys.executable, str(ROOT / "ops" / "load")]
SHAPE = ROOT / "ops/load/shapes/ubuntu-irc-2006-06-01.jsonl"
SHARED = ROOT.parent / "shared" / "traffic"
TIMEOUT = 60
HEAD = "seconds,kind,who,bytes\n"


def load(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LOAD, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT)


# --- Shapes ----------------------------------------------------------------------------------------------

TABLES = {
    "who joins is there until it leaves": ("1,join,ann,0\n3,leave,ann,0\n4,message,bob,5\n", [(0, None, 0), (1, 3, 0)]),
    "who speaks first was there": ("2,message,ann,5\n", [(0, None, 0)]),
    "who leaves first was there": ("2,leave,ann,0\n3,message,bob,1\n", [(0, 2, 0), (0, None, 0)]),
    "a join of who is there is a reconnect": ("1,join,ann,0\n3,join,ann,0\n", [(1, 3, 0), (3, None, 1)]),
    "who comes back resumes": ("1,join,ann,0\n2,leave,ann,0\n3,join,ann,0\n", [(1, 2, 0), (3, None, 1)]),
    "who speaks after it left is back": ("1,leave,ann,0\n2,message,ann,9\n", [(0, 1, 0), (2, None, 1)]),
    "nothing": ("", []),
}


@pytest.mark.parametrize(("text", "expected"), TABLES.values(), ids=TABLES)
def test_table_of_a_chat_becomes_streams(
    tmp_path: Path, text: str, expected: list[tuple[float, float | None, bool]]
) -> None:
    (tmp_path / "table.csv").write_text(HEAD + text)

    shape = read_table(tmp_path / "table.csv")

    assert sorted([(each.opened, each.closed or 0, each.resumed) for each in shape.streams]) == sorted(
        [(opened, closed or 0, resumed) for opened, closed, resumed in expected]
    )


def test_event_of_a_table_is_for_all_who_are_there(tmp_path: Path) -> None:
    text = "1,message,ann,7\n2,join,bob,0\n3,message,bob,8\n4,leave,ann,0\n5,message,bob,9\n"
    (tmp_path / "table.csv").write_text(HEAD + text)

    shape = read_table(tmp_path / "table.csv")

    assert [(each.at, each.bytes, each.fan_out) for each in shape.events] == [(1, 7, 1), (3, 8, 2), (5, 9, 1)]


BAD_TABLES = {
    "another column": ("a,b\n1,2\n", "columns"),
    "a word for a time": (HEAD + "x,join,ann,0\n", "line 2"),
    "a time that goes back": (HEAD + "2,join,ann,0\n1,join,bob,0\n", "line 3"),
    "another kind": (HEAD + "1,nick,ann,0\n", "line 2"),
    "a line cut off": (HEAD + "1,join\n", "line 2"),
    "a value of megabytes": (HEAD + "1,join," + "a" * 200_000, "is no CSV: field larger"),
    "more bytes than any event": (HEAD + "1,message,ann,99999999999999\n", "line 2: bytes are 67108864 at most"),
    "nobody": (HEAD + "1,join,,0\n", "line 2"),
}


@pytest.mark.parametrize(("text", "said"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "table.csv").write_text(text)

    with pytest.raises(ShapeError, match=said):
        read_table(tmp_path / "table.csv")


def test_shape_has_numbers_only_and_no_identity(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(HEAD + "".join(f"{at},join,person-{at},0\n" for at in range(50)))

    assert load("import", tmp_path / "table.csv", "-o", tmp_path / "one").returncode == 0
    assert load("import", tmp_path / "table.csv", "-o", tmp_path / "two").returncode == 0

    head, *rows = (tmp_path / "one").read_text().splitlines()
    clients = [[stream.client for stream in read_shape(tmp_path / name).streams] for name in ("one", "two")]
    assert json.loads(head) == {"shape": 1, "seconds": 49.0, "source": "table"}
    assert "person" not in (tmp_path / "one").read_text()
    assert all(re.fullmatch(r'\["open",[\d.]+,\d+,\d+,\[1\],0\]', row) for row in rows)
    assert sorted(clients[0]) == list(range(1, 51))
    assert clients[0] != clients[1], "the numbers follow the order of the names"


@pytest.mark.parametrize("name", ["2006-06-01", "2007-06-04", "2008-04-27"])
def test_real_chat_becomes_a_shape_with_all_its_events(name: str, tmp_path: Path) -> None:
    table = SHARED / f"ubuntu-irc-{name}.csv"
    if not table.exists():
        pytest.skip(f"the table is not at {table}")

    shape = read_table(table)
    write_shape(tmp_path / "shape", shape)

    text = table.read_text()
    assert len(shape.events) == text.count(",message,")
    assert len({stream.client for stream in shape.streams}) == len(set(re.findall(r",(u\d+),", text)))
    assert figures(read_shape(tmp_path / "shape")) == figures(shape)
    assert not re.search(r"u\d", (tmp_path / "shape").read_text())


OPEN, EVENT = ["open", 1.0, 1, 1, [1], 0], ["event", 2.0, [1], 5, 0, "all", 0, 1]
BAD_ROWS = {
    "nested without end": ("[" * 100_000, ": maximum recursion depth"),
    "a time beyond all": (json.dumps([*OPEN[:1], 10**400, *OPEN[2:]]), ": at is a number of 0 or more, not 1000"),
    "cut off": ('["open", 1.0, 1', ", column 16: no JSON"),
    "empty": ("", ", column 1: no JSON"),
    "no array": ('{"open": 1}', ": it is open, close, event: an array"),
    "another word": ('["opened", 1]', ": it is open, close, event: an array"),
    "too short": (json.dumps(EVENT[:-1]), ": `event` is followed by at, topics, bytes, type, keep, key, fan_out"),
    "a word for a time": (json.dumps([*OPEN[:1], "x", *OPEN[2:]]), ': at is a number of 0 or more, not "x"'),
    "no time": (json.dumps([*OPEN[:1], float("nan"), *OPEN[2:]]), ": at is a number of 0 or more, not NaN"),
    "no topic": (json.dumps([*OPEN[:4], [], 0]), ": topics is an array of one whole number or more, not []"),
    "a size below 0": (json.dumps([*EVENT[:3], -5, *EVENT[4:]]), ": bytes is a whole number of 0 to 67108864, not -5"),
    "a size beyond all": (json.dumps([*EVENT[:3], 99999999999999, *EVENT[4:]]),
                          ": bytes is a whole number of 0 to 67108864, not 99999999999999"),
    "before the line above": (json.dumps(["event", 0.5, *EVENT[2:]]), ": it is at 0.5 s, before the line above, at 1 s"),
    "after the end": (json.dumps(["event", 3.5, *EVENT[2:]]), ": it is at 3.5 s, after the 3 s that the shape takes"),
    "opened twice": (json.dumps(["open", 2.0, *OPEN[2:]]), ": stream 1 is opened a second time"),
    "ended and never opened": ('["close", 2.0, 2, ""]', ": stream 2 ends, and is not open"),
    "another keep": (json.dumps([*EVENT[:5], "some", *EVENT[6:]]), ': keep is all, latest, none, not "some"'),
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_damaged_shape_is_refused_with_its_line(row: str, said: str, tmp_path: Path) -> None:
    rows = ['{"shape": 1, "seconds": 3.0, "source": "x"}', json.dumps(OPEN), row, json.dumps(EVENT)]
    (tmp_path / "shape").write_text("\n".join(rows) + "\n")

    with pytest.raises(ShapeError, match=re.escape(f"{tmp_path}/shape, line 3{said}")):
        read_shape(tmp_path / "shape")


def test_stream_ends_once_and_is_not_opened_again(tmp_path: Path) -> None:
    head, end = '{"shape": 1, "seconds": 3.0, "source": "x"}', '["close", 1.0, 1, ""]'

    for row, said in (end, "ends, and is not open"), (json.dumps(OPEN), "is opened a second time"):
        (tmp_path / "shape").write_text("\n".join([head, json.dumps(OPEN), end, row]) + "\n")
        with pytest.raises(ShapeError, match=f"line 4: stream 1 {said}"):
            read_shape(tmp_path / "shape")


@pytest.mark.parametrize(("shape", "said"), [
    (Shape(1.0, (Stream(0.0, None, 1, (1,)),), ()), "of its 0 events none is for one of its 1 streams"),
    (Shape(1.0, (), (Event(0.5, (1,), 10),)), "of its 1 events none is for one of its 0 streams"),
    (Shape(1.0, (Stream(0.0, None, 1, (1,)),), (Event(0.5, (2,), 10),)), "of its 1 events none is for one of its 1"),
], ids=["no events", "no streams", "other topics"])
def test_shape_that_could_verify_nothing_is_not_replayed(shape: Shape, said: str, tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", shape)

    done = load("replay", tmp_path / "shape")

    assert done.returncode == 2
    assert done.stderr.startswith(f"load: {tmp_path}/shape: nothing to replay: {said}")


@pytest.mark.parametrize("head", ["", "[]", '{"shape": 2}', '{"shape": 1, "source": "x"}',
                                  '{"shape": 1, "seconds": "3", "source": "x"}'], ids=range(5))
def test_file_that_does_not_begin_as_a_shape_is_refused_with_its_first_line(head: str, tmp_path: Path) -> None:
    (tmp_path / "shape").write_text(head + "\n")

    with pytest.raises(ShapeError, match=r"shape, line 1[:,] "):
        read_shape(tmp_path / "shape")


def test_shape_that_comes_with_the_project_is_one() -> None:
    [path] = (ROOT / "ops" / "load" / "shapes").iterdir()

    assert len(read_shape(path).events) == 1721


SMALL = Shape(10.0, (Stream(0.0, 5.0, 1, (1,)), Stream(2.0, None, 2, (1, 2), True)),
              (Event(1.0, (1,), 10, fan_out=1), Event(3.0, (1, 2), 20, 1, "latest", 3, 2)))


def test_copies_are_others_at_other_times_and_faster() -> None:
    shape = expanded(SMALL, times=2, speed=10, spread=0.5)

    assert shape.seconds == pytest.approx(1.25)
    assert [each.opened for each in shape.streams] == pytest.approx([0.0, 0.2, 0.25, 0.45])
    assert [each.client for each in shape.streams] == [1, 2, 3, 4]
    assert [each.topics for each in shape.streams] == [(1,), (1, 2), (3,), (3, 4)]
    assert [(each.topics, each.key) for each in shape.events] == [((1,), 0), ((1, 2), 3), ((3,), 0), ((3, 4), 6)]


def test_shapes_are_alike_within_a_tolerance_and_the_figure_that_is_not_is_named() -> None:
    twice = expanded(SMALL, times=2, spread=0)

    assert all(each.alike for each in differences(SMALL, SMALL, 0.0))
    assert "streams_per_second" in [each.name for each in differences(SMALL, twice, 0.1) if not each.alike]


def traffic(streams: int, events: int, resumed: int = 0, lifetime: float = 5.0, size: int = 100) -> Shape:
    """In 1,000 s, evenly."""
    return Shape(1000.0, tuple(Stream(float(number), number + lifetime, number, (1,), number < resumed)
                               for number in range(streams)),
                 tuple(Event(number * 1000 / events, (1,), size, fan_out=1) for number in range(events)))


APART = {
    "a tenth": (traffic(100, 100), traffic(91, 91), "events_per_second", "tolerance"),
    "more than a tenth": (traffic(100, 100), traffic(100, 85), "events_per_second", ""),
    "one event of few": (traffic(100, 3), traffic(100, 2), "events_per_second", "slack"),
    "two events of few": (traffic(100, 4), traffic(100, 2), "events_per_second", ""),
    "45 events and one": (traffic(100, 45), traffic(100, 1), "events_per_second", ""),
    "a short lifetime": (traffic(9, 9, lifetime=0.5), traffic(9, 9, lifetime=0.1), "lifetime_p50_s", ""),
    "a lifetime and a moment": (traffic(9, 9, lifetime=0.15), traffic(9, 9, lifetime=0.1), "lifetime_p50_s", "slack"),
    "two of a hundred resumed": (traffic(100, 9, 2), traffic(100, 9), "resumed_share", ""),
    "one of fifty resumed": (traffic(50, 9, 1), traffic(50, 9), "resumed_share", ""),
    "one of two hundred resumed": (traffic(200, 9, 1), traffic(200, 9), "resumed_share", "slack"),
    "a byte": (traffic(9, 9, size=2), traffic(9, 9, size=1), "bytes_mean", "slack"),
    "two bytes": (traffic(9, 9, size=3), traffic(9, 9, size=1), "bytes_mean", ""),
}


@pytest.mark.parametrize(("first", "second", "figure", "by"), APART.values(), ids=APART)
def test_figure_is_alike_by_the_tolerance_or_by_a_small_slack(first: Shape, second: Shape, figure: str, by: str) -> None:
    [found] = [each for each in differences(first, second, 0.1) if each.name == figure]

    assert (found.by, found.alike) == (by, bool(by))


def test_comparison_says_for_each_figure_why_it_is_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shape(tmp_path / "a", traffic(100, 3))
    write_shape(tmp_path / "b", traffic(100, 2, size=200))

    assert command_line(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1

    said = {line.split()[0]: line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()}
    assert said["peak_streams"] == "alike, within 0.1"
    assert said["events_per_second"] == "alike, within its slack"
    assert said["bytes_mean"] == "DIFFERENT"


def recorded(folder: Path, name: str, *rows: list[Any], end: str = "closed", since: float = 100.0,
             until: float = 109.0) -> None:
    lines = [["shape", 1, since], *rows, *([["end", until, end]] if end else [])]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_recordings_of_workers_become_one_shape(tmp_path: Path) -> None:
    recorded(tmp_path, "1.jsonl", ["open", 101.0, 1, "aa", ["t1"], 0], ["event", 102.0, 7, ["t1"], 5, "", "all", "", 1],
             ["close", 103.0, 1, "gone"])
    recorded(tmp_path, "2.jsonl", ["open", 101.5, 1, "aa", ["t1", "t2"], 1],
             ["event", 102.0, 7, ["t1"], 5, "", "all", "", 1], ["event", 104.0, 8, ["t2"], 6, "ff", "latest", "cc", 1])

    shape = read_recording(tmp_path)

    first, second = shape.streams
    assert (first.opened, first.closed, first.reason, first.resumed) == (1.0, 3.0, "gone", False)
    assert (second.opened, second.closed, second.resumed, len(second.topics)) == (1.5, None, True, 2)
    assert first.client == second.client
    assert first.topics[0] == second.topics[0]
    events = [(each.at, each.bytes, each.fan_out, each.keep) for each in shape.events]
    assert events == [(2, 5, 2, "all"), (4, 6, 1, "latest")]
    assert [bool(each.kind and each.key) for each in shape.events] == [False, True]


def test_recording_that_was_full_ends_the_shape_there_and_a_killed_worker_ends_its_streams(tmp_path: Path) -> None:
    recorded(tmp_path, "1.jsonl", ["open", 101.0, 1, "aa", ["t1"], 0], end="full", until=105.0)
    recorded(tmp_path, "2.jsonl", ["open", 101.0, 1, "bb", ["t1"], 0], ["open", 103.0, 2, "cc", ["t1"], 0], end="")
    with (tmp_path / "2.jsonl").open("a") as file:
        file.write('["open", 104.0, 3, "d')

    shape = read_recording(tmp_path)

    assert shape.seconds == 5.0
    assert [(each.opened, each.closed) for each in shape.streams] == [(1.0, None), (1.0, 3.0), (3.0, 3.0)]


def test_recordings_of_two_runs_are_refused_and_those_of_a_worker_and_its_successor_joined(tmp_path: Path) -> None:
    recorded(tmp_path, "1.jsonl", ["open", 101.0, 1, "aa", ["t1"], 0])
    recorded(tmp_path, "2.jsonl", ["open", 121.0, 1, "aa", ["t2"], 0], since=120.0, until=129.0)
    assert len(read_recording(tmp_path).streams) == 2

    recorded(tmp_path, "3.jsonl", ["open", 131.0, 1, "bb", ["t3"], 0], since=130.0, until=139.0)
    recorded(tmp_path, "4.jsonl", ["event", 132.0, 7, ["t3"], 5, "", "all", "", 1], since=130.1, until=139.1)
    done = load("record", tmp_path, "-o", tmp_path / "shape")

    assert done.returncode == 2
    assert done.stderr.startswith(f"load: {tmp_path}/3.jsonl is of another run than the files before it")


def test_damaged_recording_is_refused_with_its_line(tmp_path: Path) -> None:
    recorded(tmp_path, "1.jsonl", ["open", 101.0, 1, "aa", ["t1"], 0], ["close"])

    with pytest.raises(ShapeError, match=re.escape(f"{tmp_path}/1.jsonl, line 3: this is none of open, ")):
        read_recording(tmp_path)


# --- Reading and verifying -------------------------------------------------------------------------------


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize("cut", range(0, 91, 7))
def test_wire_is_read_the_same_wherever_it_is_cut(cut: int) -> None:
    frames = b"retry: 70\n: open\nid: 1\n\nid: 2\ndata: @5 0 xx\n\n", b"event: gap\nid: 3\r\ndata: {}\r\n\r\n"
    data = chunked(*frames)

    first = read(data[:cut], True)
    second = read(data[cut:], True, first.text, first.raw)

    assert first.marks + second.marks == ((5, 0),)
    assert first.gaps + second.gaps == 1
    assert (second.last_id or first.last_id, first.retry or second.retry) == (b"3", 70)
    assert (second.text, second.raw) == (b"", b"")
    assert read(data + b"0\r\n\r\n", True).ended


def test_data_of_an_event_has_its_size_and_is_read_back() -> None:
    assert len(data_of(1500, 7, 100)) == 100
    assert read(f"data: {data_of(1500, 7, 3)}\n\n".encode(), False).marks == ((1500, 7),)


EVENTS = [Event(float(at), (1,) if at != 3 else (2,), 10) for at in range(6)]
TAKEN = {
    "all": ([0, 1, 2, 4, 5], {}),
    "one lost in the middle": ([0, 1, 4, 5], {"lost": 1}),
    "the last lost": ([0, 1, 2, 4], {"lost": 1}),
    "none": ([], {"lost": 5}),
    "one doubled": ([0, 1, 1, 2, 4, 5], {"doubled": 1}),
    "two in the wrong order": ([0, 2, 1, 4, 5], {"reordered": 1}),
    "one of another topic": ([0, 1, 2, 3, 4, 5], {"stray": 1}),
}


@pytest.mark.parametrize(("taken", "wrong"), TAKEN.values(), ids=TAKEN)
def test_tally_tells_what_went_wrong(taken: list[int], wrong: dict[str, int]) -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=-1.0, since=-0.5)

    for number in taken:
        tally.take(track, number)
    acknowledged = [each.at for each in EVENTS]
    tally.finish(track, inf, acknowledged, acknowledged)

    found = {"lost": sum(tally.lost.values()), "doubled": tally.doubled,
             "reordered": tally.reordered(acknowledged, acknowledged),
             "stray": tally.stray, "stale": tally.stale(acknowledged)}
    assert {name: count for name, count in found.items() if count} == wrong


def test_last_events_before_a_stream_was_ended_are_overdue_and_not_lost() -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=-1.0, since=-0.5)

    for number in (0, 2):
        tally.take(track, number)
    acknowledged = [each.at for each in EVENTS]
    tally.finish(track, 4.5, acknowledged, acknowledged)

    assert tally.lost == {1: 1}
    assert tally.overdue == {4: 1}


def test_nothing_from_before_the_head_is_owed_though_something_older_came() -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=1.4, since=2.5)

    tally.take(track, 0)  # an old one was still under way
    assert [*behind(track, inf)] == [(1, 3, 5)]
    tally.take(track, 4)
    tally.finish(track, inf, [each.at for each in EVENTS], [each.at for each in EVENTS])

    assert tally.lost == {5: 1}


def test_what_is_from_before_the_head_and_comes_late_is_no_double() -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=1.4, since=2.5)

    for number in (0, 2, 1, 4, 5):
        tally.take(track, number)

    assert (tally.doubled, tally.reordered([0.0, 1.0, 2.0], [0.5, 2.1, 2.5])) == (0, 0)
    tally.take(track, 1)
    assert tally.doubled == 1


@pytest.mark.parametrize(("acknowledged", "lost"), [(1.9, 1), (2.1, 0)], ids=["before the next was sent", "after it"])
def test_event_that_was_under_way_when_its_stream_was_ended_is_lost_only_if_a_later_one_came(
        acknowledged: float, lost: int) -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=-1.0, since=-0.5)

    for number in (0, 2):
        tally.take(track, number)
    tally.finish(track, 1.5, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.5, acknowledged, 2.5, 3.5, 4.5, 5.5])

    assert tally.lost.total() == lost


def test_events_that_were_under_way_at_once_may_come_in_either_order() -> None:
    tally, track = Tally(), Track(Book(EVENTS).expected((1,)), asked=-1.0, since=-0.5)

    for number in (0, 2, 1):
        tally.take(track, number)

    assert tally.reordered([0.0, 1.0, 2.0], [0.5, 2.1, 2.5]) == 0
    assert tally.reordered([0.0, 1.0, 2.0], [0.5, 1.9, 2.5]) == 1


def test_stream_is_owed_what_is_due_after_its_head_and_may_have_what_was_on_its_way() -> None:
    expected, acknowledged = Book(EVENTS).expected((1,)), [each.at for each in EVENTS]
    late, early, old = Tally(), Tally(), Tally()

    late.take(Track(expected, asked=1.4, since=1.5), 4)
    early.take(Track(expected, asked=1.4, since=1.5), 1)
    old.take(Track(expected, asked=4.4, since=4.5), 0)

    assert late.stale(acknowledged) == early.stale(acknowledged) == 0
    assert old.stale(acknowledged) == 1


# --- Replays ---------------------------------------------------------------------------------------------


def crowd(seconds: float, streams: int, events: int) -> Shape:
    """Streams that come and go and come back, of one topic or two, and events for one topic or two."""
    people = [Stream(0.1 * (number % 5), None, number, (1 + number % 3, 4) if number % 2 else (1 + number % 3,))
              for number in range(1, streams + 1)]
    people += [Stream(0.2, seconds / 3, 1000 + number, (4,)) for number in range(streams // 4)]
    people += [Stream(seconds / 2, None, 1000 + number, (4,), True) for number in range(streams // 4)]
    said = [Event(seconds * number / events, (1 + number % 3, 4) if number % 4 == 0 else (1 + number % 4,),
                  40 + number % 90) for number in range(events)]
    return Shape(seconds, tuple(sorted(people, key=lambda each: each.opened)), tuple(said), "test")


QUIET = Shape(1.0, (Stream(0.0, None, 1, (1,)),), (Event(0.8, (1,), 40),), "test")


class Faulty:
    """A small server of event streams, over HTTP without chunks, with a fault that it is told."""

    def __init__(self, fault: str, host: str = "127.0.0.1") -> None:
        self._fault = fault
        self._streams: list[tuple[set[str], Socket]] = []
        self._history: list[tuple[set[str], bytes]] = []
        self.sources: set[str] = set()
        self.hosts: set[bytes] = set()
        self._server = StreamServer((host, 0), self._serve)
        self._server.start()
        self.url = f"http://{authority(host, self._server.server_port)}"

    def stop(self) -> None:
        self._server.stop(timeout=0)

    def _serve(self, connection: Socket, address: tuple[Any, ...]) -> None:
        data = b""
        while part := connection.recv(65536):
            data += part
            head, end, rest = data.partition(b"\r\n\r\n")
            if not end:
                continue
            self.hosts |= set(re.findall(rb"\r\nHost: (\S+)", head))
            if head.startswith(b"GET /metrics"):
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                data = b""
                continue
            if head.startswith(b"GET"):
                self.sources.add(address[0])
                self._subscribe(connection, head)
                data = b""
                continue
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
            if len(rest) >= length:
                self._publish(json.loads(rest[:length]))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                data = rest[length:]

    def _subscribe(self, connection: Socket, head: bytes) -> None:
        topics = set(re.findall(r"topic=([^&\s]*)", head.decode()))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: open\n\n")
        if self._fault == "stale":
            connection.sendall(b"".join(frame for named, frame in self._history if not topics.isdisjoint(named)))
        self._streams.append((topics, connection))

    def _publish(self, event: dict[str, Any]) -> None:
        number = len(self._history)
        frame = f"id: {number}\ndata: {event['data']}\n\n".encode()
        self._history.append((set(event["topics"]), frame))
        for topics, connection in self._streams:
            if not topics.isdisjoint(event["topics"]) or (self._fault == "stray" and number % 10 == 5):
                connection.sendall(frame * (2 if self._fault == "doubled" and number % 10 == 5 else 1))


class Losing(Faulty):
    def _publish(self, event: dict[str, Any]) -> None:
        if len(self._history) % 10 == 5:
            self._history.append((set(), b""))
        else:
            super()._publish(event)


class Reordering(Faulty):
    """Holds one event back until the next has gone out."""

    _kept: dict[str, Any] | None = None

    def _publish(self, event: dict[str, Any]) -> None:
        if self._kept is None and len(self._history) % 10 == 5:
            self._kept = event
            return
        super()._publish(event)
        if self._kept is not None:
            kept, self._kept = self._kept, None
            super()._publish(kept)


class Stalling(Faulty):
    """Takes no event for a second from the first on, and then one after the other."""

    _lock = Semaphore()

    def _publish(self, event: dict[str, Any]) -> None:
        with self._lock:
            if not self._history:
                gevent.sleep(STALL)
            super()._publish(event)


class Refusing(Faulty):
    """Has no place for every other client."""

    def _serve(self, connection: Socket, address: tuple[Any, ...]) -> None:
        if b"GET /events" in connection.recv(65536, MSG_PEEK):
            self._asked += 1
            if self._asked % 2:
                connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
                return
        super()._serve(connection, address)


STALL = 1.0
FAULTS = {"none": Faulty, "lost": Losing, "doubled": Faulty, "reordered": Reordering, "stray": Faulty, "stale": Faulty,
          "unopened": Refusing}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a replay says of each faulty server: all at once, for most of it is waiting."""
    folder = tmp_path_factory.mktemp("faults")
    one = Shape(2.5, tuple(Stream(0.1 if number < 5 else 1.8, None, number, (1 + number % 2,)) for number in range(10)),
                tuple(Event(0.5 + number * 0.02, (1,) if number < 90 else (2,), 40) for number in range(95)))
    write_shape(folder / "shape", one)

    def judge(name: str) -> dict[str, Any]:
        server = FAULTS[name](name)
        try:
            done = load("replay", folder / "shape", "--url", server.url, "--readers", 1, "--settle", 2, "--json")
        finally:
            server.stop()
        return {"code": done.returncode, **json.loads(done.stdout)}

    greenlets = {name: gevent.spawn(judge, name) for name in FAULTS}
    return {name: greenlet.get() for name, greenlet in greenlets.items()}


def test_replay_finds_nothing_wrong_with_a_right_server(verdicts: dict[str, Any]) -> None:
    assert verdicts["none"]["verdict"] == {"complete": True, "ordered": True, "published": True}
    assert verdicts["none"]["code"] == 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
def test_replay_detects_a_server_that_breaks_a_promise(fault: str, verdicts: dict[str, Any]) -> None:
    wrong = {name for name, count in verdicts[fault]["wrong"].items() if count and name != "received"}

    assert wrong == {fault}
    assert verdicts[fault]["code"] == 1


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_streams_of_one_client_are_read_by_all_processes(resumed: bool) -> None:
    places = places_of([Stream(number / 1000, None, 1, (1,), resumed) for number in range(1000)], 3)

    assert min(Counter(places).values()) > 250
    assert len(Counter(places)) == 3


def test_stream_that_resumes_is_read_by_the_process_that_has_read_its_last_one() -> None:
    first = [Stream(0.0, 1.0 + number, 1, (1 + number % 2,)) for number in range(6)]
    again = [Stream(2.5 + number, None, 1, (2 - number % 2,), True) for number in range(6)]
    beside = Stream(9.0, None, 1, (2,), True)  # before the end of the one before it was seen

    places = places_of([*first, *again, beside], 2)

    assert places[:6] == [0, 1, 0, 1, 0, 1]
    assert places[6:] == [1, 0, 1, 0, 1, 0, 1]


def test_stream_that_is_ended_before_it_has_opened_is_counted_if_it_was_due_for_some_seconds(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr("select.epoll", MagicMock, raising=False)  # gevent has taken it away
    ends = (4.0, 6.0, None)
    streams = [Stream(0.5, end, number, (1,)) for number, end in enumerate(ends)]
    readers = Readers(streams, [], FORMS["pushsvc"](), Target("127.0.0.1", 1, ""), "", 0.0, -1)

    readers.begin(time.monotonic() - 9.0)  # all is due at once, so that nothing was asked for yet
    readers.work()

    assert readers.verdict(0.4, [], [])["unopened"] == 1, "when the end was asked for, the last was not due"
    assert readers.verdict(9.0, [], [])["unopened"] == 2
    assert not readers.is_caught_up(9.0, set())
    readers.close()


def test_latency_counts_from_when_an_event_was_due_though_the_server_holds_up_the_sender(tmp_path: Path) -> None:
    """Most of the events are sent after the stall only, for 128 are under way at most."""
    due = [0.8 + number / 1000 for number in range(300)]
    write_shape(tmp_path / "shape", Shape(2.0, QUIET.streams, tuple(Event(at, (1,), 40) for at in due), "test"))
    server = Stalling("none")
    try:
        done = load("replay", tmp_path / "shape", "--url", server.url, "--readers", 1, "--json")
    finally:
        server.stop()

    found = json.loads(done.stdout)
    assert found["totals"]["received"] == 300, done.stderr
    for kind in ("latency", "acknowledged"):
        assert found[kind]["max_ms"] >= STALL * 1000
        assert found[kind]["p99_ms"] >= (STALL - 0.003) * 1000, "the fourth is due 3 ms after the first"
        assert found[kind]["p50_ms"] >= (STALL - 0.15) * 1000
    assert found["late_ms"]["sender"] >= (STALL - 0.3) * 1000


def test_name_and_count_are_apart_however_long_the_name_is() -> None:
    found = {"interrupted": None, "verdict": {}, "totals": {}, "wrong": {}, "latency": {}, "acknowledged": {},
             "opening": {}, "late_ms": {}, "server_cpu_seconds": 1.5, "client_cpu_seconds": 2.5,
             "errors": {"publish: status 400": 39, "publish: ConnectionRefusedError": 7}}

    assert replay_text(found).splitlines()[1:] == [
        "server CPU, s           1.5", "client CPU, s           2.5", "error publish: status 400 39",
        "error publish: ConnectionRefusedError 7"]


MODULE = Path("/") / NCHAN_MODULE


def test_replay_against_nchan_is_complete_and_in_order(tmp_path: Path) -> None:
    program("nginx")
    if not MODULE.exists():
        missing(f"nchan is not installed (libnginx-mod-nchan): there is no {MODULE}")
    people = (Stream(0.0, None, 1, (1,)), Stream(0.1, 1.6, 2, (1, 2)), Stream(0.2, None, 3, (2,)))
    said = tuple(Event(0.8 + number * 0.03, (1 + number % 2,), 50, number % 3) for number in range(40))
    write_shape(tmp_path / "shape", Shape(2.0, people, said, "test"))

    done = load("replay", tmp_path / "shape", "--start", "nchan", "--workers", 2, "--readers", 1, "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (found["totals"]["published"], found["about"]["workers"]) == (40, 2)
    assert found["totals"]["received"] > 40
    assert found["about"]["version"].startswith("nchan ")


FORM = "POST /.well-known/mercure HTTP/1.1", "application/x-www-form-urlencoded"
TEXT = "POST /publish?topic=a%20b,c%26d HTTP/1.1", "text/plain"
SPOKEN: dict[str, tuple[str, tuple[str, str], bytes, bytes]] = {
    "mercure": ("/.well-known/mercure?topic=a+b&topic=c%26d", FORM, b"Authorization: Bearer abc",
                b"topic=a+b&topic=c%26d&data=x%3D1+%26y&type=kind-4"),
    "nchan": ("/events?topic=a%20b,c%26d", TEXT, b"X-EventSource-Event: kind-4", b"x=1 &y")}


@pytest.mark.parametrize("name", SPOKEN)
def test_other_servers_are_spoken_to_as_they_want_it(name: str) -> None:
    path, (line, kind), header, body = SPOKEN[name]
    form, topics = FORMS[name]("abc"), ["a b", "c&d"]

    head, _, rest = form.publish("host:1", topics, "x=1 &y", Event(0.0, (1, 2), 6, 4)).partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    assert first.decode() == line
    assert {b"Host: host:1", f"Content-Type: {kind}".encode(), f"Content-Length: {len(body)}".encode(), header} <= {
        *headers}
    assert rest == body
    first, *headers = form.subscribe("host:1", topics, b"urn:7").split(b"\r\n")
    assert first.decode() == f"GET {path} HTTP/1.1"
    assert {b"Host: host:1", b"Accept: text/event-stream", b"Authorization: Bearer abc", b"Last-Event-ID: urn:7"} <= {
        *headers}
    assert b"Last-Event-ID" not in form.subscribe("host:1", topics, b"")


def test_stream_of_mercure_is_read() -> None:
    """As a hub writes it: a comment first, an id that is no number, the type before the data."""
    frames = b":\n", b"event: kind-4\nid: urn:uuid:5f2b\ndata: @5 0 xx\n\n", b":\n"

    found = read(chunked(*frames), True)

    assert (found.marks, found.last_id, found.gaps) == (((5, 0),), b"urn:uuid:5f2b", 0)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Shape]:
    """A replay with forced reconnects against the service, its result, and what the service has recorded of it."""
    folder = tmp_path_factory.mktemp("replay")
    write_shape(folder / "shape", crowd(4.0, 40, 200))
    with Server(folder / "server", workers=2, env={"PUSHSVC_RECORD_DIR": str(folder / "recording")}) as server:
        done = load("replay", folder / "shape", "--url", server.url, "--times", 2, "--breaks", 1,
                    "-o", folder / "found.json", "--report", folder / "report.html")
        server.terminate(20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load("record", folder / "recording", "-o", folder / "recorded").returncode == 0
    return folder, json.loads((folder / "found.json").read_text()), read_shape(folder / "recorded")


def test_replay_against_the_service_is_complete_and_in_order_through_forced_reconnects(
    replayed: tuple[Path, dict[str, Any], Shape]
) -> None:
    _, found, _ = replayed

    assert found["totals"]["resumed"] > 80
    assert found["totals"]["published"] == 400
    assert found["totals"]["received"] > 4000
    assert {name: count for name, count in found["wrong"].items() if name != "received"} == {
        "unopened": 0, "lost": 0, "overdue": 0, "replaced": 0, "doubled": 0, "reordered": 0, "stray": 0, "stale": 0}
    assert sum(count for _, count in found["histogram"]) == found["totals"]["received"]
    assert sum(second["received"] for second in found["seconds"]) == found["totals"]["received"]
    assert found["server_cpu_seconds"] > 0


def test_recording_of_a_replay_has_its_streams_and_events(replayed: tuple[Path, dict[str, Any], Shape]) -> None:
    folder, found, recorded = replayed
    planned = expanded(read_shape(folder / "shape"), times=2)

    assert sorted(each.bytes for each in recorded.events) == sorted(each.bytes for each in planned.events)
    assert sorted(len(each.topics) for each in recorded.events) == sorted(len(each.topics) for each in planned.events)
    unseen = len(recorded.streams) - found["totals"]["opened"]  # broken before the client had read their head
    assert 0 <= unseen < 20
    assert 0 <= sum(each.resumed for each in recorded.streams) - found["totals"]["resumed"] <= unseen
    assert {len(each.topics) for each in recorded.streams} == {1, 2}
    assert len({each.client for each in recorded.streams}) <= 6, "clients are told apart by user or address"
    text = "".join(path.read_text() for path in (folder / "recording").iterdir())
    assert "load-" not in text
    assert "xxx" not in text
    assert "127.0" not in text


OUTSIDE = re.compile(r"<(script|link|img|iframe|object|embed|base)\b|(src|href|srcset)\s*=|url\(|@import|https?://", re.I)


def test_report_is_one_page_that_needs_nothing_else(replayed: tuple[Path, dict[str, Any], Shape]) -> None:
    folder, found, _ = replayed
    other = found | {"label": "<b>another</b>", "about": {}, "errors": {"publish: status 503": 39, "ended": 2}}

    text = page([found, other])

    assert not OUTSIDE.search(text.replace(str(found["about"]["url"]), ""))
    assert "&lt;b&gt;another" in text
    assert "<b>" not in text
    assert "<td>error: publish: status 503</td><td>0</td><td>39</td>" in text
    assert "<td>error: ended</td><td>0</td><td>2</td>" in text
    for written, lines in ((text, 2), ((folder / "report.html").read_text(), 1)):
        for title in ("Open streams", "p50 latency, ms", "p99 latency, ms", "Publishes per second",
                      "Deliveries per second", "Server CPU, cores", "Server memory, bytes"):
            assert [points > 2 for points in drawn(written, title)] == [True] * lines, title


def drawn(text: str, title: str) -> list[int]:
    """How many points each line of a chart has."""
    found = re.search(rf"<figcaption>{re.escape(title)}</figcaption>(.*?)</figure>", text)
    assert found, title
    return [len(re.findall("[ML]", line)) for line in re.findall(r'<path class="line c\d" d="([^"]*)"/>', found[1])]


def test_report_tells_workers_version_and_settings_of_the_server_that_was_started(tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", crowd(1.0, 4, 5))

    done = load("replay", tmp_path / "shape", "--readers", 1, "--start", "pushsvc", "--workers", 2,
                "--set", "PUSHSVC_HEARTBEAT_SECONDS=77",
                "-o", tmp_path / "found.json", "--report", tmp_path / "report.html")

    about = json.loads((tmp_path / "found.json").read_text())["about"]
    text = (tmp_path / "report.html").read_text()
    assert done.returncode == 0, done.stderr
    assert about["workers"] == 2
    assert "<td>PUSHSVC_HEARTBEAT_SECONDS</td><td>77</td>" in text
    assert f"<td>version</td><td>pushsvc {__version__}, gunicorn" in text


def test_report_hides_keys_and_passwords() -> None:
    assert told_value("PUSHSVC_JWT_KEY", "abc") == "(hidden)"
    assert told_value("PUSHSVC_BROKER_URL", "redis://me:abc@host/0") == "redis://(hidden)@host/0"


SAID = {
    "a metric": ("nginx/1.2", 'go_info{version="go9"} 1\npushsvc_build_info{a="b",version="1.2.3"} 1\n', "pushsvc 1.2.3"),
    "a header": ("nginx/1.2", "pushsvc_streams 1\n", "nginx/1.2 (its Server header)"),
    "nothing": ("gunicorn", 'python_info{version="3.11"} 1\n', "unknown"),
}


@pytest.mark.parametrize(("header", "metrics", "version"), SAID.values(), ids=SAID)
def test_version_of_a_server_is_what_it_says(header: str, metrics: str, version: str) -> None:
    def answer(connection: Socket, address: object) -> None:
        connection.recv(65536)
        head = f"HTTP/1.1 200 OK\r\nServer: {header}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + metrics.encode())
        connection.close()

    server = StreamServer(("127.0.0.1", 0), answer)
    server.start()
    try:
        assert version_said("127.0.0.1", server.server_port, "pushsvc") == version
    finally:
        server.stop(timeout=0)


def test_settings_for_a_server_that_is_not_started_are_refused() -> None:
    done = load("ramp", "--set", "PUSHSVC_HEARTBEAT_SECONDS=7")

    assert (done.returncode, done.stderr) == (2, "load: --set is for --start pushsvc\n")


def test_shape_that_is_not_there_is_refused_with_a_message(tmp_path: Path) -> None:
    done = load("replay", tmp_path / "nothing")

    assert done.returncode == 2
    assert "nothing" in done.stderr


@pytest.mark.parametrize("command", [["replay", SHAPE], ["ramp", "--step", "10"]], ids=["replay", "ramp"])
def test_address_where_nobody_listens_is_told_at_once(command: list[Any]) -> None:
    done = load(*command, "--url", "http://127.0.0.1:1")

    assert done.returncode == 2
    assert "nobody answers on 127.0.0.1:1" in done.stderr


BAD_ARGUMENTS = {
    "ramp --topics 0": "argument --topics: a whole number of at least 1 is wanted, not '0'",
    "ramp --streams abc": "argument --streams: a whole number of at least 1 is wanted, not 'abc'",
    "ramp --rate nan": "argument --rate: a number from 1e-9 to 1e9 is wanted, not 'nan'",
    "ramp --p99 inf": "argument --p99: a number from 1e-9 to 1e9 is wanted, not 'inf'",
    "ramp --set FOO": "argument --set: NAME=VALUE is wanted, not 'FOO'",
    "ramp --sources 127.0.0.2,x": "argument --sources: IPv4 addresses, separated by commas, are wanted, not 'x'",
    "ramp --sources 192.0.2.1": "argument --sources: 192.0.2.1 is no address of this machine: Cannot assign requested "
                                "address",
    "ramp --pids 1,abc": "argument --pids: a whole number of at least 1 is wanted, not 'abc'",
    "ramp --pids 1,4194305": "argument --pids: there is no process 4194305 on this machine",
    f"replay {SHAPE} --times 0": "argument --times: a whole number of at least 1 is wanted, not '0'",
    f"replay {SHAPE} --readers 0": "argument --readers: a whole number of at least 1 is wanted, not '0'",
    f"show {SHAPE} --speed 1e-320": "argument --speed: a number from 1e-9 to 1e9 is wanted, not '1e-320'",
    f"show {SHAPE} --spread -3": "argument --spread: a number from 0 to 1e9 is wanted, not '-3'",
    f"compare {SHAPE} {SHAPE} --tolerance x": "argument --tolerance: a number from 0 to 1e9 is wanted, not 'x'",
    "dark --canary http://127.0.0.1:1 --percent 5,x": "argument --percent: a list of numbers above 0 and up to 100 is "
                                                      "wanted, not 'x'",
}


@pytest.mark.parametrize(("line", "said"), BAD_ARGUMENTS.items(), ids=[*map(str, range(len(BAD_ARGUMENTS)))])
def test_argument_that_cannot_be_is_refused_with_what_is_wanted(
        line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line(line.split())

    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {said}")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", "{}", '{"load": 2, "kind": "ramp"}',
                                  '{"load": 1, "kind": "replay"}',
                                  '{"load": 1, "kind": "ramp", "label": "", "levels": []}'], ids=range(7))
def test_file_that_is_no_result_makes_no_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text(text)

    done = load("report", tmp_path / "foreign.json", "-o", tmp_path / "page.html")

    assert done.returncode == 2
    assert re.fullmatch(rf"load: {tmp_path}/foreign.json is not the result of a load test \(.*\)\n", done.stderr)
    assert not (tmp_path / "page.html").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(file: io.StringIO) -> str:
    with Progress(file) as progress:
        progress.say("begun")
        progress.show("one", 1, 4)
        progress.hint("two", 2, 4)
        progress.show("x" * 200, 5, 4)
        progress.say("ended")
        progress.show("left", 4, 4)
    return file.getvalue()


def test_progress_is_one_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    start, *drawn = shown(Terminal()).split("\r\x1b[K")

    assert start == "begun\n"
    assert drawn[:2] == ["[######..................]  25 %  one", "[############............]  50 %  two"]
    assert (drawn[2].count("#"), len(drawn[2])) == (24, 79)
    assert drawn[3:] == ["ended\n", "[########################] 100 %  left", ""]
    assert shown(io.StringIO()) == f"begun\none\n{'x' * 200}\nended\nleft\n"
    monkeypatch.setenv("TERM", "dumb")
    assert shown(Terminal()) == shown(io.StringIO())


def test_bar_of_nothing_is_full() -> None:
    assert bar(0, 0).endswith("100 %")


def test_replay_draws_one_bar_on_a_terminal(tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", crowd(1.5, 4, 10))
    ours, its = os.openpty()
    server = Faulty("none")
    try:
        subprocess.run([*LOAD, "replay", str(tmp_path / "shape"), "--url", server.url, "--readers", "1"], stderr=its,
                       stdout=subprocess.DEVNULL, timeout=TIMEOUT, env=os.environ | {"TERM": "xterm"})
        said = os.read(ours, 1 << 16).decode()
    finally:
        server.stop()
        os.close(ours)
        os.close(its)

    assert re.search(r"\r\x1b\[K\[[#.]{24}\] +\d+ %  \d of 2 s  \d+ streams", said)
    assert said.endswith("\r\x1b[K")
    assert said.count("\n") == 1, "only the first line stays"


@pytest.mark.parametrize("command", ["replay", "ramp"])
def test_streams_come_from_the_named_sources_and_requests_name_the_host(command: str, tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", Shape(1.0, QUIET.streams * 8, QUIET.events, "test"))
    ramp = ["--step", 8, "--most", 8, "--hold", 0.2]
    server = Faulty("none")
    try:
        load(command, *([tmp_path / "shape"] if command == "replay" else ramp), "--url", server.url,
             "--sources", "127.0.9.8,127.0.9.9")
    finally:
        server.stop()

    assert server.sources == {"127.0.9.8", "127.0.9.9"}
    assert server.hosts == {server.url.removeprefix("http://").encode()}


@pytest.mark.parametrize("command", ["replay", "ramp"])
def test_server_may_have_an_ipv6_address(command: str, tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", QUIET)
    try:
        server = Faulty("none", "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    ramp = ["--step", 4, "--most", 4, "--hold", 0.2]
    try:
        done = load(command, *([tmp_path / "shape"] if command == "replay" else ramp), "--url", server.url)
        refused = load(command, *([tmp_path / "shape"] if command == "replay" else ramp), "--url", server.url,
                       "--sources", "127.0.0.1")
    finally:
        server.stop()

    assert done.returncode == 0, done.stderr
    assert server.sources == {"::1"}
    assert (refused.returncode, refused.stderr) == (2, "load: --sources are IPv4 addresses, and ::1 has none\n")


def test_ipv6_address_has_brackets_where_it_is_asked_for() -> None:
    assert b"\r\nHost: [::1]:80\r\n" in Target("::1", 80, "/").request(0)
    assert b"\r\nHost: [::1]:80\r\n" in Site("::1", 80).request({})
    assert b"\r\nHost: localhost:80\r\n" in Target("localhost", 80, "/").request(0)


def test_replay_that_is_broken_off_verifies_what_it_has_sent_and_writes_it(tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", crowd(50.0, 10, 1000))
    with Server(tmp_path / "server", workers=1) as server:
        replay = subprocess.Popen([*LOAD, "replay", str(tmp_path / "shape"), "--url", server.url, "--readers", "1",
                                   "-o", str(tmp_path / "found.json"), "--report", str(tmp_path / "report.html")],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert replay.stderr is not None
            next(line for line in replay.stderr if " 2 of 50 s" in line)
            replay.send_signal(signal.SIGINT)
            out, said = replay.communicate(timeout=20)
        finally:
            replay.kill()
            replay.wait()
        eventually(lambda: streams(server) == 0, message="the streams have ended")

    found = json.loads((tmp_path / "found.json").read_text())
    assert replay.returncode == 130, said
    assert 1 < found["interrupted"] < 25
    assert 0 < found["totals"]["published"] < 500
    assert found["verdict"] == {"complete": True, "ordered": True, "published": True}
    assert found["totals"]["received"] > found["totals"]["published"]
    assert "<td>ran to its end</td><td class=\"bad\">NO</td>" in (tmp_path / "report.html").read_text()
    assert f"what there is of it is in {tmp_path}/found.json" in said
    assert "broken off after" in out


def test_replay_whose_terminal_is_closed_ends_what_it_has_started_and_writes_its_result(tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", crowd(50.0, 10, 1000))
    ours, its = os.openpty()
    replay = subprocess.Popen([*LOAD, "replay", str(tmp_path / "shape"), "--start", "pushsvc", "--workers", "1",
                               "--readers", "1", "-o", str(tmp_path / "found.json")], stdout=its, stderr=its,
                              env=os.environ | {"TERM": "xterm"},
                              preexec_fn=lambda: (os.setsid(), fcntl.ioctl(its, termios.TIOCSCTTY, 0)))
    close_descriptor(its)
    try:
        said = ""
        while " 2 of 50 s" not in said:
            said += os.read(ours, 1 << 16).decode()
        started = probe.family(replay.pid)
        close_descriptor(ours)  # the kernel sends its SIGHUP
        assert replay.wait(30) == 130
    finally:
        replay.terminate()
        replay.wait(30)

    assert len(started) >= 5, "itself, the master and a worker, a sender and a reader"
    eventually(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()], message="nothing is left behind")
    assert json.loads((tmp_path / "found.json").read_text())["verdict"] == {
        "complete": True, "ordered": True, "published": True}


@pytest.mark.parametrize("command", [["replay", SHAPE], ["ramp"], ["dark", "--canary", "http://127.0.0.1:1"]],
                         ids=["replay", "ramp", "dark"])
def test_result_that_cannot_be_written_is_told_before_the_run(command: list[Any], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "found.json"

    for option, path in (("-o", nowhere), ("--report", tmp_path)):
        done = load(*command, option, path)
        assert (done.returncode, done.stderr) == (2, f"load: {path} cannot be written\n")


@pytest.mark.parametrize("command", [
    "import {}", "record {.parent}", "replay {}", "replay {} --report {} -o /dev/null", "report {}"])
def test_file_that_is_read_is_not_overwritten(
        command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "file.jsonl", tmp_path / "link"
    write_shape(path, SMALL)
    link.symlink_to(path)
    text = path.read_text()

    done = command_line([*command.format(path, link).split(), *([] if "-o" in command else ["-o", str(link)])])

    assert (done, capsys.readouterr().err) == (2, f"load: {link} is what is read, and would be overwritten\n")
    assert path.read_text() == text


def test_result_and_its_page_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = str(tmp_path / "found")

    assert command_line(["ramp", "--url", "http://127.0.0.1:1", "-o", found, "--report", f"{tmp_path}/./found"]) == 2

    assert capsys.readouterr().err == f"load: {found} cannot be both the result and its page\n"


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_result_that_cannot_be_saved_is_printed_all_the_same(option: str, tmp_path: Path) -> None:
    write_shape(tmp_path / "shape", crowd(1.0, 4, 5))
    server = Faulty("none")
    try:
        replay = load("replay", tmp_path / "shape", "--url", server.url, "--readers", 1, option, "/dev/full", "--json")
        ramp = load("ramp", "--url", server.url, "--step", 4, "--most", 4, "--hold", 0.2, option, "/dev/full", "--json")
    finally:
        server.stop()

    for done, kind in (replay, "replay"), (ramp, "ramp"):
        assert json.loads(done.stdout)["kind"] == kind
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "load: /dev/full cannot be written: No space left on device"


# --- Ramp and dark test ----------------------------------------------------------------------------------


def test_ramp_stops_at_the_objective_and_names_the_limit(tmp_path: Path) -> None:
    with Server(tmp_path / "server", workers=1, env={"PUSHSVC_MAX_STREAMS": "150"}) as server:
        done = load("ramp", "--url", server.url, "--step", 100, "--most", 1000, "--hold", 0.5, "--p99", 10_000, "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [level["streams"] for level in found["levels"]] == [100, 200]
    assert found["held"] == 100
    assert found["limits"][0].startswith("the server's own bound: it has told 50 streams to come back later (max_streams")


def test_ramp_raises_the_rate_and_keeps_the_streams(tmp_path: Path) -> None:
    with Server(tmp_path / "server", workers=1) as server:
        done = load("ramp", "--url", server.url, "--raise", "rate", "--streams", 20, "--step", 20, "--most", 40,
                    "--hold", 0.5, "--p99", 10_000, "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [(level["rate"], level["open"], level["lost"]) for level in found["levels"]] == [(20, 20, 0), (40, 20, 0)]
    assert all(level["p99_ms"] > 0 for level in found["levels"])
    assert (found["held"], found["verdict_text"]) == (40, "holds at 40 rate")


def test_ramp_of_a_service_that_has_a_key_has_its_token(tmp_path: Path) -> None:
    with Server(tmp_path / "server", workers=1, env={"PUSHSVC_JWT_KEY": SECRET}) as server:
        done = load("ramp", "--url", server.url, "--step", 4, "--most", 4, "--hold", 0.2, "--p99", 10_000,
                    "--token", token())

    assert done.returncode == 0, done.stdout


LEVEL = {"publish": "", "failed": 0, "ended": 0, "lost": 0, "p99_ms": 5.0, "busiest": 0.1, "client_busiest": 0.1,
         "server_cores": 0.1, "machine": 0.5}
CLIMB = Climb("streams", 1, 1, 1, 1.0, p99_ms=10.0)


@pytest.mark.parametrize("climb", [
    {"raise_": "streams", "rate": 1.0, "topics": 6, "hold": 5.0}, {"raise_": "rate", "step": 1, "topics": 6, "hold": 5.0},
    {"step": 3, "most": 2}], ids=["rate", "step", "most"])
def test_climb_that_would_measure_nothing_is_refused(climb: dict[str, Any]) -> None:
    good = {"raise_": "streams", "step": 1, "most": 10, "streams": 10, "rate": 20.0}

    assert Climb(**good).events(20.0) == 100
    with pytest.raises(ValueError, match=r"not one event for each of 6 topics in 5 s|--step is not above --most"):
        Climb(**good | climb)


def test_last_level_of_a_climb_is_the_most() -> None:
    climb = {"raise_": "streams", "step": 40, "streams": 1, "rate": 20.0}

    assert Climb(**climb, most=100).levels() == [40, 80, 100]
    assert Climb(**climb, most=80).levels() == [40, 80]
    assert Climb(**climb, most=40).levels() == [40]


def test_level_is_broken_by_its_p99_by_errors_and_by_a_failed_publish() -> None:
    assert broken(LEVEL, CLIMB) == ""
    assert "p99" in broken(LEVEL | {"p99_ms": 10.1}, CLIMB)
    assert "lost" in broken(LEVEL | {"lost": 1}, CLIMB)
    assert "publish" in broken(LEVEL | {"publish": "503"}, CLIMB)


LIMITS = {
    "ports": ({}, {}, {"EADDRNOTAVAIL": 3}, None, "the client's ports"),
    "own descriptors": ({}, {}, {"EMFILE": 3}, None, "the client's descriptors"),
    "backlog": ({}, {"TcpExt.ListenOverflows": 2}, {}, None, "the accept queue"),
    "descriptors": ({}, {}, {}, 5, "the server's descriptors"),
    "processor": ({"busiest": 0.97}, {}, {}, None, "the server's processor"),
    "all processors": ({"machine": 0.98}, {}, {}, None, "the machine's processors"),
    "own processor": ({"client_busiest": 0.97}, {}, {}, None, "the client's own processor"),
    "nothing": ({}, {}, {}, None, "no limit"),
}


@pytest.mark.parametrize(("level", "kernel", "errors", "descriptors", "said"), LIMITS.values(), ids=LIMITS)
def test_limit_is_named_by_what_was_met(
    level: dict[str, Any], kernel: dict[str, int], errors: dict[str, int], descriptors: int | None, said: str
) -> None:
    [limit] = limits_of(LEVEL | level, Usage(kernel, {}), errors, descriptors, 0.5, True)

    assert limit.startswith(said)


ENDED = {
    "its bound": ({}, 4.0, True, ["the server's own bound: it has told 4 streams to come back later"]),
    "slow clients": ({"slow": 4.0, "gone": 9.0}, 0.0, True, ["slow clients: the server has ended 4 streams as slow"]),
    "another reason": ({"drain": 4.0}, 0.0, True, ["the server has ended 4 streams: drain"]),
    "none that it says": ({"slow": 1.0}, 0.0, True, ["slow clients: the server has ended 1 streams as slow",
                                                    "the server ended 3 streams and does not say why"]),
    "it is dead": ({}, 0.0, False, ["the server no longer answers, and 4 streams have ended"]),
}


@pytest.mark.parametrize(("evicted", "refused", "answers", "said"), ENDED.values(), ids=ENDED)
def test_ramp_says_why_streams_have_ended_only_if_the_server_does(
        evicted: dict[str, float], refused: float, answers: bool, said: list[str]) -> None:
    spent = Usage({}, evicted, refused, answers)

    limits = limits_of(LEVEL | {"ended": 4}, spent, {}, None, 0.5, True)

    assert [limit.partition(" (")[0] for limit in limits] == said


class Ending(Faulty):
    """Ends all streams at the first event, and is no longer there if that is its fault."""

    def _publish(self, event: dict[str, Any]) -> None:
        if self._fault == "dead":
            self._server.close()
        for _, connection in self._streams:
            connection.shutdown(SHUT_RDWR)
        self._streams.clear()


@pytest.mark.parametrize(("fault", "said"), [
    ("dead", "the server no longer answers, and 8 streams have ended"),
    ("none", "the server ended 8 streams and does not say why")], ids=["dead", "alive"])
def test_ramp_whose_streams_are_ended_says_whether_the_server_is_still_there(fault: str, said: str) -> None:
    server = Ending(fault)
    try:
        done = load("ramp", "--url", server.url, "--step", 8, "--most", 8, "--hold", 0.2, "--json")
    finally:
        server.stop()

    assert (done.returncode, json.loads(done.stdout)["limits"][0]) == (1, said)


def test_ramp_whose_first_step_breaks_the_objective_says_so_and_what_was_measured() -> None:
    first = LEVEL | {"streams": 100, "p50_ms": 2.0, "max_ms": 9.0, "broken": "p99 is 5 ms, above 0.001 ms"}

    found = told("streams", [first], limits_of(first, Usage({}, {}), {}, None, 0.5, True))

    assert found["held"] == 0
    assert found["verdict_text"] == (
        "holds at none: the first step, 100 streams, breaks the objective already: p99 is 5 ms, above 0.001 ms "
        "(measured: p50 2.0 ms, p99 5.0 ms, longest 9.0 ms)")
    assert found["limits"] == ["no limit was met that can be seen from here: even the first step breaks the objective; "
                               "a smaller --step or a higher objective tells more"]


def test_ramp_names_the_limit_that_its_first_step_has_met() -> None:
    first = LEVEL | {"streams": 100, "p50_ms": 2.0, "max_ms": 9.0, "broken": "p99 is 5 ms", "busiest": 0.97}

    [limit] = told("streams", [first], limits_of(first, Usage({}, {}), {}, None, 0.5, True))["limits"]

    assert limit.startswith("the server's processor")


def test_dark_test_says_whose_address_it_is_where_nobody_listens() -> None:
    listening = Faulty("none")
    try:
        service = load("dark", "--url", "http://127.0.0.1:1", "--canary", listening.url)
        canary = load("dark", "--url", listening.url, "--canary", "http://127.0.0.1:1")
    finally:
        listening.stop()

    refused = "load: nobody answers on 127.0.0.1:1 ({}): Connection refused\n"
    assert (service.returncode, service.stderr) == (2, refused.format("--url, the service"))
    assert (canary.returncode, canary.stderr) == (2, refused.format("--canary"))


def test_order_that_is_not_taken_names_the_service() -> None:
    test = Dark(DarkTest("dark", "", 1, [1.0], 1.0, 1.0), Site("127.0.0.1", 1), Site("127.0.0.1", 2), Progress())

    with pytest.raises(OrderError, match=r"the service on 127\.0\.0\.1:1 takes no order: .*Connection refused"):
        test.order(1.0)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """A service, and a canary that pages of the service may use."""
    with Server(tmp_path / "service", workers=1) as service, Server(
        tmp_path / "canary", workers=1, env={"PUSHSVC_CORS_ORIGINS": service.url}
    ) as canary:
        yield service, canary


def streams(server: Server) -> int:
    text = request("GET", f"{server.url}/metrics").text
    return int(sum(float(value) for value in re.findall(r"^pushsvc_streams\{.*\} (\S+)$", text, re.M)))


def test_dark_test_stops_at_its_objective_and_tells_the_pages(pair: tuple[Server, Server]) -> None:
    service, canary = pair

    with Client(service.url, "pushsvc-dark") as stream:
        done = load("dark", "--url", service.url, "--canary", canary.url, "--percent", "10,100", "--hold", 20,
                    "--p99", 0.001, "--json")
        orders = [json.loads(stream.next().data) for _ in range(2)]

    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [level["percent"] for level in found["levels"]] == [10]
    assert "p99" in found["limits"][0]
    assert orders == [
        {"url": f"{canary.url}/events?topic=dark", "streams": 1, "percent": 10.0, "seconds": 15},
        {"url": "", "streams": 0, "percent": 0, "seconds": 0}]


def test_dark_test_that_no_page_has_joined_has_measured_nothing(pair: tuple[Server, Server]) -> None:
    service, canary = pair

    with Client(canary.url, "other"):
        done = load("dark", "--url", service.url, "--canary", canary.url, "--percent", 100, "--hold", 1, "--p99", 10_000,
                    "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 2
    assert (found["held"], found["levels"][0]["joined"]) == (0, 0)
    assert found["levels"][0]["events"] > 0
    assert found["verdict_text"].startswith("not measured: no page has joined.")


DARK_LEVEL = {"percent": 5.0, "broken": "", "joined": 3}
DARK = {
    "pages at all levels": ([DARK_LEVEL, DARK_LEVEL | {"percent": 20.0}], 1, True, "holds at 20 % of the pages"),
    "none at the first": ([DARK_LEVEL | {"joined": 0}, DARK_LEVEL | {"percent": 20.0}], 1, True, "holds at 20 %"),
    "broken without pages": ([DARK_LEVEL | {"joined": 0, "broken": "p99"}], 1, True, "holds at 0 % of the pages, breaks"),
    "no metrics": ([DARK_LEVEL | {"joined": 0}], 0, False, "not measured: the canary does not tell its streams"),
}


@pytest.mark.parametrize(("levels", "before", "measured", "said"), DARK.values(), ids=DARK)
def test_dark_test_holds_where_pages_were(levels: list[Any], before: int, measured: bool, said: str) -> None:
    found = dark_told(levels, before)

    assert found["measured"] == measured
    assert found["verdict_text"].startswith(said)


PAGES = """
    const pages = [], opened = new Map(), timers = [];
    let page = 0;
    function EventSource(url) {
        if (url.startsWith("https://push/")) return {addEventListener: (_, obey) => pages.push(obey), close() {}};
        opened.set(page, (opened.get(page) || 0) + 1);
        const mine = page;
        return {close: () => opened.delete(mine)};
    }
    const setTimeout = (act, ms) => timers.push(ms), Date = {now: () => arguments[0]};
    SCRIPT
    for (let count = 0; count < 4000; count += 1) pushsvcDark("https://push", {canary: "https://canary"});
    return arguments[1].map(order => {
        for (page = 0; page < pages.length; page += 1) pages[page]({data: JSON.stringify(order)});
        return [[...opened.keys()], Math.max(...timers.splice(0), 0)];
    });
"""


@pytest.mark.parametrize("clock", [0, 9e15], ids=["slow", "fast"])
def test_pages_join_by_their_share_for_some_seconds_whatever_their_clock_says(
    start_browser: Any, clock: float  # noqa: F811
) -> None:
    order = {"url": "https://canary/events", "streams": 2, "seconds": 15}
    given = [order | {"percent": 5}, order | {"percent": 30}, order | {"percent": 100, "seconds": 1e6},
             order | {"percent": 100, "url": "https://other/events"}, order | {"percent": 100, "seconds": 0}]
    browser = start_browser()
    try:
        script = PAGES.replace("SCRIPT", (ROOT / "ops" / "load" / "dark.js").read_text())
        answers = browser.execute_script(script, clock, given)
    finally:
        browser.quit()

    few, some, every = (set(pages) for pages, _ in answers[:3])
    assert 0.03 < len(few) / 4000 < 0.07, "5 %, within six standard deviations"
    assert 0.25 < len(some) / 4000 < 0.35
    assert few < some < every
    assert len(every) == 4000
    assert [ms for _, ms in answers[:3]] == [15_000] * 3
    assert answers[3:] == [[[], 0], [[], 0]], "another origin than the page has named, and an order that is over"


def test_dark_test_of_real_pages_opens_streams_on_the_canary_and_ends_them_when_it_is_broken_off(
    start_browser: Any, pair: tuple[Server, Server]  # noqa: F811
) -> None:
    service, canary = pair
    browser = start_browser()
    try:
        browser.get(f"{service.url}/healthz")
        browser.execute_script((ROOT / "ops" / "load" / "dark.js").read_text() + "window.pushsvcDark = pushsvcDark")
        browser.execute_script("pushsvcDark(...arguments)", service.url, {"canary": canary.url})
        browser.execute_script("pushsvcDark(...arguments)", service.url, {"canary": "http://127.0.0.1:1"})
        options = ["--streams", "3", "--percent", "100", "--p99", "10000"]
        test = subprocess.Popen([*LOAD, "dark", "--url", service.url, "--canary", canary.url, *options],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: streams(canary) == 4, timeout=20, message="three of the page, one of the command")
            os.kill(test.pid, signal.SIGINT)
            assert test.wait(20) == 130
        finally:
            test.kill()
            test.wait()
        eventually(lambda: streams(canary) == 0, timeout=20, message="the page has ended its streams")
    finally:
        browser.quit()


def test_canary_that_did_not_opt_in_has_no_streams_of_pages(
    start_browser: Any, pair: tuple[Server, Server]  # noqa: F811
) -> None:
    canary, service = pair  # the other way round: this canary names no origin
    script = """
        window.made = [];
        const Real = EventSource;
        window.EventSource = class extends Real {
            constructor(url) { super(url); made.push(this); }
        };
    """ + (ROOT / "ops" / "load" / "dark.js").read_text() + "pushsvcDark(...arguments);"
    test = DarkTest("pushsvc-dark", f"{canary.url}/events?topic=dark", 2, [100.0], 1.0, 1.0)
    site = Site("127.0.0.1", service.port)
    browser = start_browser()
    try:
        browser.get(f"{service.url}/healthz")
        browser.execute_script(script, service.url, {"canary": canary.url})
        eventually(lambda: streams(service) == 1, timeout=20, message="the page waits for orders")
        Dark(test, site, site, Progress()).order(100.0)
        eventually(lambda: browser.execute_script("return made.map(each => each.readyState)") == [1, 2, 2], timeout=20,
                   message="the browser has closed both streams, for good")
        eventually(lambda: streams(canary) == 0, message="the canary has none")
    finally:
        browser.quit()
