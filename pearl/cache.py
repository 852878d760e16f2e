"""The key-value cache and the attention over it. All knowledge of transformers' cache and attention interfaces is here.

`SlotCache` holds keys and values in static buffers [batch, kv heads, slots, head_dim]; which slot a row is written
to, and which slots it may see, is said from outside before each forward. Keys carry their rotary position already, so
a mask may select a node's ancestors wherever they lie. Nothing is ever copied or deleted: what no mask selects is not
there.

A token's own place is slot = position. That is a matter of bits: the same keys in other slots sum in another order. So
a branch beside the chain is not read from slots of its own either: for its rows there is an attention call for which
it is laid over the chain, at slot = position, exactly as it would lie if it were the chain (`Branch`). A drafter, whose
bits nobody compares, writes its nodes wherever there is room and lets a mask pick their ancestors (`place_at`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, PretrainedConfig

from pearl.errors import UsageError
from pearl.rows import GRAIN, LIMIT, CannotBranch

SPARE = 2 * LIMIT  # rows beyond the slots, for those of a pass that lie in none


@dataclass(frozen=True)
class Branch:
    """A path beside the chain of a pass, as one attention call sees it: laid over the chain, at slot = position."""

    slot: int  # of the first row laid
    laid: tuple[int, ...]  # rows of the forward, at consecutive slots: the path from where it leaves the chain
    queries: tuple[int, ...]  # rows whose attention is computed here, filled up to a safe count by repetition
    own: int  # how many of the queries count


@dataclass(frozen=True)
class Call:
    """What one branch's attention call needs in every layer."""

    spare: Tensor  # int64 [n]: where the rows lie that go to the n slots from the pass's first on
    queries: Tensor  # int64 [q], the last of them for filling up
    own: Tensor  # int64: those of the queries that count
    mask: Tensor  # bool [1, 1, q, seen]


@dataclass(frozen=True)
class Layout:
    """Where the rows of a forward write their keys and values, and what they see."""

    slots: slice | Tensor  # of the first rows; the others lie in no slot of their own
    written: int  # how many rows that are
    seen: int  # slots read
    calls: tuple[Call, ...] = ()  # for the branches


