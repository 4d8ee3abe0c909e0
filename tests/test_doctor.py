"""The doctor before a real service, behind real proxies that are misconfigured in one thing each, and rightly."""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.support import client
from tests.support.certificates import certificate
from tests.support.programs import program
from tests.support.server import ROOT, Server, free_port
from tests.test_proxies import Haproxy, Nginx, PlainHaproxy, Proxy

KEY = "a key of the tests that has more than 32 bytes"
ORIGIN = "https://app.example"
HEARTBEAT = 2.0  # seconds; longer than the proxies that cut allow, shorter than those that do not
CUT = 1.0  # seconds of silence, where a proxy cuts off soon
SILENCE = 4.5  # seconds to listen; two heartbeats
AT_ONCE = 12  # scenarios
PATIENCE = 60  # seconds for one run
CLEAN, FOUND, USAGE, UNEXAMINED = range(4)


def token() -> str:
    claims = {"sub": "doctor", "exp": int(time.time()) + 3600,
              "pushsvc": {"subscribe": ["doctor-*"], "publish": ["doctor-*"]}}
    return jwt.encode(claims, KEY, "HS256")


@dataclass(frozen=True)
class Run:
    """What the doctor said."""

    code: int
    report: dict[str, Any]
    text: str

    @property
    def checks(self) -> list[str]:
        return [finding["check"] for finding in self.report["findings"]]

    def finding(self, check: str) -> dict[str, Any]:
        found = [finding for finding in self.report["findings"] if finding["check"] == check]
        assert len(found) == 1, self.text
        return found[0]


def doctor(
    *arguments: str, env: Mapping[str, str] | None = None, descriptors: int = 0, json_too: bool = True
) -> Run:
    """Run it as its user does. descriptors: the hard limit of the process, 0 for ours. json_too: ask for the report as
    JSON; else it is empty."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSVC_", "GUNICORN_"))}
    clean.pop("WEB_CONCURRENCY", None)
    command = [sys.executable, str(ROOT / "ops" / "doctor"), *(["--json"] if json_too else []), *arguments]
    limit = [program("prlimit"), f"--nofile={descriptors}:{descriptors}"] if descriptors else []
    done = subprocess.run([*limit, *command], text=True, capture_output=True, timeout=PATIENCE, check=False,
                          env=clean | dict(env or {}))
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout) if json_too and done.stdout else {}
    return Run(done.returncode, report, done.stdout if report else done.stderr + done.stdout)


# --- The path --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A proxy with one thing wrong. edits: what to change in its shipped configuration. check: the one finding that this
    is to cause, "" for none. line: a piece of the line that it is to name. arguments: more of the doctor's."""

    name: str
    kind: type[Proxy]
    check: str
    line: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()
    days: int = 90  # that the certificate holds
    http: bool = False  # ask on the port that leads to the other
    also: tuple[str, ...] = ()  # findings that come with it


LOCATION = "location = /events {"
BACKEND = "\nbackend pushsvc\n"
FRONTEND = "\nfrontend web\n"


def nginx(name: str, check: str, line: str, *edits: tuple[str, str], **more: Any) -> Scenario:
    return Scenario(f"nginx {name}", Nginx, check, line, edits, **more)


def haproxy(
    name: str, check: str, line: str, *edits: tuple[str, str], kind: type[Proxy] = Haproxy, **more: Any
) -> Scenario:
    return Scenario(f"haproxy {name}", kind, check, line, edits, **more)


def into(block: str, directive: str) -> tuple[str, str]:
    return block, f"{block.rstrip(chr(10))}\n    {directive}\n"


def without(directive: str) -> tuple[str, str]:
    return directive, ""


