"""The console page in a real browser, against the running service; and a browser's own EventSource."""

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import publish
from tests.support.programs import missing, program
from tests.support.reader import EventReader
from tests.support.server import Server
from tests.support.wait import eventually

try:
    from selenium import webdriver
except ImportError:
    webdriver = None  # type: ignore[assignment]

PAGE = Path(__file__).parents[1] / "pushsvc" / "console.html"
PHONE_WIDTH = 360  # CSS pixels: the narrowest phones in use
NO_LATENCY = "\u2013"  # the page knows the latency of its own events only
TIMEOUT = 20  # seconds; a worker's start and a reconnect fit in several times

FLAGS = [
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
]

ROWS = """
return [...document.querySelectorAll("#events tr")].map(row => ({
  kind: row.className, id: row.dataset.id ?? null, text: row.textContent,
  ...Object.fromEntries([...row.cells].map(cell => [cell.className, cell.textContent])),
}))
"""


class Console:
    """The page as its user sees it. `text` and `rows` tell what is there now; nothing here waits."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, fragment: str = "") -> None:
        self.driver.get(f"{self.url}/{fragment}")

    def write(self, id: str, text: str) -> None:
        field = self.driver.find_element("id", id)
        field.clear()
        field.send_keys(text)

    def click(self, id: str) -> None:
        self.driver.find_element("id", id).click()

    def text(self, id: str) -> str:
        return str(self.run("return document.getElementById(arguments[0]).textContent", id))

    def rows(self, kind: str = "event") -> list[dict[str, str]]:
        """The rows of one kind (`event`, `gap`, `mark`) from top to bottom, all of one moment."""
        return [row for row in self.run(ROWS) if row["kind"] == kind]

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def connect(self, topics: str, resume: str = "") -> None:
        """Opens the page and subscribes. Returns when the stream is open."""
        self.open()
        self.write("topics", topics)
        self.write("resume", resume)
        self.click("connect")
        until(lambda: self.text("state") == "open", "the stream is open")

    def complaints(self) -> list[str]:
        """What the browser logged about broken scripts or a breach of the page's Content-Security-Policy."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] in ("javascript", "security")]


def until(fact: Callable[[], object], message: str) -> None:
    eventually(fact, timeout=TIMEOUT, message=message)


