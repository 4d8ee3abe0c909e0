"""The files that hold limits over a restart: where they are, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from needs import LIMITS, Need, Target, nofile, queue
from rooted import follow
from system import text
from unit import FOLDERS, UNLIMITED, Line, Unit, files_of, read

SYSCTLS = Path("etc/sysctl.d/60-pushsvc.conf")
LOGINS = Path("etc/security/limits.d/60-pushsvc.conf")
DROP_IN = Path("etc/systemd/system/pushsvc.service.d/60-limits.conf")
UNIT = "pushsvc.service"
SHIPPED = Path(__file__).parents[1] / "systemd/pushsvc.service"
BACKLOG, WORKERS = "PUSHSVC_BACKLOG", "WEB_CONCURRENCY"
STATE = Path("var/lib/pushsvc-limits/state.json")
LOGIN_LINE = re.compile(r"^[ \t]*([^\s#]\S*)[ \t]+(soft|hard|-)[ \t]+nofile[ \t]+(\d+|-1|unlimited|infinity)\b", re.M)
HEAD = "# Written by ops/limits for {} streams. `python ops/limits revert` takes it back.\n"


def contents(target: Target, sysctls: Mapping[str, Need], root: Path, user: str, backlog: int,
             workers: int) -> dict[Path, bytes]:
    """Each file below `root`, and what it is to hold. sysctls: what was raised. backlog: of the service, without being
    told. workers: how many the unit is told to have, 0 for what it has been told before. Raises UnitError."""
    told = [service(root), service(root, ours=False), own(root)]
    most = max(nofile(target), *map(promised, told), promised(read([str(SHIPPED)], Path)))
    lines = [f"LimitNOFILE={'infinity' if most >= UNLIMITED else most}"]
    waiting = max(queue(target), *(number(each, BACKLOG) for each in told))
    if waiting > backlog:
        lines.append(f"Environment={BACKLOG}={waiting}")
    if workers := workers or number(own(root), WORKERS):
        lines.append(f"Environment={WORKERS}={workers}")
    logins = [f"{user} {kind} nofile {_unless_unlimited(max(most, has))}" for kind, has in _of_logins(root, user).items()]
    return {path: (HEAD.format(target.streams) + "\n".join(content) + "\n").encode() for path, content in (
        (SYSCTLS, _sysctl_lines(sysctls)), (LOGINS, logins), (DROP_IN, ["[Service]", *lines]))}


def _of_logins(root: Path, user: str) -> dict[str, int]:
    """The soft and the hard nofile that files of others give this user, or may give him: the line may be of a group."""
    most = {"soft": 0, "hard": 0}
    for name in (LOGINS.parent.with_name("limits.conf"), *sorted(follow(root, LOGINS.parent).glob("*.conf"))):
        place = follow(root, name.relative_to(root) if name.is_absolute() else name)
        text = place.read_text(errors="replace") if place.is_file() and name.name != LOGINS.name else ""
        for domain, kind, value in LOGIN_LINE.findall(text):
            for each in most if kind == "-" else (kind,):
                if domain in (user, "*") or domain[0] == "@" or ":" in domain:
                    most[each] = max(most[each], int(value) if value.isdecimal() else UNLIMITED)
    return most


def _unless_unlimited(number: int) -> int | str:
    return number if number < UNLIMITED else "unlimited"


def service(root: Path, ours: bool = True) -> Unit:
    """The unit of the system below `root`, as it will be from its next start. ours: with our drop-in. Raises
    UnitError."""
    find = partial(follow, root)
    return read([file for file in files_of(UNIT, FOLDERS, find) if ours or file != f"/{DROP_IN}"], find)


def own(root: Path) -> Unit:
    """What our drop-in says by itself. Raises UnitError."""
    return read([f"/{DROP_IN}"], partial(follow, root))


def promised(unit: Unit) -> int:
    """Its nofile; 0 where it names none."""
    found = unit.nofile()
    return found[0] if found else 0


def number(unit: Unit, variable: str) -> int:
    """A variable of its environment; 0 where it is not set, or is no number."""
    line = unit.variable(variable)
    return int(line.value) if line and line.value.isdecimal() else 0


def overruled(root: Path, target: Target, workers: int) -> list[str]:
    """Lines of others that count more than those of our drop-in, and say less. workers: as for `contents`."""
    unit, workers = service(root), workers or number(own(root), WORKERS)
    told = []
    for variable, wanted in ((BACKLOG, queue(target)), (WORKERS, workers)):
        line, value = unit.variable(variable), number(unit, variable)
        is_right = value == wanted if variable == WORKERS else value >= wanted
        if wanted and line and line.file != f"/{DROP_IN}" and not is_right:
            told.append(f"{at(root, line)} sets {variable}={line.value} for the unit: take that line out, or set it to "
                        f"{wanted}")
    return told


def at(root: Path, line: Line) -> str:
    return f"{root / line.file.lstrip('/')}:{line.number}"


def _sysctl_lines(sysctls: Mapping[str, Need]) -> list[str]:
    """In the order of LIMITS. A module may not be loaded: `-` lets that pass."""
    names = [limit.name for limit in LIMITS if limit.name in sysctls]
    return [f"{'-' if 'conntrack' in name else ''}{name} = {text(sysctls[name])}" for name in names]
