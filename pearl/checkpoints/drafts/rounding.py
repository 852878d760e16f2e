"""Matrices in 8 bits a number: whole numbers from -127 to 127, times a step of each row.

That is how a processor multiplies them (`pearl.models.linear.Int8Linear`), so a drafter that is written so drafts there
what it would have drafted. What reads a target's features is left as it is, there and here (`_EXACT`). In a file the
steps stand beside the numbers: `lm_head.weight` and `lm_head.weight.step`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_STEP = ".step"
_EXACT = "fc.weight"


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each matrix of floats int8 [rows, columns] and float32 [rows] beside it; other floats are in bfloat16."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point() or name == _EXACT:
            found[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        numbers = tensor.float()
        step = (numbers.abs().amax(1) / 127).clamp(min=1e-12)
        found |= {name: (numbers / step[:, None]).round().to(torch.int8), name + _STEP: step}
    return found


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` was given, but for the rounding: float32."""
    steps = {name.removesuffix(_STEP): tensor for name, tensor in tensors.items() if name.endswith(_STEP)}
    return {
        name: tensor.float() * steps[name][:, None] if name in steps else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_STEP)
    }
