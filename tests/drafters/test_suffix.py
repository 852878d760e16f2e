"""The suffix source finds what a plain search finds, at every length of match; longer ones let it guess further."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.logits.processing import LogitsProcessing
from pearl.core.params import SamplingParams
from pearl.core.trie import Node, Trie
from pearl.drafters.draft_source import MIN_PATH_LOGP, ChainQuery, TreeQuery
from pearl.drafters.suffix import MIN_CHAIN_LOGP, Chances, SuffixIndex, SuffixSource
from pearl.drafters.suffix_automaton import MOST_COUNTED, MOST_LINKS, SEPARATOR, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 2), max_size=40)
PATHS = st.lists(st.integers(0, 3), max_size=6)


def automaton_of(text: Sequence[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.add(token)
    return automaton


def followers(text: Sequence[int], suffix: Sequence[int]) -> Counter[int]:
    """What followed each occurrence, and how often."""
    size = len(suffix)
    return Counter(text[at + size] for at in range(len(text) - size) if text[at : at + size] == suffix)


def matches(text: list[int], path: list[int]) -> list[tuple[int, dict[int, int]]]:
    """By a plain search: each length of a suffix of text and path that something followed in the text, longest first,
    where more tokens did than after the longer ones."""
    found: list[tuple[int, dict[int, int]]] = []
    whole = text + path
    for size in range(len(whole), 0, -1):
        after = followers(text, whole[len(whole) - size :])
        if len(after) > (len(found[-1][1]) if found else 0):
            found.append((size, {token: min(count, MOST_COUNTED) for token, count in after.items()}))
    return found


def test_a_long_repetition_is_looked_up_in_a_few_steps():
    automaton = automaton_of([7] * 5000)
    steps = 0

    class Counted(list[int]):
        def __getitem__(self, at):
            nonlocal steps
            steps += 1
            return super().__getitem__(at)

    automaton._link = Counted(automaton._link)
    assert [match for match, _ in automaton.suffixes(automaton.end)] == [4999]
    assert steps <= MOST_LINKS + 2


@examples(300)
@given(TEXTS, PATHS)
def test_every_match_of_the_end_of_a_text_and_of_a_path_after_it_is_found_with_its_counts(text, path):
    automaton = automaton_of(text)
    place = automaton.end
    for token in path:
        place = automaton.after(place, token)
    found = [
        (match, {token: automaton.count(state) for token, state in follow.items()})
        for match, follow in automaton.suffixes(place)
    ]
    assert found == matches(text, path)


@pytest.mark.parametrize("period", [1, 2, 7])
def test_a_count_is_full_some_time_and_costs_no_more_from_then_on(period: int):
    text = [at % period for at in range(20 * MOST_COUNTED)]
    automaton = automaton_of(text)
    lengths = [match for match, _ in automaton.suffixes(automaton.end)]
    assert lengths == [len(text) - period], "one match, whose suffixes nothing else followed"
    _, follow = next(automaton.suffixes(automaton.end))
    assert [automaton.count(state) for state in follow.values()] == [1], "the whole text but its first period"
    place = automaton.after((0, 0), 0)
    _, follow = next(automaton.suffixes(place))
    assert [automaton.count(state) for state in follow.values()] == [MOST_COUNTED]


@examples(200)
@given(TEXTS, PATHS, st.integers(1, 8), st.lists(TEXTS, max_size=2))
def test_a_chain_is_the_likeliest_way_on_and_goes_no_further_than_it_is_likely(text, path, room: int, others):
    source = SuffixSource()
    for other in (*others, [0, *text]):
        source.begin(0, SamplingParams())
        source.propose(other, 4)
    tokens = [0, *text]
    chain = source.propose_batch([ChainQuery(0, tokens, tuple(path), room)])[0]
    assert len(chain) <= room
    joint, said = 0.0, tokens + path
    for token, proposal, logp, _ in chain:
        assert proposal == () and logp < 0
        best = matches(tokens, said[len(tokens) :])
        assert token in {one for _, after in best for one in after}, "it followed some match"
        joint += logp
        said = [*said, token]
    assert joint >= MIN_CHAIN_LOGP
    if not path and len(chain) > 1:
        first, *rest = chain
        assert source.propose_batch([ChainQuery(0, tokens, (first[0],), room - 1)])[0] == rest, "whoever asks, and when"


@examples(200)
@given(TEXTS, st.lists(st.integers(0, 2), max_size=3), st.integers(0, 6))
def test_a_tree_holds_likely_nodes_only_and_grows_on_what_others_have_grown(text, chain, deepest: int):
    source, trie = SuffixSource(), Trie([0, *text])
    node, others = trie.root, []
    for token in chain:
        grown = trie.grow(node, token, (), math.log(0.5))
        assert grown is not None
        others.append(node := grown)
    (new,) = source.extend([TreeQuery(0, trie, 8, deepest)])
    above: dict[Node, float] = {trie.root: 0.0}
    above |= {one: math.log(0.5) * (depth + 1) for depth, one in enumerate(others)}
    for parent, child in new:
        assert parent in above and parent.children[child.token] is child, "parents first"
        above[child] = above[parent] + child.logp
        assert above[child] >= MIN_PATH_LOGP - 1e-9 and child.position - trie.root.position <= deepest
        assert child.logp < 0
    assert [one.logp for one in others] == [math.log(0.5)] * len(others), "what others think of theirs stays"
    assert not set(others) & {child for _, child in new}
    assert source.extend([TreeQuery(0, trie, 8, deepest)]) == [[]], "that was all"


def test_a_longer_match_guesses_further():
    once = [*range(100, 140), 0, 1, 2]
    reach = {}
    for match in (1, 2, 4, 16):
        text = [*once, *range(120 - match, 120)]
        reach[match] = len(SuffixSource().propose(text, 32))
    assert reach[1] < reach[2] < reach[4] < reach[16] and reach[16] >= 15


def test_of_equal_counts_the_newest_comes_first_and_of_others_the_most_frequent():
    assert [token for token, *_ in SuffixSource().propose([1, 2, 3, 1, 2, 4, 1, 2], 1)] == [4]
    assert [token for token, *_ in SuffixSource().propose([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2], 1)] == [3]


@examples(100)
@given(TEXTS, PATHS)
def test_chances_are_those_of_different_tokens(text, path):
    automaton = automaton_of(text)
    place = automaton.end
    for token in path:
        place = automaton.after(place, token)
    found = Chances().of(automaton, place)
    assert len({token for token, _ in found}) == len(found) and sum(chance for _, chance in found) <= 1
    assert [chance for _, chance in found] == sorted((chance for _, chance in found), reverse=True)


def test_chances_are_learned_from_the_text():
    """One in which a match of two tokens always goes on as before, and one in which it never does."""
    loop, drawing, draw = SuffixSource(), SuffixSource(), random.Random(0)
    drawn = [token for _ in range(400) for token in (7, 8, 1000 + draw.randrange(30_000))]
    for source, text in ((loop, [1, 2, 3, 4] * 200), (drawing, drawn)):
        for start in range(0, len(text), 12):  # texts of their own
            source.begin(0, SamplingParams())
            for end in range(start + 4, min(len(text), start + 12) + 1):
                source.propose(text[start:end], 1)
    text = [5, 6, 9, 1, 5, 6]
    chances = []
    for source in (loop, drawing):
        source.begin(0, SamplingParams())
        chances.append(sum(math.exp(guess.logp) for guess in source.propose(text, 1)))
    assert chances[1] < 0.1 < 0.5 < chances[0]


def test_a_prediction_is_guessed_from_and_no_guess_runs_beyond_its_end():
    index = SuffixIndex()
    index.begin(0, prediction=[5, 6, 7, 8])
    spot = index.place(0, [1, 2, 5, 6])
    said = []
    while found := index.next(spot):
        token, _, spot = found
        said.append(token)
    assert said == [7, 8]
    assert SEPARATOR not in [token for token, _ in index.likely(index.place(0, [1, 2, 5, 6], (7, 8)))]


def test_a_slot_is_its_own_text_and_a_new_text_knows_nothing_of_the_last():
    source = SuffixSource()
    one, other = [1, 2, 3, 1, 2], [1, 2, 4, 1, 2]
    asked = [ChainQuery(0, one, (), 1), ChainQuery(3, other, (), 1)]
    assert [[token for token, *_ in chain] for chain in source.propose_batch(asked)] == [[3], [4]]
    source.begin(0, SamplingParams())
    assert source.propose([9, 1, 2], 1) == []
    assert source.propose([1, 2, 4, 1, 2], 1)[0][0] == 4, "one that was not begun is seen to be another"


def test_what_the_target_would_not_say_is_not_guessed():
    params = SamplingParams(no_repeat_ngram_size=2, max_new_tokens=9)
    text = [1, 2, 3, 1, 2]
    processing = LogitsProcessing.of(params, len(text))
    source = SuffixSource()
    assert source.propose_batch([ChainQuery(0, text, (), 4, processing)]) == [[]]
    trie = Trie(text)
    source.extend([TreeQuery(0, trie, 8, 4, processing=processing)])
    assert 3 not in trie.root.children
