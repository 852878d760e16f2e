"""When a source beside the target is asked: one without a model unless it rests, one with a model where a forward pays.

Knows: what sources have cost, and which nodes of theirs a pass went through. Refuses to know: what a source is, and
that it may raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pearl.core.control.controller import Controller
from pearl.core.control.forward_trial import ForwardQuery, ForwardTrial, Place
from pearl.core.control.source_trial import SourceTrial
from pearl.core.trie import Node
from pearl.drafters.draft_source import DraftSource, Grown
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk


class SourcePolicy(Protocol):
    """Of one source."""

    @property
    def rests(self) -> bool:
        """Nothing that is said to it now is of use."""

    def choose(
        self, sequences: Sequence[SequenceState], controller: Controller, again: bool
    ) -> Sequence[SequenceState]:
        """Those that it is to be asked about now. `again`: it has answered before this pass."""

    def answered(self, sequences: Sequence[SequenceState], grown: Sequence[Grown], seconds: float) -> None:
        """It has grown these nodes."""

    def heard(self, sequence: SequenceState, seconds: float) -> None:
        """It was told what a pass has said, which took so long."""

    def chosen(self, sequence: SequenceState) -> None:
        """The rows of a pass are chosen from what is there now."""

    def judge(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, controller: Controller) -> None:
        """The pass is over: what it has brought to this sequence."""

    def passed(self, seconds: float) -> None:
        """The pass took so long, with all that belongs to it."""

    def end(self, sequence: SequenceState) -> None:
        """The text is over."""


class TrialPolicy:
    """Of a source that answers at once. Where the drafter has something below the root it may be worth its time, and
    elsewhere not, or the other way round."""

    def __init__(self, source: DraftSource, is_sure: Callable[[SequenceState], bool]):
        """`is_sure`: see `DraftSource.is_sure`."""
        self._source, self._is_sure = source, is_sure
        self.trials = {late: SourceTrial() for late in (False, True)}
        self._late: dict[SequenceState, bool] = {}  # in the pass under way: the drafter had nothing below the root

    @property
    def rests(self) -> bool:
        return all(trial.resting for trial in self.trials.values())

    def choose(
        self, sequences: Sequence[SequenceState], controller: Controller, again: bool
    ) -> Sequence[SequenceState]:
        if again:
            return ()
        self._late = {one: not one.depth() for one in sequences}
        return [one for one, late in self._late.items() if not self.trials[late].resting or self._is_sure(one)]

    def answered(self, sequences: Sequence[SequenceState], grown: Sequence[Grown], seconds: float) -> None:
        for one in sequences:
            self.heard(one, seconds / len(sequences))

    def heard(self, sequence: SequenceState, seconds: float) -> None:
        self._trial(sequence).spent(seconds)

    def chosen(self, sequence: SequenceState) -> None:
        pass

    def judge(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, controller: Controller) -> None:
        origin = self._source.origin
        mine = {node for node in rows.nodes[1:] if node.origin == origin}
        right = sum(outcome.origin == origin for outcome in walked.outcomes)
        seconds = controller.seconds_of_rows(len(mine), len(rows.nodes), rows.paths_of(mine))
        self._trial(sequence).passed(right, seconds, controller.rate)

    def passed(self, seconds: float) -> None:
        pass

    def end(self, sequence: SequenceState) -> None:
        self._late.pop(sequence, None)

    def _trial(self, sequence: SequenceState) -> SourceTrial:
        return self.trials[self._late.get(sequence, True)]


class ForwardPolicy:
    """Of a source with a model: as many forwards before a pass as are worth their time."""

    rests = False

    def __init__(self, source: DraftSource, deepest: Callable[[SequenceState], int]):
        """`deepest`: how far below the root a pass may read."""
        self._source, self._deepest = source, deepest
        self.trial = ForwardTrial(source.costs)
        self._asked: dict[SequenceState, ForwardQuery] = {}
        self._grown: dict[SequenceState, dict[Node, Place]] = {}  # of the forward
        self._offered: dict[SequenceState, dict[Node, Place]] = {}  # of those: what only it had when rows were chosen

    def choose(
        self, sequences: Sequence[SequenceState], controller: Controller, again: bool
    ) -> Sequence[SequenceState]:
        queries = [
            ForwardQuery(
                one.sequence_id,
                expected(one, controller, self._deepest(one)),
                0 if again else self._source.unread(one.batch_slot, one.trie.tokens),
                again,
            )
            for one in sequences
        ]
        self._asked = dict(zip(sequences, queries, strict=True))
        return [sequences[number] for number in self.trial.choose(queries, controller.rate)]

    def answered(self, sequences: Sequence[SequenceState], grown: Sequence[Grown], seconds: float) -> None:
        asked = [self._asked[one] for one in sequences]
        self.trial.made(asked, seconds)
        for one, query, new in zip(sequences, asked, grown, strict=True):
            self._grown.setdefault(one, {}).update((node, query.place) for _, node in new)

    def heard(self, sequence: SequenceState, seconds: float) -> None:
        pass  # it keeps what it hears for its next forward

    def chosen(self, sequence: SequenceState) -> None:
        """What the drafter has guessed too by now is no gain."""
        mine = self._grown.get(sequence, {})
        self._offered[sequence] = {node: place for node, place in mine.items() if not sequence.has_arrived(node)}

    def judge(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, controller: Controller) -> None:
        if mine := self._offered.get(sequence):
            self._judge(mine, rows, walked, controller)
        grown = self._grown.get(sequence, {})
        self._grown[sequence] = {node: place for node, place in grown.items() if _is_below(node, sequence)}

    def _judge(self, mine: dict[Node, Place], rows: PassRows, walked: PassWalk, controller: Controller) -> None:
        """What guesses that nobody else had made were worth. `mine`: these, with the place of their forward."""
        rate, went_through = controller.rate, {node for node in walked.nodes[1:] if node in mine}
        read = [node for node in rows.nodes[1:] if node in mine]
        seconds = controller.seconds_of_rows(len(read), len(rows.nodes), rows.paths_of(read))
        each = rate * seconds / len(read) if read else 0.0
        for node in read:
            self.trial.brought(mine[node], (node in went_through) - each)

    def passed(self, seconds: float) -> None:
        self.trial.passed(seconds)

    def end(self, sequence: SequenceState) -> None:
        self.trial.ended(sequence.sequence_id)
        for kept in (self._asked, self._grown, self._offered):
            kept.pop(sequence, None)


def expected(sequence: SequenceState, controller: Controller, deepest: int) -> float:
    """How many tokens a walk is expected to go through, along the likeliest guesses."""
    node, joint, total = sequence.trie.root, 1.0, 0.0
    for depth in range(1, deepest + 1):
        if not node.children:
            break
        chances = {child: controller.chance(child, depth) for child in node.children.values()}
        node = max(chances, key=chances.__getitem__)
        joint *= chances[node]
        total += joint
    return total


def _is_below(node: Node, sequence: SequenceState) -> bool:
    return not node.dead and node.position > sequence.trie.root.position
