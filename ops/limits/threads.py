"""2. Threads: a thread for each stream runs out; with one loop for all, a call that blocks stops them all."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from clients import Crowd, get, publish
from stage import Service, Show, leave_network, service, tasks

THREADS = 16
BLOCK_SECONDS = 1.5
PROBE_SECONDS = 0.05  # between two events
WAIT_SECONDS = 2.0
PROBED_SECONDS = 2.2
LATE_SECONDS = 0.25
# gevent's own watch: a thread that says where a greenlet is that has kept the loop for longer than this
WATCH = {"GEVENT_MONITOR_THREAD_ENABLE": "true", "GEVENT_MAX_BLOCKING_TIME": "0.2"}


def run(streams: int = 1000) -> Show:
    leave_network()
    show = Show(2, "threads", steps=5)
    with service(app="stock_app:app", config="ops/limits/stock_conf.py",
                 arguments=("-k", "gthread", "--threads", str(THREADS))) as stock:
        pool = show.add("symptom", f"a thread for each stream: Flask under gunicorn's gthread with {THREADS} threads",
                        **_hold(stock, THREADS + 8))
    with service() as pushsvc:
        parked = show.add("after", "parked streams", **_hold(pushsvc, streams))
    with service(WATCH, app="blocking_app:app") as patient:
        calm = show.add("before", f"an event every {PROBE_SECONDS * 1000:g} ms, no view blocks", **_probe(patient, ""))
        blocked = show.add("symptom", f"a view blocks in C for {BLOCK_SECONDS} s", **_probe(patient, "/blocking"))
        moved = show.add("after", "the same call in gevent's thread pool", **_probe(patient, "/pooled"))
        show.notes.append("gevent's watch names: " + _named(patient.log()))
    show.shown = (pool["open"] <= THREADS and pool["health"] == "no answer" and parked["open"] == streams
                  and parked["threads_more"] <= THREADS and parked["health"] == "200"
                  and blocked["loop_late"] > max(calm["loop_late"], moved["loop_late"])
                  and blocked["slowest_event_s"] > LATE_SECONDS and "wait_in_c" in show.notes[0])
    return show


def _hold(found: Service, count: int) -> dict[str, Any]:
    (worker,) = found.workers()
    begun = tasks(worker)
    with Crowd() as crowd:
        crowd.come([f"/events?topic=t{number}" for number in range(count)])
        crowd.wait(WAIT_SECONDS)
        answer = get("/readyz", timeout=1.0)
        return {"clients": count, "open": crowd.opened(), "threads_before": begun, "threads_more": tasks(worker) - begun,
                "health": str(answer.status) if answer else "no answer"}


def _probe(found: Service, path: str) -> dict[str, Any]:
    """Publish again and again, for PROBED_SECONDS, while somebody asks for `path` once."""
    late = _late()
    seconds: list[float] = []
    asking = threading.Thread(target=get, args=(f"{path}?seconds={BLOCK_SECONDS}",), kwargs={"timeout": 10.0})
    until = time.monotonic() + PROBED_SECONDS
    while time.monotonic() < until:
        answer = publish("probe", "x")
        seconds.append(answer.seconds if answer else WAIT_SECONDS)
        if path and not asking.ident:
            asking.start()
        time.sleep(PROBE_SECONDS)
    if asking.ident:
        asking.join()
    time.sleep(1.1)  # the lag is measured once a second
    return {"events": len(seconds), "slowest_event_s": round(max(seconds), 3), "loop_late": _late() - late}


def _late() -> int:
    """How often the loop has been late by more than LATE_SECONDS, as /metrics tells."""
    answer = get("/metrics")
    text = answer.body if answer else ""
    counts = {bound: float(count) for bound, count in re.findall(r'loop_lag_seconds_bucket\{le="(\S+)"\} (\S+)', text)}
    return int(counts["+Inf"] - counts[str(LATE_SECONDS)])


def _named(log: str) -> str:
    """The lines of the log that say where the loop was kept."""
    found = re.findall(r'File "[^"]*/(\w+\.py)", line (\d+), in (\w+)', log.partition("Blocked Stack")[2])
    places = [f"{file}:{line} {name}" for file, line, name in found if file == "blocking_app.py"]
    return ", ".join(dict.fromkeys(places)) or "nothing"
