"""`POST /publish`: one event as a form or a JSON object, or a batch as NDJSON. All is checked before it is done."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import gevent
from flask import Blueprint, Response, request

from pushsvc.auth import COOKIE, QUERY, Access, Grant
from pushsvc.brokers.base import Broker
from pushsvc.draft import FIELDS, check_batch, check_names, draft_of
from pushsvc.errors import (
    UNREAD,
    BadRequest,
    BrokerUnavailable,
    PayloadTooLarge,
    PushError,
    RequestTimeout,
    UnsupportedMediaType,
)
from pushsvc.event import Draft, check_name
from pushsvc.hub import Hub
from pushsvc.views.problems import refuse_foreign_pages
from pushsvc.views.query import parse_pairs, single

FORM, JSON, NDJSON = "application/x-www-form-urlencoded", "application/json", "application/x-ndjson"
HEARD_BYTES = 16 << 20  # of a body that is refused


def blueprint(hub: Hub, broker: Broker, access: Access) -> Blueprint:
    views = Blueprint("publish", __name__)
    counts = hub.metrics

    @views.post("/publish")
    def publish() -> Response:
        grant, kind, body = _receive(access, hub.settings.max_body_bytes, hub.settings.dead_seconds)
        drafts = [_form(body)] if kind == FORM else [_json(body)] if kind == JSON else \
            _lines(body, hub.settings.max_batch_events)
        check_batch(drafts, hub.settings.max_batch_events, hub.settings.max_body_bytes)
        for draft in drafts:
            grant.allow_publish(draft.topics)
        try:
            positions = broker.append(drafts, _key(request.environ, grant))
        except BrokerUnavailable:
            counts.counts.refused += 1
            raise
        counts.counts.published += len(positions)
        if kind == NDJSON:
            answer = '{"ids":["' + '","'.join(map(str, positions)) + '"]}'
        else:
            answer = f'{{"id":"{positions[-1]}"}}'
        return Response(answer, content_type=JSON)

    return views


def _receive(access: Access, most: int, seconds: float) -> tuple[Grant, str, bytes]:
    """Who publishes, the media type, and the body, which has to come within `seconds`, also where it is refused: who
    sends none holds a connection. Switches."""
    refusal: PushError = RequestTimeout(f"the body did not come within {seconds:g} s")
    deadline = gevent.Timeout(seconds)
    try:
        with deadline:
            try:
                return _admit(access), _media_type(request.environ), _body(most)
            except PushError as error:
                refusal = error
                _hear_out()
    except gevent.Timeout as late:
        if late is not deadline:
            raise
        request.environ[UNREAD] = True
    raise refusal


def _admit(access: Access) -> Grant:
    environ = request.environ
    query = environ.get("QUERY_STRING", "")
    fields: dict[str, str] = {}
    if query:
        pairs = parse_pairs(query.encode("latin-1"), "the query")
        check_names((name for name, _ in pairs), (QUERY,), "the query")
        fields = single(pairs, "the query")
    cookie = request.cookies.get(COOKIE) if "HTTP_COOKIE" in environ else None
    grant = access.admit(environ.get("HTTP_AUTHORIZATION"), fields.get(QUERY), cookie, environ.get("REMOTE_ADDR", ""))
    refuse_foreign_pages(access)
    return grant


def _media_type(environ: dict[str, Any]) -> str:
    """FORM, JSON or NDJSON. Raises UnsupportedMediaType (RFC 9110, section 15.5.16)."""
    text: str = environ.get("CONTENT_TYPE", "")
    kind, _, parameters = text.partition(";")
    kind = kind.strip().lower()
    if kind not in (FORM, JSON, NDJSON):
        raise UnsupportedMediaType(f"publish {FORM}, {JSON} or {NDJSON}, not {kind[:100]!r}",
                                   {"Accept-Post": ", ".join((FORM, JSON, NDJSON))})
    if parameters and parameters.strip().lower().replace('"', "") not in ("charset=utf-8", "charset=utf8"):
        raise UnsupportedMediaType(f"the only parameter is charset=utf-8, not {parameters.strip()[:100]!r}")
    if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body may not be encoded", {"Accept-Encoding": "identity"})
    return kind


def _body(most: int) -> bytes:
    """The whole body. Werkzeug hands over the part that it has of one that is too large or was cut off."""
    length = request.content_length or 0
    request.max_content_length = most + 1  # one more: a body in chunks that is too large shows it by its length
    body = _read() if length <= most else b""
    if max(length, len(body)) > most:
        raise PayloadTooLarge(f"the body is larger than {most} bytes")
    if len(body) < length:
        request.environ[UNREAD] = True
        raise BadRequest(f"the body was cut off: {len(body)} bytes of {length} came")
    return body


def _read() -> bytes:
    try:
        return request.get_data(cache=False)
    except Exception as error:  # the server's own errors, which have no common class, tell of bad chunks
        request.environ[UNREAD] = True
        raise BadRequest("the body broke off, or its chunks are not as RFC 9112 has them") from error


def _hear_out() -> None:
    """Let a client that is refused send the rest of its body, to a bound: one whose connection is closed meanwhile sees
    a broken pipe instead of the answer."""
    ends = "wsgi.input_terminated" in request.environ
    left = HEARD_BYTES if ends else min(request.content_length or 0, HEARD_BYTES)
    try:
        while left > 0 and (data := request.environ["wsgi.input"].read(min(left, 1 << 16))):
            left -= len(data)
    except Exception:  # as in _read
        request.environ[UNREAD] = True


def _key(environ: dict[str, Any], grant: Grant) -> str | None:
    """The idempotency key, one name space per user: nobody can take another's answer."""
    text = environ.get("HTTP_IDEMPOTENCY_KEY")
    if text is None:
        return None
    try:
        text = text.encode("latin-1").decode()
        check_name("Idempotency-Key", text)
    except UnicodeDecodeError:
        raise BadRequest("Idempotency-Key is not UTF-8") from None
    return f"{grant.user or ''}\n{text}"


def _form(body: bytes) -> Draft:
    pairs = parse_pairs(body, "the form")
    check_names((name for name, _ in pairs), FIELDS, "the form")
    fields: dict[str, Any] = dict(single(pairs, "the form", lists=("topics",)))
    topics = [value for name, value in pairs if name == "topics"]
    if topics:
        fields["topics"] = topics
    retry = fields.get("retry")
    if retry is not None:
        if not (retry.isascii() and retry.isdigit() and len(retry) < 10):
            raise BadRequest("retry is a whole number of milliseconds")
        fields["retry"] = int(retry)
    return draft_of(fields)


def _json(body: bytes) -> Draft:
    fields = _parse(body)
    if type(fields) is not dict:
        raise BadRequest("the body is a JSON object")
    return draft_of(fields)


def _lines(body: bytes, most: int) -> list[Draft]:
    lines = body.removesuffix(b"\n").split(b"\n")
    if len(lines) > most:
        raise BadRequest(f"a batch has at most {most} lines, not {len(lines)}")
    drafts = []
    for number, line in enumerate(lines, 1):
        try:
            drafts.append(_json(line))
        except BadRequest as error:
            raise BadRequest(f"line {number}: {error.detail}") from None
    return drafts


def _parse(text: bytes) -> Any:
    try:
        return _DECODER.decode(text.decode())
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except RecursionError:
        raise BadRequest("the JSON is nested too deep") from None
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise BadRequest(f"the field {names.most_common(1)[0][0][:100]!r} is repeated")
    return found


def _constant(name: str) -> None:
    raise BadRequest(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
