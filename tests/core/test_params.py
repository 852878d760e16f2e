"""What a user may say of a text: what can't be meant is refused in a sentence, all else is kept as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from pearl.core.params import NEUTRAL, SamplingParams
from pearl.errors import UsageError

NAN, INF = float("nan"), float("inf")
TOKENS = ("5", 5, [-1], [1.5], [True], [None], ["5"], [[1]], {3: 1})
PENALTIES = (-2.1, 2.1, NAN, INF, True, "0", None)
REFUSED = [
    *[("temperature", value) for value in (-0.1, NAN, INF, -INF, True, "1")],
    *[("top_p", value) for value in (0, 0.0, -0.5, 1.1, NAN, INF, True, "0.9")],
    *[("min_p", value) for value in (-0.1, 1.1, NAN, INF, True, "0")],
    *[("top_k", value) for value in (-2, 1.5, NAN, True, "5")],
    *[("seed", value) for value in (-1, 1.5, 1 << 63, True, "5")],
    *[("max_new_tokens", value) for value in (0, -1, 1.5, NAN, True, "5", None)],
    *[("method", value) for value in ("greedy", "", None)],
    *[("stop", value) for value in ("", ("",), ("a", ""), (1,), 1, {"a": 1})],
    *[("bad_words", value) for value in ("", ("",), (1,), 1)],
    *[("n", value) for value in (0, -1, 1.5, True, "2", None)],
    *[("min_tokens", value) for value in (-1, 1.5, True, "2", 129)],
    *[("repetition_penalty", value) for value in (0, -1, NAN, INF, True, "1.1")],
    *[("presence_penalty", value) for value in PENALTIES],
    *[("frequency_penalty", value) for value in PENALTIES],
    *[("no_repeat_ngram_size", value) for value in (-1, 1.5, True, "2")],
    *[("stop_token_ids", value) for value in TOKENS],
    *[("suppress_tokens", value) for value in TOKENS],
    *[("allowed_token_ids", value) for value in (*TOKENS, [])],
    *[("bad_words_ids", value) for value in ([1], [[]], [[-1]], "a", [[True]], 1)],
    *[
        ("logit_bias", value)
        for value in (
            [1],
            {-1: 1.0},
            {1: NAN},
            {1: INF},
            {1: 10**400},
            {1: -(10**400)},
            {1: "1"},
            {1: True},
            {True: 1},
            {"a": 1},
        )
    ],
    *[("logprobs", value) for value in (-1, 1.5, True, "1")],
    *[("prompt_logprobs", value) for value in (-1, 1.5, True, "1")],
    *[("logits_processors", value) for value in ([1], 1, "a", [None], {"a": print})],
    *[("skip_special_tokens", value) for value in (0, "no", None)],
    *[("include_stop_str_in_output", value) for value in (1, "yes", None)],
    *[("ignore_eos", value) for value in (1, "yes", None)],
]


@pytest.mark.parametrize("name, value", REFUSED, ids=repr)
def test_what_cannot_be_meant_is_refused_in_a_sentence(name: str, value: object):
    with pytest.raises(UsageError, match=rf"^{name}\b[^\n]*\.$"):
        SamplingParams(**{name: value})


def test_temperature_zero_is_greedy_whatever_the_method():
    assert SamplingParams(method="rejection").greedy and not SamplingParams(method="rejection").rejection
    assert SamplingParams(temperature=0.1, method="rejection").rejection
    assert not SamplingParams(temperature=0.1).greedy


def test_what_holds_several_takes_any_iterable_of_them():
    assert SamplingParams(stop="ab").stop == ("ab",) and SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    made = SamplingParams(stop_token_ids=range(2), allowed_token_ids={7}, bad_words="x", bad_words_ids=[[1, 2]])
    assert (made.stop_token_ids, made.allowed_token_ids, made.bad_words) == ((0, 1), (7,), ("x",))
    assert made.bad_words_ids == ((1, 2),)
    assert SamplingParams(logit_bias={"5": 1, 6: -2.5}).logit_bias == {5: 1.0, 6: -2.5}, "as JSON has it, too"
    listed = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])
    assert SamplingParams(logits_processors=listed).logits_processors == tuple(listed)
    assert SamplingParams(top_k=-1).top_k == 0, "vLLM's way to say all"


def test_a_checkpoints_default_stands_where_nothing_was_said():
    said = dict(temperature=0.0, top_k=5, repetition_penalty=1.3)
    made = SamplingParams(**said).with_defaults({"temperature": 0.6, "top_p": 0.9, "suppress_tokens": [3]})
    assert (made.temperature, made.top_k, made.repetition_penalty) == (0.0, 5, 1.3)
    assert (made.top_p, made.suppress_tokens, made.min_p) == (0.9, (3,), 0.0)
    neutral = SamplingParams().with_defaults()
    assert {name: getattr(neutral, name) for name in NEUTRAL} == NEUTRAL
    assert SamplingParams(max_new_tokens=3).with_defaults({"min_tokens": 5}).min_tokens == 3


@given(st.integers(0, (1 << 63) - 1), st.integers(1, 20))
def test_samples_have_different_seeds_made_of_the_one_that_was_given(seed: int, n: int):
    made = SamplingParams(n=n, seed=seed).samples()
    assert made[0].seed == seed and {one.n for one in made} == {1}
    assert len({one.seed for one in made}) == n == len(made)
    assert made == SamplingParams(n=n, seed=seed).samples()


def test_a_seed_that_nobody_chose_is_fresh_each_time():
    assert len({SamplingParams().with_seed().seed for _ in range(20)}) == 20
    assert SamplingParams(seed=0).with_seed().seed == 0


def test_a_bad_word_is_bad_with_and_without_a_space_before_it():
    words = {"ass": [1], " ass": [2], "as": [3], " as": [3]}
    made = SamplingParams(bad_words=[" ass", "as"], bad_words_ids=[[9]]).with_bad_words_as_ids(words.__getitem__)
    assert (made.bad_words, made.bad_words_ids) == ((), ((9,), (1,), (2,), (3,)))


@pytest.mark.parametrize(
    "field",
    [
        dict(stop_token_ids=[8]),
        dict(logit_bias={8: 1.0}),
        dict(allowed_token_ids=[1, 8]),
        dict(suppress_tokens=[8]),
        dict(bad_words_ids=[[1, 8]]),
    ],
    ids=str,
)
def test_a_token_beyond_the_vocabulary_is_refused_where_that_is_known(field: dict):
    SamplingParams(**field).check_vocabulary(9)
    with pytest.raises(UsageError, match=f"^{next(iter(field))} must hold token ids below 8, .* not 8.$"):
        SamplingParams(**field).check_vocabulary(8)
