"""The keeper: retention and checkpoints of the log, in bites so small that a publish hardly waits for one.

One worker of the machine keeps at a time: the one that holds the keeper's lock. It runs in a native thread of its own
with a connection of its own, so nothing here may touch gevent or a logger.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pushsvc.brokers.base import MOST_MARKS
from pushsvc.brokers.sqlite_log import FileLock, Log, lock_path
from pushsvc.settings import Settings

ROUND_SECONDS = 0.5
BITE = 500  # rows per transaction: about a millisecond
BREATH_SECONDS = 0.001  # between two bites, for the publishers that wait
PASSING_SECONDS = 10.0  # how long events that are in no history stay for readers that are behind
SWEEP_BITES = 20  # per round; more while they bring something
MOST_COUNTS = 100_000  # topics whose events are counted along; the others are counted when they get one
CHECKPOINT_BYTES = 4 << 20
WAL_BYTES = 64 << 20  # a WAL larger than this is worth a short stop of all publishers
TRUNCATE_SECONDS = 0.1  # that stop's length, if somebody reads for long
MARKS_ROUNDS = 120  # counting the marks costs a millisecond: once a minute

T = TypeVar("T")


class Keeper:
    """`round()` does what is due, if this process is the one that keeps. Raises sqlite3.Error and OSError."""

    def __init__(self, path: Path, settings: Settings, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._rounds = 0
        self._settings = settings
        self._path = path
        self._turn = FileLock(path.with_name(path.name + ".keeper"))
        self._write = FileLock(lock_path(path))
        self._log: Log | None = None
        self._counts: dict[str, int] = {}
        self._counted = 0
        self._swept = 0

    def round(self, now: float) -> None:
        if not self._path.exists() or not self._turn.try_take():
            return
        log = self._current_log(now)
        self._rounds += 1
        self._trim_topics(log)
        self._trim_old(log, now - self._settings.history_seconds)
        self._trim_large(log)
        self._sweep(log, now - PASSING_SECONDS)
        self._forget(log, now)
        self._checkpoint(log)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._turn.close()
        self._write.close()

    def _current_log(self, now: float) -> Log:
        if self._log is not None and not self._log.is_current():
            self._log.close()
            self._log, self._counted, self._swept = None, 0, 0
            self._counts.clear()
        if self._log is None:
            self._log = Log(self._path, now, full_sync=self._settings.sync == "full")
        return self._log

    def _trim_topics(self, log: Log) -> None:
        if len(self._counts) > MOST_COUNTS:
            self._counts.clear()
        upto, most = log.last(), self._settings.history_events
        for topic, added in log.topics_since(self._counted, upto).items():
            count = self._counts[topic] = self._count(log, topic, added)
            if count > most:
                self._counts[topic] = self._trim_topic(log, topic, most)
        self._counted = upto

    def _count(self, log: Log, topic: str, added: int) -> int:
        """How many events a topic's history holds or a little more, `added` of them new."""
        if topic in self._counts:
            return self._counts[topic] + added
        return log.count(topic) if self._counted else added

    def _trim_topic(self, log: Log, topic: str, most: int) -> int:
        while (surplus := log.count(topic) - most) > 0:
            self._bite(log, partial(log.trim_topic, topic, min(surplus, BITE)))
        return most + surplus

    def _trim_old(self, log: Log, before_at: float) -> None:
        while seq := log.aged(before_at, BITE):
            self._bite(log, partial(log.trim_before, seq))

    def _trim_large(self, log: Log) -> None:
        while (surplus := log.used_bytes() - self._settings.history_bytes) > 0 and (seq := log.oldest(surplus, BITE)):
            self._bite(log, partial(log.trim_before, seq))

    def _sweep(self, log: Log, before_at: float) -> None:
        bites = 0
        while bites < SWEEP_BITES:
            gone, self._swept = self._bite(log, partial(log.sweep_passing, self._swept, before_at, BITE))
            if not self._swept:
                return
            bites += gone < BITE // 2

    def _forget(self, log: Log, now: float) -> None:
        before_at = now - self._settings.idempotency_seconds
        while self._bite(log, partial(log.forget_answers, before_at, BITE)) == BITE:
            pass
        if self._rounds % MARKS_ROUNDS == 0:
            self._bite(log, partial(log.forget_marks, MOST_MARKS, MOST_MARKS // 10))

    def _checkpoint(self, log: Log) -> None:
        size = log.wal_bytes()
        if size > CHECKPOINT_BYTES:
            log.checkpoint()
        if size > WAL_BYTES:
            with self._write:
                log.truncate_wal(TRUNCATE_SECONDS)

    def _bite(self, log: Log, work: Callable[[], T]) -> T:
        with self._write, log.transaction():
            done = work()
        self._sleep(BREATH_SECONDS)
        return done
