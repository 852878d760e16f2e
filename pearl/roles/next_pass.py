"""Lays out the pass after the one that is under way, for the likeliest walk, while its picks travel to the host.

The walk ends at a token that is not among the rows of the pass. Of the guesses there the likeliest is taken to be
right, and the pass from it on is chosen, and its numbers are on their way to the device, before anybody knows. If the
walk goes there and nothing has grown meanwhile, that is the next pass; else it is chosen and laid out as ever. Which
rows a pass reads changes no token.

Where picks are here at once, as on a CPU, there is nothing to do meanwhile, and nothing is prepared.
"""

from __future__ import annotations

import math
import time

from pearl.core.control.controller import Controller
from pearl.core.trie import Node
from pearl.roles.sequence import SequenceState
from pearl.roles.target_model import TargetModel
from pearl.roles.verification import PassRows, candidates
from pearl.wire.channel import Clock


class NextPass:
    """Of one sequence; where several share a pass it would take all of them to go as foreseen."""

    def __init__(self, model: TargetModel, clock: Clock = time.perf_counter):
        self.prepared = self.used = 0  # how often
        self.seconds = 0.0  # spent on it, beside the device
        self._model, self._clock = model, clock
        self._foreseen: tuple[SequenceState, Node, int, PassRows] | None = None

    def prepare(self, sequence: SequenceState, rows: PassRows, controller: Controller) -> None:
        """After the forward of `rows`."""
        self._foreseen, began = None, self._clock()
        if (found := _likeliest(rows, controller)) is None:
            return
        node, way = found
        likely = candidates(sequence, self._model.buckets, self._model.verifies_trees, controller, node)
        after = PassRows.of(node, controller.choose([likely])[0])
        self._model.prepare(after.query(sequence, way))
        self._foreseen = sequence, node, sequence.trie.changes, after
        self.prepared += 1
        self.seconds += self._clock() - began

    def rows(self, sequence: SequenceState) -> PassRows | None:
        """What was prepared, if that is the sequence's next pass."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None:
            return None
        whose, node, changes, rows = foreseen
        if whose is not sequence or node is not sequence.trie.root or changes != sequence.trie.changes:
            return None
        self.used += 1
        return rows


def _likeliest(rows: PassRows, controller: Controller) -> tuple[Node, list[int]] | None:
    """The guess that is likeliest to be where the walk ends, and the tokens from below the root to it."""
    read, best, found = set(rows.nodes), -math.inf, None
    stack: list[tuple[Node, list[int], float]] = [(rows.nodes[0], [], 0.0)]
    while stack:
        node, way, logp = stack.pop()
        for child in node.children.values():
            reached = logp + controller.log_chance(child, len(way) + 1)
            if child in read:
                stack.append((child, [*way, child.token], reached))
            elif reached > best:
                best, found = reached, (child, [*way, child.token])
    return found
