"""One sequence as the target knows it: its trie, the drafter's names for the nodes, where it stands, its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.core.logits.logprobs import Logprobs
from pearl.core.logits.processing import LogitsProcessing
from pearl.core.messages import DraftStats, Features, Nodes, joined
from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.trie import FORGET_EVERY, Node, Trie, shared_prefix


@dataclass(frozen=True)
class SequenceRequest:
    """A text to be written."""

    prompt: Sequence[int]
    params: SamplingParams
    stopper: Stopper
    # one whose text the prompt begins with: what the cache still has of it is not read again
    after: SequenceState | None = None
    user_data: Any = None
    wanted: Callable[[], bool] = lambda: True  # False, from any thread: nobody wants it any more
    reference: tuple[int, ...] = ()  # as in `messages.Start`
    prediction: Sequence[int] = ()  # tokens that are likely to occur in it: guesses are taken from there

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params.with_seed())


class SequenceState:
    """A sequence under way, or one that is over."""

    def __init__(self, sequence_id: int, request: SequenceRequest, schedule: Schedule, batch_slot: int, now: float):
        """`sequence_id`: as in messages. `now`: on the target's clock."""
        self.sequence_id, self.request, self.schedule, self.batch_slot = sequence_id, request, schedule, batch_slot
        self.params, self.stopper = request.params, request.stopper
        self.trie = Trie(request.prompt)
        self.processing = LogitsProcessing.of(self.params, len(request.prompt), self.stopper.eos_ids)
        self.logprobs: list[Logprobs] = []  # of each new token, if they are asked for
        self.prompt_logprobs: list[Logprobs | None] | None = None  # of the prompt's, the first of which has none
        self.error: Exception | None = None  # that has ended it
        self.passes: list[Pass] = []
        self.draft_stats: DraftStats | None = None
        self.hit = False  # the last walk ended on a guess, whoever had made it
        self.wait_budget_s = 0.0  # the longest wait for a first guess that the controller allowed before this pass
        self.placed = now  # when it took its slot
        self.began: float | None = None  # when its prompt's turn came
        self.ended = 0.0  # when it was over
        self.cached = 0  # tokens of the prompt that need no reading
        self.read, self.reading_s = 0, 0.0  # tokens of the prompt that are read by now, and for how long
        self.features: list[Features] = []  # of all tokens but the last, if the model tells them
        self._nodes: dict[int, Node] = {}  # by the drafter's id
        self._arrived: dict[Node, int] = {}  # those that the drafter knows, with its number of each: they ascend
        self._exhausted_at = -1
        self._forgotten = 0  # the position before which nodes are forgotten

    def fail(self, error: Exception) -> None:
        """It ends here."""
        self.error, self.stopper.finish = error, "error"

    def follow(self, last: SequenceState) -> None:
        """This sequence goes on where `last` has ended, as far as it does."""
        self.cached = self.read = shared_prefix(last.trie.tokens[:-1], self.trie.tokens[:-1])
        if (features := joined(last.features)) is not None:
            self.features = [features[: self.cached]]

    def keep(self, tokens: int) -> None:
        """The model holds no more of what it goes on from: somebody else has used its place meanwhile."""
        self.cached = self.read = min(self.cached, tokens)
        self.features = [one[: self.cached] for one in self.features]

    @property
    def exhausted(self) -> bool:
        """The drafter has said that no more will come until the root moves from where it is."""
        return self._exhausted_at == self.trie.root.position

    def depth(self) -> int:
        """Guesses that have arrived, one after the other."""
        depth, node = 0, self.trie.root
        while (first := self.first_arrived(node)) is not None:
            depth, node = depth + 1, first
        return depth

    def first_arrived(self, node: Node) -> Node | None:
        """The drafter's first guess after a node; others may have been made here."""
        mine = (child for child in node.children.values() if child in self._arrived)
        return min(mine, key=self._arrived.__getitem__, default=None)

    def has_arrived(self, node: Node) -> bool:
        """The drafter has guessed it, whoever else has."""
        return node in self._arrived

    def add_nodes(self, message: Nodes) -> None:
        """Adds the nodes that have arrived to the trie; those of a dead branch fall away."""
        at = message.position
        if at >= self._forgotten + FORGET_EVERY:
            self._forget(at)
        assert at <= self.trie.root.position, "the drafter's root can't be ahead of the text"
        self._nodes.setdefault(message.root, Node(self.trie.tokens[at], at))
        for guess in message.guesses:
            parent = self._nodes.get(guess.parent)
            node = parent and self.trie.grow(parent, guess.token, guess.proposal, guess.logp, guess.origin)
            if node:
                self._nodes[guess.id] = node
                self._arrived.setdefault(node, guess.id)
        if message.exhausted:
            self._exhausted_at = at

    def _forget(self, at: int) -> None:
        """Lets go of nodes that no guess can follow any more: dead ones, and those before the drafter's root, `at`."""
        self._nodes = {id: node for id, node in self._nodes.items() if node.may_grow(at)}
        self._arrived = {node: number for node, number in self._arrived.items() if node.may_grow(at)}
        self._forgotten = at
