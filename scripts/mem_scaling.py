"""One row of scripts/mem_scaling.sh: a training step with S segments, in a process of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.machine import memory
from pearl.training.first_weights import new_drafter
from pearl.training.objective import Objective
from pearl.training.partition import backward
from pearl.training.recipes import FeatureRecipe, Recipe

VOCABULARY = 4096
HIDDEN = 512
LAYERS = (1, 2, 3)  # of the target, whose features are used


def drafter(depths: int) -> FeatureDrafter:
    """Of the width of a small target; its weights are random."""
    target = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )
    recipe = FeatureRecipe(data="none", output="none", depths=depths, layers=2, vocabulary=VOCABULARY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return new_drafter(target, recipe, LAYERS, torch.arange(VOCABULARY), mask_token=0).place(device, torch.float32)


def main() -> int:
    segments, count, depths = map(int, sys.argv[1:4])
    model = drafter(depths)
    device = model.device
    mask = SlotMask(count, depths, device)
    objective = Objective(model.vocabulary, VOCABULARY, Recipe.kl)
    tokens = torch.randint(VOCABULARY, (1, count), device=device)
    features = torch.randn(1, count, len(LAYERS) * HIDDEN, device=device)
    ids = torch.randint(VOCABULARY, (count, 1), device=device)

    def loss(hidden, ahead, anchors):
        rows = (hidden if ahead is None else ahead)[0]
        labels = ids if anchors is None else ids[anchors].repeat_interleave(depths - 1, 0)
        return objective.judge(model.logits(rows), labels, torch.zeros_like(labels, dtype=torch.float32)).loss.mean()

    memory.reset_peak()
    before = memory.peak()
    began = time.perf_counter()
    withheld = torch.zeros_like(tokens, dtype=torch.bool)
    backward(model, mask, tokens, features, withheld, torch.arange(count, device=device), segments, loss)
    used = memory.peak() - before
    rows = count + -(-count // segments) * (depths - 1)
    print(f"| {segments} | {rows} | {used / 1e6:.0f} | {time.perf_counter() - began:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
