"""How many sequences share a forward: all of them, until memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
Query = TypeVar("Query")
Answer = TypeVar("Answer")


class BatchLimit:
    """Runs a forward over several sequences; where memory does not suffice, over halves, from then on."""

    def __init__(self, what: str):
        """`what` holds the sequences: a pass, a draft."""
        self._what, self._most = what, 1 << 30

    def run(self, queries: Sequence[Query], forward: Callable[[Sequence[Query]], list[Answer]]) -> list[Answer]:
        """The answers of `forward`. Raises `OutOfMemoryError` where there is no room for one sequence."""
        if len(queries) <= self._most:
            try:
                return forward(queries)
            except torch.OutOfMemoryError:
                if len(queries) <= 1:
                    raise
                self._most = -(-len(queries) // 2)
                _log.warning("out of memory; a %s is for at most %d texts from now on.", self._what, self._most)
        parts = [queries[i : i + self._most] for i in range(0, len(queries), self._most)]
        return [answer for part in parts for answer in self.run(part, forward)]
