"""Parked streams: real sockets, real hang-ups, real half-open peers, and the same bytes as from the plain generator."""

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.brokers import BROKERS
from tests.support.client import Connection, EndOfStream, Stream, publish, publish_lines, request
from tests.support.programs import missing
from tests.support.server import ROOT, Server, free_port
from tests.support.wait import eventually

PARKING, GEVENT = "pushsvc.worker.PushWorker", "gevent"
QUIET = {"PUSHSVC_HEARTBEAT_SECONDS": "3600"}
HOST, PEER = "10.213.77.1", "10.213.77.2"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("parking"), workers=1, env=QUIET) as server:
        yield server


def metric(server, name):
    text = request("GET", f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M))


def streams(server):
    text = request("GET", f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(r"^pushsvc_streams\{pid=\"\d+\"\} (\S+)$", text, re.M))


def behind(server):
    text = request("GET", f"{server.url}/metrics").text
    found = re.findall(r'^pushsvc_queue_depth\{pid="\d+",queue="behind"\} (\S+)$', text, re.M)
    assert found, "the metric of the streams that are behind is gone"
    return sum(map(float, found))


def evicted(server, reason):
    return metric(server, f'pushsvc_evicted_total{{reason="{reason}"}}')


# --- The same bytes, whoever serves them -----------------------------------------------------------------


def _transcript(directory, broker, worker_class, envelope):
    """All that one stream is sent, by a worker of this class: head and body, with what differs by nature blotted out."""
    with (BROKERS[broker](directory) as url,
          Server(directory, workers=1, env={**QUIET, "PUSHSVC_BROKER_URL": url, "PUSHSVC_KEEPALIVE_SECONDS": "1"},
                 worker_class=worker_class) as server):
        first = publish(server.url, topic="a", data="before")
        stream = Stream(server.url, ["a", "b"], last_event_id=first.rpartition("-")[0] + "-0", envelope=envelope)
        stream.take(1)
        for number in range(5):
            publish(server.url, topics=["b", "a"], data=f"line {number}\r\nüñ", event="x" if number % 2 else "message")
            stream.take(1)
        late = Stream(server.url, ["a"], envelope=envelope).opened()
        publish(server.url, topic="a", data="last", retry=77)
        stream.take(1)
        late.take(1)
        server.terminate(20)
        stream.rest(10)
        late.rest(10)
        assert stream.clean_end
        assert late.clean_end
    return [_blot(each, first) for each in (stream, late)]


def _blot(stream, first):
    """Ids count from the first: a log in Redis begins at the clock."""
    epoch, _, begin = first.partition("-")
    head = {name: value for name, value in stream.headers.items() if name != "date"}
    body = re.sub(re.escape(epoch.encode()) + rb"-(\d+)",
                  lambda id: b"EPOCH-%d" % (int(id[1]) - int(begin) if int(id[1]) else 0), bytes(stream.raw))
    return head, re.sub(rb"retry: \d+\n: drain", b"retry: N\n: drain", body)


@pytest.mark.parametrize(("broker", "envelope"), [("sqlite", False), ("sqlite", True), ("memory", True), ("redis", True)])
def test_a_parked_stream_is_sent_the_same_bytes_as_a_plain_generator(tmp_path, broker, envelope):
    parked = _transcript(tmp_path / "parked", broker, PARKING, envelope)
    plain = _transcript(tmp_path / "plain", broker, GEVENT, envelope)
    assert parked == plain
    assert b"line 4" in parked[0][1]


def test_the_test_client_reads_the_same_stream(tmp_path):
    from app import create_app
    from pushsvc.settings import Settings

    app = create_app(Settings(broker_url=f"sqlite:{tmp_path}/log.db"))
    try:
        client = app.test_client()
        answer = client.post("/publish", json={"topic": "a", "data": "one"})
        response = client.get("/events?topic=a&last_event_id=earliest")
        parts = iter(response.response)
        text = b"".join([next(parts), next(parts)])
        assert text == f"retry: 3000\n: open\nid: {answer.json['id']}\ndata: one\n\n".encode()
        response.close()
        assert len(app.extensions["pushsvc"].hub) == 0
    finally:
        app.extensions["pushsvc"].close()


