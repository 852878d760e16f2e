"""What the two sides say to each other; `pearl.wire.codec` has the layout.

    target -> drafter    Start    a sequence begins: its schedule, its sampling, its prompt
                         Verdict  the tokens that a pass committed (tokens, not node ids: tokens have no races), and
                                  the target's hidden states at them where a source drafts from those, or a note that
                                  they come another way
                         End      the sequence is over
    drafter -> target    Costs    once: the seconds of a forward by its rows
                         Nodes    guesses: (id, parent id, token, score, origin) each, and q where rejection sampling
                                  needs it
                         DraftStats what the drafter did in a sequence, in answer to End
    both ways            Close    nothing more will come
                         Beat     nothing to say, but alive, and at what time

Every message carries the number of its sequence, so nothing can leak into the next one. The second word of a message
says how many words it has. Both ends know the shapes: numbers only, no pickles. Floating-point numbers travel as their
own bits. What is said at once, of several sequences, travels together. Words that are no message are a
`MalformedMessage`, and nothing else comes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.trie import DRAFT, Proposal

MAX_MESSAGE_WORDS = 1 << 28  # words of a message
MAX_FEATURES = 1 << 33  # numbers of hidden states that come beside one: those of a long prompt come at once


class MalformedMessage(ValueError):
    """What came over the wire is no message."""


@dataclass(frozen=True)
class Guess:
    """A new node: `token` follows the node called `parent` and is called `id` from now on."""

    id: int
    parent: int
    token: int
    proposal: Proposal = ()
    logp: float = 0.0  # see trie.Node
    origin: str = DRAFT


@dataclass(frozen=True)
class DraftPlan:
    """What the target has decided for the drafter until its next word."""

    gamma: int = 1  # the block length in force, see Schedule.guesses_to_wait_for
    draft_batch: int = 1  # leaves and guesses of its own that a forward may read at most
    max_depth: int = 32  # how deep below the root it may guess; 0: not at all


@dataclass(frozen=True)
class Start:
    sequence_id: int
    schedule: Schedule
    params: SamplingParams  # stop strings and token limits stay with the target, which alone decides the end
    prompt: tuple[int, ...]
    plan: DraftPlan
    continues: int = 0  # a sequence that has ended: what was read of it need not be read again
    timed: bool = False  # somebody watches: the drafter also says when it was at work
    reference: tuple[int, ...] = ()  # what the target alone writes, for a source that has to know it


class DeviceTensor(Protocol):
    """Features that lie on a device and may stay there, see `pearl.machine.device_features.DeviceFeatures`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def columns(self, parts: Sequence[slice]) -> DeviceTensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> DeviceTensor: ...

    def join(self, others: list) -> DeviceTensor: ...

    @property
    def rows(self) -> Any:
        """A tensor, bfloat16."""


@dataclass(frozen=True)
class SentSeparately:
    """In place of features that come another way."""

    shape: tuple[int, int]  # positions, F
    direct: bool = False  # from device to device, not through the host


# of some positions, [positions, F]: an array of int16, the bits of bfloat16, or what lies on a device
Features = np.ndarray | DeviceTensor


def joined(parts: Sequence[Features]) -> Features | None:
    """One after the other; None if there are none."""
    if not parts:
        return None
    first, *others = parts
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)  # type: ignore[arg-type]  # if one is an array, all are
    return first.join(others)


@dataclass(frozen=True)
class Verdict:
    sequence_id: int
    position: int  # of the new root
    plan: DraftPlan
    tokens: tuple[int, ...]
    # of the positions before the new root that were not sent yet
    features: Features | SentSeparately | None = field(default=None, compare=False)


@dataclass(frozen=True)
class End:
    sequence_id: int


@dataclass(frozen=True)
class Nodes:
    """`root` is the id of the drafter's root and `position` its place in the text: so the target knows every parent.
    `exhausted`: no more will come until the root moves."""

    sequence_id: int
    root: int
    position: int
    exhausted: bool
    guesses: tuple[Guess, ...] = ()
    # of a timed sequence, in seconds: when the drafter's work since its last `Nodes` began and ended, in turn. By the
    # drafter's clock when they leave, by the target's once they have come
    spans: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class DraftStats:
    """The drafter's statistics of one sequence: times in seconds, memory in bytes."""

    sequence_id: int
    busy_s: float = 0.0
    waiting_s: float = 0.0
    forwards: int = 0
    overtaken: int = 0  # beside those: given up, as the text went another way meanwhile
    overtaken_s: float = 0.0  # of `busy_s`
    drafted: int = 0
    verdicts: int = 0
    hits: int = 0  # verdicts whose new root was already in the drafter's trie
    misses: int = 0  # committed tokens that were not the first guess after their parent
    prepared: int = 0  # of those: among the other guesses
    rows: int = 0  # read by all forwards
    lookahead_rows: int = 0  # of those: guesses that were read before the drafter's model had made them
    lookahead_hits: int = 0  # of those: what its model then said too
    memory: int = 0
    failed: bool = False  # the draft source raised; the rest of the sequence is the target's alone


@dataclass(frozen=True)
class Costs:
    """`seconds[n - 1]` is the time of a drafter forward of n rows; empty if the source has no model."""

    sequence_id: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Close:
    sequence_id: int = 0


@dataclass(frozen=True)
class Beat:
    """Seconds, see `wire.peer_clock`."""

    sequence_id: int = 0
    sent: float = 0.0
    echoed: float = 0.0  # when the last beat of the other side had left, by its clock
    heard: float = 0.0  # and when it came; 0: none has


Message = Start | Verdict | End | Costs | Nodes | DraftStats | Close | Beat
