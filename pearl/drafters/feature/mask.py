"""Who sees whom in the parallel drafter: one rule for training, its segments, and inference.

n known positions stand in a row. From each of them, an *anchor*, K - 1 *slots* look further ahead: slot d of anchor i
stands for position i + d, d = 1 .. K - 1, and the known position itself is depth 0.

    a known position sees the known positions up to itself
    a slot sees the known positions up to its anchor, and its anchor's slots up to itself

Nothing else: no slot of another anchor, and nothing that comes later. n = 3, K = 3, keys k0 k1 k2, then the slots
1 and 2 of each anchor (x: seen):

               k0 k1 k2   01 02   11 12   21 22
    slot 1 of 0  x          x
    slot 2 of 0  x          x  x
    slot 1 of 1  x  x               x
    slot 2 of 1  x  x               x  x
    ...
"""

from __future__ import annotations

import torch
from torch import Tensor


class SlotMask:
    """The rule for texts of up to `longest` tokens, built once and sliced."""

    def __init__(self, longest: int, depths: int, device: torch.device | str = "cpu"):
        """`depths`: K, the known position and its slots together."""
        self.slots = depths - 1
        self._known = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        self._own = torch.ones(self.slots, self.slots, dtype=torch.bool, device=device).tril()

    def known(self, count: int) -> Tensor:
        """What `count` known positions see of each other, bool [count, count]."""
        return self._known[:count, :count]

    def of(self, anchors: Tensor, count: int) -> Tensor:
        """What the slots of `anchors` see, bool [anchors * slots, count + anchors * slots].

        anchors: int64 positions. Keys: `count` known positions, then the slots in the order of the rows.
        """
        before = self._known[anchors, :count].repeat_interleave(self.slots, 0)
        own = torch.block_diag(*[self._own] * len(anchors)).bool()
        return torch.cat([before, own.to(before.device)], 1)

    def positions(self, anchors: Tensor) -> Tensor:
        """Where the slots of `anchors` stand, int64 [anchors * slots]."""
        return (anchors[:, None] + torch.arange(1, self.slots + 1, device=anchors.device)).flatten()
