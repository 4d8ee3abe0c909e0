"""Silence: a stream that nobody publishes to. Does something cut it, and what keeps it?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import parse_qsl, urlencode

from visit import ARRIVE_SECONDS, GATEWAY, OWN, PLAIN, Failure, Visit
from wire import Answer, Target

AT_ONCE = 0.05  # bytes that come closer together came together
SURVIVED = 0.9  # of a silence that a stream has survived: what cuts it sooner is not silence


@dataclass(frozen=True, slots=True)
class Heard:
    """Times in seconds. lasted: from the head to the end. silent: the last silence. beat: the longest silence that was
    broken by a heartbeat, 0 for none. cut: whether it ended, without the service's own word."""

    lasted: float
    silent: float
    beat: float
    cut: bool


@dataclass(frozen=True, slots=True)
class Listening:
    """What is heard meanwhile. begun: when, by the monotonic clock. seconds: how long it takes at most."""

    heard: Future[Heard]
    begun: float
    seconds: float

    def left(self) -> float:
        return max(0.0, self.begun + self.seconds - time.monotonic())

    def part(self) -> float:
        """Of the time, what is over."""
        return 1 - self.left() / self.seconds


def start(visit: Visit) -> Listening:
    """Begin to listen, in a thread that does not hold up the end of the program."""
    heard: Future[Heard] = Future()

    def run() -> None:
        try:
            heard.set_result(listen(visit))
        except Failure as error:
            heard.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return Listening(heard, time.monotonic(), visit.asked.seconds)


def listen(visit: Visit) -> Heard:
    """Raises OSError, WireError."""
    deadline = time.monotonic() + visit.asked.seconds
    with visit.open(PLAIN, _quiet(visit.target)) as answer:
        answer.wait_head(ARRIVE_SECONDS)
        arrivals = _arrivals(answer, deadline)
    end = time.monotonic()
    beats = [later - earlier for earlier, later in pairwise(arrivals) if later - earlier > AT_ONCE]
    return Heard(end - arrivals[0], end - arrivals[-1], max(beats, default=0.0), answer.ended and not _said_why(answer))


def wait(visit: Visit, listening: Listening) -> None:
    """Until the listening ends; then tell what was heard."""
    visit.progress.show(f"listening to silence for {visit.asked.seconds:g} s", listening.part(), 1)
    while not listening.heard.done():
        visit.progress.hint(f"listening to silence, {listening.left():.0f} s more", listening.part(), 1)
        time.sleep(0.1)
    visit.progress.erase()
    try:
        _tell(visit, listening.heard.result())
    except Failure as error:
        visit.note(f"silence: {error or 'no answer in time'}")


def _quiet(target: Target) -> Target:
    """Another topic of our own, where the topic is our own."""
    path, _, query = target.path.partition("?")
    pairs = [(name, f"{value}-silence" if name == "topic" and value.startswith(OWN) else value)
             for name, value in parse_qsl(query, keep_blank_values=True)]
    return target.at(f"{path}?{urlencode(pairs)}" if query else path)


def _arrivals(answer: Answer, deadline: float) -> list[float]:
    """When bytes came, the first of them with the head, until the end or the deadline."""
    arrivals = [answer.last_at]
    try:
        while not answer.ended:
            if answer.wait_more(deadline - time.monotonic()):
                arrivals.append(answer.last_at)
    except TimeoutError:
        pass
    return arrivals


def _said_why(answer: Answer) -> bool:
    """Whether it was the service that ended the stream: in order, and with a reason as its last comment."""
    return answer.clean and bool(answer.reader.comments) and answer.reader.comments[-1] not in ("", "open")


def _answers(visit: Visit) -> bool:
    """Whether there is still a service that opens such a stream."""
    try:
        with visit.open(PLAIN, _quiet(visit.target)) as answer:
            return answer.wait_head(ARRIVE_SECONDS).status not in GATEWAY
    except Failure:
        return False


def _tell(visit: Visit, heard: Heard) -> None:
    beat = f"a heartbeat every {heard.beat:.1f} s" if heard.beat else f"no heartbeat in {heard.silent:.1f} s"
    visit.report.facts["silence"] = beat
    if not heard.cut:
        if not heard.beat:
            visit.note("what becomes of a longer silence: no heartbeat came; listen for longer with --seconds")
        return
    if not _answers(visit):
        visit.note(f"what silence does: the stream ended after {heard.lasted:.1f} s, and nothing opens another since")
        return
    if heard.silent < heard.beat * SURVIVED:
        visit.find("lifetime", f"the stream was cut after {heard.lasted:.1f} s, and not for its silence: it had "
                   f"survived {heard.beat:.1f} s of it", "every client reconnects that often, all its life")
        return
    known = f"heartbeats come every {heard.beat:.1f} s" if heard.beat else "no heartbeat had come by then"
    visit.find("idle", f"the stream was cut after {heard.silent:.1f} s of silence; {known}",
               "every quiet stream is cut and reconnects, again and again",
               also="or heartbeats that come sooner: PUSHSVC_HEARTBEAT_SECONDS")
