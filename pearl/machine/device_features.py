"""Features (hidden states) of some positions that stay on the device where they are.

Knows: one tensor that may still be arriving. Refuses to know: which way it comes (`pearl.wire.feature_transport`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pearl.machine.transfers import on_host


class DeviceFeatures:
    """Features of some positions, bfloat16 [positions, F], where they were computed or are to be read."""

    def __init__(self, rows: Tensor, work: Any = None):
        """`work`: of their arrival, if they are on their way."""
        self._rows, self._work = rows, work

    @property
    def shape(self) -> tuple[int, int]:
        return self._rows.shape[0], self._rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> DeviceFeatures:
        return DeviceFeatures(self.rows[part])

    def join(self, others: list[DeviceFeatures]) -> DeviceFeatures:
        return DeviceFeatures(torch.cat([self.rows, *(other.rows for other in others)]))

    def columns(self, parts: Sequence[slice]) -> DeviceFeatures:
        return DeviceFeatures(torch.cat([self.rows[:, part] for part in parts], 1))

    @property
    def rows(self) -> Tensor:
        """What is done with them is put behind their arrival. Raises `RuntimeError` if they can't come any more."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def bits(self) -> np.ndarray:
        """int16, on the host."""
        return on_host(self.rows).view(torch.int16).numpy()
