"""The application around the service: hooks, decorators and what they keep, the same on every way to a stream."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client import Stream, request
from tests.support.server import ROOT, Server

APPLICATION = '''
import contextvars, threading
from flask import g, request
from app import create_app

app = create_app()
seen_before = contextvars.ContextVar("seen_before", default="nobody")
local = threading.local()

@app.before_request
def note():
    g.seen = f"{seen_before.get()}, {getattr(local, 'name', 'nobody')}"
    seen_before.set(request.query_string.decode())
    local.name = request.query_string.decode()
    if request.args.get("topic") == "refused":
        return "not here", 403

@app.after_request
def tell(response):
    response.headers["X-Seen"] = g.seen
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


@pytest.fixture(params=[None, "gevent"], ids=["PushWorker", "gevent"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "around.py").write_text(APPLICATION)
    with Server(tmp_path / "server", workers=1, worker_class=request.param, application="around:app",
                env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as server:
        yield server


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
