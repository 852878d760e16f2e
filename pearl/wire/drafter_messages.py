"""What a drafter may say, and its node ids made unique over all drafters of a run.

Knows: messages and the texts that they are about. Refuses to know: connections and time.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pearl.core.messages import Costs, DraftStats, Guess, Message, Nodes

_IDS = 1 << 32  # of nodes, that one drafter may give
_ROUNDING = 1e-3


def fault(message: Message, vocabulary: int, roots: tuple[int, int] | None) -> str:
    """What is wrong with a message; empty if it may come from a drafter. `vocabulary`: the tokens that one may guess.
    `roots`: the first and the last position that a root of this text has had; None: the text is over."""
    if isinstance(message, Costs):
        return "" if all(0 < s < math.inf for s in message.seconds) else "a forward that takes no time"
    if isinstance(message, DraftStats):
        return ""
    if not isinstance(message, Nodes):
        return f"a {type(message).__name__}"
    if roots and not roots[0] <= message.position <= roots[1]:
        return f"a root at {message.position} of a text that has come to {roots[1]}"
    for guess in message.guesses:
        if not 0 <= guess.token < vocabulary:
            return f"token {guess.token}"
        if not guess.logp <= _ROUNDING:
            return f"log-probability {guess.logp}"
        if not all(0 <= token < vocabulary and 0 <= q <= 1 + _ROUNDING for token, q in guess.proposal):
            return "a probability that is none"
        if guess.proposal and not _drawn(guess):
            return f"token {guess.token}, which can't come from what it was drawn from"
    return ""


def _drawn(guess: Guess) -> bool:
    """Whether it may come from its proposal, which is a distribution or a part of one."""
    chances = dict(guess.proposal)
    return chances.get(guess.token, 0.0) > 0 and sum(chances.values()) <= 1 + len(chances) * _ROUNDING


def given(id: int) -> tuple[int, int]:
    """The connection whose drafter gave a node this id, and the id that it gave."""
    return divmod(id, _IDS)


def offset_ids(message: Message, connection: int) -> Message:
    """The message with node ids that no earlier drafter has given: each counts its nodes from zero again, so the ids of
    connection number n are offset by n times as many as one may give."""
    if not isinstance(message, Nodes) or not connection:
        return message
    base = connection * _IDS
    guesses = tuple(replace(guess, id=guess.id + base, parent=guess.parent + base) for guess in message.guesses)
    return replace(message, root=message.root + base, guesses=guesses)
