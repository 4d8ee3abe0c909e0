"""One try of the broker, in a process of its own: it needs the monkey patch, and the rights of the service's user.

Run with the service's environment, as `python trial.py [FOLDER [UID GID GROUP...]]`: with the rights of FOLDER's owner,
or with these. Prints why the broker cannot be used, nothing if it can.
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
            become_user(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
        with gevent.Timeout(SECONDS, TimeoutError(f"no answer in {SECONDS} s")):
            use(broker)
    except (PushError, OSError) as error:
        print(getattr(error, "detail", error))
    return 0


def become_user(folder: Path, rights: list[int]) -> None:
    """Root leaves no files behind that the service's user could not use, and is refused nothing that it would be."""
    status = folder.stat()
    uid, gid, *groups = rights or [status.st_uid, status.st_gid]
    if os.geteuid() == 0 and uid != 0:
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)


def use(broker: Broker) -> None:
    """Raises BrokerUnavailable. Switches."""
    broker.start(lambda events: None, lambda position, since=None: None)
    try:
        broker.check()
    finally:
        broker.close()


if __name__ == "__main__":
    sys.exit(main())
