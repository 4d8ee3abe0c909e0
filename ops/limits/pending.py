"""1. Pending connections: a queue that is shorter than the storm of clients that return."""

from __future__ import annotations

import os
import signal

from clients import Crowd
from stage import Service, Show, counters, leave_network, service, set_sysctl

SMALL, LARGE = 64, 4096  # somaxconn
FEW = 32
BUSY_SECONDS = 0.25  # in which the worker accepts nothing, as one does that starts or has very much to do
RETRY_SECONDS = 1.0  # a client that finds no place tries again after one second
PATIENCE_SECONDS = 15.0


def run(streams: int = 2000) -> Show:
    """streams: that many clients come at once; at least four times what the short queue holds."""
    leave_network()
    streams = max(streams, 4 * SMALL)
    show = Show(1, "pending connections", steps=3)
    set_sysctl("net.core.somaxconn", str(SMALL))
    with service() as small:
        before = show.add("before", f"somaxconn {SMALL}, {FEW} clients at once", **_storm(small, FEW))
        symptom = show.add("symptom", f"somaxconn {SMALL}, {streams} clients at once", **_storm(small, streams))
    set_sysctl("net.core.somaxconn", str(LARGE))  # it counts from the next listen(2)
    with service() as large:
        after = show.add("after", f"somaxconn {LARGE}, {streams} clients at once", **_storm(large, streams))
    show.notes.append(f"the worker was stopped for {BUSY_SECONDS} s while they came; PUSHSVC_BACKLOG was 4096 throughout")
    show.shown = (before["ListenOverflows"] == after["ListenOverflows"] == 0 < symptom["ListenOverflows"]
                  and after["open"] == streams
                  and symptom["last_answer_s"] > max(RETRY_SECONDS, after["last_answer_s"]))
    return show


def _storm(found: Service, count: int) -> dict[str, float]:
    """That many clients come while the worker is busy."""
    (worker,) = found.workers()
    begun = counters()
    with Crowd() as crowd:
        os.kill(worker, signal.SIGSTOP)
        try:
            crowd.come([f"/events?topic=t{number}" for number in range(count)])
            crowd.hear(BUSY_SECONDS)
        finally:
            os.kill(worker, signal.SIGCONT)
        crowd.wait(PATIENCE_SECONDS)
        ended = counters()
        told = {"clients": count, "open": crowd.opened(), "answered_within_1_s": crowd.answered_within(RETRY_SECONDS),
                "last_answer_s": crowd.slowest()}
    return told | {name: ended[name] - begun[name] for name in ("ListenOverflows", "ListenDrops")}
