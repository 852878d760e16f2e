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
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache

from pearl.core.token_buckets import GRAIN, LIMIT, CannotBranch

SCRATCH_SLOTS = 2 * LIMIT  # rows beyond the slots, for those of a pass that lie in none


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


class Buffers:
    """Keys and values of every layer, [batch slots, kv heads, slots, head_dim], on the layer's device."""

    def __init__(self, slots: int, batch_slots: int = 1, coarse: bool = False):
        """`coarse`: slots are read in fewer different numbers (`seen`), for there is a graph of each."""
        self.slots = -(-slots // GRAIN) * GRAIN
        self.batch_slots, self.coarse = batch_slots, coarse
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer that makes keys and values like these, [batch, kv heads, rows, head_dim]."""
        if layer not in self._layers:
            self._layers[layer] = (self._empty(keys), self._empty(values))
        return self._layers[layer]

    def copy_first(self, slots: int) -> None:
        """Gives all batch slots what the first has in so many slots."""
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[1:, :, :slots] = buffer[:1, :, :slots]

    def seen(self, end: int) -> int:
        """How many slots a forward reads that needs those below `end`: a function of the position alone.

        A multiple of the grain; if `coarse`, with at most a fifth of them in vain and four numbers to an octave.
        """
        grains = -(-end // GRAIN)
        step = 1 << max(0, grains.bit_length() - 3) if self.coarse else 1
        return min(-(-grains // step) * step * GRAIN, self.slots)

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self.batch_slots, heads, self.slots + SCRATCH_SLOTS, width)


class SlotCache(Cache):
    """The keys and values of one text. Set where its next forward reads and writes with `place` or `place_at`."""

    is_compileable = False

    def __init__(self, slots: int | Buffers, batch_slot: int = 0):
        """`slots`: of a cache of its own, or the buffers that several texts have together, of which it is one."""
        super().__init__(layers=[])
        self.buffers = Buffers(slots) if isinstance(slots, int) else slots
        self.slots, self.batch_slot = self.buffers.slots, batch_slot
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # its own, by layer, [1, kv heads, slots, head_dim]
        self.layout = Layout(slice(0, 0), 0, GRAIN)

    def place(
        self, first: int, count: int, written: int, branches: Sequence[Branch] = (), depths: Sequence[int] = ()
    ) -> Tensor:
        """The next forward has `count` rows; the first `written` go to the slots from `first`, each sees up to its own.

        The others are side rows (see `Branch`; `depths` are their positions less `first`) and padding, which nobody
        reads: what they see in the main call is of no account. Returns the mask, bool [1, 1, count, slots seen]: True
        where a row may look.
        """
        assert first + written <= self.slots, "the cache is too short for this forward"
        assert not branches or count <= SCRATCH_SLOTS, "more side rows than there is room for"
        seen = self.buffers.seen(first + max([written, *(depth + 1 for depth in depths)]))
        slots = torch.arange(seen)
        own = torch.arange(first, first + count).clamp_(max=first + written - 1)
        calls = []
        for branch in branches:
            rows = [*range(branch.slot - first), *branch.laid]
            queries = torch.tensor(branch.queries)
            last = torch.tensor([first + depths[row - written] for row in branch.queries])
            mask = (slots <= last[:, None])[None, None]
            calls.append(Call(self.slots + torch.tensor(rows), queries, queries[: branch.own], mask))
        self.layout = Layout(slice(first, first + written), written, seen, tuple(calls))
        return (slots <= own[:, None])[None, None]

    def place_at(self, slots: Tensor, seen: int) -> None:
        """The next forward writes its rows to `slots`, int64 [rows], and reads some of the first `seen`."""
        self.layout = Layout(slots, len(slots), seen)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        """Called by each layer with its new keys and values, [1, kv heads, rows, head_dim]."""
        layout, seen = self.layout, []
        buffers = self._buffers.get(layer_idx) or self.own(layer_idx, key_states, value_states)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, layout.slots] = states[:, :, : layout.written]
            if layout.calls:
                buffer[:, :, self.slots : self.slots + states.shape[2]] = states
            seen.append(buffer[:, :, : layout.seen])
        return tuple(seen)

    def own(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """This text's part of the buffers of a layer, which makes keys and values like these."""
        if layer not in self._buffers:
            whole = self.buffers.of(layer, keys, values)
            self._buffers[layer] = tuple(buffer[self.batch_slot : self.batch_slot + 1] for buffer in whole)
        return self._buffers[layer]

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

    def holds(self, keys: Tensor, layer: int) -> bool:
        """Whether `keys` are a view of what this layer has cached."""
        return keys.data_ptr() == self._buffers[layer][0].data_ptr()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, layer: int
    ) -> Tensor:
        """The attention of a forward's rows over what `update` returned, [1, heads, rows, head_dim]."""
        out = attend_packed(query, key, value, mask, scaling)
        if self.layout.calls:
            if not self.holds(key, layer):
                raise CannotBranch
            self.attend_branches(query, key, value, scaling, layer, out)
        return out

    def attend_branches(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layer: int, out: Tensor
    ) -> None:
        """Writes the attention of the rows beside the chain to `out`. `key`, `value`: at least the slots seen."""
        key, value = key[:, :, : self.layout.seen], value[:, :, : self.layout.seen]
        for call in self.layout.calls:
            self.lay(call, layer)
            queries, own = call.queries.to(query.device), call.own.to(query.device)
            one = attend_packed(query.index_select(2, queries), key, value, call.mask, scaling)
            out.index_copy_(2, own, one[:, :, : len(own)])
        self.move(range(self.layout.written), self.layout.slots.start, layer)  # the chain is back where it was

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layout.slots.start if isinstance(self.layout.slots, slice) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self.layout.seen, 0


