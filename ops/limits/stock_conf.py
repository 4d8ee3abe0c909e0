"""gunicorn's configuration of the plain Flask application, on the same address."""

bind = "127.0.0.1:8000"
workers = 1
worker_connections = 1_000_000
graceful_timeout = 1
control_socket_disable = True
