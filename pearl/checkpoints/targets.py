"""Targets with their weights, measured on this machine and ready to verify.

Knows: which of the bits' promises a target keeps here. Refuses to know: what drafts for it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pearl.checkpoints.calibration import calibrate_target
from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import Preflight
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import probe
from pearl.core.token_buckets import LEAST_CONTEXT
from pearl.errors import UsageError
from pearl.models import linear
from pearl.models.fingerprint import model_fingerprint, wrong_target_message
from pearl.models.fused_layers import fuse
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.kv_cache.transformers_interface import takes_cache
from pearl.models.tensor_parallel.model import OtherRanks, TensorParallelModel
from pearl.models.verifier import VerifierModel

MOST_PREFIX_GB = 2.0  # of prompts, where nobody says how much


def load_target(checked: Preflight, others: OtherRanks | None = None) -> VerifierModel | TensorParallelModel:
    """`others`: the other ranks, of a target that is spread over several."""
    model = _load(checked)
    prepare(model, "stock" if others else checked.config.kernel, checked.target_on)
    reader: VerifierModel | TensorParallelModel
    reader = VerifierModel(
        model,
        checked.vocabulary,
        max(checked.max_length, LEAST_CONTEXT),
        hooks=HiddenStateHooks(model, checked.features) if checked.features else None,
        max_sequences=checked.max_sequences,
        coarse=not (checked.target_on.on_cpu or others),
    )
    if others:
        others.await_loaded()
        reader = TensorParallelModel(reader, others)
    calibrate_target(reader, checked)
    ranks = checked.config.tensor_parallel_size
    # where the first rank keeps hidden states too, the ranks would drop at different times
    if not (ranks > 1 and checked.features) and (mb := prefix_cache_mb(checked.config, checked.target_on, ranks)):
        reader.keep_prefixes(mb)
    return reader


def prefix_cache_mb(config: EngineConfig, placed: Placement, ranks: int = 1) -> int:
    """What a model, or a rank of it, may keep of prompts. Where nobody has said it: of memory that is plentiful, a
    little; over several ranks nothing, as they would have to agree."""
    gb = config.prefix_cache_gb
    if gb is None:
        machine = probe()
        free = (
            [machine.ram_gb] if placed.on_cpu else [machine.gpus_gb[torch.device(d).index or 0] for d in placed.devices]
        )
        gb = min(MOST_PREFIX_GB, min(free) / 16) if ranks == 1 else 0.0
    return int(1000 * gb / ranks)


def load_shard(checked: Preflight) -> VerifierModel:
    """What a rank other than the first has of the target."""
    model = _load(checked)
    prepare(model, "stock", checked.target_on)
    return VerifierModel(
        model, checked.vocabulary, max(checked.max_length, LEAST_CONTEXT), max_sequences=checked.max_sequences
    )


def load_plain(checked: Preflight, device: str) -> Any:
    """The target as transformers loads it, on one device: what training and recording start from."""
    config = checked.config
    return checked.target.load(config, config.dtype, config.load_in, Placement((device,)))


def prepare(model: Any, kernel: str, placed: Placement) -> None:
    """Our attention, and our layers where they are wanted. Raises `UsageError` for a model that keeps no keys."""
    if not takes_cache(model):
        raise UsageError(f"{type(model).__name__} has no key-value cache: choose a decoder-only transformer.")
    use_cache_attention(model)
    if placed.on_cpu and (kernel := linear.chosen(kernel, model.dtype)) != "stock":
        fuse(model, kernel)
        linear.pack(model, kernel)


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a text: the checkpoint's generation config says, else the tokenizer."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _load(checked: Preflight) -> Any:
    config = checked.config
    model = checked.target.load(
        config, config.dtype, config.load_in, checked.target_on, ranks=config.tensor_parallel_size
    )
    for drafting in filter(None, (checked.drafting, checked.beside)):
        if (mark := getattr(drafting.shape, "fingerprint", "")) and model_fingerprint(model) != mark:
            raise UsageError(wrong_target_message(drafting.target))
    return model
