"""Draft models and feature drafters with their weights, and what their forwards cost here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pearl.checkpoints import shared_embeddings
from pearl.checkpoints.calibration import DraftCosts, calibrate_draft, has_static_shapes
from pearl.checkpoints.drafts import dflash_weights, feature_weights
from pearl.checkpoints.drafts.kinds import CAUSAL_LM, PARD
from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import AHEAD, Preflight
from pearl.checkpoints.targets import prefix_cache_mb, prepare
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.shape import DFLASH, DSPARK
from pearl.drafters.dflash.source import DFlashSource
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.shape import EAGLE, EAGLE3, OURS, PEAGLE
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.pard import PardSource
from pearl.drafters.tree import TreeSource
from pearl.models import linear
from pearl.models.architecture import longest_sequence
from pearl.models.cuda_graphs import capture_for
from pearl.models.draft_model import DraftModel, read_unknown_tokens
from pearl.models.reduced_head import reduce_vocab

Network = TypeVar("Network", FeatureDrafter, DFlashDrafter)
_log = logging.getLogger(__name__)


def load_source(checked: Preflight) -> DraftSource:
    """What drafts, with its weights: by its kind (`pearl.checkpoints.drafts.kinds.KINDS`). Raises `UsageError`,
    `CheckpointError`."""
    assert checked.drafting, "the draft source is a checkpoint"
    return SOURCES[checked.drafting.kind](checked)


def _draft_model_source(checked: Preflight) -> DraftSource:
    model, costs = load_draft(checked, AHEAD)
    return TreeSource(model, costs.seconds, several=costs.several)


def _pard_source(checked: Preflight) -> DraftSource:
    assert checked.drafting
    model, _ = load_draft(checked, AHEAD)
    shape = checked.drafting.shape
    return PardSource(model, shape.mask_token, shape.depths, checked.config.tree_top_k)


def _feature_source(checked: Preflight) -> DraftSource:
    return _by_shapes(FeatureSource(load_feature_drafter(checked), checked.config.tree_top_k), checked)


def _head_source(checked: Preflight) -> DraftSource:
    reader = HeadReader(load_feature_drafter(checked), checked.max_length + AHEAD, checked.max_sequences)
    return _by_shapes(HeadSource(reader), checked)


def _by_shapes(source: Any, checked: Preflight) -> DraftSource:
    """A source with a network of its own, whose forwards have static shapes where a draft model's have them: recorded
    if a replay says what the code says."""
    config, placed = checked.config, checked.draft_on
    if has_static_shapes(config, placed):
        capture = None if config.cuda_graphs == "static-only" else capture_for(placed.devices)
        if capture is None:
            source.forward.use_static_shapes(None)
        elif not (check := source.forward.record(capture, source.probe)).holds:
            _log.warning("%s: %s.", check.what, check.found)
        source.time()
    return source


def load_draft(checked: Preflight, ahead: int) -> tuple[DraftModel, DraftCosts]:
    """The draft model, and what its forwards cost. Its texts are up to `ahead` guesses longer than the target's."""
    config, checkpoint, placed = checked.config, checked.draft, checked.draft_on
    assert checkpoint is not None, "the suffix source has no model"
    dtype, kernel = config.draft_dtype or config.dtype, config.draft_kernel
    model = checkpoint.load(config, dtype, config.draft_load_in, placed)
    count: int | Tensor = config.draft_vocabulary
    if needs := shared_embeddings.read(checkpoint.name):
        shared_embeddings.complete(model, checked.target.load_embeddings_and_head(config, dtype, placed), needs)
        if (mask := shared_embeddings.mask_embedding(checkpoint.name)) is not None:
            shared_embeddings.place_mask(model, mask)
        count = count or shared_embeddings.vocabulary(checkpoint.name)
        if kernel == "auto" and placed.on_cpu:
            kernel = "int8"  # so small a model spends its time on reading its weights
    cutting = isinstance(count, Tensor) or count > 0
    head = reduce_vocab(model, count, checked.tokenizer.all_special_ids) if cutting else None
    prepare(model, kernel, placed)
    longest = min(checked.max_length + ahead, longest_sequence(model.config))
    coarse = not placed.on_cpu
    vocabulary = min(checked.vocabulary, model.config.get_text_config().vocab_size)
    read_unknown_tokens(model.get_input_embeddings(), checked.vocabulary)
    reader = DraftModel(model, vocabulary, longest, head, checked.max_sequences, coarse)
    costs = calibrate_draft(reader, checked, kernel, len(head) if head else 0)
    if mb := prefix_cache_mb(checked.config, placed):
        reader.keep_prefixes(mb)
    return reader, costs


def load_feature_drafter(checked: Preflight) -> FeatureDrafter:
    """The feature drafter with its target's embedding, norm and head, ready to draft."""
    assert checked.drafting, "the draft source is a feature drafter"
    drafter = feature_weights.load(checked.drafting)
    drafter.shape = replace(drafter.shape, depths=checked.drafting.shape.depths)
    drafter.attach(_ends_of_target(checked))
    return _placed(drafter, checked)


def _dflash_source(checked: Preflight) -> DraftSource:
    return _by_shapes(
        DFlashSource(load_dflash(checked), checked.config.tree_top_k, checked.max_length + AHEAD), checked
    )


def load_dflash(checked: Preflight) -> DFlashDrafter:
    """The network with its target's embedding and head, ready to draft."""
    assert checked.drafting, "the draft source is a checkpoint"
    drafter = dflash_weights.load(checked.drafting.files, checked.drafting.shape, checked.vocabulary)
    target = _ends_of_target(checked)
    drafter.attach(target.get_input_embeddings().weight, target.get_output_embeddings())
    return _placed(drafter, checked)


def _ends_of_target(checked: Preflight) -> Any:
    dtype = "float32" if checked.draft_on.on_cpu else "bfloat16"
    return checked.target.load_embeddings_and_head(checked.config, dtype, Placement(("cpu",)))


def _placed(drafter: Network, checked: Preflight) -> Network:
    """On its device, with the linear layers of that."""
    placed, asked = checked.draft_on, checked.config.draft_kernel
    drafter.place(placed.devices[0], torch.float32 if placed.on_cpu else torch.bfloat16).requires_grad_(False)
    if placed.on_cpu:
        assert checked.drafting
        kernel = "int8" if asked == "auto" and checked.drafting.files.in_8_bits else asked
        _pack(drafter, linear.chosen(kernel, torch.float32))
    return drafter


def _pack(drafter: Network, kernel: str) -> None:
    """A network's linear layers as a kernel has them. What reads the target's features is not rounded: some of their
    numbers are so much larger than others that 8 bits for both would cost guesses."""
    head, reads = nn.ModuleList([drafter.head]), nn.ModuleDict()  # the head may be the target's, no part of the drafter
    for name in ("fc", "in_proj") if kernel == "int8" else ():
        if hasattr(drafter, name):
            reads[name] = getattr(drafter, name)
            setattr(drafter, name, nn.Identity())
    for some, its in ((drafter, kernel), (head, kernel), (reads, linear.chosen("auto", torch.float32))):
        linear.pack(some, its)
    drafter.replace_head(head[0])
    for name, layer in reads.items():
        setattr(drafter, name, layer)


SOURCES: dict[str, Callable[[Preflight], DraftSource]] = {
    CAUSAL_LM: _draft_model_source,
    PARD: _pard_source,
    OURS: _feature_source,
    PEAGLE: _feature_source,
    EAGLE: _head_source,
    EAGLE3: _head_source,
    DFLASH: _dflash_source,
    DSPARK: _dflash_source,
}
