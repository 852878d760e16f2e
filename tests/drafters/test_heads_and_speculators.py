"""EAGLE-3 and P-EAGLE compute what the independent package `speculators` does, on checkpoints that it writes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from heads import loaded, oracle, their_logits, their_parallel_logits
from trained import drafter_for, read_drafter
from transformers import LlamaConfig

from pearl.checkpoints.drafts import envelope
from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.source import FeatureSource
from pearl.models.draft_model import LeavesQuery

TEXT = [7, 3, 4, 9, 17, 20, 3, 30, 49, 41, 2, 5]
GENERATOR = torch.Generator().manual_seed(3)


def bits(features: torch.Tensor) -> Features:
    return features.bfloat16().view(torch.int16).numpy()


def read(reader: HeadReader, features: torch.Tensor, text: list[int], paths: list[tuple[int, ...]]) -> torch.Tensor:
    """Logits after each path, of a reader that has all features of `text` but its last token's."""
    reader.begin(0, continues=False)
    reader.observe(bits(features[: len(text) - 1]), 0)
    return reader.read_leaves_together([LeavesQuery(0, text, paths)])[0]


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
CASES = {
    "plain": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3, normed residual": {"layer": "qwen3", "norm_before_residual": True},
    "two layers, norm of the output": {"num_hidden_layers": 2, "norm_output": True},
    "norm of each feature": {"fc_norm": True, "seed": 5},
    "norm of all features, whole vocabulary": {"norm_before_fc": True, "cut": False},
    "five features, biases": {"ids": (1, 7, 14, 20, 27), "attention_bias": True},
    "one feature, one key head, all norms": {
        "ids": (28,),
        "num_key_value_heads": 1,
        "norm_before_residual": True,
        "norm_output": True,
        "seed": 12,
    },
    "qwen3, three layers, mha": {"layer": "qwen3", "num_hidden_layers": 3, "num_key_value_heads": 4, "seed": 9},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_draft_logits_are_theirs_along_a_path(tmp_path: Path, case: dict):
    model = oracle("eagle3", **case)
    model.save_pretrained(tmp_path)
    drafter = loaded(tmp_path)
    features = torch.randn(len(TEXT) - 1, drafter.shape.feature_row, generator=GENERATOR).bfloat16()
    theirs = their_logits(model, features, TEXT[1:], steps=4)
    reader = HeadReader(drafter, 100)
    for prefix in (2, 5, 8):
        path = tuple(TEXT[prefix : prefix + 3])
        paths = [path[:depth] for depth in range(4)]
        mine = read(reader, features, TEXT[:prefix], paths)[:, drafter.vocabulary]
        expected = torch.stack([theirs[depth][prefix - 2] for depth in range(4)])
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
        one_by_one = read(reader, features, TEXT[:prefix], [path])[:, drafter.vocabulary]
        torch.testing.assert_close(one_by_one, expected[3:], atol=1e-4, rtol=1e-4)


def test_the_first_greedy_chain_is_theirs(tmp_path: Path):
    model = oracle("eagle3", layer="qwen3", norm_before_residual=True)
    model.save_pretrained(tmp_path)
    drafter = loaded(tmp_path)
    features = torch.randn(6, drafter.shape.feature_row, generator=GENERATOR).bfloat16()
    text = TEXT[:7]
    theirs: list[int] = []
    for step in range(5):  # what they are shown are their own tokens
        shown = [*text[1:], *theirs]
        padded = torch.cat([features, features.new_zeros(len(theirs), features.shape[1])])
        best = their_logits(model, padded, shown, steps=step + 1)[step][5].argmax()
        theirs.append(int(best + model.d2t[best]))
    reader, mine = HeadReader(drafter, 100), list(text)
    reader.begin(0, continues=False)
    reader.observe(bits(features), 0)
    for _ in theirs:
        mine.append(int(reader.read(mine, keep=1)[0].argmax()))
    assert mine[7:] == theirs


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"layer": "qwen3", "num_hidden_layers": 3, "norm_before_residual": True},
        {"fc_norm": True, "seed": 4},
        {"layer": "qwen3", "num_hidden_layers": 2, **WINDOWED},
    ],
    ids=["plain", "qwen3, three layers", "norm of each feature", "windows"],
)
def test_what_one_forward_of_p_eagle_drafts_is_theirs(tmp_path: Path, case: dict):
    model = oracle("peagle", mask_token_id=6, **case)
    model.save_pretrained(tmp_path)
    drafter = loaded(tmp_path)
    assert drafter.shape.depths == 4
    features = torch.randn(len(TEXT) - 1, drafter.shape.feature_row, generator=GENERATOR).bfloat16()
    theirs = their_parallel_logits(model, features, TEXT[1:], drafter.shape.depths)
    source = Raw(drafter)
    for prefix in (2, 5, 8):
        source.begin(0, SamplingParams())
        source.observe(bits(features[: prefix - 1]))
        torch.testing.assert_close(source.guess(TEXT[:prefix], [[]])[0], theirs[prefix - 2], atol=1e-4, rtol=1e-4)


