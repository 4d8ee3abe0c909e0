"""`POST /publish`: what is accepted arrives, what is refused changes nothing, and a key makes a repetition harmless."""

import http.client
import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import gevent
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.client import Response, Stream, publish, publish_form, publish_lines, request
from tests.support.server import Server
from tests.support.wait import eventually

MIB = 1 << 20
TIMEOUT = 20  # for what takes milliseconds on an idle machine
FORM, JSON, NDJSON = "application/x-www-form-urlencoded", "application/json", "application/x-ndjson"
ID = re.compile(r"[0-9a-f]{11}-[1-9][0-9]*")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("publish"), env={"PUSHSVC_LOG_LEVEL": "debug"}) as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return server.url


@pytest.fixture
def topic() -> str:
    """A topic of the test's own."""
    return f"t-{uuid.uuid4().hex}"


def post(url: str, body: bytes | str, kind: str | None = JSON, path: str = "/publish", **headers: str) -> Response:
    sent = {} if kind is None else {"Content-Type": kind}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return request("POST", url + path, body, sent, timeout=TIMEOUT)


def post_chunked(url: str, body: bytes, kind: str) -> Response:
    """As `post`, with the body in chunks and no Content-Length."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    try:
        parts = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
        connection.request("POST", "/publish", parts, {"Content-Type": kind}, encode_chunked=True)
        answer = connection.getresponse()
        return Response(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def raw(url: str, sent: bytes) -> bytes:
    """What comes back for these bytes and then no more."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65_536):
            answer += data
        return answer


def history(url: str, topic: str) -> list[tuple[str, str]]:
    """(id, data) of all events that history holds for a topic."""
    with Stream(url, topic, last_event_id="earliest") as stream:
        end = publish(url, topic=topic, data="end", keep="none")
        *held, _ = stream.until(lambda message: message.last_event_id == end, TIMEOUT)
    return [(message.last_event_id, message.data) for message in held]


def read_back(url: str, topic: str, send: Callable[[], Any]) -> str:
    """The data that a stream gets of what `send` publishes."""
    with Stream(url, topic, timeout=TIMEOUT) as stream:
        stream.opened(TIMEOUT)
        send()
        return stream.next(TIMEOUT).data


def assert_problem(answer: Response, status: int) -> dict[str, Any]:
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    problem = answer.json()
    assert set(problem) >= {"title", "status", "detail"}
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert "Traceback" not in answer.text
    return problem


