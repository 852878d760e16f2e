"""What the target once said after a token is guessed when that token comes again."""

from __future__ import annotations

import math

import pytest
import torch

from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.trie import Trie
from pearl.drafters.draft_source import RowsRead, TreeQuery
from pearl.drafters.recycling import KEPT, PLACES, RecyclingSource

V = 40


def rows(said: dict[tuple[int, int], list[int]]) -> RowsRead:
    """After each context the tokens that are likely there, the likeliest first."""
    logits = torch.full((len(said), V), -20.0)
    for row, tokens in enumerate(said.values()):
        logits[row, tokens] = torch.tensor([3.0 - place for place in range(len(tokens))])
    return RowsRead(list(said), logits)


def source(params: SamplingParams | None = None) -> RecyclingSource:
    made = RecyclingSource()
    made.begin(0, params or SamplingParams())
    return made


def grown(of: RecyclingSource, trie: Trie, most: int = 15, deepest: int = 9) -> dict[tuple[int, ...], float]:
    """The paths below the root, and the joint log-probability of each."""
    of.extend([TreeQuery(0, trie, most, deepest)])
    found: dict[tuple[int, ...], float] = {}
    stack = [((), trie.root, 0.0)]
    while stack:
        path, node, joint = stack.pop()
        for child in node.children.values():
            found[(*path, child.token)] = joint + child.logp
            stack.append(((*path, child.token), child, joint + child.logp))
    return found


def test_what_followed_a_token_is_guessed_with_what_followed_that():
    one = source()
    one.read_rows(0, rows({(1, 2): [5, 6], (2, 5): [7], (2, 6): [8]}))
    found = grown(one, Trie([9, 1, 2]))
    assert {(5,), (6,), (5, 7), (6, 8)} <= found.keys()
    assert found[(5,)] > found[(6,)] and found[(5, 7)] <= found[(5,)]


def test_two_tokens_tell_more_than_one_and_one_more_than_none():
    one = source()
    one.read_rows(0, rows({(1, 2): [5], (3, 2): [6]}))
    for text, guess in (([1, 2], 5), ([3, 2], 6), ([4, 2], 6)):  # after another token the newest
        found = grown(one, Trie(text))
        assert max(found, key=found.__getitem__) == (guess,)
    assert not grown(one, Trie([2, 4]))


def test_nothing_is_guessed_twice_and_others_have_their_part_of_the_chance():
    one = source()
    one.read_rows(0, rows({(1, 2): [5, 6]}))
    alone = grown(one, Trie([1, 2]))
    trie = Trie([1, 2])
    trie.grow(trie.root, 5, logp=math.log(0.9))
    beside = grown(one, trie)
    assert [child.origin for child in trie.root.children.values()][:2] == ["draft", "recycled"]
    assert beside[(6,)] < alone[(6,)] + math.log(0.11)
    assert beside[(5,)] == math.log(0.9)


def test_a_tree_is_as_large_and_as_deep_as_was_asked_for():
    one = source()
    one.read_rows(0, rows({(-1, token): [*range(token + 1, token + 7)] for token in range(20)}))
    for most, deepest in ((1, 9), (4, 9), (15, 2), (15, 0)):
        found = grown(one, Trie([0]), most, deepest)
        assert len(found) <= most and max(map(len, found), default=0) <= deepest


def test_it_learns_how_much_its_memory_is_worth():
    right, wrong = source(), source()
    for step in range(60):
        right.read_rows(0, rows({(1, 2): [5, 6]}))
        wrong.read_rows(0, rows({(1, 2): [7 + step % 30]}))
    good, bad = grown(right, Trie([1, 2])), grown(wrong, Trie([1, 2]))
    assert good[(5,)] > math.log(0.9) and max(bad.values(), default=-9.0) < math.log(0.3)


@pytest.mark.parametrize("seed", range(5))
def test_where_the_target_samples_the_noise_that_it_will_add_is_known(seed: int):
    one = source(SamplingParams(temperature=1.0, seed=seed))
    said = rows({(1, 2): [5, 6, 7, 8]})
    for _ in range(40):  # it has learned that its memory is right
        one.read_rows(0, said)
    found = grown(one, Trie([1, 2]))
    one.begin(0, SamplingParams(), continues=True)
    chances = one._after(0, 1, Trie([1, 2]).root, 0.0)
    noisy = {t: chances[t] + float(noise.gumbel(seed, 2, noise.PICK, torch.tensor([t]))) for t in chances}
    assert max(found, key=found.__getitem__) == (max(noisy, key=noisy.__getitem__),)


def test_nothing_of_a_text_is_known_in_the_next_unless_that_is_asked_for():
    for over_texts in (False, True):
        one = RecyclingSource(over_texts)
        for slot in (0, 1):
            one.begin(slot, SamplingParams())
        one.read_rows(0, rows({(1, 2): [5]}))
        queries = [TreeQuery(slot, Trie([1, 2]), 9, 9) for slot in (0, 1)]
        assert [bool(new) for new in one.extend(queries)] == [True, over_texts], "beside another text"
        one.begin(0, SamplingParams(), continues=True)
        assert one.extend([TreeQuery(0, Trie([1, 2]), 9, 9)])[0], "a talk goes on"
        one.begin(0, SamplingParams())
        assert bool(one.extend([TreeQuery(0, Trie([1, 2]), 9, 9)])[0]) == over_texts, "after another text"


def test_its_memory_has_a_fixed_size():
    one = source()
    for first in range(0, 3 * PLACES, PLACES // 4):
        contexts = [(first + n, first + n + 1) for n in range(0, PLACES // 4, 97)]
        one.read_rows(0, RowsRead(contexts, torch.randn(len(contexts), V)))
    size = sum(array.nbytes for array in (one._keys, one._tokens, one._bins))
    assert size == PLACES * (8 + 5 * KEPT) < 4e6


def test_logits_that_are_not_finite_are_not_kept():
    one = source()
    one.read_rows(0, RowsRead([(1, 2)], torch.full((1, V), math.nan)))
    assert not grown(one, Trie([1, 2]))
