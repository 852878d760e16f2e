"""How many rows a forward may have: for which row counts a row's bits are the same, and what each count costs.

"Lossless" means the same tokens, and two near-equal logits are told apart by their last bits. Matrix kernels round
differently for different row counts. So at start the model reads one text in passes of every width up to `LIMIT` and
compares: a *safe* count gives every row, at every offset, the bits that most other counts give it. A pass is padded up
to the next safe count; the autoregressive baseline as well. The result is kept (`pearl.checkpoints.calibration`).

Two orders of a sum differ in the last bits of a float32 number, and once that is rounded to bfloat16 only one number in
ten thousand tells. The passes over a text of a model of some size hold millions of numbers; those of a tiny one so few
that a count may pass whose bits differ. So each kind of matrix product is also tried by itself (`Product`), where more
can be seen: ours is asked for its sums before they are rounded, others get inputs for which the terms of some sums
cancel, so that what is left is so small that its last bits are not rounded away. So is each activation: torch computes
the last numbers of a tensor, those that fill no vector register, by another function than the others.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pearl.core.token_buckets import (
    ANY,
    LEAST,
    LEAVES,
    LIMIT,
    ROWS_A_TEXT,
    SLOT_MULTIPLE,
    BatchedTokenBuckets,
    CannotBranch,
    TokenBuckets,
)
from pearl.models.draft_model import DraftModel
from pearl.models.fused_layers import FusedLayer
from pearl.models.language_model import LanguageModel
from pearl.models.linear import FIRST_ROWS, BlockedLinear, PackedLinear
from pearl.models.tensor_parallel.model import TensorParallelModel
from pearl.models.timing import best_of, timed
from pearl.models.verifier import VerifierModel

WIDTHS = (8, 12, 4)  # of all passes, where the bits change with the row count
PREFIX = 61  # tokens before the text under test
_LONG_PREFIX = SLOT_MULTIPLE + PREFIX  # the same where texts share their passes: attention is a good part of those
_GAIN = 0.97  # of the seconds of a count, at which a wider one is taken for it
_ROUNDS, _TIMING_S, _LONG_TIMING_S = 4, 2.0, 10.0  # repetitions of a timing, fewer where they take longer
_OFFSETS = (0, 1)  # one row apart, so that every row is compared with its neighbours
_TRIALS, _CANCELLING = 8, FIRST_ROWS  # inputs of a product, and how many of its sums come to almost nothing
_ACTIVATIONS = "transformers.activations", "torch.nn.modules.activation"  # modules that these are defined in
_TRIED = 1 << 12  # numbers at least of each row of an activation's inputs
_WIDEST = 1 << 14  # results of one row: what a wider head computes is compared as logits

Rows = dict[int, list[Tensor]]  # what the rows of a forward came to, [rows, *], by their count and for each offset


@dataclass(frozen=True)
class Product:
    """A linear layer or an activation by itself. `compute`: [1, rows, K] to [1, rows, outputs]. `inputs`: [trials,
    LIMIT + 1, K]."""

    compute: Callable[[Tensor], Tensor]
    inputs: Tensor

    @torch.inference_mode()
    def rows(self) -> Rows:
        """Digests [rows, trials]."""

        def digests(first: int, count: int) -> Tensor:
            tried = [self.compute(x[None, first : first + count])[0] for x in self.inputs]
            return _digests(torch.stack(tried, 1))

        return {count: [digests(first, count) for first in _OFFSETS] for count in range(1, LIMIT + 1)}

    @torch.inference_mode()
    def holds(self, count: int, most: int) -> bool:
        """Whether the rows of a forward of `count` have the bits that they have in forwards of `most`."""
        rows, whole = self.inputs.flatten(0, 1), -(-count // most) * most
        for turn in range(0, len(rows), count):
            x = rows.roll(turn, 0).repeat(-(-whole // len(rows)), 1)[None, :whole]
            alone = torch.cat([self.compute(part) for part in x.split(most, 1)], 1)
            if not torch.equal(self.compute(x[:, :count]), alone[:, :count]):
                return False
        return True


def products(model: nn.Module) -> list[Product]:
    """One linear layer of each kind and shape that a model has in this process, but for the head of a real one, and one
    activation of each kind and width."""
    found: dict[object, Product] = {}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layer: Any
    for layer in model.modules():
        if type(layer) is PackedLinear:
            compute, like, weight = layer.sums, layer.empty, torch.empty(0, layer.in_features)
            outputs = layer.out_features
        elif type(layer) is BlockedLinear:
            compute, like, weight, outputs = layer.__call__, layer.first_rows, layer.first_rows, layer.out_features
        elif type(layer) in (nn.Linear, Conv1D) and not isinstance(layer.weight, DTensor):
            weight = layer.weight.detach().T if type(layer) is Conv1D else layer.weight.detach()
            compute, like, outputs = layer.__call__, weight, len(weight)
        else:
            continue
        kind = type(layer), outputs, weight.shape[1], like.dtype, like.device
        tried = outputs <= _WIDEST or layer is not head
        if tried and kind not in found and like.device.type != "meta":
            found[kind] = Product(compute, _inputs(weight[:_CANCELLING].float().cpu()).to(like))
    return [*found.values(), *_activations(model)]


def _activations(model: nn.Module) -> list[Product]:
    """Each with the widths of the linear layers beside it, as it is given what one of them computes. Not those of a
    `FusedLayer`, which are given one half of every row: torch computes such rows one by one."""
    found: dict[object, Product] = {}
    like = next(model.parameters(), torch.empty(0))
    for parent in model.modules():
        parts = [] if isinstance(parent, FusedLayer) or like.device.type == "meta" else list(parent.children())
        widths = {getattr(part, "nf" if type(part) is Conv1D else "out_features", 0) for part in parts} - {0}
        for part, width in itertools.product(parts, widths):
            kind = type(part), width
            if type(part).__module__ in _ACTIVATIONS and kind not in found:
                shape = max(_TRIALS, _TRIED // width), LIMIT + 1, width
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
                found[kind] = Product(part.__call__, x.to(like))
    return list(found.values())


def _inputs(weight: Tensor) -> Tensor:
    """Random ones of many sizes, as sums of equal ones are often exact, and without the part that rows of a weight
    [n, K] would answer: of those sums only what the rounding of the inputs leaves remains. [trials, LIMIT + 1, K]"""
    (count, size), generator = weight.shape, torch.Generator().manual_seed(0)
    shape = _TRIALS, LIMIT + 1, size
    x = torch.randn(shape, generator=generator) * 2.0 ** -torch.randint(12, shape, generator=generator)
    basis = torch.linalg.qr(weight[: min(count, size // 2)].T)[0]
    return x - (x @ basis) @ basis.T


def find_invariant_counts(
    read: Callable[[Sequence[int], int], Tensor],
    vocabulary: int,
    one_width: bool = False,
    products: Sequence[Product] = (),
) -> TokenBuckets:
    """Tries every count on the model itself.

    `read(tokens, first)` forwards `tokens` at the positions from `first` without padding and returns logits [rows, V].
    `one_width`: where the bits change with the row count, look for a single one for all passes. `products`: of the same
    model, to be tried by themselves too.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (PREFIX + LIMIT + max(_OFFSETS),), generator=generator).tolist()
    read(text[:PREFIX], 0)
    logits: dict[int, list[Tensor]] = {}
    seconds: dict[int, list[float]] = {}
    started = time.perf_counter()
    while True:
        for count in [LIMIT, *range(1, LIMIT + 1)]:
            for offset in _OFFSETS:
                first = PREFIX + offset
                taken, rows = timed(functools.partial(read, text[first : first + count], first))
                seconds.setdefault(count, []).append(taken)
                logits.setdefault(count, []).append(rows)
        if time.perf_counter() - started > _TIMING_S or len(seconds[LIMIT]) >= 2 * _ROUNDS * len(_OFFSETS):
            break
    found = [{count: rows[: len(_OFFSETS)] for count, rows in logits.items()}, *(one.rows() for one in products)]
    safe = max((_agreeing(found, reference) for reference in logits), key=len)
    measured = [min(seconds[count]) for count in range(1, LIMIT + 1)]
    costs = rising(measured)
    if len(safe) >= 3:
        return TokenBuckets(safe, costs, pad_to=_worth_it(safe, measured))
    width = _one_width(read, text) if one_width else None
    if width is None:
        return TokenBuckets(ANY.safe, costs, exact=False)
    return TokenBuckets((width,), (costs[width - 1],) * LIMIT)