CORS = ("--origin", ORIGIN)
SCENARIOS = [
    nginx("as it is shipped", "", "", arguments=CORS),
    nginx("buffers", "buffering", "proxy_buffering on", ("proxy_buffering off;", "proxy_buffering on; "
          "proxy_ignore_headers X-Accel-Buffering;")),
    nginx("does not heed the service", "buffering", "proxy_ignore_headers", ("proxy_buffering off;",
          "proxy_ignore_headers X-Accel-Buffering;")),
    nginx("compresses by what is above", "compression", LOCATION, without("gzip off;")),
    nginx("compresses", "compression", "gzip on;", ("gzip off;", "gzip on;")),
    nginx("cuts off soon", "idle", "proxy_read_timeout 1;", ("proxy_read_timeout 5m;", "proxy_read_timeout 1;")),
    nginx("cuts off soon in a location within", "idle", "proxy_read_timeout 1;", (LOCATION, "location /events {\n"
          "    location =/events {"), ("send_timeout 1m;", "send_timeout 1m; }"),
          ("proxy_read_timeout 5m;", "proxy_read_timeout 1;")),
    nginx("has no HTTP/2", "http_version", " ssl;", (" ssl http2;", " ssl;")),
    nginx("strips the last id", "last_event_id", "Last-Event-ID", into(LOCATION, 'proxy_set_header Last-Event-ID "";')),
    nginx("adds an origin", "cors", "add_header Access", into(LOCATION, "add_header Access-Control-Allow-Origin *;"),
          arguments=CORS),
    nginx("leads elsewhere", "redirect", "return 308", (
          "https://$host$request_uri", "https://$host:{https}$request_uri"),
          http=True),
    nginx("wants a slash", "redirect", "location /events/", (f"{LOCATION}\n        proxy_pass http://pushsvc;",
          "location /events/ {\n        proxy_pass http://pushsvc/events;")),
    nginx("does not name the stream", "status", "return 404", (LOCATION, "location = /stream {")),
    nginx("has few streams", "http2_streams", "http2_max_concurrent_streams", into(
        "server_name push.example.com;\n\n", "http2_max_concurrent_streams 5;")),
    nginx("changes the type", "content_type", "proxy_hide_header Content-Type",
          into(LOCATION, "proxy_hide_header Content-Type; default_type text/plain;")),
    nginx("answers for the service", "errors", "proxy_intercept_errors on",
          into(LOCATION, "proxy_intercept_errors on; error_page 400 401 403 404 /oops.html;")),
    nginx("reaches nobody", "unreachable", "proxy_pass", ("proxy_pass http://pushsvc;", "proxy_pass http://127.0.0.1:1;")),
    nginx("lets caches keep it", "cache", "expires 1h", into(LOCATION, "expires 1h;")),
    nginx("takes the chunks away", "chunked", "chunked_transfer_encoding off",
          into(LOCATION, "chunked_transfer_encoding off;")),
    nginx("speaks HTTP/1.0 inside", "backend_http", LOCATION, without("proxy_http_version 1.1;")),
    nginx("lends everybody a token", "access", "Authorization", into(LOCATION.replace("events", "publish"),
          'proxy_set_header Authorization "Bearer {token}";')),
    nginx("has a certificate that ends", "tls", "ssl_certificate ", days=5),
    nginx("has a certificate that has ended", "tls", "ssl_certificate ", days=-1),
    nginx("accepts old TLS", "tls_version", "ssl_protocols TLSv1 ", ("ssl_protocols TLSv1.2 TLSv1.3;",
          "ssl_protocols TLSv1 TLSv1.1 TLSv1.2; ssl_ciphers DEFAULT:@SECLEVEL=0;")),
    haproxy("as it is shipped", "", "", arguments=CORS),
    haproxy("buffers", "buffering", "wait-for-body", into(BACKEND, "http-response wait-for-body time 20s")),
    haproxy("compresses", "compression", "compression algo", into(BACKEND, "compression algo gzip")),
    haproxy("cuts off soon", "idle", "timeout server 1s", ("timeout server 5m", "timeout server 1s")),
    haproxy("cuts off soon by other defaults", "idle", "timeout server 1s", (BACKEND, "\ndefaults\n    mode http\n"
            "    option http-no-delay\n    timeout connect 5s\n    timeout client 1m\n"
            f"    timeout server 1s\n{BACKEND}")),
    haproxy("has no HTTP/2", "http_version", "ssl crt", without(" alpn h2,http/1.1")),
    haproxy("strips the last id", "last_event_id", "del-header Last-Event-ID",
            into(FRONTEND, "http-request del-header Last-Event-ID")),
    haproxy("adds an origin", "cors", "Access-Control",
            into(BACKEND, "http-response add-header Access-Control-Allow-Origin *"), arguments=CORS),
    haproxy("leads elsewhere", "redirect", "redirect prefix", (
        "redirect scheme https", "redirect prefix https://127.0.0.1:{https}"), http=True),
    haproxy("reaches nobody", "unreachable", "server local", (
        "server local 127.0.0.1:{upstream}", "server local 127.0.0.1:1")),
    haproxy("does not name the stream", "status", "http-request return", ("path / /events", "path /")),
    haproxy("has few streams", "http2_streams", "tune.h2", into("\nglobal\n", "tune.h2.max-concurrent-streams 5")),
    haproxy("without TLS waits for more", "delay", "defaults", without("option http-no-delay"), kind=PlainHaproxy,
            also=("http_version",)),
    haproxy("changes the type", "content_type", "set-header Content-Type",
            into(BACKEND, "http-response set-header Content-Type text/plain")),
    haproxy("answers for the service", "errors", "http-response return", into(
        BACKEND, "http-response return status 400 content-type text/html string oops if { status 400 }")),
    haproxy("lets caches keep it", "cache", "Cache-Control",
            into(BACKEND, "http-response set-header Cache-Control max-age=3600")),
    haproxy("keeps a header back", "accel", "del-header X-Accel",
            into(BACKEND, "http-response del-header X-Accel-Buffering")),
    haproxy("has a certificate that ends", "tls", "ssl crt", days=5),
    haproxy("accepts old TLS", "tls_version", "ssl-min-ver TLSv1.0", (
        "ssl-min-ver TLSv1.2", "ssl-min-ver TLSv1.0\n    ssl-default-bind-ciphers DEFAULT:@SECLEVEL=0")),
]


