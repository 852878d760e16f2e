"""EAGLE-3 and P-EAGLE heads with random weights: written by the independent package `speculators`, or by our own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from pearl.checkpoints.drafts.feature_weights import load
from pearl.checkpoints.drafts.kinds import TargetFacts, describe
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.drafters.feature.network import FeatureDrafter
from pearl.errors import PearlError

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,  # unlike hidden / heads
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
)
_LAYERS_SAY = ("rope_parameters", "attention_bias", "layer_types", "sliding_window", "use_sliding_window")
LAYERS = 28  # of the target that they are for
TARGET = TargetFacts("its target", 32, LAYERS, 50)
DRAFTED = (0, 3, 4, 9, 17, 20, 21, 30, 33, 41, 44, 49)  # the cut vocabulary


def oracle(kind: str, layer: str = "llama", seed: int = 0, cut: bool = True, ids: Sequence[int] = (2, 14, 25), **flags):
    """A model of `speculators` with random weights. Skips the test where the package is not there."""
    reason = "speculators is not installed: pip install --no-deps speculators==0.9.0 loguru hs-connectors openai typer"
    pytest.importorskip("speculators", reason=reason)
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    sizes = SIZES | {name: flags.pop(name) for name in list(flags) if name in SIZES or name in _LAYERS_SAY}
    inner = (LlamaConfig if layer == "llama" else Qwen3Config)(**sizes)
    inner._attn_implementation = "eager"
    made = SpeculatorsConfig(
        algorithm=kind,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=4)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    config_class, model_class = {
        "eagle3": (Eagle3SpeculatorConfig, Eagle3DraftModel),
        "peagle": (PEagleSpeculatorConfig, PEagleDraftModel),
    }[kind]
    model: Any = model_class(
        config_class(
            transformer_layer_config=inner,
            draft_vocab_size=len(DRAFTED) if cut else SIZES["vocab_size"],
            eagle_aux_hidden_state_layer_ids=list(ids),
            speculators_config=made,
            **{"norm_before_residual": False} | flags,
        )
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
        if cut:
            drafted = torch.tensor(DRAFTED)
            model.d2t.copy_(drafted - torch.arange(len(drafted)))
            model.t2d[drafted] = True
    return model.eval()


def save_target_config(folder: Path, facts: TargetFacts) -> str:
    """A target of those facts and of no weights, as far as a preflight reads it."""
    sizes = dict(hidden_size=facts.hidden, num_hidden_layers=facts.layers, vocab_size=facts.vocabulary)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    LlamaConfig(**sizes, **heads, max_position_embeddings=512).save_pretrained(folder / facts.name)
    tiny.tokenizer().save_pretrained(folder / facts.name)
    return str(folder / facts.name)


def assert_refused(draft: str, facts: TargetFacts, target: str, sentence: str) -> None:
    """In that sentence, by whatever describes a draft; `target`: a folder of those facts."""
    with pytest.raises(PearlError, match=sentence):
        describe(draft, facts)
    with pytest.raises(PearlError, match=sentence):
        preflight(EngineConfig(target, draft))


def loaded(folder: Path | str, target: TargetFacts = TARGET) -> FeatureDrafter:
    """What pearl makes of a folder, with nothing of a target but what it needs."""
    return load(describe(str(folder), target)).requires_grad_(False).eval()


def their_logits(model: Any, features: Tensor, tokens: Sequence[int], steps: int) -> list[Tensor]:
    """Of each step the logits [rows, V] at all rows: row i reads the features of position i and token i + 1, and its
    step k the k tokens after that. features: [rows, F]; tokens: those after the first, [rows]."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a newer transformers says of its calls
        model(features[None].float(), torch.tensor([list(tokens)]), torch.zeros(1, len(tokens)).long(), ttt_steps=steps)
    hook.remove()
    return seen


def their_parallel_logits(model: Any, features: Tensor, tokens: Sequence[int], depths: int) -> Tensor:
    """[rows, depths, V]: of every row, as `their_logits` counts them, what its forward says of the next tokens; 0 where
    the text is over."""
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle import core

    seen: list[Tensor] = []
    sampled: list[tuple[Tensor, Tensor]] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
    plain = core.generate_cod_sample_indices

    def noted(**given):
        sampled.append(plain(**given))
        return sampled[-1]

    core.generate_cod_sample_indices = noted
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = len(tokens)
            model(
                features[None].float(),
                torch.tensor([list(tokens)]),
                torch.zeros(1, count).long(),
                verifier_last_hidden_states=torch.zeros(1, count, model.hidden_size),
                loss_config=resolve_loss_config("kl_div", "eager"),
                num_depths=depths,
                down_sample_ratio=1.0,
                down_sample_ratio_min=1.0,
            )
    finally:
        core.generate_cod_sample_indices = plain
        hook.remove()
    (anchors, depth), found = sampled[0], torch.zeros(count, depths, seen[0].shape[-1])
    found[anchors, depth] = seen[0]
    return found
