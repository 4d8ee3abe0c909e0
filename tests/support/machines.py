"""Several machines on this one: network namespaces on a bridge, with the shipped configurations of HAProxy, Redis and
Sentinel, and with clients that note what became of each event."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import gevent

from tests.support.client import EndOfStream, ProtocolError, Stream, request
from tests.support.fire import Failures, epoch_of, seq_of
from tests.support.programs import missing, program
from tests.support.reader import Message
from tests.support.redis import Redis
from tests.support.server import ROOT, Server
from tests.support.wait import eventually

SHIPPED = ROOT / "ops" / "machines"
FRONTS = ("10.0.0.11", "10.0.0.12", "10.0.0.13")  # as the shipped configurations have them
PORT = 8000
REDIS_PORT, SENTINEL_PORT = 6379, 26379
PASSWORD = "CHANGE-ME-PUSHSVC"
REDIS_PASSWORD = "CHANGE-ME-REDIS"
STOP_SECONDS = 10
PAUSE = 0.05  # seconds until a client comes back
PATIENCE = 30.0


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def changed(name: str, changes: Mapping[str, str]) -> str:
    """A shipped configuration with other addresses and paths. Each of them must occur in it."""
    text = (SHIPPED / name).read_text()
    for old in sorted(changes, key=len, reverse=True):  # none hides in another
        assert old in (SHIPPED / name).read_text(), f"{name} has no {old!r}"
        text = text.replace(old, changes[old])
    return text


# --- The net ---------------------------------------------------------------------------------------------


class Machine:
    """A network namespace with one or more addresses on the bridge. Commands run in it behind `prefix`. Without a
    `space` it is this machine as it is."""

    def __init__(self, space: str, link: str, addresses: Sequence[str]) -> None:
        self.address = addresses[0]
        self.addresses = list(addresses)
        self.prefix = ["ip", "netns", "exec", space] if space else []
        self._space = space
        self._link = link

    def create(self, bridge: str) -> None:
        run("ip", "netns", "add", self._space)
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._space)
        run("ip", "link", "set", self._link, "master", bridge, "up")
        for address in self.addresses:
            run(*self.prefix, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        run(*self.prefix, "ip", "link", "set", "eth0", "up")
        run(*self.prefix, "ip", "link", "set", "lo", "up")

    def delete(self) -> None:
        """Idempotent. The links go with it."""
        for words in (["ip", "link", "del", self._link], ["ip", "netns", "del", self._space]):
            subprocess.run(words, capture_output=True)

    def cut(self) -> None:
        """Pull the cable."""
        run("ip", "link", "set", self._link, "down")

    def join(self) -> None:
        run("ip", "link", "set", self._link, "up")

    def sent_to(self, peer: str) -> int:
        """Bytes that this machine has sent over its open TCP connections to `peer`: an address, or address:port."""
        text = run(*self.prefix, "ss", "-tinOH", "dst", peer)
        return sum(int(found) for found in re.findall(r"\bbytes_sent:(\d+)", text))


@contextlib.contextmanager
def net(**machines: int) -> Iterator[dict[str, Machine]]:
    """Machines by name, each with so many addresses, on a bridge of this one. All is gone after the block."""
    if os.geteuid() != 0:
        missing("network namespaces need root")
    for name in ("ip", "ss"):
        program(name)
    subnet, owner = _free_subnet(), os.getpid()
    bridge, hosts = f"pv{owner}br", iter(range(1, 254))
    made = {name: Machine(f"pushsvc-{owner}-{name}", f"pv{owner}-{number}",
                          [f"{subnet}.{next(hosts)}" for _ in range(count)])
            for number, (name, count) in enumerate(machines.items())}
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{subnet}.254/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for machine in made.values():
            machine.create(bridge)
        yield made
    finally:
        for machine in made.values():
            machine.delete()
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _free_subnet() -> str:
    """Three bytes of a network that this machine knows nothing of, from those set apart for tests (RFC 2544)."""
    known = run("ip", "-4", "route")
    while (subnet := f"198.{random.randint(18, 19)}.{random.randint(0, 255)}") in known:
        continue
    return subnet


# --- What runs on the machines ---------------------------------------------------------------------------


class Balancer:
    """HAProxy on a machine, with the shipped configuration but for addresses, paths and TLS, and quicker to take a
    machine for dead. port: of the front machines; listen: its own."""

    def __init__(self, directory: Path, machine: Machine, fronts: Sequence[Machine], port: int = PORT,
                 listen: int = 80) -> None:
        self.directory = directory
        self.url = f"http://{machine.address}:{listen}"
        self._listen = listen
        self._machine = machine
        self._fronts = fronts
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def changes(self) -> dict[str, str]:
        first, second = self._machine.addresses
        servers = {f"{old}:8000": f"{new.address}:{self._port}" for old, new in zip(FRONTS, self._fronts, strict=True)}
        return {
            "bind :::443 v4v6 ssl crt /etc/haproxy/certs/push.example.com.pem alpn h2,http/1.1":
                f"bind {first}:{self._listen}",
            "bind :::80 v4v6": "",
            "http-request redirect scheme https code 308 unless { ssl_fc }": "",
            "chroot /var/lib/haproxy": "",
            "stats socket /run/haproxy/admin.sock mode 600 level admin": "",
            "/etc/haproxy/come-back.http": str(SHIPPED / "come-back.http"),
            "srvtcpka-idle 5s": "srvtcpka-idle 1s",
            "source 10.0.0.1 check": f"source {first} check",
            "source 10.0.0.2 track": f"source {second} track",
        } | servers

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "haproxy.cfg"
        config.write_text(changed("haproxy.cfg", self.changes()))
        with (self.directory / "haproxy.log").open("ab") as log:
            self._process = subprocess.Popen([*self._machine.prefix, program("haproxy"), "-db", "-f", str(config)],
                                             stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            eventually(lambda: request("GET", f"{self.url}/nothing").status == 404, message="haproxy listens")
        except AssertionError:
            self.__exit__(None, None, None)
            raise AssertionError(self.log()[-4000:]) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_SECONDS)

    def log(self) -> str:
        return (self.directory / "haproxy.log").read_text(errors="replace")


class Log(Redis):
    """Redis on a machine, with the shipped configuration but for address and directory; durable, as that is."""

    def __init__(self, directory: Path, machine: Machine, *, args: Sequence[str] = ()) -> None:
        self._config = directory / "redis.conf"
        super().__init__(directory, host=machine.address, port=REDIS_PORT, prefix=machine.prefix, durable=True, args=args)

    @property
    def url(self) -> str:
        return f"redis://pushsvc:{PASSWORD}@{self.host}:{self.port}/0"

    def client(self, **options: Any) -> Any:
        return super().client(password=REDIS_PASSWORD, **options)

    def start(self, wait: bool = True) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(changed("redis.conf", {"10.0.0.21": self.host, "/var/lib/redis": str(self.directory)}))
        super().start(wait)

    def _options(self) -> list[str]:
        return [str(self._config), *super()._options()]

    def forget(self) -> None:
        """Its data is gone, as with its disk. It must not run."""
        for each in self.directory.glob("appendonly*"):
            shutil.rmtree(each)


class Sentinel(Redis):
    """A Sentinel on a machine, with the shipped configuration, but quicker to take a master for dead."""

    def __init__(self, directory: Path, machine: Machine, master: Redis) -> None:
        super().__init__(directory, host=machine.address, port=SENTINEL_PORT, prefix=machine.prefix, sentinel=True)
        self._master = master

    def start(self, wait: bool = True) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "sentinel.conf").write_text(changed("sentinel.conf", {
            "10.0.0.31": self.host, "10.0.0.21": self._master.host, "dir /tmp": f"dir {self.directory}",
            "down-after-milliseconds mymaster 5000": "down-after-milliseconds mymaster 1000"}))
        super().start(wait)


class Fronts:
    """The service on several machines, one worker each, with HAProxy in front."""

    def __init__(self, directory: Path, machines: Sequence[Machine], proxy: Machine, broker_url: str) -> None:
        env = {"PUSHSVC_BROKER_URL": broker_url, "PUSHSVC_AUTH": "none", "PUSHSVC_PUBLISH_TIMEOUT_SECONDS": "2",
               "PUSHSVC_DRAIN_SECONDS": "1"}
        self.machines = machines
        self.servers = [Server(directory / f"front{number}", workers=1, env=env, port=PORT, host=machine.address,
                               prefix=machine.prefix) for number, machine in enumerate(machines, 1)]
        self.balancer = Balancer(directory / "haproxy", proxy, machines)

    @property
    def url(self) -> str:
        return self.balancer.url

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.stop)
                server.start()
            for server in self.servers:
                server.wait_ready()
            stack.enter_context(self.balancer)
            eventually(lambda: request("GET", f"{self.url}/readyz").status == 200, message="the service behind haproxy")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        gevent.joinall([gevent.spawn(server.stop) for server in self.servers])
        self._stack.close()

    def counted(self, name: str) -> list[float]:
        """A counter of the metrics, on each machine."""
        texts = [request("GET", f"{server.url}/metrics").text for server in self.servers]
        return [sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))) for text in texts]


# --- Who publishes and who listens -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acknowledged:
    id: str
    topics: tuple[str, ...]
    data: str
    at: float


class Load:
    """Publishers that together publish so many events a second from `with` to the end of the block, whatever becomes of
    them. An event's data is "PUBLISHER NUMBER". It is sent once, with an Idempotency-Key: what comes twice was doubled.

    acknowledged: what was answered 200. failed: what was not, and what came instead; whether that is in the log is not
    known.
    """

    def __init__(self, url: str, topics: Sequence[str], rate: float, publishers: int = 8) -> None:
        self.acknowledged: list[Acknowledged] = []
        self.failed: list[str] = []
        self._url = url
        self._topics = topics
        self._every = publishers / rate
        self._publishers = publishers
        self._stopped = False
        self._greenlets: list[gevent.Greenlet] = []

    def __enter__(self) -> Self:
        self._greenlets = [gevent.spawn(self._publish_all, name) for name in range(self._publishers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stopped = True
        gevent.joinall(self._greenlets, timeout=PATIENCE, raise_error=kind is None)
        assert all(each.ready() for each in self._greenlets), "a publisher does not come back"

    def wait(self, count: int) -> None:
        """Until so many more are acknowledged."""
        target = len(self.acknowledged) + count
        eventually(lambda: len(self.acknowledged) >= target, PATIENCE, message=f"{count} events are acknowledged")

    @property
    def longest_stop(self) -> float:
        """Seconds without any acknowledgement."""
        times = sorted(each.at for each in self.acknowledged)
        return max(next - one for one, next in itertools.pairwise(times))

    def _publish_all(self, name: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=PATIENCE)
        due = time.monotonic() + random.uniform(0, self._every)
        for number in itertools.count():
            gevent.sleep(max(0.0, due - time.monotonic()))
            if self._stopped:
                break
            topics = tuple(random.sample(self._topics, 2 if number % 3 == 0 else 1))
            data = f"{name} {number}"
            began = time.monotonic()
            id, fault = publish_once(connection, {"topics": topics, "data": data}, f"{self._topics[0]} {data}")
            if id:
                self.acknowledged.append(Acknowledged(id, topics, data, time.monotonic()))
            else:
                self.failed.append(f"{data} after {time.monotonic() - began:.3f} s: {fault}")
                gevent.sleep(PAUSE)
            due = max(due + self._every, time.monotonic() - 0.1)  # what was missed in a fault is not made up for
        connection.close()


def publish_once(connection: http.client.HTTPConnection, fields: Mapping[str, Any], key: str) -> tuple[str, str]:
    """The id of an event that was acknowledged, or an empty string and what came instead."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    try:
        connection.request("POST", "/publish", json.dumps(fields), headers)
        response = connection.getresponse()
        body = response.read()
    except Failures as error:
        connection.close()
        return "", repr(error)
    return (str(json.loads(body)["id"]), "") if response.status == 200 else ("", f"{response.status} {body!r}")


