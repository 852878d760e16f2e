"""What is said arrives, whole and exact, in a few words."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import EAGER, ScriptedChannel, TableModel, examples, scrambled, ticks, together

from pearl.core.messages import (
    MAX_MESSAGE_WORDS,
    Beat,
    Close,
    Costs,
    DraftPlan,
    DraftStats,
    End,
    Guess,
    MalformedMessage,
    Nodes,
    SentSeparately,
    Start,
    Verdict,
)
from pearl.core.params import MIN_TEMPERATURE, SamplingParams
from pearl.core.sampling.methods import SUPPORT
from pearl.core.schedule import MAX_DRAFT_BATCH, MAX_GAMMA, MODES, Schedule
from pearl.core.token_buckets import LIMIT
from pearl.core.trie import ORIGINS
from pearl.drafters.model import ModelSource
from pearl.drafters.suffix import SuffixSource
from pearl.roles.target import Target
from pearl.wire.codec import decode, encode, length
from pearl.wire.frames import MESSAGES, size

NUMBERS = st.integers(0, (1 << 31) - 1)
LONG = st.integers(0, (1 << 63) - 1)
SECONDS = st.floats(0, 1e9)
PROPOSALS = st.lists(st.tuples(NUMBERS, st.floats(0, 1, width=32)), max_size=SUPPORT).map(tuple)
GUESSES = st.builds(Guess, NUMBERS, NUMBERS, NUMBERS, PROPOSALS, st.floats(-1e9, 0, width=32), st.sampled_from(ORIGINS))
PLANS = st.builds(DraftPlan, NUMBERS, NUMBERS, NUMBERS)
COUNTS = [
    field.name for field in fields(DraftStats) if field.name not in ("sequence_id", "busy_s", "waiting_s", "failed")
]
TOKENS = st.lists(NUMBERS, max_size=40).map(tuple)
SCHEDULES = st.builds(
    Schedule.of,
    st.sampled_from(MODES),
    st.one_of(st.just("auto"), st.integers(0, MAX_GAMMA)),
    st.one_of(st.just("auto"), st.integers(1, MAX_DRAFT_BATCH)),
    st.one_of(st.just("auto"), st.integers(1, LIMIT)),
    st.one_of(st.just("auto"), st.integers(1, 1000)),
)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 1 << 40),
    temperature=st.one_of(st.just(0.0), st.floats(MIN_TEMPERATURE, 1000)),
    top_k=LONG,
    top_p=st.floats(1e-9, 1),
    min_p=st.floats(0, 1),
    seed=LONG,
    method=st.sampled_from(["seeded", "rejection"]),
    stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    no_repeat_ngram_size=NUMBERS,
    stop_token_ids=TOKENS,
    suppress_tokens=TOKENS,
    bad_words_ids=st.lists(st.lists(NUMBERS, min_size=1, max_size=3), max_size=4),
    allowed_token_ids=st.one_of(st.none(), TOKENS.filter(len)),
    logit_bias=st.dictionaries(NUMBERS, st.one_of(st.just(-np.inf), st.floats(-100, 100)), max_size=4),
    logits_processors=st.sampled_from([(), (print,)]),
)
STARTS = st.builds(Start, NUMBERS, SCHEDULES, PARAMS, TOKENS, PLANS, st.booleans(), st.booleans())
OTHERS = st.one_of(
    st.builds(Verdict, NUMBERS, NUMBERS, PLANS, TOKENS),
    st.builds(Costs, NUMBERS, st.lists(st.floats(0, 100, width=32), max_size=20).map(tuple)),
    st.builds(End, NUMBERS),
    st.builds(Nodes, NUMBERS, NUMBERS, NUMBERS, st.booleans(), st.lists(GUESSES, max_size=9).map(tuple)),
    st.builds(DraftStats, NUMBERS, SECONDS, SECONDS, **dict.fromkeys(COUNTS, LONG), failed=st.booleans()),
    st.builds(Close, NUMBERS),
    st.builds(Beat, NUMBERS, SECONDS, SECONDS, SECONDS),
)


@examples(300)
@given(OTHERS)
def test_what_is_decoded_is_what_was_said(message):
    assert decode(encode(message)) == message


@given(st.builds(Verdict, NUMBERS, NUMBERS, PLANS, TOKENS), st.integers(0, 4), st.integers(0, 7))
def test_features_come_another_way_and_the_verdict_says_how_many(verdict: Verdict, rows: int, width: int):
    said = replace(verdict, features=np.zeros((rows, width), np.int16))
    there = decode(encode(said))
    assert there == verdict and isinstance(there, Verdict) and there.features == SentSeparately((rows, width))
    direct = SentSeparately((rows, width), direct=True)
    assert decode(encode(replace(verdict, features=direct))).features == direct


@given(st.lists(SECONDS, max_size=9).map(tuple))
def test_the_times_of_a_drafter_arrive_bit_for_bit(spans: tuple[float, ...]):
    there = decode(encode(Nodes(1, 2, 3, True, (Guess(4, 5, 6),), spans)))
    assert isinstance(there, Nodes) and there.spans == spans


@given(st.builds(Verdict, NUMBERS, NUMBERS, PLANS, TOKENS))
def test_a_verdict_without_features_has_none_there(verdict: Verdict):
    assert decode(encode(verdict)).features is None


@examples(200)
@given(STARTS)
def test_a_start_carries_all_that_a_drafter_needs(start: Start):
    """What ends a text stays with the target; everything that shapes the drafter's guesses arrives, bit for bit."""
    there = decode(encode(start))
    assert isinstance(there, Start)
    assert replace(there, params=start.params) == start
    for field in fields(SamplingParams):
        if field.name not in ("top_k", "max_new_tokens", "method", "stop", "ignore_eos", "logits_processors"):
            wanted = getattr(start.params.with_defaults(), field.name)
            assert getattr(there.params, field.name) == wanted, field.name
    assert there.params.rejection == start.params.rejection and there.params.logits_processors == ()
    assert there.params.top_k == min(start.params.top_k, (1 << 31) - 1)  # which keeps every token of any vocabulary
    assert (there.params.stop, there.params.ignore_eos) == ((), False)


