"""The application around the service: hooks, decorators and what they keep, the same on every way to a stream."""

import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client import Stream, publish, request
from tests.support.server import ROOT, Server
from tests.support.wait import eventually

TIMEOUT = 20  # for what takes milliseconds on an idle machine
APPLICATION = '''
import contextvars, sys, threading
import gevent
from flask import Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix
from app import create_app

app = create_app()
app.wsgi_app = ProxyFix(app.wsgi_app)
seen_before = contextvars.ContextVar("seen_before", default="nobody")
local = threading.local()

@app.before_request
def note():
    g.seen = f"{seen_before.get()}, {getattr(local, 'name', 'nobody')}"
    seen_before.set(request.query_string.decode())
    local.name = request.query_string.decode()
    if request.args.get("topic") == "refused":
        return "not here", 403

@app.before_request
def go_wrong():
    topic = request.args.get("topic")
    if topic in ("exit", "killed"):
        print("goes wrong:", topic, flush=True)
        sys.exit(1) if topic == "exit" else gevent.getcurrent().throw()
    if topic == "timeout":
        raise gevent.Timeout(1)
    if topic in ("exit-late", "fail-late"):
        return Response(go_wrong_late(topic))

def go_wrong_late(topic):
    yield "one"
    sys.exit(1) if topic == "exit-late" else 1 / 0

@app.before_request
def use_the_connection():
    topic = request.args.get("topic")
    if topic == "peer":
        g.peer = request.environ["gunicorn.socket"].getpeername()[0]
    if topic == "hints":
        request.environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    if topic == "environ":
        return sorted(request.environ)

@app.after_request
def tell(response):
    response.headers["X-Seen"] = g.seen
    response.headers["X-From"] = request.remote_addr
    if "peer" in g:
        response.headers["X-Peer"] = g.peer
    return response

@app.after_request
def answer_otherwise(response):
    topic = request.args.get("topic")
    if topic == "nothing":
        response.status_code = 204
    if topic == "rewritten":
        response.data = "another body"
    return response

@app.after_request
def borrow(response):
    topic = request.args.get("topic")
    if topic in ("lent", "nothing", "rewritten", "refused"):
        response.call_on_close(lambda: print(f"given back: {topic}", flush=True))
    if topic == "kept":
        response.call_on_close(lambda: 1 / 0)
    return response

@app.teardown_request
def fail(error):
    if request.args.get("topic") == "broken":
        raise RuntimeError("of the application")

view = app.view_functions["events.events"]

def decorated(*arguments, **names):
    response = view(*arguments, **names)
    response.headers["X-Decorated"] = "yes"
    return response

app.view_functions["events.events"] = decorated
'''


def server_of(text: str, directory: Path, worker_class: str | None = None) -> Server:
    """A server, not started yet, of the module whose text this is."""
    (directory / "around.py").write_text(text)
    return Server(directory / "server", workers=1, worker_class=worker_class, application="around:app",
                  env={"PYTHONPATH": f"{directory}:{ROOT}", "PUSHSVC_KEEPALIVE_SECONDS": "30"})