# --- Hang-ups --------------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_is_noticed_without_a_write(server):
    before, gone = streams(server), evicted(server, "gone")
    clients = [Stream(server.url, "hangup").opened() for _ in range(20)]
    assert streams(server) == before + 20
    for number, client in enumerate(clients):
        client.reset() if number % 2 else client.close()
    eventually(lambda: streams(server) == before, message="the streams of clients that hung up are still there")
    assert evicted(server, "gone") == gone + 20


def test_a_client_that_sends_garbage_after_its_request_is_served_on_and_noticed_when_it_leaves(server):
    before = streams(server)
    client = Stream(server.url, "garbage").opened()
    client._socket.sendall(b"\x00garbage\r\n\r\nGET / HTTP/1.1\r\n\r\n" * 500)
    publish(server.url, topic="garbage", data="still here")
    assert client.next().data == "still here"
    client.close()
    eventually(lambda: streams(server) == before)


def test_a_client_that_sends_more_than_a_buffer_takes_is_noticed_when_it_leaves_without_a_write(tmp_path):
    with Server(tmp_path, workers=1, env={"PUSHSVC_HEARTBEAT_SECONDS": "3600"}) as server:
        with Stream(server.url, "flood") as client:
            client.opened()
            client._socket.settimeout(30)
            client._socket.sendall(b"x" * 20_000_000)
            assert streams(server) == 1
        eventually(lambda: streams(server) == 0)
        assert evicted(server, "gone") == 1


def test_a_peer_whose_link_goes_down_is_given_up_within_seconds(tmp_path):
    if os.geteuid() != 0 or shutil.which("ip") is None:
        missing("a network namespace needs root and the ip command")
    with _namespace() as (name, cut), _bound_to(tmp_path, HOST) as server:
        code = ("import socket,sys,time;s=socket.create_connection((sys.argv[1],int(sys.argv[2])));"
                "s.sendall(b'GET /events?topic=far HTTP/1.1\\r\\nHost: h\\r\\n\\r\\n');s.recv(100);"
                "print('open',flush=True);time.sleep(60)")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", code, HOST, str(server.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:
            try:
                assert peer.stdout.readline() == b"open\n"
                eventually(lambda: streams(server) == 1)
                cut()
                eventually(lambda: streams(server) == 0, timeout=30, message="the half-open stream is still there")
                assert evicted(server, "gone") == 1
            finally:
                peer.kill()


@contextlib.contextmanager
def _namespace():
    """A machine of the test's own at PEER, joined to this one at HOST; its name, and what cuts the link."""
    name = f"pushsvc-{os.getpid()}"
    ours, theirs = f"pv{os.getpid() % 100000}a", f"pv{os.getpid() % 100000}b"

    def run(*words):
        subprocess.run(words, check=True, capture_output=True)

    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        run("ip", "addr", "add", f"{HOST}/24", "dev", ours)
        run("ip", "link", "set", ours, "up")
        run("ip", "netns", "exec", name, "ip", "addr", "add", f"{PEER}/24", "dev", theirs)
        run("ip", "netns", "exec", name, "ip", "link", "set", theirs, "up")
        yield name, lambda: run("ip", "netns", "exec", name, "ip", "link", "set", theirs, "down")
    finally:
        subprocess.run(["ip", "link", "del", ours], capture_output=True)
        run("ip", "netns", "del", name)


@contextlib.contextmanager
def _bound_to(directory, host):
    port = free_port()
    env = {"PUSHSVC_BIND": f"127.0.0.1:{port},{host}:{port}", "PUSHSVC_AUTH": "none", "PUSHSVC_DEAD_SECONDS": "2",
           "PUSHSVC_HEARTBEAT_SECONDS": "1"}
    with Server(directory, workers=1, env=env, port=port) as server:
        yield server


# --- Full sockets ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stopped(server, output):
    """A reader of the topic `stopped` that writes to the file `output`, and is stopped (SIGSTOP); its process."""
    with output.open("wb") as out, subprocess.Popen(
            ["curl", "-sN", f"{server.url}/events?topic=stopped"], stdout=out) as reader:
        try:
            eventually(lambda: b": open" in output.read_bytes())
            os.kill(reader.pid, signal.SIGSTOP)
            yield reader
        finally:
            os.kill(reader.pid, signal.SIGCONT)
            reader.kill()


