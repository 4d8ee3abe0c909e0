"""Real Redis servers and Sentinels, as processes of a test's own."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from tests.support.programs import program
from tests.support.server import _follow_parent, free_port
from tests.support.wait import eventually


class Redis:
    """One redis-server on a port of 127.0.0.1, with its data and log in `directory`. Without `durable` it forgets all
    when it ends. `start` after `kill` or `stop` has the same port and the same data.

    prefix: of the command, as `ip netns exec NAME`; host: where it listens then. args: further ones of redis-server.
    """

    def __init__(self, directory: Path, *, durable: bool = False, args: Sequence[str] = (), port: int | None = None,
                 host: str = "127.0.0.1", prefix: Sequence[str] = (), sentinel: bool = False) -> None:
        self.directory = directory.absolute()
        self.host = host
        self.port = port or free_port()
        self.durable = durable
        self._args = list(args)
        self._prefix = list(prefix)
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def client(self, **options: Any) -> Any:
        """A client of redis-py, to look and to meddle."""
        return redis.Redis(host=self.host, port=self.port, decode_responses=True, socket_timeout=10, **options)

    def start(self, wait: bool = True) -> None:
        """Start it and, unless told otherwise, wait until it answers."""
        server = program("redis-server")
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, server, *self._options()], cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_follow_parent())
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        eventually(self.answers, message=f"redis-server on {self.port} answers")

    def answers(self) -> bool:
        with contextlib.closing(self.client()) as client:
            return bool(client.ping())

    def break_listeners(self) -> None:
        """Cut off every connection that is subscribed to something."""
        with contextlib.closing(self.client()) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    def kill(self) -> None:
        """SIGKILL: what it had not written is lost. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        assert self._process is not None, "the server was not started"
        self._process.terminate()
        self._process.wait(10)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _options(self) -> list[str]:
        if self._sentinel:
            return [str(self.directory / "sentinel.conf"), "--sentinel", "--port", str(self.port), *self._args]
        return ["--port", str(self.port), "--bind", self.host, "--dir", str(self.directory), "--save", "",
                "--appendonly", "yes" if self.durable else "no", "--protected-mode", "no",
                "--repl-diskless-sync-delay", "0",
                *self._args]
