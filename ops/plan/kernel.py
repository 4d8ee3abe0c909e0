"""Settings of this machine's kernel that ops/limits would find too small for a load."""

from __future__ import annotations

from ops.limits.needs import LIMITS, Limit, Need, Target
from ops.plan.load import Load
from ops.plan.machine import SYS, Machine
from ops.plan.needs import Needs
from pushsvc.settings import Settings

WITH_PROXY = 3  # sockets of a stream on this machine, from which on a proxy is among them
FOLLOWED = SYS / "net/netfilter/nf_conntrack_count"


def command(load: Load, need: Needs) -> str:
    """What looks at all of them."""
    proxy = "" if load.sockets >= WITH_PROXY else " --no-proxy"
    return f"python3 ops/limits --streams {load.users} --workers {need.workers}{proxy}"


def too_small(load: Load, machine: Machine, settings: Settings, need: Needs) -> list[str]:
    """Each with what it is and what it has to be."""
    target = Target(streams=load.users, workers=need.workers, connections=settings.max_connections,
                    proxy=load.sockets >= WITH_PROXY, memory_bytes=machine.memory_bytes)
    found = ((limit, _have(limit), limit.need(target)) for limit in LIMITS if limit.is_sysctl)
    return [f"{limit.name} is {_text(have)}, needs {_text(wanted)}" for limit, have, wanted in found
            if have is not None and not limit.is_enough(have, wanted)]


def _have(limit: Limit) -> Need | None:
    """None for a setting that is not here, or has nothing to bound."""
    try:
        if "conntrack" in limit.name and not int(FOLLOWED.read_text()):
            return None
        return tuple(map(int, (SYS / limit.name.replace(".", "/")).read_text().split()))
    except FileNotFoundError:
        return None


def _text(numbers: Need) -> str:
    return " ".join(map(str, numbers))