def edited(kind: type[Proxy], edits: Sequence[tuple[str, str]]) -> type[Proxy]:
    """The proxy with its configuration changed further: each piece must occur in it."""

    class Edited(kind):  # type: ignore[misc, valid-type]
        def write_config(self) -> None:
            super().write_config()
            text = self.config.read_text()
            for old, new in edits:
                old, new = self.placed(old), self.placed(new)
                assert old in text, f"{self.shipped} has no {old!r}"
                text = text.replace(old, new)
            self.config.write_text(text)

        def placed(self, text: str) -> str:
            placed = {"{https}": str(self.https), "{upstream}": str(self.upstream), "{token}": token()}
            for name, value in placed.items():
                text = text.replace(name, value)
            return text

        def __enter__(self) -> Proxy:
            return Proxy.__enter__(self)  # ready or not: one of them reaches nobody

    return Edited


@dataclass(frozen=True)
class Examined:
    run: Run
    config: Path

    def line(self, piece: str) -> int:
        lines = self.config.read_text().splitlines()
        return next(number for number, line in enumerate(lines, 1) if piece in line.partition("#")[0])


def examine(scenario: Scenario, server: Server, directory: Path) -> Examined:
    directory.mkdir()
    made = certificate(directory, scenario.days)
    with edited(scenario.kind, scenario.edits)(directory, server.port, made) as proxy:
        url = (f"http://127.0.0.1:{proxy.http}" if scenario.http else
               f"http://127.0.0.1:{proxy.https}" if scenario.kind is PlainHaproxy else proxy.url)
        run = doctor("--only", "path", "--url", url, "--token", token(), "--direct", server.url,
                     "--seconds", str(SILENCE if scenario.check in ("", "idle") else 1),
                     "--cacert", str(made.certificate), "--proxy-config", str(proxy.config), *scenario.arguments)
        return Examined(run, proxy.config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"PUSHSVC_JWT_KEY": KEY, "PUSHSVC_HEARTBEAT_SECONDS": str(HEARTBEAT), "PUSHSVC_CORS_ORIGINS": ORIGIN}
    with Server(tmp_path_factory.mktemp("server"), workers=1, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def examined(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Scenario], Examined]]:
    """Each scenario that a test of this run asks for; several are under way at once, for they mostly wait. One whose
    proxy is missing tells its test so."""
    asked = [item.callspec.params["scenario"] for item in request.session.items
             if getattr(item, "callspec", None) and "scenario" in item.callspec.params]
    directory = tmp_path_factory.mktemp("scenarios")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs: dict[str, Future[Examined]] = {
            each.name: pool.submit(examine, each, server, directory / each.name.replace(" ", "-").replace("/", ""))
            for each in asked}
        yield lambda scenario: runs[scenario.name].result(PATIENCE)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_doctor_finds_exactly_what_is_wrong_and_names_its_line(
    scenario: Scenario, examined: Callable[[Scenario], Examined]
) -> None:
    found = examined(scenario)

    assert sorted(found.run.checks) == sorted(filter(None, (scenario.check, *scenario.also))), found.run.text
    assert found.run.code == (FOUND if scenario.check else CLEAN)
    if not scenario.check:
        assert found.run.report["notes"] == [], "and all was examined"
    if scenario.check:
        finding = found.run.finding(scenario.check)
        assert (finding["file"], finding["line"]) == (str(found.config), found.line(scenario.line)), found.run.text
        assert all(finding[name] for name in ("seen", "breaks", "change"))
    if scenario.check == "idle":
        seen = re.match(r"the stream was cut after ([\d.]+) s of silence; ", finding["seen"])
        assert seen, finding["seen"]
        assert CUT / 2 < float(seen[1]) < SILENCE, "the proxy cuts after a second"


def test_page_says_which_checks_are_shown_on_one_proxy_only() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## The path")[2], re.M)
    on_nginx, on_haproxy = ({check for each in SCENARIOS if issubclass(each.kind, kinds)
                             for check in (each.check, *each.also)} for kinds in (Nginx, (Haproxy, PlainHaproxy)))
    named = [set(re.findall(r"`(\w+)`", part)) for part in re.split(
        r"are shown on nginx only|on HAProxy only|on neither", page.partition("Of these, ")[2])[:3]]
    checks = {check for row in rows for check in re.findall(r"`(\w+)`", row)}
    assert named == [on_nginx - on_haproxy, on_haproxy - on_nginx, checks - on_nginx - on_haproxy]


# --- Any server of event streams -------------------------------------------------------------------------


class Beats(http.server.BaseHTTPRequestHandler):
    """A stream that nobody wrote for us: no publishing, no ids. It beats, and ends after a time, whatever came."""

    protocol_version = "HTTP/1.1"
    beat, beats = 0.4, 3
    kind = "text/event-stream; charset=utf-8"
    more: Mapping[str, str] = {}

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        for name, value in self.more.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(self.beats):
                time.sleep(self.beat)
                self.wfile.write(b"3\r\n:\r\n\r\n")
            time.sleep(self.beat / 4)
            self.wfile.flush()
        self.close_connection = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(405)

    def log_message(self, format: str, *args: object) -> None:
        pass


def look_at(handler: type[Beats], *arguments: str, seconds: str = "3", path: str = "/any/stream") -> Run:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{upstream.server_port}{path}"
            return doctor("--only", "path", "--url", url, "--seconds", seconds, *arguments)
        finally:
            upstream.shutdown()


