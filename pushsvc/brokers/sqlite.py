"""`sqlite:` the embedded broker: one WAL file is the log, shared by all workers of one machine.

Two native threads and one greenlet. The writer thread appends in groups, so that neither a commit nor a colliding worker
stops the loop; the keeper thread trims; the doorbell wakes the reader greenlet, which takes the rows after its last
sequence and hands them to the hub. The loop hears of a finished group by one async watcher.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from _queue import Empty, SimpleQueue  # the native queue: gevent patches the one in `queue`
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gevent
from gevent import monkey
from gevent.event import AsyncResult
from gevent.event import Event as Signal

from pushsvc.brokers.base import CLOSED, Broker, Deliver, Page, Reset
from pushsvc.brokers.doorbell import Doorbell
from pushsvc.brokers.sqlite_keeper import ROUND_SECONDS, Keeper
from pushsvc.brokers.sqlite_log import FileLock, Log, Stretch, lock_path
from pushsvc.brokers.trouble import Trouble
from pushsvc.errors import BrokerUnavailable
from pushsvc.event import Draft
from pushsvc.position import Position
from pushsvc.settings import Settings

GROUP_EVENTS = 2000  # most events of one commit
READ_EVENTS = 1000  # most events handed over without a pause
PAUSE_SECONDS = 0.0001  # between two full reads, so that the streams are served
LOOK_SECONDS = 0.1  # how long a reader may not notice that the file was replaced; the writer looks every time
GATHER_SECONDS = 0.001  # least time between two reads: what is published faster is read together
DOORBELLS = ".doorbells"  # the folder beside the log
DEFAULT_NAME = "pushsvc.db"
_start_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")
_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
WRITER, KEEPER, READER = "writer", "keeper", "reader"  # the parts, as the service's log names them
_Failure = (sqlite3.Error, OSError)


class _Append:
    """One call of `append` on its way through the writer. `result` is set on the loop's side only."""

    __slots__ = ("drafts", "key", "positions", "error", "result")

    def __init__(self, drafts: Sequence[Draft], key: str | None) -> None:
        self.drafts = drafts
        self.key = key
        self.positions: list[Position] = []
        self.error: Exception | None = None
        self.result = AsyncResult()

    def is_plain(self) -> bool:
        """Whether it is no more than one event of one topic."""
        return self.key is None and len(self.drafts) == 1 and len(self.drafts[0].topics) == 1


