"""The target's role (rank 0): walk the trie. It decides every token, and it is a correct decoder by itself.

    take the nodes that have arrived          wait for them only where the schedule asks for it
    choose at most width - 1 of them
    forward(root + nodes), pick at each
    walk, commit, stop?
    send the verdict

A token is committed only because the target picked it after the committed text. So the text does not depend on the
drafter, the schedule, or timing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pearl.channel import Channel, Clock
from pearl.messages import End, Nodes, Report, Start, Verdict
from pearl.model import Reader
from pearl.records import Pass
from pearl.sampling import Picker, SamplingParams
from pearl.schedule import Schedule
from pearl.stopping import Stopper
from pearl.theory import best_gamma
from pearl.trie import Node, Trie, walk

REPORT_TIMEOUT_S = 60.0  # for the drafter's facts after a sequence; it may be in a forward


class Pace:
    """Moving estimates of what `auto` needs: acceptance a, seconds of a pass, seconds of a guess."""

    def __init__(self) -> None:
        self.acceptance, self.pass_s, self.guess_s = 0.7, 0.0, 0.0

    def judged(self, tested: int, accepted: int) -> None:
        for right in [1.0] * accepted + [0.0] * (tested - accepted):
            self.acceptance += 0.05 * (right - self.acceptance)

    def passed(self, seconds: float) -> None:
        self.pass_s = self.pass_s + 0.1 * (seconds - self.pass_s) if self.pass_s else seconds

    def guessed(self, guesses: int, seconds: float) -> None:
        each = seconds / guesses
        self.guess_s = self.guess_s + 0.1 * (each - self.guess_s) if self.guess_s else each

    def block(self, schedule: Schedule) -> int:
        """The block length in force: gamma, or the best one by theory where `auto` works in blocks."""
        if schedule.gamma is not None:
            return schedule.gamma
        if schedule.post_verify:
            return 1
        c = self.pass_s / self.guess_s if self.guess_s else 3.0
        return best_gamma(self.acceptance, max(c, 0.01))


class Patience:
    """Whether a short wait for the first guess pays: tried, and tried less often where nothing came of it."""

    SHARE = 0.02  # of a pass

    def __init__(self) -> None:
        self._pause, self._left = 1, 0

    def seconds(self, pass_s: float) -> float:
        self._left -= 1
        return 0.0 if self._left > 0 else self.SHARE * pass_s

    def learn(self, came: bool) -> None:
        self._pause = 1 if came else min(2 * self._pause, 64)
        self._left = self._pause


class Target:
    """Decodes one text at a time. `passes` and `report` hold the facts of the last one."""

    def __init__(self, model: Reader, channel: Channel | None = None, clock: Clock = time.perf_counter):
        """`channel` leads to the drafter; without one only schedules that draft nothing can run. `clock`: seconds."""
        self._model, self.channel, self._clock = model, channel, clock
        self._pace, self._patience = Pace(), Patience()
        self._sequence = 0
        self.passes: list[Pass] = []
        self.report: Report | None = None

    def decode(
        self, prompt: Sequence[int], schedule: Schedule, params: SamplingParams, stopper: Stopper
    ) -> Iterator[list[int]]:
        """Yields the tokens of each pass as they are committed, until the stopper has finished."""
        channel = self.channel if schedule.drafts else None
        assert channel or not schedule.drafts, "a schedule that drafts needs a channel"
        self._sequence += 1
        self.passes, self.report = [], None
        self._model.forget()
        text = _Text(
            self._sequence, prompt, schedule, params, stopper, channel, self._clock, self._pace.block(schedule)
        )
        if channel:
            channel.send(Start(text.sequence, schedule, params, tuple(prompt), text.block))
        try:
            while stopper.finish is None:
                yield self._pass(text)
        finally:  # also where the caller stops listening
            if channel:
                self._end(channel, text.sequence)

    def _pass(self, text: _Text) -> list[int]:
        """One turn of the loop at the top of this page. Returns what it commits."""
        trie, began = text.trie, self._clock()
        first = not self.passes  # it reads the prompt, as the drafter does at the same time: nothing to wait for yet
        if not first:
            self._await_guesses(text)
        waited = self._clock() - began

        nodes = [trie.root, *trie.chain(self._width(text) - 1)]
        logits = self._model.read(trie.tokens + [node.token for node in nodes[1:]], keep=len(nodes))
        forward = self._clock() - began - waited

        text.take()  # what arrived meanwhile may already tell hit from miss
        position, prompt = trie.root.position, len(trie.tokens)
        picker = Picker(text.params, logits, [node.position for node in nodes])
        rows = {node: row for row, node in enumerate(nodes)}
        walked = walk(trie.root, rows, lambda node: picker.pick(rows[node], node))
        tested, accepted = _tested(trie.root, walked)
        committed = text.stopper.take(walked)
        text.hit = trie.commit(committed)

        self._pace.judged(tested, accepted)
        if not first:
            self._pace.passed(forward)
        text.block = self._pace.block(text.schedule)
        if text.channel and text.stopper.finish is None:
            text.channel.send(Verdict(text.sequence, trie.root.position, text.block, tuple(committed)))
        self.passes.append(
            Pass(
                position=position,
                rows=len(nodes) + (prompt - 1 if first else 0),
                offered=len(nodes) - 1,
                tested=tested,
                accepted=accepted,
                committed=len(committed),
                hit=text.hit,
                block=text.block,
                waited_s=waited,
                forward_s=forward,
                seconds=self._clock() - began,
            )
        )
        return committed

    def _width(self, text: _Text) -> int:
        """Rows of the next pass at most: the block and its root, or as many as pay; not beyond the end of the text."""
        plan, gamma = self._model.rows, text.schedule.gamma
        pays = plan.best_width(self._pace.acceptance) if gamma is None else min(gamma + 1, plan.safe[-1])
        left = text.params.max_new_tokens - len(text.stopper.tokens)
        return min(pays, plan.up_to(text.trie.root.position), left)

    def _await_guesses(self, text: _Text) -> None:
        """Takes what has arrived, and waits for as many guesses as the schedule asks for.

        Where it asks for none, a short wait for the first one may still pay (`Patience`).
        """
        text.take()
        if not text.channel:
            return
        wanted, there, began = text.guesses_wanted, text.depth(), self._clock()
        if wanted:
            text.wait_for(wanted)
            if text.depth() > there:
                self._pace.guessed(text.depth() - there, self._clock() - began)
        elif text.schedule.gamma is None and not there and not text.resting:
            patience = self._patience.seconds(self._pace.pass_s)
            if patience:
                text.wait_for(1, patience)
                self._patience.learn(came=text.depth() > 0 or text.resting)

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
        block: int,
    ):
        self.sequence, self.schedule, self.params = sequence, schedule, params
        self.stopper, self.channel, self._clock, self.block = stopper, channel, clock, block
        self.trie = Trie(prompt)
        self.hit = False  # the last walk ended on a node that had arrived
        self._nodes: dict[int, Node] = {}  # by the drafter's id
        self._rested_at = -1

    @property
    def resting(self) -> bool:
        """The drafter has said that no more will come until the root moves from where it is."""
        return self._rested_at == self.trie.root.position

    @property
    def guesses_wanted(self) -> int:
        return self.schedule.guesses_to_wait_for(self.hit, self.block)

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
            if not isinstance(message, Nodes) or message.sequence != self.sequence:
                continue
            at = message.position
            assert at <= self.trie.root.position, "the drafter's root can't be ahead of the text"
            self._nodes.setdefault(message.root, Node(self.trie.tokens[at], at))
            for guess in message.guesses:
                parent = self._nodes.get(guess.parent)
                node = parent and self.trie.grow(parent, guess.token, guess.proposal)
                if node:
                    self._nodes[guess.id] = node
            if message.resting:
                self._rested_at = at


def _tested(root: Node, walked: Sequence[int]) -> tuple[int, int]:
    """How many guesses the walk compared with a pick, and how many were right."""
    node: Node | None = root
    tested = accepted = 0
    for token in walked:
        if node is None or not node.children:
            break
        tested += 1
        node = node.children.get(token)
        accepted += node is not None
    return tested, accepted
