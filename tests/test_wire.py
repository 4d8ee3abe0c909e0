"""`GET /events` on the wire: what a standard reader, curl and an SSE library get from the running service.

What a stream brings is the same on every way to it (docs/adr/0008-parked-streams.md), so the tests of it run on each:
parked by `PushWorker`, plain by gunicorn's own gevent worker, and inside this process by Flask's test client.
"""

import http.client
import json
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpx
import pytest
from httpx_sse import connect_sse
from hypothesis import given, settings
from hypothesis import strategies as st

from app import create_app
from pushsvc.settings import Settings
from tests.support.client import Stream
from tests.support.reader import EventReader, Message
from tests.support.server import Server
from tests.support.wait import eventually
from tests.support.ways import Inside, Served, Way

HISTORY = 20  # events per topic: few, so that retention is soon seen
HEARTBEAT = 1  # seconds
SETTINGS = {"PUSHSVC_HEARTBEAT_SECONDS": str(HEARTBEAT), "PUSHSVC_HISTORY_EVENTS": str(HISTORY)}
TIMEOUT = 20  # for what takes milliseconds on an idle machine
FORM, JSON, NDJSON = "application/x-www-form-urlencoded", "application/json", "application/x-ndjson"

# What breaks readers and writers that take more for a line end, or less for text, than the standard does.
NASTY = [
    "", " ", "  two leading spaces", ": no comment", "data: not a field", "id: 1\nevent: x\nretry: 1",
    "\n", "\r", "\r\n", "\n\n\n", "\r\r\n\n\r", "a\rb\nc\r\nd", "ends with LF\n", "ends with CR\r",
    "NUL \0 within", "\x01\x1f\x7f\x80\x85\x9f", "\v\f\x1c\x1d\x1e", "a\u2028b\u2029c\u0085d",
    "\ufeffBOM first", "BOM \ufeff within", "\U0001f468\u200d\U0001f469", "\U0010ffff\ufffe\uffff", "e\u0301\u202e",
    '{"json": "\\u0000"}', "+%20&=;", "\t tab",
]  # fmt: skip


# What only a server has: a socket, the framing of a body, versions of HTTP.
served = pytest.mark.parametrize("service", ["parked", "plain"], indirect=True)


@pytest.fixture(scope="module")
def parked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Server(tmp_path_factory.mktemp("parked"), env=SETTINGS) as server:
        service = Served(server.url)
        yield service
        assert_nothing_is_left(service)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same service under gunicorn's own gevent worker: its parser, and streams that are plain generators."""
    with Server(tmp_path_factory.mktemp("plain"), workers=1, env=SETTINGS, worker_class="gevent") as server:
        service = Served(server.url)
        yield service
        assert_nothing_is_left(service)
        server.kill_all()  # gunicorn's own way to stop takes seconds


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    log = tmp_path_factory.mktemp("inside") / "push.db"
    app = create_app(Settings.from_environ({**SETTINGS, "PUSHSVC_BROKER_URL": f"sqlite:{log}"}))
    try:
        service = Inside(app)
        yield service
        assert_nothing_is_left(service)
    finally:
        app.extensions["pushsvc"].close()


@pytest.fixture(scope="module", params=["parked", "plain", "inside"])
def service(request: pytest.FixtureRequest) -> Way:
    way: Way = request.getfixturevalue(request.param)
    return way


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A topic of the test's own."""
    return f"{re.sub(r'[^a-z0-9]+', '-', request.node.name)[:200]}-{uuid.uuid4().hex[:6]}"


def assert_nothing_is_left(service: Way) -> None:
    eventually(lambda: metric(service, "pushsvc_streams") == 0, 30, message="a stream has survived the tests")


