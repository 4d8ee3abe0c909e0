"""What each limit of the kernel and of a process has to be for so many streams: rules as data, and pure.

A need is a tuple of whole numbers, as the kernel has it: most limits are one number, tcp_mem and its like are three,
a range of ports is its two ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

UNEVEN = 1.07  # the fullest worker has so many times the mean of streams
OWN_DESCRIPTORS = 64  # of a worker: listeners, the log, its threads
OTHER_DESCRIPTORS = 100_000  # of the rest of the machine
LEAST_QUEUE, MOST_QUEUE = 512, 65_535  # more than 16 bits no kernel before 4.1 takes
PORTS = (10_000, 65_535)  # below lie the ports that services listen on
SOCKET_BYTES = 5_000  # of the kernel, for one end of an idle connection
STREAM_BYTES = 1_000  # of a worker, for a parked stream
WORKER_BYTES = 45_000_000  # of a worker without streams
PROXY_BYTES = 20_000  # of a proxy, for the two connections that it joins
Need = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is to be held, and by which machine.

    streams: of all workers together. connections: `max_connections`, of each worker. proxy: whether the proxy is on
    this machine, so that each stream has two connections here. memory_bytes: of the machine. page_bytes: of its pages.
    """

    streams: int
    workers: int
    connections: int
    proxy: bool
    memory_bytes: int
    page_bytes: int = 4096

    def __post_init__(self) -> None:
        if self.streams < 1 or self.workers < 1:
            raise ValueError("streams and workers are at least 1")

    @property
    def links(self) -> int:
        """Connections of one stream that this machine has an end of."""
        return 2 if self.proxy else 1

    @property
    def sockets(self) -> int:
        """Ends of connections of one stream on this machine."""
        return 3 if self.proxy else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit. name: as sysctl has it, or `nofile`, or `memory`. need: computed from a Target.

    why: what it bounds. without: what is seen when it is too small. is_range: wider is more, not higher.
    """

    name: str
    unit: str
    why: str
    without: str
    need: Callable[[Target], Need]
    is_range: bool = False

    @property
    def is_sysctl(self) -> bool:
        return "." in self.name

    def is_enough(self, have: Need, need: Need) -> bool:
        return self.joined(have, need) == have

    def joined(self, have: Need, need: Need) -> Need:
        """What holds both: nothing that is higher already is lowered."""
        if self.is_range:
            return min(have[0], need[0]), max(have[1], need[1])
        return tuple(map(max, have, need))


def power(number: float) -> int:
    """The next power of two that is not less."""
    return 1 << max(0, math.ceil(number) - 1).bit_length()


def queue(target: Target) -> int:
    """Connections that wait at one listening socket: when all workers start anew, all streams come back at once."""
    return min(MOST_QUEUE, max(LEAST_QUEUE, power(target.streams / target.workers)))


def fullest(streams: int, workers: int) -> int:
    """Streams of the fullest worker: the kernel draws a worker for each connection."""
    return math.ceil(streams / workers * UNEVEN) if workers > 1 else streams


def descriptors(streams: int, workers: int, connections: int) -> int:
    """Of the fullest worker."""
    return fullest(streams, workers) + connections + OWN_DESCRIPTORS


def workers_holding(streams: int, each: int) -> int:
    """How many workers hold the streams, if one takes `each`, which is at least 1."""
    return 1 if streams <= each else math.ceil(streams * UNEVEN / each)


def workers_for(target: Target, nofile: int) -> int:
    """How many workers hold the streams with so many descriptors each; 0: no number of them."""
    each = nofile - target.connections - OWN_DESCRIPTORS
    return workers_holding(target.streams, each) if each > 0 else 0


def nofile(target: Target) -> int:
    """Descriptors of one worker."""
    return descriptors(target.streams, target.workers, target.connections)


def most_descriptors(target: Target) -> int:
    """Of the process that needs most: a worker, or a proxy of one process."""
    return max(nofile(target), 2 * target.streams + target.connections if target.proxy else 0)


def addresses(target: Target) -> int:
    """How many addresses the service has to listen on, so that the proxy has a port for each stream."""
    return math.ceil(target.streams / (PORTS[1] - PORTS[0] + 1)) if target.proxy else 1


def ports(target: Target) -> Need:
    """Linux's own range is enough for as many streams as it has ports, less a tenth for others."""
    usual = (32_768, 60_999)
    return usual if not target.proxy or target.streams <= 0.9 * (usual[1] - usual[0]) else PORTS


