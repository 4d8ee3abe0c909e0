"""Settings: what the environment may say, what it is told when it is wrong, and that the docs say the same."""

import os
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from pushsvc.errors import SettingsError
from pushsvc.settings import Settings, table, variable, workers_asked
from tests.support.server import ROOT, free_port

READ = {
    "PUSHSVC_BIND": ("0.0.0.0:80, [::]:80", "0.0.0.0:80, [::]:80"),
    "PUSHSVC_BACKLOG": ("1", 1),
    "PUSHSVC_BROKER_URL": ("memory:", "memory:"),
    "PUSHSVC_REDIS_PREFIX": ("app:", "app:"),
    "PUSHSVC_SYNC": ("full", "full"),
    "PUSHSVC_POLL_SECONDS": ("0.5", 0.5),
    "PUSHSVC_PUBLISH_TIMEOUT_SECONDS": ("30", 30.0),
    "PUSHSVC_HISTORY_EVENTS": ("1", 1),
    "PUSHSVC_HISTORY_BYTES": ("1048576", 1 << 20),
    "PUSHSVC_HEARTBEAT_SECONDS": ("1e1", 10.0),
    "PUSHSVC_RETRY_MS": ("0", 0),
    "PUSHSVC_ROTATE_SECONDS": ("0", 0.0),
    "PUSHSVC_AUTH": ("none", "none"),
    "PUSHSVC_JWT_KEY": ("a\nb", "a\nb"),
    "PUSHSVC_CORS_ORIGINS": ("https://a.example,http://b:3000", "https://a.example,http://b:3000"),
    "PUSHSVC_LOG_LEVEL": ("debug", "debug"),
    "PUSHSVC_LOG_FORMAT": ("json", "json"),
}

BAD_VALUES = {
    "a word for a whole number": ("PUSHSVC_BACKLOG", "many", "a whole number"),
    "a fraction for a whole number": ("PUSHSVC_HISTORY_EVENTS", "1.5", "a whole number"),
    "nothing for a whole number": ("PUSHSVC_BACKLOG", "", "a whole number"),
    "a word for a number": ("PUSHSVC_HEARTBEAT_SECONDS", "soon", "a number"),
    "a unit beside a number": ("PUSHSVC_HEARTBEAT_SECONDS", "15s", "a number"),
    "no number": ("PUSHSVC_HEARTBEAT_SECONDS", "nan", "at least 0.1"),
    "no end": ("PUSHSVC_HEARTBEAT_SECONDS", "inf", "at most 3600"),
    "less than the least": ("PUSHSVC_HEARTBEAT_SECONDS", "0.01", "at least 0.1 and at most 3600 s"),
    "more than the most": ("PUSHSVC_POLL_SECONDS", "61", "at most 60 s"),
    "a wait that the kernel cannot count": ("PUSHSVC_KEEPALIVE_SECONDS", "99999999999", "at most 3600 s"),
    "a queue that the kernel cannot count": ("PUSHSVC_BACKLOG", "99999999999", "at most 1e+06 connections"),
    "an age without end": ("PUSHSVC_HISTORY_SECONDS", "inf", "at most 1e+09 s"),
    "a memory without end": ("PUSHSVC_IDEMPOTENCY_SECONDS", "inf", "at most 1e+09 s"),
    "a life without end": ("PUSHSVC_ROTATE_SECONDS", "inf", "at least 0 s"),
    "a negative number": ("PUSHSVC_MAX_STREAMS", "-1", "at least 0 streams"),
    "none at all of what needs one": ("PUSHSVC_HISTORY_EVENTS", "0", "at least 1 events per topic"),
    "a choice that does not exist": ("PUSHSVC_SYNC", "off", "one of normal, full"),
    "a choice in capitals": ("PUSHSVC_LOG_LEVEL", "DEBUG", "one of debug, info, warning, error"),
    "an empty choice": ("PUSHSVC_LOG_FORMAT", "", "one of text, json"),
    "another word for none": ("PUSHSVC_AUTH", "off", "one of none"),
    "a broker that does not exist": ("PUSHSVC_BROKER_URL", "kafka://x", "kafka://x"),
    "no broker": ("PUSHSVC_BROKER_URL", "", "sqlite:PATH, redis://HOST or memory:"),
    "a path without its scheme": ("PUSHSVC_BROKER_URL", "/var/push.db", "sqlite:PATH, redis://HOST or memory:"),
    "a place in memory": ("PUSHSVC_BROKER_URL", "memory:x", "sqlite:PATH, redis://HOST or memory:"),
    "a prefix without its colon": ("PUSHSVC_REDIS_PREFIX", "app", "ends with a colon"),
    "no prefix": ("PUSHSVC_REDIS_PREFIX", "", "ends with a colon"),
    "a prefix of two lines": ("PUSHSVC_REDIS_PREFIX", "a\nb:", "a control character"),
    "an origin with a path": ("PUSHSVC_CORS_ORIGINS", "https://a.example/", "'https://a.example/'"),
    "an origin without a scheme": ("PUSHSVC_CORS_ORIGINS", "a.example", "'a.example'"),
    "every origin": ("PUSHSVC_CORS_ORIGINS", "*", "'*'"),
    "one bad origin of two": ("PUSHSVC_CORS_ORIGINS", "https://a.example, null", "'null'"),
    "a drain longer than the stop": ("PUSHSVC_DRAIN_SECONDS", "30", "PUSHSVC_GRACEFUL_SECONDS"),
}

