"""The drafter's role (rank 1): grow the trie.

    apply the verdicts that have arrived: move the root, drop what is dead
    extend the chain by what the source proposes        or the likeliest leaves of the tree, in one forward
    send the new nodes

It waits only when there is nothing to guess: far enough ahead, the block complete, or the source at a loss. Its guesses
may be wrong, late or absent; they cost speed, never tokens.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pearl import memory
from pearl.channel import Channel, Clock
from pearl.messages import Costs, End, Guess, Nodes, Plan, Report, Start, Verdict
from pearl.sources import Continuing, DraftSource, Observer, TreeGrower
from pearl.timeline import OFF, Trace, flow_id
from pearl.trie import Node, Trie


@dataclass
class _Text:
    """The drafter's view of one sequence."""

    start: Start
    trie: Trie
    plan: Plan
    report: Report
    ids: dict[Node, int] = field(default_factory=dict)
    drafted: int = 0  # guesses since the chain began
    told: int = -1  # the root position for which the target knows that no more will come

    def name(self, node: Node) -> int:
        return self.ids.setdefault(node, len(self.ids))


class Drafter:
    """One end of the channel and a source; `step` is one turn of the loop, `run` the loop of a process."""

    def __init__(self, source: DraftSource, channel: Channel, clock: Clock = time.perf_counter, trace: Trace = OFF):
        self._source, self._channel, self._clock, self._trace = source, channel, clock, trace
        self._text: _Text | None = None
        self._told_costs = False

    def run(self) -> None:
        """Until the target is gone."""
        while not self._channel.lost:
            if not self.step():
                began = self._clock()
                self._channel.wait()
                ended = self._clock()
                self._count(waiting_s=ended - began)
                self._trace.span("wait", began, ended)

    def step(self) -> bool:
        """Applies what has arrived, then makes one proposal. False: there was nothing to do."""
        heard = False
        while (message := self._channel.receive()) is not None:
            heard = True
            match message:
                case Start():
                    self._begin(message)
                case Verdict() if self._text and message.sequence == self._text.start.sequence:
                    self._apply(self._text, message)
                case End():
                    self._finish(message)
        return (self._text is not None and self._grow(self._text)) or heard

    def _begin(self, start: Start) -> None:
        memory.reset_peak()
        trie = Trie(start.prompt)
        self._text = _Text(start, trie, start.plan, Report(start.sequence))
        self._text.name(trie.root)
        self._trace.instant("start", self._clock(), sequence=start.sequence, mode=start.schedule.mode)
        if isinstance(self._source, TreeGrower) and not self._told_costs:
            self._channel.send(Costs(start.sequence, self._source.costs))
            self._told_costs = True
        try:
            if start.continues and isinstance(self._source, Continuing):
                self._source.go_on(start.params)
            else:
                self._source.start(start.params)
        except Exception:
            self._fail(self._text)

    def _apply(self, text: _Text, verdict: Verdict) -> None:
        misses, prepared = _foreseen(text.trie.root, verdict.tokens)
        hit = text.trie.commit(verdict.tokens)
        assert text.trie.root.position == verdict.position, "a verdict was lost"
        text.plan = verdict.plan
        if verdict.features is not None and isinstance(self._source, Observer):
            self._source.observe(verdict.features)
        if not text.trie.root.children:
            text.drafted = 0
        self._count(verdicts=1, hits=int(hit), misses=misses, prepared=prepared)
        now = self._clock()
        self._trace.instant("hit" if hit else "miss", now, sequence=verdict.sequence, position=verdict.position)
        self._trace.flow("verdict", flow_id(verdict.sequence, verdict.position), now, sent=False)

    def _grow(self, text: _Text) -> bool:
        """One proposal, sent. False: there was nothing to propose, and the target knows it."""
        root = text.trie.root
        if text.report.failed or not text.plan.ahead:
            grown, resting = [], True
        elif isinstance(self._source, TreeGrower) and text.start.schedule.grows_trees(self._source.whole):
            grown, resting = self._tree(text, self._source)
        else:
            grown, resting = self._chain(text)
        if not grown and text.told == root.position:
            return False
        if resting:
            text.told = root.position
        guesses = tuple(
            Guess(text.name(node), text.name(parent), node.token, node.proposal, node.logp) for parent, node in grown
        )
        self._channel.send(Nodes(text.start.sequence, text.name(root), root.position, resting, guesses))
        if guesses:
            self._trace.flow("nodes", flow_id(text.start.sequence, guesses[0].id), self._clock(), sent=True)
        return True

    def _chain(self, text: _Text) -> tuple[list[tuple[Node, Node]], bool]:
        """What the source proposes after the chain, and whether it rests: at a loss, or far enough ahead."""
        trie = text.trie
        chain = trie.chain()
        room = text.start.schedule.room(len(chain), text.plan.block, text.drafted)
        if not room:
            return [], True
        path = [node.token for node in chain]
        proposed = self._try(text, lambda: self._source.propose(trie.tokens + path, room)) or []
        leaf, grown = chain[-1] if chain else trie.root, []
        for token, proposal in proposed:
            node = trie.grow(leaf, token, proposal)
            assert node is not None, "the drafter's own root is up to date with its own text"
            grown.append((leaf, node))
            leaf = node
        text.drafted += len(grown)
        self._count(drafted=len(grown))
        return grown, len(grown) in (0, room)

    def _tree(self, text: _Text, source: TreeGrower) -> tuple[list[tuple[Node, Node]], bool]:
        """The nodes of one forward over the likeliest leaves, and whether it rests: nothing worth extending, or, where
        the schedule works in turns, the one forward of its turn is made."""
        if not text.start.schedule.post_verify and text.trie.root.children:
            return [], True
        own, confirmed = source.own, source.confirmed
        plan, fixed = text.plan, text.start.schedule.branches is not None
        grown = self._try(text, partial(source.extend, text.trie, plan.branches, plan.ahead, fixed)) or []
        self._count(drafted=len(grown), own=source.own - own, confirmed=source.confirmed - confirmed)
        return grown, not grown or not text.start.schedule.post_verify

    def _try(self, text: _Text, draft: Callable[[], Any]) -> Any:
        """What the source says; None if it raised, and then it is not asked again in this text."""
        source, began = self._source, self._clock()
        forwards, rows = source.forwards, _rows(source)
        try:
            return draft()
        except Exception:
            self._fail(text)
            return None
        finally:
            ended, rows = self._clock(), _rows(source) - rows
            self._count(busy_s=ended - began, forwards=source.forwards - forwards, rows=rows)
            at = {"sequence": text.start.sequence, "position": text.trie.root.position}
            self._trace.span("draft", began, ended, rows=max(1, rows), **at)

    def _fail(self, text: _Text) -> None:
        """Whatever happens to a source, the text goes on without it, and the run says so."""
        print("pearl: the draft source failed; the target goes on alone in this sequence.", file=sys.stderr)
        traceback.print_exc()
        text.report = replace(text.report, failed=True)

    def _finish(self, end: End) -> None:
        report = self._text.report if self._text else Report(end.sequence)
        self._text = None
        self._trace.instant("end", self._clock(), sequence=end.sequence)
        self._trace.save()
        self._channel.send(replace(report, memory=memory.peak()))

    def _count(self, **more: float) -> None:
        if self._text:
            report = self._text.report
            self._text.report = replace(report, **{name: getattr(report, name) + value for name, value in more.items()})


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
