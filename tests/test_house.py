"""The house: imports go down only, the ground floor is pure, and no module stands outside."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT

PACKAGE = "pushsvc"

FLOORS = [
    {"errors", "settings", "position", "event", "draft", "sse", "bind", "wheel", "crowd"},
    {"mailbox", "auth", "metrics", "log", "memory", "presence", "recorder"},
    {"brokers.*"},
    {"bundle", "subscription", "hub", "publisher"},
    {"stream", "worker", "listener", "parking", "express"},
    {"views.*"},
]
# What reaches outside of its arguments: the clock, chance, the environment, the disk, the net, the scheduler.
IMPURE = {
    "asyncio", "flask", "gevent", "greenlet", "gunicorn", "http", "io", "logging", "multiprocessing", "os", "pathlib",
    "prometheus_client", "random", "resource", "secrets", "select", "shutil", "signal", "socket", "sqlite3", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time", "uuid", "werkzeug",
}  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts) for path in (ROOT / PACKAGE).rglob("*.py")
)


def floor(module: str) -> int | None:
    """The number of a module's floor; None if it stands nowhere."""
    for number, names in enumerate(FLOORS):
        if module in names or f"{module.partition('.')[0]}.*" in names:
            return number
    return None


def is_package_front(module: str) -> bool:
    """Whether it is the `__init__` of the whole, which is empty and below everything."""
    return module == "__init__"


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that a module imports, wherever in it; relative names are made whole."""
    path = ROOT / PACKAGE / Path(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE, *module.split(".")][: -node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{whole}.{each.name}") for each in node.names)


def own(name: str) -> str | None:
    """The module of ours that an imported name is, or is in; None for those of others."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in (len(parts), len(parts) - 1):
        for module in (".".join(parts[1:end]), ".".join([*parts[1:end], "__init__"])):
            if module in MODULES:
                return module
    return "__init__"


def neighbours(module: str) -> list[tuple[int, str]]:
    return [(line, found) for line, name in imports(module) if (found := own(name)) and not is_package_front(found)]


def test_test_sees_the_modules_and_their_imports() -> None:
    assert {"errors", "hub", "brokers.base", "brokers.__init__", "views.events"} <= set(MODULES)
    assert "brokers.base" in {found for _, found in neighbours("stream")}
    assert "hub" in {found for _, found in neighbours("stream")}, "`from pushsvc import hub` was not seen"
    assert "brokers.sqlite" in {found for _, found in neighbours("brokers.__init__")}, "a late import was not seen"


@pytest.mark.parametrize("module", MODULES)
def test_module_stands_on_a_floor(module: str) -> None:
    assert is_package_front(module) or floor(module) is not None, "add it to FLOORS and to ARCHITECTURE.md"


@pytest.mark.parametrize("module", [each for each in MODULES if not is_package_front(each)])
def test_module_imports_from_its_own_floor_or_below(module: str) -> None:
    mine = floor(module)
    assert mine is not None
    upwards = [f"line {line}: {found}" for line, found in neighbours(module) if (floor(found) or 0) > mine]
    assert not upwards


@pytest.mark.parametrize("module", sorted(set(MODULES) & FLOORS[0]))
def test_ground_floor_is_pure(module: str) -> None:
    impure = [f"line {line}: {name}" for line, name in imports(module) if name.partition(".")[0] in IMPURE]
    assert not impure


@pytest.mark.parametrize("module", [each for each in MODULES if each.startswith("brokers.")])
def test_broker_never_imports_the_hub(module: str) -> None:
    assert {found for _, found in neighbours(module)} & {"hub", "stream", "subscription", "bundle", "worker"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_worker_and_the_views_know_their_server_and_framework(module: str) -> None:
    known = {name.partition(".")[0] for _, name in imports(module)}
    assert "gunicorn" not in known or floor(module) == 4
    assert "flask" not in known or floor(module) == 5


def test_front_of_the_package_imports_nothing() -> None:
    assert list(imports("__init__")) == []


def test_the_package_is_installed_with_all_that_the_publisher_needs() -> None:
    """Other applications install it, for the publisher."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["build-backend"] == "flit_core.buildapi"
    assert (ROOT / project["project"]["name"]).samefile(ROOT / PACKAGE), "flit takes the folder of this name"
    needed, waiting = set(), ["publisher"]
    while waiting:
        needed.add(module := waiting.pop())
        waiting += {found for _, found in neighbours(module)} - needed
    names = {name.partition(".")[0] for module in needed for _, name in imports(module)}
    others = names - sys.stdlib_module_names - {PACKAGE}
    assert others == {each.partition(">")[0] for each in project["project"]["dependencies"]}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a floor modules may lean on each other, but not in a circle."""
    below = {module: {found for _, found in neighbours(module)} - {module} for module in MODULES}
    while free := [module for module, needs in below.items() if not needs & below.keys()]:
        for module in free:
            del below[module]
    assert not below
