"""What a model's forwards cost on this machine and which of them keep their bits, measured once and kept.

Knows: what such figures depend on, and the user's cache folder where they lie. Refuses to know: how a forward is timed
or compared (`pearl.models.batch_invariance`, `pearl.models.numerics_check`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from pearl.checkpoints import calibration_key
from pearl.checkpoints.checkpoint import Checkpoint
from pearl.checkpoints.placement import Placement
from pearl.checkpoints.preflight import Preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.token_buckets import BatchedTokenBuckets, Check, TokenBuckets
from pearl.drafters.tree import profile_batches
from pearl.errors import UsageError
from pearl.machine.files import atomic_write, cache_folder
from pearl.models import numerics_check
from pearl.models.batch_invariance import (
    Product,
    branches_agree,
    find_invariant_batches,
    find_invariant_counts,
    position_border,
    products,
    profile_leaves,
    profile_path,
)
from pearl.models.cuda_graphs import capture_for
from pearl.models.draft_model import DraftModel
from pearl.models.kv_cache.attention_probe import attention_checks
from pearl.models.kv_cache.transformers_interface import uses_cache_attention
from pearl.models.linear import RowwiseInt8Linear
from pearl.models.static_shapes.one_text import DRAFT_COUNTS
from pearl.models.tensor_parallel.model import TensorParallelModel
from pearl.models.verifier import VerifierModel

Found = dict[str, Any]  # as JSON holds it


@dataclass(frozen=True)
class DraftCosts:
    """Seconds of a drafter's forward: of one text by its leaves, see `profile_leaves`; of several, see
    `profile_batches`."""

    seconds: tuple[float, ...]
    several: tuple[float, float]


def measured_once(key: dict[str, object], measure: Callable[[], Found]) -> Found:
    """`measure()`, or what it said the last time for this `key`, which names all that it depends on.

    Of processes that ask at the same time one measures and the others wait. Target and drafter may share a GPU, so only
    one process at a time measures there: else each would slow the other down."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "rows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with _alone_on(key["devices"], path.parent), atomic_write(path) as partial:  # type: ignore[arg-type]
                partial.write_text(json.dumps(measure()))
        return json.loads(path.read_text())


@contextlib.contextmanager
def _alone_on(devices: Iterable[str], folder: Path) -> Iterator[None]:
    """No other process measures on these GPUs. CPUs have cores for each."""
    with contextlib.ExitStack() as held:
        for device in sorted(devices):  # in one order, so that no two wait for each other
            if device != "cpu":
                held.enter_context(FileLock(folder / f"measuring-{device.replace(':', '-')}.lock"))
        yield


def calibrate_target(reader: VerifierModel | TensorParallelModel, checked: Preflight) -> None:
    """Gives a target the row counts that keep its bits, and their costs."""
    key = _key(reader.model, checked.config, checked.target_on, checked.target, checked.config.dtype)
    if isinstance(reader, VerifierModel):
        _calibrate_verifier(reader, checked, key)
    else:
        _calibrate_tensor_parallel(reader, checked, key)
    for batch_slot in range(reader.max_sequences):
        reader.forget(batch_slot=batch_slot)


def _calibrate_verifier(reader: VerifierModel, checked: Preflight, key: Found) -> None:
    config, placed = checked.config, checked.target_on
    ours = uses_cache_attention(reader.model)  # another's masks are no part of a recorded forward
    static_shapes = ours and has_static_shapes(config, placed, reader.model)
    capture = None if config.cuda_graphs == "static-only" or not static_shapes else capture_for(placed.devices)

    def examine_batches() -> Found:
        plan, captured, checks = numerics_check.examine_batches(reader, capture, products(reader.model))
        kept = {"captured": captured, "checks": [asdict(check) for check in checks]}
        return {"batched": asdict(plan) if plan else None, **kept}

    if static_shapes:
        backends = numerics_check.backends(placed.on_cpu)
        static = {"what": "static shapes", "backends": backends, "graphs": capture is not None, **key}
        found = measured_once(static, lambda: asdict(numerics_check.examine(reader, capture, backends)))
        report = numerics_check.NumericsReport.of(found)
        numerics_check.apply(reader, report, capture)
        capture = capture if report.captured else None  # what can't be recorded of one text can't of several
    else:
        _measure_rows(reader, checked, key, lambda: products(reader.model))
    _refuse_long_texts(reader, checked, key)
    if reader.max_sequences > 1:
        found = _measure_batches(reader, key, static_shapes, capture is not None, examine_batches)
        reader.share_static_shapes(capture if found.get("captured") else None)
        reader.checks += tuple(Check(**check) for check in found.get("checks", ()))


def _calibrate_tensor_parallel(reader: TensorParallelModel, checked: Preflight, key: Found) -> None:
    def examine_batches() -> Found:
        plan = find_invariant_batches(reader, checked.vocabulary)
        return {"batched": asdict(plan) if plan else None}

    _measure_rows(reader, checked, key, list)  # no product of a shard is asked alone
    if reader.max_sequences > 1:
        _measure_batches(reader, key, False, False, examine_batches)


