"""Where the service listens, and whether that is open to more than this machine. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from pushsvc.errors import SettingsError
from pushsvc.settings import Settings

MOST_ADDRESSES = 4096  # remembered; where the service is open to loopback only, or to proxies, they are few
MOST_PORT = 65_535


@lru_cache(MOST_ADDRESSES)
def is_loopback(address: str) -> bool:
    """Whether an address (or a listening host) can be reached from this machine only."""
    if address == "127.0.0.1":
        return True
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address == "localhost"
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def check_bind(settings: Settings, addresses: Sequence[object]) -> None:
    """Raises SettingsError if the service would be open to more than this machine without anybody having said so, or
    could not be found: of port 0 the kernel makes another one for each worker.

    addresses: as gunicorn has them: (host, port, …), or a path for a Unix socket, which a proxy may open to all.
    """
    for address in addresses:
        if isinstance(address, tuple) and not 1 <= address[1] <= MOST_PORT:
            raise SettingsError(f"a port is 1 to {MOST_PORT}, not {address[1]}: PUSHSVC_BIND")
    if settings.jwt_key or settings.auth == "none":
        return
    for address in addresses:
        if not (isinstance(address, tuple) and is_loopback(str(address[0]))):
            raise SettingsError(f"bound to {address}, which is not loopback: set PUSHSVC_JWT_KEY so that clients need a "
                                "token, or PUSHSVC_AUTH=none if something else guards the service")
