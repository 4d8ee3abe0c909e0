"""What this machine has: kernel settings, limits of a process, memory."""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path

from needs import Need
from unit import UNLIMITED

SYS = Path("/proc/sys")
PROC = Path("/proc")
MEMORY, NOFILE = "memory", "nofile"
TRACKED = SYS / "net/netfilter/nf_conntrack_count"


def have(name: str, pid: int | None = None) -> Need | None:
    """The present value of a limit; None where the kernel has none of that name here. nofile: the hard limit of `pid`,
    or of this process. Raises OSError for a process that is not there."""
    if name == MEMORY:
        return (total_memory(),)
    if name == NOFILE:
        return (hard_nofile(pid),)
    try:
        return tuple(map(int, sysctl(name).read_text().split()))
    except FileNotFoundError:
        return None


def why_not(name: str) -> str:
    """Why this process cannot set a sysctl; empty if it seems that it can."""
    path = sysctl(name)
    if not path.exists():
        loaded = "set it outside of this network namespace" if name.startswith("net.") else "this kernel has it not"
        return "not loaded" if "conntrack" in name else loaded
    if os.geteuid() != 0:
        return "needs root"
    if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o200:
        return "read-only here"
    return ""


def write(name: str, value: Need) -> None:
    """Set a sysctl. Raises OSError, also if the kernel has taken another value without a word."""
    sysctl(name).write_text(text(value) + "\n")
    if have(name) != value:
        raise OSError(errno.EINVAL, f"the kernel keeps {text(have(name) or ())}")


def text(value: Need) -> str:
    return " ".join(map(str, value))


def sysctl(name: str) -> Path:
    return SYS / name.replace(".", "/")


def hard_nofile(pid: int | None) -> int:
    hard = resource.prlimit(pid or 0, resource.RLIMIT_NOFILE)[1]
    return UNLIMITED if hard == resource.RLIM_INFINITY else hard


def total_memory() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", (PROC / "meminfo").read_text(), re.MULTILINE)
    assert found, "/proc/meminfo names MemTotal"
    return int(found[1]) * 1024


def tracks_connections() -> bool:
    """Whether connections are followed here at all: the module may be loaded and have nothing to do."""
    return TRACKED.exists() and int(TRACKED.read_text()) > 0
