"""Writes a network over hidden states in the envelope of `speculators`, which vLLM, SGLang and llama.cpp serve.

One that borrows its target's embedding is in it too, but for pearl alone.

Knows: the keys and tensors of that format, version 0.9.0. Refuses to know: how the network was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pearl.checkpoints.drafts.feature_formats import IDS
from pearl.checkpoints.drafts.files import CONFIG, MARKOV, MARKOV_FILE, MARKOV_TABLE, MASK_ROW, NOTE
from pearl.checkpoints.drafts.rounding import rounded
from pearl.config.engine_config import EMBEDDED, EMBEDDED_ON_HUB, model_path
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.shape import EAGLE3, PEAGLE, DrafterShape
from pearl.machine.files import atomic_write

VERSION = "0.9.0"  # of the package whose format this is
WEIGHTS = "model.safetensors"
_NAMES = {EAGLE3: "Eagle3Speculator", PEAGLE: "PEagleSpeculator"}
_OTHER = ("vocabulary", MASK_ROW, *MARKOV)  # what has no place in the format


def save(drafter: FeatureDrafter, folder: Path, tokens: int = 0, architecture: str = "", borrows: bool = False) -> None:
    """`tokens`: of a draft, as the file recommends it; 0: as many as a forward gives, or 5. `architecture`: the class
    of its target. `borrows`: without the target's embedding, and rounded: for pearl alone, in few bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = drafter.shape
    config = _config(shape, tokens or (shape.depths if shape.parallel else 5), architecture)
    learned = {name: part.detach().cpu() for name, part in drafter.state_dict().items()}
    tensors = {name: part for name, part in learned.items() if not name.startswith(_OTHER)}
    borrows = borrows and not shape.own_embedding
    stored = rounded(tensors) if borrows else {name: part.bfloat16().contiguous() for name, part in tensors.items()}
    if not (shape.own_embedding or borrows):
        stored["embed_tokens.weight"] = drafter.whole_embedding().to("cpu", torch.bfloat16).contiguous()
    if shape.mapped:
        stored |= _maps(drafter.vocabulary.cpu(), shape.known)
    with atomic_write(folder / WEIGHTS) as partial:
        save_file(stored, partial, metadata={"format": "pt"})
    names = (*MARKOV, *([MASK_ROW] if borrows else []))
    if beside := {name: part for name, part in learned.items() if name.startswith(names)}:
        if borrows:
            if MARKOV_TABLE in beside:  # after other tokens it says nothing then
                beside[MARKOV_TABLE] = beside[MARKOV_TABLE][drafter.vocabulary.cpu()]
            beside = rounded(beside)
        with atomic_write(folder / MARKOV_FILE) as partial:
            save_file({name: part.contiguous() for name, part in beside.items()}, partial)
    note = {"target": shape.target, "fingerprint": shape.fingerprint, "markov_rank": shape.markov_rank}
    note |= {"borrows": True, "rounded": True} if borrows else {}
    for name, values in ((CONFIG, config), (NOTE, note)):
        with atomic_write(folder / name) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _maps(vocabulary: Tensor, known: int) -> dict[str, Tensor]:
    """How far a draft token's id is from the target's, int64 [D]; which of the target's can be drafted, bool [V]."""
    drafted = torch.zeros(known, dtype=torch.bool)
    drafted[vocabulary] = True
    return {"d2t": vocabulary - torch.arange(len(vocabulary)), "t2d": drafted}


def _config(shape: DrafterShape, tokens: int, architecture: str) -> dict[str, Any]:
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    made: dict[str, Any] = {
        "architectures": [_NAMES[shape.kind]],
        "speculators_model_type": shape.kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": shape.kind,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": _verifier(shape.target), "architectures": [architecture] * bool(architecture)},
        },
        "transformer_layer_config": _layer(shape),
        "draft_vocab_size": shape.vocabulary,
        "target_hidden_size": None if shape.width == shape.hidden else shape.width,
        IDS: [layer + 1 for layer in shape.features],
        "norm_before_residual": shape.norm_before_residual,
        "norm_before_fc": shape.input_norm,
        "fc_norm": shape.fc_norm,
        "norm_output": shape.norm_output,
        "embed_requires_grad": shape.kind == PEAGLE,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return made | ({"mask_token_id": shape.mask_token} if shape.kind == PEAGLE else {})


def _verifier(target: str) -> str | None:
    """What others find that target by: they look into it when they load its head."""
    if target == EMBEDDED:
        return EMBEDDED_ON_HUB
    path = model_path(target)
    return str(path.absolute()) if target and path.exists() else target or None


def _layer(shape: DrafterShape) -> dict[str, Any]:
    return {
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "vocab_size": shape.known,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": shape.activation,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.eps,
        "rope_parameters": dict(shape.rope),
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "tie_word_embeddings": False,
    }
