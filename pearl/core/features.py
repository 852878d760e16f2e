"""Features (hidden states) of some positions: those that stay on the device where they are, and whose layers are whose.

Knows: one tensor that may still be arriving. Refuses to know: which way it comes (`pearl.wire.feature_transport`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
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


@dataclass(frozen=True)
class FeatureShares:
    """Of the layers whose hidden states a target gives those that the drafter reads, and those that a source beside the
    target does; None: all."""

    layers: tuple[int, ...] = ()
    drafter: tuple[int, ...] | None = None
    beside: tuple[int, ...] | None = None

    @staticmethod
    def of(drafter: tuple[int, ...], beside: tuple[int, ...]) -> FeatureShares:
        return FeatureShares((*drafter, *(layer for layer in beside if layer not in drafter)), drafter, beside)

    def for_drafter(self, features: Features | None) -> Features | None:
        """Of features [positions, layers times H]; None: it wants none."""
        return self._share(features, self.drafter)

    def for_beside(self, features: Features | None) -> Features | None:
        return self._share(features, self.beside)

    def _share(self, features: Features | None, wanted: tuple[int, ...] | None) -> Features | None:
        if features is None or wanted is None or wanted == self.layers:
            return features
        if not wanted:
            return None
        width = features.shape[1] // len(self.layers)
        first = [width * self.layers.index(layer) for layer in wanted]
        return _columns(features, [slice(at, at + width) for at in first])


ALL = FeatureShares()


def _columns(features: Features, parts: Sequence[slice]) -> Features:
    if isinstance(features, np.ndarray):
        return np.concatenate([features[:, part] for part in parts], 1)
    return DeviceFeatures(torch.cat([features.rows[:, part] for part in parts], 1))
