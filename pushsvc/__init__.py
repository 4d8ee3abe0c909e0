"""pushsvc: a push server over server-sent events, from an ordinary Flask application."""

__version__ = "0.1.0"
