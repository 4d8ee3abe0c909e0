"""One try of the broker, in a process of its own: it needs the monkey patch, and the rights of the service's user.

Run with the service's environment; prints why the broker cannot be used, nothing if it can.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

from pushsvc.brokers import open_broker  # noqa: E402
from pushsvc.brokers.base import Broker  # noqa: E402
from pushsvc.errors import PushError  # noqa: E402
from pushsvc.settings import Settings  # noqa: E402

SECONDS = 10


def main() -> int:
    gevent.get_hub()  # this and the broker are made while all that they import can be read
    try:
        broker = open_broker(Settings.from_environ(os.environ))
        if len(sys.argv) > 1:
            become_owner(Path(sys.argv[1]))
        with gevent.Timeout(SECONDS, TimeoutError(f"no answer in {SECONDS} s")):
            use(broker)
    except (PushError, OSError) as error:
        print(getattr(error, "detail", error))
    return 0


def become_owner(path: Path) -> None:
    """Root leaves no files behind that the service's user could not use."""
    status = path.stat()
    if os.geteuid() == 0 and status.st_uid != 0:
        os.setgroups([])
        os.setgid(status.st_gid)
        os.setuid(status.st_uid)


def use(broker: Broker) -> None:
    """Raises BrokerUnavailable. Switches."""
    broker.start(lambda events: None, lambda position, since=None: None)
    try:
        broker.check()
    finally:
        broker.close()


if __name__ == "__main__":
    sys.exit(main())
