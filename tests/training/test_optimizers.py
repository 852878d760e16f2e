"""Muon turns a gradient into the nearest orthogonal matrix, in steps of AdamW's size; vectors stay with AdamW."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pearl.training.optimizers import Together, optimizer_of


def made(name: str, weights):
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


def test_a_table_of_tokens_stays_with_adamw():
    table, matrix = nn.Parameter(torch.zeros(90, 10)), nn.Parameter(torch.zeros(80, 10))
    optimizer = made("muon", [table, matrix])
    assert isinstance(optimizer, Together)
    muon, adamw = optimizer._parts
    assert muon.param_groups[0]["params"] == [matrix] and adamw.param_groups[0]["params"] == [table]


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