def _worth_it(safe: Sequence[int], seconds: Sequence[float]) -> tuple[int, ...]:
    """Without the counts that clearly take longer than a wider one: a pass is padded to that one instead. A library may
    have another, slower kernel for a single row, or none that fits five."""
    least = {count: min(seconds[wider - 1] for wider in safe if wider >= count) for count in safe}
    return tuple(count for count in safe if _GAIN * seconds[count - 1] <= least[count])


def _one_width(read: Callable[[Sequence[int], int], Tensor], text: Sequence[int]) -> int | None:
    """A row count at which a token's bits are the same in every row, whatever the other rows hold; None if there is no
    such."""
    return next((width for width in WIDTHS if _steady(read, text, width)), None)


def _steady(read: Callable[[Sequence[int], int], Tensor], text: Sequence[int], width: int) -> bool:
    """Whether every token of the text under test has one set of bits in passes of `width` rows: each is read in every
    row, and in the first one also with other tokens after it."""
    bits: dict[int, Tensor] = {}
    for first in range(PREFIX, PREFIX + LIMIT + max(_OFFSETS) - width + 1):
        tokens = list(text[first : first + width])
        for line in (tokens, tokens[:1] + tokens[:1] * (width - 1)):
            rows = read(line, first)
            same = rows if line is tokens else rows[:1]
            if any(not torch.equal(bits.setdefault(first + r, row), row) for r, row in enumerate(same)):
                return False
    return True


