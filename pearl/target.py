"""The target's role (rank 0): walk the trie. It decides every token, and it is a correct decoder by itself.

    take the nodes that have arrived          wait for them only where the schedule asks for it
    choose at most width - 1 of them          the likeliest, a tree
    forward(root + nodes), pick at each
    walk, commit, stop?
    send the verdict

A token is committed only because the target picked it after the committed text. So the text does not depend on the
drafter, the schedule, or timing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pearl.channel import Channel, Clock
from pearl.controller import Controller
from pearl.messages import Costs, End, Nodes, Report, Start, Verdict
from pearl.model import Reader, SideRow
from pearl.records import Judged, Pass
from pearl.sampling import Picker, SamplingParams
from pearl.schedule import MAX_WIDTH, Schedule
from pearl.stopping import Stopper
from pearl.timeline import OFF, Trace, flow_id
from pearl.trie import Likely, Node, Trie, path_numbers, shared_prefix, walk

REPORT_TIMEOUT_S = 60.0  # for the drafter's facts after a sequence; it may be in a forward


@runtime_checkable
class Tapped(Protocol):
    """A reader that knows what its layers said."""

    def features(self, rows: Sequence[int]) -> np.ndarray | None:
        """At rows of the last read, see `model.LanguageModel.features`."""


class Target:
    """Decodes one text at a time. `passes` and `report` hold the facts of the last one."""

    def __init__(
        self,
        model: Reader,
        channel: Channel | None = None,
        clock: Clock = time.perf_counter,
        trace: Trace = OFF,
    ):
        """`channel` leads to the drafter; without one only schedules that draft nothing can run. `clock`: seconds."""
        self._model, self.channel, self._clock, self._trace = model, channel, clock, trace
        self._controllers: dict[tuple[Schedule, bool], Controller] = {}
        self.draft_costs: tuple[float, ...] = ()  # seconds of a drafter forward by its rows, as it has said
        self._sequence = 0
        self._last: _Text | None = None
        self.passes: list[Pass] = []
        self.report: Report | None = None

    def decode(
        self,
        prompt: Sequence[int],
        schedule: Schedule,
        params: SamplingParams,
        stopper: Stopper,
        continues: bool = False,
    ) -> Iterator[list[int]]:
        """Yields the tokens of each pass as they are committed, until the stopper has finished.

        `continues`: what was read of the last text is not read again, as far as this prompt begins with it. Its last
        token is: only some modes have read it, as a guess, and the first pass is to have the same rows in every mode.
        """
        channel = self.channel if schedule.drafts else None
        assert channel or not schedule.drafts, "a schedule that drafts needs a channel"
        self._sequence += 1
        last = self._last if continues and self.passes else None
        self.passes, self.report = [], None
        controller = self._controllers.setdefault((schedule, params.greedy), Controller(schedule, self._model.rows))
        controller.draft_costs(self.draft_costs)
        text = _Text(self._sequence, prompt, schedule, params, stopper, channel, self._clock, controller, self._trace)
        if last:
            text.follow(last)
        self._model.forget(but=prompt[: text.known])
        self._last = text
        self._trace.instant("sequence", self._clock(), sequence=text.sequence, mode=schedule.mode)
        if channel:
            channel.send(Start(text.sequence, schedule, params, tuple(prompt), controller.plan, continues))
        try:
            while stopper.finish is None:
                yield self._pass(text)
        finally:  # also where the caller stops listening
            if channel:
                self._end(channel, text.sequence)
            self._trace.save()

    def _pass(self, text: _Text) -> list[int]:
        """One turn of the loop at the top of this page. Returns what it commits."""
        trie, controller, began = text.trie, text.controller, self._clock()
        first = not self.passes  # it reads the prompt, as the drafter does at the same time: nothing to wait for yet
        if not first:
            self._await_guesses(text)
        ready = self._clock()

        nodes, sides, paths = self._choose(text)
        keep = len(nodes) - len(sides)
        chain = [node.token for node in nodes[1:keep]]
        logits = self._model.read(trie.tokens + chain, keep=keep, branches=sides)
        read = self._clock()

        text.take()  # what arrived meanwhile may already tell hit from miss
        position, unread = trie.root.position, len(trie.tokens) - text.known if first else 1
        picker = Picker(text.params, logits, [node.position for node in nodes])
        rows = {node: row for row, node in enumerate(nodes)}
        walked = walk(trie.root, rows, lambda node: picker.pick(rows[node], node))
        judged = _judge(trie.root, walked, controller)
        committed = text.stopper.take(walked)
        features = text.gather(self._features(rows, trie.root, committed, unread), first)
        text.hit = trie.commit(committed)

        if not first:
            controller.passed(len(nodes), len(committed), read - ready, self._clock() - began, paths)
        self.draft_costs = text.draft_costs or self.draft_costs
        plan = controller.plan
        if text.channel and text.stopper.finish is None:
            text.channel.send(Verdict(text.sequence, trie.root.position, plan, tuple(committed), features))
        ended = self._clock()
        self.passes.append(
            Pass(
                position=position,
                rows=len(nodes) + unread - 1,
                offered=len(nodes) - 1,
                sides=len(sides),
                paths=paths,
                tested=len(judged),
                accepted=sum(one.rank is not None for one in judged),
                committed=len(committed),
                hit=text.hit,
                judged=judged,
                block=plan.block,
                branches=plan.branches,
                ahead=plan.ahead,
                patience_s=text.patience_s,
                waited_s=ready - began,
                forward_s=read - ready,
                seconds=ended - began,
            )
        )
        self._draw(text, began, ready, read, ended)
        return committed

    def _features(self, rows: dict[Node, int], root: Node, committed: Sequence[int], read: int) -> np.ndarray | None:
        """What the model's layers said at the tokens that this pass has read for good: the root and what it has read
        of a prompt before it, `read` tokens, and every committed token but the last."""
        if not isinstance(self._model, Tapped):
            return None
        passed, node = list(range(1 - read, 0)), root
        for token in committed:
            passed.append(rows[node])
            node = node.children.get(token, node)
        return self._model.features(passed)

    def _choose(self, text: _Text) -> tuple[list[Node], list[SideRow], int]:
        """The nodes of the next pass, the root and the likeliest chain first, where those beside it hang, and on how
        many paths these lie.

        None lies beyond the end of the text, or of the cache's grain.
        """
        root = text.trie.root
        left = text.params.max_new_tokens - len(text.stopper.tokens)
        deepest = min(left, self._model.rows.up_to(root.position)) - 1
        likely = text.trie.best(MAX_WIDTH - 1, deepest)
        if not self._model.branches:
            likely = _chain(likely)
        likely = text.controller.choose(likely)
        chain = _chain(likely)
        on_chain = {one.node for one in chain}
        rows = {-1: 0}  # by the place in `likely`
        beside = []
        for place, one in enumerate(likely):
            if one.node in on_chain:
                rows[place] = one.depth
            else:
                rows[place] = 1 + len(chain) + len(beside)
                beside.append(one)
        sides = [(rows[one.parent], one.node.token) for one in beside]
        nodes = [root, *(one.node for one in chain), *(one.node for one in beside)]
        return nodes, sides, max(path_numbers(likely), default=0)

    def _await_guesses(self, text: _Text) -> None:
        """Takes what has arrived, and waits for as many guesses as the schedule asks for.

        Where it asks for none, waiting for the first one may still pay: the controller says for how long.
        """
        text.take()
        text.patience_s = 0.0
        if not text.channel:
            return
        wanted, there, began = text.guesses_wanted, text.depth(), self._clock()
        if wanted:
            text.wait_for(wanted)
            if text.depth() > there:
                text.controller.guessed(text.depth() - there, self._clock() - began)
        elif not there and not text.resting and (patience := text.controller.patience()):
            text.patience_s = patience
            text.wait_for(1, patience)
            text.controller.waited(text.depth() > 0 or text.resting, self._clock() - began)

    def _draw(self, text: _Text, began: float, ready: float, read: float, ended: float) -> None:
        """The last pass, in the timeline."""
        trace, one = self._trace, self.passes[-1]
        if trace is OFF:
            return
        at = {"sequence": text.sequence, "position": one.position}
        if one.waited_s > 1e-4:
            trace.span("wait", began, ready, **at)
        facts = {"rows": one.offered + 1, "offered": one.offered, "committed": one.committed, "hit": one.hit}
        trace.span("prefill" if len(self.passes) == 1 else "verify", ready, ended, **at, **facts)
        prepared = bool(one.judged) and one.judged[-1].rank not in (0, None)
        trace.instant("hit" if one.hit else "miss", read, **at, prepared=prepared)
        if text.channel and text.stopper.finish is None:
            trace.flow("verdict", flow_id(text.sequence, text.trie.root.position), ended, sent=True)

    def _end(self, channel: Channel, sequence: int) -> None:
        """Tells the drafter that the text is over and takes its facts; outside all timing."""
        channel.send(End(sequence))
        deadline = self._clock() + REPORT_TIMEOUT_S
        while self.report is None and not channel.lost and (left := deadline - self._clock()) > 0:
            channel.wait(left)
            while (message := channel.receive()) is not None:
                if isinstance(message, Report) and message.sequence == sequence:
                    self.report = message


class _Text:
    """The target's view of one text: its trie, the drafter's names for the nodes, and where it stands."""

    def __init__(
        self,
        sequence: int,
        prompt: Sequence[int],
        schedule: Schedule,
        params: SamplingParams,
        stopper: Stopper,
        channel: Channel | None,
        clock: Clock,
        controller: Controller,
        trace: Trace,
    ):
        self.sequence, self.schedule, self.params = sequence, schedule, params
        self.stopper, self.channel, self._clock, self.controller = stopper, channel, clock, controller
        self._trace = trace
        self.trie = Trie(prompt)
        self.draft_costs: tuple[float, ...] = ()
        self.known = 0  # tokens of the prompt that need no reading
        self._features: list[np.ndarray] = []  # of all tokens but the last, if the model tells them
        self.hit = False  # the last walk ended on a node that had arrived
        self.patience_s = 0.0  # the longest wait for a first guess that the controller allowed before this pass
        self._nodes: dict[int, Node] = {}  # by the drafter's id
        self._rested_at = -1

    def follow(self, last: _Text) -> None:
        """This text goes on where `last` has ended, as far as it does."""
        self.known = shared_prefix(last.trie.tokens[:-1], self.trie.tokens[:-1])
        if last._features:
            self._features = [np.concatenate(last._features)[: self.known]]

    def gather(self, features: np.ndarray | None, first: bool) -> np.ndarray | None:
        """What the drafter is told of a pass with `features`: in the first one also those that were known before."""
        if features is None:
            return None
        self._features.append(features)
        return np.concatenate(self._features) if first else features

    @property
    def resting(self) -> bool:
        """The drafter has said that no more will come until the root moves from where it is."""
        return self._rested_at == self.trie.root.position

    @property
    def guesses_wanted(self) -> int:
        return self.schedule.guesses_to_wait_for(self.hit, self.controller.block)

    def depth(self) -> int:
        return len(self.trie.chain())

    def wait_for(self, guesses: int, timeout_s: float | None = None) -> None:
        """Until so many guesses are there, the time is over, or none can be expected: the drafter rests or is lost."""
        assert self.channel, "nothing to wait for without a drafter"
        deadline = None if timeout_s is None else self._clock() + timeout_s
        while self.depth() < guesses and not self.resting and not self.channel.lost:
            left = None if deadline is None else deadline - self._clock()
            if left is not None and left <= 0:
                return
            self.channel.wait(left)
            self.take()

    def take(self) -> None:
        """Hangs the nodes that have arrived into the trie; those of another text or a dead branch fall away."""
        while self.channel and (message := self.channel.receive()) is not None:
            if isinstance(message, Costs):
                self.draft_costs = message.seconds
                self.controller.draft_costs(message.seconds)
            if not isinstance(message, Nodes) or message.sequence != self.sequence:
                continue
            if message.guesses:
                self._trace.flow("nodes", flow_id(self.sequence, message.guesses[0].id), self._clock(), sent=False)
            at = message.position
            assert at <= self.trie.root.position, "the drafter's root can't be ahead of the text"
            self._nodes.setdefault(message.root, Node(self.trie.tokens[at], at))
            for guess in message.guesses:
                parent = self._nodes.get(guess.parent)
                node = parent and self.trie.grow(parent, guess.token, guess.proposal, guess.logp)
                if node:
                    self._nodes[guess.id] = node
            if message.resting:
                self._rested_at = at


def _chain(likely: Sequence[Likely]) -> list[Likely]:
    """The likeliest way down through `likely`, which are the likeliest first; each the child of the one before it."""
    chain: list[Likely] = []
    last = -1
    for place, one in enumerate(likely):
        if one.parent == last:
            chain.append(one._replace(parent=len(chain) - 1))
            last = place
    return chain


def _judge(root: Node, walked: Sequence[int], controller: Controller) -> tuple[Judged, ...]:
    """What the guesses along the walk were worth, up to where there were none; the controller learns from it."""
    judged: list[Judged] = []
    node: Node | None = root
    for token in walked:
        if node is None or not node.children:
            break
        for place, child in enumerate(node.children.values()):
            controller.judged(child.logp, child.token == token, first=place == 0)
        guesses = list(node.children)
        q = tuple(round(math.exp(child.logp), 4) for child in node.children.values())
        judged.append(Judged(guesses.index(token) if token in guesses else None, q))
        node = node.children.get(token)
    return tuple(judged)
