"""The target's picks, computed where the logits are: one copy to the host a pass, under way while the host works.

`sampling.Picker` picks row by row on the host. On a GPU that waits for the device several times a row, so there all
rows are picked at once, without waiting: greedy and seeded ones. Rejection sampling judges a guess that only the host
knows, and stays there.

A row's pick must not depend on how many rows there are. Sums of floats may; so the mass of the tokens ahead of a token,
which decides whether it belongs to the nucleus, is a sum of integers: probabilities in units of 2^-40.

Shapes: R rows of a pass, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pearl.core import noise
from pearl.core.sampling import NOT_FINITE, Picker, SamplingParams, best_tokens
from pearl.core.trie import Node
from pearl.errors import NonFiniteLogits

_UNITS = 40  # bits of a probability


class Picks(Protocol):
    def pick(self, row: int, node: Node) -> int:
        """The token after `node`, which the pass read as `row`."""


def begin(params: SamplingParams, logits: Tensor, positions: Sequence[int]) -> Picks:
    """The picks of a pass; on a GPU they are on their way when this returns.

    logits: [R, V]; positions: of each row's own token.
    """
    if logits.is_cuda and not params.rejection:
        return _Coming(on_device(params, logits, positions), logits.dtype)
    return Picker(params, logits, positions)


def wait(picks: Sequence[Picks]) -> bool:
    """Until they are all here. False: they have been all along."""
    coming = [one for one in picks if isinstance(one, _Coming)]
    for one in coming:
        one.wait()
    return bool(coming)


class _Coming:
    """Picks that are being copied to the host."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype):
        """tokens: int64 [R], on a GPU; `NOT_FINITE` where there is none. dtype: of their logits."""
        self._dtype = dtype
        self._here = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._here.copy_(tokens, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tokens.device))
        self._picks: list[int] | None = None

    def wait(self) -> list[int]:
        if self._picks is None:
            self._copied.synchronize()  # the one place where the host waits for the device
            self._picks = self._here.tolist()
            if NOT_FINITE in self._picks:
                raise NonFiniteLogits(self._dtype)
        return self._picks

    def pick(self, row: int, node: Node) -> int:
        return self.wait()[row]


def on_device(params: SamplingParams, logits: Tensor, positions: Sequence[int]) -> Tensor:
    """What `sampling.Picker` picks after each row, int64 [R], without a word to the host; `NOT_FINITE` where it would
    raise."""
    assert not params.rejection, "a guess is judged on the host"
    if params.greedy:
        return best_tokens(logits)
    scores = _warped(logits, params)
    noisy = scores.double() + noise.gumbel_rows(
        params.seed, [position + 1 for position in positions], noise.PICK, scores.shape[-1], scores.device
    )
    return best_tokens(noisy)


def _warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """`sampling.warp` of every row, [R, V]."""
    scores = logits.float() / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[:, -1:], -torch.inf)
    if params.top_p < 1:
        best, tokens = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        units = (best.double() * (1 << _UNITS)).long()
        ahead = units.cumsum(-1) - units
        kept = (ahead < math.ceil(params.top_p * (1 << _UNITS))) & (best > 0)
        scores = scores.masked_fill(~torch.zeros_like(kept).scatter_(1, tokens, kept), -torch.inf)
    if params.min_p > 0:
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(params.min_p), -torch.inf)
    return scores
