"""Forwards of static shapes, so that a GPU can replay them as recorded graphs.

A decoding step launches hundreds of small kernels; on a GPU the launching takes longer than the kernels. A CUDA graph
launches them all at once, but it replays *addresses*: same shapes, same buffers. So here the row count and the slots
read come in buckets (`ForwardShape`), and all that differs between two passes of one shape (token ids, positions,
slots, what a row sees) is a few hundred numbers in one buffer (`StaticInputs`), which one copy fills. What a mask can
be computed from is sent, not the mask. Masks are made, and branches laid over the chain, on the device, inside the
graph.

`Capture` says what becomes of a shape's code: it is recorded and replayed (`pearl.models.cuda_graphs`), or called
anew each time, which is the reference. The code is the same, so one may be compared with the other bit for bit
(`pearl.commands.selfcheck`), and without a GPU all but the recording is tested.

A row that lies in no slot (padding, a row beside the chain) writes beyond the slots, to the spare place of its number.
A branch is laid over the chain by *reading* each slot from where the branch has it, all branches in one attention call.

Letters: R rows of the shape, P paths beside the chain, S slots read, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.config.inputs import brief
from pearl.core.token_buckets import LIMIT, CannotBranch
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention import BACKENDS, AttentionMask, LayerCall
from pearl.models.kv_cache.slot_cache import SCRATCH_SLOTS, Branch, KeyValue, SlotCache
from pearl.models.kv_cache.transformers_interface import ForwardCache, forward
from pearl.models.kv_cache.window import Window
from pearl.models.reduced_head import ReducedVocabHead

_log = logging.getLogger(__name__)
COUNTS = (1, 2, 4, 8, 12, 16)  # row counts of shapes; a target's are those of them that keep its bits
PATHS = (0, 1, 2, 4, 8, LIMIT)
_TOKEN, _POSITION, _SLOT, _LAST, _TAKE = range(5)  # lines of `StaticInputs.numbers` that every pass has
_TO, _FROM, _QUERY, _QUERY_LAST = range(4)  # lines of each path, after those
_COMMON, _OF_A_PATH = 5, 4

Run = Callable[[], None]  # a forward whose inputs and outputs lie in buffers


class Capture(Protocol):
    def __call__(self, run: Run) -> Run:
        """What does the same as `run` and may be called in its place. Raises `RuntimeError` if that can't be made."""


@dataclass(frozen=True)
class ForwardShape:
    """All that a recorded forward can't change."""

    batch_slot: int
    rows: int
    seen: int  # slots read
    paths: int = 0
    masked: bool = False  # each row says which slots it sees: a drafter's. Else all up to one
    head: tuple[bool, int] = (True, 0)  # see `ReducedVocabHead.layout`


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


class StaticInputs:
    """The buffers from which every shape reads, and the way there: one copy, which does not wait for the device."""

    def __init__(self, device: torch.device, slots: int, masks: int):
        lines = _COMMON + _OF_A_PATH * LIMIT
        self.numbers = torch.zeros(lines, LIMIT, dtype=torch.int64, device=device)
        self.mask = torch.zeros(masks * LIMIT * slots, dtype=torch.bool, device=device)
        # two by turns: one is filled while the other's copy may still be under way
        self._stages = [_PinnedStage(self.numbers, self.mask) for _ in range(2)] if device.type == "cuda" else []

    def fill(self, numbers: np.ndarray, mask: np.ndarray | None) -> None:
        """numbers: int64 [lines, LIMIT]; mask: bool [1 + windows, R, S]"""
        lines = len(numbers)
        if not self._stages:
            self.numbers[:lines] = torch.from_numpy(numbers)
            if mask is not None:
                self.mask[: mask.size] = torch.from_numpy(mask.reshape(-1))
            return
        stage = self._stages.pop(0)
        self._stages.append(stage)
        stage.send(numbers, mask, self.numbers[:lines], self.mask)


