"""The gradient of a text's loss, slots in segments: exact, and without all slots in memory at once.

The known positions are read once. Their keys and values are all that slots want of them, so the slots of one segment of
anchors after another run, give back their gradient with respect to those keys and values, and are forgotten; in the
end one backward pass through the known positions takes the sum (P-EAGLE, 2026). With n positions, K depths and S
segments there are n + n (K - 1) / S rows in memory instead of n K: for S = K - 1 that is 2 n.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter

# hidden [B, anchors * slots, H] and the anchors, or [B, n, H] and None for the known positions -> a share of the loss
Loss = Callable[[Tensor, Tensor | None], Tensor]


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

    tokens, withheld: [B, n]; features: [B, n, F]; anchors: int64, ascending positions of which slots are read.
    """
    batch, count = tokens.shape
    known = drafter.known(tokens, features, withheld)
    hidden, made = drafter.stack(known, torch.arange(count, device=tokens.device), mask.known(count))
    past = [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in made]
    for part in anchors.chunk(segments) if mask.slots and len(anchors) else ():
        slots = drafter.slots(batch, len(part) * mask.slots)
        ahead, _ = drafter.stack(slots, mask.positions(part), mask.of(part, count), past)
        loss(ahead, part).backward()
    roots: list[Tensor] = [loss(hidden, None)]
    gradients: list[Tensor | None] = [None]
    for layer, leaves in zip(made, past, strict=True):
        for part, leaf in zip(layer, leaves, strict=True):
            if leaf.grad is not None:
                roots.append(part)
                gradients.append(leaf.grad)
    torch.autograd.backward(roots, gradients)
