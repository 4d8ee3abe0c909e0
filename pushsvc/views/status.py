"""`/healthz`, `/readyz`, `/metrics`, and the console at `/`."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from flask import Blueprint, Response

from pushsvc.brokers.base import Broker
from pushsvc.errors import BrokerUnavailable
from pushsvc.hub import Hub
from pushsvc.metrics import CONTENT_TYPE
from pushsvc.views.problems import problem

NO_STORE = {"Cache-Control": "no-store"}


def blueprint(hub: Hub, broker: Broker) -> Blueprint:
    views = Blueprint("status", __name__)
    page = files("pushsvc").joinpath("console.html").read_bytes()
    policy = _policy(page.decode())

    @views.get("/")
    def console() -> Response:
        return Response(page, content_type="text/html; charset=utf-8", headers={
            "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache"})

    @views.get("/healthz")
    def healthz() -> Response:
        return Response("ok\n", content_type="text/plain; charset=utf-8", headers=NO_STORE)

    @views.get("/readyz")
    def readyz() -> Response:
        if hub.draining:
            return problem(503, "Not ready", "this worker is stopping", NO_STORE)
        try:
            broker.check()
        except BrokerUnavailable as error:
            return problem(503, "Not ready", error.detail, NO_STORE)
        return Response("ready\n", content_type="text/plain; charset=utf-8", headers=NO_STORE)

    @views.get("/metrics")
    def metrics() -> Response:
        hub.flush()
        return Response(hub.metrics.exposition(), content_type=CONTENT_TYPE, headers=NO_STORE)

    return views


def _policy(page: str) -> str:
    """Only the page's own script and style run, and it talks to this service only (CSP level 3, hashes)."""
    scripts = [_hash(text) for text in re.findall(r"<script>(.*?)</script>", page, re.S)]
    styles = [_hash(text) for text in re.findall(r"<style>(.*?)</style>", page, re.S)]
    return (f"default-src 'none'; script-src {' '.join(scripts)}; style-src {' '.join(styles)}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
