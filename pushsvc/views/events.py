"""`GET /events`: one stream of one or more topics."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from sys import intern
from typing import Any

from flask import Blueprint, Response, request

from pushsvc import sse
from pushsvc.auth import COOKIE, QUERY, Access
from pushsvc.brokers.base import Broker
from pushsvc.draft import check_names
from pushsvc.errors import BadRequest
from pushsvc.event import check_name
from pushsvc.hub import Hub
from pushsvc.position import EARLIEST, parse_position
from pushsvc.stream import Stream, refusal
from pushsvc.views.query import parse_pairs, single

LAST_ID = ("last_event_id", "lastEventID", "lastEventId")
FIELDS = frozenset({"topic", "envelope", QUERY, *LAST_ID})
HEADERS = {"Content-Type": sse.CONTENT_TYPE, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
BODILESS = (204, 304)  # and 1xx (RFC 9110, section 6.4.1)


def blueprint(hub: Hub, broker: Broker, access: Access) -> Blueprint:
    views = Blueprint("events", __name__)

    @views.get("/events")
    def events() -> Response:
        environ = request.environ
        pairs = parse_pairs(environ.get("QUERY_STRING", "").encode("latin-1"), "the query")
        check_names((name for name, _ in pairs), FIELDS, "the query")
        fields = single(pairs, "the query", lists=("topic",))
        cookie = request.cookies.get(COOKIE) if "HTTP_COOKIE" in environ else None
        grant = access.admit(environ.get("HTTP_AUTHORIZATION"), fields.get(QUERY), cookie, environ.get("REMOTE_ADDR", ""))
        topics = _topics([value for name, value in pairs if name == "topic"], hub.settings.max_topics_per_stream)
        grant.allow_subscribe(topics)
        asked = _asked(environ.get("HTTP_LAST_EVENT_ID", ""), fields)
        envelope = _flag("envelope", fields.get("envelope", "0"))
        if request.method == "HEAD":
            return Response(iter(()), headers=HEADERS)  # not a list: that would be told as Content-Length: 0
        if hub.is_full():
            hub.metrics.counts.turned_away += 1
            return Response(refusal(hub.comeback_ms()), headers=HEADERS)
        subscription = hub.subscribe(topics, envelope, user=grant.user, expires=grant.expires,
                                     address=intern(environ.get("REMOTE_ADDR", "")), abort=_abort(environ))
        return StreamResponse(Stream(hub, broker, subscription, asked))

    return views


class StreamResponse(Response):
    """A response whose body is handed to the server as it is, for it may be parked. Hooks may still add fields, and
    what is to be called when the request is over; if they change the body, or to a status that has none, it is an
    ordinary one."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, headers=HEADERS, direct_passthrough=True)

    def get_wsgi_response(self, environ: Any) -> tuple[Iterable[bytes], str, list[tuple[str, str]]]:
        stream, status = self.response, self.status_code
        if type(stream) is not Stream or status < 200 or status in BODILESS:
            self.direct_passthrough = False
            return super().get_wsgi_response(environ)
        stream.on_close = self._on_close
        return stream, self.status, self.headers.to_wsgi_list()


def _topics(topics: list[str], most: int) -> list[str]:
    if not topics:
        raise BadRequest("name at least one topic: /events?topic=…")
    if len(topics) > most:
        raise BadRequest(f"a stream has at most {most} topics, not {len(topics)}")
    for topic in topics:
        check_name("topic", topic)
    return topics


def _asked(header: str, fields: dict[str, str]) -> str:
    """The id to resume after: the header, which a browser sends by itself, before the query; "" for live only."""
    given = [fields[name] for name in LAST_ID if name in fields]
    if len(given) > 1:
        raise BadRequest("the query has more than one last_event_id")
    try:
        asked = header.encode("latin-1").decode() or (given[0] if given else "")
    except UnicodeDecodeError:
        raise BadRequest("Last-Event-ID is not UTF-8") from None
    if asked and asked != EARLIEST:
        parse_position(asked)
    return asked


def _flag(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise BadRequest(f"{name} is 0 or 1, not {text[:100]!r}")
    return text == "1"


def _abort(environ: dict[str, object]) -> Callable[[], None] | None:
    """What breaks a send that a frozen client holds up: gunicorn waits for it without a limit."""
    connection = environ.get("gunicorn.socket")
    return partial(_break, connection) if isinstance(connection, socket.socket) else None


def _break(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
