"""What is wrong with the parts of a broker: each trouble is logged once when it begins and once when it is over,
however often it strikes in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

CALM_SECONDS = 5.0  # without a failure: then a trouble is over; a full disk may let every other write pass
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Case:
    error: Exception
    struck_at: float
    lasts: bool = True
    told: bool = False


class Trouble:
    """`note` is called by the parts, from any thread; `tell` by a greenlet, for native threads may not log.

    expected: kinds of errors that say all by their message; others are logged with their trace.
    """

    def __init__(self, clock: Callable[[], float], expected: tuple[type[Exception], ...]) -> None:
        self._clock = clock
        self._expected = expected
        self._cases: dict[str, _Case] = {}

    def note(self, part: str, error: Exception | None) -> None:
        """`part` has failed with `error`, or works (None). Never waits."""
        case = self._cases.get(part)
        if error is None:
            if case is not None:
                case.lasts = False
        elif case is None:
            self._cases[part] = _Case(error, self._clock())
        else:
            case.error, case.struck_at, case.lasts = error, self._clock(), True

    def of(self, part: str) -> Exception | None:
        """What `part` failed with the last time, or None if it has worked since."""
        case = self._cases.get(part)
        return case.error if case is not None and case.lasts else None

    def tell(self) -> None:
        """Log what is new."""
        for part, case in list(self._cases.items()):
            if not case.told:
                case.told = True
                trace = None if isinstance(case.error, self._expected) else case.error
                logger.error("broker failing", extra={"part": part, "reason": str(case.error)}, exc_info=trace)
            elif not case.lasts and self._clock() - case.struck_at > CALM_SECONDS:
                del self._cases[part]
                logger.info("broker recovered", extra={"part": part})
