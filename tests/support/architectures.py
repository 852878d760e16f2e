"""The architectures that are tried, each as a tiny random model, and what of them is promised.

A line of the table is one: the class of its config in transformers, its arguments, and what it can't do. `longest`:
tokens of a text that the runtime accepts. `trees`: it surely verifies side branches; otherwise passes may be chains.
`quick`: it is tried in the quick tier too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

SIZES = tiny.SIZES
NO_IDS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
MPT_SIZES = dict(vocab_size=tiny.VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=tiny.LENGTH, **NO_IDS)
GPT2_SIZES = dict(vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=tiny.LENGTH, **NO_IDS)
FULL = ["full_attention", "full_attention"]
MIXED = ["sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 24}  # tokens, of texts of up to 256
MIXED_WINDOW = WINDOW | {"layer_types": MIXED}
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16
)  # multi-head latent attention
SHARED_KEYS = dict(  # the last two layers read the keys of earlier ones
    head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=tiny.VOCABULARY,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    sliding_window=24,
    layer_types=MIXED * 2,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)


@dataclass(frozen=True, eq=False)
class Architecture:
    name: str
    config_class: str
    arguments: Mapping[str, Any]
    longest: int = tiny.LENGTH
    trees: bool = True
    quick: bool = False

    def config(self) -> PreTrainedConfig:
        return getattr(transformers, self.config_class)(**self.arguments)

    def model(self, dtype: str = "float32", drift: float = 0.0) -> PreTrainedModel:
        """A random model. `drift`: its weights are off by so much of their deviation, as a drafter's are."""
        model = tiny.random_model(self.config())
        if drift:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight += drift * weight.std() * torch.randn(weight.shape, generator=generator)
        return model.bfloat16().to(getattr(torch, dtype))


def _as_llama(name: str, config_class: str, more: Mapping[str, Any] | None = None, **promised: Any) -> Architecture:
    """Its config's arguments have the names that most have."""
    return Architecture(name, config_class, SIZES | dict(more or {}), **promised)


def _of_experts(name: str, config_class: str, more: Mapping[str, Any], **promised: Any) -> Architecture:
    """How many rows an expert gets depends on the other rows of a forward, and so may the bits: then its passes are
    chains. Where they do not, trees are verified all the same."""
    return _as_llama(name, config_class, more, trees=False, **promised)


