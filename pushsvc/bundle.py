"""Bundles: what is pending for a group, as a chain that equal groups share, and the frames in it, encoded once."""

from __future__ import annotations

from collections.abc import Sequence

from pushsvc import sse
from pushsvc.event import KEEP_ALL, Event
from pushsvc.mailbox import Letter, replaces
from pushsvc.position import Position

MANY = 16  # topics of a stream, from which on a set of them is quicker to look at


class Wire:
    """An event and its frames, each wire form encoded once."""

    __slots__ = ("event", "epoch", "_plain", "_envelopes")

    def __init__(self, event: Event, epoch: str) -> None:
        self.event = event
        self.epoch = epoch
        self._plain: Letter | None = None
        self._envelopes: dict[str, Letter] = {}

    def letter(self) -> Letter:
        """The plain form."""
        if self._plain is None:
            self._plain = self._letter(sse.encode(self.event, self.epoch))
        return self._plain

    def letter_for(self, topics: Sequence[str]) -> Letter:
        """The envelope form for a stream of `topics`: it names the first of the event's that is among them."""
        among = topics if len(self.event.topics) == 1 or len(topics) < MANY else frozenset(topics)
        topic = next(topic for topic in self.event.topics if topic in among)
        if topic not in self._envelopes:
            self._envelopes[topic] = self._letter(sse.encode_envelope(self.event, self.epoch, topic))
        return self._envelopes[topic]

    def _letter(self, frame: bytes) -> Letter:
        event = self.event
        return Letter(event.seq, frame, event.keep, replaces(event.topics, event.key, event.keep))


class GapWire(Wire):
    """A gap that streams are told as they go on: at `position`, which no event of theirs has. The same in both wire
    forms."""

    def __init__(self, since: Position, position: Position, upto: Position, reason: str, now: float) -> None:
        super().__init__(Event(position.seq, now, (), "gap", "", KEEP_ALL, "", None), position.epoch)
        self._plain = self._letter(sse.gap(str(since), str(upto), reason, str(position)))

    def letter_for(self, topics: Sequence[str]) -> Letter:
        return self.letter()


class Payload:
    """A bundle in one wire form: its letters, and all of it as one ready chunk.

    first, last: the sequences of its first and last event."""

    __slots__ = ("letters", "chunk", "first", "last")

    def __init__(self, letters: list[Letter]) -> None:
        self.letters = letters
        self.first = letters[0].seq
        self.last = letters[-1].seq
        self.chunk = sse.chunk(letters[0].frame if len(letters) == 1 else b"".join([each.frame for each in letters]))

    def chunk_after(self, cursor: int) -> bytes:
        """What a stream at `cursor` has not had, as one chunk; empty for nothing."""
        frames = [letter.frame for letter in self.letters if letter.seq > cursor]
        return sse.chunk(b"".join(frames)) if frames else b""


class Bundle:
    """One event or more, in position order. Two groups that are given the same events hold the same bundle.

    wire: the newest event. first_at: when the oldest was appended, seconds since 1970.
    """

    __slots__ = ("wire", "first_at", "_before", "_after", "_plain", "_payload")

    def __init__(self, wire: Wire | None = None, before: Bundle | None = None) -> None:
        self.wire = wire
        self.first_at: float = before.first_at if before and before.wire else wire.event.at if wire else 0.0
        self._before = before
        self._after: dict[int, Bundle] = {}
        self._plain: list[Letter] | None = None
        self._payload: Payload | None = None

    def extended(self, wire: Wire) -> Bundle:
        """This bundle and `wire`."""
        seq = wire.event.seq
        found = self._after.get(seq)
        if found is None:
            found = self._after[seq] = Bundle(wire, self)
        return found

    def wires(self) -> list[Wire]:
        wires = []
        at: Bundle | None = self
        while at is not None and at.wire is not None:
            wires.append(at.wire)
            at = at._before
        return wires[::-1]

    def letters(self, topics: Sequence[str], envelope: bool) -> list[Letter]:
        """The letters for a group; those of the plain form are made once for all groups."""
        if envelope:
            return [wire.letter_for(topics) for wire in self.wires()]
        if self._plain is None:
            self._plain = [wire.letter() for wire in self.wires()]
        return self._plain

    def payload(self, topics: Sequence[str], envelope: bool) -> Payload:
        """The payload for a group; that of the plain form is made once for all groups."""
        if envelope:
            return Payload(self.letters(topics, envelope))
        if self._payload is None:
            self._payload = Payload(self.letters(topics, envelope))
        return self._payload
