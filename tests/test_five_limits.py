"""The five limits of docs/limits: each symptom and each fix shows when one runs its reproduction again, on a small scale.

The five run at the same time, each in a network of its own; most of their time they wait.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import request
from tests.support.programs import missing, program
from tests.support.server import ROOT, Server

SHOW = ROOT / "ops" / "limits" / "show.py"
STREAMS = {1: 300, 2: 200, 3: 90, 4: 100, 5: 2000}
TIMEOUT = 90
USAGE, CANNOT = 2, 3

Figures = dict[str, Any]
Shown = Callable[[int], dict[str, list[Figures]]]


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    """Asks for one limit's figures: name of the phase -> those of each such phase."""
    for name in ("ip", "haproxy"):
        program(name)
    if os.geteuid() != 0:
        missing("a network namespace needs root")
    running = {limit: subprocess.Popen([sys.executable, str(SHOW), str(limit), "--json", "--streams", str(streams)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for limit, streams in STREAMS.items()}

    @functools.cache
    def ask(limit: int) -> dict[str, list[Figures]]:
        out, err = running[limit].communicate(timeout=TIMEOUT)
        if running[limit].returncode == CANNOT:
            missing(err.strip())
        assert running[limit].returncode == 0, f"{err}\n{out}"
        phases = json.loads(out)["phases"]
        assert err == "", "progress is for a terminal"
        assert len(phases) <= json.loads(out)["steps"]
        return {name: [each["figures"] for each in phases if each["name"] == name]
                for name in ("before", "symptom", "after")} | {"notes": json.loads(out)["notes"]}

    try:
        yield ask
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.communicate()


def test_pending_connections_that_find_no_place_wait_for_seconds_and_a_longer_queue_takes_them(shown: Shown) -> None:
    told = shown(1)
    (before,), (symptom,), (after,) = told["before"], told["symptom"], told["after"]
    assert before["ListenOverflows"] == 0 < symptom["ListenOverflows"]
    assert symptom["ListenDrops"] >= symptom["ListenOverflows"]
    assert symptom["last_answer_s"] > 1, "a client whose SYN was dropped waits a second"
    assert after["ListenOverflows"] == after["ListenDrops"] == 0
    assert after["open"] == STREAMS[1]


def test_threads_run_out_and_parked_streams_need_none(shown: Shown) -> None:
    told = shown(2)
    symptom, parked = told["symptom"][0], told["after"][0]
    assert symptom["open"] < symptom["clients"]
    assert symptom["health"] == "no answer"
    assert (parked["open"], parked["health"]) == (STREAMS[2], "200")
    assert parked["threads_more"] < 5


def test_view_that_blocks_is_seen_as_loop_lag_and_named_and_a_pool_takes_it_out_of_the_way(shown: Shown) -> None:
    told = shown(2)
    blocked, pooled = told["symptom"][1], told["after"][1]
    assert blocked["loop_late"] > pooled["loop_late"]
    assert blocked["slowest_event_s"] > 1
    assert any("wait_in_c" in str(note) for note in told["notes"])


def test_proxy_stops_when_its_ports_are_used_up_and_each_fix_lifts_that(shown: Shown) -> None:
    told = shown(3)
    (symptom,) = told["symptom"]
    assert 0 < symptom["open"] <= STREAMS[3] // 3
    assert symptom["answered_503"] == STREAMS[3] - symptom["open"]
    assert symptom["told_by_the_proxy"] > 0
    assert [fix["open"] for fix in told["after"]] == [STREAMS[3]] * 3


def test_worker_without_descriptors_refuses_softly_and_goes_on_without_a_spin(shown: Shown) -> None:
    told = shown(4)
    (symptom,), (refusing, raised) = told["symptom"], told["after"]
    assert symptom["no_answer"] > 0
    assert symptom["health"] == "no answer"
    assert (refusing["open"], refusing["told_to_come_back"]) == (STREAMS[4], STREAMS[4])
    assert refusing["refused_in_storm"] > 0
    assert (refusing["health"], refusing["publish"]) == ("200", "200")
    assert refusing["cpu_when_full"] < 0.5, "a loop that finds no descriptor and asks again takes a whole core"
    assert raised["open"] == 2 * STREAMS[4]


def test_connection_that_finds_all_places_taken_by_idle_ones_is_served_at_once(tmp_path: Path) -> None:
    env = {"PUSHSVC_MAX_CONNECTIONS": "4", "PUSHSVC_KEEPALIVE_SECONDS": "60"}
    with Server(tmp_path, workers=1, env=env) as server:
        idle = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=5) for _ in range(6)]
        for connection in idle:
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok\n"
        assert request("GET", f"{server.url}/healthz", timeout=5).status == 200
        for connection in idle:
            connection.close()
        assert "Traceback" not in server.log()


def test_worker_that_is_short_of_memory_refuses_streams_before_the_kernel_kills_it(shown: Shown) -> None:
    told = shown(5)
    (after,) = told["after"]
    if told["symptom"]:  # only where a cgroup can be made
        assert told["symptom"][0]["killed_by_the_kernel"] > 0
        assert told["symptom"][0]["lost"] > 0
        assert after["killed_by_the_kernel"] == 0
    assert after["told_to_come_back"] > 0
    assert (after["lost"], after["same_worker"]) == (0, True)
    assert (after["health"], after["publish"]) == ("200", "200")


@pytest.mark.parametrize(("limit", "streams"), [(limit, streams) for limit in STREAMS for streams in (-5, 0, 1_000_000)])
def test_scale_that_cannot_be_shown_is_wrong_usage(limit: int, streams: int) -> None:
    done = subprocess.run([sys.executable, str(SHOW), str(limit), "--streams", str(streams)], capture_output=True,
                          text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == USAGE
    assert f"--streams of {limit}: " in done.stderr


def test_scale_for_which_there_are_no_descriptors_cannot_be_shown_here() -> None:
    few = [program("prlimit"), "--nofile=300:300"]
    done = subprocess.run([*few, sys.executable, str(SHOW), "1", "--streams", "1000"], capture_output=True, text=True,
                          timeout=TIMEOUT, check=False)
    assert done.returncode == CANNOT, done.stderr
    assert re.fullmatch("show: .+\n", done.stderr)


# --- The pages -------------------------------------------------------------------------------------------

PAGES = sorted((ROOT / "docs" / "limits").glob("[1-5]-*.md"))


def test_each_limit_has_a_page_with_the_command_that_shows_it() -> None:
    for number, page in enumerate(PAGES, 1):
        assert f"ops/limits/show.py {number}" in page.read_text(), page.name
    assert len(PAGES) == 5


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "limits" / "README.md"], ids=lambda page: page.name)
def test_page_names_only_settings_and_sysctls_that_exist(page: Path) -> None:
    from pushsvc.settings import Settings

    text = page.read_text()
    settings = {f"PUSHSVC_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"PUSHSVC_[A-Z_]*[A-Z]", text)) - settings == set()
    for name in set(re.findall(r"`((?:net|fs)\.[\w.-]+)`", text)):
        assert f'"{name}"' in (ROOT / "ops/limits/needs.py").read_text(), name
