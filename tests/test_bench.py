"""The verdicts of the bench: a figure that misses its target is called so, and ends the command with 1. And that a
publish can be measured at all."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.server import ROOT

sys.path += [str(ROOT / "ops" / "bench")]

import million
import report

WHOLE = {
    "date": "", "command": "", "streams": 1_000_000, "workers": 54, "clients": 58, "topics": 10_000, "heartbeat": 45,
    "open": 1_000_000, "open_seconds": 300.0, "connect_us": 250.0, "idle_cpu": 0.5, "failed": 0, "refused": 3,
    "kernel": {}, "memory": {"workers": 1_500_000_000},
    "broadcast": {"events": 1_000_000, "disorder": 0, "seconds": 30.0, "p50_ms": 1.0, "p99_ms": 2.0},
    "singles": {"events": 1000, "wanted": 100_000, "deliveries": 100_000, "disorder": 0, "seconds": 10.0,
                "per_second": 100.0, "p50_ms": 1.0, "p99_ms": 2.0}}


def million_with(**changed: Any) -> dict[str, Any]:
    return WHOLE | {name: WHOLE[name] | value if isinstance(value, dict) else value for name, value in changed.items()}


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit code and the text of `million.py`, which found this."""
    def end(found: dict[str, Any]) -> tuple[int, str]:
        monkeypatch.setattr(million, "run", lambda options, changes: found)
        monkeypatch.setattr(million.kernel, "wanted", lambda streams: {})
        return million.main(["--streams", "1000"]), capsys.readouterr().out

    return end


def test_a_million_streams_that_are_whole_end_with_0(ends_with: Any) -> None:
    code, text = ends_with(WHOLE)
    assert code == 0
    assert text.count("PASS") == 6
    assert "3 told to come back, 0 failed" in text


@pytest.mark.parametrize(("changed", "named"), [
    ({"open": 999_999}, "streams open"),
    ({"failed": 1}, "streams that failed"),
    ({"memory": {"workers": 1_501_000_000}}, "memory of all workers (MB)"),
    ({"broadcast": {"events": 999_999}}, "streams that have the one event"),
    ({"broadcast": {"disorder": 1}}, "streams with events missed, doubled or out of order"),
    ({"singles": {"deliveries": 99_999}}, "deliveries of the events to one topic each"),
    ({"singles": {"disorder": 1}}, "streams with events missed, doubled or out of order")])
def test_a_million_streams_of_which_something_is_missing_end_with_1(
        ends_with: Any, changed: dict[str, Any], named: str) -> None:
    found = million_with(**changed)
    assert [each["text"] for each in report.million_targets(found) if not each["met"]] == [named]
    code, text = ends_with(found)
    assert code == 1
    assert text.count("PASS") == 5


def test_the_memory_of_fewer_streams_has_no_target() -> None:
    found = million_with(streams=100_000, memory={"workers": 300_000_000})
    assert not [each for each in report.million_targets(found) if "memory" in each["text"]]


@pytest.mark.parametrize(("ours", "theirs", "verdict"), [
    (9.0, 10.0, "PASS"), (10.0, 10.0, "PASS"), (15.0, 10.0, "short by 1.50x")])
def test_a_ratio_is_judged_by_its_target(ours: float, theirs: float, verdict: str) -> None:
    results = {"servers": {"pushsvc": {"median": {"event_us": ours}}, "nchan": {"median": {"event_us": theirs}}}}
    (target,) = report.targets(results)
    assert target["text"] == "CPU per delivered event, in nchan's"
    assert target["verdict"] == verdict
    assert target["met"] is (verdict == "PASS")


def test_what_was_not_measured_is_not_judged() -> None:
    assert report.targets({"servers": {"pushsvc": {}, "nchan": {"skipped": "no nginx"}}}) == []


def test_a_publish_is_measured_beside_a_route_that_does_nothing() -> None:
    program = ROOT / "ops" / "bench" / "publish.py"
    ran = subprocess.run([sys.executable, program, "--json", "--requests", "50", "--rounds", "1", "cpu"],
                         capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found, = json.loads(ran.stdout)["cpu"]
    assert found["publish_us"] > 0
    assert found["noop_us"] > 0
