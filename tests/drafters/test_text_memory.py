"""A memory finds where the end of a text stood in earlier ones, forgets the least used, and comes back from disk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.params import SamplingParams
from pearl.core.trie import Trie
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.suffix import SuffixSource
from pearl.drafters.text_memory import BYTES_A_TOKEN, MATCHED, WINDOWS, TextMemory
from pearl.errors import UsageError

SHORTEST = WINDOWS[-1]
TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=60), max_size=5)


def memory_of(*texts: Sequence[int], tokens: int = 10_000) -> TextMemory:
    memory = TextMemory(tokens * BYTES_A_TOKEN / 1e6)
    for text in texts:
        memory.add(text)
    return memory


def shared_end(a: Sequence[int], b: Sequence[int]) -> int:
    size = 0
    while size < min(len(a), len(b)) and a[-1 - size] == b[-1 - size]:
        size += 1
    return size


@examples(150)
@given(TEXTS, st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_a_match_is_true_and_there_is_one_if_a_plain_search_finds_one(texts, text):
    memory = memory_of(*texts)
    found = memory.find(text)
    longest = max((shared_end(one[:end], text) for one in texts for end in range(1, len(one) + 1)), default=0)
    if longest < SHORTEST:
        assert found is None
        return
    assert found is not None and SHORTEST <= found.length <= min(longest, MATCHED)
    said = memory.after(found.place, 60)
    assert any(
        one[end - found.length : end] == text[len(text) - found.length :] and one[end:] == said
        for one in texts
        for end in range(found.length, len(one) + 1)
    ), "so many tokens stand there, and what follows is that text's own end"


def test_long_matches_are_found_among_many_short_ones():
    draw = random.Random(0)
    common = [draw.randrange(50) for _ in range(SHORTEST)]
    texts = [[draw.randrange(50) for _ in range(30)] + common + [draw.randrange(50)] for _ in range(200)]
    memory = memory_of(*texts)
    for text in texts:
        found = memory.find(text[:-1])
        assert found is not None and memory.after(found.place, 9) == text[-1:]


def test_the_texts_least_recently_used_go_first():
    draw = random.Random(1)
    texts = [[draw.randrange(1000) for _ in range(50)] for _ in range(40)]
    memory = memory_of(*texts[:10], tokens=1000)
    for text in texts[10:]:
        found = memory.find(texts[0][:20])
        assert found is not None and memory.after(found.place, 99) == texts[0][20:], "used all the time, so still there"
        memory.touch(found.place)
        memory.add(text)
        assert memory.size <= memory.capacity
    there = [memory.find(text[:20]) is not None for text in texts]
    assert there[0] and there[-1] and not any(there[1:20])


def test_the_same_text_again_takes_no_room():
    text = [*range(100)]
    memory = memory_of(text, [*range(200, 260)])
    size = memory.size
    memory.add(text)
    assert memory.size == size and memory.texts == 2
    memory.add(text[:60])
    assert memory.texts == 3


@examples(100)
@given(TEXTS)
def test_no_text_is_there_twice_whatever_others_are_like(texts):
    """Many here are short, go on from others, or end as others do."""
    memory = memory_of(*texts, *texts)
    assert memory.texts == len({tuple(text) for text in texts})


def test_texts_that_end_alike_take_no_room_again_after_others_have_gone():
    draw = random.Random(5)
    end = [draw.randrange(1000) for _ in range(MATCHED)]
    alike = [[draw.randrange(1000) for _ in range(150)] + end for _ in range(2)]
    memory = memory_of(*alike, tokens=1000)
    for _ in range(20):
        memory.add([draw.randrange(1000) for _ in range(100)])
        size, moves = memory.size, memory.moves
        for text in alike:
            memory.add(text)
        assert (memory.size, memory.moves) == (size, moves)


def test_what_takes_more_room_than_there_is_keeps_its_end():
    memory = memory_of([*range(5000)], tokens=1000)
    found = memory.find([*range(4970, 4990)])
    assert found is not None and memory.after(found.place, 99) == [*range(4990, 5000)]


@examples(30)
@given(TEXTS, st.sampled_from([100, 10_000]))
def test_it_comes_back_from_disk(tmp_path_factory, texts, tokens: int):
    path = tmp_path_factory.mktemp("memory") / "some" / "memory.npz"
    memory = memory_of(*texts, tokens=tokens)
    memory.save(path, 4)
    again = memory_of(tokens=tokens)
    assert again.load(path, 4) == memory.size
    for text in texts:
        for end in range(1, len(text)):
            before, after = memory.find(text[:end]), again.find(text[:end])
            assert (before is None) == (after is None)
            if before and after:
                assert before.length == after.length
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_none_or_of_other_tokens_is_refused(tmp_path: Path):
    path = tmp_path / "memory"
    memory_of([*range(20)]).save(path, 20)
    with pytest.raises(UsageError, match=r"another vocabulary \(20 tokens, not 30\)"):
        memory_of().load(path, 30)
    garbage = [b"", b"no memory", path.read_bytes()[:-40]]
    for tokens in (np.ones((3, 4), dtype=np.int32), np.array([20, -1]), np.array([0.5]), np.array(["a"])):
        np.savez(path.with_suffix(".npz"), tokens=tokens, vocabulary=20)
        garbage.append(path.with_suffix(".npz").read_bytes())
    for damaged in garbage:
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged, or no memory of texts at all: name another memory_file, or del"):
            memory_of().load(path, 20)
        assert path.read_bytes() == damaged


def test_in_a_round_nothing_of_it_is_found():
    memory = memory_of()
    memory.begin_round()
    memory.add([*range(30)])
    assert memory.find([*range(10)]) is None
    memory.begin_round()
    assert memory.find([*range(10)]) is not None


def test_what_is_to_be_forgotten_of_a_round_is_found_by_nobody(tmp_path: Path):
    memory = memory_of([*range(30)])
    memory.begin_round()
    memory.add([*range(40, 70)])
    memory.begin_round(forget=True)
    memory.add([*range(80, 110)])
    memory.save(tmp_path / "memory", 200)
    assert [memory.find([*range(first, first + 10)]) is not None for first in (0, 40, 80)] == [True, False, True]


# As a source


def tree(source: SuffixSource, tokens: Sequence[int], depth: int = 15) -> list[int]:
    """The chain of likeliest nodes."""
    trie = Trie(tokens)
    source.extend([TreeQuery(0, trie, 16, depth)])
    return [node.token for node in trie.chain()]


def test_a_text_that_was_written_before_is_guessed_as_far_as_a_pass_reaches():
    draw = random.Random(2)
    text = [draw.randrange(1000) for _ in range(200)]
    source = SuffixSource(memory=memory_of())
    source.remember(text)
    for end in (60, 61, 77):  # the next passes go on from there
        assert tree(source, text[:end]) == text[end : end + 15]
    assert tree(source, [*text[:80], 7]) == [], "the text goes another way"
    assert tree(source, [*text[:80], 7, *text[81:100]]) == text[100:115], "and comes back"


def test_what_an_earlier_text_says_wrongly_again_and_again_is_not_guessed_far():
    draw = random.Random(3)
    text = [draw.randrange(1000) for _ in range(4000)]
    source = SuffixSource(memory=memory_of(text))
    reach = [len(tree(source, text[at : at + 10])) for at in (0,)]
    for at in range(0, 3000, 10):
        source.begin(0, SamplingParams())
        tree(source, text[at : at + 8])
        tree(source, [*text[at : at + 8], 1001, 1002])
    source.begin(0, SamplingParams())
    reach.append(len(tree(source, text[:10])))
    assert reach[1] < reach[0]


def test_a_memory_that_lets_texts_go_leaves_no_stale_place():
    draw = random.Random(4)
    texts = [[draw.randrange(1000) for _ in range(60)] for _ in range(40)]
    source = SuffixSource(memory=memory_of(texts[0], tokens=300))
    assert tree(source, texts[0][:20]) == texts[0][20:35]
    for text in texts[1:]:
        source.remember(text)
    assert tree(source, texts[0][:21]) == []


def test_a_prediction_is_followed():
    source = SuffixSource()
    text = [*range(50)]
    source.begin(0, SamplingParams())
    source.predict(0, text)
    assert tree(source, [99, *range(20, 30)])[:8] == [*range(30, 38)]
