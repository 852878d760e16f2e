"""The key-value cache: static buffers [batch slots, kv heads, slots, head_dim], and what of them a forward reads.

Which slot a row is written to, and which slots it may see, is said before each forward (`SlotCache.place_chain`,
`SlotCache.place_nodes`). Keys carry their rotary position already, so a mask may select a node's ancestors wherever
they lie. Nothing is ever copied or deleted: what no mask selects is not there.

A token's own place is slot = position. That is a matter of bits: the same keys in other slots sum in another order. So
a branch beside the chain is not read from slots of its own either: for its rows there is an attention call for which
it is laid over the chain, at slot = position, exactly as it would lie if it were the chain (`Branch`). A drafter, whose
bits nobody compares, writes its nodes wherever there is room and lets a mask pick their ancestors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pearl.core.token_buckets import LIMIT, SLOT_MULTIPLE, CannotBranch
from pearl.machine.transfers import SentOnce
from pearl.models.kv_cache.attention import AttentionMask, LayerCall, folded_heads
from pearl.models.kv_cache.transformers_interface import ForwardCache

SCRATCH_SLOTS = 2 * LIMIT  # rows beyond the slots, for those of a pass that lie in none

KeyValue = tuple[Tensor, Tensor]  # of one layer, [batch, kv heads, rows or slots, head_dim]


@dataclass(frozen=True)
class Branch:
    """A path beside the chain of a pass, as one attention call sees it: laid over the chain, at slot = position."""

    slot: int  # of the first row of the overlay
    overlay: tuple[int, ...]  # rows of the forward, at consecutive slots: the path from where it leaves the chain
    queries: tuple[int, ...]  # rows whose attention is computed here, filled up to a safe count by repetition
    own: int  # how many of the queries count


@dataclass(frozen=True)
class BranchAttention:
    """What one branch's attention call needs in every layer."""

    sources: SentOnce  # int64 [n]: where the rows lie that go to the n slots from the pass's first on
    queries: SentOnce  # int64 [q], the last of them for filling up
    own: SentOnce  # int64: those of the queries that count
    mask: AttentionMask  # [1, 1, q, slots seen]


@dataclass(frozen=True)
class ForwardLayout:
    """Where the rows of a forward write their keys and values, and what they read."""

    slots: slice | SentOnce  # of the first rows; the others lie in no slot of their own
    written: int  # how many rows that are
    seen: int  # slots read
    branches: tuple[BranchAttention, ...] = ()
    main: AttentionMask | None = None  # with branches: of the first rows, those of the main call
    results: SentOnce | None = None  # and int64 [rows]: of the main call's results and the branches', which is whose

    @property
    def places(self) -> list[int]:
        """The slots of the first rows."""
        return (
            list(range(self.slots.start, self.slots.stop))
            if isinstance(self.slots, slice)
            else self.slots.here.tolist()
        )


