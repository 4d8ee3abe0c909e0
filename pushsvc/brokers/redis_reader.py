"""What one process hears from Redis: one connection, subscribed to the channels of the topics that it has streams for.

Redis hands over what is published while one listens, and nothing else. So after every break, and at the first
connection too, the reader joins: it subscribes, then reads from history what it has not handed over, and only then goes
on with what has come meanwhile. What is lost for good it tells, by a reset with a `since`, before it hands over anything
behind it: a client that left in between would come back with an id that says nothing of the loss.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import gevent
from gevent.event import Event as Signal

from pushsvc.brokers.base import PAGE_BYTES, Deliver, Reset
from pushsvc.brokers.redis_codec import Message, event_of, events_of, message_of, names_of
from pushsvc.brokers.redis_line import HISTORY, Line
from pushsvc.brokers.redis_link import Arguments, Link
from pushsvc.brokers.trouble import Trouble
from pushsvc.event import KEEP_LATEST, KEEP_NONE, Event, size_of
from pushsvc.position import Position

READER = "reader"  # the part, as the service's log names it
UNWATCH_SECONDS = 30.0  # how long a topic that has lost its last stream is still listened to: clients come back
ECHO_SECONDS = 3.0  # of silence, after which the connection is tried; twice without an answer, and it is given up
RETRY_SECONDS = (0.05, 1.0)  # between two attempts to join: at first, and at most
GATHER_SECONDS = 0.001  # least time between two hand-overs: what is published faster is handed over together
PAUSE_SECONDS = 0.0001  # between two full hand-overs, so that the streams are served
MOST_TOGETHER = 1000  # events of one hand-over, events of one page of a repair, topics of one command
REPAIR_TOPICS = 500  # of one page of a repair
UNKNOWN = -1
NOBODY = "\n"  # how the channels begin that are no topic's


class _Lost(Exception):
    """Something on a topic did not come: everything after `seq` may be missing."""

    def __init__(self, seq: int, text: str) -> None:
        super().__init__(text)
        self.seq = seq


class Reader:
    """`epoch`, `last`: the position of the newest event handed over; `past`: the epochs before that one."""

    def __init__(self, link: Link, line: Line, trouble: Trouble, deliver: Deliver, reset: Reset) -> None:
        self.epoch = ""
        self.last = 0
        self.past: dict[str, int] = {}
        self._link = link
        self._line = line
        self._trouble = trouble
        self._deliver = deliver
        self._reset = reset
        self._topics: dict[str, int] = {}  # watched: the newest sequence known of each, or UNKNOWN
        self._idle: OrderedDict[str, float] = OrderedDict()  # watched no more: since when, the longest first
        self._orders: deque[tuple[str, str]] = deque()
        self._asked = self._confirmed = 0  # how many orders were given, and how many have come into force
        self._ordered = Signal()
        self._changed = Signal()
        self._live = False
        self._lost: _Lost | None = None  # not told yet
        self._told = 0  # up to where what retention has taken is told
        self._greenlets: list[gevent.Greenlet] = []

    def start(self) -> None:
        self._greenlets = [gevent.spawn(self._run), gevent.spawn(self._give_orders)]

    def close(self) -> None:
        gevent.killall(self._greenlets)
        self._link.close()

    @property
    def orders(self) -> int:
        """How many orders have not come into force."""
        return self._asked - self._confirmed

    # -- topics

    def watch(self, topics: Iterable[str]) -> None:
        """Atomic: no switch."""
        for topic in topics:
            self._idle.pop(topic, None)
            if topic not in self._topics:
                self._topics[topic] = UNKNOWN
                self._order("SUBSCRIBE", topic)

    def unwatch(self, topics: Iterable[str]) -> None:
        """Atomic: no switch."""
        now = time.monotonic()
        for topic in topics:
            self._idle[topic] = now
            self._idle.move_to_end(topic)

    def await_watches(self, seconds: float) -> bool:
        """Wait until what was watched before this call is listened to; False if that does not come about in time.
        Switches."""
        target = self._asked
        with gevent.Timeout(seconds, False):
            while not (self._live and self._confirmed >= target):
                self._changed.wait()
        return self._live and self._confirmed >= target

    def leave(self) -> None:
        """Join again, perhaps elsewhere. One that is just joining finds out by itself where, and would never get to the
        end if every publish broke it off. Atomic: no switch."""
        if self._live:
            self._link.interrupt()

    def _order(self, verb: str, topic: str) -> None:
        self._asked += 1
        self._orders.append((verb, topic))
        self._ordered.set()

    def _give_orders(self) -> None:
        while True:
            self._ordered.wait(1.0)
            self._ordered.clear()
            self._drop_idle()
            if self._live and self._orders:
                try:
                    self._send_orders()
                except OSError:
                    continue  # the reader notices it too, and joins anew

    def _drop_idle(self) -> None:
        due = time.monotonic() - UNWATCH_SECONDS
        while self._idle:
            topic, since = next(iter(self._idle.items()))
            if since > due:
                return
            del self._idle[topic]
            if self._topics.pop(topic, None) is not None:
                self._order("UNSUBSCRIBE", topic)

    def _send_orders(self) -> None:
        orders, asked = list(self._orders), self._asked
        self._orders.clear()
        commands: list[Arguments] = []
        stretch: list[str | int | bytes] = []
        for verb, topic in orders:
            if not stretch or stretch[0] != verb or len(stretch) > MOST_TOGETHER:
                stretch = [verb]
                commands.append(stretch)
            stretch.append(self._link.channels + topic)
        self._link.send([*commands, self._echo(str(asked))])

    def _signal(self) -> None:
        changed, self._changed = self._changed, Signal()
        changed.set()

    # -- the life of the connection

    def _run(self) -> None:
        pause, most = RETRY_SECONDS
        while True:
            try:
                self._join()
                pause = RETRY_SECONDS[0]
                self._trouble.note(READER, None)
                self._trouble.tell()
                self._listen()
            except _Lost as lost:
                self._lost = lost
                self._trouble.note(READER, lost)
            except Exception as error:  # the top of a greenlet: it says so and joins anew
                self._trouble.note(READER, error)
            self._live = False
            self._link.close()
            self._trouble.tell()
            gevent.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, most)

    def _join(self) -> None:
        """From no connection to one that goes on exactly where the last one broke off, or with the gap told. Switches."""
        known = Position(self.epoch, self.last)
        newest = self._link.open(*known)
        epoch = self._link.epoch
        self._line.follow(epoch)
        asked = self._asked
        early = self._subscribe_all()
        if not known.epoch or not self._continues(known):
            self.epoch, self.last = epoch, newest
            self.past = self._link.past
            self._topics = dict.fromkeys(self._topics, UNKNOWN)  # the numbers may have gone back
            self._reset(Position(epoch, newest))
            known, self._lost, self._told = Position(epoch, newest), None, 0
        self._catch_up(known, epoch, early)
        self._confirmed, self._live = asked, True
        self._ordered.set()
        self._signal()

    def _continues(self, known: Position) -> bool:
        """Whether the numbers of the log that we are connected to go on where ours end."""
        link = self._link
        return link.epoch == known.epoch or (known.epoch in link.past and known.seq < link.start)

    def _subscribe_all(self) -> list[tuple[str, Message]]:
        """Listen to all topics that are watched now; what came meanwhile. Step by step: Redis cuts off a listener that
        leaves too many confirmations unread. Switches."""
        topics = list(self._topics)
        self._orders.clear()
        early = self._subscribe([NOBODY])  # without any channel it would be no listener to Redis, with other bounds
        for start in range(0, len(topics), MOST_TOGETHER):
            early += self._subscribe(topics[start : start + MOST_TOGETHER])
        return early

    def _subscribe(self, topics: Sequence[str]) -> list[tuple[str, Message]]:
        self._link.send([["SUBSCRIBE", *(self._link.channels + topic for topic in topics)], self._echo("joined")])
        return self._hear_until("joined")

    def _hear_until(self, token: str) -> list[tuple[str, Message]]:
        """All messages that come before an echo. Switches."""
        heard: list[tuple[str, Message]] = []
        while True:
            item = self._link.receive(2 * ECHO_SECONDS)
            if item is None:
                raise TimeoutError("no answer in time")
            if item[0] == b"message":
                heard.append(self._read(item))
            elif self._echoed(item) == token:
                return heard

    def _echo(self, token: str) -> Arguments:
        """What Redis answers with the token, behind all that was sent before: it leaves a channel that is nobody's. (A
        PING is refused where its file cannot be written.)"""
        return "UNSUBSCRIBE", f"{self._link.channels}{NOBODY}{token}"

    def _echoed(self, item: Sequence[bytes]) -> str:
        """The token of an echo; empty if this is none."""
        if item[0] != b"unsubscribe":
            return ""
        channel = self._topic(item)
        return channel[len(NOBODY) :] if channel.startswith(NOBODY) else ""

    def _catch_up(self, known: Position, epoch: str, early: list[tuple[str, Message]]) -> None:
        if epoch != known.epoch:
            start, place = self._link.start, self._end_of(known)
            since = min(known.seq, self._lost.seq) if self._lost is not None else known.seq
            self._topics = dict.fromkeys(self._topics, UNKNOWN)  # their newest events may be lost with the old epoch
            self._repair(place, early)
            self.epoch, self.past, self._lost, self._told = epoch, self._link.past, None, start
            self._reset(Position(epoch, place), Position(known.epoch, since), start)
        head = self._head()
        early += self._barrier()
        self._repair(head, early)
        if self._lost is not None:  # and every number up to the head is that of an event
            head = self._burn()
            early += self._barrier()
            self._repair(head, early)
        self._hand_over(early)

    def _end_of(self, known: Position) -> int:
        """A sequence behind all of a known epoch and before all of the next, which may not be the present one. What was
        lost with its end is told there. No event has it."""
        starts = [start for epoch, start in self._link.past.items() if epoch > known.epoch and start > known.seq]
        return min(starts, default=self._link.start)

    def _barrier(self) -> list[tuple[str, Message]]:
        """What was published before this call and has not been read yet. Switches."""
        self._link.send([self._echo("barrier")])
        return self._hear_until("barrier")

    def _head(self) -> int:
        head = self._line.head()
        self._expect(head.epoch)
        return head.seq

    def _burn(self) -> int:
        """A sequence that no event has."""
        epoch, seq = self._line.ask("burn")
        self._expect(epoch.decode())
        return int(seq)

    def _expect(self, epoch: str) -> None:
        """Raises ConnectionError if `epoch`, which the line has read, is not ours: it may be connected elsewhere."""
        if epoch != self._link.epoch:
            self._line.leave()
            raise ConnectionError("the log begins a new epoch")

    def _repair(self, head: int, early: Sequence[tuple[str, Message]]) -> None:
        """Hand over what lies between the last event and `head`, page by page, with the gap in its place. This may be
        broken off anywhere. Switches."""
        changed, missing = self._changed_topics(head), self._floor()
        while self.last < head:
            found = {message.seq: message.event for topic, message in early
                     if message.event is not None and self.last < message.seq <= head and topic in self._topics}
            upto = head
            topics = list(changed)
            for start in range(0, len(topics), REPAIR_TOPICS):
                page = topics[start : start + REPAIR_TOPICS]
                reply = self._line.ask(HISTORY, self.last, upto, MOST_TOGETHER, PAGE_BYTES, *page)
                self._expect(reply[0].decode())
                missing = max(missing, int(reply[1]))
                events = list(events_of(reply[3:]))
                found |= {event.seq: event for event in events}
                upto = int(min(_filled(found), events[-1].seq if reply[2] else upto))
                found = {seq: event for seq, event in found.items() if seq <= upto}
            self._pass_on(found, upto, missing, head)
            changed = {topic: seq for topic, seq in changed.items() if seq > upto}
            gevent.sleep(PAUSE_SECONDS)

    def _pass_on(self, found: dict[int, Event], upto: int, missing: int, head: int) -> None:
        """Hand over the events found up to `upto`, and in its place among them the gap, if one is to be told: at the
        first number that no event is found for. `missing`: the newest that retention has taken. Atomic: no switch."""
        lost = self._lost if self.epoch == self._link.epoch else None  # at the end of an epoch it is told with that
        after, until = (self.last, head) if lost is not None else (max(self.last, self._told), min(missing, head))
        at = next((seq for seq in range(after + 1, min(until, upto) + 1) if seq not in found), None)
        ready = [found[seq] for seq in sorted(found)]
        if at is not None:
            before = sum(seq < at for seq in found)
            if before:
                self._deliver(ready[:before])
            since = at - 1 if lost is None else min(at - 1, lost.seq)
            self._reset(Position(self.epoch, at), Position(self.epoch, since), until)
            self._told = until
            if lost is not None:
                self._lost = None
            del ready[:before]
        if ready:
            self._deliver(ready)
        self.last = upto

    def _changed_topics(self, head: int) -> dict[str, int]:
        """The watched topics that had an event since the last one handed over, or lost one that was newer, with their
        newest sequences, 0 for those that history has none of any more. The former are noted. In this order: what has
        left the one is in the other, or under the floor afterwards. Switches."""
        newest = self._since_last("last")
        for topic, seq in newest.items():
            if topic in self._topics:  # it may have been left meanwhile
                self._topics[topic] = seq if seq <= head else UNKNOWN
        return dict.fromkeys(self._since_last("lost"), 0) | newest

    def _floor(self) -> int:
        """The newest sequence whose topic, and that retention has taken it, is forgotten. Raises ConnectionError if what
        the line has read until now may be of another log: so this is read behind it. Switches."""
        epoch, floor = self._line.command("HMGET", f"{self._line.link.prefix}log", "epoch", "floor")
        self._expect("" if epoch is None else epoch.decode())
        return int(floor or 0)

    def _since_last(self, key: str) -> dict[str, int]:
        """The watched topics among those of a sorted set, with what they have there after the last event. Asks for the
        names of others only if they are few: Redis has those of all workers. Switches."""
        place, topics = f"{self._line.link.prefix}{key}", list(self._topics)
        if int(self._line.command("ZCOUNT", place, f"({self.last}", "+inf")) <= max(len(topics), MOST_TOGETHER):
            reply = self._line.command("ZRANGE", place, f"({self.last}", "+inf", "BYSCORE", "WITHSCORES")
            pairs = [(reply[at].decode(), reply[at + 1]) for at in range(0, len(reply), 2)]
            return {topic: int(float(score)) for topic, score in pairs if topic in self._topics}
        found: dict[str, int] = {}
        for start in range(0, len(topics), MOST_TOGETHER):
            page = topics[start : start + MOST_TOGETHER]
            for topic, score in zip(page, self._line.command("ZMSCORE", place, *page), strict=True):
                if score is not None and int(float(score)) > self.last:
                    found[topic] = int(float(score))
        return found

    # -- live

    def _listen(self) -> None:
        silent, handed_at = 0, 0.0
        while True:
            item = self._link.receive(ECHO_SECONDS)
            if item is None:
                if (silent := silent + 1) > 2:
                    raise TimeoutError("the connection is silent")
                self._link.send([self._echo("alive")])
                continue
            silent = 0
            messages: list[tuple[str, Message | None]] = []
            while True:
                self._take(item, messages)
                if len(messages) >= MOST_TOGETHER or not self._link.has_more():
                    break
                item = self._link.receive(ECHO_SECONDS)
                if item is None:  # a part of a message, and nothing after it
                    break
            self._hand_over(messages)
            early = handed_at + GATHER_SECONDS - time.monotonic()
            if early > 0 or len(messages) >= MOST_TOGETHER:
                gevent.sleep(max(early, PAUSE_SECONDS))
            handed_at = time.monotonic()

    def _take(self, item: Sequence[bytes], messages: list[tuple[str, Message | None]]) -> None:
        if item[0] == b"message":
            messages.append(self._read(item))
        elif item[0] == b"subscribe":
            messages.append((self._topic(item), None))
        elif (token := self._echoed(item)).isdigit():
            self._confirmed = max(self._confirmed, int(token))
            self._signal()

    def _read(self, item: Sequence[bytes]) -> tuple[str, Message]:
        topic = self._topic(item)
        return topic, message_of(topic, item[2])

    def _topic(self, item: Sequence[bytes]) -> str:
        return item[1][len(self._link.channels.encode()) :].decode()

    def _hand_over(self, messages: Iterable[tuple[str, Message | None]]) -> None:
        """The events among `messages` that were not handed over, each once, up to where something goes wrong; None
        where a topic begins to be listened to. Raises _Lost if one is missing before them. Switches only to fetch."""
        events: list[Event] = []
        try:
            for topic, message in messages:
                self._add(topic, message, events)
        finally:
            if events:
                self._deliver(events)

    def _add(self, topic: str, message: Message | None, events: list[Event]) -> None:
        known = self._topics.get(topic)
        if known is None:
            return
        if message is None:  # what was published to it just before was for nobody here
            self._topics[topic] = UNKNOWN
            return
        epoch, seq, previous, event, keep = message
        if epoch != self.epoch:
            raise ConnectionError("the log has begun a new epoch")
        if self._live and (seq < self.last or seq == known):
            raise ConnectionError(f"the log has gone back to {seq}")
        if seq <= known:
            return
        if known != UNKNOWN and previous not in (known, 0):
            raise _Lost(known, f"what came before {seq} on {topic!r} did not arrive")
        if seq > self.last:
            if event := event or self._fetch(topic, seq, keep):
                events.append(event)
            self.last = seq
        if topic in self._topics:  # it may have been left during the fetch
            self._topics[topic] = seq

    def _fetch(self, topic: str, seq: int, keep: str) -> Event | None:
        """None for one whose place a newer one has taken, and for a passing one that is gone. Switches."""
        names, body = self._line.command("HMGET", f"{self._line.link.prefix}e:{seq}", "t", "b")
        if body is not None:
            return event_of(seq, names_of(names), body)
        if keep == KEEP_NONE or (keep == KEEP_LATEST and self._trimmed(topic) < seq):
            return None
        raise _Lost(seq - 1, f"the event {seq} is gone")

    def _trimmed(self, topic: str) -> int:
        """The newest sequence that retention has taken from a topic's history, so far as is known. Switches."""
        mark, floor = self._line.command("ZSCORE", f"{self._line.link.prefix}lost", topic), self._floor()
        return floor if mark is None else int(float(mark))


def _filled(found: dict[int, Event]) -> float:
    """The sequence with which the first of these events fill a page; infinity if all of them do not."""
    size = 0
    for seq in sorted(found):
        size += size_of(found[seq].data)
        if size > PAGE_BYTES:
            return seq
    return math.inf
