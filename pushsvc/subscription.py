"""Subscriptions: one client's registration in this process, and the groups of those that want the same bytes."""

from __future__ import annotations

import enum
from collections.abc import Callable

from pushsvc.bundle import Bundle
from pushsvc.crowd import Crowd
from pushsvc.mailbox import Letter, Mailbox


class State(enum.IntEnum):
    """Where a stream is in its life; always exactly one."""

    OPENING = 1  # its request's greenlet runs: head, replay
    PARKED = 2  # nobody waits for it but the hub
    BEHIND = 3  # a greenlet drains its mailbox
    CLOSED = 4


class Place(enum.IntEnum):
    """Where a group waits for the fan-out."""

    NOWHERE = 0  # nothing is pending
    SMALL = 1  # before all others
    MANY = 2  # with all those that an event has gone to at once
    LARGE = 3  # alone, and up to the end of its turns: what comes meanwhile waits for the next


class Group:
    """All subscriptions of the same topics in the same wire form: what is pending for one is pending for all.

    topics: as asked, without repetition. envelope: the wire form. members: the subscriptions. pending: what the next
    fan-out brings them.
    """

    __slots__ = ("topics", "envelope", "members", "pending", "place")

    def __init__(self, topics: tuple[str, ...], envelope: bool) -> None:
        self.topics = topics
        self.envelope = envelope
        self.members: Crowd[Subscription] = ()
        self.pending: Bundle | None = None
        self.place = Place.NOWHERE


class Subscription:
    """One client: its group (topics and wire form), its cursor (the last sequence handed to it), its mailbox.

    user: the token's `sub`, or None. expires: when its token does, seconds since 1970, or 0 for never. since, sent:
    when it was opened and when it was last sent something, on the hub's clock. address: the client's, for the log.
    fd: its descriptor when the parking lot has it, else -1; mailbox: None while it is parked. reason: why it was
    closed; parted: its farewell is on its way. abort: breaks a send that a frozen client holds up.
    """

    __slots__ = ("group", "cursor", "mailbox", "state", "fd", "user", "expires", "since", "sent", "address",
                 "overflowed", "parted", "reason", "retry_ms", "abort")

    def __init__(self, group: Group, mailbox: Mailbox, *, user: str | None = None, expires: float = 0,
                 address: str = "", abort: Callable[[], None] | None = None) -> None:
        self.group = group
        self.mailbox: Mailbox | None = mailbox
        self.fd = -1
        self.user = user
        self.expires = expires
        self.address = address
        self.abort = abort
        self.cursor = 0
        self.state = State.OPENING
        self.overflowed = False
        self.parted = False
        self.reason = ""
        self.retry_ms: int | None = None
        self.since = 0.0
        self.sent = 0.0

    def offer(self, letters: list[Letter]) -> bool:
        """Put what is after the cursor into the mailbox; False if the stream is too slow. Atomic: no switch.

        An empty mailbox takes more than it has places for: its stream has had no chance to take a part. A stream that
        still replays reads what does not fit from history instead: it is told by `overflowed`.
        """
        mailbox = self.mailbox
        assert mailbox is not None, "a parked stream is written to"
        whole = not mailbox.queue and self.state is not State.OPENING
        for letter in letters:
            if letter.seq > self.cursor and not self.overflowed and not mailbox.offer(letter, whole):
                if self.state is not State.OPENING:
                    return False
                mailbox.clear()
                self.overflowed = True
        return True

    def take_waiting(self, now: float) -> bytes:
        """What waits in the mailbox after the cursor, joined; empty for nothing. Atomic: no switch."""
        mailbox = self.mailbox
        if mailbox is None or not mailbox.queue:
            return b""
        letters = mailbox.take()
        frames = [letter.frame for letter in letters if letter.seq > self.cursor]
        if frames:
            self.cursor = letters[-1].seq
            self.sent = now
        return b"".join(frames)

    def __repr__(self) -> str:
        return f"<Subscription {self.state.name.lower()} topics={len(self.group.topics)} cursor={self.cursor}>"
