"""The sum that an attention is, by different kernels: backends, each with bits of its own.

A forward of static shape (`pearl.models.static_shapes`) sees either all slots up to one, as a chain does, or what a
mask says. Every backend takes both, but `flash`, which reads no mask and serves chains alone. Which one a device runs
is measured, not assumed: only backends are asked for whose bits do not depend on how many rows there are or on which
path (`pearl.models.numerics_check`).

Letters: B sequences or paths, R rows of each, S slots.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionMask:
    """What the rows of an attention call may read."""

    def __init__(self, visible: Tensor, last: Tensor | None = None):
        """visible: bool [B, 1, R, S]. last: int64 [B, R], the last slot of each of consecutive rows; None: no chain."""
        self.visible, self.last = visible, last
        self._added: dict[torch.device, Tensor] = {}

    def added(self, groups: int, like: Tensor) -> Tensor:
        """The mask of `groups` heads that share a key, as it is added to scores like these, [B, 1, groups * R, S].

        It is made once for all layers of a forward: the kernel would make it of a bool mask anew in each.
        """
        if like.device not in self._added:
            seen = self.visible.repeat(1, 1, groups, 1).to(like.device)
            self._added[like.device] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -math.inf)
        return self._added[like.device]


Backend = Callable[[Tensor, Tensor, Tensor, AttentionMask, float | None], Tensor]


def packed(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scaling: float | None) -> Tensor:
    """Heads that share a key become rows of it, [B, heads, R, head_dim].

    transformers' own attention copies every key and value once a head instead: for six heads a key and 500 tokens that
    is a tenth of the whole pass on a CPU core.
    """
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    wide = query.reshape(batch, key.shape[1], groups * rows, width)
    out = F.scaled_dot_product_attention(wide, key, value, attn_mask=mask.added(groups, query), scale=scaling)
    return out.reshape(batch, heads, rows, value.shape[-1])


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scaling: float | None) -> Tensor:
    """torch's own handling of heads that share a key."""
    visible = mask.visible.to(query.device)
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=shared)


def flash(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scaling: float | None) -> Tensor:
    """Without a mask: each chain says how long it is, on the device, so that its length needs no shape of its own.

    The kernel is causal from the end: the last of R rows sees all that is used. Rows behind a chain's own, which only
    fill the shape, see slots beyond it; nobody reads them. So `key` and `value` hold R slots more than are read.
    """
    if mask.last is None:
        return grouped(query, key, value, mask, scaling)
    chains, heads, rows, width = query.shape
    slots, device = key.shape[2], query.device
    used = mask.last[:, 0].to(device) + rows
    out = _varlen()(
        query.transpose(1, 2).reshape(chains * rows, heads, width),
        key.transpose(1, 2).reshape(chains * slots, key.shape[1], width),
        value.transpose(1, 2).reshape(chains * slots, value.shape[1], value.shape[3]),
        torch.arange(0, (chains + 1) * rows, rows, dtype=torch.int32, device=device),
        torch.arange(0, (chains + 1) * slots, slots, dtype=torch.int32, device=device),
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

    attention: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]
    known = inspect.signature(attention).parameters
    missing = [name for name in ("window_size", "enable_gqa", "seqused_k") if name not in known]
    if missing:
        raise RuntimeError(f"this torch's varlen_attn does not take {', '.join(missing)}")
    # one split of the keys: how many there are would depend on their number, and bits on that
    return functools.partial(attention, num_splits=1) if "num_splits" in known else attention


BACKENDS: dict[str, Backend] = {"flash": flash, "grouped": grouped, "packed": packed}  # the fastest first, as a rule
