"""Mode `ar` writes what transformers' `generate` writes, and every other mode writes what `ar` does.

For every architecture of the table (`tests/support/architectures.py`), with random weights, greedily, token for token
in float32. In bfloat16 the modes still agree with each other; `generate`, which pads no rows, may differ from them
where the two best logits all but tie, and how near they were is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from architectures import TABLE, Architecture, parameters, prompts, reference
from numerics import measured
from toys import ScriptedChannel, scrambled, ticks, together

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import BatchedTokenBuckets
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.models import linear
from pearl.models.batch_invariance import branches_agree
from pearl.models.fused_layers import fuse
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.verifier import SequenceQuery, VerifierModel
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target

NEW, FEW = 32, 16
PARAMS = SamplingParams(max_new_tokens=NEW)
BFLOAT16 = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma",
    "gemma3",
    "gpt2",
    "cohere",
    "olmo2",
    "granite",
    "smollm3",
)
BFLOAT16_TABLE = [one for one in TABLE if one.name in BFLOAT16]


@functools.cache
def target_model(architecture: Architecture, dtype: str) -> VerifierModel:
    """As loading prepares it."""
    model = architecture.model(dtype)
    kernel = linear.chosen("auto", model.dtype) if dtype == "bfloat16" else "stock"
    use_cache_attention(model)
    fuse(model, kernel)
    linear.pack(model, kernel)
    reader = tiny.verifier(model, max_length=architecture.longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pearl.models.batch_invariance._TIMING_S", 0.0)  # bits are compared once, and nothing is timed
        reader.buckets = measured(reader)
    reader.buckets = replace(
        reader.buckets, branches=reader.verifies_trees and branches_agree(reader, reader.vocabulary)
    )
    return reader


@functools.cache
def alone(architecture: Architecture, dtype: str) -> list[list[int]]:
    """What `ar` writes after each of the prompts."""
    target = Target(target_model(architecture, dtype))
    return [
        together(target, prompt, Schedule.of("ar"), PARAMS, decode=str).tokens
        for prompt in prompts(architecture.longest, NEW)
    ]


def assert_modes_agree(architecture: Architecture, dtype: str, modes: Sequence[str]) -> None:
    """With a drafter that is often right, and messages that come when they come."""
    wanted, reader = alone(architecture, dtype), target_model(architecture, dtype)
    draft = tiny.draft_model(architecture.model(dtype, drift=0.015), max_length=architecture.longest + 16)
    for mode in modes:
        source = TreeSource(draft) if mode == "tree" else ModelSource(draft)
        schedule = Schedule.of("tree", None, 4, 9, 6) if mode == "tree" else Schedule.of(mode, 4)
        passes = 0
        for seed, prompt in list(enumerate(prompts(architecture.longest, NEW)))[:2]:
            target = Target(reader, ScriptedChannel(source, scrambled(seed) if seed % 2 else [(3, 3, 3)]), ticks())
            written = together(target, prompt, schedule, SamplingParams(max_new_tokens=FEW), decode=str).tokens
            assert written == wanted[seed][:FEW], mode
            assert target.draft_stats and not target.draft_stats.failed
            passes += len(target.passes)
        assert passes < 2 * FEW / 1.4, f"{mode}: few guesses were accepted: then little was shown"


@pytest.mark.parametrize("architecture", parameters(), scope="module")
def test_ar_writes_what_transformers_generate_writes(architecture: Architecture):
    wanted = reference(architecture, "float32", NEW)
    assert len(wanted) > 1 and all(len(text) == NEW for text in wanted)
    assert max(len(set(text)) for text in wanted) > 8, "texts that repeat a few tokens show little"
    assert alone(architecture, "float32") == wanted


@pytest.mark.parametrize("architecture", parameters(), scope="module")
def test_every_mode_writes_what_ar_writes(architecture: Architecture):
    assert_modes_agree(architecture, "float32", ("pearl", "tree"))  # and texts side by side are those of `sd`
    reader = target_model(architecture, "float32")
    assert reader.verifies_trees or not (architecture.trees and reader.buckets.exact), (
        "rows have the bits they have alone"
    )


@pytest.mark.parametrize("architecture", parameters(), scope="module")
def test_texts_side_by_side_are_those_that_each_is_alone(architecture: Architecture):
    """Three in one batch, with a drafter, in forwards that they share where the model's bits allow it."""
    model, draft = architecture.model(), architecture.model(drift=0.02)
    longest = architecture.longest
    reader = tiny.verifier(model, max_length=longest, max_sequences=3)
    reader.buckets = target_model(architecture, "float32").buckets
    if reader.verifies_trees:
        reader.batched_buckets = BatchedTokenBuckets(tuple(range(1, 49)), (1.0,) * 48)
    source = ModelSource(tiny.draft_model(draft, max_length=longest + 16, max_sequences=3))
    target = Target(reader, ScriptedChannel(source, [(3, 3, 3)]), ticks())
    texts = prompts(longest, NEW)
    requests = [SequenceRequest(prompt, PARAMS, Stopper(PARAMS, (), str)) for prompt in texts]
    written: dict[int, list[int]] = {}
    for sequence, tokens in target.write(requests, Schedule.of("sd", 4), len(texts)):
        written.setdefault(sequence.sequence_id, []).extend(tokens)
    assert [tokens[:NEW] for _, tokens in sorted(written.items())] == alone(architecture, "float32")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("architecture", parameters(), scope="module")
