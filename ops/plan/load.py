"""The load that is planned for. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ops.plan.errors import PlanError
from pushsvc.settings import MOST_WORKERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the service is to carry. Raises PlanError.

    users: streams that are open at once. messages_per_second: of all users together. fan_out: streams that a message
    reaches, on average. event_bytes: of a message's data. group: streams that have the same topics
    (one user's devices). reconnects_per_hour: of one stream. proxies: addresses that
    proxies connect from; 0: clients connect themselves. sockets: ends of each stream's connections that are on this
    machine (1: the service's own; 2: the client's too; 3: a proxy's two too; 4: a proxy's two and the client's too).
    storm_seconds: time in which all streams come back.
    workers, addresses: how many of them; 0: as many as the load needs.
    """

    users: int
    messages_per_second: float
    fan_out: float
    event_bytes: int = 200
    topics_per_stream: int = 2
    group: int = 1
    reconnects_per_hour: float = 1.0
    storm_seconds: float = 5.0
    proxies: int = 1
    sockets: int = 1
    workers: int = 0
    addresses: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name))
        if self.fan_out > self.users:
            raise PlanError(f"fan_out {self.fan_out:g} is more than the {self.users:,} streams that there are")


_LEAST = {"users": 1, "topics_per_stream": 1, "storm_seconds": 0.1, "group": 1, "sockets": 1}
_MOST = {"sockets": 4, "workers": MOST_WORKERS}
_MOST_OF_ALL = 1e9  # beyond it the figures mean nothing, and in the end are no numbers any more


def _check(name: str, value: float) -> None:
    least, most = _LEAST.get(name, 0), _MOST.get(name, _MOST_OF_ALL)
    if math.isnan(value) or value < least:
        raise PlanError(f"{name} is at least {least:g}, not {value:g}")
    if value > most:
        raise PlanError(f"{name} is at most {most:.10g}, not {value:g}")
