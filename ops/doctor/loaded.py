"""The service's configuration as gunicorn would load it, in a process of its own: loading it has effects.

Run as `python loaded.py FILE`; prints one JSON object. What stops the start of the service stops this, with its message.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAMES = ("workers", "worker_class_str", "reuse_port", "backlog", "graceful_timeout", "max_requests", "preload_app",
         "worker_connections")


def main() -> int:
    sys.argv = ["gunicorn", "-c", sys.argv[1], "wsgi:app"]
    from gunicorn.app.wsgiapp import WSGIApplication

    config = WSGIApplication().cfg
    found: dict[str, Any] = {name: getattr(config, name) for name in NAMES}
    found["addresses"] = [list(each) if isinstance(each, tuple) else str(each) for each in config.address]
    found["threads"] = [each.name for each in threading.enumerate() if each is not threading.main_thread()]
    found["patched"] = "gevent.monkey" in sys.modules and bool(sys.modules["gevent.monkey"].saved)
    found["refused"] = _refusal(config)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from pushsvc.settings import Settings

    found["settings"] = asdict(Settings.from_environ(os.environ))
    print(json.dumps(found))
    return 0


def _refusal(config: Any) -> str:
    """Why the service would not start: its own words."""
    os.environ["GUNICORN_PID"] = str(os.getpid())  # as on a reload: the address may be in use, by the service itself
    try:
        config.on_starting(SimpleNamespace(address=config.address, cfg=config))
    except SystemExit as stop:
        return str(stop.code).removeprefix("pushsvc: ")
    return ""


if __name__ == "__main__":
    sys.exit(main())
