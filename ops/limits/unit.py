"""What a systemd unit is told in the end: the unit, its drop-ins, and the files of environment, in systemd's order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Of files of one name the first of these folders has the one that counts.
FOLDERS = tuple(f"{top}/systemd/system" for top in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"))
SECTION = "Service"
UNLIMITED = 1 << 31
SIZES = {"": 1} | {letter: 1 << 10 * power for power, letter in enumerate("KMGTPE", 1)}
NUMBER = re.compile(r"(\d+)\s*([KMGTPE]?)")
Find = Callable[[str], Path]  # where a file or folder of this name is


class UnitError(ValueError):
    """Why a file cannot be read as what it is; one line, with the file's name."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a file says under a name, and where."""

    name: str
    value: str
    file: str
    number: int


@dataclass(frozen=True, slots=True)
class Unit:
    """lines: of the section of the service, in the order in which they count. variables: all that its environment is
    told, the last one of a name counts. files: of environment. unread: which files could not be read, and why."""

    lines: tuple[Line, ...] = ()
    variables: tuple[Line, ...] = ()
    files: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def all(self, name: str) -> list[Line]:
        return _since_empty(line for line in self.lines if line.name == name)

    def last(self, name: str) -> Line | None:
        return next(reversed(self.all(name)), None)

    def variable(self, name: str) -> Line | None:
        return next((line for line in reversed(self.variables) if line.name == name), None)

    def nofile(self) -> tuple[int, Line] | None:
        """The hard limit of descriptors, UNLIMITED for none, and the line that sets it. What is no number is passed
        over, as by systemd."""
        lines = [(size(line.value.rpartition(":")[2]), line) for line in self.all("LimitNOFILE")]
        return next(((number, line) for number, line in reversed(lines) if number is not None), None)


def read(files: Iterable[str], find: Find, env: str = "") -> Unit:
    """The unit and its drop-ins, in their order. env: a file of environment instead of those that they name, "" for
    none. Raises UnitError."""
    unread: list[str] = []
    lines = tuple(line for file in files for line in _lines(file, _text(file, find, unread)))
    named = _since_empty(line for line in lines if line.name == "EnvironmentFile")
    set_here = [line for each in _since_empty(line for line in lines if line.name == "Environment")
                for line in _words(each)]
    places = [env] if env else [place for line in named for place in _matching(line.value.removeprefix("-"), find)]
    set_there = [line for file in places for line in _variables(file, _text(file, find, unread))]
    return Unit(lines, (*set_here, *set_there), tuple(places), tuple(unread))


def files_of(name: str, folders: Iterable[str], find: Find) -> list[str]:
    """The unit of this name, and its drop-ins: those for it before those for all services, then by name."""
    units = [f"{folder}/{name}" for folder in folders if find(f"{folder}/{name}").is_file()]
    return [*units[:1], *drop_ins(name, folders, find)]


def drop_ins(name: str, folders: Iterable[str], find: Find) -> list[str]:
    named: dict[str, str] = {}
    for place in (f"{folder}/{each}.d" for each in (name, "service") for folder in folders):
        for file in find(place).glob("*.conf"):
            named.setdefault(file.name, f"{place}/{file.name}")
    return [named[each] for each in sorted(named)]


def size(text: str) -> int | None:
    """A number of descriptors as systemd reads it: `64K` is 65536. None for what is none."""
    if text == "infinity":
        return UNLIMITED
    found = NUMBER.fullmatch(text.strip())
    return min(UNLIMITED, int(found[1]) * SIZES[found[2]]) if found else None


def _since_empty(lines: Iterable[Line]) -> list[Line]:
    """Those that count: an empty one takes back all before it."""
    found: list[Line] = []
    for line in lines:
        found = [*found, line] if line.value else []
    return found


def _lines(file: str, text: str) -> Iterator[Line]:
    section, begun, first = "", "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line[:1] in ("#", ";") or not (line or begun):
            continue
        first = first if begun else number
        if line.endswith("\\"):
            begun += f"{line[:-1]} "
            continue
        line, begun = f"{begun}{line}".strip(), ""
        name, equals, value = line.partition("=")
        if line.startswith("["):
            section = line.strip("[]")
        elif equals and section == SECTION:
            yield Line(name.strip(), value.strip(), file, first)


def _words(line: Line) -> Iterator[Line]:
    """Of `Environment=`: each variable."""
    try:
        words = shlex.split(line.value)
    except ValueError as error:
        raise UnitError(f"{line.file}:{line.number} cannot be read: {error}") from error
    for name, equals, value in (word.partition("=") for word in words):
        if equals:
            yield Line(name, value, line.file, line.number)


def _variables(file: str, text: str) -> Iterator[Line]:
    """Of a file of environment, one NAME=value a line."""
    for number, raw in enumerate(text.splitlines(), 1):
        name, equals, value = raw.strip().partition("=")
        if equals and name[:1] not in ("#", ";"):
            yield Line(name.strip(), _unquoted(value.strip()), file, number)


def _matching(name: str, find: Find) -> list[str]:
    """The files of environment that a name means: it may have wildcards."""
    folder, _, last = name.rpartition("/")
    if not any(sign in last for sign in "*?["):
        return [name]
    return sorted(f"{folder}/{each.name}" for each in find(folder or "/").glob(last))


def _text(file: str, find: Find, unread: list[str]) -> str:
    """What is in it; nothing for one that is not there, or that cannot be read, which is noted."""
    try:
        return find(file).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UnitError(f"{file} cannot be read: it is no UTF-8") from error
    except FileNotFoundError:
        return ""
    except OSError as error:
        unread.append(f"{file} cannot be read, so what it says is not known: {error.strerror}")
        return ""


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
