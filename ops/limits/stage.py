"""What the shows stand on: a network namespace of their own, the real service in it, counters, and the report."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import PORT, get

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from ops.bench.terminal import Progress  # noqa: E402

HERE = Path(__file__).parent
PROGRESS = Progress()
START_SECONDS, STOP_SECONDS = 30.0, 5.0
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOPBACK = ("ip", "link", "set", "lo", "up")


class NotHere(Exception):
    """This cannot be shown here; the text says why."""


# --- The place -------------------------------------------------------------------------------------------


def leave_network() -> None:
    """From now on this process and what it starts have a network of their own, loopback only, which ends with them.
    Raises NotHere."""
    if os.geteuid() != 0:
        raise NotHere("a network namespace needs root")
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise NotHere(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
    try:
        subprocess.run(LOOPBACK, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotHere(f"loopback does not come up: {error}") from error


def set_sysctl(name: str, value: str) -> None:
    """Of this network namespace: to be called after leave_network. Raises NotHere."""
    try:
        Path("/proc/sys", *name.split(".")).write_text(value)
    except OSError as error:
        raise NotHere(f"{name} cannot be set in a namespace here: {error.strerror}") from error


def counters() -> dict[str, int]:
    """TcpExt of /proc/net/netstat, of this network namespace."""
    lines = Path("/proc/self/net/netstat").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("TcpExt:"))
    return dict(zip(names, map(int, values), strict=True))


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads of these processes so far."""
    files = (file for pid in pids for file in Path("/proc").glob(f"{pid}/task/*/schedstat"))
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def tasks(pid: int) -> int:
    """Threads of a process, the first included."""
    return len(os.listdir(f"/proc/{pid}/task"))


def raise_descriptors() -> None:
    """The clients need as many as they can get."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- The programs ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(command: Sequence[str], env: Mapping[str, str], log: Path, nofile: int = 0,
            group: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, ended with all that it started. nofile: its limit of descriptors, if not 0.
    group: a cgroup that it is to be in."""
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if nofile:
            resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=prepare)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(slots=True)
class Service:
    """A gunicorn master with its workers. log: all that they have written."""

    process: subprocess.Popen[bytes]
    log_path: Path
    address: tuple[str, int] = ("127.0.0.1", PORT)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextlib.contextmanager
def service(settings: Mapping[str, str] | None = None, *, app: str = "wsgi:app", config: str = "gunicorn.conf.py",
            arguments: Sequence[str] = (), health: str = "/readyz", nofile: int = 0,
            group: Path | None = None) -> Iterator[Service]:
    """pushsvc with one worker, with these settings, on PORT; or another application. Raises NotHere if it does not
    start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSVC_", "GUNICORN_"))}
    with tempfile.TemporaryDirectory(prefix="pushsvc-show-") as folder:
        env = inherited | {"PUSHSVC_BIND": f"127.0.0.1:{PORT}", "PUSHSVC_BROKER_URL": f"sqlite:{folder}/push.db",
                           "WEB_CONCURRENCY": "1", "XDG_RUNTIME_DIR": folder, "PUSHSVC_DRAIN_SECONDS": "0.5",
                           **(settings or {})}
        command = [sys.executable, "-m", "gunicorn", "-c", config, "--pythonpath", str(HERE), *arguments, app]
        with program(command, env, Path(folder, "log"), nofile, group) as process:
            found = Service(process, Path(folder, "log"))
            _wait_ready(found, health)
            yield found


def _wait_ready(found: Service, health: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while (answer := get(health, found.address, 2.0)) is None or answer.status != 200:
        if found.process.poll() is not None or time.monotonic() > deadline:
            raise NotHere(f"the service does not start:\n{found.log()[-2000:]}")
        time.sleep(0.05)


# --- The report ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Phase:
    """One step of a show, before, symptom or after: what was done, in words, and the figures."""

    name: str
    what: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Show:
    """All phases, and whether they showed what they are to show. steps: how many phases there will be. notes: what the
    reader has to know."""

    limit: int
    title: str
    steps: int
    phases: list[Phase] = field(default_factory=list)
    shown: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        PROGRESS.hint(f"{self.title}: {self.steps} phases", 0, self.steps)

    def add(self, name: str, what: str, **figures: Any) -> dict[str, Any]:
        """A phase that is over."""
        self.phases.append(Phase(name, what, figures))
        PROGRESS.hint(f"{self.title}: {name}, {what}", len(self.phases), self.steps)
        return figures
