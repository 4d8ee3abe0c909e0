"""The query string and forms: UTF-8 or an error, never replaced characters; unknown and repeated fields are refused."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import unquote_to_bytes

from pushsvc.errors import BadRequest


def parse_pairs(text: bytes, where: str) -> list[tuple[str, str]]:
    """The fields of `application/x-www-form-urlencoded` (WHATWG URL, section 5.1), in order. Raises BadRequest."""
    pairs = []
    for part in text.split(b"&"):
        if part:
            name, _, value = part.partition(b"=")
            try:
                pairs.append((_decode(name), _decode(value)))
            except UnicodeDecodeError:
                raise BadRequest(f"{where} is not UTF-8") from None
    return pairs


def single(pairs: list[tuple[str, str]], where: str, lists: Collection[str] = ()) -> dict[str, str]:
    """Fields by name, but for `lists`, which may be repeated. Raises BadRequest for any other that is."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in lists:
            continue
        if name in found:
            raise BadRequest(f"{where} repeats the field {name[:100]!r}")
        found[name] = value
    return found


def _decode(part: bytes) -> str:
    if b"+" in part:
        part = part.replace(b"+", b" ")
    if b"%" in part:
        part = unquote_to_bytes(part)
    return part.decode()