def metric(service: Way, name: str) -> float:
    """The sum of a metric over all workers and labels."""
    text = service.request("GET", "/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def data_of(messages: list[Message]) -> list[str]:
    return [message.data for message in messages]


def position(id: str) -> tuple[str, int]:
    """What makes ids comparable. Clients may not do this; tests of their order must."""
    epoch, _, seq = id.partition("-")
    return epoch, int(seq)


def normal(data: str) -> str:
    """The data as a reader of the plain form must get it: the three line ends become one."""
    return data.replace("\r\n", "\n").replace("\r", "\n")


# --- The answer and its opening --------------------------------------------------------------------------


def test_answer_has_the_status_and_headers_of_the_contract(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-store"
        assert stream.headers["x-accel-buffering"] == "no"
        if isinstance(service, Served):  # the application leaves the framing to its server
            assert stream.headers["transfer-encoding"] == "chunked"
        assert "content-length" not in stream.headers
        assert "set-cookie" not in stream.headers


def test_stream_opens_at_once_with_retry_and_a_comment(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        assert stream.reader.reconnection_time == 3000
        assert re.match(rb"retry: 3000\n:[^\n]*\n", bytes(stream.raw))


def test_stream_without_an_id_is_live_only(service: Way, topic: str) -> None:
    service.publish(topic=topic, data="before")
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        service.publish(topic=topic, data="after")
        assert stream.next(TIMEOUT).data == "after"


def test_event_comes_as_the_fields_event_id_data_in_this_order(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, event="news", data="one\r\ntwo\rthree\nfour")
        assert stream.next(TIMEOUT) == Message("news", "one\ntwo\nthree\nfour", id)
        expected = f"event: news\nid: {id}\ndata: one\ndata: two\ndata: three\ndata: four\n\n"
        assert bytes(stream.raw).endswith(expected.encode())


@pytest.mark.parametrize("fields", [{}, {"event": "message"}], ids=["left out", "asked for"])
def test_default_event_message_is_left_out(service: Way, topic: str, fields: dict[str, str]) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, data="x", **fields)
        assert stream.next(TIMEOUT) == Message("message", "x", id)
        assert b"event:" not in stream.raw
        assert bytes(stream.raw).endswith(f"id: {id}\ndata: x\n\n".encode())


def test_event_with_retry_changes_the_reconnection_time(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        service.publish(topic=topic, data="x", retry=0)
        assert stream.next(TIMEOUT).data == "x"
        assert stream.reader.reconnection_time == 0


def test_empty_data_is_an_event(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, data="")
        assert stream.next(TIMEOUT) == Message("message", "", id)


def test_large_event_comes_whole_live_and_from_history(service: Way, topic: str) -> None:
    data = ("\u00e9\r\n\u2028" + "x" * 200) * 4500  # as JSON nearly 1 MiB: more than a socket takes at once
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, data=data)
        frame = "".join([f"id: {id}\n", *(f"data: {line}\n" for line in normal(data).split("\n")), "\n"])
        assert stream.next(TIMEOUT) == Message("message", normal(data), id)
        assert frame.encode() in stream.raw
    with service.stream(topic, last_event_id="earliest") as stream:
        assert stream.next(TIMEOUT) == Message("message", normal(data), id)
        assert frame.encode() in stream.raw


# --- Topics, the envelope, the order ---------------------------------------------------------------------


def test_envelope_is_one_json_object_with_id_topic_event_and_data(service: Way, topic: str) -> None:
    with service.stream(topic, envelope=True) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, event="news", data="one\r\ntwo")
        message = stream.next(TIMEOUT)
        assert (message.type, message.last_event_id) == ("news", id)
        pairs = json.loads(message.data, object_pairs_hook=list)
        assert pairs == [("id", id), ("topic", topic), ("event", "news"), ("data", "one\r\ntwo")]


def test_envelope_names_the_default_event_too(service: Way, topic: str) -> None:
    with service.stream(topic, envelope=True) as stream:
        stream.opened(TIMEOUT)
        service.publish(topic=topic, data="x")
        message = stream.next(TIMEOUT)
        assert message.type == "message"
        assert json.loads(message.data)["event"] == "message"


def test_envelope_names_the_topic_that_matched(service: Way, topic: str) -> None:
    with service.stream([f"{topic}-c", f"{topic}-b"], envelope=True) as stream:
        stream.opened(TIMEOUT)
        service.publish(topics=[f"{topic}-a", f"{topic}-b"], data="x")
        service.publish(topic=f"{topic}-c", data="y")
        topics = [json.loads(message.data)["topic"] for message in stream.take(2, TIMEOUT)]
        assert topics == [f"{topic}-b", f"{topic}-c"]


def test_event_of_several_topics_of_a_stream_comes_once(service: Way, topic: str) -> None:
    topics = [f"{topic}-{letter}" for letter in "abc"]
    with service.stream(topics) as live:
        live.opened(TIMEOUT)
        first = service.publish(topics=topics, data="first")
        second = service.publish(topics=[*topics[1:], f"{topic}-other"], data="second")
        last = service.publish(topic=topics[0], data="last")
        expected = [first, second, last]
        assert [message.last_event_id for message in live.take(3, TIMEOUT)] == expected
    with service.stream(topics, last_event_id="earliest") as replayed:
        assert [message.last_event_id for message in replayed.take(3, TIMEOUT)] == expected


def test_topic_asked_for_twice_counts_once(service: Way, topic: str) -> None:
    with service.stream([topic, topic]) as stream:
        stream.opened(TIMEOUT)
        service.publish(topic=topic, data="a")
        service.publish(topic=topic, data="b")
        assert data_of(stream.take(2, TIMEOUT)) == ["a", "b"]


def test_events_of_other_topics_do_not_come(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        for other in (f"{topic}x", topic[:-1], topic.upper(), f"{topic} ", "*"):
            service.publish(topic=other, data="not for you")
        service.publish(topic=topic, data="for you")
        assert stream.next(TIMEOUT).data == "for you"


def test_ids_grow_in_the_order_of_delivery_over_all_topics(service: Way, topic: str) -> None:
    topics = [f"{topic}-{number}" for number in range(3)]
    with service.stream(topics) as stream:
        stream.opened(TIMEOUT)
        sent = [service.publish(topic=topics[count % 3], data=str(count)) for count in range(15)]
        got = stream.take(15, TIMEOUT)
        assert [message.last_event_id for message in got] == sent
        assert data_of(got) == [str(count) for count in range(15)]
        assert sorted(sent, key=position) == sent
        assert len({epoch for epoch, _ in map(position, sent)}) == 1


def test_stream_may_name_a_thousand_topics(service: Way, topic: str) -> None:
    topics = [f"user-{number:020}" for number in range(1000)]
    with service.stream(topics, timeout=TIMEOUT) as stream:
        assert stream.status == 200
        stream.opened(TIMEOUT)
        id = service.publish(topics=topics, data="to all")
        assert stream.next(TIMEOUT) == Message("message", "to all", id)


# --- Resuming --------------------------------------------------------------------------------------------

RESUMES = {
    "by the header": ({"Last-Event-ID": "{1}"}, {}),
    "by last_event_id": ({}, {"last_event_id": "{1}"}),
    "by lastEventID": ({}, {"lastEventID": "{1}"}),
    "by the header before the query": ({"Last-Event-ID": "{1}"}, {"last_event_id": "{0}"}),
    "by the query under an empty header": ({"Last-Event-ID": ""}, {"last_event_id": "{1}"}),
}


@pytest.mark.parametrize(("headers", "query"), RESUMES.values(), ids=RESUMES)
def test_stream_resumes_after_the_id(service: Way, topic: str, headers: dict[str, str], query: dict[str, str]) -> None:
    ids = [service.publish(topic=topic, data=str(count)) for count in range(4)]
    asked = urlencode({"topic": topic} | {name: value.format(*ids) for name, value in query.items()})
    headers = {name: value.format(*ids) for name, value in headers.items()}
    with service.stream([], path=f"/events?{asked}", headers=headers) as stream:
        assert data_of(stream.take(2, TIMEOUT)) == ["2", "3"]
        service.publish(topic=topic, data="live")
        assert stream.next(TIMEOUT).data == "live"


def test_resume_from_the_newest_id_brings_only_what_is_new(service: Way, topic: str) -> None:
    id = service.publish(topic=topic, data="seen")
    with service.stream(topic, last_event_id=id) as stream:
        stream.opened(TIMEOUT)
        service.publish(topic=topic, data="new")
        assert stream.next(TIMEOUT).data == "new"


def test_id_of_another_topic_resumes_too(service: Way, topic: str) -> None:
    service.publish(topic=topic, data="before")
    id = service.publish(topic=f"{topic}-other", data="elsewhere")
    service.publish(topic=topic, data="after")
    with service.stream(topic, last_event_id=id) as stream:
        assert stream.next(TIMEOUT).data == "after"


def test_reader_that_lost_its_connection_before_any_event_misses_nothing(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        service.publish(topic=f"{topic}-other", data="makes the position known")
        stream.opened(TIMEOUT)
        stands_at = eventually(lambda: stream.last_event_id, message="no id before the first event")
    service.publish(topic=topic, data="missed")
    with service.stream(topic, last_event_id=stands_at) as stream:
        assert stream.next(TIMEOUT).data == "missed"


@pytest.mark.parametrize("where", ["header", "query"])
def test_earliest_brings_all_that_history_holds_then_live(service: Way, topic: str, where: str) -> None:
    for count in range(3):
        service.publish(topic=topic, data=str(count))
    asked = {"last_event_id": "earliest"} if where == "header" else {"query_last_event_id": "earliest"}
    with service.stream(topic, **asked) as stream:
        assert data_of(stream.take(3, TIMEOUT)) == ["0", "1", "2"]
        service.publish(topic=topic, data="live")
        assert stream.next(TIMEOUT).data == "live"


def test_event_comes_live_whatever_its_keep_and_history_brings_what_was_kept(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        first = service.publish(topic=topic, data="first")
        for keep, data in [("latest", "old"), ("none", "passing"), ("all", "all"), ("latest", "new"), ("none", "gone")]:
            service.publish(topic=topic, data=data, keep=keep, key="k")
        assert data_of(stream.take(6, TIMEOUT)) == ["first", "old", "passing", "all", "new", "gone"]
    with (service.stream(topic, last_event_id="earliest") as whole,
          service.stream(topic, last_event_id=first) as rest):
        assert data_of(whole.take(3, TIMEOUT)) == ["first", "all", "new"]
        assert data_of(rest.take(2, TIMEOUT)) == ["all", "new"]
        service.publish(topic=topic, data="live", keep="none")
        assert whole.next(TIMEOUT).data == rest.next(TIMEOUT).data == "live"


def test_replay_has_the_same_bytes_as_live(service: Way, topic: str) -> None:
    def frames(stream: Stream, count: int) -> bytes:
        stream.take(count, TIMEOUT)
        return bytes(stream.raw)[bytes(stream.raw).index(b"event: first") :]

    for envelope in (False, True):
        with service.stream(topic, envelope=envelope) as stream:
            stream.opened(TIMEOUT)
            before = service.publish(topic=f"{topic}-other", data="")
            service.publish(topic=topic, event="first", data="a\r\nb", retry=7)
            service.publish(topic=topic, data="\u2028 \0 \U0001f600")
            live = frames(stream, 2)
        with service.stream(topic, envelope=envelope, last_event_id=before) as stream:
            assert frames(stream, 2) == live


# --- Gaps ------------------------------------------------------------------------------------------------

FOREIGN_IDS = ["garbage", "0", "-", "12", "00000000001-5", "ffffffffffe-1", "é \U0001f600", "*", "null", "x" * 255]


@pytest.mark.parametrize("asked", FOREIGN_IDS)
def test_id_that_is_not_ours_is_told_as_a_gap_and_history_follows(service: Way, topic: str, asked: str) -> None:
    first = service.publish(topic=topic, data="held")
    with service.stream(topic, query_last_event_id=asked) as stream:
        gap, held = stream.take(2, TIMEOUT)
        assert gap.type == "gap"
        told = json.loads(gap.data)
        assert list(told) == ["from", "to", "reason"]
        assert (told["from"], told["reason"]) == (asked, "epoch")
        assert position(gap.last_event_id) < position(first)
        assert held == Message("message", "held", first)
        service.publish(topic=topic, data="live")
        assert stream.next(TIMEOUT).data == "live"


def test_gap_comes_alone_when_history_holds_nothing_and_live_follows(service: Way, topic: str) -> None:
    with service.stream(topic, last_event_id="garbage") as stream:
        gap = stream.next(TIMEOUT)
        assert (gap.type, json.loads(gap.data)["reason"]) == ("gap", "epoch")
        id = service.publish(topic=topic, data="live")
        assert stream.next(TIMEOUT) == Message("message", "live", id)


def test_id_that_is_ahead_of_the_log_is_told_as_a_gap_and_live_follows(service: Way, topic: str) -> None:
    epoch, seq = position(service.publish(topic=topic, data="held"))
    with service.stream(topic, last_event_id=f"{epoch}-{seq + 1_000_000}") as stream:
        gap = stream.next(TIMEOUT)
        told = json.loads(gap.data)
        assert (told["from"], told["reason"]) == (f"{epoch}-{seq + 1_000_000}", "epoch")
        service.publish(topic=topic, data="live")
        messages = stream.until(lambda message: message.data == "live", TIMEOUT)
        assert all(position(message.last_event_id) >= position(gap.last_event_id) for message in messages)


def test_trimmed_history_is_told_as_a_gap_and_the_rest_follows_in_order(service: Way, topic: str) -> None:
    first = service.publish(topic=topic, data="first")
    ids = service.publish_lines([{"topic": topic, "data": str(count)} for count in range(3 * HISTORY)])

    def trimmed() -> list[Message] | None:
        with service.stream(topic, last_event_id=first) as stream:
            messages = stream.until(lambda message: message.last_event_id == ids[-1], TIMEOUT)
        return messages if len(messages) == 1 + HISTORY else None

    gap, *rest = eventually(trimmed, TIMEOUT, 0.1, "history was not trimmed to its bound")
    assert gap.type == "gap"
    assert [message.last_event_id for message in rest] == ids[-HISTORY:]
    assert json.loads(gap.data) == {"from": first, "to": ids[-HISTORY - 1], "reason": "trimmed"}
    assert gap.last_event_id == ids[-HISTORY - 1]

    with service.stream(topic, last_event_id=gap.last_event_id) as stream:
        assert [message.last_event_id for message in stream.take(HISTORY, TIMEOUT)] == ids[-HISTORY:]
    with service.stream(topic, last_event_id="earliest") as stream:
        assert [message.last_event_id for message in stream.take(HISTORY, TIMEOUT)] == ids[-HISTORY:]


def test_gap_in_envelope_form_is_the_same_event(service: Way, topic: str) -> None:
    with service.stream(topic, envelope=True, last_event_id="garbage") as stream:
        gap = stream.next(TIMEOUT)
        assert (gap.type, list(json.loads(gap.data))) == ("gap", ["from", "to", "reason"])


# --- Heartbeats ------------------------------------------------------------------------------------------


def test_silence_is_broken_by_comments_and_a_busy_stream_gets_none(service: Way, topic: str) -> None:
    with service.stream(f"{topic}-silent") as silent, service.stream(topic) as busy:
        silent.opened(TIMEOUT)
        busy.opened(TIMEOUT)
        begun = published = time.monotonic()
        first, length = len(silent.reader.comments), len(silent.raw)
        while len(silent.reader.comments) < first + 2:
            before, last, published = len(busy.reader.comments), published, time.monotonic()
            assert published < begun + TIMEOUT, "no heartbeats"
            service.publish(topic=topic, data="x")
            busy.next(TIMEOUT)
            if time.monotonic() - last < HEARTBEAT / 3:  # a machine that paused for longer has made a silence
                assert len(busy.reader.comments) == before
            silent.quiet(0.05)
        assert time.monotonic() - begun >= HEARTBEAT, "heartbeats come faster than was asked for"
        assert re.fullmatch(rb"(:\n)+", silent.raw[length:])


def test_heartbeat_does_not_change_what_a_reader_resumes_from(service: Way, topic: str) -> None:
    id = service.publish(topic=topic, data="seen")
    with service.stream(topic, last_event_id=id) as stream:
        stream.opened(TIMEOUT)
        before = len(stream.reader.comments)
        eventually(lambda: stream.quiet(0.2) or len(stream.reader.comments) > before, TIMEOUT, 0)
        assert stream.reader.last_event_id in ("", id)
        assert not stream.reader.has_incomplete()


# --- Other ways to ask -----------------------------------------------------------------------------------


@served
def test_http_1_0_client_gets_the_stream_unframed(service: Way, topic: str) -> None:
    service.publish(topic=topic, data="held")
    with service.stream(topic, version="1.0", last_event_id="earliest") as stream:
        assert stream.status == 200
        assert "transfer-encoding" not in stream.headers
        assert "content-length" not in stream.headers
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.next(TIMEOUT).data == "held"
        service.publish(topic=topic, data="live")
        assert stream.next(TIMEOUT).data == "live"
        assert stream.raw.startswith(b"retry: ")
        eventually(lambda: stream.quiet(0.2) or stream.reader.comments[1:], TIMEOUT, 0, "no heartbeat")


def test_head_answers_the_headers_and_leaves_no_stream_open(service: Way, topic: str) -> None:
    opened = metric(service, "pushsvc_streams_opened_total")
    with service.stream(topic, last_event_id="earliest") as stream:
        streamed = stream.headers
    eventually(lambda: metric(service, "pushsvc_streams_opened_total") > opened)
    opened = metric(service, "pushsvc_streams_opened_total")
    answer = service.request("HEAD", f"/events?topic={topic}", headers={"Connection": "keep-alive"})
    assert (answer.status, answer.body) == (200, b"")
    for name in ("content-type", "cache-control", "x-accel-buffering"):
        assert answer.headers[name] == streamed[name]
    # "A server MAY send a Content-Length header field in a response to a HEAD request; a server MUST NOT send
    # Content-Length in such a response unless its field value equals the decimal number of octets that would have been
    # sent in the content of a response if the same request had used the GET method." (RFC 9110, section 8.6)
    assert "content-length" not in answer.headers
    eventually(lambda: metric(service, "pushsvc_streams") == 0, 30, message="HEAD has left a stream open")
    assert metric(service, "pushsvc_streams_opened_total") == opened


def test_head_is_refused_as_get_is(service: Way) -> None:
    answer = service.request("HEAD", "/events")
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")


REFUSED = {
    "no query": "",
    "no topic": "envelope=1",
    "an empty topic": "topic=",
    "one empty topic of two": "topic=a&topic=",
    "a control character": "topic=a%00b",
    "a line end": "topic=a%0Ab",
    "a C1 control character": "topic=a%C2%85b",
    "a topic of 256 bytes": "topic=" + "a" * 256,
    "a topic of 128 characters and 256 bytes": "topic=" + "%C3%A9" * 128,
    "a topic that is not UTF-8": "topic=%FF",
    "a topic that is a surrogate": "topic=%ED%A0%80",
    "too many topics": "&".join(f"topic={number}" for number in range(1001)),
    "an unknown field": "topic=a&topics=b",
    "an unknown field that is not UTF-8": "topic=a&%FF=b",
    "a repeated field": "topic=a&envelope=1&envelope=1",
    "an envelope that is no flag": "topic=a&envelope=yes",
    "an empty envelope": "topic=a&envelope=",
    "an id with a line end": "topic=a&last_event_id=1%0A2",
    "an id with NUL": "topic=a&last_event_id=%00",
    "an id that is too long": "topic=a&last_event_id=" + "1" * 256,
    "an id of 128 characters and 256 bytes": "topic=a&last_event_id=" + "%C3%A9" * 128,
    "two spellings of the id": "topic=a&last_event_id=1&lastEventID=1",
}


@pytest.mark.parametrize("query", REFUSED.values(), ids=REFUSED)
def test_request_that_breaks_the_contract_is_a_problem(service: Way, query: str) -> None:
    answer = service.request("GET", f"/events?{query}")
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
    problem = answer.json()
    assert (problem["status"], bool(problem["title"]), bool(problem["detail"])) == (400, True, True)


def test_unknown_query_field_is_told_the_nearest_that_exists(service: Way) -> None:
    assert "'topic'" in service.request("GET", "/events?topci=a").json()["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_method_is_a_problem_that_says_what_is_allowed(service: Way, method: str) -> None:
    answer = service.request(method, "/events?topic=a")
    assert (answer.status, answer.headers["content-type"]) == (405, "application/problem+json")
    assert {"GET", "HEAD"} <= set(answer.headers["allow"].split(", "))


# --- gunicorn's own worker as the measure ----------------------------------------------------------------


FRAMING = {"connection", "date", "server", "transfer-encoding"}  # the fields that are the server's


def test_stream_is_the_same_on_every_way(parked: Served, plain: Served, inside: Inside, topic: str) -> None:
    def seen(service: Way, topic: str, **asked: Any) -> tuple[dict[str, str], bytes, bytes]:
        """Headers, bytes and heartbeat of a stream of the same story: a gap, history, live events, silence."""
        epoch, begin = position(service.publish(topic=topic, data="held", event="a"))
        service.publish_lines([{"topic": topic, "data": data} for data in NASTY[:5]])
        with service.stream([topic, f"{topic}-b"], last_event_id="garbage", **asked) as stream:
            stream.take(7, TIMEOUT)
            for data in NASTY[5:]:
                service.publish(topics=[f"{topic}-b", topic], data=data, event="b", retry=5)
                stream.next(TIMEOUT)
            story = bytes(stream.raw).replace(b"\n:\n", b"\n")  # a slow machine has made a silence
            ids = re.compile(rb"%b-([1-9]\d*)" % epoch.encode())  # but 0, which the gap begins with
            story = ids.sub(lambda found: b"E-%d" % (int(found[1]) - begin), story).replace(epoch.encode(), b"E")
            length = len(stream.raw)
            if not asked:
                eventually(lambda: stream.quiet(0.2) or len(stream.raw) > length, TIMEOUT, 0)
        headers = {name: value for name, value in stream.headers.items() if name != "date"}
        return headers, story, bytes(stream.raw[length:])

    for name, asked in {"plain": {}, "envelope": {"envelope": True}, "unframed": {"version": "1.0"}}.items():
        headers, *bodies = seen(parked, f"{topic}-{name}", **asked)
        assert seen(plain, f"{topic}-{name}", **asked) == (headers, *bodies)
        if name != "unframed":
            own = {name: value for name, value in headers.items() if name not in FRAMING}
            assert seen(inside, f"{topic}-{name}", **asked) == (own, *bodies)


def test_client_that_closes_its_sending_side_is_gone_where_streams_are_parked_only(
        parked: Served, plain: Served, topic: str) -> None:
    """What differs around a stream (ADR 8): the epoll set of the parked ones tells of it, a plain one is not asked."""
    with parked.stream(topic) as stream:
        stream.opened(TIMEOUT)._socket.shutdown(socket.SHUT_WR)
        assert stream.rest(TIMEOUT) == []
        assert not stream.clean_end
    with plain.stream(topic) as stream:
        stream.opened(TIMEOUT)._socket.shutdown(socket.SHUT_WR)
        plain.publish(topic=topic, data="still here")
        assert stream.next(TIMEOUT).data == "still here"


TARGETS = [
    "/events?topic=a", "/events", "/events?", "/events?topic=", "/events?topic=a&topic=b&envelope=1",
    "/events?topic=%C3%A9+x", "/events?topic=é", "/events?topic=%FF", "/events?topic=a#x", "/events#?topic=a",
    "/events?topic=a?b", "/events?topic=a;b", "/events/?topic=a", "//events?topic=a", "/%65vents?topic=a",
    "/./events?topic=a", "/EVENTS?topic=a", "/events%00?topic=a", "http://other/events?topic=a", "events?topic=a", "*",
    "/events?topic=a b", "/events?topic=a\tb", "/events?topic=\x7f", "/events?topic=a&last_event_id=garbage",
    "/events?topic=" + "a" * 256,
]  # fmt: skip
FIELDS = [
    "", "Host: other", "host: x", "Last-Event-ID: garbage", "last-event-id:garbage", "Last-Event-ID: \t garbage \t",
    "Last-Event-ID:", "Last-Event-ID: a\r\nLast-Event-ID: b", "Last_Event_ID: garbage", "Last-Event-ID: \xff",
    "Last-Event-ID: é", "Last-Event-ID: a\x01", "Last-Event-ID: a\0", "Last-Event-ID: a\r\n b", "Last-Event-ID : a",
    " Last-Event-ID: a", "Last-Event-ID", "X: a\nLast-Event-ID: b", "Connection: close", "connection: Close",
    "Connection: keep-alive\r\nConnection: close", "Connection: close\r\nConnection: keep-alive",
    "Connection: x\r\nConnection: close",
    "Connection: keep-alive, close", "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    "Content-Length: 0", "Content-Length: 3", "Content-Length: x", "Content-Length: 0\r\nContent-Length: 1",
    "Transfer-Encoding: x", "Transfer-Encoding: chunked", "Content-Type: a\r\nContent-Type: b", "Expect: 100-continue",
    "Expect: x", "TE: trailers", "X-Forwarded-Proto: https", "X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1",
    "Script-Name: /x", "Path-Info: /x", "Cookie: a=b\r\nCookie: c=d", "Cookie: \xff=\xfe",
    "Origin: https://evil.example", "Authorization: Bearer x", "X: " + "x" * 8000, "X: " + "x" * 9000,
    "\r\n".join(f"X-{number}: x" for number in range(99)), "\r\n".join(f"X-{number}: x" for number in range(120)),
    "é: x", "X@Y: x", ": x", "X:y: z",
]  # fmt: skip
REQUESTS = [f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n" for target in TARGETS]
REQUESTS += ["\r\n".join(["GET /events?topic=a HTTP/1.1", "Host: x", *filter(None, [each]), "", ""]) for each in FIELDS]
REQUESTS += [
    f"{line}\r\nHost: x\r\n\r\n"
    for line in (
        "GET /events?topic=a HTTP/1.0", "GET /events?topic=a HTTP/1.2", "GET /events?topic=a HTTP/2.0",
        "GET /events?topic=a", "get /events?topic=a HTTP/1.1", "HEAD /events?topic=a HTTP/1.1",
        "OPTIONS /events HTTP/1.1", "POST /events?topic=a HTTP/1.1", "GET  /events?topic=a HTTP/1.1",
        "GET /events?topic=a  HTTP/1.1", "GET /events?topic=a HTTP/1.1 ", " GET /events?topic=a HTTP/1.1",
        "\r\nGET /events?topic=a HTTP/1.1", "\r\n\r\nGET /events?topic=a HTTP/1.1", "\nGET /events?topic=a HTTP/1.1",
    )
]  # fmt: skip
REQUESTS += [
    "GET /events?topic=a HTTP/1.1\r\n\r\n",
    "GET /events?topic=a HTTP/1.1\nHost: x\n\n",
    "GET /events HTTP/1.1\r\nHost: x\r\n\r\nGET /events?topic=a HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /events?topic=a HTTP/1.1\r\nHost: x\r\n\r\nGET /events HTTP/1.1\r\nHost: x\r\n\r\n",
]


def answer_to(url: str, request: str) -> tuple[str, list[tuple[str, list[str]]], bytes]:
    """Status line, headers and body (of a stream: how it begins) of what a request gets that is sent as it is."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT) as connection:
        connection.sendall(request.encode("utf-8" if "é" in request else "latin-1"))
        answer = http.client.HTTPResponse(connection, method=request.split()[0])
        answer.begin()
        streams = answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream"
        body = b"" if streams and request.startswith("HEAD") else answer.read1() if streams else answer.read()
        answer.close()
    headers = [(name, sorted(value.split(", "))) for name, value in answer.getheaders() if name != "Date"]
    return f"{answer.version} {answer.status} {answer.reason}", headers, re.sub(rb"[0-9a-f]{11}-\d+", b"ID", body)


@pytest.mark.parametrize("sent", REQUESTS, ids=lambda sent: ascii(sent)[:80])
def test_request_is_understood_as_under_gunicorns_own_worker(parked: Served, plain: Served, sent: str) -> None:
    """The worker reads the requests of returning clients by itself: it may not read them otherwise."""
    expected = answer_to(plain.url, sent)
    for _ in range(3):  # the worker that has not yet had such a request, and the one that has
        assert answer_to(parked.url, sent) == expected


@served
def test_chunks_are_framed_as_gunicorn_frames_them(service: Way, topic: str) -> None:
    with service.stream(topic) as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, data="x" * 2700)
        frame = f"id: {id}\ndata: {'x' * 2700}\n\n".encode()
        assert stream.next(TIMEOUT).data == "x" * 2700
        assert bytes(stream.wire).endswith(b"\r\nA%X\r\n%b\r\n" % (len(frame) - 0xA00, frame))


def test_connections_that_are_not_kept_are_closed_on_every_way(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, args=["--keep-alive", "0"]) as server:
        for _ in range(2):
            with socket.create_connection((server.host, server.port), TIMEOUT) as connection:
                connection.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b"".join(iter(partial(connection.recv, 4096), b""))
            assert b"\r\nConnection: close\r\n" in answer
            with Stream(server.url, "a") as stream:
                assert stream.opened(TIMEOUT).headers["connection"] == "close"


@served
@pytest.mark.parametrize(("sent", "status"), [
    ("GET /events?topic=a HTTP/2.9\r\n\r\n", 400), ("nonsense\r\n\r\n", 400), ("GET / HTTP/1.1\r\n: x\r\n\r\n", 400),
    ("GET /events?topic=a HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
    ("POST /publish HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n", 400),
    ("POST /publish HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, x, chunked\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n" + "X: " + "x" * 9000 + "\r\n\r\n", 431),
])  # fmt: skip
def test_request_that_cannot_be_read_is_a_problem_too(
        service: Served, sent: str, status: int) -> None:
    line, headers, body = answer_to(service.url, sent)
    problem = json.loads(body)
    assert line.split()[1] == str(status) == str(problem["status"])
    assert dict(headers)["Content-Type"] == ["application/problem+json"]
    assert problem["title"]
    assert problem["detail"]


# --- Other readers ---------------------------------------------------------------------------------------


class Curl:
    """`curl -N` on a stream; `shown` is what it has put out so far, as a standard reader reads it."""

    def __init__(self, address: str) -> None:
        self.reader = EventReader()
        self.messages: list[Message] = []
        self._process = subprocess.Popen(["curl", "-sN", address], stdout=subprocess.PIPE)

    def __enter__(self) -> "Curl":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def shown(self, count: int) -> list[Message]:
        """Waits for the opening and `count` messages."""
        assert self._process.stdout is not None
        while len(self.messages) < count or not self.reader.comments:
            part = self._process.stdout.read1(65_536)
            assert part, "curl has ended"
            self.messages += self.reader.feed(part)
        return self.messages


@served
def test_curl_subscribes_publishes_and_resumes(service: Served, topic: str) -> None:
    with Curl(f"{service.url}/events?topic={topic}") as curl:
        curl.shown(0)
        form = ["-d", f"topic={topic}", "-d", "data=hello"]
        answer = subprocess.check_output(["curl", "-sS", *form, f"{service.url}/publish"], timeout=TIMEOUT)
        first = json.loads(answer)["id"]
        assert curl.shown(1) == [Message("message", "hello", first)]
    second = service.publish(topic=topic, event="more", data="two\nlines")
    with Curl(f"{service.url}/events?topic={topic}&last_event_id={first}") as curl:
        assert curl.shown(1) == [Message("more", "two\nlines", second)]


@served
def test_an_sse_library_reads_the_same_events(service: Served, topic: str) -> None:
    data = NASTY[: HISTORY - 1]
    ids = service.publish_lines([{"topic": topic, "event": "nasty", "data": each} for each in data])
    url, params = f"{service.url}/events", {"topic": topic, "last_event_id": "earliest"}
    with httpx.Client(timeout=TIMEOUT) as client, connect_sse(client, "GET", url, params=params) as source:
        events = source.iter_sse()
        got = [next(events) for _ in data]
        id = service.publish(topic=topic, data="live")
        live = next(events)
    assert [(each.event, each.id) for each in got] == [("nasty", id) for id in ids]
    assert [each.data for each in got] == [normal(each) for each in data]
    assert (live.event, live.id, live.data) == ("message", id, "live")


# --- What is published is what is read -------------------------------------------------------------------

TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=200),
    st.text(st.sampled_from("\r\n\0 :ab\u2028\ufeff\U0001f600"), max_size=30),
)
NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=80).filter(
    lambda name: len(name.encode()) <= 255
)


class Echo:
    """Publishes in each form and reads it back in both wire forms, on two streams that stay open."""

    def __init__(self, service: Way, topic: str) -> None:
        self.service = service
        self.topic = topic
        self.plain = service.stream(topic, timeout=TIMEOUT).opened(TIMEOUT)
        self.envelope = service.stream(topic, envelope=True, timeout=TIMEOUT).opened(TIMEOUT)

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()
        self.envelope.close()

    def check(self, data: str, **fields: Any) -> None:
        sent = {"topic": self.topic, "data": data, **fields}
        ids = [
            self.service.publish(**sent),
            self.service.publish_form(list(sent.items())),
            *self.service.publish_lines([sent, sent]),
        ]
        event = fields.get("event", "message")
        for id, plain, enveloped in zip(ids, self.plain.take(4, TIMEOUT), self.envelope.take(4, TIMEOUT), strict=True):
            assert plain == Message(event, normal(data), id)
            assert json.loads(enveloped.data) == {"id": id, "topic": self.topic, "event": event, "data": data}


@pytest.fixture(scope="module")
def echo(service: Way) -> Iterator[Echo]:
    with Echo(service, "echo") as echo:
        yield echo


@settings(max_examples=100, deadline=None, database=None)
@given(data=TEXT)
def test_data_is_read_as_it_was_published(echo: Echo, data: str) -> None:
    echo.check(data)


@settings(max_examples=40, deadline=None, database=None)
@given(data=TEXT, event=NAME, key=NAME)
def test_event_and_key_may_be_any_valid_name(echo: Echo, data: str, event: str, key: str) -> None:
    echo.check(data, event=event, key=key)


@settings(max_examples=40, deadline=None, database=None)
@given(topic=NAME)
def test_topic_may_be_any_valid_name(service: Way, topic: str) -> None:
    query = urlencode({"topic": topic, "envelope": "1"}, quote_via=quote)
    with service.stream([], path=f"/events?{query}") as stream:
        stream.opened(TIMEOUT)
        id = service.publish(topic=topic, data="x")
        form = service.publish_form([("topics", topic), ("topics", f"{topic[:1]}-other"), ("data", "y")])
        first, second = map(json.loads, data_of(stream.take(2, TIMEOUT)))
        assert (first["id"], first["topic"], first["data"]) == (id, topic, "x")
        assert (second["id"], second["topic"], second["data"]) == (form, topic, "y")
