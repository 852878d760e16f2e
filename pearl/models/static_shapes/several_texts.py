"""Passes that several texts share, of static shapes: each text attends to its own keys, with the bits it has alone.

The rows of all texts go through the linear layers together. The attention has *lanes*: one for each text, and one for
each path beside a text's chain. A lane reads as many slots as it would alone, each from where its text, or its path,
has it, and has a fixed number of queries; lanes that read as many slots share one call. Whose slots a lane reads is a
number on the device too, so that a graph serves any texts.

    rows      token, position, the place in the buffers where its keys go, the query whose result it takes
    lanes     batch slot; the rows that ask, the last slot that each sees; what is laid over the chain, and from where

Letters: R rows of the shape, L lanes, Q queries of each, S slots read, O rows laid over, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.core.token_buckets import LIMIT, CannotBranch
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention import BACKENDS, AttentionMask, LayerCall
from pearl.models.kv_cache.slot_cache import SCRATCH_SLOTS, KeyValue, KVBuffers
from pearl.models.kv_cache.transformers_interface import ForwardCache, forward
from pearl.models.kv_cache.window import Window
from pearl.models.reduced_head import ReducedVocabHead
from pearl.models.static_shapes.inputs import StaticInputs
from pearl.models.static_shapes.one_text import ForwardRows, kept
from pearl.models.static_shapes.recordings import Capture, Recordings

_TOKEN, _POSITION, _PLACE, _TAKE = range(4)  # of each row
_ROW_LINES = 4


@dataclass(frozen=True)
class SharedShape:
    """All that a recorded forward can't change."""

    rows: int
    queries: int
    groups: tuple[tuple[int, int], ...]  # slots read, and how many lanes read so many
    over: int = 0  # rows that a lane may have laid over its chain
    masked: bool = False
    head: tuple[bool, int] = (True, 0)

    @property
    def lanes(self) -> int:
        return sum(lanes for _, lanes in self.groups)

    @property
    def of_a_lane(self) -> int:
        """Numbers: the batch slot, two of each query, two of each row laid over."""
        return 1 + 2 * self.queries + 2 * self.over

    @property
    def numbers(self) -> int:
        return _ROW_LINES * self.rows + self.lanes * self.of_a_lane


@dataclass
class Lane:
    """One attention over one text's keys. Rows are of the whole forward."""

    batch_slot: int
    seen: int
    queries: list[int]
    lasts: list[int]  # the last slot that each query sees
    to: list[int] = field(default_factory=list)  # slots that hold something else than the chain,
    source: list[int] = field(default_factory=list)  # and where that lies
    mask: np.ndarray | None = None  # bool [1 + windows, queries, S]


