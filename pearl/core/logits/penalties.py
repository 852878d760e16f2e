"""Repetition, frequency and presence penalty: what tokens that occurred before lose.

    repetition  a logit above 0 is divided by it, one below 0 multiplied: of tokens of prompt and text (Keskar et al.
                2019, `transformers.RepetitionPenaltyLogitsProcessor`)
    frequency   times how often the new text holds the token, off its logit     (OpenAI's; the prompt does not count)
    presence    off its logit if the new text holds it

Only the columns of such tokens are touched. Those of the path to a row's node are computed anew from the row's own
logits with their whole counts, so that the bits are those of a text that holds the path.

Shapes: R rows, V tokens of the vocabulary, U different tokens so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.machine.transfers import sent


class Penalties:
    """Of one sequence."""

    def __init__(self, repetition: float, frequency: float, presence: float, prompt: int):
        """`prompt`: its tokens."""
        self._repetition, self._frequency, self._presence, self._prompt = repetition, frequency, presence, prompt
        # tokens of the text that are done with: without a repetition penalty the prompt does not count
        self._read = 0 if repetition != 1 else prompt
        self._places: dict[int, int] = {}  # of tokens in the tensors, in the order in which they came
        self._counts: Counter[int] = Counter()  # in the new text
        self._tokens = torch.empty(0, dtype=torch.long)  # [U]
        self._times = torch.empty(0)  # [U], float32: how often the new text holds each

    @staticmethod
    def of(params: SamplingParams, prompt: int) -> Penalties | None:
        values = (
            params.repetition_penalty or 1.0,
            params.frequency_penalty,
            params.presence_penalty,
        )
        return Penalties(*values, prompt) if values != (1.0, 0.0, 0.0) else None

    def apply(self, scores: Tensor, text: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """In place.  scores: float32 [R, V]"""
        self._count(text, scores)
        rows, tokens, times = [], [], []
        for row, path in enumerate(paths):
            for token, more in Counter(path).items():
                if token < scores.shape[-1]:
                    rows.append(row)
                    tokens.append(token)
                    times.append(self._counts[token] + more)
        device = scores.device
        where = sent(torch.tensor(rows), device), sent(torch.tensor(tokens), device)
        own = scores[where] if rows else scores
        if len(self._tokens):
            scores[:, self._tokens] = self._penalised(scores[:, self._tokens], self._times)
        if rows:
            scores[where] = self._penalised(own, sent(torch.tensor(times, dtype=torch.float32), device))

    def _count(self, text: Sequence[int], scores: Tensor) -> None:
        """Takes in what the text holds more than the last time."""
        assert len(text) >= self._read or self._read == self._prompt, "a text only grows"
        size, device = scores.shape[-1], scores.device
        old = [token for token in text[self._read : self._prompt] if token < size]
        new = [token for token in text[max(self._read, self._prompt) :] if token < size]
        if not old and not new:
            return
        self._read = len(text)
        fresh = [token for token in dict.fromkeys((*old, *new)) if token not in self._places]
        self._places |= {token: place for place, token in enumerate(fresh, len(self._places))}
        self._tokens = torch.cat([self._tokens.to(device), sent(torch.tensor(fresh, dtype=torch.long), device)])
        self._times = torch.cat([self._times.to(device), torch.zeros(len(fresh), device=device)])
        self._counts.update(new)
        if new:
            places = sent(torch.tensor([self._places[token] for token in new]), device)
            self._times.index_add_(0, places, torch.ones(len(new), device=device))

    def _penalised(self, scores: Tensor, times: Tensor) -> Tensor:
        """scores: [..., U]; times: [U]. Each step is one rounding, as in transformers and vLLM."""
        if self._repetition != 1:
            scores = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
        if self._frequency:
            scores = scores - self._frequency * times
        if self._presence:
            scores = scores - self._presence * (times > 0)
        return scores
