"""The keeper: retention and checkpoints of the log, in bites so small that a publish hardly waits for one.

One worker of the machine keeps at a time: the one that holds the keeper's lock. It runs in a native thread of its own
with a connection of its own, so nothing here may touch gevent or a logger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pushsvc.brokers.sqlite_log import FileLock, Log, lock_path
from pushsvc.settings import Settings

ROUND_SECONDS = 0.5
BITE = 500  # rows per transaction: about a millisecond
BREATH_SECONDS = 0.001  # between two bites, for the publishers that wait
PASSING_SECONDS = 10.0  # how long events that are in no history stay for readers that are behind
MOST_MARKS = 100_000
CHECKPOINT_BYTES = 4 << 20
WAL_BYTES = 64 << 20  # a WAL larger than this is worth a short stop of all publishers
MARKS_ROUNDS = 120  # counting the marks costs a millisecond: once a minute


class Keeper:
    """`round()` does what is due, if this process is the one that keeps. Raises sqlite3.Error and OSError."""

    def __init__(self, path: Path, settings: Settings, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._rounds = 0
        self._settings = settings
        self._path = path
        self._turn = FileLock(path.with_name(path.name + ".keeper"))
        self._write = FileLock(lock_path(path))
        self._keeps = False
        self._log: Log | None = None
        self._counts: Counter[str] = Counter()
        self._counted = 0
        self._swept = 0

    def round(self, now: float) -> None:
        self._keeps = self._keeps or self._turn.try_take()
        if not self._keeps:
            return
        log = self._current_log(now)
        if log is None:
            return
        self._rounds += 1
        self._trim_topics(log)
        self._trim_old(log, now - self._settings.history_seconds)
        self._trim_large(log)
        self._sweep(log, now)
        self._checkpoint(log)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._turn.close()
        self._write.close()

    def _current_log(self, now: float) -> Log | None:
        if self._log is not None and not self._log.is_current():
            self._log.close()
            self._log, self._counted, self._swept = None, 0, 0
            self._counts.clear()
        if self._log is None and self._path.exists():
            self._log = Log(self._path, now)
        return self._log

    def _trim_topics(self, log: Log) -> None:
        upto = log.last()
        most = self._settings.history_events
        for topic, added in log.topics_since(self._counted, upto):
            self._counts[topic] += added
            if self._counts[topic] <= most:
                continue
            self._counts[topic] = log.count(topic)
            while (surplus := self._counts[topic] - most) > 0:
                gone = self._bite(log, partial(log.trim_topic, topic, min(surplus, BITE)))
                self._counts[topic] -= gone or surplus
        self._counted = upto

    def _trim_old(self, log: Log, before_at: float) -> None:
        while old := [seq for seq, at in log.oldest(BITE) if at < before_at]:
            self._bite(log, partial(log.trim_before, old[-1]))

    def _trim_large(self, log: Log) -> None:
        while log.used_bytes() > self._settings.history_bytes and (oldest := log.oldest(BITE)):
            self._bite(log, partial(log.trim_before, oldest[-1][0]))

    def _sweep(self, log: Log, now: float) -> None:
        self._swept = self._bite(log, partial(log.sweep_passing, self._swept, now - PASSING_SECONDS, BITE))
        self._bite(log, partial(log.forget_answers, now - self._settings.idempotency_seconds, BITE))
        if self._rounds % MARKS_ROUNDS == 0:
            self._bite(log, partial(log.forget_marks, MOST_MARKS, MOST_MARKS // 10))

    def _checkpoint(self, log: Log) -> None:
        size = log.wal_bytes()
        if size > CHECKPOINT_BYTES:
            log.checkpoint("PASSIVE")
        if size > WAL_BYTES:
            with self._write:
                log.checkpoint("TRUNCATE")

    def _bite(self, log: Log, work: Callable[[], int]) -> int:
        with self._write, log.transaction():
            done = work()
        self._sleep(BREATH_SECONDS)
        return done
