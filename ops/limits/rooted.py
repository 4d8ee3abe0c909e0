"""Where the names of an image lead: a link in it means a place in it, as if its root were ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

MOST_LINKS = 40  # as the kernel


def follow(root: Path, name: Path | str, last: bool = True) -> Path:
    """The place below `root` that `name` leads to; it may not be there. last: whether a link there is followed too.
    Raises OSError."""
    todo, at, links = _parts(Path(name)), root, 0
    while todo:
        part = todo.pop()
        if part == "..":
            at = at if at == root else at.parent
        elif (todo or last) and (at / part).is_symlink():
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(root / name))
            link = (at / part).readlink()
            at = root if link.is_absolute() else at
            todo += _parts(link)
        else:
            at /= part
    return at


def _parts(name: Path) -> list[str]:
    """The last one first."""
    return [part for part in reversed(name.parts) if part != "/"]