def rising(costs: Sequence[float]) -> tuple[float, ...]:
    """Whatever else ran on the machine made some of them longer: a pass costs no more than one of more rows."""
    return tuple(min(costs[count:]) for count in range(len(costs)))


def profile_path(reader: LanguageModel | TensorParallelModel, vocabulary: int) -> float:
    """Seconds that a pass takes longer for each path beside its chain."""
    generator = torch.Generator().manual_seed(3)
    *text, a, b, c, d, e = torch.randint(vocabulary, (PREFIX,), generator=generator).tolist()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for chain, sides, found in (((a, b), (c, d, e), seconds[0]), ((a, b, c, d, e), (), seconds[1])):
            reader.read(text, 1)
            side_rows = [(0, side) for side in sides]
            found.append(timed(functools.partial(reader.read, [*text, *chain], len(chain) + 1, side_rows))[0])
    return max(0.0, (min(seconds[0]) - min(seconds[1])) / 3)


def branches_agree(reader: LanguageModel | TensorParallelModel, vocabulary: int) -> bool:
    """Whether rows beside the chain have, bit for bit, the logits that they would have in it, on this very model."""
    generator = torch.Generator().manual_seed(1)
    *text, a, b, c, d, e = torch.randint(vocabulary, (PREFIX + 5,), generator=generator).tolist()
    try:
        mixed = reader.read([*text, a, b], 3, side_rows=[(0, c), (3, d), (1, e)])
    except CannotBranch:
        return False
    beside = reader.read([*text, c, d], 3)[1:]
    later = reader.read([*text, a, e], 3)[2:]
    return torch.equal(mixed[3:], torch.cat([beside, later]))


