"""What to change in a proxy, as a table: for each check the directives that cause it, and the one that cures it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from layout import Node, Scope

UNITS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NGINX, HAPROXY = "nginx", "haproxy"
TITLES = {NGINX: "nginx", HAPROXY: "HAProxy"}


@dataclass(frozen=True, slots=True)
class Rule:
    """wrong: a directive that causes it, as a regular expression of its text; PATH in it is the stream's.
    right: what to write. level: the block that `right` belongs in. absent: whether its cause may be that `right` is
    missing; else only `wrong` is one. shortest: of several, the shortest time."""

    wrong: str
    right: str
    level: str
    absent: bool = False
    shortest: bool = False


@dataclass(frozen=True, slots=True)
class Cure:
    """change: what to write. line: where, 0 where that is not known. file: "" for the one that was given."""

    change: str
    line: int = 0
    file: str = ""


RULES: dict[str, dict[str, Rule]] = {
    NGINX: {
        "access": Rule(r"^proxy_set_header Authorization \S", "no `proxy_set_header Authorization …`", "location"),
        "backend_http": Rule(r"^proxy_http_version 1\.0", "proxy_http_version 1.1;", "location", absent=True),
        "buffering": Rule(r"^proxy_buffering on|^proxy_ignore_headers .*X-Accel-Buffering",
                          "proxy_buffering off;", "location", absent=True),
        "cache": Rule(r"^expires |^(add_header|proxy_hide_header) Cache-Control", "no `expires`, no `add_header "
                      "Cache-Control`, no `proxy_hide_header Cache-Control`", "location"),
        "chunked": Rule(r"^chunked_transfer_encoding off", "chunked_transfer_encoding on;", "location"),
        "compression": Rule(r"^gzip on|^gzip_types|^brotli on|^zstd on", "gzip off;", "location", absent=True),
        "content_type": Rule(r"^(add_header|proxy_hide_header) Content-Type|^default_type", "no `proxy_hide_header "
                             "Content-Type`", "location"),
        "cors": Rule(r"^(add_header|proxy_hide_header) Access-Control-|^return 40|^limit_except|^proxy_method|"
                     r"^proxy_set_header Origin", "no `add_header` and no `proxy_hide_header` of `Access-Control-…`: the "
                     "service answers", "location"),
        "errors": Rule(r"^proxy_intercept_errors on", "proxy_intercept_errors off;", "location"),
        "http_version": Rule(r"^listen (?!.*\bhttp2\b).*\bssl\b", "listen 443 ssl http2;", "server"),
        "http2_streams": Rule(r"^http2_max_concurrent_streams", "http2_max_concurrent_streams 128;", "server"),
        "idle": Rule(r"^proxy_read_timeout", "proxy_read_timeout 5m;", "location", absent=True,
                     shortest=True),
        "last_event_id": Rule(r"^proxy_set_header Last-Event-ID|^proxy_pass_request_headers off",
                              "no `proxy_set_header Last-Event-ID …`", "location"),
        "redirect": Rule(r"^return 30\d|^rewrite .* (redirect|permanent)$|^location \S*PATH/$", "no `return 30…` on the "
                         "way of a stream",
                         "server"),
        "status": Rule(r"^return [45]|^deny", "a location for the stream, with `proxy_pass`", "server"),
        "tls": Rule(r"^ssl_certificate ", "`ssl_certificate` with a certificate that holds", "server"),
        "tls_version": Rule(r"^ssl_protocols .*TLSv1(\.1)?( |$)", "ssl_protocols TLSv1.2 TLSv1.3;", "server",
                            absent=True),
        "unreachable": Rule(r"^proxy_pass", "`proxy_pass` to the address of the service", "location"),
    },
    HAPROXY: {
        "access": Rule(r"^http-request (set|add)-header Authorization", "no `http-request set-header Authorization`",
                       "frontend"),
        "accel": Rule(r"^http-response .*X-Accel-Buffering", "no `http-response del-header X-Accel-Buffering`",
                      "backend"),
        "buffering": Rule(r"^http-response wait-for-body", "no `http-response wait-for-body`", "backend"),
        "cache": Rule(r"^http-(response|after-response) .*Cache-Control", "no `http-response … Cache-Control`",
                      "backend"),
        "compression": Rule(r"^compression ", "no `compression`", "backend"),
        "content_type": Rule(r"^http-(response|after-response) .*Content-Type", "no `http-response … Content-Type`",
                             "backend"),
        "cors": Rule(r"^http-(response|after-response) .*Access-Control-|^http-request (return|deny).*OPTIONS|"
                     r"^http-request .*-header Origin", "no `http-response … Access-Control-…`: the service answers",
                     "backend"),
        "delay": Rule(r"^no option http-no-delay", "option http-no-delay", "defaults", absent=True),
        "errors": Rule(r"^http-response return|^http-error|^errorfile", "no `http-response return`, no `http-error`",
                       "backend"),
        "http_version": Rule(r"^bind (?!.*\bh2\b).*\bssl\b", "bind … ssl crt … alpn h2,http/1.1", "frontend"),
        "http2_streams": Rule(r"^tune\.h2\.(fe\.)?max-concurrent-streams", "tune.h2.max-concurrent-streams 100",
                              "global"),
        "idle": Rule(r"^timeout (server|tunnel) ", "timeout server 5m", "defaults", absent=True, shortest=True),
        "last_event_id": Rule(r"^http-request .*-header Last-Event-ID", "no `http-request del-header Last-Event-ID`",
                              "frontend"),
        "redirect": Rule(r"^(http-request )?redirect ", "no `redirect` on the way of a stream", "frontend"),
        "status": Rule(r"^http-request (return|deny)", "no `http-request return` on the way of a stream", "frontend"),
        "tls": Rule(r"^bind .*\bcrt\b", "`bind … crt` with a certificate that holds", "frontend"),
        "tls_version": Rule(r"^bind .*(ssl-min-ver (SSLv3|TLSv1\.[01])|force-tlsv1[01])|"
                            r"^ssl-default-bind-options .*ssl-min-ver (SSLv3|TLSv1\.[01])",
                            "ssl-default-bind-options ssl-min-ver TLSv1.2", "global", absent=True),
        "unreachable": Rule(r"^server ", "`server` with the address of the service", "backend"),
    },
}


def general(check: str) -> str:
    """What to change where no configuration was given; "" where it is no matter of a proxy."""
    found = [(kind, rules[check]) for kind, rules in RULES.items() if check in rules]
    return "; ".join(f"{TITLES[kind]}: {_quoted(rule.right)}{_in(rule)}" for kind, rule in found)


def cure(check: str, scope: Scope) -> Cure:
    """What to change in this configuration, and in which line."""
    rule = RULES[scope.kind].get(check)
    if rule is None:
        return Cure(general(check))
    wrong, title = _first(rule, scope), TITLES[scope.kind]
    inner = scope.level(rule.level) or next((level for name, level in scope.levels if name != "http"), None)
    if wrong is not None:
        if inner and _is_for_all(wrong, scope) and rule.level == "location" and rule.right.endswith(";"):
            return Cure(f"{title}: put {_quoted(rule.right)} after this line, against `{wrong.text}` in http", inner.line,
                        inner.file)
        return Cure(f"{title}: {_quoted(rule.right)} instead of `{wrong.text}`", wrong.line, wrong.file)
    if inner is None or not inner.line:
        return Cure(general(check))
    if not rule.absent or _has(rule.right, scope):
        return Cure(f"{general(check)}. This file has nothing that causes it: look at what is before it or behind it")
    return Cure(f"{title}: put {_quoted(rule.right)} after this line", inner.line, inner.file)


def _is_for_all(wrong: Node, scope: Scope) -> bool:
    """Whether it stands where it is meant for other servers too."""
    http = scope.level("http")
    return http is not None and any(each is wrong for each in http.inner) and scope.level("location") is not None


def _first(rule: Rule, scope: Scope) -> Node | None:
    """The cause nearest to the stream; None too if a nearer level has the cure."""
    matches = _matcher(rule.wrong, scope.path)
    if rule.shortest:
        in_force = {tuple(node.words[:-1]): node for node in reversed(list(scope.before("frontend").find(matches)))}
        shortest = min(in_force.values(), key=_seconds(scope.kind), default=None)
        return None if shortest and _is(rule.right, shortest) else shortest
    for _, level in scope.levels:
        if any(_is(rule.right, node) for node in level.inner):
            return None
        if found := next(filter(matches, level.inner), None):
            return found
    return None


def _matcher(pattern: str, path: str) -> Callable[[Node], bool]:
    compiled = re.compile(pattern.replace("PATH", re.escape(path)), re.I)
    return lambda node: compiled.search(node.text) is not None


def _has(right: str, scope: Scope) -> bool:
    return any(True for _ in scope.find(lambda node: _is(right, node)))


def _is(right: str, node: Node) -> bool:
    return node.text == right.rstrip(";")


def _seconds(kind: str) -> Callable[[Node], float]:
    """The time of a directive, its last word; what is no time is longer than any."""

    def seconds(node: Node) -> float:
        found = re.fullmatch(r"(\d+)(us|ms|s|m|h|d|)", node.words[-1])
        if found is None:
            return float("inf")
        unit = found[2] or ("ms" if kind == HAPROXY else "s")
        return int(found[1]) * UNITS[unit]

    return seconds


def _quoted(right: str) -> str:
    return right if "`" in right else f"`{right}`"


def _in(rule: Rule) -> str:
    return f" in the {rule.level}{' of the stream' if rule.level == 'location' else ''}"
