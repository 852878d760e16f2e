"""Draft sources in the target's process: they grow its trie before a pass is chosen, and hear what the pass has said.

Their nodes have no names, as nobody else need know them: a verdict holds tokens, and where the drafter guesses the same
token later, its guess takes the node over. What they cost is the target's own time, so each is asked where it brings
more (`pearl.roles.sources.policies`). One that raises is not asked again for that text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from pearl.core.control.controller import Controller
from pearl.core.logits.processing import LogitsProcessing
from pearl.core.messages import Features
from pearl.core.token_buckets import TokenBuckets
from pearl.drafters.draft_source import DraftSource, Grown, RowsRead, TreeQuery, grow_chain
from pearl.machine.logs import FailureLog
from pearl.roles.batch_limit import BatchLimit
from pearl.roles.sequence import SequenceState
from pearl.roles.sources.policies import ForwardPolicy, SourcePolicy, TrialPolicy
from pearl.roles.verification import PassRows, PassWalk, deepest
from pearl.wire.channel import Clock

MOST_FORWARDS = 8  # of one source before a pass
_log = logging.getLogger(__name__)


class TargetSources:
    """All of them serve greedy and seeded texts. A text of rejection sampling is served by those alone whose guesses
    are drawn (`DraftSource.draws`)."""

    def __init__(self, sources: Sequence[DraftSource], clock: Clock, buckets: TokenBuckets):
        """`buckets`: of a pass over one text."""
        self._clock, self._buckets = clock, buckets
        self.policies: dict[DraftSource, SourcePolicy] = {
            source: ForwardPolicy(source, self._deepest)
            if source.costs
            else TrialPolicy(source, partial(self._is_sure, source))
            for source in sources
        }
        self._limit = BatchLimit("draft beside the target")
        self._serving: dict[SequenceState, set[DraftSource]] = {}
        # each has its own, as it counts what the logits have that it is shown: a drafter's may know fewer tokens
        self._processing: dict[tuple[SequenceState, DraftSource], LogitsProcessing | None] = {}
        self._failures = FailureLog(_log)

    def __bool__(self) -> bool:
        return bool(self.policies)

    def begin(self, sequence: SequenceState, continues: bool) -> None:
        rejection = sequence.params.rejection
        self._serving[sequence] = {source for source in self.policies if source.draws or not rejection}
        for source in self.policies:
            self._processing[sequence, source] = LogitsProcessing.of(
                sequence.params, len(sequence.request.prompt), sequence.stopper.eos_ids
            )
            self._try(source, [sequence], partial(source.begin, sequence.batch_slot, sequence.params, continues))
            if prediction := sequence.request.prediction:
                self._try(source, [sequence], partial(source.predict, sequence.batch_slot, prediction))

    def end(self, sequence: SequenceState) -> None:
        """It is over, and so is all that was to be said of it. Sources that did not serve it remember it too. One that
        never began is left alone."""
        if sequence not in self._serving:
            return
        for source, policy in self.policies.items():
            self._try(source, [sequence], partial(source.end, sequence.batch_slot))
            self._guarded(source, [sequence], partial(source.remember, sequence.trie.tokens))
            policy.end(sequence)
            self._processing.pop((sequence, source), None)
        self._serving.pop(sequence, None)

    def grow(self, sequences: Sequence[SequenceState], controller: Controller) -> None:
        """Guesses of all that are worth asking, below the roots of these sequences: what a pass can read."""
        for source, policy in self.policies.items():
            able = [one for one in sequences if source in self._serving[one]]
            for again in range(MOST_FORWARDS):
                asked = policy.choose(able, controller, again=again > 0) if able else ()
                if not asked:
                    break
                able = self._extend(source, policy, asked)
        for policy in self.policies.values():
            for one in sequences:
                policy.chosen(one)

    def _extend(self, source: DraftSource, policy: SourcePolicy, asked: Sequence[SequenceState]) -> list[SequenceState]:
        """Asks about these. Returns those to which it had something to say."""
        queries = [
            TreeQuery(
                one.batch_slot,
                one.trie,
                self._buckets.most - 1,
                self._deepest(one),
                processing=self._processing[one, source],
            )
            for one in asked
        ]
        began = self._clock()
        found: list[Grown] = [[] for _ in asked]

        def extend() -> None:
            found[:] = self._limit.run(queries, partial(_grown, source))

        self._try(source, asked, extend)
        policy.answered(asked, found, self._clock() - began)
        return [one for one, new in zip(asked, found, strict=True) if new]

    def hear(self, sequence: SequenceState, read: RowsRead, features: Features | None) -> None:
        """What a pass has said of one sequence. `features`: of what is read for good now, if there are any."""
        for source, policy in self._serve(sequence):
            began = self._clock()
            if source.layers and features is not None:
                self._try(source, [sequence], partial(source.observe, features, sequence.batch_slot))
            if source.reads_rows and not policy.rests:
                self._try(source, [sequence], partial(source.read_rows, sequence.batch_slot, read))
            policy.heard(sequence, self._clock() - began)

    def judge(self, sequence: SequenceState, chosen: PassRows, walked: PassWalk, controller: Controller) -> None:
        """The pass is over: what each source has brought to this sequence."""
        for _, policy in self._serve(sequence):
            policy.judge(sequence, chosen, walked, controller)

    def passed(self, seconds: float) -> None:
        """A pass with all that belongs to it has taken so long."""
        for policy in self.policies.values():
            policy.passed(seconds)

    def _serve(self, sequence: SequenceState) -> list[tuple[DraftSource, SourcePolicy]]:
        """Those that are asked about it: what the others would have been worth here nobody knows."""
        serving = self._serving[sequence]
        return [(source, policy) for source, policy in self.policies.items() if source in serving]

    def _deepest(self, sequence: SequenceState) -> int:
        return deepest(sequence, self._buckets)

    def _is_sure(self, source: DraftSource, sequence: SequenceState) -> bool:
        sure = False

        def ask() -> None:
            nonlocal sure
            sure = source.is_sure(sequence.batch_slot, sequence.trie.tokens)

        self._try(source, [sequence], ask)
        return sure

    def _try(self, source: DraftSource, sequences: Sequence[SequenceState], work: Callable[[], object]) -> None:
        if any(source in self._serving[one] for one in sequences):
            self._guarded(source, sequences, work)

    def _guarded(self, source: DraftSource, sequences: Sequence[SequenceState], work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            self._failures.tell("a draft source beside the target failed; the text goes on without it.")
            for one in sequences:
                self._serving[one].discard(source)


def _grown(source: DraftSource, queries: Sequence[TreeQuery]) -> list[Grown]:
    if source.grows_trees:
        return source.extend(queries)
    chains = source.propose_batch([one.chain() for one in queries])
    return [grow_chain(one, chain, source.origin) for one, chain in zip(queries, chains, strict=True)]
