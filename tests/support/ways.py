"""The ways to the service: over a socket to a server, or in this process by Flask's test client."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gevent
from flask import Flask
from gevent.queue import Empty, Queue
from werkzeug.datastructures import Headers as Fields
from werkzeug.test import TestResponse

from tests.support import client
from tests.support.client import Headers, Response, Stream


class Way:
    """What a client may ask of the service. All methods switch."""

    def request(self, method: str, target: str, body: str | None = None, headers: Headers | None = None) -> Response:
        raise NotImplementedError

    def stream(self, topics: str | Iterable[str], **asked: Any) -> Stream:
        """A stream, with what else `Stream` takes."""
        raise NotImplementedError

    def publish(self, **fields: Any) -> str:
        return client.publish("", ask=self.request, **fields)

    def publish_form(self, pairs: Sequence[tuple[str, str]]) -> str:
        return client.publish_form("", pairs, ask=self.request)

    def publish_lines(self, objects: Iterable[Mapping[str, Any]]) -> list[str]:
        return client.publish_lines("", objects, ask=self.request)


class Served(Way):
    """The service of the server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def request(self, method: str, target: str, body: str | None = None, headers: Headers | None = None) -> Response:
        return client.request(method, self.url + target, body, headers)

    def stream(self, topics: str | Iterable[str], **asked: Any) -> Stream:
        return Stream(self.url, topics, **asked)


class Inside(Way):
    """An application of this process, without a server: its streams are plain generators, and nobody frames them."""

    def __init__(self, app: Flask) -> None:
        self.app = app

    def request(self, method: str, target: str, body: str | None = None, headers: Headers | None = None) -> Response:
        response = _open(self.app, target, method=method, data=body, headers=headers or {})
        return Response(response.status_code, _headers(response), response.get_data())

    def stream(self, topics: str | Iterable[str], **asked: Any) -> Stream:
        return InsideStream(self.app, topics, **asked)


class InsideStream(Stream):
    """A stream of Flask's test client, read on by a greenlet as a server would. To close it is to cut it."""

    def __init__(self, app: Flask, topics: str | Iterable[str], **asked: Any) -> None:
        self._app = app
        self._parts: Queue[bytes] = Queue()
        self._pulling: gevent.Greenlet | None = None
        super().__init__("http://localhost", topics, **asked)

    def close(self) -> None:
        if self._pulling is not None:
            self._pulling.kill()

    def _connect(self, host: str, port: int, timeout: float, receive_buffer: int | None) -> None:
        """There is nothing to connect to."""

    def _ask(self, target: str, version: str, fields: Headers, deadline: float) -> tuple[int, dict[str, str], bytes]:
        response = _open(self._app, target, headers=fields)
        self._pulling = gevent.spawn(self._pull, response)
        return response.status_code, _headers(response), b""

    def _pull(self, response: TestResponse) -> None:
        try:
            for part in response.response:
                self._parts.put(part)
            self._parts.put(b"")
        finally:
            response.close()

    def _next_part(self, timeout: float) -> bytes:
        try:
            return self._parts.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None


def _open(app: Flask, target: str, headers: Headers, **about: Any) -> TestResponse:
    fields = Fields([(name, value.encode().decode("latin-1")) for name, value in headers.items()])  # PEP 3333
    return app.test_client().open(target, headers=fields, **about)


def _headers(response: TestResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}
