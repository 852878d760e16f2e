"""Sums over ranks whose bits do not depend on where in a tensor a number stands.

Collective libraries cut a tensor into a piece for each rank, and each piece is summed in an order of its own: the first
row of a pass may be (a + b) + c and its last (b + c) + a. How a row is rounded then depends on how many rows there are,
and no row count is like another (seen with gloo and three ranks). Of two parts there is only one sum. For more, every
rank gathers all parts and adds them up by itself, in the order of the ranks: a pass has few rows, so that the parts are
small. Parts in 16 bits are added in 32, and rounded once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """While a forward runs in this thread, `torch.distributed.all_reduce`, that transformers calls, adds in the order
    of ranks. In other threads it does what it always does."""
    library, thread = dist.all_reduce, threading.get_ident()

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        elsewhere = threading.get_ident() != thread
        if elsewhere or op != dist.ReduceOp.SUM or async_op or dist.get_world_size(group) == 2:
            return library(tensor, op, group, async_op)
        add_up(tensor, group)
        return None

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = library


def add_up(tensor: Tensor, group: Any = None) -> None:
    """The sum of this tensor over all ranks, in its place."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    total = parts[0].float() if tensor.element_size() < 4 else parts[0]
    for part in parts[1:]:
        total = total + part
    tensor.copy_(total)
