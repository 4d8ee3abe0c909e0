"""Waiting for a fact instead of sleeping for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = 10, interval: float = 0.02, message: str = "") -> T:
    """Calls `predicate` until it returns something truthy, and returns that. Switches.

    An exception counts as "not yet". After `timeout` seconds raises AssertionError with `message` and the
    last value or, chained, the last exception. The predicate is called at least once.
    """
    deadline = time.monotonic() + timeout
    while True:
        outcome, error = _attempt(predicate)
        if outcome and error is None:
            return outcome
        if time.monotonic() >= deadline:
            last = f"value {outcome!r}" if error is None else f"exception {error!r}"
            raise AssertionError(f"{message or 'not true'}: after {timeout:g} s, last {last}") from error
        time.sleep(interval)


def _attempt(predicate: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return predicate(), None
    except Exception as error:  # whatever it is, it is shown when time is up
        return None, error