@dataclass(frozen=True)
class Share:
    """One text's rows of a forward that several texts have together."""

    cache: SlotCache  # placed for these rows
    rows: range  # of the forward
    mask: Tensor  # bool [1, 1, rows, slots seen]
    queries: int  # as many rows its attention has: a safe count, filled up by repetition of the last


@dataclass(frozen=True)
class _Run:
    """Neighbours in the buffers whose attention has one shape: one call, in which each has the bits of its own."""

    texts: slice
    queries: int  # of each
    seen: int
    mask: Tensor  # bool [texts, 1, queries, seen]


class SharedCache(Cache):
    """Several texts in one forward. The linear layers see all their rows at once; in the attention each text is alone
    with its own keys and has the bits that it has in a forward of its own."""

    is_compileable = False

    def __init__(self, shares: Sequence[Share]):
        """`shares` in the order of their texts. Rows of the forward beyond theirs only fill it."""
        super().__init__(layers=[])
        self._shares = shares
        self._buffers = shares[0].cache.buffers
        assert all(share.cache.buffers is self._buffers for share in shares), "texts that share a forward share buffers"
        self._runs = list(_runs(shares))
        self._gathered: tuple[Tensor, Tensor] | None = None  # see `_gather`
        rows, texts, slots = [], [], []
        for share in shares:
            layout, first = share.cache.layout, share.rows.start
            own = layout.slots
            places = range(own.start, own.stop) if isinstance(own, slice) else own.tolist()
            if layout.calls:
                places = [*places, *range(self._buffers.slots, self._buffers.slots + len(share.rows))]
            slots += places
            texts += [share.cache.batch_slot] * len(places)
            rows += [*share.rows[: layout.written], *(share.rows if layout.calls else ())]
            assert len(rows) == len(slots), f"rows from {first} on that lie nowhere"
        self._rows, self._texts, self._slots = torch.tensor(rows), torch.tensor(texts), torch.tensor(slots)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        """Called by each layer with its new keys and values, [1, kv heads, rows, head_dim]."""
        self._made = key_states
        for buffer, states in zip(
            self._buffers.of(layer_idx, key_states, value_states), (key_states, value_states), strict=True
        ):
            buffer[self._texts, :, self._slots] = states[0].transpose(0, 1)[self._rows]
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, layer: int
    ) -> Tensor:
        """As `SlotCache.attend`; rows that belong to no text are zero."""
        if key is not self._made:
            raise CannotBranch
        keys, values = self._buffers.of(layer, key, value)
        _, heads, rows, width = query.shape
        there, back = self._gather(heads, rows, query.device)
        gathered = query.transpose(1, 2).reshape(rows * heads, width).index_select(0, there)
        results, first = [], 0
        for run in self._runs:  # the queries of all lie one after the other, as each call takes them
            count = run.texts.stop - run.texts.start
            own = gathered[first : first + count * heads * run.queries].view(count, heads, run.queries, width)
            k, v = keys[run.texts, :, : run.seen], values[run.texts, :, : run.seen]
            results.append(attend_packed(own, k, v, run.mask, scaling).reshape(-1, v.shape[-1]))
            first += len(results[-1])
        out = torch.cat(results).index_select(0, back).view(1, rows, heads, -1).transpose(1, 2)
        for share in self._shares:
            if share.cache.layout.calls:
                rows = slice(share.rows.start, share.rows.stop)
                k, v = share.cache.own(layer, key, value)
                share.cache.attend_branches(query[:, :, rows], k, v, scaling, layer, out[:, :, rows])
        return out

    def _gather(self, heads: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of the forward's [rows * heads] each query is, [texts, heads, queries] of each run; and which of the
        queries each row's is. A query that repeats a text's last row comes after that; rows of no text take the first.
        """
        if self._gathered is None:
            shares = iter(self._shares)
            there, back = [], torch.zeros(rows, heads, dtype=torch.int64)
            first = 0
            for run in self._runs:
                for share in itertools.islice(shares, run.texts.stop - run.texts.start):
                    filled = torch.arange(run.queries).clamp_(max=len(share.rows) - 1) + share.rows.start
                    there.append(filled * heads + torch.arange(heads)[:, None])
                    places = first + torch.arange(heads * run.queries).view(heads, run.queries)
                    back[share.rows.start : share.rows.stop] = places[:, : len(share.rows)].T
                    first += heads * run.queries
            self._gathered = torch.cat([one.flatten() for one in there]).to(device), back.flatten().to(device)
        return self._gathered

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return 1, 0


def _runs(shares: Sequence[Share]) -> Iterator[_Run]:
    together: list[Share] = []
    for share in shares:
        if together and not _alike(together[-1], share):
            yield _run(together)
            together = []
        together.append(share)
    yield _run(together)


def _alike(a: Share, b: Share) -> bool:
    neighbours = b.cache.batch_slot == a.cache.batch_slot + 1
    return neighbours and (a.queries, a.cache.layout.seen) == (b.queries, b.cache.layout.seen)


def _run(shares: Sequence[Share]) -> _Run:
    queries, seen = shares[0].queries, shares[0].cache.layout.seen
    masks = [share.mask[:, :, torch.arange(queries).clamp_(max=len(share.rows) - 1)] for share in shares]
    return _Run(slice(shares[0].cache.batch_slot, shares[-1].cache.batch_slot + 1), queries, seen, torch.cat(masks))


class Attends(Protocol):
    """A cache that computes the attention over itself."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, layer: int
    ) -> Tensor: ...