@pytest.fixture
def start_browser(tmp_path: Path) -> Callable[[], Any]:
    """Starts a new browser. Skips, or fails, before anything is started if there is none."""
    if webdriver is None:
        missing("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to run as root with one
    for flag in [*FLAGS, *sandbox, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=program("chromedriver"))
    return lambda: webdriver.Chrome(options=options, service=service)


@pytest.fixture
def server(start_browser: Callable[[], Any], tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "server", workers=2) as server:
        yield server


@pytest.fixture
def console(start_browser: Callable[[], Any], server: Server) -> Iterator[Console]:
    """The browser ends before the server, which would wait a while for its connections."""
    driver = start_browser()
    try:
        driver.set_script_timeout(TIMEOUT)
        console = Console(driver, server.url)
        yield console
        assert console.complaints() == []
    finally:
        driver.quit()


def publish_once(url: str, **fields: str) -> str:
    """Publishes one event, trying again while the service is down; however many tries, it is one event."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return eventually(lambda: publish(url, headers=headers, **fields), timeout=TIMEOUT)


def test_event_published_by_another_client_arrives_with_its_id_and_topic(console: Console, server: Server) -> None:
    console.connect("news, room")

    id = publish(server.url, topic="room", event="greeting", data="hello")

    until(console.rows, "the event is shown")
    [row] = console.rows()
    shown = {name: row[name] for name in ("id", "topic", "name", "data", "latency")}
    assert shown == {"id": id, "topic": "room", "name": "greeting", "data": "hello", "latency": NO_LATENCY}
    assert console.text("last-id") == id
    assert console.text("received") == "1"


def test_publishing_in_the_page_shows_the_id_and_the_latency(console: Console) -> None:
    console.connect("room")
    console.write("pub-topic", "room")
    console.write("pub-data", "two\nlines")

    console.click("publish")

    until(lambda: console.rows() and console.rows()[0]["latency"].endswith(" ms"), "the latency is shown")
    [row] = console.rows()
    assert row["data"] == "two\nlines"
    assert row["id"] in console.text("pub-result")


def test_page_comes_back_after_all_workers_were_killed_and_shows_every_event_once_in_order(
    console: Console, server: Server
) -> None:
    console.connect("room")
    ids = [publish(server.url, topic="room", data="before")]
    until(console.rows, "the event before is shown")

    for pid in server.worker_pids():
        os.kill(pid, signal.SIGKILL)
    ids += [publish_once(server.url, topic="room", data=f"meanwhile {number}") for number in range(5)]
    until(lambda: console.text("reconnects") != "0", "the page has reconnected")
    ids += [publish_once(server.url, topic="room", data=f"after {number}") for number in range(5)]

    until(lambda: ids[-1] in [row["id"] for row in console.rows()], "the last event is shown")
    assert [row["id"] for row in console.rows()] == ids
    assert console.rows("gap") == []
    assert console.text("state") == "open"


def test_position_that_history_does_not_hold_is_shown_as_a_gap(console: Console) -> None:
    console.connect("room", resume="00000000001-5")

    until(lambda: console.rows("gap"), "the gap is shown")

    [gap] = console.rows("gap")
    assert "00000000001-5" in gap["text"]
    assert console.text("last-id") == gap["id"]
    assert console.text("gaps") == "1"
    assert console.text("received") == "0"


def test_hostile_text_is_shown_as_text_and_runs_nothing(console: Console, server: Server) -> None:
    hostile = "<img/src=x/onerror=document.title='run'><svg/onload=document.title='run'>"
    console.connect(hostile)
    title = console.run("return document.title")

    publish(server.url, topic=hostile, event=hostile, data=hostile)

    until(console.rows, "the event is shown")
    [row] = console.rows()
    assert [row["topic"], row["name"], row["data"]] == [hostile] * 3
    assert console.run("return document.querySelectorAll('img, svg').length") == 0
    assert console.run("return document.title") == title


def test_page_does_not_scroll_sideways_on_a_narrow_phone(console: Console, server: Server) -> None:
    metrics = {"width": PHONE_WIDTH, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    console.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = "w" * 200
    console.connect(wide, resume="00000000001-5")
    console.write("pub-topic", wide)
    console.write("pub-data", wide)
    console.click("publish")
    publish(server.url, topic=wide, event=wide, data=wide)
    until(lambda: len(console.rows()) == 2 and console.rows("gap"), "all rows are shown")

    for summary in console.driver.find_elements("css selector", "summary"):
        summary.click()

    assert console.run("return document.documentElement.scrollWidth") <= PHONE_WIDTH
    assert console.run("return document.getElementById('log').scrollWidth") <= PHONE_WIDTH


def test_refused_publish_shows_the_detail_of_the_problem(console: Console) -> None:
    console.open()
    console.write("pub-data", "to nobody")

    console.click("publish")

    until(lambda: "topic" in console.text("pub-result"), "the detail names the topic")
    assert console.text("pub-result").startswith("400 ")


def test_refused_subscription_says_why_and_is_not_tried_again(console: Console) -> None:
    console.open()

    console.click("connect")

    until(lambda: console.text("state") == "refused", "the page has given up")
    assert console.text("note").startswith("400 ")
    assert "topic" in console.text("note")
    assert console.text("countdown") == ""


# Answers of a service that the test invents, in turn, the last one for ever: [status, type, body].
ANSWER_WITH = """
const answers = [...arguments];
window.asked = [];
window.fetch = async (url, {headers}) => {
  asked.push({at: performance.now(), after: headers["Last-Event-ID"] ?? null});
  const [status, type, body] = answers.length > 1 ? answers.shift() : answers[0];
  return new Response(body, {status, headers: {"Content-Type": type}});
};
"""


def test_page_resumes_an_ended_stream_after_the_time_that_it_asked_for(console: Console) -> None:
    console.open()
    console.run(ANSWER_WITH, [200, "text/event-stream", "retry: 200\nid: 7\ndata: x\n\n: drain\n\n"])

    console.click("connect")

    until(lambda: len(console.run("return asked")) >= 3, "the page has come back twice")
    asked = console.run("return asked")[:3]
    assert [request["after"] for request in asked] == [None, "7", "7"]
    assert 200 <= asked[2]["at"] - asked[1]["at"] < 1500
    until(lambda: "drain" in console.text("note"), "the reason is shown")


def test_page_asks_again_after_a_failure_of_the_service_and_shows_it_meanwhile(console: Console) -> None:
    problem = '{"title": "Service Unavailable", "detail": "the broker is away"}'
    console.open()
    console.run(
        ANSWER_WITH,
        [503, "application/problem+json", problem],
        [200, "text/event-stream", "retry: 600000\ndata: back\n\n"],
    )

    console.click("connect")

    until(lambda: console.text("state") == "waiting to reconnect", "the page waits")
    assert console.text("note") == "503 Service Unavailable: the broker is away"
    assert console.text("countdown").startswith("in ")
    until(console.rows, "the page has come back")


def test_link_carries_topics_and_position_but_never_the_token(console: Console) -> None:
    console.open()
    for id, text in {"topics": "news, room", "resume": "earliest", "token": "secret"}.items():
        console.write(id, text)
    console.click("connect")
    link = console.run("return location.href")

    console.driver.get("about:blank")
    console.driver.get(link)

    assert "secret" not in link
    fields = console.run("return ['topics', 'resume', 'token'].map(id => document.getElementById(id).value)")
    assert fields == ["news room", "earliest", ""]


def test_native_event_source_opens_before_any_event_and_then_gets_it_with_its_id(
    console: Console, server: Server
) -> None:
    console.driver.get(f"{server.url}/healthz")
    console.driver.execute_async_script(
        """
        const [url, done] = arguments;
        window.seen = [];
        window.source = new EventSource(url);
        const note = ({type, data, lastEventId}) => seen.push([type, data ?? "", lastEventId ?? ""]);
        for (const type of ["open", "error", "message", "note"]) source.addEventListener(type, note);
        source.addEventListener("open", () => done());
        """,
        f"{server.url}/events?topic=room",
    )
    assert console.run("return seen") == [["open", "", ""]]

    first = publish(server.url, topic="room", data="one\ntwo")
    second = publish(server.url, topic="room", data="three", event="note")

    until(lambda: len(console.run("return seen")) == 3, "both events are seen")
    assert console.run("return seen")[1:] == [["message", "one\ntwo", first], ["note", "three", second]]
    console.run("source.close()")


STREAMS = [
    "data: first\n\ndata:second\r\n\r\ndata:  third\r\r",
    ": comment\n:\nevent: note\ndata: a\ndata: b\nid: 1\n\ndata: plain again\n\n",
    "id: 1\n\nid: 2\x003\ndata: an id with NUL is ignored\n\nid\ndata: reset\n\n",
    "event: no data, no event\nid: 7\n\ndata\n\ndata\ndata\n\ndata:\n\n",
    "data: a\r\ndata: b\r\nevent: note\r\nid: 1\r\n\r\ndata: c\rdata: d\r\r",
    "data: a\r\n\ndata: b\r\n\r\n\n\r\r\ndata: c\n\r",
    "data : x\n data: x\nData: x\nfoo: bar\nfoo\ndata: a:b: c\n\n",
    "retry: 1500\nretry: 1s\nretry: -1\nretry\ndata: no\u2028line\x0bend\x85here\n\n",
    "id: 1\ndata: whole\n\nid: 2\nevent: x\ndata: cut off before its blank line\n",
]

READ = """
function read(chunks) {
  const messages = [];
  let retry = null;
  const onEvent = ({id, type, data}) => messages.push([type, data, id]);
  const parser = new EventParser("", onEvent, ms => { retry = ms; });
  chunks.forEach(chunk => parser.feed(chunk));
  return JSON.stringify([messages, parser.lastId, retry]);
}
return arguments[0].map(stream => {
  const cuts = [...stream].map((_, at) => [stream.slice(0, at), "", stream.slice(at)]);
  return [...new Set([[stream], [...stream], ...cuts].map(read))].map(JSON.parse);
});
"""


def test_parser_of_the_page_reads_as_the_oracle_does_wherever_the_stream_is_cut(console: Console) -> None:
    console.open()

    found = console.run(READ, STREAMS)

    assert found == [[oracle(stream)] for stream in STREAMS]


def oracle(stream: str) -> list[object]:
    reader = EventReader()
    messages = [[read.type, read.data, read.last_event_id] for read in reader.feed(stream.encode())]
    return [messages, reader.last_event_id, reader.reconnection_time]


class Elements(HTMLParser):
    """The start tags of a page: names with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_one_file_whose_policy_can_name_its_style_and_script_by_hash() -> None:
    page = PAGE.read_text("utf-8")
    elements = Elements(page).found
    attributes = {name for _, attrs in elements for name in attrs}

    assert [tag for tag, _ in elements if tag in ("style", "script")] == ["style", "script"]
    assert page.count("<style>") == page.count("<script>") == 1
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")]
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "object", "embed", "base")]
    assert "://" not in page
