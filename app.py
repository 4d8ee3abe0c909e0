"""The composition root: settings -> broker -> hub -> views, as an ordinary Flask application."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from flask import Flask, Response

from pushsvc.auth import Access
from pushsvc.brokers import open_broker
from pushsvc.brokers.base import Broker
from pushsvc.hub import Hub
from pushsvc.metrics import Metrics
from pushsvc.recorder import Recorder, open_recorder
from pushsvc.settings import Settings, hide
from pushsvc.stream import Stream
from pushsvc.views import events, problems, publish, status
from pushsvc.views.application import Application

DESCRIPTORS_KEPT = 64  # for listeners, the log and its threads
PROC, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
V1_MEMORY, V2_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
CACHES = ("active_file", "inactive_file", "slab_reclaimable")  # of memory.stat
MEMORY_USED = 0.9  # of the cgroup's limit; the rest is for publishes, and for what opens until the next look
logger = logging.getLogger("pushsvc")


@dataclass(frozen=True, slots=True)
class Service:
    """The running parts of one application: `app.extensions["pushsvc"]`."""

    settings: Settings
    broker: Broker
    hub: Hub

    def drain(self) -> None:
        """End all streams gently. Switches."""
        self.hub.drain()

    def close(self) -> None:
        """Give everything back; what was acknowledged is in the log. Idempotent. Switches."""
        self.hub.stop()
        self.broker.close()
        if self.hub.recorder is not None:
            self.hub.recorder.close()


def create_app(settings: Settings | None = None) -> Flask:
    """An application that serves at once. Without `settings`: those of the environment. Raises SettingsError.

    It belongs to the process and the gevent hub that it is made in: make it after a fork, not before.
    """
    settings = _bounded(settings or Settings.from_environ(os.environ))
    access = Access(settings)
    broker = open_broker(settings)
    hub = Hub(settings, Metrics(), is_short=memory_check(settings.max_memory_bytes))
    app = Application("pushsvc", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    problems.install(app, access)
    app.register_blueprint(events.blueprint(hub, broker, access))
    app.register_blueprint(publish.blueprint(hub, broker, access))
    app.register_blueprint(status.blueprint(hub, broker))
    if recorder := open_recorder(settings):
        _record(app, hub, recorder)
    app.extensions["pushsvc"] = Service(settings, broker, hub)
    hub.start(broker)
    logger.info("started", extra={"broker": hide(settings.broker_url), "max_streams": settings.max_streams})
    return app


def _record(app: Flask, hub: Hub, recorder: Recorder) -> None:
    """The hub tells the recorder of its streams, and the response which of them resume."""
    hub.recorder = recorder

    @app.after_request
    def note_resume(response: Response) -> Response:
        if isinstance(response.response, Stream) and response.response.asked:
            recorder.resuming(response.response.subscription)
        return response


def _bounded(settings: Settings) -> Settings:
    """`max_streams` 0 becomes what this process has descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, soft - settings.max_connections - DESCRIPTORS_KEPT)
    return replace(settings, max_streams=min(settings.max_streams or most, most))


def memory_check(most: int, proc: Path = PROC, cgroups: Path = CGROUPS) -> Callable[[], bool]:
    """What tells whether there is no memory for further streams: this process has more than `most` bytes resident; for
    `most` 0, one of its cgroups has used up its limit. It reads a few small files, and never raises."""
    around = [] if most else list(_memory_cgroups(proc, cgroups))

    def is_short() -> bool:
        with suppress(OSError, ValueError):
            if most:
                return int((proc / "statm").read_text().split()[1]) * resource.getpagesize() > most
            return any(_is_used_up(*each) for each in around)
        return False

    return is_short


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Path]]:
    """(file of the limit, file of the usage) of this process's own cgroup and of those above, v2 and v1. A container may
    show only its own, at the top."""
    with suppress(OSError, ValueError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = cgroups / "memory" if controllers else cgroups
            limit, usage = V1_MEMORY if controllers else V2_MEMORY
            here = top / path.lstrip("/")
            for folder in [here, *here.parents]:
                if folder.is_relative_to(top) and (folder / limit).exists():
                    yield folder / limit, folder / usage


def _is_used_up(limit: Path, usage: Path) -> bool:
    """Kernel memory counts, that of sockets too; what the kernel would give back first, its caches, does not."""
    text = limit.read_text().strip()
    bound = inf if text == "max" else MEMORY_USED * int(text)
    used = int(usage.read_text())
    if used <= bound:
        return False
    words = usage.with_name("memory.stat").read_text().split()
    stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    total = "total_" if "total_cache" in stat else ""  # v1 counts the cgroups below under names of their own
    return used - sum(stat.get(total + name, 0) for name in CACHES) > bound
