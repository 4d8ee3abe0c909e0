"""HTTP/1.1 by hand (RFC 9112): what a library would tidy up is what the doctor wants to see."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self
from urllib.parse import urljoin, urlsplit

from reader import Reader

HEAD_BYTES = 65_536
READ_BYTES = 65_536
BODY_BYTES = 1 << 20
CONNECT_SECONDS = 10.0
STREAM = "text/event-stream"
PORTS = {"http": 80, "https": 443}
Headers = Mapping[str, str]


class WireError(Exception):
    """What came is no answer in HTTP/1."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask. path: with its query. trusted: a file of certificates to trust, "" for the system's; verify: whether
    the server's has to hold."""

    scheme: str
    host: str
    port: int
    path: str
    trusted: str = ""
    verify: bool = True

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return self.origin + self.path

    def at(self, path: str) -> Target:
        return replace(self, path=path)

    def to(self, url: str) -> Target:
        """The target that `url`, which may be relative, leads to from here. Raises ValueError."""
        return parse(urljoin(self.url, url), self.trusted, self.verify)

    def with_field(self, field: str) -> Target:
        """The same with one more field, `name=value`, in its query."""
        return self.at(f"{self.path}{'&' if '?' in self.path else '?'}{field}")


def parse(url: str, trusted: str = "", verify: bool = True) -> Target:
    """Raises ValueError for what is no http or https address."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is no address like https://push.example.com/events")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname, parts.port or PORTS[parts.scheme], path, trusted, verify)


@dataclass(frozen=True, slots=True)
class Head:
    """version: as `1.1`. fields: all, in order, with lower-case names."""

    version: str
    status: int
    fields: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        """All values of a field, joined as one list (RFC 9110, section 5.3); "" for none."""
        return ", ".join(value for each, value in self.fields if each == name)

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.fields if each == name]

    @property
    def media_type(self) -> str:
        return self.get("content-type").partition(";")[0].strip().lower()


class Chunks:
    """Takes a chunked body out of its framing (RFC 9112, section 7.1). ended: its last chunk has come."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._left = 0  # of the chunk and the line end behind it

    def feed(self, data: bytes) -> bytes:
        self._rest += data
        out = b""
        while self._rest and not self.ended:
            if self._left:
                part, self._rest = self._rest[: self._left], self._rest[self._left :]
                out += part[: max(0, self._left - 2)]
                self._left -= len(part)
                continue
            line, found, rest = self._rest.partition(b"\r\n")
            if not found:
                break
            size = _size(line)
            self._rest, self._left, self.ended = rest, size + 2, size == 0
        return out


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise WireError(f"{line[:50]!r} is no size of a chunk") from None


class Answer:
    """One response as it comes, on a connection of its own. The constructor asks and returns at once; `wait_head` reads.

    ended: no more will come. clean: and it ended as its framing says. last_at: when the newest bytes came, by the
    monotonic clock. Methods that wait raise TimeoutError.
    """

    def __init__(self, target: Target, fields: Headers, method: str = "GET", body: bytes = b"") -> None:
        self.reader = Reader()
        self.head: Head | None = None
        self.ended = self.clean = False
        self.body = b""
        self.last_at = time.monotonic()
        self._received = b""
        self._chunks: Chunks | None = None
        self._left: int | None = None
        self._socket = connect(target)
        try:
            self._socket.sendall(_request(target, fields, method, body))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_head(self, seconds: float) -> Head:
        """Raises WireError for no answer, TimeoutError if none comes in time."""
        deadline = time.monotonic() + seconds
        while self.head is None:
            data = self._read(deadline)
            self._received += data
            if b"\r\n\r\n" in self._received:
                self._open()
            elif not data or len(self._received) > HEAD_BYTES:
                raise WireError(f"no head of an answer in {self._received[:200]!r}")
        return self.head

    def wait_more(self, seconds: float) -> bytes:
        """The next bytes of the body; empty at its end."""
        data = self._read(time.monotonic() + seconds)
        if not data:
            self.ended = True
            self.clean = self.clean or (self._chunks is None and self._left is None)
        return self._take(data)

    def wait_end(self, seconds: float) -> bytes:
        """The whole body, at most BODY_BYTES of it. Raises WireError if it is longer."""
        deadline = time.monotonic() + seconds
        while not self.ended:
            self.wait_more(deadline - time.monotonic())
            if len(self.body) > BODY_BYTES:
                raise WireError("the answer is larger than any that was expected")
        return self.body

    def close(self) -> None:
        self._socket.close()

    def _open(self) -> None:
        head, _, rest = self._received.partition(b"\r\n\r\n")
        self.head = parse_head(head.decode("latin-1"))
        if self.head.get("transfer-encoding").lower().endswith("chunked"):
            self._chunks = Chunks()
        elif length := self.head.get("content-length"):
            self._left = int(length) if length.isdecimal() else 0
            self._end_if(self._left == 0)
        if self.head.status in (204, 304):
            self._end_if(True)
        self._take(rest)

    def _take(self, data: bytes) -> bytes:
        if self._chunks is not None:
            data = self._chunks.feed(data)
            self._end_if(self._chunks.ended)
        elif self._left is not None:
            self._left -= len(data)
            self._end_if(self._left <= 0)
        if self.head is not None and self.head.media_type == STREAM:
            self.reader.feed(data)
        else:
            self.body += data
        return data

    def _end_if(self, ended: bool) -> None:
        if ended:
            self.ended = self.clean = True

    def _read(self, deadline: float) -> bytes:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise
        except OSError:  # a reset, or TLS without its end
            data = b""
        if data:
            self.last_at = time.monotonic()
        return data


def connect(
    target: Target, alpn: tuple[str, ...] = ("http/1.1",), context: ssl.SSLContext | None = None
) -> socket.socket:
    """Connected, with TLS if the scheme asks for it. Raises OSError."""
    plain = socket.create_connection((target.host, target.port), CONNECT_SECONDS)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.scheme == "http":
            return plain
        context = context or tls_context(target)
        context.set_alpn_protocols(list(alpn))
        return context.wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


def tls_context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=target.trusted or None)
    if not target.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def exchange(target: Target, fields: Headers, method: str = "GET", body: bytes = b"",
             seconds: float = CONNECT_SECONDS) -> tuple[Head, bytes]:
    """One request and its whole answer. Raises OSError, WireError."""
    with Answer(target, fields, method, body) as answer:
        head = answer.wait_head(seconds)
        return head, answer.wait_end(seconds)


def parse_head(text: str) -> Head:
    """Raises WireError."""
    status_line, *lines = text.split("\r\n")
    matched = re.match(r"HTTP/(1\.[01]) ([0-9]{3})(?: |$)", status_line)
    if matched is None:
        raise WireError(f"no status line: {status_line[:100]!r}")
    pairs = (line.partition(":") for line in lines)
    return Head(matched[1], int(matched[2]), tuple((name.strip().lower(), value.strip()) for name, _, value in pairs))


def _request(target: Target, fields: Headers, method: str, body: bytes) -> bytes:
    given = {"Host": target.netloc, **({"Content-Length": str(len(body))} if method == "POST" else {}), **fields}
    lines = [f"{method} {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
