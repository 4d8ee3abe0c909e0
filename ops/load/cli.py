"""The command line. Results go to standard output, as text or with `--json`; progress goes to standard error."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import probe
import servers
from build import BuildError
from fleet import FleetError, run, say_progress
from publisher import PublishError
from servers import ServerError
from swarm import authority, resolved
from terminal import Progress

from load.arguments import not_negative, percents, pids, positive, setting, source_addresses, whole
from load.crew import CrewError
from load.dark import Dark, Site, Test
from load.figures import SLACKS, differences, figures
from load.metrics import version_said
from load.ramp import RATE, STREAMS, Climb, Ramp
from load.recording import read_recording
from load.replay import FORMAT, Plan, replay
from load.report import page, read_result
from load.shape import Shape, ShapeError, expanded, read_shape, write_shape
from load.table import read_table
from load.targets import FORMS, address_of, processes_of, server_of, token_of, workers_of
from load.watch import listeners

OK, BROKEN, CANNOT, INTERRUPTED = 0, 1, 2, 130
KNOCK_SECONDS = 5.0
EPILOG = """exit codes:
  0  done, and what was asked for holds
  1  it does not hold: streams not opened, events lost, doubled or out of order, an objective broken, shapes that differ
  2  it cannot be done: a wrong argument or file, no server, a dark test that no page has joined
  130  broken off by Ctrl-C; a replay writes what it has, and a second Ctrl-C ends it at once
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return run(lambda: int(options.command(options)))
    except (ShapeError, ServerError, BuildError, CrewError, FleetError, PublishError, OSError, ValueError) as error:
        print(f"load: {error}", file=sys.stderr)
        return CANNOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python ops/load", description="Load tests with the shape of real traffic.",
                                     epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_import(commands)
    _add_record(commands)
    _add_show(commands)
    _add_compare(commands)
    _add_replay(commands)
    _add_ramp(commands)
    _add_dark(commands)
    _add_report(commands)
    return parser


