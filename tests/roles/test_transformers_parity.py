"""Greedy texts and log-probabilities are those of transformers' `generate` with the same settings, token for token, in
every mode, alone and side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiers import tiered
from tiny import CONFIGS, VOCABULARY, draft_model, generated, random_model, verifier
from toys import EAGER, ScriptedChannel, letters, ticks
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.tree import TreeSource
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.target import Target

PROMPTS = [[5, 6, 7, 5, 6, 80], [11, 12, 13, 14, 11, 12, 13], [150, 3, 3, 3]]
TOKENS, EOS = 16, [17, 90, 40]
SEQUENCES = {(80, 21): 30.0, (13, 21): 30.0, (80, 21, 22): 30.0, (13, 21, 23): 30.0, (3,): -2.0}
BAD = [[21], [7, 5], [60, 61, 62], [17]]
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
    ({"bad_words_ids": BAD}, {"bad_words_ids": BAD}),
    ({"min_tokens": 12}, {"min_new_tokens": 12}),
    ({"logit_bias": {9: 4.0, 33: -2.5}}, {"sequence_bias": {(9,): 4.0, (33,): -2.5}}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"suppress_tokens": [1, 2, 3, 50]}, {"suppress_tokens": [1, 2, 3, 50]}),
    (
        {"repetition_penalty": 1.3, "logit_bias": {9: 4.0}, "no_repeat_ngram_size": 3, "min_tokens": 9},
        {"repetition_penalty": 1.3, "sequence_bias": {(9,): 4.0}, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
    ),
    (
        {"logits_processors": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)]), "min_tokens": 5},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)]), "min_new_tokens": 5},
    ),
    ({"logits_processors": [SequenceBiasLogitsProcessor(SEQUENCES)]}, {"sequence_bias": SEQUENCES}),
]


def written(name: str, mode: str, params: SamplingParams) -> list[SequenceState]:
    """The texts of all prompts, side by side. The drafter is the target itself in half the cases, else another."""
    slots = 1 if mode == "sd" else len(PROMPTS)
    model = random_model(CONFIGS[name]())
    other = model if mode == "tree" else random_model(CONFIGS[name](), seed=1)
    source = TreeSource(draft_model(other, max_sequences=slots))
    target = Target(verifier(model, max_sequences=slots), ScriptedChannel(source, EAGER), ticks())
    requests = [SequenceRequest(prompt, params, Stopper(params, EOS, letters)) for prompt in PROMPTS]
    schedule = Schedule.of(mode, None, max_draft_tokens=4) if mode == "tree" else Schedule.of(mode, None)
    ended = [text for text, committed in target.write(requests, schedule, slots) if not committed]
    assert not any(text.draft_stats and text.draft_stats.failed for text in ended)
    return sorted(ended, key=lambda text: text.sequence_id)


@pytest.mark.parametrize("name", tiered(["llama", "qwen2", "gemma", "mistral"], lambda name: name == "qwen2"))
def test_greedy_texts_are_transformers_own(name: str):
    different, model = set(), random_model(CONFIGS[name]())
    ways = WAYS if name == "llama" else WAYS[3::2]
    for number, (ours, theirs) in enumerate(ways):
        params = SamplingParams(max_new_tokens=TOKENS, **ours)
        expected = [generated(model, prompt, TOKENS, eos_token_id=EOS, **theirs) for prompt in PROMPTS]
        different.add(str(expected))
        for mode in ("ar", "sd" if name == "llama" and number % 2 else "tree"):
            assert [text.stopper.tokens for text in written(name, mode, params)] == expected, (mode, ours)
    assert len(different) > len(ways) / 2, "most settings change the texts of so small a model"


@pytest.mark.parametrize("mode", ["ar", pytest.param("sd", marks=pytest.mark.slow), "tree"])
def test_logprobs_are_transformers_log_softmax(mode: str):
    model = random_model(CONFIGS["llama"]())
    settings = dict(max_new_tokens=TOKENS, repetition_penalty=1.3, temperature=0.8, seed=3, ignore_eos=True)
    plain = written("llama", mode, SamplingParams(**settings))
    for text, without in zip(
        written("llama", mode, SamplingParams(**settings, logprobs=3, prompt_logprobs=2)), plain, strict=True
    ):
        assert text.stopper.tokens == without.stopper.tokens, "asking changes nothing"
        prompt, tokens = list(text.request.prompt), text.stopper.tokens
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        rows = [*text.prompt_logprobs[1:], *text.logprobs]
        assert text.prompt_logprobs[0] is None and len(rows) == len(prompt + tokens) - 1
        for place, (row, token) in enumerate(zip(rows, [*prompt[1:], *tokens], strict=True)):
            assert next(iter(row)) == token
            assert row == pytest.approx({one: float(expected[place, one]) for one in row}, abs=1e-4)
            best = expected[place].topk(2 if place < len(prompt) - 1 else 3).indices.tolist()
            assert set(row) == {token, *best}
    assert without.prompt_logprobs is None and without.logprobs == []


def test_a_long_prompts_logprobs_are_read_in_pieces():
    model, prompt = random_model(CONFIGS["llama"]()), [(7 * i) % VOCABULARY for i in range(200)]
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    target = Target(verifier(model))
    request = SequenceRequest(prompt, params, Stopper(params, (), letters))
    ((_, _), (text, _)) = target.write([request], Schedule.of("ar"))
    with torch.inference_mode():
        expected = random_model(CONFIGS["llama"]())(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = [one[token] for one, token in zip(text.prompt_logprobs[1:], prompt[1:], strict=True)]
    assert found == pytest.approx(expected[range(199), prompt[1:]].tolist(), abs=1e-4)
