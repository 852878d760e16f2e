"""What is loaded is what the preflight has announced."""

import json

import tiny

from pearl.checkpoints.checkpoint import Checkpoint
from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import eos_ids, load_target
from pearl.config.engine_config import EngineConfig
from pearl.core.token_buckets import LEAVES


def test_a_pair_with_embeddings_padded_differently_reads_the_shared_vocabulary(pair):
    checked = preflight(EngineConfig(*pair, dtype="float32", max_length=100))
    target, (draft, costs) = load_target(checked), load_draft(checked, ahead=9)
    assert (target.model.config.vocab_size, draft.model.config.vocab_size) == (tiny.SHARED + 16, tiny.SHARED)
    assert target.read([5, 6, 7], 2).shape == draft.read([5, 6, 7], 2).shape == (2, tiny.SHARED)
    assert (target.max_length, draft.max_length) == (100, 109)
    assert len(costs.seconds) == LEAVES and all(seconds > 0 for seconds in costs.seconds), (
        "what each number of leaves costs"
    )


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
