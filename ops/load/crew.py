"""The crew: the processes of one replay, readers and a sender, and the line of JSON that each says each second."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

READY_SECONDS = 120.0
END_SECONDS = 10.0
PROGRAM = Path(__file__).resolve().parent


class CrewError(Exception):
    """A process of the crew has died, or does not answer."""


class Member:
    """One process. role: `readers` or `sender`. done: it has said its last word."""

    def __init__(self, role: str, order: dict[str, Any]) -> None:
        self.role = role
        self._process = subprocess.Popen([sys.executable, "-E", str(PROGRAM), role], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True)  # a Ctrl-C is for the parent
        self._rest = b""
        self.done = False
        self.tell(order)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CrewError(f"the {self.role} have died") from None

    def answers(self) -> Iterator[dict[str, Any]]:
        """What it has said; waits for the first byte. Raises CrewError at its end."""
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            raise CrewError(f"the {self.role} have died")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self.done = "sent" in answer or "verdict" in answer
            yield answer

    def stop(self, deadline: float) -> None:
        """End it. Idempotent."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Crew:
    """Readers and a sender that were told their orders. Use it in a `with` block."""

    def __init__(self, orders: list[tuple[str, dict[str, Any]]]) -> None:
        self.members: list[Member] = []
        try:
            for role, order in orders:
                self.members.append(Member(role, order))
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        for member in self.members:
            member.stop(deadline)
        self.members = []

    def said(self, seconds: float) -> Iterator[tuple[Member, dict[str, Any]]]:
        """What its members say within this time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and (busy := [each for each in self.members if not each.done]):
            for member in select.select(busy, [], [], left)[0]:
                for answer in member.answers():
                    yield member, answer

    def wait_ready(self) -> None:
        waiting = set(self.members)
        for member, answer in self.said(READY_SECONDS):
            if answer.get("ready"):
                waiting.discard(member)
            if not waiting:
                return
        raise CrewError(f"{len(waiting)} processes are not ready after {READY_SECONDS:g} s")

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]
