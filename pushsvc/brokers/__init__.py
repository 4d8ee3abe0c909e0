"""Brokers: the log, and the road between processes. `base` is the contract, the others keep it."""

from __future__ import annotations

from pushsvc.brokers.base import Broker
from pushsvc.settings import Settings


def open_broker(settings: Settings) -> Broker:
    """The broker that `settings.broker_url` names, not started. Raises SettingsError for an address that is none."""
    scheme, _, rest = settings.broker_url.partition(":")
    if scheme == "memory":
        from pushsvc.brokers.memory import MemoryBroker

        return MemoryBroker(settings)
    if scheme == "sqlite":
        from pushsvc.brokers.sqlite import SqliteBroker

        return SqliteBroker(rest, settings)
    from pushsvc.brokers.redis import RedisBroker

    return RedisBroker(settings)


def end_life(settings: Settings) -> None:
    """What is to be done when no process uses the log any more: see `sqlite.end_life`."""
    scheme, _, rest = settings.broker_url.partition(":")
    if scheme == "sqlite":
        from pushsvc.brokers import sqlite

        sqlite.end_life(rest, settings)
