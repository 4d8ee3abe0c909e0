"""Real nginx and HAProxy, with the configurations that the project ships, in front of the real service."""

import contextlib
import gzip
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.support import certificates, client
from tests.support.certificates import Certificate
from tests.support.client import Stream
from tests.support.programs import program
from tests.support.server import Server, free_port
from tests.support.wait import eventually

OPS = Path(__file__).parents[1] / "ops"
KEY = "a key of the tests that has more than 32 bytes"
HEARTBEAT = 0.5  # seconds; the proxies must pass every one
AT_ONCE = 0.1  # seconds; HAProxy without http-no-delay takes 0.2, a proxy that buffers for ever
STOP_TIMEOUT = 10


def token(**pushsvc: list[str]) -> str:
    claims = {"sub": "ann", "exp": int(time.time()) + 3600, "pushsvc": pushsvc}
    return jwt.encode(claims, KEY, "HS256")


TOKEN = token(subscribe=["*"], publish=["*"])
BEARER = {"Authorization": f"Bearer {TOKEN}"}


# --- The proxies -----------------------------------------------------------------------------------------


class Proxy:
    """One proxy before the service at `upstream`, on ports of 127.0.0.1: `https` and `http`.

    Its configuration is the shipped one but for what `changes` names: ports, addresses, paths. Each of them must
    occur, so that a test never passes on a configuration that has moved on.
    """

    name = ""
    shipped = Path()

    def __init__(self, directory: Path, upstream: int, certificate: Certificate) -> None:
        self.directory = directory
        self.upstream = upstream
        self.certificate = certificate
        self.https, self.http = free_port(), free_port()
        self.log_path = directory / "proxy.log"
        self.config = directory / self.shipped.name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.https}"

    def changes(self) -> dict[str, str]:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def write_config(self) -> None:
        text = self.shipped.read_text()
        for old, new in sorted(self.changes().items(), key=lambda change: -len(change[0])):  # none hides in another
            assert old in self.shipped.read_text(), f"{self.shipped} has no {old!r}"
            text = text.replace(old, new)
        self.config.write_text(text)

    def __enter__(self) -> "Proxy":
        self.write_config()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True)
        try:
            eventually(self._listens, message=f"{self.name} does not listen")
        except AssertionError:
            self.__exit__()
            raise AssertionError(f"{self.name} does not listen:\n{self.log()[-4000:]}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        with socket.create_connection(("127.0.0.1", self.https), 1):
            return True


class Nginx(Proxy):
    name = "nginx"
    shipped = OPS / "nginx" / "pushsvc.conf"

    def changes(self) -> dict[str, str]:
        return {
            "listen [::]:80;": "", "listen [::]:443 ssl http2;": "",  # a machine of the tests may have no IPv6
            "listen 80;": f"listen 127.0.0.1:{self.http};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.https} ssl http2;",
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{self.upstream};",
            "/etc/ssl/certs/push.example.com.pem": str(self.certificate.certificate),
            "/etc/ssl/private/push.example.com.key": str(self.certificate.key),
            "/var/log/nginx/pushsvc.log": str(self.directory / "access.log"),
        }

    def command(self) -> list[str]:
        for name in ("client", "proxy", "fastcgi", "uwsgi", "scgi"):
            (self.directory / name).mkdir()
        paths = "".join(f"{name}{'_body' if name == 'client' else ''}_temp_path {self.directory / name};\n"
                        for name in ("client", "proxy", "fastcgi", "uwsgi", "scgi"))
        main = self.directory / "nginx.conf"
        user = "user root;\n" if os.geteuid() == 0 else ""  # the temporary directory is its owner's only
        # gzip for everything, as some distributions have it: the shipped part must switch it off itself
        main.write_text(f"{user}daemon off;\nworker_processes 1;\npid {self.directory / 'nginx.pid'};\n"
                        f"error_log {self.directory / 'error.log'};\nevents {{ worker_connections 256; }}\n"
                        f"http {{\ngzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;\n"
                        f"{paths}include {self.config};\n}}\n")
        return [program("nginx"), "-c", str(main), "-e", str(self.directory / "error.log"), "-p", str(self.directory)]

    def log(self) -> str:
        names = ("proxy.log", "error.log", "access.log")
        return "".join((self.directory / name).read_text(errors="replace")
                       for name in names if (self.directory / name).exists())


class Haproxy(Proxy):
    name = "haproxy"
    shipped = OPS / "haproxy" / "haproxy.cfg"

    def changes(self) -> dict[str, str]:
        changes = {
            "bind :::443 v4v6": f"bind 127.0.0.1:{self.https}",
            "bind :::80 v4v6": f"bind 127.0.0.1:{self.http}",
            "server local 127.0.0.1:8000": f"server local 127.0.0.1:{self.upstream}",
            "/etc/haproxy/certs/push.example.com.pem": str(self.certificate.both),
            "chroot /var/lib/haproxy": "",
        }
        if os.geteuid() != 0:
            changes |= {"user haproxy": "", "group haproxy": ""}  # it cannot change its user, and need not
        return changes

    def command(self) -> list[str]:
        return [program("haproxy"), "-db", "-f", str(self.config)]

    def __enter__(self) -> "Proxy":
        super().__enter__()
        # Its server counts as up from the start; wait for what the first check says.
        eventually(lambda: exchange(self, "GET", "/readyz")[0] == 200, message="the service behind haproxy")
        return self


class PlainHaproxy(Haproxy):
    """The same without TLS, as behind something that ends it."""

    def changes(self) -> dict[str, str]:
        return super().changes() | {
            " ssl crt /etc/haproxy/certs/push.example.com.pem alpn h2,http/1.1": "",
            "/etc/haproxy/certs/push.example.com.pem": "",
            "http-request redirect scheme https code 308 unless { ssl_fc }": "",
        }

    def __enter__(self) -> "Proxy":
        return Proxy.__enter__(self)


PROXIES = [Nginx, Haproxy]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificates.certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One service for the tests that leave it as it was."""
    with service(tmp_path_factory.mktemp("server")) as server:
        yield server


def service(directory: Path) -> Server:
    env = {"PUSHSVC_JWT_KEY": KEY, "PUSHSVC_HEARTBEAT_SECONDS": str(HEARTBEAT), "PUSHSVC_LOG_LEVEL": "debug"}
    return Server(directory, workers=2, env=env)


@pytest.fixture(params=PROXIES, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> type[Proxy]:
    program(request.param.name)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def proxy(
    kind: type[Proxy], shared_server: Server, tmp_path: Path, certificate: Certificate, tls: None
) -> Iterator[Proxy]:
    with kind(tmp_path, shared_server.port, certificate) as proxy:
        yield proxy


@pytest.fixture
def tls(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streaming client speaks plain HTTP: with this its connections go through TLS."""
    plain: Callable[..., socket.socket] = client._connect
    context = ssl.create_default_context(cafile=certificate.certificate)

    def connect(host: str, *rest: Any) -> socket.socket:
        return context.wrap_socket(plain(host, *rest), server_hostname=host)

    monkeypatch.setattr(client, "_connect", connect)


def exchange(
    proxy: Proxy, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request through the proxy over TLS: status, headers by lower-case name, body."""
    context = ssl.create_default_context(cafile=proxy.certificate.certificate)
    connection = http.client.HTTPSConnection("127.0.0.1", proxy.https, timeout=20, context=context)
    try:
        connection.request(method, path, body, BEARER | (headers or {}))
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def publish(proxy: Proxy, headers: dict[str, str] | None = None, **fields: object) -> str:
    body = json.dumps(fields).encode()
    status, _, answer = exchange(proxy, "POST", "/publish", body, {"Content-Type": "application/json", **(headers or {})})
    assert status == 200, answer
    return str(json.loads(answer)["id"])


def curl(proxy: Proxy, *args: str) -> str:
    command = [program("curl"), "-sS", "--max-time", "5", "--cacert", str(proxy.certificate.certificate), *args]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert done.returncode in (0, 28), done.stderr.decode()  # 28: the time that a stream was given is up
    return done.stdout.decode()


# --- What a stream is through a proxy --------------------------------------------------------------------


def test_small_event_arrives_at_once_through_the_proxy_while_the_stream_stays_open(proxy: Proxy) -> None:
    with Stream(proxy.url, "room", token=TOKEN, headers={"Accept-Encoding": "gzip, br"}) as stream:
        stream.opened()
        assert stream.headers["content-type"] == "text/event-stream"
        assert "content-encoding" not in stream.headers
        waits = []
        for number in range(10):
            begun = time.monotonic()
            id = publish(proxy, topic="room", data=str(number))
            message = stream.next()
            waits.append(time.monotonic() - begun)
            assert (message.data, message.last_event_id) == (str(number), id)
        assert min(waits) < AT_ONCE, waits
        assert not stream.ended


def test_haproxy_holds_no_event_back_without_tls_either(
    shared_server: Server, tmp_path: Path, certificate: Certificate
) -> None:
    """Only on a plain connection does it ask the kernel to wait for more; its TLS may end before it."""
    program("haproxy")
    with PlainHaproxy(tmp_path, shared_server.port, certificate) as proxy, \
            Stream(f"http://127.0.0.1:{proxy.https}", "plain", token=TOKEN) as stream:
        stream.opened()
        waits = []
        for number in range(5):
            begun = time.monotonic()
            client.publish(shared_server.url, headers=BEARER, topic="plain", data=str(number))
            assert stream.next().data == str(number)
            waits.append(time.monotonic() - begun)
        assert min(waits) < AT_ONCE, waits


def test_heartbeats_pass_the_proxy_and_keep_the_stream(proxy: Proxy) -> None:
    with Stream(proxy.url, "silence", token=TOKEN) as stream:
        stream.opened()
        seen = len(stream.reader.comments)
        eventually(lambda: stream.quiet(HEARTBEAT) or len(stream.reader.comments) >= seen + 3)
        publish(proxy, topic="silence", data="after it")
        assert stream.next().data == "after it"


def test_stream_resumes_through_the_proxy_with_the_last_event_id_header(proxy: Proxy) -> None:
    with Stream(proxy.url, "resumed", token=TOKEN) as stream:
        stream.opened()
        first = publish(proxy, topic="resumed", data="first")
        assert stream.next().last_event_id == first
    missed = [publish(proxy, topic="resumed", data=f"missed {number}") for number in range(3)]

    with Stream(proxy.url, "resumed", last_event_id=first, token=TOKEN) as stream:
        assert [message.last_event_id for message in stream.take(3)] == missed
        stream.quiet(HEARTBEAT)


def test_stream_ends_clean_through_the_proxy_when_the_service_is_told_to_stop(
    kind: type[Proxy], tmp_path: Path, certificate: Certificate, tls: None
) -> None:
    (tmp_path / "proxy").mkdir()
    with service(tmp_path / "server") as server, kind(tmp_path / "proxy", server.port, certificate) as proxy, \
            Stream(proxy.url, "room", token=TOKEN) as stream:
        stream.opened()
        os.kill(server.pid, signal.SIGTERM)

        assert stream.rest(timeout=STOP_TIMEOUT) == []

        assert stream.clean_end
        assert stream.reader.comments[-1].strip() == "drain"
        assert stream.reader.reconnection_time is not None


def test_client_that_hangs_up_leaves_no_stream_in_the_service(
    kind: type[Proxy], tmp_path: Path, certificate: Certificate, tls: None
) -> None:
    (tmp_path / "proxy").mkdir()
    with service(tmp_path / "server") as server, kind(tmp_path / "proxy", server.port, certificate) as proxy:
        streams = [Stream(proxy.url, "room", token=TOKEN).opened() for _ in range(4)]
        for stream in streams:
            stream.close()

        eventually(lambda: server.log().count("reason=gone") == len(streams), message="streams are left")


def test_twenty_streams_of_one_client_share_one_http2_connection(proxy: Proxy) -> None:
    """Over HTTP/1.1 a browser stops at six."""
    urls = [f"{proxy.url}/events?topic=many&last_event_id=earliest&access_token={TOKEN}"] * 20
    id = publish(proxy, topic="many", data="to all")

    version = "http=%{http_version} new=%{num_connects}\n"
    found = curl(proxy, "--http2", "-N", "--parallel", "--parallel-max", "20", "--max-time", "2", "-w", version, *urls)

    assert found.count(f"id: {id}\ndata: to all\n") == 20
    ends = re.findall(r"^http=(\S+) new=(\d+)$", found, re.M)
    assert {ended for ended, _ in ends} == {"2"}
    assert sum(int(connects) for _, connects in ends) == 1


# --- Publishing through a proxy --------------------------------------------------------------------------


def test_publish_over_http2_is_answered_with_its_id_and_once_per_idempotency_key(proxy: Proxy) -> None:
    args = ["--http2", "-H", f"Authorization: Bearer {TOKEN}", "-H", "Idempotency-Key: once", "-d", "topic=keyed",
            "-d", "data=hello", f"{proxy.url}/publish"]

    answers = [json.loads(curl(proxy, *args)) for _ in range(2)]

    assert answers[0] == answers[1]
    with Stream(proxy.url, "keyed", last_event_id="earliest", token=TOKEN) as stream:
        assert [message.data for message in stream.take(1)] == ["hello"]
        stream.quiet(HEARTBEAT)


def test_page_of_the_proxy_may_publish_and_a_foreign_page_may_not(proxy: Proxy) -> None:
    publish(proxy, {"Origin": proxy.url}, topic="page", data="from the console")

    body = json.dumps({"topic": "page", "data": "from elsewhere"}).encode()
    headers = {"Content-Type": "application/json", "Origin": "https://elsewhere.example"}
    assert exchange(proxy, "POST", "/publish", body, headers)[0] == 403


def test_body_up_to_the_bound_passes_and_a_larger_one_gets_the_answer_of_the_service(proxy: Proxy) -> None:
    publish(proxy, topic="large", data="x" * 1_000_000)

    status, headers, body = exchange(proxy, "POST", "/publish", b"x" * 1_100_000, {"Content-Type": "application/json"})

    assert (status, headers["content-type"]) == (413, "application/problem+json"), body[:300]


def test_refusal_passes_the_proxy_with_its_challenge_and_its_problem(proxy: Proxy) -> None:
    refused = {"Authorization": "Bearer no-token", "Accept-Encoding": "gzip"}

    status, headers, body = exchange(proxy, "GET", "/events?topic=room", headers=refused)

    if headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    assert (status, json.loads(body)["status"]) == (401, 401)
    assert headers["www-authenticate"].startswith("Bearer")


# --- What the proxy adds, hides and logs -----------------------------------------------------------------


class Recorder(http.server.BaseHTTPRequestHandler):
    """A service that notes how it was asked."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked.append((self.request_version, headers))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_proxy_tells_the_service_who_asked_and_believes_nobody_else(
    kind: type[Proxy], tmp_path: Path, certificate: Certificate
) -> None:
    recorder = type("Here", (Recorder,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), recorder) as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        try:
            with kind(tmp_path, upstream.server_port, certificate) as proxy:
                claims = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "gopher", "X-Forwarded-Host": "evil.example",
                          "Last-Event-ID": "00000000001-5", "Idempotency-Key": "k", "Cookie": "pushsvc_token=t"}
                exchange(proxy, "GET", "/events?topic=room", headers=claims)
                version, headers = recorder.asked[-1]  # type: ignore[attr-defined]
        finally:
            upstream.shutdown()

    host = f"127.0.0.1:{proxy.https}"
    assert version == "HTTP/1.1"
    assert headers.get("connection", "keep-alive") == "keep-alive"
    sent = {name: headers.get(name) for name in ("host", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host",
                                                 "last-event-id", "idempotency-key", "cookie", "authorization")}
    assert sent == {"host": host, "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "https", "x-forwarded-host": host,
                    "last-event-id": "00000000001-5", "idempotency-key": "k", "cookie": "pushsvc_token=t",
                    "authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/nothing"])
