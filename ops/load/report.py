"""The report: one page for one result or for several side by side. All of it is in the page: no script, no picture, no
font from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from load.charts import bars, legend, lines, short
from load.replay import FORMAT

Found = dict[str, Any]
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #6b7484; --rule: #d8dde6; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --dim: #98a2b3; --rule: #39414f; --page: #14181f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child { text-align: left; color: var(--dim); font-weight: normal; }
td.bad { color: #c8322b; font-weight: bold; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--dim); } .grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 1.6; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
""" + "".join(f".line.c{place} {{ stroke: {colour}; }} rect.c{place} {{ fill: {colour}; }} i.c{place} {{ background: "
              f"{colour}; }}\n" for place, colour in enumerate(("#2f6fde", "#d9822b", "#2a9d6f", "#b0459c", "#8a6d3b",
                                                                "#c8322b")))
VERDICT = {True: "yes", False: "NO"}
REPLAY, CLIMBS = "replay", ("ramp", "dark")


def read_result(path: Path) -> Found:
    """What a replay, a ramp or a dark test has written. Raises ValueError for anything that makes no page."""
    try:
        found: Found = json.loads(path.read_text())
        if found["load"] != FORMAT or found["kind"] not in (REPLAY, *CLIMBS):
            raise ValueError("another format or kind")
        page([found])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the result of a load test ({type(error).__name__}: {error})") from None
    return found


def page(results: Sequence[Found]) -> str:
    """The whole page. results: what replay, ramp and dark have found, in any number."""
    replays = [each for each in results if each["kind"] == REPLAY]
    climbs = [each for each in results if each["kind"] in CLIMBS]
    parts = [_replays(replays) if replays else "", *(_climb(each) for each in climbs), _conditions(results)]
    return (f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Load report</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>'
            f"<h1>Load report</h1>{''.join(parts)}</body>\n</html>\n")


# -- replays


def _replays(results: Sequence[Found]) -> str:
    names = _names(results)
    verdicts = [("ran to its end", [VERDICT[each.get("interrupted") is None] for each in results])]
    verdicts += [(text, [VERDICT[each["verdict"][key]] for each in results]) for key, text in (
        ("complete", "every stream opened and got every event"), ("ordered", "once and in order"),
        ("published", "every publish was acknowledged"))]
    rows: list[tuple[str, list[Any]]] = [*verdicts, *(_row(results, text, *path) for text, path in (
        ("streams", ("totals", "streams")), ("streams opened, reconnects too", ("totals", "opened")),
        ("resumed with an id", ("totals", "resumed")), ("not open when due", ("wrong", "unopened")),
        ("events", ("totals", "events")), ("deliveries", ("totals", "received")), ("lost", ("wrong", "lost")),
        ("overdue by 5 s when a stream ended", ("wrong", "overdue")), ("doubled", ("wrong", "doubled")),
        ("out of order", ("wrong", "reordered")), ("of other topics", ("wrong", "stray")),
        ("from before", ("wrong", "stale")), ("replaced (keep latest or none)", ("wrong", "replaced")),
        ("gaps told", ("totals", "gaps")), ("p50 due to received, ms", ("latency", "p50_ms")),
        ("p90", ("latency", "p90_ms")), ("p99", ("latency", "p99_ms")), ("p99.9", ("latency", "p999_ms")),
        ("longest", ("latency", "max_ms")), ("p99 due to acknowledged, ms", ("acknowledged", "p99_ms")),
        ("p99 due to open, ms", ("opening", "p99_ms")), ("server CPU, s", ("server_cpu_seconds",)),
        ("client CPU, s", ("client_cpu_seconds",)), ("sender late at most, ms", ("late_ms", "sender")),
        ("readers late at most, ms", ("late_ms", "readers")))), *_errors(results)]
    return f"<h2>Replay</h2>{legend(names)}{_table(names, rows)}{_charts(results, names)}"


