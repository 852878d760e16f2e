"""The cache of a forward that several sequences share: each attends to its own keys, with the bits it has alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.core.token_buckets import CannotBranch
from pearl.machine.transfers import SentOnce, sent
from pearl.models.kv_cache.attention import AttentionMask, LayerCall, folded_heads
from pearl.models.kv_cache.slot_cache import KeyValue, SlotCache
from pearl.models.kv_cache.transformers_interface import ForwardCache


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's rows of the forward."""

    cache: SlotCache  # in which these rows are placed
    rows: range  # of the forward
    queries: int  # as many rows its attention has: a safe count, filled up by repetition of the last


@dataclass(frozen=True)
class AttentionGroup:
    """Neighbours in the buffers whose attention has one shape: one call, in which each has the bits of its own."""

    batch_slots: slice
    queries: int  # of each
    seen: int
    mask: AttentionMask  # [sequences, 1, queries, seen]


class BatchCache(ForwardCache):
    """The linear layers see all rows of the forward at once; in the attention each sequence is alone with its keys."""

    must_attend = True

    def __init__(self, slices: Sequence[SequenceSlice], rows: int):
        """`slices` in the order of their batch slots. `rows`: of the forward; those beyond theirs only fill it."""
        super().__init__()
        self.mask = AttentionMask(torch.ones(1, 1, rows, 1, dtype=torch.bool))  # each sequence brings its own
        self._slices, self._buffers = slices, slices[0].cache.buffers
        assert all(one.cache.buffers is self._buffers for one in slices), "who shares a forward shares buffers"
        self._groups = list(_groups(slices))
        self._gathered: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # see `_gather`
        self._made: list[tuple[int, Tensor]] = []  # layers, and the keys that each has made in this forward
        written: list[int] = []  # rows of the forward, some of them twice, and where each is written
        batch_slots: list[int] = []
        slots: list[int] = []
        for one in slices:
            layout, places = one.cache.layout, one.cache.layout.places
            written += one.rows[: layout.written]
            if layout.branches:
                written += one.rows
                places = [*places, *range(self._buffers.slots, self._buffers.slots + len(one.rows))]
            slots += places
            batch_slots += [one.cache.batch_slot] * len(places)
            assert len(written) == len(slots), f"rows from {one.rows.start} on that lie nowhere"
        self._rows, self._batch_slots, self._slots = (
            SentOnce(torch.tensor(one)) for one in (written, batch_slots, slots)
        )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Called by each layer with its new keys and values, [1, kv heads, rows, head_dim]."""
        self._made.append((layer_idx, key_states))
        buffers = self._buffers.layer(layer_idx, key_states, value_states)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            rows, batch_slots, slots = (one.on(buffer.device) for one in (self._rows, self._batch_slots, self._slots))
            buffer[batch_slots, :, slots] = states[0].transpose(0, 1)[rows]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        """As `SlotCache.attend`; rows that belong to no sequence are zero."""
        owner = next((layer for layer, made in reversed(self._made) if made is key), None)
        if owner is None:
            raise CannotBranch
        keys, values = self._buffers.layer(owner, key, value)
        _, heads, rows, width = query.shape
        there, back = self._gather(heads, rows, query.device)
        gathered = query.transpose(1, 2).reshape(rows * heads, width).index_select(0, there)
        results, first = [], 0
        for group in self._groups:  # the queries of all lie one after the other, as each call takes them
            count = group.batch_slots.stop - group.batch_slots.start
            own = gathered[first : first + count * heads * group.queries].view(count, heads, group.queries, width)
            k, v = keys[group.batch_slots, :, : group.seen], values[group.batch_slots, :, : group.seen]
            results.append(folded_heads(own, k, v, group.mask, call).reshape(-1, v.shape[-1]))
            first += len(results[-1])
        out = torch.cat(results).index_select(0, back).view(1, rows, heads, -1).transpose(1, 2)
        for one in self._slices:
            if one.cache.layout.branches:
                mine, seen = out[:, :, one.rows.start : one.rows.stop], one.cache.layout.seen
                k, v = (part[:, :, :seen] for part in one.cache.view(owner, key, value))
                asked = query[:, :, one.rows.start : one.rows.stop]
                for branch, made in zip(
                    one.cache.layout.branches, one.cache.attend_branches(asked, k, v, call), strict=True
                ):
                    own = branch.own.on(out.device)
                    mine.index_copy_(2, own, made[:, :, : len(own)])
        return out

    def _gather(self, heads: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of the forward's [rows * heads] each query is, [sequences, heads, queries] of each group; and which of
        the queries each row's is. A query that repeats a sequence's last row comes after that; rows of no sequence take
        the first. Made once for all layers of a forward that have so many heads there.
        """
        if (heads, device) not in self._gathered:
            slices = iter(self._slices)
            there, back = [], torch.zeros(rows, heads, dtype=torch.int64)
            first = 0
            for group in self._groups:
                for one in itertools.islice(slices, group.batch_slots.stop - group.batch_slots.start):
                    filled = torch.arange(group.queries).clamp_(max=len(one.rows) - 1) + one.rows.start
                    there.append(filled * heads + torch.arange(heads)[:, None])
                    places = first + torch.arange(heads * group.queries).view(heads, group.queries)
                    back[one.rows.start : one.rows.stop] = places[:, : len(one.rows)].T
                    first += heads * group.queries
            both = torch.cat([one.flatten() for one in there]), back.flatten()
            self._gathered[heads, device] = sent(both[0], device), sent(both[1], device)
        return self._gathered[heads, device]


def _groups(slices: Sequence[SequenceSlice]) -> Iterator[AttentionGroup]:
    together: list[SequenceSlice] = []
    for one in slices:
        if together and not _can_share_call(together[-1], one):
            yield _group(together)
            together = []
        together.append(one)
    yield _group(together)


def _can_share_call(a: SequenceSlice, b: SequenceSlice) -> bool:
    neighbours = b.cache.batch_slot == a.cache.batch_slot + 1
    return neighbours and (a.queries, a.cache.layout.seen) == (b.queries, b.cache.layout.seen)


def _group(slices: Sequence[SequenceSlice]) -> AttentionGroup:
    queries, seen = slices[0].queries, slices[0].cache.layout.seen
    masks = [one.cache.mask.of_rows(torch.arange(queries).clamp_(max=len(one.rows) - 1)) for one in slices]
    batch_slots = slice(slices[0].cache.batch_slot, slices[-1].cache.batch_slot + 1)
    return AttentionGroup(batch_slots, queries, seen, AttentionMask.together(masks))
