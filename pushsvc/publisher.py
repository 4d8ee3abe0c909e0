"""Publishing from any Python process (Django, Celery, a script), without HTTP and without gevent: straight into Redis.

    with Publisher("redis://127.0.0.1/0") as publisher:
        publisher.publish("room-7", "Hello")
        publisher.publish_batch([{"topic": "room-7", "data": {"n": 1}}, {"topics": ["a", "b"], "data": "x"}])
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

from pushsvc.brokers.redis_address import parse_address
from pushsvc.brokers.redis_codec import positions_of, publish_arguments
from pushsvc.brokers.redis_link import Arguments, Link, Refused
from pushsvc.draft import check_batch, draft_of
from pushsvc.errors import BadRequest, BrokerUnavailable, SettingsError
from pushsvc.event import DEFAULT_TYPE, KEEP_ALL, Draft, check_name
from pushsvc.position import Position
from pushsvc.settings import Settings, hide

MOST_SECONDS = 86_400.0


class Publisher:
    """One connection to the log at `url`, opened when it is first needed and again after it broke. Threads may share
    it, and a forked process gets one of its own. Retention is what the service has set; in a new log its defaults, until
    a worker comes. What may be published together is what the HTTP API takes by default: 10,000 events and 1 MiB of data.

    prefix: as PUSHSVC_REDIS_PREFIX. replicas: as PUSHSVC_REDIS_REPLICAS. timeout: seconds that a publish may take, the
    wait for other threads and for a connection included, more than 0 and at most a day. Raises SettingsError for what
    cannot be meant, and for a URL that is none of Redis.
    """

    def __init__(self, url: str, *, prefix: str | None = None, replicas: int = 0, timeout: float = 10.0) -> None:
        if not (isinstance(timeout, int | float) and 0 < timeout <= MOST_SECONDS):
            raise SettingsError(f"timeout is more than 0 and at most {MOST_SECONDS:g} s, not {timeout!r}")
        if not isinstance(replicas, int):
            raise SettingsError(f"replicas is a whole number, not {replicas!r}")
        settings = Settings(redis_replicas=replicas)
        if prefix is not None:
            settings = replace(settings, redis_prefix=prefix)
        self._name = hide(url)
        self._replicas = replicas
        self._timeout = timeout
        self._most_events, self._most_bytes = settings.max_batch_events, settings.max_body_bytes
        self._address = parse_address(url)
        self._prefix = settings.redis_prefix
        self._link = self._new_link()
        self._known = Position("", 0)
        self._pid = os.getpid()
        self._locks = {self._pid: threading.Lock()}

    def publish(self, topic: str | Sequence[str], data: Any, *, event: str = DEFAULT_TYPE, keep: str = KEEP_ALL,
                key: str = "", retry: int | None = None, idempotency_key: str | None = None) -> str:
        """Publish one event; its id. `topic`: one, or several. `data`: text, or a JSON value.

        Raises BadRequest for arguments that cannot be meant, which changes nothing, and BrokerUnavailable: its text
        says whether it is known that nothing was published. With an `idempotency_key` it is safe to publish again.
        """
        fields: dict[str, Any] = {"data": data, "event": event, "keep": keep, "key": key, "retry": retry}
        fields |= {"topic": topic} if isinstance(topic, str) else \
            {"topics": list(topic) if isinstance(topic, Iterable) else topic}
        return self._append([draft_of(fields)], idempotency_key)[0]

    def publish_batch(self, events: Iterable[Mapping[str, Any]], *, idempotency_key: str | None = None) -> list[str]:
        """Publish events, all or none, in one stretch of the order; their ids. Each is what the HTTP API takes as a
        JSON object; `topics` may be a tuple too. Raises as `publish`."""
        if not isinstance(events, Iterable):
            raise BadRequest("events is a list of events")
        drafts = []
        for number, fields in enumerate(islice(events, self._most_events + 1), 1):
            try:
                if not isinstance(fields, Mapping):
                    raise BadRequest("it is no mapping of names to values")
                drafts.append(draft_of(fields))
            except BadRequest as error:
                raise BadRequest(f"event {number}: {error.detail}") from None
        return self._append(drafts, idempotency_key) if drafts else []

    def close(self) -> None:
        """Idempotent. A publish that another thread is at ends first, but is broken off after `timeout`."""
        lock = self._lock()
        if lock.acquire(timeout=self._timeout):
            try:
                self._link.close()
            finally:
                lock.release()
        elif self._pid == os.getpid():
            self._link.interrupt()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _append(self, drafts: Sequence[Draft], key: str | None) -> list[str]:
        if key is not None:
            if not isinstance(key, str):
                raise BadRequest("idempotency_key is a string")
            check_name("idempotency_key", key)
        check_batch(drafts, self._most_events, self._most_bytes)
        deadline, lock = time.monotonic() + self._timeout, self._lock()
        if not lock.acquire(timeout=self._timeout):
            raise BrokerUnavailable(f"cannot reach the log {self._name}: other threads are at it: nothing was published")
        try:
            reply = self._talk(drafts, "\n" + key if key is not None else None, deadline)
            positions = positions_of(reply)
            self._known = max(self._known, positions[-1])
        except Refused as error:
            raise BrokerUnavailable(f"cannot write the log {self._name}: {error}") from error
        except OSError as error:
            raise BrokerUnavailable(f"cannot reach the log {self._name}: {error}") from error
        finally:
            lock.release()
        return [str(position) for position in positions]

    def _talk(self, drafts: Sequence[Draft], key: str | None, deadline: float) -> Any:
        reply, *have = self._exchange(drafts, key, deadline)
        if isinstance(reply, Refused) and reply.leave:  # nothing was done, as in Line
            self._link.close()
            reply, *have = self._exchange(drafts, key, deadline)
        if isinstance(reply, Refused):
            if reply.leave:
                self._link.close()
            raise reply
        if have and (isinstance(have[0], Refused) or have[0] < self._replicas):
            raise Refused(f"{have[0]} of {self._replicas} replicas have it: it may be lost with its master")
        return reply

    def _exchange(self, drafts: Sequence[Draft], key: str | None, deadline: float) -> list[Any]:
        """What the script answers, and if they are asked how many replicas have it."""
        self._reach(deadline)
        link = self._link
        commands: list[Arguments] = [link.script("publish", *publish_arguments(link.channels, key, drafts))]
        if self._replicas:
            commands.append(link.await_replicas(self._replicas))
        try:
            return link.exchange(commands)
        except OSError as error:
            raise ConnectionError(f"{error}: whether the events are in it is not known") from error

    def _lock(self) -> threading.Lock:
        """This process's own: a thread that is not in the forked process may hold its parent's for ever."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _new_link(self) -> Link:
        return Link(self._address, self._prefix, self._timeout)

    def _reach(self, deadline: float) -> None:
        """A connection of this process that still stands, else a new one; with time until `deadline`."""
        if self._pid != os.getpid():
            self._pid, self._link = os.getpid(), self._new_link()
        self._link.deadline = deadline
        if not self._link.stands():
            self._link.open(*self._known)