class SharedCache(ForwardCache):
    """The cache of a forward of one shape."""

    must_attend = True

    def __init__(
        self, buffers: KVBuffers, shape: SharedShape, inputs: StaticInputs, backend: str, windows: Sequence[Window]
    ):
        super().__init__()
        self._buffers, self._shape, self._attention = buffers, shape, BACKENDS[backend]
        self._spare = shape.queries if backend == "flash" and not shape.masked else 0  # see `attention.flash`
        numbers = inputs.numbers(shape.numbers)
        rows, lanes = numbers.split([_ROW_LINES * shape.rows, shape.lanes * shape.of_a_lane])
        self._rows = rows.view(_ROW_LINES, shape.rows)
        whose, queries, lasts, to, source = lanes.view(shape.lanes, shape.of_a_lane).split(
            [1, shape.queries, shape.queries, shape.over, shape.over], 1
        )
        self._queries, self._lanes = queries.flatten(), whose
        slots = buffers.slots + SCRATCH_SLOTS
        self._places = self._rows[_PLACE] // slots, self._rows[_PLACE] % slots
        self.mask = AttentionMask(torch.ones(1, 1, shape.rows, 1, dtype=torch.bool, device=numbers.device))
        self._groups: list[tuple[int, Tensor, AttentionMask]] = []  # lanes, the slots that each reads, who sees what
        self._made: list[tuple[int, Tensor]] = []  # layers, and the keys that each has made in this forward
        self._indices: dict[tuple[int, int], list[Tensor]] = {}  # see `_index`
        size = shape.lanes, 1, shape.queries, shape.groups[0][0]
        whole = inputs.mask(1 + len(windows), *size) if shape.masked else torch.empty(0)
        first = 0
        for seen, count in shape.groups:
            mine = slice(first, first + count)
            places = torch.arange(seen + self._spare + 1, device=numbers.device).repeat(count, 1)
            if shape.over:  # the last column takes what a lane does not need
                where = to[mine].where(to[mine] < seen, seen + self._spare)
                places = places.scatter(1, where, source[mine])
            if shape.masked:
                near = {window: AttentionMask(one) for window, one in zip(windows, whole[1:], strict=True)}
                mask = AttentionMask(whole[0], windowed=near)
            else:
                mask = AttentionMask.chain(lasts[mine].contiguous(), seen)
            self._groups.append((count, places[:, :-1], mask))
            first += count

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Called by each layer with its new keys and values, [1, kv heads, R, head_dim]."""
        self._made.append((layer_idx, key_states))
        buffers = self._buffers.layer(layer_idx, key_states, value_states)
        batch_slots, slots = self._places
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[batch_slots, :, slots] = states[0].transpose(0, 1)
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        """The attention of the rows, [1, heads, R, head_dim]."""
        owner = next((layer for layer, made in reversed(self._made) if made is key), None)
        if owner is None:
            raise CannotBranch
        buffers = self._buffers.layer(owner, key, value)
        heads, width = query.shape[1], query.shape[3]
        asked = query[0].transpose(0, 1).index_select(0, self._queries).view(-1, self._shape.queries, heads, width)
        results, first = [], 0
        for number, (count, _, mask) in enumerate(self._groups):
            own = asked[first : first + count].transpose(1, 2)  # [L, heads, Q, head_dim]
            keys, values = (self._gathered(buffer, number) for buffer in buffers)
            found = self._attention(own, keys, values, mask, call)
            results.append(found.transpose(1, 2).reshape(count * self._shape.queries, heads, found.shape[-1]))
            first += count
        return torch.cat(results).index_select(0, self._rows[_TAKE]).transpose(0, 1)[None]

    def _gathered(self, buffer: Tensor, group: int) -> Tensor:
        """Keys or values as the lanes of a group see them, [L, kv heads, S, head_dim].  buffer: [B, kv heads, ...]"""
        _, heads, slots, width = buffer.shape
        index = self._index(heads, slots)[group]
        return buffer.view(-1, width).index_select(0, index.flatten()).view(*index.shape, width)

    def _index(self, heads: int, slots: int) -> list[Tensor]:
        """For each group where its lanes' slots lie in a buffer of rows, [L, kv heads, S]: the same in all layers."""
        if (heads, slots) not in self._indices:
            device, first, made = self._lanes.device, 0, []
            for count, places, _ in self._groups:
                whose = self._lanes[first : first + count] * heads + torch.arange(heads, device=device)
                made.append((whose * slots)[:, :, None] + places[:, None])
                first += count
            self._indices[heads, slots] = made
        return self._indices[heads, slots]


