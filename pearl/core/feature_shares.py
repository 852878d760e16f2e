"""Of the hidden states that a target gives: which layers are read by the drafter, and which beside the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pearl.core.messages import Features


@dataclass(frozen=True)
class FeatureShares:
    """Which of a target's `layers` the drafter reads, and which a source beside the target; None: all."""

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
    return features.columns(parts)
