#!/usr/bin/env python3
"""Shows one of the five limits that many streams meet: before, the symptom, and after the fix, all measured here.

  1 pending connections   2 threads   3 ports   4 descriptors   5 memory

It runs the real service, with clients of its own, in a network namespace of its own that ends with it; it takes some
seconds and needs root. The pages of docs/limits tell what the figures mean.

Exit codes: 0 the symptom and the fix showed; 1 they did not; 2 wrong usage; 3 it cannot be shown here; 130 broken off.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType

from stage import PROGRESS, NotHere, Show, raise_descriptors

from ops.bench.terminal import answered  # stage has put the project's folder on the path

MODULES = {"1": "pending", "2": "threads", "3": "ports", "4": "descriptors", "5": "memory"}
# --streams, least and most: what fills the limit, and what its other parts hold (queues, ports, the proxy)
BOUNDS = {"1": (256, 4000), "2": (1, 20_000), "3": (30, 3000), "4": (50, 10_000), "5": (1000, 20_000)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("limit", choices=MODULES)
    parser.add_argument("--streams", type=int, help="how many (each has a number of its own)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    least, most = BOUNDS[options.limit]
    if options.streams is not None and not least <= options.streams <= most:
        parser.error(f"--streams of {options.limit}: {least} to {most}")
    raise_descriptors()
    signal.signal(signal.SIGTERM, _end)
    try:
        module = importlib.import_module(MODULES[options.limit])
        with PROGRESS:
            show: Show = module.run(**({} if options.streams is None else {"streams": options.streams}))
    except (NotHere, OSError, subprocess.SubprocessError) as error:  # too few descriptors for so many, say
        print(f"show: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(show), indent=2) if options.json else _text(show))
    return 0 if show.shown else 1


def _end(number: int, frame: FrameType | None) -> None:
    """A SIGTERM ends it as a Ctrl-C does, with all that it has started."""
    raise KeyboardInterrupt


def _text(show: Show) -> str:
    lines = [f"{show.limit}. {show.title}"]
    for phase in show.phases:
        lines += [f"\n{phase.name}: {phase.what}", *(f"  {name:28}{value}" for name, value in phase.figures.items())]
    lines += ["", *(f"note: {note}" for note in show.notes)]
    return "\n".join([*lines, "the symptom and the fix showed" if show.shown else "it did NOT show as it should"])


if __name__ == "__main__":
    sys.exit(answered(main))
