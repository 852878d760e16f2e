"""The drafter's role (rank 1): grow the trie.

    apply the verdicts that have arrived: move the root, drop what is dead
    extend the chain by what the source proposes        or the likeliest leaves of the tree, in one forward
    send the new nodes

It does so for every sequence under way, in one forward where its source can.
It waits only when there is nothing to guess: far enough ahead, the block complete, or the source at a loss. A forward
that the text has overtaken may be given up. Guesses may be wrong, late or absent; they cost speed, never tokens.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pearl.core.messages import Costs, DraftStats, End, Message, Nodes, SentSeparately, Start, Verdict
from pearl.drafters.draft_source import ChainQuery, DraftSource, Grown, TreeQuery, as_guesses
from pearl.machine import memory
from pearl.machine.timeline import OFF, Trace, flow_id
from pearl.roles.drafted_sequence import DraftedSequence
from pearl.roles.sources.guarded_source import GuardedSource
from pearl.wire.channel import Channel, Clock

Proposals = dict[DraftedSequence, tuple[Grown, bool]]  # new nodes, and whether no more will come until the root moves


class Drafter:
    """One end of the channel and a source; `step` is one turn of the loop, `run` the loop of a process."""

    def __init__(self, source: DraftSource, channel: Channel, clock: Clock = time.perf_counter, trace: Trace = OFF):
        self._source, self._channel, self._clock, self._trace = source, channel, clock, trace
        self._guarded = GuardedSource(source, clock, trace)
        self._live: dict[int, DraftedSequence] = {}
        self._slot_of: dict[int, int] = {}  # by sequence id: the batch slot, for the last sequence in each
        self._told_costs = False
        self._early: deque[Message] = deque()  # what arrived during a forward, and may move roots

    def run(self) -> None:
        """Until the target is gone."""
        while self._early or not self._channel.lost:
            if not self.step():
                began = self._clock()
                self._channel.wait()
                ended = self._clock()
                for sequence in self._live.values():
                    sequence.count(waiting_s=(ended - began) / len(self._live))
                self._trace.span("wait", began, ended)
        for sequence in self._live.values():  # the source may serve another connection
            self._guarded.end(sequence)

    def step(self) -> bool:
        """Applies what has arrived, then makes a proposal for every sequence that wants one. False: there was nothing
        to do."""
        heard = False
        while (message := self._receive()) is not None:
            heard = True
            match message:
                case Start():
                    self._begin(message)
                case Verdict() if message.sequence_id in self._live:
                    self._apply(self._live[message.sequence_id], message)
                case End():
                    self._finish(message)
        return self._grow() or heard or bool(self._early)

    def _receive(self) -> Message | None:
        return self._early.popleft() if self._early else self._channel.receive()

    def _is_overtaken(self, sequence: DraftedSequence, paths: Sequence[tuple[int, ...]]) -> bool:
        """Whether the text goes along none of these paths below the root, by verdicts that have arrived by now: they
        are applied when the forward under way is over."""
        while (message := self._channel.receive()) is not None:
            self._early.append(message)
        mine = [one for one in self._early if one.sequence_id == sequence.start.sequence_id]
        tokens = tuple(token for one in mine if isinstance(one, Verdict) for token in one.tokens)
        return any(isinstance(one, End) for one in mine) or all(path[: len(tokens)] != tokens for path in paths)

    def _begin(self, start: Start) -> None:
        if not self._live:
            memory.reset_peak()
        taken = {sequence.batch_slot for sequence in self._live.values()}
        slot = self._slot_of.get(start.continues)
        continues = slot is not None and slot not in taken
        if slot is None or not continues:
            slot = next(slot for slot in itertools.count() if slot not in taken)
        sequence = self._live[start.sequence_id] = DraftedSequence.begun(start, slot)
        self._trace.instant("start", self._clock(), sequence=start.sequence_id, mode=start.schedule.mode)
        if self._source.grows_trees and not self._told_costs:
            self._channel.send(Costs(start.sequence_id, self._source.costs))
            self._told_costs = True
        self._guarded.begin(sequence, continues)

    def _apply(self, sequence: DraftedSequence, verdict: Verdict) -> None:
        hit = sequence.apply(verdict)
        if verdict.features is not None and self._source.layers:
            assert not isinstance(verdict.features, SentSeparately), "a channel puts in what came another way"
            self._guarded.observe(sequence, verdict.features)
        now = self._clock()
        self._trace.instant("hit" if hit else "miss", now, sequence=verdict.sequence_id, position=verdict.position)
        self._trace.flow("verdict", flow_id(verdict.sequence_id, verdict.position), now, sent=False)

    def _grow(self) -> bool:
        """A proposal for each sequence, sent. False: there was nothing to propose, and the target knows it."""
        chains, trees = [], []
        proposals: Proposals = {}
        for sequence in self._live.values():
            if sequence.stats.failed or not sequence.plan.max_depth:
                proposals[sequence] = [], True
            elif self._source.grows_trees and sequence.start.schedule.grows_trees(self._source.makes_trees_alone):
                trees.append(sequence)
            else:
                chains.append(sequence)
        proposals |= self._trees(trees) | self._chains(chains)
        said = [nodes for one, proposal in proposals.items() if (nodes := self._nodes(one, *proposal))]
        if said:
            if self._guarded.spans:
                said[0] = replace(said[0], spans=tuple(self._guarded.spans))
                self._guarded.spans.clear()
            self._channel.send(*said)
        return bool(said)

    def _nodes(self, sequence: DraftedSequence, grown: Grown, exhausted: bool) -> Nodes | None:
        nodes = sequence.nodes(grown, exhausted)
        if nodes and nodes.guesses:
            first = flow_id(nodes.sequence_id, nodes.guesses[0].id, self._trace.connection)
            self._trace.flow("nodes", first, self._clock(), sent=True)
        return nodes

    def _chains(self, sequences: Sequence[DraftedSequence]) -> Proposals:
        """What the source proposes after each chain; it is exhausted where it is at a loss, or far enough ahead."""
        proposals: Proposals = {}
        queries: dict[DraftedSequence, ChainQuery] = {}
        for sequence in sequences:
            chain, plan = sequence.trie.chain(), sequence.plan
            room = sequence.start.schedule.room(len(chain), plan.gamma, sequence.drafted, plan.max_depth)
            if room:
                path = tuple(node.token for node in chain)
                queries[sequence] = ChainQuery(
                    sequence.batch_slot,
                    sequence.trie.tokens,
                    path,
                    room,
                    sequence.processing,
                    partial(self._is_overtaken, sequence),
                )
            else:
                proposals[sequence] = [], True
        found = self._guarded.ask(
            list(queries), lambda some: self._source.propose_batch([queries[one] for one in some])
        )
        for sequence, guesses in found.items():
            chain = sequence.trie.chain()
            leaf, grown = chain[-1] if chain else sequence.trie.root, []
            for guess in as_guesses(guesses or [], self._source.origin):
                node = sequence.trie.grow(leaf, *guess)
                assert node is not None, "the drafter's own root is up to date with its own text"
                grown.append((leaf, node))
                leaf = node
            sequence.drafted += len(grown)
            sequence.count(drafted=len(grown))
            if not grown and self._early:
                continue
            proposals[sequence] = grown, len(grown) in (0, queries[sequence].room)
        return proposals

    def _trees(self, sequences: Sequence[DraftedSequence]) -> Proposals:
        """The nodes of one forward over the likeliest leaves of each sequence; it is exhausted where nothing is worth
        extending, or, where the schedule works in turns, the one forward of its turn is made."""
        proposals: Proposals = {}
        queries: dict[DraftedSequence, TreeQuery] = {}
        for sequence in sequences:
            schedule, trie, plan = sequence.start.schedule, sequence.trie, sequence.plan
            if not schedule.post_verify and trie.root.children:
                proposals[sequence] = [], True
            else:
                take_all = schedule.draft_batch is not None
                queries[sequence] = TreeQuery(
                    sequence.batch_slot,
                    trie,
                    plan.draft_batch,
                    plan.max_depth,
                    take_all,
                    sequence.processing,
                    partial(self._is_overtaken, sequence),
                )
        found = self._guarded.ask(list(queries), lambda some: self._source.extend([queries[one] for one in some]))
        for sequence, grown in found.items():
            sequence.count(drafted=len(grown or []))
            if not grown and self._early:
                continue
            proposals[sequence] = grown or [], not grown or not sequence.start.schedule.post_verify
        return proposals

    def _finish(self, end: End) -> None:
        sequence = self._live.pop(end.sequence_id, None)
        if sequence:
            self._guarded.end(sequence)
            self._slot_of = {one: slot for one, slot in self._slot_of.items() if slot != sequence.batch_slot}
            self._slot_of[end.sequence_id] = sequence.batch_slot
        self._trace.instant("end", self._clock(), sequence=end.sequence_id)
        if not self._live:
            self._trace.save()
        stats = sequence.stats if sequence else DraftStats(end.sequence_id)
        self._channel.send(replace(stats, memory=memory.peak()))
