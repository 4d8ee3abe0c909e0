"""5. Memory: a service that fills its cgroup is killed by the kernel; one that looks refuses streams before."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients import Crowd, get, publish
from stage import NotHere, Service, Show, leave_network, service

TOPICS = 250  # of each stream, and of no other: so a few streams take much memory
ROOM_BYTES = 24 << 20  # between the empty service and its limit
GROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
          ("/sys/fs/cgroup", "memory.max", "memory.current", "memory.events"))  # v1, v2
UNLIMITED = str(1 << 50)  # a setting that bounds nothing
STEP = 25  # streams that come at once
PAUSE_SECONDS = 0.3  # after them: the worker looks once a second, and has a tenth of the limit until then
WAIT_SECONDS = 5.0
AGAIN_SECONDS = 30.0  # at most, until streams are taken again: memory may go back to the kernel late


class Group:
    """A cgroup that bounds memory. Raises NotHere where none can be made."""

    def __init__(self) -> None:
        for top, limit, usage, kills in GROUPS:
            self.folder = Path(top, f"pushsvc-show-{os.getpid()}")
            if not Path(top, "cgroup.procs").exists():
                continue
            with contextlib.suppress(OSError):
                self.folder.mkdir()
                self.limit, self.usage, self._kills = self.folder / limit, self.folder / usage, self.folder / kills
                if self.limit.exists():
                    return
                self.folder.rmdir()
        raise NotHere("no cgroup can be made here")

    def bound(self) -> int:
        """Set the limit ROOM_BYTES above what is in use; the limit in bytes."""
        limit = int(self.usage.read_text()) + ROOM_BYTES
        self.limit.write_text(str(limit))
        return int(self.limit.read_text())

    def kills(self) -> int:
        """Processes that the kernel has killed here for want of memory."""
        return int(re.findall(r"^oom_kill (\d+)$", self._kills.read_text(), re.MULTILINE)[0])

    def remove(self) -> None:
        """Its processes have ended, but the kernel may need a moment to see it."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)
        raise OSError(f"{self.folder} is left")


@contextlib.contextmanager
def group() -> Iterator[Group]:
    made = Group()
    try:
        yield made
    finally:
        made.remove()


def run(streams: int = 2000) -> Show:
    """streams: that many clients come; fewer than that fill the memory."""
    leave_network()
    show = Show(5, "memory", steps=2)
    try:
        symptom = _in_group(show, "symptom", "the service does not look at its memory", streams,
                            {"PUSHSVC_MAX_MEMORY_BYTES": UNLIMITED})
        after = _in_group(show, "after", "the service looks at its cgroup's limit", streams, {})
        show.shown = symptom["killed_by_the_kernel"] > 0 == after["killed_by_the_kernel"]
    except NotHere as error:
        show.notes.append(f"{error}: so that only the service's own bound is shown, not what happens without one")
        after = _by_setting(show, streams)
        show.shown = True
    show.shown = (show.shown and after["told_to_come_back"] > 0 and after["lost"] == 0 and after["open"] > 0
                  and after["health"] == after["publish"] == "200" and after["taken_again_after_s"] is not None)
    show.notes.append(f"each stream has {TOPICS} topics of its own; the worker looks once a second")
    return show


def _in_group(show: Show, name: str, what: str, streams: int, settings: dict[str, str]) -> dict[str, Any]:
    with group() as bounds, service(settings, group=bounds.folder) as found:
        limit = bounds.bound()
        told = _fill(found, streams, lambda: bounds.kills() > 0)
        about = {"limit_mb": limit >> 20, "in_use_mb": int(bounds.usage.read_text()) >> 20}
        return show.add(name, what, **about, **told, killed_by_the_kernel=bounds.kills())


def _by_setting(show: Show, streams: int) -> dict[str, Any]:
    with service() as found:
        (worker,) = found.workers()
        pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
    most = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
    with service({"PUSHSVC_MAX_MEMORY_BYTES": str(most)}) as found:
        return show.add("after", "the worker has a bound of its own", limit_mb=most >> 20,
                        **_fill(found, streams, lambda: False))


def _fill(found: Service, streams: int, is_over: Any) -> dict[str, Any]:
    """Streams come until some are refused, or the kernel has killed the worker, or all are there."""
    workers = found.workers()
    with Crowd() as crowd:
        while len(crowd.clients) < streams and not is_over() and not crowd.refused():
            first = len(crowd.clients)
            crowd.come([_path(number) for number in range(first, first + STEP)])
            crowd.hear(PAUSE_SECONDS)
        crowd.wait(WAIT_SECONDS)
        crowd.hear(1.0)
        lost = sum(client.ended and not client.was_refused for client in crowd.clients)
        told: dict[str, Any] = {"clients": len(crowd.clients), "open": crowd.opened(),
                                "told_to_come_back": crowd.refused(), "lost": lost,
                                "same_worker": found.workers() == workers}
        told |= {"health": _status(get("/readyz")), "publish": _status(publish("t", "x"))}
    return told | {"taken_again_after_s": _taken_again()}


def _taken_again() -> float | None:
    """All have hung up: seconds until a stream is opened again; None if it takes too long."""
    begun = time.monotonic()
    while time.monotonic() - begun < AGAIN_SECONDS:
        with Crowd() as crowd:
            crowd.come(["/events?topic=again"])
            crowd.wait(1.0)
            if crowd.opened():
                return round(time.monotonic() - begun, 1)
        time.sleep(0.2)
    return None


def _path(number: int) -> str:
    return "/events?" + "&".join(f"topic=conversation-{number}-{topic}" for topic in range(TOPICS))


def _status(answer: Any) -> str:
    return str(answer.status) if answer else "no answer"
