"""Tiny random transformers models, made here, for tests that need a real architecture and no checkpoint.

Weights are drawn wider than transformers draws them: with its 0.02 every context looks alike to two layers, and a cache
that mixed up its slots would pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pearl.models.draft_model import DraftModel
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.verifier import VerifierModel

VOCABULARY = 160
LENGTH = 256  # tokens of a text
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-mha": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=2 * LENGTH),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH),
    "phi3": lambda: Phi3Config(**SIZES),
    "deepseek": lambda: DeepseekV3Config(  # values narrower than keys
        **SIZES | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
    ),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=LENGTH),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=LENGTH),
}


def random_model(config: PreTrainedConfig, seed: int = 0, std: float = 0.25, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model of that config; its matrices are normal with deviation `std`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model.to(getattr(torch, dtype))


def verifier(model: PreTrainedModel, **options: object) -> VerifierModel:
    """The model as a target reads it."""
    use_cache_attention(model)
    vocabulary = model.config.get_text_config().vocab_size
    return VerifierModel(model, **{"vocabulary": vocabulary, "max_length": LENGTH, **options})  # type: ignore[arg-type]


def draft_model(model: PreTrainedModel, **options: object) -> DraftModel:
    """The model as a drafter reads it."""
    use_cache_attention(model)
    vocabulary = model.config.get_text_config().vocab_size
    return DraftModel(model, **{"vocabulary": vocabulary, "max_length": LENGTH, **options})  # type: ignore[arg-type]


SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
MERGES = ((" ", "t"), ("h", "e"), (" t", "he"), ("i", "n"), ("\n", "\n"))
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHARED = 272  # tokens that both models of the pair have embeddings for, a few more than the tokenizer has


def tokenizer(extra: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = MERGES) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges: it spells any text. `extra` adds tokens at the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {" ": "Ġ", "\n": "Ċ"}  # how byte-level tokens write these bytes
    pairs = [tuple("".join(shown.get(c, c) for c in part) for part in pair) for pair in merges]
    words = [*SPECIAL, *letters, *map("".join, pairs)]
    bpe = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0], chat_template=CHAT)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.add_tokens(list(extra))
    return fast


def after_sentencepiece() -> PreTrainedTokenizerFast:
    """It begins texts with a special token and a space, neither of which is shown, as Llama 2 and Mistral do."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    pairs = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    words += map("".join, pairs)
    numbers = {word: number for number, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(numbers, pairs, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def save_pair(folder: Path, words: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    """A target of two layers in folder/target and, in folder/draft, a draft that is its first layer: often right.

    They share the tokenizer, and their embeddings are padded to different sizes, as in many families.
    """
    words = words or tokenizer()
    shared = max(SHARED, len(words))
    sizes = SIZES | {"vocab_size": shared + 16, "max_position_embeddings": 512, "eos_token_id": 0}
    target = random_model(LlamaConfig(**sizes))
    with torch.no_grad():
        for out in (target.model.layers[1].self_attn.o_proj, target.model.layers[1].mlp.down_proj):
            out.weight *= 0.3  # the second layer has less to say
    draft = random_model(LlamaConfig(**sizes | {"vocab_size": shared, "num_hidden_layers": 1}))
    weights = target.state_dict()
    kept = {name: weights[name][: len(weight)] for name, weight in draft.state_dict().items()}
    draft.load_state_dict(kept)
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return str(folder / "target"), str(folder / "draft")


def generated(model: PreTrainedModel, prompt: Sequence[int], new: int, **settings: Any) -> list[int]:
    """What transformers' `generate` says, greedily. `settings`: of its own names."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
        )
    return text[0, len(prompt) :].tolist()
