"""The log as one SQLite file: its schema and every statement that touches it. No threads, no gevent, no clock.

    events     one row per event; `seq` is its place in the order. `topics` joined by LF, which no topic contains.
    history    (topic, seq) for each event that a topic's history holds. `key` only for `keep: latest`: the unique
               index over it makes a new row take the place of the older one. Events of one topic are entered by
               a trigger.
    marks      per topic, the newest sequence that retention took. `forgotten` in meta stands for the topics
               without a row.
    answers    Idempotency-Key -> the stretch of sequences that it was answered with.
    meta       epoch, forgotten, what a probe writes; boot, safe: see `Log._begin_life`.

Rows of many events go in by one statement: each step of a statement gives up Python's global lock, and taking it
back from a busy loop can cost milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pushsvc.brokers.base import Page, page_of
from pushsvc.event import KEEP_ALL, KEEP_LATEST, KEEP_NONE, Draft, Event
from pushsvc.position import new_epoch

SCHEMA_VERSION = 1
PROBE_BYTES = 1 << 16  # a nearly full disk has room for a byte, but not for an event
_KEEPS = (KEEP_ALL, KEEP_LATEST, KEEP_NONE)
_KEEP_NUMBER = {keep: number for number, keep in enumerate(_KEEPS)}
_STRIDES = (256, 16, 1)  # rows per INSERT: few sizes, so that their statements stay prepared
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, topics TEXT NOT NULL, event TEXT NOT NULL,
    data TEXT NOT NULL, keep INTEGER NOT NULL, key TEXT NOT NULL, retry INTEGER);
CREATE INDEX IF NOT EXISTS events_passing ON events(seq) WHERE keep <> 0;
CREATE TABLE IF NOT EXISTS history(
    topic TEXT NOT NULL, seq INTEGER NOT NULL, key TEXT, PRIMARY KEY(topic, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS history_seq ON history(seq);
CREATE UNIQUE INDEX IF NOT EXISTS history_latest ON history(topic, key) WHERE key IS NOT NULL;
CREATE TRIGGER IF NOT EXISTS events_history AFTER INSERT ON events WHEN new.keep <> 2 AND instr(new.topics, char(10)) = 0
BEGIN
    INSERT OR REPLACE INTO history VALUES(new.topics, new.seq, CASE new.keep WHEN 1 THEN new.key END);
END;
CREATE TABLE IF NOT EXISTS marks(topic TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers(
    key TEXT PRIMARY KEY, first INTEGER NOT NULL, count INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_at ON answers(at);
"""
_OLDEST = """
WITH RECURSIVE walk(seq, size) AS (
    SELECT min(seq), 0 FROM events
    UNION ALL
    SELECT (SELECT min(seq) FROM events WHERE seq > walk.seq), size + 100 + length(CAST(data AS BLOB))
    FROM walk JOIN events USING(seq) WHERE size < ?1 LIMIT ?2)
SELECT max(seq) FROM walk WHERE size < ?1"""
_COLUMNS = "seq, at, topics, event, data, keep, key, retry"


class Stretch(tuple[int, int]):
    """(first, count): the sequences first, first + 1, … of one append."""


