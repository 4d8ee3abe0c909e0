"""The whole suite, some files at a time: most tests wait for processes of theirs, not for the processor.

    python -m tests [--jobs N] [arguments of pytest for every file ...]

Each file is a pytest of its own. What one prints is shown when it fails. Exit codes: 0 all passed, 1 not, 130 broken off.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parent
FIRST = ("chat_replay", "machines", "sqlite_faults", "parking", "resume", "redis", "doctor", "five_limits", "load",
         "brokers", "stop", "publish_api", "redis_stress", "plan", "proxies", "console")  # they take longest
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)")
NOTHING_COLLECTED = 5  # pytest's exit status
LOOK_SECONDS = 0.1


@dataclass
class Run:
    """The pytest of one file, and what it prints."""

    path: Path
    output: IO[bytes]
    process: subprocess.Popen[bytes]
    began: float

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


def start(path: Path, arguments: Sequence[str]) -> Run:
    output = tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-p no:anyio", "-q", "-rs", str(path), *arguments]
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    return Run(path, output, process, time.monotonic())


def finish(run: Run, counts: Counter[str]) -> bool:
    """Tell how a file went; whether it went well."""
    text = run.text()
    summary = text.rstrip().rpartition("\n")[2]
    counts.update({word.rstrip("s") if word.startswith("error") else word: int(number)
                   for number, word in COUNT.findall(summary)})
    good = run.process.returncode in (0, NOTHING_COLLECTED)
    if not good:
        print(text)
    told = ", ".join(f"{number} {word}" for number, word in COUNT.findall(summary)) or f"exit {run.process.returncode}"
    skips = [line for line in text.splitlines() if line.startswith("SKIPPED")]
    took = time.monotonic() - run.began
    print(f"{'' if good else 'FAILED '}{run.path.name} {told} in {took:.0f} s", *skips, sep="\n  ", flush=True)
    run.output.close()
    return good


def in_order(paths: Sequence[Path]) -> list[Path]:
    names = [path.stem.removeprefix("test_") for path in paths]
    ranks = {name: FIRST.index(name) if name in FIRST else len(FIRST) for name in names}
    return sorted(paths, key=lambda path: (ranks[path.stem.removeprefix("test_")], path.name))


def run_all(jobs: int, arguments: Sequence[str]) -> tuple[bool, Counter[str]]:
    waiting, running, counts, good = in_order(list(TESTS.glob("test_*.py"))), list[Run](), Counter[str](), True
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), arguments))
            time.sleep(LOOK_SECONDS)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                good = finish(run, counts) and good
    finally:
        for run in running:
            os.killpg(run.process.pid, signal.SIGINT)
        for run in running:
            run.process.wait()
    return good, counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1,
                        help="files at a time (default %(default)s)")
    options, arguments = parser.parse_known_args()
    began = time.monotonic()
    try:
        good, counts = run_all(options.jobs, arguments)
    except KeyboardInterrupt:
        return 130
    told = ", ".join(f"{number:,} {word}" for word, number in counts.items())
    print(f"{told} in {time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