class SqliteBroker(Broker):
    """The log at `place` (a path, also as `//` and a path; a folder or nothing: the default name in it)."""

    def __init__(self, place: str, settings: Settings) -> None:
        self.path = _path(place)
        self._settings = settings
        self._full_sync = settings.sync == "full"
        self._deliver: Deliver = lambda events: None
        self._reset: Reset = lambda position, since=None, upto=0: None
        self._queue: SimpleQueue[_Append | None] = SimpleQueue()
        self._done: deque[_Append] = deque()
        self._wake = Signal()
        self._log: Log | None = None
        self._last = self._head = Position("", 0)
        self._head_turn = 0.0  # the turn of the loop in which it was read: nobody has heard of anything since
        self._look_at = 0.0
        self._doorbell: Doorbell | None = None
        self._ringing: Any = None
        self._reader: gevent.Greenlet | None = None
        self._closed = False
        self._stopped: deque[str] = deque()
        self._keeper_queue: SimpleQueue[None] = SimpleQueue()
        self._trouble = Trouble(time.monotonic, (*_Failure, BrokerUnavailable))

    # -- the loop's side

    def start(self, deliver: Deliver, reset: Reset) -> None:
        self._deliver, self._reset = deliver, reset
        self._loop = gevent.get_hub().loop
        self._finished = self._loop.async_()
        self._finished.start(self._on_finished)
        _start_thread(self._write, ())
        _start_thread(self._keep, ())
        self._look_after_doorbell()
        with contextlib.suppress(BrokerUnavailable):
            self._open()
        self._reader = gevent.spawn(self._read)

    def append(self, drafts: Sequence[Draft], key: str | None = None) -> list[Position]:
        if self._closed:
            raise BrokerUnavailable(CLOSED)
        job = _Append(drafts, key)
        self._queue.put(job)
        try:
            positions: list[Position] = job.result.get(timeout=self._settings.publish_timeout_seconds)
        except gevent.Timeout:
            raise BrokerUnavailable("the log did not answer in time: whether the event is in it is not known") from None
        return positions

    def head(self) -> Position:
        log = self._open()
        turn = self._loop.now()
        if self._head_turn != turn:
            try:
                self._head = Position(log.epoch, log.last())
            except _Failure as error:
                raise self._unavailable("read", error) from error
            self._head_turn = turn
        return self._head

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        try:
            return self._open().history(topics, after, limit)
        except _Failure as error:
            raise self._unavailable("read", error) from error

    def check(self) -> None:
        self.append([])
        self.head()
        if error := self._trouble.of(READER):
            raise self._unavailable("deliver from", error) from error

    def depths(self) -> dict[str, int]:
        return {"append": self._queue.qsize()}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._reader is None:
            return
        self._queue.put(None)
        self._keeper_queue.put(None)
        self._reader.kill()
        with gevent.Timeout(self._settings.publish_timeout_seconds, False):
            while len(self._stopped) < 2:
                gevent.sleep(0.005)
        self._finished.close()
        self._on_finished()
        self._close_log()
        self._take_down_doorbell()

    def _open(self) -> Log:
        """The loop's connection to the log; a new one if the file was replaced. Atomic: no switch."""
        if self._closed:
            raise BrokerUnavailable(CLOSED)
        now = time.monotonic()
        if self._log is not None and now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            if not self._log.is_current():
                self._close_log()
        if self._log is None:
            try:
                self._log = Log(self.path, time.time(), full_sync=self._full_sync, busy_seconds=0.05)
                head = Position(self._log.epoch, self._log.last())
            except _Failure as error:
                self._close_log()
                raise self._unavailable("open", error) from error
            if head.epoch != self._last.epoch or head.seq < self._last.seq:
                self._last = head
                self._head_turn = 0.0
                self._reset(head)
        return self._log

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _look_after_doorbell(self) -> None:
        """Hang the doorbell where the others find it: at the start, and when somebody has taken it away. Without one
        their events come a poll interval late. Atomic: no switch."""
        if self._doorbell is not None and self._doorbell.hangs():
            return
        self._take_down_doorbell()
        with contextlib.suppress(OSError):
            self._doorbell = Doorbell(self.path.with_name(self.path.name + DOORBELLS))
            self._ringing = self._loop.io(self._doorbell.fileno(), 1)
            self._ringing.start(self._on_ring)

    def _take_down_doorbell(self) -> None:
        doorbell, self._doorbell = self._doorbell, None
        if doorbell is not None:
            self._ringing.close()
            doorbell.close()

    def _on_ring(self) -> None:
        if self._doorbell is not None:
            self._doorbell.answer()
        self._wake.set()

    def _on_finished(self) -> None:
        while self._done:
            job = self._done.popleft()
            if job.error is not None:
                job.result.set_exception(self._unavailable("write", job.error))
            else:
                job.result.set(job.positions)
        self._wake.set()

    def _read(self) -> None:
        """The reader: on a ring, or after the poll interval, hand over what is new. Switches."""
        read_at = 0.0
        while True:
            if not self._wake.wait(self._settings.poll_seconds):
                self._look_after_doorbell()
            if (early := read_at + GATHER_SECONDS - time.monotonic()) > 0:
                gevent.sleep(early)
            self._wake.clear()
            try:
                while self._hand_over():
                    gevent.sleep(PAUSE_SECONDS)
                read_at = time.monotonic()
                self._trouble.note(READER, None)
            except Exception as error:  # the top of a greenlet; what was missed meanwhile is read later
                self._trouble.note(READER, error)
                gevent.sleep(PAUSE_SECONDS)
            self._trouble.tell()

    def _hand_over(self) -> bool:
        """One stretch of events to the hub; whether there may be more. Atomic: no switch."""
        log = self._open()
        events, more = log.since(self._last.seq, READ_EVENTS)
        if not events:
            return False
        first, last = events[0].seq, events[-1].seq
        if first != self._last.seq + 1 and log.lost_between(self._last.seq, first):
            self._reset(Position(log.epoch, first - 1))
        self._last = Position(log.epoch, last)
        self._deliver(events)
        return more

    def _unavailable(self, verb: str, error: Exception) -> BrokerUnavailable:
        return BrokerUnavailable(f"cannot {verb} the log {self.path}: {error}")

    # -- the writer thread: no gevent, no logging below this line

    def _write(self) -> None:
        log: Log | None = None
        lock = FileLock(lock_path(self.path))
        while (jobs := self._next_jobs())[-1] is not None:
            try:
                with lock:
                    if log is None or not log.is_current():
                        log = self._reopen(log)
                    self._commit(log, jobs)
                self._trouble.note(WRITER, None)
            except Exception as error:  # the top of a thread: every job must be answered
                for job in jobs:
                    job.error = error
                self._trouble.note(WRITER, error)
                if log is not None:
                    log.close()
                    log = None
            self._finish(jobs)
            self._ring()
        if log is not None:
            log.close()
        lock.close()
        self._stopped.append(WRITER)

    def _next_jobs(self) -> list[Any]:
        """Wait for an append, and take those that wait behind it. The last is None when it is time to stop."""
        jobs: list[_Append | None] = [self._queue.get()]
        count = 0
        with contextlib.suppress(Empty):
            while jobs[-1] is not None and count < GROUP_EVENTS:
                count += len(jobs[-1].drafts)
                jobs.append(self._queue.get_nowait())
        if jobs[-1] is None and len(jobs) > 1:
            self._queue.put(jobs.pop())
        return jobs

    def _reopen(self, log: Log | None) -> Log:
        if log is not None:
            log.close()
        return Log(self.path, time.time(), full_sync=self._full_sync, locked=True)

    def _commit(self, log: Log, jobs: list[_Append]) -> None:
        now = time.time()
        if len(jobs) == 1 and jobs[0].is_plain():
            jobs[0].positions = _positions(log.epoch, log.add_one(jobs[0].drafts[0], now))
            return
        with log.transaction():
            fresh: list[_Append] = []
            seen: dict[str, _Append] = {}
            for job in jobs:
                if job.key is not None and job.key in seen:
                    continue
                stretch = log.answered(job.key, now - self._settings.idempotency_seconds) if job.key else None
                if stretch is not None:
                    job.positions = _positions(log.epoch, stretch)
                    continue
                fresh.append(job)
                if job.key is not None:
                    seen[job.key] = job
            self._add(log, fresh, now)
            for job in jobs:
                if job.key in seen and job.key is not None:
                    job.positions = seen[job.key].positions
            if not any(job.drafts for job in fresh):
                log.probe(now)

    def _add(self, log: Log, jobs: list[_Append], now: float) -> None:
        first, _ = log.add([draft for job in jobs for draft in job.drafts], now)
        for job in jobs:
            stretch = Stretch((first, len(job.drafts)))
            job.positions = _positions(log.epoch, stretch)
            if job.key is not None:
                log.remember(job.key, stretch, now)
            first += len(job.drafts)

    def _finish(self, jobs: list[_Append]) -> None:
        self._done.extend(jobs)
        self._finished.send()

    def _ring(self) -> None:
        doorbell = self._doorbell
        if doorbell is not None:
            doorbell.ring()

    # -- the keeper thread

    def _keep(self) -> None:
        keeper: Keeper | None = None
        while True:
            with contextlib.suppress(Empty):
                self._keeper_queue.get(timeout=ROUND_SECONDS)
                break
            try:
                keeper = keeper or Keeper(self.path, self._settings, _sleep)
                keeper.round(time.time())
                self._trouble.note(KEEPER, None)
            except Exception as error:  # the top of a thread: it says so, and tries again next round
                self._trouble.note(KEEPER, error)
                if keeper is not None:
                    keeper.close()
                    keeper = None
        if keeper is not None:
            keeper.close()
        self._stopped.append(KEEPER)


def end_life(place: str, settings: Settings) -> None:
    """After the last worker's end: note in the log that all of it is on the disk. Does nothing if somebody else still
    has its doorbell there, or has died without taking it away. Raises sqlite3.Error and OSError."""
    path = _path(place)
    if path.exists() and not any(path.with_name(path.name + DOORBELLS).iterdir()):
        with contextlib.closing(Log(path, time.time(), full_sync=settings.sync == "full")) as log:
            log.end_life()


def _path(place: str) -> Path:
    path = Path(place.removeprefix("//") or f"var/{DEFAULT_NAME}")
    return path / DEFAULT_NAME if place.endswith("/") or path.is_dir() else path.absolute()


def _positions(epoch: str, stretch: Stretch) -> list[Position]:
    first, count = stretch
    return [Position(epoch, seq) for seq in range(first, first + count)]
