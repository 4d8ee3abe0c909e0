"""aiohttp-sse: an asyncio queue per stream. `python aiohttp_app.py PORT`."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import defaultdict

from aiohttp import web
from aiohttp_sse import EventSourceResponse, sse_response

queues: defaultdict[str, set[asyncio.Queue[tuple[str, str]]]] = defaultdict(set)
numbers = itertools.count(1)


async def events(request: web.Request) -> EventSourceResponse:
    topic = request.query["topic"]
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    queues[topic].add(queue)
    try:
        async with sse_response(request) as response:
            while True:
                number, line = await queue.get()
                await response.send(line, id=number)
    finally:
        queues[topic].discard(queue)
    return response


async def publish(request: web.Request) -> web.Response:
    """The body: one event's data per line."""
    waiting = list(queues[request.query["topic"]])
    for line in (await request.text()).splitlines():
        event = str(next(numbers)), line
        for queue in waiting:
            queue.put_nowait(event)
    return web.Response(status=204)


def main() -> None:
    app = web.Application()
    app.router.add_get("/events", events)
    app.router.add_post("/publish", publish)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), backlog=4096, access_log=None, print=None,
                shutdown_timeout=2)


if __name__ == "__main__":
    main()
