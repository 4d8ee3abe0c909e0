"""The connection over which one process publishes to Redis and reads from it: what is asked at the same time goes out
in one write and comes back in one read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.event import Event as Signal

from pushsvc.brokers.redis_link import Arguments, Link, Refused
from pushsvc.brokers.trouble import Trouble
from pushsvc.errors import BrokerUnavailable
from pushsvc.position import Position

MOST_TOGETHER = 256  # requests of one write
MOST_PAGES = 8  # pages of history of one write, a MiB each: publishes wait for no more than these
WRITER, ASKER = "writer", "asker"  # the parts, as the service's log names them
PUBLISH, HISTORY = "publish", "history"
UNKNOWN = "whether the event is in it is not known"


class _Job:
    """One request. `script`: the script's name, or empty for a command that stands in `arguments` whole."""

    __slots__ = ("script", "arguments", "result")

    def __init__(self, script: str, arguments: Arguments) -> None:
        self.script = script
        self.arguments = arguments
        self.result = AsyncResult()


class Line:
    """`ask` and `head` wait for their answers; one greenlet does all the talking.

    seconds: how long an answer may take. replicas: how many must have a publish before it is answered.
    known: the newest position that this process knows of. name: of the log, for messages.
    publisher: a line of its own for publishes, which goes with this one: the wait for replicas holds up its connection.
    """

    def __init__(self, link: Link, name: str, seconds: float, replicas: int, known: Callable[[], Position],
                 trouble: Trouble, publisher: Line | None = None) -> None:
        self.link = link
        self._name = name
        self._seconds = seconds
        self._replicas = replicas
        self._known = known
        self._trouble = trouble
        self._publisher = publisher
        self._part = WRITER if publisher is None else ASKER
        self._jobs: deque[_Job] = deque()
        self._pages: deque[_Job] = deque()  # of history
        self._talking = 0
        self._left = False
        self._wake = Signal()
        self._head: _Job | None = None
        self._greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        self._greenlet = gevent.spawn(self._work)
        if self._publisher is not None:
            self._publisher.start()

    def __len__(self) -> int:
        """How many requests have no answer yet."""
        others = len(self._publisher) if self._publisher is not None else 0
        return len(self._jobs) + len(self._pages) + self._talking + others

    def ask(self, script: str, *arguments: str | int | bytes, seconds: float = 0) -> Any:
        """What a script answers. Raises BrokerUnavailable. Switches."""
        if script == PUBLISH and self._publisher is not None:
            return self._publisher.ask(script, *arguments, seconds=seconds)
        return self._answer(self._post(_Job(script, arguments)), seconds)

    def command(self, *arguments: str | int | bytes) -> Any:
        """What a command answers. Raises BrokerUnavailable. Switches."""
        return self._answer(self._post(_Job("", arguments)))

    def head(self) -> Position:
        """The newest position; those who ask at the same time share one answer. Switches."""
        if self._head is None:
            self._head = self._post(_Job("", ("HMGET", f"{self.link.prefix}log", "epoch", "seq")))
        epoch, seq = self._answer(self._head)
        if epoch is None:
            self.leave()
            raise self.unavailable("read", "it is gone")
        return Position(epoch.decode(), int(seq))

    def leave(self) -> None:
        """Ask who is master again before the next request. Atomic: no switch."""
        self._left = True
        if self._publisher is not None:
            self._publisher.leave()

    def follow(self, epoch: str) -> None:
        """Leave what is in another epoch. Atomic: no switch."""
        if self.link.epoch != epoch:
            self._left = True
        if self._publisher is not None:
            self._publisher.follow(epoch)

    def close(self) -> None:
        """Finish what was asked, if that goes in time. Switches."""
        if self._greenlet is None:
            return
        with gevent.Timeout(self._seconds, False):
            while len(self):
                gevent.sleep(0.005)
        self._stop()

    def _stop(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()
        self.link.close()
        if self._publisher is not None:
            self._publisher._stop()

    def unavailable(self, verb: str, reason: object) -> BrokerUnavailable:
        return BrokerUnavailable(f"cannot {verb} the log {self._name}: {reason}")

    def _post(self, job: _Job) -> _Job:
        self._queue(job).append(job)
        self._wake.set()
        return job

    def _queue(self, job: _Job) -> deque[_Job]:
        return self._pages if job.script == HISTORY else self._jobs

    def _answer(self, job: _Job, seconds: float = 0) -> Any:
        try:
            return job.result.get(timeout=seconds or self._seconds)
        except gevent.Timeout:
            known = self._take_back(job) or job.script != PUBLISH
            raise self.unavailable("reach", "no answer in time" if known else f"no answer in time: {UNKNOWN}") from None

    def _take_back(self, job: _Job) -> bool:
        """Whether it had not been sent, and never will be. Atomic: no switch."""
        queue = self._queue(job)
        if job is self._head or job not in queue:  # others may wait for the head
            return False
        queue.remove(job)
        return True

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._jobs or self._pages:
                self._serve(self._jobs, MOST_TOGETHER)
                self._serve(self._pages, MOST_PAGES)

    def _serve(self, queue: deque[_Job], most: int) -> None:
        """Answer the first requests of a queue. Switches."""
        jobs = [queue.popleft() for _ in range(min(len(queue), most))]
        if not jobs:
            return
        if self._head in jobs:
            self._head = None
        self._talking = len(jobs)
        try:
            self._talk(jobs)
        except Exception as error:  # the top of a greenlet: every request must be answered
            self._fail(jobs, error)
        self._talking = 0
        self._trouble.tell()

    def _talk(self, jobs: list[_Job]) -> None:
        again = self._exchange(jobs)
        if again:  # nothing was done: the script is not known there, the log is gone, or the master is none any more
            self.link.close()
            again = self._exchange(again)
        for job, refused in again.items():
            job.result.set_exception(self._refusal(job, refused))
            self._trouble.note(self._part, refused)
            self.link.close()

    def _exchange(self, jobs: Iterable[_Job]) -> dict[_Job, Refused]:
        """Ask, and hand out the answers; those for which another connection is to be asked. Switches."""
        self._reach()
        jobs = list(jobs)
        commands = [self.link.script(job.script, *job.arguments) if job.script else job.arguments for job in jobs]
        publishes = any(job.script == PUBLISH for job in jobs)
        if self._replicas and publishes:
            commands.append(self.link.await_replicas(self._replicas))
        try:
            replies = self.link.exchange(commands)
        except OSError as error:
            raise ConnectionError(f"{error}: {UNKNOWN}" if publishes else str(error)) from error
        have = replies.pop() if len(replies) > len(jobs) else self._replicas
        again: dict[_Job, Refused] = {}
        trouble: Exception | None = None
        for job, reply in zip(jobs, replies, strict=True):
            if isinstance(reply, Refused) and reply.leave:
                again[job] = reply
            elif isinstance(reply, Refused):
                trouble = reply
                job.result.set_exception(self._refusal(job, reply))
            elif job.script == PUBLISH and (isinstance(have, Refused) or have < self._replicas):
                job.result.set_exception(self.unavailable(
                    "acknowledge in", f"{have} of {self._replicas} replicas have it: it is in the log, but may be lost "
                    "with its master"))
            else:
                job.result.set(reply)
        self._trouble.note(self._part, trouble)
        return again

    def _refusal(self, job: _Job, reason: object) -> BrokerUnavailable:
        return self.unavailable("write" if job.script == PUBLISH else "read", reason)

    def _reach(self) -> None:
        """A connection that still stands, else a new one. Switches."""
        if self._left or not self.link.stands():
            self._left = False
            self.link.open(*self._known())

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        self._trouble.note(self._part, error)
        for job in jobs:
            if not job.result.ready():
                job.result.set_exception(self._refusal(job, error))
