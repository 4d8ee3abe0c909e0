"""Looks at a push server before it goes live: its process on this machine, and the path of a stream through the public
URL. Says what would break, and which line to change.

Exit codes: 0 nothing to change, 1 findings, 2 wrong usage, 3 something could not be examined, 130 broken off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # what the service and other tools of the house reckon with has its home there

import checks  # noqa: E402
import path  # noqa: E402
import process  # noqa: E402
import visit  # noqa: E402
from finding import Report  # noqa: E402
from host import HostError  # noqa: E402
from wire import parse  # noqa: E402

from ops.bench.terminal import Progress, answered  # noqa: E402
from ops.limits.unit import UnitError  # noqa: E402

CLEAN, FOUND, UNEXAMINED, BROKEN_OFF = 0, 1, 3, 130  # 2 is argparse's
MOST_SECONDS = 86_400


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    report = Report()
    for name, part in (("process", _process), ("path", _path)):
        if options.only in ("", name) and (name == "process" or options.url):
            report.merge(part(options))
    print(report.as_json() if options.json else report.as_text())
    return UNEXAMINED if report.failed else FOUND if report.findings else CLEAN


def _process(options: argparse.Namespace) -> Report:
    asked = checks.Asked(options.config, options.env, options.unit, options.streams, bool(options.url))
    try:
        return process.examine(asked)
    except (HostError, UnitError, OSError) as error:
        return Report(failed=[f"the process: {error}"])


def _path(options: argparse.Namespace) -> Report:
    url, publish, direct = (parse(each, options.cacert) if each else None
                            for each in (options.url, options.publish, options.direct))
    assert url is not None, "without --url there is no path"
    asked = visit.Asked(url, publish, direct, options.token, options.origin, options.proxy_config, options.seconds)
    with Progress() as progress:
        return path.examine(asked, progress)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python ops/doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="the public address: of a stream, or of the service (then a topic of "
                        "its own is used)")
    parser.add_argument("--token", default="", help="with which one may subscribe and publish there (topics doctor-*)")
    parser.add_argument("--publish", default="", metavar="URL", help="where to publish (publish beside the stream)")
    parser.add_argument("--direct", default="", metavar="URL", help="the service without the proxy, to compare headers")
    parser.add_argument("--origin", default="", help="a page's origin, to check what a browser lets it do")
    parser.add_argument("--cacert", default="", metavar="FILE", help="certificates to trust instead of the system's")
    parser.add_argument("--proxy-config", default="", metavar="FILE", help="of nginx or HAProxy: findings name its lines")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to listen to silence (%(default)g)")
    parser.add_argument("--config", default=str(ROOT / "gunicorn.conf.py"), metavar="FILE",
                        help="gunicorn's (%(default)s)")
    parser.add_argument("--env", default="", metavar="FILE", help="the service's environment, NAME=value a line")
    parser.add_argument("--unit", default="", metavar="FILE", help="the service's systemd unit, with its drop-ins "
                        f"({process.UNIT} if it is there and no --env is given)")
    parser.add_argument("--streams", type=int, default=10_000, help="how many are expected at once (%(default)s)")
    parser.add_argument("--only", default="", choices=("process", "path"), help="one part (path: any SSE server)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with exit code 2 for what cannot be meant."""
    if options.only == "path" and not options.url:
        parser.error("--only path needs --url")
    for name in ("cacert", "proxy_config", "env", "unit", "config"):
        if getattr(options, name) and not Path(getattr(options, name)).is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {getattr(options, name)}")
    if not 0 < options.seconds <= MOST_SECONDS:  # nan is neither
        parser.error(f"--seconds is above 0 and at most {MOST_SECONDS}")
    if options.streams <= 0:
        parser.error("--streams is above 0")
    try:
        for url in filter(None, (options.url, options.publish, options.direct)):
            parse(url)
        if options.proxy_config:
            visit.read_config(options.proxy_config, parse(options.url or "https://localhost/"))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(answered(main))
    except KeyboardInterrupt:
        sys.exit(BROKEN_OFF)
