"""The figures of a shape, and whether two shapes are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from load.shape import Shape

# What makes two shapes alike, with what may differ in absolute terms where the figure itself is small.
COMPARED = {"streams_per_second": 0.05, "peak_streams": 2.0, "lifetime_mean_s": 0.5, "lifetime_p50_s": 0.5,
            "lifetime_p90_s": 0.5, "topics_per_stream": 0.05, "resumed_share": 0.02, "events_per_second": 0.05,
            "bytes_mean": 2.0, "bytes_p90": 2.0, "fan_out_mean": 0.5, "fan_out_p50": 1.0, "fan_out_p90": 1.0,
            "deliveries_per_second": 0.5, "burst": 0.5}


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two shapes. alike: within the tolerance."""

    name: str
    first: float
    second: float
    alike: bool


def figures(shape: Shape) -> dict[str, float]:
    """Rates per second, lifetimes in seconds (of a stream that is open at the end: until then), sizes in bytes.
    burst: events in the busiest second for each one in a second on average."""
    seconds = max(shape.seconds, 0.001)
    lives = sorted((shape.seconds if each.closed is None else each.closed) - each.opened for each in shape.streams)
    sizes, fan_outs = sorted(each.bytes for each in shape.events), sorted(each.fan_out for each in shape.events)
    busiest = max(Counter(int(each.at) for each in shape.events).values(), default=0)
    rate = len(shape.events) / seconds
    found = {
        "seconds": shape.seconds, "streams": len(shape.streams), "streams_per_second": len(shape.streams) / seconds,
        "clients": len({each.client for each in shape.streams}), "peak_streams": peak(shape),
        "topics": len({topic for each in shape.streams for topic in each.topics}),
        "topics_per_stream": _mean([len(each.topics) for each in shape.streams]),
        "resumed_share": _mean([each.resumed for each in shape.streams]),
        "lifetime_mean_s": _mean(lives), "lifetime_p50_s": _at(lives, 0.5), "lifetime_p90_s": _at(lives, 0.9),
        "events": len(shape.events), "events_per_second": rate, "bytes_mean": _mean(sizes), "bytes_p90": _at(sizes, 0.9),
        "fan_out_mean": _mean(fan_outs), "fan_out_p50": _at(fan_outs, 0.5), "fan_out_p90": _at(fan_outs, 0.9),
        "deliveries_per_second": sum(fan_outs) / seconds, "burst": busiest / rate if rate else 0.0}
    return {name: round(float(value), 3) for name, value in found.items()}


def peak(shape: Shape) -> int:
    """The most streams that were open at once."""
    changes = sorted([(each.opened, 1) for each in shape.streams]
                     + [(each.closed, -1) for each in shape.streams if each.closed is not None])
    most = count = 0
    for _, change in changes:
        count += change
        most = max(most, count)
    return most


def differences(first: Shape, second: Shape, tolerance: float) -> list[Difference]:
    """All figures that are compared. tolerance: how far apart they may be, as a part of the larger."""
    ours, theirs = figures(first), figures(second)
    return [Difference(name, ours[name], theirs[name], abs(ours[name] - theirs[name]) <= max(
        least, tolerance * max(abs(ours[name]), abs(theirs[name])))) for name, least in COMPARED.items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _at(values: Sequence[float], part: float) -> float:
    """The value that `part` of the sorted values do not exceed."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0
