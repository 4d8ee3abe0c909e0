"""The mailbox: bounded, in order, and honest about what it cannot take."""

from collections.abc import Sequence

import gevent
import pytest

from pushsvc.mailbox import Letter, Mailbox, replaces
from tests.support.wait import eventually


def letter(seq: int, keep: str = "all", key: str = "", size: int = 1, topic: str = "a") -> Letter:
    return Letter(seq, b"x" * size, keep, replaces((topic,), key, keep))


def filled(letters: Sequence[Letter], most_events: int = 100, most_bytes: int = 1000) -> Mailbox:
    mailbox = Mailbox(most_events, most_bytes)
    for each in letters:
        assert mailbox.offer(each)
    return mailbox


def waiting(mailbox: Mailbox) -> list[int]:
    return [each.seq for each in mailbox.queue.values()]


# letters, the bounds in events and bytes, whether the last is taken, what waits then
FULL = {
    "the last that fits in events": ([letter(1), letter(2)], (2, 100), True, [1, 2]),
    "one too many": ([letter(1), letter(2), letter(3)], (2, 100), False, [1, 2]),
    "the last that fits in bytes": ([letter(1, size=50), letter(2, size=50)], (10, 100), True, [1, 2]),
    "a byte too many": ([letter(1, size=50), letter(2, size=51)], (10, 100), False, [1]),
    "one larger than the bound, alone": ([letter(1, size=500)], (10, 100), True, [1]),
    "one larger than the bound, not alone": ([letter(1), letter(2, size=500)], (10, 100), False, [1]),
    "one behind a larger one": ([letter(1, size=500), letter(2)], (10, 100), False, [1]),
    "none goes first": ([letter(1), letter(2, "none", "k"), letter(3)], (2, 100), True, [1, 3]),
    "the oldest none first": ([letter(1, "none", "k"), letter(2), letter(3, "none", "l"), letter(4)], (3, 100), True,
                              [2, 3, 4]),
    "as many as it takes": ([letter(1, "none", "k", 40), letter(2, "none", "l", 40), letter(3, size=90)], (10, 100), True,
                            [3]),
    "no more than it takes": ([letter(1, "none", "k", 40), letter(2, "none", "l", 40), letter(3, size=50)], (10, 100),
                              True, [2, 3]),
    "a none that finds no place is dropped": ([letter(1), letter(2), letter(3, "none", "k")], (2, 100), True, [1, 2]),
    "a newer none before an older": ([letter(1), letter(2, "none", "k"), letter(3, "none", "l")], (2, 100), True, [1, 3]),
    "latest is no less than all": ([letter(1, "latest", "k"), letter(2, "latest", "l"), letter(3)], (2, 100), False,
                                   [1, 2]),
    "the newer latest takes the place of the older": ([letter(1, "latest", "k"), letter(2), letter(3, "latest", "k")],
                                                      (2, 100), True, [2, 3]),
    "an older none stays if the newer finds no place": ([letter(1, "none", "k", 10), letter(2, size=80),
                                                        letter(3, "none", "k", 30)], (10, 100), True, [1, 2]),
    "so does an older latest": ([letter(1, "latest", "k", 10), letter(2, size=80), letter(3, "latest", "k", 30)],
                                (10, 100), False, [1, 2]),
    "one larger than the bound in the place of the only one": ([letter(1, "latest", "k"), letter(2, "latest", "k", 500)],
                                                               (10, 100), True, [2]),
    "the newer latest of a full mailbox": ([letter(1, "latest", "k"), letter(2), letter(3, "latest", "k")], (2, 100),
                                           True, [2, 3]),
    "and its bytes": ([letter(1, "latest", "k", 90), letter(2, "latest", "k", 95)], (10, 100), True, [2]),
}


@pytest.mark.parametrize(("letters", "bounds", "taken", "left"), FULL.values(), ids=FULL)
def test_a_full_mailbox(letters: list[Letter], bounds: tuple[int, int], taken: bool, left: list[int]) -> None:
    mailbox = filled(letters[:-1], *bounds)
    assert mailbox.offer(letters[-1]) is taken
    assert waiting(mailbox) == left
    assert mailbox.bytes == sum(len(each.frame) for each in mailbox.queue.values())
    assert [each.seq for each in mailbox.take()] == left
    assert mailbox.bytes == len(mailbox.queue) == len(mailbox.latest) == 0


