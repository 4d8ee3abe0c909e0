"""The figures of a shape, and whether two shapes are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from load.shape import Shape

ONE = "one more or less"  # stream or event: as a rate, a share, or a part of the mean second
LEAST_SECONDS, LEAST_BYTES, LEAST_STREAMS = 0.05, 1.0, 1.0
MOST_SHARE = 0.01

# What makes two shapes alike: each figure within the tolerance or, where it is small, within a slack.
COMPARED = {"streams_per_second": ONE, "peak_streams": LEAST_STREAMS, "lifetime_mean_s": LEAST_SECONDS,
            "lifetime_p50_s": LEAST_SECONDS, "lifetime_p90_s": LEAST_SECONDS, "topics_per_stream": 0.0,
            "resumed_share": ONE, "events_per_second": ONE, "bytes_mean": LEAST_BYTES, "bytes_p90": LEAST_BYTES,
            "fan_out_mean": 0.0, "fan_out_p50": LEAST_STREAMS, "fan_out_p90": LEAST_STREAMS,
            "deliveries_per_second": 0.0, "burst": ONE}
SLACKS = f"""each figure is alike within --tolerance of the larger one, or within a slack:
  streams_per_second, events_per_second   one stream or event more or less in the longer shape
  resumed_share                           one stream more or less, {MOST_SHARE:g} at most
  burst                                   one event more or less in the busiest second
  peak_streams, fan_out_p50, fan_out_p90  {LEAST_STREAMS:g} stream
  lifetime_...                            {LEAST_SECONDS:g} s
  bytes_...                               {LEAST_BYTES:g} byte
  the others                              none"""


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two shapes. by: why it is alike, `tolerance` or `slack`; "": it is not."""

    name: str
    first: float
    second: float
    by: str

    @property
    def alike(self) -> bool:
        return bool(self.by)


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
    return [Difference(name, ours[name], theirs[name], _by(name, ours, theirs, tolerance)) for name in COMPARED]


def _by(name: str, ours: dict[str, float], theirs: dict[str, float], tolerance: float) -> str:
    one, other = ours[name], theirs[name]
    apart = round(abs(one - other), 9)  # of figures with three places
    if apart <= tolerance * max(abs(one), abs(other)):
        return "tolerance"
    return "slack" if apart <= _slack(name, ours, theirs) else ""


def _slack(name: str, ours: dict[str, float], theirs: dict[str, float]) -> float:
    slack = COMPARED[name]
    if isinstance(slack, float):
        return slack
    if name == "resumed_share":
        return min(MOST_SHARE, _per(ours["streams"], theirs["streams"]))
    return _per(*((each["events_per_second"] if name == "burst" else each["seconds"]) for each in (ours, theirs)))


def _per(*counts: float) -> float:
    """One of the larger count, as a part of it, and half of the last place that figures have."""
    return 1 / max(counts) + 0.0005 if any(counts) else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _at(values: Sequence[float], part: float) -> float:
    """The value that `part` of the sorted values do not exceed."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0
