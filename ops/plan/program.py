"""What a load needs on this machine, and what it would meet first.

Measures for half a minute what things cost here (the real service on loopback, some thousand streams), keeps that in a
file, and reckons with it: workers, memory, bandwidth, descriptors, processor time, and the walls with what moves them.
PUSHSVC_* variables count as they would for the service. docs/plan.md tells how it is reckoned.

Exit codes: 0 the load fits; 1 a wall is in its way; 2 bad input, or the calibration could not be read or made; 130
broken off (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType

from ops.bench.terminal import Progress
from ops.plan import calibration, sheet
from ops.plan.calibration import Calibration
from ops.plan.errors import PlanError
from ops.plan.kernel import too_small
from ops.plan.load import Load
from ops.plan.machine import Machine
from ops.plan.needs import needs
from ops.plan.walls import walls
from pushsvc.errors import SettingsError
from pushsvc.settings import Settings

FILE = Path(__file__).resolve().parents[2] / "var" / "calibration.json"
SAMPLE = 12_000
MOST_GIVEN = 1e9  # of cores, gigabytes and the like


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has asked for that
            signal.signal(number, _end)
    try:
        _check_given(options)
        given = {each.name: getattr(options, each.name) for each in fields(Load)}
        load = Load(**{name: value for name, value in given.items() if value is not None})
        settings = Settings.from_environ(os.environ)
        _check_settings(load, settings)
        costs = _calibration(options)
    except (PlanError, SettingsError) as error:
        print(f"plan: {error.detail if isinstance(error, SettingsError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("broken off", file=sys.stderr)
        return 130
    return _show(load, _machine(options, costs.machine), settings, costs, options.json)


def _show(load: Load, machine: Machine, settings: Settings, known: Calibration, is_json: bool) -> int:
    need = needs(load, known.costs, machine, settings)
    found = walls(load, known.costs, machine, settings, need)
    small = too_small(load, machine, settings, need)
    if is_json:
        print(json.dumps(sheet.as_json(load, machine, settings, known, need, found, small), indent=1))
    else:
        print(sheet.as_text(load, machine, settings, known, need, found, small))
    return 0 if sheet.fits(found) else 1


def _calibration(options: argparse.Namespace) -> Calibration:
    """The one that is asked for; a new one if that is asked for, or if none is and there is none. Raises PlanError."""
    path = options.calibration or FILE
    if not options.calibrate and (options.calibration or path.exists()):
        return calibration.load(path)
    calibration.check_place(path)
    from ops.plan.calibrate import Sample, calibrate  # the bench's clients: a plan from a file does without

    with Progress() as progress:
        found = calibrate(Sample(options.sample), progress)
    calibration.save(found, path)
    print(f"took {found.seconds:.0f} s, kept in {path}", file=sys.stderr)
    return found


def _machine(options: argparse.Namespace, machine: Machine) -> Machine:
    """The calibrated one, with what else is asked for."""
    asked = {"cores": options.cores, "memory_bytes": int(options.memory_gb * 1e9) if options.memory_gb else None,
             "descriptors": options.descriptors}
    return replace(machine, **{name: value for name, value in asked.items() if value is not None})


def _check_given(options: argparse.Namespace) -> None:
    """What stands for what there is, or for what is needed, unless it is given: then it is some. Raises PlanError."""
    for name in ("workers", "addresses", "cores", "memory_gb", "descriptors"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= MOST_GIVEN:
            bound = f"at most {MOST_GIVEN:g}" if value > MOST_GIVEN else "above 0"
            raise PlanError(f"{name} is {bound}, not {value:g}")


def _check_settings(load: Load, settings: Settings) -> None:
    """What the service would refuse. Raises PlanError."""
    for name, most, variable in (
            ("topics_per_stream", settings.max_topics_per_stream, "PUSHSVC_MAX_TOPICS_PER_STREAM"),
            ("event_bytes", settings.max_body_bytes, "PUSHSVC_MAX_BODY_BYTES")):
        if getattr(load, name) > most:
            raise PlanError(f"{name} is at most {most}, as {variable} says")


def _end(number: int, frame: FrameType | None) -> None:
    """As a Ctrl-C: what was started is ended."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python ops/plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default %(default)s)"
    add("--users", type=int, required=True, metavar="N", help="streams that are open at once")
    add("--messages-per-second", type=float, required=True, metavar="N", help="of all users together")
    add("--fan-out", type=float, required=True, metavar="N", help="streams that a message reaches, on average")
    add("--event-bytes", type=int, default=200, metavar="N", help="data of a message" + default)
    add("--topics-per-stream", type=int, default=2, metavar="N", help=default.strip())
    add("--group", type=int, default=1, metavar="N", help="streams that have the same topics: a user's devices" + default)
    add("--reconnects-per-hour", type=float, default=1.0, metavar="N", help="of one stream" + default)
    add("--storm-seconds", type=float, default=5.0, metavar="N", help="in which all come back after a break" + default)
    add("--proxies", type=int, default=1, metavar="N", help="addresses that proxies connect from; 0: no proxy" + default)
    add("--sockets", type=int, default=1, metavar="N", help="ends of a stream's connections on this machine: 2 with the "
        "clients here, 3 with a proxy here, 4 with both" + default)
    add("--workers", type=int, metavar="N", help="instead of as many as are needed")
    add("--addresses", type=int, metavar="N", help="to listen on, instead of as many as are needed")
    add("--cores", type=int, metavar="N", help="plan for a machine with so many")
    add("--memory-gb", type=float, metavar="N", help="plan for a machine with so much")
    add("--descriptors", type=int, metavar="N", help="plan for so many per process")
    add("--calibrate", action="store_true", help="measure anew")
    add("--calibration", type=Path, metavar="FILE", help="an earlier calibration; with --calibrate: where the new one "
        "is kept (default var/calibration.json, measured if it is missing)")
    add("--sample", type=int, default=SAMPLE, metavar="N", help="streams that a calibration opens" + default)
    add("--json", action="store_true", help="one JSON object instead of text")
    return parser
