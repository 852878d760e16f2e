"""Sources propose chains of at most the room they are given; prompt lookup finds what a plain search finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import TableModel, alone, examples

from pearl.core.sampling import SamplingParams
from pearl.drafters.draft_source import ChainQuery
from pearl.drafters.model import ModelSource
from pearl.drafters.ngram import NgramSource

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def looked_up(text: list[int], longest: int, shortest: int, most: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest possible end of the text."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + most]
    return []


@examples(500)
@given(TEXTS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_prompt_lookup_finds_what_a_plain_search_finds(text: list[int], a: int, b: int, most: int, room: int):
    longest, shortest = max(a, b), min(a, b)
    proposed = NgramSource(longest, shortest, most).propose(text, room)
    assert [token for token, _ in proposed] == looked_up(text, longest, shortest, min(most, room))
    assert all(q == () for _, q in proposed), "it is certain of its guesses"


def test_the_longest_match_goes_before_the_latest():
    text = [1, 2, 3, 7, 7, 9, 3, 8, 1, 2, 3]  # "1 2 3" was followed by 7, "3" last by 8
    assert NgramSource(longest=3, shortest=1, most=1).propose(text, 5) == [(7, ())]
    assert NgramSource(longest=1, shortest=1, most=1).propose(text, 5) == [(8, ())]


@examples(200)
@given(TEXTS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_a_look_up_says_how_long_its_match_is(text: list[int], a: int, b: int, most: int):
    longest, shortest = max(a, b), min(a, b)
    size, guesses = NgramSource(longest, shortest, most).look_up(text)
    if not guesses:
        assert size == 0 and looked_up(text, longest, shortest, most) == []
    else:
        assert shortest <= size <= longest
        assert list(guesses) == looked_up(text, size, size, most), "so many of the last tokens occurred before,"
        assert size == longest or looked_up(text, size + 1, size + 1, most) == [], "and no more"


def test_a_text_that_repeats_nothing_gives_no_guess():
    assert NgramSource().propose([1, 2, 3, 4], 5) == []
    assert NgramSource().propose([1], 5) == []


@given(st.integers(0, 50), TEXTS, st.sampled_from([0.0, 0.7]), st.integers(0, 99), st.integers(1, 5))
def test_a_model_proposes_one_token_a_forward_the_one_that_a_target_like_it_would_pick(
    table: int, text: list[int], temperature: float, seed: int, room: int
):
    model = TableModel(3, seed=table)
    params = SamplingParams(max_new_tokens=1, temperature=temperature, seed=seed)
    source = ModelSource(model)
    source.begin(0, params)
    assert source.propose(text, room) == [(alone(model, text, params, ()).tokens[0], ())]
    assert source.forwards == 1


def test_a_model_forgets_the_last_sequence_when_a_new_one_starts():
    model = TableModel(3)
    source = ModelSource(model)
    source.begin(0, SamplingParams())
    source.begin(0, SamplingParams(temperature=1.0, seed=0, method="rejection"))
    assert model.forgotten == 2
    assert source.propose([0, 1], 1)[0][1], "and samples as the new one asks"


def test_a_model_is_at_a_loss_beyond_its_length():
    source = ModelSource(TableModel(3, max_length=4))
    assert len(source.propose([0] * 4, 3)) == 1
    assert source.propose([0] * 5, 3) == [] and source.forwards == 1


@pytest.mark.parametrize("slots", [(0,), (0, 1), (3,)], ids=["alone", "two", "alone, where it was beside others"])
def test_a_forward_of_chains_reads_a_row_of_each_and_samples_as_that_sequence_asks(slots: tuple[int, ...]):
    model = TableModel(5)
    source, params = ModelSource(model), {slot: SamplingParams(temperature=1.0, seed=slot) for slot in slots}
    for slot in slots:
        source.begin(slot, params[slot])
    guesses = source.propose_batch([ChainQuery(slot, [1, 2], (3,), 1) for slot in slots])
    wanted = [alone(model, [1, 2, 3], replace(params[slot], max_new_tokens=1), ()).tokens[0] for slot in slots]
    assert guesses == [[(token, ())] for token in wanted]
    assert (source.forwards, source.rows) == (1, len(slots))