class Watch:
    """A stream of the topics that bad requests name, which was told of everything so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = publish(url, topic="t", data="before")
        self.stream = Stream(url, ["t", "u"], last_event_id=self.id, timeout=TIMEOUT)

    def assert_nothing_happened(self) -> None:
        epoch, _, seq = self.id.partition("-")
        id = publish(self.url, topic="t", data="after")
        assert (self.stream.next(TIMEOUT).last_event_id, id) == (id, f"{epoch}-{int(seq) + 1}")


@pytest.fixture
def watch(server: Server) -> Iterator[Watch]:
    watch = Watch(server.url)
    yield watch
    watch.stream.close()


# --- What is accepted ------------------------------------------------------------------------------------


def test_form_publishes_and_answers_the_id(url: str, topic: str) -> None:
    answer = post(url, f"topic={topic}&data=a+b%26%3D%0D%0A%C3%A9", FORM)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert list(answer.json()) == ["id"]
    assert ID.fullmatch(answer.json()["id"])
    assert history(url, topic) == [(answer.json()["id"], "a b&=\né")]


def test_json_publishes_and_answers_the_id(url: str, topic: str) -> None:
    answer = post(url, json.dumps({"topic": topic, "data": "a"}))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert list(answer.json()) == ["id"]
    assert history(url, topic) == [(answer.json()["id"], "a")]


def test_batch_publishes_its_lines_in_order_and_answers_their_ids(url: str, topic: str) -> None:
    lines = [{"topic": topic, "data": str(count)} for count in range(5)]
    answer = post(url, "".join(json.dumps(line) + "\n" for line in lines), NDJSON)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert list(answer.json()) == ["ids"]
    assert history(url, topic) == [(id, str(count)) for count, id in enumerate(answer.json()["ids"])]


LINE_ENDS = {"LF": "{0}\n{1}\n", "no LF after the last": "{0}\n{1}", "CRLF": "{0}\r\n{1}\r\n"}


@pytest.mark.parametrize("shape", LINE_ENDS.values(), ids=LINE_ENDS)
def test_batch_may_end_its_lines_as_ndjson_does(url: str, topic: str, shape: str) -> None:
    line = json.dumps({"topic": topic, "data": "x"})
    assert len(post(url, shape.format(line, line), NDJSON).json()["ids"]) == 2


TYPES = [
    FORM, JSON, NDJSON, JSON.upper(), f"{JSON}; charset=utf-8", f'{JSON};charset="UTF-8"', f"{FORM}; charset=UTF-8",
    f"{NDJSON} ;charset=utf-8",
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_media_type_may_be_written_as_http_allows(url: str, kind: str) -> None:
    body = "topic=x&data=x" if "form" in kind else '{"topic": "x", "data": "x"}'
    assert post(url, body, kind).status == 200


SERIALISED = {
    "a number": ("1", "1"),
    "a fraction": ("1.50", "1.5"),
    "a large whole number": ("123456789012345678901234567890", "123456789012345678901234567890"),
    "true": ("true", "true"),
    "false": ("false", "false"),
    "null": ("null", "null"),
    "an empty object": ("{}", "{}"),
    "an object": ('{"b": 1, "a": [1, 2, {"c": null}]}', '{"b":1,"a":[1,2,{"c":null}]}'),
    "a list": ("[ ]", "[]"),
    "text beyond ASCII": ('{"é": "\\u00fc \\ud83d\\ude00 \U0001f600"}', '{"é":"ü \U0001f600 \U0001f600"}'),
    "a line end in a string": ('["a\\nb"]', '["a\\nb"]'),
    "a string": ('"{\\"a\\": 1}"', '{"a": 1}'),
}


@pytest.mark.parametrize(("given", "expected"), SERIALISED.values(), ids=SERIALISED)
def test_data_that_is_no_string_arrives_as_json(url: str, topic: str, given: str, expected: str) -> None:
    assert read_back(url, topic, lambda: post(url, f'{{"topic": "{topic}", "data": {given}}}')) == expected
    assert read_back(url, topic, lambda: post(url, f'{{"topic": "{topic}", "data": {given}}}', NDJSON)) == expected


def test_data_of_a_form_is_a_string_as_it_is(url: str, topic: str) -> None:
    assert read_back(url, topic, lambda: publish_form(url, [("topic", topic), ("data", "null")])) == "null"


def test_event_goes_to_each_of_its_thousand_topics(url: str, topic: str) -> None:
    topics = [f"{topic}-{number}" for number in range(1000)]
    pairs = [("data", "x"), *(("topics", each) for each in topics)]
    ids = [publish(url, topics=topics, data="x"), publish_form(url, pairs)]
    for each in (topics[0], topics[-1]):
        assert history(url, each) == [(id, "x") for id in ids]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "*", " ", "a b/c?d#e&f=g%00", "\u2028", "topic"])
def test_name_may_be_anything_of_255_bytes_without_control_characters(url: str, name: str) -> None:
    data = uuid.uuid4().hex
    with Stream(url, name) as stream:
        stream.opened(TIMEOUT)
        publish(url, topic=name, event=name, key=name, data=data)
        message = stream.next(TIMEOUT)
        assert (message.type, message.data) == (name, data)


@pytest.mark.parametrize("path", ["/publish", "/publish?", "/publish?access_token=anything"])
def test_open_service_ignores_tokens(url: str, path: str) -> None:
    assert post(url, '{"topic": "x", "data": "x"}', path=path, Authorization="Bearer anything").status == 200


def test_keep_of_an_event_says_what_stays_in_history(url: str, topic: str) -> None:
    publish(url, topic=topic, data="none", keep="none")
    publish(url, topic=topic, data="a1", keep="latest", key="a")
    kept = [publish(url, topic=topic, data="all", keep="all")]
    kept += [publish(url, topic=topic, data="b1", keep="latest", key="b")]
    kept += [publish(url, topic=topic, data="a2", keep="latest", key="a")]
    assert history(url, topic) == list(zip(kept, ["all", "b1", "a2"], strict=True))


# --- What is refused -------------------------------------------------------------------------------------

BAD_JSON = {
    "nothing": "",
    "blank": " ",
    "no JSON": "topic=t&data=x",
    "cut off": '{"topic": "t", "data": "x"',
    "two objects": '{"topic": "t", "data": "x"}{"topic": "t", "data": "x"}',
    "a comma too many": '{"topic": "t", "data": "x",}',
    "a list": '[{"topic": "t", "data": "x"}]',
    "a string": '"t"',
    "null": "null",
    "an empty object": "{}",
    "no topic": '{"data": "x"}',
    "no data": '{"topic": "t"}',
    "topic and topics": '{"topic": "t", "topics": ["t"], "data": "x"}',
    "no topics": '{"topics": [], "data": "x"}',
    "a topic twice": '{"topics": ["t", "t"], "data": "x"}',
    "1001 topics": json.dumps({"topics": [f"t{number}" for number in range(1001)], "data": "x"}),
    "an unknown field": '{"topic": "t", "data": "x", "colour": 1}',
    "a field in capitals": '{"topic": "t", "data": "x", "Event": "e"}',
    "an empty field name": '{"topic": "t", "data": "x", "": 1}',
    "an unknown field that is a surrogate": '{"topic": "t", "data": "x", "\\ud800": 1}',
    "an id": '{"topic": "t", "data": "x", "id": "1"}',
    "a repeated field": '{"topic": "t", "data": "x", "data": "y"}',
    "a field repeated by an escape": '{"topic": "t", "data": "x", "d\\u0061ta": "x"}',
    "an empty topic": '{"topic": "", "data": "x"}',
    "an empty topic of two": '{"topics": ["t", ""], "data": "x"}',
    "an empty event": '{"topic": "t", "data": "x", "event": ""}',
    "a topic of 256 bytes": json.dumps({"topic": "x" * 256, "data": "x"}),
    "a topic of 128 characters and 256 bytes": json.dumps({"topic": "é" * 128, "data": "x"}),
    "an event of 256 bytes": json.dumps({"topic": "t", "data": "x", "event": "x" * 256}),
    "a key of 256 bytes": json.dumps({"topic": "t", "data": "x", "key": "x" * 256}),
    "a topic that is a number": '{"topic": 1, "data": "x"}',
    "a topic that is null": '{"topic": null, "data": "x"}',
    "a topic that is a list": '{"topic": ["t"], "data": "x"}',
    "topics that are a string": '{"topics": "t", "data": "x"}',
    "topics with a number": '{"topics": ["t", 1], "data": "x"}',
    "topics with a list": '{"topics": [["t"]], "data": "x"}',
    "topics that are an object": '{"topics": {"t": 1}, "data": "x"}',
    "an event that is a number": '{"topic": "t", "data": "x", "event": 1}',
    "an event that is null": '{"topic": "t", "data": "x", "event": null}',
    "a key that is a number": '{"topic": "t", "data": "x", "key": 1}',
    "a key that is null": '{"topic": "t", "data": "x", "key": null}',
    "a keep that is a flag": '{"topic": "t", "data": "x", "keep": true}',
    "a keep that does not exist": '{"topic": "t", "data": "x", "keep": "forever"}',
    "an empty keep": '{"topic": "t", "data": "x", "keep": ""}',
    "a retry that is a string": '{"topic": "t", "data": "x", "retry": "1000"}',
    "a retry that is a fraction": '{"topic": "t", "data": "x", "retry": 1.5}',
    "a retry that is a flag": '{"topic": "t", "data": "x", "retry": true}',
    "a negative retry": '{"topic": "t", "data": "x", "retry": -1}',
    "a retry of more than a day": '{"topic": "t", "data": "x", "retry": 86400001}',
    "an immense retry": '{"topic": "t", "data": "x", "retry": 1%s}' % ("0" * 400),
    "a number of too many digits": '{"topic": "t", "data": 1%s}' % ("0" * 5000),
    "a retry of too many digits": '{"topic": "t", "data": "x", "retry": 1%s}' % ("0" * 5000),
    "NaN": '{"topic": "t", "data": NaN}',
    "Infinity": '{"topic": "t", "data": [Infinity]}',
    "-Infinity": '{"topic": "t", "data": {"a": -Infinity}}',
    "a number beyond all": '{"topic": "t", "data": 1e999}',
    "a number beyond all within": '{"topic": "t", "data": [{"a": -1e999}]}',
    "a lone surrogate": '{"topic": "t", "data": "\\ud800"}',
    "a lone low surrogate": '{"topic": "t", "data": "a\\udfffb"}',
    "surrogates in the wrong order": '{"topic": "t", "data": "\\ude00\\ud83d"}',
    "a lone surrogate within": '{"topic": "t", "data": {"a": ["\\ud800"]}}',
    "a lone surrogate as a name within": '{"topic": "t", "data": {"\\ud800": 1}}',
    "a lone surrogate as the topic": '{"topic": "\\ud800", "data": "x"}',
    "a lone surrogate as the event": '{"topic": "t", "data": "x", "event": "\\ud800"}',
    "a lone surrogate as the key": '{"topic": "t", "data": "x", "key": "\\ud800"}',
    "a raw line end in a string": '{"topic": "t", "data": "a\nb"}',
    "a raw NUL in a string": '{"topic": "t", "data": "a\0b"}',
    "deep lists": '{"topic": "t", "data": %s}' % ("[" * 100_000 + "]" * 100_000),
    "deep objects": '{"topic": "t", "data": %s}' % ('{"a":' * 100_000 + "1" + "}" * 100_000),
    "deep and cut off": "[" * 1_000_000,
    "a byte order mark": '\ufeff{"topic": "t", "data": "x"}',
}
for code in (0x00, 0x0A, 0x0D, 0x1F, 0x7F, 0x85, 0x9F):
    for field in ("topic", "event", "key"):
        fields = {"topic": "t", "data": "x", field: f"a{chr(code)}b"}
        BAD_JSON[f"U+{code:04X} in the {field}"] = json.dumps(fields)

BAD_BYTES = {
    "a byte that is not UTF-8": b'{"topic": "t", "data": "\xff"}',
    "an overlong NUL": b'{"topic": "t", "data": "\xc0\x80"}',
    "a surrogate in UTF-8": b'{"topic": "t", "data": "\xed\xa0\x80"}',
    "a character cut off": b'{"topic": "t", "data": "\xe2\x82"}',
    "beyond U+10FFFF": b'{"topic": "t", "data": "\xf4\x90\x80\x80"}',
    "Latin-1": '{"topic": "t", "data": "é"}'.encode("latin-1"),
    "UTF-16": '{"topic": "t", "data": "x"}'.encode("utf-16"),
    "UTF-32": '{"topic": "t", "data": "x"}'.encode("utf-32"),
}

BAD_FORMS: dict[str, bytes | str] = {
    "nothing": "",
    "no pairs": "&&&",
    "JSON": '{"topic": "t", "data": "x"}',
    "no topic": "data=x",
    "no data": "topic=t",
    "a topic without a value": "topic&data=x",
    "an empty topic": "topic=&data=x",
    "an empty topic of two": "topics=t&topics=&data=x",
    "topic and topics": "topic=t&topics=u&data=x",
    "topic twice": "topic=t&topic=u&data=x",
    "data twice": "topic=t&data=x&data=y",
    "a field repeated by an escape": "topic=t&data=x&d%61ta=x",
    "a topic twice in topics": "topics=t&topics=t&data=x",
    "1001 topics": "data=x&" + "&".join(f"topics=t{number}" for number in range(1001)),
    "an unknown field": "topic=t&data=x&colour=1",
    "an empty field name": "topic=t&data=x&=1",
    "an empty event": "topic=t&data=x&event=",
    "a keep that does not exist": "topic=t&data=x&keep=ALL",
    "an empty retry": "topic=t&data=x&retry=",
    "a retry that is no number": "topic=t&data=x&retry=soon",
    "a retry with a sign": "topic=t&data=x&retry=%2B1",
    "a negative retry": "topic=t&data=x&retry=-1",
    "a retry that is a fraction": "topic=t&data=x&retry=1.5",
    "a retry in other digits": "topic=t&data=x&retry=%D9%A1",
    "a retry of more than a day": "topic=t&data=x&retry=86400001",
    "an immense retry": "topic=t&data=x&retry=" + "9" * 10_000,
    "a control character in the topic": "topic=a%00b&data=x",
    "a line end in the event": "topic=t&data=x&event=a%0Ab",
    "DEL in the key": "topic=t&data=x&key=a%7Fb",
    "a topic of 256 bytes": "topic=" + "x" * 256 + "&data=x",
    "escapes that are not UTF-8": "topic=t&data=%FF",
    "a name that is not UTF-8": "topic=t&data=x&%FF=1",
    "an escaped surrogate": "topic=t&data=%ED%A0%80",
    "an escaped overlong NUL": "topic=t&data=%C0%80",
    "an escaped character cut off": "topic=t&data=%E2%82",
    "raw bytes that are not UTF-8": b"topic=t&data=\xff",
    "a raw surrogate": b"topic=t&data=\xed\xa0\x80",
    "raw Latin-1": "topic=t&data=é".encode("latin-1"),
}

GOOD_LINE = '{"topic": "t", "data": "good"}\n'
BAD_BATCHES: dict[str, tuple[bytes | str, int]] = {
    "no JSON in the second": (GOOD_LINE + "x\n" + GOOD_LINE, 2),
    "an unknown field in the third": (GOOD_LINE * 2 + '{"topic": "t", "data": "x", "colour": 1}\n' + GOOD_LINE, 3),
    "an empty topic in the last": (GOOD_LINE * 9 + '{"topic": "", "data": "x"}', 10),
    "a list in the first": ("[]\n" + GOOD_LINE, 1),
    "an empty line between": (GOOD_LINE + "\n" + GOOD_LINE, 2),
    "two line ends at the end": (GOOD_LINE + "\n", 2),
    "a byte that is not UTF-8 in the second": (GOOD_LINE.encode() + b'{"topic": "t", "data": "\xff"}\n', 2),
    "a lone surrogate in the second": (GOOD_LINE + '{"topic": "t", "data": "\\ud800"}\n', 2),
    "a line in two": (GOOD_LINE + '{"topic": "t",\n"data": "x"}\n', 2),
    "line ends of old": (GOOD_LINE.replace("\n", "\r") * 2, 1),
    "another line end": (GOOD_LINE.replace("\n", "\u2028") * 2, 1),
    "nothing": ("", 1),
    "one line end": ("\n", 1),
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_a_problem_and_changes_nothing(watch: Watch, body: str) -> None:
    assert_problem(post(watch.url, body), 400)
    watch.assert_nothing_happened()


@pytest.mark.parametrize("body", BAD_BYTES.values(), ids=BAD_BYTES)
def test_json_in_another_encoding_is_a_problem_and_changes_nothing(watch: Watch, body: bytes) -> None:
    assert_problem(post(watch.url, body), 400)
    watch.assert_nothing_happened()


@pytest.mark.parametrize("body", BAD_FORMS.values(), ids=BAD_FORMS)
def test_bad_form_is_a_problem_and_changes_nothing(watch: Watch, body: bytes | str) -> None:
    assert_problem(post(watch.url, body, FORM), 400)
    watch.assert_nothing_happened()


@pytest.mark.parametrize(("body", "line"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_line_is_named_and_refuses_the_whole_batch(watch: Watch, body: bytes | str, line: int) -> None:
    assert f"line {line}:" in assert_problem(post(watch.url, body, NDJSON), 400)["detail"]
    watch.assert_nothing_happened()


def test_batch_of_too_many_lines_is_a_problem_and_changes_nothing(watch: Watch) -> None:
    assert_problem(post(watch.url, '{"topic":"t","data":1}\n' * 10_001, NDJSON), 400)
    watch.assert_nothing_happened()


def test_batch_of_too_many_topics_together_is_a_problem_and_changes_nothing(watch: Watch) -> None:
    line = json.dumps({"topics": [f"t{number}" for number in range(1000)], "data": 1}) + "\n"
    assert len(line) * 101 < 1 << 20
    assert "100000 topics together, not 101000" in assert_problem(post(watch.url, line * 101, NDJSON), 400)["detail"]
    watch.assert_nothing_happened()


def test_unknown_field_is_told_the_nearest_that_exists(url: str) -> None:
    assert "'event'" in post(url, '{"topic": "t", "data": "x", "evnet": "e"}').json()["detail"]
    assert "'topics'" in post(url, "topcis=t&data=x", FORM).json()["detail"]


def test_refusal_of_a_large_body_does_not_hold_up_the_worker(watch: Watch) -> None:
    names = ",".join(f'"{number}":1' for number in range(90_000))
    repeated = f'{{{names},"89999":1}}'
    for body in (repeated, f'{{"topic":"t","data":{repeated}}}', f'{{"{"ab" * 500_000}":1}}'):
        assert_problem(post(watch.url, body), 400)
    watch.assert_nothing_happened()


def test_json_of_any_depth_is_published_or_refused(url: str) -> None:
    for begin, end in ("[]", ('{"a":', "}")):
        statuses = [
            post(url, f'{{"topic": "x", "data": {begin * depth}1{end * depth}}}').status for depth in range(1, 1200, 13)
        ]
        assert statuses == sorted(statuses)
        assert set(statuses) == {200, 400}


OTHER_TYPES: dict[str, tuple[str | None, dict[str, str]]] = {
    "none": (None, {}),
    "text": ("text/plain", {}),
    "JSON of another kind": ("text/json", {}),
    "a suffix": ("application/problem+json", {}),
    "multipart": ("multipart/form-data; boundary=x", {}),
    "a longer name": ("application/jsonx", {}),
    "two types": (f"{JSON}, {FORM}", {}),
    "another charset": (f"{JSON}; charset=latin-1", {}),
    "an unknown parameter": (f"{JSON}; version=2", {}),
    "gzip": (JSON, {"Content-Encoding": "gzip"}),
    "gzip twice": (JSON, {"Content-Encoding": "gzip, gzip"}),
}


@pytest.mark.parametrize(("kind", "headers"), OTHER_TYPES.values(), ids=OTHER_TYPES)
def test_other_media_type_charset_or_coding_is_415(watch: Watch, kind: str | None, headers: dict[str, str]) -> None:
    assert_problem(post(watch.url, '{"topic": "t", "data": "x"}', kind, **headers), 415)
    watch.assert_nothing_happened()


def test_identity_is_a_content_coding_that_is_accepted(url: str) -> None:
    assert post(url, '{"topic": "x", "data": "x"}', **{"Content-Encoding": "identity"}).status == 200


@pytest.mark.parametrize("query", ["topic=t", "data=x", "acess_token=x", "=", "%FF=1", "access_token=a&access_token=b"])
def test_query_of_a_publish_is_checked_too(watch: Watch, query: str) -> None:
    assert_problem(post(watch.url, '{"topic": "t", "data": "x"}', path=f"/publish?{query}"), 400)
    watch.assert_nothing_happened()


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_other_method_is_405_and_says_what_is_allowed(watch: Watch, method: str) -> None:
    answer = request(method, f"{watch.url}/publish", '{"topic": "t", "data": "x"}', {"Content-Type": JSON})
    assert_problem(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == {"POST", "OPTIONS"}
    watch.assert_nothing_happened()


def test_head_of_publish_is_405_without_a_body(url: str) -> None:
    answer = request("HEAD", f"{url}/publish")
    assert (answer.status, answer.body) == (405, b"")
    assert "POST" in answer.headers["allow"]


def test_options_of_publish_says_what_is_allowed(url: str) -> None:
    answer = request("OPTIONS", f"{url}/publish")
    assert answer.status in (200, 204)
    assert set(answer.headers["allow"].split(", ")) == {"POST", "OPTIONS"}


@pytest.mark.parametrize("path", ["/", "/publish/", "/publish/t", "/Publish", "/%70ublish%00", "/nothing"])
def test_other_path_is_not_there(watch: Watch, path: str) -> None:
    answer = post(watch.url, '{"topic": "t", "data": "x"}', path=path)
    assert_problem(answer, 405 if path == "/" else 404)
    watch.assert_nothing_happened()


# --- The size of a body ----------------------------------------------------------------------------------

SIZED = {
    "JSON": (JSON, b'{"topic":"%b","data":"', b'"}'),
    "form": (FORM, b"topic=%b&data=", b""),
    "NDJSON": (NDJSON, b'{"topic":"%b","data":"', b'"}\n'),
}
SENDERS = {"with Content-Length": post, "in chunks": post_chunked}


def body_of(shape: str, topic: str, size: int) -> tuple[bytes, str, int]:
    """(body, media type, length of its data) of one event that takes `size` bytes."""
    kind, begin, end = SIZED[shape]
    begin = begin % topic.encode()
    length = size - len(begin) - len(end)
    return begin + b"x" * length + end, kind, length


@pytest.mark.parametrize("send", SENDERS.values(), ids=SENDERS)
@pytest.mark.parametrize("shape", SIZED)
def test_body_of_one_mebibyte_arrives_whole(url: str, topic: str, shape: str, send: Callable[..., Response]) -> None:
    body, kind, length = body_of(shape, topic, MIB)
    data = read_back(url, topic, lambda: send(url, body, kind))
    assert (len(data), set(data)) == (length, {"x"})


@pytest.mark.parametrize("send", SENDERS.values(), ids=SENDERS)
@pytest.mark.parametrize("shape", SIZED)
@pytest.mark.parametrize("size", [MIB + 1, 2 * MIB, 12 * MIB])
def test_larger_body_is_413_and_changes_nothing(
    watch: Watch, size: int, shape: str, send: Callable[..., Response]
) -> None:
    body, kind, _ = body_of(shape, "t", size)
    detail = assert_problem(send(watch.url, body, kind), 413)["detail"]
    assert str(MIB) in detail
    watch.assert_nothing_happened()


def test_batch_that_is_too_large_is_not_published_in_part(watch: Watch) -> None:
    line = b'{"topic":"t","data":"%b"}\n' % (b"x" * 999)
    assert_problem(post_chunked(watch.url, line * (MIB // len(line) + 1), NDJSON), 413)
    watch.assert_nothing_happened()


def test_batch_in_chunks_of_whole_lines_up_to_the_limit_is_not_published_in_part(watch: Watch) -> None:
    line = b'{"topic":"t","data":"%b"}\n' % (b"x" * (1024 - 24))
    assert len(line) == 1024
    assert_problem(post_chunked(watch.url, line * 1025, NDJSON), 413)
    watch.assert_nothing_happened()


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("kind", "part"), [(FORM, b"topic=t&data=cut"), (NDJSON, GOOD_LINE.encode()), (JSON, GOOD_LINE.encode())]
)
def test_body_that_was_cut_off_publishes_nothing(watch: Watch, kind: str, part: bytes, framing: str) -> None:
    head = f"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode()
    body = b"%x\r\n%b\r\n" % (len(part), part) if "chunked" in framing else part
    answer = raw(watch.url, head + body)
    assert answer.partition(b"\r\n")[0].startswith(b"HTTP/1.1 400 "), answer
    watch.assert_nothing_happened()


BAD_CHUNKS = {
    "a size that is no number": b"zz\r\n",
    "a negative size": b"-1\r\nx\r\n",
    "no size": b"\r\n",
    "more than was said": b"3\r\nabcX\r\n",
    "less than was said": b"5\r\nabc",
    "a bad extension": b'3;"\r\nabc\r\n0\r\n\r\n',
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_are_a_bad_request(watch: Watch, chunks: bytes) -> None:
    head = f"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(watch.url, head.encode() + chunks)
    assert answer.partition(b"\r\n")[0].startswith(b"HTTP/1.1 400 "), answer
    watch.assert_nothing_happened()


@pytest.mark.parametrize("kind", [JSON, "text/plain"])
@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_answer_to_bad_chunks_says_that_it_is_the_last_of_its_connection(url: str, kind: str, chunks: bytes) -> None:
    """So no proxy and no client keeps it for another request."""
    head = f"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(url, head.encode() + chunks)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


# --- Idempotency -----------------------------------------------------------------------------------------


def keyed(url: str, key: str, topic: str, data: str = "once") -> Response:
    return post(url, json.dumps({"topic": topic, "data": data}), **{"Idempotency-Key": key})


def test_same_key_again_answers_the_same_id_and_publishes_nothing(url: str, topic: str) -> None:
    answers = [keyed(url, topic, topic) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert len({answer.body for answer in answers}) == 1
    assert history(url, topic) == [(answers[0].json()["id"], "once")]


def test_another_key_publishes_again(url: str, topic: str) -> None:
    ids = [keyed(url, f"{topic}-{count}", topic).json()["id"] for count in range(3)]
    assert [id for id, _ in history(url, topic)] == ids


def test_same_key_holds_over_all_workers(server: Server, topic: str) -> None:
    seen = len(server.log())
    answers = {keyed(server.url, topic, topic).body for _ in range(40)}  # each on a connection of its own
    assert len(answers) == 1
    assert len(history(server.url, topic)) == 1
    pids = {int(pid) for pid in re.findall(r"debug (\d+) gunicorn\.error: POST /publish", server.log()[seen:])}
    assert pids == set(server.worker_pids()), "the test has not met every worker"


def test_same_key_at_the_same_time_publishes_once(url: str, topic: str) -> None:
    for turn in range(3):
        senders = [gevent.spawn(keyed, url, f"{topic}-{turn}", topic) for _ in range(20)]
        gevent.joinall(senders, TIMEOUT, raise_error=True)
        assert {sender.value.status for sender in senders} == {200}
        assert len({sender.value.json()["id"] for sender in senders}) == 1
        assert len(history(url, topic)) == turn + 1


def test_same_key_of_a_batch_answers_the_same_ids_and_publishes_nothing(url: str, topic: str) -> None:
    lines = [{"topic": topic, "data": str(count)} for count in range(5)]
    first, second = (publish_lines(url, lines, headers={"Idempotency-Key": topic}) for _ in range(2))
    assert first == second
    assert [id for id, _ in history(url, topic)] == first


def test_batches_with_one_key_at_the_same_time_publish_once(url: str, topic: str) -> None:
    lines = [{"topic": topic, "data": str(count)} for count in range(50)]
    senders = [gevent.spawn(publish_lines, url, lines, headers={"Idempotency-Key": topic}) for _ in range(10)]
    gevent.joinall(senders, TIMEOUT, raise_error=True)
    assert len({tuple(sender.value) for sender in senders}) == 1
    assert [id for id, _ in history(url, topic)] == senders[0].value


def test_refused_publish_does_not_use_up_its_key(url: str, topic: str) -> None:
    assert post(url, '{"topic": ""}', **{"Idempotency-Key": topic}).status == 400
    assert keyed(url, topic, topic).status == 200
    assert len(history(url, topic)) == 1


BAD_KEYS = ["", "x" * 256, "a\tb", "é" * 128]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_key_is_a_problem_and_changes_nothing(watch: Watch, key: str) -> None:
    answer = post(watch.url, '{"topic": "t", "data": "x"}', **{"Idempotency-Key": key.encode().decode("latin-1")})
    assert_problem(answer, 400)
    watch.assert_nothing_happened()


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests may kill."""
    with Server(tmp_path_factory.mktemp("mortal")) as server:
        yield server


