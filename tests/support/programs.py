"""Programs that a test needs and that a machine may not have."""

import os
import shutil
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """A run by hand may do without these programs; an unattended one must not pass without these tests."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str) -> str:
    """The path of a program, also of one that only root has in its path."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin:/usr/local/sbin")
    if found is None:
        missing(f"{name} is not installed")
    return found
