"""What the machine's files set at boot: which of them has the last word on a sysctl, as `sysctl --system` reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from needs import Need
from rooted import follow

# Of files of one name the first of these folders has the one that counts; they are read by name over all folders.
FOLDERS = tuple(Path(top, "sysctl.d") for top in ("etc", "run", "usr/local/lib", "usr/lib", "lib"))
LAST = Path("etc/sysctl.conf")  # read after all of them
LINE = re.compile(r"\s*-?\s*([\w./-]+)\s*=\s*(\d+(?:\s+\d+)*)\s*$")  # one with a `*` yields to one that names its setting


@dataclass(frozen=True, slots=True)
class Word:
    """What a file sets, and where."""

    file: Path
    line: int
    value: Need

    def as_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "line": self.line, "value": self.value}


def last_words(root: Path, without: Path | None = None) -> tuple[dict[str, Word], list[str]]:
    """By the name of the sysctl, what holds after a boot of the system below `root`; and what could not be read.
    without: a file that is not to count."""
    words: dict[str, Word] = {}
    unread: list[str] = []
    for file in _files(root):
        if without and file == root / without:
            continue
        try:
            lines = follow(root, file.relative_to(root)).read_text(errors="replace").splitlines()
        except FileNotFoundError:  # a name that is linked to nowhere, or to /dev/null in an image, sets nothing
            continue
        except OSError as error:
            unread.append(f"{file} cannot be read, so what it sets at boot is not known: {error.strerror}")
            continue
        for number, line in enumerate(lines, 1):
            if found := LINE.match(line):
                words[found[1].replace("/", ".")] = Word(file, number, tuple(map(int, found[2].split())))
    return words, unread


def _files(root: Path) -> list[Path]:
    """In the order in which they are read."""
    named: dict[str, Path] = {}
    for folder in FOLDERS:
        for file in follow(root, folder).glob("*.conf"):
            named.setdefault(file.name, root / folder / file.name)
    return [*(named[name] for name in sorted(named)), root / LAST]
