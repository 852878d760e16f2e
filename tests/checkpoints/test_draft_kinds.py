"""What a draft checkpoint is, its files say: kind, layers and vocabulary, before any weight is read."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import assert_refused, save_target_config
from safetensors.torch import save_file

from pearl.checkpoints.drafts.feature_formats import IDS, layer_ids
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.checkpoints.drafts.kinds import TargetFacts, describe, kind_of, with_depths
from pearl.checkpoints.preflight import preflight
from pearl.commands import pairs
from pearl.config.engine_config import EMBEDDED, EMBEDDED_ON_HUB, EngineConfig
from pearl.errors import PearlError

HIDDEN, WORDS, DRAFTED, LAYERS = 16, 50, 20, 28
FLAT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": WORDS,
    "draft_vocab_size": DRAFTED,
    "rms_norm_eps": 1e-5,
}
ENVELOPE: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "transformer_layer_config": {k: v for k, v in FLAT.items() if k not in ("architectures", "draft_vocab_size")},
    "draft_vocab_size": DRAFTED,
    "norm_before_residual": False,
    "speculators_config": {"verifier": {"name_or_path": "org/its-target"}},
}
TARGET = TargetFacts("org/its-target", HIDDEN, LAYERS, WORDS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target_config(tmp_path_factory.mktemp("target"), TARGET)


def tensors(first: str = "midlayer.", features: int = 3) -> dict[str, torch.Tensor]:
    """Those of an EAGLE-3 head."""
    shapes = {
        "fc.weight": (HIDDEN, features * HIDDEN),
        f"{first}self_attn.q_proj.weight": (16, 2 * HIDDEN),
        f"{first}self_attn.k_proj.weight": (8, 2 * HIDDEN),
        f"{first}self_attn.v_proj.weight": (8, 2 * HIDDEN),
        f"{first}self_attn.o_proj.weight": (HIDDEN, 16),
        f"{first}mlp.gate_proj.weight": (24, HIDDEN),
        f"{first}mlp.down_proj.weight": (HIDDEN, 24),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFTED, HIDDEN),
        "d2t": (DRAFTED,),
    }
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], pickled: bool = False) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("first", ["midlayer.", "layers.0.", "model.layers.0.", "draft_model.midlayer."])
def test_a_flat_eagle3_head_is_known_by_its_tensors(tmp_path: Path, first: str, pickled: bool):
    found = describe(checkpoint(tmp_path, FLAT, tensors(first), pickled), TARGET)
    expected = "EAGLE-3 head, 1 layer, 20 draft tokens, features after layers 1, 13 and 24 of 28"
    assert found.kind == "eagle3" and found.line.startswith(expected) and "by default" in found.line
    assert found.features == (1, 13, 24) and found.feature_width == 3 * HIDDEN


def test_an_envelope_is_known_by_its_type_and_a_p_eagle_head_by_its_mask(tmp_path: Path):
    found = describe(checkpoint(tmp_path / "a", ENVELOPE, tensors("layers.0.")), TARGET)
    assert found.kind == "eagle3" and found.target == "org/its-target" and not found.warnings
    masked = tensors() | {"mask_hidden": torch.zeros(1, 1, 3 * HIDDEN)}
    parallel = ENVELOPE | {"speculators_model_type": "peagle", "mask_token_id": 7}
    for config in (parallel, FLAT | {"ptd_token_id": 7}):
        found = describe(checkpoint(tmp_path / "b", config, masked), TARGET)
        assert found.kind == "peagle" and found.shape.mask_token == 7 and "tokens a forward" in found.line


def test_deepspecs_eagle3_head_names_the_layers_whose_outputs_it_reads(tmp_path: Path):
    said = {"architectures": ["Qwen3Eagle3Model"], "model_type": "qwen3", "head_dim": 4, "num_target_layers": LAYERS}
    config = FLAT | said | {"target_layer_ids": [1, 7, 13, 19, 25], "draft_vocab_size": None}
    own = {name: torch.zeros(WORDS, HIDDEN) for name in ("lm_head.weight", "embed_tokens.weight")}
    weights = tensors("layers.0.", features=5) | own
    found = describe(checkpoint(tmp_path, config, {name: weights[name] for name in weights if name != "d2t"}), TARGET)
    assert found.kind == "eagle3" and found.features == (1, 7, 13, 19, 25)
    assert found.shape.own_embedding and found.shape.vocabulary == WORDS and "name the layers" in found.line


def test_an_eagle1_head_is_known_by_the_shape_of_its_fc(tmp_path: Path):
    weights = {"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN), "fc.bias": torch.zeros(HIDDEN)}
    for name, shape in {"q_proj": (16, HIDDEN), "k_proj": (8, HIDDEN)}.items():
        weights[f"layers.0.self_attn.{name}.weight"] = torch.zeros(shape)
    weights["layers.0.mlp.gate_proj.weight"] = torch.zeros(24, HIDDEN)
    weights["layers.0.mlp.down_proj.weight"] = torch.zeros(HIDDEN, 24)
    config = {name: value for name, value in FLAT.items() if name != "draft_vocab_size"}
    found = describe(checkpoint(tmp_path, config, weights), TARGET)
    assert found.kind == "eagle" and found.features == (LAYERS,) and found.shape.vocabulary == WORDS


def test_a_language_model_is_one(tmp_path: Path):
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": HIDDEN}
    found = describe(checkpoint(tmp_path, config, {"model.norm.weight": torch.zeros(HIDDEN)}))
    assert found.kind == "causal-lm" and found.line == "llama language model, 4 layers"
    assert describe("smollm2-135m-draft").kind == "causal-lm"
    assert describe("smollm2-135m-feature").kind == describe("feature:smollm2-135m-feature").kind == "peagle"


PARD = {"model_type": "qwen2", "num_hidden_layers": 24, "vocab_size": WORDS, "pard_token": 49}


def test_a_pard_model_is_known_by_the_token_of_its_mask_rows(tmp_path: Path):
    found = describe(checkpoint(tmp_path, PARD, {}))
    assert found.kind == "pard" and found.line == "PARD qwen2 language model, 24 layers, 8 tokens a forward"
    assert (found.shape.mask_token, found.shape.depths) == (49, 8)
    named = {name: value for name, value in PARD.items() if name != "pard_token"} | {"ptd_token_id": 0}
    found = describe(checkpoint(tmp_path, named | {"para_num": 12, "spd_type": "pard2"}, {}))
    assert (found.shape.mask_token, found.shape.depths) == (0, 12)
    assert found.line == ("PARD-2 qwen2 language model, 24 layers, 12 tokens a forward, without features of the target")


def test_how_many_tokens_a_forward_guesses_may_be_asked_for(tmp_path: Path):
    found = describe(checkpoint(tmp_path / "pard", PARD, {}))
    fewer, more = with_depths(found, 4), with_depths(found, 12)
    assert fewer.shape.depths == 4 and not fewer.warnings and fewer.line.endswith("4 tokens a forward")
    assert (
        more.shape.depths == 12
        and "was trained for 8 tokens a forward, and draft_depths asks for 12" in (more.warnings[0])
    )
    assert with_depths(found, 0) is found
    with pytest.raises(PearlError, match="guesses one at a time: leave it out"):
        with_depths(describe("smollm2-135m-draft"), 4)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"pard_token": 50}, "pard_token of the draft .* is 50, which is none of the 50 tokens"),
        ({"pard_token": "<mask>"}, "pard_token of the draft .* is '<mask>'"),
        ({"pard_token": None, "spd_type": "pard2"}, "does not name pard_token"),
        ({"para_num": "many"}, "para_num of the draft .* is 'many'"),
        ({"para_num": 65}, "para_num of the draft .* is 65: it must be a number of tokens from 1 to 64"),
    ],
)
def test_a_pard_config_that_does_not_say_what_it_needs_is_refused(tmp_path: Path, change: dict, sentence: str):
    with pytest.raises(PearlError, match=sentence):
        describe(checkpoint(tmp_path, PARD | change, {}))


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, (1, 13, 24)),
        ({IDS: [2, 14, 25]}, (1, 13, 24)),
        ({"eagle_config": {IDS: [1, 13, 24]}}, (1, 13, 24)),
        ({IDS: [1, 13, 24]}, (1, 13, 24)),  # moved to the top as it was
        ({"eagle_config": {IDS: [2, 14, 25]}}, (1, 13, 24)),
        ({IDS: [3, 9, 20]}, (2, 8, 19)),
        ({"eagle_config": {IDS: [3, 9, 20]}}, (3, 9, 20)),
        ({"eagle_config": {IDS: [20, 24, 28]}}, (19, 23, 27)),  # of 28 layers none is number 28
        ({"target_layer_ids": [2, 14, 25]}, (2, 14, 25)),  # of DeepSpec, whose ids name layers
        ({"target_layer_ids": [1, 7, 13, 19, 25]}, (1, 7, 13, 19, 25)),
        ({"speculators_model_type": "eagle3", IDS: None}, (1, 13, 24)),
        ({"speculators_model_type": "eagle3", IDS: [1, 13, 24]}, (0, 12, 23)),  # its one meaning, whatever the numbers
    ],
)
def test_layers_are_counted_as_the_writer_of_the_file_did(config: dict, expected: tuple[int, ...]):
    assert layer_ids(config, LAYERS)[0] == expected


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"medusa_num_heads": 5}, "is a Medusa drafter"),
        ({"hydra_num_heads": 5}, "is a Hydra drafter"),
        ({"speculators_model_type": "hass"}, "speculators type 'hass'"),
        ({"speculators_model_type": "mtp"}, "speculators type 'mtp', which pearl does not read"),
        ({"head_dim": 8}, "by which layers.0.self_attn.q_proj.weight has the shape"),
        ({IDS: [2, 14]}, "names 2 layers, and its fc.weight reads 3 hidden states"),
        ({"target_hidden_size": 24}, "its fc.weight reads 2 hidden states of 24|hidden states of 24 numbers"),
        ({"hidden_size": None}, "lacks a value that it needs"),
        ({"num_hidden_layers": 2}, "lack layers.1.mlp.down_proj.weight"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "scales its rotary angles by 'su'"),
        ({"ptd_token_id": 7}, "lack mask_hidden"),
        ({"model_type": "gemma4_assistant"}, "reads the keys and values of its target"),
        ({"eagle_config": [2, 14, 25]}, r"config\.json of the draft .* is damaged"),
        ({"architectures": 5}, r"config\.json of the draft .* is damaged"),
        (
            {"architectures": ["Phi3ForCausalLMEagle3"], "model_type": "phi3"},
            "has phi3 layers, and pearl reads heads of",
        ),
        ({"eagle_config": {IDS: [1, 13, 29]}}, "reads the outputs of the layers 0, 12, 28, and"),
        ({"num_target_layers": 36}, "trained for a target of 36 layers"),
        ({"eagle_config": {"use_aux_hidden_state": False}, "target_hidden_size": 24}, "reads the 24 of its target as"),
        ({"num_attention_heads": None}, "lacks a value that it needs"),
        ({"num_attention_heads": 0}, "num_attention_heads of the draft .* is 0: its"),
        ({"num_attention_heads": float("inf")}, "lacks a value that it needs, or has another form"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of the draft .* is 1000000000: its"),
        ({"num_key_value_heads": 3}, "has 4 heads and 3 of keys and values"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps of the draft .* is inf"),
        ({"rope_theta": -1}, "rope_theta of the draft .* is -1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "does not name low_freq_factor, high_freq_factor: add"),
        ({"rope_scaling": {"type": "linear"}}, "does not name factor: add"),
        ({"partial_rotary_factor": 0.5}, "turns a part of each head only"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turns a part of each head only"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
            r"by several rotary angles \(sliding_attention, full_attention\), and pearl by one",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention, sliding_attention for 1 layer, and pearl"),
        ({"layer_types": ["chunked_attention"]}, "layer_types of the draft .* are chunked_attention"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path, target: str, change: dict, sentence: str):
    name = checkpoint(tmp_path, FLAT | {"architectures": ["LlamaForCausalLMEagle3"]} | change, tensors())
    assert_refused(name, TARGET, target, sentence)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"speculators_config": {"verifier": "org/its-target"}}, r"config\.json of the draft .* is damaged"),
        ({"speculators_config": {"proposal_methods": ["greedy"]}}, r"config\.json of the draft .* is damaged"),
        (
            {"speculators_config": {"proposal_methods": [{"speculative_tokens": 10**9}]}},
            "speculative_tokens of the draft .* is 1000000000: it must be a number of tokens from 1 to 64",
        ),
        ({"mask_token_id": WORDS}, "mask token of the draft .* is 50, which is none of the 50"),
        (
            {
                "mask_token_id": WORDS + 1,
                "transformer_layer_config": ENVELOPE["transformer_layer_config"] | {"vocab_size": 60},
            },
            "mask_token_id of the draft .* is 51, and .*its-target embeds 50",
        ),
    ],
)
def test_an_envelope_that_can_not_be_meant_is_refused(tmp_path: Path, target: str, change: dict, sentence: str):
    config = ENVELOPE | {"speculators_model_type": "peagle", "mask_token_id": 7} | change
    name = checkpoint(tmp_path, config, tensors() | {"mask_hidden": torch.zeros(1, 1, 3 * HIDDEN)})
    assert_refused(name, TARGET, target, sentence)


def test_what_an_architecture_says_of_layers_counts_before_the_model_type(tmp_path: Path):
    config = FLAT | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "phi3"}
    assert describe(checkpoint(tmp_path, config, tensors()), TARGET).kind == "eagle3"


def test_a_head_may_read_what_is_behind_the_targets_last_norm_as_it_is(tmp_path: Path):
    config = FLAT | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {"use_aux_hidden_state": False}}
    weights = {name: part for name, part in tensors().items() if name != "fc.weight"}
    found = describe(checkpoint(tmp_path, config, weights), TARGET)
    assert found.kind == "eagle3" and found.features == (LAYERS,) and found.feature_width == HIDDEN
    assert found.line == "EAGLE-3 head, 1 layer, 20 draft tokens, features behind the target's last norm"


def test_layers_may_see_a_window(tmp_path: Path):
    window = {"layer_types": ["sliding_attention"], "sliding_window": 9}
    for model_type, more, expected in (
        ("llama", {}, (9,)),
        ("qwen3", {"use_sliding_window": True}, (9,)),
        ("qwen3", {}, ()),  # as transformers reads it
        ("qwen3", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 0}, (9,)),
        ("qwen3", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}, ()),
        ("llama", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
    ):
        inner = ENVELOPE["transformer_layer_config"] | window | {"model_type": model_type, "head_dim": 4} | more
        found = describe(checkpoint(tmp_path, ENVELOPE | {"transformer_layer_config": inner}, tensors()), TARGET)
        assert found.shape.windows == expected


def test_a_bin_on_a_hub_is_looked_at_where_its_config_leaves_open_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = {name: value for name, value in FLAT.items() if name != "draft_vocab_size"}
    whole = tensors() | {"lm_head.weight": torch.zeros(WORDS, HIDDEN)}
    del whole["d2t"]
    checkpoint(tmp_path / "head", config, whole, pickled=True)
    checkpoint(tmp_path / "other", config, tensors("stack.0."), pickled=True)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", _nothing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: tmp_path / name / file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: tmp_path / name)
    head, other = DraftFiles("head"), DraftFiles("other")
    assert kind_of(head).describe(head, TARGET).features == (1, 13, 24)
    with pytest.raises(PearlError, match=r"has the fc\.weight of a head over hidden states"):
        kind_of(other).describe(other, TARGET)


def _nothing(*_: object):
    raise FileNotFoundError


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"d2t": torch.zeros(DRAFTED - 3)}, r"by which d2t has the shape \[20\] and not \[17\]"),
        ({"embed_tokens.weight": torch.zeros(9, HIDDEN)}, r"by which embed_tokens.weight has the shape \[50, 16\]"),
        ({"fc.weight": torch.zeros(HIDDEN, 5 * HIDDEN)}, f"does not name their layers: add {IDS}"),
        (
            {"mask_hidden": torch.zeros(1, 1, 3 * HIDDEN)},
            "The mask token of the draft .* is 50, which is none of the 50",
        ),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path: Path, change: dict, sentence: str):
    config = FLAT | ({"ptd_token_id": WORDS} if "mask_hidden" in change else {})
    with pytest.raises(PearlError, match=sentence):
        describe(checkpoint(tmp_path, config, tensors() | change), TARGET)


def test_a_head_of_another_layout_or_with_norms_of_its_inputs_is_not_taken_for_a_language_model(tmp_path: Path):
    with pytest.raises(PearlError, match=r"has the fc\.weight of a head over hidden states"):
        describe(checkpoint(tmp_path / "a", FLAT, tensors("stack.0.")), TARGET)
    normed = tensors("layers.0.") | {"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)}
    normed |= {f"layers.0.self_attn.{name}_proj.weight": torch.zeros(16, HIDDEN) for name in "qk"}
    normed["embedding_layernorm.weight"] = torch.zeros(HIDDEN)
    with pytest.raises(PearlError, match="HASS"):
        describe(checkpoint(tmp_path / "b", FLAT, normed), TARGET)


def test_sections_of_rotary_angles_are_the_ordinary_ones_in_a_text(tmp_path: Path):
    config = FLAT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}, "rope_theta": 5e5}
    found = describe(checkpoint(tmp_path, config, tensors()), TARGET)
    assert found.shape.rope == {"rope_type": "default", "rope_theta": 5e5}


def test_a_pickle_of_before_torch_1_6_is_described_too(tmp_path: Path):
    name = checkpoint(tmp_path, FLAT, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert describe(name, TARGET).kind == "eagle3"


@pytest.mark.parametrize("said", [{}, {"norm_before_residual": None}], ids=["absent", "null"])
def test_an_envelope_has_to_say_what_engines_guess_differently(tmp_path: Path, said: dict):
    config = {name: value for name, value in ENVELOPE.items() if name != "norm_before_residual"} | said
    with pytest.raises(PearlError, match="does not say norm_before_residual"):
        describe(checkpoint(tmp_path, config, tensors()), TARGET)


def test_a_drafter_of_another_target_is_refused_and_one_of_another_name_warned_of(tmp_path: Path):
    name = checkpoint(tmp_path, ENVELOPE, tensors())
    with pytest.raises(PearlError, match="hidden states of 16 numbers, and other has 32"):
        describe(name, TargetFacts("other", 32, LAYERS, WORDS))
    with pytest.raises(PearlError, match="drafts 20 tokens, and other knows 10"):
        describe(name, TargetFacts("other", HIDDEN, LAYERS, 10))
    with pytest.raises(PearlError, match="and other has 20 layers"):
        describe(
            checkpoint(tmp_path, ENVELOPE | {IDS: [2, 14, 25]}, tensors()), TargetFacts("other", HIDDEN, 20, WORDS)
        )
    found = describe(name, TargetFacts("org/a-fine-tune", HIDDEN, LAYERS, WORDS))
    assert "names org/its-target as its target, not org/a-fine-tune" in found.warnings[0]


def test_a_head_of_another_vocabulary_is_refused_and_one_of_a_padded_one_warned_of(tmp_path: Path):
    name = checkpoint(tmp_path, FLAT | {"vocab_size": 40_000}, tensors())
    for words in (39_000, 41_000):
        (said,) = describe(name, replace(TARGET, vocabulary=words)).warnings
        assert f"was trained for 40,000 tokens, and org/its-target has {words:,}" in said
    for words in (30_000, 60_000):
        with pytest.raises(PearlError, match=f"trained for a target of 40,000 tokens, and .* has {words:,}: name its"):
            describe(name, replace(TARGET, vocabulary=words))
    assert not describe(name, replace(TARGET, vocabulary=40_000)).warnings


def test_the_default_target_is_known_by_its_name_on_the_hub_too(tmp_path: Path):
    named = {"speculators_config": {"verifier": {"name_or_path": EMBEDDED_ON_HUB}}}
    name = checkpoint(tmp_path, ENVELOPE | named, tensors())
    assert not describe(name, replace(TARGET, name=EMBEDDED)).warnings
    assert describe(name, TARGET).warnings


def test_how_many_paths_to_keep_is_asked_of_drafters_that_guess_several_tokens(tmp_path: Path, target: str):
    name = checkpoint(tmp_path / "a", FLAT, tensors())
    with pytest.raises(PearlError, match=r"tree_top_k is for a drafter that guesses several .* one at a time: leave"):
        preflight(EngineConfig(target, name, tree_top_k=1))
    masked = tensors() | {"mask_hidden": torch.zeros(1, 1, 3 * HIDDEN)}
    preflight(EngineConfig(target, checkpoint(tmp_path / "b", FLAT | {"ptd_token_id": 7}, masked), tree_top_k=1))


class _Runs:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = checkpoint(tmp_path / "a", FLAT, {}, pickled=True)
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": _Runs()}))
    with pytest.raises(PearlError, match="is not a file of tensors alone"):
        describe(name, TARGET)
    assert not Path("ran").exists()


def test_pairs_describes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = checkpoint(tmp_path / "head", ENVELOPE, tensors())
    assert pairs.main([name]) == 0
    said = capsys.readouterr().out
    assert said.startswith("EAGLE-3 head, 1 layer, 20 draft tokens, features after layers 1, L / 2 - 1 and L - 4 of L")
    assert "Target: org/its-target." in said and re.search(r"Size: [\d,]+ weights\.", said)
    assert pairs.main([checkpoint(tmp_path / "medusa", {"medusa_num_heads": 2}, {})]) == 2
    EngineConfig(draft=name)


@pytest.mark.parametrize("config", [None, {}, {"model_type": None}])
def test_a_folder_without_a_model_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PearlError, match=r"is no model: a config\.json with a model_type is needed"):
        describe(str(tmp_path))


def test_half_a_character_in_a_config_does_not_end_its_description(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "\\ud83d"}')
    assert pairs.describe(str(tmp_path)) == 0
    assert capsys.readouterr().out == "\\ud83d language model.\n"


def test_a_number_of_guesses_is_asked_of_what_drafts_beside_the_target_too(tmp_path: Path, target: str):
    masked = tensors() | {"mask_hidden": torch.zeros(1, 1, 3 * HIDDEN)}
    name = checkpoint(tmp_path / "several", FLAT | {"ptd_token_id": 7}, masked)
    found = preflight(EngineConfig(target, "suffix", target_draft=name, draft_depths=3))
    assert found.beside and found.beside.shape.depths == 3
    for more in ({}, {"target_draft": checkpoint(tmp_path / "one", FLAT, tensors())}):
        with pytest.raises(
            PearlError, match="draft_depths is for a drafter that guesses several tokens in one forward: l"
        ):
            preflight(EngineConfig(target, "suffix", draft_depths=3, **more))
