"""Publishing flat out, and clients that come back: what resuming and faults are tested under."""

import http.client
import itertools
import json
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import gevent

from tests.support.client import EndOfStream, ProtocolError, Stream
from tests.support.reader import Message

PAUSE = 0.02  # seconds until a client tries again
Failures = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Published:
    """What was published and acknowledged with `id`. `key`: its Idempotency-Key."""

    id: str
    topics: tuple[str, ...]
    data: str
    key: str


def seq_of(id: str) -> int:
    return int(id.rpartition("-")[2])


def epoch_of(id: str) -> str:
    return id.rpartition("-")[0]


class Fire:
    """Several connections that publish flat out from `with` to `stop()` or the end of the block.

    Every third event goes to two topics at once, every tenth request is a batch. Each request has its own
    Idempotency-Key. `stubborn`: one that fails or is refused is repeated with its key until it is answered; else it
    counts as `failed`, unless its connection broke: then its publisher ends. Can be lit again.

    acknowledged: what was answered, by sequence. tried: what was sent, by key.
    """

    def __init__(self, url: str, topics: Sequence[str], *, connections: int = 4, stubborn: bool = False,
                 size: int = 0, pause: float = 0) -> None:
        self.acknowledged: dict[int, Published] = {}
        self.tried: dict[str, list[dict[str, Any]]] = {}
        self.failed: list[tuple[int, str]] = []
        self._url = url
        self._topics = topics
        self._connections = connections
        self._stubborn = stubborn
        self._padding = "x" * size
        self._pause = pause
        self._numbers = itertools.count()
        self._stopped = False
        self._greenlets: list[gevent.Greenlet] = []

    def __enter__(self) -> Self:
        self._stopped = False
        self._greenlets = [gevent.spawn(self._publish) for _ in range(self._connections)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            gevent.killall(self._greenlets)

    def stop(self, timeout: float = 60) -> None:
        """Let every publisher finish what it has sent; raises what one of them has failed with. Switches."""
        self._stopped = True
        gevent.joinall(self._greenlets, timeout=timeout, raise_error=True)
        assert all(each.ready() for each in self._greenlets), "a publisher does not come back"

    @property
    def newest(self) -> int:
        """The newest acknowledged sequence."""
        return max(self.acknowledged, default=0)

    def on(self, topics: Collection[str], after: int = 0, upto: int = 1 << 62) -> list[Published]:
        """What was acknowledged for any of `topics` after one sequence up to another, in order."""
        return [each for seq, each in sorted(self.acknowledged.items())
                if after < seq <= upto and not set(topics).isdisjoint(each.topics)]

    def _publish(self) -> None:
        connection = Publishing(self._url)
        try:
            while not self._stopped:
                number = next(self._numbers)
                key = f"key-{number}"
                events = self.tried[key] = [self._event(f"{number}.{part}") for part in range(1 if number % 10 else 5)]
                ids = self._answer(connection, events, key)
                if ids is None:
                    return
                for id, event in zip(ids, events, strict=False):
                    self.acknowledged[seq_of(id)] = Published(id, tuple(event["topics"]), event["data"], key)
                gevent.sleep(self._pause)
        finally:
            connection.close()

    def _event(self, name: str) -> dict[str, Any]:
        topics = random.sample(self._topics, 2 if random.random() < 1 / 3 else 1)
        return {"topics": topics, "data": name + self._padding}

    def _answer(self, connection: "Publishing", events: list[dict[str, Any]], key: str) -> list[str] | None:
        """The ids; nothing for a refusal, None for a connection that broke."""
        while True:
            try:
                status, answer = connection.publish(events, key)
            except Failures:
                if not self._stubborn:
                    return None
            else:
                if status == 200:
                    return list(answer["ids"])
                self.failed.append((status, answer["detail"]))
                if not self._stubborn:
                    return []
            gevent.sleep(PAUSE)


class Publishing:
    """One kept connection that publishes batches with an Idempotency-Key. Opens anew after it broke."""

    def __init__(self, url: str, timeout: float = 30) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)

    def publish(self, events: Iterable[Mapping[str, Any]], key: str) -> tuple[int, dict[str, Any]]:
        """(status, the JSON of the answer). Raises Failures when the connection breaks."""
        lines = "".join(json.dumps(event) + "\n" for event in events)
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": key}
        try:
            self._connection.request("POST", "/publish", lines, headers)
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except Failures:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()


class Follower:
    """A client as EventSource is: when its stream ends it comes back with its last id.

    messages: all that came, over all connections. connections: how many it has had.
    """

    def __init__(self, url: str, topics: Sequence[str], last_event_id: str | None = None, **about: Any) -> None:
        self.messages: list[Message] = []
        self.connections = 0
        self.last_event_id = last_event_id
        self._url = url
        self._topics = topics
        self._about = about
        self._stream: Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, timeout: float = 20) -> Self:
        """Connect, if it is not connected, and wait until the stream has begun. Switches."""
        deadline = time.monotonic() + timeout
        while self._stream is None:
            self._connect(deadline)
        return self

    def until(self, predicate: Callable[[Message], bool], timeout: float = 60) -> list[Message]:
        """Follow until a message comes that the predicate holds for; all messages so far. Switches."""
        deadline = time.monotonic() + timeout
        while not self.messages or not predicate(self.messages[-1]):
            self._next(deadline)
        return self.messages

    def upto(self, seq: int, timeout: float = 60) -> list[Message]:
        """Follow until an event of that sequence or a later one; all messages so far. Switches."""
        return self.until(lambda message: message.type != "gap" and seq_of(message.last_event_id) >= seq, timeout)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _next(self, deadline: float) -> None:
        try:
            if self._stream is None:
                self._connect(deadline)
                return
            self.messages.append(self._stream.next(deadline - time.monotonic()))
            self.last_event_id = self._stream.last_event_id
        except EndOfStream:
            self._leave()

    def _connect(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"no stream, {len(self.messages)} messages, {self.connections} connections")
        try:
            self._stream = Stream(self._url, self._topics, last_event_id=self.last_event_id, timeout=remaining,
                                  **self._about)
            self._stream.opened(remaining)
            self.connections += 1
        except (OSError, EndOfStream, ProtocolError) as error:
            if isinstance(error, TimeoutError):
                raise
            self._leave()

    def _leave(self) -> None:
        """The stream has ended: come back in a moment, where it ended."""
        if self._stream is not None:
            self.last_event_id = self._stream.last_event_id or self.last_event_id
        self.close()
        gevent.sleep(PAUSE)


def assert_exact(messages: Iterable[Message], expected: Iterable[Published]) -> None:
    """No gap, no double, in order, nothing else."""
    got = [(message.last_event_id, message.data) for message in messages]
    wanted = [(each.id, each.data) for each in expected]
    if got == wanted:
        return
    missing = [each for each in wanted if each not in set(got)]
    surplus = [each for each in got if each not in set(wanted)]
    raise AssertionError(f"{len(got)} messages, {len(wanted)} expected; missing {len(missing)} {missing[:3]}, "
                   f"unexpected {len(surplus)} {surplus[:3]}, in order: {sorted(got, key=_place) == got}, "
                   f"doubles: {len(got) - len(set(got))}, first {got[:2]}, last {got[-2:]}")


def _place(pair: tuple[str, str]) -> int:
    return seq_of(pair[0])