def test_path_of_another_server_is_examined_as_far_as_it_can_be() -> None:
    run = look_at(Beats)

    assert run.checks == ["http_version", "lifetime"], run.text
    seen = re.match(r"the stream was cut after ([\d.]+) s, .* survived ([\d.]+) s of it", run.finding("lifetime")["seen"])
    assert seen, run.text
    assert Beats.beat * Beats.beats - 0.1 < float(seen[1]) < 3, "it ends soon after its last beat"
    assert Beats.beat / 2 < float(seen[2]) < float(seen[1])
    assert [note.partition(":")[0] for note in run.report["notes"]] == ["whether events arrive at once and resume"]


def test_silence_of_what_is_no_stream_is_not_judged() -> None:
    class Page(Beats):
        kind, beat = "text/html", 0.1

    run = look_at(Page)

    assert run.checks == ["http_version", "content_type"], run.text
    assert run.report["notes"] == ["events, resuming and silence: the answer is no event stream"]


def test_end_of_the_service_is_not_taken_for_a_cut() -> None:
    class Dies(Beats):
        beats = 0
        ended = False

        def do_GET(self) -> None:
            if "silence" not in self.path or not Dies.ended:
                Dies.ended = Dies.ended or "silence" in self.path
                return super().do_GET()
            return self.send_error(503)

    run = look_at(Dies, seconds="1")

    assert run.checks == ["http_version"], run.text
    assert "nothing opens another since" in run.report["notes"][-1]


@pytest.mark.parametrize(("more", "seen", "breaks"), [
    ({}, "the preflight (501) allows no origin", "those pages of https://app.example only that send headers themselves"),
    ({"Access-Control-Allow-Credentials": "true"}, "the stream (200) allows *", "from pages of https://app.example"),
], ids=["anybody", "anybody with cookies"])
def test_origin_may_be_any_unless_cookies_count(more: dict[str, str], seen: str, breaks: str) -> None:
    shares = type("Shares", (Beats,), {"more": {"Access-Control-Allow-Origin": "*"} | more})

    found = look_at(shares, *CORS, seconds="0.1").finding("cors")

    assert found["seen"].startswith(seen)
    assert breaks in found["breaks"]


def test_topic_of_our_own_is_named_beside_a_token_in_the_query() -> None:
    asked: list[str] = []

    class Listed(Beats):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    look_at(Listed, seconds="0.1", path="/?access_token=T")

    assert re.fullmatch(r"/events\?access_token=T&topic=doctor-[0-9a-f]{12}", asked[0])


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("open"), workers=1, env={"PUSHSVC_HEARTBEAT_SECONDS": "0.3"}) as server:
        yield server


def test_publish_that_needs_no_token_is_found(open_server: Server) -> None:
    run = doctor("--only", "path", "--url", open_server.url, "--seconds", "1")

    assert run.checks == ["http_version", "access"], run.text
    assert run.report["notes"] == []


def test_report_for_people_names_what_was_seen_what_breaks_and_what_to_change(open_server: Server) -> None:
    run = doctor("--only", "path", "--url", open_server.url, "--seconds", "1", json_too=False)

    assert run.code == FOUND
    finding = r"^1\. http_version: .+^   breaks +.+six\s+connections.+^   change +nginx: `listen"
    assert re.search(finding, run.text, re.M | re.S), run.text
    assert run.text.splitlines()[-1] == "2 findings"


def test_refused_token_is_no_finding_but_leaves_the_path_unexamined(server: Server) -> None:
    run = doctor("--only", "path", "--url", server.url, "--token", "none", "--seconds", "1")

    assert run.code == UNEXAMINED, run.text
    assert "401" in run.report["failed"][0]


def test_address_that_nobody_listens_on_is_unexamined() -> None:
    run = doctor("--only", "path", "--url", f"http://127.0.0.1:{free_port()}")

    assert (run.code, run.checks) == (UNEXAMINED, []), run.text


def test_progress_is_a_bar_on_a_terminal_and_goes_with_the_report(open_server: Server) -> None:
    terminal, end = os.openpty()
    command = [sys.executable, str(ROOT / "ops" / "doctor"), "--only", "path", "--url", open_server.url, "--seconds", "1"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, timeout=PATIENCE, check=False,
                              env=os.environ | {"TERM": "xterm"})
        told = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(end)
        os.close(terminal)

    assert done.returncode == FOUND
    lines = told.split("\r\x1b[K")
    assert re.fullmatch(r"\[#+\.*\] +\d+ %  listening to silence, \d s more", lines[-2]), told
    assert lines[-1] == "", "the line is taken away"
    assert "\n" not in told


