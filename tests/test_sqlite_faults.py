"""The embedded broker when the disk, the file or the processes fail: what was acknowledged stays, the rest is told."""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from pushsvc.brokers.sqlite_log import Log
from pushsvc.brokers.trouble import CALM_SECONDS, Trouble
from tests.support.client import Response, Stream, publish, request
from tests.support.fire import Fire, Follower, Published, Publishing, assert_exact, epoch_of, seq_of
from tests.support.server import ROOT, Server
from tests.support.wait import eventually

TOPICS = ["a", "b", "c"]
PUBLISHERS = 3
TIMEOUT = 60
SETTINGS = {"PUSHSVC_POLL_SECONDS": "0.2", "PUSHSVC_COMEBACK_MS": "50", "PUSHSVC_PUBLISH_TIMEOUT_SECONDS": "20"}


def service(directory: Path, path: Path, workers: int = 2, **settings: str) -> Server:
    return Server(directory, workers=workers, env={**SETTINGS, "PUSHSVC_BROKER_URL": f"sqlite:{path}", **settings})


@contextlib.contextmanager
def started(server: Server) -> Iterator[Server]:
    """Runs, but is not ready: its log cannot be used."""
    server.start()
    try:
        eventually(lambda: request("GET", f"{server.url}/healthz").status == 200, TIMEOUT)
        yield server
    finally:
        server.stop()


def post(server: Server, data: str = "x", topic: str = "a") -> Response:
    return request("POST", f"{server.url}/publish", json.dumps({"topic": topic, "data": data}),
                   {"Content-Type": "application/json"}, timeout=TIMEOUT)


def assert_unavailable(response: Response, reason: str) -> None:
    assert response.status == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == 503
    assert reason in response.json()["detail"]


def assert_tells(server: Server, reason: str) -> None:
    """Publishing and readiness name the reason, life goes on."""
    answer = post(server, topic="elsewhere")
    assert_unavailable(answer, reason)
    assert answer.headers["retry-after"] == "1"
    assert_unavailable(request("GET", f"{server.url}/readyz", timeout=TIMEOUT), reason)
    assert request("GET", f"{server.url}/healthz").status == 200


def recovered(server: Server) -> bool:
    """Ready, and then published "recovered", which is there once: whoever is asked again has not published it yet."""
    return bool(request("GET", f"{server.url}/readyz").status == 200 and post(server, "recovered").status == 200)


def complaints(server: Server) -> list[str]:
    return [line for line in server.log().splitlines() if "broker failing" in line]


def held(server: Server) -> list[tuple[str, str]]:
    """(id, data) of all that history holds, as a client reads it."""
    marker = publish(server.url, topics=TOPICS, data="marker")
    with Follower(server.url, TOPICS, "earliest") as client:
        messages = client.upto(seq_of(marker), TIMEOUT)
    return [(message.last_event_id, message.data) for message in messages if message.data != "marker"]


