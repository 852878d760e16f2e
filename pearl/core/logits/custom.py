"""Callables of the user's that change logits: `SamplingParams.logits_processors`.

They run on the host, on the rows that the walk comes to and on no other, in the order of the text. So each call is one
that a plain decoder would make too, and a callable that remembers its calls sees what it would see there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pearl.errors import UsageError
from pearl.machine.transfers import sent


def apply(processors: Sequence[Callable[..., Any]], tokens: Sequence[int], logits: Tensor) -> Tensor:
    """The logits of what follows `tokens` (prompt, text and path), float32 [V], after each processor in turn.

    A processor takes (list of token ids, logits [V]) and returns logits; transformers' take [1, L] and [1, V]. Raises
    `UsageError` where one returns something else, and whatever it raises.
    """
    scores = logits.to(torch.float32, copy=True)
    for process in processors:
        if _of_transformers(process):
            made = process(sent(torch.tensor([list(tokens)]), scores.device), scores[None])
            made = made[0] if isinstance(made, Tensor) and made.shape[:1] == (1,) else made
        else:
            made = process(list(tokens), scores)
        if not isinstance(made, Tensor) or made.shape != scores.shape:
            what = f"one of shape {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            name = getattr(process, "__name__", type(process).__name__)
            raise UsageError(f"{name} of logits_processors must return a tensor of {len(scores)} logits, not {what}.")
        scores = made
    return scores


def _of_transformers(process: Callable[..., Any]) -> bool:
    """Whether it is an object of that library, which is imported then."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(process, library.LogitsProcessor | library.LogitsProcessorList)
