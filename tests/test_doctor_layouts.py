"""Which line of a proxy's configuration the doctor names, for layouts as people have them: as texts, without a proxy."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ROOT

URL = "https://push.example.com/events"
TIMEOUT = 30
SCRIPT = """
import sys
sys.path[:0] = [".", "../.."]
import path, visit, wire
target = wire.parse(sys.argv[1])
seen = visit.Visit(visit.Asked(target, config=sys.argv[2]), None, target)
path._look_at_config(seen)
for check in sys.argv[3:]:
    seen.find(check, "", "")
print(seen.report.as_json())
"""


def report(file: Path, *checks: str, url: str = URL) -> dict[str, Any]:
    """What the doctor finds in a configuration by itself, and what it says of `checks`."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, url, str(file), *checks], cwd=ROOT / "ops" / "doctor", text=True,
                          capture_output=True, timeout=TIMEOUT, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def named(finding: dict[str, Any]) -> str:
    """The text of the line, "" for none."""
    return finding["line"] and Path(finding["file"]).read_text().splitlines()[finding["line"] - 1].strip()


# --- HAProxy ---------------------------------------------------------------------------------------------

FRONT = "frontend web\n bind :443 ssl crt x\n default_backend p\n"
BACK = "backend p\n server a 127.0.0.1:8000\n"
SLOW, FAST = "defaults\n timeout server 5m\n", "defaults\n timeout server 2s\n"
TWO = "defaults slow\n timeout server 2s\ndefaults fast\n timeout server 1h\n"
STATIC = "backend static\n timeout server 9s\n server b 127.0.0.1:81\n"
OWN = "backend p\n timeout server 2s\n server a 127.0.0.1:8000\n"


def use(condition: str, acl: str = "") -> str:
    return FRONT + f" {acl}\n use_backend static if {condition}\n"


HAPROXY = {
    "defaults between frontend and backend": (SLOW + FRONT + FAST + BACK, "timeout server 2s"),
    "defaults that the backend has left behind": (FAST + FRONT + "defaults\n mode http\n" + BACK, "defaults"),
    "defaults that are named": (TWO + FRONT + BACK.replace("p\n", "p from slow\n", 1), "timeout server 2s"),
    "defaults of defaults": ("defaults slow\n timeout server 2s\ndefaults x\ndefaults y from slow\n" + FRONT + BACK,
                             "timeout server 2s"),
    "only the frontend's side": ("defaults\n timeout server 1s\n" + FRONT + SLOW.replace("5m", "8m") + BACK,
                                 "timeout server 8m"),
    "another path": (SLOW + use("{ path_beg /static }") + STATIC + OWN, "timeout server 2s"),
    "another path by name": (SLOW + use("is_static", "acl is_static path_beg -i /static /img") + STATIC + OWN,
                             "timeout server 2s"),
    "the stream's path": (SLOW + use("{ path /ev } || { path -m beg -i /EV }") + STATIC + OWN, "timeout server 9s"),
    "not the stream's path": (SLOW + use("!{ path_beg /events }") + STATIC + OWN, "timeout server 2s"),
    "the stream's host": (SLOW + use("{ hdr(host) -i push.example.com }") + STATIC + OWN, "timeout server 9s"),
    "what cannot be judged": (SLOW + use("{ src 10.0.0.0/8 }") + STATIC + OWN, "timeout server 2s"),
    "a ring behind": (SLOW + FRONT + BACK + " timeout server 3s\nring r\n timeout server 1s\n", "timeout server 3s"),
    "indented": ("  global\n    maxconn 9\n" + re.sub("^", "  ", FAST + FRONT + BACK, flags=re.M), "timeout server 2s"),
}