def assert_holds(server: Server, fire: Fire) -> None:
    """All that was acknowledged is there, with the id it was answered, and nothing is there twice or by half."""
    found = held(server)
    assert len(set(found)) == len(found)
    missing = [each for each in fire.acknowledged.values() if (each.id, each.data) not in set(found)]
    assert not missing, f"{len(missing)} of {len(fire.acknowledged)} are lost: {missing[:3]}"
    texts = [text for _, text in found]
    assert len(set(texts)) == len(texts), "published twice"
    for events in fire.tried.values():
        assert sum(event["data"] in set(texts) for event in events) in (0, len(events)), f"by half: {events}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB of its own."""
    if os.geteuid():
        pytest.skip("mounting a file system takes root")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "pushsvc-test", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left of a disk; the file to delete for it to have space again."""
    path = disk / "ballast"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return path


# --- the disk


def test_a_full_disk_refuses_publishes_keeps_streams_and_recovers_by_itself(tmp_path: Path, disk: Path) -> None:
    with service(tmp_path, disk / "push.db") as server, contextlib.ExitStack() as stack, \
            Fire(server.url, TOPICS, connections=PUBLISHERS, size=2000) as fire:
        followers = [stack.enter_context(Follower(server.url, TOPICS, "earliest")) for _ in range(4)]
        for each in followers:
            each.open()
        reading = [gevent.spawn(each.until, lambda message: message.data == "end", TIMEOUT) for each in followers]
        eventually(lambda: len(fire.acknowledged) > 200, TIMEOUT)
        ballast = fill(disk)
        eventually(lambda: len(fire.failed) > 200, TIMEOUT)
        eventually(lambda: assert_tells(server, "full") is None, TIMEOUT)  # a small event may still find its place
        assert {status for status, _ in fire.failed} == {503}
        acknowledged = len(fire.acknowledged)
        ballast.unlink()
        eventually(lambda: len(fire.acknowledged) > acknowledged + 200, TIMEOUT)
        fire.stop()
        assert request("GET", f"{server.url}/readyz").status == 200
        publish(server.url, topics=TOPICS, data="end")
        gevent.joinall(reading, timeout=TIMEOUT, raise_error=True)
        for each in followers:
            assert each.connections == 1, "open streams stay open"
            assert_exact(each.messages[:-1], fire.on(TOPICS))
        assert 1 <= len(complaints(server)) <= 6, "once per worker and part, not once per publish"
        assert "Traceback" not in server.log()


def test_a_disk_that_is_full_from_the_start_is_used_as_soon_as_there_is_space(tmp_path: Path, disk: Path) -> None:
    ballast = fill(disk)
    with started(service(tmp_path, disk / "push.db")) as server:
        assert_tells(server, "full")
        ballast.unlink()
        eventually(lambda: recovered(server), TIMEOUT)
        server.wait_ready()
        with Stream(server.url, "a", last_event_id="earliest") as stream:
            assert stream.next().data == "recovered"


def test_a_read_only_file_system_is_told_and_used_as_soon_as_it_can_be_written(tmp_path: Path, disk: Path) -> None:
    server = service(tmp_path, disk / "push.db")
    with server:
        id = publish(server.url, topic="a", data="before")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with started(server):
        assert_tells(server, "Read-only file system")
        with Stream(server.url, "a", last_event_id="earliest") as stream:
            assert stream.status == 200, "any other answer is final for a browser"
            assert stream.rest() == []
            assert stream.clean_end
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        eventually(lambda: recovered(server), TIMEOUT)
        server.wait_ready()
        with Stream(server.url, "a", last_event_id="earliest") as stream:
            assert stream.next().last_event_id == id
        assert len(complaints(server)) <= 6


# --- the file


def empty_wal(path: Path) -> None:
    """Bring all into the file, as a backup tool does: from now on it is the file that counts."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        eventually(lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)  # else: busy


def overwrite(path: Path, start: int, end: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(random.randbytes(end - start))


def test_a_file_that_is_no_log_is_told_and_replaced_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "push.db"
    server = service(tmp_path, path)
    with server, Fire(server.url, TOPICS, connections=PUBLISHERS) as fire:
        eventually(lambda: len(fire.acknowledged) > 200, TIMEOUT)
    healthy = tmp_path / "healthy.db"
    shutil.copy(path, healthy)
    overwrite(path, 0, 100)
    with started(server):
        assert_tells(server, "not a database")
        with Stream(server.url, "a", last_event_id="earliest") as stream:
            assert (stream.status, stream.rest()) == (200, [])
        healthy.rename(path)
        eventually(lambda: recovered(server), TIMEOUT)
        server.wait_ready()
        assert_holds(server, fire)
        assert len(complaints(server)) <= 6


def test_a_log_of_another_schema_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "push.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE mine(x); PRAGMA user_version=7;")
    with started(service(tmp_path, path)) as server:
        assert_tells(server, "version 7")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]


@pytest.mark.parametrize("start", [0, 4096 * 2], ids=["all pages", "the middle pages"])
def test_garbage_in_the_file_under_a_running_service_is_told_and_healed(tmp_path: Path, start: int) -> None:
    path = tmp_path / "push.db"
    with service(tmp_path, path) as server, contextlib.ExitStack() as stack:
        with Fire(server.url, TOPICS, connections=PUBLISHERS, size=500) as fire:
            eventually(lambda: len(fire.acknowledged) > 1000, TIMEOUT)
        streams = [stack.enter_context(Stream(server.url, "a")).opened() for _ in range(4)]
        empty_wal(path)
        healthy = path.read_bytes()
        overwrite(path, start, len(healthy))
        for _ in range(20):
            answer = post(server)
            assert answer.status == 503, answer.text
        reason = "not a database" if start == 0 else "malformed"
        assert_tells(server, reason)
        for stream in streams:
            stream.quiet(0.05)
        with path.open("r+b") as file:
            file.write(healthy)
        eventually(lambda: recovered(server), TIMEOUT)
        for stream in streams:
            assert stream.next(TIMEOUT).data == "recovered"
        fire.acknowledged.update({seq_of(id): Published(id, ("a",), data, "") for id, data in held(server)[-1:]})
        assert_holds(server, fire)
        assert 1 <= len(complaints(server)) <= 6


# --- the log is deleted


def agree(server: Server, old: str) -> bool:
    """Whether publishes by every worker come to one log that is not the `old` one."""
    ids = [publish(server.url, topic="a", data="agreed") for _ in range(12)]
    return len({epoch_of(id) for id in ids}) == 1 and epoch_of(ids[0]) != old and sorted(ids, key=seq_of) == ids


