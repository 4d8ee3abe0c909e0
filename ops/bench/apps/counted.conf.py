"""gunicorn.conf.py, and a worker that counts what it holds when it gets SIGUSR2: into `counts-PID.json` in TMPDIR."""

import gc
import json
import os
import runpy
import signal
import tempfile
from collections import Counter
from pathlib import Path

KINDS = ("Greenlet", "greenlet", "Subscription", "Group", "Mailbox", "Stream", "socket")
_service = runpy.run_path(str(Path(__file__).resolve().parents[3] / "gunicorn.conf.py"))
globals().update({name: value for name, value in _service.items() if not name.startswith("__")})


def _count(number, frame):
    gc.collect()
    counts = Counter(type(each).__name__ for each in gc.get_objects())
    place = Path(tempfile.gettempdir())
    whole = place / f"counts-{os.getpid()}.part"
    whole.write_text(json.dumps({kind: counts[kind] for kind in KINDS}))
    whole.rename(place / f"counts-{os.getpid()}.json")


def post_worker_init(worker):
    _service["post_worker_init"](worker)
    signal.signal(signal.SIGUSR2, _count)