@pytest.mark.parametrize(("text", "line"), HAPROXY.values(), ids=HAPROXY)
def test_line_of_haproxy_is_that_of_the_sections_a_stream_meets(text: str, line: str, tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n maxconn 9\n" + text)

    (finding,) = report(config, "idle")["findings"]

    assert named(finding) == line


# --- nginx -----------------------------------------------------------------------------------------------

MAIN = "events {}\nhttp {\nproxy_http_version 1.1;\ngzip on;\ninclude conf.d/*.conf;\n}\n"
PASS = "proxy_pass http://127.0.0.1:8000;"
SERVER = "server {\nlisten 443 ssl;\nserver_name push.example.com;\nlocation = /events {\nproxy_read_timeout 2s;\n" \
    f"{PASS}\n}}\n}}\n"


def put(folder: Path, files: dict[str, str]) -> Path:
    """The configuration; the first of them is the one that is given."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder / next(iter(files))


def other(name: str, seconds: int, listen: str = "443 ssl") -> str:
    return f"server {{ listen {listen}; server_name {name}; location / {{\nproxy_read_timeout {seconds}s; {PASS} }} }}\n"


@pytest.mark.parametrize("given", ["nginx.conf", "conf.d/push.conf"])
def test_part_of_nginx_configuration_and_the_main_file_are_read_together(given: str, tmp_path: Path) -> None:
    put(tmp_path, {"nginx.conf": MAIN, "conf.d/push.conf": SERVER})

    told = report(tmp_path / given, "idle", "compression")

    assert told["notes"] == []
    assert [each["check"] for each in told["findings"]] == ["idle", "compression"], "it speaks HTTP/1.1 to the service"
    assert [named(each) for each in told["findings"]] == ["proxy_read_timeout 2s;", "location = /events {"]
    assert "`gzip on` in http" in told["findings"][1]["change"], "it is turned off for the stream only"
    assert {each["file"] for each in told["findings"]} == {str(tmp_path / "conf.d/push.conf")}


SNIPPET = f"location /events {{\nproxy_read_timeout 2s;\n{PASS} proxy_http_version 1.1;\n}}\n"
LAYOUTS = {
    "snippet in the server": {"nginx.conf": "http { server { listen 443; include snip.conf; } }", "snip.conf": SNIPPET},
    "snippet of the folder above": {"sites/a": "server { listen 443 ssl; include snip.conf; }", "snip.conf": SNIPPET},
    "nested location": {"a": f"http {{ server {{ listen 443; location / {{\nproxy_read_timeout 9m; {SNIPPET} }} }} }}"},
    "modifier without a space": {"a": f"http {{ {SERVER.replace('= /events', '=/events')} }}"},
    "exact name": {"a": f"http {{ {other('*.example.com', 9)} {other('~^push', 8)} {SERVER} }}"},
    "wildcard before a regular expression": {"a": other("~^push", 9) + other("push.*", 8) + other(".example.com", 2)},
    "regular expression before the default": {
        "a": other("_", 9, "443 default_server") + other(r"~^(?<n>.+)\.example\.com$", 2)},
    "default before the first": {"a": other("a.example", 9) + other("b.example", 2, "443 ssl default_server")},
    "default that leads nowhere": {
        "a": "server { listen 443 default_server; return 404; }" + other("push.example.com", 2)},
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_line_of_nginx_is_that_of_the_location_a_stream_meets(files: dict[str, str], tmp_path: Path) -> None:
    finding = report(put(tmp_path, files), "idle")["findings"][-1]

    assert named(finding).startswith("proxy_read_timeout 2s"), finding


UNKNOWN = {
    "file that is missing": {"nginx.conf": f"http {{ include away.conf; {SERVER} }}"},
    "file that includes itself": {"nginx.conf": f"http {{ include nginx.conf; {SERVER} }}"},
    "file that is no text": {"nginx.conf": f"http {{ include lua/*; {SERVER} }}", "lua/a": "}"},
    "server alone": {"push.conf": SERVER},
    "locations alone": {"snip.conf": f"location /events {{\n{PASS} }}"},
}


@pytest.mark.parametrize("files", UNKNOWN.values(), ids=UNKNOWN)
def test_what_may_stand_elsewhere_is_noted_and_not_judged(files: dict[str, str], tmp_path: Path) -> None:
    told = report(put(tmp_path, files))

    assert told["findings"] == []
    assert told["notes"]


@pytest.mark.parametrize("text", [f"location /other {{\n{PASS} }}", "gzip off;", "http { gzip_static on; }"])
def test_advice_names_no_line_where_the_stream_has_none(text: str, tmp_path: Path) -> None:
    (finding,) = report(put(tmp_path, {"snip.conf": text}), "compression")["findings"]

    assert (finding["file"], finding["line"]) == ("", 0)
    assert "this line" not in finding["change"]
