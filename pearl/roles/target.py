"""The target's role (rank 0): it verifies draft trees, decides every token, and is a correct decoder by itself.

    take the nodes that have arrived          wait for them only where the schedule asks for it
    choose those that pay                     gamma guesses, or the likeliest, a tree
    forward(root + nodes): p at each          pick from p at each
    walk, commit, stop?                       a wrong guess is corrected; after right ones there is a bonus token
    send the verdict

It writes one sequence or several side by side: each has its own trie, root, end and slot in the cache, and a pass reads
the rows of all that are ready in one forward. No sequence waits for another's miss: one whose guesses the schedule has
to wait for sits the pass out. When a sequence ends, the next one takes its slot; its prompt is read a piece at a time
between the passes of the others.

A token is committed only because the target picked it after the committed text. So a text does not depend on the
drafter, the schedule, timing, or the texts beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pearl.core.control.controller import Controller
from pearl.core.feature_shares import ALL, FeatureShares
from pearl.core.messages import DraftPlan, DraftStats, End, Features, Message, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.core.sampling import picks
from pearl.core.sampling.picks import Picks
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import PREFILL_CHUNK
from pearl.drafters.draft_source import DraftSource, RowsRead
from pearl.machine.timeline import OFF, Trace
from pearl.models.verifier import SequenceQuery
from pearl.roles import pass_recorder
from pearl.roles.batch_limit import BatchLimit
from pearl.roles.controllers import Controllers
from pearl.roles.drafter_inbox import DrafterInbox
from pearl.roles.next_pass import NextPass
from pearl.roles.pass_recorder import PassTimes
from pearl.roles.prompt_reader import PromptReader
from pearl.roles.running_batch import RunningBatch
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.sources.target_sources import TargetSources
from pearl.roles.target_model import TargetModel
from pearl.roles.verification import PassRows, PassWalk, begin_picks, candidates, verify
from pearl.roles.watcher import Watcher
from pearl.wire.channel import Channel, Clock

Written = tuple[SequenceState, list[int]]  # tokens that a pass has committed
_NO_MORE = object()


class Target:
    """Writes texts. Each `SequenceState` holds its own statistics."""

    def __init__(
        self,
        model: TargetModel,
        channel: Channel | None = None,
        clock: Clock = time.perf_counter,
        trace: Trace = OFF,
        prefill_tokens: int = PREFILL_CHUNK,
        sources: Sequence[DraftSource] = (),
        shares: FeatureShares = ALL,
    ):
        """`channel` leads to the drafter; without one only schedules that draft nothing can run. `clock`: seconds.
        `prefill_tokens`: of prompts that are read between two passes of the texts that are further. `sources`: that
        guess in this process. `shares`: whose the features are that the model gives, if it gives any."""
        self._model, self.channel, self._clock, self._trace = model, channel, clock, trace
        self._schedule, self._shares = Schedule.of("ar"), shares
        self._batch, self._controllers, self._limit = RunningBatch(), Controllers(model), BatchLimit("pass")
        self._prompts = PromptReader(model, clock, prefill_tokens)
        self._beside = TargetSources(sources, clock, model.buckets)
        self.next_pass = NextPass(model, clock)
        self.always_prepares = False  # for tests and measurements: even where picks are here at once
        self._inbox = DrafterInbox(self._batch, self._controllers.take_costs, clock, trace)

    def watch(self, watcher: Watcher | None) -> None:
        """It is told of everything from now on; None: nobody is. May be called from any thread."""
        self._inbox.watcher = watcher

    def begin_round(self, forget: bool = False) -> None:
        """See `DraftSource.begin_round`; between two texts."""
        for source in self._beside.policies:
            source.begin_round(forget)

    @property
    def idle(self) -> bool:
        """No sequence is under way."""
        return not self._batch.live

    @property
    def passes(self) -> list[Pass]:
        """Of the sequence that was begun last."""
        return self._batch.last.passes if self._batch.last else []

    @property
    def draft_costs(self) -> tuple[float, ...]:
        """Seconds of a drafter forward by its rows, as the drafter has said; empty: it has not."""
        return self._controllers.draft_costs

    @property
    def sources_beside(self) -> list[dict[str, Any]]:
        """For the records: what guesses in this process, what a forward of it takes, how many tokens one guesses."""
        return [
            {
                "origin": one.origin,
                "seconds": one.costs,
                "depths": one.depths,
            }
            for one in self._beside.policies
        ]

    @property
    def draft_stats(self) -> DraftStats | None:
        """The drafter's, of the sequence that was begun last."""
        return self._batch.last.draft_stats if self._batch.last else None

    def decode(
        self,
        prompt: Sequence[int],
        schedule: Schedule,
        params: SamplingParams,
        stopper: Stopper,
        continues: bool = False,
        reference: tuple[int, ...] = (),
    ) -> Iterator[list[int]]:
        """One text. Yields the tokens of each pass as they are committed, until the stopper has finished.

        `continues`: what was read of the last text is not read again, as far as this prompt begins with it. Its last
        token is: only some modes have read it, as a guess, and the first pass is to have the same rows in every mode.
        """
        after = self._batch.last if continues and self.passes else None
        request = SequenceRequest(prompt, params, stopper, after, reference=reference)
        writing = self.write([request], schedule)
        with contextlib.closing(writing):
            for _, committed in writing:
                if committed:
                    yield committed

    def write(
        self,
        requests: Iterable[SequenceRequest | None],
        schedule: Schedule,
        batch_size: int = 1,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> Generator[Written, None, None]:
        """At most `batch_size` texts side by side. Yields a sequence and what a pass has committed of it; at last the
        sequence and nothing, when it is over and all its statistics are there.

        A request is taken from `requests` when a slot is free for it; None: there is no request yet. They are asked
        again between two passes, and at once where nothing is under way: who can wait for a request does so there. A
        sequence that is not `wanted` any more ends before the next pass. `goes_on` is asked before each turn, also
        while prompts are read and nothing is written; False: all ends.
        """
        assert self.channel or not schedule.drafts, "a schedule that drafts needs a channel"
        self._schedule, self._inbox.channel = schedule, self.channel if schedule.drafts else None
        batch, slots = self._batch, min(batch_size, self._model.max_sequences)
        batch.open(slots)
        queue, more = iter(requests), True
        try:
            while (more or batch.live) and goes_on():
                self._drop_unwanted()
                while more and batch.has_room:
                    request = next(queue, _NO_MORE)
                    more = request is not _NO_MORE
                    if not isinstance(request, SequenceRequest):
                        break
                    self._begin(request)
                if batch.live:
                    yield from self._turn()
                elif more:
                    self._inbox.take()
                yield from ((sequence, []) for sequence in self._inbox.pop_finished())
            self._inbox.await_stats()
            while batch.ended:
                yield batch.ended.pop(next(iter(batch.ended))), []
        finally:  # also where the caller stops listening
            for sequence in batch.live.values():
                self._beside.end(sequence)
            self._send([End(number) for number in batch.abandon()])
            self._inbox.await_stats()
            self._trace.save()

    def _begin(self, request: SequenceRequest) -> None:
        prompt_logprobs = request.params.prompt_logprobs
        if prompt_logprobs is not None:  # all of the prompt is to be read
            request = replace(request, after=None)
        sequence, continues = self._batch.admit(request, self._schedule, self._clock())
        prompt = request.prompt
        if prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        sequence.keep(self._model.forget(but=prompt[: sequence.cached], batch_slot=sequence.batch_slot))
        if self._beside:
            self._beside.begin(sequence, bool(continues))
        self._trace.instant("sequence", self._clock(), sequence=sequence.sequence_id, mode=self._schedule.mode)
        if watcher := self._inbox.watcher:
            watcher.began(sequence)
        if self._inbox.channel:
            start = Start(
                sequence_id=sequence.sequence_id,
                schedule=self._schedule,
                params=sequence.params.for_drafter(sequence.stopper.eos_ids),
                prompt=tuple(prompt),
                plan=self._controllers.choose(self._schedule, list(self._batch.live.values())).plan,
                continues=continues,
                timed=watcher is not None,
                reference=request.reference,
            )
            self._send([start])

    def _drop_unwanted(self) -> None:
        unwanted = [sequence for sequence in self._batch.live.values() if not sequence.request.wanted()]
        for sequence in unwanted:
            self._batch.end(sequence, self._clock())
            self._beside.end(sequence)
        self._send([End(sequence.sequence_id) for sequence in unwanted])

    def _turn(self) -> Iterator[Written]:
        """Pieces of the prompts that are still to be read, and a pass over the sequences that are further."""
        began, live = self._clock(), list(self._batch.live.values())
        writing = [sequence for sequence in live if sequence.passes]
        reading = [sequence for sequence in live if not sequence.passes]
        since = began
        for sequence in self._prompts.turns(reading, alone=not writing):
            sequence.began = sequence.began or since
            if self._prompts.restore(sequence):
                since = self._clock()
            if self._prompts.read_on(sequence):
                yield from self._pass([sequence], sequence.began, since)
            since = self._clock()
        if writing and (ready := self._await_guesses(writing, patient=not reading)):
            yield from self._pass(ready, began, since)

    def _await_guesses(self, sequences: list[SequenceState], patient: bool) -> list[SequenceState]:
        """Those that are ready for a pass. `patient`: nothing else is to be done meanwhile."""
        self._inbox.take()
        if not self._inbox.channel:
            return sequences
        controller = self._controllers.choose(self._schedule, sequences)
        return self._inbox.await_guesses(sequences, self._schedule, controller, patient)

    def _pass(self, sequences: list[SequenceState], began: float, since: float) -> Iterator[Written]:
        """The loop at the top of this page, once: for sequences that have read their prompts, or for one that is to
        read the rest of it. `began`: when the turn did, `since`: when the waiting did."""
        first = not sequences[0].passes
        assert not first or len(sequences) == 1, "a prompt has a forward of its own, or its bits would not be its own"
        controller = self._controllers.choose(self._schedule, sequences)
        ready = self._clock()

        # guess, and choose
        beside = bool(self._beside) and controller.free and self._schedule.pre_verify
        if beside and not first:
            self._beside.grow(sequences, controller)
        chosen = self._choose(sequences, controller)
        asked = self._clock()
        # forward: p at each row, and the picks from it
        p = self._forward([rows.query(sequence) for sequence, rows in zip(sequences, chosen, strict=True)])
        coming = [begin_picks(*arguments) for arguments in zip(sequences, chosen, p, strict=True)]
        read = self._clock()
        self._inbox.take()  # what arrived meanwhile may already tell hit from miss
        if len(sequences) == 1 and not first:
            self._prepare(sequences[0], chosen[0], coming[0], controller)
        if picks.wait(coming):  # they came from a GPU, and the pass was read only now
            read = self._clock()
        # walk and commit
        heard = zip(sequences, chosen, strict=True) if beside else ()
        contexts = [rows.contexts(sequence.trie.tokens) for sequence, rows in heard]  # before the walk moves the root
        walks = [
            verify(sequence, rows.nodes, row_picks, controller, logits, partial(self._read_root, sequence))
            for sequence, rows, row_picks, logits in zip(sequences, chosen, coming, p, strict=True)
        ]
        if not first:
            row_count, path_count = sum(len(rows.nodes) for rows in chosen), sum(rows.paths for rows in chosen)
            committed = sum(len(walked.committed) for walked in walks)
            took = read - asked, self._clock() - since
            controller.record_pass(row_count, committed, *took, path_count, len(sequences))
        plan = controller.plan
        # send the verdicts: the drafter is at work again
        features = [
            None if sequence.error else self._prompts.features(sequence, rows.nodes, walked)
            for sequence, rows, walked in zip(sequences, chosen, walks, strict=True)
        ]
        verdicts = [self._verdict(*arguments, plan) for arguments in zip(sequences, walks, features, strict=True)]
        for sequence in sequences:
            if sequence.stopper.finish is not None:
                self._batch.end(sequence, self._clock())
        self._send(verdicts)
        if beside:
            read_rows = list(map(RowsRead, contexts, p))
            self._tell_beside(sequences, chosen, walks, read_rows, features, None if first else controller)
            self._beside.passed(self._clock() - since)
        for sequence in sequences:
            if sequence.stopper.finish is not None:
                self._beside.end(sequence)
        self._record(sequences, chosen, walks, plan, PassTimes(began, since, ready, asked, read, self._clock()))
        yield from (
            (sequence, walked.committed) for sequence, walked in zip(sequences, walks, strict=True) if walked.committed
        )

    def _tell_beside(
        self,
        sequences: Sequence[SequenceState],
        chosen: Sequence[PassRows],
        walks: Sequence[PassWalk],
        read: Sequence[RowsRead],
        features: Sequence[Features | None],
        controller: Controller | None,
    ) -> None:
        """What a pass has read, to the sources in this process. `controller`: judges their guesses; None: there were
        none."""
        for sequence, rows, walked, read_of, states in zip(sequences, chosen, walks, read, features, strict=True):
            self._beside.hear(sequence, read_of, self._shares.for_beside(states))
            if controller:
                self._beside.judge(sequence, rows, walked, controller)

    def _record(
        self,
        sequences: Sequence[SequenceState],
        chosen: Sequence[PassRows],
        walks: Sequence[PassWalk],
        plan: DraftPlan,
        times: PassTimes,
    ) -> None:
        """A pass in the statistics, in the trace, and to who watches."""
        for sequence, rows, walked in zip(sequences, chosen, walks, strict=True):
            pass_recorder.record(sequence, rows, walked, plan, times, len(sequences))
            pass_recorder.draw(sequence, times, self._trace, drafts=self._inbox.channel is not None)
            if watcher := self._inbox.watcher:
                watcher.passed(sequence, rows, walked, times)

    def _prepare(self, sequence: SequenceState, rows: PassRows, coming: Picks, controller: Controller) -> None:
        """The next pass, while the picks of this one are on their way; anew when more guesses have come meanwhile."""
        if self.always_prepares:
            self.next_pass.prepare(sequence, rows, controller)
        changes = -1
        while picks.under_way([coming]):
            if changes != sequence.trie.changes:
                changes = sequence.trie.changes
                self.next_pass.prepare(sequence, rows, controller)
            time.sleep(0)  # who receives messages needs the interpreter too
            self._inbox.take()

    def _choose(self, sequences: list[SequenceState], controller: Controller) -> list[PassRows]:
        """The rows of a pass: what was prepared, if the walk has gone there, or those that pay."""
        if len(sequences) == 1 and (foreseen := self.next_pass.rows(sequences[0])):
            return [foreseen]
        likely = [candidates(one, self._model.buckets, self._model.verifies_trees, controller) for one in sequences]
        chosen = controller.choose(likely)
        return [PassRows.of(one.trie.root, nodes) for one, nodes in zip(sequences, chosen, strict=True)]

    def _forward(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        """The logits of each sequence's rows, [rows, V]; in several forwards where memory does not suffice for one."""

        def forward(some: Sequence[SequenceQuery]) -> list[Tensor]:
            if len(some) > 1:
                return self._model.read_together(some)
            one = some[0]
            return [self._model.read(one.tokens, one.keep, one.side_rows, one.batch_slot)]

        return self._limit.run(queries, forward)

    def _read_root(self, sequence: SequenceState) -> Tensor:
        """Its logits [1, V] by a cache in which nothing is but the text before it."""
        text = sequence.trie.tokens
        kept = sequence.trie.root.position if sequence.passes else sequence.cached
        self._model.forget(text[:kept], sequence.batch_slot)
        return self._model.read(text, 1, batch_slot=sequence.batch_slot)

    def _verdict(
        self, sequence: SequenceState, walked: PassWalk, features: Features | None, plan: DraftPlan
    ) -> Message:
        """What the drafter is told of a pass."""
        if sequence.stopper.finish is None:
            position = sequence.trie.root.position
            said = self._shares.for_drafter(features) if self._inbox.channel else None
            return Verdict(sequence.sequence_id, position, plan, tuple(walked.committed), said)
        return End(sequence.sequence_id)

    def _send(self, messages: Sequence[Message]) -> None:
        if self._inbox.channel and messages:
            self._inbox.channel.send(*messages)
