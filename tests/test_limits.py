"""ops/limits: what it computes, and that it leaves a machine as it found it."""

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.bench import terminal
from ops.plan import calibration
from tests.support.programs import missing, program
from tests.support.server import ROOT
from tests.test_plan import KNOWN

LIMITS = ROOT / "ops" / "limits"
ENOUGH, SMALL, USAGE, FAILED, CHANGED = range(5)
GIB = 1 << 30
UNIT = "etc/systemd/system/pushsvc.service"
SEEN = ("net/core/somaxconn", "net/ipv4/tcp_max_syn_backlog", "net/ipv4/ip_local_port_range", "net/ipv4/tcp_rmem",
        "net/ipv4/tcp_wmem", "net/ipv4/tcp_max_tw_buckets", "fs/file-max", "fs/nr_open")
LOW = {"net/core/somaxconn": "77", "net/ipv4/ip_local_port_range": "30000\t30100",
       "net/ipv4/tcp_rmem": "4096\t9000\t9001"}
STREAMS = "20000"  # of which the settings of the whole machine hold as many: a test must not raise those
FILES = ["etc/security/limits.d/60-pushsvc.conf", "etc/sysctl.d/60-pushsvc.conf",
         "etc/systemd/system/pushsvc.service.d/60-limits.conf", "var/lib/pushsvc-limits/state.json"]


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(LIMITS))
    return importlib.import_module("needs")


