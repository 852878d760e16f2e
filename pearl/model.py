"""A causal language model that reads a text and remembers what it has read.

`LanguageModel.read(tokens, keep)` is a pure function of its tokens: the cache only decides what needs no second
reading. It compares the tokens themselves, so nothing has to tell it about misses, roll-backs or roots. Deleting the
cache changes the cost and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pearl.cache import SlotCache, as_model_mask
from pearl.rows import ANY, LIMIT, RowPlan

CHUNK = 512  # rows of one prefill forward at most


class Reader(Protocol):
    """What the roles ask of a model."""

    rows: RowPlan
    max_length: int  # of a text, in tokens

    def read(self, tokens: Sequence[int], keep: int, padded: bool = True) -> Tensor:
        """Logits [keep, V] of what follows each of the last `keep` of `tokens`."""

    def forget(self) -> None:
        """Empties the cache."""


class LanguageModel:
    """A transformers model over a `SlotCache`."""

    def __init__(self, model: torch.nn.Module, vocabulary: int, max_length: int, rows: RowPlan = ANY):
        """`vocabulary`: the logits are cut to this many tokens. `max_length`: of a text, in tokens."""
        self.model, self.vocabulary, self.max_length, self.rows = model, vocabulary, max_length, rows
        self._cache = SlotCache(max_length + LIMIT)
        self._cached: list[int] = []  # the token in each slot

    def forget(self) -> None:
        self._cached = []

    def read(self, tokens: Sequence[int], keep: int, padded: bool = True) -> Tensor:
        """Logits [keep, V] of what follows each of the last `keep` of `tokens`, at least one.

        `padded`: bring the forward up to a row count whose bits are safe. A drafter, whose guesses are checked anyway,
        saves those rows.
        """
        tokens = list(tokens)
        assert 0 < keep <= len(tokens) <= self.max_length, "a text must fit the cache and hold the rows asked for"
        known = min(_shared_prefix(self._cached, tokens), len(tokens) - keep)
        self._cached = tokens[:known]  # if what follows fails, the rest is unknown
        while len(tokens) - keep - known >= CHUNK:
            self.forward(tokens[known : known + CHUNK], known, 1)
            known += CHUNK
        new = tokens[known:]
        pads = self.rows.pad(len(new)) - len(new) if padded else 0
        logits = self.forward(new + new[-1:] * pads, known, keep + pads, padding=pads)
        self._cached = tokens  # the pads lie beyond: their slots are written again before anything sees them
        return logits[:keep, : self.vocabulary]

    @torch.inference_mode()
    def forward(self, tokens: list[int], first: int, keep: int, padding: int = 0) -> Tensor:
        """One forward of `tokens`, the last `padding` of which only fill it, at the positions from `first`.

        Returns logits [keep, V] of the last `keep` rows, V as the model has it.
        """
        mask = self._cache.place(first, len(tokens), len(tokens) - padding)
        device = self.model.device
        positions = torch.arange(first, first + len(tokens), device=device).clamp_(max=self.max_length - 1)  # pads
        out = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=positions[None],
            attention_mask=as_model_mask(self.model, mask),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits[0]


def _shared_prefix(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix; by halves, as comparing slices is much faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
