"""What the programs of this house share at the terminal."""

from __future__ import annotations

import os
import select
import shutil
import sys
from collections.abc import Callable

NO_READER = 141  # 128 and the number of SIGPIPE: what a shell tells of a program that this signal has ended

BAR = 20  # characters
OVER = "\r\x1b[K"  # writes the line anew


def say(text: str, part: float | None = None, again: bool = False) -> None:
    """Tell on standard error how far something is. On a terminal that is one line, written over each time, with a bar
    where `part` of the whole, 0 to 1, is known; "" takes it away. Elsewhere it is a line for what is new, and none for
    what is only told `again`."""
    if sys.stderr.isatty():
        line = text if part is None else f"{_bar(part)} {text}"
        print(f"{OVER}{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
    elif text and not again:
        print(text, file=sys.stderr, flush=True)


def _bar(part: float) -> str:
    part = min(1.0, max(0.0, part))
    full = int(part * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}] {part:4.0%}"


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
