"""Reads a configuration of nginx with the files that it includes, as a part of the main file where that is found."""

from __future__ import annotations

from pathlib import Path

import layout_nginx
from layout import LayoutError, Node, Scope, walk
from wire import Target

MAIN = "nginx.conf"
LEVELS = 3  # folders in which the main file is looked for, from that of its part upwards


def read(file: str, target: Target) -> Scope:
    """The scope of a stream that is asked for at `target`. Raises LayoutError, OSError, UnicodeDecodeError."""
    given = _Reading(Path(file))
    root = given.tree(file)
    if any(node.name == "http" for node in walk(root)):
        return layout_nginx.scope(root, target, given.gaps)
    for main in (folder / MAIN for folder in list(Path(file).absolute().parents)[:LEVELS]):
        whole = _Reading(main, Path(file))
        try:
            around = whole.tree(str(main))
        except (LayoutError, OSError, UnicodeDecodeError):
            continue
        if whole.has_part:
            return layout_nginx.scope(around, target, whole.gaps)
    return layout_nginx.scope(root, target, given.gaps)


class _Reading:
    """One file with what it includes. gaps: what could not be read. has_part: whether it has included `part`."""

    def __init__(self, file: Path, part: Path | None = None) -> None:
        self.gaps: list[str] = []
        self.has_part = False
        self._file = file
        self._part = part
        self._open: list[Path] = []

    def tree(self, file: str) -> Node:
        path = Path(file).resolve()
        if path in self._open:
            raise LayoutError("it includes itself")
        self._open.append(path)
        try:
            return layout_nginx.tree(path.read_text(), file, self._follow)
        finally:
            self._open.pop()

    def _follow(self, include: Node) -> list[Node]:
        """What stands in the files that it names. Names are relative to the folder of the main file; that of a part may
        be the one above."""
        found: list[Node] = []
        for path in self._matching(" ".join(include.words[1:])):
            is_part = self._part is not None and path.resolve() == self._part.resolve()
            self.has_part = self.has_part or is_part
            try:
                found += self.tree(str(self._part if is_part else path)).inner
            except (LayoutError, OSError, UnicodeDecodeError) as error:
                self.gaps.append(f"{path}, which {include.file}:{include.line} includes: {error}")
        return found

    def _matching(self, name: str) -> list[Path]:
        folders = self._file.absolute().parents
        if any(sign in name for sign in "*?["):
            return next(filter(None, (sorted(folder.glob(name)) if not name.startswith("/") else
                                      sorted(Path("/").glob(name[1:])) for folder in folders[:2])), [])
        return [next((folder / name for folder in folders[:2] if (folder / name).exists()), folders[0] / name)]