class Machine:
    """A network namespace with low settings of its own, and a tree for the files. `run` runs the tool there."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root

    def sh(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, timeout=60,
                              check=False)

    def run(self, *arguments: str) -> tuple[int, str]:
        done = self.sh(sys.executable, str(LIMITS), "--streams", STREAMS, "--workers", "4", "--root",
                       str(self.root), *arguments)
        return done.returncode, done.stdout + done.stderr

    def sysctls(self) -> dict[str, str]:
        found = self.sh("grep", "", *(f"/proc/sys/{name}" for name in SEEN)).stdout
        return dict(line.removeprefix("/proc/sys/").split(":", 1) for line in found.splitlines())

    def tree(self) -> "dict[str, Look]":
        return tree(self.root)

    def all(self) -> Any:
        return self.sysctls(), self.tree()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        missing("a network namespace needs root and the ip command")
    name, root = f"pushsvc-limits-{os.getpid()}", tmp_path / "root"
    root.mkdir()
    subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    try:
        machine = Machine(name, root)
        for setting, value in LOW.items():
            machine.sh("sh", "-c", f"echo '{value}' > /proc/sys/{setting}")
        assert {name: machine.sysctls()[name] for name in LOW} == LOW
        yield machine
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, capture_output=True)


def tool(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LIMITS), *arguments], capture_output=True, text=True, timeout=60,
                          check=False, **options)


# --- What is computed ------------------------------------------------------------------------------------

COMPUTED = {
    "nofile": [((1000, 1), (2064,)), ((200_000, 4), (54_564,)), ((1_000_000, 54), (20_879,))],
    "fs.nr_open": [((1000, 1), (3000,)), ((200_000, 4), (401_000,))],
    "fs.file-max": [((1000, 1), (103_000,)), ((200_000, 4), (700_000,))],
    "net.core.somaxconn": [((100, 2), (512,)), ((10_000, 2), (8192,)), ((1_000_000, 1), (65_535,))],
    "net.ipv4.tcp_max_syn_backlog": [((100, 2), (1024,)), ((10_000, 2), (16_384,))],
    "net.ipv4.ip_local_port_range": [((25_000, 2), (32_768, 60_999)), ((26_000, 2), (10_000, 65_535))],
    "net.ipv4.tcp_mem": [((1000, 1), (1000, 1500, 2000)), ((10_000_000, 9), (524_288, 786_432, 1_048_576))],
    "net.ipv4.tcp_rmem": [((1000, 1), (4096, 65_536, 1 << 20))],
    "net.ipv4.tcp_wmem": [((1000, 1), (4096, 16_384, 1 << 20))],
    "net.ipv4.tcp_max_orphans": [((200_000, 4), (200_000,))],
    "net.ipv4.tcp_max_tw_buckets": [((200_000, 4), (400_000,))],
    "net.core.netdev_max_backlog": [((1000, 1), (1000,)), ((200_000, 4), (16_384,)), ((9_000_000, 4), (65_536,))],
    "net.netfilter.nf_conntrack_max": [((200_000, 4), (465_536,))],
    "memory": [((1000, 1), (81_000_000,)), ((200_000, 4), (7_380_000_000,))],
}
WITHOUT_PROXY = {"fs.nr_open": (54_564,), "fs.file-max": (300_000,), "net.ipv4.ip_local_port_range": (32_768, 60_999),
                 "net.ipv4.tcp_mem": (100_000, 150_000, 200_000), "net.ipv4.tcp_max_tw_buckets": (200_000,),
                 "net.netfilter.nf_conntrack_max": (265_536,), "memory": (1_380_000_000,)}


def of(needs: Any, name: str, streams: int, workers: int, proxy: bool = True) -> tuple[int, ...]:
    target = needs.Target(streams=streams, workers=workers, connections=1000, proxy=proxy, memory_bytes=8 * GIB)
    (limit,) = [each for each in needs.LIMITS if each.name == name]
    return tuple(limit.need(target))


@pytest.mark.parametrize(("name", "asked", "need"), [(name, *row) for name, rows in COMPUTED.items() for row in rows])
def test_need_follows_from_the_streams_and_the_memory(needs: Any, name: str, asked: Any, need: tuple[int, ...]) -> None:
    assert of(needs, name, *asked) == need


@pytest.mark.parametrize(("name", "need"), WITHOUT_PROXY.items())
def test_proxy_on_another_machine_needs_less_here(needs: Any, name: str, need: tuple[int, ...]) -> None:
    assert of(needs, name, 200_000, 4, proxy=False) == need


def test_every_limit_is_computed_by_a_row_of_the_table(needs: Any) -> None:
    assert [each.name for each in needs.LIMITS if each.name not in COMPUTED] == []


def test_page_has_the_computed_figures(needs: Any) -> None:
    rows = (ROOT / "docs/limits/README.md").read_text().splitlines()
    for limit in needs.LIMITS:
        need = of(needs, limit.name, 200_000, 4)
        shown = f"{need[0] / 1e9:.1f} GB" if limit.name == "memory" else f"{need[0]:,}" if len(need) == 1 else \
            " ".join(map(str, need))
        assert [row for row in rows if row.startswith("| ") and limit.name in row and shown in row], (limit.name, shown)


@pytest.mark.parametrize(("name", "have", "need", "joined"), [
    ("net.core.somaxconn", (70_000,), (65_535,), (70_000,)),
    ("net.ipv4.tcp_wmem", (8192, 16_384, 4_000_000), (4096, 20_000, 1 << 20), (8192, 20_000, 4_000_000)),
    ("net.ipv4.ip_local_port_range", (1024, 40_000), (10_000, 65_535), (1024, 65_535)),
])
def test_nothing_that_is_higher_already_is_lowered(needs: Any, name: str, have: Any, need: Any, joined: Any) -> None:
    (limit,) = [each for each in needs.LIMITS if each.name == name]
    assert limit.joined(have, need) == joined
    assert limit.is_enough(joined, need)


def test_workers_that_have_descriptors_enough_are_counted(needs: Any) -> None:
    target = needs.Target(streams=100_000, workers=2, connections=1000, proxy=True, memory_bytes=GIB)
    assert needs.workers_for(target, 20_000) == 6
    assert needs.workers_for(target, 1000) == 0
    assert needs.workers_for(target, 101_064) == 1, "one has them all: none of them is the fullest"


# --- check, apply, revert --------------------------------------------------------------------------------


def test_check_changes_nothing_and_tells_what_is_too_small(machine: Machine) -> None:
    before = machine.all()
    code, said = machine.run()
    assert machine.all() == before
    assert code == SMALL
    assert "net.core.somaxconn                  77, needs 8192" in said
    assert "ListenOverflows" in said


def test_apply_raises_what_is_too_small_and_revert_leaves_everything_as_it_was(machine: Machine) -> None:
    before = machine.all()
    code, said = machine.run("apply", "--exit-code")
    assert code == CHANGED, said
    assert "net.core.somaxconn: 77 -> 8192" in said
    raised = machine.sysctls()
    assert raised["net/core/somaxconn"] == "8192"
    assert raised["net/ipv4/ip_local_port_range"] == "30000\t60999", "the lower end was lower already"
    assert raised["fs/file-max"] == before[0]["fs/file-max"]
    assert [name for name, (content, *_) in sorted(machine.tree().items()) if content is not None] == FILES
    assert machine.run("check")[0] == ENOUGH

    code, said = machine.run("revert", "--exit-code")

    assert code == CHANGED, said
    assert machine.all() == before


def test_apply_a_second_time_changes_nothing(machine: Machine) -> None:
    machine.run("apply")
    once = machine.all()
    code, said = machine.run("apply", "--exit-code")
    assert (code, machine.all()) == (ENOUGH, once)
    assert "changed nothing" in said


def test_apply_for_fewer_streams_lowers_nothing(machine: Machine) -> None:
    machine.run("apply", "--workers", "1")
    before = machine.all()
    assert machine.run("apply", "--workers", "4")[0] == ENOUGH
    lines = [name for name in FILES if machine.tree()[name] != before[1][name]]
    assert machine.sysctls() == before[0]
    assert b"PUSHSVC_BACKLOG=32768\n" in (machine.tree()[FILES[2]][0] or b""), lines


def test_files_of_others_are_left_alone_and_a_file_in_our_place_comes_back(machine: Machine) -> None:
    for name, content in {FILES[1]: b"# an admin's own\n", "etc/sysctl.d/99-other.conf": b"vm.swappiness = 10\n",
                          "etc/systemd/system/pushsvc.service": b"[Service]\nLimitNOFILE=2000000\n"}.items():
        path = machine.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o640)
        os.chown(path, 65534, 65533)
        os.utime(path, (1_000_000_000, 1_100_000_000))
    before = machine.all()

    machine.run("apply")
    after = machine.tree()
    assert after["etc/sysctl.d/99-other.conf"] == before[1]["etc/sysctl.d/99-other.conf"]
    assert b"LimitNOFILE=2000000\n" in (after[FILES[2]][0] or b""), "the drop-in lowers what the unit has"
    machine.run("revert")

    assert machine.all() == before


@pytest.mark.parametrize("target", ["99-other.conf", "/dev/null", "nowhere", "../../shared.conf"])
def test_link_in_the_place_of_a_file_comes_back_and_what_it_leads_to_is_not_touched(
    machine: Machine, target: str
) -> None:
    put(machine.root, "etc/sysctl.d/99-other.conf", "vm.swappiness = 10\n")
    shared = put(machine.root, "shared.conf", "vm.swappiness = 20\n")
    link = machine.root / FILES[1]
    link.symlink_to(target)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    os.utime(link, (1_000_000_000, 1_100_000_000), follow_symlinks=False)
    before = machine.all()

    code, said = machine.run("apply")
    assert code == ENOUGH, said
    assert f"in the place of a link to {target}" in said
    assert not link.is_symlink()
    assert shared.read_text() == "vm.swappiness = 20\n"
    assert machine.run("apply", "--exit-code")[0] == ENOUGH, "nothing more to change"
    assert machine.run("revert")[0] == ENOUGH

    assert machine.all() == before
    assert (str(link.readlink()), link.lstat().st_uid) == (target, 65534)


def test_link_that_somebody_has_put_there_since_is_left_and_told(machine: Machine) -> None:
    before = machine.all()
    machine.run("apply")
    file = machine.root / FILES[1]
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("copy")
    file.with_name("copy").write_bytes(content)

    code, said = machine.run("revert")

    assert code == SMALL
    assert "60-pushsvc.conf was edited since it was written: left as it is" in said
    file.with_name("copy").unlink()
    assert machine.run("revert", "--force")[0] == ENOUGH
    assert machine.all() == before


def test_what_somebody_has_changed_since_is_left_and_told(machine: Machine) -> None:
    before = machine.all()
    machine.run("apply")
    machine.sh("sh", "-c", "echo 9999 > /proc/sys/net/core/somaxconn")
    (machine.root / FILES[0]).write_text("edited\n")

    code, said = machine.run("revert")

    assert code == SMALL
    assert "net.core.somaxconn is 9999, which is not what was set: left as it is" in said
    assert "60-pushsvc.conf was edited since it was written: left as it is" in said
    assert machine.sysctls() == before[0] | {"net/core/somaxconn": "9999"}
    assert machine.run("revert", "--force")[0] == ENOUGH
    assert machine.all() == before


def test_apply_that_fails_half_way_says_what_it_did_and_can_be_taken_back(machine: Machine) -> None:
    (machine.root / "etc").mkdir()
    (machine.root / "etc/security").write_text("in the way of a folder\n")
    before = machine.all()

    code, said = machine.run("apply")

    assert code == FAILED, said
    assert "net.core.somaxconn: 77 -> 8192" in said
    assert "can be taken back with revert" in said
    assert "Traceback" not in said
    assert machine.run("revert")[0] == ENOUGH
    assert machine.all() == before


def test_revert_without_an_apply_changes_nothing(machine: Machine) -> None:
    before = machine.all()
    code, said = machine.run("revert")
    assert (code, machine.all()) == (ENOUGH, before)
    assert "changed nothing" in said


def test_setting_that_a_namespace_has_not_is_a_finding(machine: Machine) -> None:
    code, said = machine.run("check", "--json")
    assert code == SMALL
    found = {each["name"]: each for each in json.loads(said)["limits"]}
    orphans = found["net.ipv4.tcp_max_orphans"]
    if orphans["have"] is not None:
        pytest.skip("this kernel has all settings in every namespace")
    assert (orphans["state"], orphans["note"]) == ("absent", "set it outside of this network namespace")


def test_read_only_setting_is_a_finding(machine: Machine) -> None:
    mount = "mount -o bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec \"$@\""
    command = [sys.executable, str(LIMITS), "apply", "--streams", STREAMS, "--root", str(machine.root)]
    done = machine.sh("unshare", "-m", "sh", "-c", mount, "sh", *command)
    assert done.returncode == SMALL, done.stderr
    assert "not settable here: read-only here" in done.stdout
    assert machine.sysctls()["net/core/somaxconn"] == "77"


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def limit_of(said: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in json.loads(said)["limits"] if each["name"] == name]
    return found


def test_raised_setting_is_written_as_high_as_an_earlier_file_has_it(machine: Machine) -> None:
    put(machine.root, "etc/sysctl.d/50-image.conf", "net.core.somaxconn = 70000\n")
    assert machine.run("apply")[0] == ENOUGH
    assert machine.sysctls()["net/core/somaxconn"] == "8192"
    assert "net.core.somaxconn = 70000\n" in (machine.root / FILES[1]).read_text()


@pytest.mark.parametrize(("name", "line"), [
    ("etc/sysctl.conf", "net.core.somaxconn = 128"),
    ("etc/sysctl.d/99-other.conf", "net/core/somaxconn=128"),
    ("run/sysctl.d/70-other.conf", " -net.core.somaxconn = 128 "),
    ("usr/lib/sysctl.d/99-other.conf", "net.core.somaxconn\t=\t128"),
])
def test_file_that_sets_it_too_low_at_the_next_boot_is_told_with_its_line(
    machine: Machine, name: str, line: str
) -> None:
    other = put(machine.root, name, f"# an admin's own\n; net.core.somaxconn = 1\n{line}\n")

    code, said = machine.run("apply")

    assert code == SMALL, said
    assert f"{other}:3 sets it to 128 at boot" in said
    code, said = machine.run("check", "--json")
    assert code == SMALL
    found = limit_of(said, "net.core.somaxconn")
    assert (found["state"], found["have"]) == ("undone", [8192])
    assert found["boot"] == {"file": str(other), "line": 3, "value": [128]}
    other.write_text("net.core.somaxconn = 20000\n")
    assert machine.run("check")[0] == ENOUGH


SOMAXCONN = "net.core.somaxconn = 128\n"
HARMLESS = {
    "sorts before ours": {"etc/sysctl.d/10-other.conf": SOMAXCONN, "usr/lib/sysctl.d/50-other.conf": SOMAXCONN},
    "is put out by one of its name": {"usr/lib/sysctl.d/99-other.conf": SOMAXCONN, "run/sysctl.d/99-other.conf": "\n",
                                      "run/sysctl.d/98-other.conf": SOMAXCONN, "etc/sysctl.d/98-other.conf": ""},
    "has ours as its name": {"run/sysctl.d/60-pushsvc.conf": SOMAXCONN},
    "is undone by the last": {"etc/sysctl.d/99-other.conf": SOMAXCONN, "etc/sysctl.conf": "net.core.somaxconn = 9000\n"},
    "is of another kind": {"etc/sysctl.d/99-other.txt": SOMAXCONN, "etc/sysctl.d/99-glob.conf": "net.core.* = 1\n"},
}


@pytest.mark.parametrize("files", HARMLESS.values(), ids=HARMLESS)
def test_file_without_the_last_word_at_boot_is_not_told(machine: Machine, files: dict[str, str]) -> None:
    for name, text in files.items():
        put(machine.root, name, text)
    assert machine.run("apply")[0] == ENOUGH
    assert limit_of(machine.run("check", "--json")[1], "net.core.somaxconn")["boot"] is None


def test_earlier_file_that_sets_it_too_low_at_boot_is_overruled_by_ours(machine: Machine) -> None:
    put(machine.root, "etc/sysctl.d/50-other.conf", SOMAXCONN)
    machine.sh("sh", "-c", "echo 9000 > /proc/sys/net/core/somaxconn")

    assert "50-other.conf:1 sets it to 128 at boot" in machine.run("check")[1]
    assert machine.run("apply")[0] == ENOUGH
    assert "net.core.somaxconn = 9000\n" in (machine.root / FILES[1]).read_text()


def test_links_of_an_image_lead_to_places_in_it(machine: Machine) -> None:
    put(machine.root, "etc/other.conf", SOMAXCONN)
    folder = machine.root / "etc/sysctl.d"
    folder.mkdir()
    (folder / "98-masked.conf").symlink_to("/dev/null")
    (folder / "99-sysctl.conf").symlink_to("/etc/other.conf")
    machine.run("apply")
    assert "99-sysctl.conf:1 sets it to 128 at boot" in machine.run("check")[1]


# --- Without a machine of its own ------------------------------------------------------------------------


def test_image_gets_files_with_every_setting_and_the_machine_none(tmp_path: Path) -> None:
    with _unchanged():
        done = tool("apply", "--no-sysctl", "--root", str(tmp_path), "--streams", "1000000", "--workers", "60")
    assert done.returncode in (ENOUGH, SMALL), done.stderr
    lines = (tmp_path / FILES[1]).read_text().splitlines()[1:]
    names = [line.partition(" = ")[0] for line in lines]
    assert "net.core.somaxconn" in names
    assert "-net.netfilter.nf_conntrack_max" in names
    assert len(names) == 12
    assert "Environment=WEB_CONCURRENCY=60\n" in (tmp_path / FILES[2]).read_text()


IMAGE = ("--no-sysctl", "--streams", STREAMS, "--workers", "4", "--root")


Look = tuple[bytes | None, str, list[int]]


def tree(root: Path) -> dict[str, Look]:
    """All files and folders by name: content, what it is a link to, then mode, owner and group, and the time of the last
    change, which folders do not keep."""
    return {str(path.relative_to(root)): look(path) for path in root.rglob("*")}


def look(path: Path) -> Look:
    status = path.lstat()
    return (path.read_bytes() if path.is_file() else None, str(path.readlink()) if path.is_symlink() else "",
            [status.st_mode, status.st_uid, status.st_gid, 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns])


def test_image_that_was_moved_since_is_reverted_where_it_is(tmp_path: Path) -> None:
    image, moved = tmp_path / "image", tmp_path / "moved"
    put(image, FILES[1], "# an admin's own\n")
    before = tree(image)
    assert tool("apply", *IMAGE, str(image)).returncode in (ENOUGH, SMALL)
    image.rename(moved)

    done = tool("revert", *IMAGE, str(moved))

    assert done.returncode == ENOUGH, done.stderr
    assert tree(moved) == before


def test_setting_that_is_not_here_now_is_not_forgotten(tmp_path: Path) -> None:
    """Of a module that is not loaded, or of another network namespace."""
    noted = {"version": 1, "sysctls": {"net.nowhere": {"was": [1], "set": [2]}}}
    state = put(tmp_path, FILES[3], json.dumps(noted))
    done = tool("revert", *IMAGE, str(tmp_path))
    assert (done.returncode, done.stderr) == (SMALL, "")
    assert "left    net.nowhere is not here now, so that 1 is not put back\n" in done.stdout
    assert json.loads(state.read_text())["sysctls"] == noted["sysctls"]
    assert tool("revert", "--force", *IMAGE, str(tmp_path)).returncode == ENOUGH
    assert not state.exists()


def test_state_of_another_root_is_refused_and_kept(tmp_path: Path) -> None:
    """As they were once: with whole paths."""
    state = put(tmp_path, FILES[3], json.dumps({"version": 1, "files": {"/elsewhere/a": {"was": None, "set": ""}}}))
    done = tool("revert", *IMAGE, str(tmp_path))
    assert done.returncode == FAILED
    assert done.stderr == f"limits: {state} is of another root: it notes /elsewhere/a\n"
    assert state.exists()

    own = str(put(tmp_path, "etc/own", ""))
    state.write_text(json.dumps({"version": 1, "files": {own: {"was": None, "set": ""}}}))
    assert f"{own}: removed" in tool("revert", *IMAGE, str(tmp_path)).stdout


@pytest.mark.parametrize("link", ["{outside}/host", "../../outside/host", "/inside", "../../../../inside"])
def test_folder_of_an_image_that_is_a_link_leads_nowhere_out_of_it(link: str, tmp_path: Path) -> None:
    image, outside = tmp_path / "image", tmp_path / "outside"
    put(outside, "host/50-own.conf", "net.core.somaxconn = 1\n")
    (image / "etc").mkdir(parents=True)
    folder = image / "etc/sysctl.d"
    folder.symlink_to(link.format(outside=outside))
    before = tree(tmp_path)

    assert tool("apply", *IMAGE, str(image)).returncode in (ENOUGH, SMALL)

    assert tree(outside) == {"host": before["outside/host"], "host/50-own.conf": before["outside/host/50-own.conf"]}
    assert [path for path in image.rglob("60-pushsvc.conf") if path.parent.name in ("host", "inside")]
    assert tool("revert", *IMAGE, str(image)).returncode == ENOUGH
    assert tree(tmp_path) == before


NO_STATES = ["", "[]", "null", '{"version": 1, "x": 2}', '{"version": 1, "files": []}', '{"version": 1, "folders": [1]}',
             '{"version": 1, "sysctls": {"a": {}}}', '{"version": 1, "sysctls": {"a": {"was": [1], "set": ["2"]}}}',
             '{"version": 1, "files": {"a": {"was": null}}}', '{"version": 1, "files": {"a": {"was": "%", "set": "="}}}',
             '{"version": 1, "files": {"a": {"was": "", "set": ""}}}', '{"version": 1, "written": {"a": null}}',
             '{"version": 2}', '{"version": 1, "files": {"a": {"was": null, "set": "", "link": "b", "owner": [0]}}}']


@pytest.mark.parametrize("content", NO_STATES)
@pytest.mark.parametrize("action", ["apply", "revert"])
def test_state_that_is_none_is_told_and_kept(action: str, content: str, tmp_path: Path) -> None:
    state = put(tmp_path, FILES[3], content)
    done = tool(action, "--json", *IMAGE, str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (FAILED, 1)
    assert done.stderr == f"limits: {json.loads(done.stdout)['error']}\n"
    assert str(state) in done.stderr
    assert state.read_text() == content


@pytest.mark.parametrize(("content", "said"), [
    (b"[Service]\nUser=\xff\n", f"/{UNIT} cannot be read: it is no UTF-8"),
    (b"[Service]\nEnvironment='A=1\n", f"/{UNIT}:2 cannot be read: No closing quotation"),
])
def test_unit_that_cannot_be_read_is_told(content: bytes, said: str, tmp_path: Path) -> None:
    put(tmp_path, UNIT, "").write_bytes(content)
    for action in ("check", "apply"):
        done = tool(action, "--json", *IMAGE, str(tmp_path))
        assert (done.returncode, done.stderr) == (FAILED, f"limits: {said}\n")
        assert json.loads(done.stdout)["error"] == said


@pytest.mark.parametrize("user", ["a b\n* - nofile 1", "a b", "a\n", "", "*", "#a", "@", "1:2"])
def test_user_that_is_no_name_is_wrong_usage(user: str, tmp_path: Path) -> None:
    done = tool("apply", *IMAGE, str(tmp_path), f"--user={user}")
    assert done.returncode == USAGE
    assert done.stderr.endswith("argument --user: the name of a user, or of a group after @\n")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("user", ["www-data", "@push", "push.svc@example.com"])
def test_user_or_group_gets_the_descriptors(user: str, tmp_path: Path) -> None:
    tool("apply", *IMAGE, str(tmp_path), f"--user={user}")
    assert (tmp_path / FILES[0]).read_text().splitlines()[1].startswith(f"{user} soft nofile ")


def test_disk_that_is_full_leaves_no_file_behind(tmp_path: Path) -> None:
    """Of the state, which is written first."""
    before = tree(tmp_path)
    command = [program("prlimit"), "--fsize=1", sys.executable, str(LIMITS), "apply", *IMAGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (FAILED, "limits: [Errno 27] File too large\n")
    assert tree(tmp_path) == before


def test_file_that_cannot_be_written_is_not_left_by_half(needs: Any, monkeypatch: Any, tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = put(tmp_path, "file", "before")
    change = importlib.import_module("change")
    monkeypatch.setattr(change.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        change.replace(path, b"after")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]


def test_link_of_an_image_that_leads_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "etc").symlink_to("etc")
    done = tool("apply", *IMAGE, str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (FAILED, 1)
    assert "Too many levels of symbolic links" in done.stderr


MORE_DESCRIPTORS = {
    "the unit": {UNIT: "LimitNOFILE = 2M"},
    "the unit, without a bound": {UNIT: "LimitNOFILE=infinity"},
    "a unit of a package, both limits": {"usr/lib/systemd/system/pushsvc.service": "LimitNOFILE=1K:2M"},
    "a drop-in": {UNIT: "LimitNOFILE=1000", f"{UNIT}.d/50-image.conf": "LimitNOFILE=2M"},
    "a drop-in elsewhere, over two lines": {UNIT: "", "usr/lib/systemd/system/pushsvc.service.d/a.conf":
                                            "LimitNOFILE=\\\n# of the image\n 2M"},
    "a drop-in for all": {UNIT: "", "etc/systemd/system/service.d/50-image.conf": "LimitNOFILE=2M"},
}


def put_units(root: Path, lines: dict[str, str]) -> None:
    for name, line in lines.items():
        put(root, name, f"[Unit]\nLimitNOFILE=9M\n[Service]\n{line}\n")


@pytest.mark.parametrize("lines", MORE_DESCRIPTORS.values(), ids=MORE_DESCRIPTORS)
def test_drop_in_lowers_no_descriptors_of_the_unit(lines: dict[str, str], tmp_path: Path) -> None:
    put_units(tmp_path, lines)
    tool("apply", *IMAGE, str(tmp_path))
    limit = "infinity" if "infinity" in str(lines) else 2 << 20
    assert f"LimitNOFILE={limit}\n" in (tmp_path / FILES[2]).read_text()


@pytest.mark.parametrize("lines", [
    {UNIT: "LimitNOFILE=2M", f"{UNIT}.d/50-low.conf": "LimitNOFILE=100"},
    {UNIT: "LimitNOFILE=2M\nLimitNOFILE="},
    {"usr/lib/systemd/system/pushsvc.service": "LimitNOFILE=2M", UNIT: ""},
    {f"{UNIT}.d/50-a.conf": "", "run/systemd/system/pushsvc.service.d/50-a.conf": "LimitNOFILE=2M"},
])
def test_descriptors_that_the_unit_does_not_have_in_the_end_do_not_count(lines: dict[str, str], tmp_path: Path) -> None:
    put_units(tmp_path, lines)
    tool("apply", *IMAGE, str(tmp_path))
    assert f"LimitNOFILE={1 << 20}\n" in (tmp_path / FILES[2]).read_text()


def test_drop_in_after_ours_with_fewer_descriptors_is_told(tmp_path: Path) -> None:
    put_units(tmp_path, {UNIT: "", f"{UNIT}.d/99-low.conf": "LimitNOFILE=100"})
    done = tool("apply", *IMAGE, str(tmp_path))
    assert done.returncode == SMALL
    assert f"{tmp_path}/{UNIT}.d/99-low.conf:4 sets it to 100 for the unit: take that line out" in done.stdout
    found = limit_of(tool("check", "--json", *IMAGE, str(tmp_path)).stdout, "nofile")
    assert (found["boot"]["line"], found["boot"]["value"]) == (4, [100])
    (tmp_path / f"{UNIT}.d/99-low.conf").unlink()
    assert limit_of(tool("check", "--json", *IMAGE, str(tmp_path)).stdout, "nofile")["boot"] is None


@pytest.mark.parametrize(("variable", "wanted"), [("PUSHSVC_BACKLOG", 8192), ("WEB_CONCURRENCY", 4)])
@pytest.mark.parametrize("where", ["file", "wildcard", "drop-in"])
def test_environment_that_counts_more_than_ours_is_told(variable: str, wanted: int, where: str, tmp_path: Path) -> None:
    line = "EnvironmentFile=/etc/pushsvc/*.env" if where == "wildcard" else "EnvironmentFile=-/etc/pushsvc/b.env"
    put_units(tmp_path, {UNIT: f"EnvironmentFile=-/nowhere\n{line}\nEnvironment=A=1"})
    other = f"{UNIT}.d/99-other.conf" if where == "drop-in" else "etc/pushsvc/b.env"
    text = f'[Service]\nEnvironment="A=2" {variable}=3\n' if where == "drop-in" else f"# a\n{variable}=3\n"
    path = put(tmp_path, other, text)

    done = tool("apply", *IMAGE, str(tmp_path))

    assert done.returncode == SMALL
    told = f"{path}:2 sets {variable}=3 for the unit: take that line out, or set it to {wanted}"
    assert told in done.stdout
    assert json.loads(tool("check", "--json", *IMAGE, str(tmp_path)).stdout)["overruled"] == [told]
    path.write_text(text.replace("=3", f"={wanted}"))
    assert json.loads(tool("check", "--json", *IMAGE, str(tmp_path)).stdout)["overruled"] == []


@pytest.mark.parametrize("name", ["etc/sysctl.d/50-image.conf", "usr/lib/sysctl.d/10-image.conf"])
def test_file_of_sysctls_lowers_nothing_that_an_earlier_one_sets(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, "net.core.somaxconn = 70001\nfs.file-max=99999999999\nnet.ipv4.tcp_wmem = 5000\n")
    for _ in range(2):  # the second one has our own file there as well
        tool("apply", *IMAGE, str(tmp_path))
        lines = dict(line.split(" = ") for line in (tmp_path / FILES[1]).read_text().splitlines()[1:])
        assert (lines["net.core.somaxconn"], lines["fs.file-max"]) == ("70001", "99999999999")
        least, *others = map(int, lines["net.ipv4.tcp_wmem"].split())
        assert least == 5000
        assert others >= [16_384, 1 << 20]


@pytest.mark.parametrize(("line", "soft", "hard"), [
    ("* - nofile 2000000", "2000000", "2000000"),
    ("pushsvc\thard nofile 2000000 # an admin's", "1048576", "2000000"),
    ("@pushsvc soft nofile unlimited", "unlimited", "1048576"),
    ("other - nofile 2000000\n#* - nofile 3000000\n* - nproc 4000000", "1048576", "1048576"),
])
@pytest.mark.parametrize("name", ["etc/security/limits.conf", "etc/security/limits.d/50-a.conf"])
def test_logins_get_no_fewer_descriptors_than_others_give_them(
    name: str, line: str, soft: str, hard: str, tmp_path: Path
) -> None:
    put(tmp_path, name, f"# of the image\n{line}\n")
    tool("apply", *IMAGE, str(tmp_path))
    lines = [f"pushsvc soft nofile {soft}", f"pushsvc hard nofile {hard}"]
    assert (tmp_path / FILES[0]).read_text().splitlines()[1:] == lines


def test_image_for_fewer_streams_lowers_nothing(tmp_path: Path) -> None:
    tool("apply", "--no-sysctl", "--root", str(tmp_path), "--streams", "90000000", "--workers", "4")
    once = (tmp_path / FILES[1]).read_text().splitlines()[1:]
    tool("apply", *IMAGE, str(tmp_path))
    assert (tmp_path / FILES[1]).read_text().splitlines()[1:] == once


def test_number_of_workers_stays_where_none_is_given(tmp_path: Path) -> None:
    tool("apply", *IMAGE, str(tmp_path))
    before = tree(tmp_path)
    assert b"Environment=WEB_CONCURRENCY=4\n" in (before[FILES[2]][0] or b"")
    without = ("--no-sysctl", "--streams", STREAMS, "--root", str(tmp_path))

    assert "changed nothing" in tool("apply", *without).stdout

    assert tree(tmp_path) == before
    assert json.loads(tool("check", "--json", *without).stdout)["workers"] == 4


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    def read() -> list[str]:
        return [(Path("/proc/sys") / name).read_text() for name in SEEN]

    before = read()
    yield
    assert read() == before


FAKED = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import system
system.SYS, system.PROC = Path(sys.argv[2], "sys"), Path(sys.argv[2])
system.TRACKED = system.SYS / system.TRACKED.relative_to("/proc/sys")
sys.exit(runpy.run_path(sys.argv[1] + "/__main__.py")["main"](sys.argv[3:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may apply settings")
def test_every_setting_is_raised_and_put_back(needs: Any, tmp_path: Path) -> None:
    """Those of the whole machine as well, so before files that stand for the kernel's."""
    proc, root = tmp_path / "proc", tmp_path / "root"
    limits = [limit for limit in needs.LIMITS if limit.is_sysctl]
    for limit in limits:
        low = "30000 30100" if limit.is_range else " ".join(["700", "701", "702"][:len(of(needs, limit.name, 1, 1))])
        put(proc, f"sys/{limit.name.replace('.', '/')}", f"{low}\n")
    put(proc, "sys/net/netfilter/nf_conntrack_count", "5\n")
    put(proc, "meminfo", f"MemTotal: {8 * GIB // 1024} kB\n")
    for number, name in enumerate(FILES[:3]):
        os.utime(put(root, name, "# an admin's own\n"), (1_000_000_000, 1_100_000_000 + number))
    values = {limit.name: proc / "sys" / limit.name.replace(".", "/") for limit in limits}
    before = {name: file.read_text() for name, file in values.items()}, tree(root)

    def run(action: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", FAKED, str(LIMITS), str(proc), action, "--streams", "2000000", "--workers", "4",
                   "--root", str(root)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run("apply")
    assert done.returncode == SMALL, done.stderr  # the memory stays too small
    raised = {name: tuple(map(int, file.read_text().split())) for name, file in values.items()}
    assert raised == {name: of(needs, name, 2_000_000, 4) for name in values}
    lines = [line.lstrip("-") for line in (root / FILES[1]).read_text().splitlines()[1:]]
    assert lines == [f"{name} = {' '.join(map(str, value))}" for name, value in raised.items()]

    assert run("revert").returncode == ENOUGH

    assert ({name: file.read_text() for name, file in values.items()}, tree(root)) == before


def test_json_has_each_limit_with_its_reason(needs: Any) -> None:
    done = tool("--json", "--streams", "1000")
    found = json.loads(done.stdout)
    about = {"action": "check", "streams": 1000, "proxy": True, "done": [], "left": [], "error": ""}
    assert about.items() <= found.items()
    assert [each["name"] for each in found["limits"]] == [limit.name for limit in needs.LIMITS]
    for each in found["limits"]:
        assert set(each) == {"name", "unit", "have", "need", "state", "note", "boot", "why", "without"}
        assert each["state"] in ("enough", "small", "undone", "later", "unused", "absent")
        assert all(type(number) is int for number in [*(each["have"] or []), *each["need"]])
    assert done.returncode == (
        SMALL if any(each["state"] in ("small", "undone") for each in found["limits"]) else ENOUGH)


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_who_is_not_root_is_told_so(action: str) -> None:
    code = ("import os, runpy, sys; sys.path.insert(0, sys.argv[1]); tool = runpy.run_path(sys.argv[1] + '/__main__.py');"
            "tool['parse']([]);  # imports, which the other user might not be able to read\n"
            "os.geteuid() or os.seteuid(65534); sys.exit(tool['main'](sys.argv[2:]))")
    done = subprocess.run([sys.executable, "-c", code, str(LIMITS), action], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == FAILED, done.stderr
    assert f"{action} needs root" in done.stderr


@pytest.mark.parametrize("arguments", [["raise"], ["--streams", "many"], ["--streams", "0"], ["--workers", "-1"],
                                       ["--workers", "5000"], ["--streams", "9" * 400], ["--pid", "9" * 20]])
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    assert tool(*arguments).returncode == USAGE


ANSWERS = {
    "limits": ["ops/limits", "--json"],
    "plan": ["ops/plan", "--users=10", "--messages-per-second=1", "--fan-out=1", "--calibration={calibration}"],
    "doctor": ["ops/doctor", "--only", "process"],
    "load": ["ops/load", "show", "ops/load/shapes/ubuntu-irc-2006-06-01.jsonl"],
}

UNREAD = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("command", ANSWERS.values(), ids=ANSWERS)
def test_tool_whose_answer_nobody_reads_ends_without_a_word(command: list[str], tmp_path: Path) -> None:
    """As in `... | head -1`, where head has ended first."""
    calibration.save(KNOWN, tmp_path / "known")
    command = [each.format(calibration=tmp_path / "known") for each in command]
    done = subprocess.run([sys.executable, "-c", UNREAD, sys.executable, *command], capture_output=True, text=True,
                          timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("name", "command"), ANSWERS.items(), ids=ANSWERS)
def test_tool_whose_answer_cannot_be_written_says_so_in_a_line(
    name: str, command: list[str], options: list[str], tmp_path: Path
) -> None:
    calibration.save(KNOWN, tmp_path / "known")
    command = [*options, *(each.format(calibration=tmp_path / "known") for each in command)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              check=False, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.endswith("No space left on device\n")


def test_progress_says_nothing_where_standard_error_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `2>&-`."""
    monkeypatch.setattr(sys, "stderr", None)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), terminal.Progress() as progress:
        progress.say("a line")
        progress.show("a bar", 1, 2)
    assert (output.getvalue(), progress.is_terminal) == ("", False)


@pytest.mark.parametrize("action", ["check", "apply", "revert"])
@pytest.mark.parametrize("name", ["missing", "file"])
def test_root_that_is_no_folder_is_wrong_usage_and_nothing_is_made(action: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = tool(action, "--no-sysctl", "--root", str(tmp_path / name))
    assert done.returncode == USAGE
    assert done.stderr.splitlines()[-1].endswith(f"error: --root: no folder {tmp_path / name}")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


TELLS = """
import sys
sys.path[:0] = ["ops/limits"]
import stage
with stage.PROGRESS:
    show = stage.Show(9, "a show", steps=4)
    for name in ("before", "symptom"):
        show.add(name, "of " + name)
"""


def told(stderr: int) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-c", TELLS], cwd=ROOT, stderr=stderr, timeout=60, check=True,
                          env=os.environ | {"TERM": "xterm"})


def test_progress_of_a_show_is_a_bar_on_a_terminal_and_nothing_elsewhere() -> None:
    reader, writer = os.openpty()
    try:
        told(writer)
        lines = os.read(reader, 1 << 16).decode().split("\r\x1b[K")
    finally:
        os.close(reader)
        os.close(writer)
    assert lines == [
        "", "[........................]   0 %  a show: 4 phases",
        "[######..................]  25 %  a show: before, of before",
        "[############............]  50 %  a show: symptom, of symptom", ""]
    assert told(subprocess.PIPE).stderr == b""


def test_broken_connection_is_not_taken_for_an_answer_that_nobody_reads() -> None:
    def broken() -> int:
        raise BrokenPipeError("of a connection")

    def full() -> int:
        raise OSError(errno.ENOSPC, "of a file")

    with Path(os.devnull).open("w") as output, contextlib.redirect_stdout(output):
        with pytest.raises(BrokenPipeError):
            terminal.answered(broken)
        with pytest.raises(FileNotFoundError):
            terminal.answered(lambda: len(os.listdir("/nowhere")))
        with pytest.raises(OSError, match="of a file"):
            terminal.answered(full)


def test_limits_of_a_process_are_those_that_it_has() -> None:
    with subprocess.Popen(["sh", "-c", "ulimit -n 3333; echo ok; read wait"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = json.loads(tool("--json", "--streams", "9000", "--pid", str(process.pid)).stdout)
        process.communicate(b"\n")
    assert [each["have"] for each in found["limits"] if each["name"] == "nofile"] == [[3333]]
    assert tool("--pid", str(process.pid)).returncode == FAILED
