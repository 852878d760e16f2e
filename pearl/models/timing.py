"""How long something takes, the device's work included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def timed(make: Callable[[], Made]) -> tuple[float, Made]:
    """The seconds that `make` took, until a tensor that it returned was there, and what it returned."""
    began = time.perf_counter()
    made = make()
    first = made[0] if isinstance(made, Sequence) and made else made
    if isinstance(first, Tensor) and first.is_cuda:
        torch.cuda.synchronize(first.device)
    return time.perf_counter() - began, made


def best_of(count: int, make: Callable[[], object]) -> float:
    """The least seconds of several: whatever else runs on the machine only makes it longer."""
    return min(timed(make)[0] for _ in range(count))
