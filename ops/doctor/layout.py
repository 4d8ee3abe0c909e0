"""The configuration of a proxy as a tree of directives with their lines, and which of them a stream meets. Pure.

Both languages become the same tree: a node is one directive, or one block (nginx) or section (HAProxy) and what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from wire import Target

SECTIONS = ("global", "defaults", "frontend", "backend", "listen", "cache", "userlist", "resolvers", "peers", "program")
_TOKEN = re.compile(r"""(?P<space>\s+)|(?P<comment>\#[^\n]*)|(?P<quoted>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
                    r"|(?P<mark>[;{}])|(?P<word>(?:\\.|\$\{[^}]*\}|[^\s;{}\\]|\\$)+)", re.S)


class LayoutError(Exception):
    """The file is no configuration that could be read."""


@dataclass(slots=True)
class Node:
    """words: of the directive. line: where it begins, from 1. inner: what is in its block."""

    words: list[str]
    line: int
    inner: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True, slots=True)
class Scope:
    """What a stream meets. kind: `nginx` or `haproxy`. levels: the blocks by what they are (`location`, `server`, `http`;
    `backend`, `frontend`, `defaults`), the innermost first. path: that of the
    stream."""

    kind: str
    path: str
    levels: tuple[tuple[str, Node], ...]

    def find(self, matches: Callable[[Node], bool]) -> Iterator[Node]:
        """The directives that match, those nearest to the stream first."""
        for _, level in self.levels:
            yield from (each for each in level.inner if matches(each))

    def level(self, name: str) -> Node | None:
        return next((node for each, node in self.levels if each == name), None)


def walk(node: Node) -> Iterator[Node]:
    for each in node.inner:
        yield each
        yield from walk(each)


def read(text: str, target: Target) -> Scope:
    """The scope of a stream that is asked for at `target`. Raises LayoutError."""
    if re.search(rf"^(?:{'|'.join(SECTIONS)})\b[^;{{]*$", text, re.M):
        return _haproxy_scope(haproxy(text), target)
    return _nginx_scope(nginx(text), target)


# --- nginx -----------------------------------------------------------------------------------------------


def nginx(text: str) -> Node:
    """Raises LayoutError."""
    root = Node([], 0)
    open_blocks, line = [root], 0
    words: list[str] = []
    for kind, value, at in _tokens(text):
        if kind != "mark":
            line = line if words else at
            words.append(value)
            continue
        if value == "}":
            if len(open_blocks) == 1 or words:
                raise LayoutError(f"line {at}: a }} that closes nothing")
            open_blocks.pop()
            continue
        node = Node(words, line)
        open_blocks[-1].inner.append(node)
        words = []
        if value == "{":
            open_blocks.append(node)
    if len(open_blocks) > 1 or words:
        raise LayoutError("it ends in the middle of a directive")
    return root


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, value without its quotes, line) of what is neither space nor comment."""
    place, line = 0, 1
    while place < len(text):
        matched = _TOKEN.match(text, place)
        if matched is None:
            raise LayoutError(f"line {line}: {text[place:place + 20]!r} is no directive")
        kind = str(matched.lastgroup)
        value = matched[0][1:-1] if kind == "quoted" else matched[0]
        if kind not in ("space", "comment"):
            yield kind, value, line
        line += matched[0].count("\n")
        place = matched.end()


def _nginx_scope(root: Node, target: Target) -> Scope:
    path = target.path.partition("?")[0]
    servers = [node for node in walk(root) if node.name == "server" and node.inner]
    server = max(servers, key=lambda each: _fit(each, target), default=None)
    http = next((node for node in walk(root) if node.name == "http"), root)
    if server is None:
        return Scope("nginx", path, (("http", http),))
    location = _location(server, path)
    levels = [("location", location)] if location else []
    return Scope("nginx", path, (*levels, ("server", server), ("http", http)))


def _fit(server: Node, target: Target) -> tuple[bool, bool, bool]:
    """How well a server fits: it listens on the port; it has the name; it leads somewhere."""
    listens = [each for each in server.inner if each.name == "listen" and len(each.words) > 1]
    names = [name for each in server.inner if each.name == "server_name" for name in each.words[1:]]
    leads = any(each.name == "proxy_pass" for each in walk(server))
    return any(_port(each.words[1]) == target.port for each in listens), target.host in names, leads


def _port(address: str) -> int:
    found = re.search(r"(?:^|:)(\d+)$", address)
    return int(found[1]) if found else 80


def _location(server: Node, path: str) -> Node | None:
    """The location that nginx takes for `path`: the exact one, else the first regular expression that fits unless `^~`
    stops it, else the longest prefix."""
    found = [each for each in server.inner if each.name == "location"]
    exact = [each for each in found if each.words[1:] == ["=", path]]
    prefixes = [each for each in found if _modifier(each) in ("", "^~") and path.startswith(each.words[-1])]
    longest = max(prefixes, key=lambda each: len(each.words[-1]), default=None)
    if exact or (longest and _modifier(longest) == "^~"):
        return exact[0] if exact else longest
    patterns = [each for each in found if _modifier(each) in ("~", "~*") and _matches(each, path)]
    return patterns[0] if patterns else longest


def _modifier(location: Node) -> str:
    return location.words[1] if len(location.words) == 3 else ""


def _matches(location: Node, path: str) -> bool:
    flags = re.I if _modifier(location) == "~*" else 0
    try:
        return re.search(location.words[-1], path, flags) is not None
    except re.error:  # one of PCRE's that Python has not
        return False


# --- HAProxy ---------------------------------------------------------------------------------------------


def haproxy(text: str) -> Node:
    root = Node([], 0)
    for line, raw in enumerate(text.splitlines(), 1):
        words = _haproxy_words(raw)
        if not words:
            continue
        if words[0] in SECTIONS and not raw[:1].isspace():
            root.inner.append(Node(words, line))
        elif root.inner:
            root.inner[-1].inner.append(Node(words, line))
        else:
            raise LayoutError(f"line {line}: {words[0]!r} is in no section")
    return root


def _haproxy_words(raw: str) -> list[str]:
    bare = re.sub(r"""("(?:\\.|[^"\\])*"|'[^']*'|\\.)|#.*""", lambda found: found[1] or "", raw)
    return bare.replace('"', "").replace("'", "").split()


def _haproxy_scope(root: Node, target: Target) -> Scope:
    fronts = [node for node in root.inner if node.name in ("frontend", "listen")]
    front = next((each for each in fronts if target.port in _bound(each)), fronts[0] if fronts else None)
    if front is None:
        raise LayoutError("it has no frontend")
    backs = [each for each in root.inner if each.name == "backend" and each.words[1:2] and each.words[1] in _used(front)]
    before = [each for each in root.inner if each.name == "defaults" and each.line < front.line]
    levels = [("backend", each) for each in backs or [front]] + [("frontend", front)]
    levels += [("defaults", each) for each in reversed(before)]
    levels += [("global", each) for each in root.inner if each.name == "global"]
    return Scope("haproxy", target.path.partition("?")[0], tuple(levels))


def _bound(front: Node) -> set[int]:
    binds = [each for each in front.inner if each.name == "bind" and len(each.words) > 1]
    return {_port(address) for each in binds for address in each.words[1].split(",")}


def _used(front: Node) -> set[str]:
    uses = [each.words for each in front.inner if each.name in ("default_backend", "use_backend")]
    return {words[1] for words in uses if len(words) > 1}
