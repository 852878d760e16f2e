"""The drafter's role (rank 1): grow the trie.

    apply the verdicts that have arrived: move the root, drop what is dead
    extend the chain by what the source proposes        or the likeliest leaves of the tree, in one forward
    send the new nodes

It does so for every text under way, in one forward where its source can.
It waits only when there is nothing to guess: far enough ahead, the block complete, or the source at a loss. Its guesses
may be wrong, late or absent; they cost speed, never tokens.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pearl.core.messages import Costs, DraftPlan, DraftStats, End, Guess, Nodes, Start, Verdict
from pearl.core.timeline import OFF, Trace, flow_id
from pearl.core.trie import Node, Trie
from pearl.drafters.draft_source import Chain, DraftSource, Observer, Proposal, Several, SeveralTrees, Tree, TreeGrower
from pearl.machine import memory
from pearl.wire.channel import Channel, Clock


@dataclass(eq=False)
class _Text:
    """The drafter's view of one sequence."""

    start: Start
    place: int  # among the source's texts
    trie: Trie
    plan: DraftPlan
    report: DraftStats
    ids: dict[Node, int] = field(default_factory=dict)
    drafted: int = 0  # guesses since the chain began
    told: int = -1  # the root position for which the target knows that no more will come

    def name(self, node: Node) -> int:
        return self.ids.setdefault(node, len(self.ids))

    def count(self, **more: float) -> None:
        report = self.report
        self.report = replace(report, **{name: getattr(report, name) + value for name, value in more.items()})


@dataclass
class _Grown:
    """What was proposed for a text: (parent, node) each; `exhausted`: no more will come until the root moves."""

    nodes: list[tuple[Node, Node]]
    exhausted: bool


