"""Log-probabilities as vLLM tells them by default: the log-softmax of the target's own logits, in float32, before any
processor or temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.machine.transfers import all_on_host, sent

Logprobs = dict[int, float]  # by token


def logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[Logprobs]:
    """Of each row the token that came, first, and the `most` best. On a GPU the host waits once.

    logits: [R, V]; tokens: R of them"""
    logp = logits.float().log_softmax(-1)
    best = logp.topk(min(most, logp.shape[-1]))
    own = logp.gather(1, sent(torch.tensor(tokens, dtype=torch.int64), logp.device)[:, None])[:, 0]
    rows = zip(tokens, *(one.tolist() for one in all_on_host([own, best.indices, best.values])), strict=True)
    return [{token: own_logp} | dict(zip(ids, values, strict=True)) for token, own_logp, ids, values in rows]
