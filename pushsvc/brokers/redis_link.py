"""Connections to the Redis that a URL names: plain, with TLS, on a Unix socket, or whichever is master by Sentinel.

Errors of redis-py are translated here, at the one edge: whatever fails is an OSError (the connection is gone) or a
Refused (the server answered, and the connection is good). Needs no gevent, and works under its patches.
"""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

from redis.exceptions import BusyLoadingError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from pushsvc.brokers.redis_address import CONNECT_SECONDS, Address, connection_of, parse_url

SCRIPTS = ("publish", "history", "open", "burn")
_RUN_ID = re.compile(r"^run_id:(\w+)", re.M)
_ROLE = re.compile(r"^role:(\w+)", re.M)
_EVICTS = re.compile(r"^maxmemory:[1-9].*^maxmemory_policy:(?!noeviction)(\S+)", re.M | re.S)
_REPLICATION_IDS = re.compile(r"^master_replid:(\w+)\s+^master_replid2:(\w+)", re.M)
Arguments = Sequence[str | int | bytes]


class Refused(Exception):
    """The server refused a command; the text says why. `leave`: another server is to be asked."""

    def __init__(self, text: str, leave: bool = False) -> None:
        super().__init__(text)
        self.leave = leave


class Scripts:
    """The Lua scripts, with what they share in front. They are known to a server by their digests."""

    def __init__(self) -> None:
        folder = files("pushsvc.brokers")
        shared = folder.joinpath("log.lua").read_text()
        self.texts = {name: f"{shared}\n{folder.joinpath(name + '.lua').read_text()}" for name in SCRIPTS}
        self.digests: dict[str, str] = {}


