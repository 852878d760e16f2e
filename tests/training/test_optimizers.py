"""Muon turns a gradient into the nearest orthogonal matrix, in steps of AdamW's size; vectors stay with AdamW."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pearl.training.optimizers import Together, optimizer_of


def made(name: str, weights):
    """`weights`: by name, or of hidden layers."""
    weights = weights if isinstance(weights, dict) else {f"layers.{at}": one for at, one in enumerate(weights)}
    recipe = SimpleNamespace(optimizer=name, learning_rate=0.01, weight_decay=0.0)
    return optimizer_of(weights, recipe, torch.device("cpu"))  # type: ignore[arg-type]


def test_a_step_of_muon_moves_all_directions_of_a_matrix_alike():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.zeros(24, 8)), nn.Parameter(torch.zeros(8))
    optimizer = made("muon", [matrix, vector])
    assert isinstance(optimizer, Together) and isinstance(made("muon", [matrix]), torch.optim.Muon)
    matrix.grad = torch.randn(24, 3) @ torch.randn(3, 8) + 0.1 * torch.randn(24, 8)  # three directions stand out
    vector.grad = torch.randn(8)
    optimizer.step()
    far = torch.linalg.svdvals(matrix.detach())
    assert (
        far.max() / far.min() < 2
        and torch.linalg.svdvals(matrix.grad).max() / torch.linalg.svdvals(matrix.grad).min() > 20
    )
    assert matrix.detach().square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.35)  # Liu et al. 2025, equation 4
    assert torch.allclose(vector.detach(), -0.01 * vector.grad.sign(), rtol=1e-3)  # AdamW's first step


SHAPES = {  # of heads and students of targets with 1,024 to 4,096 dimensions
    "lm_head.weight": (6144, 1024),
    "embed_tokens.weight": (8192, 4096),
    "markov_w1.weight": (2048, 256),
    "markov_w2.weight": (2048, 256),
    "confidence.weight": (1, 1280),
    "transformer.wpe.weight": (1024, 1024),
    "model.decoder.embed_positions.weight": (1024, 512),
    "layers.0.self_attn.k_proj.weight": (128, 4096),
    "model.layers.3.mlp.down_proj.weight": (4096, 11008),
    "fc.weight": (1024, 12288),
    "norm.weight": (1024,),
}


def test_matrices_of_hidden_layers_go_to_muon_and_tables_of_tokens_to_adamw_whatever_their_shapes():
    weights = {name: nn.Parameter(torch.zeros(shape, device="meta")) for name, shape in SHAPES.items()}
    optimizer = made("muon", weights)
    assert isinstance(optimizer, Together)
    muon, _ = ({id(one) for one in part.param_groups[0]["params"]} for part in optimizer._parts)
    hidden = {name for name, weight in weights.items() if id(weight) in muon}
    assert hidden == {"layers.0.self_attn.k_proj.weight", "model.layers.3.mlp.down_proj.weight", "fc.weight"}


def test_a_schedule_reaches_both_parts_and_after_a_resume_too():
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = made("muon", [matrix, vector])
    again = made("muon", [matrix, vector])
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step)
        matrix.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
        one.step()
        schedule.step()
        assert isinstance(one, Together)
        assert [group["lr"] for part in one._parts for group in part.param_groups] == [0.005, 0.005]
        one.zero_grad()
        assert matrix.grad is None and vector.grad is None
