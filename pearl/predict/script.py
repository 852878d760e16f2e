"""What a simulation plays: texts as scripts of what a drafter would guess at each place, and the seconds of forwards.

Knows: plain data. Refuses to know: who plays it (`pearl.predict.simulation`) and where it comes from.

Tokens stand for their places. At position p the token (p + choice) mod `VOCABULARY` is the target's own for choice 0,
and another one else. So what a model says of a place depends on the position alone, and a text that lost or repeated a
place would not be the scripted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pearl.core.token_buckets import TokenBuckets, extended

VOCABULARY = 32
_NEVER = 1e-6  # left for the guesses after those of a place, at least


@dataclass(frozen=True)
class DraftedToken:
    """What the drafter would say of the next token, were it asked at this place of the text."""

    rank: int  # of the target's own token among its guesses: 0 the first, below `VOCABULARY`
    q: tuple[float, ...]  # the probabilities of its first guesses, likeliest first

    def choice(self, guess: int) -> int:
        """The token of its guess so many: 0 is the target's own (see the top of this file)."""
        if guess == self.rank:
            return 0
        return guess + 1 if guess < self.rank else guess


@dataclass(frozen=True)
class Script:
    """One text: `places[i]` is where its token number i comes from; None: the drafter is at a loss there."""

    prompt: int  # tokens
    places: tuple[DraftedToken | None, ...]
    prefill_s: float  # of the target
    draft_prefill_s: float
    # the same of each source beside the target: what it would say; where None, nothing
    beside: tuple[tuple[DraftedToken | None, ...], ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [token(self.prompt + i) for i in range(len(self.places))]

    @cached_property
    def drafted(self) -> Tensor:
        """Logits [places, V] of the drafter."""
        logits = np.full((len(self.places), VOCABULARY), -math.inf, np.float32)
        for i, place in enumerate(self.places):
            if place:
                at = [token(self.prompt + i, place.choice(guess)) for guess in range(VOCABULARY)]
                logits[i, at] = np.log(_spread(place.q))
        return torch.from_numpy(logits)


@dataclass(frozen=True)
class Times:
    """Seconds, of sides that have the machine to themselves. While the other side works, a forward takes `crowding`
    times as long, and one that reads a prompt `prompt_crowding` times (1: they share nothing)."""

    buckets: TokenBuckets  # what the target knows of its rows; it may be wrong about their cost
    pass_s: tuple[float, ...]  # of a pass, by its rows with padding, and all that goes with it
    draft_s: tuple[float, ...]  # of a drafter forward by its rows; empty: it has no model, it searches in the text
    draft_costs: tuple[float, ...]  # what the drafter says of them
    latency_s: float  # of a message
    crowding: float = 1.0
    prompt_crowding: float = 1.0
    path_s: float = 0.0  # that a pass takes longer for each path beside its chain

    def draft(self, rows: int) -> float:
        """Of a drafter forward; beyond the rows that were measured, as the drafter itself expects it."""
        return extended(self.draft_s, rows)


def token(position: int, choice: int = 0) -> int:
    return (position + choice) % VOCABULARY


def _spread(q: Sequence[float]) -> list[float]:
    """The probabilities of all guesses, strictly falling: each one after those of `q` takes half of what is left."""
    spread: list[float] = []
    left = max(_NEVER, 1.0 - sum(q))
    for guess in range(VOCABULARY):
        value = max(q[guess], _NEVER) if guess < len(q) else left / 2
        value = min(value, 0.999 * spread[-1]) if spread else value
        left -= value if guess >= len(q) else 0.0
        spread.append(value)
    return spread
