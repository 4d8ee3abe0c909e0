"""The real service, run as the processes that a user would run, and stopped without a trace."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.client import request
from tests.support.wait import eventually

ROOT = Path(__file__).parents[2]
LOG_TAIL = 8_000
STOP_TIMEOUT = 10
SETTLE_TIMEOUT = 2

# What gunicorn itself takes from its environment; a test must not depend on the caller's.
GUNICORN_VARIABLES = {
    "FORWARDED_ALLOW_IPS",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "PORT",
    "SCRIPT_NAME",
    "SENDFILE",
    "WEB_CONCURRENCY",
}
PR_SET_PDEATHSIG = 1
PORTS = (10_000, 32_000)  # below those that the kernel gives to outgoing connections


class Server:
    """One gunicorn master and its workers on a port of `host`, with its data and log in `directory`.

    `with Server(directory) as server:` starts it, waits until it is ready, and leaves no process behind,
    whatever happens. Every start (`restart`, or `start` after `stop`) has the same port and the same data,
    and appends to the same log. `env` is added last, so it may override anything.

    The master leads a session and a process group of its own, which its workers share: they can be found
    and ended together, and nothing else ever is. Should the thread that called `start` die, the kernel sends
    the master SIGTERM: so start it from a thread that outlives the test.

    prefix: of the command, as `ip netns exec NAME`: a machine of its own, which has the address `host`.
    """

    def __init__(
        self,
        directory: Path,
        workers: int = 2,
        env: Mapping[str, str] | None = None,
        worker_class: str | None = None,
        port: int | None = None,
        args: Sequence[str] = (),
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        application: str = "wsgi:app",
    ) -> None:
        self.directory = directory.absolute()
        self._application = application
        self.workers = workers
        self.host = host
        self.port = port or free_port()
        self._env = dict(env or {})
        self._args = [*(["-k", worker_class] if worker_class else []), *args]
        self._prefix = list(prefix)
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"pid {self._master.pid}" if self._master and self._runs() else "stopped"
        return f"<Server {self.url} {state}>"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The master's process id. Raises AssertionError before the first start."""
        assert self._master is not None, "the server was not started"
        return self._master.pid

    def start(self) -> None:
        """Starts the master and returns at once."""
        assert not self._runs(), "the server runs already"
        self.stop()  # workers may have survived a master that a test has killed
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._master = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", *self._args,
                 self._application],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_follow_parent(),
            )

    def wait_ready(self, timeout: float = 20) -> None:
        """Waits until `/readyz` says 200 and all workers are there and heed signals.

        Raises AssertionError with the log's end after `timeout` seconds, at once if the master exits.
        """
        deadline = time.monotonic() + timeout
        while not (self._answers_ready() and self._has_all_workers()):
            if not self._runs():
                raise AssertionError(f"{self!r} has exited:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                pids = self.worker_pids()
                raise AssertionError(f"{self!r} not ready in {timeout:g} s, workers {pids}:\n{self._log_tail()}")
            time.sleep(0.05)

    def worker_pids(self) -> list[int]:
        """The master's living children in order of their numbers; empty when the master is gone."""
        if self._master is None:
            return []
        children: list[int] = []
        for listing in Path(f"/proc/{self._master.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread ended meanwhile
                children += map(int, listing.read_text().split())
        return sorted(pid for pid in children if _is_alive(pid))

    def kill_worker(self, pid: int) -> None:
        """SIGKILL to one worker. The master starts another."""
        assert pid in self.worker_pids(), f"{pid} is not one of the workers {self.worker_pids()}"
        os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL to master and workers at once, as a power cut would. Returns when they are gone."""
        self._signal_group(signal.SIGKILL)
        self._wait(STOP_TIMEOUT)
        self._await_no_survivors()

    def terminate(self, timeout: float) -> float:
        """SIGTERM to the master, as a deployment does; returns the seconds until it had exited.

        Raises AssertionError with the log's end if that takes longer than `timeout`; it still runs then.
        """
        assert self._runs(), f"{self!r} does not run"
        started = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        self.wait_gone(timeout)
        return time.monotonic() - started

    def wait_gone(self, timeout: float) -> None:
        """Waits for the master's exit. Raises AssertionError with the log's end if that takes longer."""
        assert self._wait(timeout), f"{self!r} has not exited in {timeout:g} s:\n{self._log_tail()}"

    def reload(self) -> None:
        """SIGHUP to the master: it starts new workers and lets the old ones go. Returns at once."""
        assert self._runs(), f"{self!r} does not run"
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> None:
        """Ends all processes of this server: in order if STOP_TIMEOUT is enough for that, else by force.

        Idempotent. Leaves the port free and the data in place.
        """
        if self._master is None:
            return
        self._settle()
        if self._runs():
            os.kill(self._master.pid, signal.SIGTERM)
            self._wait(STOP_TIMEOUT)
        self._signal_group(signal.SIGKILL)
        self._wait(STOP_TIMEOUT)
        self._await_no_survivors()

    def restart(self) -> None:
        """Stops in order, starts again on the same port and data, and waits until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def log(self) -> str:
        """All that the processes have written to stdout and stderr, over all starts."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    @property
    def _log_path(self) -> Path:
        return self.directory / "server.log"

    def _log_tail(self) -> str:
        return self.log()[-LOG_TAIL:]

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not _is_setting(name)}
        return inherited | {
            "PYTHONUNBUFFERED": "1",
            "XDG_RUNTIME_DIR": str(self.directory),  # gunicorn's control socket: one per server, not per user
            "PUSHSVC_BIND": f"{self.host}:{self.port}",
            "PUSHSVC_BROKER_URL": f"sqlite:{self.directory / 'push.db'}",
            "WEB_CONCURRENCY": str(self.workers),
            **self._env,
        }

    def _answers_ready(self) -> bool:
        try:
            return request("GET", f"{self.url}/readyz", timeout=2).status == 200
        except OSError:
            return False

    def _has_all_workers(self) -> bool:
        pids = self.worker_pids()
        return len(pids) == self.workers and all(_catches(pid, signal.SIGABRT) for pid in pids)

    def _settle(self) -> None:
        """Gives a worker that starts just now, after a kill or a reload, the time to heed signals."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while self._runs() and not self._has_all_workers() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _runs(self) -> bool:
        return self._master is not None and self._master.poll() is None

    def _wait(self, timeout: float) -> bool:
        """Waits for the master's exit; returns whether it has exited."""
        try:
            return self._master is None or self._master.wait(timeout) is not None
        except subprocess.TimeoutExpired:
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        # The kernel gives the master's number to nobody else while one process of its group lives. So once
        # the master is reaped, a process of that number means that the group is gone: it is a stranger.
        if self._master is None or (not self._runs() and Path(f"/proc/{self._master.pid}").exists()):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._master.pid, number)

    def _await_no_survivors(self) -> None:
        group = self.pid
        eventually(lambda: not _group_members(group), STOP_TIMEOUT, message=f"processes of {self!r} are left")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now, and that no connection of ours or others is given meanwhile."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randint(*PORTS)))
            return int(probe.getsockname()[1])


def _is_setting(name: str) -> bool:
    return name.startswith(("PUSHSVC_", "GUNICORN_")) or name in GUNICORN_VARIABLES


def _follow_parent() -> Callable[[], None]:
    """What the child calls between fork and exec, so that it does not outlive a killed test run."""
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_alive(pid: int) -> bool:
    state = _stat(pid)[:1]
    return state not in ([], ["Z"], ["X"])


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal.

    A gunicorn worker, unlike the master, catches SIGABRT: from then on its handlers are its own. A SIGTERM
    before that meets the handler inherited from the master and is lost: an orderly stop would then hang.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def _group_members(group: int) -> list[int]:
    """The living processes of a process group."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _is_alive(pid) and _stat(pid)[2:3] == [str(group)]]


def _stat(pid: int) -> list[str]:
    """`/proc/PID/stat` from its third field (state, parent, group, ...); empty for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