class SharedShapeRunner:
    """A model's forwards that several texts share, by shape."""

    def __init__(
        self,
        model: PreTrainedModel,
        buffers: KVBuffers,
        capture: Capture | None = None,
        backend: str = "packed",
        hooks: HiddenStateHooks | None = None,
        head: ReducedVocabHead | None = None,
        windows: Sequence[Window] = (),
    ):
        """As `StaticShapeRunner`."""
        self.backend = backend
        self._model, self._buffers, self._hooks, self._head, self._windows = model, buffers, hooks, head, windows
        self._most = LIMIT * buffers.max_sequences + SCRATCH_SLOTS  # rows: of each text, and those that only fill
        lanes = 2 * LIMIT * buffers.max_sequences  # a lane a row, and what fills them up
        numbers = _ROW_LINES * self._most + lanes * (1 + 4 * LIMIT)
        mask = (1 + len(windows)) * 2 * buffers.max_sequences * LIMIT * buffers.slots
        self._inputs, self._recorded = StaticInputs(model.device, numbers, mask), Recordings(capture, later=True)
        self._logits = self._states = torch.empty(0)  # [most rows, V] and [most rows, F], of the last forward

    @property
    def shapes(self) -> int:
        return len(self._recorded)

    @property
    def capture(self) -> Capture | None:
        """What records forwards."""
        return self._recorded.capture

    @property
    def captured(self) -> bool:
        """Whether forwards are recorded."""
        return self._recorded.captured

    @property
    def failed(self) -> str:
        """Why nothing is recorded any more."""
        return self._recorded.failed

    def supports(self, rows: int) -> bool:
        return rows <= self._most

    @torch.inference_mode()
    def __call__(
        self, parts: Sequence[tuple[int, ForwardRows]], queries: int, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [count, V] and hidden states [count, F] of the rows of some texts, one after the other.

        `parts`: batch slot and rows of each; `queries`: of a lane, at least as many as a text has rows; `count`: rows
        of the forward. The next one writes over both."""
        lanes = list(self._lanes(parts))
        masked = parts[0][1].mask is not None
        if masked:  # a drafter's, whose bits are of no account
            widest = max(lane.seen for lane in lanes)
            groups = [(widest, lanes)]
        else:
            groups = [
                (seen, [one for one in lanes if one.seen == seen]) for seen in sorted({one.seen for one in lanes})
            ]
        groups = [(seen, [*some, *some[:1] * (_filled(len(some)) - len(some))]) for seen, some in groups]
        shape = SharedShape(
            count,
            queries,
            tuple((seen, len(some)) for seen, some in groups),
            LIMIT if any(lane.to for lane in lanes) else 0,
            masked,
            self._head.layout if self._head else (True, 0),
        )
        ordered = [lane for _, some in groups for lane in some]
        self._inputs.fill(self._numbers(parts, ordered, shape), _mask(ordered, shape) if masked else None)
        self._recorded.run(shape, lambda: self._forward(shape))
        return self._logits[:count], self._states[:count] if self._hooks else None

    def _forward(self, shape: SharedShape) -> None:
        rows = self._inputs.numbers(_ROW_LINES, shape.rows)
        cache = SharedCache(self._buffers, shape, self._inputs, self.backend, self._windows)
        logits = forward(self._model, rows[_TOKEN][None], rows[_POSITION][None], cache)
        self._logits = kept(self._logits, logits[0], self._most)
        if self._hooks:
            self._states = kept(self._states, self._hooks.states()[0], self._most)

    def _lanes(self, parts: Sequence[tuple[int, ForwardRows]]) -> Iterator[Lane]:
        first = 0
        for batch_slot, rows in parts:
            count, written = len(rows.tokens), len(rows.slots)
            if rows.mask is not None:
                seen = self._buffers.seen(rows.mask.shape[2])
                yield Lane(batch_slot, seen, list(range(first, first + count)), [0] * count, mask=rows.mask)
            else:
                deepest = max(rows.first + written - 1, *rows.positions[written:], 0)
                seen = self._buffers.seen(deepest + 1)
                yield Lane(batch_slot, seen, list(range(first, first + written)), list(rows.slots))
                for branch in rows.branches:
                    own, scratch = branch.queries[: branch.own], self._buffers.slots
                    to = list(range(branch.slot, branch.slot + len(branch.overlay)))
                    lasts = [rows.positions[row] for row in own]
                    source = [scratch + row for row in branch.overlay]
                    yield Lane(batch_slot, seen, [first + row for row in own], lasts, to, source)
            first += count

    def _numbers(
        self, parts: Sequence[tuple[int, ForwardRows]], lanes: Sequence[Lane], shape: SharedShape
    ) -> np.ndarray:
        """int64 [`SharedShape.numbers`]"""
        made = np.zeros(shape.numbers, dtype=np.int64)
        rows = made[: _ROW_LINES * shape.rows].reshape(_ROW_LINES, shape.rows)
        slots, first = self._buffers.slots + SCRATCH_SLOTS, 0
        for batch_slot, part in parts:
            count, written = len(part.tokens), len(part.slots)
            rows[_TOKEN, first : first + count] = part.tokens
            rows[_POSITION, first : first + count] = part.positions
            places = [*part.slots, *range(self._buffers.slots + written, self._buffers.slots + count)]
            rows[_PLACE, first : first + count] = batch_slot * slots + np.array(places)
            first += count
        pads = shape.rows - first
        assert pads <= LIMIT * self._buffers.max_sequences, "rows that only fill the shape have a place each"
        rows[_TOKEN, first:], rows[_POSITION, first:] = rows[_TOKEN, first - 1], rows[_POSITION, first - 1]
        spread = np.arange(pads)
        of_text, further = spread % self._buffers.max_sequences, spread // self._buffers.max_sequences
        rows[_PLACE, first:] = of_text * slots + self._buffers.slots + LIMIT + further
        asked = made[_ROW_LINES * shape.rows :].reshape(shape.lanes, shape.of_a_lane)
        q = shape.queries
        for number, lane in reversed(list(enumerate(lanes))):  # rows take what the first of equal lanes says
            asked[number, 0] = lane.batch_slot
            filled = q - len(lane.queries)
            asked[number, 1 : 1 + q] = [*lane.queries, *lane.queries[-1:] * filled]
            asked[number, 1 + q : 1 + 2 * q] = [*lane.lasts, *lane.lasts[-1:] * filled]
            if shape.over:
                over = asked[number, 1 + 2 * q :].reshape(2, shape.over)
                over[0] = lane.seen
                over[0, : len(lane.to)], over[1, : len(lane.to)] = lane.to, lane.source
            rows[_TAKE, lane.queries] = number * q + np.arange(len(lane.queries))
        return made


def _filled(lanes: int) -> int:
    """As many lanes as a shape has for so many: powers of two, and halfway."""
    return next(count for power in range(20) for count in (1 << power, 3 << power >> 1) if count >= lanes)


def _mask(lanes: Sequence[Lane], shape: SharedShape) -> np.ndarray:
    """bool [1 + windows, L, 1, Q, S]"""
    assert lanes[0].mask is not None, "a drafter's rows say what they see"
    made = np.zeros((len(lanes[0].mask), shape.lanes, 1, shape.queries, shape.groups[0][0]), dtype=bool)
    for number, lane in enumerate(lanes):
        assert lane.mask is not None
        _, count, slots = lane.mask.shape
        made[:, number, 0, :count, :slots] = lane.mask
        made[:, number, 0, count:, :slots] = lane.mask[:, -1:]
    return made
