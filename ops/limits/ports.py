"""3. Ephemeral ports: a proxy has one for each connection to one address and port of the service."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clients import PORT, Crowd, get
from stage import NotHere, Show, leave_network, program, service, set_sysctl

LOW = 40_000
PROXY_PORT = 9000
ADDRESSES = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
WAIT_SECONDS = 10.0
CLIENTS = [f"127.0.1.{number}" for number in range(1, 51)]  # the clients have ports of their own
CONFIG = f"""
global
    log stdout format raw daemon
    maxconn 4000
defaults
    mode http
    log global
    timeout connect 5s
    timeout client 1m
    timeout server 1m
frontend web
    bind 127.0.0.1:{PROXY_PORT}
    default_backend pushsvc
backend pushsvc
    balance roundrobin
"""


def run(streams: int = 300) -> Show:
    """streams: that many clients; the proxy has a third as many ports."""
    leave_network()
    show = Show(3, "ephemeral ports", steps=5)
    ports = max(3, streams // 3)
    set_sysctl("net.ipv4.ip_local_port_range", f"{LOW} {LOW + ports - 1}")
    first, all_of_them = f"{ADDRESSES[0]}:{PORT}", [f"{address}:{PORT}" for address in ADDRESSES]
    few = _through(show, "before", f"{ports} ports, {ports // 2} clients", first, [first], ports // 2)
    one = _through(show, "symptom", f"{ports} ports, {streams} clients", first, [first], streams)
    fixes = [_through(show, "after", f"the service listens on {len(ADDRESSES)} addresses", ",".join(all_of_them),
                      all_of_them, streams),
             _through(show, "after", f"the proxy has {len(ADDRESSES)} source addresses", first,
                      [f"{first} source {address}" for address in ADDRESSES], streams)]
    with tempfile.TemporaryDirectory(prefix="pushsvc-show-") as folder:
        path = f"{folder}/pushsvc.sock"
        fixes.append(_through(show, "after", "a Unix socket between them", f"{first},unix:{path}", [f"unix@{path}"],
                              streams))
    show.shown = (few["open"] == ports // 2 and one["open"] <= ports and one["answered_503"] > 0
                  and one["told_by_the_proxy"] > 0 and all(fix["open"] == streams for fix in fixes))
    show.notes.append(f"one address had {ports} ports here, so that four are enough for {streams} streams")
    return show


def _through(show: Show, name: str, what: str, bind: str, servers: Sequence[str], clients: int) -> dict[str, Any]:
    """One phase: the service listens on `bind`, and the proxy goes to `servers`, whose clients all come at once."""
    with service({"PUSHSVC_BIND": bind, "PUSHSVC_AUTH": "none"}), _haproxy(servers) as log, Crowd() as crowd:
        crowd.come([f"/events?topic=t{number}" for number in range(clients)], ("127.0.0.1", PROXY_PORT), CLIENTS)
        crowd.wait(WAIT_SECONDS)
        return show.add(name, what, clients=clients, open=crowd.opened(),
                        answered_503=sum(client.status == 503 for client in crowd.clients),
                        told_by_the_proxy=log.read_text().count("no free ports"))


@contextlib.contextmanager
def _haproxy(servers: Sequence[str]) -> Iterator[Path]:
    """HAProxy before these servers; its log. Raises NotHere."""
    found = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise NotHere("haproxy is not installed")
    with tempfile.TemporaryDirectory(prefix="pushsvc-show-") as folder:
        config, log = Path(folder, "haproxy.cfg"), Path(folder, "log")
        lines = [f"    server s{number} {server}\n" for number, server in enumerate(servers)]
        config.write_text(CONFIG + "".join(lines))
        with program([found, "-db", "-f", str(config)], dict(os.environ), log) as process:
            while get("/healthz", ("127.0.0.1", PROXY_PORT), 2.0) is None:
                if process.poll() is not None:
                    raise NotHere(f"haproxy does not start:\n{log.read_text()[-2000:]}")
            yield log