@examples(200)
@given(st.one_of(STARTS, OTHERS))
def test_the_second_word_tells_how_many_there_are(message):
    words = encode(message)
    assert words.dtype == np.int32 and length(words[:2]) == len(words)


def test_a_guess_of_an_origin_that_is_none_is_garbage():
    words = encode(Nodes(1, 2, 3, False, (Guess(1, 0, 5),))).copy()
    words[words == 0] += len(ORIGINS) << 16  # the word with the origin is one of those that hold nothing
    with pytest.raises(MalformedMessage, match="origin"):
        decode(words)


def test_a_message_that_ends_early_is_garbage():
    words = encode(Verdict(1, 2, DraftPlan(), (4, 5)))[:-1].copy()
    words[1] -= 1
    with pytest.raises(MalformedMessage, match="ends before"):
        decode(words)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans())
def test_the_messages_of_steady_state_pearl_fit_one_frame(a: int, b: int, c: int, d: int, exhausted: bool):
    assert size(Nodes(a, b, c, exhausted, (Guess(a, b, d, logp=-0.5),))) == 4 * MESSAGES.words
    assert size(Verdict(a, b, DraftPlan(c, d, a), (d,) * 8)) == 4 * MESSAGES.words


@given(PROPOSALS, NUMBERS)
def test_a_guess_with_its_distribution_is_far_below_a_kilobyte(proposal: tuple, n: int):
    assert size(Nodes(n, n, n, False, (Guess(n, n, n, proposal),))) <= 128


@pytest.mark.parametrize("mode", ["sd", "pearl", "pearl-no-pre", "pearl-no-post"])
@pytest.mark.parametrize("method", ["seeded", "rejection"])
def test_no_step_of_a_text_says_more_than_a_kilobyte(mode: str, method: str):
    model, params = TableModel(64), SamplingParams(max_new_tokens=40, temperature=1.0, seed=0, method=method)
    for source in (ModelSource(TableModel(64, scale=1.4)), SuffixSource()):
        for script in (EAGER, scrambled(0)):
            channel = ScriptedChannel(source, script)
            together(Target(model, channel, ticks()), [1, 2, 3], Schedule.of(mode), params)
            said = [*channel.sent, *channel.peer.sent]
            assert len(said) > 10 and max(map(size, said)) < 1024
            if method == "seeded" and isinstance(source, ModelSource):
                steady = [m for m in said if isinstance(m, Nodes | Verdict)]
                assert all(size(m) == 4 * MESSAGES.words for m in steady if len(getattr(m, "tokens", ())) <= 8)


# Garbage


WORDS = st.integers(-(1 << 31), (1 << 31) - 1)


@examples(1000)
@given(st.integers(-2, 9), st.lists(st.one_of(st.integers(-3, 40), WORDS), min_size=2, max_size=60))
def test_words_that_are_no_message_are_garbage_and_nothing_worse(kind, words):
    made = np.array([kind, len(words), *words[2:]], np.int32)
    try:
        message = decode(made)
    except MalformedMessage:
        return
    assert type(message).__name__ in ("Start", "Verdict", "End", "Costs", "Nodes", "DraftStats", "Close", "Beat")


@examples(300)
@given(OTHERS, st.data())
def test_a_message_that_was_cut_short_is_garbage(message, data):
    words = encode(message)
    words[1] = data.draw(st.integers(0, int(words[1]) - 1))
    with pytest.raises(MalformedMessage):
        decode(words[: length(words)])


@pytest.mark.parametrize("rows, fits", [(40_000, True), (1 << 30, False), (-1, False)])
def test_the_features_of_a_long_prompt_come_at_once(rows: int, fits: bool):
    """40,000 tokens, of three layers with 8,192 numbers each."""
    features = SentSeparately((rows, 3 * 8192))
    words = encode(Verdict(1, 40_000, DraftPlan(4, 1, 4), (7,), features))
    if fits:
        assert decode(words).features == features
    else:
        with pytest.raises(MalformedMessage, match="features of"):
            decode(words)


@pytest.mark.parametrize("count", [-(1 << 31), -1, 0, 2, MAX_MESSAGE_WORDS + 1, (1 << 31) - 1])
def test_no_message_has_so_many_words(count):
    with pytest.raises(MalformedMessage, match="words"):
        length(np.array([3, count], np.int32))
