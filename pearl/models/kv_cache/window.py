"""What a layer's rows see of the tokens before them: all, the last few (sliding windows), or their own chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LONGEST = 1 << 17  # positions that are looked at; what begins to mask beyond masks nothing


@dataclass(frozen=True)
class Window:
    """Of `size` tokens: those up to the row itself, or, if `chunked`, the block of positions that the row lies in."""

    size: int
    chunked: bool = False

    def first(self, positions: Any) -> Any:
        """The first position that the rows at `positions` see; a tensor, an array or a number, as they are."""
        return positions // self.size * self.size if self.chunked else positions - (self.size - 1)

    @property
    def code(self) -> int:
        """As a number; 0 is no window."""
        return -self.size if self.chunked else self.size

    @staticmethod
    def of_code(code: int) -> Window | None:
        return Window(abs(code), code < 0) if code else None


class UnknownMask(Exception):
    """A mask is neither causal nor a window of it."""


def window_of(visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Window | None:
    """The window of one of transformers' mask functions, of (batch, head, row's position, key's position).

    Found by asking, so it does not matter how the function was put together. Raises `UnknownMask`.
    """
    nought, keys = torch.zeros((), dtype=torch.int64), torch.arange(_LONGEST)

    def first(position: int) -> int:
        seen = visible(nought, nought, torch.tensor(position), keys).expand(_LONGEST)
        least = int(seen.int().argmax())
        if not seen[least : position + 1].all() or seen[position + 1 :].any():
            raise UnknownMask
        return least

    low, high = 0, _LONGEST - 1  # rows at `low` see all before them; of those at `high` it is asked
    if first(high) == 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first(middle) == 0 else (low, middle)
    found = Window(high, chunked=first(high) == high)
    for position in (high + 1, 2 * high - 1, 2 * high, 3 * high + 1, _LONGEST // 3, _LONGEST - 1):
        if position < _LONGEST and first(position) != max(0, found.first(position)):
            raise UnknownMask
    return found