@pytest.mark.parametrize("what", ["the file", "the file and its neighbours", "the folder"])
def test_a_log_that_is_deleted_under_a_running_service_begins_anew_for_all_workers(tmp_path: Path, what: str) -> None:
    path = tmp_path / "log" / "push.db"
    with service(tmp_path, path, workers=3) as server, contextlib.ExitStack() as stack:
        old = publish(server.url, topic="a", data="old")
        clients = [stack.enter_context(Follower(server.url, ["a"], old)).open() for _ in range(6)]
        with Fire(server.url, ["b", "c"], connections=PUBLISHERS) as fire:
            eventually(lambda: len(fire.acknowledged) > 100, TIMEOUT)
            if what == "the folder":
                eventually(lambda: shutil.rmtree(path.parent) is None, TIMEOUT)
            else:
                # The file last: as soon as it is gone a worker begins anew, with neighbours that are not the old ones.
                for each in [path] if what == "the file" else sorted(path.parent.glob("push.db*"), reverse=True):
                    shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink()
            eventually(lambda: agree(server, epoch_of(old)), TIMEOUT)
            fresh = publish(server.url, topic="a", data="fresh")
            settled = fire.newest
            eventually(lambda: fire.newest != settled, TIMEOUT)
        assert epoch_of(fresh) > epoch_of(old)
        for client in clients:
            messages = client.until(lambda message: message.last_event_id == fresh, TIMEOUT)
            assert [message.type for message in messages].count("gap") == 1
            assert messages[0].type == "gap"
            gap = json.loads(messages[0].data)
            assert (gap["from"], gap["reason"]) == (old, "epoch")
            assert epoch_of(gap["to"]) == epoch_of(fresh)
        now = {each.id: each for each in fire.acknowledged.values() if epoch_of(each.id) == epoch_of(fresh)}
        with Follower(server.url, ["b", "c"], "earliest") as client:
            last = publish(server.url, topic="b", data="last")
            found = {message.last_event_id: message.data for message in client.upto(seq_of(last), TIMEOUT)}
        late = {id: each for id, each in now.items() if seq_of(id) > seq_of(fresh)}
        assert late.keys() <= found.keys(), "nothing that was acknowledged once all agree is lost"
        assert late
        assert request("GET", f"{server.url}/readyz").status == 200


def test_a_log_that_is_deleted_while_the_service_is_stopped_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "push.db"
    server = service(tmp_path, path)
    with server:
        old = publish(server.url, topic="a", data="old")
    for each in tmp_path.glob("push.db*"):
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    with server:
        with Stream(server.url, "a", last_event_id=old) as stream:
            gap = stream.next()
            assert gap.type == "gap"
            assert json.loads(gap.data)["reason"] == "epoch"
            assert seq_of(fresh := publish(server.url, topic="a", data="fresh")) == 1
            assert stream.next().last_event_id == fresh
        assert epoch_of(fresh) > epoch_of(old)


# --- the processes


def test_kill_9_of_all_processes_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    server = service(tmp_path, tmp_path / "push.db", workers=3)
    with server:
        fire = Fire(server.url, TOPICS, connections=PUBLISHERS)
        for _ in range(3):
            with fire:
                known = len(fire.acknowledged)
                eventually(lambda: len(fire.acknowledged) > known + random.randint(100, 600), TIMEOUT)  # noqa: B023
                server.kill_all()
            server.start()
            server.wait_ready(TIMEOUT)
            assert_holds(server, fire)
        head = publish(server.url, topic="a", data="head")
        assert seq_of(head) > fire.newest
        assert epoch_of(head) == epoch_of(fire.acknowledged[fire.newest].id)
        connection = Publishing(server.url)
        for each in random.sample(sorted(fire.acknowledged.values(), key=lambda each: each.id), 50):
            status, answer = connection.publish(fire.tried[each.key], each.key)
            assert status == 200
            assert each.id in answer["ids"], "the first answer again"
        connection.close()
        assert_holds(server, fire)


def test_kill_9_of_one_worker_after_the_other_neither_loses_nor_doubles(tmp_path: Path) -> None:
    with service(tmp_path, tmp_path / "push.db", workers=3) as server, Follower(server.url, TOPICS, "earliest") as client:
        client.open()
        with Fire(server.url, TOPICS, connections=PUBLISHERS, stubborn=True) as fire:
            reading = gevent.spawn(client.until, lambda message: message.data == "end", TIMEOUT)
            for _ in range(6):
                known = len(fire.acknowledged)
                eventually(lambda: len(fire.acknowledged) > known + 100, TIMEOUT)  # noqa: B023
                server.kill_worker(random.choice(server.worker_pids()))
        server.wait_ready()  # a connection that the killed one had not accepted yet is reset
        publish(server.url, topics=TOPICS, data="end")
        reading.get(timeout=TIMEOUT)
        assert not fire.failed, "who is left goes on"
        assert_exact(client.messages[:-1], fire.on(TOPICS))
        assert_holds(server, fire)


