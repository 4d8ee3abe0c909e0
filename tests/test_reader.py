"""The wire oracle against the HTML standard: its own examples (section 9.2.6), and each of its rules."""

import pytest

from tests.support import reader as reader_module
from tests.support.reader import EventReader, Message


def read(stream: bytes) -> list[Message]:
    return EventReader().feed(stream)


def message(data: str, type: str = "message", id: str = "") -> Message:
    return Message(type, data, id)


EXAMPLES = {
    "one message": (
        b"data: This is the first message.\n\n",
        [message("This is the first message.")],
    ),
    "a message of two lines": (
        b"data: This is the second message, it\ndata: has two lines.\n\n",
        [message("This is the second message, it\nhas two lines.")],
    ),
    "event types": (
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
        [message("73857293", "add"), message("2153", "remove"), message("113411", "add")],
    ),
    "stock ticker": (
        b"data: YHOO\ndata: +2\ndata: 10\n\n",
        [message("YHOO\n+2\n10")],
    ),
    "four blocks": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [message("first event", id="1"), message("second event"), message(" third event")],
    ),
    "the last of four blocks without its blank line": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
        [message("first event", id="1"), message("second event")],
    ),
    "data without a colon": (
        b"data\n\ndata\ndata\n\ndata:",
        [message(""), message("\n")],
    ),
    "one space after the colon is ignored": (
        b"data:test\n\ndata: test\n\n",
        [message("test"), message("test")],
    ),
}

RULES = {
    "nothing": (b"", []),
    "lines end with LF": (b"data: a\ndata: b\n\n", [message("a\nb")]),
    "lines end with CR": (b"data: a\rdata: b\r\r", [message("a\nb")]),
    "lines end with CRLF": (b"data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
    "line ends may be mixed": (b"data: a\rdata: b\r\ndata: c\n\r\n", [message("a\nb\nc")]),
    "LF CR is two line ends": (b"data: a\n\rdata: b\n\r", [message("a"), message("b")]),
    "CR LF LF is two line ends": (b"data: a\r\n\ndata: b\r\n\n", [message("a"), message("b")]),
    "nothing else ends a line": (
        "data: a\x0b\x0c\x1c\x85\u2028\u2029b\n\n".encode(),
        [message("a\x0b\x0c\x1c\x85\u2028\u2029b")],
    ),
    "one leading BOM is stripped": (b"\xef\xbb\xbfdata: a\n\n", [message("a")]),
    "a second BOM is part of the field name": (
        b"\xef\xbb\xbf\xef\xbb\xbfdata: a\ndata: b\n\n",
        [message("b")],
    ),
    "a later BOM is data": (b"data: \xef\xbb\xbfa\n\n", [message("\ufeffa")]),
    "characters of all lengths": ("data: aé€😀\n\n".encode(), [message("aé€😀")]),
    "malformed bytes are replaced": (b"data: a\xffb\xe2\x82c\n\n", [message("a\ufffdb\ufffdc")]),
    "a cut character does not eat the line end": (b"data: \xf0\x9f\n\n", [message("\ufffd")]),
    "NUL is a character of data": (b"data: a\0b\n\n", [message("a\0b")]),
    "comments are ignored": (b":\n: data: no\ndata: a\n:data: no\n\n", [message("a")]),
    "only the first colon splits": (b"data: a:b: c\n\n", [message("a:b: c")]),
    "only one space is removed": (b"data:  a \n\n", [message(" a ")]),
    "a tab is not a space": (b"data:\ta\n\n", [message("\ta")]),
    "unknown fields are ignored": (b"foo: bar\nfoo\ndata: a\n\n", [message("a")]),
    "field names know no case": (b"Data: no\nDATA: no\ndata: a\nID: 7\n\n", [message("a")]),
    "a space before the name makes another name": (b" data: no\n\n", []),
    "a space before the colon makes another name": (b"data : no\n\n", []),
    "data of one empty line": (b"data:\n\n", [message("")]),
    "only one trailing LF is removed": (b"data: a\ndata\ndata\n\n", [message("a\n\n")]),
    "no data, no event": (b"event: x\nid: 1\n\n", []),
    "the type is forgotten without data": (b"event: x\n\ndata: a\n\n", [message("a")]),
    "the type is forgotten after an event": (
        b"event: x\ndata: a\n\ndata: b\n\n",
        [message("a", "x"), message("b")],
    ),
    "the last type wins": (b"event: x\nevent: y\ndata: a\n\n", [message("a", "y")]),
    "an empty type is message": (b"event: x\nevent\ndata: a\n\n", [message("a")]),
    "fields come in any order": (b"data: a\nid: 1\nevent: x\n\n", [message("a", "x", "1")]),
    "the id persists": (b"id: 1\ndata: a\n\ndata: b\n\n", [message("a", id="1"), message("b", id="1")]),
    "an id without data counts": (b"id: 1\n\ndata: a\n\n", [message("a", id="1")]),
    "the last id wins": (b"id: 1\nid: 2\ndata: a\n\n", [message("a", id="2")]),
    "an empty id resets": (b"id: 1\ndata: a\n\nid:\ndata: b\n\n", [message("a", id="1"), message("b")]),
    "an id with NUL is ignored": (b"id: 1\nid: 2\x003\ndata: a\n\n", [message("a", id="1")]),
    "blank lines alone are nothing": (b"\n\n\r\n\r\r", []),
    "no event without its blank line": (b"data: a\n\ndata: b\n", [message("a")]),
}

STREAMS = EXAMPLES | {f"rule: {name}": case for name, case in RULES.items()}
TABLE = pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS)


