"""The process door: `gunicorn -c gunicorn.conf.py wsgi:app`, or any WSGI server under gevent."""

import sys

from gevent import monkey

monkey.patch_all()  # a second time under gunicorn's gevent worker, which is harmless; the first elsewhere

from app import create_app  # noqa: E402
from pushsvc.errors import SettingsError  # noqa: E402

APP_LOAD_ERROR = 4  # gunicorn gives up at this exit status instead of starting the worker again

try:
    app = create_app()
except SettingsError as error:
    print(f"pushsvc: {error.detail}", file=sys.stderr)
    sys.exit(APP_LOAD_ERROR)
