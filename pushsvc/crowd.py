"""Crowds: sets that are mostly of one. A tuple while they are small, for most topics have a single stream. Pure."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")
SMALL = 4
Crowd = tuple[T, ...] | set[T]


def joined(crowd: Crowd[T], item: T) -> Crowd[T]:
    """`crowd` with `item`, which is not in it; a large one is changed in place."""
    if isinstance(crowd, set):
        crowd.add(item)
        return crowd
    return (*crowd, item) if len(crowd) < SMALL else {*crowd, item}


def left(crowd: Crowd[T], item: T) -> Crowd[T]:
    """`crowd` without `item`."""
    if isinstance(crowd, set):
        crowd.discard(item)
        return crowd
    return tuple(each for each in crowd if each is not item)
