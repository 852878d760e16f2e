"""What is loaded is what the preflight has announced."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from architectures import parameters
from safetensors.torch import save_file

from pearl.checkpoints.checkpoint import Checkpoint
from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.drafts import kinds
from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import eos_ids, load_target
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.token_buckets import LEAVES
from pearl.engine import Engine
from pearl.errors import CheckpointError, UsageError
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import HiddenStateHooks

GGUF_LAYER = dict(
    attn_norm=(64,),
    ffn_norm=(64,),
    attn_q=(64, 64),
    attn_k=(32, 64),
    attn_v=(32, 64),
    attn_output=(64, 64),
    ffn_gate=(96, 64),
    ffn_up=(96, 64),
    ffn_down=(64, 96),
)


def test_of_a_pair_with_embeddings_padded_differently_the_drafter_is_cut_and_the_target_is_not(pair):
    checked = preflight(EngineConfig(*pair, dtype="float32", max_length=200))
    target, (draft, costs) = load_target(checked), load_draft(checked, ahead=9)
    assert (target.model.config.vocab_size, draft.model.config.vocab_size) == (tiny.SHARED + 16, tiny.SHARED)
    assert target.read([5, 6, 7], 2).shape == (2, tiny.SHARED + 16)
    assert draft.read([5, 6, 7], 2).shape == (2, tiny.SHARED)
    assert (target.max_length, draft.max_length) == (200, 209)
    assert len(costs.seconds) == LEAVES and all(seconds > 0 for seconds in costs.seconds), (
        "what each number of leaves costs"
    )


def test_a_draft_reads_tokens_that_it_does_not_know(pair):
    """A target's own tokens, added after its draft was trained, stand in its texts."""
    checked = preflight(EngineConfig(*pair, dtype="float32"))
    draft, _ = load_draft(checked, ahead=9)
    text = [5, tiny.SHARED + 15, 7]
    assert draft.read(text, 3).isfinite().all()
    torch.testing.assert_close(draft.read(text, 1), draft.read([5, tiny.SHARED - 1, 7], 1))
    assert draft.read_leaves(text, [(), (tiny.SHARED + 3,)]).shape == (2, tiny.SHARED)


@pytest.mark.parametrize("architecture", parameters())
def test_embeddings_and_head_can_be_had_without_layers_and_are_known_by_their_fingerprint(architecture, tmp_path):
    model = architecture.model()
    model.save_pretrained(tmp_path)
    bare = Checkpoint(str(tmp_path)).load_embeddings_and_head(EngineConfig(), "float32", Placement(("cpu",)))
    assert torch.equal(bare.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(bare.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert model_fingerprint(bare) == model_fingerprint(model)
    HiddenStateHooks(model, [model.config.num_hidden_layers])  # what its last norm puts out


def test_without_layers_too_embeddings_have_the_shape_that_the_config_says(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(CheckpointError, match="lack 2 tensors"):
        Checkpoint(str(tmp_path / "cut")).load_embeddings_and_head(EngineConfig(), "float32", Placement(("cpu",)))


def write_gguf(path: Path, layers: int = 2) -> Path:
    """A random Llama of two layers, of which the file holds so many."""
    shapes = {f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in GGUF_LAYER.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, tiny.LENGTH),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_vocab_size, 64),
    ):
        add(value)
    for name, shape in ({"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64)} | shapes).items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_lacks_layers_is_refused_and_a_part_of_one_before_it_is_read(tmp_path):
    def load(path: Path):
        return Checkpoint.of(str(path)).load(EngineConfig(), "float32", None, Placement(("cpu",)))

    assert len(load(write_gguf(tmp_path / "whole.gguf")).model.layers) == 2
    with pytest.raises(CheckpointError, match="lack 9 tensors"):
        load(write_gguf(tmp_path / "cut.gguf", layers=1))
    (tmp_path / "parts").mkdir()
    for part in (1, 2):
        (tmp_path / "parts" / f"x-0000{part}-of-00002.gguf").touch()
    with pytest.raises(UsageError, match=r"x-00001-of-00002\.gguf is one of 2 parts of a GGUF file: merge them first"):
        preflight(EngineConfig(str(tmp_path / "parts")))


def test_a_folder_with_a_gguf_file_alone_is_a_draft(tmp_path):
    write_gguf(tmp_path / "draft.gguf")
    assert kinds.describe(str(tmp_path)).line == kinds.describe(str(tmp_path / "draft.gguf")).line


def test_a_context_too_short_for_the_measurements_at_start_is_refused(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    with pytest.raises(UsageError, match=r"reads 100 tokens.*choose a model with a longer context"):
        preflight(EngineConfig(str(tmp_path / "short")))


@pytest.mark.parametrize("most", [20, 62])
def test_a_text_may_be_shorter_than_what_is_measured_at_start(pair, most):
    with Engine.from_pretrained(*pair, mode="sd", processes=1, dtype="float32", max_length=most) as engine:
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        assert len(engine.generate(list(range(30, 40)), params).tokens) == 8


def test_the_checkpoint_says_what_ends_a_text(pair):
    checked = preflight(EngineConfig(pair[0], dtype="float32"))
    model = load_target(checked).model
    for said, ids in ((None, (0,)), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))):
        model.generation_config.eos_token_id = said
        assert eos_ids(model, checked.tokenizer) == ids


def test_the_header_of_a_checkpoint_tells_its_size(pair):
    counted = Checkpoint.of(pair[0]).numbers()
    model = load_target(preflight(EngineConfig(pair[0], dtype="float32", kernel="stock"))).model
    assert counted == sum(weight.numel() for weight in model.parameters())
    assert json.dumps(counted)  # a plain number


@pytest.mark.parametrize("kind, each", [("bfloat16", 2.0), ("float32", 4.0)])
def test_packed_weights_take_the_memory_of_what_holds_them(tmp_path, kind, each):
    tensors = {
        "layer.qweight": torch.zeros(16, 64, dtype=torch.int32),  # eight of four bits in each
        "layer.scales": torch.zeros(2, 64, dtype=torch.float16),
        "experts.gate_up_proj_blocks": torch.zeros(4, 8, dtype=torch.uint8),  # two of four bits, unpacked on a CPU
    }
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = 16 * 64 * 4 + 2 * 64 * each + 2 * 4 * 8 * each
    assert Checkpoint(str(tmp_path)).numbers(kind) * each == wanted
