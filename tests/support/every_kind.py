"""A draft checkpoint with random weights of every kind that pearl reads, for any target, as others publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from pearl.models.architecture import longest_sequence

Shapes = dict[str, tuple[int, ...]]
HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4, 2, 12, 40  # head_dim is unlike hidden / heads
DEPTHS = 4  # K of what guesses several tokens a forward


def save(kind: str, folder: Path, target: Any, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> str:
    """`target`: its config. In bfloat16, as most are published: a CPU packs their layers. Returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    text = target.get_text_config()
    if kind == "pard":
        return _save_pard(folder, text, tokenizer, seed)
    config, shapes, more = KINDS[kind](text)
    generator = torch.Generator().manual_seed(seed)
    spread = {name: 0.3 if len(shape) == 1 else 1.2 / shape[-1] ** 0.5 for name, shape in shapes.items()}
    tensors = {
        name: (torch.randn(shape, generator=generator) * spread[name] + float("norm" in name)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors | more, folder / ("drafter.safetensors" if kind == "feature" else "model.safetensors"))
    name = "drafter.json" if kind == "feature" else "config.json"
    (folder / name).write_text(json.dumps(config))
    return str(folder)


def _save_pard(folder: Path, text: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    import tiny

    words = text.vocab_size
    sizes = tiny.SIZES | {"vocab_size": words, "max_position_embeddings": longest_sequence(text), "eos_token_id": 0}
    tiny.random_model(LlamaConfig(**sizes), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"pard_token": words - 1, "para_num": DEPTHS}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _layers(count: int, hidden: int, first: str, reads: int, norms: bool = False) -> Shapes:
    """`reads`: numbers of a row that the first layer reads; `norms`: of every head's queries and keys."""
    found: Shapes = {}
    for layer in range(count):
        at, width = (first, reads) if layer == 0 else (f"layers.{layer}.", hidden)
        found |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{at}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk" if norms}
        wide = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        found |= {f"{at}self_attn.{name}_proj.weight": (rows, width) for name, rows in wide.items()}
        found[f"{at}self_attn.o_proj.weight"] = (hidden, HEADS * HEAD_DIM)
        found |= {f"{at}mlp.{name}_proj.weight": (INTERMEDIATE, hidden) for name in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, INTERMEDIATE)
    return found


def _config(text: Any, layers: int, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": text.hidden_size,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _map(text: Any) -> tuple[int, dict[str, Tensor]]:
    """Two of three tokens can be drafted."""
    ids = torch.tensor([one for one in range(text.vocab_size) if one % 3][: 1 << 12])
    drafted = torch.zeros(text.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return len(ids), {"d2t": ids - torch.arange(len(ids)), "t2d": drafted}


def _taps(text: Any) -> list[int]:
    """Layers whose outputs are read."""
    return [0, text.num_hidden_layers - 1]


def _eagle(text: Any):
    hidden = text.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)} | _layers(1, hidden, "layers.0.", hidden)
    del shapes["layers.0.input_layernorm.weight"]
    return _config(text, 1, "llama") | {"architectures": ["LlamaForCausalLM"], "bias": True}, shapes, {}


def _eagle3(text: Any):
    """Flat, as SafeAI and SpecForge write it; its ids name the layers."""
    drafted, more = _map(text)
    shapes = _pairs(text, "midlayer.", drafted, layers=1)
    said = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": drafted,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": _taps(text), "use_aux_hidden_state": True},
    }
    return _config(text, 1, "llama") | said, shapes, more


def _pairs(text: Any, first: str, drafted: int, layers: int, norms: bool = False) -> Shapes:
    hidden = text.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, len(_taps(text)) * hidden), "norm.weight": (hidden,)}
    shapes |= {f"{first}hidden_norm.weight": (hidden,), "lm_head.weight": (drafted, hidden)}
    return shapes | _layers(layers, hidden, first, 2 * hidden, norms)