class Listener:
    """A client as EventSource is, from `with` to the end of the block: it comes back with its last id, and an answer
    that is not 200 would be final.

    received: (when, message) of all that came, told gaps included. visits: how many streams it has had.
    """

    def __init__(self, url: str, topics: Sequence[str], last_event_id: str) -> None:
        self.topics = frozenset(topics)
        self.received: list[tuple[float, Message]] = []
        self.visits = 0
        self._url = url
        self._start = self._last_id = last_event_id
        self._greenlet: gevent.Greenlet | None = None

    def __enter__(self) -> Self:
        self._greenlet = gevent.spawn(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        assert self._greenlet is not None
        self._greenlet.kill()
        if kind is None:
            self._greenlet.get()

    @property
    def newest(self) -> int:
        return seq_of(self._last_id)

    @property
    def gaps(self) -> list[dict[str, str]]:
        return [json.loads(message.data) for _, message in self.received if message.type == "gap"]

    def longest_silence(self, since: float) -> float:
        """Seconds without anything, counted from `since` at the earliest."""
        times = [since, *(at for at, _ in self.received if at > since)]
        return max(next - one for one, next in itertools.pairwise(times))

    def first_after(self, moment: float) -> float:
        """Seconds from a moment until something came."""
        return next(at for at, _ in self.received if at > moment) - moment

    def check(self, acknowledged: Sequence[Acknowledged]) -> int:
        """Asserts that nothing came twice or out of order, and that all that was acknowledged came or was told as lost;
        how many were lost."""
        messages = [message for _, message in self.received if message.type != "gap"]
        seen = {message.data for message in messages}
        assert len(seen) == len(messages), f"{len(messages) - len(seen)} events came twice"
        seqs = [seq_of(message.last_event_id) for message in messages]
        assert all(one < next for one, next in itertools.pairwise(seqs)), "events changed places"
        gaps = [(place_of(gap["from"]), place_of(gap["to"])) for gap in self.gaps]
        lost = [each for each in acknowledged if each.data not in seen and not self.topics.isdisjoint(each.topics)]
        for each in lost:
            assert any(after < place_of(each.id) <= upto for after, upto in gaps), f"{each} is lost, told were {gaps}"
        return len(lost)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError, ProtocolError, EndOfStream):
                self._visit()
            gevent.sleep(PAUSE)

    def _visit(self) -> None:
        with Stream(self._url, sorted(self.topics), last_event_id=self._last_id, timeout=PATIENCE,
                    wire_limit=0) as stream:
            assert stream.status == 200, f"{stream!r} is final for an EventSource"
            stream.opened(PATIENCE)
            self.visits += 1
            while True:
                message = stream.next(PATIENCE)
                self.received.append((time.monotonic(), message))
                self._last_id = stream.last_event_id


def place_of(id: str) -> tuple[str, int]:
    """Where an id stands among all: epochs have one length, and grow."""
    return epoch_of(id), seq_of(id)
