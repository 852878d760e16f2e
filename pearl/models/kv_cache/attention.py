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
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pearl.machine.transfers import sent
from pearl.models.kv_cache.window import Window


class LayerCall(NamedTuple):
    """What a layer asks of its attention beside queries, keys and values."""

    layer: int
    scaling: float | None = None
    window: Window | None = None
    softcap: float | None = None  # scores are squashed to less than this (Gemma 2)
    sinks: Tensor | None = None  # [heads], scores of a key without a value (gpt-oss)


class AttentionMask:
    """What the rows of an attention call may read."""

    def __init__(
        self, visible: Tensor, last: Tensor | None = None, windowed: Mapping[Window, AttentionMask] | None = None
    ):
        """visible: bool [B, 1, R, S]. last: int64 [B, R], the last slot of each row, which it sees from the first on;
        None: no chain. `windowed`: of no chain, what layers with windows see."""
        self.visible, self.last = visible, last
        self._windowed = dict(windowed or {})
        self._added: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @staticmethod
    def chain(last: Tensor, slots: int) -> AttentionMask:
        """Rows that see all slots up to `last`, int64 [B, R]."""
        return AttentionMask((torch.arange(slots, device=last.device) <= last[..., None])[:, None], last)

    @staticmethod
    def together(masks: Sequence[AttentionMask]) -> AttentionMask:
        """Those of sequences side by side."""
        visible = torch.cat([mask.visible for mask in masks])
        lasts = [mask.last for mask in masks if mask.last is not None]
        if len(lasts) == len(masks):
            return AttentionMask(visible, torch.cat(lasts))
        windows = {window for mask in masks for window in mask._windowed}
        return AttentionMask(
            visible, None, {one: AttentionMask.together([mask.within(one) for mask in masks]) for one in windows}
        )

    def of_rows(self, rows: Tensor) -> AttentionMask:
        """Those of some rows, int64 [rows]."""
        windowed = {window: mask.of_rows(rows) for window, mask in self._windowed.items()}
        return AttentionMask(self.visible[:, :, rows], None if self.last is None else self.last[:, rows], windowed)

    def within(self, window: Window | None) -> AttentionMask:
        """What the rows of a layer with that window see."""
        if window is None:
            return self
        if window not in self._windowed:
            assert self.last is not None, "rows of no chain bring what they see in each window"
            slots = torch.arange(self.visible.shape[-1], device=self.last.device)
            near = slots >= window.first(self.last)[..., None]
            self._windowed[window] = AttentionMask(self.visible & near[:, None])
        return self._windowed[window]

    def added(self, groups: int, like: Tensor) -> Tensor:
        """The mask of `groups` heads that share a key, as it is added to scores like these, [B, 1, groups * R, S].

        It is made once for layers of a forward that are alike: the kernel would make it of a bool mask anew in each.
        """
        alike = groups, like.device, like.dtype
        if alike not in self._added:
            seen = sent(self.visible.repeat(1, 1, groups, 1), like.device)
            self._added[alike] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -math.inf)
        return self._added[alike]


Backend = Callable[[Tensor, Tensor, Tensor, AttentionMask, LayerCall], Tensor]


def folded_heads(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, call: LayerCall) -> Tensor:
    """Heads that share a key become rows of it, [B, heads, R, head_dim].

    transformers' own attention copies every key and value once a head instead: for six heads a key and 500 tokens that
    is a tenth of the whole pass on a CPU core.
    """
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    wide = query.reshape(batch, key.shape[1], groups * rows, width)
    added = mask.within(call.window).added(groups, query)
    if call.softcap or call.sinks is not None:
        out = _products(wide, key, value, added, call)
    else:
        out = F.scaled_dot_product_attention(wide, key, value, attn_mask=added, scale=call.scaling)
    return out.reshape(batch, heads, rows, value.shape[-1])


def _products(query: Tensor, key: Tensor, value: Tensor, added: Tensor, call: LayerCall) -> Tensor:
    """The same by two products of matrices, for what torch's attention has no place for.

    query: [B, kv heads, groups * R, width]; added: the mask"""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = (scores + added).float()
    if call.sinks is not None:
        each = query.shape[2] * query.shape[1] // len(call.sinks)  # rows of a head
        sinks = call.sinks.float().repeat_interleave(each).view(1, query.shape[1], -1, 1).expand(len(query), -1, -1, -1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def torch_gqa(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, call: LayerCall) -> Tensor:
    """torch's own handling of heads that share a key."""
    if call.softcap or call.sinks is not None:
        return folded_heads(query, key, value, mask, call)
    visible = mask.within(call.window).visible.to(query.device)
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=call.scaling, enable_gqa=shared)


def flash(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, call: LayerCall) -> Tensor:
    """Without a mask: each chain says how long it is, on the device, so that its length needs no shape of its own.

    The kernel is causal from the end: the last of R rows sees all that is used. Rows behind a chain's own, which only
    fill the shape, see slots beyond it; nobody reads them. So `key` and `value` hold R slots more than are read.
    """
    if mask.last is None or call.window or call.softcap or call.sinks is not None:
        slots = mask.visible.shape[-1]
        return torch_gqa(query, key[:, :, :slots], value[:, :, :slots], mask, call)
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
        scale=call.scaling,
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


# by the names that results and the self-check have for them, the fastest first, as a rule
BACKENDS: dict[str, Backend] = {"flash": flash, "grouped": torch_gqa, "packed": folded_heads}
