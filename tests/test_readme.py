"""The README as a reader follows it: its commands are pasted into a shell, its answers are what comes out."""

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.client import publish, request
from tests.support.server import Server
from tests.support.wait import eventually

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ADDRESS = "http://127.0.0.1:8000"
EPOCH = "19a0c5d3e2f"  # of the ids in the README
TOUR, ACCESS, RUN = "A tour with curl", "Access", "Run it"
SECONDS = 60  # for one section; each command of it takes about one


@dataclass(frozen=True)
class Block:
    """One fenced block. `follows`: nothing but an empty line is between it and the block before."""

    section: str
    language: str
    text: str
    follows: bool


def blocks() -> list[Block]:
    found = []
    section = ""
    end = 0
    text = README.read_text()
    for match in re.finditer(r"^## (?P<section>[^\n]+)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.M | re.S):
        if match["section"]:
            section = match["section"]
        else:
            found.append(Block(section, match["language"], match["text"], not text[end : match.start()].strip()))
        end = match.end()
    return found


def section(name: str) -> list[Block]:
    found = [block for block in blocks() if block.section == name]
    assert found, f"the README has no section {name!r} with blocks"
    return found


def stays_open(block: Block) -> bool:
    """Whether the command runs until the reader ends it, in a terminal of its own."""
    return block.text.startswith("curl -N ")


def normal(text: str) -> str:
    """`text` with the epoch of every id as in the README, without the spaces at its end."""
    return re.sub(r"\b[0-9a-f]{11}-(?=\d)", lambda id: id[0] if id[0].startswith("00000") else f"{EPOCH}-", text).strip()


def unavailable(reason: str) -> NoReturn:
    """A run by hand may do without; an unattended one must not pass without these tests."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A directory in which the README's commands can be run."""
    for name in ("bash", "curl", "python3"):
        if shutil.which(name) is None:
            unavailable(f"{name} is not installed")
    directory = tmp_path / "checkout"
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (directory / ".venv" / "bin" / "python").chmod(0o755)
    return directory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "server") as server:
        yield server


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver")
    if missing := [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]:
        unavailable(f"{missing[0]} is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def run(directory: Path, script: str) -> str:
    """What a shell writes to both outputs. Commands that a reader would end are ended."""
    process = subprocess.Popen(["bash", "-u"], cwd=directory, text=True, start_new_session=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return process.communicate(script, timeout=SECONDS)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_tour_gives_the_answers_that_the_readme_shows(shell: Path, server: Server) -> None:
    tour = section(TOUR)
    script, opened = [], shell / "first-terminal"
    for number, block in enumerate(tour):
        if block.language != "sh":
            continue
        command = block.text.replace(ADDRESS, server.url)
        if stays_open(block):
            script.append(f"{command.strip()} > {shlex.quote(str(opened))} 2>&1 &\nFIRST=$!\n"
                          f"until grep -q open {shlex.quote(str(opened))}; do sleep 0.05; done")
        else:
            script.append(f"printf '\\n@@@ {number}\\n'\n{command}")  # an answer may end without a newline
    script.append("sleep 0.5; kill $FIRST")

    answers = dict(re.findall(r"^@@@ (\d+)\n(.*?)(?=\n?@@@|\Z)", run(shell, "\n".join(script)), re.M | re.S))

    first_terminal = normal(opened.read_text())
    for number, block in enumerate(tour):
        if block.language == "text" and block.follows and not stays_open(tour[number - 1]) and \
                tour[number - 1].language == "sh":
            assert normal(answers[str(number - 1)]) == block.text.strip(), tour[number - 1].text
        elif block.language == "text":
            assert block.text.strip() in first_terminal
    assert len(answers) >= 10


def test_access_works_as_pasted_and_is_refused_without_a_token(shell: Path, tmp_path: Path) -> None:
    keyed, started, published = [block.text for block in section(ACCESS) if block.language == "sh"]
    run(shell, keyed)
    environment = re.fullmatch(r"(\w+)=(\S+ \S+) make run\n", started)
    assert environment is not None, started
    value = run(shell, f"printf %s {environment[2]}")

    with Server(tmp_path / "server", env={environment[1]: value}) as server:
        answer = run(shell, published.replace(ADDRESS, server.url))
        refused = request("POST", f"{server.url}/publish", "topic=room&data=x",
                          {"Content-Type": "application/x-www-form-urlencoded"})

    assert re.fullmatch(rf'{{"id":"{EPOCH}-1"}}', normal(answer)), answer
    assert refused.status == 401


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    elsewhere = [block.text for block in blocks() if block.language == "sh" and block.section not in (TOUR, ACCESS)]
    assert elsewhere == ["make run\n", "make test\n"]  # how this suite is run, and what Server does
    assert [block for block in blocks() if block.language not in ("sh", "text", "js")] == []


def test_browser_snippet_opens_and_logs_what_is_published(tmp_path: Path, server: Server) -> None:
    [snippet] = [block.text for block in section("In a browser") if block.language == "js"]
    with browser(tmp_path / "profile") as driver:
        driver.get(f"{server.url}/healthz")
        # As in the browser's console; const at the top would be gone at the end of this script.
        driver.execute_script("window.logged = []; console.log = (...args) => logged.push(args);\n"
                              + snippet.replace(ADDRESS, server.url))
        logged = "return JSON.stringify(logged)"
        eventually(lambda: '["open"]' in driver.execute_script(logged), message="the stream opens")
        id = publish(server.url, topic="room", data="hello")
        publish(server.url, topic="room", event="note", data={"n": 1})
        eventually(lambda: driver.execute_script(logged) == f'[["open"],["{id}","hello"],["note",{{"n":1}}]]',
                   message="both events are logged")


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")) +
                         sorted((ROOT / "ops").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]+))?\)", page.read_text()):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_http_page_tells_of_every_field_bound_and_status() -> None:
    from pushsvc import draft, errors, event
    from pushsvc.settings import Settings
    from pushsvc.views import events

    text = (ROOT / "docs" / "http.md").read_text()
    subscribe, publish, refusals = (text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
                                    for name in ("Subscribe", "Publish", "Refusals"))
    assert {field for field in events.FIELDS if f"`{field}`" not in subscribe} == set()
    assert {field for field in draft.FIELDS if f"`{field}`" not in publish.partition("| field |")[2]} == set()
    for bound in (f"1 to {event.MAX_NAME_BYTES} bytes", f"1 to {event.MAX_TOPICS:,} different",
                  f"0 to {event.MAX_RETRY_MS:,}.", f"{draft.MAX_BATCH_TOPICS:,} topics",
                  f"{Settings().max_batch_events:,} (`PUSHSVC_MAX_BATCH_EVENTS`)",
                  f"{Settings().max_body_bytes >> 20} MiB (`PUSHSVC_MAX_BODY_BYTES`)"):
        assert bound in publish
    assert f"{Settings().max_topics_per_stream:,} at most (`PUSHSVC_MAX_TOPICS_PER_STREAM`)" in subscribe
    statuses = {each.status for each in errors.PushError.__subclasses__() if each is not errors.SettingsError}
    assert {status for status in statuses if f"| {status} |" not in refusals} == set()


