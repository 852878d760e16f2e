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

from pearl.channel import Channel
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
    """Decodes one sequence at a time. `passes` and `report` hold the facts of the last one."""

    def __init__(self, model: Reader, channel: Channel | None = None):
        """`channel` leads to the drafter; without one only schedules that draft nothing can run."""
        self._model, self.channel = model, channel
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
        sequence = self._sequence
        self.passes, self.report = [], None
        self._model.forget()
        text = _Text(sequence, prompt)
        hit, block = False, self._pace.block(schedule)
        if channel:
            channel.send(Start(sequence, schedule, params, tuple(prompt), block))
        try:
            while stopper.finish is None:
                began = time.perf_counter()
                if channel and self.passes:  # both sides begin with the prompt: nothing to wait for yet
                    self._await_guesses(channel, text, schedule, hit, block)
                waited = time.perf_counter() - began

                trie = text.trie
                left = params.max_new_tokens - len(stopper.tokens)
                chain = trie.chain(min(self._width(schedule, trie.root.position), left) - 1)
                new = len(prompt) if not self.passes else 1
                logits = self._model.read(trie.tokens + [node.token for node in chain], keep=1 + len(chain))
                forward = time.perf_counter() - began - waited

                if channel:
                    text.take(channel)  # what arrived meanwhile may already tell hit from miss
                nodes = [trie.root, *chain]
                picker = Picker(params, logits, [node.position for node in nodes])
                rows = {node: row for row, node in enumerate(nodes)}
                position = trie.root.position
                walked = walk(trie.root, rows, lambda node: picker.pick(rows[node], node))
                tested, accepted = _tested(trie.root, walked)
                committed = stopper.take(walked)
                hit = trie.commit(committed)

                self._pace.judged(tested, accepted)
                if self.passes:  # the first one reads the whole prompt
                    self._pace.passed(forward)
                block = self._pace.block(schedule)
                if channel and stopper.finish is None:
                    channel.send(Verdict(sequence, trie.root.position, block, tuple(committed)))
                self.passes.append(
                    Pass(
                        position=position,
                        rows=new + len(chain),
                        offered=len(chain),
                        tested=tested,
                        accepted=accepted,
                        committed=len(committed),
                        hit=hit,
                        block=block,
                        waited_s=waited,
                        forward_s=forward,
                        seconds=time.perf_counter() - began,
                    )
                )
                yield committed
        finally:  # also where the caller stops listening
            if channel:
                self._end(channel, sequence)

    def _width(self, schedule: Schedule, position: int) -> int:
        """Rows of a pass at most whose root is at `position`: the block and its root, or as many as pay."""
        plan = self._model.rows
        if schedule.gamma is None:
            width = plan.best_width(self._pace.acceptance)
        else:
            width = min(schedule.gamma + 1, plan.safe[-1])
        return min(width, plan.up_to(position))

    def _await_guesses(self, channel: Channel, text: _Text, schedule: Schedule, hit: bool, block: int) -> None:
        """Takes what has arrived; waits for more as the schedule says, but never for a drafter that rests or is lost."""
        wanted = schedule.guesses_to_wait_for(hit, block)
        text.take(channel)
        began = time.perf_counter()
        if wanted:
            there = text.depth(wanted)
            while text.depth(wanted) < wanted and not text.resting and not channel.lost:
                channel.wait()
                text.take(channel)
            if text.depth(wanted) > there:
                self._pace.guessed(text.depth(wanted) - there, time.perf_counter() - began)
        elif schedule.gamma is None and not text.depth(1) and not text.resting:
            patience = self._patience.seconds(self._pace.pass_s)
            if patience:
                deadline = began + patience
                while not text.depth(1) and not text.resting and (left := deadline - time.perf_counter()) > 0:
                    channel.wait(left)
                    text.take(channel)
                    if channel.lost:
                        break
                self._patience.learn(bool(text.depth(1)) or text.resting)

    def _end(self, channel: Channel, sequence: int) -> None:
        """Tells the drafter that the text is over and takes its facts; outside all timing."""
        channel.send(End(sequence))
        deadline = time.perf_counter() + REPORT_TIMEOUT_S
        while self.report is None and not channel.lost and (left := deadline - time.perf_counter()) > 0:
            channel.wait(left)
            while (message := channel.receive()) is not None:
                if isinstance(message, Report) and message.sequence == sequence:
                    self.report = message


class _Text:
    """The target's view of one sequence: its trie, and the drafter's names for the nodes."""

    def __init__(self, sequence: int, prompt: Sequence[int]):
        self.trie = Trie(prompt)
        self._sequence = sequence
        self._nodes: dict[int, Node] = {}  # by the drafter's id
        self._rested_at = -1

    @property
    def resting(self) -> bool:
        """The drafter has said that no more will come until the root moves from where it is."""
        return self._rested_at == self.trie.root.position

    def depth(self, limit: int) -> int:
        return len(self.trie.chain(limit))

    def take(self, channel: Channel) -> None:
        """Hangs the nodes that have arrived into the trie; those of another sequence or a dead branch fall away."""
        while (message := channel.receive()) is not None:
            if not isinstance(message, Nodes) or message.sequence != self._sequence:
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
