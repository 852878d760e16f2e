"""Log-probabilities as vLLM tells them by default: the log-softmax of the target's own logits, in float32, before any
processor or temperature."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Logprobs = dict[int, float]  # by token


def logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[Logprobs]:
    """Of each row the token that came, first, and the `most` best.  logits: [R, V]; tokens: R of them"""
    logp = logits.float().log_softmax(-1)
    best = logp.topk(min(most, logp.shape[-1]))
    rows = zip(logp, tokens, best.indices.tolist(), best.values.tolist(), strict=True)
    return [{token: float(row[token])} | dict(zip(ids, values, strict=True)) for row, token, ids, values in rows]
