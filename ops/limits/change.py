"""Changes that can be taken back: each is noted in the state file before it is made."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import system
from needs import Need
from rooted import follow

VERSION = 1
KEPT: dict[str, type] = {"sysctls": dict, "files": dict, "folders": list, "written": dict}  # in the file of the state
Say = Callable[[str], None]


class ChangeError(Exception):
    """Something could not be done; the text says what. What was done before is in the state file."""


@dataclass(slots=True)
class State:
    """What was changed below `root`, as it was before and as it was set. path: of the state file; it names files and
    folders as they are below the root, which may be elsewhere the next time. written: what the file of sysctls holds.
    Saved anew with each change, so that it never knows less than what was done."""

    root: Path
    path: Path
    sysctls: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    written: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path, name: Path) -> State:
        """The state in the file of this name below `root`; an empty one where there is none. Raises ChangeError."""
        path = follow(root, name, last=False)
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(root, path)
        except (OSError, ValueError) as error:
            raise ChangeError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ChangeError(f"{path} is no state")
        if found.pop("version", None) != VERSION:
            raise ChangeError(f"{path} is of another version")
        if not _is_state(found):
            raise ChangeError(f"{path} is no state")
        state = cls(root, path, **found)
        state.files = {state._below(name): noted for name, noted in state.files.items()}
        return state

    def _below(self, name: str) -> str:
        """As the root's own name of it; states of before had whole paths. Raises ChangeError for one of another root."""
        try:
            return str(self.root.joinpath(name).relative_to(self.root))
        except ValueError as error:
            raise ChangeError(f"{self.path} is of another root: it notes {name}") from error

    def place(self, name: Path | str) -> Path:
        """Where a file or folder of the root is: below it, wherever a folder is a link to."""
        return follow(self.root, name, last=False)

    def make(self, folder: Path) -> None:
        """A folder, with those above it. Each is noted first: at the end it goes again."""
        missing = _missing(folder)
        self.folders += [str(each.relative_to(self.root)) for each in missing]
        if missing and folder != self.path.parent:
            self.save()
        for each in missing:
            each.mkdir()

    def save(self) -> None:
        self.make(self.path.parent)
        try:
            replace(self.path, json.dumps({"version": VERSION} | {name: getattr(self, name) for name in KEPT}).encode())
        except OSError:
            if not self.path.exists():
                self.remove_folders()  # nobody would know of them
            raise

    def remove_folders(self) -> None:
        """Those that were made, and that nobody has put something into."""
        for folder in sorted(self.folders, key=len, reverse=True):
            with suppress(OSError):
                self.place(folder).rmdir()

    def is_empty(self) -> bool:
        return not (self.sysctls or self.files)


def _is_state(found: dict[str, Any]) -> bool:
    """Whether it has what `save` writes."""
    sysctls, files, folders, written = (found.get(name, kind()) for name, kind in KEPT.items())
    return (found.keys() <= KEPT.keys() and all(isinstance(found[name], KEPT[name]) for name in found)
            and all(isinstance(noted, dict) and {"was", "set"} <= noted.keys() and all(map(_is_need, noted.values()))
                    for noted in sysctls.values())
            and all(isinstance(noted, dict) and _is_file(noted) for noted in files.values())
            and all(isinstance(folder, str) for folder in folders) and all(map(_is_need, written.values())))


