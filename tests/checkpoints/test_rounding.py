"""Matrices in 8 bits: what a processor would multiply by is what was written, and the rest of a file is untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trained import drafter_for, small_target

from pearl.checkpoints import drafters
from pearl.checkpoints.drafts import envelope
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.checkpoints.drafts.rounding import rounded, whole
from pearl.drafters.feature.shape import PEAGLE
from pearl.models.linear import Int8Linear

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this torch has no FBGEMM"
)


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 7, generator=generator)
    matrix[1] *= 1000  # a row of large numbers does not spoil the others
    matrix[2] = 0
    return {"matrix": matrix, "fc.weight": matrix, "norm": matrix[0], "ids": torch.arange(6).view(2, 3)}


def test_a_matrix_keeps_every_number_but_for_half_a_step_of_its_row():
    tensors = some()
    stored = rounded(tensors)
    assert stored["matrix"].dtype == torch.int8 and stored["ids"] is tensors["ids"]
    found = whole(stored)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].bfloat16()) for name in ("norm", "fc.weight")), "not rounded so"
    steps = tensors["matrix"].abs().amax(1, keepdim=True) / 127
    assert ((found["matrix"] - tensors["matrix"]).abs() <= steps / 2 + 1e-6).all() and not found["matrix"][2].any()
    again = rounded(found)
    assert torch.equal(again["matrix"], stored["matrix"]), "rounded again, it is the same"
    assert whole(tensors) == tensors, "a file without steps is not in 8 bits"


@needs_fbgemm
def test_a_processor_multiplies_by_the_very_numbers_of_the_file():
    matrix = some()["matrix"]
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Int8Linear(matrix, None)(x), Int8Linear(whole(rounded({"w": matrix}))["w"], None)(x))


@needs_fbgemm
def test_a_head_in_8_bits_is_multiplied_in_8_bits_but_for_what_reads_the_features(tmp_path):
    head = drafter_for(small_target(), kind=PEAGLE, markov_rank=4)
    fc = head.fc.weight.detach().clone()
    envelope.save(head, tmp_path, borrows=True)
    assert DraftFiles.of(str(tmp_path)).in_8_bits
    drafters._pack(head, "int8")
    kinds = {name: type(module) for name, module in head.named_modules() if not list(module.children())}
    assert kinds["layers.0.self_attn.q_proj"] is Int8Linear and type(head.head) is Int8Linear
    x = torch.randn(4, fc.shape[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(head.fc(x), nn.functional.linear(x, fc), rtol=1e-4, atol=1e-4)
