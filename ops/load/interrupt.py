"""A Ctrl-C that is waited for: what runs sees it, and ends in order. A second one ends it at once. So does a SIGTERM, and
a SIGHUP (the terminal is closed), but a second SIGHUP is none."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from fleet import leave_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """asked: a signal has come. Use it in a `with` block; before and after it the signals are what they were."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS
                        if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # as after a SIGHUP
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        elif self.asked:
            raise KeyboardInterrupt
        self.asked = True
