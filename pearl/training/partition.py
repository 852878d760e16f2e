"""The gradient of a text's loss, anchors in segments: exact, and without all their rows in memory at once.

The known positions are read once. Their keys and values, and of anchors the hidden states, are all that later depths
want of them, so the anchors of one segment after another look ahead, give back their gradient with respect to those,
and are forgotten; in the end one backward pass through the known positions takes the sum (P-EAGLE, 2026). With n
positions, K depths and S segments there are n + n (K - 1) / S rows in memory instead of n K: for S = K - 1 that is 2 n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.training.look_ahead import look_ahead


class Loss(Protocol):
    def __call__(self, hidden: Tensor, ahead: Tensor | None, anchors: Tensor | None) -> Tensor:
        """A share of the loss. hidden: [B, n, H], of the known positions; ahead: [B, anchors * slots, H], or None for
        the share of the known positions themselves."""


def backward(
    drafter: FeatureDrafter,
    mask: SlotMask,
    tokens: Tensor,
    features: Tensor,
    withheld: Tensor,
    anchors: Tensor,
    segments: int,
    loss: Loss,
) -> None:
    """Adds the gradient of the sum of all shares of the loss to the parameters.

    tokens, withheld: [B, n]; features: [B, n, F]; anchors: int64, ascending positions from which rows look ahead.
    """
    count = tokens.shape[1]
    known = drafter.known(tokens, features, withheld)
    hidden, made = drafter.stack(known, torch.arange(count, device=tokens.device), mask.known(count))
    start = hidden.detach().requires_grad_()
    past, pairs = detached(made)
    for part in anchors.chunk(segments) if mask.slots and len(anchors) else ():
        ahead = look_ahead(drafter, mask, tokens, start, past, part)
        loss(start.detach(), ahead, part).backward()
    backward_through(loss(hidden, None, None), [(hidden, start), *pairs])


def detached(made: Sequence[KeyValue]) -> tuple[list[KeyValue], list[tuple[Tensor, Tensor]]]:
    """Copies of keys and values at which a graph ends, and (part of the graph, its copy) for `backward_through`."""
    past = [(keys.detach().requires_grad_(), values.detach().requires_grad_()) for keys, values in made]
    return past, [(part, copy) for pair in zip(made, past, strict=True) for part, copy in zip(*pair, strict=True)]


def backward_through(loss: Tensor, leaves: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The gradient of a loss, and what others have asked of detached copies: (part of the graph, its copy) each."""
    asked = [(part, leaf.grad) for part, leaf in leaves if leaf.grad is not None]
    roots, gradients = [loss, *(part for part, _ in asked)], [None, *(gradient for _, gradient in asked)]
    torch.autograd.backward(roots, gradients)


def evaluate(
    drafter: FeatureDrafter,
    mask: SlotMask,
    tokens: Tensor,
    features: Tensor,
    withheld: Tensor,
    anchors: Tensor,
    loss: Loss,
) -> Tensor:
    """The sum of all shares of the loss in one piece: the plain way, against which `backward` is tested."""
    count = tokens.shape[1]
    known = drafter.known(tokens, features, withheld)
    hidden, made = drafter.stack(known, torch.arange(count, device=tokens.device), mask.known(count))
    total = loss(hidden, None, None)
    if mask.slots and len(anchors):
        total = total + loss(hidden.detach(), look_ahead(drafter, mask, tokens, hidden, made, anchors), anchors)
    return total
