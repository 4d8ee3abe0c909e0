"""What processes cost, as the kernel counts it: processor time, memory, descriptors; and which machine this is."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads of these processes so far, to the nanosecond."""
    return sum(int(each.read_text().split()[0]) for pid in pids for each in PROC.glob(f"{pid}/task/*/schedstat")) / 1e9


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes together: what they share with each other or with others is counted by its part."""
    return sum(_kilobytes(PROC / str(pid) / "smaps_rollup", "Pss") for pid in pids) * 1024


def own_bytes(pids: Iterable[int]) -> int:
    """The same without the pages of files (libraries), whose parts change when other programs come and go."""
    rollups = [PROC / str(pid) / "smaps_rollup" for pid in pids]
    return sum(_kilobytes(rollup, name) for rollup in rollups for name in ("Pss_Anon", "Pss_Shmem")) * 1024


def descriptors(pid: int) -> int:
    return len(os.listdir(PROC / str(pid) / "fd"))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = (PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


def available_bytes() -> int:
    return _kilobytes(PROC / "meminfo", "MemAvailable") * 1024


def kernel_memory() -> dict[str, int]:
    """What the kernel holds: slab (socket structures and the like), and the buffers and number of TCP sockets."""
    tcp = re.search(r"^TCP: inuse (\d+) .* mem (\d+)$", (PROC / "net/sockstat").read_text(), re.MULTILINE)
    assert tcp, "/proc/net/sockstat names TCP"
    return {"slab_bytes": _kilobytes(PROC / "meminfo", "Slab") * 1024, "tcp_sockets": int(tcp[1]),
            "tcp_buffer_bytes": int(tcp[2]) * os.sysconf("SC_PAGE_SIZE")}


def busy_seconds() -> float:
    """How long the cores of the machine have worked since it started, summed."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """How much of that was for this process and those that it has started and seen end."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def machine() -> dict[str, Any]:
    model = re.search(r"^model name\s*: (.*)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    return {"cores": os.cpu_count(), "processor": model[1] if model else platform.machine(),
            "memory_gib": round(_kilobytes(PROC / "meminfo", "MemTotal") / (1 << 20), 1),
            "linux": ".".join(platform.release().split(".")[:2]), "python": platform.python_version()}


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _kilobytes(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    assert found, f"{path} names {name}"
    return int(found[1])
