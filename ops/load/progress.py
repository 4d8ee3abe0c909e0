"""How far something is, on standard error: a bar on a terminal, which one line is drawn anew for; else lines."""

from __future__ import annotations

import os
import sys
from typing import TextIO

CELLS = 24
COLUMNS = 80  # where the terminal does not say
ERASE = "\r\x1b[K"


class Progress:
    """Use it in a `with` block: at its end no bar is left behind."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._has_bar = False
        self.is_terminal = self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._erase()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._erase()
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
            self._has_bar = True

    def _erase(self) -> None:
        if self._has_bar:
            self._file.write(ERASE)
            self._file.flush()
            self._has_bar = False

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
