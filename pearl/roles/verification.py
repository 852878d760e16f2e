"""A pass over one sequence, without its forward: which rows it reads, and what the target's picks make of them.

Knows: tries and what a row of a pass is. Refuses to know: models, channels, clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from pearl.core.control.controller import Controller
from pearl.core.logits import custom
from pearl.core.logits.logprobs import logprobs
from pearl.core.records import GuessOutcome
from pearl.core.sampling import picks
from pearl.core.sampling.picks import Picks
from pearl.core.token_buckets import LIMIT, TokenBuckets
from pearl.core.trie import Candidate, Node, path_numbers, walk
from pearl.errors import NonFiniteLogits
from pearl.machine.transfers import select_rows
from pearl.models.language_model import SideRow
from pearl.models.verifier import SequenceQuery
from pearl.roles.sequence import SequenceState


@dataclass(frozen=True)
class PassRows:
    """The rows of a pass, of one sequence."""

    nodes: list[Node]  # the root and the likeliest chain first
    sides: list[SideRow]  # where those beside it hang
    paths: int  # on how many paths these lie

    @staticmethod
    def of(root: Node, likely: Sequence[Candidate]) -> PassRows:
        chain = _chain(likely)
        on_chain = {one.node for one in chain}
        rows = {-1: 0}  # by the place in `likely`
        beside: list[Candidate] = []
        for place, one in enumerate(likely):
            if one.node in on_chain:
                rows[place] = one.depth
            else:
                rows[place] = 1 + len(chain) + len(beside)
                beside.append(one)
        sides = [(rows[one.parent], one.node.token) for one in beside]
        nodes = [root, *(one.node for one in chain), *(one.node for one in beside)]
        return PassRows(nodes, sides, max(path_numbers(likely), default=0))

    def paths_of(self, mine: Collection[Node]) -> int:
        """On how many paths beside the chain, counted as `path_numbers` does, one of these is the first."""
        keep, count = len(self.nodes) - len(self.sides), 0
        gone_on: set[int] = set()  # rows beside the chain that have a child
        for row, (parent, _) in enumerate(self.sides, keep):
            begins = parent < keep or parent in gone_on
            gone_on.add(parent)
            count += begins and self.nodes[row] in mine
        return count

    def below_root(self) -> list[list[int]]:
        """For each row the tokens after the root, up to its own."""
        chain = [node.token for node in self.nodes[1 : len(self.nodes) - len(self.sides)]]
        found = [chain[:depth] for depth in range(len(chain) + 1)]
        for parent, token in self.sides:
            found.append([*found[parent], token])
        return found

    def contexts(self, text: Sequence[int]) -> list[tuple[int, int]]:
        """For each row the token before it, -1 if there is none, and its own. `text`: up to the root."""
        chain = [node.token for node in self.nodes[: len(self.nodes) - len(self.sides)]]
        found = list(zip([text[-2] if len(text) > 1 else -1, *chain], chain, strict=False))
        for parent, token in self.sides:
            found.append((found[parent][1], token))
        return found

    def query(self, sequence: SequenceState, way: Sequence[int] = ()) -> SequenceQuery:
        """`way`: tokens from below the sequence's root to the first of the nodes, if that is another."""
        keep = len(self.nodes) - len(self.sides)
        chain = [node.token for node in self.nodes[1:keep]]
        return SequenceQuery(sequence.batch_slot, [*sequence.trie.tokens, *way, *chain], keep, self.sides)


@dataclass(frozen=True)
class PassWalk:
    """What a pass has found of one sequence."""

    position: int  # of the root before it
    committed: list[int]
    outcomes: tuple[GuessOutcome, ...]
    nodes: list[Node]  # that the walk went through
    verified: int  # as in `records.Pass`
    accepted_rows: int


def deepest(sequence: SequenceState, buckets: TokenBuckets, root: Node | None = None) -> int:
    """How far below the root a pass may read: not beyond the end of the text, or of the cache's next `SLOT_MULTIPLE`
    slots. `root`: one that it may have later."""
    root = root or sequence.trie.root
    left = sequence.params.max_new_tokens - len(sequence.stopper.tokens)
    left -= root.position - sequence.trie.root.position
    return min(left, buckets.up_to(root.position)) - 1


def candidates(
    sequence: SequenceState, buckets: TokenBuckets, trees: bool, controller: Controller, root: Node | None = None
) -> list[Candidate]:
    """The guesses that the next pass may read, likeliest first by what the controller makes of their chances. `trees`:
    they may branch. `root`: as of `deepest`.

    The pass that reads the end of a prompt has no guesses, though some may have come while other sequences had their
    turn: so many rows round in their own way, and what they leave in the cache is to be the same in every mode.
    """
    if not sequence.passes:
        return []
    likely = sequence.trie.best(LIMIT - 1, deepest(sequence, buckets, root), controller.log_chance, root)
    return likely if trees else _chain(likely)


