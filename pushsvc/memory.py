"""Whether there is memory for further streams: the bound that was set, or the limits of the control groups around us.

Asked by every worker once a second and while streams open, before the kernel has to end one.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

PROC, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
V1_MEMORY, V2_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
CACHES = ("active_file", "inactive_file", "slab_reclaimable")  # of memory.stat
MEMORY_USED = 0.9  # of the cgroup's limit; the rest is for publishes, and for what opens until the next look


def memory_check(most: int, proc: Path = PROC, cgroups: Path = CGROUPS) -> Callable[[], bool]:
    """What tells whether there is no memory for further streams: this process has more than `most` bytes resident; for
    `most` 0, one of its cgroups has used up its limit. It reads a few small files, and never raises."""
    around = [] if most else list(_memory_cgroups(proc, cgroups))

    def is_short() -> bool:
        with suppress(OSError, ValueError):
            if most:
                return int((proc / "statm").read_text().split()[1]) * resource.getpagesize() > most
            return any(_is_used_up(*each) for each in around)
        return False

    return is_short


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Path]]:
    """(file of the limit, file of the usage) of this process's own cgroup and of those above, v2 and v1. A container may
    show only its own, at the top."""
    with suppress(OSError, ValueError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = cgroups / "memory" if controllers else cgroups
            limit, usage = V1_MEMORY if controllers else V2_MEMORY
            here = top / path.lstrip("/")
            for folder in [here, *here.parents]:
                if folder.is_relative_to(top) and (folder / limit).exists():
                    yield folder / limit, folder / usage


def _is_used_up(limit: Path, usage: Path) -> bool:
    """Kernel memory counts, that of sockets too; what the kernel would give back first, its caches, does not."""
    text = limit.read_text().strip()
    bound = inf if text == "max" else MEMORY_USED * int(text)
    used = int(usage.read_text())
    if used <= bound:
        return False
    words = usage.with_name("memory.stat").read_text().split()
    stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    total = "total_" if "total_cache" in stat else ""  # v1 counts the cgroups below under names of their own
    return used - sum(stat.get(total + name, 0) for name in CACHES) > bound
