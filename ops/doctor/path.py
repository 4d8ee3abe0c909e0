"""The path: a stream through the public URL, looked at from the client's side. It serves any server of event streams."""

from __future__ import annotations

import re

import marks
import replies
import silence
import tls
from finding import Report
from layout import walk
from visit import ARRIVE_SECONDS, BROWSER, GATEWAY, PLAIN, Asked, Failure, Visit, detail, own_target
from wire import STREAM, Answer, Head

from ops.bench.terminal import Progress

MOST_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
REFUSALS = (401, 403)


class Unexamined(Exception):
    """Why nothing more could be examined."""


def examine(asked: Asked, progress: Progress) -> Report:
    visit = Visit(asked, progress, own_target(asked.target))
    try:
        _follow(visit)
        _look_at_connection(visit)
        _look_at_config(visit)
        if head := _look_at_answer(visit):
            _listen(visit, head.media_type == STREAM)
    except Unexamined as error:
        visit.report.failed.append(f"the path: {error}")
    except (*Failure, ValueError) as error:  # ValueError: a redirect to what is no address
        visit.report.failed.append(f"the path: {visit.target.origin}: {error or 'no answer in time'}")
    return visit.report


def _follow(visit: Visit) -> None:
    begun = visit.target
    for _ in range(MOST_REDIRECTS):
        location = _leads_to(visit)
        if not location:
            break
        visit.target = visit.target.to(location)
    if visit.target.url == begun.url:
        return
    lost = ", but what is meant for one origin (Authorization, cookies) is not sent to another"
    final = _bare(visit.target.url)
    visit.find("redirect", f"{_bare(begun.url)} leads to {final}", "an EventSource follows, at the price of a request "
               f"for each reconnect{lost if visit.target.origin != begun.origin else ''}; a publish may become a GET",
               at=begun, change=f"give clients {final}")


def _leads_to(visit: Visit) -> str:
    """Where a redirect leads; "" for no redirect. Raises OSError, WireError."""
    try:
        with visit.open(PLAIN) as answer:
            head = answer.wait_head(ARRIVE_SECONDS)
            return head.get("location") if head.status in REDIRECTS else ""
    except TimeoutError:
        return ""
    except OSError as error:
        if not tls.refuses(error):
            raise
        visit.find("tls", tls.reason(error), "every client refuses the connection")
        visit.target = tls.unverified(visit.target)  # there is more to see
        return _leads_to(visit)


def _look_at_connection(visit: Visit) -> None:
    seen = tls.look_at(visit.target)
    visit.report.facts["connection"] = seen.summary
    if seen.days_left is not None and seen.days_left < tls.LEAST_DAYS:
        visit.find("tls", f"the certificate ends in {seen.days_left} days", "then every client refuses the connection",
                   change="renew it, and see why nothing has renewed it yet")
    if seen.old_version:
        visit.find("tls_version", f"the server accepts {seen.old_version}", "a connection may be forced down to a "
                   "version of TLS that is broken (RFC 8996)")
    if seen.alpn != tls.HTTP2:
        visit.find("http_version", f"no HTTP/2: {seen.summary}", "over HTTP/1.1 a browser has six connections per host "
                   "for all its tabs together, and every stream keeps one: the seventh tab hangs")
    elif seen.streams is not None and seen.streams < tls.LEAST_STREAMS:
        visit.find("http2_streams", f"HTTP/2 with {seen.streams} streams per connection", "a browser has one "
                   f"connection for all its tabs: of more than {seen.streams} streams the rest waits")


def _look_at_config(visit: Visit) -> None:
    """What no client can see from outside, but the configuration tells."""
    scope = visit.scope(visit.target)
    if scope is None or scope.kind != "nginx":
        return
    for gap in scope.gaps:
        visit.note(gap)
    if not any(node.name == "proxy_pass" for _, level in scope.levels[:1] for node in walk(level)):
        return
    version = next((node.words[-1] for node in scope.find(lambda node: node.name == "proxy_http_version")), "")
    if version == "1.0" or not (version or scope.gaps):
        visit.find("backend_http", "nginx speaks HTTP/1.0 to the service", "without chunks nobody can tell a stream "
                   "that was ended from one that broke: nginx tells its clients of a clean end either way")


def _look_at_answer(visit: Visit) -> Head | None:
    """The head of the stream; None if none opens. Raises Unexamined for what is the service's own refusal."""
    with visit.open(BROWSER) as answer:
        try:
            head = answer.wait_head(ARRIVE_SECONDS)
        except TimeoutError:
            marks.tell_held_back(visit, answer)
            return None
        if head.status != 200:
            _refused(visit, head, answer)
            return None
    _look_at_head(visit, head)
    return head


def _refused(visit: Visit, head: Head, answer: Answer) -> None:
    try:
        body = answer.wait_end(ARRIVE_SECONDS)
    except Failure:
        body = answer.body
    if head.media_type.endswith("json") or head.status in REFUSALS:
        hint = "; give a --token" if head.status in REFUSALS and not visit.asked.token else ""
        raise Unexamined(f"the service answers {head.status} {detail(body)}{hint}")
    check = "unreachable" if head.status in GATEWAY else "status"
    visit.find(check, f"the answer is {head.status} {head.media_type or 'without a type'}, not a stream, and it is "
               "not the service that says so", "an EventSource takes any answer but 200 as final: it never comes back")


def _look_at_head(visit: Visit, head: Head) -> None:
    kind = head.get("content-type") or "(none)"
    visit.report.facts["answer"] = f"HTTP/{head.version} {head.status}, Content-Type: {kind}"
    if head.media_type != STREAM:
        visit.find("content_type", f"Content-Type: {kind}", "an EventSource takes nothing but text/event-stream: it "
                   "fails, and never comes back")
    if coding := head.get("content-encoding"):
        visit.find("compression", f"Content-Encoding: {coding}", "a compressor holds events back until its block is "
                   "full, or takes some 100 KB of memory for each stream to flush each event")
    if head.version == "1.0" or "chunked" not in head.get("transfer-encoding"):
        visit.find("chunked", f"the stream comes as HTTP/{head.version} without chunks", "no client can tell a stream "
                   "that was ended from one that broke, and some show nothing of it before its end")
    policy = head.get("cache-control").lower()
    if not re.search(r"\bno-(store|cache)\b", policy) or re.search(r"max-age=[1-9]|\bpublic\b", policy):
        visit.find("cache", f"Cache-Control: {policy or '(none)'}", "a cache on the way may keep the stream, or wait "
                   "for its end before it passes it on")


def _listen(visit: Visit, is_stream: bool) -> None:
    """What needs an open stream, and other replies; silence takes longest, so it is listened to meanwhile."""
    listening = silence.start(visit) if is_stream else None
    if not is_stream:
        visit.note("events, resuming and silence: the answer is no event stream")
    for step in (*(marks.examine,) * is_stream, replies.errors, replies.access, replies.cors, replies.headers):
        visit.progress.hint(f"examining {step.__doc__}", listening.part() if listening else 0, 1)
        try:
            step(visit)
        except Failure as error:
            visit.note(f"{step.__doc__}: {error or 'no answer in time'}")
    if listening:
        silence.wait(visit, listening)


def _bare(url: str) -> str:
    """Without the query, which may have a token."""
    return url.partition("?")[0]
