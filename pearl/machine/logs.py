"""Where the sentences go that this package logs.

Modules log to `logging.getLogger("pearl...")` and set nothing up: a program that imports them decides, and one that
does not sees warnings on standard error. Programs of ours write lines there that begin with `pearl:`.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable

LEVELS = ("debug", "info", "warning", "error")


class _Lines(logging.StreamHandler):
    """To what standard error is when a line is written: a bar of progress, or a test, may have replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("pearl: %(message)s"))

    @property
    def stream(self):  # type: ignore[override]
        return sys.stderr


def write_lines(level: int = logging.INFO) -> Callable[[], None]:
    """Of a program of ours: what is logged from now on is written. Returns what takes that back."""
    logger, lines = logging.getLogger("pearl"), _Lines()
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(level)

    def undo() -> None:
        logger.removeHandler(lines)
        logger.setLevel(before)

    return undo


def set_level(name: str) -> None:
    """One of `LEVELS`: what is less is not written."""
    logging.getLogger("pearl").setLevel(name.upper())


def level() -> int:
    return logging.getLogger("pearl").getEffectiveLevel()


class FailureLog:
    """Warns of each failure once, with its traceback: what fails may do so in every text."""

    def __init__(self, log: logging.Logger):
        self._log = log
        self._told: set[str] = set()

    def tell(self, sentence: str) -> None:
        """To be called where the failure is handled."""
        reason = traceback.format_exc()
        if reason not in self._told:
            self._told.add(reason)
            self._log.warning("%s\n%s", sentence, reason)
