"""What the doctor says: findings, notes and facts, as text or as JSON. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

WIDTH = 110
FIELDS = ("breaks", "change", "where")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change. check: its name, stable for programs. seen: what was seen. breaks: what that breaks.
    change: what to write instead. file, line: where; "" and 0 where that is not known or not in a file."""

    check: str
    seen: str
    breaks: str
    change: str
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(slots=True)
class Report:
    """findings: what to change. failed: parts that could not be examined, and why. notes: single things that could not.
    facts: what was measured, by name."""

    findings: list[Finding] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings.extend(findings)

    def merge(self, other: Report) -> None:
        self.findings += other.findings
        self.failed += other.failed
        self.notes += other.notes
        self.facts |= other.facts

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        facts = [_wrap(f"{name}: ", str(value)) for name, value in self.facts.items()]
        notes = [_wrap("not examined: ", note) for note in [*self.failed, *self.notes]]
        numbered = [_show(number, finding) for number, finding in enumerate(self.findings, 1)]
        count = len(self.findings)
        verdict = f"{count} finding{'s' * (count > 1)}" if count else "nothing to change" * (not self.failed)
        return "\n".join([*facts, *notes, *([""] if facts or notes else []), *numbered, verdict])


def _show(number: int, finding: Finding) -> str:
    parts = [(name, getattr(finding, name)) for name in FIELDS]
    lines = [_wrap(f"{number}. {finding.check}: ", finding.seen)]
    lines += [_wrap(f"   {name:8} ", value) for name, value in parts if value]
    return "\n".join([*lines, ""])


def _wrap(start: str, text: str) -> str:
    indent = " " * (12 if start.startswith("   ") else 3)
    return textwrap.fill(start + text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
