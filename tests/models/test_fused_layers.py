"""Layers with fewer operations have the bits of transformers' own, and replace only what computes the same."""

from __future__ import annotations

import pytest
import tiny
import torch
from architectures import TABLE, Architecture
from transformers import GraniteConfig, Ministral3Config, PreTrainedConfig, PreTrainedModel, SmolLM3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from pearl.models.fused_layers import FusedLayer, fuse
from pearl.models.hidden_states import decoder_layers
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.kv_cache.transformers_interface import PLAIN, use_transformers_attention

LIKE_LLAMA = {"llama", "llama tied", "qwen2", "qwen2 windows", "qwen3", "mistral", "exaone"}


def fused(model: PreTrainedModel) -> int:
    use_cache_attention(model)
    return fuse(model, "stock")


def tokens(count: int) -> list[int]:
    return torch.randint(tiny.VOCABULARY, (count,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("one", [one for one in TABLE if one.name in LIKE_LLAMA], ids=lambda one: one.name)
def test_chains_and_branches_have_the_bits_of_transformers_layers(one: Architecture, dtype: str):
    model = one.model(dtype)
    assert fused(model) == len(decoder_layers(model)) and getattr(model, PLAIN)
    branches = [(0, 3), (1, 4), (3, 5)]  # the token behind a row
    wanted, found = (
        tiny.verifier(of, max_length=one.longest).read(tokens(40), 3, branches) for of in (one.model(dtype), model)
    )
    assert torch.equal(found, wanted)


def test_a_fused_model_holds_each_number_once_and_transformers_still_generates_with_it():
    (one,) = [one for one in TABLE if one.name == "qwen2"]
    model, plain = one.model(), one.model()
    assert fused(model) and sum(map(torch.numel, model.parameters())) == sum(map(torch.numel, plain.parameters()))
    use_transformers_attention(model)
    prompt = torch.tensor([tokens(9)])
    assert torch.equal(*(of.generate(prompt, max_new_tokens=12, do_sample=False) for of in (model, plain)))


@pytest.mark.parametrize("more", [{"logits_scaling": 4.0}, {"embedding_multiplier": 3.0}])
def test_what_a_model_does_around_its_layers_is_seen_too(more: dict):
    model, plain = (tiny.random_model(GraniteConfig(**tiny.SIZES, **more)) for _ in range(2))
    assert fused(model) == 2 and not getattr(model, PLAIN)
    assert torch.equal(*(tiny.verifier(of).read(tokens(40), 3) for of in (model, plain)))


@pytest.mark.parametrize("residual", [1.0, 0.5])
def test_a_multiplier_shows_in_what_a_layer_computes(residual: float):
    model = tiny.random_model(GraniteConfig(**tiny.SIZES, residual_multiplier=residual))
    assert fused(model) == (2 if residual == 1.0 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_positions_stays_as_it_is(dtype: torch.dtype):
    config: PreTrainedConfig = SmolLM3Config(**tiny.SIZES | {"num_hidden_layers": 4}, no_rope_layers=[1, 1, 0, 1])
    model = tiny.random_model(config).to(dtype)
    fused(model)
    assert [type(layer) is FusedLayer for layer in decoder_layers(model)] == [True, True, False, True]


def test_a_factor_that_grows_with_the_position_is_seen_where_it_counts():
    far = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    arguments = tiny.SIZES | {"max_position_embeddings": 256}
    for beta, taken in ((0.1, 0), (None, 2)):
        rope = far | ({"llama_4_scaling_beta": beta} if beta else {"llama_4_scaling_beta": 0.0})
        assert fused(tiny.random_model(Ministral3Config(**arguments, rope_parameters=rope))) == taken


def test_a_weight_that_no_layer_of_ours_holds_is_left_alone():
    model = tiny.random_model(tiny.CONFIGS["llama"]())  # in float32
    use_cache_attention(model)
    assert fuse(model, "blocked") == 0


def test_layers_that_fail_or_put_out_something_else_are_left_alone():
    for harm in ("tuple", "error"):
        model = tiny.random_model(tiny.CONFIGS["llama"]())
        use_cache_attention(model)
        layer = decoder_layers(model)[0]
        forward = layer.forward

        def other(*inputs, forward=forward, harm=harm, **named):
            if harm == "error":
                raise IndexError(harm)
            return (forward(*inputs, **named),)

        layer.forward = other
        assert fused(model) == 1


def test_an_mlp_that_clamps_what_is_large_is_seen_though_usual_numbers_are_not(monkeypatch):
    """As those of some models of 2026 do."""

    def clamped(self, x):
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product.clamp(-1e3, 1e3))

    assert fused(tiny.random_model(tiny.CONFIGS["llama"]())) > 0
    monkeypatch.setattr(LlamaMLP, "forward", clamped)
    model = tiny.random_model(tiny.CONFIGS["llama"]())
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.mlp.up_proj.weight *= 30
    assert fused(model) == 0
