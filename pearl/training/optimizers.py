"""What turns gradients into steps.

AdamW (Loshchilov and Hutter 2019) fits everywhere. Muon (Jordan 2024) takes the momentum of a matrix to the nearest
orthogonal one, so that rare directions move as far as common ones; its steps have AdamW's size (Liu et al. 2025,
"Muon is scalable for LLM training", equation 4), so one learning rate serves both. It is for hidden layers: vectors,
and tables of tokens such as embeddings and heads, stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pearl.training.recipes import ADAMW, Recipe

# parts of the names of tables of tokens or positions, and of what judges a token
NOT_HIDDEN = ("embed", "lm_head", "wte", "wpe", "mask", "markov", "confidence")


def optimizer_of(weights: dict[str, nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's. `weights`: by their names in the module."""
    if recipe.optimizer == ADAMW:
        return _adamw(list(weights.values()), recipe, device)
    matrices = [weight for name, weight in weights.items() if _of_a_hidden_layer(name, weight)]
    others = [weight for name, weight in weights.items() if not _of_a_hidden_layer(name, weight)]
    muon = torch.optim.Muon(
        matrices, recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, _adamw(others, recipe, device)) if others else muon


def _of_a_hidden_layer(name: str, weight: nn.Parameter) -> bool:
    """Told by the name: a table of few tokens has the shape of a wide layer's matrix."""
    return weight.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


def _adamw(weights: Sequence[nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """With 8-bit states on GPUs where bitsandbytes is installed."""
    options: dict[str, Any] = {"lr": recipe.learning_rate, "betas": (0.9, 0.95), "weight_decay": recipe.weight_decay}
    if device.type == "cuda":
        try:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(weights, **options)
        except ImportError:
            pass
    return torch.optim.AdamW(weights, **options)


class Together(torch.optim.Optimizer):
    """Several optimizers, each of weights of its own, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})  # the very groups of the parts

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