class KVBuffers:
    """Keys and values of every layer, [batch slots, kv heads, slots, head_dim], on the layer's device.

    Those of layers that are alike lie in one tensor, a stack: what is done to all of them is one operation then, which
    on a GPU is one launch."""

    def __init__(self, slots: int, max_sequences: int = 1, coarse: bool = False, alike: Sequence[Sequence[int]] = ()):
        """`coarse`: slots are read in fewer different numbers (`seen`), for there is a graph of each. `alike`: layers
        that make keys and values of the same shapes on the same device; others have a stack each."""
        self.slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self.max_sequences, self.coarse = max_sequences, coarse
        self.stacks: list[Tensor] = []  # [layers, batch slots, kv heads, slots, head_dim] each
        self._alike = {number: tuple(layers) for layers in alike for number in layers}
        # of layers that are alike: keys and values, [2, layers, batch slots, ...], or each of them, [1, layers, ...]
        self._made: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self._parts: dict[int, tuple[Tensor, ...]] = {}  # of these, by layer
        self._layers: dict[int, KeyValue] = {}

    def layer(self, number: int, keys: Tensor, values: Tensor) -> KeyValue:
        """Those of a layer that makes keys and values like these, [batch, kv heads, rows, head_dim]."""
        if number not in self._layers:
            own_keys, own_values = itertools.chain(*self.parts(number, keys, values))
            self._layers[number] = own_keys, own_values
        return self._layers[number]

    def parts(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """The same in as few tensors as hold them: keys and values, [2, ...], or each of them, [1, ...]."""
        if number not in self._parts:
            alike = self._alike.get(number, (number,))
            kind = alike, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device  # in case it was moved
            if kind not in self._made:
                self._made[kind] = self._make(len(alike), keys, values)
            self._parts[number] = tuple(one[:, alike.index(number)] for one in self._made[kind])
        return self._parts[number]

    def all_layers(self) -> Iterable[KeyValue]:
        return self._layers.values()

    def copy_first(self, slots: int) -> None:
        """Gives all batch slots what the first has in so many slots."""
        for stack in self.stacks:
            stack[:, 1:, :, :slots] = stack[:, :1, :, :slots]

    def seen(self, end: int) -> int:
        """How many slots a forward reads that needs those below `end`: a function of the position alone.

        A multiple of `SLOT_MULTIPLE`; if `coarse`, with at most a fifth of them in vain and four numbers to an octave.
        """
        multiples = -(-end // SLOT_MULTIPLE)
        step = 1 << max(0, multiples.bit_length() - 3) if self.coarse else 1
        return min(-(-multiples // step) * step * SLOT_MULTIPLE, self.slots)

    def _make(self, layers: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Buffers of layers whose keys and values are like these: halves of a stack, or a stack each."""
        together = keys.shape == values.shape
        made = [self._empty(2 * layers, keys)] if together else [self._empty(layers, one) for one in (keys, values)]
        self.stacks += made
        return tuple(stack.unflatten(0, (-1, layers)) for stack in made)

    def _empty(self, layers: int, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(layers, self.max_sequences, heads, self.slots + SCRATCH_SLOTS, width)


class SlotCache(ForwardCache):
    """The keys and values of the sequence in one batch slot."""

    def __init__(self, buffers: KVBuffers, batch_slot: int = 0):
        super().__init__()
        self.buffers, self.slots, self.batch_slot = buffers, buffers.slots, batch_slot
        self.layout = ForwardLayout(slice(0, 0), 0, SLOT_MULTIPLE)
        self.high = 0  # slots from here on have never held a row, or not since `clear`
        self._views: dict[int, KeyValue] = {}  # its part of the buffers, by layer, [1, kv heads, slots, head_dim]
        self._parts: dict[int, tuple[Tensor, ...]] = {}  # the same, see `KVBuffers.parts`, [n, kv heads, slots, ...]

    def place_chain(
        self,
        first: int,
        count: int,
        written: int,
        branches: Sequence[Branch] = (),
        positions: Sequence[int] = (),
        main: int | None = None,
    ) -> None:
        """The next forward has `count` rows; the first `written` go to the slots from `first`, each sees up to its own.

        The others are side rows (see `Branch`; `positions` are those of all rows but padding) and padding, which nobody
        reads: what they see in the main call is of no account, and with branches it has only the first `main` rows.
        """
        assert first + written <= self.slots, "the cache is too short for this forward"
        assert not branches or count <= SCRATCH_SLOTS, "more side rows than there is room for"
        seen = self.buffers.seen(max([first + written, *(position + 1 for position in positions)]))
        own = torch.arange(first, first + count).clamp_(max=first + written - 1)
        self.first, self.mask = first, AttentionMask.chain(own[None], seen)
        self.layout = ForwardLayout(slice(first, first + written), written, seen)
        if not branches:
            return
        main = min(main or count, count)
        calls, results, done = [], list(range(written)) + [0] * (count - written), main
        for branch in branches:
            sources = torch.tensor([*range(branch.slot - first), *branch.overlay])
            queries = torch.tensor(branch.queries)
            last = torch.tensor([positions[row] for row in branch.queries])
            mask = AttentionMask.chain(last[None], seen)
            rows = [SentOnce(one) for one in (self.slots + sources, queries, queries[: branch.own])]
            calls.append(BranchAttention(rows[0], rows[1], rows[2], mask))
            for place, row in enumerate(branch.queries[: branch.own], done):
                results[row] = place
            done += len(branch.queries)
        mask, order = AttentionMask.chain(own[None, :main], seen), SentOnce(torch.tensor(results))
        self.layout = replace(self.layout, branches=tuple(calls), main=mask, results=order)

    def place_nodes(self, slots: Tensor, mask: AttentionMask) -> None:
        """The next forward writes its rows to `slots`, int64 [rows]; they see what `mask` says."""
        self.layout = ForwardLayout(SentOnce(slots), len(slots), mask.visible.shape[-1])
        self.mask, self.first, self.high = mask, 0, max(self.high, int(slots.max()) + 1)

    def clear(self, first: int, scratch: bool = True) -> None:
        """Makes the slots from `first` on nought. A row that must not see them counts them nought times; but nought
        times NaN is NaN, so a text with such keys or values would spoil the next. `scratch`: those of the rows that lie
        in no slot too, of which only a forward of static shape reads what another one has written."""
        for own in self._stacks():
            own[:, :, first : max(first, self.high)] = 0
            if scratch:
                own[:, :, self.slots :] = 0
        self.high = min(self.high, first)

    def take(self, first: int, count: int) -> list[Tensor]:
        """A copy of so many slots from `first` on, [layers, kv heads, slots, head_dim] of each stack."""
        return [own[:, :, first : first + count].clone() for own in self._stacks()]

    def put(self, stacks: Sequence[Tensor], first: int) -> None:
        """Puts such a copy to the slots from `first` on."""
        for own, states in zip(self._stacks(), stacks, strict=True):
            own[:, :, first : first + states.shape[2]] = states
            self.high = max(self.high, first + states.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Called by each layer with its new keys and values, [1, kv heads, rows, head_dim]."""
        layout = self.layout
        keys, values = self.view(layer_idx, key_states, value_states)
        for buffer, states in ((keys, key_states), (values, value_states)):
            if layout.branches:  # `attend` lays one after the other over the slots of the pass, the chain at last
                buffer[:, :, self.slots : self.slots + states.shape[2]] = states
            elif isinstance(layout.slots, slice):
                buffer[:, :, layout.slots] = states[:, :, : layout.written]
            else:
                buffer.index_copy_(2, layout.slots.on(buffer.device), states[:, :, : layout.written])
        return keys[:, :, : layout.seen], values[:, :, : layout.seen]

    def view(self, layer: int, keys: Tensor, values: Tensor) -> KeyValue:
        """This sequence's part of the buffers of a layer, which makes keys and values like these."""
        if layer not in self._views:
            own = slice(self.batch_slot, self.batch_slot + 1)
            all_keys, all_values = self.buffers.layer(layer, keys, values)
            self._views[layer] = all_keys[own], all_values[own]
            self._parts[layer] = tuple(one[:, self.batch_slot] for one in self.buffers.parts(layer, keys, values))
        return self._views[layer]

    def move(self, rows: Sequence[int], slot: int) -> None:
        """Copies rows of the last forward with branches to the slots from `slot` on, in all layers."""
        first, last = self.slots + rows[0], self.slots + rows[-1]
        straight = last - first == len(rows) - 1  # rows ascend
        scratch = SentOnce(torch.tensor([self.slots + row for row in rows]))
        for own in self._stacks():
            moved = own[:, :, first : last + 1] if straight else own.index_select(2, scratch.on(own.device))
            own[:, :, slot : slot + len(rows)] = moved

    def _stacks(self) -> Iterator[Tensor]:
        """This sequence's part of each stack, [layers, kv heads, slots, head_dim]."""
        return (stack[:, self.batch_slot] for stack in self.buffers.stacks)

    def lay_over(self, branch: BranchAttention, layer: int) -> None:
        """Puts a branch, and the chain up to where it leaves it, to the slots of the pass in one layer."""
        first = self.layout.places[0]
        for part in self._parts[layer]:
            sources = branch.sources.on(part.device)
            part[:, :, first : first + len(sources)] = part.index_select(2, sources)

    def owner(self, keys: Tensor, layer: int) -> int | None:
        """The layer whose cached keys `keys` are a view of: usually `layer`, but layers may share keys. None: no
        layer's."""
        at = keys.data_ptr()
        if layer in self._views and self._views[layer][0].data_ptr() == at:
            return layer
        return next((other for other, one in self._views.items() if one[0].data_ptr() == at), None)

    @property
    def must_attend(self) -> bool:
        return bool(self.layout.branches)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        main, results = self.layout.main, self.layout.results
        if main is None or results is None:
            return folded_heads(query, key, value, self.mask, call)
        beside = self.attend_branches(query, key, value, call)
        chain = folded_heads(query[:, :, : main.visible.shape[2]], key, value, main, call)
        return torch.cat([chain, *beside], 2).index_select(2, results.on(query.device))

    def attend_branches(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> list[Tensor]:
        """The attention of each branch's queries, [1, heads, queries, head_dim]; then the chain lies in its slots.
        `key`, `value`: the slots seen, of one layer. Raises `CannotBranch` if they are no layer's own."""
        owner = self.owner(key, call.layer)
        if owner is None:
            raise CannotBranch
        results = []
        for branch in self.layout.branches:
            self.lay_over(branch, owner)
            queries = query.index_select(2, branch.queries.on(query.device))
            results.append(folded_heads(queries, key, value, branch.mask, call))
        self.lay_chain(owner)
        return results

    def lay_chain(self, layer: int) -> None:
        """Puts the chain to the slots of the pass, where branches were laid over it."""
        first, count = self.layout.places[0], self.layout.written
        for part in self._parts[layer]:
            part[:, :, first : first + count] = part[:, :, self.slots : self.slots + count]
