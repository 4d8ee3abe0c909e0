"""Marks: events that are published to see whether and when they arrive, and how a stream resumes after them."""

from __future__ import annotations

import time
from urllib.parse import quote

from visit import ARRIVE_SECONDS, PLAIN, Failure, Visit
from wire import Answer, Headers, Target

LATE_SECONDS = 0.05  # an event comes about as soon as the answer; a kernel that waits for more to send adds 0.2 s
LEAST, MOST = 2, 5  # marks: two to resume between; more to see whether all are late


def examine(visit: Visit) -> None:
    """events and resuming"""
    with visit.open(PLAIN) as answer:
        answer.wait_head(ARRIVE_SECONDS)
        late = _publish_marks(visit, answer)
        ids = [event.id for event in answer.reader.events]
    if not late:
        return
    visit.report.facts["an event takes"] = f"{max(0.0, min(late)) * 1000:.0f} ms more than the answer to its publish"
    if min(late) > LATE_SECONDS:
        visit.find("delay", f"of {len(late)} events the quickest came {min(late) * 1000:.0f} ms after the answer to its "
                   "publish", "the kernel waits for more to send: every event is late")
    if len(ids) >= LEAST:
        _resume(visit, ids)


def tell_held_back(visit: Visit, answer: Answer) -> None:
    """For a stream of which nothing has come."""
    seen = f"no byte of the answer in {ARRIVE_SECONDS:g} s"
    filled = visit.fill()
    try:
        answer.wait_head(ARRIVE_SECONDS)
        seen += f"; it came when {filled} more had been published" if filled else "; then it came"
    except TimeoutError:
        seen += f", nor when {filled} more had been published" if filled else ""
    visit.find("buffering", seen, "events do not arrive until a buffer is full; a browser's `open` does not fire")
    visit.note("the rest of the path: while it holds events back there is nothing to measure")


def _publish_marks(visit: Visit, answer: Answer) -> list[float]:
    """How long after the answer to its publish each mark came, in seconds; empty if they do not come."""
    late: list[float] = []
    while len(late) < LEAST or (min(late) > LATE_SECONDS and len(late) < MOST):
        if refused := visit.publish(f"doctor {len(late)}", visit.asked.token):
            visit.note(f"whether events arrive at once and resume: publishing was refused ({refused})")
            return []
        answered = time.monotonic()
        if not _arrives(answer, len(late) + 1):
            _tell_missing(visit, answer, len(late) + 1)
            return []
        late.append(answer.last_at - answered)
    return late


def _arrives(answer: Answer, count: int) -> bool:
    deadline = time.monotonic() + ARRIVE_SECONDS
    while len(answer.reader.events) < count and not answer.ended:
        try:
            answer.wait_more(deadline - time.monotonic())
        except TimeoutError:
            return False
    return len(answer.reader.events) >= count


def _tell_missing(visit: Visit, answer: Answer, count: int) -> None:
    if answer.ended:
        visit.note("whether events arrive: the stream ended meanwhile")
        return
    filled = visit.fill()
    came = f"; it did when {filled} more had been published" if filled and _arrives(answer, count) else ""
    visit.find("buffering", f"an event that was published did not arrive in {ARRIVE_SECONDS:g} s{came}",
               "events do not arrive until a buffer is full")


def _resume(visit: Visit, ids: list[str]) -> None:
    """Both ways to name the last id should bring the next event."""
    if not all(ids):
        visit.note("resuming: the events have no id")
    elif _resumes(visit, visit.target, {"Last-Event-ID": ids[0]}, ids[1]):
        return
    elif _resumes(visit, visit.target.with_field(f"last_event_id={quote(ids[0])}"), {}, ids[1]):
        visit.find("last_event_id", "a stream resumes by the query, but not by the header Last-Event-ID",
                   "browsers name the last id in that header when they reconnect: without it they miss what came "
                   "meanwhile, and are not told")
    else:
        visit.note("whether Last-Event-ID passes: the stream resumes neither by the header nor by the query")


def _resumes(visit: Visit, target: Target, fields: Headers, id: str) -> bool:
    try:
        with visit.open(PLAIN | dict(fields), target) as answer:
            answer.wait_head(ARRIVE_SECONDS)
            return _arrives(answer, 1) and answer.reader.events[0].id == id
    except Failure:
        return False
