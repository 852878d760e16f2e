"""Weights between two trainings are those of both, by their shares, in every file; what is no weight stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import drafter_for, read_drafter, small_target

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import mix_weights

from pearl.checkpoints import shared_embeddings
from pearl.checkpoints.drafts import envelope
from pearl.drafters.feature.shape import PEAGLE
from pearl.training.students.cut import student_of


def mixed(one: Path, other: Path, share: float) -> int:
    return mix_weights.main([str(one), str(other), "--share", str(share), "--output", str(one.parent / "mixed")])


def test_weights_are_mixed_by_their_share(tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, value in ((one, 1.0), (other, 3.0)):
        folder.mkdir()
        save_file({"a": torch.full((2,), value, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (other / "config.json").write_text("{}")
    assert mixed(one, other, 0.25) == 0
    found = load_file(tmp_path / "mixed" / "model.safetensors")["a"]
    assert found.tolist() == [1.5, 1.5] and found.dtype == torch.bfloat16
    assert (tmp_path / "mixed" / "config.json").read_text() == "{}"
    assert mix_weights.main([str(tmp_path), str(other), "--output", str(tmp_path / "mixed")]) == 2, "nothing is there"
    assert "is not there: name the folder of a training" in capsys.readouterr().err
    save_file({"b": torch.zeros(2)}, one / "model.safetensors")
    assert mixed(one, other, 0.5) == 2
    assert mix_weights.main([str(one), str(other), "--output", str(other)]) == 2, "it would write over what it reads"


def save_head(folder: Path, seed: int, vocabulary: range = range(0, 40, 2), borrows: bool = False) -> Path:
    """With a Markov head, which lies in a file of its own."""
    drafter = drafter_for(small_target(), seed=seed, vocabulary=vocabulary, kind=PEAGLE, markov_rank=4)
    envelope.save(drafter, folder, borrows=borrows)
    return folder


@pytest.mark.parametrize("borrows", [False, True], ids=["whole", "in 8 bits"])
def test_a_head_is_mixed_in_all_its_files_and_keeps_its_tokens(tmp_path, borrows: bool):
    one, other = (save_head(tmp_path / name, seed, borrows=borrows) for seed, name in enumerate(("one", "other")))
    assert mixed(one, other, 0.25) == 0
    first, second, found = (read_drafter(tmp_path / name).state_dict() for name in ("one", "other", "mixed"))
    assert any(name.startswith("markov") for name in found)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            wanted = 0.75 * first[name].float() + 0.25 * second[name].float()
            largest = float(wanted.abs().max())
            torch.testing.assert_close(tensor.float(), wanted, atol=max(1e-2, largest / 127), rtol=1e-2)
        else:
            assert torch.equal(tensor, second[name]), name


def test_heads_that_draft_from_other_tokens_are_refused(tmp_path, capsys):
    one, other = save_head(tmp_path / "one", 0), save_head(tmp_path / "other", 1, range(1, 41, 2))
    assert mixed(one, other, 0.5) == 2
    assert "draft from different tokens: train the second with --start" in capsys.readouterr().err
    assert not (tmp_path / "mixed" / envelope.WEIGHTS).exists()


def test_drafters_of_two_kinds_are_refused(tmp_path, capsys):
    shared_embeddings.save(student_of(small_target(), (0, 2)), tmp_path / "model", "a", "b", torch.tensor([1, 5]))
    assert mixed(save_head(tmp_path / "head", 0), tmp_path / "model", 0.5) == 2
    assert "are drafters of two kinds: name two trainings of one" in capsys.readouterr().err


@pytest.mark.parametrize("mark, code", [("a", 0), ("b", 2)])
def test_draft_models_of_one_target_draft_from_the_tokens_of_both(tmp_path, mark: str, code: int):
    student = student_of(small_target(), (0, 2))
    for name, whose, words in (("one", "a", [1, 5]), ("other", mark, [0, 5, 7])):
        shared_embeddings.save(student, tmp_path / name, "the target", whose, torch.tensor(words))
    assert mixed(tmp_path / "one", tmp_path / "other", 0.5) == code
    assert code or shared_embeddings.vocabulary(tmp_path / "mixed").tolist() == [0, 1, 5, 7]


def test_a_model_that_guesses_several_tokens_is_not_mixed_with_one_that_does_not(tmp_path):
    student = student_of(small_target(), (0, 2))
    for name, mask in (("one", None), ("other", torch.zeros(64))):
        shared_embeddings.save(student, tmp_path / name, "the target", "a", torch.tensor([1]), mask)
    assert mixed(tmp_path / "one", tmp_path / "other", 0.5) == 2