SAME = {
    "latest of one key": ([letter(1, "latest", "k"), letter(2), letter(3, "latest", "k")], [2, 3]),
    "latest of two keys": ([letter(1, "latest", "k"), letter(2, "latest", "l")], [1, 2]),
    "latest without a key": ([letter(1, "latest"), letter(2, "latest")], [2]),
    "latest of two topics": ([letter(1, "latest", "k"), letter(2, "latest", "k", topic="b")], [1, 2]),
    "none of one key": ([letter(1, "none", "k"), letter(2, "none", "k"), letter(3, "none", "k")], [3]),
    "none of two keys": ([letter(1, "none", "k"), letter(2, "none", "l")], [1, 2]),
    "all of one key": ([letter(1, "all", "k"), letter(2, "all", "k")], [1, 2]),
    "all and latest of one key": ([letter(1, "all", "k"), letter(2, "latest", "k"), letter(3, "all", "k")], [1, 2, 3]),
    # else who resumes behind the none would never get the latest, which its history holds
    "none after latest of one key": ([letter(1, "latest", "k"), letter(2, "none", "k")], [1, 2]),
    "latest after none of one key": ([letter(1, "none", "k"), letter(2, "latest", "k")], [1, 2]),
}


@pytest.mark.parametrize(("letters", "left"), SAME.values(), ids=SAME)
def test_what_takes_the_place_of_what(letters: list[Letter], left: list[int]) -> None:
    assert waiting(filled(letters)) == left


def test_a_key_that_was_taken_or_pushed_out_starts_anew() -> None:
    mailbox = filled([letter(1, "latest", "k")])
    mailbox.take()
    assert mailbox.offer(letter(2, "latest", "k"))
    assert waiting(mailbox) == [2]
    mailbox = filled([letter(1, "none", "k"), letter(2)], most_events=2)
    assert mailbox.offer(letter(3))
    assert waiting(mailbox) == [2, 3]
    assert mailbox.offer(letter(4, "none", "k"))
    assert waiting(mailbox) == [2, 3]


def test_take_waits_for_the_first_and_brings_all_in_order() -> None:
    mailbox = Mailbox(10, 100)
    taking = gevent.spawn(mailbox.take)
    gevent.sleep(0)
    assert not taking.ready()
    for seq in (1, 2, 3):
        mailbox.offer(letter(seq))
    assert [each.seq for each in taking.get(timeout=10)] == [1, 2, 3]


def test_a_nudge_wakes_with_nothing_once() -> None:
    mailbox = Mailbox(10, 100)
    taking = gevent.spawn(mailbox.take)
    gevent.sleep(0)
    mailbox.nudge()
    assert taking.get(timeout=10) == []
    again = gevent.spawn(mailbox.take)
    gevent.sleep(0)
    assert not again.ready()
    mailbox.offer(letter(1))
    assert [each.seq for each in again.get(timeout=10)] == [1]


def test_a_nudge_that_finds_letters_adds_nothing() -> None:
    mailbox = filled([letter(1)])
    mailbox.nudge()
    mailbox.nudge()
    assert [each.seq for each in mailbox.take()] == [1]
    taking = gevent.spawn(mailbox.take)
    gevent.sleep(0)
    assert not taking.ready()
    mailbox.close()
    assert taking.get(timeout=10) == []


def test_close_wakes_and_leaves_what_waits_to_be_taken() -> None:
    mailbox = Mailbox(10, 100)
    taking = gevent.spawn(mailbox.take)
    gevent.sleep(0)
    mailbox.close()
    assert taking.get(timeout=10) == []
    assert mailbox.take() == [], "who takes from a closed one does not wait"
    mailbox = filled([letter(1), letter(2)])
    mailbox.close()
    mailbox.close()
    assert [each.seq for each in mailbox.take()] == [1, 2]
    assert mailbox.take() == []
    assert mailbox.closed


def test_offers_never_wait() -> None:
    mailbox = Mailbox(5, 100)
    offering = gevent.spawn(lambda: [mailbox.offer(letter(seq)) for seq in range(100)])
    assert eventually(offering.ready)
    assert offering.get() == [True] * 5 + [False] * 95


def test_clear_forgets_all_but_stays_open() -> None:
    mailbox = filled([letter(1), letter(2, "latest", "k"), letter(3, "none", "k")], most_events=3)
    mailbox.clear()
    assert (waiting(mailbox), mailbox.bytes, mailbox.latest, mailbox.closed) == ([], 0, {}, False)
    assert all(mailbox.offer(letter(seq)) for seq in (4, 5, 6))
