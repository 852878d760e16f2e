"""Weights between two trainings are those of both, by their shares."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import mix_weights


def test_weights_are_mixed_by_their_share(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, value in ((one, 1.0), (other, 3.0)):
        folder.mkdir()
        save_file({"a": torch.full((2,), value, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (other / "config.json").write_text("{}")
    assert mix_weights.main([str(one), str(other), "--share", "0.25", "--output", str(tmp_path / "mixed")]) == 0
    mixed = load_file(tmp_path / "mixed" / "model.safetensors")["a"]
    assert mixed.tolist() == [1.5, 1.5] and mixed.dtype == torch.bfloat16
    assert (tmp_path / "mixed" / "config.json").read_text() == "{}"
    assert mix_weights.main([str(tmp_path), str(other), "--output", str(tmp_path / "mixed")]) == 2, "nothing is there"
    save_file({"b": torch.zeros(2)}, one / "model.safetensors")
    assert mix_weights.main([str(one), str(other), "--output", str(tmp_path / "mixed")]) == 2
