"""The doorbell between the workers of one machine: one datagram on a Unix socket each, which says only "look".

A lost ring costs a poll interval, never an event. The sockets lie in one folder beside the log; a socket whose worker
has died is removed by the first that rings it in vain.
"""

from __future__ import annotations

import contextlib
import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK
from _socket import socket as RawSocket  # not gevent's: it is rung from the writer's native thread too
from pathlib import Path


class Doorbell:
    """This worker's socket, and the ringing of all others. Raises OSError where the folder cannot be used."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Through the folder's descriptor: a Unix socket's path has at most 107 bytes, a folder's may have more.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._socket = RawSocket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
        self._others: list[str] = []
        self._listed_at = -1
        self._ringer = RawSocket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
        self._name = f"{os.getpid()}.{self._socket.fileno()}.sock"  # a process may have several
        self._place = folder / self._name
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._folder)
            self._socket.bind(self._path(self._name))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def hangs(self) -> bool:
        """Whether the others can still find it: nobody has removed it, or its folder."""
        return self._place.exists()

    def ring(self) -> None:
        """Wake every other worker. From any thread; never waits, never raises."""
        with contextlib.suppress(OSError):
            changed_at = os.fstat(self._folder).st_mtime_ns
            if changed_at != self._listed_at:
                self._others = [name for name in os.listdir(self._folder) if name != self._name]
                self._listed_at = changed_at
            for name in self._others:
                self._ring(name)

    def answer(self) -> None:
        """Take all rings that have come. Atomic: no switch."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    def close(self) -> None:
        if self._folder >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._folder)
            self._socket.close()
            self._ringer.close()
            os.close(self._folder)
            self._folder = -1

    def _ring(self, name: str) -> None:
        try:
            self._ringer.sendto(b"!", self._path(name))
        except BlockingIOError:
            pass  # its queue is full of rings: it will look
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
        except OSError:
            pass

    def _path(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder}/{name}"
