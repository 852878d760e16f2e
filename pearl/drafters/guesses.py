"""The guesses of one forward, and the chains and tries that grow of them.

A row's guesses may depend on the token before it as well; then they are asked for once that token is known, for all
rows of a depth together. Knows: rows of guesses, beams. Refuses to know: which leaves are read, and by what network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.core.trie import Node, Proposal, Trie
from pearl.drafters.draft_source import MIN_PATH_LOGP, Chain, Grown

_GO_ON_LOGP = math.log(0.02)  # a path that is less likely is not gone on from, unless it is the best of its beam

Guess = tuple[int, float, Proposal]  # token, log q, what it was drawn from
RowGuesses = Any  # of one row, list[Guess], likeliest first; or, where they depend on the token before, a `RowAfter`
Guesses = list[RowGuesses]  # by depth
Beam = list[tuple[float, Node]]  # paths: the log of how likely each is, and where it ends


class _LooksBack(Protocol):
    def after(self, asked: Sequence[tuple[RowAfter, Sequence[int]]]) -> list[list[list[Guess]]]:
        """The guesses of some rows of one text, each after some tokens."""


@dataclass(frozen=True)
class RowAfter:
    """The guesses of a row, which depend on the token before it as well.  logits: [D], or over the target's
    vocabulary; hidden: [H]; position: of the token that is guessed; path: see `RankQuery.paths`"""

    source: _LooksBack
    logits: Tensor
    hidden: Tensor
    position: int
    path: Sequence[int]
    params: SamplingParams


def guesses_after_each(asked: Sequence[tuple[RowGuesses, Sequence[int]]]) -> list[list[list[Guess]]]:
    """The guesses of some rows of one text, each after some tokens: one call of the network for all of them."""
    looking = [(row, tokens) for row, tokens in asked if isinstance(row, RowAfter)]
    found = iter(looking[0][0].source.after(looking) if looking else ())
    return [next(found) if isinstance(row, RowAfter) else [row] * len(tokens) for row, tokens in asked]


def best_chain(table: Guesses, token: int) -> Chain:
    """The best guess of every depth, one after the other, the first after `token`."""
    chain: list[Any] = []
    for row in table:
        token, _, proposal = guesses_after_each([(row, [token])])[0][0][0]
        chain.append((token, proposal))
    return chain


def with_confidence(guesses: Sequence[Guess], chance: float) -> list[Guess]:
    """Guesses of a row, of which a head says the log of the chance that the best is right: the others share what is
    left, in proportion, and none is likelier."""
    (best, q, proposal), *others = guesses
    left, before = (math.log1p(-math.exp(min(logp, -1e-6))) for logp in (chance, q))
    rest = [(token, min(chance, left + one - before), its) for token, one, its in others]
    return [(best, chance, proposal), *rest]


def joint_logp(trie: Trie, path: Sequence[int]) -> float:
    """The log of the chance of a path that is there."""
    node, joint = trie.root, 0.0
    for token in path:
        node = node.children[token]
        joint += node.logp
    return joint


def grown_beams(
    trie: Trie, beams: Sequence[tuple[Beam, Guesses]], top_k: int, origin: str, others: Collection[Node] = ()
) -> Grown:
    """Goes on from beams of highest joint probability, each by a table of guesses by depth: every surviving parent
    meets every candidate of its depth. `others`: nodes whose own row was read; paths stop there."""
    new: Grown = []
    for depth in range(max((len(table) for _, table in beams), default=0)):
        beams = [(beam, table) for beam, table in beams if beam and depth < len(table)]
        found = guesses_after_each([(table[depth], [node.token for _, node in beam]) for beam, table in beams])
        grown = [
            grown_once(trie, beam, guesses, top_k, origin, new) for (beam, _), guesses in zip(beams, found, strict=True)
        ]
        beams = [
            ([one for one in beam if one[1] not in others], table)
            for beam, (_, table) in zip(grown, beams, strict=True)
        ]
    return new


def grown_once(trie: Trie, beam: Beam, guesses: Sequence[list[Guess]], top_k: int, origin: str, new: Grown) -> Beam:
    """The likeliest paths that go on from those of a beam. Notes nodes that were not there."""
    paths = [
        (joint + q, rank, parent, token, proposal, q)
        for (joint, parent), after in zip(beam, guesses, strict=True)
        for rank, (token, q, proposal) in enumerate(after)
    ]
    first = paths[0] if paths else None
    kept: Beam = []
    for path in sorted(paths, key=lambda path: (-path[0], path[1]))[:top_k]:
        joint, _, parent, token, proposal, q = path
        if joint < MIN_PATH_LOGP and path is not first:
            continue
        there = token in parent.children
        child = trie.grow(parent, token, proposal, q, origin)
        assert child is not None, "a source extends the tree that it was given"
        if not there:
            new.append((parent, child))
        if joint >= _GO_ON_LOGP or not kept:
            kept.append((joint, child))
    return kept
