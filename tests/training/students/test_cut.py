"""A student of all layers is its target, whatever the architecture, and is judged by the logits that it makes."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import tiny
import torch
import transformers
from architectures import EXPERTS, GPT2_SIZES, LATENT, Architecture
from transformers import PreTrainedModel

from pearl.errors import UsageError
from pearl.models.hidden_states import decoder_layers
from pearl.training.students.cut import student_of
from pearl.training.students.head import StudentHead

FOUR = tiny.SIZES | {"num_hidden_layers": 4}
GATED = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
OPT = dict(hidden_size=64, word_embed_proj_dim=32, ffn_dim=96, num_hidden_layers=4, num_attention_heads=4)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # of four layers
    "llama": ("LlamaConfig", FOUR),
    "embeddings of positions": ("GPT2Config", GPT2_SIZES | {"n_layer": 4}),
    "embeddings that are projected": ("OPTConfig", OPT | {"vocab_size": 160, "max_position_embeddings": 256}),
    "a norm of embeddings": ("BloomConfig", {"vocab_size": 160, "hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "a head with a bias": ("PhiConfig", FOUR),
    "logits that are divided": ("GraniteConfig", FOUR | {"logits_scaling": 8.0, "residual_multiplier": 0.5}),
    "logits that are multiplied": ("CohereConfig", FOUR | {"logit_scale": 0.0625}),
    "logits that are capped": ("Gemma2Config", FOUR | GATED | {"final_logit_softcapping": 5.0}),
    "windows by layer": ("Gemma3TextConfig", FOUR | GATED),
    "positions by layer": ("SmolLM3Config", FOUR | {"no_rope_layer_interval": 2}),
    "experts by layer": ("Qwen3MoeConfig", FOUR | EXPERTS | {"num_experts": 4, "mlp_only_layers": [0, 2]}),
}


def of_kind(name: str) -> PreTrainedModel:
    config, values = KINDS[name]
    return tiny.random_model(getattr(transformers, config)(**values))


def check_is_the_target(target: PreTrainedModel, head_is_known: bool = True) -> None:
    """With a vocabulary of every third token."""
    layers = range(len(decoder_layers(target)))
    student = student_of(target, layers)
    tokens, words = torch.randint(160, (1, 24)), torch.arange(0, 160, 3)
    with torch.no_grad():
        wanted = target(tokens).logits
        torch.testing.assert_close(student(tokens).logits, wanted)
    if not head_is_known:
        with pytest.raises(UsageError, match="in a way that pearl distill does not know"):
            StudentHead(student, words)
        return
    head = StudentHead(student, words)
    with torch.no_grad():
        hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(head(hidden), wanted[..., words], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_a_student_of_all_layers_is_the_target(name: str):
    check_is_the_target(of_kind(name))


@pytest.mark.parametrize("one", architectures.parameters())
def test_so_it_is_for_every_architecture_that_is_tried(one: Architecture):
    check_is_the_target(tiny.random_model(one.config()), head_is_known=one.name != "llama4")


@pytest.mark.parametrize("name", KINDS)
def test_each_layer_of_a_student_computes_what_it_did_in_the_target(name: str):
    """Told by the layers' own outputs: the target's layers, all but some skipped, are the student."""
    target = of_kind(name)
    kept, skipped = ([0, 3], [1, 2]) if name == "experts by layer" else ([1, 3], [0, 2])
    student, tokens = student_of(target, kept), torch.arange(24)[None]
    for layer in skipped:
        decoder_layers(target)[layer].register_forward_hook(_skip, with_kwargs=True)
    with torch.no_grad():
        torch.testing.assert_close(
            student(tokens, use_cache=False).logits, target(tokens, use_cache=False).logits, atol=1e-4, rtol=1e-4
        )


def test_a_student_is_on_the_device_of_its_target():
    student = student_of(of_kind("logits that are capped").to("meta"), [1, 3])
    assert {one.device.type for one in (*student.parameters(), *student.buffers())} == {"meta"}


def _skip(_module: Any, inputs: tuple, named: dict, output: Any) -> Any:
    """A layer's output is what it was given."""
    given = inputs[0] if inputs else named["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def test_layers_that_are_no_model_by_themselves_are_refused_in_a_sentence():
    """Which layers of DeepSeek have experts its config says by a number: dense ones come first."""
    values = FOUR | LATENT | EXPERTS | dict(n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1)
    target = tiny.random_model(transformers.DeepseekV3Config(**values))
    student_of(target, [0, 3])
    with pytest.raises(UsageError, match=r"differ in kind, and \[1, 3\] alone are no model"):
        student_of(target, [1, 3])


def test_a_student_drops_nothing_out():
    assert not student_of(of_kind("embeddings of positions"), [0]).training
