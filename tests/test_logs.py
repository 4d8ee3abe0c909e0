"""Logs: lines that a machine can read, a line per process event, and nothing that is a secret or a frame."""

import datetime
import json
import logging
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pushsvc import __version__
from pushsvc.log import Formatter, config
from pushsvc.settings import Settings
from tests.support.client import Stream, publish, publish_lines, request
from tests.support.server import Server
from tests.support.wait import eventually

TIMEOUT = 20  # for what takes milliseconds on an idle machine
TEXT = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>debug|info|warning|error|critical) (?P<pid>\d+) "
    r"(?P<logger>[\w.]+): (?P<message>.*)"
)
EXTRA = re.compile(r' (?P<name>[a-z_]+)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s"=]+)')
# The three lines to try it with go to standard output, for people; the log goes to standard error.
BANNER = re.compile(r"pushsvc listens on |  (subscribe|publish|resume|console)  ")
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl-_c2lnbmF0dXJl"
FORMATS = ["text", "json"]


def record(message: str = "happened", *args: object, error: bool = False, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("pushsvc.x", logging.INFO, __file__, 1, message, args, sys.exc_info() if error else None)
    vars(made).update(extra)
    return made


def written(server: Server) -> list[str]:
    """The lines of a server's log."""
    return [line for line in server.log().splitlines() if line and not BANNER.match(line)]


def parsed(line: str, shape: str) -> dict[str, Any]:
    """The fields of an entry. Raises AssertionError for what is none."""
    if shape == "json":
        entry = json.loads(line)
        assert isinstance(entry, dict)
        return entry
    head = TEXT.fullmatch(line)
    assert head, f"not a line of the log: {line!r}"
    return {**head.groupdict(), "extras": dict(EXTRA.findall(head["message"]))}


class Talk:
    """A server of one log format and level, and what it wrote while it served, was reloaded and stopped."""

    def __init__(self, server: Server, shape: str) -> None:
        self.server = server
        self.shape = shape

    def ours(self, name: str) -> list[dict[str, Any]]:
        """The entries that are ours, not gunicorn's, and begin so."""
        entries = [parsed(line, self.shape) for line in written(self.server)]
        return [each for each in entries if each["logger"].startswith("pushsvc") and each["message"].startswith(name)]


@pytest.fixture(scope="module", params=[("text", "info"), ("json", "info"), ("json", "debug")], ids="-".join)
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    shape, level = request.param
    env = {"PUSHSVC_LOG_FORMAT": shape, "PUSHSVC_LOG_LEVEL": level, "PUSHSVC_HEARTBEAT_SECONDS": "0.5"}
    with Server(tmp_path_factory.mktemp(f"{shape}-{level}"), workers=1, env=env) as server:
        talk = Talk(server, shape)
        yield talk


# --- The formatter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FORMATS)
def test_entry_says_when_how_grave_who_and_what(shape: str) -> None:
    made = record("lost %d of %s", 3, "four")
    made.created, made.msecs, made.process = 1_700_000_000.25, 250.0, 42
    entry = parsed(Formatter(shape).format(made), shape)
    assert entry["at"] == "2023-11-14T22:13:20.250Z"
    assert datetime.datetime.fromisoformat(entry["at"]).utcoffset() == datetime.timedelta(0)
    assert (entry["level"], int(entry["pid"]), entry["logger"]) == ("info", 42, "pushsvc.x")
    assert entry["message"] == "lost 3 of four"


def test_extras_are_key_value_pairs_in_text() -> None:
    line = Formatter("text").format(record(topics=2, reason="slow", detail='said "no way"', empty="", odd="a=b"))
    assert line.endswith(r'happened topics=2 reason=slow detail="said \"no way\"" empty="" odd="a=b"')
    assert list(parsed(line, "text")["extras"]) == ["topics", "reason", "detail", "empty", "odd"]


def test_extras_are_fields_in_json() -> None:
    entry = parsed(Formatter("json").format(record(topics=2, reason="slow", who=None, odd=b"\xff")), "json")
    assert (entry["topics"], entry["reason"], entry["who"]) == (2, "slow", None)
    assert "odd" in entry


HOSTILE = [
    "two\nlines", "CR\r", "tab\t", '"quoted"', "back\\slash", "\x1b[31m", "\u2028", "\0", "\ud800", "ü", "", "{}", "%s"
]  # fmt: skip


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("value", HOSTILE)
def test_extra_of_any_value_stays_on_its_line(shape: str, value: str) -> None:
    line = Formatter(shape).format(record(user=value))
    assert len(line.split("\n")) == len(line.split("\r")) == 1
    entry = parsed(line, shape)
    assert shape == "text" or entry["user"] == value


@pytest.mark.parametrize("message", HOSTILE)
def test_message_of_any_text_is_one_line_of_json(message: str) -> None:
    assert parsed(Formatter("json").format(record("%s", message)), "json")["message"] == message


def test_traceback_follows_its_line_in_text_and_is_a_field_in_json() -> None:
    try:
        raise ValueError("at hand")
    except ValueError:
        text = Formatter("text").format(record(error=True, path="/x"))
        entry = parsed(Formatter("json").format(record(error=True, path="/x")), "json")
    first, *rest = text.split("\n")
    assert parsed(first, "text")["extras"] == {"path": "/x"}
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: at hand"
    assert entry["error"].splitlines() == rest


LEAKS = {
    "a URL": "GET /events?topic=a&access_token={} HTTP/1.1",
    "a URL that ends there": "/events?access_token={}",
    "a URL with more": "/events?access_token={}&topic=a",
    "a URL in quotes": '"http://a/?access_token={}" "curl"',
    "a URL in other quotes": "InvalidRequestLine('/?access_token={}')",
    "bytes": "b'GET /?access_token={}\\r\\n'",
    "another spelling": "/events?access%5Ftoken={}",
    "an escaped sign": "/events?access_token%3D{}",
    "a header": "Authorization: Bearer {}",
    "a cookie": "{{'HTTP_COOKIE': 'a=b; pushsvc_token={}'}}",
    "two": "{0} and access_token={0}",
    "alone": "{}",
}


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_token_is_blotted_out_of_message_extra_and_traceback(shape: str, leak: str) -> None:
    text = leak.format(JWT)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        made = [record("%s", text), record(text.replace("%", "%%")), record(uri=text), record(error=True)]
    for line in map(Formatter(shape).format, made):
        assert JWT.split(".")[2] not in line
        assert JWT.split(".")[1] not in line
        assert "***" in line
        parsed(line.split("\n")[0], shape)


@pytest.mark.parametrize("shape", FORMATS)
def test_token_in_the_query_is_blotted_out_whatever_it_looks_like(shape: str) -> None:
    said = '"GET /?access_token=s3cret-~+/%3D&topic=a HTTP/1.1" "http://a/?access_token=s3cret"'
    line = Formatter(shape).format(record(said))
    assert "s3cret" not in line
    assert "&topic=a HTTP/1.1" in line
    parsed(line, shape)


@pytest.mark.parametrize("shape", FORMATS)
def test_what_is_no_token_is_left_as_it_is(shape: str) -> None:
    said = "GET /events?topic=eyJ.b&last_event_id=18c-1 pushsvc.brokers.sqlite 1.2.3 access_tokens"
    assert parsed(Formatter(shape).format(record("%s", said)), shape)["message"] == said


def test_configuration_has_the_level_and_format_of_the_settings() -> None:
    made = config(Settings(log_level="warning", log_format="json"))
    assert made["formatters"]["pushsvc"]["shape"] == "json"
    assert {made["loggers"][name]["level"] for name in ("pushsvc", "gunicorn.error")} == {"WARNING"}


# --- The running service ---------------------------------------------------------------------------------


def test_streams_and_frames_write_nothing_but_a_line_per_stream_at_debug(talk: Talk) -> None:
    url, topic = talk.server.url, f"topic-{uuid.uuid4().hex}"
    data = f"payload-{uuid.uuid4().hex}"
    before = len(talk.ours(""))
    closed = len(talk.ours("stream closed"))
    for _ in range(3):
        with Stream(url, topic) as stream:
            stream.opened(TIMEOUT)
            publish_lines(url, [{"topic": topic, "data": data}] * 20)
            publish(url, topic=topic, data=data)
            stream.take(21, TIMEOUT)
    eventually(lambda: metric(url, "pushsvc_streams") == 0, TIMEOUT)
    debug = "debug" in talk.server.directory.name
    eventually(lambda: len(talk.ours("stream closed")) == closed + 3 * debug, TIMEOUT)
    assert len(talk.ours("")) == before + 3 * debug, "there is more than a line per stream"
    assert data not in talk.server.log()
    assert topic not in talk.server.log()
    if debug:
        entry = talk.ours("stream closed")[-1]
        assert (entry["level"], entry["reason"], entry["address"]) == ("debug", "gone", "127.0.0.1")


def metric(url: str, name: str) -> float:
    """The sum of a metric over all workers and labels."""
    text = request("GET", f"{url}/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def test_requests_are_not_logged_unless_an_access_log_is_asked_for(talk: Talk) -> None:
    request("GET", f"{talk.server.url}/nothing")
    request("POST", f"{talk.server.url}/publish", "x")
    entries = [parsed(line, talk.shape) for line in written(talk.server)]
    assert not [entry for entry in entries if entry["logger"] == "gunicorn.access"]


def test_each_event_of_a_process_is_one_line(talk: Talk) -> None:
    """Last of this file for each server: it ends it."""
    server = talk.server
    started = len(talk.ours("started"))
    assert started == 1
    with Stream(server.url, "t") as stream:
        stream.opened(TIMEOUT)
        server.reload()
        assert stream.rest(TIMEOUT) == []
    eventually(lambda: len(talk.ours("started")) == 2, TIMEOUT)
    server.wait_ready()
    server.terminate(TIMEOUT)
    for name in ("started", "draining", "drained"):
        entries = talk.ours(name)
        assert len(entries) == 2, f"{name}: {entries}"
        assert len({entry["pid"] for entry in entries}) == 2, "they should be of two workers"
        assert {entry["level"] for entry in entries} == {"info"}
    first = talk.ours("started")[0]
    said = first["extras"] if talk.shape == "text" else first
    assert str(said["broker"]).startswith("sqlite:")
    assert "Traceback" not in server.log()
    for line in written(server):
        parsed(line, talk.shape)


def test_access_log_that_was_asked_for_has_a_line_per_request_in_the_same_format(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    env = {"PUSHSVC_LOG_FORMAT": "json"}
    with Server(tmp_path_factory.mktemp("asked"), workers=1, env=env, args=["--access-logfile", "-"]) as server:
        agent, referer = 'an "agent" \\', "http://a/?access_token=secret"
        request("GET", f"{server.url}/nothing?a=b", headers={"User-Agent": agent, "Referer": referer})

        def entry() -> list[dict[str, Any]]:
            entries = [parsed(line, "json") for line in written(server)]
            return [each for each in entries if each["logger"] == "gunicorn.access" and "/nothing" in each["message"]]

        assert len(eventually(entry, TIMEOUT)) == 1
        assert "GET /nothing?a=b HTTP/1.1" in entry()[0]["message"]
        assert "secret" not in server.log()


def test_access_log_has_a_parked_stream_when_it_has_opened_and_another_when_it_ends(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    env = {"PUSHSVC_LOG_FORMAT": "json"}
    with Server(tmp_path_factory.mktemp("asked"), workers=1, env=env, args=["--access-logfile", "-"]) as server:
        def entries(topic: str) -> list[dict[str, Any]]:
            return [entry for line in written(server) if (entry := parsed(line, "json"))["logger"] == "gunicorn.access"
                    and f"topic={topic} " in entry["message"]]

        def written_to() -> list[dict[str, Any]]:
            publish(server.url, topic="lent", data="it sees that its client has gone")
            return entries("lent")

        with Stream(server.url, "parked") as parked, Stream(server.url, "lent", version="1.0") as lent:
            parked.opened(TIMEOUT)
            lent.opened(TIMEOUT)
            assert len(eventually(lambda: entries("parked"), TIMEOUT)) == 1
            assert not entries("lent")
        eventually(written_to, TIMEOUT)
        assert len(entries("parked")) == 1


def test_metrics_are_told_also_while_a_worker_makes_its_file(tmp_path: Path) -> None:
    """prometheus_client makes it empty first."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    with Server(tmp_path / "server", workers=1, env={"PROMETHEUS_MULTIPROC_DIR": str(folder)}) as server:
        assert any(folder.glob("counter_*.db"))
        (folder / "counter_1.db").touch()
        answer = request("GET", f"{server.url}/metrics")
        assert answer.status == 200
        assert "\npushsvc_published_total 0.0\n" in answer.text
        assert answer.text.count(f'\npushsvc_build_info{{version="{__version__}"}} 1.0\n') == 1


def test_what_a_worker_counted_last_is_in_the_metrics_when_it_has_been_replaced(tmp_path: Path) -> None:
    with Server(tmp_path / "server", workers=1) as server, Stream(server.url, "t") as stream:
        stream.opened(TIMEOUT)
        [old] = server.worker_pids()
        for _ in range(5):
            publish(server.url, topic="t", data="x")
        stream.take(5, TIMEOUT)
        server.reload()
        assert stream.rest(TIMEOUT) == []
        eventually(lambda: (now := server.worker_pids()) and old not in now, TIMEOUT)
        server.wait_ready()
        for name in ("published_total", "received_total", "delivered_total"):
            assert metric(server.url, f"pushsvc_{name}") == 5, name
        assert '\npushsvc_evicted_total{reason="drain"} 1.0\n' in request("GET", f"{server.url}/metrics").text