@TABLE
def test_stream_is_read_as_the_standard_says(stream: bytes, expected: list[Message]) -> None:
    assert read(stream) == expected


@TABLE
def test_byte_by_byte_reads_the_same_as_at_once(stream: bytes, expected: list[Message]) -> None:
    whole, slow = EventReader(), EventReader()
    whole.feed(stream)

    messages = [found for byte in stream for found in slow.feed(bytes([byte]))]

    assert messages == expected
    assert state(slow) == state(whole)


@TABLE
def test_any_cut_in_two_reads_the_same(stream: bytes, expected: list[Message]) -> None:
    for cut in range(len(stream) + 1):
        reader = EventReader()
        assert reader.feed(stream[:cut]) + reader.feed(b"") + reader.feed(stream[cut:]) == expected, cut


def state(reader: EventReader) -> tuple[object, ...]:
    return reader.comments, reader.reconnection_time, reader.last_event_id, reader.has_incomplete()


def test_cr_at_the_end_of_a_chunk_dispatches_at_once_and_swallows_a_following_lf() -> None:
    reader = EventReader()

    assert reader.feed(b"data: a\r\n\r") == [message("a")]
    assert reader.feed(b"") == []
    assert reader.feed(b"\n") == []
    assert reader.feed(b"data: b\n\n") == [message("b")]


def test_lf_after_a_swallowed_lf_is_a_blank_line() -> None:
    reader = EventReader()

    assert reader.feed(b"data: a\r") == []
    assert reader.feed(b"\n") == []
    assert reader.feed(b"\n") == [message("a")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (": 3000", 3000),
        (":0", 0),
        (": 007", 7),
        ("", None),
        (":", None),
        (": -1", None),
        (": +1", None),
        (": 1.5", None),
        (": 1_000", None),
        (":  1", None),
        (": 1 ", None),
        (": 1s", None),
        (": ٣", None),
        (": ²", None),
    ],
)
def test_retry_takes_ascii_digits_only(value: str, expected: int | None) -> None:
    reader = EventReader()
    reader.feed(f"retry{value}\n".encode())
    assert reader.reconnection_time == expected


def test_bad_retry_leaves_the_time_before_it() -> None:
    reader = EventReader()
    reader.feed(b"retry: 5\nretry: soon\n")
    assert reader.reconnection_time == 5


def test_last_event_id_changes_with_the_blank_line_and_not_before() -> None:
    reader = EventReader()
    reader.feed(b"id: 1\n\nid: 2\ndata: a\n")
    assert reader.last_event_id == "1"
    reader.feed(b"\n")
    assert reader.last_event_id == "2"


def test_comments_are_kept_as_they_are() -> None:
    reader = EventReader()
    reader.feed(b":\n: heartbeat\n:a:b\n")
    assert reader.comments == ["", " heartbeat", "a:b"]


def test_only_the_newest_comments_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "COMMENTS_KEPT", 2)
    reader = EventReader()
    reader.feed(b":1\n:2\n:3\n")
    assert reader.comments == ["2", "3"]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"", False),
        (b"data: a\n\n", False),
        (b"data: a\r\r", False),
        (b"data: a\n\n: heartbeat\n", False),
        (b"retry: 3000\n", False),
        (b"data: a\n", True),
        (b"event: a\n", True),
        (b"id: 1\n", True),
        (b"data", True),
        (b": heart", True),
        (b"data: a\n\n\xe2\x82", True),
        (b"\xef\xbb", True),
    ],
)
def test_has_incomplete_tells_whether_an_end_here_would_cut_something_off(stream: bytes, expected: bool) -> None:
    reader = EventReader()
    reader.feed(stream)
    assert reader.has_incomplete() is expected
