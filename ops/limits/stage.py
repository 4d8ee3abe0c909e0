"""What the shows stand on: a network namespace of their own, the real service in it, plain clients, and counters."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import http.client
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PORT = 8000  # in the namespace nobody else listens
START_SECONDS, STOP_SECONDS = 30.0, 5.0
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BIND_ADDRESS_NO_PORT = 24  # linux/in.h: the port is chosen at connect, so a source has its ports per destination
READ_BYTES = 65_536
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


# --- The clients -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Client:
    """One connection that asks for `request`. head: what has come first; status 0: nothing has. seconds: from the connect
    to the answer. ended: there will come no more."""

    connection: socket.socket
    request: bytes
    begun: float
    seconds: float = 0.0
    head: bytes = b""
    ended: bool = False

    @property
    def status(self) -> int:
        return int(self.head.split()[1]) if self.head.startswith(b"HTTP/1.1 ") else 0

    @property
    def is_open(self) -> bool:
        """It has a stream that goes on."""
        return self.status == 200 and not self.ended and not self.was_refused

    @property
    def was_refused(self) -> bool:
        """It was told to come back later: 200, a time, and that is all."""
        return self.status == 200 and b"retry: " in self.head and b"\n: full\n" in self.head

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                self.request = self.request[self.connection.send(self.request) :]
            except OSError as error:
                self.ended = error.errno != errno.EAGAIN

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.connection.recv(READ_BYTES)
            except ConnectionError:
                data = b""
            self.ended = self.ended or not data
            self.seconds = self.seconds or time.monotonic() - self.begun
            self.head += data[: READ_BYTES - len(self.head)]
            self.ended = self.ended or self.head.endswith(b"\r\n0\r\n\r\n")


@dataclass(slots=True)
class Crowd:
    """Clients that come together. Use it in a `with` block: they hang up at its end."""

    clients: list[Client] = field(default_factory=list)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self.clients:
            client.connection.close()

    def come(self, paths: Sequence[str], address: tuple[str, int] = ("127.0.0.1", PORT),
             sources: Sequence[str] = ("",)) -> None:
        """One client more for each path, all at once, without waiting. sources: addresses that they take in turn."""
        for number, path in enumerate(paths):
            connection = socket.socket()
            connection.setblocking(False)
            if sources[number % len(sources)]:
                connection.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
                connection.bind((sources[number % len(sources)], 0))
            request = f"GET {path} HTTP/1.1\r\nHost: show\r\nAccept: text/event-stream\r\n\r\n"
            self.clients.append(Client(connection, request.encode(), time.monotonic()))
            connection.connect_ex(address)

    def wait(self, seconds: float, enough: Callable[[Client], bool] = lambda client: bool(client.head)) -> None:
        """Until each of them has had an answer that is `enough`, or has ended, or for so long."""
        waiting = {client.connection.fileno(): client for client in self.clients if not (client.ended or enough(client))}
        deadline = time.monotonic() + seconds
        with select.epoll() as poll:
            for place in waiting:
                poll.register(place, select.EPOLLIN | select.EPOLLOUT)
            while waiting and (left := deadline - time.monotonic()) > 0:
                for place, event in poll.poll(left):
                    client = waiting[place]
                    if event & select.EPOLLOUT and client.request:
                        client.send()
                        poll.modify(place, select.EPOLLIN)
                    if event & ~select.EPOLLOUT:
                        client.read()
                    if client.ended or enough(client):
                        poll.unregister(place)
                        del waiting[place]

    def hear(self, seconds: float) -> None:
        """Read what comes for so long."""
        self.wait(seconds, lambda client: False)

    def opened(self) -> int:
        return sum(client.is_open for client in self.clients)

    def refused(self) -> int:
        return sum(client.was_refused for client in self.clients)

    def answered_within(self, seconds: float) -> int:
        return sum(0 < client.seconds <= seconds and client.status > 0 for client in self.clients)

    def slowest(self) -> float:
        """Seconds until the last of those that were answered."""
        return round(max((client.seconds for client in self.clients if client.status), default=0.0), 3)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str
    seconds: float


def get(path: str, address: tuple[str, int] = ("127.0.0.1", PORT), timeout: float = 5.0,
        body: bytes | None = None) -> Answer | None:
    """The answer to a GET, or to a POST of a form; None if none came in time."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    headers = {"Connection": "close"} | ({"Content-Type": "application/x-www-form-urlencoded"} if body else {})
    try:
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode(errors="replace"), time.monotonic() - begun)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def publish(topic: str, data: str) -> Answer | None:
    return get("/publish", body=f"topic={topic}&data={data}".encode())


# --- The report ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Phase:
    """One step of a show, before, symptom or after: what was done, in words, and the figures."""

    name: str
    what: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Show:
    """All phases, and whether they showed what they are to show. notes: what the reader has to know."""

    limit: int
    title: str
    phases: list[Phase] = field(default_factory=list)
    shown: bool = False
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, what: str, **figures: Any) -> dict[str, Any]:
        self.phases.append(Phase(name, what, figures))
        return figures
