"""gunicorn.conf.py, and a worker that samples where its processor time goes: from one SIGUSR2 to the next, then into
`profile-PID.json` in TMPDIR. The sampler takes part of the time itself."""

import json
import os
import runpy
import signal
import tempfile
from collections import Counter
from pathlib import Path

SECONDS = 0.001
_service = runpy.run_path(str(Path(__file__).resolve().parents[3] / "gunicorn.conf.py"))
globals().update({name: value for name, value in _service.items() if not name.startswith("__")})
_own, _within = Counter(), Counter()


def _place(frame):
    code = frame.f_code
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name}:{code.co_qualname}"


def _sample(number, frame):
    _own[_place(frame)] += 1
    places = set()
    while frame is not None:
        places.add(_place(frame))
        frame = frame.f_back
    _within.update(places)


def _toggle(number, frame):
    if signal.getitimer(signal.ITIMER_PROF)[1]:
        signal.setitimer(signal.ITIMER_PROF, 0)
        place = Path(tempfile.gettempdir())
        whole = place / f"profile-{os.getpid()}.part"
        whole.write_text(json.dumps({"own": _own.most_common(40), "within": _within.most_common(80),
                                     "samples": _own.total()}))
        whole.rename(place / f"profile-{os.getpid()}.json")
    else:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)


def post_worker_init(worker):
    _service["post_worker_init"](worker)
    signal.signal(signal.SIGPROF, _sample)
    signal.siginterrupt(signal.SIGPROF, False)
    signal.signal(signal.SIGUSR2, _toggle)
