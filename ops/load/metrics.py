"""What a server says of itself: its figures as Prometheus text at /metrics, where it has them, and its version."""

from __future__ import annotations

import re
from collections import Counter
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from swarm import authority

SECONDS = 5.0
FRESH_SECONDS = 1.5  # after so long /metrics has what is there: a worker counts once a second
UNKNOWN = "unknown"


def scraped(host: str, port: int, name: str, token: str = "") -> dict[str, float]:
    """The values of one metric by the value of its last label, summed; empty if the server does not tell it."""
    return values(metrics_said(host, port, token) or "", name)


def metrics_said(host: str, port: int, token: str = "") -> str | None:
    """The text of /metrics, empty if the server has none; None if it does not answer."""
    answer = _asked(host, port, token)
    return answer[0] if answer else None


def values(text: str, name: str) -> dict[str, float]:
    """The values of one metric in this text, as `scraped` has them."""
    found = Counter[str]()
    for label, value in re.findall(rf'^{name}(?:{{[^}}]*?"([^"]*)"}})? (\S+)$', text, re.MULTILINE):
        found[label] += float(value)
    return dict(found)


def version_said(host: str, port: int, name: str, token: str = "") -> str:
    """The version of a server of this name: by a metric of its own (`NAME_..._info`), else by its `Server` header if that
    has one (which may be a proxy's); else `unknown`."""
    text, header = _asked(host, port, token) or ("", "")
    if found := re.search(rf'^{name}\w*_info{{(?:.*,)?version="([^"]+)"', text, re.MULTILINE):
        return f"{name} {found[1]}"
    return f"{header} (its Server header)" if re.search(r"/v?\d", header) else UNKNOWN


def _asked(host: str, port: int, token: str) -> tuple[str, str] | None:
    """The text of /metrics and the `Server` header, empty for what there is not; None if there is no answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(f"http://{authority(host, port)}/metrics", headers=headers)
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            is_text = answer.headers.get_content_type() == "text/plain"  # a stream has no end
            return answer.read().decode() if is_text else "", answer.headers.get("Server", "")
    except HTTPError as refusal:
        with refusal:
            return "", refusal.headers.get("Server", "")
    except (OSError, ValueError, HTTPException):
        return None