def _is_need(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def _is_pair(value: Any) -> bool:
    return _is_need(value) and len(value) == 2


def _is_file(noted: dict[str, Any]) -> bool:
    """A link has its `link` and a file that was there its `mode`; both have their `owner`."""
    there = noted.get("was") is not None or "link" in noted
    with suppress(KeyError, TypeError, ValueError):
        _bytes(noted["set"]), _bytes(noted["was"])
        return (isinstance(noted["set"], str) and isinstance(noted.get("link", ""), str)
                and isinstance(noted["mode"] if noted["was"] is not None else 0, int)
                and (not there or (_is_pair(noted["owner"]) and _is_pair(noted.get("times", [0, 0])))))
    return False


def raise_sysctl(state: State, name: str, was: Need, value: Need, say: Say) -> None:
    """Set a sysctl. Raises ChangeError."""
    noted = state.sysctls.setdefault(name, {"was": list(was)})
    noted["set"] = list(value)
    state.save()
    try:
        system.write(name, value)
    except OSError as error:
        raise ChangeError(f"{name} cannot be set to {system.text(value)}: {error.strerror}") from error
    say(f"{name}: {system.text(was)} -> {system.text(value)}")


def put_files(state: State, contents: Mapping[Path, bytes], say: Say) -> int:
    """Write those that differ; how many. Raises ChangeError, also for one that somebody has edited since."""
    count = 0
    for path, content in contents.items():
        full = state.place(path)
        now = full.read_bytes() if full.exists() else None
        if now == content:
            continue
        noted = state.files.get(str(path))
        if noted and now not in (None, _bytes(noted["set"])) and not _is_as_before(full, noted):
            raise ChangeError(f"{full} was edited since it was written: take the edit out, or `revert --force`")
        link = f" in the place of a link to {full.readlink()}" if full.is_symlink() else ""
        _put(state, path, content)
        say(f"{full}: {'written' if now is None else 'written anew'}{link}")
        count += 1
    return count


def _put(state: State, name: Path, content: bytes) -> None:
    path = state.place(name)
    state.files.setdefault(str(name), _as_before(path))["set"] = _text(content)
    state.save()
    try:
        state.make(path.parent)
        replace(path, content)
    except OSError as error:
        raise ChangeError(f"{path} cannot be written: {error.strerror}") from error


def _as_before(path: Path) -> dict[str, Any]:
    """What _restore needs of it. Of a link it is the link: what it leads to may be another's, and is never touched."""
    if path.is_symlink():
        status = path.lstat()
        return {"was": None, "link": str(path.readlink())} | _of_file(status)
    if not path.exists():
        return {"was": None}
    status = path.stat()
    return {"was": _text(path.read_bytes()), "mode": status.st_mode & 0o7777} | _of_file(status)


def _of_file(status: os.stat_result) -> dict[str, list[int]]:
    """times: of the last use and the last change, in nanoseconds."""
    return {"owner": [status.st_uid, status.st_gid], "times": [status.st_atime_ns, status.st_mtime_ns]}


def _is_as_before(path: Path, noted: Mapping[str, Any]) -> bool:
    if path.is_symlink() or "link" in noted:
        return path.is_symlink() and str(path.readlink()) == noted.get("link")
    return (path.read_bytes() if path.exists() else None) == _bytes(noted["was"])


def revert(state: State, force: bool, say: Say) -> list[str]:
    """Take all back, and the state file too; what is left, because somebody has changed it since. Raises ChangeError."""
    left = [*_revert_sysctls(state, force, say), *_revert_files(state, force, say)]
    state.save()
    if state.is_empty():
        state.path.unlink()
        state.remove_folders()
    return left


def _revert_sysctls(state: State, force: bool, say: Say) -> Iterator[str]:
    for name, noted in list(state.sysctls.items()):
        was, now = tuple(noted["was"]), system.have(name)
        if now not in (was, tuple(noted["set"])) and not force:
            yield (f"{name} is not here now, so that {system.text(was)} is not put back" if now is None else
                   f"{name} is {system.text(now)}, which is not what was set: left as it is")
            continue
        if now not in (was, None):
            try:
                system.write(name, was)
            except OSError as error:
                raise ChangeError(f"{name} cannot be set back to {system.text(was)}: {error.strerror}") from error
            say(f"{name}: {system.text(now or ())} -> {system.text(was)}")
        del state.sysctls[name]
        state.save()


def _revert_files(state: State, force: bool, say: Say) -> Iterator[str]:
    for name, noted in list(state.files.items()):
        path = state.place(name)
        is_before = _is_as_before(path, noted)
        is_ours = path.is_file() and not path.is_symlink() and path.read_bytes() == _bytes(noted["set"])
        if not is_before and not is_ours and not force:
            yield f"{path} was edited since it was written: left as it is"
            continue
        if not is_before:
            _restore(path, _bytes(noted["was"]), noted)
            say(f"{path}: {'removed' if noted['was'] is None and 'link' not in noted else 'as it was'}")
        del state.files[name]
        state.save()


def _restore(path: Path, was: bytes | None, noted: dict[str, Any]) -> None:
    try:
        if "link" in noted:
            new = _beside(path)
            new.unlink(missing_ok=True)
            new.symlink_to(noted["link"])
            os.chown(new, *noted["owner"], follow_symlinks=False)
            _set_times(new, noted)
            new.rename(path)
        elif was is None:
            path.unlink()
        else:
            replace(path, was, noted["mode"])
            os.chown(path, *noted["owner"])
            _set_times(path, noted)
    except OSError as error:
        raise ChangeError(f"{path} cannot be put back: {error.strerror}") from error


def _set_times(path: Path, noted: Mapping[str, Any]) -> None:
    if "times" in noted:  # a state of before has none
        used, changed = noted["times"]
        os.utime(path, ns=(used, changed), follow_symlinks=False)


def replace(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all. Raises OSError."""
    new = _beside(path)
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(mode)
        new.rename(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    return missing


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
