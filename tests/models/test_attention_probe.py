"""What a layer asks of its attention is found by asking it; what ours does not know it does not swallow."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from architectures import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_prompt
from transformers import DogeConfig, Gemma2Config, Gemma3nTextConfig, GptOssConfig, Llama4TextConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from pearl.core.token_buckets import CannotBranch
from pearl.models.kv_cache.attention_probe import attention_of, use_cache_attention
from pearl.models.kv_cache.transformers_interface import uses_cache_attention
from pearl.models.kv_cache.window import UnknownMask, Window, window_of
from pearl.models.verifier import VerifierModel

MIXED = ["sliding_attention", "full_attention"]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 1 << 15))
def test_a_mask_function_says_its_window(size: int):
    assert window_of(sliding_window_causal_mask_function(size)) == Window(size)
    chunked = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
    assert window_of(chunked) == Window(size, chunked=True)


def test_a_mask_that_is_no_window_is_none_or_unknown():
    assert window_of(causal_mask_function) is None
    assert window_of(sliding_window_causal_mask_function(1 << 20)) is None  # no text is that long
    other = and_masks(causal_mask_function, lambda batch, head, row, key: key % 2 == row % 2)
    for unknown in (sliding_window_bidirectional_mask_function(30), other):
        with pytest.raises(UnknownMask):
            window_of(unknown)


def gemma3n() -> Gemma3nTextConfig:
    more = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=tiny.VOCABULARY, laurel_rank=4)
    shared = dict(num_hidden_layers=4, num_kv_shared_layers=2, altup_num_inputs=2, sliding_window=24)
    return Gemma3nTextConfig(**SIZES | more | shared, head_dim=16, layer_types=MIXED * 2)


KINDS = {
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=24),
    "shared keys": gemma3n,
    "sinks": lambda: GptOssConfig(
        **SIZES, head_dim=16, sliding_window=24, num_local_experts=2, num_experts_per_tok=1, layer_types=MIXED
    ),
    "chunks": lambda: Llama4TextConfig(
        **SIZES,
        head_dim=16,
        attention_chunk_size=24,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        layer_types=["chunked_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_our_attention_takes_the_place_of_one_with(name):
    """And rows beside the chain, beyond the window, say what they would say in it."""
    model = tiny.random_model(KINDS[name]())
    text = random_prompt(140)
    with torch.inference_mode():
        wanted = model(torch.tensor([text]), use_cache=False).logits[0]
    found = use_cache_attention(model)
    assert uses_cache_attention(model) and found.owns_keys and found.windows == (Window(24, name == "chunks"),)
    reader = VerifierModel(model, tiny.VOCABULARY, tiny.LENGTH, max_sequences=2)
    reader.read(text[:134], 1)
    got = reader.read(text[:136], 3, [(0, 5), (2, text[136]), (4, text[137])])
    torch.testing.assert_close(got[:3], wanted[133:136], atol=1e-3, rtol=0)
    torch.testing.assert_close(got[4:], wanted[136:138], atol=1e-3, rtol=0)


def test_an_argument_that_ours_does_not_know_leaves_the_models_attention_in_place(monkeypatch: pytest.MonkeyPatch):
    model = tiny.random_model(tiny.CONFIGS["llama"]())
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(layer.self_attn.forward, position_bias=torch.ones(1))
    assert "it takes position_bias" in use_cache_attention(model).why_not
    assert not uses_cache_attention(model)


def test_a_mask_of_the_models_own_leaves_its_attention_in_place_with_chains():
    reader = tiny.verifier(tiny.random_model(DogeConfig(**SIZES)))
    assert attention_of(reader.model).why_not == "its mask is its own"
    assert not reader.verifies_trees
    with pytest.raises(CannotBranch):
        reader.read(random_prompt(20), 3, [(0, 5), (0, 6)])
