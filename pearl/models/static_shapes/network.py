"""Forwards of a drafter's own network: rows, who sees whom, and the keys and values of what was read before.

Such a network is small, so its launches are most of its time. With static shapes its inputs are copied into buffers
that stay: numbers and masks from the host by one copy each, rows and what was read before on the device. A row that
only fills the shape sees itself alone, and keys behind those that were read are seen by nobody.

Refuses to know: what the rows are, and where keys and values are kept (`pearl.drafters.feature`,
`pearl.drafters.dflash`). Bits are of no account; that a replay says what its code says is tried at start (`record`).

Letters: R rows, S positions read before, n numbers of each row, W width of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pearl.core.token_buckets import SLOT_MULTIPLE, Check
from pearl.machine.transfers import sent
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.models.static_shapes.inputs import StaticInputs
from pearl.models.static_shapes.one_text import DRAFT_COUNTS
from pearl.models.static_shapes.recordings import SEEDS, Capture, Recordings, compare_graphs

# numbers int64 [n, R]; rows [R, W], if there are any; masks bool [R, S + R]; past -> tensors with a row for each,
# [R, *] or [1, heads, R, *]
Code = Callable[[Tensor, Tensor | None, list[Tensor], list[KeyValue]], list[Tensor]]


class NetworkForward:
    """What calls a network: its code as it is, or, after `use_static_shapes`, by shapes."""

    def __init__(self, code: Code, device: torch.device):
        self._code, self._device = code, device
        self._static: _StaticNetwork | None = None
        self._noted: list[Tensor] | None = None

    @property
    def shapes(self) -> int:
        return len(self._static.recorded) if self._static else 0

    @property
    def captured(self) -> bool:
        return self._static is not None and self._static.recorded.captured

    def use_static_shapes(self, capture: Capture | None) -> None:
        self._static = _StaticNetwork(self._code, self._device, capture)

    def record(self, capture: Capture, probe: Callable[[int], object]) -> Check:
        """Forwards are replayed from here on, if replays say what the code says. `probe(seed)` makes some, all of
        those that there are; each shape comes twice before it is replayed with another text."""
        said = []
        for how in (None, capture):
            self.use_static_shapes(how)
            with self._notes() as noted:
                for seed in SEEDS:
                    probe(seed)
            said.append(noted)
        static = self._static
        assert static is not None, "it has just been made"
        code, graphs = said
        check = compare_graphs("graph against eager, drafter", code, graphs, self.shapes, static.recorded.failed)
        if not check.holds and not static.recorded.failed:
            self._static = None
        return check

    @contextlib.contextmanager
    def _notes(self) -> Iterator[list[Tensor]]:
        noted: list[Tensor] = []
        self._noted = noted
        try:
            yield noted
        finally:
            self._noted = None

    @torch.inference_mode()
    def __call__(
        self,
        numbers: Sequence[Sequence[int]],
        rows: Tensor | None,
        masks: Sequence[Tensor],
        past: Sequence[KeyValue],
    ) -> list[Tensor]:
        """What the code returns. `masks` lie on the host."""
        count = len(numbers[0])
        if self._static and count <= DRAFT_COUNTS[-1] and past:
            found = self._static(numbers, rows, masks, past)
        else:
            there = {id(mask): sent(mask, self._device) for mask in masks}
            asked = sent(torch.tensor(numbers), self._device)
            found = self._code(asked, rows, [there[id(mask)] for mask in masks], list(past))
        if self._noted is not None:
            self._noted += found
        return found


class _StaticNetwork:
    def __init__(self, code: Code, device: torch.device, capture: Capture | None):
        self.recorded = Recordings(capture, later=True)
        self._code, self._device = code, device
        self._inputs: StaticInputs | None = None
        self._rows = torch.empty(0)  # [most, W]
        self._past: list[KeyValue] = []  # [1, kv heads, most, head_dim]
        self._room = self._high = 0  # positions that the buffers hold, and have held since they were nought
        self._found: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(
        self,
        numbers: Sequence[Sequence[int]],
        rows: Tensor | None,
        masks: Sequence[Tensor],
        past: Sequence[KeyValue],
    ) -> list[Tensor]:
        count, before = len(numbers[0]), past[0][0].shape[2]
        wide = next(one for one in DRAFT_COUNTS if one >= count)
        seen = max(SLOT_MULTIPLE, -(-before // SLOT_MULTIPLE) * SLOT_MULTIPLE)
        kinds: dict[int, int] = {}  # layers may share a mask
        which = tuple(kinds.setdefault(id(mask), len(kinds)) for mask in masks)
        self._make_room(rows, past, seen, len(numbers), len(which))
        assert self._inputs is not None
        if rows is not None:
            self._rows[:count].copy_(rows)
        self._fill_past(past, before)
        made = np.zeros((len(kinds), wide, seen + wide), dtype=bool)
        made[:, :, seen:] |= np.eye(wide, dtype=bool)
        for number, mask in zip(which, masks, strict=True):
            said = mask.numpy()
            made[number, :count, :before], made[number, :count, seen : seen + count] = (
                said[:, :before],
                said[:, before:],
            )
        filled = np.array([[*line, *[line[-1]] * (wide - count)] for line in numbers], dtype=np.int64)
        self._inputs.fill(filled, made)
        shape = (wide, seen, len(numbers), *which)
        self.recorded.run(shape, lambda: self._forward(shape, rows is not None))
        return [(one[:, :, :count] if one.dim() == 4 else one[:count]).clone() for one in self._found[shape]]

    def _forward(self, shape: tuple[int, ...], has_rows: bool) -> None:
        wide, seen, lines, *which = shape
        assert self._inputs is not None
        masks = self._inputs.mask(1 + max(which), wide, seen + wide)
        past = [(k[:, :, :seen], v[:, :, :seen]) for k, v in self._past]
        numbers = self._inputs.numbers(lines, wide)
        found = self._code(numbers, self._rows[:wide] if has_rows else None, [masks[one] for one in which], past)
        if shape not in self._found:  # buffers that stay
            self._found[shape] = [torch.zeros_like(one) for one in found]
        for buffer, one in zip(self._found[shape], found, strict=True):
            buffer.copy_(one)

    def _make_room(self, rows: Tensor | None, past: Sequence[KeyValue], seen: int, lines: int, layers: int) -> None:
        """Buffers that hold so many positions. Graphs that read the old ones are gone with them."""
        if self._inputs is not None and seen <= self._room:
            return
        self._room = max(seen, 2 * self._room, 8 * SLOT_MULTIPLE)
        most = DRAFT_COUNTS[-1]
        self._inputs = StaticInputs(self._device, lines * most, layers * most * (self._room + most))
        if rows is not None:
            self._rows = rows.new_zeros(most, rows.shape[1])
        self._past = [tuple(one.new_zeros(1, one.shape[1], self._room, one.shape[3]) for one in pair) for pair in past]  # type: ignore[misc]
        self._high, self._found = 0, {}
        self.recorded.forget()

    def _fill_past(self, past: Sequence[KeyValue], before: int) -> None:
        for here, there in zip(self._past, past, strict=True):
            for buffer, read in zip(here, there, strict=True):
                buffer[:, :, :before].copy_(read)
                if before < self._high:  # nought times what is no number is no number
                    buffer[:, :, before : self._high].zero_()
        self._high = before
