"""The process: reads what the service is configured to be and what its machine allows, and has it judged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import host
from checks import CHECKS, Asked, Seen, stopped, streams_of
from finding import Report

from ops.limits.unit import Unit
from pushsvc.errors import SettingsError
from pushsvc.settings import workers_asked

UNIT = "/etc/systemd/system/pushsvc.service"  # where ops/README.md puts it


def examine(asked: Asked) -> Report:
    """Raises HostError, UnitError, OSError."""
    if not (asked.unit or asked.env) and Path(UNIT).is_file():
        asked = replace(asked, unit=UNIT)
    source = f"told by {asked.unit or asked.env}" if asked.unit or asked.env else "read from this shell's environment"
    told = host.told(asked.unit, asked.env)
    asked = replace(asked, told=told, env=next((file for file in reversed(told.files) if Path(file).is_file()), ""))
    environ = {**os.environ, **{line.name: line.value for line in told.variables}}
    service = _load(asked, environ)
    if not service.settings:
        return Report([stopped(asked, service.stopped)],
                      notes=["the rest of the process: its settings are not known"], facts={"process": source})
    directory = Path(asked.config).absolute().parent
    user, notes = _user(told)
    log = host.log_of(service.settings["broker_url"], directory, told, user)
    seen = Seen(asked, service, host.limits(told), log, host.try_broker(environ, log, directory),
                host.has_parser(), environ.get("GUNICORN_CMD_ARGS", ""))
    broker = service.settings["broker_url"].partition("?")[0].rpartition("@")[2]  # without a password
    facts = {"process": f"{service.gunicorn['workers']} workers, {streams_of(seen)} streams each, {broker}; {source}"}
    return Report([finding for check in CHECKS for finding in check(seen)], notes=notes, facts=facts)


def _user(unit: Unit) -> tuple[host.User | None, list[str]]:
    """Whose rights are to be judged, None for our own; and what there is to say of it."""
    try:
        user = host.user_of(unit)
    except KeyError as error:
        return None, [f"the rights of the unit's user or group: {error.args[0]}"]
    if user is None or user.uid == os.geteuid():
        return None, []
    if os.geteuid() != 0:
        return None, [f"the rights of the unit's user {user.name}: only root can try them"]
    return user, []


def _load(asked: Asked, environ: Mapping[str, str]) -> host.Service:
    """Raises HostError. gunicorn itself fails for a wrong number of workers, before the service can say what is wrong."""
    try:
        workers_asked(environ)
    except SettingsError as error:
        return host.Service(stopped=error.detail)
    return host.load(asked.config, environ)
