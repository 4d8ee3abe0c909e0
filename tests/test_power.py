"""A power loss: without full sync the newest events may be gone, and then nobody may be left believing otherwise."""

import pytest

from pushsvc.brokers import sqlite_log
from pushsvc.brokers.sqlite_log import Log
from pushsvc.event import Draft
from tests.support.client import Stream, publish
from tests.support.server import Server


@pytest.fixture
def machine(monkeypatch):
    """Sets which life of the machine it is."""

    def boot(name):
        monkeypatch.setattr(sqlite_log, "boot_id", lambda: name)

    boot("first life")
    return boot


def _life(path, now, *, events=0, full_sync=False, ends=False):
    """Open the log, append, and let go of it, in order or not; its epoch and last sequence."""
    log = Log(path, now, full_sync=full_sync)
    if events:
        with log.transaction():
            log.add([Draft(("a",), "x")] * events, now)
    if ends:
        log.end_life()
    found = log.epoch, log.last()
    log.close()
    return found


def test_a_machine_that_went_down_gives_the_log_a_new_epoch_and_never_the_same_sequence(tmp_path, machine):
    before = _life(tmp_path / "log", 1000, events=3)
    machine("second life")
    after = _life(tmp_path / "log", 2000, events=1)
    assert after[0] > before[0]
    assert after[1] == 4
    assert _life(tmp_path / "log", 3000) == after, "one power loss, one new epoch"


@pytest.mark.parametrize("how", [{"ends": True}, {"full_sync": True}])
def test_a_machine_that_went_down_with_all_on_its_disk_keeps_the_epoch(tmp_path, machine, how):
    before = _life(tmp_path / "log", 1000, events=3, **how)
    machine("second life")
    assert _life(tmp_path / "log", 2000) == before


def test_an_orderly_end_is_forgotten_with_the_next_start(tmp_path, machine):
    _life(tmp_path / "log", 1000, events=3, ends=True)
    before = _life(tmp_path / "log", 2000, events=1)
    machine("second life")
    assert _life(tmp_path / "log", 3000)[0] > before[0]


def test_processes_that_die_while_the_machine_lives_change_nothing(tmp_path, machine):
    before = _life(tmp_path / "log", 1000, events=3)
    assert _life(tmp_path / "log", 2000) == before


def test_the_log_is_not_for_every_account_of_the_machine(tmp_path):
    _life(tmp_path / "log", 1000)
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_stop_in_order_marks_the_log_as_safe_and_a_kill_does_not(tmp_path):
    with Server(tmp_path, workers=2) as server:
        first = publish(server.url, topic="a", data="1")
        server.terminate(20)
        assert _safe(tmp_path / "push.db") == 1
        server.start()
        server.wait_ready()
        assert _safe(tmp_path / "push.db") == 0
        assert Stream(server.url, "a", last_event_id=first.rpartition("-")[0] + "-0").next().last_event_id == first
        server.kill_all()
        assert _safe(tmp_path / "push.db") == 0


def _safe(path):
    import sqlite3

    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT value FROM meta WHERE name='safe'").fetchone()[0]
    finally:
        connection.close()