class FileLock:
    """An advisory lock on a file: waiters sleep in the kernel and are woken at once, where SQLite's own would poll.

    A file that was deleted is locked anew under its path, so that all who lock meet in one file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> None:
        while not self._take(fcntl.LOCK_EX):
            pass

    def __exit__(self, *exc: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def try_take(self) -> bool:
        """Take it if nobody else has it; True too for who has it already."""
        try:
            while not self._take(fcntl.LOCK_EX | fcntl.LOCK_NB):
                pass
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self, how: int) -> bool:
        """Lock the file; False if it is not the one under the path any more."""
        if self._fd < 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, how)
        found = os.fstat(self._fd)
        if _identity(self._path) == (found.st_dev, found.st_ino):
            return True
        self.close()
        return False


def lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


class Log:
    """One connection to the log. Raises sqlite3.Error and OSError as they come; the broker translates them.

    now: seconds since 1970, the epoch of a new log. busy_seconds: how long a statement waits for another process.
    locked: whether the caller holds the file lock.
    `identity` tells whether the file under `path` is still the one that was opened.
    """

    def __init__(self, path: Path, now: float, *, full_sync: bool = False, busy_seconds: float = 5.0,
                 locked: bool = False) -> None:
        self.path = path
        self._busy_seconds = busy_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        if locked:
            self.connection = self._open(now, full_sync, busy_seconds)
        else:
            with contextlib.closing(FileLock(lock_path(path))) as lock, lock:
                self.connection = self._open(now, full_sync, busy_seconds)
        self.identity = _identity(path)
        self.epoch = str(self.value("epoch"))

    def _open(self, now: float, full_sync: bool, busy_seconds: float) -> sqlite3.Connection:
        if not self.path.exists():  # what a deleted log left behind is not this log's
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{suffix}")
        connection = sqlite3.connect(self.path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'FULL' if full_sync else 'NORMAL'}")
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute("PRAGMA cache_size=-8192")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"its schema is version {version}, this program's {SCHEMA_VERSION}")
            if version == 0:
                os.chmod(self.path, 0o600)  # what people say to each other is not for every account of the machine
                first = f"INSERT INTO meta VALUES('epoch', '{new_epoch(int(now * 1000))}'), ('forgotten', 0);"
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} {first} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            self._begin_life(connection, boot_id(), int(now * 1000), full_sync)
        except BaseException:
            connection.close()
            raise
        return connection

    def _begin_life(self, connection: sqlite3.Connection, boot: str, milliseconds: int, full_sync: bool) -> None:
        """Begin a new epoch if the machine went down with events that were acknowledged but not on its disk.

        Without full sync the newest events may be lost with the power, and their sequences would be given again: a
        client that has seen them would miss others without being told. `boot` says in which life of the machine the
        log was last open, `safe` that nothing can be lost: it was closed in order, or every commit was synced.
        """
        found = dict(connection.execute("SELECT name, value FROM meta WHERE name IN ('boot', 'safe')"))
        doubtful = found.get("boot", boot) != boot and not found.get("safe")
        if not doubtful and found == {"boot": boot, "safe": int(full_sync)}:
            return
        connection.execute("PRAGMA synchronous=FULL")  # on the disk before anything is acknowledged
        connection.execute("BEGIN IMMEDIATE")
        if doubtful:
            connection.execute("UPDATE meta SET value=? WHERE name='epoch'", (new_epoch(milliseconds),))
        connection.execute("INSERT OR REPLACE INTO meta VALUES('boot', ?), ('safe', ?)", (boot, int(full_sync)))
        connection.execute("COMMIT")
        connection.execute(f"PRAGMA synchronous={'FULL' if full_sync else 'NORMAL'}")

    def end_life(self) -> None:
        """Put all on the disk and note that nothing can be lost: when no process appends any more."""
        self.truncate_wal(self._busy_seconds)
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("UPDATE meta SET value=1 WHERE name='safe'")

    def is_current(self) -> bool:
        """Whether the file was neither deleted nor replaced since."""
        return _identity(self.path) == self.identity

    def close(self) -> None:
        self.connection.close()

    def value(self, name: str) -> Any:
        return self.connection.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One write transaction: all or nothing."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            raise

    # -- writing: inside a transaction

    def answered(self, key: str, since: float) -> Stretch | None:
        """What `key` was answered with after `since`."""
        row = self.connection.execute("SELECT first, count FROM answers WHERE key=? AND at>?", (key, since)).fetchone()
        return Stretch(row) if row else None

    def remember(self, key: str, stretch: Stretch, now: float) -> None:
        self.connection.execute("INSERT OR REPLACE INTO answers VALUES(?, ?, ?, ?)", (key, *stretch, now))

    def last(self) -> int:
        """The newest sequence ever given, 0 for none: also after its event is gone."""
        row = self.connection.execute("SELECT seq FROM sqlite_sequence WHERE name='events'").fetchone()
        return int(row[0]) if row else 0

    def add(self, drafts: Sequence[Draft], now: float) -> Stretch:
        """Append `drafts`; the stretch of their sequences."""
        first = self.last() + 1
        self._insert("INSERT INTO events VALUES", [_row(seq, draft, now) for seq, draft in enumerate(drafts, first)])
        history: list[tuple[object, ...]] = []
        for seq, draft in enumerate(drafts, first):
            if draft.keep != KEEP_NONE and len(draft.topics) > 1:  # the trigger has seen to the others
                key = draft.key if draft.keep == KEEP_LATEST else None
                history += [(topic, seq, key) for topic in draft.topics]
        self._insert("INSERT OR REPLACE INTO history VALUES", history)
        return Stretch((first, len(drafts)))

    def add_one(self, draft: Draft, now: float) -> Stretch:
        """Append one draft of one topic, outside of a transaction: a single statement, which is one by itself. Each
        further statement would give up the interpreter's lock and wait for it again."""
        cursor = self.connection.execute("INSERT INTO events VALUES(?,?,?,?,?,?,?,?)", _row(None, draft, now))
        return Stretch((cursor.lastrowid or 0, 1))

    def _insert(self, verb: str, rows: list[tuple[object, ...]]) -> None:
        start = 0
        for stride in _STRIDES:
            while len(rows) - start >= stride:
                values = [value for row in rows[start : start + stride] for value in row]
                mark = "(" + ",".join("?" * len(rows[start])) + ")"
                self.connection.execute(f"{verb} {','.join([mark] * stride)}", values)
                start += stride

    def probe(self, now: float) -> None:
        """Write as much as a publish may take: raises if the log cannot be written."""
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES('probed', ?), ('probe', zeroblob(?))",
                                (now, PROBE_BYTES))

    # -- reading

    def since(self, seq: int, limit: int) -> tuple[list[Event], bool]:
        """The first `limit` events after `seq`, of any topic, those that are in no history too; whether more follow."""
        rows = self.connection.execute(f"SELECT {_COLUMNS} FROM events WHERE seq>? ORDER BY seq LIMIT ?", (seq, limit))
        with contextlib.closing(rows):
            page, full = page_of(map(_event, rows))
        return page, full or len(page) == limit

    def history(self, topics: Sequence[str], after: int, limit: int) -> Page:
        """As the broker contract says: page and marks are read at one moment."""
        self.connection.execute("BEGIN")
        try:
            seqs = self._history_seqs(topics, after, limit + 1)
            which = ",".join(map(str, seqs[:limit]))
            rows = self.connection.execute(f"SELECT {_COLUMNS} FROM events WHERE seq IN ({which}) ORDER BY seq")
            with contextlib.closing(rows):
                events, _ = page_of(map(_event, rows))
            missing = self._missing(topics, after)
        finally:
            self.connection.execute("COMMIT")
        return Page(events, len(events) < len(seqs), missing)

    def _history_seqs(self, topics: Sequence[str], after: int, limit: int) -> list[int]:
        found: set[int] = set()
        for topic in topics:
            rows = self.connection.execute(
                "SELECT seq FROM history WHERE topic=? AND seq>? ORDER BY seq LIMIT ?", (topic, after, limit))
            found.update(seq for seq, in rows)
        return sorted(found)[:limit]

    def _missing(self, topics: Sequence[str], after: int) -> int:
        forgotten = int(self.value("forgotten"))
        newest = 0
        for topic in topics:
            row = self.connection.execute("SELECT seq FROM marks WHERE topic=?", (topic,)).fetchone()
            newest = max(newest, row[0] if row else forgotten)
        return newest if newest > after else 0

    def lost_between(self, after: int, before: int) -> bool:
        """Whether retention has taken events of the stretch between two sequences, both exclusive."""
        marked = self.connection.execute("SELECT 1 FROM marks WHERE seq>? LIMIT 1", (after,)).fetchone()
        return before > after + 1 and (marked is not None or int(self.value("forgotten")) > after)

    # -- retention: inside a transaction, in bites, each of a few statements that give one row or none

    def topics_since(self, seq: int, upto: int) -> dict[str, int]:
        """How many events each topic's history got in the stretch after `seq` up to `upto`."""
        rows = self.connection.execute(
            "SELECT json_group_object(topic, added) FROM (SELECT topic, count(*) AS added FROM history "
            "WHERE seq>? AND seq<=? GROUP BY topic)", (seq, upto))
        added: dict[str, int] = json.loads(rows.fetchone()[0])
        return added

    def count(self, topic: str) -> int:
        return int(self.connection.execute("SELECT count(*) FROM history WHERE topic=?", (topic,)).fetchone()[0])

    def trim_topic(self, topic: str, surplus: int) -> int:
        """Take the `surplus` oldest events out of one topic's history; how many went."""
        row = self.connection.execute(
            "SELECT seq FROM history WHERE topic=? ORDER BY seq LIMIT 1 OFFSET ?", (topic, surplus - 1)).fetchone()
        if row is None:
            return 0
        stretch = (topic, row[0])
        self.connection.execute("INSERT INTO marks VALUES(?, ?) ON CONFLICT DO UPDATE SET seq=max(seq, excluded.seq)",
                                stretch)
        self.connection.execute(
            "DELETE FROM events WHERE seq IN (SELECT seq FROM history WHERE topic=? AND seq<=?) "
            "AND (SELECT count(*) FROM history h WHERE h.seq=events.seq)=1", stretch)
        return self.connection.execute("DELETE FROM history WHERE topic=? AND seq<=?", stretch).rowcount

    def trim_before(self, seq: int) -> int:
        """Take every event up to `seq` out of every history; how many went."""
        self.connection.execute(
            "INSERT INTO marks SELECT topic, max(seq) FROM history WHERE seq<=? GROUP BY topic "
            "ON CONFLICT DO UPDATE SET seq=max(marks.seq, excluded.seq)", (seq,))
        self.connection.execute("DELETE FROM history WHERE seq<=?", (seq,))
        return self.connection.execute("DELETE FROM events WHERE seq<=?", (seq,)).rowcount

    def aged(self, before_at: float, limit: int) -> int:
        """The newest of the `limit` oldest events that is older than `before_at`; 0 for none."""
        return self._seq("SELECT max(seq) FROM (SELECT seq, at FROM events ORDER BY seq LIMIT ?) WHERE at<?",
                         (limit, before_at))

    def oldest(self, size: int, limit: int) -> int:
        """The oldest events, `limit` at most, that have together `size` bytes or little more: the newest of them;
        0 for none."""
        return self._seq(_OLDEST, (size, limit))

    def sweep_passing(self, after: int, before_at: float, limit: int) -> tuple[int, int]:
        """Delete events that are in no history (keep: none, superseded latest) from the `limit` rows of such kinds
        after `after`, if older than `before_at`. How many went; the last sequence looked at, 0 at the end."""
        looked_at, upto = self.connection.execute(
            "SELECT count(*), max(seq) FROM (SELECT seq FROM events WHERE keep<>0 AND seq>? AND at<? "
            "ORDER BY seq LIMIT ?)", (after, before_at, limit)).fetchone()
        gone = self.connection.execute(
            "DELETE FROM events WHERE keep<>0 AND seq>? AND seq<=? "
            "AND NOT EXISTS (SELECT 1 FROM history h WHERE h.seq=events.seq)", (after, upto)).rowcount
        return gone, upto if looked_at == limit else 0

    def forget_answers(self, before_at: float, limit: int) -> int:
        return self.connection.execute(
            "DELETE FROM answers WHERE key IN (SELECT key FROM answers WHERE at<? LIMIT ?)", (before_at, limit)).rowcount

    def forget_marks(self, most: int, limit: int) -> int:
        """Keep at most about `most` marks: the oldest go into one mark for all topics without one; how many went."""
        count = self.connection.execute("SELECT count(*) FROM marks").fetchone()[0]
        if count <= most:
            return 0
        row = self.connection.execute("SELECT seq FROM marks ORDER BY seq LIMIT 1 OFFSET ?", (limit,)).fetchone()
        self.connection.execute("UPDATE meta SET value=max(value, ?) WHERE name='forgotten'", row)
        return self.connection.execute("DELETE FROM marks WHERE seq<=?", row).rowcount

    def _seq(self, query: str, values: tuple[object, ...]) -> int:
        return self.connection.execute(query, values).fetchone()[0] or 0

    def used_bytes(self) -> int:
        """What the events take in the file: its pages but for the free ones."""
        pages, free, size = (self.connection.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("page_count", "freelist_count", "page_size"))
        return int((pages - free) * size)

    def checkpoint(self) -> None:
        """Move the WAL's pages into the file, as far as no reader needs them where they are; waits for nobody."""
        self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def truncate_wal(self, seconds: float) -> None:
        """Move all of the WAL's pages and empty it, unless a reader holds it for longer than `seconds`."""
        self.connection.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
        try:
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self.connection.execute(f"PRAGMA busy_timeout={int(self._busy_seconds * 1000)}")

    def wal_bytes(self) -> int:
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0


def boot_id() -> str:
    """Which life of this machine it is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _row(seq: int | None, draft: Draft, now: float) -> tuple[object, ...]:
    """A row of `events`; without `seq` it gets the next."""
    return (seq, now, "\n".join(draft.topics), draft.event, draft.data, _KEEP_NUMBER[draft.keep], draft.key, draft.retry)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _event(row: tuple[Any, ...]) -> Event:
    seq, at, topics, event, data, keep, key, retry = row
    return Event(seq, at, tuple(topics.split("\n")), event, data, _KEEPS[keep], key, retry)
