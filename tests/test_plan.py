"""The plan: its arithmetic against made-up costs, and one real calibration, small enough for a test."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from ops.plan import calibration, sheet
from ops.plan.calibration import Calibration, Costs
from ops.plan.errors import PlanError
from ops.plan.load import Load
from ops.plan.machine import Machine
from ops.plan.needs import Needs, needs, rates
from ops.plan.walls import Wall, walls
from pushsvc.settings import Settings
from tests.support.server import ROOT

TIMEOUT = 60
TINY = 1000  # streams
COSTS = Costs(
    service_bytes=50e6, worker_bytes=20e6, stream_bytes=400, own_bytes=800, topic_bytes=100, socket_bytes=5000,
    connect_us=200, connect_topic_us=20, publish_us=500, receive_us=100, event_us=10, apart_us=14, single_us=34,
    heartbeat_us=10, idle_us=5000, head_bytes=250, frame_bytes=35, heartbeat_bytes=7,
)  # fmt: skip
MACHINE = Machine(cores=4, memory_bytes=16_000_000_000, descriptors=21_064, files=1_000_000, backlog=4096, ports=28_000)
LOAD = Load(users=10_000, messages_per_second=100, fan_out=10)
SETTINGS = Settings()
KNOWN = Calibration(date="a day", version="a version", streams=1000, seconds=30, machine=MACHINE, costs=COSTS)


def planned(load: Load = LOAD, machine: Machine = MACHINE, settings: Settings = SETTINGS) -> tuple[Needs, list[Wall]]:
    need = needs(load, COSTS, machine, settings)
    return need, walls(load, COSTS, machine, settings, need)


# --- The arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "workers"), [(1, 4), (70_000, 4), (74_766, 4), (74_767, 5), (1_000_000, 54)]
)  # 20,000 streams fit into a worker, and the fullest has 1.07 times its share
def test_there_are_as_many_workers_as_cores_or_as_descriptors_demand(users: int, workers: int) -> None:
    need, _ = planned(replace(LOAD, users=users, fan_out=1))
    assert need.max_streams == 20_000
    assert need.workers == workers
    assert need.streams_per_worker <= 20_000
    assert need.descriptors_per_worker == need.streams_per_worker + 1064


@pytest.mark.parametrize(
    ("proxies", "users", "addresses"), [(1, 28_000, 1), (1, 28_001, 2), (2, 56_000, 1), (0, 999_999, 1)]
)
def test_there_are_as_many_addresses_as_ports_demand(proxies: int, users: int, addresses: int) -> None:
    need, found = planned(replace(LOAD, users=users, proxies=proxies))
    assert need.addresses == addresses
    assert ("ports" in [wall.name for wall in found]) == bool(proxies)


@pytest.mark.parametrize(
    ("change", "ours", "kernel"),
    [
        ({}, 50e6 + 10_000 * 800, 10_000 * 5000),
        ({"topics_per_stream": 5}, 50e6 + 10_000 * (800 + 3 * 100), 10_000 * 5000),
        ({"group": 10}, 50e6 + 10_000 * (400 + 40), 10_000 * 5000),
        ({"workers": 3}, 50e6 + 2 * 20e6 + 10_000 * 800, 10_000 * 5000),
        ({"workers": 2, "group": 2}, 70e6 + 10_000 * (400 + 0.75 * 400), 10_000 * 5000),
        ({"sockets": 3}, 50e6 + 10_000 * 800, 3 * 10_000 * 5000),
    ],
)
def test_memory_is_that_of_workers_streams_and_sockets(change: dict[str, Any], ours: float, kernel: float) -> None:
    need, _ = planned(replace(LOAD, **({"workers": 1} | change)))
    assert need.memory_workers == pytest.approx(ours)
    assert need.memory_kernel == pytest.approx(kernel)


def test_processor_time_is_that_of_all_that_happens_in_a_second() -> None:
    settings = Settings(rotate_seconds=3600, heartbeat_seconds=20)
    need, _ = planned(replace(LOAD, workers=2), settings=settings)
    assert need.cpu_connects == pytest.approx(10_000 * 2 / 3600 * 220e-6)
    assert need.cpu_publishes == pytest.approx(100 * (500 + 100) * 1e-6)
    assert need.cpu_deliveries == pytest.approx((1000 * 14 + 100 * 2 * (34 - 14)) * 1e-6)
    assert need.cpu_idle == pytest.approx(2 * 5000e-6)
    parts = [need.cpu_connects, need.cpu_publishes, need.cpu_deliveries, need.cpu_heartbeats, need.cpu_idle]
    assert need.cpu == pytest.approx(sum(parts))
    assert need.core_use == pytest.approx(need.cpu / 2)


@pytest.mark.parametrize(("events", "heartbeats"), [(0, 500), (0.02, 495.02), (1, 290.99), (20, 2e-5), (1e6, 0)])
def test_heartbeats_are_for_streams_that_were_silent(events: float, heartbeats: float) -> None:
    """10,000 streams, which get so many events in an interval of 20 s: x/(e^x - 1) of what they got without any."""
    load = replace(LOAD, messages_per_second=10_000 * events / 20 / LOAD.fan_out)
    assert rates(load, Settings(heartbeat_seconds=20)).heartbeats == pytest.approx(heartbeats, rel=0.05)


def test_bandwidth_counts_frames_heads_heartbeats_and_the_packets_around_them() -> None:
    quiet = replace(LOAD, reconnects_per_hour=0, messages_per_second=0)
    settings = Settings(rotate_seconds=0, heartbeat_seconds=10)
    need, _ = planned(quiet, settings=settings)
    assert need.out_bytes == pytest.approx(1000 * (7 + 66))
    assert need.in_bytes == pytest.approx(1000 * 66)
    small, _ = planned(LOAD, settings=settings)
    large, _ = planned(replace(LOAD, event_bytes=1200), settings=settings)
    assert large.out_bytes - small.out_bytes == pytest.approx(1000 * 1000)
    assert large.in_bytes - small.in_bytes == pytest.approx(100 * 1000)


def test_a_storm_queues_what_cannot_be_opened_while_it_lasts() -> None:
    need, _ = planned(replace(LOAD, users=100_000, workers=8))
    opened = 4 / 8 / 220e-6 * 5
    assert need.storm_queue == pytest.approx(100_000 / 8 - opened)
    assert need.storm_done_seconds == pytest.approx(100_000 * 220e-6 / 4)
    calm, _ = planned(replace(LOAD, users=1000))
    assert (calm.storm_queue, calm.storm_done_seconds) == (0, 5)


# --- The walls -------------------------------------------------------------------------------------------

FIRST = [
    ("cpu", {"messages_per_second": 2000}, {}, {}, "further machine"),
    ("cpu", {"messages_per_second": 1000, "workers": 1}, {}, {}, "WEB_CONCURRENCY=4"),
    ("memory", {}, {"memory_bytes": 300_000_000}, {}, "further machine"),
    ("descriptors", {"workers": 1}, {"descriptors": 9000}, {}, "WEB_CONCURRENCY=2"),
    ("descriptors", {}, {}, {"max_streams": 2000, "heartbeat_seconds": 60}, "PUSHSVC_MAX_STREAMS"),
    ("files", {}, {"files": 11_000}, {}, "fs.file-max"),
    ("ports", {"addresses": 1}, {"ports": 5000}, {}, "PUSHSVC_BIND with 2 addresses"),
    ("backlog", {"storm_seconds": 0.1}, {}, {"backlog": 64}, "PUSHSVC_BACKLOG=4096 and net.core.somaxconn=4096"),
    ("backlog", {"storm_seconds": 0.1}, {"backlog": 64}, {}, "net.core.somaxconn"),
]


@pytest.mark.parametrize(("name", "load", "machine", "settings", "setting"), FIRST)
def test_each_wall_can_be_the_first_and_names_its_setting(
    name: str, load: dict[str, Any], machine: dict[str, Any], settings: dict[str, Any], setting: str
) -> None:
    _, found = planned(replace(LOAD, **load), replace(MACHINE, **machine), Settings(**settings))
    assert found[0].name == name
    assert setting in found[0].setting
    assert [wall.reach for wall in found] == sorted(wall.reach for wall in found)
    assert {wall.name for wall in found} == {"cpu", "memory", "descriptors", "files", "ports", "backlog"}


@pytest.mark.parametrize(("name", "load", "machine", "settings", "setting"), FIRST)
def test_load_at_the_distance_of_a_wall_meets_it(
    name: str, load: dict[str, Any], machine: dict[str, Any], settings: dict[str, Any], setting: str
) -> None:
    """The distance is no guess: multiplied by it, with workers and addresses as planned, the need is the limit."""
    machine_, settings_ = replace(MACHINE, **machine), Settings(**settings)
    need, found = planned(replace(LOAD, **load), machine_, settings_)
    asked, reach = replace(LOAD, **load), found[0].reach
    grown = replace(asked, users=int(asked.users * reach), messages_per_second=asked.messages_per_second * reach,
                    workers=need.workers, addresses=need.addresses)
    _, again = planned(grown, machine_, settings_)
    assert again[0].name == name
    assert again[0].need == pytest.approx(again[0].limit, rel=0.01)
    assert again[0].reach == pytest.approx(1, rel=0.01)


def test_more_workers_than_the_service_starts_are_further_machines() -> None:
    need, found = planned(replace(LOAD, users=30_000_000))
    [wall] = [wall for wall in found if wall.name == "descriptors"]
    assert need.workers == 1024
    assert wall.reach < 1
    assert wall.setting.startswith("2 machines, for one has 1,024 workers at most, or LimitNOFILE")
    _, found = planned(replace(LOAD, workers=4, messages_per_second=100_000), replace(MACHINE, cores=5000))
    assert (found[0].name, found[0].setting) == ("cpu", "WEB_CONCURRENCY=1024")


def test_largest_numbers_make_json() -> None:
    most: dict[str, Any] = {each.name: 1e9 if each.type == "float" else 10**9 for each in fields(Load)}
    load = Load(**most | {"sockets": 4, "workers": 0, "addresses": 0})
    found = sheet.as_json(load, MACHINE, SETTINGS, KNOWN, *planned(load))
    assert json.loads(json.dumps(found, allow_nan=False))["fits"] is False


@pytest.mark.parametrize("users", [1000, 50_000, 500_000])
def test_setting_that_moves_a_wall_is_above_the_need_and_the_limit(users: int) -> None:
    _, found = planned(replace(LOAD, users=users))
    for wall in found:
        if wall.name in ("files", "backlog"):
            assert int(wall.setting.rpartition("=")[2]) > max(wall.need, wall.limit)


def test_without_messages_and_heartbeats_nearly_nothing_is_left_for_the_processor() -> None:
    settings = Settings(rotate_seconds=0, heartbeat_seconds=3600)
    quiet = replace(LOAD, messages_per_second=0, reconnects_per_hour=0)
    _, found = planned(quiet, settings=settings)
    assert next(wall for wall in found if wall.name == "cpu").reach > 50


# --- What is printed -------------------------------------------------------------------------------------


def test_every_field_of_a_load_and_every_setting_that_counts_changes_what_is_printed() -> None:
    """So no assumption is made in silence."""

    def text(load: Load = LOAD, machine: Machine = MACHINE, settings: Settings = SETTINGS) -> str:
        return sheet.as_text(load, machine, settings, KNOWN, *planned(load, machine, settings))

    def told(load: Load = LOAD, machine: Machine = MACHINE, settings: Settings = SETTINGS) -> list[str]:
        return sheet.assumptions(load, machine, settings, KNOWN)

    for each in fields(Load):
        changed = replace(LOAD, **{each.name: getattr(LOAD, each.name) + 3})
        assert text(changed) != text(), each.name
        if each.name not in ("users", "workers", "addresses"):  # these are the plan itself
            assert told(changed) != told(), each.name
    for each in fields(Machine):
        assert text(machine=replace(MACHINE, **{each.name: getattr(MACHINE, each.name) // 2})) != text(), each.name
    for name in sheet.USED:
        other: dict[str, Any] = {name: 77}
        assert text(settings=Settings(**other)) != text(), name


@pytest.mark.parametrize("word", ["1.07", "loopback", "TLS", "tokens", "a day", "a version", "700", "66", "random",
                                  "70%", "80%", "5,000 bytes"])
def test_what_the_plan_takes_for_granted_is_printed(word: str) -> None:
    assert word in "\n".join(sheet.assumptions(LOAD, MACHINE, SETTINGS, KNOWN))


def test_verdict_tells_whether_it_fits_and_what_to_set() -> None:
    assert sheet.verdict(LOAD, planned()[1]).startswith("Fits. The first wall is ")
    tight = planned(settings=Settings(max_streams=1000), load=replace(LOAD, workers=4))[1]
    assert not sheet.fits(tight)
    assert "descriptors: WEB_CONCURRENCY=11" in sheet.verdict(LOAD, tight)


# --- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"users": 0}, "users is at least 1, not 0"),
        ({"messages_per_second": -1}, "messages_per_second is at least 0, not -1"),
        ({"messages_per_second": float("nan")}, "not nan"),
        ({"fan_out": 10_001}, "fan_out 10001 is more than the 10,000 streams"),
        ({"topics_per_stream": 0}, "topics_per_stream is at least 1"),
        ({"storm_seconds": 0}, "storm_seconds is at least 0.1"),
        ({"event_bytes": -5}, "event_bytes is at least 0"),
        ({"sockets": 7}, "sockets is at most 4, not 7"),
        ({"messages_per_second": 1e308}, r"messages_per_second is at most 1000000000, not 1e\+308"),
        ({"storm_seconds": float("inf")}, "storm_seconds is at most 1000000000, not inf"),
        ({"workers": 1025}, "workers is at most 1024, not 1025"),
    ],
)
def test_load_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        replace(LOAD, **change)


def test_calibration_is_kept_as_it_is(tmp_path: Path) -> None:
    calibration.save(KNOWN, tmp_path / "new" / "file")
    assert calibration.load(tmp_path / "new" / "file") == KNOWN
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["/proc/nothere/x", ROOT / "docs"])
def test_place_where_no_calibration_can_be_kept_is_told_before_it_is_measured(place: Path) -> None:
    done = plan(*REQUIRED, "--calibrate", "--calibration", place)
    assert done.returncode == 2
    assert re.fullmatch("plan: the calibration could not be written: .*\n", done.stderr)


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(COSTS).items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": 0}, "no calibration of this version"),
        ({"costs": _without("event_us")}, "event_us is a number of 0 or more, not 'None'"),
        ({"costs": asdict(COSTS) | {"event_us": -1}}, "event_us is a number of 0 or more, not '-1'"),
        ({"costs": asdict(COSTS) | {"event_us": True}}, "event_us"),
        ({"costs": asdict(COSTS) | {"connect_us": 0}}, "connect_us is a number of 0.001 or more, not '0'"),
        ({"costs": asdict(COSTS) | {"event_us": 1e300}}, r"event_us is a number of 0 or more, not '1e\+300'"),
        ({"machine": asdict(MACHINE) | {"cores": 0}}, "cores is a number of 1 or more, not '0'"),
        ({"machine": None}, "has no machine"),
        ({"date": 5}, "date is a text"),
    ],
)
def test_calibration_that_was_tampered_with_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps({"shape": calibration.SHAPE, **asdict(KNOWN)} | change))
    with pytest.raises(PlanError, match=said):
        calibration.load(path)


def test_calibration_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[" * 100_000)
    with pytest.raises(PlanError, match="file is no calibration: maximum recursion depth"):
        calibration.load(tmp_path / "file")


def plan(*arguments: object, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PUSHSVC_")}
    return subprocess.run([sys.executable, "ops/plan", *map(str, arguments)], cwd=ROOT, env=clean | env, text=True,
                          capture_output=True, timeout=TIMEOUT, check=False)


REQUIRED = ("--users", 10_000, "--messages-per-second", 100, "--fan-out", 10)


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (("--users", 0, *REQUIRED[2:]), {}, "plan: users is at least 1, not 0"),
        (("--users", "many", *REQUIRED[2:]), {}, "invalid int value: 'many'"),
        (REQUIRED[:2], {}, "required: --messages-per-second, --fan-out"),
        ((*REQUIRED, "--topics-per-stream", 1001), {}, "topics_per_stream is at most 1000"),
        ((*REQUIRED, "--calibration", "/nowhere"), {}, "plan: /nowhere is no calibration"),
        ((*REQUIRED, "--calibrate", "--sample", 5), {}, "plan: a calibration opens 100 to 15000 streams, not 5"),
        *(((*REQUIRED, f"--{name}", 0), {}, f"plan: {name.replace('-', '_')} is above 0, not 0")
          for name in ("workers", "addresses", "cores", "memory-gb", "descriptors")),
        ((*REQUIRED, "--memory-gb", "nan"), {}, "plan: memory_gb is above 0, not nan"),
        ((*REQUIRED, "--memory-gb", "1e300"), {}, "plan: memory_gb is at most 1e+09, not 1e+300"),
        ((*REQUIRED, "--cores", -3), {}, "plan: cores is above 0, not -3"),
        ((*REQUIRED, "--event-bytes", 1_048_577), {}, "plan: event_bytes is at most 1048576, as PUSHSVC_MAX_BODY_BYTES"),
        ((*REQUIRED, "--sockets", 7), {}, "plan: sockets is at most 4, not 7"),
        (REQUIRED, {"PUSHSVC_BACKLOG": "x"}, "plan: PUSHSVC_BACKLOG is a whole number, not 'x'"),
    ],
)
def test_bad_input_ends_with_2_and_one_clear_sentence(arguments: tuple[Any, ...], env: dict[str, str], said: str) -> None:
    done = plan(*arguments, **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


# --- The program -----------------------------------------------------------------------------------------


def test_exit_code_tells_whether_the_load_fits(tmp_path: Path) -> None:
    file = tmp_path / "file"
    calibration.save(KNOWN, file)
    fits = plan(*REQUIRED, "--calibration", file)
    assert (fits.returncode, fits.stderr) == (0, "")
    assert "Fits. The first wall is" in fits.stdout
    tight = plan(*REQUIRED, "--calibration", file, "--json", PUSHSVC_MAX_STREAMS="1000", WEB_CONCURRENCY="1")
    assert (tight.returncode, json.loads(tight.stdout)["needs"]["workers"]) == (0, 11)
    assert plan(*REQUIRED, "--calibration", file, "--workers", 1, PUSHSVC_MAX_STREAMS="1000").returncode == 1
    assert plan(*REQUIRED, "--calibration", file, "--memory-gb", 0.1).returncode == 1


@pytest.mark.parametrize(("sockets", "proxy"), [(1, False), (3, True)])
def test_settings_of_the_kernel_that_are_too_small_are_those_that_limits_finds(
    sockets: int, proxy: bool, tmp_path: Path
) -> None:
    calibration.save(KNOWN, tmp_path / "file")
    done = plan("--users", 5_000_000, *REQUIRED[2:], "--sockets", sockets, "--calibration", tmp_path / "file", "--json")
    told = json.loads(done.stdout)["assumptions"][-1]
    command = re.findall(r"`python3 (.+?)`", told)[0].split()
    assert ("--no-proxy" in command) is not proxy

    looked = subprocess.run([sys.executable, *command, "--json"], cwd=ROOT, text=True, capture_output=True,
                            timeout=TIMEOUT, check=False)
    small = [limit for limit in json.loads(looked.stdout)["limits"] if "." in limit["name"]
             and limit["state"] in ("small", "later") and "tcp_mem" not in limit["name"]]  # of the memory in the file

    assert "net.ipv4.tcp_max_orphans" in [limit["name"] for limit in small]
    for limit in small:
        have, need = (" ".join(map(str, limit[each])) for each in ("have", "need"))
        assert f"{limit['name']} is {have}, needs {need}" in told
    assert told.count(", needs ") - told.count("tcp_mem is") == len(small)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_calibration_that_is_broken_off_ends_with_130_and_keeps_nothing(number: int, tmp_path: Path) -> None:
    measuring = subprocess.Popen([sys.executable, "ops/plan", *map(str, REQUIRED), "--calibrate", "--calibration",
                                  str(tmp_path / "file"), "--sample", "1000"], cwd=ROOT, stderr=subprocess.PIPE,
                                 text=True)
    try:
        assert measuring.stderr is not None
        assert "1,000 streams on one topic" in measuring.stderr.readline()
        measuring.send_signal(number)
        assert measuring.communicate(timeout=TIMEOUT)[1].splitlines()[-1] == "broken off"
    finally:
        measuring.kill()
        measuring.wait()
    assert measuring.returncode == 130
    assert not [*tmp_path.iterdir()]


def test_small_real_calibration_finds_plausible_costs_and_is_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    done = plan(*REQUIRED, "--calibrate", "--calibration", file, "--sample", TINY, "--json", "--proxies", 0)
    assert done.returncode in (0, 1), done.stderr
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()[:3]] == [
        "streams on one topic", "streams with a topic of their own", "streams of 8 topics at two workers"]
    found = json.loads(done.stdout)
    assert set(found) == {"fits", "load", "machine", "settings", "calibration", "rates", "needs", "walls", "first_wall",
                          "first_hard_wall", "assumptions"}
    known = calibration.load(file)
    assert found["calibration"] == asdict(known)
    costs = known.costs
    assert 0 < costs.stream_bytes <= costs.own_bytes < 5000
    assert 1_000_000 < costs.worker_bytes < costs.service_bytes < 500_000_000
    assert 500 < costs.socket_bytes < 100_000
    assert 3 < costs.event_us < 1000
    assert 3 < costs.apart_us <= costs.single_us < 50_000
    assert costs.connect_us > 20
    assert costs.publish_us > 20
    assert 0 < costs.heartbeat_us < 5000
    assert (costs.heartbeat_bytes, known.streams) == (7, TINY)
    assert 150 < costs.head_bytes < 1000
    assert 20 < costs.frame_bytes < 60
    assert found["first_wall"] == min(found["walls"], key=lambda wall: wall["reach"])["name"]
    assert all(value is not None for wall in found["walls"] for value in wall.values())
