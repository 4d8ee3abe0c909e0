"""A server's own figures, where it has them as Prometheus text at /metrics."""

from __future__ import annotations

import re
from collections import Counter
from urllib.request import Request, urlopen

SECONDS = 5.0


def scraped(host: str, port: int, name: str, token: str = "") -> dict[str, float]:
    """The values of one metric by the value of its last label, summed; empty if the server does not tell it."""
    request = Request(f"http://{host}:{port}/metrics", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            text = answer.read().decode()
    except (OSError, ValueError):
        return {}
    found = Counter[str]()
    for label, value in re.findall(rf'^{name}(?:{{[^}}]*?"([^"]*)"}})? (\S+)$', text, re.MULTILINE):
        found[label] += float(value)
    return dict(found)
