"""What an argument of the command line may be. Each raises ArgumentTypeError: what is wanted, and what came."""

from __future__ import annotations

import math
import socket
from argparse import ArgumentTypeError
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path


def number(wanted: str, is_good: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number for which this holds. wanted: in words."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not is_good(value):
            raise ArgumentTypeError(f"{wanted} is wanted, not {text!r}")
        return value

    return parse


def whole(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"a whole number of at least {least} is wanted, not {text!r}")
        return value

    return parse


positive = number("a number from 1e-9 to 1e9", lambda value: 1e-9 <= value <= 1e9)
not_negative = number("a number from 0 to 1e9", lambda value: 0 <= value <= 1e9)
percent = number("a list of numbers above 0 and up to 100", lambda value: 0 < value <= 100)
pid = whole(1)


def percents(text: str) -> list[float]:
    return [percent(each) for each in text.split(",")]


def pids(text: str) -> list[int]:
    """Processes of this machine, separated by commas."""
    found = [pid(each) for each in text.split(",")] if text else []
    for each in found:
        if not Path(f"/proc/{each}").exists():
            raise ArgumentTypeError(f"there is no process {each} on this machine")
    return found


def setting(text: str) -> tuple[str, str]:
    """Name and value."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentTypeError(f"NAME=VALUE is wanted, not {text!r}")
    return name, value


def source_addresses(text: str) -> str:
    """IPv4 addresses of this machine, separated by commas."""
    for address in text.split(",") if text else ():
        try:
            with socket.socket() as candidate:
                candidate.bind((str(IPv4Address(address)), 0))
        except AddressValueError:
            raise ArgumentTypeError(f"IPv4 addresses, separated by commas, are wanted, not {address!r}") from None
        except OSError as error:
            raise ArgumentTypeError(f"{address} is no address of this machine: {error.strerror}") from None
    return text
