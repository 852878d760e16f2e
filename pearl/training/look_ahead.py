"""What a network says further ahead than the next token, in training: the rows of each anchor's depths 1 to K - 1.

    P-EAGLE     slots, all of one forward: what their tokens are it has to do without
    EAGLE-3     a forward a depth: the text's own tokens, beside its own hidden state of the depth before
                (training-time test, EAGLE-3, Li et al. 2025, section 3.2)

Who sees whom is the same (`pearl.drafters.feature.mask`): the known positions up to the anchor, and the anchor's own
rows. So both give [B, anchors * slots, H], anchor by anchor, and the objective need not know which it was.

Shapes: B texts, n positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.models.kv_cache.slot_cache import KeyValue


def look_ahead(
    drafter: FeatureDrafter,
    mask: SlotMask,
    tokens: Tensor,
    hidden: Tensor,
    past: Sequence[KeyValue],
    anchors: Tensor,
) -> Tensor:
    """Hidden states [B, anchors * slots, H].

    tokens: [B, n]; hidden: [B, n, H] and past: keys and values, of the known positions; anchors: int64 positions.
    """
    count = tokens.shape[1]
    if drafter.shape.parallel:
        slots = drafter.slots(len(tokens), len(anchors) * mask.slots)
        return drafter.stack(slots, mask.positions(anchors), mask.of(anchors, count), list(past))[0]
    before = mask.known(count)[anchors]
    own = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    found, state, past = [], hidden[:, anchors], list(past)
    for depth in range(1, mask.slots + 1):
        at = anchors + depth
        rows = drafter.rows(tokens[:, at.clamp(max=count - 1)], drafter.carried(state))
        state, made = drafter.stack(rows, at, torch.cat([before, *[own] * depth], 1), past)
        past = [(torch.cat([k, n], 2), torch.cat([v, m], 2)) for (k, v), (n, m) in zip(past, made, strict=True)]
        found.append(state)
    return torch.stack(found, 2).flatten(1, 2)
