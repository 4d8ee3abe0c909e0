"""nginx: its language as a tree, and the blocks of it that a stream meets. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from layout import LayoutError, Node, Scope, port_of, walk
from wire import Target

MODIFIERS = ("=", "^~", "~*", "~")  # of a location, which may stick to what they modify
_TOKEN = re.compile(r"""(?P<space>\s+)|(?P<comment>\#[^\n]*)|(?P<quoted>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
                    r"|(?P<mark>[;{}])|(?P<word>(?:\\.|\$\{[^}]*\}|[^\s;{}\\]|\\$)+)", re.S)
Follow = Callable[[Node], Sequence[Node]]  # what stands in the place of an `include`


def read(text: str, target: Target) -> Scope:
    """The scope of a stream that is asked for at `target`, by this file alone. Raises LayoutError."""
    return scope(tree(text), target)


def tree(text: str, file: str = "", follow: Follow | None = None) -> Node:
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
        node = Node(_apart(words), line, file=file)
        open_blocks[-1].inner += follow(node) if follow and node.name == "include" else [node]
        words = []
        if value == "{":
            open_blocks.append(node)
    if len(open_blocks) > 1 or words:
        raise LayoutError("it ends in the middle of a directive")
    return root


def _apart(words: list[str]) -> list[str]:
    """A location's modifier is a word of its own."""
    if words[:1] != ["location"] or len(words) != 2:
        return words
    sign = next((each for each in MODIFIERS if words[1].startswith(each)), "")
    return ["location", sign, words[1].removeprefix(sign)] if sign else words


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


def scope(root: Node, target: Target, gaps: Sequence[str] = ()) -> Scope:
    """gaps: what is known to be missing in the tree."""
    path = target.path.partition("?")[0]
    http = next((node for node in walk(root) if node.name == "http"), root)
    if http is root:
        gaps = [*gaps, "what stands around this part of nginx's configuration: give its main file, nginx.conf"]
    server = _server([node for node in walk(root) if node.name == "server" and node.inner], target)
    if server is None:
        gaps = [*gaps, "nginx's server for this address: it is not in the configuration that was given"]
    locations, _ = _locations(server or root, path)
    levels = [*(("location", each) for each in locations), *([("server", server)] if server else []), ("http", http)]
    return Scope("nginx", path, tuple(levels), tuple(gaps))


def _server(servers: Sequence[Node], target: Target) -> Node | None:
    """The server that nginx takes: of those that listen on the port the one whose name fits best, else the default one,
    else the first. Where none listens there, a port is passed on to another: then one that leads somewhere."""
    here = [each for each in servers if target.port in _ports(each)]
    leading = [each for each in servers if any(inner.name == "proxy_pass" for inner in walk(each))]
    ranked = here or leading or servers
    return max(ranked, key=lambda each: (_named(each, target.host.lower()), _is_default(each, target.port)), default=None)


def _ports(server: Node) -> set[int]:
    listens = [each.words[1] for each in _inner(server, "listen") if len(each.words) > 1]
    return {port_of(address) for address in listens} or {80}


def _is_default(server: Node, port: int) -> bool:
    listens = [each.words for each in _inner(server, "listen") if len(each.words) > 1]
    return any({"default_server", "default"} & {*words[2:]} and port_of(words[1]) == port for words in listens)


def _named(server: Node, host: str) -> tuple[int, int]:
    """How well its names fit: exactly, by the longest `*.` before, the longest `.*` behind, a regular expression."""
    names = [name for each in _inner(server, "server_name") for name in each.words[1:]]
    return max((_fit(name.lower() if name[:1] != "~" else name, host) for name in names), default=(0, 0))


def _fit(name: str, host: str) -> tuple[int, int]:
    if host == name.removeprefix("."):
        return 4, 0
    if name[:1] in (".", "*") and host.endswith(name.removeprefix("*")):
        return 3, len(name)
    if name.endswith(".*") and host.startswith(name[:-1]):
        return 2, len(name)
    return int(name[:1] == "~" and _matches(name[1:], host, re.I)), 0


def _locations(block: Node, path: str) -> tuple[list[Node], bool]:
    """The locations that nginx takes for `path`, the innermost first, and whether that is final: the exact one, else the
    first regular expression that fits unless `^~` stops it, else the longest prefix; and so on within it."""
    found = _inner(block, "location")
    if exact := [each for each in found if each.words[1:] == ["=", path]]:
        return exact[:1], True
    prefixes = [each for each in found if _modifier(each) in ("", "^~") and path.startswith(each.words[-1])]
    longest = max(prefixes, key=lambda each: len(each.words[-1]), default=None)
    within, final = _locations(longest, path) if longest else ([], False)
    chain = [*within, longest] if longest else []
    if final or (longest and _modifier(longest) == "^~"):
        return chain, final
    for each in found:
        if _modifier(each) in ("~", "~*") and _matches(each.words[-1], path, re.I * (_modifier(each) == "~*")):
            return [*_locations(each, path)[0], each], True
    return chain, False


def _inner(block: Node, name: str) -> list[Node]:
    return [each for each in block.inner if each.name == name]


def _modifier(location: Node) -> str:
    return location.words[1] if len(location.words) == 3 else ""


def _matches(pattern: str, text: str, flags: int) -> bool:
    try:
        return re.search(re.sub(r"\(\?<(?=\w)", "(?P<", pattern), text, flags) is not None
    except re.error:  # one of PCRE's that Python has not
        return False
