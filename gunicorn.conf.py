"""gunicorn's configuration, derived from Settings: no numbers of its own."""

import atexit
import gc
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gunicorn.glogging import Logger

from pushsvc import log
from pushsvc.bind import check_bind
from pushsvc.errors import PushError
from pushsvc.settings import REDIS, Settings, workers_asked

try:
    settings = Settings.from_environ(os.environ)
    _workers = workers_asked(os.environ)
except PushError as error:
    sys.exit(f"pushsvc: {error.detail}")

_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))
_MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is first imported
_METRICS = f"pushsvc-metrics-{os.getpid()}-"
if _MULTIPROC not in os.environ:
    os.environ[_MULTIPROC] = tempfile.mkdtemp(prefix=_METRICS)
    _process = os.getpid()
    # Also where the start is refused, or only tried. The workers inherit it.
    atexit.register(lambda: os.getpid() == _process and _remove_metrics())

bind = [address.strip() for address in settings.bind.split(",")]
_alone = settings.broker_url == "memory:"  # each process would have a log of its own
workers = _workers or (1 if _alone else os.cpu_count()) or 1
worker_class = "pushsvc.worker.PushWorker"
worker_connections = _hard
# Long-lived connections spread evenly: each worker has a queue of its own. A Unix socket has only one.
reuse_port = not any(address.startswith("unix:") for address in bind)
backlog = settings.backlog
keepalive = settings.keepalive_seconds
# A stream may name a thousand topics. The parser in C bounds a line of any length at 1 MiB, the one in Python would not.
limit_request_line = 0 if find_spec("gunicorn_h1c") else 8190
graceful_timeout = settings.graceful_seconds
preload_app = False  # the application belongs to its worker: threads and connections do not survive a fork
control_socket_disable = True
logconfig_dict = log.config(settings)


class logger_class(Logger):
    """gunicorn's logger, but without an access log unless one is asked for (`--access-logfile -`)."""

    def access(self, resp, req, environ, request_time):
        if self.cfg.accesslog:
            super().access(resp, req, environ, request_time)


def on_starting(server):
    """Refuse what would run, but not as meant: before there is a worker."""
    try:
        check_bind(settings, server.address)
    except PushError as error:
        sys.exit(f"pushsvc: {error.detail}")
    if _alone and server.cfg.workers > 1:
        sys.exit(f"pushsvc: the broker memory: is for one worker, not {server.cfg.workers}: each would have its own log")
    if server.cfg.workers < 1:
        sys.exit(f"pushsvc: there is at least 1 worker, not {server.cfg.workers}")
    if server.cfg.preload_app:
        sys.exit("pushsvc: preload_app does not work: the application belongs to its worker")
    for address in server.address:
        if isinstance(address, tuple) and "GUNICORN_PID" not in os.environ:
            _check_free(address)


def _check_free(address):
    """With reuse_port a second service on the same port would silently take half of the connections."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            sys.exit(f"pushsvc: cannot listen on {address[0]}:{address[1]}: {error.strerror}")


# What every worker needs and what is not ours: loaded once, before the fork, it is in memory once for all workers. None
# of it keeps a name of what gevent patches in the worker (`from socket import socket`) for a wait.
_SHARED = ("concurrent.futures.thread", "cryptography.hazmat.primitives.asymmetric", "flask", "gevent.events",
           "gevent.local", "gevent.monkey", "gevent.queue", "gevent.resolver.thread", "gevent.select", "gevent.selectors",
           "gevent.server", "gevent.signal", "gevent.ssl", "gevent.subprocess", "gevent.threading", "gevent.time",
           "gunicorn.http.wsgi", "importlib.resources.readers", "jinja2", "jwt", "prometheus_client.multiprocess",
           "sqlite3", "subprocess", "werkzeug", *(["redis"] if settings.broker_url.startswith(REDIS) else []))


def pre_fork(server, worker):
    """All that the master has loaded is shared with its workers; frozen, so that their collectors do not touch it: a
    page that is written to is a worker's own."""
    for name in _SHARED:
        import_module(name)
    gc.collect()
    gc.freeze()


def when_ready(server):
    """Say how to try it: three lines that work as pasted."""
    address = next((each for each in server.address if isinstance(each, tuple)), None)
    if address is None:
        return
    host = "127.0.0.1" if address[0] in ("", "0.0.0.0", "::") else address[0]
    url = f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.jwt_key else ""
    print(f"""
pushsvc listens on {url}

  subscribe  curl -N{token} '{url}/events?topic=hello'
  publish    curl{token} -d topic=hello -d 'data=Hello, world' {url}/publish
  resume     curl -N{token} '{url}/events?topic=hello&last_event_id=earliest'

  console    {url}/
""", flush=True)


def post_fork(server, worker):
    """A worker begins afresh: with the code as it is now, and with signals that end it until it has handlers of its own
    (the master's, which it inherits, would swallow a stop)."""
    for name in [name for name in sys.modules if name.startswith("pushsvc")]:
        del sys.modules[name]  # what the master has loaded may be older than the files: a reload brings new code
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def post_worker_init(worker):
    from pushsvc.worker import tell_problems, watch_stop

    tell_problems()
    if not hasattr(worker, "lot"):  # gunicorn's own gevent worker
        watch_stop(worker)


def child_exit(server, worker):
    from pushsvc import metrics

    metrics.forget_worker(worker.pid)


def worker_exit(server, worker):
    """In the worker, at its end. (gunicorn calls it in the master too, where nothing was loaded.)"""
    gc.unfreeze()  # what is left is then taken down in its order
    application = getattr(worker, "application", getattr(worker, "wsgi", None))
    service = getattr(application, "extensions", {}).get("pushsvc")
    if service is not None:
        service.close()


def on_exit(server):
    from pushsvc.brokers import end_life

    try:
        end_life(settings)
    except Exception as error:  # the log goes on as after a crash: nothing is lost by it
        server.log.warning("the log was not closed in order: %s", error)
    _remove_metrics()


def _remove_metrics():
    folder = Path(os.environ[_MULTIPROC])
    if folder.name.startswith(_METRICS):
        shutil.rmtree(folder, ignore_errors=True)
