"""On what a pass's bits depend here, and what the runtime does about it.

"The text is the target's own" rests on facts about kernels that differ from device to device: that a row's bits are the
same for every row count, wherever in the pass it stands, and beside the chain as in it; that a recorded graph does what
its code does. So at start they are tried on the user's own model, device and dtype, on one text, bit for bit. Where a
fact does not hold, the runtime picks what makes it hold: other row counts, a single fixed width, another backend of
the attention (`pearl.models.kv_cache.attention`), chains instead of trees, code instead of graphs; and says so. What
was found is kept (`pearl.checkpoints.calibration`). `pearl.commands.selfcheck` shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pearl.config.inputs import brief
from pearl.core.token_buckets import LIMIT, PREFILL_CHUNK, BatchedTokenBuckets, Check, TokenBuckets
from pearl.models.batch_invariance import (
    PREFIX,
    Product,
    branches_agree,
    find_invariant_batches,
    find_invariant_counts,
    products,
    profile_path,
    rising,
)
from pearl.models.draft_model import DraftModel, LeavesQuery
from pearl.models.kv_cache.attention import BACKENDS
from pearl.models.language_model import LanguageModel
from pearl.models.static_shapes.one_text import COUNTS, DRAFT_COUNTS
from pearl.models.static_shapes.recordings import SEEDS, Capture, compare_graphs
from pearl.models.timing import best_of
from pearl.models.verifier import SequenceQuery, VerifierModel

_ALONE, _TOGETHER = "graph against eager", "graph against eager, texts side by side"
_REPEATS = 5
_APART = 1.2  # times as many rows as the last: a forward that texts share has a shape for a few row counts only


@dataclass(frozen=True)
class NumericsReport:
    """What was found, and what is done."""

    plan: TokenBuckets
    backend: str  # of the attention
    captured: bool  # forwards are recorded as graphs
    checks: tuple[Check, ...]

    @staticmethod
    def of(found: dict[str, Any]) -> NumericsReport:
        """From what `asdict` and JSON made of one."""
        checks = tuple(Check(**check) for check in found["checks"])
        return NumericsReport(TokenBuckets.from_json(found["plan"]), found["backend"], found["captured"], checks)


def examine(reader: VerifierModel, capture: Capture | None, backends: Sequence[str]) -> NumericsReport:
    """Tries the backends of attention on this very model, and graphs if there is something to record them with. Leaves
    the reader as the report says.

    Of the backends that keep the bits it takes the one whose passes cost least; if none does, the cheapest.
    """
    found: list[NumericsReport] = []
    refused: list[Check] = []
    for backend in backends:
        try:
            found.append(_try(reader, backend))
        except (RuntimeError, NotImplementedError) as error:  # of kernels that can't do this model's shapes
            if backend == backends[-1]:
                raise
            refused.append(Check(f"attention {backend}", False, f"not here ({brief(error, 120)})"))
    best = min(found, key=lambda one: (not one.plan.exact, not one.plan.branches, one.plan.cost(LIMIT // 2)))
    counts = _counts(best.plan)
    reader.buckets = best.plan
    reader.enable_static_shapes(counts, None, best.backend)
    graphs, captured = _graphs(reader, capture)
    plan = replace(best.plan, cost_s=_timed(reader, counts, best.plan.cost_s))
    plan = replace(plan, safe=counts) if plan.exact else plan
    reader.buckets = plan
    if plan.branches:
        plan = replace(plan, path_s=profile_path(reader, reader.vocabulary))
        reader.buckets = plan
    reader.forget()
    return NumericsReport(plan, best.backend, captured, (*best.checks, *refused, *graphs))


def backends(on_cpu: bool) -> tuple[str, ...]:
    """Those worth trying. On CPU the one that heads sharing a key were packed for."""
    return ("packed",) if on_cpu else tuple(BACKENDS)


def apply(reader: VerifierModel, known: NumericsReport, capture: Capture | None) -> None:
    """Sets a reader up as a report says."""
    reader.buckets = known.plan
    reader.checks = known.checks
    reader.enable_static_shapes(_counts(known.plan), capture if known.captured else None, known.backend)


def examine_drafter(reader: DraftModel, capture: Capture | None) -> tuple[bool, tuple[Check, ...]]:
    """Graph against code for a model whose guesses are checked anyway: whether forwards are recorded. The reader is
    left so."""
    reader.enable_static_shapes(DRAFT_COUNTS)
    checks, captured = _graphs(reader, capture)
    return captured, tuple(checks)


def examine_batches(
    reader: VerifierModel, capture: Capture | None, products: Sequence[Product]
) -> tuple[BatchedTokenBuckets | None, bool, tuple[Check, ...]]:
    """Forwards that several texts share: the row counts that keep the bits of each text alone, None if hardly any do;
    and, where shapes are static, whether these forwards are recorded. Leaves the reader so."""
    reader.share_static_shapes(None)
    plan = find_invariant_batches(reader, reader.vocabulary, products)
    reader.batched_buckets = plan
    if plan is None or reader.shared is None:
        return plan, False, ()
    plan = reader.batched_buckets = replace(plan, counts=_spread(plan.counts), cost_s=())
    if capture is None:
        checks, captured = [Check(_TOGETHER, True, "not recorded: forwards run eagerly")], False
    else:
        code = [logits for seed in SEEDS for logits in _probed_together(reader, plan, seed)]
        reader.share_static_shapes(capture)
        graphs = [logits for seed in SEEDS for logits in _probed_together(reader, plan, seed)]
        checks, captured = _compared(_TOGETHER, code, graphs, reader.shared)
        if not captured:
            reader.share_static_shapes(None)
    plan = reader.batched_buckets = replace(plan, cost_s=_timed_together(reader, plan))
    return plan, captured, tuple(checks)


def rows_check(plan: TokenBuckets) -> Check:
    """What a plan says of row counts."""
    if not plan.exact:
        found = "the bits depend on the row count on this device; near-equal logits may pick differently"
    elif plan.fixed:
        found = f"the bits depend on the row count here, so every pass has {plan.most} rows"
    else:
        found = (
            f"a pass is padded to one of {', '.join(map(str, plan.pad_to or plan.safe))}; these give equal bits here"
        )
    return Check("rows", plan.exact, found)


def _counts(plan: TokenBuckets) -> tuple[int, ...]:
    """The row counts of shapes: few of those that are safe, as each has a graph for every number of slots."""
    if not plan.exact:
        return COUNTS
    thinned = {next((safe for safe in plan.safe if safe >= count), plan.most) for count in COUNTS}
    return tuple(sorted(thinned))


def _try(reader: VerifierModel, backend: str) -> NumericsReport:
    """Row counts, places and branches with one backend of the attention, without graphs."""
    reader.buckets = TokenBuckets(tuple(range(1, LIMIT + 1)), (1.0,) * LIMIT)
    reader.enable_static_shapes(range(1, LIMIT + 1), None, backend)
    plan = find_invariant_counts(
        lambda tokens, first: reader.forward(list(tokens), first, len(tokens)),
        reader.vocabulary,
        one_width=True,
        products=products(reader.model),
    )
    reader.buckets = plan
    reader.enable_static_shapes(_counts(plan), None, backend)
    branches = bool(plan.exact and reader.verifies_trees and branches_agree(reader, reader.vocabulary))
    checks = [rows_check(plan), _of_branches(reader, plan, branches), Check("attention", True, backend)]
    return NumericsReport(replace(plan, branches=branches), backend, False, tuple(checks))


def _of_branches(reader: VerifierModel, plan: TokenBuckets, agree: bool) -> Check:
    if agree:
        return Check("tree against chain", True, "equal bits")
    if not reader.verifies_trees:
        return Check("tree against chain", False, "this model's attention reads no branches: passes are chains")
    why = "other bits" if plan.exact else "not tried, as row counts change the bits"
    return Check("tree against chain", False, f"{why}: passes are chains")


def _graphs(reader: LanguageModel, capture: Capture | None) -> tuple[list[Check], bool]:
    """Graph against code, on passes of every row count and of trees; whether graphs are used. The reader is left with
    what is."""
    static = reader.static
    assert static, "what is compared with graphs is the same code"
    if capture is None:
        return [Check(_ALONE, True, "not recorded: forwards run eagerly")], False
    code = [logits for seed in SEEDS for logits in _probed(reader, static.counts, seed)]
    recorder = reader.enable_static_shapes(static.counts, capture, static.backend)
    graphs = [logits for seed in SEEDS for logits in _probed(reader, static.counts, seed)]
    checks, captured = _compared(_ALONE, code, graphs, recorder, reader.shared)
    if not captured:
        reader.enable_static_shapes(static.counts, None, static.backend)
    return checks, captured


def _compared(what: str, code: Sequence[Tensor], graphs: Sequence[Tensor], *runners: Any) -> tuple[list[Check], bool]:
    """What is said of logits by code and by graphs of some runners, and whether those are used."""
    used = [one for one in runners if one]
    failed = next((one.failed for one in used if one.failed), "")
    check = compare_graphs(what, code, graphs, sum(one.shapes for one in used), failed)
    return [check], check.holds


def _spread(counts: Sequence[int]) -> tuple[int, ...]:
    """Of row counts, ascending, the last and some on the way to it."""
    found: list[int] = []
    for count in counts:
        if not found or count >= _APART * found[-1] or count == counts[-1]:
            found.append(count)
    return tuple(found)


def _probed(reader: LanguageModel, counts: Sequence[int], seed: int) -> list[Tensor]:
    """Logits of passes of each row count, chains and trees, over texts that differ."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        text = torch.randint(reader.vocabulary, (PREFIX + count,), generator=generator).tolist()
        reader.forget()
        reader.read(text[:PREFIX], 1)
        found.append(reader.read(text, count))
        if isinstance(reader, DraftModel):
            found.append(reader.read_leaves(text, [(1,), (2, 3)]))
            if reader.max_sequences > 1:
                both = [LeavesQuery(slot, text[slot:], [(1,), (2, 3)]) for slot in range(2)]
                found += reader.read_leaves_together(both)
                reader.forget(batch_slot=1)
        elif isinstance(reader, VerifierModel) and reader.verifies_trees and count < LIMIT:
            reader.forget(but=text[:PREFIX])
            found.append(reader.read(text, count, [(0, 1), (0, 2)][: LIMIT - count]))
    if reader.max_length > PREFILL_CHUNK:
        reader.forget()
        piece = torch.randint(reader.vocabulary, (PREFILL_CHUNK,), generator=generator).tolist()
        found += [reader.read(piece, 1), reader.read([*piece, 1], 1)]
    return found