class SlotCache(Cache):
    """Static keys and values of every layer. Set where the next forward reads and writes with `place` or `place_at`."""

    is_compileable = False

    def __init__(self, slots: int, batch: int = 1):
        super().__init__(layers=[])
        self.slots = -(-slots // GRAIN) * GRAIN
        self._batch = batch
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, made where that layer's device is
        self.layout = Layout(slice(0, 0), 0, GRAIN)
        self._repeated: dict[tuple[int, int], Tensor] = {}  # masks of this forward, see `repeated`

    def place(
        self, first: int, count: int, written: int, branches: Sequence[Branch] = (), depths: Sequence[int] = ()
    ) -> Tensor:
        """The next forward has `count` rows; the first `written` go to the slots from `first`, each sees up to its own.

        The others are side rows (see `Branch`; `depths` are their positions less `first`) and padding, which nobody
        reads: what they see in the main call is of no account. Returns the mask, bool [1, 1, count, slots seen]: True
        where a row may look.
        """
        assert first + written <= self.slots, "the cache is too short for this forward"
        assert not branches or count <= SPARE, "more side rows than there is room for"
        seen = -(-(first + max([written, *(depth + 1 for depth in depths)])) // GRAIN) * GRAIN
        slots = torch.arange(seen)
        own = torch.arange(first, first + count).clamp_(max=first + written - 1)
        calls = []
        for branch in branches:
            rows = [*range(branch.slot - first), *branch.laid]
            queries = torch.tensor(branch.queries)
            last = torch.tensor([first + depths[row - written] for row in branch.queries])
            mask = (slots <= last[:, None])[None, None]
            calls.append(Call(self.slots + torch.tensor(rows), queries, queries[: branch.own], mask))
        self.layout, self._repeated = Layout(slice(first, first + written), written, seen, tuple(calls)), {}
        return (slots <= own[:, None])[None, None]

    def place_at(self, slots: Tensor, seen: int) -> None:
        """The next forward writes its rows to `slots`, int64 [rows], and reads some of the first `seen`."""
        self.layout, self._repeated = Layout(slots, len(slots), seen), {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        """Called by each layer with its new keys and values, [batch, kv heads, rows, head_dim]."""
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = (self._empty(key_states), self._empty(value_states))
        layout, seen = self.layout, []
        for buffer, states in zip(self._buffers[layer_idx], (key_states, value_states), strict=True):
            buffer[:, :, layout.slots] = states[:, :, : layout.written]
            if layout.calls:
                buffer[:, :, self.slots : self.slots + states.shape[2]] = states
            seen.append(buffer[:, :, : layout.seen])
        return tuple(seen)

    def move(self, rows: Sequence[int], slot: int, layer: int | None = None) -> None:
        """Copies rows of the last forward with branches to the slots from `slot` on, in one layer or in all."""
        first, last = self.slots + rows[0], self.slots + rows[-1]
        straight = last - first == len(rows) - 1  # rows ascend
        spare = slice(first, last + 1) if straight else [self.slots + row for row in rows]
        for buffers in self._buffers.values() if layer is None else [self._buffers[layer]]:
            for buffer in buffers:
                buffer[:, :, slot : slot + len(rows)] = buffer[:, :, spare]

    def lay(self, call: Call, layer: int) -> None:
        """Puts a branch, and the chain up to where it leaves it, to the slots of the pass in one layer."""
        first = self.layout.slots.start
        for buffer in self._buffers[layer]:
            buffer[:, :, first : first + len(call.spare)] = buffer.index_select(2, call.spare.to(buffer.device))

    def repeated(self, mask: Tensor, groups: int, device: torch.device) -> Tensor:
        """A mask of this forward for `groups` heads that share a key; made once for all layers."""
        key = (id(mask), device.index or 0)
        if key not in self._repeated:
            self._repeated[key] = mask.repeat(1, 1, groups, 1).to(device)
        return self._repeated[key]

    def holds(self, keys: Tensor, layer: int) -> bool:
        """Whether `keys` are a view of what this layer has cached."""
        return keys.data_ptr() == self._buffers[layer][0].data_ptr()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layout.slots.start if isinstance(self.layout.slots, slice) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self.layout.seen, 0

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """While a forward runs, its attention finds the cache here: transformers hands it keys and values only."""
        global _under_way
        before, _under_way = _under_way, self
        try:
            yield
        finally:
            _under_way = before

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self._batch, heads, self.slots + SPARE, width)


_under_way: SlotCache | None = None


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
    cache = _under_way
    out = _attend(query, key, value, attention_mask, scaling)
    if cache is not None and cache.layout.calls:
        layer = module.layer_idx
        if not cache.holds(key, layer):
            raise CannotBranch
        for call in cache.layout.calls:
            cache.lay(call, layer)
            queries, own = call.queries.to(query.device), call.own.to(query.device)
            one = _attend(query.index_select(2, queries), key, value, call.mask, scaling)
            out.index_copy_(2, own, one[:, :, : len(own)])
        cache.move(range(cache.layout.written), cache.layout.slots.start, layer)  # the chain is back where it was
    return out.transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[batch, heads, rows, head_dim]"""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, width)
    if groups > 1 and _under_way is None:
        mask = mask.repeat(1, 1, groups, 1)
    elif groups > 1:
        mask = _under_way.repeated(mask, groups, query.device)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, value.shape[-1])


AttentionInterface.register("pearl_grouped_sdpa", grouped_sdpa)


def use_grouped_attention(model: torch.nn.Module) -> None:
    """Switches a model that would use sdpa to `grouped_sdpa`. Models that need another attention keep it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("pearl_grouped_sdpa")


def reads_branches(model: torch.nn.Module) -> bool:
    """Whether a pass of this model may hold side branches: they need `grouped_sdpa`."""
    return model.config._attn_implementation == "pearl_grouped_sdpa"


def as_model_mask(model: torch.nn.Module, mask: Tensor) -> Tensor:
    """The mask in the form that the model's attention takes: bool, or added to the scores."""
    if model.config._attn_implementation != "eager":
        return mask.to(model.device)
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.device, model.dtype)


_ALIBI = "its position bias from a mask of its own, which the cache would override"
_OWN_MASKS = {  # settings of models whose own mask is more than causal and would be overridden
    "alibi": _ALIBI,
    "attention_types": "local masks of its own, which the cache would override",
    "use_bidirectional_attention": "tokens see what follows them, so it does not write texts",
}


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
    own = next((why for name, why in _OWN_MASKS.items() if getattr(config, name, None)), None)
    if own or config.model_type == "bloom":
        raise UsageError(f"{config.model_type} makes {own or _ALIBI}: choose another model.")
    limits = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    sliding = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    if sliding and getattr(config, "sliding_window", None):
        limits.append(config.sliding_window)  # up to here a window masks nothing that causality does not
    if "chunked_attention" in kinds:
        limits.append(config.attention_chunk_size)
    return min(limits)
