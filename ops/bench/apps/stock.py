"""What one writes first: a Flask route that streams a generator, and a gevent queue per stream.

Run it under gunicorn's gevent worker, one worker: `gunicorn -k gevent stock:app`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

from flask import Flask, Response, request
from gevent.queue import Queue

app = Flask("stock", static_folder=None)
queues: defaultdict[str, set[Queue]] = defaultdict(set)
numbers = itertools.count(1)


@app.get("/events")
def events() -> Response:
    return Response(stream(request.args["topic"]), content_type="text/event-stream",
                    headers={"Cache-Control": "no-store"})


def stream(topic: str) -> Iterator[str]:
    queue: Queue = Queue()
    queues[topic].add(queue)
    try:
        yield "retry: 3000\n: open\n\n"
        while True:
            yield queue.get()
    finally:
        queues[topic].discard(queue)


@app.post("/publish")
def publish() -> Response:
    """The body: one event's data per line."""
    waiting = list(queues[request.args["topic"]])
    for line in request.get_data(as_text=True).splitlines():
        frame = f"id: {next(numbers)}\ndata: {line}\n\n"
        for queue in waiting:
            queue.put(frame)
    return Response(status=204)
