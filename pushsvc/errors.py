"""One family of errors. Each knows its HTTP status and its title; one handler turns them into problems.

The law of this room: an error says whose fault it is (4xx the caller's, 5xx ours) and what to do, in `detail`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# In a request's environment (PEP 3333): its body did not come whole, so nothing can follow it on its connection.
UNREAD: Final = "pushsvc.unread"


class PushError(Exception):
    """Root of the family. `status` is the HTTP status, `title` the problem's title (RFC 9457, section 3.1)."""

    status = 500
    title = "Internal error"

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class BadRequest(PushError):
    status = 400
    title = "Bad request"


class Unauthorized(PushError):
    """No token, or one that does not hold (RFC 6750, section 3.1: invalid_token)."""

    status = 401
    title = "Unauthorized"


class Forbidden(PushError):
    """A valid token that does not reach this far (RFC 6750, section 3.1: insufficient_scope)."""

    status = 403
    title = "Forbidden"


class RequestTimeout(PushError):
    """The request did not come whole in time (RFC 9110, section 15.5.9)."""

    status = 408
    title = "Request timeout"


class PayloadTooLarge(PushError):
    status = 413
    title = "Payload too large"


class UnsupportedMediaType(PushError):
    status = 415
    title = "Unsupported media type"


class BrokerUnavailable(PushError):
    """The broker cannot take or give events now. Nothing was acknowledged; publishing again is safe with a key."""

    status = 503
    title = "Broker unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"Retry-After": "1"})


class SettingsError(PushError):
    """A setting that cannot be meant; the start stops with this message."""

    title = "Bad settings"
