"""How long something takes, the device's work included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

TIMED = (64, 3)  # tokens of text, and repetitions, when a draft source's forward is timed


def timed(make: Callable[[], Made], device: torch.device | None = None) -> tuple[float, Made]:
    """The seconds that `make` took, until its work on `device` was done, and what it returned. None: the device of a
    tensor that it returned."""
    began = time.perf_counter()
    made = make()
    first = made[0] if isinstance(made, Sequence) and made else made
    if device is None and isinstance(first, Tensor):
        device = first.device
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, made


def best_of(count: int, make: Callable[[], object], device: torch.device | None = None) -> float:
    """The least seconds of several: whatever else runs on the machine only makes it longer. `device`: see `timed`."""
    return min(timed(make, device)[0] for _ in range(count))