_under_way: Attends | None = None
_masks: dict[tuple[int, torch.device], Tensor] = {}  # of the forward under way, as its attention calls take them


@contextlib.contextmanager
def active_cache(cache: Attends) -> Iterator[None]:
    """While a forward runs, its attention finds the cache here: transformers hands it keys and values only."""
    global _under_way
    before, _under_way = _under_way, cache
    _masks.clear()
    try:
        yield
    finally:
        _under_way = before
        _masks.clear()


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
    if _under_way is None:
        out = attend_packed(query, key, value, attention_mask, scaling)
    else:
        out = _under_way.attend(query, key, value, attention_mask, scaling, module.layer_idx)
    return out.transpose(1, 2), None


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[batch, heads, rows, head_dim]; mask: bool [batch or 1, 1, rows, slots]"""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, width)
    mask = mask.repeat(1, 1, groups, 1) if _under_way is None else _ready(mask, groups, query)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, value.shape[-1])


def _ready(mask: Tensor, groups: int, like: Tensor) -> Tensor:
    """A mask of the forward under way for `groups` heads that share a key. It is made once for all layers, and as it is
    added to the scores: the kernel would turn it into that anew in each."""
    key = (id(mask), like.device)
    if key not in _masks:
        seen = mask.repeat(1, 1, groups, 1).to(like.device)
        _masks[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -math.inf)
    return _masks[key]


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