def find_invariant_batches(
    reader: VerifierModel | TensorParallelModel, vocabulary: int, products: Sequence[Product] = ()
) -> BatchedTokenBuckets | None:
    """Tries the row counts of a forward that all texts of `reader` share. None: their bits are not those of a text
    alone, or too few counts' are.

    All read the same tokens, so each row can be compared with one that a text has read alone. The reader's `buckets`
    are known.
    """
    if not reader.verifies_trees or reader.max_sequences < 2:
        return None
    prefix = min(_LONG_PREFIX, reader.max_length - reader.buckets.most)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(vocabulary, (prefix + reader.buckets.most,), generator=generator).tolist()
    reader.read(text[:prefix], 1)
    reader.trial.copy_first(prefix)
    alone = reader.read(text, reader.buckets.most)
    counts = batched_candidates(reader.buckets, reader.max_sequences)
    counts = [count for count in counts if all(one.holds(count, reader.buckets.most) for one in products)]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < _ROUNDS and time.perf_counter() - started < _LONG_TIMING_S):
        for count in list(counts):
            share, more = divmod(count, reader.max_sequences)
            lengths = [share + (one < more) for one in range(reader.max_sequences)]
            taken, logits = timed(functools.partial(reader.trial.read, text[prefix:], prefix, lengths, count))
            seconds[count].append(taken)
            if not all(torch.equal(rows, alone[: len(rows)]) for rows in logits):
                counts.remove(count)
        rounds += 1
    if len(counts) < 2:
        return None
    return BatchedTokenBuckets(tuple(counts), rising([min(seconds[count]) for count in counts]), reader.buckets.path_s)


def batched_candidates(buckets: TokenBuckets, texts: int) -> list[int]:
    """Row counts worth trying: up to several rows for each of so many texts. Products over blocks of rows are often
    made for multiples of 4 or 6."""
    steps = (*buckets.safe, 18, 20, 24, 28, 30, 36, 40, 48, 60, 72, 84, 96, 120, 144, 168, 192, 240, 288)
    widest = min(texts * buckets.most, max(2 * LIMIT, ROWS_A_TEXT * texts))
    return [count for count in steps if count <= widest]


def position_border(reader: VerifierModel) -> int | None:
    """The longest text in which the first tokens say what they say in a shorter one; None: any, up to the longest.

    Some rotary embeddings look at the last position of a forward and turn all rows by other angles beyond some border.
    So a row that only fills a forward is moved further and further away.
    """
    tokens = torch.randint(reader.vocabulary, (PREFIX,), generator=torch.Generator().manual_seed(4)).tolist()

    def said(far: int) -> Tensor:
        return reader.with_a_row_at(tokens, far)

    near = said(0)
    noise = (said(PREFIX) - near).abs().max()  # of experts, say, that get other rows

    def changes(far: int) -> bool:
        return bool((said(far) - near).abs().max() > 4 * noise + 0.05 * near.float().std())

    low, high = PREFIX, reader.max_length - 1
    if high <= low or not changes(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return high


def profile_leaves(reader: DraftModel, vocabulary: int) -> tuple[float, ...]:
    """Seconds of a drafter's forward of 1, 2, ... `LEAVES` leaves."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(vocabulary, (2 * PREFIX,), generator=generator).tolist()
    reader.read_leaves(text, [()])
    leaves = [[(token,) for token in range(count)] for count in range(1, LEAVES + 1)]
    return tuple(best_of(3, functools.partial(reader.read_leaves, text, paths)) for paths in leaves)


def _agreeing(found: Sequence[Rows], reference: int) -> tuple[int, ...]:
    """The counts whose rows have the bits of the same rows of `reference`, wherever in the pass they stand."""
    shift = _OFFSETS[1] - _OFFSETS[0]

    def agrees(rows: Rows, count: int) -> bool:
        (early, late), (mine, later) = rows[reference], rows[count]
        return _same(mine, early) and _same(later, late) and _same(mine[shift:], later)

    return tuple(count for count in range(LEAST, LIMIT + 1) if all(agrees(rows, count) for rows in found))


def _same(a: Tensor, b: Tensor) -> bool:
    shared = min(len(a), len(b))
    return torch.equal(a[:shared], b[:shared])


def _digests(rows: Tensor) -> Tensor:
    """A number for the bits of each row, int64 [...]; rows: [..., outputs]. Of zeros the sign does not count."""
    bits = (rows + 0.0).view(torch.int16 if rows.element_size() == 2 else torch.int32).long()
    weights = torch.randint(1 << 62, bits.shape[-1:], generator=torch.Generator().manual_seed(1))
    return (bits * (2 * weights + 1).to(bits.device)).sum(-1)
