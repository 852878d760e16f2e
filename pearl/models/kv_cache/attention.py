"""Forms of one attention: the same sum, by different kernels, with bits of their own.

A fixed forward (`pearl.models.static_shapes`) sees either all slots up to one, as a chain does, or what a mask says.
Every form takes both, but `flash`, which reads no mask and serves chains alone. Which form a device runs is measured,
not assumed: only forms are asked for whose bits do not depend on how many rows there are or on which path
(`pearl.commands.selfcheck`).

Letters: B paths, R rows each, S slots.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pearl.models.kv_cache.slot_cache import attend_packed


@dataclass(frozen=True, eq=False)
class See:
    """What the rows of a call may read."""

    mask: Tensor  # bool [B, 1, R, S]
    last: Tensor | None  # int64 [B, R]: the last slot of each row, of consecutive rows; None: the mask is no chain's


Form = Callable[[Tensor, Tensor, Tensor, See, float | None], Tensor]


def packed(query: Tensor, key: Tensor, value: Tensor, see: See, scaling: float | None) -> Tensor:
    """Heads that share a key become rows of it: no key is copied. [B, heads, R, head_dim]"""
    return attend_packed(query, key, value, see.mask, scaling)


def grouped(query: Tensor, key: Tensor, value: Tensor, see: See, scaling: float | None) -> Tensor:
    """torch's own handling of heads that share a key."""
    mask = see.mask.to(query.device)
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared)


def flash(query: Tensor, key: Tensor, value: Tensor, see: See, scaling: float | None) -> Tensor:
    """Without a mask: each chain says how long it is, on the device, so that its length needs no shape of its own.

    The kernel is causal from the end: the last of R rows sees all that is used. Rows behind a chain's own, which only
    fill the shape, see slots beyond it; nobody reads them. So `key` and `value` hold R slots more than are read.
    """
    if see.last is None:
        return grouped(query, key, value, see, scaling)
    chains, heads, rows, width = query.shape
    slots, to = key.shape[2], dict(dtype=torch.int32, device=query.device)
    used = see.last[:, 0].to(query.device) + rows
    out = _varlen()(
        query.transpose(1, 2).reshape(chains * rows, heads, width),
        key.transpose(1, 2).reshape(chains * slots, key.shape[1], width),
        value.transpose(1, 2).reshape(chains * slots, value.shape[1], value.shape[3]),
        torch.arange(0, (chains + 1) * rows, rows, **to),
        torch.arange(0, (chains + 1) * slots, slots, **to),
        rows,
        slots,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=heads != key.shape[1],
        seqused_k=used.to(torch.int32),
    )
    return out.unflatten(0, (chains, rows)).transpose(1, 2)


def _varlen() -> Callable[..., Tensor]:
    """torch's varlen attention. Raises `RuntimeError` where it can't do what is needed."""
    from torch.nn.attention import varlen

    known = inspect.signature(varlen.varlen_attn).parameters
    missing = [name for name in ("window_size", "enable_gqa", "seqused_k") if name not in known]
    if missing:
        raise RuntimeError(f"this torch's varlen_attn does not take {', '.join(missing)}")
    # one split of the keys: how many there are would depend on their number, and bits on that
    return functools.partial(varlen.varlen_attn, num_splits=1) if "num_splits" in known else varlen.varlen_attn


FORMS: dict[str, Form] = {"flash": flash, "grouped": grouped, "packed": packed}  # the fastest first, as a rule
