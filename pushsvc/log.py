"""Logs: one line per process event, a line per stream at debug, nothing per frame. Tokens never.

Structured: what belongs to an entry goes in `extra`, and comes out as key=value, or as one JSON object per line.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

from pushsvc.settings import Settings

# In a URL; and what looks like a JWT (`{"` in base64url begins with eyJ), wherever and however it was sent.
_TOKEN = re.compile(r"(access_token=)[^&\s\"'\\]*|eyJ[\w-]+\.[\w-]+\.[\w-]*")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Formatter(logging.Formatter):
    """`shape`: text or json. Tokens are blotted out wherever they turn up, in tracebacks too."""

    def __init__(self, shape: str = "text") -> None:
        super().__init__()
        self.shape = shape

    def format(self, record: logging.LogRecord) -> str:
        entry = self._entry(record)
        text = json.dumps(entry, default=str) if self.shape == "json" else _text(entry)
        return _TOKEN.sub(r"\1***", text)

    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"at": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "pid": record.process,
                 "logger": record.name, "message": record.getMessage()}
        # gunicorn's access atoms come as one-letter arguments, not as extras: they are in the message already
        entry |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return entry


def _text(entry: dict[str, Any]) -> str:
    head = "{at} {level} {pid} {logger}: {message}".format(**entry)
    extras = [f"{name}={_value(value)}" for name, value in list(entry.items())[5:] if name != "error"]
    trace = [f"\n{entry['error']}"] if "error" in entry else []
    return " ".join([head, *extras]) + "".join(trace)


def _value(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or re.search(r"[\s\"=]", text) else text


def config(settings: Settings) -> dict[str, Any]:
    """What logging.config.dictConfig takes: one handler to standard error for gunicorn's loggers and ours."""
    level = settings.log_level.upper()
    ours = {"level": level, "handlers": ["stderr"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"pushsvc": {"()": "pushsvc.log.Formatter", "shape": settings.log_format}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "pushsvc"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {"pushsvc": ours, "gunicorn.error": ours, "gunicorn.access": {**ours, "level": "INFO"}},
    }
