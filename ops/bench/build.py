"""What is not a Python package is built or fetched into a cache directory: nothing is installed on the machine."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

SECONDS = 600.0
HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pushsvc-bench"
NCHAN_MODULE = "usr/lib/nginx/modules/ngx_nchan_module.so"


class BuildError(Exception):
    """It cannot be had here; the text says why."""


def sendloop(cache: Path) -> Path:
    """The send loop, compiled if its source is newer."""
    source, program = HERE / "sendloop.c", cache / "sendloop"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        compiler = _tool("cc")
        cache.mkdir(parents=True, exist_ok=True)
        _run([compiler, "-O2", "-Wall", "-o", str(program), str(source)], cache, "sendloop.c does not compile")
    return program


def go_program(cache: Path, name: str, module: str, package: str, version: str) -> Path:
    """A Go program of a pinned version: its module is required by an empty one, and verified against Go's checksum
    database as any other."""
    folder = cache / f"{name}-{version}"
    program = folder / name
    if not program.exists():
        go = _tool("go")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "go.mod").write_text(f"module bench/{name}\n\ngo 1.25\n\nrequire {module} {version}\n")
        _run([go, "build", "-mod=mod", "-trimpath", "-o", str(program), package], folder,
             f"{name} {version} could not be fetched and built")
    return program


def nginx_with_nchan(cache: Path) -> tuple[Path, Path]:
    """nginx and its nchan module: those of the system, or Debian's packages, unpacked into the cache."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
    if nginx and (Path("/") / NCHAN_MODULE).exists():
        return Path(nginx), Path("/") / NCHAN_MODULE
    folder = cache / "nchan"
    if not (folder / NCHAN_MODULE).exists():
        apt, dpkg = _tool("apt-get"), _tool("dpkg-deb")
        folder.mkdir(parents=True, exist_ok=True)
        _run([apt, "download", "nginx", "libnginx-mod-nchan"], folder, "Debian's packages could not be fetched")
        for package in glob.glob(str(folder / "*.deb")):
            _run([dpkg, "-x", package, str(folder)], folder, "a package could not be unpacked")
    return folder / "usr/sbin/nginx", folder / NCHAN_MODULE


def _tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise BuildError(f"there is no {name} here")
    return found


def _run(command: list[str], folder: Path, trouble: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        print(f"{trouble}: {error.stderr[-2000:]}", file=sys.stderr)
        raise BuildError(trouble) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{trouble} in {SECONDS:g} s") from error
