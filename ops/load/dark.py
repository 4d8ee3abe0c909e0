"""The dark test: real pages that have opted in open extra streams to a canary, and throw away what comes on them.

The service does nothing for it: this command publishes an order to a topic (type `pushsvc-dark`, keep none), which
`dark.js` in the pages obeys. The share of the pages grows level by level. The command measures the canary by a stream
and events of its own, and tells all to stop when the objective breaks, at the end, and when it is broken off. An order
is good for some seconds from its arrival, whatever a page's clock says, and not kept: pages that hear no more of it stop
by themselves, and those that come later hear nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fleet import Fleet
from publisher import Publisher, PublishError, mark, post
from swarm import Target, authority
from terminal import Progress

from load.metrics import FRESH_SECONDS, scraped

ORDER = "pushsvc-dark"
PROBE_SECONDS = 0.1
LOOK_SECONDS = 0.5
LEAST_EVENTS = 5  # before a p99 is judged
ARRIVE_SECONDS = 2.0
GOOD_SECONDS = 15  # how long an order holds unless it is given again; dark.js allows no more
AGAIN_SECONDS = 5.0
TRIES = 5
JSON = "application/json"
Found = dict[str, Any]


class OrderError(PublishError):
    """The service of the pages takes no order; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Site:
    """A pushsvc. token: sent as a bearer token."""

    host: str
    port: int
    token: str = ""

    def publish(self, fields: Found) -> None:
        """Publish one event. Raises OSError, PublishError."""
        publisher = Publisher(self.host, self.port)
        try:
            publisher.exchange(self.request(fields))
        finally:
            publisher.close()

    def request(self, fields: Found) -> bytes:
        authorization = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        return post("/publish", json.dumps(fields).encode(), JSON, authorization, authority(self.host, self.port))


@dataclass(frozen=True, slots=True)
class Test:
    """topic: of the orders. url: what the pages open on the canary. streams: how many each. percents: the levels. hold:
    seconds of each. p99_ms: the objective. most: open streams on the canary at which it stops; 0: no bound."""

    topic: str
    url: str
    streams: int
    percents: Sequence[float]
    hold: float
    p99_ms: float
    most: int = 0


