"""Drafts from fields, as all ways to publish take them: the HTTP API and the publisher in Python. Pure.

Unknown fields are refused: a typo never passes silently.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pushsvc.errors import BadRequest
from pushsvc.event import DEFAULT_TYPE, KEEP_ALL, Draft, size_of

FIELDS = frozenset({"topic", "topics", "data", "event", "keep", "key", "retry"})
# Topics of all events of one batch together. The log takes a batch in one step, in which it serves nobody else: with so
# many Redis was at it for 0.3 to 1.2 s.
MAX_BATCH_TOPICS = 100_000


def check_names(names: Iterable[str], known: Collection[str], where: str) -> None:
    """Raises BadRequest for the first name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            shown = str(name)[:100]  # in Python a name may be anything
            near = difflib.get_close_matches(shown, known, 1, 0.0)
            raise BadRequest(f"{where} has no field {shown!r}; the nearest is {near[0]!r}")


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
    return Draft(_topics(fields), _exact(data) if isinstance(data, str) else _serialised(data),
                 _text(fields, "event", DEFAULT_TYPE), _text(fields, "keep", KEEP_ALL), _text(fields, "key", ""), retry)


def check_batch(drafts: Sequence[Draft], most_events: int, most_bytes: int) -> None:
    """Raises BadRequest for more than what may be published together: events, topics of all of them (one that several
    events name counts as often), bytes of their data."""
    if len(drafts) > most_events:
        raise BadRequest(f"a batch has at most {most_events} events")
    topics = sum(len(draft.topics) for draft in drafts)
    if topics > MAX_BATCH_TOPICS:
        raise BadRequest(f"the events of a batch have at most {MAX_BATCH_TOPICS} topics together, not {topics}")
    size = sum(size_of(draft.data) for draft in drafts)
    if size > most_bytes:
        raise BadRequest(f"what is published together has at most {most_bytes} bytes of data, not {size}")


def _topics(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if ("topic" in fields) == ("topics" in fields):
        raise BadRequest("give either topic or topics")
    if "topic" in fields:
        return (_text(fields, "topic", ""),)
    topics = fields["topics"]
    if not isinstance(topics, list | tuple) or not all(isinstance(topic, str) for topic in topics):
        raise BadRequest("topics is a list of strings")
    return tuple(map(_exact, topics))


def _text(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise BadRequest(f"{name} is a string")
    return _exact(value)


def _exact(text: str) -> str:
    """The text of what may be a subclass of str, as marked-up strings and members of enumerations are."""
    return str.__str__(text)


def _serialised(data: Any) -> str:
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRequest(f"data is nothing that JSON can carry: {error}") from None
