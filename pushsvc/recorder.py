"""The recorder: the shape of the traffic of one worker, in one file. No payload, no name, no address ever.

Off unless a directory is set. What identifies somebody or something is hashed with a key that nobody has: it is made of
the random bytes that the kernel gives each program at its start, which the workers of one master have in common, and
which end with it. So the same user has the same hash in all files of one run, and nobody can find out who it was.

A file is JSON lines, each an array that begins with its kind. `at` is in seconds since 1970.
    ["shape", 1, at]                                                    the first line
    ["open", at, stream, client, [topic, ...], resumed]                 resumed: 0 or 1
    ["close", at, stream, reason]
    ["event", at, seq, [topic, ...], bytes, type, keep, key, fan-out]   type, key: "" for the default, for none
    ["end", at, reason]                                                 the last line: closed or full
`ops/load record` joins the files of all workers.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import gevent
from gevent.event import Event as Signal

from pushsvc.event import DEFAULT_TYPE, Event, size_of
from pushsvc.settings import Settings

FORMAT = 1
FLUSH_SECONDS = 1.0
MOST_PENDING_BYTES = 16 << 20  # waits for a disk that does not answer; more is the end of the recording
END_BYTES = 64  # room for the last line
HASH_BYTES = 6  # a million names and no two with the same hash, most likely
AT_RANDOM = 25  # linux/auxvec.h
CLOSED, FULL = "closed", "full"
logger = logging.getLogger(__name__)


class Peopled(Protocol):
    """What the recorder needs of a group: how many streams it has."""

    @property
    def members(self) -> Collection[object]: ...


class Client(Protocol):
    """What the recorder needs of a subscription."""

    user: str | None
    address: str
    reason: str

    @property
    def group(self) -> Any: ...


class Recorder:
    """Notes openings, ends and events, and writes them about once a second, off the loop's thread.

    path: the file, which must not exist. most: its size in bytes at which the recording ends. wall: seconds since 1970.
    An error ends the recording, is logged once, and goes no further.
    """

    def __init__(self, path: Path, most: int, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._left = most - END_BYTES
        self._wall = wall
        self._key = process_key()
        self._numbers: dict[object, int] = {}  # of the streams that are open
        self._count = 0
        self._asking: object = None
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._over = False
        self._stopping = Signal()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._note(["shape", FORMAT, self._now()])
        self._greenlet = gevent.spawn(self._run)

    @property
    def running(self) -> bool:
        return not self._over

    # -- what is noted

    def resuming(self, subscription: object) -> None:
        """If this one is attached next, it has come with an id. Atomic: no switch."""
        self._asking = subscription

    def opened(self, subscription: Client) -> None:
        """A stream was attached. Atomic: no switch."""
        if self._over:
            return
        resumed, self._asking = self._asking is subscription, None
        self._count += 1
        self._numbers[subscription] = self._count
        topics = [self._hash(topic) for topic in subscription.group.topics]
        client = self._hash(subscription.user or subscription.address)
        self._note(["open", self._now(), self._count, client, topics, int(resumed)])

    def closed(self, subscription: Client) -> None:
        """A stream was detached. Atomic: no switch."""
        number = self._numbers.pop(subscription, 0)
        if number:
            self._note(["close", self._now(), number, subscription.reason])

    def delivered(self, events: Sequence[Event], topics: Mapping[str, Iterable[Peopled]]) -> None:
        """Events came from the broker. topics: the groups of each. Atomic: no switch."""
        if self._over:
            return
        for event in events:
            names = [self._hash(topic) for topic in event.topics]
            kind = "" if event.event == DEFAULT_TYPE else self._hash(event.event)
            key = self._hash(event.key) if event.key else ""
            self._note(["event", round(event.at, 3), event.seq, names, size_of(event.data), kind, event.keep, key,
                        _fan_out(event.topics, topics)])

    def _note(self, row: list[object]) -> None:
        if self._over:
            return
        line = json.dumps(row, separators=(",", ":")) + "\n"
        self._pending.append(line)
        self._pending_bytes += len(line)
        if self._pending_bytes > MOST_PENDING_BYTES:
            self._fail("the disk is too slow")

    def _hash(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), digest_size=HASH_BYTES, key=self._key).hexdigest()

    def _now(self) -> float:
        return round(self._wall(), 3)

    # -- the file: only the greenlet writes to it and closes it

    def close(self) -> None:
        """Write what is left and end the file. Idempotent. Switches."""
        self._stopping.set()
        self._greenlet.join()

    def _run(self) -> None:
        while not (self._over or self._stopping.wait(FLUSH_SECONDS)):
            self._flush()
        if not self._over:
            self._note(["end", self._now(), CLOSED])
            self._flush(END_BYTES)
        self._over = True
        self._numbers.clear()
        os.close(self._file)

    def _flush(self, end_bytes: int = 0) -> None:
        """Write what was noted, off the loop's thread. end_bytes: of it, what has its place at the end. Switches."""
        data = "".join(self._pending).encode()
        self._pending, self._pending_bytes = [], 0
        if len(data) > self._left + end_bytes:
            data = data[: data.rfind(b"\n", 0, self._left) + 1]
            data += json.dumps(["end", self._now(), FULL]).encode() + b"\n"
            self._over = True
            logger.warning("recording ended", extra={"path": str(self._path), "reason": FULL})
        self._left -= len(data)
        try:
            gevent.get_hub().threadpool.apply(_write, (self._file, data))
        except OSError as error:
            self._fail(error.strerror or str(error))

    def _fail(self, reason: str) -> None:
        """No more is noted. Atomic: no switch."""
        if not self._over:
            logger.error("recording failed", extra={"path": str(self._path), "reason": reason})
        self._over = True
        self._pending, self._pending_bytes = [], 0


def open_recorder(settings: Settings) -> Recorder | None:
    """The recorder that the settings ask for; None for none, also when its file cannot be made (which is logged)."""
    if not settings.record_dir:
        return None
    path = Path(settings.record_dir) / f"{time.time_ns() // 1_000_000}-{os.getpid()}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Recorder(path, settings.record_bytes)
    except OSError as error:
        logger.error("recording failed", extra={"path": str(path), "reason": error.strerror})
        return None


def process_key() -> bytes:
    """32 bytes that this process shares with those that it was forked from, and with nobody else."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return hashlib.blake2b(ctypes.string_at(getauxval(AT_RANDOM), 16), digest_size=32, person=b"pushsvc record").digest()


def _fan_out(names: Sequence[str], topics: Mapping[str, Iterable[Peopled]]) -> int:
    """How many streams of this worker the event is for, each once."""
    if len(names) == 1:
        return sum(len(group.members) for group in topics.get(names[0], ()))
    groups = {id(group): group for name in names for group in topics.get(name, ())}
    return sum(len(group.members) for group in groups.values())


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
