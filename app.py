"""The composition root: settings -> broker -> hub -> views, as an ordinary Flask application."""

from __future__ import annotations

import logging
import os
import resource
from dataclasses import dataclass, replace

from flask import Flask, Response

from pushsvc.auth import Access
from pushsvc.brokers import open_broker
from pushsvc.brokers.base import Broker
from pushsvc.hub import Hub
from pushsvc.memory import memory_check
from pushsvc.metrics import Metrics
from pushsvc.recorder import Recorder, open_recorder
from pushsvc.settings import Settings, hide
from pushsvc.stream import Stream
from pushsvc.views import events, problems, publish, status
from pushsvc.views.application import Application

DESCRIPTORS_KEPT = 64  # for listeners, the log and its threads
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
        self.hub.metrics.flush()  # what was counted since the last second, the streams that a drain has ended among it
        if self.hub.recorder is not None:
            self.hub.recorder.close()


def create_app(settings: Settings | None = None) -> Flask:
    """An application that serves at once. Without `settings`: those of the environment. Raises SettingsError.

    It belongs to the process and the gevent hub that it is made in: make it after a fork, not before.
    """
    settings = _bounded(settings or Settings.from_environ(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
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


def _bounded(settings: Settings, descriptors: int) -> Settings:
    """`max_streams` 0 becomes what this process has descriptors for; so does one that is more."""
    most = max(1, descriptors - settings.max_connections - DESCRIPTORS_KEPT)
    if most < (settings.max_streams or settings.max_connections):
        logger.warning("room for %d streams only: a process may have %d descriptors here, PUSHSVC_MAX_CONNECTIONS keeps "
                       "%d", most, descriptors, settings.max_connections)
    return replace(settings, max_streams=min(settings.max_streams or most, most))
