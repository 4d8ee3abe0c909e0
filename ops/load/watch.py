"""What the servers and the machine use meanwhile: processes by pid or by the port they listen on, and kernel counters."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import probe

PROC = Path("/proc")
LISTEN = "0A"  # of the state column in /proc/net/tcp


def listeners(port: int) -> list[int]:
    """The processes of this machine that listen on a TCP port, and those between them and it: parents that share it."""
    inodes = {line.split()[9] for name in ("tcp", "tcp6") if (PROC / "net" / name).exists()
              for line in (PROC / "net" / name).read_text().splitlines()[1:]
              if line.split()[3] == LISTEN and int(line.split()[1].rpartition(":")[2], 16) == port}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    return sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit() and _has(entry, wanted))


def _has(process: Path, wanted: set[str]) -> bool:
    with suppress(OSError):
        for each in (process / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(each) in wanted:
                    return True
    return False


class Watch:
    """Processor time and memory of some processes, from one look to the next. Those that have ended count no more."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = list(pids)
        self._cpu = self._times()
        self._at = time.monotonic()

    def look(self) -> dict[str, float]:
        """cpu: seconds used since the last look, of all; busiest: of the process that used most; cores: how many were
        used on average; memory: bytes now."""
        before, self._cpu = self._cpu, self._times()
        since, self._at = self._at, time.monotonic()
        used = [seconds - before.get(pid, seconds) for pid, seconds in self._cpu.items()]
        memory = 0
        for pid in self._cpu:
            with suppress(OSError, AssertionError):
                memory += probe.own_bytes([pid])
        return {"cpu": sum(used), "busiest": max(used, default=0.0), "memory": memory,
                "cores": sum(used) / max(self._at - since, 1e-3)}

    def _times(self) -> dict[int, float]:
        found = {}
        for pid in self.pids:
            with suppress(OSError, IndexError):
                found[pid] = probe.cpu_seconds([pid])
        return {pid: seconds for pid, seconds in found.items() if seconds}


def kernel_counters() -> dict[str, int]:
    """What the kernel refused so far on this machine: connections that found no room in an accept queue, and SYNs that
    found none in theirs."""
    found: dict[str, int] = {}
    for path in ("netstat", "snmp"):
        lines = (PROC / "net" / path).read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=False):
            group = names.partition(":")[0]
            found |= {f"{group}.{name}": int(value) for name, value in zip(names.split()[1:], values.split()[1:],
                                                                          strict=False)}
    wanted = ("TcpExt.ListenOverflows", "TcpExt.ListenDrops", "TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies",
              "TcpExt.TCPMemoryPressures", "TcpExt.TCPAbortOnMemory", "Tcp.AttemptFails")
    return {name: found.get(name, 0) for name in wanted}


def descriptors_left(pids: Iterable[int]) -> int | None:
    """The fewest that one of the processes may still open; None if that cannot be read."""
    left = []
    for pid in pids:
        with suppress(OSError):
            limit = re.search(r"^Max open files\s+(\d+)", (PROC / str(pid) / "limits").read_text(), re.MULTILINE)
            if limit:
                left.append(int(limit[1]) - probe.descriptors(pid))
    return min(left, default=None)


def machine() -> dict[str, Any]:
    return probe.machine()