def _envelope(text: Any, kind: str, name: str, layers: int, model_type: str) -> dict[str, Any]:
    methods = [{"proposal_type": "greedy", "speculative_tokens": DEPTHS}]
    inner = _config(text, layers, model_type) | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return {
        "architectures": [name],
        "speculators_model_type": kind,
        "speculators_config": {"algorithm": kind, "proposal_methods": methods, "default_proposal_method": "greedy"},
        "transformer_layer_config": inner,
    }


def _peagle(text: Any):
    drafted, more = _map(text)
    shapes = _pairs(text, "layers.0.", drafted, layers=2, norms=True)
    shapes |= {
        "mask_hidden": (1, 1, shapes["fc.weight"][1]),
        "embed_tokens.weight": (text.vocab_size, text.hidden_size),
    }
    said = {
        "draft_vocab_size": drafted,
        "norm_before_residual": True,
        "mask_token_id": 7,
        "eagle_aux_hidden_state_layer_ids": [one + 1 for one in _taps(text)],
    }
    return _envelope(text, "peagle", "PEagleSpeculator", 2, "qwen3") | said, shapes, more


def _block(text: Any) -> Shapes:
    hidden = text.hidden_size
    shapes: Shapes = {"fc.weight": (hidden, len(_taps(text)) * hidden)}
    shapes |= {f"{name}.weight": (hidden,) for name in ("hidden_norm", "norm")}
    return shapes | _layers(2, hidden, "layers.0.", hidden, norms=True)


def _dflash(text: Any):
    """As z-lab writes it."""
    said = {
        "architectures": ["DFlashDraftModel"],
        "num_target_layers": text.num_hidden_layers,
        "block_size": DEPTHS + 1,
        "dflash_config": {"mask_token_id": text.vocab_size - 1, "target_layer_ids": _taps(text)},
    }
    return _config(text, 2, "qwen3") | said, _block(text), {}


def _dspark(text: Any):
    drafted, more = _map(text)
    rank, hidden = 6, text.hidden_size
    said = {
        "draft_vocab_size": drafted,
        "block_size": DEPTHS,
        "markov_rank": rank,
        "mask_token_id": text.vocab_size - 1,
        "aux_hidden_state_layer_ids": [one + 1 for one in _taps(text)],
    }
    shapes = _block(text) | {
        "lm_head.weight": (drafted, hidden),
        "markov_head.markov_w1.weight": (text.vocab_size, rank),
        "markov_head.markov_w2.weight": (drafted, rank),
        "confidence_head.proj.weight": (1, hidden + rank),
        "confidence_head.proj.bias": (1,),
    }
    return _envelope(text, "dspark", "DSparkSpeculator", 2, "qwen3") | said, shapes, more


def _feature(text: Any):
    """What pearl wrote before."""
    hidden, ids = text.hidden_size, [one for one in range(text.vocab_size) if one % 3][: 1 << 12]
    taps = _taps(text)
    shapes: Shapes = {"fuse.weight": (hidden, len(taps) * hidden), "in_proj.weight": (hidden, 2 * hidden)}
    shapes |= {f"feature_norms.{one}.weight": (hidden,) for one in range(len(taps))}
    shapes |= {"token_norm.weight": (hidden,), "mask_embedding": (hidden,), "shared_hidden": (hidden,)}
    config = {
        "features": taps,
        "depths": DEPTHS,
        "layers": 2,
        "vocabulary": len(ids),
        "hidden": hidden,
        "intermediate": INTERMEDIATE,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "eps": 1e-5,
        "rope_theta": 500.0,
        "format": 1,
    }
    return (
        config,
        shapes | _layers(2, hidden, "layers.0.", hidden),
        {"vocabulary": torch.tensor(ids, dtype=torch.int32)},
    )


KINDS: dict[str, Callable[[Any], tuple[dict[str, Any], Shapes, dict[str, Tensor]]]] = {
    "eagle": _eagle,
    "eagle3": _eagle3,
    "peagle": _peagle,
    "dflash": _dflash,
    "dspark": _dspark,
    "feature": _feature,
}
ALL = ("pard", *KINDS)