@pytest.fixture(params=[None, "gevent"], ids=["PushWorker", "gevent"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with server_of(APPLICATION, tmp_path, request.param) as server:
        yield server


def answers_of(server: Server, *topics: str) -> list[tuple[int, bytes]]:
    """What requests on one connection get."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=TIMEOUT)
    try:
        connection.connect()
        connection.auto_open = 0  # what comes on another connection is no answer
        answers = []
        for topic in topics:
            connection.request("GET", f"/events?topic={topic}")
            answer = connection.getresponse()
            answers.append((answer.status, answer.read()))
        return answers
    finally:
        connection.close()


def test_hooks_and_decorators_run_and_no_client_sees_anothers_values(server: Server) -> None:
    streams = [Stream(server.url, f"user-{number}").opened() for number in range(20)]
    for stream in streams:
        assert stream.headers["x-decorated"] == "yes"
        assert stream.headers["x-seen"] == "nobody, nobody"
        stream.close()
    assert request("GET", f"{server.url}/healthz").headers["x-seen"] == "nobody, nobody"


def test_hook_that_answers_or_fails_does_so_on_every_way(server: Server) -> None:
    refused, broken = (f"{server.url}/events?topic={topic}" for topic in ("refused", "broken"))
    answers = []
    for _ in range(2):
        answers.append((request("GET", refused), request("GET", broken)))
        Stream(server.url, "a").opened().close()
    for refusal, failure in answers:
        assert (refusal.status, refusal.text) == (403, "not here")
        assert failure.status == 500
        assert failure.headers["content-type"] == "application/problem+json"
    assert len(re.findall(r"RuntimeError: of the application", server.log())) == 2, "each is in the log, with its cause"



def test_hook_that_exits_ends_its_own_request_and_nothing_else(server: Server) -> None:
    pids, held = server.worker_pids(), []
    for number in (1, 2):  # gunicorn's way, and the short one, which is open when there has been a stream
        for topic in ("exit", "killed"):
            with socket.create_connection((server.host, server.port), TIMEOUT) as connection:
                connection.sendall(f"GET /events?topic={topic} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                eventually(lambda topic=topic, number=number: server.log().count(f"goes wrong: {topic}") == number)
                connection.sendall(b"GET /events?topic=refused HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 403 "), "the connection goes on"
        held.append(Stream(server.url, "held").opened())
    publish(server.url, topic="held", data="x")
    assert [stream.next(TIMEOUT).data for stream in held] == ["x", "x"]
    assert server.worker_pids() == pids


def test_what_is_no_exception_is_answered_500_while_nothing_was_sent(server: Server) -> None:
    for number in (1, 2):
        failure = request("GET", f"{server.url}/events?topic=timeout")
        assert (failure.status, failure.headers["content-type"]) == (500, "application/problem+json")
        for topic in ("exit-late", "fail-late"):
            with pytest.raises(http.client.IncompleteRead) as broken:
                request("GET", f"{server.url}/events?topic={topic}")
            assert broken.value.partial == b"one", "and nothing behind it"
        assert server.log().count("Error handling request") == 3 * number
        Stream(server.url, "a").opened().close()


def test_environment_is_the_same_on_every_way(server: Server) -> None:
    environs = []
    for _ in range(2):
        environs.append(request("GET", f"{server.url}/events?topic=environ").json())
        with Stream(server.url, "peer", headers={"X-Forwarded-For": "127.0.0.9"}) as stream:
            stream.opened(TIMEOUT)
            assert stream.headers["x-from"] == "127.0.0.9", "of the middleware around wsgi_app"
            assert stream.headers["x-peer"] == "127.0.0.1"
            publish(server.url, topic="peer", data="x")
            assert stream.next(TIMEOUT).data == "x"
        with socket.create_connection((server.host, server.port), TIMEOUT) as connection:
            connection.sendall(b"GET /events?topic=hints HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while b": open" not in got:
                got += connection.recv(1000)
            assert got.startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert environs[0] == environs[1]


def test_hook_makes_of_a_stream_an_answer_without_one(server: Server) -> None:
    for _ in range(2):
        assert answers_of(server, "nothing", "rewritten", "refused") == [
            (204, b""), (200, b"another body"), (403, b"not here")]
        Stream(server.url, "a").opened().close()
    assert "\npushsvc_streams_opened_total 2.0\n" in request("GET", f"{server.url}/metrics").text
    for topic in ("nothing", "rewritten", "refused"):
        assert given_back(server, topic) == 2


def given_back(server: Server, topic: str) -> int:
    return server.log().count(f"given back: {topic}\n")


def test_what_a_hook_lends_to_a_request_is_given_back_once_when_it_is_over(server: Server) -> None:
    for number in (1, 2):
        with Stream(server.url, "lent") as stream:
            stream.opened(TIMEOUT)
        # gunicorn's own worker notices at a write that the client has left
        eventually(lambda n=number: publish(server.url, topic="lent", data="x") and given_back(server, "lent") == n)
    answers_of(server, "refused")
    eventually(lambda: given_back(server, "refused"))
    assert given_back(server, "lent") == 2


def test_request_is_over_when_its_stream_is_parked(tmp_path: Path) -> None:
    with server_of(APPLICATION, tmp_path) as server:
        for number in (1, 2):
            with Stream(server.url, ["lent", "x"]) as stream, Stream(server.url, ["kept", "x"]) as other:
                eventually(lambda number=number: given_back(server, "lent") == number)
                eventually(lambda number=number: server.log().count("ZeroDivisionError") == number)
                publish(server.url, topic="x", data="x")
                assert [each.next(TIMEOUT).data for each in (stream, other)] == ["x", "x"]


def test_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text().partition("```python\n")[2].partition("```\n")[0]
    with server_of(text, tmp_path) as server:
        for _ in range(2):
            foreign = request("GET", f"{server.url}/events?topic=a", headers={"X-Forwarded-For": "203.0.113.9"})
            assert foreign.status == 401
            with Stream(server.url, "a") as stream:
                assert stream.opened(TIMEOUT).headers["x-machine"] == "a"


@pytest.mark.parametrize("worker_class", [None, "gevent"], ids=["PushWorker", "gevent"])
def test_application_inside_of_middleware_is_refused_with_the_form_that_works(
        tmp_path: Path, worker_class: str | None) -> None:
    server = server_of(APPLICATION.replace("app.wsgi_app = ProxyFix(app.wsgi_app)", "").replace(
        "app.view_functions[\"events.events\"] = decorated", "app = ProxyFix(app)"), tmp_path, worker_class)
    try:
        server.start()
        server.wait_gone(TIMEOUT)
        assert "pushsvc: the application has to be what create_app() makes, not a ProxyFix; " in server.log()
        assert "app.wsgi_app = ProxyFix(app.wsgi_app)\n" in server.log()
        assert "Traceback" not in server.log()
    finally:
        server.stop()