class Dark:
    """One test. `run` leaves no order behind, however it ends."""

    def __init__(self, test: Test, service: Site, canary: Site, progress: Progress) -> None:
        self._test = test
        self._service = service
        self._canary = canary
        self._progress = progress
        self._probe = f"dark-probe-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self._ordered = 0.0
        self._before = 0

    def run(self) -> Found:
        """All levels, until the objective breaks. Raises OrderError if the service takes no order."""
        levels: list[Found] = []
        try:
            with Fleet(1) as fleet:
                fleet.open(1, Target(self._canary.host, self._canary.port, f"/events?topic={self._probe}{self._query()}"))
                time.sleep(FRESH_SECONDS)
                self._before = self._streams()
                for percent in self._test.percents:
                    levels.append(self._level(fleet, percent))
                    self._progress.say(f"{percent:g} %: {levels[-1]['streams']} streams, p99 {levels[-1]['p99_ms']} ms")
                    if levels[-1]["broken"]:
                        break
        finally:
            self.stop()
        return told(levels, self._before)

    def _query(self) -> str:
        return f"&access_token={self._canary.token}" if self._canary.token else ""

    # -- orders

    def order(self, percent: float) -> None:
        """Ask this share of the pages for their streams."""
        self._ordered = time.monotonic()
        self._publish({"url": self._test.url, "streams": self._test.streams, "percent": percent,
                       "seconds": GOOD_SECONDS})

    def stop(self) -> None:
        """Tell all pages to end their streams. Tried several times: a service that is down hears it later or never,
        and then the order runs out."""
        for attempt in range(TRIES):
            try:
                self._publish({"url": "", "streams": 0, "percent": 0, "seconds": 0})
                return
            except OrderError as error:
                self._progress.say(f"the stop was not taken ({attempt + 1} of {TRIES}): {error}")
                time.sleep(0.5)
        self._progress.say(f"the pages stop by themselves within {GOOD_SECONDS} s")

    def _publish(self, data: Found) -> None:
        order = {"topic": self._test.topic, "event": ORDER, "keep": "none", "data": data}
        try:
            self._service.publish(order)
        except (OSError, PublishError) as error:
            where = authority(self._service.host, self._service.port)
            raise OrderError(f"the service on {where} takes no order: {error}") from error

    # -- one level

    def _level(self, fleet: Fleet, percent: float) -> Found:
        """Hold one share of the pages, and look twice a second whether the objective still holds."""
        fleet.reset()
        self.order(percent)
        sent, why, until = 0, "", time.monotonic() + self._test.hold
        streams = peak = 0
        try:
            publisher = Publisher(self._canary.host, self._canary.port)
            while not why and time.monotonic() < until:
                if time.monotonic() - self._ordered > AGAIN_SECONDS:
                    self.order(percent)
                sent = self._send(publisher, sent, time.monotonic() + LOOK_SECONDS)
                streams = self._streams()
                peak = max(peak, streams)
                why = self._judged(fleet, sent, streams)
                self._show(percent, f"{streams} streams", until - time.monotonic())
            publisher.close()
        except OrderError as error:
            why = str(error)[:100]
        except (OSError, PublishError) as error:
            why = f"the canary does not take a publish: {str(error)[:100]}"
        seen = fleet.wait(sent, ARRIVE_SECONDS)
        if not why and seen.events < sent:
            why = f"{sent - seen.events} of {sent} events did not arrive on the command's own stream"
        return {"percent": percent, "streams": streams, "peak": peak, "joined": max(0, peak - self._before),
                "events": seen.events, **seen.latencies(), "broken": why}

    def _streams(self) -> int:
        """Open on the canary; 0 if it does not tell: the command has one itself."""
        return int(sum(scraped(self._canary.host, self._canary.port, "pushsvc_streams", self._canary.token).values()))

    def _show(self, percent: float, text: str, left: float) -> None:
        """left: seconds of this level."""
        hold, levels = self._test.hold, self._test.percents
        gone, total = hold * (levels.index(percent) + 1) - max(0.0, left), hold * len(levels)
        self._progress.hint(f"{gone:.0f} of {total:.0f} s  {percent:g} % of the pages, {text}", gone, total)

    def _send(self, publisher: Publisher, sent: int, until: float) -> int:
        """Events for the command's own stream until then, each due when the one before was, and a pause."""
        at = time.monotonic()
        while at < until:
            sent += 1
            publisher.exchange(self._canary.request({"topic": self._probe, "keep": "none", "data": mark(sent, 0, at)}))
            at += PROBE_SECONDS
            time.sleep(max(0.0, at - time.monotonic()))
        return sent

    def _judged(self, fleet: Fleet, sent: int, streams: int) -> str:
        """What of the objective is broken; "" for nothing."""
        test, seen = self._test, fleet.stats()
        p99 = seen.percentile_ms(0.99)
        if seen.ended or not seen.open:
            return "the command's own stream on the canary has ended"
        if test.most and streams > test.most:
            return f"the canary has {streams} streams, more than {test.most}"
        if p99 is not None and seen.events >= LEAST_EVENTS and p99 > test.p99_ms:
            return f"p99 is {p99:g} ms, above {test.p99_ms:g} ms"
        if seen.events < sent / 2 - LEAST_EVENTS:
            return f"only {seen.events} of {sent} events have arrived"
        return ""


def told(levels: list[Found], before: int) -> Found:
    """The result of these levels, the last of which may be broken. before: streams that the canary had without pages.
    measured: it broke, or there were pages."""
    why, held = str(levels[-1]["broken"]), [each["percent"] for each in levels if not each["broken"] and each["joined"]]
    text = f"holds at {max(held, default=0.0):g} % of the pages"
    if why:
        text += f", breaks at {levels[-1]['percent']:g} %: {why}"
    elif not before:
        text = "not measured: the canary does not tell its streams in /metrics, so nobody knows whether pages have joined"
    elif not held:
        text = ("not measured: no page has joined. Do the pages load dark.js, with this canary, and does the canary name "
                "their origin in PUSHSVC_CORS_ORIGINS?")
    return {"kind": "dark", "levels": levels, "limits": [why] if why else [], "broken": bool(why),
            "measured": bool(why or (before and held)), "held": max(held, default=0.0), "verdict_text": text}