def test_rows_of_a_shared_forward_and_beside_a_chain_say_what_the_model_says(architecture: Architecture, static: bool):
    """But for rounding: of some the bits differ, so that no mode would ask for this here."""
    model = architecture.model()
    text, aside = prompts(architecture.longest, NEW)[1], [3, 7]
    texts = torch.tensor([text, [*text[:-2], *aside]])
    with torch.inference_mode():
        wanted, other = model(texts, use_cache=False).logits[:, -4:]
    reader = tiny.verifier(model, max_length=architecture.longest, max_sequences=2)
    if not reader.shares_forwards:
        pytest.skip("it verifies chains, each text alone")
    if static:
        reader.enable_static_shapes()
    reader.batched_buckets = BatchedTokenBuckets(tuple(range(1, 49)), (1.0,) * 48)
    for batch_slot in (0, 1):
        reader.read(text[:-4], 1, batch_slot=batch_slot)
    sides = [(1, aside[0]), (4, aside[1])]
    for found in reader.read_together([SequenceQuery(0, text, 4, sides), SequenceQuery(1, text, 4, sides)]):
        torch.testing.assert_close(found[:4], wanted, atol=1e-3, rtol=0)
        torch.testing.assert_close(found[4:], other[2:], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", parameters(BFLOAT16_TABLE), scope="module")
def test_every_mode_writes_what_ar_writes_in_bfloat16(architecture: Architecture):
    assert target_model(architecture, "bfloat16").buckets.exact, "on this machine nothing is promised"
    assert_modes_agree(architecture, "bfloat16", ("sd", "pearl", "tree"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", parameters(BFLOAT16_TABLE), scope="module")
def test_in_bfloat16_ar_leaves_generate_only_where_two_tokens_all_but_tie(architecture: Architecture, record_property):
    """Logits of size x are 2^-8 x apart in bfloat16, and a few of these steps are what other sums come to."""
    model = architecture.model("bfloat16")
    for prompt, mine, theirs in zip(
        prompts(architecture.longest, NEW),
        alone(architecture, "bfloat16"),
        reference(architecture, "bfloat16", NEW),
        strict=True,
    ):
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), NEW)
        if same == NEW:
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *mine[:same]]])).logits[0, -1].float()
        gap = float(logits[theirs[same]] - logits[mine[same]])
        record_property("first difference", f"token {same}: {gap:.4f} between the two, of {logits.abs().max():.2f}")
        assert abs(gap) <= 8 * 2**-8 * logits.abs().max()
