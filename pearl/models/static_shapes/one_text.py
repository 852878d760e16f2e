"""Passes over one text, of static shapes: chains, trees, a drafter's nodes, and whole pieces of a prompt.

A row that lies in no slot (padding, a row beside the chain) writes beyond the slots, to the spare place of its number.
A branch is laid over the chain by *reading* each slot from where the branch has it, all branches in one attention call.
Masks are made, and branches laid over the chain, on the device, inside the graph.

Letters: R rows of the shape, P paths beside the chain, S slots read, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.core.token_buckets import LIMIT, PREFILL_CHUNK, CannotBranch
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention import BACKENDS, AttentionMask, LayerCall
from pearl.models.kv_cache.slot_cache import SCRATCH_SLOTS, Branch, KeyValue, SlotCache
from pearl.models.kv_cache.transformers_interface import ForwardCache, forward
from pearl.models.kv_cache.window import Window
from pearl.models.reduced_head import ReducedVocabHead
from pearl.models.static_shapes.inputs import StaticInputs
from pearl.models.static_shapes.recordings import Capture, Recordings

COUNTS = (1, 2, 4, 8, 12, 16)  # row counts of shapes; a target's are those of them that keep its bits
DRAFT_COUNTS = (*COUNTS, 24, 32, 48, 64)  # a drafter that guesses several tokens at once has a row for each
PATHS = (0, 1, 2, 4, 8, LIMIT)
_TOKEN, _POSITION, _SLOT, _LAST, _TAKE = range(5)  # lines of the numbers that every pass has
_TO, _FROM, _QUERY, _QUERY_LAST = range(4)  # lines of each path, after those
_COMMON, _OF_A_PATH = 5, 4


@dataclass(frozen=True)
class ForwardShape:
    """All that a recorded forward can't change."""

    batch_slot: int
    rows: int
    seen: int  # slots read
    paths: int = 0
    masked: bool = False  # each row says which slots it sees: a drafter's. Else all up to one
    head: tuple[bool, int] = (True, 0)  # see `ReducedVocabHead.layout`
    keep: int = 0  # rows whose logits are wanted, the last ones; 0: all

    @property
    def lines(self) -> tuple[int, int]:
        """Of the numbers."""
        return _COMMON + _OF_A_PATH * self.paths, max(self.rows, LIMIT)


@dataclass(frozen=True)
class ForwardRows:
    """The rows of a pass over one text, before padding."""

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]  # of the first rows; the others lie in no slot
    first: int = 0  # position of the first
    branches: Sequence[Branch] = ()
    mask: np.ndarray | None = None  # bool [1 + windows, rows, slots]: what each sees, if not all up to its own slot
    least: int = 0  # rows of the forward, these and padding