def _errors(results: Sequence[Found]) -> list[tuple[str, list[Any]]]:
    kinds = dict.fromkeys(kind for each in results for kind in each["errors"])
    return [(f"error: {kind}", [each["errors"].get(kind, 0) for each in results]) for kind in kinds]


def _charts(results: Sequence[Found], names: Sequence[str]) -> str:
    def over(value: Callable[[Found], float | None]) -> dict[str, list[tuple[float, float | None]]]:
        return {f"{place} {name}": [(second["at"], value(second)) for second in each["seconds"]]
                for place, (name, each) in enumerate(zip(names, results, strict=True))}

    across = "seconds"
    charts = [lines("Open streams", across, over(lambda second: second["open"])),
              lines("p50 latency, ms", across, over(lambda second: second["p50_ms"]), logarithmic=True),
              lines("p99 latency, ms", across, over(lambda second: second["p99_ms"]), logarithmic=True),
              _histogram(results, names),
              lines("Publishes per second", across, over(lambda second: second["published"])),
              lines("Deliveries per second", across, over(lambda second: second["received"])),
              lines("Server CPU, cores", across, over(lambda second: second["server_cpu"])),
              lines("Server memory, bytes", across, over(lambda second: second["server_memory"]))]
    return f'<div class="charts">{"".join(charts)}</div>'


def _histogram(results: Sequence[Found], names: Sequence[str]) -> str:
    most = max((len(each["histogram"]) for each in results), default=0)
    ends: list[tuple[float, int]] = next((each["histogram"] for each in results if len(each["histogram"]) == most), [])
    shares = {}
    for place, (name, each) in enumerate(zip(names, results, strict=True)):
        total = sum(count for _, count in each["histogram"]) or 1
        found = [count / total * 100 for _, count in each["histogram"]]
        shares[f"{place} {name}"] = found + [0.0] * (most - len(found))
    return bars("Latency: % of deliveries up to so many ms", [short(end) for end, _ in ends], shares)


# -- ramp and dark


def _climb(result: Found) -> str:
    columns = list(dict.fromkeys(name for level in result["levels"] for name in level))
    rows = [(str(level.get(columns[0], "")), [level.get(name) for name in columns[1:]]) for level in result["levels"]]
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in result["limits"])
    points = [(float(level[columns[0]]), level["p99_ms"]) for level in result["levels"]]
    title = f"{result['kind'].capitalize()}: {result['label']}"
    chart = lines("p99 latency, ms", columns[0], {"p99": points}, logarithmic=True)
    return (f"<h2>{escape(title)}</h2><p>{escape(result['verdict_text'])}</p><ul>{limits}</ul>"
            f'{_table(columns[1:], rows, columns[0])}<div class="charts">{chart}</div>')


# -- common


def _conditions(results: Sequence[Found]) -> str:
    rows: list[tuple[str, list[Any]]] = [_row(results, "at", "at")]
    for part in ("settings", "about", "machine", "objective", "shape"):
        rows += [_row(results, name if part != "shape" else f"shape: {name}", part, name)
                 for name in dict.fromkeys(name for each in results for name in each.get(part, {}))]
    return f"<h2>Conditions</h2>{_table(_names(results), rows)}"


def _names(results: Sequence[Found]) -> list[str]:
    return [str(each["label"]) for each in results]


def _row(results: Sequence[Found], text: str, *path: str) -> tuple[str, list[Any]]:
    return text, [_find(each, path) for each in results]


def _find(found: Any, path: Sequence[str]) -> Any:
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]], corner: str = "") -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in (corner, *heads))
    body = "".join(f"<tr><td>{escape(text)}</td>{''.join(map(_cell, values))}</tr>" for text, values in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td>&ndash;</td>"
    text = f"{value:,.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else (
        f"{value:,}" if isinstance(value, int) else str(value))
    return f'<td class="bad">{escape(text)}</td>' if value == VERDICT[False] else f"<td>{escape(text)}</td>"
