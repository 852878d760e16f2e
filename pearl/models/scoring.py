"""Logits of every token of texts that are there already, in one forward: for scores (`pearl.evaluation.score`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.models.language_model import LanguageModel


@torch.inference_mode()
def read_whole(model: LanguageModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, V] of what follows every token of several texts, in one forward where the model can.

    What the model knew of its sequences is forgotten; bits are of no account.
    """
    assert len(texts) <= model.max_sequences, "more texts than batch slots"
    for slot, tokens in enumerate(texts):
        model.forget(batch_slot=slot)
        model.observe(tokens, slot)
    parts = [model.place_rows(list(tokens), 0, batch_slot=slot) for slot, tokens in enumerate(texts)]
    if len(parts) == 1 or not model.shares_forwards:
        read = [model.run(one.tokens, one.positions, one.cache) for one in parts]
        return [logits[:, : model.vocabulary] for logits in read]
    logits, places = model.run_together(parts)
    return [logits[places[slot], : model.vocabulary] for slot in range(len(texts))]
