"""The servers of the bench: one small class each. What is told about one here is all that the bench knows of it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import build
import probe
from publisher import Publisher, PublishError, post

ROOT = Path(__file__).resolve().parents[2]
APPS = Path(__file__).with_name("apps")
HOST = "127.0.0.1"
PORTS = range(8200, 9000)
START_SECONDS = 60.0
STOP_SECONDS = 30.0
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
JSON, TEXT = "application/json", "text/plain"


class ServerError(Exception):
    """A server did not start."""


class Server(ABC):
    """A server that the bench can start, subscribe to and publish to.

    name: its word in results and on the command line. title: what a table calls it. path: where to subscribe, with
    `{topic}`. batch: events of one request when it is to be as fast as it can. connections: how many such
    requests may be under way.
    """

    name = ""
    title = ""
    path = "/events?topic={topic}"
    batch = 1
    connections = 4
    port = 0
    folder = Path()

    def __init__(self, cache: Path = build.DEFAULT_CACHE) -> None:
        self.cache = cache
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def version(self) -> str:
        """Of the server and of what carries it. Raises BuildError if it cannot be had here."""

    @abstractmethod
    def command(self, folder: Path) -> list[str]:
        """What starts it on `self.port`; its files go into `folder`. Raises BuildError if it cannot be had here."""

    @abstractmethod
    def request(self, topic: str, data: Sequence[str]) -> bytes:
        """The HTTP request that publishes one event, or up to `batch`."""

    def environment(self, folder: Path) -> dict[str, str]:
        return {}

    def start(self, folder: Path, port: int, cores: Iterable[int] | None = None) -> list[int]:
        """Start it and wait until it takes a publish: the pids of the processes that serve. Raises ServerError."""
        self.port, self.folder = port, folder
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith(("PUSHSVC_", "GUNICORN_", "PROMETHEUS_"))}
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(folder), cwd=folder, env=inherited | self.environment(folder), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=lambda: _prepare(cores))
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        return self.pids()

    def pids(self) -> list[int]:
        return probe.family(self._process.pid) if self._process else []

    def stop(self) -> None:
        """End it, with what it started. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process.pid)
            process.wait()
            _reap_group(process.pid)

    def publish(self, publisher: Publisher, topic: str, data: str) -> None:
        publisher.exchange(self.request(topic, [data]))

    def publisher(self) -> Publisher:
        return Publisher(HOST, self.port)

    def _is_ready(self) -> bool:
        try:
            publisher = self.publisher()
        except OSError:
            return False
        try:
            self.publish(publisher, "ready", "?")
        except (OSError, PublishError):
            return False
        finally:
            publisher.close()
        return True


class Pushsvc(Server):
    """This service. workers: how many. settings: further variables. configuration: another file for gunicorn."""

    name = "pushsvc"
    title = "pushsvc, parked streams"
    batch = 500
    worker_class = ""

    def __init__(self, cache: Path = build.DEFAULT_CACHE, workers: int = 1, settings: Mapping[str, str] | None = None,
                 configuration: Path = ROOT / "gunicorn.conf.py") -> None:
        super().__init__(cache)
        self.workers = workers
        self.settings = settings or {}
        self.configuration = configuration

    def version(self) -> str:
        own = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        return f"pushsvc {own[1] if own else '?'}, {_versions('gunicorn', 'gevent', 'flask')}"

    def command(self, folder: Path) -> list[str]:
        which = ["-k", self.worker_class] if self.worker_class else []
        return [sys.executable, "-m", "gunicorn", "--chdir", str(ROOT), "-c", str(self.configuration), *which, "wsgi:app"]

    def environment(self, folder: Path) -> dict[str, str]:
        return {"PUSHSVC_BIND": f"{HOST}:{self.port}", "PUSHSVC_BROKER_URL": f"sqlite:{folder / 'bench.db'}",
                "PUSHSVC_LOG_LEVEL": "warning", "WEB_CONCURRENCY": str(self.workers), "TMPDIR": str(folder),
                **self.settings}

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        if len(data) == 1:
            return post("/publish", json.dumps({"topic": topic, "data": data[0]}).encode(), JSON)
        body = "\n".join([f'{{"topic":"{topic}","data":"{each}"}}' for each in data])
        return post("/publish", body.encode(), "application/x-ndjson")


    def worker_pids(self) -> list[int]:
        return self.pids()[1:]

    def metrics(self) -> dict[str, float]:
        """What `GET /metrics` says, summed over all labels; `workers`: how many workers it speaks for."""
        with urlopen(f"http://{HOST}:{self.port}/metrics", timeout=START_SECONDS) as answer:
            text = answer.read().decode()
        found = Counter[str]()
        for name, value in re.findall(r"^(\w+)(?:{.*})? ([-+.\de]+)$", text, re.MULTILINE):
            found[name] += float(value)
        workers = set(re.findall(r'^pushsvc_streams{pid="(\d+)"}', text, re.MULTILINE))
        return dict(found) | {"workers": len(workers)}

    def wait_for_workers(self, seconds: float) -> None:
        """Until each of them serves. Raises ServerError."""
        deadline = time.monotonic() + seconds
        while self.metrics()["workers"] < self.workers:
            if time.monotonic() > deadline:
                raise ServerError(f"not all of {self.workers} workers started in {seconds:g} s")
            time.sleep(0.5)


