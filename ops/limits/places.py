"""The files that hold limits over a restart: where they are, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from needs import LIMITS, Need, Target, nofile, queue
from system import UNLIMITED, text

SYSCTLS = Path("etc/sysctl.d/60-pushsvc.conf")
LOGINS = Path("etc/security/limits.d/60-pushsvc.conf")
DROP_IN = Path("etc/systemd/system/pushsvc.service.d/60-limits.conf")
UNITS = tuple(Path(folder, "pushsvc.service") for folder in ("etc/systemd/system", "usr/lib/systemd/system"))
SHIPPED = Path(__file__).parents[1] / "systemd/pushsvc.service"
STATE = Path("var/lib/pushsvc-limits/state.json")
HEAD = "# Written by ops/limits for {} streams. `python ops/limits revert` takes it back.\n"


def contents(target: Target, sysctls: Mapping[str, Need], root: Path, user: str, backlog: int,
             workers: bool) -> dict[Path, bytes]:
    """Each file below `root`, and what it is to hold. sysctls: what was raised. backlog: of the service, without being
    told. workers: whether to set their number."""
    most = max(nofile(target), promised(root), of_unit(SHIPPED))
    service = [f"LimitNOFILE={'infinity' if most >= UNLIMITED else most}"]
    waiting = max(queue(target), of_unit(root / DROP_IN, "Environment=PUSHSVC_BACKLOG"))
    if waiting > backlog:
        service.append(f"Environment=PUSHSVC_BACKLOG={waiting}")
    if workers:
        service.append(f"Environment=WEB_CONCURRENCY={target.workers}")
    logins = [f"{user} {kind} nofile {min(most, UNLIMITED - 1)}" for kind in ("soft", "hard")]
    return {path: (HEAD.format(target.streams) + "\n".join(lines) + "\n").encode() for path, lines in (
        (SYSCTLS, _sysctl_lines(sysctls)), (LOGINS, logins), (DROP_IN, ["[Service]", *service]))}


def promised(root: Path) -> int:
    """The nofile that the unit has from its next start; 0 where there is none."""
    return max(of_unit(root / path) for path in (*UNITS, DROP_IN))


def of_unit(path: Path, name: str = "LimitNOFILE") -> int:
    """A number of a unit or a drop-in; 0 if it is not there or has none."""
    found = re.findall(rf"^{name}=(?:\w+:)?(\d+|infinity)$", path.read_text(), re.M) if path.is_file() else []
    return 0 if not found else UNLIMITED if found[-1] == "infinity" else int(found[-1])


def _sysctl_lines(sysctls: Mapping[str, Need]) -> list[str]:
    """In the order of LIMITS. A module may not be loaded: `-` lets that pass."""
    names = [limit.name for limit in LIMITS if limit.name in sysctls]
    return [f"{'-' if 'conntrack' in name else ''}{name} = {text(sysctls[name])}" for name in names]