NAMED = re.compile(r"\bPUSHSVC_[A-Z][A-Z_]*")
UNKNOWN = {
    "PUSHSVC_HEARTBEAT": "PUSHSVC_HEARTBEAT_SECONDS",
    "PUSHSVC_JWT_SECRET": "PUSHSVC_JWT_KEY",
    "PUSHSVC_CORS_ORIGIN": "PUSHSVC_CORS_ORIGINS",
    "PUSHSVC_LOGLEVEL": "PUSHSVC_LOG_LEVEL",
    "PUSHSVC_BROKER": "PUSHSVC_BROKER_URL",
    "PUSHSVC_bind": "PUSHSVC_BIND",
}


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    return caught.value.detail


def started(**env: str) -> tuple[int, str]:
    """Exit status and output of a service that is expected not to start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSVC_", "GUNICORN_"))}
    finished = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "wsgi:app"],
        cwd=ROOT, env=inherited | {"PUSHSVC_BIND": f"127.0.0.1:{free_port()}"} | env, timeout=60, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return finished.returncode, finished.stdout


def test_empty_environment_gives_the_defaults_of_the_contract() -> None:
    settings = Settings.from_environ({})
    assert settings == Settings()
    assert settings.bind == "127.0.0.1:8000"
    assert settings.broker_url.startswith("sqlite:var/")
    assert settings.heartbeat_seconds == 15
    assert settings.max_body_bytes == 1 << 20
    assert (settings.auth, settings.jwt_key) == ("", "")


@pytest.mark.parametrize(("name", "text", "value"), [(name, *pair) for name, pair in READ.items()])
def test_variable_is_read_as_what_it_is(name: str, text: str, value: Any) -> None:
    settings = Settings.from_environ({name: text})
    read = getattr(settings, name.removeprefix("PUSHSVC_").lower())
    assert (read, type(read)) == (value, type(value))
    others = {each.name: each.default for each in fields(Settings) if variable(each) != name}
    assert {each: getattr(settings, each) for each in others} == others


def test_variables_of_others_are_left_alone() -> None:
    others = {"PATH": "/bin", "PUSHSVC": "x", "pushsvc_bind": "x", "MY_PUSHSVC_BIND": "x", "WEB_CONCURRENCY": "4"}
    assert Settings.from_environ(others) == Settings()


def test_origins_are_taken_one_by_one() -> None:
    assert Settings().origins == ()
    asked = " https://a.example , http://b:3000,"
    assert Settings.from_environ({"PUSHSVC_CORS_ORIGINS": asked}).origins == ("https://a.example", "http://b:3000")


@pytest.mark.parametrize(("name", "text", "said"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_value_is_refused_with_its_name_and_what_is_right(name: str, text: str, said: str) -> None:
    message = refusal({name: text})
    assert name in message
    assert said in message


@pytest.mark.parametrize(("name", "nearest"), UNKNOWN.items())
def test_unknown_variable_is_refused_and_told_the_nearest(name: str, nearest: str) -> None:
    message = refusal({name: "x"})
    assert name in message
    assert message.endswith(nearest)


def test_setting_that_code_gives_is_checked_like_one_from_outside() -> None:
    with pytest.raises(SettingsError, match="PUSHSVC_MAILBOX_EVENTS"):
        Settings(mailbox_events=0)


@pytest.mark.parametrize(("text", "asked"), [(None, 0), ("", 0), ("1", 1), ("1024", 1024)])
def test_number_of_workers_is_what_the_environment_asks_for(text: str | None, asked: int) -> None:
    assert workers_asked({} if text is None else {"WEB_CONCURRENCY": text}) == asked


def test_message_never_contains_the_key() -> None:
    assert "secret" not in refusal({"PUSHSVC_JWT_KEY": "a secret", "PUSHSVC_BACKLOG": "0"})
    assert "secret" not in refusal({"PUSHSVC_JWT_KEYS": "a secret"})


STOPS = {
    "an unknown variable": ({"PUSHSVC_HEARTBEAT": "1"}, "PUSHSVC_HEARTBEAT_SECONDS"),
    "a bad number": ({"PUSHSVC_RETRY_MS": "3s"}, "PUSHSVC_RETRY_MS is a whole number"),
    "no workers": ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY is a whole number of at least 1"),
    "far too many workers": ({"WEB_CONCURRENCY": "1025"}, "at most 1024"),
    "a bad choice": ({"PUSHSVC_SYNC": "never"}, "PUSHSVC_SYNC is one of normal, full"),
}


@pytest.mark.parametrize(("env", "said"), STOPS.values(), ids=STOPS)
def test_gunicorn_stops_before_any_worker_with_one_line(env: dict[str, str], said: str) -> None:
    status, output = started(**env)
    assert status not in (0, None)
    assert said in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize("port", [0, 65_536])
def test_gunicorn_stops_where_the_port_is_none(port: int) -> None:
    status, output = started(PUSHSVC_BIND=f"127.0.0.1:{free_port()},127.0.0.1:{port}")
    assert status not in (0, None)
    assert output.strip().splitlines()[-1] == f"pushsvc: a port is 1 to 65535, not {port}: PUSHSVC_BIND"
    assert "Traceback" not in output


def test_a_start_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    status, _ = started(PUSHSVC_BIND=f"0.0.0.0:{free_port()}", TMPDIR=str(tmp_path))
    assert status not in (0, None)
    assert list(tmp_path.iterdir()) == []


def test_other_servers_are_stopped_too() -> None:
    """`wsgi.py` is the door of any WSGI server, not only of the one with our configuration file."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PUSHSVC_")}
    finished = subprocess.run(
        [sys.executable, "-c", "import wsgi"], cwd=ROOT, env=environ | {"PUSHSVC_HEARTBEAT": "1"}, timeout=60,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "PUSHSVC_HEARTBEAT_SECONDS" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_setting_is_in_the_table_with_a_reason() -> None:
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [variable(each) for each in fields(Settings)]
    for each in fields(Settings):
        assert each.metadata["why"].endswith("."), each.name
        assert each.metadata["unit"] or isinstance(each.default, str), each.name


def test_docs_have_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert table() in page, "print it with: python -m pushsvc.settings"


def test_module_prints_its_table() -> None:
    module = [sys.executable, "-m", "pushsvc.settings"]
    assert subprocess.check_output(module, cwd=ROOT, text=True, timeout=60) == table() + "\n"


def test_variables_that_the_service_names_exist() -> None:
    """In messages, docs and units: a name that was changed in the code is changed everywhere."""
    known = {variable(each) for each in fields(Settings)}
    places = [ROOT / "gunicorn.conf.py", *ROOT.glob("*.md")]
    places += [path for folder in ("pushsvc", "docs", "ops") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {path: path.read_text(errors="replace") for path in places if path.suffix != ".pyc"}
    unknown = {(str(path), name) for path, text in texts.items() for name in NAMED.findall(text) if name not in known}
    assert not unknown


@pytest.mark.parametrize(("descriptors", "asked", "streams", "warned"), [
    (3000, 0, 1936, False), (3000, 1900, 1900, False), (3000, 2000, 1936, True), (1024, 0, 1, True),
    (1500, 0, 436, True)])
def test_a_worker_that_has_few_descriptors_says_how_few_streams_it_takes(
        caplog: pytest.LogCaptureFixture, descriptors: int, asked: int, streams: int, warned: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        service = create_app(Settings(broker_url="memory:", max_streams=asked)).extensions["pushsvc"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    service.close()
    assert service.settings.max_streams == streams
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == ([f"room for {streams} streams only: a process may have {descriptors} descriptors here, "
                     "PUSHSVC_MAX_CONNECTIONS keeps 1000"] if warned else [])