def test_what_is_not_for_the_public_stays_inside(proxy: Proxy, path: str) -> None:
    assert exchange(proxy, "GET", path)[0] == 404


def test_console_and_readiness_are_served(proxy: Proxy) -> None:
    assert exchange(proxy, "GET", "/")[0] == 200
    assert exchange(proxy, "GET", "/readyz")[0] == 200


def test_plain_http_is_sent_to_https(proxy: Proxy) -> None:
    response = client.http.client.HTTPConnection("127.0.0.1", proxy.http, timeout=10)
    response.request("GET", "/events?topic=room")
    answer = response.getresponse()

    assert answer.status == 308
    assert str(answer.getheader("Location")).startswith("https://127.0.0.1")
    response.close()


def test_access_token_of_the_query_is_in_no_log_of_the_proxy(proxy: Proxy) -> None:
    exchange(proxy, "GET", f"/events?topic=&access_token={TOKEN}")
    with Stream(f"{proxy.url}", "room", path="/events", token=TOKEN) as stream:
        stream.opened()

    eventually(lambda: "/events" in proxy.log(), message="the access log is written")

    assert "/events" in proxy.log()
    assert TOKEN[-20:] not in proxy.log()


# --- The unit --------------------------------------------------------------------------------------------


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    text = (OPS / "systemd" / "pushsvc.service").read_text()
    program_path = re.search(r"^ExecStart=(\S+)", text, re.M)
    assert program_path is not None
    unit = tmp_path / "pushsvc.service"
    unit.write_text(text.replace(program_path[1], "/bin/true").replace("/opt/pushsvc", "/"))

    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)

    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "pushsvc.service" in line]
    assert complaints == []


def test_unit_waits_longer_than_the_service_takes_to_stop() -> None:
    from pushsvc.settings import Settings

    text = (OPS / "systemd" / "pushsvc.service").read_text()
    waits = re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert waits is not None
    assert int(waits[1]) > Settings().graceful_seconds + 5


@pytest.mark.parametrize(
    ("shipped", "names"),
    [(Nginx.shipped, ["proxy_read_timeout"]), (Haproxy.shipped, ["timeout client", "timeout server"])],
)
def test_proxy_waits_for_a_stream_much_longer_than_a_heartbeat_takes(shipped: Path, names: list[str]) -> None:
    from pushsvc.settings import Settings

    for name in names:
        waits = re.search(rf"^\s*{name} (\d+)m;?(\s|$)", shipped.read_text(), re.M)
        assert waits is not None, f"{shipped} has no {name} in minutes"
        assert int(waits[1]) * 60 >= 4 * Settings().heartbeat_seconds
