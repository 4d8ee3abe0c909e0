"""HAProxy: its language as a tree, and the sections of it that a stream meets. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from layout import LayoutError, Node, Scope, port_of
from wire import Target

SECTIONS = ("global", "defaults", "frontend", "backend", "listen", "acme", "cache", "crt-store", "fcgi-app",
            "http-errors", "log-forward", "log-profile", "mailers", "peers", "program", "resolvers", "ring", "traces",
            "userlist")
FETCH = re.compile(r"(?:(?P<path>path)|(?:req\.)?hdr)(?:_(?P<way>\w+))?(?(path)|\(host\))")  # what is known of a request
WAYS: dict[str, Callable[[str, str], bool]] = {
    "": str.__eq__, "str": str.__eq__, "beg": str.startswith, "end": str.endswith, "sub": str.__contains__}


def is_it(text: str) -> bool:
    """Whether a configuration is HAProxy's, not nginx's."""
    return re.search(rf"^(?:{'|'.join(SECTIONS)})(?=\s|$)[^;{{]*$", text, re.M) is not None


def read(text: str, target: Target) -> Scope:
    """The scope of a stream that is asked for at `target`. Raises LayoutError."""
    return _scope(_tree(text), target)


def _tree(text: str) -> Node:
    root = Node([], 0)
    for line, raw in enumerate(text.splitlines(), 1):
        words = _words(raw)
        if not words:
            continue
        if words[0] in SECTIONS:
            root.inner.append(Node(words, line))
        elif root.inner:
            root.inner[-1].inner.append(Node(words, line))
        else:
            raise LayoutError(f"line {line}: {words[0]!r} is in no section")
    return root


def _words(raw: str) -> list[str]:
    bare = re.sub(r"""("(?:\\.|[^"\\])*"|'[^']*'|\\.)|#.*""", lambda found: found[1] or "", raw)
    return bare.replace('"', "").replace("'", "").split()


def _scope(root: Node, target: Target) -> Scope:
    """The backend's side before the frontend's; of other backends that the stream may go to, only the section."""
    fronts = [node for node in root.inner if node.name in ("frontend", "listen")]
    front = next((each for each in fronts if target.port in _bound(each)), fronts[0] if fronts else None)
    if front is None:
        raise LayoutError("it has no frontend")
    by_name = {each.words[1]: each for each in root.inner if each.name in ("backend", "listen") and each.words[1:]}
    backs = [by_name[name] for name in _used(front, target) if name in by_name] or [front]
    levels = [("backend", backs[0]), *(("defaults", each) for each in _defaults(root, backs[0]))]
    levels += [("backend", each) for each in backs[1:]] + [("frontend", front)]
    levels += [("defaults", each) for each in _defaults(root, front)]
    levels += [("global", each) for each in root.inner if each.name == "global"]
    return Scope("haproxy", target.path.partition("?")[0], tuple(levels))


def _bound(front: Node) -> set[int]:
    binds = [each for each in front.inner if each.name == "bind" and len(each.words) > 1]
    return {port_of(address) for each in binds for address in each.words[1].split(",")}


def _defaults(root: Node, section: Node) -> Iterator[Node]:
    """Those that a section takes over: the one that it names with `from`, else for a proxy the last before it. Each
    starts anew, but for what it takes over itself."""
    before = [each for each in root.inner if each.name == "defaults" and each.line < section.line]
    if "from" in section.words:
        name = section.words[section.words.index("from") + 1:][:1]
        before = [each for each in before if each.words[1:2] == name]
    elif section.name == "defaults":
        return
    if before:
        yield before[-1]
        yield from _defaults(root, before[-1])


def _used(front: Node, target: Target) -> Iterator[str]:
    """The names of the backends that a stream goes to, the likeliest first: the first whose condition holds, else the
    default one; then those of which that is not known."""
    unknown = []
    own = front.words[1:2] if front.name == "listen" else []
    default = [each.words[1] for each in front.inner if each.name == "default_backend" and each.words[1:]][-1:] or own
    for use in (each.words for each in front.inner if each.name == "use_backend" and each.words[1:]):
        holds = _holds(use[2:], front, target)
        if holds:
            default = use[1:2]
            break
        if holds is None:
            unknown.append(use[1])
    yield from default
    yield from unknown


def _holds(words: list[str], front: Node, target: Target) -> bool | None:
    """Whether a condition (`if …`, `unless …`) holds; None where that is not known."""
    if not words:
        return True
    found = _any(_all(group, front, target) for group in _split(words[1:], ("||", "or")))
    return found if words[0] == "if" or found is None else not found


def _split(words: list[str], marks: tuple[str, ...]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for word in words:
        if word in marks:
            groups.append([])
        else:
            groups[-1].append(word)
    return groups


def _all(words: list[str], front: Node, target: Target) -> bool | None:
    """Terms one behind the other: each the name of an `acl`, or one in braces, with `!` before it for its contrary."""
    found: list[bool | None] = []
    inverted, rest = False, list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("!"):
            inverted, word = not inverted, word[1:]
        if not word:
            continue
        if word == "{":
            end = rest.index("}") if "}" in rest else len(rest)
            holds, rest = _test(rest[:end], target), rest[end + 1:]
        else:
            lines = [each.words[2:] for each in front.inner if each.words[:2] == ["acl", word]]
            holds = _any(_test(line, target) for line in lines) if lines else None
        found.append(holds if holds is None else holds is not inverted)
        inverted = False
    return False if False in found else None if None in found else True


def _any(found: Iterable[bool | None]) -> bool | None:
    several = [*found]
    return True if True in several else None if None in several else False


def _test(words: list[str], target: Target) -> bool | None:
    """A test of what is known of a request: `path_beg /a /b`, `path -i -m beg /a`."""
    fetch, values = FETCH.fullmatch(words[0] if words else ""), list(words[1:])
    way, fold = (fetch["way"] or "") if fetch else "", False
    while values and values[0].startswith("-"):
        flag = values.pop(0)
        fold = fold or flag == "-i"
        if flag == "-m" and values:
            way = values.pop(0)
        elif flag == "--":
            break
        elif flag != "-i":
            return None
    if fetch is None or way not in WAYS:
        return None
    asked, holds = target.path.partition("?")[0] if fetch["path"] else target.netloc, WAYS[way]
    return any(holds(asked.lower(), each.lower()) if fold else holds(asked, each) for each in values)
