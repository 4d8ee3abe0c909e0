"""Settings: every number of the service has its one home here, with its unit and its reason.

Pure: `Settings.from_environ` takes the environment as an argument. `python -m pushsvc.settings` prints the table of
docs/settings.md.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from pushsvc.errors import SettingsError

PREFIX = "PUSHSVC_"
WORKERS = "WEB_CONCURRENCY"  # a variable of many servers, and the one that gunicorn has for it
MOST_WORKERS = 1024
REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis-sentinel", "rediss-sentinel",
         "sentinel", "valkey", "valkeys")  # schemes of addresses of Redis


MOST = 2.0**63  # of a number that has no bound of its own: all that reads it can still count


def setting(default: Any, why: str, *, unit: str = "", least: float = 0, most: float = MOST,
            choices: tuple[str, ...] = ()) -> Any:
    """A field of Settings: its default, its reason (a sentence of the table), its unit and what it may be."""
    meta = {"why": why, "unit": unit, "least": least, "most": most, "choices": choices}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked. Raises SettingsError with a message that names the variable."""

    bind: str = setting("127.0.0.1:8000", "Where to listen, as gunicorn's `bind`; several are separated by commas.")
    backlog: int = setting(4096, "Connections that wait to be accepted, per worker; the kernel allows `somaxconn`.",
                           unit="connections", least=1, most=1e6)
    keepalive_seconds: int = setting(5, "How long an idle connection of a publisher is kept.", unit="s", least=1,
                                     most=3600)
    broker_url: str = setting("sqlite:var/pushsvc.db", "The log: `sqlite:PATH` (all workers of one machine share it), "
                              "`redis://HOST:PORT/DB` (several machines; also `rediss:`, `unix:`, `redis+sentinel:`) or "
                              "`memory:` (one process, lost with it).")
    redis_prefix: str = setting("pushsvc:", "What all keys and channels in Redis begin with; it ends with `:`. One per "
                                "deployment, of which none begins with another's.")
    redis_replicas: int = setting(0, "Replicas of Redis that must have an event before it is acknowledged.",
                                  unit="replicas", most=100)
    sync: str = setting("normal", "`normal` survives the death of every process; `full` also a power loss, at one disk "
                        "sync per group of publishes.", choices=("normal", "full"))
    poll_seconds: float = setting(1.0, "How long an event waits for a reader whose doorbell was lost.", unit="s",
                                  least=0.01, most=60)
    publish_timeout_seconds: float = setting(10.0, "How long a publish waits for the log before it is told 503.",
                                             unit="s", least=0.1, most=300)
    history_events: int = setting(10_000, "Newest events that each topic keeps in history.", unit="events per topic",
                                  least=1)
    history_seconds: float = setting(86_400.0, "Age at which an event leaves history.", unit="s", least=1, most=1e9)
    history_bytes: int = setting(1 << 30, "Size of the whole log at which its oldest events leave; Redis has a bound "
                               "of its own, `maxmemory`, and refuses to publish when it is full.", unit="bytes",
                                 least=1 << 20)
    idempotency_seconds: float = setting(86_400.0, "How long an Idempotency-Key is remembered.", unit="s", least=1,
                                         most=1e9)
    max_body_bytes: int = setting(1 << 20, "Largest body of a publish; more is 413.", unit="bytes", least=1024)
    max_batch_events: int = setting(10_000, "Most lines of one NDJSON batch; their topics are 100,000 together at most.",
                                    unit="events", least=1)
    max_topics_per_stream: int = setting(1000, "Most topics that one stream may name.", unit="topics", least=1)
    max_streams: int = setting(0, "Most streams of one worker; more are told to come back later. 0: what its "
                               "descriptors allow.", unit="streams")
    max_connections: int = setting(1000, "Most connections of one worker besides its parked streams: publishers, and "
                                   "streams that open or cannot be parked (HTTP/1.0, TLS in gunicorn). Such streams may "
                                   "have three quarters of them; further ones are told to come back.",
                                   unit="connections", least=1)
    max_memory_bytes: int = setting(0, "Resident memory of one worker above which further streams are told to come back "
                                    "later. 0: they are when nine tenths of what the cgroup allows are in use, if it has "
                                    "a limit.", unit="bytes")
    mailbox_events: int = setting(1000, "Most events that wait for one slow stream; then it is closed and resumes by id.",
                                  unit="events", least=1)
    mailbox_bytes: int = setting(1 << 20, "Most bytes that wait for one slow stream in its worker, besides one burst "
                            "that came when nothing waited; and twice as many in the kernel.", unit="bytes", least=1024)
    heartbeat_seconds: float = setting(15.0, "Silence after which a stream gets a comment line: under the 60 s at which "
                                       "most proxies cut.", unit="s", least=0.1, most=3600)
    dead_seconds: float = setting(30.0, "How long a client may leave what was sent unacknowledged, or its window closed, "
                                  "before its connection is given up; and how long the body of a publish may take.",
                                  unit="s", least=1, most=3600)
    retry_ms: int = setting(3000, "The reconnection time that a stream opens with.", unit="ms", most=86_400_000)
    rotate_seconds: float = setting(14_400.0, "Age at which a stream is ended to come back elsewhere, spread by a tenth "
                                    "either way; 0: never.", unit="s")
    drain_seconds: float = setting(10.0, "Window over which a stop ends its streams; a worker with few is faster.",
                                   unit="s", most=3600)
    graceful_seconds: int = setting(30, "How long gunicorn waits for a worker before it kills it; longer than the drain "
                                    "window.", unit="s", least=1, most=7200)
    comeback_ms: int = setting(5000, "Clients of a drained worker come back spread over this time, each with its own "
                               "`retry:`.", unit="ms", least=1, most=3_600_000)
    auth: str = setting("", "`none` opens the service on any address without a key.", choices=("", "none"))
    jwt_key: str = setting("", "The key that tokens are checked with: a secret (HS256; fewer than 32 bytes are warned "
                           "of) or a public key in PEM (RS256, ES256, EdDSA).")
    jwt_algorithms: str = setting("", "Accepted algorithms, separated by commas; empty: the one that fits the key.")
    cors_origins: str = setting("", "Origins (`https://app.example`) whose pages may use the service, with credentials; "
                                "separated by commas.")
    record_dir: str = setting("", "Where each worker records the shape of its traffic for load tests, without payloads "
                              "and with hashed names; empty: nowhere.")
    record_bytes: int = setting(64 << 20, "Size of a worker's recording at which it ends.", unit="bytes", least=4096)
    log_level: str = setting("info", "`debug` adds a line per stream.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "`text` (key=value) or `json`, one line per entry.", choices=("text", "json"))

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each, getattr(self, each.name))
        if self.drain_seconds >= self.graceful_seconds:
            raise SettingsError(f"{PREFIX}DRAIN_SECONDS is not shorter than {PREFIX}GRACEFUL_SECONDS")
        scheme, _, rest = self.broker_url.partition(":")
        if scheme not in ("sqlite", "memory", *REDIS) or (scheme == "memory" and rest):
            url = hide(self.broker_url)
            raise SettingsError(f"{PREFIX}BROKER_URL is sqlite:PATH, redis://HOST or memory:, not {url!r}")
        if not self.redis_prefix.isprintable():
            raise SettingsError(f"{PREFIX}REDIS_PREFIX has a control character")
        if not self.redis_prefix.endswith(":"):  # the number of the database follows: app and 10 would be app1 and 0
            raise SettingsError(f"{PREFIX}REDIS_PREFIX ends with a colon, as pushsvc:, unlike {self.redis_prefix!r}")
        for origin in self.origins:
            _check_origin(origin)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """The settings that `environ` asks for. Raises SettingsError also for a PUSHSVC_ variable that is none."""
        known = {variable(each): each for each in fields(cls)}
        for name in environ:
            if name.startswith(PREFIX) and name not in known:
                near = difflib.get_close_matches(name.upper(), known, 1, 0.0)
                raise SettingsError(f"{name} is no setting; the nearest is {near[0]}")
        return cls(**{each.name: _read(name, each, environ[name]) for name, each in known.items() if name in environ})

    @property
    def origins(self) -> tuple[str, ...]:
        """`cors_origins`, one by one."""
        return tuple(filter(None, (origin.strip() for origin in self.cors_origins.split(","))))


