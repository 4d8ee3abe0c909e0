#!/usr/bin/env python3
"""docs/BENCHMARKS.md and its pictures, from the JSON files in docs/bench/ that the programs of the bench write.

As a program it makes them anew from what is there. Exit codes: 0 done, 1 there are no results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS, MILLION, CHURN = (f"bench/{name}.json" for name in ("results", "million", "churn"))
PAGE = "BENCHMARKS.md"
Results = dict[str, Any]
Column = tuple[str, str, Callable[[float], str]]
MILLION_STREAMS, MILLION_KB = 1_000_000, 1.5  # all workers' memory, per stream
OURS, KERNEL, NCHAN, STOCK = "pushsvc", "sendloop", "nchan", "stock"


def _number(digits: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}{unit}"


def _part(value: float) -> str:
    return f"{value:.0%}"


ONE_TOPIC: tuple[Column, ...] = (
    ("memory per idle stream", "memory_kb", _number(2, " KB")), ("CPU per connect", "connect_us", _number(0, " us")),
    ("CPU per delivered event", "event_us", _number(1, " us")), ("latency p50", "p50_ms", _number(0, " ms")),
    ("p99", "p99_ms", _number(0, " ms")))
FLAT_OUT: tuple[Column, ...] = (
    ("deliveries per second", "flat_per_second", _number(0)),
    ("published per second", "flat_published_per_second", _number(0)),
    ("latency p50", "flat_p50_ms", _number(0, " ms")), ("p99", "flat_p99_ms", _number(0, " ms")),
    ("server's core", "flat_server_cpu", _part), ("client's core", "flat_client_cpu", _part),
    ("streams lost", "flat_ended", _number(0)))
PICTURES = (
    ("memory.svg", "memory_kb", "Memory per idle stream (KB, logarithmic)", True),
    ("event.svg", "event_us", "CPU per delivered event (microseconds)", False),
    ("connect.svg", "connect_us", "CPU per connect (microseconds)", False),
    ("flat_out.svg", "flat_per_second", "Deliveries per second, flat out (logarithmic)", True))


# --- Targets ---------------------------------------------------------------------------------------------


def targets(results: Results) -> list[dict[str, Any]]:
    """What pushsvc is to reach, and what it reached: only those for which all figures are there."""
    wanted = [
        ("memory per idle stream, all on one topic (KB)", _of(results, OURS, "memory_kb"), "<=", 1.0),
        ("memory per idle stream, each on its own topic (KB)", _of(results, OURS, "topics_memory_kb"), "<=", 1.0),
        ("CPU per delivered event, in nchan's", _ratio(results, "event_us", NCHAN), "<=", 1.0),
        ("CPU per delivered event, in the send loop's", _ratio(results, "event_us", KERNEL), "<=", 1.6),
        ("deliveries per second flat out, in nchan's", _ratio(results, "flat_per_second", NCHAN), ">=", 10.0),
        ("CPU per connect, in stock's", _ratio(results, "connect_us", STOCK), "<=", 0.5),
        ("p99 of a topic with one stream beside a busy one (ms)", _of(results, OURS, "single_p99_ms"), "<", 25.0)]
    return [_target(*each) for each in wanted if each[1] is not None]


def million_targets(found: Results) -> list[dict[str, Any]]:
    """What `million.py` is to show, and did. Memory counts from a million streams on: fewer workers share less."""
    streams, broadcast, singles = found["streams"], found["broadcast"], found["singles"]
    wanted = [
        ("streams open", found["open"], ">=", streams),
        ("streams that failed", found["failed"], "<=", 0),
        ("streams that have the one event", broadcast["events"], ">=", streams),
        ("deliveries of the events to one topic each", singles["deliveries"], ">=", singles["wanted"]),
        ("streams with events missed, doubled or out of order", broadcast["disorder"] + singles["disorder"], "<=", 0)]
    if streams >= MILLION_STREAMS:
        used = round(found["memory"]["workers"] / 1e6)
        wanted.append(("memory of all workers (MB)", used, "<=", round(streams * MILLION_KB / 1000)))
    return [_target(*each) | {"value": each[1], "target": f"{each[2]} {each[3]:,}"} for each in wanted]


def million_target_rows(found: Results) -> list[list[str]]:
    rows = [[each["text"], each["target"], f"{each['value']:,}", each["verdict"]] for each in million_targets(found)]
    return [["target", "wanted", "measured", ""], *rows]


def _target(text: str, value: float, sign: str, limit: float) -> dict[str, Any]:
    met = {"<=": value <= limit, "<": value < limit, ">=": value >= limit}[sign]
    short = f"short by {max(value / limit, limit / value):.2f}x" if value and limit else "missed"
    return {"text": text, "value": float(f"{value:.4g}"), "target": f"{sign} {limit:g}", "met": met,
            "verdict": "PASS" if met else short}


def _of(results: Results, server: str, name: str) -> Any:
    return results["servers"].get(server, {}).get("median", {}).get(name)


def _ratio(results: Results, name: str, other: str) -> float | None:
    ours, theirs = _of(results, OURS, name), _of(results, other, name)
    return ours / theirs if ours is not None and theirs else None


# --- Tables ----------------------------------------------------------------------------------------------


def text(results: Results) -> str:
    """All of it for a terminal."""
    load = results["load"]
    parts = [(f"{load['streams']:,} streams on one topic, one 100-byte event at a time", _table(results, ONE_TOPIC)),
             (f"flat out, {load['flat_streams']:,} streams on one topic", _table(results, FLAT_OUT)),
             ("targets", _target_rows(results))]
    tables = [f"{title}\n\n{plain(rows)}" for title, rows in parts if len(rows) > 1]
    return "\n\n".join(["", *tables, *_ours(results), "\n".join(_versions(results))])


def _table(results: Results, columns: Sequence[Column]) -> list[list[str]]:
    rows = [["server", *(title for title, _, _ in columns)]]
    for entry in results["servers"].values():
        median = entry.get("median", {})
        cells = [show(median[name]) if median.get(name) is not None else "" for _, name, show in columns]
        if any(cells):
            rows.append([entry["title"], *cells])
    return rows


def _target_rows(results: Results) -> list[list[str]]:
    rows = [[each["text"], each["target"], f"{each['value']:g}", each["verdict"]] for each in results["targets"]]
    return [["target", "wanted", "measured", ""], *rows]


def _ours(results: Results) -> list[str]:
    median, load = results["servers"].get(OURS, {}).get("median", {}), results["load"]
    lines = []
    if "topics_memory_kb" in median:
        lines.append(f"{load['streams']:,} streams, each on its own topic: {median['topics_memory_kb']:.2f} KB and "
                     f"{median['topics_connect_us']:.0f} us of CPU per stream.")
    if "single_p99_ms" in median:
        lines.append("While one topic with {others:,} streams gets {mixed_rate:g} events/s, a topic with one stream on "
                     "the same worker gets as many: p50 {single_p50_ms:g} ms, p99 {single_p99_ms:g} ms (the busy topic: "
                     "p50 {busy_p50_ms:g} ms, p99 {busy_p99_ms:g} ms, {busy_lost:g} events lost; this client published "
                     "at most {publisher_late_ms:.1f} ms late).".format(others=load["streams"] - 1, **load, **median))
    return lines


def _versions(results: Results) -> list[str]:
    return [f"{entry['title']}: " + (f"skipped, {entry['skipped']}" if "skipped" in entry else entry["version"])
            + "".join(f" ({trouble})" for trouble in entry["troubles"]) for entry in results["servers"].values()]


def plain(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *body])


# --- The page --------------------------------------------------------------------------------------------


def page(results: Results, million: Results | None, churn: Results | None) -> str:
    machine, load = results["machine"], results["load"]
    pinned = " The server had one core, clients and publishers had the others." if results["pinned"] else ""
    parts = [
        "# Benchmarks", "Generated by `make bench`; not edited by hand. [ops/bench/README.md](../ops/bench/README.md) "
        "tells what is measured, and how to get figures of your own.",
        f"{results['date']}, `{results['command']}`: {machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_gib']:g} GiB, Linux {machine['linux']}, Python {machine['python']}.{pinned} Each figure is "
        f"the median of {results['rounds']} round{'s' if results['rounds'] > 1 else ''}, the servers in turns; CPU and "
        f"memory are the server's own. {_noise(results)}",
        "## Targets", _markdown(_target_rows(results)),
        f"## {load['streams']:,} streams on one topic", "One 100-byte event at a time, each completely delivered before "
        "the next. The latency is from the publish to the arrival at each client: with one sender and one reader it is "
        "mostly the time that all the streams take.", _markdown(_table(results, ONE_TOPIC)), *_images(PICTURES[:3]),
        f"## Flat out: {load['flat_streams']:,} streams on one topic", "Publishers send as fast as they are answered, in "
        "batches where the server takes batches. Counted is what clients received; the latency of events that came "
        "together is that of the oldest. A client's core near 100 % means that the client was the limit.",
        _markdown(_table(results, FLAT_OUT)), *_images(PICTURES[3:])]
    if ours := _ours(results):
        parts += ["## pushsvc beside itself", *ours]
    parts += _million(million) if million else []
    parts += _churn(churn) if churn else []
    parts += ["## Versions", "\n".join(f"- {line}" for line in _versions(results))]
    return "\n\n".join(parts) + "\n"


def _noise(results: Results) -> str:
    shares = [value for entry in results["servers"].values() for each in entry["rounds"] for name, value in each.items()
              if name.endswith("_others_cpu")]
    if not shares:
        return ""
    shares.sort()
    return (f"Meanwhile other programs used {shares[len(shares) // 2]:.2f} cores (median; at most {shares[-1]:.2f}): "
            "processor time hardly depends on that, latencies and deliveries per second do.")


def _images(pictures: Sequence[tuple[str, str, str, bool]]) -> list[str]:
    return [f"![{title}](bench/{file})" for file, _, title, _ in pictures]


def _million(found: Results) -> list[str]:
    return ["## {streams:,} streams".format(**found), "{date}, `{command}`: {open:,} streams open on {workers} workers, "
            "each with two topics (`all`, and one of {topics:,}), opened in {open_seconds:,.0f} s by {clients} client "
            "processes on the same machine; {refused:,} were told to come back on the way (their worker was full); a "
            "heartbeat every {heartbeat:g} s.".format(**found),
            _markdown(million_target_rows(found)), _markdown(million_latencies(found)), _markdown(million_memory(found)),
            "Kernel settings that it needed:", "\n".join(f"- {line}" for line in million_kernel(found))]


def million_latencies(found: Results) -> list[list[str]]:
    title = f"{found['singles']['events']:,} events to one topic each, {found['singles']['per_second']:g}/s"
    rows = [["published", "p50", "p99", "the last stream has it after"]]
    for published, each in (("one event to all", found["broadcast"]), (title, found["singles"])):
        rows.append([published, f"{each['p50_ms']:,.0f} ms", f"{each['p99_ms']:,.0f} ms", f"{each['seconds']:.2f} s"])
    return rows


def million_memory(found: Results) -> list[list[str]]:
    rows = [[name.replace("_", " "), f"{value / 1e6:,.0f} MB"] for name, value in found["memory"].items()]
    return [["memory", "with all streams open"], *rows]


def million_kernel(found: Results) -> list[str]:
    lines = [f"`{name} = {change['set']}` (was `{change['was']}`)" for name, change in found["kernel"].items()]
    return lines or ["none but the defaults"]


def _churn(found: Results) -> list[str]:
    return ["## {total:,} connects and disconnects".format(**found), "{date}, `{command}`: in waves of {wave:,}, every "
            "other one ended by resets, {seconds:,.0f} s in all, {workers} workers. {verdict}".format(**found),
            _markdown(churn_rows(found))]


def churn_rows(found: Results) -> list[list[str]]:
    names = [name for name in found["before"] if found["before"][name] or found["after"][name]]
    return [["in all workers", "before", "after"],
            *([name.replace("_", " "), f"{found['before'][name]:,}", f"{found['after'][name]:,}"] for name in names)]


def draw(results: Results, folder: Path) -> None:
    """The pictures, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "pushsvc", "font.size": 10}
    from matplotlib import pyplot

    for file, name, title, logarithmic in PICTURES:
        bars = [(entry["title"], value, key == OURS) for key, entry in results["servers"].items()
                if (value := entry.get("median", {}).get(name)) and value > 0]
        bars.sort(key=lambda bar: bar[1], reverse=name != "flat_per_second")
        figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.42 * len(bars)), layout="constrained")
        drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars],
                          color=["#d1495b" if ours else "#8d99ae" for _, _, ours in bars])
        axes.bar_label(drawn, [f"{bar[1]:,.0f}" if bar[1] >= 100 else f"{bar[1]:.3g}" for bar in bars], padding=3)
        axes.set_title(title, loc="left")
        axes.set_xscale("log" if logarithmic else "linear")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / file, metadata={"Date": None})
        pyplot.close(figure)


def write(docs: Path) -> None:
    """BENCHMARKS.md and the pictures, from the JSON files below `docs`. Raises FileNotFoundError without results."""
    results = json.loads((docs / RESULTS).read_text())
    results.setdefault("targets", targets(results))
    (docs / PAGE).write_text(page(results, _read(docs / MILLION), _read(docs / CHURN)))
    draw(results, docs / "bench")


def keep(docs: Path, name: str, found: Results) -> None:
    """Write one program's results, and the page anew if there is one."""
    (docs / "bench").mkdir(parents=True, exist_ok=True)
    (docs / name).write_text(json.dumps(found, indent=1) + "\n")
    if (docs / RESULTS).exists():
        write(docs)


def _read(file: Path) -> Results | None:
    return json.loads(file.read_text()) if file.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    options = parser.parse_args(arguments)
    try:
        write(options.docs)
    except FileNotFoundError as error:
        print(f"no results: {error.filename}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
