"""What a batch is doing, for a person at a terminal: who is being written, how far, and how fast all of it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.progress import Progress, TaskID

from pearl.engine import GenerationRequest

NAMES = 3  # texts that are named


class Board:
    """The description of a progress bar, which is drawn on a terminal only; a log stays quiet."""

    def __init__(self, progress: Progress, bar: TaskID, mode: str):
        self._progress, self._bar, self._mode = progress, bar, mode
        self._under_way: dict[GenerationRequest, tuple[str, int]] = {}  # the name and the tokens of each
        self._tokens, self._began = 0, time.perf_counter()

    def said(self, job: GenerationRequest, name: str, tokens: Sequence[int]) -> None:
        """A pass has committed these tokens of a text."""
        self._tokens += len(tokens)
        self._under_way[job] = name, self._under_way.get(job, (name, 0))[1] + len(tokens)
        self._show()

    def over(self, job: GenerationRequest) -> None:
        self._under_way.pop(job, None)
        self._show()

    def _show(self) -> None:
        if not self._progress.disable:
            self._progress.update(self._bar, description=self.line)

    @property
    def line(self) -> str:
        """In one line: mode, speed, texts under way and the longest of them."""
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        longest = sorted(self._under_way.values(), key=lambda text: -text[1])[:NAMES]
        names = ", ".join(f"{name} {tokens}" for name, tokens in longest)
        return f"{self._mode} {rate:.0f} tok/s, {len(self._under_way)} texts: {names}"