def hide(url: str) -> str:
    """A URL for logs and messages: without its passwords, also such as should have been written with `%40` and `%2F`."""
    url = re.sub(r"(password=)[^&]*", r"\1***", url)
    front = url.partition("?")[0]
    end = (front if "@" in front else url).rfind("@")
    start = url.find(":", url.find("://") + 3)
    return f"{url[:start]}:***{url[end:]}" if 0 <= start < end else url


def variable(each: Field[Any]) -> str:
    """The environment variable of a setting."""
    return PREFIX + each.name.upper()


def workers_asked(environ: Mapping[str, str]) -> int:
    """The number of workers that `environ` asks for; 0 where it says nothing. Raises SettingsError."""
    text = environ.get(WORKERS, "")
    try:
        number = int(text or 0)
    except ValueError:
        number = 0
    if text and not 1 <= number <= MOST_WORKERS:
        raise SettingsError(f"{WORKERS} is a whole number of at least 1 and at most {MOST_WORKERS}, not {text!r}")
    return number


def _read(name: str, each: Field[Any], text: str) -> Any:
    kind = typing.get_type_hints(Settings)[each.name]
    try:
        return kind(text)
    except ValueError:
        article = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{name} is {article}, not {text!r}") from None


def _check(each: Field[Any], value: Any) -> None:
    meta: types.MappingProxyType[Any, Any] = each.metadata
    if isinstance(value, str):
        if meta["choices"] and value not in meta["choices"]:
            raise SettingsError(f"{variable(each)} is one of {', '.join(filter(None, meta['choices']))}, not {value!r}")
    elif not meta["least"] <= value <= meta["most"]:
        most = "" if meta["most"] == MOST else f" and at most {meta['most']:g}"
        raise SettingsError(f"{variable(each)} is at least {meta['least']:g}{most} {meta['unit']}, not {value!r}")


def _check_origin(origin: str) -> None:
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
        raise SettingsError(f"{PREFIX}CORS_ORIGINS has {origin!r}, which is no origin like https://app.example")


def table() -> str:
    """The settings as a Markdown table: docs/settings.md holds it, a test holds the two together."""
    rows = ["| variable | default | unit | what for |", "| --- | --- | --- | --- |"]
    for each in fields(Settings):
        default = f"`{each.default}`" if each.default != "" else "(empty)"
        rows.append(f"| `{variable(each)}` | {default} | {each.metadata['unit']} | {each.metadata['why']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