def test_operations_page_tells_for_how_much_a_disk_has_to_have_room() -> None:
    from pushsvc.brokers.sqlite_log import PROBE_BYTES

    text = (ROOT / "docs" / "operations.md").read_text().partition("## Health checks")[2].partition("## Metrics")[0]
    assert f"no room for an event of {PROBE_BYTES >> 10} KiB" in text


PAGES = [page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "limits").glob("*.md"),
                           *(ROOT / "ops").rglob("*.md")) if page.name != "BENCHMARKS.md"]  # a tool writes that one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tools_are_called_by_a_python_that_has_what_they_need(page: Path) -> None:
    """`make run` puts the packages into .venv, and not every system has a `python`."""
    for python, tool in re.findall(r"(\S*python3?) (ops/[\w/.]+)", page.read_text()):
        allowed = ("python3", ".venv/bin/python") if tool == "ops/limits" else (".venv/bin/python",)
        assert python.lstrip("`") in allowed, f"{python} {tool}"


def test_limits_are_looked_at_without_any_package() -> None:
    done = subprocess.run([sys.executable, "-S", "ops/limits", "--streams", "1", "--json"], cwd=ROOT, text=True,
                          capture_output=True, timeout=SECONDS)
    assert done.returncode in (0, 1), done.stderr
    assert '"limits"' in done.stdout


def names_of_the_code() -> set[str]:
    """Every function, class, method and attribute of the service: bare, with `()`, and behind its class."""
    found = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "pushsvc").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found.add(f"{node.name}()")
            elif isinstance(node, ast.ClassDef):
                found.add(node.name)
                found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
                found |= {target.id for each in node.body if isinstance(each, ast.Assign)
                          for target in each.targets if isinstance(target, ast.Name)}
    return found


def test_architecture_names_only_what_the_code_has() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    known = names_of_the_code()
    named = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?|\w+\(\))`", text))
    assert named - known - {"EventSource"} == set()
    assert len(named) > 30
    files = set(re.findall(r"`([\w/.]+\.py)`", text))
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / "pushsvc" / name).exists()] == []


def test_architecture_has_a_line_for_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = {str(path.relative_to(ROOT / "pushsvc")) for path in (ROOT / "pushsvc").rglob("*.py")}
    assert {module for module in modules if "__init__" not in module and f"| `{module}` |" not in text} == set()


def test_architecture_names_only_settings_that_exist() -> None:
    from dataclasses import fields

    from pushsvc.settings import Settings

    bounds = (ROOT / "ARCHITECTURE.md").read_text().partition("## Where things are bounded")[2]
    named = set(re.findall(r"`([a-z_]+)`", bounds))
    assert named - {each.name for each in fields(Settings)} == set()


@pytest.mark.parametrize("page", ["README.md", "docs/http.md", "docs/operations.md", "ops/README.md"])
def test_page_names_only_settings_and_metrics_that_exist(page: str) -> None:
    from pushsvc.metrics import Metrics
    from pushsvc.settings import Settings

    text = (ROOT / page).read_text()
    settings = {f"PUSHSVC_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"PUSHSVC_[A-Z_]*[A-Z]", text)) - settings == set()
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().exposition().decode(), re.M))
    assert set(re.findall(r"`(pushsvc_[a-z_]+)(?:\{[a-z,]+\})?`", text)) - metrics - {"pushsvc_token"} == set()


def test_operations_page_tells_of_every_metric_and_every_reason() -> None:
    from pushsvc import hub
    from pushsvc.metrics import Metrics

    text = (ROOT / "docs" / "operations.md").read_text()
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().exposition().decode(), re.M))
    assert {name for name in metrics if f"| `{name}" not in text and not name.endswith("_created")} == set()
    reasons = {hub.GONE, hub.SLOW, hub.ROTATE, hub.EXPIRED, hub.DRAIN, hub.LOST, hub.UNAVAILABLE}
    assert {reason for reason in reasons if f"| `{reason}` |" not in text} == set()