class StaticCache(ForwardCache):
    """A `SlotCache` as a forward of one shape sees it: where rows lie is read from the inputs, on the device."""

    def __init__(
        self, cache: SlotCache, shape: ForwardShape, inputs: StaticInputs, backend: str, windows: Sequence[Window]
    ):
        super().__init__()
        self._cache, self._shape, self._attention = cache, shape, BACKENDS[backend]
        # rows may lie behind the chain's own
        filled = backend == "flash" and not shape.masked and shape.rows < PREFILL_CHUNK
        self._read = shape.seen + (LIMIT if filled else 0)
        numbers = inputs.numbers(*shape.lines)[:, : shape.rows]
        self._slots, self._take = numbers[_SLOT], numbers[_TAKE]
        if shape.masked:
            count, size = 1 + len(windows), (1, 1, shape.rows, shape.seen)
            whole, *near = inputs.mask(count, *size)
            windowed = {window: AttentionMask(one) for window, one in zip(windows, near, strict=True)}
            self.mask = AttentionMask(whole, windowed=windowed)
        else:
            self.mask = AttentionMask.chain(numbers[_LAST][None], shape.seen)
        if shape.paths:
            lines = numbers[_COMMON : _COMMON + _OF_A_PATH * shape.paths].unflatten(0, (shape.paths, _OF_A_PATH))
            # one column more takes what a path does not need
            places = torch.arange(self._read + 1, device=numbers.device).repeat(shape.paths, 1)
            to = lines[:, _TO].where(lines[:, _TO] < shape.seen, self._read)
            self._places = places.scatter_(1, to, lines[:, _FROM])[:, : self._read].flatten()
            self._queries = lines[:, _QUERY].flatten()
            self._path_mask = AttentionMask.chain(lines[:, _QUERY_LAST], shape.seen)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Called by each layer with its new keys and values, [1, kv heads, R, head_dim]."""
        keys, values = self._cache.view(layer_idx, key_states, value_states)
        for buffer, states in ((keys, key_states), (values, value_states)):
            buffer.index_copy_(2, self._slots.to(buffer.device), states)
        return keys[:, :, : self._read], values[:, :, : self._read]

    @property
    def must_attend(self) -> bool:
        return bool(self._shape.paths)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        """The attention of the rows, [1, heads, R, head_dim], those of each path over the chain with it laid over."""
        out = self._attention(query, key, value, self.mask, call)
        if not self._shape.paths:
            return out
        owner = self._cache.owner(key, call.layer)
        if owner is None:
            raise CannotBranch
        keys, values = map(self._laid_over, self._cache.view(owner, key, value))
        queries = query.index_select(2, self._queries.to(query.device))
        queries = queries[0].unflatten(1, (self._shape.paths, -1)).transpose(0, 1)  # [P, heads, R, head_dim]
        beside = self._attention(queries, keys, values, self._path_mask, call).transpose(0, 1).flatten(1, 2)
        return torch.cat([out, beside[None]], 2).index_select(2, self._take.to(out.device))

    def _laid_over(self, buffer: Tensor) -> Tensor:
        """Keys or values as each path sees them, [P, kv heads, S, head_dim]."""
        gathered = buffer.index_select(2, self._places.to(buffer.device))
        return gathered[0].unflatten(1, (self._shape.paths, self._read)).transpose(0, 1)


class StaticShapeRunner:
    """A model's forwards by shape."""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        counts: Sequence[int] = COUNTS,
        capture: Capture | None = None,
        backend: str = "packed",
        hooks: HiddenStateHooks | None = None,
        head: ReducedVocabHead | None = None,
        windows: Sequence[Window] = (),
        pieces: bool = True,
    ):
        """`slots`: of a text's cache. `counts`: row counts that there are shapes of, ascending. `capture`: None leaves
        the code as it is. `backend`: see `kv_cache.attention`. `windows`: the different ones of the layers. `pieces`:
        whole pieces of a prompt have shapes too."""
        self.counts, self.backend, self._reads_pieces = tuple(counts), backend, pieces
        self._model, self._slots, self._hooks, self._head = model, slots, hooks, head
        if head:
            head.settle()
        wide, masks = max(LIMIT, self.counts[-1]), 1 + len(windows)
        numbers = max((_COMMON + _OF_A_PATH * LIMIT) * LIMIT, _COMMON * max(wide, PREFILL_CHUNK))
        self._inputs, self._windows = StaticInputs(model.device, numbers, masks * wide * slots), windows
        self._recorded, self._pieces = Recordings(capture), Recordings(capture, later=True)
        self._logits = self._states = torch.empty(0)  # [most rows, V] and [most rows, F], of the last forward
        self._most = wide, max(wide, PREFILL_CHUNK)
        self._filled: tuple[ForwardShape, ForwardRows] | None = None  # what the inputs hold, if that was prepared
        self.foreseen = 0  # forwards whose inputs were there

    @property
    def shapes(self) -> int:
        """How many there have been so far."""
        return len(self._recorded) + len(self._pieces)

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
        return self._recorded.failed or self._pieces.failed

    def supports(self, rows: int, keep: int = 0) -> bool:
        """Whether a forward of so many rows has a shape, the last `keep` of which are asked what follows."""
        return rows <= self.counts[-1] or (self._reads_pieces and rows == PREFILL_CHUNK and keep == 1)

    @torch.inference_mode()
    def __call__(self, cache: SlotCache, rows: ForwardRows) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V], V as the model has it, or [1, V] of a piece of a prompt, and the hooked layers' hidden states
        [R, F]. The next forward writes over both."""
        shape = self._fill(cache, rows)
        piece = bool(shape.keep)
        (self._pieces if piece else self._recorded).run(shape, lambda: self._forward(cache, shape))
        return self._logits[: shape.keep or shape.rows], self._states[: shape.rows] if self._hooks else None

    @torch.inference_mode()
    def prepare(self, cache: SlotCache, rows: ForwardRows) -> None:
        """Fills the inputs of a forward that is likely to be the next one, of rows that need no mask. If it is another,
        they are filled again."""
        self._filled = self._fill(cache, rows), rows

    @torch.inference_mode()
    def say_the_same(self) -> None:
        """Recordings that do nothing leave equal logits from here on, of which the first is the best."""
        self._logits.zero_()

    def _fill(self, cache: SlotCache, rows: ForwardRows) -> ForwardShape:
        """The shape of a forward, whose inputs are filled unless they are."""
        piece = len(rows.tokens) > self.counts[-1]
        counts = (PREFILL_CHUNK,) if piece else self.counts
        count = next(count for count in counts if count >= max(rows.least, len(rows.tokens)))
        seen = cache.buffers.seen(rows.mask.shape[2] if rows.mask is not None else 1 + max(_lasts(rows)))
        paths = next(paths for paths in PATHS if paths >= len(rows.branches))
        layout, masked = self._head.layout if self._head else (True, 0), rows.mask is not None
        shape = ForwardShape(cache.batch_slot, count, seen, paths, masked, layout, int(piece))
        filled, self._filled = self._filled, None
        if filled == (shape, rows):
            self.foreseen += 1
        else:
            self._inputs.fill(_numbers(rows, shape, self._slots), _mask(rows, shape))
        return shape

    def _forward(self, cache: SlotCache, shape: ForwardShape) -> None:
        numbers = self._inputs.numbers(*shape.lines)
        tokens, positions = numbers[_TOKEN, : shape.rows], numbers[_POSITION, : shape.rows]
        seen = StaticCache(cache, shape, self._inputs, self.backend, self._windows)
        logits = forward(self._model, tokens[None], positions[None], seen, shape.keep)
        self._logits = kept(self._logits, logits[0], self._most[0])
        if self._hooks:
            self._states = kept(self._states, self._hooks.states()[0], self._most[1])


def kept(buffer: Tensor, rows: Tensor, most: int) -> Tensor:
    """`rows` in the buffer of all shapes, of `most` rows, which is made for the first of them."""
    if buffer.shape[1:] != rows.shape[1:] or buffer.dtype != rows.dtype or buffer.device != rows.device:
        buffer = rows.new_zeros(most, rows.shape[1])
    buffer[: len(rows)] = rows
    return buffer


def _lasts(rows: ForwardRows) -> list[int]:
    """The last slot that each row sees in the main call; but rows beside the chain see theirs in a call of its own."""
    written = len(rows.slots)
    deepest = max([rows.first + written - 1, *rows.positions[written:]])
    return [*rows.slots, *[deepest] * (len(rows.tokens) - written)]


def _numbers(rows: ForwardRows, shape: ForwardShape, slots: int) -> np.ndarray:
    """int64 `ForwardShape.lines`"""
    count, written, total = len(rows.tokens), len(rows.slots), shape.rows
    made = np.zeros(shape.lines, dtype=np.int64)
    made[_TOKEN, :total] = rows.tokens[-1]
    made[_TOKEN, :count] = rows.tokens
    made[_POSITION, :total] = rows.positions[-1]
    made[_POSITION, :count] = rows.positions
    # a row beside the chain has the spare place of its number; else only those that fill the shape want one
    first_spare = 0 if rows.branches else written
    assert total - first_spare <= SCRATCH_SLOTS, "rows in no slot have a place each"
    made[_SLOT, :total] = slots + np.arange(total) - first_spare
    made[_SLOT, :written] = rows.slots
    made[_LAST, :total] = min(rows.first + written, shape.seen) - 1
    made[_LAST, :written] = np.minimum(rows.slots, shape.seen - 1)
    made[_TAKE, :total] = np.arange(total)
    for number in range(shape.paths):
        line = made[_COMMON + _OF_A_PATH * number :]
        line[_TO] = shape.seen
        if number >= len(rows.branches):
            continue
        branch = rows.branches[number]
        line[_TO, : len(branch.overlay)] = branch.slot + np.arange(len(branch.overlay))
        line[_FROM, : len(branch.overlay)] = slots + np.array(branch.overlay)
        own = list(branch.queries[: branch.own])
        line[_QUERY, :total] = own[-1]
        line[_QUERY, : len(own)] = own
        line[_QUERY_LAST, :total] = rows.positions[own[-1]]
        line[_QUERY_LAST, : len(own)] = [rows.positions[row] for row in own]
        made[_TAKE, own] = total * (1 + number) + np.arange(len(own))
    return made


def _mask(rows: ForwardRows, shape: ForwardShape) -> np.ndarray | None:
    """bool [1 + windows, R, S]: a row that only fills the shape sees what the last one does."""
    if rows.mask is None:
        return None
    masks, count, slots = rows.mask.shape
    made = np.zeros((masks, shape.rows, shape.seen), dtype=bool)
    made[:, :count, :slots] = rows.mask
    made[:, count:] = made[:, count - 1 : count]
    return made
