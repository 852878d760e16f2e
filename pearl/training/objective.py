"""What a drafter is asked to learn: the target's next-token choice, and how sure the target was.

Shapes: R rows, V draft vocabulary, k noted tokens a row.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1  # instead of a token that was not noted, or that can't be drafted
_GONE = -30.0  # log-probability of a token that was not noted
_FIGURES = ("loss", "accuracy", "top 5")  # of each depth, in the order in which they are shown


@dataclass(frozen=True)
class RowLosses:
    """Of R rows: the loss of each, how likely it found what the text goes on with, and whether the best guess, or one
    of the best five, was the target's choice."""

    loss: Tensor  # float [R]
    chance: Tensor  # float [R], of the text's next token, as the drafter sees it
    first: Tensor  # bool [R]
    top_five: Tensor  # bool [R]

    def add_to(self, figures: dict[str, float], depth: int) -> None:
        """To sums of `depth_figures`."""
        for name, value in zip(_FIGURES, (self.loss, self.first, self.top_five), strict=True):
            figures[f"{name} {depth}"] += float(value.detach().sum())
            figures[f"n:{name} {depth}"] += len(value)


def depth_figures(depths: int) -> dict[str, float]:
    """Sums of nothing so far, for `pearl.training.loop.Figures`."""
    return {f"{kind}{name} {depth}": 0.0 for name in _FIGURES for depth in range(depths) for kind in ("", "n:")}


class Objective:
    """Cross-entropy against the target's choice, mixed with the divergence from its likeliest tokens."""

    def __init__(self, vocabulary: Tensor, tokens: int, kl: float):
        """vocabulary: int64 [V], ids that can be drafted; `tokens`: of the target's vocabulary; `kl`: the mix, 0 to 1.

        A choice outside the draft vocabulary can't be learned; it counts as a wrong guess and adds no loss.
        """
        self._row = torch.full((tokens + 1,), NOTHING, dtype=torch.int64, device=vocabulary.device)
        self._row[vocabulary] = torch.arange(len(vocabulary), device=vocabulary.device)
        self._kl = kl

    def judge(self, logits: Tensor, top_ids: Tensor, top_logp: Tensor, went: Tensor | None = None) -> RowLosses:
        """logits: [R, V]; top_ids: [R, k], the choice first; top_logp: [R, k]; went: [R], what the text goes on with;
        None: with the choice."""
        logq = logits.float().log_softmax(-1)
        rows = self._row[top_ids.long()]  # a NOTHING indexes the last entry, which is NOTHING
        there = rows >= 0
        q = logq.gather(1, rows.clamp(min=0))
        choice = torch.where(there[:, 0], -q[:, 0], 0.0)
        p = torch.where(there, top_logp.float(), _GONE).softmax(-1)
        soft = torch.where(there[:, 0], -(p * torch.where(there, q, 0.0)).sum(-1), 0.0)
        best = logq.detach().topk(min(5, logq.shape[-1])).indices
        right = (best == rows[:, :1]) & there[:, :1]
        on = rows[:, 0] if went is None else self._row[went.long()]
        chance = torch.where(on >= 0, logq.detach().gather(1, on.clamp(min=0)[:, None])[:, 0].exp(), 0.0)
        return RowLosses((1 - self._kl) * choice + self._kl * soft, chance, right[:, 0], right.any(-1))


def frequent(choices: Iterable[Tensor], count: int, always: Iterable[int] = (), rows: int = 1 << 62) -> Tensor:
    """The draft vocabulary: the `count` tokens most often chosen by the target, and those of `always` among them.

    choices: int [*] pieces. `rows`: of the target's head; a tokenizer may have special tokens beyond. Returns ids in
    ascending order, int64; fewer if fewer ever occurred.
    """
    seen: Counter[int] = Counter()
    for piece in choices:
        tokens, times = piece[piece >= 0].unique(return_counts=True)
        seen.update(dict(zip(tokens.tolist(), times.tolist(), strict=True)))
    kept = dict.fromkeys(token for token in always if token < rows)
    for token, _ in sorted(seen.items(), key=lambda entry: (-entry[1], entry[0])):
        if len(kept) >= count:
            break
        kept[token] = None
    return torch.tensor(sorted(kept), dtype=torch.int64)


def filled(vocabulary: Tensor, count: int, tokens: int) -> Tensor:
    """A draft vocabulary of `count` of the `tokens`: where fewer were ever seen, those of the lowest ids besides, which
    byte-pair encoding has merged first, as they were the commonest. It is for heads that need not learn them.

    vocabulary: int64 [V], ascending."""
    seen = set(vocabulary.tolist())
    more = itertools.islice((token for token in range(tokens) if token not in seen), max(0, count - len(seen)))
    return torch.tensor(sorted([*seen, *more]), dtype=torch.int64)
