"""The target's role (rank 0): walk the tries. It decides every token, and it is a correct decoder by itself.

    take the nodes that have arrived          wait for them only where the schedule asks for it
    choose at most width - 1 of them          the likeliest, a tree
    forward(root + nodes), pick at each
    walk, commit, stop?
    send the verdict

It writes one text or several side by side: each has its own trie, root, end and place in the cache, and a pass reads
the rows of all that are ready in one forward. No text waits for another's miss: one whose guesses the schedule has to
wait for sits the pass out. When a text ends, the next one takes its place; its prompt is read a piece at a time between
the passes of the others.

A token is committed only because the target picked it after the committed text. So a text does not depend on the
drafter, the schedule, timing, or the texts beside it.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pearl.core import picks
from pearl.core.control.acceptance import AcceptanceRates
from pearl.core.control.controller import Controller
from pearl.core.messages import Costs, DraftStats, End, Features, Message, Nodes, Start, Verdict, joined
from pearl.core.picks import Picks
from pearl.core.records import DraftOutcome, Pass, Turn
from pearl.core.sampling import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.timeline import OFF, Trace, flow_id
from pearl.core.token_buckets import LIMIT
from pearl.core.trie import Likely, Node, Trie, path_numbers, shared_prefix, walk
from pearl.models.language_model import PREFILL_CHUNK, SideRow
from pearl.models.verifier import SequenceQuery
from pearl.roles.target_model import TargetModel
from pearl.wire.channel import Channel, Clock

IDLE_S = 0.002  # between two looks for a request, while no text is under way
REPORT_TIMEOUT_S = 60.0  # for the drafter's facts after a sequence; it may be in a forward


@dataclass(frozen=True)
class Request:
    """A text to be written."""

    prompt: Sequence[int]
    params: SamplingParams
    stopper: Stopper
    after: Text | None = None  # which the prompt begins with: what lies there of it still is not read again
    tag: object = None  # the asker's own


_NO_MORE = object()


class Target:
    """Writes texts. `turns` holds the facts of the last run of them; each text holds its own."""

    def __init__(
        self,
        model: TargetModel,
        channel: Channel | None = None,
        clock: Clock = time.perf_counter,
        trace: Trace = OFF,
    ):
        """`channel` leads to the drafter; without one only schedules that draft nothing can run. `clock`: seconds."""
        self._model, self.channel, self._clock, self._trace = model, channel, clock, trace
        self._controllers: dict[tuple[Schedule, bool, int], Controller] = {}
        self._rates: dict[tuple[Schedule, bool], AcceptanceRates] = {}
        self.draft_costs: tuple[float, ...] = ()  # seconds of a drafter forward by its rows, as it has said
        self._sequence = 0
        self._schedule = Schedule.of("ar")
        self._wire: Channel | None = None  # to the drafter, if the schedule has one
        self._live: dict[int, Text] = {}  # by sequence
        self._ended: dict[int, Text] = {}  # whose facts are not all there yet
        self._free: list[int] = []  # places
        self._held: dict[int, Text] = {}  # the text that was last at each place
        self._at_once: int = 1 << 30  # texts of a pass at most, since memory ran out
        self._last: Text | None = None
        self.turns: list[Turn] = []

    @property
    def passes(self) -> list[Pass]:
        """Of the text that was begun last."""
        return self._last.passes if self._last else []

    @property
    def report(self) -> DraftStats | None:
        """The drafter's, of the text that was begun last."""
        return self._last.report if self._last else None

    def decode(
        self,
        prompt: Sequence[int],
        schedule: Schedule,
        params: SamplingParams,
        stopper: Stopper,
        continues: bool = False,
    ) -> Iterator[list[int]]:
        """One text. Yields the tokens of each pass as they are committed, until the stopper has finished.

        `continues`: what was read of the last text is not read again, as far as this prompt begins with it. Its last
        token is: only some modes have read it, as a guess, and the first pass is to have the same rows in every mode.
        """
        after = self._last if continues and self.passes else None
        writing = self.write([Request(prompt, params, stopper, after)], schedule)
        with contextlib.closing(writing):
            for _, committed in writing:
                if committed:
                    yield committed

    def write(
        self, requests: Iterable[Request | None], schedule: Schedule, places: int = 1
    ) -> Generator[tuple[Text, list[int]], None, None]:
        """At most `places` texts side by side. Yields a text and what a pass has committed of it; at last the text and
        nothing, when it is over and all its facts are there.

        A request is taken from `requests` when there is a place for it; None says that there is none for now.
        """
        assert self.channel or not schedule.drafts, "a schedule that drafts needs a channel"
        self._schedule, self._wire = schedule, self.channel if schedule.drafts else None
        places = min(places, self._model.batch_slots)
        self._live, self._ended, self._free, self.turns = {}, {}, list(range(places)), []
        queue, more = iter(requests), True
        try:
            while more or self._live:
                while more and self._free:
                    request = next(queue, _NO_MORE)
                    more = request is not _NO_MORE
                    if not isinstance(request, Request):
                        break
                    self._begin(request)
                if self._live:
                    yield from self._turn(places, more)
                elif more:
                    time.sleep(IDLE_S)
                    self._take()
                yield from self._over()
            self._await_reports()
            while self._ended:
                yield self._ended.pop(next(iter(self._ended))), []
        finally:  # also where the caller stops listening
            if self._live and self._wire:
                self._wire.send(*(End(sequence) for sequence in self._live))
            self._ended |= self._live
            self._live = {}
            self._await_reports()
            self._trace.save()

    def _begin(self, request: Request) -> None:
        self._sequence += 1
        after = request.after
        if after and not (after.place in self._free and self._held.get(after.place) is after):
            after = None
        place = self._free.pop(self._free.index(after.place) if after else 0)
        text = self._last = Text(self._sequence, request, self._schedule, place, self._trace, self._clock)
        if after:
            text.follow(after)
        text.request = replace(request, after=None)  # else a talk would keep all its turns
        self._model.forget(but=request.prompt[: text.known], batch_slot=place)
        self._live[text.sequence] = self._held[place] = text
        self._trace.instant("sequence", self._clock(), sequence=text.sequence, mode=self._schedule.mode)
        if self._wire:
            plan = self._controller(list(self._live.values())).plan
            continues = after.sequence if after else 0
            self._wire.send(
                Start(text.sequence, self._schedule, request.params, tuple(request.prompt), plan, continues)
            )

    def _turn(self, places: int, more: bool) -> Iterator[tuple[Text, list[int]]]:
        """A piece of the prompts that are still to be read, and a pass over the texts that are further."""
        began, live = self._clock(), list(self._live.values())
        writing = [text for text in live if text.passes]
        reading = [text for text in live if not text.passes]
        since, room = began, PREFILL_CHUNK
        for text in reading:
            if room > 0:
                room -= len(text.trie.tokens) - text.read
                text.began = text.began or since
                if len(live) == 1 or self._read_on(text):
                    yield from self._pass([text], text.began, since)
                since = self._clock()
        if writing and (ready := self._await_guesses(writing, patient=not reading)):
            yield from self._pass(ready, began, since)
        self.turns.append(Turn(len(live), places, more, self._clock() - began))

    def _read_on(self, text: Text) -> bool:
        """Reads a piece of a prompt, while other texts wait. True: but the last, which is for the first pass."""
        end, prompt = text.read + PREFILL_CHUNK, text.trie.tokens
        if end >= len(prompt):
            return True
        began = self._clock()
        self._model.read(prompt[:end], 1, batch_slot=text.place)
        text.gather(self._said(text, range(1 - PREFILL_CHUNK, 1)))
        text.read = end
        text.reading_s += self._clock() - began
        return False

    def _pass(self, texts: list[Text], began: float, since: float) -> Iterator[tuple[Text, list[int]]]:
        """One turn of the loop at the top of this page: for texts that have read their prompts, or for one that is to
        read the rest of it. Yields what it commits. `began`: when the turn did, `since`: when the waiting did."""
        first = not texts[0].passes
        assert not first or len(texts) == 1, "a prompt has a forward of its own, or its bits would not be its own"
        controller = self._controller(texts)
        ready = self._clock()
        chosen = self._choose(texts, controller)
        wanted = [_wanted(text, rows) for text, rows in zip(texts, chosen, strict=True)]
        coming = [
            picks.begin(text.params, said, [node.position for node in rows.nodes])
            for text, rows, said in zip(texts, chosen, self._read(wanted), strict=True)
        ]
        read = self._clock()

        self._take()  # what arrived meanwhile may already tell hit from miss
        if picks.wait(coming):  # a GPU was still at work
            read = self._clock()
        walks = [
            _walk(text, rows.nodes, said, controller) for text, rows, said in zip(texts, chosen, coming, strict=True)
        ]
        if not first:
            count, paths = sum(len(rows.nodes) for rows in chosen), sum(rows.paths for rows in chosen)
            tokens = sum(len(walked.committed) for walked in walks)
            controller.record_pass(count, tokens, read - ready, self._clock() - since, paths, len(texts))
        said: list[Message] = []
        plan = controller.plan
        for text, rows, walked in zip(texts, chosen, walks, strict=True):
            features = self._features(text, rows.nodes, walked)
            if text.stopper.finish is None:
                said.append(Verdict(text.sequence, text.trie.root.position, plan, tuple(walked.committed), features))
            else:
                said.append(End(text.sequence))
                text.ended = self._clock()
                self._ended[text.sequence] = self._live.pop(text.sequence)
                bisect.insort(self._free, text.place)
        if self._wire:
            self._wire.send(*said)
        ended = self._clock()
        for text, rows, walked in zip(texts, chosen, walks, strict=True):
            text.passes.append(
                Pass(
                    position=walked.position,
                    rows=len(rows.nodes) + (len(text.request.prompt) - text.known - 1 if first else 0),
                    offered=len(rows.nodes) - 1,
                    sides=len(rows.sides),
                    paths=rows.paths,
                    tested=len(walked.judged),
                    accepted=sum(one.rank is not None for one in walked.judged),
                    committed=len(walked.committed),
                    hit=text.hit,
                    judged=walked.judged,
                    block=plan.block,
                    branches=plan.branches,
                    ahead=plan.ahead,
                    patience_s=text.patience_s,
                    waited_s=ready - since,
                    forward_s=read - ready + (text.reading_s if first else 0.0),
                    seconds=ended - began,
                    texts=len(texts),
                    others_s=ended - began - (ended - since + (text.reading_s if first else 0.0)),
                )
            )
            self._draw(text, since, ready, read, ended)
        yield from ((text, walked.committed) for text, walked in zip(texts, walks, strict=True))

    def _read(self, wanted: Sequence[SequenceQuery]) -> list[Tensor]:
        """The logits of each text's rows; in several forwards where memory does not suffice for one."""
        if len(wanted) == 1:
            one = wanted[0]
            return [self._model.read(one.tokens, one.keep, one.side_rows, one.batch_slot)]
        if len(wanted) <= self._at_once:
            try:
                return self._model.read_together(wanted)
            except torch.OutOfMemoryError:
                self._at_once = -(-len(wanted) // 2)
                print(f"pearl: out of memory; passes hold at most {self._at_once} texts from now on.", file=sys.stderr)
        parts = [wanted[i : i + self._at_once] for i in range(0, len(wanted), self._at_once)]
        return [logits for part in parts for logits in self._read(part)]

    def _controller(self, texts: Sequence[Text]) -> Controller:
        """The one for about so many texts: what a pass of eight costs and brings says little of a pass of one."""
        greedy = all(text.params.greedy for text in texts)
        key = (self._schedule, greedy, (len(texts) - 1).bit_length())
        if key not in self._controllers:
            rates = self._rates.setdefault(key[:2], AcceptanceRates())
            joint = self._model.joint if len(texts) > 1 else None
            self._controllers[key] = Controller(self._schedule, self._model.rows, joint, rates)
            self._controllers[key].record_draft_costs(self.draft_costs)
        return self._controllers[key]

    def _features(self, text: Text, nodes: Sequence[Node], walked: _Walk) -> Features | None:
        """What the drafter is told of the tokens that this pass has read for good: the root and every committed token
        but the last; in the first one also of all tokens before them."""
        if not self._model.gives_features:
            return None
        rows = {node: row for row, node in enumerate(nodes)}
        passed = [rows[node] for node in walked.nodes]
        if text.passes:
            return text.gather(self._said(text, passed))
        rest = len(text.request.prompt) - text.read
        text.gather(self._said(text, [*range(1 - rest, 0), *passed]))
        return joined(text.features)

    def _said(self, text: Text, rows: Sequence[int]) -> Features | None:
        """What the model's layers said at rows of the last read."""
        return self._model.features(rows, text.place)

    def _choose(self, texts: Sequence[Text], controller: Controller) -> list[_Rows]:
        """The rows of the next pass, of each text. None lies beyond the end of the text, or of the cache's grain.

        The pass that reads the end of a prompt has no guesses, though some may have come while other texts had their
        turn: so many rows round in their own way, and what they leave in the cache is to be the same in every mode.
        """
        candidates: list[list[Likely]] = []
        for text in texts:
            if not text.passes:
                candidates.append([])
                continue
            root = text.trie.root
            left = text.params.max_new_tokens - len(text.stopper.tokens)
            deepest = min(left, self._model.rows.up_to(root.position)) - 1
            likely = text.trie.best(LIMIT - 1, deepest)
            candidates.append(likely if self._model.verifies_trees else _chain(likely))
        chosen = controller.choose(candidates)
        return [_Rows.of(text.trie.root, likely) for text, likely in zip(texts, chosen, strict=True)]

    def _await_guesses(self, texts: list[Text], patient: bool) -> list[Text]:
        """Takes what has arrived, and waits for as many guesses as the schedule asks for: until one of the texts has
        them, and if `patient` is false not at all. Returns the texts that are ready.

        Where it asks for none, waiting for the first one may still pay: the controller says for how long.
        """
        self._take()
        if not self._wire:
            return texts
        controller = self._controller(texts)
        wanted = {text: self._schedule.guesses_to_wait_for(text.hit, controller.block) for text in texts}
        there, began = {text: text.depth() for text in texts}, self._clock()
        ready = [text for text in texts if self._ready(text, wanted[text])]
        while patient and not ready:
            self._wire.wait()
            self._take()
            ready = [text for text in texts if self._ready(text, wanted[text])]
        waited_for = [text for text in ready if wanted[text]]
        if gained := sum(text.depth() - there[text] for text in waited_for):
            controller.record_drafting(gained / len(waited_for), self._clock() - began)
        lacking = [text for text in ready if not (wanted[text] or there[text] or text.exhausted)]
        for text in ready:
            text.patience_s = 0.0
        if patient and lacking and (patience := controller.wait_budget(len(lacking))):
            for text in lacking:
                text.patience_s = patience
            began = self._clock()
            deadline = began + patience
            while (left := deadline - self._clock()) > 0 and not all(self._ready(text, 1) for text in lacking):
                self._wire.wait(left)
                self._take()
            came = any(text.depth() > 0 or text.exhausted for text in lacking)
            controller.record_wait(came, self._clock() - began)
        return ready

    def _ready(self, text: Text, guesses: int) -> bool:
        """Whether so many guesses are there, or none can be expected: the drafter rests or is lost."""
        assert self._wire, "nothing to wait for without a drafter"
        return text.depth() >= guesses or text.exhausted or self._wire.lost

    def _take(self) -> None:
        """Takes what has arrived. What is about a text that has ended falls away, but for the drafter's facts."""
        while self._wire and (message := self._wire.receive()) is not None:
            if isinstance(message, Costs):
                self.draft_costs = message.seconds
                for controller in self._controllers.values():
                    controller.record_draft_costs(message.seconds)
            elif isinstance(message, Nodes) and message.sequence in self._live:
                self._live[message.sequence].hang(message)
            elif isinstance(message, DraftStats) and message.sequence in self._ended:
                self._ended[message.sequence].report = message

    def _over(self) -> Iterator[tuple[Text, list[int]]]:
        """The texts that have ended and of which nothing more will be known."""
        for text in list(self._ended.values()):
            if text.report or not self._wire or self._wire.lost:
                yield self._ended.pop(text.sequence), []

    def _await_reports(self) -> None:
        """Waits for the drafter's facts; outside all timing. Whose do not come does without."""
        deadline = self._clock() + REPORT_TIMEOUT_S
        missing = [text for text in self._ended.values() if not text.report]
        while self._wire and missing and not self._wire.lost and (left := deadline - self._clock()) > 0:
            self._wire.wait(left)
            self._take()
            missing = [text for text in missing if not text.report]

    def _draw(self, text: Text, began: float, ready: float, read: float, ended: float) -> None:
        """The last pass, in the timeline."""
        trace, one = self._trace, text.passes[-1]
        if trace is OFF:
            return
        at = {"sequence": text.sequence, "position": one.position}
        if one.waited_s > 1e-4:
            trace.span("wait", began, ready, **at)
        facts = {"rows": one.offered + 1, "offered": one.offered, "committed": one.committed, "hit": one.hit}
        trace.span("prefill" if len(text.passes) == 1 else "verify", ready, ended, **at, **facts)
        prepared = bool(one.judged) and one.judged[-1].rank not in (0, None)
        trace.instant("hit" if one.hit else "miss", read, **at, prepared=prepared)
        if self._wire and text.stopper.finish is None:
            trace.flow("verdict", flow_id(text.sequence, text.trie.root.position), ended, sent=True)


class Text:
    """One text: its trie, the drafter's names for the nodes, where it stands, and the facts of it."""

    def __init__(self, sequence: int, request: Request, schedule: Schedule, place: int, trace: Trace, clock: Clock):
        """`place`: of its keys and values among those of the model's texts."""
        self.sequence, self.request, self.schedule, self.place = sequence, request, schedule, place
        self.params, self.stopper = request.params, request.stopper
        self._trace, self._clock = trace, clock
        self.trie = Trie(request.prompt)
        self.passes: list[Pass] = []
        self.report: DraftStats | None = None
        self.hit = False  # the last walk ended on a node that had arrived
        self.patience_s = 0.0  # the longest wait for a first guess that the controller allowed before this pass
        self.placed = clock()  # when it took its place,
        self.began: float | None = None  # when its prompt's turn came,
        self.ended = 0.0  # and when it was over
        self.known = 0  # tokens of the prompt that need no reading
        self.read, self.reading_s = 0, 0.0  # tokens of the prompt that are read by now, and for how long
        self.features: list[Features] = []  # of all tokens but the last, if the model tells them
        self._nodes: dict[int, Node] = {}  # by the drafter's id
        self._rested_at = -1

    def follow(self, last: Text) -> None:
        """This text goes on where `last` has ended, as far as it does."""
        self.known = self.read = shared_prefix(last.trie.tokens[:-1], self.trie.tokens[:-1])
        if (features := joined(last.features)) is not None:
            self.features = [features[: self.known]]

    def gather(self, features: Features | None) -> Features | None:
        if features is not None:
            self.features.append(features)
        return features

    @property
    def exhausted(self) -> bool:
        """The drafter has said that no more will come until the root moves from where it is."""
        return self._rested_at == self.trie.root.position

    def depth(self) -> int:
        return len(self.trie.chain())

    def hang(self, message: Nodes) -> None:
        """Hangs the nodes that have arrived into the trie; those of a dead branch fall away."""
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
        if message.exhausted:
            self._rested_at = at


@dataclass(frozen=True)
class _Walk:
    """What a pass found of one text."""

    position: int  # of the root before it
    committed: list[int]
    judged: tuple[DraftOutcome, ...]
    nodes: list[Node]  # that the walk went through


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass, of one text."""

    nodes: list[Node]  # the root and the likeliest chain first
    sides: list[SideRow]  # where those beside it hang
    paths: int  # on how many paths these lie

    @staticmethod
    def of(root: Node, likely: Sequence[Likely]) -> _Rows:
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
        return _Rows(nodes, sides, max(path_numbers(likely), default=0))


def _wanted(text: Text, rows: _Rows) -> SequenceQuery:
    keep = len(rows.nodes) - len(rows.sides)
    chain = [node.token for node in rows.nodes[1:keep]]
    return SequenceQuery(text.place, text.trie.tokens + chain, keep, rows.sides)


def _walk(text: Text, nodes: Sequence[Node], found: Picks, controller: Controller) -> _Walk:
    """Walks the trie of a text by the picks of a pass and commits."""
    root = text.trie.root
    rows = {node: row for row, node in enumerate(nodes)}
    walked = walk(root, rows, lambda node: found.pick(rows[node], node))
    judged = _judge(root, walked, controller)
    committed, passed, node = text.stopper.take(walked), [], root
    for token in committed:
        passed.append(node)
        node = node.children.get(token, node)
    text.hit = text.trie.commit(committed)
    return _Walk(root.position, committed, judged, passed)


def _chain(likely: Sequence[Likely]) -> list[Likely]:
    """The likeliest way down through `likely`, which are the likeliest first; each the child of the one before it."""
    chain: list[Likely] = []
    last = -1
    for place, one in enumerate(likely):
        if one.parent == last:
            chain.append(one._replace(parent=len(chain) - 1))
            last = place
    return chain


def _judge(root: Node, walked: Sequence[int], controller: Controller) -> tuple[DraftOutcome, ...]:
    """What the guesses along the walk were worth, up to where there were none; the controller learns from it."""
    judged: list[DraftOutcome] = []
    node: Node | None = root
    for token in walked:
        if node is None or not node.children:
            break
        for place, child in enumerate(node.children.values()):
            controller.record_guess(child.logp, child.token == token, first=place == 0)
        guesses = list(node.children)
        q = tuple(round(math.exp(child.logp), 4) for child in node.children.values())
        judged.append(DraftOutcome(guesses.index(token) if token in guesses else None, q))
        node = node.children.get(token)
    return tuple(judged)
