#!/usr/bin/env python3
"""A fleet: several swarm processes as one client. 15,000 streams per process, each process from three source addresses
of its own (127.0.1.2, 127.0.2.2, 127.0.3.2, ...): one has about 28,000 ports, of which the kernel tries one half first,
and the fuller that half is, the longer it looks for a free one.

As a program it opens streams to any server of event streams on this machine, says what arrives, and ends.
Exit codes: 0 all streams opened and stayed, 1 not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import probe
from swarm import BUCKETS_PER_E, Target
from terminal import answered

SOURCES = 3  # addresses of one process
PER_PROCESS = 15_000
ANSWER_SECONDS = 60.0
OPEN_SECONDS = 900.0
END_SECONDS = 10.0
PROGRAM = Path(__file__).with_name("swarm.py")


class FleetError(Exception):
    """A swarm process died or did not answer in time."""


@dataclass(slots=True)
class Seen:
    """What all streams have seen since the last reset, merged."""

    open: int = 0
    ended: int = 0
    failed: int = 0
    events: int = 0
    bytes: int = 0
    reads: int = 0
    disorder: int = 0
    first_at: int = 0
    last_at: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, answer: dict[str, Any]) -> None:
        for name in ("open", "ended", "failed", "events", "bytes", "reads", "disorder"):
            setattr(self, name, getattr(self, name) + answer[name])
        firsts = [at for at in (self.first_at, answer["first_at"]) if at]
        self.first_at = min(firsts, default=0)
        self.last_at = max(self.last_at, answer["last_at"])
        self.latency.update({int(bucket): count for bucket, count in answer["latency"].items()})
        self.errors.update(answer["errors"])

    def percentile_ms(self, part: float) -> float | None:
        """The latency that `part` of the events did not exceed; None if there were none."""
        return percentile_ms(self.latency, part)

    def latencies(self) -> dict[str, float | None]:
        return {"p50_ms": self.percentile_ms(0.5), "p99_ms": self.percentile_ms(0.99), "max_ms": self.percentile_ms(1)}


def percentile_ms(latency: Mapping[int, int], part: float) -> float | None:
    """The upper end of the bucket that `part` of the counts in `latency` do not exceed, in ms; None for no counts."""
    left = part * sum(latency.values())
    for bucket, count in sorted(latency.items()):
        left -= count
        if left <= 0 and count:
            return round(math.exp((bucket + 1) / BUCKETS_PER_E) / 1000, 2)
    return None


def say_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Fleet:
    """`processes` swarms; `cores`: those that they may use. Call `stop()`, or use it in a `with` block.

    arrived: how many events had come since the last reset, by the latest news (see `follow`).

    watch: called at least once a second while the fleet waits; what it raises ends the wait.
    """

    def __init__(self, processes: int = 1, cores: Iterable[int] | None = None,
                 watch: Callable[[], None] = lambda: None) -> None:
        self.arrived = 0
        self._watch = watch
        self._processes = [_start(cores) for _ in range(processes)]
        self._open = [0] * processes
        self._next = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def open(self, total: int, target: Target, rate: float = 0, progress: Callable[[int], None] = lambda _: None,
             seconds: float = OPEN_SECONDS) -> Seen:
        """Open `total` more streams, shared by the processes; return when each is open or has failed."""
        commands = []
        for place, share in enumerate(_shares(total, len(self._processes))):
            about = asdict(target) | {"source": target.source or sources(target.host, place)}
            commands.append({"do": "open", "target": about, "count": share, "first": self._next,
                             "rate": rate * share / total})
            self._next += share
        return self._ask(commands, seconds, progress)

    def stats(self) -> Seen:
        return self._all({"do": "stats"})

    def reset(self) -> Seen:
        """Forget the stats and the numbers of past events; the streams stay."""
        return self._all({"do": "reset"})

    def close(self, abort: bool = False) -> Seen:
        """Hang up on all streams, or reset them; numbering begins anew."""
        self._next = 0
        return self._all({"do": "close", "abort": abort})

    def wait(self, events: int, seconds: float) -> Seen:
        """Wait until each stream has had `events` since the last reset, or for so long."""
        shares = [answer["open"] * events for answer in self._answers([{"do": "stats"}] * len(self._processes))]
        commands = [{"do": "wait", "events": share, "seconds": seconds} for share in shares]
        return self._ask(commands, seconds + ANSWER_SECONDS)

    def follow(self, seconds: float) -> None:
        """From now on there is news of `arrived`, so many seconds apart; 0: no longer. For a fleet of one process."""
        self._all({"do": "follow", "seconds": seconds})

    def fileno(self) -> int:
        """What becomes readable when there is news."""
        (process,) = self._processes
        assert process.stdout is not None
        return process.stdout.fileno()

    def read_news(self) -> None:
        """Take one piece of news. Waits for it."""
        self.arrived = self._line(0)["arrived"]

    def stop(self) -> None:
        """End the processes. Idempotent."""
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []

    def _all(self, command: dict[str, Any]) -> Seen:
        return self._ask([command] * len(self._processes))

    def _ask(self, commands: Sequence[dict[str, Any]], seconds: float = ANSWER_SECONDS,
             progress: Callable[[int], None] = lambda _: None) -> Seen:
        seen = Seen()
        for answer in self._answers(commands, seconds, progress):
            seen.add(answer)
        return seen

    def _answers(self, commands: Sequence[dict[str, Any]], seconds: float = ANSWER_SECONDS,
                 progress: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
        for process, command in zip(self._processes, commands, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        waiting = {process.stdout.fileno(): place for place, process in enumerate(self._processes) if process.stdout}
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + seconds
        while waiting:
            self._watch()
            if time.monotonic() > deadline:
                raise FleetError(f"{len(waiting)} client processes did not answer in {seconds:g} s")
            for fd in select.select(list(waiting), [], [], 1.0)[0]:
                place = waiting[fd]
                answer = self._line(place)
                if "progress" in answer:
                    self._open[place] = answer["progress"]
                    progress(sum(self._open))
                elif "arrived" in answer:
                    self.arrived = answer["arrived"]
                else:
                    answers[place] = answer
                    del waiting[fd]
        return [answers[place] for place in sorted(answers)]

    def _line(self, place: int) -> dict[str, Any]:
        stdout = self._processes[place].stdout
        line = stdout.readline() if stdout else b""
        if not line:
            raise FleetError("a client process has died")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _start(cores: Iterable[int] | None) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-E", str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               bufsize=0, start_new_session=True)  # a Ctrl-C is for the bench, which ends it
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def sources(host: str, place: int) -> str:
    """The addresses of process number `place`, separated by commas; for another machine the kernel's choice."""
    if not host.startswith("127."):
        return ""
    return ",".join(f"127.{place // 250}.{turn}.{place % 250 + 2}" for turn in range(1, SOURCES + 1))


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (place < total % parts) for place in range(parts)]