def test_doctor_that_is_broken_off_ends_at_once(open_server: Server) -> None:
    arguments = ["--only", "path", "--url", open_server.url, "--seconds", "90"]
    command = [sys.executable, str(ROOT / "ops" / "doctor"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            assert "listening" in running.stderr.readline()
            running.send_signal(signal.SIGINT)
            assert (running.wait(PATIENCE), running.stderr.read()) == (130, "")
        finally:
            running.kill()


@pytest.mark.parametrize("arguments", [
    ("--only", "path"), ("--url", "push.example.com"), ("--config", "/nonexistent"), ("--seconds", "0"), ("--unknown",),
    ("--seconds", "nan"), ("--seconds", "inf"), ("--seconds", "-3"), ("--seconds", "1e300"), ("--streams", "0"),
    ("--url", "https://push.example.com", "--proxy-config", __file__),
], ids=" ".join)
def test_wrong_usage_has_an_exit_code_of_its_own(arguments: tuple[str, ...]) -> None:
    run = doctor(*arguments)

    assert run.code == USAGE, run.text
    assert "error: " in run.text


# --- The process -----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the configuration that the project ships, to be changed."""
    for name in ("pushsvc", "app.py", "wsgi.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "gunicorn.conf.py").write_text((ROOT / "gunicorn.conf.py").read_text())
    return tmp_path


def process(place: Path, *arguments: str, env: Mapping[str, str] | None = None, descriptors: int = 0) -> Run:
    """The doctor's look at a service that is rightly set up, but for what is given."""
    backlog = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    right = {"WEB_CONCURRENCY": "2", "PUSHSVC_HISTORY_BYTES": "1048576", "PUSHSVC_BACKLOG": backlog}
    return doctor("--only", "process", "--config", str(place / "gunicorn.conf.py"), "--streams", "100", *arguments,
                  env=right | dict(env or {}), descriptors=descriptors)


def line_of(file: Path, piece: str) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if piece in line)


def test_process_that_is_rightly_set_up_has_no_findings_and_nothing_is_left_behind(place: Path) -> None:
    before = sorted(place.iterdir())

    run = process(place)

    assert (run.code, run.checks) == (CLEAN, [] if find_spec("gunicorn_h1c") else ["parser"]), run.text
    assert run.report["notes"] == run.report["failed"] == []
    assert sorted(place.iterdir()) == before


CONFIGURED = [
    {"worker_class": 'worker_class = "sync"', "reuse_port": "reuse_port = False", "graceful": "graceful_timeout = 5",
     "max_requests": "max_requests = 1000", "backlog": "backlog = 1 << 24",
     "monkey_patch": "from gevent import monkey; monkey.patch_all()"},
    {"worker_class": 'worker_class = "gevent"',
     "monkey_patch": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"},
]


@pytest.mark.parametrize("lines", CONFIGURED, ids=["many", "threads"])
def test_settings_of_gunicorn_that_break_streams_are_found_with_their_lines(place: Path, lines: dict[str, str]) -> None:
    config = place / "gunicorn.conf.py"
    text = config.read_text()
    for line in lines.values():
        text, replaced = re.subn(rf"^{line.partition(' ')[0]} = .*$", line, text, count=1, flags=re.M)
        text += "" if replaced else f"\n\n{line}\n"
    config.write_text(text)

    run = process(place)

    assert sorted({*run.checks} - {"parser"}) == sorted(lines), run.text
    kernel = "/etc/sysctl.d/60-pushsvc.conf", 0
    assert {check: (run.finding(check)["file"], run.finding(check)["line"]) for check in lines} == {
        check: kernel if check == "backlog" else (str(config), line_of(config, line)) for check, line in lines.items()}


def test_argument_of_gunicorn_in_the_environment_is_found_too(place: Path) -> None:
    found = process(place, env={"GUNICORN_CMD_ARGS": "--max-requests 9"}).finding("max_requests")

    assert found["file"] == "environment: GUNICORN_CMD_ARGS"


@pytest.mark.parametrize(("variable", "value", "piece"), [
    ("PUSHSVC_HEARTBEATS", "5", "no setting"),
    ("PUSHSVC_BIND", "0.0.0.0:8000", "loopback"),
    ("PUSHSVC_BROKER_URL", "memory:", "one worker"),
    ("GUNICORN_CMD_ARGS", "--preload", "preload"),
    ("GUNICORN_CMD_ARGS", "--workers 0", "at least 1 worker"),
])
def test_service_that_would_not_start_is_found_in_its_own_words(
    place: Path, variable: str, value: str, piece: str
) -> None:
    found = process(place, env={variable: value}).finding("start")

    assert piece in found["seen"]


NAMED = {
    "an unknown variable": ("PUSHSVC_HEARTBEAT=5", "PUSHSVC_HEARTBEAT "),
    "a wrong value": ("PUSHSVC_RETRY_MS = '3s'", "PUSHSVC_RETRY_MS is"),
    "the last of two": ("PUSHSVC_SYNC=never", "PUSHSVC_SYNC is"),
    "the second that is named": ("PUSHSVC_GRACEFUL_SECONDS=2", "PUSHSVC_GRACEFUL_SECONDS"),
    "a number of workers": ("WEB_CONCURRENCY=many", "WEB_CONCURRENCY is"),
}


@pytest.mark.parametrize(("line", "said"), NAMED.values(), ids=NAMED)
def test_variable_that_stops_the_start_is_found_where_it_stands(place: Path, line: str, said: str) -> None:
    env = place / "pushsvc.env"
    env.write_text(f"# PUSHSVC_SYNC=full\nPUSHSVC_SYNC=full\n{line}\nPUSHSVC_HEARTBEAT_SECONDS=5\n")

    found = process(place, "--env", str(env)).finding("start")

    assert said in found["seen"]
    assert (found["file"], found["line"]) == (str(env), 3)


def test_variable_of_the_unit_or_the_shell_that_stops_the_start_is_found_there(place: Path) -> None:
    unit, env = place / "pushsvc.service", place / "pushsvc.env"
    unit.write_text('[Service]\nEnvironment=A=1 "PUSHSVC_BACKLOG=0"\n')
    env.write_text("PUSHSVC_SYNC=full\n")
    files = ("--unit", str(unit), "--env", str(env))
    right = {"PUSHSVC_BACKLOG": "1"}  # which the unit puts out

    found = process(place, *files, env=right).finding("start")
    assert (found["file"], found["line"]) == (str(unit), 2)

    found = process(place, *files, env=right | {"PUSHSVC_BACKLOGS": "1"}).finding("start")
    assert (found["file"], found["line"]) == ("environment: PUSHSVC_BACKLOGS", 0)


def test_streams_that_have_no_descriptors_are_found_and_what_would_do_fits(place: Path) -> None:
    found = process(place, "--streams", "5000", descriptors=2000).finding("descriptors")
    enough = re.search(r"LimitNOFILE=(\d+)", found["change"])
    assert enough is not None

    assert "descriptors" not in process(place, "--streams", "5000", descriptors=int(enough[1])).checks
    assert "descriptors" in process(place, "--streams", "5000", descriptors=int(enough[1]) - 1).checks


def test_descriptors_for_the_even_share_of_a_worker_are_not_enough(place: Path) -> None:
    even, uneven = 5000 // 2 + 1000 + 64, 2675 + 1000 + 64

    found = process(place, "--streams", "5000", descriptors=even).finding("descriptors")

    assert "fullest gets 2675" in found["seen"]
    assert f"LimitNOFILE={uneven}; or WEB_CONCURRENCY=3" in found["change"]


@pytest.mark.parametrize("workers", ["0", "-2", "1000000", "many"])
def test_number_of_workers_that_cannot_be_meant_is_found(workers: str, place: Path) -> None:
    found = process(place, env={"WEB_CONCURRENCY": workers}).finding("start")

    assert f"WEB_CONCURRENCY is a whole number of at least 1 and at most 1024, not '{workers}'" in found["seen"]


@pytest.mark.parametrize(("span", "found"), [("20", True), ("20s", True), ("0min 20 s", True), ("45s", False),
                                             ("1min", False), ("infinity", False), ("0", False),
                                             ("45\nTimeoutSec=10", True), ("10\nTimeoutSec=45", False)])
def test_stop_of_the_unit_that_is_too_short_is_found_however_it_is_written(span: str, found: bool, place: Path) -> None:
    unit = place / "pushsvc.service"
    text = (ROOT / "ops" / "systemd" / "pushsvc.service").read_text()
    text = text.replace("TimeoutStopSec=45", f"TimeoutStopSec={span}").replace("sqlite:/var/lib", f"sqlite:{place}")
    unit.write_text(text)
    assert ("graceful" in process(place, "--unit", str(unit)).checks) is found


@pytest.mark.parametrize(("graceful", "found"), [("85", False), ("86", True)])
def test_stop_of_a_unit_that_says_nothing_is_systemds_own(graceful: str, found: bool, place: Path) -> None:
    unit = place / "pushsvc.service"
    unit.write_text(f"[Service]\nEnvironment=PUSHSVC_GRACEFUL_SECONDS={graceful}\n")

    run = process(place, "--unit", str(unit))

    assert [each["seen"] for each in run.report["findings"] if each["check"] == "graceful"] == found * [
        "the default of TimeoutStopSec is 90 s, graceful_timeout 86 s"]


def test_limits_and_environment_of_the_unit_count_instead_of_those_of_the_shell(place: Path) -> None:
    unit = place / "pushsvc.service"
    env = place / "pushsvc.env"
    env.write_text("\nPUSHSVC_AUTH=none\nPUSHSVC_BIND=0.0.0.0:8000\n")
    text = (ROOT / "ops" / "systemd" / "pushsvc.service").read_text()
    for old, new in (("LimitNOFILE=1048576", "LimitNOFILE=2000"), ("TimeoutStopSec=45", "TimeoutStopSec=20"),
                     ("/etc/pushsvc/pushsvc.env", str(env)), ("sqlite:/var/lib", f"sqlite:{place}")):
        assert old in text
        text = text.replace(old, new)
    unit.write_text(text)

    run = process(place, "--streams", "5000", "--unit", str(unit))

    assert run.finding("descriptors")["line"] == line_of(unit, "LimitNOFILE=")
    assert run.finding("graceful")["line"] == line_of(unit, "TimeoutStopSec=")
    assert (run.finding("access")["file"], run.finding("access")["line"]) == (str(env), 2)
    assert str(place / "pushsvc" / "pushsvc.db") in run.report["facts"]["process"]


def test_unit_that_is_installed_is_taken_unless_another_environment_is_named(place: Path) -> None:
    unit, env = place / "pushsvc.service", place / "b.env"
    unit.write_text(f"[Service]\nEnvironment=PUSHSVC_JWT_KEY={'k' * 32} PUSHSVC_BIND=0.0.0.0:8000\n")
    env.write_text("PUSHSVC_AUTH=none\nPUSHSVC_BIND=0.0.0.0:8000\n")
    script = "import runpy, sys; sys.path.insert(0, 'ops/doctor'); sys.path.insert(0, '.'); import process; " \
        f"process.UNIT = sys.argv.pop(1); sys.argv += ['--only', 'process', '--config', '{place}/gunicorn.conf.py']; " \
        "runpy.run_path('ops/doctor', run_name='__main__')"

    def told(*arguments: object) -> str:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE, check=False)
        return " ".join(done.stdout.split())

    assert f"told by {unit}" in told(unit)
    assert "there is no key" not in told(unit)
    assert re.search(r"told by \S*b\.env .* there is no key", told(unit, "--env", env))
    assert "read from this shell's environment" in told(place / "nowhere")


def test_drop_ins_and_all_files_of_environment_count_as_for_systemd(place: Path) -> None:
    unit, first, second = place / "pushsvc.service", place / "a.env", place / "b.env"
    first.write_text("PUSHSVC_AUTH=none\nPUSHSVC_BIND=127.0.0.1:8000\n")
    second.write_text("# b\nPUSHSVC_BIND='0.0.0.0:8000'\n")
    unit.write_text(f"[Service]\nEnvironmentFile={first}\nEnvironmentFile=-{place}/nowhere.env\nLimitNOFILE=1M\n"
                    "Environment=PUSHSVC_BIND=127.0.0.2:8000\n")
    drop_ins = place / "pushsvc.service.d"
    drop_ins.mkdir()
    (drop_ins / "60-limits.conf").write_text("[Service]\nLimitNOFILE = 2K\n")
    (drop_ins / "10-env.conf").write_text(f"[Service]\nEnvironmentFile={second}\nLimitNOFILE=100\nTimeoutStopSec=20\n")

    run = process(place, "--streams", "5000", "--unit", str(unit))

    found = run.finding("descriptors")
    assert (found["file"], found["line"]) == (str(drop_ins / "60-limits.conf"), 2)
    assert "2048 descriptors (LimitNOFILE)" in found["seen"]
    found = run.finding("graceful")
    assert (found["file"], found["line"]) == (str(drop_ins / "10-env.conf"), 4)
    assert "it listens on ['0.0.0.0', 8000]" in run.finding("access")["seen"]
    assert (run.finding("access")["file"], run.finding("access")["line"]) == (str(first), 1)
    (drop_ins / "70-more.conf").write_text("[Service]\nLimitNOFILE=64K\n")
    assert "descriptors" not in process(place, "--streams", "5000", "--unit", str(unit)).checks


@pytest.mark.parametrize(("option", "content", "said"), [
    ("--unit", b"[Service]\nUser=\xff\n", "it is no UTF-8"),
    ("--unit", b"[Service]\nEnvironment='A=1\n", ":2 cannot be read: No closing quotation"),
    ("--env", b"A=\xff\n", "it is no UTF-8"),
])
def test_unit_or_environment_that_cannot_be_read_leaves_the_process_unexamined(
    option: str, content: bytes, said: str, place: Path
) -> None:
    file = place / "file"
    file.write_bytes(content)
    run = process(place, option, str(file))
    assert run.code == UNEXAMINED
    (failed,) = run.report["failed"]
    assert failed.startswith(f"the process: {file}")
    assert said in failed


def test_more_streams_than_a_proxy_has_ports_are_found_where_a_proxy_is(place: Path, server: Server) -> None:
    run = doctor("--config", str(place / "gunicorn.conf.py"), "--streams", "90000", "--url", server.url, "--token",
                 token(), "--seconds", "1", env={"PUSHSVC_JWT_KEY": KEY})

    assert {"ports", "http_version"} <= set(run.checks), run.text
    assert "access" not in run.checks


def test_unix_socket_needs_no_ports(place: Path) -> None:
    bind = {"PUSHSVC_BIND": f"unix:{place}/push.sock,127.0.0.1:8000"}
    run = doctor("--config", str(place / "gunicorn.conf.py"), "--streams", "90000", "--url",
                 f"http://127.0.0.1:{free_port()}", env=bind)

    assert "ports" not in run.checks, run.text
    assert "process" in run.report["facts"]


def test_service_without_a_key_behind_a_proxy_is_found(place: Path, server: Server) -> None:
    run = doctor("--config", str(place / "gunicorn.conf.py"), "--url", server.url, "--token", token(), "--seconds", "1")

    assert "loopback" in run.finding("access")["seen"]


def test_service_that_is_open_to_all_is_found(place: Path) -> None:
    found = process(place, env={"PUSHSVC_AUTH": "none", "PUSHSVC_BIND": "0.0.0.0:8000"}).finding("access")

    assert "0.0.0.0" in found["seen"]


def test_environment_of_the_service_is_read_from_its_file_and_named(place: Path) -> None:
    env = place / "pushsvc.env"
    env.write_text('# the service\nWEB_CONCURRENCY=1\nPUSHSVC_AUTH="none"\nPUSHSVC_BIND=0.0.0.0:8000\n')

    found = process(place, "--env", str(env)).finding("access")

    assert (found["file"], found["line"]) == (str(env), 3)


def test_log_that_cannot_be_written_is_found(place: Path) -> None:
    broken = place / "push.db"
    broken.write_bytes(b"no database, but long enough to look at" * 100)

    found = process(place, env={"PUSHSVC_BROKER_URL": f"sqlite:{broken}"}).finding("broker")

    assert "not a database" in found["seen"]


def test_redis_that_does_not_answer_is_found(place: Path) -> None:
    found = process(place, env={"PUSHSVC_BROKER_URL": f"redis://127.0.0.1:{free_port()}"}).finding("broker")

    assert "refused" in found["seen"].lower(), found


def test_log_of_a_running_service_is_tried_and_left_as_it_was(place: Path, server: Server) -> None:
    published = client.publish(server.url, headers={"Authorization": f"Bearer {token()}"}, topic="doctor-log", data="one")

    run = process(place, env={"PUSHSVC_BROKER_URL": f"sqlite:{server.directory / 'push.db'}"})

    assert "broker" not in run.checks, run.text
    again = client.publish(server.url, headers={"Authorization": f"Bearer {token()}"}, topic="doctor-log", data="two")
    assert again.partition("-")[0] == published.partition("-")[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_root_leaves_no_file_of_its_own_beside_the_log(place: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # not in pytest's, which other users cannot enter
        os.chown(name, 65534, 65534)
        env = {"PUSHSVC_BROKER_URL": f"sqlite:{name}/push.db"}
        trial = [sys.executable, str(ROOT / "ops" / "doctor" / "trial.py"), name]
        subprocess.run(trial, env=os.environ | env, check=True)
        assert Path(name, "push.db").exists()

        run = process(place, env=env)

        assert "broker" not in run.checks, run.text
        assert {each.stat().st_uid for each in Path(name).rglob("*")} == {65534}


def unit_for(place: Path, log: Path, *lines: str) -> Path:
    """The unit that is shipped, for the user `nobody` and this log."""
    unit, text = place / "pushsvc.service", (ROOT / "ops" / "systemd" / "pushsvc.service").read_text()
    for old, new in (("User=pushsvc\nGroup=pushsvc", "User=nobody"), ("StateDirectory=pushsvc", "\n".join(lines)),
                     ("sqlite:/var/lib/pushsvc/pushsvc.db", f"sqlite:{log}")):
        assert old in text
        text = text.replace(old, new)
    unit.write_text(text)
    return unit


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try the rights of another user")
def test_rights_on_the_log_are_those_of_the_units_user(place: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # not in pytest's, which other users cannot enter
        folder, log = Path(name), Path(name, "push.db")
        unit = unit_for(place, log)
        folder.chmod(0o755)

        found = process(place, "--unit", str(unit)).finding("broker")
        assert f"its folder cannot be written by nobody: {name}" in found["seen"]
        assert (found["file"], found["line"]) == (str(unit), line_of(unit, "PUSHSVC_BROKER_URL="))

        os.chown(folder, 65534, 65534)
        run = process(place, "--unit", str(unit))
        assert "broker" not in run.checks, run.text
        assert run.report["notes"] == []

        subprocess.run([sys.executable, str(ROOT / "ops" / "doctor" / "trial.py")], check=True,
                       env=os.environ | {"PUSHSVC_BROKER_URL": f"sqlite:{log}"})
        log.chmod(0o600)
        assert "(tried by nobody)" in process(place, "--unit", str(unit)).finding("broker")["seen"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try the rights of another user")
def test_folder_that_systemd_hands_over_at_the_start_needs_no_rights_before(place: Path) -> None:
    name = f"pushsvc-doctor-{os.getpid()}"
    log = Path("/var/lib", name, "push.db")

    assert "by nobody: /var/lib" in process(place, "--unit", str(unit_for(place, log))).finding("broker")["seen"]
    run = process(place, "--unit", str(unit_for(place, log, f"StateDirectory={name}")))
    assert "broker" not in run.checks, run.text


def test_user_of_the_unit_that_is_not_there_leaves_the_rights_unexamined(place: Path) -> None:
    unit = unit_for(place, place / "push.db")
    unit.write_text(unit.read_text().replace("User=nobody", "User=nobody-of-this-name"))
    (note,) = process(place, "--unit", str(unit)).report["notes"]
    assert "nobody-of-this-name" in note


def test_disk_that_history_may_outgrow_is_found(place: Path) -> None:
    found = process(place, env={"PUSHSVC_HISTORY_BYTES": str(1 << 49)}).finding("disk")

    assert "GiB are free" in found["seen"]


# --- The configurations, as text -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["nginx/pushsvc.conf", "haproxy/haproxy.cfg"])
def test_configuration_without_a_server_for_the_stream_is_no_reason_to_fail(file: str, tmp_path: Path) -> None:
    """Whatever is left of a file, the doctor names a line of it or none."""
    text = (ROOT / "ops" / file).read_text()
    language = f"layout_{file.partition('/')[0]}"
    script = f"import sys, layout, wire, advice, {language} as language\n" \
        "for end in range(0, len(text := sys.stdin.read()), 97):\n" \
        "    try: scope = language.read(text[:end], wire.parse('https://push.example.com/events'))\n" \
        "    except layout.LayoutError: continue\n" \
        "    for check in advice.RULES[scope.kind]: assert 0 <= advice.cure(check, scope).line <= text.count('\\n') + 1\n"
    done = subprocess.run([sys.executable, "-c", script], input=text, text=True, capture_output=True, timeout=PATIENCE,
                          check=False, cwd=ROOT / "ops" / "doctor")
    assert done.returncode == 0, done.stderr