def _measure_rows(
    reader: VerifierModel | TensorParallelModel, checked: Preflight, key: Found, tried: Callable[[], list[Product]]
) -> None:
    """`tried`: the products that are tried by themselves too."""

    def measure() -> Found:
        plan = find_invariant_counts(
            lambda tokens, first: reader.forward(list(tokens), first, len(tokens)),
            checked.vocabulary,
            products=tried(),
        )
        reader.buckets = plan
        branches = reader.verifies_trees and branches_agree(reader, checked.vocabulary)
        path_s = profile_path(reader, checked.vocabulary) if branches else 0.0
        return asdict(replace(plan, branches=branches, path_s=path_s))

    reader.buckets = TokenBuckets.from_json(measured_once({"what": "rows", **key}, measure))
    reader.checks = (numerics_check.rows_check(reader.buckets), *attention_checks(reader.model))


def _refuse_long_texts(reader: VerifierModel, checked: Preflight, key: Found) -> None:
    border = measured_once(
        {"what": "positions", "longest": reader.max_length, **key}, lambda: {"border": position_border(reader)}
    )["border"]
    if border is not None:
        raise UsageError(
            f"In a text of more than {border} tokens {checked.target.name} changes what its first ones say (its "
            f"rotary embedding looks at the whole text): give a max_length of at most {border}."
        )


def _measure_batches(
    reader: VerifierModel | TensorParallelModel, key: Found, static: bool, graphs: bool, examine: Callable[[], Found]
) -> Found:
    """Gives the reader the row counts of passes that several texts share. Returns what `examine` has found, now or
    earlier."""
    reader.read([0], 1)  # from here on there is memory for the keys and values of all texts, or loading fails
    key = key | {"what": "batches", "texts": reader.max_sequences, "static": static, "graphs": graphs}
    found = measured_once(key, lambda: examine() if reader.buckets.exact else {"batched": None})
    reader.batched_buckets = BatchedTokenBuckets.from_json(found["batched"]) if found["batched"] else None
    return found


def calibrate_draft(reader: DraftModel, checked: Preflight, kernel: str, kept: int) -> DraftCosts:
    """What the forwards of a draft model cost; they are recorded as graphs where that works. `kernel`: of its linear
    layers. `kept`: tokens that a reduced head holds, 0: it is whole."""
    config, placed = checked.config, checked.draft_on
    assert checked.draft is not None, "a draft model was loaded"
    key = _key(reader.model, config, placed, checked.draft, config.draft_dtype or config.dtype)
    key |= {"what": "leaves", "load_in": config.draft_load_in, "kernel": kernel, "head": kept}
    if uses_cache_attention(reader.model) and has_static_shapes(config, placed, reader.model):
        capture = None if config.cuda_graphs == "static-only" else capture_for(placed.devices)
        key["graphs"] = capture is not None
        captured = measured_once(
            {**key, "what": "capture"}, lambda: {"captured": numerics_check.examine_drafter(reader, capture)[0]}
        )
        reader.enable_static_shapes(DRAFT_COUNTS, capture if captured["captured"] else None)
    found = measured_once(key, lambda: {"seconds": profile_leaves(reader, reader.vocabulary)})["seconds"]
    several: Found = {"several": (0.0, 0.0)}
    if reader.max_sequences > 1:
        key |= {"what": "several", "texts": reader.max_sequences}
        several = measured_once(key, lambda: {"several": profile_batches(reader, reader.vocabulary, found[0])})
    for batch_slot in range(reader.max_sequences):
        reader.forget(batch_slot=batch_slot)
    first, further = several["several"]
    return DraftCosts(tuple(found), (first, further))


def has_static_shapes(config: EngineConfig, placed: Placement, model: nn.Module | None = None) -> bool:
    """Whether forwards have static shapes: by default on one GPU, where graphs save most of a step. On CPU they save
    nothing, and what fills them up costs a little; and no graph can be recorded of a model in 8 bits."""
    if config.cuda_graphs == "auto":
        in_8_bits = model is not None and any(isinstance(one, RowwiseInt8Linear) for one in model.modules())
        return len(placed.devices) == 1 and not placed.on_cpu and not in_8_bits
    return config.cuda_graphs in ("on", "static-only")


def _key(model: Any, config: EngineConfig, placed: Placement, checkpoint: Checkpoint, dtype: str) -> dict[str, object]:
    """What a model's times and bits depend on."""
    return {
        "model": checkpoint.name,
        "weights": calibration_key.of_weights(checkpoint),
        "code": calibration_key.of_code(),
        "machine": calibration_key.of_machine(placed.devices),
        "dtype": dtype,
        "load_in": config.load_in,
        "double_quant": config.double_quant,
        "kernel": config.kernel,
        "devices": placed.devices,
        "config": model.config.to_json_string(),
        "ranks": config.tensor_parallel_size,
    }