class PushsvcUnparked(Pushsvc):
    name = "pushsvc-gevent"
    title = "pushsvc, gunicorn's own gevent worker"
    batch = 100
    worker_class = "gevent"


class _App(Server):
    """A small application in apps/: it takes one event per line."""

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        return post(f"/publish?topic={topic}", "\n".join(data).encode(), TEXT)


class Stock(_App):
    name = "stock"
    title = "stock: Flask generator, gevent queue, gunicorn gevent"
    batch = 20

    def version(self) -> str:
        return _versions("gunicorn", "gevent", "flask")

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "gunicorn", "--chdir", str(APPS), "-k", "gevent", "-w", "1", "-b",
                f"{HOST}:{self.port}", "--worker-connections", "19000", "--backlog", "4096", "--keep-alive", "75",
                "--graceful-timeout", "2", "--http-parser", "python", "--no-control-socket", "--log-level", "warning",
                "stock:app"]


class SseStarlette(_App):
    name = "sse-starlette"
    title = "sse-starlette, uvicorn (uvloop, httptools)"
    batch = 20

    def version(self) -> str:
        return _versions("sse-starlette", "starlette", "uvicorn", "uvloop", "httptools")

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", "uvicorn", "--app-dir", str(APPS), "--host", HOST, "--port", str(self.port),
                "--loop", "uvloop", "--http", "httptools", "--backlog", "4096", "--timeout-keep-alive", "75",
                "--timeout-graceful-shutdown", "2", "--no-access-log", "--log-level", "warning", "starlette_app:app"]


class AiohttpSse(_App):
    name = "aiohttp-sse"
    title = "aiohttp-sse"
    batch = 20

    def version(self) -> str:
        return _versions("aiohttp-sse", "aiohttp")

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, str(APPS / "aiohttp_app.py"), str(self.port)]


