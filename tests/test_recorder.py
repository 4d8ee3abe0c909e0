"""The recorder: the shape of the traffic and nothing of its content, in one file per worker; off, it is not there."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import create_app
from pushsvc.event import Event
from pushsvc.recorder import END_BYTES, Recorder, process_key
from pushsvc.settings import Settings
from tests.support.client import Stream, publish
from tests.support.server import Server
from tests.support.wait import eventually

SECRETS = ("ann-secret", "room-secret", "note-secret", "key-secret", "data-secret", "127.0.0.1")


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "one.jsonl", 1 << 20)
    yield recorder
    recorder.close()


def rows(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Subscribed(SimpleNamespace):
    """What the recorder sees of a subscription: each is one of its own."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def client(*topics: str, user: str | None = None, reason: str = "gone") -> Any:
    return Subscribed(user=user, address="127.0.0.1", reason=reason, group=SimpleNamespace(topics=topics))


def event(seq: int = 1, topics: tuple[str, ...] = ("room-secret",), data: str = "data-secret", **fields: Any) -> Event:
    return Event(**{"seq": seq, "at": 1.5, "topics": topics, "event": "message", "data": data, "keep": "all", "key": "",
                    "retry": None, **fields})


def test_stream_is_noted_when_it_opens_and_with_its_reason_when_it_ends(recorder: Recorder, tmp_path: Path) -> None:
    stream = client("a", "b", reason="slow")

    recorder.resuming(stream)
    recorder.opened(stream)
    recorder.closed(stream)
    recorder.opened(client("a"))
    recorder.close()

    [first, opened, closed, second, last] = rows(tmp_path / "one.jsonl")
    assert first[:2] == ["shape", 1]
    assert (opened[0], opened[2], len(opened[4]), opened[5]) == ("open", 1, 2, 1)
    assert (closed[0], closed[2], closed[3]) == ("close", 1, "slow")
    assert (second[2], second[4], second[5]) == (2, opened[4][:1], 0)
    assert (last[0], last[2]) == ("end", "closed")


def test_event_is_noted_with_its_size_and_with_how_many_streams_it_is_for(recorder: Recorder, tmp_path: Path) -> None:
    both = SimpleNamespace(members=[1, 2])
    groups = {"a": [SimpleNamespace(members=[3]), both], "b": [both]}

    recorder.delivered([event(7, ("a", "b"), "ü", keep="latest", key="k", event="note"), event(8, ("a",)),
                        event(9, ("c",))], groups)
    recorder.close()

    noted = rows(tmp_path / "one.jsonl")[1:4]
    seen = [(row[2], row[4], row[6], row[8]) for row in noted]
    assert seen == [(7, 2, "latest", 3), (8, 11, "all", 3), (9, 11, "all", 0)]
    assert [(bool(row[5]), bool(row[7])) for row in noted] == [(True, True), (False, False), (False, False)]


def test_nothing_that_identifies_is_in_the_file(recorder: Recorder, tmp_path: Path) -> None:
    recorder.opened(client("room-secret", user="ann-secret"))
    recorder.opened(client("room-secret"))
    recorder.delivered([event(event="note-secret", key="key-secret")], {})
    recorder.close()

    text = (tmp_path / "one.jsonl").read_text()
    assert len(text.splitlines()) == 5
    assert not [secret for secret in SECRETS if secret in text]
    assert process_key().hex() not in text


def test_same_name_has_the_same_hash_in_all_files_of_a_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        recorder = Recorder(tmp_path / name, 1 << 20)
        recorder.opened(client("room", user="ann"))
        recorder.close()

    assert rows(tmp_path / "one")[1][3:5] == rows(tmp_path / "two")[1][3:5]


@pytest.mark.parametrize("more", range(0, 90, 6))
def test_file_stays_under_its_bound_and_says_that_it_was_full(more: int, tmp_path: Path) -> None:
    path, most = tmp_path / "small", 4096 + more
    recorder = Recorder(path, most)

    recorder.delivered([event(seq) for seq in range(200)], {})
    recorder.close()

    assert most - 3 * END_BYTES < path.stat().st_size <= most
    assert rows(path)[-1][0::2] == ["end", "full"]
    assert not recorder.running


def test_disk_that_takes_no_more_ends_the_recording_once_and_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(tmp_path / "full", 1 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # Python ignores SIGXFSZ: a write is told EFBIG
    try:
        recorder.delivered([event(seq) for seq in range(200)], {})
        eventually(lambda: not recorder.running, message="the recording has ended")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.opened(client("a"))
    recorder.close()

    assert [record.message for record in caplog.records] == ["recording failed"]


def test_service_records_nothing_unless_it_is_asked_to(tmp_path: Path) -> None:
    service = create_app(Settings(broker_url="memory:")).extensions["pushsvc"]
    try:
        assert service.hub.recorder is None
    finally:
        service.close()


def test_service_starts_without_a_recording_if_its_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    service = create_app(Settings(broker_url="memory:", record_dir=str(tmp_path / "file"))).extensions["pushsvc"]
    try:
        assert service.hub.recorder is None
    finally:
        service.close()


def test_workers_of_one_service_record_the_same_names_alike_and_who_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with Server(tmp_path / "server", workers=2, env={"PUSHSVC_RECORD_DIR": str(folder)}) as server:
        streams = [Stream(server.url, ["room-secret"]).opened() for _ in range(8)]
        id = publish(server.url, topic="room-secret", data="data-secret", event="note-secret", key="key-secret")
        for stream in streams:
            stream.take(1)
        streams.append(Stream(server.url, ["room-secret"], last_event_id=id).opened())
        for stream in streams:
            stream.close()
        server.terminate(20)

    files = sorted(folder.iterdir())
    noted = [row for path in files for row in rows(path)]
    opened = [row for row in noted if row[0] == "open"]
    assert len(files) == 2
    assert len({tuple(row[4]) for row in opened}) == 1
    assert sorted(row[5] for row in opened) == [0] * 8 + [1]
    assert len([row for row in noted if row[0] == "close"]) == 9
    assert sum(row[8] for row in noted if row[0] == "event" and row[2] == int(id.rpartition("-")[2])) == 8
    assert [row[2] for row in noted if row[0] == "end"] == ["closed", "closed"]
    assert not [secret for secret in SECRETS for path in files if secret in path.read_text()]
