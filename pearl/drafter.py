"""The drafter's role (rank 1): grow the trie.

    apply the verdicts that have arrived: move the root, drop what is dead
    extend the chain by what the source proposes
    send the new nodes

It waits only when there is nothing to guess: far enough ahead, the block complete, or the source at a loss. Its guesses
may be wrong, late or absent; they cost speed, never tokens.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass, field, replace

from pearl import memory
from pearl.channel import Channel, Clock
from pearl.messages import End, Guess, Nodes, Report, Start, Verdict
from pearl.sources import DraftSource
from pearl.trie import Node, Trie


@dataclass
class _Text:
    """The drafter's view of one sequence."""

    start: Start
    trie: Trie
    block: int
    report: Report
    ids: dict[Node, int] = field(default_factory=dict)
    drafted: int = 0  # guesses since the chain began
    told: int = -1  # the root position for which the target knows that no more will come

    def name(self, node: Node) -> int:
        return self.ids.setdefault(node, len(self.ids))


class Drafter:
    """One end of the channel and a source; `step` is one turn of the loop, `run` the loop of a process."""

    def __init__(self, source: DraftSource, channel: Channel, clock: Clock = time.perf_counter):
        self._source, self._channel, self._clock = source, channel, clock
        self._text: _Text | None = None

    def run(self) -> None:
        """Until the target is gone."""
        while not self._channel.lost:
            if not self.step():
                began = self._clock()
                self._channel.wait()
                self._count(waiting_s=self._clock() - began)

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
        self._text = _Text(start, trie, start.block, Report(start.sequence))
        self._text.name(trie.root)
        try:
            self._source.start(start.params)
        except Exception:
            self._fail(self._text)

    def _apply(self, text: _Text, verdict: Verdict) -> None:
        hit = text.trie.commit(verdict.tokens)
        assert text.trie.root.position == verdict.position, "a verdict was lost"
        text.block = verdict.block
        if not text.trie.root.children:
            text.drafted = 0
        self._count(verdicts=1, hits=int(hit))

    def _grow(self, text: _Text) -> bool:
        trie, root = text.trie, text.trie.root
        chain = trie.chain()
        room = text.start.schedule.room(len(chain), text.block, text.drafted)
        path = [node.token for node in chain]
        proposed = self._propose(text, trie.tokens + path, room) if room and not text.report.failed else []
        if not proposed and text.told == root.position:
            return False
        leaf, guesses = chain[-1] if chain else root, []
        for token, proposal in proposed:
            node = trie.grow(leaf, token, proposal)
            assert node is not None, "the drafter's own root is up to date with its own text"
            guesses.append(Guess(text.name(node), text.name(leaf), token, proposal))
            leaf = node
        text.drafted += len(proposed)
        resting = len(proposed) in (0, room)  # at a loss, or far enough ahead
        if resting:
            text.told = root.position
        self._channel.send(Nodes(text.start.sequence, text.name(root), root.position, resting, tuple(guesses)))
        return True

    def _propose(self, text: _Text, tokens: list[int], room: int) -> list:
        began = self._clock()
        forwards = self._source.forwards
        try:
            proposed = self._source.propose(tokens, room)
        except Exception:
            self._fail(text)
            proposed = []
        self._count(busy_s=self._clock() - began, forwards=self._source.forwards - forwards, drafted=len(proposed))
        return proposed

    def _fail(self, text: _Text) -> None:
        """Whatever happens to a source, the text goes on without it, and the run says so."""
        print("pearl: the draft source failed; the target goes on alone in this sequence.", file=sys.stderr)
        traceback.print_exc()
        text.report = replace(text.report, failed=True)

    def _finish(self, end: End) -> None:
        report = self._text.report if self._text else Report(end.sequence)
        self._text = None
        self._channel.send(replace(report, memory=memory.peak()))

    def _count(self, **more: float) -> None:
        if self._text:
            report = self._text.report
            self._text.report = replace(report, **{name: getattr(report, name) + value for name, value in more.items()})
