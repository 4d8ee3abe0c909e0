"""sse-starlette on uvicorn: an asyncio queue per stream. `uvicorn starlette_app:app`."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

queues: defaultdict[str, set[asyncio.Queue[dict[str, str]]]] = defaultdict(set)
numbers = itertools.count(1)


async def events(request: Request) -> EventSourceResponse:
    return EventSourceResponse(stream(request.query_params["topic"]))


async def stream(topic: str) -> AsyncIterator[dict[str, str]]:
    queue: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    queues[topic].add(queue)
    try:
        yield {"comment": "open"}
        while True:
            yield await queue.get()
    finally:
        queues[topic].discard(queue)


async def publish(request: Request) -> Response:
    """The body: one event's data per line."""
    waiting = list(queues[request.query_params["topic"]])
    for line in (await request.body()).decode().splitlines():
        event = {"id": str(next(numbers)), "data": line}
        for queue in waiting:
            queue.put_nowait(event)
    return Response(status_code=204)


app = Starlette(routes=[Route("/events", events), Route("/publish", publish, methods=["POST"])])