def _probed_together(reader: VerifierModel, plan: BatchedTokenBuckets, seed: int) -> list[Tensor]:
    """Logits of passes that all texts share, each another one, of each row count; chains, and trees."""
    generator, found, texts = torch.Generator().manual_seed(seed), [], reader.max_sequences
    lines = torch.randint(reader.vocabulary, (texts, PREFIX + LIMIT), generator=generator).tolist()
    for slot, line in enumerate(lines):
        reader.forget(batch_slot=slot)
        reader.read(line[:PREFIX], 1, batch_slot=slot)
    for count in plan.counts:
        for sides in ([], [(0, 1), (0, 2)]) if reader.verifies_trees else ([],):
            queries, left = [], count
            for slot, line in enumerate(lines):
                rows = min(reader.buckets.most, -(-left // (texts - slot)))
                beside = sides[: max(0, rows - 1)]
                if rows:
                    keep = rows - len(beside)
                    queries.append(SequenceQuery(slot, line[: PREFIX + keep], keep, beside))
                left -= rows
                reader.forget(line[:PREFIX], slot)
            found += reader.read_together(queries)
    return found


def _timed_together(reader: VerifierModel, plan: BatchedTokenBuckets) -> tuple[float, ...]:
    """Seconds of a forward of each row count, as it runs from now on."""
    text = torch.randint(reader.vocabulary, (PREFIX + LIMIT,), generator=torch.Generator().manual_seed(0)).tolist()
    reader.forget()
    reader.read(text[:PREFIX], 1)
    reader.trial.copy_first(PREFIX)
    found = []
    for count in plan.counts:
        share, more = divmod(count, reader.max_sequences)
        lengths = [share + (one < more) for one in range(reader.max_sequences)]
        read = functools.partial(reader.trial.read, text[PREFIX:], PREFIX, lengths, count)
        read()
        found.append(best_of(_REPEATS, read))
    return rising(found)


def _timed(reader: VerifierModel, counts: Sequence[int], before: Sequence[float]) -> tuple[float, ...]:
    """Seconds of a pass of 1, 2, ... rows, as it runs from now on: that of the next count there is."""
    text = torch.randint(reader.vocabulary, (PREFIX + LIMIT,), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: dict[int, float] = {}
    reader.forget()
    reader.read(text[:PREFIX], 1)
    for count in counts:
        tokens = text[PREFIX : PREFIX + count]
        seconds[count] = best_of(_REPEATS, functools.partial(reader.forward, tokens, PREFIX, count))
    found = [
        next((seconds[count] for count in counts if count >= rows), before[rows - 1]) for rows in range(1, LIMIT + 1)
    ]
    return rising(found)