def kill_all_workers(server: Server) -> None:
    pids = server.worker_pids()
    for pid in pids:
        server.kill_worker(pid)
    eventually(lambda: not set(pids) & set(server.worker_pids()), TIMEOUT)
    server.wait_ready()


def kill_and_start(server: Server) -> None:
    server.kill_all()
    server.start()
    server.wait_ready()


DEATHS = {
    "kill -9 of all workers": kill_all_workers,
    "kill -9 of everything": kill_and_start,
    "a restart": Server.restart,
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_key_and_what_was_acknowledged_outlive(mortal: Server, topic: str, death: Callable[[Server], None]) -> None:
    url = mortal.url
    lines = [{"topic": topic, "data": str(count)} for count in range(3)]
    one = keyed(url, topic, topic).json()["id"]
    batch = publish_lines(url, lines, headers={"Idempotency-Key": f"{topic}-batch"})
    death(mortal)
    assert keyed(url, topic, topic).json()["id"] == one
    assert publish_lines(url, lines, headers={"Idempotency-Key": f"{topic}-batch"}) == batch
    assert history(url, topic) == [(one, "once"), *zip(batch, "012", strict=True)]
    epoch, _, seq = publish(url, topic=topic, data="next").partition("-")
    assert (epoch, int(seq) > int(batch[-1].partition("-")[2])) == (one.partition("-")[0], True)


# --- Anything at all -------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
NAMES = st.sampled_from(["topic", "topics", "data", "event", "keep", "key", "retry", "colour", "", "\ud800"])
OBJECTS = st.dictionaries(NAMES, VALUES | st.just("t") | st.just(["t"])).map(lambda fields: json.dumps(fields).encode())
PAIRS = st.lists(st.tuples(NAMES.filter(str.isascii), st.binary(max_size=20)), max_size=6).map(
    lambda pairs: urlencode(pairs).encode()
)
BODIES = st.one_of(
    st.binary(max_size=200),
    st.text(st.sampled_from('{}[]":,\\u\n&=%+0e-.tdf '), max_size=60).map(str.encode),
    OBJECTS,
    st.lists(OBJECTS, max_size=4).map(b"\n".join),
    PAIRS,
)


@settings(max_examples=150, deadline=None, database=None)
@given(body=BODIES, kind=st.sampled_from([FORM, JSON, NDJSON]), in_chunks=st.booleans())
@example(body=b"", kind=FORM, in_chunks=True)
def test_no_body_makes_the_service_fail(server: Server, body: bytes, kind: str, in_chunks: bool) -> None:
    answer = (post_chunked if in_chunks else post)(server.url, body, kind)
    if answer.status != 200:
        assert_problem(answer, 400)


def test_no_request_of_this_file_was_an_error_in_the_log(server: Server) -> None:
    assert "error in a view" not in server.log()
    assert "Traceback" not in server.log()
