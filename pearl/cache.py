"""The key-value cache and the attention over it. All knowledge of transformers' cache and attention interfaces is here.

`SlotCache` holds keys and values in static buffers [batch, kv heads, slots, head_dim]; which slot a row is written
to, and which slots it may see, is said from outside before each forward. Keys carry their rotary position already, so
a mask may select a node's ancestors wherever they lie. Nothing is ever copied or deleted: what no mask selects is not
there.
A token's own place is slot = position. That is a matter of bits: the same keys in other slots sum in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, PretrainedConfig

from pearl.errors import UsageError
from pearl.rows import GRAIN


class SlotCache(Cache):
    """Static keys and values of every layer. Set where the next forward reads and writes with `place`."""

    is_compileable = False

    def __init__(self, slots: int, batch: int = 1):
        super().__init__(layers=[])
        self.slots = -(-slots // GRAIN) * GRAIN
        self._batch = batch
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, made where that layer's device is
        self._first, self._count, self._seen = 0, 0, GRAIN

    def place(self, first: int, count: int, seen_by: int) -> Tensor:
        """The next forward has `count` rows in the slots from `first`; each sees the slots up to its own.

        The rows from `seen_by` on are padding, which nobody reads: they see no further than the others, so the forward
        reads no more slots for them. Returns the mask, bool [1, 1, count, slots seen]: True where a row may look.
        """
        assert first + count <= self.slots, "the cache is too short for this forward"
        self._first, self._count = first, count
        self._seen = -(-(first + seen_by) // GRAIN) * GRAIN
        own = torch.arange(first, first + count)
        return (torch.arange(self._seen) <= own[:, None])[None, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        """Called by each layer with its new keys and values, [batch, kv heads, rows, head_dim]."""
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = (self._empty(key_states), self._empty(value_states))
        rows = slice(self._first, self._first + self._count)
        keys, values = self._buffers[layer_idx]
        keys[:, :, rows] = key_states
        values[:, :, rows] = value_states
        return keys[:, :, : self._seen], values[:, :, : self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._first

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self._seen, 0

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self._batch, heads, self.slots, width)


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,  # [batch, heads, rows, head_dim]
    key: Tensor,  # [batch, kv heads, slots, head_dim]
    value: Tensor,
    attention_mask: Tensor,  # bool [1, 1, rows, slots]
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in which the heads that share a key become rows of it.

    transformers' own copies every key and value once a head instead: for six heads a key and 500 tokens that is a
    tenth of the whole pass on a CPU core.
    """
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, width)
    mask = attention_mask.repeat(1, 1, groups, 1) if groups > 1 else attention_mask
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register("pearl_grouped_sdpa", grouped_sdpa)


def use_grouped_attention(model: torch.nn.Module) -> None:
    """Switches a model that would use sdpa to `grouped_sdpa`. Models that need another attention keep it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("pearl_grouped_sdpa")


def as_model_mask(model: torch.nn.Module, mask: Tensor) -> Tensor:
    """The mask in the form that the model's attention takes: bool, or added to the scores."""
    if model.config._attn_implementation != "eager":
        return mask.to(model.device)
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.device, model.dtype)


def longest_text(config: PretrainedConfig) -> int:
    """How many tokens the model can read with a plain causal mask.

    Raises `UsageError` for layers that keep a state instead of keys, which can't go back after a wrong guess.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if other or not hasattr(config, "num_attention_heads"):
        what = ", ".join(sorted(other)) or config.model_type
        raise UsageError(f"The model has layers without a key-value cache ({what}): choose a decoder-only transformer.")
    limits = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    sliding = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    if sliding and getattr(config, "sliding_window", None):
        limits.append(config.sliding_window)  # up to here a window masks nothing that causality does not
    if "chunked_attention" in kinds:
        limits.append(config.attention_chunk_size)
    return min(limits)
