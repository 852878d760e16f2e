"""Random numbers as a function: the same bits on every device, in every process, in any order.

u(seed, position, purpose, token) is a counter-based hash, so nothing has a state that a schedule could disturb. Each
use has a `purpose` of its own: two tests that share a uniform are no longer independent, which shifts the
distribution (docs/theory.md shows by how much). The mixing function is SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

PICK, DRAFT, ACCEPT, RESIDUAL = range(4)  # the purposes

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 32
# The extreme values that -log(-log(u)) takes on u = (k + 1/2) / 2^32. A token further than their difference below the
# best one can't win, so its noise need not be computed.
GUMBEL_REACH = 26.1


def _mix(x: int) -> int:
    """SplitMix64's finaliser on one Python integer."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _mix_tensor(x: Tensor) -> Tensor:
    """The same on int64: multiplication wraps, and the arithmetic right shift is masked into a logical one."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _stream(seed: int, position: int, purpose: int) -> int:
    state = _mix((seed + _GOLDEN) & _MASK)
    state = _mix((state + position * _GOLDEN) & _MASK)
    return _mix((state + purpose * _GOLDEN) & _MASK)


def uniform(seed: int, position: int, purpose: int) -> float:
    """One uniform in (0, 1)."""
    word = _mix((_stream(seed, position, purpose) + _GOLDEN) & _MASK) >> (64 - _BITS)
    return (word + 0.5) / (1 << _BITS)


def gumbel(seed: int, position: int, purpose: int, tokens: Tensor) -> Tensor:
    """Gumbel(0, 1) noise of each token.  tokens: int64 [n]  ->  float64 [n]"""
    words = _mix_tensor((tokens + 1) * _signed(_GOLDEN) + _signed(_stream(seed, position, purpose)))
    words = (words >> (64 - _BITS)) & ((1 << _BITS) - 1)
    uniforms = (words.to(torch.float64) + 0.5) / (1 << _BITS)
    return -torch.log(-torch.log(uniforms))
