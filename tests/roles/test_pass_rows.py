"""The rows of a pass and what has arrived of a sequence, counted as the pass reads them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.messages import Guess, Nodes
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.trie import Trie
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.verification import PassRows

SOURCES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3), st.booleans()), min_size=1, max_size=12)


@given(SOURCES)
@examples(60)
def test_each_path_beside_the_chain_is_counted_for_who_has_begun_it(grown: list):
    trie = Trie([0])
    nodes, mine = [trie.root], set()
    for number, (parent, token, own) in enumerate(grown):
        node = trie.grow(nodes[parent % len(nodes)], token, logp=math.log(0.9) - 0.01 * number)
        nodes.append(node)
        if own:
            mine.add(node)
    rows = PassRows.of(trie.root, trie.best(20))
    everybody = set(rows.nodes)
    assert rows.paths_of(everybody) == rows.paths and rows.paths_of(set()) == 0
    assert rows.paths_of(mine) + rows.paths_of(everybody - mine) == rows.paths


def test_the_drafters_first_guess_is_the_one_that_it_sent_first():
    """Whoever else had its second one before."""
    params = SamplingParams()
    request = SequenceRequest((1, 2, 3), params, Stopper(params, (), str))
    sequence = SequenceState(0, request, Schedule.of("tree"), 0, 0.0)
    root = sequence.trie.root
    sequence.trie.grow(root, 7, logp=-1.0, origin="recycled")
    guesses = [Guess(1, 0, 9, (), -0.1), Guess(2, 0, 7, (), -2.0), Guess(3, 1, 4, (), -0.1)]
    sequence.add_nodes(Nodes(0, 0, root.position, False, tuple(guesses)))
    assert sequence.first_arrived(root).token == 9 and sequence.depth() == 2
