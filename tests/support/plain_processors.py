"""Logits processors the plain way, one row at a time: transformers' own objects, in its order, and OpenAI's formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from pearl.core.params import SamplingParams


def plainly(params: SamplingParams, prompt: int, eos: Collection[int], tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Logits of what follows `tokens`, of which `prompt` are the prompt's.  logits: [V]"""
    before, scores = torch.tensor([list(tokens)]), logits.float()[None]
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor({(t,): b for t, b in params.logit_bias.items()})(before, scores)
    if params.repetition_penalty not in (None, 1):
        scores = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(before, scores)
    scores = scores.clone()
    for token, times in Counter(tokens[prompt:]).items():
        scores[0, token] -= torch.tensor(params.frequency_penalty) * times
        scores[0, token] -= torch.tensor(params.presence_penalty)
    if params.no_repeat_ngram_size:
        scores = NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size)(before, scores)
    ends = torch.tensor(sorted(eos), dtype=torch.long)
    if params.bad_words_ids:
        bad = [list(word) for word in params.bad_words_ids if list(word) not in [[token] for token in eos]]
        scores = NoBadWordsLogitsProcessor(bad)(before, scores) if bad else scores
    if params.min_tokens:
        ends = torch.cat([ends, torch.tensor(params.stop_token_ids, dtype=torch.long)])
        scores = MinNewTokensLengthLogitsProcessor(prompt, params.min_tokens, ends)(before, scores)
    if params.suppress_tokens:
        scores = SuppressTokensLogitsProcessor(params.suppress_tokens)(before, scores)
    if params.allowed_token_ids is not None:
        others = [token for token in range(scores.shape[1]) if token not in params.allowed_token_ids]
        scores[:, others] = -torch.inf
    for process in params.logits_processors:
        scores = process(list(tokens), scores[0])[None]
    return scores[0]


def avoid_the_sum(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """A callable that looks at all tokens before: it makes one token that they add up to less likely."""
    changed = logits.clone()
    changed[sum(tokens) % len(logits)] -= 3.0
    return changed
