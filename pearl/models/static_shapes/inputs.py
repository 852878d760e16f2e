"""The buffers from which every shape reads, and the way there: one copy, which does not wait for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class StaticInputs:
    """Numbers, and what masks can't be computed from. A shape reads as much of both as it has."""

    def __init__(self, device: torch.device, numbers: int, mask: int):
        """How many of each there may be."""
        self._numbers = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._mask = torch.zeros(mask, dtype=torch.bool, device=device)
        # by turns: one is filled while the others' copies may still be under way, those of a pass that is read and of
        # one that was foreseen
        self._stages = [_PinnedStage(numbers, mask) for _ in range(3)] if device.type == "cuda" else []

    def numbers(self, *shape: int) -> Tensor:
        """The first of the numbers as a tensor of that shape, int64."""
        return self._numbers[: int(np.prod(shape))].view(shape)

    def mask(self, *shape: int) -> Tensor:
        """bool"""
        return self._mask[: int(np.prod(shape))].view(shape)

    def fill(self, numbers: np.ndarray, mask: np.ndarray | None = None) -> None:
        """numbers: int64, as `numbers` has them; mask: bool, as `mask` has it."""
        pairs = [(numbers, self._numbers)] if mask is None else [(numbers, self._numbers), (mask, self._mask)]
        if not self._stages:
            for values, there in pairs:
                there[: values.size] = torch.from_numpy(values).flatten()
            return
        stage = self._stages.pop(0)
        self._stages.append(stage)
        stage.send(pairs)


class _PinnedStage:
    """Page-locked memory, from which a GPU copies by itself."""

    def __init__(self, numbers: int, mask: int):
        self._here = [
            torch.zeros(numbers, dtype=torch.int64, pin_memory=True),
            torch.zeros(mask, dtype=torch.bool, pin_memory=True),
        ]
        self._sent = torch.cuda.Event()

    def send(self, pairs: list[tuple[np.ndarray, Tensor]]) -> None:
        self._sent.synchronize()  # has long happened: a pass lies between
        for (values, there), here in zip(pairs, self._here, strict=False):
            part = here[: values.size]
            part.copy_(torch.from_numpy(values).flatten())
            there[: values.size].copy_(part, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(pairs[0][1].device))
