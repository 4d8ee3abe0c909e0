"""Replies that are not the stream itself: refusals, publishes without leave, what a browser asks before, lost headers."""

from __future__ import annotations

from collections.abc import Iterator

from visit import ANSWER_SECONDS, ARRIVE_SECONDS, PLAIN, Visit
from wire import Head, Target, exchange

TAKES = ("last-event-id", "authorization")  # the headers that a fetch-based client asks leave for
ACCEL = "x-accel-buffering"


def errors(visit: Visit) -> None:
    """refusals"""
    with visit.open(PLAIN, visit.target.with_field("doctor=1")) as answer:
        head = answer.wait_head(ARRIVE_SECONDS)
    if head.status >= 400 and "html" in head.media_type:
        visit.find("errors", f"a refused request is answered {head.status} {head.media_type}, not by the service",
                   "clients do not learn why they are refused")


def access(visit: Visit) -> None:
    """publishing without a token"""
    if not visit.publish("doctor", ""):
        visit.find("access", "a publish without a token was accepted",
                   "anybody who reaches this address may publish: to the service, all that comes from a proxy on its "
                   "machine comes from loopback", change="PUSHSVC_JWT_KEY in the service", at=visit.publishes_at)


def cors(visit: Visit) -> None:
    """pages of another origin"""
    origin = visit.asked.origin
    if not origin:
        return
    wanted = {"Origin": origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": ",".join(TAKES)}
    preflight, _ = exchange(visit.target, wanted, "OPTIONS", seconds=ANSWER_SECONDS)
    stream = _head_of(visit, visit.target, {"Origin": origin})
    kept = [*_shares(stream, origin, "the stream")]
    problems = [*kept, *_shares(preflight, origin, "the preflight"), *_allows(preflight)]
    who = f"pages of {origin}" if kept else (f"those pages of {origin} only that send headers themselves; an "
                                             "EventSource asks for no leave before")
    if problems:
        visit.find("cors", "; ".join(problems), f"a browser keeps the stream from {who}",
                   also=f"in the service PUSHSVC_CORS_ORIGINS={origin}")


def headers(visit: Visit) -> None:
    """lost headers"""
    if visit.asked.direct is None:
        return
    direct = _head_of(visit, visit.asked.direct.at(visit.target.path), {})
    public = _head_of(visit, visit.target, {})
    heeded = "nginx" in public.get("server")  # it takes this header for itself, and heeds it
    if direct.get(ACCEL) and not public.get(ACCEL) and not heeded:
        visit.find("accel", f"the service says X-Accel-Buffering: {direct.get(ACCEL)}, and it does not come through",
                   "an nginx or a CDN before this proxy does not learn that it must not buffer")


def _head_of(visit: Visit, target: Target, fields: dict[str, str]) -> Head:
    with visit.open(PLAIN | fields, target) as answer:
        return answer.wait_head(ARRIVE_SECONDS)


def _shares(head: Head, origin: str, what: str) -> Iterator[str]:
    """What a browser has against the answer (WHATWG Fetch, CORS check)."""
    values = head.all("access-control-allow-origin")
    to_all = values == ["*"] and head.get("access-control-allow-credentials") != "true"
    if values != [origin] and not to_all:
        yield f"{what} ({head.status}) allows {' and '.join(values) or 'no origin'}, not once and exactly {origin}"


def _allows(preflight: Head) -> Iterator[str]:
    if not 200 <= preflight.status < 300:
        yield f"the preflight is answered {preflight.status}"
        return
    allowed = preflight.get("access-control-allow-headers").lower()
    missing = [name for name in TAKES if name not in allowed and (allowed != "*" or name == "authorization")]
    if missing:
        yield f"the preflight does not allow {', '.join(missing)}"
