"""Draft sources in the target's process: they grow its trie before a pass is chosen, and hear what the pass has said.

Their nodes have no names, as nobody else need know them: a verdict holds tokens, and where the drafter guesses the same
token later, its guess takes the node over. What they cost is the target's own time, so a source rests where it brings
less; where the drafter has something below the root it may be worth its time and elsewhere not, or the other way round.
One that raises is not asked again for that text.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from pearl.core.control.controller import Controller
from pearl.core.control.source_trial import SourceTrial
from pearl.core.messages import Features
from pearl.drafters.draft_source import DraftSource, RowsRead, TreeQuery, grow_chain
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk
from pearl.wire.channel import Clock

_log = logging.getLogger(__name__)


class TargetSources:
    """For greedy and seeded texts; rejection sampling judges guesses that were drawn."""

    def __init__(self, sources: Sequence[DraftSource], clock: Clock):
        self._sources, self._clock = tuple(sources), clock
        self._trials = {(source, late): SourceTrial() for source in self._sources for late in (False, True)}
        self._late: dict[SequenceState, bool] = {}  # in the pass under way: the drafter had nothing below the root
        self._failed: dict[SequenceState, set[DraftSource]] = {}
        self._reasons: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._sources)

    def begin(self, sequence: SequenceState, continues: bool) -> None:
        self._failed = {one: failed for one, failed in self._failed.items() if not one.stopper.finish}
        self._failed[sequence] = set(self._sources) if sequence.params.rejection else set()
        for source in self._sources:
            self._try(source, [sequence], partial(source.begin, sequence.batch_slot, sequence.params, continues))
            if prediction := sequence.request.prediction:
                self._try(source, [sequence], partial(source.predict, sequence.batch_slot, prediction))

    def end(self, sequence: SequenceState) -> None:
        """It is over."""
        for source in self._sources:
            self._try(source, [sequence], partial(source.end, sequence.batch_slot))
            self._try(source, [sequence], partial(source.remember, sequence.trie.tokens))

    def grow(self, sequences: Sequence[SequenceState], rows: int, deepest: Callable[[SequenceState], int]) -> None:
        """Guesses of all that are not at rest, below the roots of these sequences: what `rows` rows of a pass can read,
        none deeper than `deepest`."""
        self._late = {one: not one.depth() for one in sequences}
        for source in self._sources:
            asked = [one for one in sequences if self._is_asked(source, one)]
            queries = [
                TreeQuery(one.batch_slot, one.trie, rows, deepest(one), False, one.processing)
                for one in asked
                if source not in self._failed[one]
            ]
            if queries:
                began = self._clock()
                self._try(source, asked, partial(_extend, source, queries))
                self._spent(source, asked, began)

    def _is_asked(self, source: DraftSource, sequence: SequenceState) -> bool:
        if not self._trials[source, self._late[sequence]].resting:
            return True
        sure = False

        def ask() -> None:
            nonlocal sure
            sure = source.is_sure(sequence.batch_slot, sequence.trie.tokens)

        self._try(source, [sequence], ask)
        return sure

    def hear(self, sequence: SequenceState, read: RowsRead, features: Features | None) -> None:
        """What a pass has said of one sequence. `features`: of what is read for good now, if there are any."""
        for source in self._sources:
            began = self._clock()
            if source.layers and features is not None:
                self._try(source, [sequence], partial(source.observe, features, sequence.batch_slot))
            if source.reads_rows and not all(self._trials[source, late].resting for late in (False, True)):
                self._try(source, [sequence], partial(source.read_rows, sequence.batch_slot, read))
            self._spent(source, [sequence], began)

    def judge(self, sequence: SequenceState, chosen: PassRows, walked: PassWalk, controller: Controller) -> None:
        """The pass is over: what each source has brought to this sequence."""
        for source in self._sources:
            rows = sum(node.origin == source.origin for node in chosen.nodes[1:])
            right = sum(outcome.origin == source.origin for outcome in walked.outcomes)
            row_s = controller.seconds_of_rows(rows, len(chosen.nodes))
            self._trials[source, self._late.get(sequence, True)].passed(right, row_s, controller.rate)

    def _spent(self, source: DraftSource, sequences: Sequence[SequenceState], began: float) -> None:
        each = (self._clock() - began) / len(sequences)
        for one in sequences:
            self._trials[source, self._late.get(one, True)].spent(each)

    def _try(self, source: DraftSource, sequences: Sequence[SequenceState], work: Callable[[], object]) -> None:
        if all(source in self._failed[one] for one in sequences):
            return
        try:
            work()
        except Exception:
            reason = traceback.format_exc()
            if reason not in self._reasons:  # once each: a source that fails may do so in every text
                self._reasons.add(reason)
                _log.warning("a draft source beside the target failed; the text goes on without it.\n%s", reason)
            for one in sequences:
                self._failed[one].add(source)


def _extend(source: DraftSource, queries: Sequence[TreeQuery]) -> None:
    if source.grows_trees:
        source.extend(queries)
        return
    for one, chain in zip(queries, source.propose_batch([one.chain() for one in queries]), strict=True):
        grow_chain(one, chain, source.origin)