def _fill(server):
    """Publish numbered events until the socket of the stopped reader is full; how many."""
    data = "x" * 60_000
    for number in range(400):  # 24 MB: far more than both sockets hold
        publish(server.url, topic="stopped", data=f"{number} {data}")
        if behind(server):
            return number + 1
    raise AssertionError("the socket of a stopped reader never got full")


def test_a_reader_that_is_stopped_and_goes_on_in_time_misses_nothing(server, tmp_path):
    output = tmp_path / "out"
    with _stopped(server, output) as reader:
        count = _fill(server)
        publish(server.url, topic="stopped", data="the last")
        os.kill(reader.pid, signal.SIGCONT)
        eventually(lambda: b"data: the last\n" in output.read_bytes()[-200:])
        numbers = [int(found) for found in re.findall(rb"^data: (\d+) ", output.read_bytes(), re.M)]
        assert numbers == list(range(count))
        eventually(lambda: behind(server) == 0, message="a stream that caught up still has its greenlet")


def test_a_reader_that_stays_stopped_is_given_up_though_its_kernel_answers(tmp_path):
    """Its window is closed: the kernel acknowledges each probe of it, and TCP_USER_TIMEOUT ends that all the same."""
    dead = 1
    env = {**QUIET, "PUSHSVC_DEAD_SECONDS": str(dead), "PUSHSVC_MAILBOX_BYTES": str(8 << 20)}
    with Server(tmp_path, workers=1, env=env) as server:
        worker, = server.worker_pids()
        before, begun = _sockets(worker), time.monotonic()
        with _stopped(server, tmp_path / "out"):
            _fill(server)
            eventually(lambda: streams(server) == 0, timeout=30, message="the stopped reader still has its stream")
            assert time.monotonic() - begun >= dead
            assert (evicted(server, "gone"), evicted(server, "slow"), behind(server)) == (1, 0, 0)
            eventually(lambda: _sockets(worker) <= before)


def test_reader_that_is_frozen_costs_the_kernel_no_more_than_two_mailboxes(tmp_path):
    """It has a default buffer of its own, which is full first: what the service's side takes is the rest."""
    most = 100_000
    with Server(tmp_path, workers=1, env={**QUIET, "PUSHSVC_MAILBOX_BYTES": str(most)}) as server, \
            Stream(server.url, "frozen") as stream:
        stream.opened()
        own = stream._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        sent = 0
        while not behind(server):
            publish(server.url, topic="frozen", data="x" * 10_000)
            sent += 10_000
            assert sent < own + 3 * most, "the kernel takes more for a reader that has stopped"


# Tells how many greenlets the worker has.
COUNTED = """
import gc
from greenlet import greenlet
from app import create_app

app = create_app()

@app.get("/greenlets")
def greenlets():
    return str(sum(isinstance(each, greenlet) and not each.dead for each in gc.get_objects()))
"""


