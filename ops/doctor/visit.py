"""What all checks of a path share: how to ask, how to publish, how to tell."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import included
import layout_haproxy
from advice import Cure, cure, general
from finding import Finding, Report
from layout import LayoutError, Scope
from wire import Answer, Headers, Target, WireError, exchange

from ops.bench.terminal import Progress

ARRIVE_SECONDS = 3.0  # what has not come by then is held back
ANSWER_SECONDS = 15.0  # for requests that are answered as a whole
FILLERS, FILLER_BYTES = 6, 60_000  # more than proxies hold back
BROWSER = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, deflate, br, zstd", "Cache-Control": "no-cache"}
PLAIN = BROWSER | {"Accept-Encoding": "identity"}
OWN = "doctor-"  # what the doctor's own topics begin with
GATEWAY = (502, 503, 504)  # "a gateway or proxy" has no good answer of the service (RFC 9110, section 15.6)
FORM = "application/x-www-form-urlencoded"
Failure = (OSError, WireError)  # a TimeoutError is an OSError


@dataclass(frozen=True, slots=True)
class Asked:
    """target: the stream. publish: where to publish, None for beside the stream. direct: the service without the proxy.
    token, origin, config: "" for none. seconds: how long to listen to silence."""

    target: Target
    publish: Target | None = None
    direct: Target | None = None
    token: str = ""
    origin: str = ""
    config: str = ""
    seconds: float = 40.0


@dataclass(slots=True)
class Visit:
    """One examination. target: moves on with redirects. progress: how far it is."""

    asked: Asked
    progress: Progress
    target: Target
    report: Report = field(default_factory=Report)

    def open(self, fields: Headers, target: Target | None = None) -> Answer:
        """Ask for the stream, or for another target, as its user would. Raises OSError."""
        target = target or self.target
        return Answer(target, {**fields, **_bearer(self.asked.token if self._may_know(target) else "")})

    @property
    def publishes_at(self) -> Target:
        return self.asked.publish or self.target.at(_beside(self.target.path.partition("?")[0], "publish"))

    def publish(self, data: str, token: str, **more: str) -> str:
        """Why it was refused; "" if it was accepted."""
        target, query = self.publishes_at, self.target.path.partition("?")[2]
        form = urlencode({"topic": dict(parse_qsl(query)).get("topic", ""), "data": data, **more}).encode()
        fields = {"Content-Type": FORM} | _bearer(token if self._may_know(target) else "")
        try:
            head, body = exchange(target, fields, "POST", form, ANSWER_SECONDS)
        except Failure as error:
            return str(error) or "no answer in time"
        return "" if 200 <= head.status < 300 else f"{head.status} {detail(body)}".strip()

    def fill(self) -> str:
        """Publish more than a proxy holds back: how much that was, as text; "" if nothing was accepted."""
        refusals = [self.publish("x" * FILLER_BYTES, self.asked.token, keep="none") for _ in range(FILLERS)]
        accepted = refusals.count("")
        return f"{accepted * FILLER_BYTES // 1000} kB" if accepted else ""

    def scope(self, target: Target) -> Scope | None:
        """What a stream at `target` meets in the proxy; None if no configuration was given. Raises ValueError."""
        return read_config(self.asked.config, target) if self.asked.config else None

    def find(
        self, check: str, seen: str, breaks: str, *, change: str = "", also: str = "", at: Target | None = None
    ) -> None:
        """Tell a finding. change: what cures it if no line of the proxy's configuration does. also: what cures it too.
        at: where it was seen."""
        scope = self.scope(at or self.target)
        cured = cure(check, scope) if scope else Cure(general(check))
        advice = cured.change if cured.line or not change else change
        file, change = (cured.file or self.asked.config) if cured.line else "", "; ".join(filter(None, (advice, also)))
        self.report.findings.append(Finding(check, seen, breaks, change, file, cured.line))

    def _may_know(self, target: Target) -> bool:
        """Whether the token is meant for it: no redirect takes it to another host."""
        named = (self.asked.target, self.asked.publish, self.asked.direct)
        return target.host in [each.host for each in named if each is not None]

    def note(self, text: str) -> None:
        self.report.notes.append(text)


def own_target(target: Target) -> Target:
    """A stream on a topic of our own, where the address names none: nobody else is to see what is published."""
    path, _, query = target.path.partition("?")
    if "topic" in dict(parse_qsl(query, keep_blank_values=True)):
        return target
    named = ("/events" if path == "/" else path) + (f"?{query}" if query else "")
    return target.at(named).with_field(f"topic={OWN}{secrets.token_hex(6)}")


def read_config(file: str, target: Target) -> Scope:
    """Raises ValueError."""
    try:
        text = Path(file).read_text()
        return layout_haproxy.read(text, target) if layout_haproxy.is_it(text) else included.read(file, target)
    except (OSError, UnicodeDecodeError, LayoutError) as error:
        raise ValueError(f"{file}: {error}") from error


def detail(body: bytes) -> str:
    """What a problem (RFC 9457) says, or the first words of what else it is."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return re.sub(r"<[^>]*>|\s+", " ", body[:300].decode(errors="replace")).strip()[:100]


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _beside(path: str, name: str) -> str:
    """The path with another last segment."""
    return path.rstrip("/").rpartition("/")[0] + "/" + name
