"""Kernel settings that many streams on one machine need: raised as root for as long as a block runs, then put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SYS = Path("/proc/sys")
DESCRIPTORS_ASIDE = 100_000
PORTS_PER_SOURCE = 20_000


class KernelError(Exception):
    """A setting is too low, and only root may raise it."""


def wanted(streams: int) -> dict[str, tuple[int, ...]]:
    """What `streams` need when both ends of each are on this machine. tcp_mem is in pages: an idle stream has none,
    but one event to all of them is in all buffers at once."""
    return {
        "fs.file-max": (2 * streams + DESCRIPTORS_ASIDE,),
        "net.core.somaxconn": (4096,),
        "net.ipv4.tcp_max_syn_backlog": (65_536,),
        "net.ipv4.tcp_max_orphans": (streams,),
        "net.ipv4.tcp_mem": (streams // 2, streams * 3 // 4, streams),
        **_port_range(), **_conntrack(streams)}


@contextmanager
def raised(settings: dict[str, tuple[int, ...]], say: Callable[[str], None]) -> Iterator[dict[str, dict[str, str]]]:
    """Raise those that are lower: what was set, and what was before. Raises KernelError."""
    changes: dict[str, dict[str, str]] = {}
    try:
        for name, values in settings.items():
            was = _read(name)
            if any(now < need for now, need in zip(was, values, strict=True)) or _is_range(name):
                changes[name] = {"was": _text(was), "set": _text(values if _is_range(name) else map(max, was, values))}
                _write(name, changes[name]["set"])
                say(f"sysctl {name} = {changes[name]['set']} (was {changes[name]['was']})")
        yield changes
    finally:
        for name, change in changes.items():
            if os.geteuid() == 0:
                _write(name, change["was"])
                say(f"sysctl {name} = {change['was']} again")


def _port_range() -> dict[str, tuple[int, ...]]:
    low, high = _read("net.ipv4.ip_local_port_range")
    return {} if high - low >= PORTS_PER_SOURCE else {"net.ipv4.ip_local_port_range": (32_768, 60_999)}


def _is_range(name: str) -> bool:
    return name.endswith("_range")


def _conntrack(streams: int) -> dict[str, tuple[int, ...]]:
    """Only where connections are tracked at all."""
    tracked = SYS / "net/netfilter/nf_conntrack_count"
    if not tracked.exists() or int(tracked.read_text()) == 0:
        return {}
    return {"net.netfilter.nf_conntrack_max": (2 * streams,)}


def _path(name: str) -> Path:
    return SYS / name.replace(".", "/")


def _read(name: str) -> tuple[int, ...]:
    return tuple(map(int, _path(name).read_text().split()))


def _text(values: object) -> str:
    return " ".join(map(str, values))  # type: ignore[call-overload]


def _write(name: str, text: str) -> None:
    try:
        _path(name).write_text(text)
    except OSError as error:
        raise KernelError(f"{name} must be at least {text}: run as root, or set it") from error
