"""Drafts from fields, as all ways to publish take them: the HTTP API and the publisher in Python. Pure.

Unknown fields are refused: a typo never passes silently.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pushsvc.errors import BadRequest
from pushsvc.event import DEFAULT_TYPE, KEEP_ALL, Draft

FIELDS = frozenset({"topic", "topics", "data", "event", "keep", "key", "retry"})


def check_names(names: Iterable[str], known: Collection[str], where: str) -> None:
    """Raises BadRequest for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, 1, 0.0)
            raise BadRequest(f"{where} has no field {name[:100]!r}; the nearest is {near[0]!r}")


def draft_of(fields: Mapping[str, Any]) -> Draft:
    """The draft that `fields` give: topic or topics, data (text as it is, any other JSON value serialised), and what
    may be left out: event, keep, key, retry. Raises BadRequest for unknown names and values of the wrong kind."""
    if not fields.keys() <= FIELDS:
        check_names(fields, FIELDS, "the event")
    if "data" not in fields:
        raise BadRequest("data is missing")
    data = fields["data"]
    retry = fields.get("retry")
    if retry is not None and type(retry) is not int:
        raise BadRequest("retry is a whole number of milliseconds")
    return Draft(_topics(fields), data if type(data) is str else _serialised(data),
                 _text(fields, "event", DEFAULT_TYPE), _text(fields, "keep", KEEP_ALL), _text(fields, "key", ""), retry)


def _topics(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if ("topic" in fields) == ("topics" in fields):
        raise BadRequest("give either topic or topics")
    if "topic" in fields:
        return (_text(fields, "topic", ""),)
    topics = fields["topics"]
    if type(topics) is not list or not all(type(topic) is str for topic in topics):
        raise BadRequest("topics is a list of strings")
    return tuple(topics)


def _text(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if type(value) is not str:
        raise BadRequest(f"{name} is a string")
    return value


def _serialised(data: Any) -> str:
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise BadRequest("data has a number that JSON cannot carry") from None
