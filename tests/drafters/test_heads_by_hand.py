"""A flat EAGLE-3 checkpoint, as its authors publish them, says what the formulas say: without any other package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from eagle3_by_hand import chain_logits
from safetensors.torch import save_file

from pearl.checkpoints.drafts.feature_weights import load
from pearl.checkpoints.drafts.kinds import TargetFacts, describe
from pearl.drafters.feature.head_reader import HeadReader
from pearl.errors import CheckpointError, PearlError
from pearl.models.draft_model import LeavesQuery

H, WORDS, DRAFTED = 16, 30, (0, 2, 5, 9, 11, 29)
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 1,
    "vocab_size": WORDS,
    "draft_vocab_size": len(DRAFTED),
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "fc.weight": (H, 3 * H),
    "midlayer.self_attn.q_proj.weight": (24, 2 * H),
    "midlayer.self_attn.k_proj.weight": (12, 2 * H),
    "midlayer.self_attn.v_proj.weight": (12, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, 24),
    "midlayer.mlp.gate_proj.weight": (24, H),
    "midlayer.mlp.up_proj.weight": (24, H),
    "midlayer.mlp.down_proj.weight": (H, 24),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.post_attention_layernorm.weight": (H,),
    "norm.weight": (H,),
    "lm_head.weight": (len(DRAFTED), H),
}
TARGET = TargetFacts("its target", H, 28, WORDS)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


class Bare:
    """Of a target what a head takes."""

    def __init__(self, words: int = WORDS):
        self._table = torch.nn.Embedding(words, H)
        torch.nn.init.normal_(self._table.weight, std=0.5)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self._table


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    made = {name: torch.randn(shape) * 0.3 + float("norm" in name) for name, shape in SHAPES.items()}
    d2t = torch.tensor(DRAFTED) - torch.arange(len(DRAFTED))
    return made | {"d2t": d2t, "t2d": torch.zeros(WORDS).bool().index_fill(0, torch.tensor(DRAFTED), True)}


WINDOWED = {"layer_types": ["sliding_attention"], "sliding_window": 3}
LAST = {"eagle_config": {"use_aux_hidden_state": False}}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"norm_output": True, "rope_theta": 500.0}, {"norm_before_residual": True}, WINDOWED, LAST],
)
def test_logits_are_those_of_the_formulas(tmp_path: Path, flags: dict, pickled: bool):
    weights, config = tensors(seed=1), CONFIG | flags
    if flags == LAST:
        del weights["fc.weight"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    target = Bare()
    drafter = load(describe(str(tmp_path), TARGET)).attach(target).requires_grad_(False)
    assert drafter.vocabulary.tolist() == list(DRAFTED)
    features = torch.randn(6, drafter.shape.feature_row).bfloat16()
    table = target.get_input_embeddings().weight.detach()
    window = flags.get("sliding_window", 0)
    expected = chain_logits(weights, config, table, features.float(), TEXT, window=window)
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    reader.observe(features.view(torch.int16).numpy(), 0)
    paths = [tuple(TEXT[7 : 7 + depth]) for depth in range(4)]
    found = reader.read_leaves_together([LeavesQuery(0, TEXT[:7], paths)])[0]
    torch.testing.assert_close(found[:, drafter.vocabulary], torch.stack(expected[5:9]), atol=1e-4, rtol=1e-4)
    assert not found[:, 1].isfinite().any(), "what can't be drafted has no chance"


def test_a_map_may_have_the_whole_vocabulary_in_another_order(tmp_path: Path):
    ids = torch.randperm(WORDS, generator=torch.Generator().manual_seed(3))
    weights = tensors(seed=1) | {"lm_head.weight": torch.randn(WORDS, H), "d2t": ids - torch.arange(WORDS)}
    config = CONFIG | {"draft_vocab_size": WORDS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    target, features = Bare(), torch.randn(6, 3 * H).bfloat16()
    drafter = load(describe(str(tmp_path), TARGET)).attach(target).requires_grad_(False)
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    reader.observe(features.view(torch.int16).numpy(), 0)
    found = reader.read_leaves_together([LeavesQuery(0, TEXT[:7], [()])])[0][0]
    table = target.get_input_embeddings().weight.detach()
    expected = chain_logits(weights, config, table, features.float(), TEXT)[5]
    torch.testing.assert_close(found[ids], expected, atol=1e-4, rtol=1e-4)


def test_a_token_that_its_own_embedding_lacks_is_read_as_the_last_one(tmp_path: Path):
    """Of a fine-tune with more tokens than the target that the head was trained for."""
    table = torch.randn(WORDS, H)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(seed=1) | {"embed_tokens.weight": table}, tmp_path / "model.safetensors")
    facts = TargetFacts("a fine-tune", H, 28, WORDS + 4)
    drafter = load(describe(str(tmp_path), facts)).attach(Bare(WORDS + 4)).requires_grad_(False)
    features, found = torch.randn(3, 3 * H).bfloat16(), []
    for token in (WORDS + 2, WORDS - 1):
        reader = HeadReader(drafter, 100)
        reader.begin(0, continues=False)
        reader.observe(features.view(torch.int16).numpy(), 0)
        found.append(reader.read_leaves_together([LeavesQuery(0, [3, 1, token, 4], [(), (token,)])])[0])
    assert torch.equal(*found)


def test_what_no_network_can_be_made_of_is_refused_when_it_is_loaded(tmp_path: Path):
    save_file(tensors(seed=1), tmp_path / "model.safetensors")
    for change in ({"rope_scaling": {"type": "linear", "factor": "two"}}, {"hidden_act": "snake"}):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
        with pytest.raises(PearlError, match=r"no network can be made of it|hidden_act is 'snake'"):
            load(describe(str(tmp_path), TARGET))


def test_a_map_that_leads_out_of_the_vocabulary_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(seed=1) | {"d2t": torch.full((len(DRAFTED),), WORDS)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"d2t of the draft .* leads to tokens from 30 to 35, and there are 30"):
        load(describe(str(tmp_path), TARGET))
    save_file(tensors(seed=1), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"leads to tokens from 0 to 29, and there are 28"):
        load(describe(str(tmp_path), TargetFacts("of a smaller vocabulary", H, 28, 28)))


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside the usual one"])
def test_a_later_layers_norm_may_be_called_as_sglang_calls_it(tmp_path: Path, other: bool):
    """Where both are there, it is the one that vLLM and `speculators` read."""
    later = {name.replace("midlayer", "layers.1"): part for name, part in tensors(2).items() if "midlayer" in name}
    rows = {"q": 24, "k": 12, "v": 12}
    later |= {f"layers.1.self_attn.{name}_proj.weight": torch.randn(count, H) for name, count in rows.items()}
    if not other:
        del later["layers.1.input_layernorm.weight"]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    save_file(tensors(1) | later, tmp_path / "model.safetensors")
    drafter = load(describe(str(tmp_path), TARGET))
    wanted = later["layers.1.input_layernorm.weight" if other else "layers.1.hidden_norm.weight"]
    assert torch.equal(drafter.state_dict()["layers.1.input_layernorm.weight"], wanted)
