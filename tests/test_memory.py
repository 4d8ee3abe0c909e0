"""Memory: a worker that has none left for further streams says so before the kernel ends it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pushsvc.hub import LOOK_STREAMS, Hub
from pushsvc.memory import memory_check
from pushsvc.metrics import Metrics
from pushsvc.settings import Settings
from tests.support.client import Stream, publish, request
from tests.support.server import Server
from tests.support.wait import eventually

MIB = 1 << 20


class Machine:
    """What /proc/self and /sys/fs/cgroup say, as a tree of files."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.write(self.proc / "statm", "90000 20000 5000 1 0 30000 0")
        self.write(self.proc / "cgroup", "")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def v2(self, path: str, limit: str, used: int, files: int = 0) -> None:
        folder = self.cgroups / path.lstrip("/")
        self.write(folder / "memory.max", limit)
        self.write(folder / "memory.current", str(used))
        self.write(folder / "memory.stat", f"anon 1\nsock 2\ninactive_file {files // 2}\nactive_file {files // 4}\n"
                   f"slab_reclaimable {files // 4}")

    def v1(self, path: str, limit: int, used: int, files: int = 0) -> None:
        folder = self.cgroups / "memory" / path.lstrip("/")
        self.write(folder / "memory.limit_in_bytes", str(limit))
        self.write(folder / "memory.usage_in_bytes", str(used))
        self.write(folder / "memory.stat", f"cache 9\ninactive_file 7\ntotal_cache {files}\ntotal_inactive_file {files}")

    def check(self, most: int = 0) -> Callable[[], bool]:
        return memory_check(most, self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_resident_memory_above_the_setting_is_short(machine: Machine) -> None:
    pages = 20_000 * 4096
    assert machine.check(pages - 1)()
    assert not machine.check(pages)()


@pytest.mark.parametrize(("used", "files", "short"), [(89, 0, False), (91, 0, True), (99, 10, False), (99, 4, True)])
@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_is_short_when_nine_tenths_of_its_limit_are_used(
    machine: Machine, version: int, used: int, files: int, short: bool
) -> None:
    """The kernel's caches do not count: it gives those back first."""
    machine.write(machine.proc / "cgroup", "4:memory:/a/b\n0::/" if version == 1 else "0::/a/b")
    fill = machine.v1 if version == 1 else machine.v2
    fill("/a/b", 100 * MIB, used * MIB, files * MIB)  # type: ignore[arg-type]
    assert machine.check()() is short


def test_limit_of_a_cgroup_above_counts_too(machine: Machine) -> None:
    machine.write(machine.proc / "cgroup", "0::/slice/service")
    machine.v2("/slice/service", "max", 50 * MIB)
    machine.v2("/slice", str(100 * MIB), 95 * MIB)
    assert machine.check()()


def test_container_that_sees_only_its_own_cgroup_at_the_top_is_bounded_by_it(machine: Machine) -> None:
    machine.write(machine.proc / "cgroup", "4:memory:/docker/1234\n0::/")
    machine.v1("/", 100 * MIB, 95 * MIB)
    assert machine.check()()


def test_limit_that_is_changed_while_the_service_runs_counts(machine: Machine) -> None:
    machine.write(machine.proc / "cgroup", "0::/a")
    machine.v2("/a", "max", 95 * MIB)
    check = machine.check()
    assert not check()
    machine.v2("/a", str(100 * MIB), 95 * MIB)
    assert check()


def test_setting_takes_the_place_of_the_cgroup(machine: Machine) -> None:
    machine.write(machine.proc / "cgroup", "0::/a")
    machine.v2("/a", str(100 * MIB), 95 * MIB)
    assert not machine.check(1 << 40)()


@pytest.mark.parametrize("cgroup", ["", "0::/", "0::/gone", "4:memory:/gone", "3:cpu,cpuacct:/a"])
def test_without_a_limit_nothing_is_short(machine: Machine, cgroup: str) -> None:
    machine.write(machine.proc / "cgroup", cgroup)
    machine.v2("/a", str(100 * MIB), 95 * MIB)
    assert not machine.check()()


def test_files_that_go_away_or_make_no_sense_are_no_shortage(machine: Machine) -> None:
    machine.write(machine.proc / "cgroup", "0::/a")
    machine.v2("/a", str(100 * MIB), 95 * MIB)
    check = machine.check()
    assert check()
    machine.write(machine.cgroups / "a/memory.stat", "no numbers here")
    assert not check()
    (machine.cgroups / "a/memory.current").unlink()
    assert not check()


def test_hub_is_full_while_memory_is_short_and_takes_streams_again_after() -> None:
    short = [True]
    hub = Hub(Settings(), Metrics(), is_short=lambda: short[0])
    assert not hub.is_full()
    hub._look_at_memory()
    assert hub.is_full()
    short[0] = False
    hub._look_at_memory()
    assert not hub.is_full()


def test_storm_is_refused_before_the_second_is_over() -> None:
    short: list[bool] = []
    hub = Hub(Settings(), Metrics(), is_short=lambda: bool(short))
    assert not any(hub.is_full() for _ in range(1000))
    short.append(True)
    assert [hub.is_full() for _ in range(1000)].index(True) <= LOOK_STREAMS


def test_worker_without_memory_refuses_streams_softly_and_goes_on_otherwise(tmp_path: Path) -> None:
    env = {"PUSHSVC_MAX_MEMORY_BYTES": str(MIB), "PUSHSVC_COMEBACK_MS": "7"}
    with Server(tmp_path, workers=1, env=env) as server:
        with Stream(server.url, "room") as early:
            early.opened() if not early.ended else None
            eventually(lambda: "short of memory" in server.log(), message="the worker says that memory is short")
            with Stream(server.url, "room") as refused:
                assert refused.rest() == []
                assert (refused.status, refused.clean_end) == (200, True)
                assert refused.reader.comments[-1].strip() == "full"
                assert 1 <= (refused.reader.reconnection_time or 0) <= 7
            id = publish(server.url, topic="room", data="goes on")
            if not early.ended:
                assert early.next().last_event_id == id
        assert request("GET", f"{server.url}/readyz").status == 200
        assert len(re.findall("short of memory", server.log())) == 1, "it is said once"


def test_worker_with_memory_enough_is_not_short(tmp_path: Path) -> None:
    with Server(tmp_path, workers=1, env={"PUSHSVC_MAX_MEMORY_BYTES": str(1 << 40)}) as server:
        with Stream(server.url, "room") as stream:
            stream.opened()
            stream.quiet(1.5)
        assert "short of memory" not in server.log()
