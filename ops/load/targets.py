"""The servers that a replay can be sent to: how each is asked for a stream, and how an event is published to it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from publisher import post
from servers import Mercure, Nchan, Pushsvc, Server

from load.shape import Event

FORM, JSON, TEXT = "application/x-www-form-urlencoded", "application/json", "text/plain"
HISTORY_EVENTS = 10_000  # as pushsvc has it, so that all are asked the same
WORKERS_SECONDS = 30.0


class Form(ABC):
    """How to speak to one kind of server. token: what it asks of a publisher, and of a subscriber; "" for nothing. host:
    with the port, as the server's URL has them (see `authority`)."""

    name = ""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self._authorization = f"Authorization: Bearer {token}\r\n" if token else ""

    @abstractmethod
    def path(self, topics: Sequence[str]) -> str:
        """Where a stream of these topics is."""

    @abstractmethod
    def publish(self, host: str, topics: Sequence[str], data: str, event: Event) -> bytes:
        """The request that publishes an event."""

    def subscribe(self, host: str, topics: Sequence[str], last_id: bytes) -> bytes:
        """The request that asks for a stream, after `last_id` if that is not empty."""
        resume = b"Last-Event-ID: " + last_id + b"\r\n" if last_id else b""
        return (f"GET {self.path(topics)} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
                f"{self._authorization}").encode() + resume + b"\r\n"


class PushsvcForm(Form):
    name = "pushsvc"

    def path(self, topics: Sequence[str]) -> str:
        return "/events?" + urlencode([("topic", topic) for topic in topics])

    def publish(self, host: str, topics: Sequence[str], data: str, event: Event) -> bytes:
        body = {"topics": topics, "data": data, "keep": event.keep}
        body |= {"key": f"key-{event.key}"} if event.key else {}
        body |= {"event": f"kind-{event.kind}"} if event.kind else {}
        return post("/publish", json.dumps(body).encode(), JSON, self._authorization, host)


class MercureForm(Form):
    name = "mercure"

    def path(self, topics: Sequence[str]) -> str:
        return "/.well-known/mercure?" + urlencode([("topic", topic) for topic in topics])

    def publish(self, host: str, topics: Sequence[str], data: str, event: Event) -> bytes:
        fields = [*(("topic", topic) for topic in topics), ("data", data)]
        fields += [("type", f"kind-{event.kind}")] if event.kind else []
        return post("/.well-known/mercure", urlencode(fields).encode(), FORM, self._authorization, host)


class NchanForm(Form):
    """With locations as `Nchan.conf` of the bench has them, and a comma between the channels of one stream."""

    name = "nchan"

    def path(self, topics: Sequence[str]) -> str:
        return f"/events?topic={quote(','.join(topics), safe=',')}"

    def publish(self, host: str, topics: Sequence[str], data: str, event: Event) -> bytes:
        kind = f"X-EventSource-Event: kind-{event.kind}\r\n" if event.kind else ""
        return post(f"/publish?topic={quote(','.join(topics), safe=',')}", data.encode(), TEXT, kind, host)


class NchanWithHistory(Nchan):
    """The bench's, but with a history, several channels in one stream, and so many workers."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._workers = workers

    def command(self, folder: Path) -> list[str]:
        command = super().command(folder)
        path = folder / "nginx.conf"
        text = path.read_text()
        for old, new in {"worker_processes 1;": f"worker_processes {self._workers};",
                         "nchan_message_buffer_length 10;": f"nchan_message_buffer_length {HISTORY_EVENTS};",
                         "nchan_message_timeout 10s;": "nchan_message_timeout 1h;",
                         "nchan_channel_id $arg_topic;":
                             'nchan_channel_id $arg_topic; nchan_channel_id_split_delimiter ",";'}.items():
            assert old in text, f"nchan.conf has {old}"
            text = text.replace(old, new)
        path.write_text(text)
        return command


class MercureWithHistory(Mercure):
    """The bench's, but with its log on disk."""

    def command(self, folder: Path) -> list[str]:
        url = f"bolt://{folder / 'mercure.db'}?size={HISTORY_EVENTS * 10}&cleanup_frequency=0.1"
        return [url if each == "local://local" else each for each in super().command(folder)]


FORMS: dict[str, type[Form]] = {form.name: form for form in (PushsvcForm, NchanForm, MercureForm)}


def server_of(name: str, workers: int, settings: dict[str, str]) -> Server:
    """A server of this machine, not yet started. Raises BuildError when it starts, if it cannot be had."""
    if name == "pushsvc":
        return Pushsvc(workers=workers, settings=settings)
    return NchanWithHistory(workers) if name == "nchan" else MercureWithHistory()


def token_of(server: Server) -> str:
    """What the server asks of a publisher; "" for nothing."""
    if isinstance(server, Mercure):
        import jwt

        return jwt.encode({"mercure": {"publish": ["*"]}}, server.key)
    return ""


def processes_of(server: Server) -> list[int]:
    """The processes of a server that runs, once all its workers are there. Raises ServerError."""
    if isinstance(server, Pushsvc):
        server.wait_for_workers(WORKERS_SECONDS)
    return server.pids()


def workers_of(server: Server, pids: Sequence[int]) -> int:
    """How many of its processes serve clients: pushsvc and nchan have a master besides."""
    return len(pids) - (not isinstance(server, Mercure))


def address_of(url: str) -> tuple[str, int]:
    """Host and port. Raises ValueError if it is no http URL."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is not http://HOST:PORT")
    return parts.hostname, parts.port or 80