def test_a_thousand_frozen_readers_are_closed_as_slow_and_others_still_receive(tmp_path):
    """Each has a topic of its own and the envelope, which names it: no two of them share what waits."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    (tmp_path / "counted.py").write_text(COUNTED)
    topics, mailbox, greenlet = [f"ice-{number}" for number in range(1000)], 16_384, 40_000
    env = {**QUIET, "PUSHSVC_MAILBOX_BYTES": str(mailbox), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Server(tmp_path / "server", workers=1, env=env, application="counted:app") as server:
        worker, = server.worker_pids()
        reader = Stream(server.url, topics[0]).opened()
        witness = Stream(server.url, "other").opened()
        greenlets, sockets = _greenlets(server), _sockets(worker)
        frozen = [Stream(server.url, topic, envelope=True, receive_buffer=4096).opened(30) for topic in topics]
        assert _greenlets(server) <= greenlets + 5, "a parked stream has a greenlet"
        memory = _memory(worker, "VmRSS")
        sent, most_behind = [], 0
        deadline = time.monotonic() + 120
        with Connection(server.url) as publisher:
            while evicted(server, "slow") < 1000 and time.monotonic() < deadline:
                sent.append(publisher.publish(topics=topics, data="y" * 5000))
                publisher.publish(topic="other", data="small")
                assert witness.next(30).data == "small"
                assert reader.next(30).last_event_id == sent[-1]
                most_behind = max(most_behind, behind(server))
        assert evicted(server, "slow") == 1000
        eventually(lambda: behind(server) == 0)
        assert streams(server) == 2
        assert most_behind > 500, "they were not behind at the same time"
        # What waits in its mailbox, and as much that was taken out of it and does not fit into the socket.
        assert _memory(worker, "VmHWM") - memory < 1000 * (2 * mailbox + greenlet)
        eventually(lambda: _greenlets(server) <= greenlets + 5, message="greenlets are left")
        eventually(lambda: _sockets(worker) <= sockets + 5, message="descriptors are left")
        back = Stream(server.url, topics[0], last_event_id=frozen[0].last_event_id)
        seen = [message.last_event_id for message in back.take(len(sent), 30)]
        assert seen == sent
        for client in frozen:
            client.close()


def _greenlets(server):
    return int(request("GET", f"{server.url}/greenlets").text)


def _sockets(pid):
    """How many sockets a process has open. Other descriptors its log opens when it needs them."""
    count = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(each.readlink()).startswith("socket:")
    return count


def _memory(pid, which):
    """A figure of /proc/PID/status, in bytes."""
    return int(re.search(rf"^{which}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)[1]) * 1024


# --- Age -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_class", [PARKING, GEVENT])
def test_a_stream_of_age_ends_cleanly_and_its_client_comes_back_without_a_loss(tmp_path, worker_class):
    most = 700  # ms until it comes back
    env = {**QUIET, "PUSHSVC_ROTATE_SECONDS": "0.5", "PUSHSVC_COMEBACK_MS": str(most)}
    with Server(tmp_path, workers=1, env=env, worker_class=worker_class) as server, \
            Connection(server.url) as publisher:
        sent, read, ended = [], [], []
        stream = Stream(server.url, "aged", last_event_id=publisher.publish(topic="aged", data="before"))
        while len(ended) < 2 or len(read) < len(sent):
            if len(ended) < 2:
                sent.append(publisher.publish(topic="aged", data="x"))
                time.sleep(0.01)
            try:
                read.append(stream.next(30).last_event_id)
            except EndOfStream:
                ended.append(stream)
                stream = Stream(server.url, "aged", last_event_id=stream.last_event_id)
        stream.close()
        assert read == sent
        for stream in ended:
            assert (stream.status, stream.clean_end) == (200, True)
            assert bytes(stream.raw).endswith(b"\n\nretry: %d\n: rotate\n" % stream.reader.reconnection_time)
            assert 0 < stream.reader.reconnection_time <= most
            stream.close()
        assert evicted(server, "rotate") >= 2


# --- Bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_class", [PARKING, GEVENT])
def test_a_worker_that_is_full_refuses_softly_and_keeps_publishing(tmp_path, worker_class):
    env = {"PUSHSVC_HEARTBEAT_SECONDS": "0.3", "PUSHSVC_MAX_STREAMS": "30",  # a plain stream notices a hang-up by one
           "PUSHSVC_KEEPALIVE_SECONDS": "1"}
    with Server(tmp_path, workers=1, env=env, worker_class=worker_class) as server:
        held = [Stream(server.url, "full").opened() for _ in range(30)]
        refused = Stream(server.url, "full")
        assert refused.rest() == []
        assert (refused.status, refused.clean_end) == (200, True)
        assert refused.reader.reconnection_time is not None
        publish(server.url, topic="full", data="for those who are in")
        assert all(stream.next().data == "for those who are in" for stream in held)
        assert request("GET", f"{server.url}/healthz").status == 200
        held.pop().close()
        eventually(lambda: streams(server) == 29)
        again = Stream(server.url, "full").opened()
        publish(server.url, topic="full", data="for one more")
        assert again.next().data == "for one more", "a refusal opens, too"


def test_a_worker_without_descriptors_does_not_spin_and_recovers(tmp_path):
    with Server(tmp_path, workers=1, env=QUIET) as server:
        worker, = server.worker_pids()
        held = [Stream(server.url, "few").opened() for _ in range(10)]
        used = len(os.listdir(f"/proc/{worker}/fd"))
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        waiting = [_connected(server) for _ in range(40)]
        before = _cpu_seconds(worker)
        time.sleep(2)
        spent = _cpu_seconds(worker) - before
        assert spent < 0.5, f"{spent:.2f} s of CPU in 2 s of waiting"
        assert len(os.listdir(f"/proc/{worker}/fd")) >= used + 4, "the limit was never met"
        for connection in waiting:
            connection.close()
        for stream in held[:5]:
            stream.close()
        eventually(lambda: publish(server.url, topic="few", data="again"), timeout=20)
        assert held[-1].until(lambda message: message.data == "again")


def test_a_worker_near_its_descriptor_limit_refuses_streams_and_answers_all_others(tmp_path):
    descriptors, connections = 260, 60
    limited = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh"]
    env = {**QUIET, "PUSHSVC_MAX_CONNECTIONS": str(connections), "PUSHSVC_KEEPALIVE_SECONDS": "60"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, workers=1, env=env, prefix=limited))
        worker, = server.worker_pids()
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (descriptors, descriptors)
        held = []
        while not (refused := stack.enter_context(Stream(server.url, "many"))).headers.get("content-length"):
            held.append(refused.opened(30))
            assert len(held) < descriptors - connections, "streams take what the other connections need"
        assert refused.rest() == []
        assert (refused.status, refused.clean_end) == (200, True)
        assert re.fullmatch(rb"retry: \d+\n: open\n: full\n", refused.raw)
        assert len(held) > descriptors / 2

        for _ in range(connections):
            stack.enter_context(_kept(server))
        assert _sockets(worker) > len(held) + connections - 5, "the kept connections were not kept"
        for number in range(10):
            assert request("GET", f"{server.url}/healthz").status == 200
            publish(server.url, topic="many", data=str(number))
        for stream in held:
            assert [message.data for message in stream.take(10, 30)] == list("0123456789")
        assert len(os.listdir(f"/proc/{worker}/fd")) < descriptors - 10, "the log may need some"


@contextlib.contextmanager
def _kept(server):
    """A connection that has had an answer, and is kept for another request."""
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        yield connection


def _connected(server):
    connection = socket.create_connection((server.host, server.port), timeout=5)
    connection.sendall(b"GET /events?topic=few HTTP/1.1\r\nHost: h\r\n\r\n")
    return connection


def _cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_nothing_is_left_after_waves_of_streams(server):
    worker, = server.worker_pids()

    def wave(count):
        clients = [Stream(server.url, [f"wave-{number}", "all"]).opened() for number in range(count)]
        publish(server.url, topic="all", data="hello")
        for client in clients:
            assert client.next().data == "hello"
            client.close()
        eventually(lambda: streams(server) == 0)

    wave(50)
    descriptors = len(os.listdir(f"/proc/{worker}/fd"))
    for _ in range(3):
        wave(200)
    eventually(lambda: len(os.listdir(f"/proc/{worker}/fd")) <= descriptors + 1)
    text = request("GET", f"{server.url}/metrics").text
    assert re.search(rf'pushsvc_topics\{{pid="{worker}"\}} 0.0', text)
    assert re.search(rf'pushsvc_subscriptions\{{pid="{worker}"\}} 0.0', text)


# --- Batches and order -----------------------------------------------------------------------------------


def test_streams_of_several_topics_see_one_order_while_large_and_small_groups_are_served(server):
    crowd = [Stream(server.url, "crowd").opened() for _ in range(150)]
    mixed = [Stream(server.url, ["crowd", f"own-{number}"]).opened() for number in range(20)]
    ids = []
    for batch in range(10):
        lines = [{"topic": "crowd", "data": f"{batch}"}]
        lines += [{"topic": f"own-{number}", "data": f"{batch}"} for number in range(20)]
        lines += [{"topics": ["crowd", "own-3"], "data": f"both {batch}"}]
        ids.append(publish_lines(server.url, lines))
    for stream in crowd:
        assert [each.last_event_id for each in stream.take(20, 30)] == [seq for b in ids for seq in (b[0], b[21])]
    for number, stream in enumerate(mixed):
        expected = [seq for batch in ids for seq in (batch[0], batch[1 + number], batch[21])]
        assert [each.last_event_id for each in stream.take(30, 30)] == expected
    for stream in crowd + mixed:
        stream.close()
