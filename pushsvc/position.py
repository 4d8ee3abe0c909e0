"""Positions: where in the log a client stands. `EPOCH-SEQ` on the wire, opaque to clients.

The epoch names one life of the log (a new or restored log has a new one), the sequence counts its events, from 1 or, in
Redis, from where no log before it can have come.
Epochs are 11 hexadecimal digits of milliseconds since 1970, so that the ids of one deployment grow.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pushsvc.errors import BadRequest

EARLIEST = "earliest"
MAX_ID_BYTES = 255
_POSITION = re.compile(r"([0-9a-f]{11})-(0|[1-9][0-9]{0,18})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Position(NamedTuple):
    """`epoch`: 11 hex digits; `seq`: the last event seen, 0 for none. `str()` gives what `id:` carries."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


def new_epoch(milliseconds: int) -> str:
    """The epoch of a log that begins at `milliseconds` since 1970."""
    return f"{milliseconds:011x}"


def parse_position(text: str) -> Position | None:
    """The position that `text` names, or None: an id that this service never gave is a position not in history.

    Raises BadRequest for what no id can be: control characters or more than 255 bytes.
    """
    if len(text.encode()) > MAX_ID_BYTES or _CONTROL.search(text):
        raise BadRequest(f"the last event id has at most {MAX_ID_BYTES} bytes and no control characters")
    match = _POSITION.fullmatch(text)
    return Position(match[1], int(match[2])) if match else None