class Nchan(Server):
    name = "nchan"
    title = "nchan in nginx (C)"
    connections = 32

    def version(self) -> str:
        nginx, module = build.nginx_with_nchan(self.cache)
        text = subprocess.run([str(nginx), "-v"], capture_output=True, text=True, check=True).stderr
        return f"nchan {_package_version('libnginx-mod-nchan', module)}, nginx {text.strip().rpartition('/')[2]}"

    def command(self, folder: Path) -> list[str]:
        nginx, module = build.nginx_with_nchan(self.cache)
        configuration = (APPS / "nchan.conf").read_text()
        for name, value in {"MODULE": module, "FOLDER": folder, "PORT": self.port,
                            "USER": "user root;" if os.geteuid() == 0 else ""}.items():
            configuration = configuration.replace(f"__{name}__", str(value))
        (folder / "nginx.conf").write_text(configuration)
        return [str(nginx), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        return post(f"/publish?topic={topic}", data[0].encode(), TEXT)


class Mercure(Server):
    """The hub as the program of its own module, without the Caddy server around it: HTTP, and nothing else."""

    name = "mercure"
    title = "Mercure (Go)"
    path = "/.well-known/mercure?topic={topic}"
    release = "v0.20.2"
    key = "!ThisKeyIsForTheBenchOnLoopbackOnly!"

    def version(self) -> str:
        return f"{self.name} {self.release.removeprefix('v')}"

    def command(self, folder: Path) -> list[str]:
        module = "github.com/dunglas/mercure"
        program = build.go_program(self.cache, "mercure", module, f"{module}/cmd/mercure", self.release)
        return [str(program), "--addr", f"{HOST}:{self.port}", "--jwt-key", self.key, "--allow-anonymous",
                "--transport-url", "local://local", "--write-timeout", "0s", "--heartbeat-interval", "15s"]

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        body = urlencode({"topic": topic, "data": data[0]}).encode()
        return post("/.well-known/mercure", body, "application/x-www-form-urlencoded", self._authorization())

    def _authorization(self) -> str:
        import jwt  # where it is not installed, the other servers can still be compared

        return f"Authorization: Bearer {jwt.encode({'mercure': {'publish': ['*']}}, self.key)}\r\n"


class Centrifugo(Server):
    name = "centrifugo"
    title = "Centrifugo (Go), unidirectional SSE"
    path = "/connection/uni_sse?cf_connect=" + quote('{"subs":{"TOPIC":{}}}').replace("TOPIC", "{topic}")
    batch = 100
    release = "v5.4.9"

    def version(self) -> str:
        return f"{self.name} {self.release.removeprefix('v')}"

    def command(self, folder: Path) -> list[str]:
        module = "github.com/centrifugal/centrifugo/v5"
        program = build.go_program(self.cache, "centrifugo", module, module, self.release)
        (folder / "config.json").write_text(json.dumps({
            "address": HOST, "port": str(self.port), "uni_sse": True, "api_insecure": True, "log_level": "error",
            "allow_anonymous_connect_without_token": True, "allow_subscribe_for_client": True,
            "allow_subscribe_for_anonymous": True, "usage_stats_disable": True}))
        return [str(program), "-c", str(folder / "config.json")]

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        if len(data) == 1:
            return post("/api/publish", json.dumps({"channel": topic, "data": data[0]}).encode(), JSON)
        commands = [{"publish": {"channel": topic, "data": each}} for each in data]
        return post("/api/batch", json.dumps({"commands": commands}).encode(), JSON)


class SendLoop(Server):
    """The kernel's price. A request's body goes out as it is, so it is what pushsvc would send."""

    name = "sendloop"
    title = "a C loop of send(2): the kernel's price"
    batch = 500

    def version(self) -> str:
        build.sendloop(self.cache)
        return f"Linux {probe.machine()['linux']}"

    def command(self, folder: Path) -> list[str]:
        return [str(build.sendloop(self.cache)), str(self.port)]

    def request(self, topic: str, data: Sequence[str]) -> bytes:
        frames = "".join([f"id: 019e0000000-1000000\ndata: {each}\n\n" for each in data])
        return post("/publish", f"{len(frames):x}\r\n{frames}\r\n".encode(), TEXT)


ALL: tuple[type[Server], ...] = (SendLoop, Pushsvc, Nchan, Stock, PushsvcUnparked, AiohttpSse, SseStarlette, Mercure,
                                 Centrifugo)


@contextmanager
def running(server: Server, cores: Iterable[int] | None = None) -> Iterator[list[int]]:
    """The pids of a server that runs in a directory of its own, as long as the block does."""
    _adopt()
    folder = Path(tempfile.mkdtemp(prefix="pushsvc-bench-"))
    try:
        yield server.start(folder, free_port(), cores)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """One below those that the kernel gives to clients; any of them: others may be looking for one at this moment."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServerError("no port is free")


def _prepare(cores: Iterable[int] | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if cores:
        os.sched_setaffinity(0, cores)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reap_group(pid: int) -> None:
    """Wait for what was left of it: else its processor time would count as that of others."""
    try:
        while True:
            os.waitpid(-pid, 0)
    except ChildProcessError:
        return


def _adopt() -> None:
    """Processes whose parent dies become ours, so that none is lost sight of."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {installed(name)}" for name in names)


def _package_version(package: str, module: Path) -> str:
    fetched = next(iter(module.parents[4].glob(f"{package}_*.deb")), None) if len(module.parents) > 5 else None
    text = fetched.name.split("_")[1] if fetched else subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+\.\d+", text.replace("%3a", ":").partition(":")[2] or text)
    return found[0] if found else "?"
