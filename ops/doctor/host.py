"""What the machine allows and what the service asks of it: read here, judged in `process`."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ops.limits.unit import FOLDERS, UNLIMITED, Unit, drop_ins, read

HERE = Path(__file__).parent
PROC = Path("/proc/sys")
STATES = Path("/var/lib")  # where a StateDirectory is
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs", "lustre")
SECONDS = 60.0  # for a process that loads what the service loads
INFINITE = 1 << 62
DEFAULT_NAME = "pushsvc.db"
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # given, the configuration makes no folder of its own


class HostError(Exception):
    """Why the process could not be examined."""


@dataclass(frozen=True, slots=True)
class Limits:
    """descriptors: of one process. descriptors_from: where that bound is set. Others: the kernel's, by their names."""

    descriptors: int
    descriptors_from: str
    nr_open: int
    file_max: int
    somaxconn: int
    ports: int


@dataclass(frozen=True, slots=True)
class User:
    """Whose rights the service has."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """Where the log lies. folder: "" for a broker without files. there: whether it is there already; writable: whether
    the service can make it. user: who is to use it; None: whoever owns the folder. free, held: bytes."""

    folder: str = ""
    there: bool = False
    writable: bool = True
    user: User | None = None
    kind: str = ""
    free: int = INFINITE
    held: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """What gunicorn and the settings say. stopped: why it would not start, "" if it would."""

    stopped: str = ""
    gunicorn: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def told(unit: str, env: str) -> Unit:
    """What the unit with its drop-ins says, "" for none, and the file of environment, "" for those that the unit names.
    Raises HostError, UnitError."""
    folder, name = str(Path(unit).parent), Path(unit).name
    folders = FOLDERS if folder in FOLDERS else (folder,)
    found = read([unit, *drop_ins(name, folders, Path)] if unit else [], Path, env)
    if found.unread:
        raise HostError(found.unread[0])
    return found


def user_of(unit: Unit) -> User | None:
    """The unit's User, with its Group; None where it names none. Raises KeyError for one that is not there."""
    if not (user := unit.last("User")):
        return None
    entry = pwd.getpwuid(int(user.value)) if user.value.isdecimal() else pwd.getpwnam(user.value)
    named = unit.last("Group")
    group = named.value if named else str(entry.pw_gid)
    gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    return User(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)))


def load(config: str, environ: Mapping[str, str]) -> Service:
    """Raises HostError if it could not be loaded for a reason that is not the configuration's."""
    place = Path(config).absolute()
    done = _python("loaded.py", [str(place)], {**environ, VARIABLE: environ.get(VARIABLE, "/nonexistent")}, place.parent)
    if done.returncode:
        return Service(stopped=_last_line(done.stderr) or f"exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Service(found.pop("refused"), settings=found.pop("settings"), gunicorn=found)


def try_broker(environ: Mapping[str, str], log: Log, directory: Path) -> str:
    """Why the broker cannot be used; "" if it can. A log that is not there yet is not made: its service makes it."""
    by = f" by {log.user.name}" if log.user else ""
    if log.folder and not log.there:
        return "" if log.writable else f"its folder cannot be written{by}: {log.folder}"
    rights = map(str, (log.user.uid, log.user.gid, *log.user.groups) if log.user else ())
    done = _python("trial.py", [log.folder, *rights] if log.folder else [], environ, directory)
    refused = done.stdout.strip() or (_last_line(done.stderr) if done.returncode else "")
    return f"{refused} (tried{by})" if refused and by else refused


def _python(script: str, arguments: list[str], environ: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([sys.executable, "-B", str(HERE / script), *arguments], env=dict(environ), cwd=cwd,
                              text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{script} took more than {SECONDS:g} s") from error


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("pushsvc: ") if lines else ""


def limits(unit: Unit) -> Limits:
    """unit: whose LimitNOFILE holds instead of ours, if it has one. Raises OSError."""
    hard, source = resource.getrlimit(resource.RLIMIT_NOFILE)[1], "`ulimit -Hn` of this shell"
    nr_open = _number("fs/nr_open")
    if found := unit.nofile():
        hard, source = found[0] if found[0] < UNLIMITED else nr_open, "LimitNOFILE"
    low, high = map(int, (PROC / "net/ipv4/ip_local_port_range").read_text().split())
    return Limits(INFINITE if hard == resource.RLIM_INFINITY else hard, source, nr_open, _number("fs/file-max"),
                  _number("net/core/somaxconn"), high - low + 1)


def _number(name: str) -> int:
    return int((PROC / name).read_text().split()[0])


def log_of(broker_url: str, directory: Path, unit: Unit, user: User | None) -> Log:
    """directory: the one that the service is started in. user: of the unit."""
    scheme, _, rest = broker_url.partition(":")
    if scheme != "sqlite":
        return Log()
    path = directory / (rest.removeprefix("//") or f"var/{DEFAULT_NAME}")
    path = path / DEFAULT_NAME if rest.endswith("/") or path.is_dir() else path
    nearest = next(each for each in path.parents if each.is_dir())
    held = sum(each.stat().st_size for each in (path, path.with_name(path.name + "-wal")) if each.exists())
    folder = path.parent if path.parent.is_dir() else nearest
    made = user is not None and _is_handed_over(path, unit, user)
    user = None if made else user
    return Log(str(folder), path.exists(), made or _may_write(nearest, user), user, _kind(nearest),
               shutil.disk_usage(nearest).free, held)


def _is_handed_over(path: Path, unit: Unit, user: User) -> bool:
    """Whether systemd gives the user a folder that it does not have yet: at the start, the unit's StateDirectory."""
    states = [STATES / name.partition(":")[0] for line in unit.all("StateDirectory") for name in line.value.split()]
    return any(path.is_relative_to(state) and not (state.is_dir() and state.stat().st_uid == user.uid)
               for state in states)


def _may_write(folder: Path, user: User | None) -> bool:
    """user: None for ourselves. Another's rights need a process that has them."""
    if user is None:
        return os.access(folder, os.W_OK | os.X_OK)
    test = ["test", "-w", str(folder), "-a", "-x", str(folder)]
    return subprocess.run(test, check=False, user=user.uid, group=user.gid, extra_groups=user.groups).returncode == 0


def _kind(folder: Path) -> str:
    """The type of the file system that a folder is on; "" if that is not known."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    held = [(len(each[1]), each[2]) for each in mounts if folder.resolve().is_relative_to(each[1])]
    return max(held)[1] if held else ""


def has_parser() -> bool:
    """Whether gunicorn's parser in C is installed."""
    return find_spec("gunicorn_h1c") is not None


def line_of(path: str, pattern: str) -> int:
    """The last line that matches, for that is the one that counts; 0 for none."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return max((number for number, line in enumerate(lines, 1) if re.search(pattern, line)), default=0)