def begin_picks(sequence: SequenceState, rows: PassRows, logits: Tensor) -> Picks:
    """The target's picks after each row, with all that its params do to logits.  logits: [R, V]"""
    params, positions = sequence.params, [node.position for node in rows.nodes]
    if not sequence.processing and not params.logits_processors:
        return picks.begin(params, logits, positions)
    paths, text = rows.below_root(), sequence.trie.tokens
    if sequence.processing:
        logits = sequence.processing(logits, text, paths)
    if not params.logits_processors:
        return picks.begin_processed(params, logits, positions)
    return picks.begin_processed(
        params,
        logits,
        positions,
        lambda row, scores: custom.apply(params.logits_processors, [*text, *paths[row]], scores),
    )


def verify(
    sequence: SequenceState,
    nodes: Sequence[Node],
    row_picks: Picks,
    controller: Controller,
    logits: Tensor,
    read_root: Callable[[], Tensor],
) -> PassWalk:
    """Walks the trie by the picks of a pass and commits; the controller learns what the guesses were worth. A sequence
    whose picks fail (a callable of the user's raises, or nothing may be said) ends there; the others go on.

    So does one whose logits are not finite. But a root's logits may be so because of rows that it must not see: nought
    times NaN is NaN. So it is read once more without any, as mode `ar` reads it.

    logits: [R, V], the target's own. `read_root`: the root's logits [1, V], of nothing but the text.
    """
    root = sequence.trie.root
    rows = {node: row for row, node in enumerate(nodes)}
    walked, failed = _walked(root, rows, row_picks)
    if isinstance(failed, NonFiniteLogits) and walked:
        failed = None  # rows that it must not see may have made it so: the next pass reads that token as its root
    elif isinstance(failed, NonFiniteLogits):
        logits, rows = read_root(), {root: 0}
        walked, failed = _walked(root, rows, begin_picks(sequence, PassRows.of(root, []), logits))
    outcomes = _outcomes(sequence, walked, controller)
    verified, accepted = _verified(root, walked, rows)
    try:
        committed = sequence.stopper.take(walked)
    except Exception as error:  # of a tokenizer that can't decode what was said
        committed, failed = [], error
    passed, node = list[Node](), root
    if failed and sequence.stopper.finish is None:
        sequence.fail(failed)
    for token in committed:
        passed.append(node)
        node = node.children.get(token, node)
    if sequence.params.logprobs is not None:
        read = select_rows(logits, [rows[node] for node in passed])
        sequence.logprobs += logprobs(read, committed, sequence.params.logprobs)
    sequence.hit = sequence.trie.commit(committed) and bool(committed)
    return PassWalk(root.position, committed, outcomes, passed, verified, accepted)


def _walked(root: Node, rows: dict[Node, int], row_picks: Picks) -> tuple[list[int], Exception | None]:
    """The tokens of a walk, and what has ended it too early, if anything."""
    picked: list[int] = []

    def pick(node: Node) -> int:
        picked.append(row_picks.pick(rows[node], node))
        return picked[-1]

    try:
        return walk(root, rows, pick), None
    except Exception as error:
        return picked, error


def _outcomes(sequence: SequenceState, walked: Sequence[int], controller: Controller) -> tuple[GuessOutcome, ...]:
    """What the guesses along the walk were worth, up to where there were none."""
    outcomes: list[GuessOutcome] = []
    node: Node | None = sequence.trie.root
    for depth, token in enumerate(walked, 1):
        if node is None or not node.children:
            break
        first = sequence.first_arrived(node)
        for child in node.children.values():
            controller.record_guess(child.logp, child.token == token, child is first, depth, child.origin)
        guesses = list(node.children)
        q = tuple(round(math.exp(child.logp), 4) for child in node.children.values())
        origins = tuple(child.origin for child in node.children.values())
        outcomes.append(GuessOutcome(guesses.index(token) if token in guesses else None, q, origins))
        node = node.children.get(token)
    return tuple(outcomes)


def _verified(root: Node, walked: Sequence[int], rows: dict[Node, int]) -> tuple[int, int]:
    """At how many places of the walk a row of the pass was a guess, and at how many of those one was right."""
    verified = accepted = 0
    node: Node | None = root
    for token in walked:
        if node is None or not any(child in rows for child in node.children.values()):
            break
        node = node.children.get(token)
        verified += 1
        accepted += node in rows
    return verified, accepted


def _chain(likely: Sequence[Candidate]) -> list[Candidate]:
    """The likeliest way down through `likely`, which are the likeliest first; each the child of the one before it."""
    chain: list[Candidate] = []
    last = -1
    for place, one in enumerate(likely):
        if one.parent == last:
            chain.append(one._replace(parent=len(chain) - 1))
            last = place
    return chain