def leave_terminal() -> None:
    """A SIGHUP has come, of which the kernel and the shell may send one each: ignore further ones, and say nothing more
    to a terminal that is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    for descriptor, event in poll.poll(0):
        if event & select.POLLHUP:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def run(main: Callable[[], int]) -> int:
    """A program's exit code; a SIGTERM or a SIGHUP ends it as a Ctrl-C does, with its `finally` blocks: then it is
    130."""

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has asked for that
        signal.signal(signal.SIGHUP, end)
    try:
        return answered(main)
    except KeyboardInterrupt:
        say_progress("broken off")
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--path", default="/events?topic=bench", help="{} in it is the stream's number (%(default)s)")
    parser.add_argument("--modulo", type=int, default=0, help="that number modulo this")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0, help="streams per second (0: as fast as they are answered)")
    parser.add_argument("--seconds", type=float, default=10, help="how long to listen (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    target = Target(options.host, options.port, options.path, modulo=options.modulo)
    with Fleet(math.ceil(options.streams / PER_PROCESS)) as fleet:
        begun = time.monotonic()
        fleet.open(options.streams, target, options.rate, lambda count: say_progress(f"{count} streams"))
        opened = time.monotonic() - begun
        time.sleep(options.seconds)
        seen, cpu = fleet.stats(), probe.cpu_seconds(fleet.pids)
    found = {name: value for name, value in asdict(seen).items() if name != "latency"}
    found |= seen.latencies() | {"seconds_to_open": round(opened, 2), "client_cpu_seconds": round(cpu, 2)}
    text = "\n".join(f"{name:20}{value}" for name, value in found.items())
    print(json.dumps(found, indent=2) if options.json else text)
    return 0 if seen.open == options.streams else 1


if __name__ == "__main__":
    sys.exit(run(main))