def buffers(target: Target) -> Need:
    """Pages of all TCP buffers. An idle stream has none; one event to all is in all of them at once, a page for each
    connection at most. Never more than half of the memory."""
    high = min(target.streams * target.links, target.memory_bytes // target.page_bytes // 2)
    return high // 2, high * 3 // 4, high


def memory(target: Target) -> int:
    """Bytes of everything that holds the streams."""
    each = target.sockets * SOCKET_BYTES + STREAM_BYTES + (PROXY_BYTES if target.proxy else 0)
    return target.streams * each + target.workers * WORKER_BYTES


LIMITS = (
    Limit(name="nofile", unit="descriptors per process",
          why="Each stream is a descriptor of its worker.",
          without="A worker that has none left tells new streams to come back later (`max_streams` in its first line of "
                  "log); a program without such a bound fails with EMFILE, `Too many open files`.",
          need=lambda target: (nofile(target),)),
    Limit(name="fs.nr_open", unit="descriptors per process",
          why="The most that nofile may be set to. A proxy needs two descriptors per stream, often in one process.",
          without="The service does not start: systemd fails to set LimitNOFILE.",
          need=lambda target: (most_descriptors(target),)),
    Limit(name="fs.file-max", unit="open files of the machine",
          why="All descriptors of all processes together.",
          without="ENFILE in every program, `file-max limit reached` in the kernel's log.",
          need=lambda target: (target.streams * target.sockets + OTHER_DESCRIPTORS,)),
    Limit(name="net.core.somaxconn", unit="connections per listening socket",
          why="Connections that are made and wait to be accepted; PUSHSVC_BACKLOG asks for as many, the kernel cuts it "
              "to this.",
          without="In a storm of clients that return, connects time out or take 1 s, 3 s, 7 s: ListenOverflows and "
                  "ListenDrops in /proc/net/netstat grow.",
          need=lambda target: (queue(target),)),
    Limit(name="net.ipv4.tcp_max_syn_backlog", unit="connections per listening socket",
          why="Connections that are not made yet, or whose request has not come yet (the service accepts a connection "
              "with its request). The kernel keeps a quarter of it for known peers.",
          without="SYNs are dropped or answered with cookies: TCPReqQFullDrop, TCPReqQFullDoCookies.",
          need=lambda target: (power(queue(target) * 4 / 3),)),
    Limit(name="net.ipv4.ip_local_port_range", unit="first and last port", is_range=True,
          why="A proxy needs a port of its own for each connection to one address and port of the service.",
          without="connect() fails with EADDRNOTAVAIL: the proxy answers 503 from that stream on, and its CPU goes up "
                  "before, for it searches.",
          need=ports),
    Limit(name="net.ipv4.tcp_mem", unit="pages: low, pressure, high",
          why="All TCP buffers of the machine. One event to all streams is in all their buffers at once.",
          without="Above `pressure` windows shrink, above `high` data is dropped and connections break: "
                  "TCPMemoryPressures, TCPAbortOnMemory, `out of memory -- consider tuning tcp_mem` in the kernel's log.",
          need=buffers),
    Limit(name="net.ipv4.tcp_rmem", unit="bytes: least, default, most",
          why="The receive buffer of one connection: a publisher's body; what a proxy takes of a stream.",
          without="Large publishes come in many small windows.",
          need=lambda target: (4096, 65_536, 1 << 20)),
    Limit(name="net.ipv4.tcp_wmem", unit="bytes: least, default, most",
          why="The send buffer of one connection: what a slow client may leave untaken before its mailbox fills.",
          without="A burst does not fit the socket, so that a parked stream needs a greenlet again: `behind` grows.",
          need=lambda target: (4096, 16_384, 1 << 20)),
    Limit(name="net.ipv4.tcp_max_orphans", unit="connections of the machine",
          why="Connections that were closed here and still have something to send. A stop closes all streams.",
          without="They are reset instead of ended, so that browsers report errors: `too many orphaned sockets` in the "
                  "kernel's log, TCPAbortOnMemory.",
          need=lambda target: (target.streams,)),
    Limit(name="net.ipv4.tcp_max_tw_buckets", unit="connections of the machine",
          why="Connections that ended within the last minute and were closed here first. A stop closes all streams.",
          without="The kernel forgets them early: TCPTimeWaitOverflow, `time wait bucket table overflow`.",
          need=lambda target: (target.streams * target.links,)),
    Limit(name="net.core.netdev_max_backlog", unit="packets per core",
          why="Packets that wait between the network (loopback too) and the kernel's TCP. One event to all is a burst.",
          without="Packets are dropped and sent again 200 ms later: the second column of /proc/net/softnet_stat grows.",
          need=lambda target: (min(65_536, max(1000, power(target.streams / 16))),)),
    Limit(name="net.netfilter.nf_conntrack_max", unit="connections of the machine",
          why="Where a firewall or NAT follows connections, each stream is one, and one more through a proxy here.",
          without="`nf_conntrack: table full, dropping packet` in the kernel's log; nobody can connect any more.",
          need=lambda target: (target.streams * target.links + 65_536,)),
    Limit(name="memory", unit="bytes of the machine",
          why="About 5 KB of the kernel for each end of a connection, 1 KB of the worker for each stream, and what the "
              "proxy takes.",
          without="The kernel kills a process. Give the service a limit of its own: docs/limits/5-memory.md.",
          need=lambda target: (memory(target),)),
)
