"""Plain clients for the service: a streaming subscriber that sees the raw bytes, and publishers.

Everything here is blocking and of the standard library, so it works with and without gevent's monkey patch.
The streaming client speaks HTTP/1.1 by hand: what a library would tidy up is what the tests want to see.
"""

import http.client
import json
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote, urlencode, urlsplit

from tests.support.reader import EventReader, Message

HEAD_LIMIT = 65_536
READ_SIZE = 65_536
WIRE_LIMIT = 1 << 20

Headers = Mapping[str, str]


class EndOfStream(Exception):
    """The stream ended and every message of it has been taken."""


class ProtocolError(Exception):
    """The server sent something that is not HTTP/1.1 as RFC 9112 has it."""


# --- The framing of a body -------------------------------------------------------------------------------


class Body(Protocol):
    """Takes a body out of its framing. `ended`: no more to come; `clean`: it ended as its framing says."""

    ended: bool
    clean: bool

    def feed(self, data: bytes) -> bytes: ...

    def eof(self) -> None: ...


class ChunkedBody:
    """`Transfer-Encoding: chunked` (RFC 9112 section 7.1). Clean with the last chunk and its trailers."""

    def __init__(self) -> None:
        self.ended = self.clean = False
        self._buffer = bytearray()
        self._left = 0
        self._step: Callable[[bytearray], bool] = self._size

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        body = bytearray()
        while not self.ended and self._step(body):
            pass
        return bytes(body)

    def eof(self) -> None:
        self.ended = True

    # Each step reads one part of the grammar, sets the next step and returns whether it got on.

    def _size(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        size, _, _extensions = line.partition(b";")
        if not re.fullmatch(rb"[0-9A-Fa-f]+[ \t]*", size):
            raise ProtocolError(f"not a chunk size: {bytes(line[:80])!r}")
        self._left = int(size, 16)
        self._step = self._data if self._left else self._trailer
        return True

    def _data(self, body: bytearray) -> bool:
        part = self._buffer[: self._left]
        del self._buffer[: len(part)]
        body += part
        self._left -= len(part)
        if self._left == 0:
            self._step = self._data_end
        return self._left == 0

    def _data_end(self, body: bytearray) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise ProtocolError(f"chunk data not followed by CRLF: {bytes(self._buffer[:80])!r}")
        del self._buffer[:2]
        self._step = self._size
        return True

    def _trailer(self, body: bytearray) -> bool:
        line = self._line()
        self.ended = self.clean = line == b""
        return line is not None

    def _line(self) -> bytes | None:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return None
        self._buffer = rest
        return bytes(line)


class CountedBody:
    """`Content-Length`. Clean once all bytes are there."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = self.clean = length == 0

    def feed(self, data: bytes) -> bytes:
        body = data[: self._left]
        self._left -= len(body)
        self.ended = self.clean = self._left == 0
        return body

    def eof(self) -> None:
        self.ended = True


class UnframedBody:
    """Ends with the connection (HTTP/1.0). Clean if that was an orderly close and no reset."""

    def __init__(self) -> None:
        self.ended = self.clean = False

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> None:
        self.ended = self.clean = True


def framing(headers: Headers) -> Body:
    """The framing that the response's headers announce."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return ChunkedBody()
    if "content-length" in headers:
        return CountedBody(int(headers["content-length"]))
    return UnframedBody()


# --- Subscribing -----------------------------------------------------------------------------------------


class Stream:
    """One subscription. The constructor connects, asks, and returns when the response's head is read.

    `status`, `headers` (lower-case names), `raw` (the body without its framing), `wire` (the first
    `wire_limit` bytes as they came, head included), `reader` (fed only by a `text/event-stream`),
    `ended` (no more will come), `clean_end` (and it ended as its framing says; False after a broken
    connection), `error` (what broke it, else None).

    `topics` is one topic or several. `receive_buffer` sets SO_RCVBUF, to play the slow reader soon.
    Every waiting method takes its timeout in seconds and raises TimeoutError. All of them switch.
    """

    def __init__(
        self,
        url: str,
        topics: str | Iterable[str],
        *,
        last_event_id: str | None = None,
        query_last_event_id: str | None = None,
        envelope: bool = False,
        headers: Headers | None = None,
        token: str | None = None,
        timeout: float = 10,
        version: str = "1.1",
        path: str = "/events",
        receive_buffer: int | None = None,
        wire_limit: int = WIRE_LIMIT,
    ) -> None:
        self.raw = bytearray()
        self.wire = bytearray()
        self.reader = EventReader()
        self.error: OSError | None = None
        self._taken_id = last_event_id or query_last_event_id or ""
        self._wire_limit = wire_limit
        self._messages: deque[Message] = deque()

        parts = urlsplit(url)
        target = parts.path.rstrip("/") + path + _query(topics, query_last_event_id, envelope)
        fields = {"Host": parts.netloc, "Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_event_id is not None:
            fields["Last-Event-ID"] = last_event_id
        if token is not None:
            fields["Authorization"] = f"Bearer {token}"
        fields |= headers or {}

        deadline = time.monotonic() + timeout
        self._connect(parts.hostname or "127.0.0.1", parts.port or 80, timeout, receive_buffer)
        try:
            self.status, self.headers, rest = self._ask(target, version, fields, deadline)
            self._is_event_stream = self.headers.get("content-type", "").startswith("text/event-stream")
            self._body = framing(self.headers)
            self._decode(rest)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Stream {self.status} id={self.last_event_id!r} ended={self.ended} clean={self.clean_end}>"

    @property
    def ended(self) -> bool:
        return self._body.ended or self.error is not None

    @property
    def clean_end(self) -> bool:
        return self._body.clean and self.error is None

    @property
    def last_event_id(self) -> str:
        """The id to resume from, as if the messages not taken yet had not come.

        Before the first it is the one that was asked for.
        """
        return self._taken_id if self._messages else self.reader.last_event_id or self._taken_id

    def next(self, timeout: float = 5) -> Message:
        """The next message. Raises EndOfStream when there is none and the stream has ended."""
        deadline = time.monotonic() + timeout
        while not self._messages:
            if self.ended:
                raise EndOfStream(repr(self))
            self._receive(deadline)
        return self._pop()

    def take(self, count: int, timeout: float = 5) -> list[Message]:
        """The next `count` messages, within `timeout` for all. Takes none of them if they do not all come."""
        deadline = time.monotonic() + timeout
        while len(self._messages) < count:
            if self.ended:
                raise EndOfStream(f"{len(self._messages)} of {count} messages, {self!r}")
            self._receive(deadline)
        return [self._pop() for _ in range(count)]

    def until(self, predicate: Callable[[Message], bool], timeout: float = 5) -> list[Message]:
        """The messages up to and with the first that the predicate holds for: it is the last of the list."""
        deadline = time.monotonic() + timeout
        messages: list[Message] = []
        while not messages or not predicate(messages[-1]):
            messages.append(self.next(deadline - time.monotonic()))
        return messages

    def rest(self, timeout: float = 5) -> list[Message]:
        """All messages up to the end of the stream, which must come within `timeout`."""
        deadline = time.monotonic() + timeout
        while not self.ended:
            self._receive(deadline)
        return [self._pop() for _ in range(len(self._messages))]

    def opened(self, timeout: float = 5) -> Self:
        """Waits for what the service sends at once: a `retry` field and a comment. Returns the stream.

        Raises EndOfStream for a refusal, which is a stream of known length that has its end with it.
        """
        deadline = time.monotonic() + timeout
        while self.reader.reconnection_time is None or not self.reader.comments:
            if self.ended:
                raise EndOfStream(f"{self!r} sent {bytes(self.raw[:500])!r}")
            self._receive(deadline)
        if "content-length" in self.headers:
            raise EndOfStream(f"refused: {bytes(self.raw[:500])!r}")
        return self

    def quiet(self, seconds: float) -> None:
        """Asserts that the stream stays open and brings no message for so long. Comments do not count."""
        deadline = time.monotonic() + seconds
        try:
            while not self._messages and not self.ended:
                self._receive(deadline)
        except TimeoutError:
            return
        assert not self._messages, f"expected silence, got {list(self._messages)[:5]}"
        raise AssertionError(f"expected silence on an open stream, got its end: {self!r}")

    def close(self) -> None:
        """Hangs up in order. Idempotent; what was received stays readable."""
        self._socket.close()

    def reset(self) -> None:
        """Hangs up with a TCP reset, as a client does that dies or leaves unread bytes behind."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _connect(self, host: str, port: int, timeout: float, receive_buffer: int | None) -> None:
        self._socket = _connect(host, port, timeout, receive_buffer)

    def _ask(self, target: str, version: str, fields: Headers, deadline: float) -> tuple[int, dict[str, str], bytes]:
        """Sends the request; the status, the headers and what has come of the body with them."""
        self._socket.sendall(_request_head(target, version, fields))
        return self._read_head(deadline)

    def _pop(self) -> Message:
        message = self._messages.popleft()
        self._taken_id = message.last_event_id or self._taken_id
        return message

    def _receive(self, deadline: float) -> None:
        """Waits for the next bytes of the body, or for its end."""
        try:
            data = self._read(deadline)
        except ConnectionError as error:
            self.error = error
            return
        if data:
            self._decode(data)
        else:
            self._body.eof()

    def _decode(self, data: bytes) -> None:
        body = self._body.feed(data)
        self.raw += body
        if self._is_event_stream:
            self._messages.extend(self.reader.feed(body))

    def _read(self, deadline: float) -> bytes:
        remaining = deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            data = self._next_part(remaining)
        except TimeoutError:
            waiting = list(self._messages)[:5]
            raise TimeoutError(f"timed out; not taken: {len(self._messages)} messages {waiting}") from None
        self.wire += data[: max(0, self._wire_limit - len(self.wire))]
        return data

    def _next_part(self, timeout: float) -> bytes:
        self._socket.settimeout(timeout)
        return self._socket.recv(READ_SIZE)

    def _read_head(self, deadline: float) -> tuple[int, dict[str, str], bytes]:
        received = b""
        while b"\r\n\r\n" not in received:
            data = self._read(deadline)
            received += data
            if not data or len(received) > HEAD_LIMIT:
                raise ProtocolError(f"no response head in {received[:500]!r}")
        head, _, rest = received.partition(b"\r\n\r\n")
        return *_parse_head(head.decode("latin-1")), rest


def _query(topics: str | Iterable[str], last_event_id: str | None, envelope: bool) -> str:
    pairs = [("topic", topic) for topic in ([topics] if isinstance(topics, str) else topics)]
    if last_event_id is not None:
        pairs.append(("last_event_id", last_event_id))
    if envelope:
        pairs.append(("envelope", "1"))
    return "?" + urlencode(pairs, quote_via=quote) if pairs else ""


def _connect(host: str, port: int, timeout: float, receive_buffer: int | None) -> socket.socket:
    connection = socket.socket()
    try:
        if receive_buffer is not None:  # before connect: it decides the window that the handshake offers
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(timeout)
        connection.connect((host, port))
    except BaseException:
        connection.close()
        raise
    return connection


def _request_head(target: str, version: str, fields: Headers) -> bytes:
    lines = [f"GET {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _parse_head(head: str) -> tuple[int, dict[str, str]]:
    status_line, *lines = head.split("\r\n")
    matched = re.match(r"HTTP/1\.[01] ([0-9]{3}) ", status_line + " ")
    if matched is None:
        raise ProtocolError(f"not a status line: {status_line!r}")
    pairs = (line.partition(":") for line in lines)
    return int(matched[1]), _joined((name, value.strip()) for name, _, value in pairs)


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by lower-case name; one that occurs twice is one list (RFC 9110 section 5.3)."""
    headers: dict[str, str] = {}
    for name, value in pairs:
        key = name.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers


# --- Requests and publishing -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response; header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    method: str,
    url: str,
    body: bytes | str | None = None,
    headers: Headers | None = None,
    timeout: float = 10,
) -> Response:
    """One request on a connection of its own. `url` is whole, with its path and query."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        return _exchange(connection, method, target, body, {"Connection": "close", **(headers or {})})
    finally:
        connection.close()


Ask = Callable[[str, str, str, Headers], Response]


def publish(url: str, *, headers: Headers | None = None, ask: Ask = request, **fields: Any) -> str:
    """Publishes one event as JSON to the service at `url`; asserts that it was accepted; returns its id.

    ask: how requests are made, as by `request`.
    """
    sent = {"Content-Type": "application/json", **(headers or {})}
    return str(_accepted(ask("POST", f"{url}/publish", json.dumps(fields), sent))["id"])


def publish_form(
    url: str, pairs: Sequence[tuple[str, str]], *, headers: Headers | None = None, ask: Ask = request
) -> str:
    """Publishes one event as a form, as `curl -d` does; returns its id."""
    sent = {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
    return str(_accepted(ask("POST", f"{url}/publish", urlencode(pairs), sent))["id"])


def publish_lines(
    url: str, objects: Iterable[Mapping[str, Any]], *, headers: Headers | None = None, ask: Ask = request
) -> list[str]:
    """Publishes a batch, one JSON object a line; returns the ids in the order of the lines."""
    sent = {"Content-Type": "application/x-ndjson", **(headers or {})}
    lines = "".join(json.dumps(fields) + "\n" for fields in objects)
    return list(_accepted(ask("POST", f"{url}/publish", lines, sent))["ids"])


class Connection:
    """A kept connection for many publishes, one after the other. Not for two greenlets at once.

    A connection that the server has closed while it was idle is opened anew; a request is never repeated.
    """

    def __init__(self, url: str, *, headers: Headers | None = None, timeout: float = 10) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        self._target = parts.path.rstrip("/") + "/publish"
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, **fields: Any) -> str:
        """Publishes one event as JSON; asserts that it was accepted; returns its id."""
        if self._hung_up():
            self.close()
        try:
            body = json.dumps(fields)
            response = _exchange(self._connection, "POST", self._target, body, self._headers)
        except BaseException:
            self.close()  # the next publish must not read this one's answer
            raise
        return str(_accepted(response)["id"])

    def close(self) -> None:
        self._connection.close()

    def _hung_up(self) -> bool:
        """An idle connection has nothing to read, unless the server has ended it."""
        sock = self._connection.sock
        return sock is not None and bool(select.select([sock], [], [], 0)[0])


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | str | None,
    headers: Headers,
) -> Response:
    data = body.encode() if isinstance(body, str) else body
    connection.request(method, target, data, dict(headers))
    response = connection.getresponse()
    return Response(response.status, _joined(response.getheaders()), response.read())


def _accepted(response: Response) -> dict[str, Any]:
    assert response.status == 200, f"publish was answered {response.status}: {response.body[:2000]!r}"
    answer = response.json()
    assert isinstance(answer, dict), f"publish was answered {answer!r}"
    return answer
