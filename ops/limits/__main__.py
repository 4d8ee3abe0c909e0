"""Says which limits of this machine are too small for so many streams, raises them, and puts them back.

  check   (the default) changes nothing
  apply   raises what is too small: now, and over a restart by one file each for sysctl, logins and the unit
  revert  puts all back as it was before the first apply

Exit codes: 0 all is enough, or done; 1 something is too small, now or at the next boot, or was left; 2 wrong usage;
3 it could not be done; 4 done, and something was changed (only with --exit-code). docs/limits/README.md tells more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boot
import change
import places
import system
from needs import LIMITS, Limit, Need, Target, addresses, workers_for
from unit import UnitError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ops.bench.terminal import answered
from pushsvc.settings import MOST_WORKERS, Settings  # the numbers of the service have their home there

ENOUGH, SMALL, UNDONE, LATER, UNUSED, ABSENT = "enough", "small", "undone", "later", "unused", "absent"
MOST_STREAMS = 1_000_000_000
USER = re.compile(r"@?\w[\w.@-]*", re.ASCII)  # of the forms of limits.conf; it begins a line there
MOST_PID = 1 << 22  # of any kernel
OK, TOO_SMALL, USAGE, FAILED, CHANGED = range(5)


@dataclass(frozen=True, slots=True)
class Finding:
    """One limit, as it is here. have: None where the kernel has none of that name. note: what else there is to say.
    boot: the line that sets it too low at the next boot, and is not ours; None for none."""

    limit: Limit
    have: Need | None
    need: Need
    state: str
    note: str
    boot: boot.Word | None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.limit.name, "unit": self.limit.unit, "have": self.have, "need": self.need,
                "state": self.state, "note": self.note, "boot": self.boot and self.boot.as_json(),
                "why": self.limit.why, "without": self.limit.without}


def look(limit: Limit, target: Target, options: argparse.Namespace, words: Mapping[str, boot.Word]) -> Finding:
    need, have = limit.need(target), system.have(limit.name, options.pid)
    word = words.get(limit.name)
    state, note = _judge(limit, target, have, need, word)
    if word is None or word.file == options.root / places.SYSCTLS or _holds(limit, word.value, need):
        word = None
    elif state in (ENOUGH, ABSENT):
        state = UNDONE
    return Finding(limit, have, need, state, note, word)


def _holds(limit: Limit, value: Need, need: Need) -> bool:
    """Whether a line of a file sets enough. Of several numbers it may name the first ones only."""
    count = min(len(value), len(need))
    return limit.is_enough((*value[:count], *need[count:]), need)


def _judge(limit: Limit, target: Target, have: Need | None, need: Need,
           word: boot.Word | None) -> tuple[str, str]:
    if have is None:
        return ABSENT, system.why_not(limit.name)
    if limit.is_enough(have, need):
        return ENOUGH, ""
    if "conntrack" in limit.name and not system.tracks_connections():
        return UNUSED, "no connection is followed here now"
    if limit.name == system.NOFILE:
        if word and word.value >= need:
            return LATER, f"{word.value[0]} from the next start of the unit"
        return SMALL, f"or {workers_for(target, have[0]) or 'no number of'} workers"
    reason = system.why_not(limit.name) if limit.is_sysctl else "not settable"
    return SMALL, f"not settable here: {reason}" if reason else ""


def check(target: Target, options: argparse.Namespace) -> list[Finding]:
    words, _ = boot.last_words(options.root)
    if (found := places.service(options.root).nofile()) and not options.pid:
        words[system.NOFILE] = boot.Word(options.root / found[1].file.lstrip("/"), found[1].number, (found[0],))
    return [look(limit, target, options, words) for limit in LIMITS]


def apply(target: Target, options: argparse.Namespace, done: list[str]) -> None:
    """Raise what is too small. Raises change.ChangeError; `done` has what was done until then."""
    state = change.State.load(options.root, places.STATE)
    findings = [found for found in check(target, options) if found.limit.is_sysctl]
    if options.no_sysctl:
        for found in findings:
            _write(state, found.limit, found.limit.joined(found.have or found.need, found.need))
    for found in [] if options.no_sysctl else findings:
        value = found.limit.joined(found.have or found.need, found.need)
        if found.state == UNDONE:
            _write(state, found.limit, value)  # our file may be the later one
        elif found.state == SMALL and found.have is not None and not found.note:
            _write(state, found.limit, value)
            change.raise_sysctl(state, found.limit.name, found.have, value, done.append)
    others, _ = boot.last_words(options.root, without=places.SYSCTLS)
    for found in findings:
        if found.limit.name in state.written and found.limit.name in others:
            _write(state, found.limit, others[found.limit.name].value)
    written = {name: tuple(value) for name, value in state.written.items()}
    contents = places.contents(target, written, options.root, options.user, Settings().backlog, options.workers or 0)
    change.put_files(state, contents, done.append)


def _write(state: change.State, limit: Limit, value: Need) -> None:
    """Our file is to hold this, and what it holds already. Of several numbers `value` may name the first ones only."""
    held = tuple(state.written.get(limit.name, value))
    state.written[limit.name] = list(limit.joined(held, (*value[:len(held)], *held[len(value):])))


def revert(options: argparse.Namespace, done: list[str]) -> list[str]:
    """Put all back; what was left. Raises change.ChangeError; `done` has what was done until then."""
    state = change.State.load(options.root, places.STATE)
    return [] if state.is_empty() and not state.path.exists() else change.revert(state, options.force, done.append)


def target_of(options: argparse.Namespace) -> Target:
    workers = options.workers or _workers_told(options.root) or os.cpu_count() or 1
    return Target(streams=options.streams, workers=workers, proxy=not options.no_proxy,
                  connections=Settings().max_connections, memory_bytes=system.total_memory(),
                  page_bytes=os.sysconf("SC_PAGE_SIZE"))


def _workers_told(root: Path) -> int:
    """How many the unit is told to have; 0 for no number, or one that cannot be read or meant: `check` tells that."""
    with suppress(UnitError, OSError):
        number = places.number(places.service(root), places.WORKERS)
        return number if number <= MOST_WORKERS else 0
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python ops/limits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("check", "apply", "revert"), default="check")
    parser.add_argument("--streams", type=_streams, default=100_000, help="of all workers together (%(default)s)")
    parser.add_argument("--workers", type=_workers, help="WEB_CONCURRENCY; apply sets it for the unit (as that has it, "
                        "else one per core)")
    parser.add_argument("--no-proxy", action="store_true", help="the proxy is on another machine, or there is none")
    parser.add_argument("--pid", type=_pid, help="check the descriptors of this process, not of one started from here")
    parser.add_argument("--user", type=_user, default="pushsvc", help="whose logins get the descriptors (%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the files go: an image, say (%(default)s)")
    parser.add_argument("--no-sysctl", action="store_true", help="apply: write the files only, with every setting")
    parser.add_argument("--force", action="store_true", help="revert: also what somebody has changed since")
    parser.add_argument("--exit-code", action="store_true", help="exit with 4 if something was changed")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    options.root = options.root.absolute()
    if not options.root.is_dir():
        parser.error(f"--root: no folder {options.root}")
    return options


def _count(text: str) -> int:
    number = int(text.replace("_", "").replace(",", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _streams(text: str) -> int:
    if (number := _count(text)) > MOST_STREAMS:
        raise argparse.ArgumentTypeError(f"at most {MOST_STREAMS:,}")
    return number


def _pid(text: str) -> int:
    if (number := _count(text)) > MOST_PID:
        raise argparse.ArgumentTypeError(f"at most {MOST_PID:,}")
    return number


def _user(text: str) -> str:
    if not USER.fullmatch(text):
        raise argparse.ArgumentTypeError("the name of a user, or of a group after @")
    return text


def _workers(text: str) -> int:
    if (number := _count(text)) > MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"at most {MOST_WORKERS}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    target, done, left, overruled, error = target_of(options), list[str](), list[str](), list[str](), ""
    try:
        _refuse_without_root(options)
        if options.action == "apply":
            apply(target, options, done)
        elif options.action == "revert":
            left = revert(options, done)
        findings = [] if options.action == "revert" else check(target, options)
        overruled = places.overruled(options.root, target, options.workers or 0) if findings else []
        notes = _notes(target, findings, options)
    except (change.ChangeError, UnitError, OSError) as failure:
        findings, notes, error = [], [], str(failure)
    if options.json:
        print(json.dumps({"action": options.action, "streams": target.streams, "workers": target.workers,
                          "proxy": target.proxy, "limits": [each.as_json() for each in findings], "done": done,
                          "left": left, "overruled": overruled, "notes": notes, "error": error}, indent=2))
    else:
        _print(target, options, findings, {"changed": done, "left": left, "undone": overruled, "note": notes})
    if error:
        print(f"limits: {error}", file=sys.stderr)
        if done:
            print("limits: what was done before can be taken back with revert", file=sys.stderr)
        return FAILED
    if left or overruled or any(each.state in (SMALL, UNDONE) for each in findings):
        return TOO_SMALL
    return CHANGED if options.exit_code and done else OK


def _refuse_without_root(options: argparse.Namespace) -> None:
    touches_system = options.root == Path("/") or not options.no_sysctl
    if options.action != "check" and touches_system and os.geteuid() != 0:
        raise change.ChangeError(f"{options.action} needs root; without it: --root DIRECTORY --no-sysctl")


def _notes(target: Target, findings: Sequence[Finding], options: argparse.Namespace) -> list[str]:
    notes = [*boot.last_words(options.root)[1], *places.service(options.root).unread] if findings else []
    if findings and addresses(target) > 1:
        notes.append(f"one address has not enough ports for so many streams: let the service listen on "
                     f"{addresses(target)} (PUSHSVC_BIND) and name each in the proxy")
    if options.action == "apply" and findings:
        notes.append("systemctl daemon-reload && systemctl restart pushsvc: then the unit has its limits")
    return notes


def _print(target: Target, options: argparse.Namespace, findings: Sequence[Finding],
           said: Mapping[str, Sequence[str]]) -> None:
    """said: further lines, by the word that they begin with."""
    if findings:
        proxy = "a proxy on this machine" if target.proxy else "no proxy on this machine"
        print(f"{target.streams:,} streams, {target.workers} workers, {proxy}, "
              f"{target.memory_bytes / 1e9:.1f} GB of memory\n")
    for each in findings:
        have = "-" if each.have is None else system.text(each.have)
        shown = have if each.state in (ENOUGH, UNDONE) else f"{have}, needs {system.text(each.need)}"
        print(f"{each.state:8}{each.limit.name:36}{shown}{f' ({each.note})' if each.note else ''}")
        if each.boot:
            print(f"        {each.boot.file}:{each.boot.line} sets it to {system.text(each.boot.value)} "
                  f"{'at boot' if each.limit.is_sysctl else 'for the unit'}: take that line out, or raise it to "
                  f"{system.text(each.need)}")
        if each.state == SMALL:
            text = f"{each.limit.why} Too small: {each.limit.without}"
            print(textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    for title, lines in said.items():
        for line in lines:
            print(f"{title:8}{line}")
    if options.action != "check" and not said["changed"] and not said["left"]:
        print("changed nothing")


if __name__ == "__main__":
    sys.exit(answered(main))
