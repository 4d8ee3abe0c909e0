"""What the programs of this house share at the terminal."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

NO_READER = 141  # 128 and the number of SIGPIPE: what a shell tells of a program that this signal has ended


def answered(main: Callable[[], int]) -> int:
    """A program's exit code; 141, and no word, where nobody reads its answer to the end (`... | head -1`). The signal
    itself would also end a program that writes to a connection."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed there at the exit
        return NO_READER


def _has_lost_its_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