class Link:
    """One connection. Not open until `open`; after an OSError it is closed and can be opened again.

    epoch, start, past: the epoch that the log was in when this was opened, the sequence that it began after (no event has
    that one), and the epochs before, with theirs (0: not known). seconds: how long a reply may take. limits: what
    open.lua is told of retention, or nothing to leave it to others. deadline: by time.monotonic(), when all that is
    going on ends; infinity for none.
    """

    def __init__(self, address: Address, prefix: str, seconds: float, limits: Arguments = ()) -> None:
        self.address = address
        self.prefix = prefix
        self.channels = f"{prefix}{address.db}:"
        self.epoch = ""
        self.start = 0
        self.past: dict[str, int] = {}
        self.deadline = math.inf
        self._seconds = seconds
        self._limits = limits
        self._told = False  # a later connection would set them back after another worker has set them anew
        self._scripts = Scripts()
        self._sentinels = list(address.sentinels)  # the one that was right last time first
        self._connection: Any = None

    def left(self) -> float:
        """How many seconds there are until the deadline. Raises TimeoutError if there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def stands(self) -> bool:
        """Whether it is open and the server has not closed it: what is sent into one that it has would be lost for no
        reason. Never raises."""
        try:
            return self._connection is not None and not self.has_more()
        except OSError:
            return False

    def open(self, epoch: str = "", newest: int = 0) -> int:
        """Connect to the master, load the scripts, take part in the present epoch or begin the next; the newest
        sequence. `epoch`, `newest`: the position that the caller knows. Raises OSError and Refused. Switches."""
        self.close()
        try:
            self._connection = self._connect()
            info = "".join(self.call("INFO", part).decode() for part in ("server", "replication", "memory"))
            role, run, policy = _ROLE.search(info), _RUN_ID.search(info), _EVICTS.search(info)
            if role is None or role[1] != "master" or run is None:
                raise Refused("it is not a master", leave=True)
            if policy is not None:
                raise Refused(f"when it is full it evicts keys, and nobody would be told what is lost with them: its "
                              f"maxmemory-policy has to be noeviction, not {policy[1]}")
            for name, text in self._scripts.texts.items():
                self._scripts.digests[name] = self.call("SCRIPT", "LOAD", text).decode()
            life = run[1] + _made_master(info)
            reply = self.call(*self.script("open", life, epoch, newest, int(not self._told), *self._limits))
        except BaseException:
            self.close()
            raise
        self._told = True
        self.epoch, self.start = reply[0].decode(), int(reply[2])
        self.past = {epoch.decode(): int(ended.partition(b" ")[2] or 0)
                     for epoch, ended in zip(reply[3][::2], reply[3][1::2], strict=True)}
        return int(reply[1])

    def close(self) -> None:
        """Idempotent, never raises."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.disconnect()

    def interrupt(self) -> None:
        """Break the connection under the greenlet that waits for it: that one gets an OSError. Atomic: no switch."""
        connection = self._connection
        if connection is not None and (sock := connection._sock) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def await_replicas(self, count: int) -> Arguments:
        """The command that waits until so many replicas have what was sent before, for half the time of a reply at
        most; it answers how many have."""
        return "WAIT", count, max(1, round(min(self._seconds, self.left()) * 500))  # 0 would be for ever

    def script(self, name: str, *arguments: str | int | bytes) -> list[str | int | bytes]:
        """The command that runs a script."""
        return ["EVALSHA", self._scripts.digests[name], 1, self.prefix, *arguments]

    def call(self, *command: str | int | bytes) -> Any:
        """Send a command and return its reply. Raises OSError and Refused. Switches."""
        reply, = self.exchange([command])
        if isinstance(reply, Refused):
            raise reply
        return reply

    def exchange(self, commands: Sequence[Arguments]) -> list[Any]:
        """Send commands in one go and return their replies, a Refused for each that was refused. Raises OSError: what
        became of them is not known. Switches."""
        try:
            self.send(commands)
            return [self._reply() for _ in commands]
        except BaseException:  # also the caller's own timeout: a reply that comes later would be taken for the next one's
            self.close()
            raise

    def send(self, commands: Iterable[Arguments]) -> None:
        """Raises OSError. Switches."""
        connection = self._given_in_time()
        try:
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        except (RedisError, OSError) as error:
            raise self._broken(error) from error
        except BaseException:  # a part of them may be out
            self.close()
            raise

    def receive(self, seconds: float) -> Any:
        """The next reply or message; None if none comes in time. Raises OSError. Switches."""
        connection = self._given()
        try:
            return connection.read_response(timeout=seconds, disconnect_on_error=False)
        except RedisTimeout:
            return None
        except (RedisError, OSError) as error:
            raise self._broken(error) from error
        except BaseException:  # a part of it may have been read
            self.close()
            raise

    def has_more(self) -> bool:
        """Whether something has come already. Raises OSError."""
        try:
            return bool(self._given().can_read(0))
        except (RedisError, OSError) as error:
            raise self._broken(error) from error

    def _reply(self) -> Any:
        connection = self._given_in_time()
        try:
            return connection.read_response(disconnect_on_error=False)
        except BusyLoadingError as error:  # for redis-py a broken connection, but it is an answer: nothing was done
            return Refused(str(error), leave=True)
        except (RedisTimeout, RedisConnectionError, OSError) as error:
            raise self._broken(error) from error
        except ResponseError as error:
            leave = isinstance(error, ReadOnlyError | NoScriptError) or str(error).startswith("NOLOG")
            return Refused(str(error), leave)
        except RedisError as error:
            raise self._broken(error) from error

    def _given(self) -> Any:
        connection = self._connection
        if connection is None:
            raise ConnectionError("not connected")
        return connection

    def _given_in_time(self) -> Any:
        connection = self._given()
        if self.deadline < math.inf:
            connection._sock.settimeout(min(connection.socket_timeout, self.left()))
        return connection

    def _broken(self, error: Exception) -> OSError:
        self.close()
        return TimeoutError("no answer in time") if isinstance(error, RedisTimeout | TimeoutError) else \
            ConnectionError(str(error))

    def _connect(self) -> Any:
        if not self._sentinels:
            return self._connected(parse_url(self.address.url), self._seconds)
        reasons: dict[tuple[str, int], str] = {}
        for sentinel in self._sentinels:
            asked = sentinel
            try:
                asked = self._ask(sentinel)
                if asked not in reasons:
                    connection = self._master(asked)
                    self._sentinels = [sentinel, *(each for each in self._sentinels if each != sentinel)]
                    return connection
            except (OSError, Refused) as error:
                reasons[asked] = str(error)
        raise ConnectionError("no Sentinel names a master that can be had: " + "; ".join(
            f"{host}:{port}: {reason}" for (host, port), reason in reasons.items()))

    def _connected(self, options: dict[str, Any], seconds: float) -> Any:
        left = self.left()
        most = {"socket_timeout": seconds, "socket_connect_timeout": CONNECT_SECONDS}
        limited = {name: min(options.get(name, value), left) for name, value in most.items()}
        connection = connection_of(options | limited, seconds)
        try:
            connection.connect()
        except RedisTimeout as error:
            raise TimeoutError(str(error)) from error
        except ResponseError as error:
            raise Refused(str(error)) from error
        except RedisError as error:
            raise ConnectionError(str(error)) from error
        return connection

    def _ask(self, sentinel: tuple[str, int]) -> tuple[str, int]:
        """Who is master, by a Sentinel: it may be wrong, if it was cut off."""
        host, port = sentinel
        options: dict[str, Any] = {"host": host, "port": port, **dict(self.address.sentinel_options), "client_name": None}
        connection = self._connected(options, CONNECT_SECONDS)
        try:
            found = _answer(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.master)
        finally:
            connection.disconnect()
        if not found:
            raise Refused(f"knows no master {self.address.master!r}")
        return found[0].decode(), int(found[1])

    def _master(self, server: tuple[str, int]) -> Any:
        """A connection to a server that a Sentinel names, if it takes itself for the master too."""
        host, port = server
        connection = self._connected(parse_url(self.address.url) | {"host": host, "port": port}, self._seconds)
        try:
            role = _ROLE.search(_answer(connection, "INFO", "replication").decode())
            if role is None or role[1] != "master":
                raise Refused("it is not a master", leave=True)
        except BaseException:
            connection.disconnect()
            raise
        return connection


def _answer(connection: Any, *command: str) -> Any:
    """What a connection that is no Link's yet is answered. Raises OSError and Refused. Switches."""
    try:
        connection.send_command(*command)
        return connection.read_response()
    except RedisTimeout as error:
        raise TimeoutError(str(error)) from error
    except RedisError as error:
        raise Refused(str(error)) from error


def _made_master(info: str) -> str:
    """":" and the replication id of a server that was a replica in this life, "" for another. It keeps its run id when it
    is made one and a master again, and may have lost what it had taken before."""
    ids = _REPLICATION_IDS.search(info)
    return f":{ids[1]}" if ids is not None and ids[2].strip("0") else ""