class _PinnedStage:
    """Page-locked memory, from which a GPU copies by itself."""

    def __init__(self, numbers: Tensor, mask: Tensor):
        self._numbers = torch.zeros(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._mask = torch.zeros(mask.shape, dtype=mask.dtype, pin_memory=True)
        self._sent = torch.cuda.Event()

    def send(self, numbers: np.ndarray, mask: np.ndarray | None, to: Tensor, mask_to: Tensor) -> None:
        self._sent.synchronize()  # has long happened: a pass lies between
        here = self._numbers[: len(to)]
        here.copy_(torch.from_numpy(numbers))
        to.copy_(here, non_blocking=True)
        if mask is not None:
            flat = self._mask[: mask.size]
            flat.copy_(torch.from_numpy(mask.reshape(-1)))
            mask_to[: mask.size].copy_(flat, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(to.device))


class StaticCache(ForwardCache):
    """A `SlotCache` as a forward of one shape sees it: where rows lie is read from the inputs, on the device."""

    def __init__(
        self, cache: SlotCache, shape: ForwardShape, inputs: StaticInputs, backend: str, windows: Sequence[Window]
    ):
        super().__init__()
        self._cache, self._shape, self._attention = cache, shape, BACKENDS[backend]
        self._read = shape.seen + (LIMIT if backend == "flash" and not shape.masked else 0)
        numbers = inputs.numbers[:, : shape.rows]
        self._slots, self._take = numbers[_SLOT], numbers[_TAKE]
        if shape.masked:
            count, size = 1 + len(windows), (1, 1, shape.rows, shape.seen)
            whole, *near = inputs.mask[: count * shape.rows * shape.seen].view(count, *size)
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
        owner = self._cache.owner(key)
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
    ):
        """`slots`: of a text's cache. `counts`: row counts that there are shapes of, ascending. `capture`: None leaves
        the code as it is. `backend`: see `kv_cache.attention`. `windows`: the different ones of the layers."""
        self.counts, self.backend = tuple(counts), backend
        self.failed = ""  # why nothing is recorded any more
        self._model, self._slots, self._capture, self._hooks, self._head = model, slots, capture, hooks, head
        if head:
            head.settle()
        self._inputs, self._windows = StaticInputs(model.device, slots, 1 + len(windows)), windows
        self._runs: dict[ForwardShape, Run] = {}
        self._logits = self._states = torch.empty(0)  # [LIMIT, V] and [LIMIT, F], of the last forward

    @property
    def shapes(self) -> int:
        """How many there have been so far."""
        return len(self._runs)

    def supports(self, rows: int) -> bool:
        """Whether a forward of so many rows has a shape."""
        return rows <= self.counts[-1]

    @torch.inference_mode()
    def __call__(self, cache: SlotCache, rows: ForwardRows) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V], V as the model has it, and the hooked layers' hidden states [R, F]. The next forward writes
        over both."""
        count = next(count for count in self.counts if count >= max(rows.least, len(rows.tokens)))
        seen = cache.buffers.seen(rows.mask.shape[2] if rows.mask is not None else 1 + max(_lasts(rows)))
        paths = next(paths for paths in PATHS if paths >= len(rows.branches))
        layout = self._head.layout if self._head else (True, 0)
        shape = ForwardShape(cache.batch_slot, count, seen, paths, rows.mask is not None, layout)
        self._inputs.fill(_numbers(rows, shape, self._slots), _mask(rows, shape))
        if shape not in self._runs:
            self._runs[shape] = self._prepared(cache, shape)
        self._runs[shape]()
        return self._logits[:count], self._states[:count] if self._hooks else None

    def _prepared(self, cache: SlotCache, shape: ForwardShape) -> Run:
        def run() -> None:
            tokens = self._inputs.numbers[_TOKEN : _TOKEN + 1, : shape.rows]
            positions = self._inputs.numbers[_POSITION : _POSITION + 1, : shape.rows]
            seen = StaticCache(cache, shape, self._inputs, self.backend, self._windows)
            logits = forward(self._model, tokens, positions, seen)
            self._logits = _kept(self._logits, logits[0])
            if self._hooks:
                self._states = _kept(self._states, self._hooks.states()[0])

        if self._capture is None:
            return run
        run()  # buffers are made outside of the recording
        try:
            return self._capture(run)
        except RuntimeError as error:
            self.failed = brief(error)
            self._capture = None
            _log.warning("forwards can't be recorded as graphs, so they run eagerly (%s).", self.failed)
            return run


def _kept(buffer: Tensor, rows: Tensor) -> Tensor:
    """`rows` in the buffer of all shapes, which is made for the first of them."""
    if buffer.shape[1:] != rows.shape[1:] or buffer.dtype != rows.dtype or buffer.device != rows.device:
        buffer = rows.new_zeros(LIMIT, rows.shape[1])
    buffer[: len(rows)] = rows
    return buffer


def _lasts(rows: ForwardRows) -> list[int]:
    """The last slot that each row sees in the main call; but rows beside the chain see theirs in a call of its own."""
    written = len(rows.slots)
    deepest = max([rows.first + written - 1, *rows.positions[written:]])
    return [*rows.slots, *[deepest] * (len(rows.tokens) - written)]


def _numbers(rows: ForwardRows, shape: ForwardShape, slots: int) -> np.ndarray:
    """int64 [lines, LIMIT]"""
    count, written, total = len(rows.tokens), len(rows.slots), shape.rows
    made = np.zeros((_COMMON + _OF_A_PATH * shape.paths, LIMIT), dtype=np.int64)
    made[_TOKEN, :total] = rows.tokens[-1]
    made[_TOKEN, :count] = rows.tokens
    made[_POSITION, :total] = rows.positions[-1]
    made[_POSITION, :count] = rows.positions
    made[_SLOT, :total] = slots + np.arange(total)
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


assert SCRATCH_SLOTS > LIMIT, "rows in no slot have a place each"
