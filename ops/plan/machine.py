"""The limits of a machine that a plan is held against."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/proc/sys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """descriptors: of one process (hard limit). files: of all processes. backlog: the most that a listening socket may
    hold. ports: from one address to one address and port."""

    cores: int
    memory_bytes: int
    descriptors: int
    files: int
    backlog: int
    ports: int


def this_machine() -> Machine:
    """Linux's own words."""
    low, high = map(int, _read("net/ipv4/ip_local_port_range").split())
    return Machine(cores=len(os.sched_getaffinity(0)), memory_bytes=_memory(), descriptors=_descriptors(),
                   files=int(_read("fs/file-max")), backlog=int(_read("net/core/somaxconn")), ports=high - low + 1)


def _descriptors() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(_read("fs/nr_open"))
    return most if hard == resource.RLIM_INFINITY else min(hard, most)


def _memory() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found, "/proc/meminfo names MemTotal"
    return int(found[1]) * 1024


def _read(name: str) -> str:
    return (SYS / name).read_text()
