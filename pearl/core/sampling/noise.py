"""Random numbers as a function: the same bits on every device, in every process, in any order.

u(seed, position, purpose, token) is a counter-based hash, so nothing has a state that a schedule could disturb. Each
use has a `purpose` of its own: two tests that share a uniform are no longer independent, which shifts the
distribution (docs/explanations/theory.md shows by how much). The mixing function is
SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pearl.machine.transfers import sent

PICK, DRAFT, ACCEPT, RESIDUAL = range(4)  # the purposes

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 32
_PIECE = 1 << 14  # tokens hashed together
MAX_GUMBEL = 22.9  # no noise is above it: -log(-log(u)) at the largest u = (k + 1/2) / 2^32


def _mix(x: int) -> int:
    """SplitMix64's finaliser on one Python integer."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _mix_tensor(x: Tensor) -> Tensor:
    """The same on int64, in place: multiplication wraps; the arithmetic right shift is masked into a logical one."""
    shifted = torch.empty_like(x)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return x


def _stream(seed: int, position: int, purpose: int) -> int:
    state = _mix((seed + _GOLDEN) & _MASK)
    state = _mix((state + position * _GOLDEN) & _MASK)
    return _mix((state + purpose * _GOLDEN) & _MASK)


def of_branch(seed: int, path: Sequence[int]) -> int:
    """The seed of what is drawn at the end of a path of guessed tokens; of the text itself, which has none, `seed`."""
    for token in path:
        seed = _mix((seed + (token + 1) * _GOLDEN) & _MASK)
    return seed


def uniform(seed: int, position: int, purpose: int) -> float:
    """One uniform in (0, 1)."""
    word = _mix((_stream(seed, position, purpose) + _GOLDEN) & _MASK) >> (64 - _BITS)
    return (word + 0.5) / (1 << _BITS)


def gumbel(seed: int, position: int, purpose: int, tokens: Tensor) -> Tensor:
    """Gumbel(0, 1) noise of each token.  tokens: int64 [n]  ->  float64 [n]"""
    return _gumbel(_words(seed, position, purpose, tokens))


def gumbel_of(seed: int, position: int, purpose: int, tokens: Sequence[int]) -> list[float]:
    """The same of a few tokens, without a tensor."""
    stream = _stream(seed, position, purpose)
    words = (_mix((stream + (token + 1) * _GOLDEN) & _MASK) >> (64 - _BITS) for token in tokens)
    return [-math.log(-math.log((word + 0.5) / (1 << _BITS))) for word in words]


def gumbel_rows(seed: int, positions: Sequence[int], purpose: int, tokens: int, device: torch.device) -> Tensor:
    """The noise of tokens 0, 1, ... at each of several positions.  float64 [positions, tokens]"""
    streams = sent(torch.tensor([_signed(_stream(seed, position, purpose)) for position in positions]), device)
    state = torch.arange(1, tokens + 1, device=device).mul_(_signed(_GOLDEN)) + streams[:, None]
    return _gumbel(_word(state))


def candidates_above(seed: int, position: int, purpose: int, tokens: Tensor, least: float) -> Tensor:
    """Those of `tokens` whose Gumbel noise is above `least`, and perhaps one or two that are just below: found without
    a logarithm for each, in pieces that stay in the processor's cache."""
    word = max(0, math.floor(math.exp(-math.exp(-least)) * (1 << _BITS)) - 2) if least > -3 else 0
    pieces = tokens.split(_PIECE)
    return torch.cat([piece[_words(seed, position, purpose, piece) >= word] for piece in pieces])


def _words(seed: int, position: int, purpose: int, tokens: Tensor) -> Tensor:
    """The upper bits of the hash.  tokens: int64 [n]"""
    stream = _stream(seed, position, purpose)
    if tokens.device.type == "cpu":
        return torch.from_numpy(_on_host(tokens.numpy().view(np.uint64), stream).view(np.int64))
    return _word(tokens.add(1).mul_(_signed(_GOLDEN)).add_(_signed(stream)))


def _on_host(tokens: np.ndarray, stream: int) -> np.ndarray:
    """The same by numpy, whose calls on a few tokens cost a quarter of torch's.  uint64 [n], which wraps too"""
    x = tokens + np.uint64(1)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(stream)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x >>= np.uint64(64 - _BITS)
    return x


def _word(state: Tensor) -> Tensor:
    """The upper bits of what a state is mixed into, in place.  int64"""
    return _mix_tensor(state).bitwise_right_shift_(64 - _BITS).bitwise_and_((1 << _BITS) - 1)


def _gumbel(words: Tensor) -> Tensor:
    uniforms = (words.to(torch.float64) + 0.5) / (1 << _BITS)
    return -torch.log(-torch.log(uniforms))
