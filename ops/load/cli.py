"""The command line. Results go to standard output, as text or with `--json`; progress goes to standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import servers
from build import BuildError
from fleet import run, say_progress
from servers import ServerError

from load import readers, sender
from load.crew import CrewError
from load.figures import differences, figures
from load.recording import read_recording
from load.replay import Plan, replay
from load.report import page
from load.shape import Shape, ShapeError, expanded, read_shape, write_shape
from load.table import read_table
from load.targets import FORMS, address_of, server_of, token_of
from load.watch import listeners

OK, BROKEN, CANNOT = 0, 1, 2
EPILOG = """exit codes:
  0  done, and what was asked for holds
  1  it does not hold: events lost, doubled or out of order, an objective broken, shapes that differ
  2  it cannot be done: a wrong argument or file, no server
  130  broken off by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["readers"], ["sender"]):  # one of the processes of a replay
        {"readers": readers.main, "sender": sender.main}[arguments[0]]()
        return OK
    options = _parser().parse_args(arguments)
    try:
        return run(lambda: int(options.command(options)))
    except (ShapeError, ServerError, BuildError, CrewError, OSError, ValueError) as error:
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
    return _written(options, read_table(options.table))


def _add_record(commands: Any) -> None:
    parser = _command(commands, "record", _record, "Make a shape of what a service has recorded in PUSHSVC_RECORD_DIR.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="SHAPE")


def _record(options: argparse.Namespace) -> int:
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
    return "\n".join(f"{name:24}{value:>12g}" for name, value in found.items())


def _add_expansion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speed", type=_positive, default=1.0, help="how many times as fast (%(default)g)")
    parser.add_argument("--times", type=int, default=1, help="copies of the population (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.1,
                        help="the part of the duration over which the copies begin (%(default)g)")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _add_compare(commands: Any) -> None:
    parser = _command(commands, "compare", _compare, "Whether two shapes are alike: rates, lifetimes, sizes, fan-outs.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="as a part of the larger (%(default)g)")
    parser.add_argument_group("the first is expanded before it is compared")
    _add_expansion(parser)


def _compare(options: argparse.Namespace) -> int:
    first = expanded(read_shape(options.first), options.times, options.speed, options.spread)
    found = differences(first, read_shape(options.second), options.tolerance)
    alike = all(each.alike for each in found)
    rows = [f"{each.name:24}{each.first:>12g}{each.second:>12g}  {'alike' if each.alike else 'DIFFERENT'}"
            for each in found]
    _print(options, {"alike": alike, "figures": {each.name: [each.first, each.second, each.alike] for each in found}},
           "\n".join(rows))
    return OK if alike else BROKEN


# -- replay


def _add_replay(commands: Any) -> None:
    parser = _command(commands, "replay", _replay, "Replay a shape against a server, and verify what each stream gets.")
    parser.add_argument("shape", type=Path)
    _add_expansion(parser)
    _add_server(parser)
    parser.add_argument("--breaks", type=float, default=0.0, metavar="SECONDS",
                        help="break each stream every so many seconds on average; it resumes (0: never)")
    parser.add_argument("--readers", type=int, default=2, help="processes that read, at least (%(default)s)")
    parser.add_argument("--settle", type=float, default=15.0, metavar="SECONDS",
                        help="how long the last events may take (%(default)g)")
    parser.add_argument("--p99", type=float, metavar="MS", help="an objective: exit code 1 if the p99 latency is above")
    parser.add_argument("--label", default="", help="what the report calls this run")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="where the result goes as JSON")
    parser.add_argument("--report", type=Path, metavar="HTML", help="where the result goes as a page")


def _add_server(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    where.add_argument("--start", choices=sorted(FORMS), help="start this server for the run")
    parser.add_argument("--server", choices=sorted(FORMS), default="pushsvc", help="which kind it is (%(default)s)")
    parser.add_argument("--token", default="", help="sent as a bearer token")
    parser.add_argument("--pids", default="", help="its processes on this machine (default: those that have its port)")
    parser.add_argument("--workers", type=int, default=2, help="of a pushsvc that is started (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of a pushsvc that is started, PUSHSVC_...")


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """host, port, form, token, pids and about (versions) of the server that the options name, or that they start."""
    if not options.start:
        host, port = address_of(options.url)
        pids = [int(pid) for pid in options.pids.split(",") if pid] or (
            listeners(port) if host.startswith("127.") or host == "localhost" else [])
        yield {"host": host, "port": port, "form": options.server, "token": options.token, "pids": pids,
               "about": {"url": options.url}}
        return
    server = server_of(options.start, options.workers, dict(each.split("=", 1) for each in options.set))
    with servers.running(server) as pids:
        yield {"host": servers.HOST, "port": server.port, "form": options.start, "token": token_of(server), "pids": pids,
               "about": {"version": server.version(), "workers": len(pids)}}


def _replay(options: argparse.Namespace) -> int:
    with _served(options) as server:
        pids, about = server.pop("pids"), server.pop("about")
        plan = Plan(options.shape, **server, label=options.label, speed=options.speed, times=options.times,
                    spread=options.spread, breaks=options.breaks, processes=options.readers, settle=options.settle)
        found = replay(plan, pids, say_progress, about)
    found["objective"] = {"p99_ms": options.p99}
    return _told(options, found)


def _told(options: argparse.Namespace, found: dict[str, Any]) -> int:
    if options.output:
        options.output.write_text(json.dumps(found))
    if options.report:
        options.report.write_text(page([found]))
    brief = {name: value for name, value in found.items() if name not in ("seconds", "histogram", "shape")}
    _print(options, brief, _replay_text(found))
    return OK if holds(found) else BROKEN


def holds(found: dict[str, Any]) -> bool:
    """Whether a result is complete, in order, and within its objective."""
    objective, p99 = found.get("objective", {}).get("p99_ms"), found["latency"]["p99_ms"]
    return all(found["verdict"].values()) and (objective is None or (p99 is not None and p99 <= objective))


def _replay_text(found: dict[str, Any]) -> str:
    rows = {"verdict": ", ".join(f"{'' if value else 'NOT '}{name}" for name, value in found["verdict"].items()),
            **found["totals"], **{f"{name} ": value for name, value in found["wrong"].items() if name != "received"},
            **{f"latency {name}": value for name, value in found["latency"].items()},
            **{f"acknowledged {name}": value for name, value in found["acknowledged"].items()},
            **{f"opening {name}": value for name, value in found["opening"].items()},
            **{f"late {role}, ms": value for role, value in found["late_ms"].items()},
            "server CPU, s": found["server_cpu_seconds"], "client CPU, s": found["client_cpu_seconds"],
            **{f"error {name}": count for name, count in found["errors"].items()}}
    return "\n".join(f"{name:24}{value}" for name, value in rows.items())


# -- report


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "One page of several results, side by side.")
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HTML")


def _report(options: argparse.Namespace) -> int:
    results = [json.loads(path.read_text()) for path in options.results]
    options.output.write_text(page(results))
    _print(options, {"written": str(options.output), "results": len(results)}, f"{options.output} has {len(results)}")
    return OK