def _command(commands: Any, name: str, command: Callable[[argparse.Namespace], int],
             text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EPILOG,
                                                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def _print(options: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    print(json.dumps(found, indent=2) if options.json else text)


# -- shapes


def _add_import(commands: Any) -> None:
    parser = _command(commands, "import", _import, "Make a shape of a table of a chat (CSV).")
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="SHAPE")


def _import(options: argparse.Namespace) -> int:
    _check_apart(options.output, options.table)
    return _written(options, read_table(options.table))


def _add_record(commands: Any) -> None:
    parser = _command(commands, "record", _record, "Make a shape of what a service has recorded in PUSHSVC_RECORD_DIR.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="SHAPE")


def _record(options: argparse.Namespace) -> int:
    _check_apart(options.output, *options.folder.glob("*.jsonl"))
    return _written(options, read_recording(options.folder))


def _written(options: argparse.Namespace, shape: Shape) -> int:
    write_shape(options.output, shape)
    found = figures(shape)
    _print(options, found, _figures_text(found))
    return OK


def _add_show(commands: Any) -> None:
    parser = _command(commands, "show", _show, "The figures of a shape.")
    parser.add_argument("shape", type=Path)
    _add_expansion(parser)


def _show(options: argparse.Namespace) -> int:
    found = figures(expanded(read_shape(options.shape), options.times, options.speed, options.spread))
    _print(options, found, _figures_text(found))
    return OK


def _figures_text(found: dict[str, float]) -> str:
    return "\n".join(f"{name:23} {value:>12g}" for name, value in found.items())


def _add_expansion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speed", type=positive, default=1.0, help="how many times as fast (%(default)g)")
    parser.add_argument("--times", type=whole(1), default=1, help="copies of the population (%(default)s)")
    parser.add_argument("--spread", type=not_negative, default=0.1,
                        help="the part of the duration over which the copies begin (%(default)g)")


def _add_compare(commands: Any) -> None:
    parser = _command(commands, "compare", _compare, "Whether two shapes are alike: rates, lifetimes, sizes, fan-outs.")
    parser.epilog = f"{SLACKS}\n\n{EPILOG}"
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--tolerance", type=not_negative, default=0.1, help="as a part of the larger (%(default)g)")
    parser.add_argument_group("the first is expanded before it is compared")
    _add_expansion(parser)


def _compare(options: argparse.Namespace) -> int:
    first = expanded(read_shape(options.first), options.times, options.speed, options.spread)
    found = differences(first, read_shape(options.second), options.tolerance)
    alike = all(each.alike for each in found)
    says = {"tolerance": f"alike, within {options.tolerance:.3g}", "slack": "alike, within its slack", "": "DIFFERENT"}
    rows = [f"{each.name:23} {each.first:>12g} {each.second:>12g}  {says[each.by]}" for each in found]
    _print(options, {"alike": alike, "figures": {each.name: [each.first, each.second, each.alike, each.by]
                                                 for each in found}}, "\n".join(rows))
    return OK if alike else BROKEN


# -- replay


def _add_replay(commands: Any) -> None:
    parser = _command(commands, "replay", _replay, "Replay a shape against a server, and verify what each stream gets.")
    parser.add_argument("shape", type=Path)
    _add_expansion(parser)
    _add_server(parser)
    parser.add_argument("--breaks", type=not_negative, default=0.0, metavar="SECONDS",
                        help="break each stream every so many seconds on average; it resumes (0: never)")
    parser.add_argument("--readers", type=whole(1), default=2, help="processes that read, at least (%(default)s)")
    parser.add_argument("--settle", type=not_negative, default=15.0, metavar="SECONDS",
                        help="how long the last events and streams may take (%(default)g)")
    parser.add_argument("--p99", type=positive, metavar="MS",
                        help="an objective: exit code 1 if the p99 latency is above")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", default="", help="what the report calls this run")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="where the result goes as JSON")
    parser.add_argument("--report", type=Path, metavar="HTML", help="where the result goes as a page")


def _check_outputs(options: argparse.Namespace, *read: Path) -> None:
    """Raises ValueError if the result could not be written, or only over what is `read`: that is known before the run and
    not after it."""
    for path in filter(None, (options.output, options.report)):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written")
        _check_apart(path, *read)
    if options.output and options.report and _is_same(options.output, options.report):
        raise ValueError(f"{options.output} cannot be both the result and its page")


def _check_apart(output: Path, *read: Path) -> None:
    """Raises ValueError if the output is one of the files that are read."""
    if any(_is_same(output, each) for each in read):
        raise ValueError(f"{output} is what is read, and would be overwritten")


def _is_same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.is_file() and one.samefile(other)
    return one.resolve() == other.resolve()


def _add_server(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    where.add_argument("--start", choices=sorted(FORMS), help="start this server for the run")
    parser.add_argument("--server", choices=sorted(FORMS), default="pushsvc", help="which kind it is (%(default)s)")
    parser.add_argument("--token", default="", help="sent as a bearer token, by streams and publishes")
    parser.add_argument("--pids", type=pids, default="",
                        help="its processes on this machine (default: those that have its port)")
    parser.add_argument("--sources", type=source_addresses, default="", metavar="ADDRESS,...",
                        help="addresses of this machine that the streams come from, in turns (default: the kernel's "
                             "choice; several of loopback for a server there)")
    parser.add_argument("--workers", type=whole(1), default=2, help="of a pushsvc or nchan that is started (%(default)s)")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of a pushsvc that is started, PUSHSVC_...")


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """host, port, form, token, pids and about (versions) of the server that the options name, or that they start."""
    if options.set and options.start != "pushsvc":
        raise ValueError("--set is for --start pushsvc")
    if not options.start:
        host, port = address_of(options.url)
        _knock(host, port, "--url")
        if options.sources and resolved(host, port)[0] != socket.AF_INET:
            raise ValueError(f"--sources are IPv4 addresses, and {host} has none")
        pids = options.pids or (listeners(port) if host.startswith("127.") or host in ("localhost", "::1") else [])
        yield {"host": host, "port": port, "form": options.server, "token": options.token, "pids": pids,
               "about": {"url": options.url, "version": version_said(host, port, options.server, options.token)}}
        return
    settings = dict(options.set)
    server = server_of(options.start, options.workers, settings)
    with servers.running(server):
        pids = processes_of(server)
        yield {"host": servers.HOST, "port": server.port, "form": options.start, "token": token_of(server), "pids": pids,
               "about": {"version": server.version(), "workers": workers_of(server, pids),
                         **{name: told_value(name, value) for name, value in settings.items()}}}


def told_value(name: str, value: str) -> str:
    """As a report may show it: no key, and no password of an address."""
    return "(hidden)" if name.endswith("KEY") else re.sub(r"//[^/@]*@", "//(hidden)@", value)


def _knock(host: str, port: int, argument: str) -> None:
    """Raises OSError if nobody listens there: clients that are refused for an hour tell nothing. argument: its name."""
    try:
        socket.create_connection((host, port), KNOCK_SECONDS).close()
    except OSError as error:
        raise OSError(f"nobody answers on {authority(host, port)} ({argument}): {error.strerror or error}") from error


def _check_shape(path: Path) -> None:
    """Raises ShapeError for a shape that could verify nothing: that is told before anything is started."""
    shape = read_shape(path)
    topics = {topic for each in shape.streams for topic in each.topics}
    if topics.isdisjoint(topic for each in shape.events for topic in each.topics):
        raise ShapeError(f"{path}: nothing to replay: of its {len(shape.events)} events none is for one of its "
                         f"{len(shape.streams)} streams")


def _replay(options: argparse.Namespace) -> int:
    _check_shape(options.shape)
    _check_outputs(options, options.shape)
    with _served(options) as server:
        pids, about = server.pop("pids"), server.pop("about")
        plan = Plan(options.shape, **server, label=options.label, speed=options.speed, times=options.times,
                    spread=options.spread, breaks=options.breaks, processes=options.readers, settle=options.settle,
                    sources=options.sources)
        with Progress() as progress:
            found = replay(plan, pids, progress, about)
    found["objective"] = {"p99_ms": options.p99}
    return _told(options, found)


def _told(options: argparse.Namespace, found: dict[str, Any]) -> int:
    brief = {name: value for name, value in found.items() if name not in ("seconds", "histogram", "shape")}
    _print(options, brief, replay_text(found))
    _save(options, found)
    if found["interrupted"] is not None:
        say_progress(f"broken off{_written_to(options)}")
        return INTERRUPTED
    return OK if holds(found) else BROKEN


def _written_to(options: argparse.Namespace) -> str:
    """Where the result has gone, as the end of a sentence; "" for nowhere."""
    paths = [str(path) for path in (options.output, options.report) if path]
    return f"; what there is of it is in {' and '.join(paths)}" if paths else ""


def _save(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Where the options say. Comes after what is printed, so that a full disk does not lose it. Raises OSError."""
    for path, text in ((options.output, json.dumps(found)), (options.report, page([found]) if options.report else "")):
        try:
            if path:
                path.write_text(text)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error


def holds(found: dict[str, Any]) -> bool:
    """Whether a result is complete, in order, and within its objective."""
    objective, p99 = found.get("objective", {}).get("p99_ms"), found["latency"]["p99_ms"]
    return all(found["verdict"].values()) and (objective is None or (p99 is not None and p99 <= objective))


def replay_text(found: dict[str, Any]) -> str:
    interrupted = {} if found["interrupted"] is None else {"broken off after, s": found["interrupted"]}
    verdict = ", ".join(f"{'' if value else 'NOT '}{name}" for name, value in found["verdict"].items())
    rows = {**interrupted, "verdict": verdict, **found["totals"],
            **{f"{name} ": value for name, value in found["wrong"].items() if name != "received"},
            **{f"latency {name}": value for name, value in found["latency"].items()},
            **{f"acknowledged {name}": value for name, value in found["acknowledged"].items()},
            **{f"opening {name}": value for name, value in found["opening"].items()},
            **{f"late {role}, ms": value for role, value in found["late_ms"].items()},
            "server CPU, s": found["server_cpu_seconds"], "client CPU, s": found["client_cpu_seconds"],
            **{f"error {name}": count for name, count in found["errors"].items()}}
    return "\n".join(f"{name:23} {value}" for name, value in rows.items())


# -- ramp


def _add_ramp(commands: Any) -> None:
    parser = _command(commands, "ramp", _ramp, "Raise the streams or the rate until an objective breaks, and say which "
                      "limit it was. Exit code 1 if it breaks.")
    _add_server(parser)
    parser.add_argument("--raise", dest="raise_", choices=(STREAMS, RATE), default=STREAMS, help="(%(default)s)")
    parser.add_argument("--step", type=whole(1), default=1000, help="how much more at each level (%(default)s)")
    parser.add_argument("--most", type=whole(1), default=15_000, help="the last level (%(default)s)")
    parser.add_argument("--streams", type=whole(1), default=1000, help="when the rate is raised (%(default)s)")
    parser.add_argument("--rate", type=positive, default=20.0, help="events/s when streams are raised (%(default)g)")
    parser.add_argument("--topics", type=whole(1), default=1, help="streams and events are spread over (%(default)s)")
    parser.add_argument("--hold", type=positive, default=5.0, metavar="SECONDS", help="of each level (%(default)g)")
    parser.add_argument("--p99", type=positive, default=1000.0, metavar="MS", help="the objective (%(default)g)")
    parser.add_argument("--errors", type=whole(0), default=0, help="streams or deliveries that may fail (%(default)s)")
    _add_output(parser)


def _ramp(options: argparse.Namespace) -> int:
    _check_outputs(options)
    climb = Climb(options.raise_, options.step, options.most, options.streams, options.rate, options.topics, options.hold,
                  options.p99, options.errors, options.sources)
    with _served(options) as server:
        form = FORMS[server["form"]](server["token"])
        with Progress() as progress:
            found = Ramp(climb, form, server["host"], server["port"], server["pids"], progress).run()
    return _climbed(options, found | {"label": options.label or server["form"], "about": server["about"]}, asdict(climb))


def _climbed(options: argparse.Namespace, found: dict[str, Any], settings: dict[str, Any]) -> int:
    found |= {"load": FORMAT, "at": probe.now(), "machine": probe.machine(), "settings": settings,
              "objective": {"p99_ms": options.p99}}
    _print(options, found, "\n".join([found["verdict_text"], *(f"limit: {each}" for each in found["limits"])]))
    _save(options, found)
    if not found.get("measured", True):
        return CANNOT
    return BROKEN if found["broken"] else OK


# -- dark


def _add_dark(commands: Any) -> None:
    parser = _command(commands, "dark", _dark, "Have real pages open extra streams to a canary, more and more of them, "
                      "until the objective breaks. Exit code 1 if it breaks. The pages opt in with dark.js.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service of the pages (%(default)s)")
    parser.add_argument("--token", default="", help="for its orders")
    parser.add_argument("--canary", required=True, metavar="URL", help="the canary, as this command reaches it")
    parser.add_argument("--canary-token", default="", help="for the command's own stream and events")
    parser.add_argument("--open", default="", metavar="URL", help="what the pages open (CANARY/events?topic=dark)")
    parser.add_argument("--topic", default="pushsvc-dark", help="of the orders (%(default)s)")
    parser.add_argument("--streams", type=whole(1), default=1, help="extra streams of each page (%(default)s)")
    parser.add_argument("--percent", type=percents, default="1,2,5,10,20,50,100",
                        help="of the pages, level by level (%(default)s)")
    parser.add_argument("--hold", type=positive, default=60.0, metavar="SECONDS", help="of each level (%(default)g)")
    parser.add_argument("--p99", type=positive, default=500.0, metavar="MS", help="the objective (%(default)g)")
    parser.add_argument("--most", type=whole(0), default=0, help="streams on the canary at which to stop (0: no bound)")
    _add_output(parser)


def _dark(options: argparse.Namespace) -> int:
    _check_outputs(options)
    url = options.open or f"{options.canary.rstrip('/')}/events?topic=dark"
    test = Test(options.topic, url, options.streams, options.percent, options.hold, options.p99, options.most)
    service = Site(*address_of(options.url), options.token)
    canary = Site(*address_of(options.canary), options.canary_token)
    for site, argument in ((service, "--url, the service"), (canary, "--canary")):
        _knock(site.host, site.port, argument)
    with Progress() as progress:
        found = Dark(test, service, canary, progress).run()
    found |= {"label": options.label or options.canary, "about": {
        "url": options.url, "canary": options.canary,
        "version": version_said(canary.host, canary.port, "pushsvc", canary.token)}}
    return _climbed(options, found, asdict(test))


# -- report


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "One page of several results, side by side.")
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HTML")


def _report(options: argparse.Namespace) -> int:
    _check_apart(options.output, *options.results)
    results = [read_result(path) for path in options.results]
    options.output.write_text(page(results))
    _print(options, {"written": str(options.output), "results": len(results)}, f"{options.output} has {len(results)}")
    return OK
