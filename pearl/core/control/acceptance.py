"""How often guesses came true, by what the drafter thought of them."""

from __future__ import annotations

import math

BINS = 10  # of the drafter's probability
FIRST_ACCEPTANCE = 0.7  # until something is known
_WEIGHT = 4.0  # of the drafter's own probability, in observed guesses


class AcceptanceRates:
    """How often a guess was accepted, by the log-probability that the drafter gave it; at first it is believed."""

    def __init__(self) -> None:
        centres = [(b + 0.5) / BINS for b in range(BINS)]
        # the last: guesses without a probability
        self._accepted = [_WEIGHT * rate for rate in (*centres, FIRST_ACCEPTANCE)]
        self._judged = [_WEIGHT] * (BINS + 1)
        self.first = FIRST_ACCEPTANCE  # of the drafter's first guesses: the papers' alpha

    def __getitem__(self, logp: float) -> float:
        b = _bin(logp)
        return self._accepted[b] / self._judged[b]

    def learn(self, logp: float, accepted: bool) -> None:
        b = _bin(logp)
        self._accepted[b] = 0.98 * self._accepted[b] + accepted
        self._judged[b] = 0.98 * self._judged[b] + 1

    def learn_first(self, accepted: bool) -> None:
        self.first += 0.05 * (accepted - self.first)


def _bin(logp: float) -> int:
    return BINS if logp == 0 else min(BINS - 1, int(math.exp(logp) * BINS))
