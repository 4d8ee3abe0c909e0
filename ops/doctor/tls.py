"""What a TLS handshake tells: the certificate, the versions, and whether HTTP/2 is offered."""

from __future__ import annotations

import ssl
import struct
import time
import warnings
from dataclasses import dataclass, replace

from wire import Target, connect, tls_context

LEAST_DAYS = 14  # those who renew by a timer do it a month ahead
LEAST_STREAMS = 100  # "It is recommended that this value be no smaller than 100" (RFC 9113, section 6.5.2)
HTTP2 = "h2"
OFFERED = (HTTP2, "http/1.1")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and SETTINGS without any
SETTINGS, MAX_CONCURRENT_STREAMS = 4, 3
FRAME_HEAD, SETTING = struct.Struct(">BHBBL"), struct.Struct(">HL")
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Seen:
    """summary: for people. alpn: what the server has chosen, "" for nothing. days_left: of the certificate; None if it
    was not checked. old_version: one below TLS 1.2 that the server accepts, "" for none. streams: that it allows on one
    connection of HTTP/2; None for no bound."""

    summary: str
    alpn: str = ""
    days_left: int | None = None
    old_version: str = ""
    streams: int | None = None


def refuses(error: Exception) -> bool:
    """Whether it is the certificate that does not hold."""
    return isinstance(error, ssl.SSLCertVerificationError)


def reason(error: Exception) -> str:
    return f"the certificate does not hold: {getattr(error, 'verify_message', '') or error}"


def unverified(target: Target) -> Target:
    return replace(target, verify=False)


def look_at(target: Target) -> Seen:
    """Raises OSError."""
    if target.scheme == "http":
        return Seen("plain HTTP/1.1")
    with connect(target, OFFERED) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        alpn, version = connection.selected_alpn_protocol() or "", connection.version() or ""
        days = _days_left(connection) if target.verify else None
        streams = _most_streams(connection) if alpn == HTTP2 else None
    chosen = alpn or "no protocol"
    return Seen(f"{version}, ALPN chooses {chosen}", alpn, days, _old_version(target), streams)


def _most_streams(connection: ssl.SSLSocket) -> int | None:
    """What the server's first frame says: "The SETTINGS frame MUST be the first" (RFC 9113, section 3.4)."""
    connection.sendall(PREFACE)
    with connection.makefile("rb") as stream:
        head = stream.read(FRAME_HEAD.size)
        if len(head) < FRAME_HEAD.size:
            return None
        high, low, kind, _flags, _stream = FRAME_HEAD.unpack(head)
        body = stream.read((high << 16) + low) if kind == SETTINGS else b""
    return dict(SETTING.iter_unpack(body[: len(body) // SETTING.size * SETTING.size])).get(MAX_CONCURRENT_STREAMS)


def _days_left(connection: ssl.SSLSocket) -> int:
    ends = ssl.cert_time_to_seconds(str((connection.getpeercert() or {})["notAfter"]))
    return int((ends - time.time()) // DAY_SECONDS)


def _old_version(target: Target) -> str:
    context = tls_context(unverified(target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that these versions are old is the point
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    try:
        with connect(target, OFFERED, context) as connection:
            return getattr(connection, "version", lambda: "")() or ""
    except OSError:
        return ""
