"""The short way in: requests for a path that has answered with a stream before.

Such a request is a GET that arrived whole in the first read of its connection. It is parsed once, by the parser that
gunicorn uses, straight into a WSGI environment (PEP 3333), and served without a connection object: a storm of
returning clients costs half. Whatever is not as plain as that goes gunicorn's way, with the bytes already read.
"""

from __future__ import annotations

import io
import ipaddress
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

from gevent import socket
from gunicorn.http.wsgi import Response, _make_early_hints_callback, base_environ

try:
    from gunicorn_h1c import IncompleteError, ParseError, parse_request
except ImportError:  # then every request goes gunicorn's way
    parse_request = None
    IncompleteError = ParseError = ValueError

MOST_PEERS = 4096  # proxies, mostly
READ_BYTES = 8192  # as much as gunicorn reads at first
# Fields that change how a request is read, or that only a trusted peer may send: gunicorn knows their rules.
_SPECIAL = frozenset((b"CONTENT-LENGTH", b"CONTENT-TYPE", b"TRANSFER-ENCODING", b"EXPECT", b"UPGRADE", b"TE",
                      b"TRAILER", b"FORWARDED", b"HTTP2-SETTINGS", b"SCRIPT-NAME", b"PATH-INFO"))
# RFC 9112, section 3.2.1, origin-form: an absolute path of printable ASCII.
_TARGET = re.compile(rb"/(?!/)[\x21-\x22\x24-\x7e]*")


class ExpressRequest:
    """What gunicorn asks of a request that it answers, also with an error."""

    __slots__ = ("headers", "uri")
    method = "GET"
    version = (1, 1)
    body = None

    def __init__(self, headers: list[tuple[str, str]], uri: str) -> None:
        self.headers = headers
        self.uri = uri

    @property
    def query(self) -> str:
        return self.uri.partition("?")[2]

    def should_close(self) -> bool:
        for name, value in self.headers:
            if name == "CONNECTION":  # the first decides
                return value.strip(" \t").lower() == "close"
        return False


class LateSocket:
    """The `gunicorn.socket` of an environment: gevent's socket of the connection, which `make(endpoint, raw)` makes when
    something is asked of it, and which has the descriptor from then on. Few applications ask, and a socket is dear."""

    __slots__ = ("_endpoint", "_make", "_raw", "_response", "made")
    __class__ = socket.socket

    def __init__(self, make: Callable[[Any, Any], Any], endpoint: Any, raw: Any, response: Any) -> None:
        self._make = make
        self._endpoint = endpoint
        self._raw = raw
        self._response = response
        self.made: Any = None

    def now(self) -> Any:
        if self.made is None:
            self.made = self._make(self._endpoint, self._raw)
        return self.made

    def send_early_hints(self, headers: Any) -> None:
        """The `wsgi.early_hints` of the environment."""
        _make_early_hints_callback(self._response.req, self, self._response)(headers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now(), name)


class Express:
    """`prepare()` makes of the bytes of a request what a worker serves, or None if it has to go gunicorn's way.

    cfg: gunicorn's configuration; server: the listener's (host, port). paths: those that have answered with a stream.
    """

    def __init__(self, cfg: Any, server: tuple[str, int], paths: Collection[bytes]) -> None:
        self.paths = paths
        self._cfg = cfg
        self._schemes = cfg.secure_scheme_headers
        self._trusted = lru_cache(MOST_PEERS)(self._is_trusted)
        self._template = base_environ(cfg) | {
            "wsgi.multithread": True, "wsgi.url_scheme": "http", "REQUEST_METHOD": "GET", "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_NAME": server[0], "SERVER_PORT": str(server[1]), "SCRIPT_NAME": ""}

    def prepare(self, data: bytes, address: tuple[str, int]) -> tuple[dict[str, Any], Any] | None:
        """The environment and gunicorn's response for a request. Raises nothing: what is odd is None."""
        target = data[4 : data.find(b" ", 4)]
        path, _, query = target.partition(b"?")
        if path not in self.paths or not data.startswith(b"GET ") or not _TARGET.fullmatch(target):
            return None
        fields = self._fields(data)
        if fields is None:
            return None
        environ = self._template.copy()
        schemes = {value == self._schemes[name] for name, value in fields if name in self._schemes}
        if schemes and self._trusted(address[0]):
            if len(schemes) > 1:  # they contradict each other: gunicorn refuses that
                return None
            environ["wsgi.url_scheme"] = "https" if True in schemes else "http"
        for name, value in fields:
            key = "HTTP_" + name.replace("-", "_")
            environ[key] = f"{environ[key]},{value}" if key in environ else value
        environ["wsgi.input"] = io.BytesIO()
        environ["RAW_URI"] = target.decode("latin-1")
        environ["PATH_INFO"] = (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1")
        environ["QUERY_STRING"] = query.decode("latin-1")
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = address[0], str(address[1])
        return environ, Response(ExpressRequest(fields, environ["RAW_URI"]), None, self._cfg)

    def _is_trusted(self, peer: str) -> bool:
        """Whether gunicorn believes this peer what it says of the scheme (`forwarded_allow_ips`)."""
        return "*" in self._cfg.forwarded_allow_ips or any(
            ipaddress.ip_address(peer) in network for network in self._cfg.forwarded_allow_networks())

    def _fields(self, data: bytes) -> list[tuple[str, str]] | None:
        """The header fields with upper-case names; None unless all of them are plain and nothing follows them."""
        cfg = self._cfg
        if data.count(b"\n") != data.count(b"\r\n"):  # gunicorn refuses a bare LF
            return None
        try:
            parsed = parse_request(
                data, last_len=0, limit_request_line=cfg.limit_request_line or READ_BYTES,
                limit_request_fields=cfg.limit_request_fields, limit_request_field_size=cfg.limit_request_field_size,
                permit_unconventional_http_method=False, permit_unconventional_http_version=False)
        except (ParseError, IncompleteError):
            return None
        if parsed["minor_version"] != 1 or parsed["consumed"] != len(data):
            return None
        fields = []
        for raw, value in parsed["headers"]:
            name = raw.upper()
            if name in _SPECIAL or b"_" in name:
                return None
            fields.append((name.decode("latin-1"), value.decode("latin-1")))
        return fields


def is_possible(cfg: Any, script_name: str) -> bool:
    """Whether the short way leads to the same place: nobody has asked for what only gunicorn's way has."""
    hooks = all(cfg.settings[name].get() is cfg.settings[name].default for name in ("pre_request", "post_request"))
    return (parse_request is not None and hooks and not cfg.is_ssl and not cfg.accesslog and not script_name
            and cfg.protocol == "http" and cfg.proxy_protocol in (False, "off") and cfg.http_parser != "python"
            and cfg.http2_cleartext == "off" and not cfg.permit_obsolete_folding and not cfg.strip_header_spaces)
