"""pushsvc with two views of somebody's own that wait for a library which gevent cannot patch: one in the loop's thread,
one in a thread of gevent's pool."""

from __future__ import annotations

from flask import Response, request
from gevent import get_hub, monkey

from app import create_app

app = create_app()


def wait_in_c(seconds: float) -> None:
    """Stands for any call that blocks in C: a driver, a codec, a name look-up."""
    monkey.get_original("time", "sleep")(seconds)


@app.get("/blocking")
def blocking() -> Response:
    wait_in_c(float(request.args["seconds"]))
    return Response("done\n")


@app.get("/pooled")
def pooled() -> Response:
    get_hub().threadpool.apply(wait_in_c, (float(request.args["seconds"]),))
    return Response("done\n")