# --- others at the file


def test_backups_and_readers_of_the_file_do_not_disturb_publishes(tmp_path: Path) -> None:
    path = tmp_path / "push.db"
    with service(tmp_path, path) as server:
        with Fire(server.url, TOPICS, connections=PUBLISHERS) as fire:
            eventually(lambda: fire.newest > 100, TIMEOUT)
            for number in range(3):
                known = len(fire.acknowledged)
                backup(path, tmp_path / f"copy-{number}.db")
                copied = known_ids(tmp_path / f"copy-{number}.db")
                assert copied == list(range(1, len(copied) + 1))
                assert len(copied) >= known
                with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
                    reader.execute("BEGIN")
                    reader.execute("SELECT count(*) FROM events").fetchone()
                    eventually(lambda: len(fire.acknowledged) > known + 200, TIMEOUT)  # noqa: B023
        assert not fire.failed
        assert_holds(server, fire)


def backup(path: Path, copy: Path) -> None:
    """With the command line tool where it is installed, as an operator does; else with the same function of Python's."""
    if shutil.which("sqlite3"):
        subprocess.run(["sqlite3", path, f".backup '{copy}'"], check=True, timeout=TIMEOUT)
        return
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def known_ids(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [seq for seq, in connection.execute("SELECT seq FROM events")]


def test_a_publish_waits_for_somebody_who_writes_to_the_file_for_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "push.db"
    with service(tmp_path, path) as server, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        answers = [gevent.spawn(post, server) for _ in range(10)]
        gevent.sleep(0.5)
        assert not any(answer.ready() for answer in answers)
        writer.execute("ROLLBACK")
        assert [answer.get(timeout=TIMEOUT).status for answer in answers] == [200] * 10


# --- what survives a power loss


@pytest.mark.parametrize(("full_sync", "level"), [(True, 2), (False, 1)])
def test_full_sync_is_asked_of_sqlite(tmp_path: Path, full_sync: bool, level: int) -> None:
    with contextlib.closing(Log(tmp_path / "push.db", 0, full_sync=full_sync)) as log:
        assert log.connection.execute("PRAGMA synchronous").fetchone() == (level,)


@pytest.mark.parametrize(("sync", "least", "most"), [("full", 10, 1000), ("normal", 0, 9)])
def test_with_full_sync_each_publish_is_on_disk_before_its_answer(
        tmp_path: Path, sync: str, least: int, most: int) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    program = f"""
from gevent import monkey; monkey.patch_all()
import os
from pushsvc.brokers import open_broker
from pushsvc.event import Draft
from pushsvc.settings import Settings
broker = open_broker(Settings(broker_url="sqlite:{tmp_path / 'push.db'}", sync={sync!r}))
broker.start(lambda events: None, lambda position: None)
broker.append([])
open("/dev/null").close()  # a mark in the trace
for number in range(10):
    broker.append([Draft(("a",), str(number))])
os._exit(0)
"""
    command = [strace, "-f", "-e", "trace=openat,fsync,fdatasync", "-o", trace, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"no ptrace here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    calls = trace.read_text().split("/dev/null")[-1]
    assert least <= calls.count("sync(") <= most


# --- how troubles are told


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_trouble_is_told_once_when_it_begins_and_once_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pushsvc")
    clock = Clock()
    trouble = Trouble(clock, (OSError,))
    for _ in range(100):  # every other write passes
        for error in (OSError("full"), None, OSError("other")):
            trouble.note("writer", error)
            trouble.tell()
        clock.now += 0.1
    assert [record.message for record in caplog.records] == ["broker failing"]
    assert str(trouble.of("writer")) == "other"
    trouble.note("writer", None)
    assert trouble.of("writer") is None
    clock.now += CALM_SECONDS + 0.1
    trouble.tell()
    trouble.tell()
    assert [record.message for record in caplog.records] == ["broker failing", "broker recovered"]
    trouble.note("writer", OSError("again"))
    trouble.tell()
    assert len(caplog.records) == 3


def test_a_failure_between_two_looks_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(Clock(), (OSError,))
    trouble.note("keeper", OSError("short"))
    trouble.note("keeper", None)
    trouble.tell()
    assert [record.__dict__["reason"] for record in caplog.records] == ["short"]
    assert caplog.records[0].exc_info is None


def test_an_error_that_nobody_expects_is_told_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(Clock(), (OSError,))
    trouble.note("reader", ValueError("what"))
    trouble.tell()
    assert caplog.records[0].exc_info
