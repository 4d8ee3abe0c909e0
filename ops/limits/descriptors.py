"""4. Descriptors: a process that has none left, and one that keeps some for saying so."""

from __future__ import annotations

import time
from typing import Any

from clients import Crowd, get, publish
from stage import Service, Show, cpu_seconds, leave_network, service

CONNECTIONS, OWN = 600, 64  # what pushsvc keeps: PUSHSVC_MAX_CONNECTIONS, and for itself
STOCK: Any = {"app": "stock_app:app", "config": "ops/limits/stock_conf.py", "arguments": ("-k", "gevent")}
WAIT_SECONDS = 2.0
STORM_SECONDS = 2.0
STORM_PER_SECOND = 50


def run(streams: int = 200) -> Show:
    """streams: for how many there are descriptors; twice as many clients come."""
    leave_network()
    show = Show(4, "descriptors", steps=4)
    nofile, settings = streams + CONNECTIONS + OWN, {"PUSHSVC_MAX_CONNECTIONS": str(CONNECTIONS)}
    with service(settings, nofile=nofile) as found:
        before = show.add("before", f"pushsvc, nofile {nofile}, {streams // 2} clients", **_hold(found, streams // 2))
    with service(**STOCK, nofile=streams) as found:
        symptom = show.add("symptom", f"plain Flask under gevent, nofile {streams}, {2 * streams} clients",
                           **_hold(found, 2 * streams))
    with service(settings, nofile=nofile) as found:
        after = show.add("after", f"pushsvc, nofile {nofile}: places for {streams} streams, {2 * streams} clients",
                         **_hold(found, 2 * streams, storm=True))
    with service(settings, nofile=2 * nofile) as found:
        raised = show.add("after", f"pushsvc, nofile {2 * nofile}, {2 * streams} clients", **_hold(found, 2 * streams))
    show.notes.append(f"in the storm {STORM_PER_SECOND} more clients a second came, and each was told to come back")
    show.shown = (before["open"] == streams // 2 and symptom["no_answer"] > 0 and symptom["health"] == "no answer"
                  and after["open"] == streams and after["told_to_come_back"] == streams and after["no_answer"] == 0
                  and after["health"] == after["publish"] == "200" and after["refused_in_storm"] > 0
                  and after["cpu_in_storm"] < 0.5 and after["cpu_when_full"] < 0.5 and raised["open"] == 2 * streams)
    return show


def _hold(found: Service, count: int, storm: bool = False) -> dict[str, Any]:
    workers = found.workers()
    with Crowd() as crowd:
        crowd.come([f"/events?topic=t{number}" for number in range(count)])
        crowd.wait(WAIT_SECONDS)
        crowd.hear(0.2)
        told: dict[str, Any] = {"clients": count, "open": crowd.opened(), "told_to_come_back": crowd.refused(),
                "no_answer": sum(not client.head for client in crowd.clients)}
        begun, cpu = time.monotonic(), cpu_seconds(workers)
        crowd.hear(1.0)
        told["cpu_when_full"] = round((cpu_seconds(workers) - cpu) / (time.monotonic() - begun), 3)
        if storm:
            told |= _storm(workers)
        told |= {"health": _status(get("/readyz", timeout=2.0))}
        return told | ({"publish": _status(publish("t0", "x"))} if storm else {})


def _storm(workers: list[int]) -> dict[str, Any]:
    """More clients come at an even rate: how many were told to come back, and what part of a core that took."""
    begun, cpu, refused, come = time.monotonic(), cpu_seconds(workers), 0, 0
    while (now := time.monotonic() - begun) < STORM_SECONDS:
        answer = get("/events?topic=late", timeout=2.0)
        come += 1
        refused += answer is not None and answer.status == 200 and ": full" in answer.body
        time.sleep(max(0.0, come / STORM_PER_SECOND - now))
    spent = cpu_seconds(workers) - cpu
    return {"refused_in_storm": refused, "cpu_in_storm": round(spent / (time.monotonic() - begun), 3)}


def _status(answer: Any) -> str:
    return str(answer.status) if answer else "no answer"