TABLE: tuple[Architecture, ...] = (
    _as_llama("llama", "LlamaConfig", quick=True),
    _as_llama("llama tied", "LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    _as_llama("qwen2", "Qwen2Config"),
    _as_llama("qwen2 windows", "Qwen2Config", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    _as_llama("qwen3", "Qwen3Config", {"head_dim": 16}),
    _as_llama("mistral", "MistralConfig", WINDOW),
    _as_llama("ministral", "MinistralConfig", MIXED_WINDOW | {"head_dim": 16}),
    _as_llama("ministral3", "Ministral3Config", {"head_dim": 16}),
    _as_llama("phi3", "Phi3Config", WINDOW),
    _as_llama("phi", "PhiConfig"),
    _as_llama("gemma", "GemmaConfig", {"head_dim": 16}),
    _as_llama("gemma2", "Gemma2Config", WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    _as_llama("gemma3", "Gemma3TextConfig", MIXED_WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}, quick=True),
    _as_llama("gemma3n", "Gemma3nTextConfig", SHARED_KEYS | {"laurel_rank": 4, "altup_num_inputs": 2}),
    _as_llama("gemma4", "Gemma4TextConfig", SHARED_KEYS | {"global_head_dim": 32}),
    _as_llama("vaultgemma", "VaultGemmaConfig", MIXED_WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    Architecture("gpt2", "GPT2Config", GPT2_SIZES),
    Architecture("gpt-bigcode", "GPTBigCodeConfig", GPT2_SIZES),
    Architecture("gptj", "GPTJConfig", GPT2_SIZES | {"rotary_dim": 8}),
    Architecture("codegen", "CodeGenConfig", GPT2_SIZES | {"rotary_dim": 8}),
    _as_llama("gpt-neox", "GPTNeoXConfig", {"num_key_value_heads": 4}),
    Architecture(
        "opt",
        "OPTConfig",
        dict(
            vocab_size=tiny.VOCABULARY,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tiny.LENGTH,
        )
        | NO_IDS,
    ),
    _as_llama(
        "falcon",
        "FalconConfig",
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "num_key_value_heads": 4},
        trees=False,
    ),
    _as_llama("stablelm", "StableLmConfig", trees=False),
    _as_llama("starcoder2", "Starcoder2Config", WINDOW),
    _as_llama("persimmon", "PersimmonConfig", {"num_key_value_heads": 4}),
    _as_llama("cohere", "CohereConfig"),
    _as_llama("cohere2", "Cohere2Config", MIXED_WINDOW),
    _as_llama("olmo", "OlmoConfig"),
    _as_llama("olmo2", "Olmo2Config"),
    _as_llama("olmo3", "Olmo3Config", MIXED_WINDOW),
    _as_llama("granite", "GraniteConfig"),
    _as_llama("smollm3", "SmolLM3Config"),
    _as_llama("smollm3 windows", "SmolLM3Config", MIXED_WINDOW | {"use_sliding_window": True}),
    _as_llama("helium", "HeliumConfig", {"head_dim": 16}),
    _as_llama("glm", "GlmConfig", {"head_dim": 16}),
    _as_llama("glm4", "Glm4Config", {"head_dim": 16}),
    _as_llama("nemotron", "NemotronConfig", trees=False),
    _as_llama("arcee", "ArceeConfig"),
    _as_llama("apertus", "ApertusConfig"),
    _as_llama("ernie4.5", "Ernie4_5Config", {"head_dim": 16}),
    _as_llama("hunyuan", "HunYuanDenseV1Config", {"head_dim": 16}),
    _as_llama("seed-oss", "SeedOssConfig", {"head_dim": 16}),
    _as_llama("exaone", "ExaoneConfig"),
    _as_llama("exaone4", "Exaone4Config", MIXED_WINDOW),
    _as_llama("nanochat", "NanoChatConfig"),
    _as_llama("bitnet", "BitNetConfig"),
    _as_llama("internlm3", "InternLM3Config"),
    _as_llama("jais2", "Jais2Config", {"head_dim": 16}),
    _as_llama("doge", "DogeConfig", trees=False),
    Architecture("mpt", "MptConfig", MPT_SIZES, trees=False),
    _as_llama("falcon alibi", "FalconConfig", {"alibi": True, "new_decoder_architecture": False}, trees=False),
    _of_experts("mixtral", "MixtralConfig", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    _of_experts("qwen2-moe", "Qwen2MoeConfig", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    _of_experts("qwen3-moe", "Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "head_dim": 16}),
    _of_experts("olmoe", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    _of_experts("granite-moe", "GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    _of_experts("phimoe", "PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    _as_llama(
        "gpt-oss",
        "GptOssConfig",
        MIXED_WINDOW | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
        trees=False,
    ),
    _as_llama("deepseek-v3", "DeepseekV3Config", LATENT | {"first_k_dense_replace": 2}, trees=False, quick=True),
    _as_llama("deepseek-v2", "DeepseekV2Config", LATENT | {"first_k_dense_replace": 2}, trees=False),
    _as_llama("youtu", "YoutuConfig", LATENT, trees=False),
    _of_experts("flex-olmo", "FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    _of_experts(
        "afmoe",
        "AfmoeConfig",
        MIXED_WINDOW | EXPERTS | {"head_dim": 16, "num_experts": 4, "num_dense_layers": 1},
    ),
    _of_experts(
        "llama4",
        "Llama4TextConfig",
        dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96)
        | {"attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"]}
        | {"no_rope_layers": [1, 0], "floor_scale": 16, "attn_scale": 1.0},  # whose queries grow with the position
        quick=True,
    ),
    _of_experts(  # layers with different numbers of heads
        "laguna",
        "LagunaConfig",
        EXPERTS
        | {"head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 32}
        | {"num_attention_heads_per_layer": [4, 2], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    _of_experts(
        "dots1",
        "Dots1Config",
        EXPERTS
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "layer_types": FULL,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    _of_experts(
        "glm4-moe", "Glm4MoeConfig", EXPERTS | {"n_routed_experts": 4, "head_dim": 16, "first_k_dense_replace": 1}
    ),
)


def parameters(table: Sequence[Architecture] = TABLE) -> list[Any]:
    """For `pytest.mark.parametrize`: those that are not in the quick tier are marked slow, those that this transformers
    does not have are skipped."""
    return [
        pytest.param(
            one,
            id=one.name,
            marks=[
                *([] if one.quick else [pytest.mark.slow]),
                pytest.mark.skipif(
                    not hasattr(transformers, one.config_class), reason=f"this transformers has no {one.config_class}"
                ),
            ],
        )
        for one in table
    ]


def prompts(longest: int, new: int) -> list[list[int]]:
    """Random ones: a short one, one whose text crosses a multiple of the cache's slots, and the longest that fits."""
    lengths = [length for length in (5, 100, longest - new) if 0 < length <= longest - new]
    made = []
    for seed, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed)
        made.append(torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist())
    return made


@functools.cache
def reference(architecture: Architecture, dtype: str, new: int) -> list[list[int]]:
    """`tiny.generated` for each of `prompts`, by a model that none of our code has touched."""
    model = architecture.model(dtype)
    return [tiny.generated(model, prompt, new) for prompt in prompts(architecture.longest, new)]
