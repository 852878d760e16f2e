"""The target's picks, computed where the logits are: one copy to the host a pass, under way while the host works.

`methods.Picker` picks row by row on the host. On a GPU that waits for the device several times a row, so there all
rows are picked at once, without waiting: greedy and seeded ones. Rejection sampling judges a guess that only the host
knows, and stays there.

Shapes: R rows of a pass, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.sampling.methods import NOT_FINITE, Picker, ProcessedPicker, best_tokens, nothing_left, warp
from pearl.core.trie import Node
from pearl.errors import NonFiniteLogits
from pearl.machine.transfers import Fetched

_FORBIDDEN = NOT_FINITE - 1  # in place of a token: all are forbidden


class Picks(Protocol):
    def pick(self, row: int, node: Node) -> int:
        """The token after `node`, which the pass read as `row`."""


def begin(params: SamplingParams, logits: Tensor, positions: Sequence[int]) -> Picks:
    """The picks of a pass; on a GPU they are on their way when this returns.

    logits: [R, V]; positions: of each row's own token.
    """
    if logits.is_cuda and not params.rejection:
        return _Coming(on_device(params, logits, positions), logits.dtype, positions)
    return Picker(params, logits, positions)


def begin_processed(
    params: SamplingParams,
    logits: Tensor,
    positions: Sequence[int],
    finish: Callable[[int, Tensor], Tensor] | None = None,
) -> Picks:
    """The same of logits that processors have changed. `finish`: see `ProcessedPicker`; None: all is done to them."""
    if logits.is_cuda and not params.rejection and not finish:
        tokens = on_device(params, logits, positions)
        return _Coming(tokens.masked_fill(logits.amax(-1) == -torch.inf, _FORBIDDEN), logits.dtype, positions)
    return ProcessedPicker(params, logits, positions, finish or (lambda row, scores: scores))


def under_way(picks: Sequence[Picks]) -> bool:
    """Whether a GPU is still at work on some of them."""
    return any(isinstance(one, _Coming) and not one.arrived for one in picks)


def wait(picks: Sequence[Picks]) -> bool:
    """Waits until all are here. Returns whether any came from a GPU."""
    coming = [one for one in picks if isinstance(one, _Coming)]
    for one in reversed(coming):  # with the last those before it have arrived
        one.wait()
    return bool(coming)


class _Coming:
    """Picks that are being copied to the host."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype, positions: Sequence[int]):
        """tokens: int64 [R], on a GPU; `NOT_FINITE` where there is none. dtype: of their logits."""
        self._dtype, self._positions = dtype, positions
        self._coming = Fetched(tokens)
        self._picks: list[int] | None = None

    @property
    def arrived(self) -> bool:
        return self._coming.arrived

    def wait(self) -> list[int]:
        if self._picks is None:
            self._picks = self._coming.wait().tolist()
        return self._picks

    def pick(self, row: int, node: Node) -> int:
        token = self.wait()[row]
        if token == NOT_FINITE:
            raise NonFiniteLogits(self._dtype)
        if token == _FORBIDDEN:
            raise nothing_left(self._positions[row] + 1)
        return token


def on_device(params: SamplingParams, logits: Tensor, positions: Sequence[int]) -> Tensor:
    """What `methods.Picker` picks after each row, int64 [R], without a word to the host; `NOT_FINITE` where it would
    raise."""
    assert not params.rejection, "a guess is judged on the host"
    if params.greedy:
        return best_tokens(logits)
    assert params.seed is not None, "a sequence has a seed before it begins"
    scores = warp(logits, params)
    noisy = scores.double() + noise.gumbel_rows(
        params.seed, [position + 1 for position in positions], noise.PICK, scores.shape[-1], scores.device
    )
    return best_tokens(noisy)