class Drafter:
    """One end of the channel and a source; `step` is one turn of the loop, `run` the loop of a process."""

    def __init__(self, source: DraftSource, channel: Channel, clock: Clock = time.perf_counter, trace: Trace = OFF):
        self._source, self._channel, self._clock, self._trace = source, channel, clock, trace
        self._texts: dict[int, _Text] = {}  # by sequence
        self._held: dict[int, int] = {}  # the sequence that was last at each place, and the place
        self._company = False  # whether a text under way has been beside another
        self._told_costs = False
        self._reasons: set[str] = set()  # of failures
        self._at_once: int = 1 << 30  # texts of a forward at most, since memory ran out

    def run(self) -> None:
        """Until the target is gone."""
        while not self._channel.lost:
            if not self.step():
                began = self._clock()
                self._channel.wait()
                ended = self._clock()
                for text in self._texts.values():
                    text.count(waiting_s=(ended - began) / len(self._texts))
                self._trace.span("wait", began, ended)

    def step(self) -> bool:
        """Applies what has arrived, then makes a proposal for every text that wants one. False: there was nothing to
        do."""
        heard = False
        while (message := self._channel.receive()) is not None:
            heard = True
            match message:
                case Start():
                    self._begin(message)
                case Verdict() if message.sequence in self._texts:
                    self._apply(self._texts[message.sequence], message)
                case End():
                    self._finish(message)
        return self._grow() or heard

    def _begin(self, start: Start) -> None:
        if not self._texts:
            memory.reset_peak()
        taken = {text.place for text in self._texts.values()}
        goes_on = self._held.get(start.continues, -1)
        goes_on = -1 if goes_on in taken else goes_on
        place = next(place for place in itertools.count() if place not in taken) if goes_on < 0 else goes_on
        trie = Trie(start.prompt)
        text = self._texts[start.sequence] = _Text(start, place, trie, start.plan, DraftStats(start.sequence))
        text.name(trie.root)
        self._company = len(self._texts) > 1 or self._company
        self._trace.instant("start", self._clock(), sequence=start.sequence, mode=start.schedule.mode)
        if isinstance(self._source, TreeGrower) and not self._told_costs:
            self._channel.send(Costs(start.sequence, self._source.costs))
            self._told_costs = True
        try:
            if isinstance(self._source, Several):
                self._source.begin(place, start.params, goes_on >= 0)
            else:
                self._source.start(start.params)
        except Exception:
            self._fail([text])

    def _apply(self, text: _Text, verdict: Verdict) -> None:
        misses, prepared = _foreseen(text.trie.root, verdict.tokens)
        hit = text.trie.commit(verdict.tokens)
        assert text.trie.root.position == verdict.position, "a verdict was lost"
        text.plan = verdict.plan
        if verdict.features is not None and isinstance(self._source, Observer):
            self._source.observe(verdict.features, text.place)
        if not text.trie.root.children:
            text.drafted = 0
        text.count(verdicts=1, hits=int(hit), misses=misses, prepared=prepared)
        now = self._clock()
        self._trace.instant("hit" if hit else "miss", now, sequence=verdict.sequence, position=verdict.position)
        self._trace.flow("verdict", flow_id(verdict.sequence, verdict.position), now, sent=False)

    def _grow(self) -> bool:
        """A proposal for each text, sent. False: there was nothing to propose, and the target knows it."""
        chains: list[_Text] = []
        trees: list[_Text] = []
        grown: dict[_Text, _Grown] = {}
        for text in self._texts.values():
            if text.report.failed or not text.plan.ahead:
                grown[text] = _Grown([], True)
            elif isinstance(self._source, TreeGrower) and text.start.schedule.grows_trees(self._source.whole):
                trees.append(text)
            else:
                chains.append(text)
        grown |= self._trees(trees) | self._chains(chains)
        said = [
            self._say(text, one) for text, one in grown.items() if one.nodes or text.told != text.trie.root.position
        ]
        if said:
            self._channel.send(*said)
        return bool(said)

    def _say(self, text: _Text, grown: _Grown) -> Nodes:
        root = text.trie.root
        if grown.exhausted:
            text.told = root.position
        guesses = tuple(
            Guess(text.name(node), text.name(parent), node.token, node.proposal, node.logp)
            for parent, node in grown.nodes
        )
        if guesses:
            self._trace.flow(
                "nodes", flow_id(text.start.sequence, text.ids[grown.nodes[0][1]]), self._clock(), sent=True
            )
        return Nodes(text.start.sequence, text.name(root), root.position, grown.exhausted, guesses)

    def _chains(self, texts: Sequence[_Text]) -> dict[_Text, _Grown]:
        """What the source proposes after each chain, and whether it rests there: at a loss, or far enough ahead."""
        grown, asked = {}, {}
        for text in texts:
            chain = text.trie.chain()
            room = text.start.schedule.room(len(chain), text.plan.block, text.drafted, text.plan.ahead)
            if room:
                path = tuple(node.token for node in chain)
                asked[text] = Chain(text.place, text.trie.tokens, path, room)
            else:
                grown[text] = _Grown([], True)
        for text, proposed in self._try(
            list(asked), lambda some: self._propose([asked[text] for text in some])
        ).items():
            chain = text.trie.chain()
            leaf, nodes = chain[-1] if chain else text.trie.root, []
            for token, proposal in proposed or []:
                node = text.trie.grow(leaf, token, proposal)
                assert node is not None, "the drafter's own root is up to date with its own text"
                nodes.append((leaf, node))
                leaf = node
            text.drafted += len(nodes)
            text.count(drafted=len(nodes))
            grown[text] = _Grown(nodes, len(nodes) in (0, asked[text].room))
        return grown

    def _propose(self, asked: Sequence[Chain]) -> list[list[tuple[int, Proposal]]]:
        if isinstance(self._source, Several) and self._company:
            return self._source.propose_each(asked)
        return [self._source.propose([*one.tokens, *one.path], one.room) for one in asked]

    def _trees(self, texts: Sequence[_Text]) -> dict[_Text, _Grown]:
        """The nodes of one forward over the likeliest leaves of each text, and whether it rests there: nothing worth
        extending, or, where the schedule works in turns, the one forward of its turn is made."""
        source = self._source
        assert isinstance(source, TreeGrower) or not texts
        grown, asked = {}, {}
        for text in texts:
            schedule = text.start.schedule
            if not schedule.post_verify and text.trie.root.children:
                grown[text] = _Grown([], True)
            else:
                fixed = schedule.draft_batch is not None
                asked[text] = Tree(text.place, text.trie, text.plan.branches, text.plan.ahead, fixed)
        own, confirmed = (source.own, source.confirmed) if asked else (0, 0)
        found = self._try(list(asked), lambda some: self._extend([asked[text] for text in some]))
        for text, nodes in found.items():
            text.count(drafted=len(nodes or []))
            grown[text] = _Grown(nodes or [], not nodes or not text.start.schedule.post_verify)
        if found:
            next(iter(found)).count(lookahead_rows=source.own - own, lookahead_hits=source.confirmed - confirmed)
        return grown

    def _extend(self, asked: Sequence[Tree]) -> list[list[tuple[Node, Node]]]:
        if isinstance(self._source, SeveralTrees):
            return self._source.extend_each(asked)
        assert isinstance(self._source, TreeGrower)
        return [self._source.extend(one.trie, one.most, one.deepest, one.fixed) for one in asked]

    def _try(self, texts: Sequence[_Text], draft: Callable[[Sequence[_Text]], Sequence[Any]]) -> dict[_Text, Any]:
        """What the source says of each text; None if it raised, and then it is not asked again in these texts. Where
        memory does not suffice for all of them, it is asked for some after the others."""
        if not texts:
            return {}
        if len(texts) > self._at_once:
            parts = [texts[i : i + self._at_once] for i in range(0, len(texts), self._at_once)]
            return {text: said for part in parts for text, said in self._try(part, draft).items()}
        source, began = self._source, self._clock()
        forwards, rows = source.forwards, _rows(source)
        try:
            return dict(zip(texts, draft(texts), strict=True))
        except torch.OutOfMemoryError:
            if len(texts) == 1:
                self._fail(texts)
                return dict.fromkeys(texts)
            self._at_once = -(-len(texts) // 2)
            print(f"pearl: out of memory; a draft is for at most {self._at_once} texts from now on.", file=sys.stderr)
        except Exception:
            self._fail(texts)
            return dict.fromkeys(texts)
        finally:
            ended, rows = self._clock(), _rows(source) - rows
            for number, text in enumerate(texts):  # facts of a forward that several share are counted once
                text.count(
                    busy_s=(ended - began) / len(texts),
                    forwards=0 if number else source.forwards - forwards,
                    rows=0 if number else rows,
                )
                at = {"sequence": text.start.sequence, "position": text.trie.root.position}
                self._trace.span("draft", began, ended, rows=max(1, rows), **at)
        return self._try(texts, draft)

    def _fail(self, texts: Sequence[_Text]) -> None:
        """Whatever happens to a source, the text goes on without it, and the run says so."""
        reason = traceback.format_exc()
        if reason not in self._reasons:  # once each: a source that fails may do so in every text
            self._reasons.add(reason)
            print(f"pearl: the draft source failed; the target goes on alone there.\n{reason}", file=sys.stderr)
        for text in texts:
            text.report = replace(text.report, failed=True)

    def _finish(self, end: End) -> None:
        text = self._texts.pop(end.sequence, None)
        report = text.report if text else DraftStats(end.sequence)
        if text:
            self._held = {sequence: place for sequence, place in self._held.items() if place != text.place}
            self._held[end.sequence] = text.place
        self._trace.instant("end", self._clock(), sequence=end.sequence)
        if not self._texts:
            self._company = False
            self._trace.save()
        self._channel.send(replace(report, memory=memory.peak()))


def _rows(source: DraftSource) -> int:
    """Rows that it has read for trees so far."""
    return source.rows if isinstance(source, TreeGrower) else 0


def _foreseen(root: Node, tokens: Sequence[int]) -> tuple[int, int]:
    """How many of the committed tokens were not the first guess where they stand, and how many of those were another.

    A token at whose place nothing was guessed is no miss: there the drafter was late.
    """
    node: Node | None = root
    misses = prepared = 0
    for token in tokens:
        if node is None or not node.children:
            break
        if token != next(iter(node.children)):
            misses += 1
            prepared += token in node.children
        node = node.children.get(token)
    return misses, prepared
