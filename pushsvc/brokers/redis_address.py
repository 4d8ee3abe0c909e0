"""Addresses of a Redis, and the connections of redis-py that they mean. Nothing here connects."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis import connection as redis_connection
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError

from pushsvc.errors import SettingsError
from pushsvc.settings import REDIS, hide

CONNECT_SECONDS = 2.0
SENTINEL_PORT = 26379
# Parameters of a URL that change no form of what is sent and answered; beside them all that begin with ssl_.
PARAMETERS = frozenset({"db", "username", "password", "client_name", "socket_timeout", "socket_connect_timeout",
                        "socket_keepalive", "socket_read_size", "health_check_interval", "retry_on_timeout"})
SENTINEL_PARAMETERS = frozenset({"sentinel_username", "sentinel_password"})
_DB = re.compile(r"/?|/[0-9]+")
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
parse_url: Any = redis_connection.parse_url


class _NoAddress(ValueError):
    """The text says why, without any part of a password."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the log is. url: what redis-py takes, for Sentinel without a host. sentinels: (host, port) of each."""

    url: str
    db: int
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str = ""
    sentinel_options: tuple[tuple[str, str], ...] = ()


def parse_address(url: str) -> Address:
    """The address that a URL gives. Raises SettingsError for one that cannot be meant.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss:// with TLS, unix:///PATH; redis+sentinel://[USER:PASSWORD@]HOST
    [:PORT][,HOST[:PORT]…]/MASTER[/DB], rediss+sentinel:// with TLS to the Redis servers; Sentinel's own
    credentials as `sentinel_username` and `sentinel_password` in the query. Other parameters are those of redis-py's
    connections in PARAMETERS, and with TLS its `ssl_` ones.
    """
    scheme, mark, rest = url.partition("://")
    if scheme not in REDIS or not mark or not rest:
        raise SettingsError(f"{hide(url)!r} is no address of a Redis")
    scheme = scheme.replace("valkey", "redis")
    try:
        _check_parameters(rest, "sentinel" in scheme)
        if "sentinel" in scheme:
            address = _sentinel_address("rediss" if scheme.startswith("rediss") else "redis", rest)
        else:
            address = _address(f"{scheme}://{rest}")
        _try_options(address)
        return address
    except (ValueError, RedisError) as error:
        raise SettingsError(f"{hide(url)!r} is no address of a Redis: {_reason(rest, error)}") from None


def _check_parameters(rest: str, sentinel: bool) -> None:
    for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True):
        if not (name in PARAMETERS or name.startswith("ssl_") or (sentinel and name in SENTINEL_PARAMETERS)):
            raise _NoAddress(f"{name} is no parameter of it")


def _address(url: str, **of_sentinel: Any) -> Address:
    """An address by what redis-py takes. Its connections go to the database that it reads there: from a parameter, else
    from the path."""
    options = parse_url(url)
    db = options.get("db", 0)
    if db < 0 or ("path" not in options and not _DB.fullmatch(urlsplit(url).path)):
        raise _NoAddress("its database is no number, as in redis://HOST/0")
    return Address(url, db, **of_sentinel)


def _try_options(address: Address) -> None:
    """Raises _NoAddress for what no connection could be made with."""
    options = parse_url(address.url)
    for name in ("socket_timeout", "socket_connect_timeout"):
        if not options.get(name, 1) > 0:  # also not a number
            raise _NoAddress(f"{name} is more than 0 s")
    try:
        connection_of(options, CONNECT_SECONDS)
    except (TypeError, ValueError, RedisError) as error:
        unexpected = _UNEXPECTED.search(str(error))
        raise _NoAddress(f"{unexpected[1]} is no parameter of it" if unexpected else str(error)) from None


def _reason(rest: str, error: Exception) -> str:
    """What is wrong, without what may be a part of a password."""
    if "@" not in rest or (isinstance(error, _NoAddress) and "@" not in rest.partition("?")[2]):
        return str(error)
    return "in a user or a password, write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25"


def connection_of(options: dict[str, Any], seconds: float) -> Any:
    """A connection that has not been connected. seconds: how long a reply may take."""
    kind = options.pop("connection_class", Connection)
    settings: dict[str, Any] = {"protocol": 2, "client_name": f"pushsvc-{os.getpid()}",
                                "socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": seconds}
    if kind is not UnixDomainSocketConnection:
        settings |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    if kind is SSLConnection and options.get("ssl_cert_reqs") != "none":
        settings["ssl_check_hostname"] = True  # as redis-py has it from 6 on
    connection = kind(**settings | options)
    # It says nothing of itself to Redis. A parameter for this there is only from redis-py 7.2 on.
    connection.driver_info = connection.lib_name = connection.lib_version = None
    return connection


def _sentinel_address(scheme: str, rest: str) -> Address:
    parts = urlsplit(f"//{rest}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    sentinels = tuple(_host(each) for each in hosts.split(","))
    path = [each for each in parts.path.split("/") if each]
    master = parts.fragment or (unquote(path.pop(0)) if path else "")
    if not master or len(path) > 1:
        raise _NoAddress("it names no master: redis+sentinel://HOST:PORT,HOST:PORT/MASTER")
    pairs = parse_qsl(parts.query)
    own = tuple((name.removeprefix("sentinel_"), value) for name, value in pairs if name.startswith("sentinel_"))
    query = urlencode([(name, value) for name, value in pairs if not name.startswith("sentinel_")])
    url = f"{scheme}://{credentials + '@' if credentials else ''}host/{''.join(path)}{'?' + query if query else ''}"
    return _address(url, sentinels=sentinels, master=master, sentinel_options=own)


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise _NoAddress("a Sentinel has no host")
    return parts.hostname, parts.port or SENTINEL_PORT
