"""Streams as a plain Flask application has them: each keeps what serves it, a thread or a greenlet, for as long as it
is open."""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Flask, Response

app = Flask(__name__)


@app.get("/events")
def events() -> Response:
    def stream() -> Iterator[str]:
        yield "retry: 3000\n: open\n\n"
        while True:
            time.sleep(15)
            yield ":\n\n"

    return Response(stream(), content_type="text/event-stream")


@app.get("/readyz")
def readyz() -> str:
    return "ready\n"
