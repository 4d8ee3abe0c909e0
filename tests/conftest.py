"""The suite runs as production does: under gevent's monkey patch."""

from gevent import monkey

monkey.patch_all()
