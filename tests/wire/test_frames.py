"""Whatever is said fits frames of one size, and comes out of them as it went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.messages import Costs, DraftPlan, End, Guess, Nodes, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.wire.codec import length, pack, unpack
from pearl.wire.frames import FEATURES, MESSAGES, bits_of, count_words, frame_bytes, framed, size, words_of

WORDS = st.integers(-(1 << 31), (1 << 31) - 1)
TOKENS = st.lists(st.integers(0, (1 << 31) - 1), max_size=300).map(tuple)
GUESSES = st.lists(st.builds(Guess, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=40).map(tuple)
SAID = st.one_of(
    st.builds(lambda prompt: Start(1, Schedule.of("pearl"), SamplingParams(seed=3), prompt, DraftPlan()), TOKENS),
    st.builds(lambda tokens: Verdict(1, 7, DraftPlan(), tokens), TOKENS),
    st.builds(lambda guesses: Nodes(1, 2, 3, False, guesses), GUESSES),
    st.builds(Costs, st.just(1), st.lists(st.floats(0, 100, width=32), max_size=99).map(tuple)),
    st.just(End(1)),
)


@examples(200)
@given(st.lists(SAID, min_size=1, max_size=6))
def test_messages_of_any_length_are_frames_and_messages_again(messages):
    frames = framed(pack(messages))
    assert frames.dtype == np.int32 and frames.shape[1] == MESSAGES.words and frames.nbytes == size(*messages)
    words = np.concatenate(frames)[: length(frames[0])]
    there = unpack(words)
    assert [type(one) for one in there] == [type(one) for one in messages]
    assert np.array_equal(pack(there), pack(messages))


@examples(200)
@given(st.lists(WORDS, min_size=1, max_size=200), st.sampled_from([MESSAGES, FEATURES]))
def test_no_frame_is_more_than_the_words_need(words: list[int], lane):
    frames = framed(np.array(words, np.int32), lane)
    assert (len(frames) - 1) * lane.words < len(words) <= len(frames) * lane.words
    assert np.concatenate(frames)[: len(words)].tolist() == words
    assert frames.nbytes == frame_bytes(len(words), lane)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5), (4, 7), (100, 33)])
def test_features_arrive_bit_for_bit(shape: tuple[int, int]):
    """Two in a word: of an odd number the last has a word of its own."""
    bits = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, shape).astype(np.int16)
    words = words_of(bits)
    assert len(words) == count_words(shape)
    there = bits_of(words, shape)
    assert there.dtype == np.int16 and np.array_equal(there, bits)
    assert size(Verdict(1, 2, DraftPlan(), (3,), bits)) == size(End(1)) + frame_bytes(len(words), FEATURES)
