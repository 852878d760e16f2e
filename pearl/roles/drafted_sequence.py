"""The drafter's view of one sequence: its trie, the plan in force, and the statistics of its draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pearl.core.logits.processing import LogitsProcessing
from pearl.core.messages import DraftPlan, DraftStats, Guess, Nodes, Start, Verdict
from pearl.core.trie import FORGET_EVERY, Node, Trie
from pearl.drafters.draft_source import Grown


@dataclass(eq=False)
class DraftedSequence:
    """A sequence under way."""

    start: Start
    batch_slot: int
    trie: Trie
    plan: DraftPlan
    stats: DraftStats
    processing: LogitsProcessing | None
    ids: dict[Node, int] = field(default_factory=dict)  # by which the target knows the nodes
    ids_given: int = 0
    forgotten: int = 0  # the position before which nodes have none any more
    drafted: int = 0  # guesses since the chain began
    exhausted_at: int = -1  # the root position for which the target knows that no more will come

    @staticmethod
    def begun(start: Start, batch_slot: int) -> DraftedSequence:
        processing = LogitsProcessing.of(start.params, len(start.prompt))
        trie, stats = Trie(start.prompt), DraftStats(start.sequence_id)
        sequence = DraftedSequence(start, batch_slot, trie, start.plan, stats, processing)
        sequence.id_of(sequence.trie.root)
        return sequence

    def id_of(self, node: Node) -> int:
        if node not in self.ids:
            self.ids[node], self.ids_given = self.ids_given, self.ids_given + 1
        return self.ids[node]

    def count(self, **more: float) -> None:
        stats = self.stats
        if any(more.values()):
            self.stats = replace(stats, **{name: getattr(stats, name) + value for name, value in more.items()})

    def apply(self, verdict: Verdict) -> bool:
        """Moves the root to where the target says. Returns whether that was foreseen: a hit."""
        misses, prepared = _foreseen(self.trie.root, verdict.tokens)
        hit = self.trie.commit(verdict.tokens)
        assert self.trie.root.position == verdict.position, "a verdict was lost"
        self.plan = verdict.plan
        if verdict.position >= self.forgotten + FORGET_EVERY:
            self.ids = {node: id_ for node, id_ in self.ids.items() if node.may_grow(verdict.position)}
            self.forgotten = verdict.position
        if not self.trie.root.children:
            self.drafted = 0
        self.count(verdicts=1, hits=int(hit), misses=misses, prepared=prepared)
        return hit

    def nodes(self, grown: Grown, exhausted: bool) -> Nodes | None:
        """What the target is told of new nodes; None: nothing that it does not know. `exhausted`: no more will come
        until the root moves."""
        root = self.trie.root
        if not grown and self.exhausted_at == root.position:
            return None
        if exhausted:
            self.exhausted_at = root.position
        guesses = tuple(
            Guess(self.id_of(node), self.id_of(parent), node.token, node.proposal, node.logp, node.origin)
            for parent, node in self._with_parents(grown)
        )
        return Nodes(self.start.sequence_id, self.id_of(root), root.position, exhausted, guesses)

    def _with_parents(self, grown: Grown) -> Grown:
        """New nodes, with those above them that nobody has told of: one source may have grown some before it raised,
        and others go on below."""
        root, new = self.trie.root, {node for _, node in grown}
        if all(one in self.ids or one in new or one.position <= root.position for one, _ in grown):
            return grown
        untold = [pair for pair in self.trie.pairs() if pair[1] not in self.ids]
        return [*untold, *(pair for pair in grown if pair not in untold)]


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