def test_what_a_layer_with_a_window_says_is_theirs(tmp_path: Path):
    """Of first guesses: in later steps of their training the window stays where it was at the first."""
    model = oracle("eagle3", num_hidden_layers=2, **WINDOWED)
    model.save_pretrained(tmp_path)
    drafter = loaded(tmp_path)
    assert drafter.shape.windows == (4, 0)
    features = torch.randn(len(TEXT) - 1, drafter.shape.feature_row, generator=GENERATOR).bfloat16()
    theirs = their_logits(model, features, TEXT[1:], steps=1)[0]
    reader = HeadReader(drafter, 100)
    for prefix in (4, 8, 11):
        mine = read(reader, features, TEXT[:prefix], [()])[0, drafter.vocabulary]
        torch.testing.assert_close(mine, theirs[prefix - 2], atol=1e-4, rtol=1e-4)


class Raw(FeatureSource):
    """Gives the logits as they are."""

    def _ranked(self, queries):
        return [one.logits for one in queries]


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_what_we_write_they_read_and_compute_the_same(tmp_path: Path, kind: str):
    pytest.importorskip("speculators", reason="speculators is not installed")
    from speculators.model import SpeculatorModel

    target = tiny.random_model(LlamaConfig(**tiny.SIZES | {"vocab_size": 50, "num_hidden_layers": 4}))
    drafter = drafter_for(target, (0, 1, 3), 4, layers=2, vocabulary=range(0, 50, 3), kind=kind)
    target.save_pretrained(tmp_path / "target")
    drafter.shape = replace(drafter.shape, target=str(tmp_path / "target"))
    tmp_path = tmp_path / "head"
    envelope.save(drafter.requires_grad_(False), tmp_path, tokens=4)
    saved = read_drafter(tmp_path).requires_grad_(False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer_layer_config"]["_attn_implementation"] = "eager"  # what they compute on a CPU with
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = SpeculatorModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(model.d2t + torch.arange(17), saved.vocabulary) and int(model.t2d.sum()) == 17
    features = torch.randn(len(TEXT) - 1, saved.shape.feature_row, generator=GENERATOR).bfloat16()
    if kind == "peagle":
        theirs = their_parallel_logits(model, features, TEXT[1:], 4)[6]
        source = Raw(saved)
        source.observe(bits(features[:7]))
        mine = source.guess(TEXT[:8], [[]])[0]
    else:
        theirs = torch.stack([one[6] for one in their_logits(model, features, TEXT[1:], 4)])
        path = tuple(TEXT[8:11])
        mine = read(HeadReader(saved, 100), features, TEXT[:8], [path[:depth] for depth in range(4)])[
            :, saved.vocabulary
        ]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
