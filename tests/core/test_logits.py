"""What is done to logits: transformers' processors and OpenAI's penalties, bit by bit, wherever a text ends and a path
begins."""

from __future__ import annotations

import math

import pytest
import torch
from cases import all_processors
from hypothesis import given
from hypothesis import strategies as st
from plain_processors import avoid_the_sum, plainly
from toys import examples
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from pearl.core.logits import custom
from pearl.core.logits.logprobs import logprobs
from pearl.core.logits.processing import LogitsProcessing
from pearl.core.params import SamplingParams
from pearl.core.sampling.picks import begin_processed
from pearl.core.trie import Trie
from pearl.errors import UsageError
from pearl.machine.transfers import select_rows

V = 7
TEXTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=14)


@examples(400)
@given(all_processors(V), TEXTS, st.lists(TEXTS, min_size=1, max_size=5), st.data())
def test_all_rows_at_once_are_each_row_alone_however_the_text_came(fields: dict, text: list, paths: list, data):
    params, eos = SamplingParams(**fields), data.draw(st.frozensets(st.integers(0, V - 1), max_size=1))
    prompt = data.draw(st.integers(1, len(text)))
    processing = LogitsProcessing.of(params, prompt, eos)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for end in [*data.draw(st.lists(st.integers(prompt, len(text)), max_size=3).map(sorted)), len(text)]:
        logits = 3 * torch.randn(len(paths), V, generator=generator)
        now = [[*text[end:], *path] if data.draw(st.booleans()) else path[:row] for row, path in enumerate(paths)]
        expected = [
            plainly(params, prompt, eos, [*text[:end], *path], row) for path, row in zip(now, logits, strict=True)
        ]
        before = logits.clone()
        found = processing(logits, text[:end], now) if processing else logits
        assert torch.equal(found, torch.stack(expected)) and torch.equal(logits, before)


@examples(200)
@given(all_processors(V), TEXTS, TEXTS)
def test_what_is_forbidden_without_logits_is_what_has_none(fields: dict, text: list, path: list):
    processing = LogitsProcessing.of(SamplingParams(**fields), len(text), [0])
    if processing:
        scores = processing(torch.zeros(1, V), text, [path])[0]
        biased = {token for token, bias in fields.get("logit_bias", {}).items() if bias == -math.inf}
        forbidden = {token for token in range(V) if processing.forbids(text, path, token)}
        assert forbidden | biased == {token for token in range(V) if scores[token] == -math.inf}


def test_tokens_that_a_drafter_does_not_have_are_left_out():
    params = SamplingParams(
        repetition_penalty=1.5, logit_bias={9: 1.0, 1: 2.0}, suppress_tokens=[9, 2], no_repeat_ngram_size=1
    )
    found = LogitsProcessing.of(params, 2)(torch.ones(1, 4), [0, 9], [[9, 3]])
    assert found.tolist() == [[-math.inf, 3.0, -math.inf, -math.inf]]


def test_half_precision_is_processed_in_float32():
    logits = torch.randn(2, V).bfloat16()
    found = LogitsProcessing.of(SamplingParams(frequency_penalty=0.001), 1)(logits, [1], [[2], [2, 2]])
    assert found.dtype == torch.float32 and found[1, 2] == logits[1, 2].float() - torch.tensor(0.001) * 2


# callables


def test_callables_get_the_text_and_transformers_objects_what_they_expect():
    logits = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(custom.apply([avoid_the_sum], [1, 1], logits), torch.tensor([1.0, -2.0, 0.0]))
    listed = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0), TemperatureLogitsWarper(0.5)])
    for processors in (listed, [listed]):
        assert custom.apply(processors, [1, 2], logits).tolist() == [2.0, -8.0, 3.0]
    assert logits.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("made", [None, [1.0], torch.zeros(2), torch.zeros(1, 3)], ids=str)
def test_a_callable_that_returns_no_logits_is_refused(made: object):
    with pytest.raises(UsageError, match=r"^<lambda> of logits_processors must return a tensor of 3 logits, not .*\.$"):
        custom.apply([lambda tokens, logits: made], [1], torch.zeros(3))


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0, seed=1)], ids=["greedy", "seeded"]
)
def test_where_every_token_is_forbidden_a_sentence_says_so(params: SamplingParams):
    picks = begin_processed(params, torch.full((1, 4), -math.inf), [5])
    with pytest.raises(UsageError, match=r"At token 6 .* forbid every token"):
        picks.pick(0, Trie([1]).root)


# log-probabilities


def test_logprobs_hold_the_token_that_came_and_the_best():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [0.0, 0.0, 0.0, 5.0]]).bfloat16()
    first, second = logprobs(logits, [3, 3], 2)
    expected = logits.float().log_softmax(-1)
    assert first == {3: expected[0, 3].item(), 1: expected[0, 1].item(), 2: expected[0, 2].item()}
    assert next(iter(first)) == 3 and len(second) == 2
    assert logprobs(logits, [0, 0], 0)[0] == {0: expected[0, 0].item()}
    assert len(logprobs(logits, [0, 0], 9)[0]) == 4
    assert logprobs(select_rows(logits, []), [], 2) == []
