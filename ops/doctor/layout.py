"""The configuration of a proxy as a tree of directives with their lines, and which of them a stream meets. Pure.

Both languages become the same tree: a node is one directive, or one block (nginx) or section (HAProxy) and what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile


class LayoutError(Exception):
    """The file is no configuration that could be read."""


@dataclass(slots=True)
class Node:
    """words: of the directive. line: where it begins, from 1. inner: what is in its block. file: where it stands, "" for
    the one that was given."""

    words: list[str]
    line: int
    inner: list[Node] = field(default_factory=list)
    file: str = ""

    @property
    def name(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True, slots=True)
class Scope:
    """What a stream meets. kind: `nginx` or `haproxy`. levels: the blocks by what they are (`location`, `server`, `http`;
    `backend`, `frontend`, `defaults`), the innermost first. path: that of the stream. gaps: what else counts and is not
    known, so that what is missing here may stand there."""

    kind: str
    path: str
    levels: tuple[tuple[str, Node], ...]
    gaps: tuple[str, ...] = ()

    def find(self, matches: Callable[[Node], bool]) -> Iterator[Node]:
        """The directives that match, those nearest to the stream first."""
        for _, level in self.levels:
            yield from (each for each in level.inner if matches(each))

    def before(self, name: str) -> Scope:
        """Without the first level of this name and all beyond it."""
        return replace(self, levels=tuple(takewhile(lambda level: level[0] != name, self.levels)))

    def level(self, name: str) -> Node | None:
        return next((node for each, node in self.levels if each == name), None)


def walk(node: Node) -> Iterator[Node]:
    for each in node.inner:
        yield each
        yield from walk(each)


def port_of(address: str) -> int:
    found = re.search(r"(?:^|:)(\d+)$", address)
    return int(found[1]) if found else 80
