"""Errors become problems (RFC 9457) in one handler, and cross-origin rules (WHATWG Fetch) are kept in one place."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from functools import partial

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from pushsvc.auth import Access
from pushsvc.errors import Forbidden, PushError

PREFLIGHT_SECONDS = 7200
logger = logging.getLogger(__name__)


def problem(status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    """A problem details object with its media type; `type` is about:blank, for the status says what it is."""
    body = json.dumps({"title": title, "status": status, "detail": detail})
    return Response(body, status, headers, content_type="application/problem+json")


def install(app: Flask, access: Access) -> None:
    """Register the error handlers and the cross-origin rules on `app`."""
    app.register_error_handler(PushError, _push_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _surprise)

    if access.origins:
        app.before_request(_preflight)
        app.after_request(partial(_share, access.origins))


def _preflight() -> Response | None:
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return Response(status=204, headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, Last-Event-ID",
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS)})
    return None


def _share(origins: Collection[str], response: Response) -> Response:
    response.headers.add("Vary", "Origin")
    origin = request.environ.get("HTTP_ORIGIN", "")
    if origin in origins:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Credentials"] = "true"
    return response


def refuse_foreign_pages(access: Access) -> None:
    """Raises Forbidden when a browser says that a page of an origin that was not allowed sends this request: a form of
    any page can post here, with the reader's cookie or from the reader's loopback."""
    origin = request.environ.get("HTTP_ORIGIN")
    if origin is None or origin in access.origins:
        return
    if origin.partition("://")[2] != request.host:
        raise Forbidden(f"pages of {origin!r} may not publish: PUSHSVC_CORS_ORIGINS does not name it")


def _push_error(error: PushError) -> Response:
    return problem(error.status, error.title, error.detail, error.headers)


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    detail = error.description or ""
    if isinstance(error, RequestEntityTooLarge):
        detail = f"the body is larger than {request.max_content_length} bytes"
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Location")}
    return problem(status, error.name, detail, headers)


def _surprise(error: Exception) -> Response:
    logger.exception("error in a view", extra={"method": request.method, "path": request.path})
    return problem(500, "Internal server error", "the service failed; its log says why")
