"""What a batch is doing, for whoever watches: who is being written, how far, and how fast all of it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pearl.engine import GenerationRequest
from pearl.machine.display import Progress

NAMES = 3  # texts that are named


class ProgressLine:
    """In one line: mode, speed, texts under way and the longest of them."""

    def __init__(self, progress: Progress, mode: str):
        self._progress, self._mode = progress, mode
        self._under_way: dict[GenerationRequest, tuple[str, int]] = {}  # the name and the tokens of each
        self._tokens, self._began = 0, time.perf_counter()

    def said(self, request: GenerationRequest, name: str, tokens: Sequence[int]) -> None:
        """A pass has committed these tokens of a text."""
        self._tokens += len(tokens)
        self._under_way[request] = name, self._under_way.get(request, (name, 0))[1] + len(tokens)
        self._progress.show(str(self))

    def over(self, request: GenerationRequest) -> None:
        self._under_way.pop(request, None)
        self._progress.show(str(self))

    def __str__(self) -> str:
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        longest = sorted(self._under_way.values(), key=lambda text: -text[1])[:NAMES]
        names = ", ".join(f"{name} {tokens}" for name, tokens in longest)
        return f"{self._mode} {rate:.0f} tok/s, {len(self._under_way)} texts: {names}"
