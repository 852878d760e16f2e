"""A target whose layers are on several devices: what belongs to a layer is on its device, and the bits are the same."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoModelForCausalLM

from pearl.core.token_buckets import BatchedTokenBuckets
from pearl.models.draft_model import LeavesQuery
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.verifier import SequenceQuery, VerifierModel

TEXT = [(7 * i) % tiny.VOCABULARY for i in range(150)]  # longer than a forward over a prompt


def said(model: torch.nn.Module) -> tuple[VerifierModel, list[torch.Tensor]]:
    """Logits of passes as a run has them: a prompt, a tree, a branch that was taken, several texts, a drafter's."""
    reader, draft = tiny.verifier(model, max_sequences=3), tiny.draft_model(model, max_sequences=3)
    reader.batched_buckets = BatchedTokenBuckets((16, 32), (0.0, 0.0))
    together = [
        SequenceQuery(0, TEXT[:30], 3, ((0, 5),)),
        SequenceQuery(1, TEXT[:20], 2),
        SequenceQuery(2, TEXT[:9], 2, ((0, 1), (2, 2))),
    ]
    return reader, [
        reader.read(TEXT, 4, side_rows=[(0, 5), (1, 6), (4, 7)]),
        reader.read([*TEXT[:-3], 5, 7, 8], 2),
        *reader.read_together(together),
        *draft.read_leaves_together([LeavesQuery(0, TEXT[:30], [(1,), (2, 3)]), LeavesQuery(1, TEXT[:20], [()])]),
    ]


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gemma3"])  # with and without heads that share a key
def test_every_tensor_of_a_layer_is_on_its_device(name):
    """The second device is torch's meta device: it computes nothing, and refuses tensors of another as a GPU does."""
    model = tiny.random_model(tiny.CONFIGS[name]())
    use_cache_attention(model)  # which it is asked with numbers, and the meta device has none
    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        part.to("meta")
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta", skip_keys=["cache", "past_key_values"]))
    reader, logits = said(model)
    assert {one.device.type for one in logits} == {"meta"}
    layers = [[part.device.type for part in parts] for parts in reader.buffers.all_layers()]
    assert layers == [["cpu", "cpu"], ["meta", "meta"]]


def test_layers_placed_by_a_device_map_have_the_bits_of_a_model_in_one_place(tmp_path):
    tiny.random_model(tiny.CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    spread, whole = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, device_map=where, offload_folder=tmp_path / "offloaded"
        )
        for where in ({**places, "model.layers.1": "disk"}, {"": "cpu"})
    )
    assert {p.device.type for p in spread.model.layers[1].parameters()} == {"meta"}  # read when its turn comes
    (_, ours), (_, theirs) = said(spread), said(whole)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
