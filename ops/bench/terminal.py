"""What the programs of this house share at the terminal."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

UNWRITTEN = 2  # the exit code of a program whose answer cannot be written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
NO_READER = 141  # 128 and the number of SIGPIPE: what a shell tells of a program that this signal has ended

CELLS = 24
COLUMNS = 80  # where the terminal does not say
ERASE = "\r\x1b[K"


class Progress:
    """How far something is, on standard error: on a terminal a bar, which one line is drawn anew for; else lines. Use it
    in a `with` block: at its end no bar is left behind. Nothing is said where standard error is closed."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file: Any = file or sys.stderr  # None where that is closed
        self._is_drawn = False
        self.is_terminal = self._file is not None and self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.erase()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.erase()
        if self._file is not None:
            print(text, file=self._file, flush=True)

    def show(self, text: str, done: float, total: float) -> None:
        """So much of the whole is done: the bar, with this text behind it; a line if there is no terminal."""
        if self.is_terminal:
            self.hint(text, done, total)
        else:
            self.say(text)

    def hint(self, text: str, done: float, total: float) -> None:
        """As `show`, but nothing if there is no terminal: for what comes often."""
        if self.is_terminal:
            line = f"{bar(done, total)}  {text.strip()}"[:self._columns() - 1]
            self._file.write(f"{ERASE}{line}")
            self._file.flush()
            self._is_drawn = True

    def erase(self) -> None:
        if self._is_drawn:
            self._file.write(ERASE)
            self._file.flush()
            self._is_drawn = False

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._file.fileno()).columns or COLUMNS
        except OSError:
            return COLUMNS


def bar(done: float, total: float) -> str:
    """`[####....]  50 %`. More than all is all."""
    part = min(1.0, max(0.0, done / total)) if total > 0 else 1.0
    full = int(part * CELLS)
    return f"[{'#' * full}{'.' * (CELLS - full)}] {int(part * 100):3d} %"


def answered(main: Callable[[], int]) -> int:
    """A program's exit code; 141, and no word, where nobody reads its answer to the end (`... | head -1`). The signal
    itself would also end a program that writes to a connection. 2, with a line, where its answer cannot be written."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        _write_no_more()
        return NO_READER
    except OSError as error:
        if error.errno not in FULL or not _is_full():
            raise
        _write_no_more()
        Progress().say(f"{_name()}: the answer cannot be written: {error.strerror}")
        return UNWRITTEN


def _write_no_more() -> None:
    """What is left is flushed to nowhere at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_full() -> bool:
    """Whether it is standard output that takes no more, not even an empty line."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _name() -> str:
    """The program's, as it is called: `python ops/limits` is `limits`."""
    called = Path(sys.argv[0])
    return called.parent.name if called.name == "__main__.py" else called.stem


def _has_lost_its_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
