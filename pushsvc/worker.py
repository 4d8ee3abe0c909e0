"""What a gunicorn gevent worker needs from us: a stop that its open streams are told of."""

from __future__ import annotations

from typing import Any

import gevent

WATCH_SECONDS = 0.1


def watch_stop(worker: Any) -> None:
    """Drain the worker's streams as soon as gunicorn tells it to stop: gunicorn itself waits for them and tells them
    nothing. Called in the worker, after its application was loaded."""
    service = worker.wsgi.extensions["pushsvc"]

    def watch() -> None:
        while worker.alive:
            gevent.sleep(WATCH_SECONDS)
        service.drain()

    gevent.spawn(watch)
