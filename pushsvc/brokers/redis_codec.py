"""How events lie in Redis and travel through it; the scripts beside this file tell the forms. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pushsvc.event import DEFAULT_TYPE, KEEP_ALL, KEEP_LATEST, KEEP_NONE, Draft, Event
from pushsvc.position import Position

_LETTERS = {KEEP_ALL: "", KEEP_LATEST: "l", KEEP_NONE: "n"}
_KEEPS = {letter.encode(): keep for keep, letter in _LETTERS.items()}


class Message(NamedTuple):
    """What a channel brings. previous: the topic's sequence before, 0 for none that is known. event: None if it has to
    be fetched. keep: the event's."""

    epoch: str
    seq: int
    previous: int
    event: Event | None
    keep: str


def publish_arguments(channels: str, key: str | None, drafts: Sequence[Draft]) -> list[str | int]:
    """What publish.lua takes after its key."""
    arguments: list[str | int] = [channels, key or ""]
    for draft in drafts:
        letter = _LETTERS[draft.keep]
        name = "" if draft.event == DEFAULT_TYPE else draft.event
        retry = "" if draft.retry is None else draft.retry
        arguments += (len(draft.topics), *draft.topics, letter, draft.key,
                      f"{letter}\n{retry}\n{name}\n{draft.key}\n{draft.data}")
    return arguments


def positions_of(reply: bytes) -> list[Position]:
    """The positions in an answer of publish.lua."""
    epoch, first, count = reply.decode().split(" ")
    return [Position(epoch, seq) for seq in range(int(first), int(first) + int(count))]


def event_of(seq: int, topics: tuple[str, ...], body: bytes) -> Event:
    """The event of a BODY."""
    at, keep, retry, name, key, data = body.split(b"\n", 5)
    return Event(seq, int(at) / 1000, topics, name.decode() if name else DEFAULT_TYPE, data.decode(), _KEEPS[keep],
                 key.decode() if key else "", int(retry) if retry else None)


def message_of(topic: str, message: bytes) -> Message:
    """What a message on the channel of `topic` says."""
    head, body = message.split(b"\n", 1)
    epoch, seq, previous, form = head.split(b" ")
    count = int(form)
    if count == 0:
        return Message(epoch.decode(), int(seq), int(previous), None, _KEEPS[body])
    topics: tuple[str, ...] = (topic,)
    if count > 1:
        *names, body = body.split(b"\n", count)
        topics = tuple(name.decode() for name in names)
    event = event_of(int(seq), topics, body)
    return Message(epoch.decode(), int(seq), int(previous), event, event.keep)


def names_of(names: bytes) -> tuple[str, ...]:
    """Topics that stand on lines of their own."""
    return tuple(names.decode().split("\n"))


def events_of(entries: Sequence[bytes]) -> Iterator[Event]:
    """The events in an answer of history.lua, after its first three values."""
    for place in range(0, len(entries), 3):
        yield event_of(int(entries[place]), names_of(entries[place + 1]), entries[place + 2])
