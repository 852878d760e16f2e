"""Rotary positions (RoFormer, Su et al. 2021), as transformers pairs the numbers of a head."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines of positions, [R, D] or as far as they broadcast to x


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x: [B, heads, R, D], turned by the angles of its positions."""
    first, second = x.chunk(2, -1)
    cosines, sines = rotation
    return x * cosines + torch.cat([-second, first], -1) * sines
