"""How many rows a forward may have: for which row counts a row's bits are the same, and what each count costs.

"Lossless" means the same tokens, and two near-equal logits are told apart by their last bits. Matrix kernels round
differently for different row counts. So at start the model reads one text in passes of every width up to `LIMIT` and
compares: a *safe* count gives every row, at every offset, the bits that most other counts give it. A pass is padded up
to the next safe count; the autoregressive baseline as well. The result is kept by model, machine and versions.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

LIMIT = 16
LEAST = 2  # a single row goes through another kernel, and a short measurement may not meet a bit that tells
# The cache is read in multiples of this many slots. A sum over more slots may round otherwise even if the further ones
# count for nothing, so the pass that reads a token always sees as many as that token's own position asks for.
GRAIN = 128
ROWS_A_TEXT = 5  # of a pass that many texts share, on average at most
LEAVES = 8  # rows of a drafter's forward at most, once its text is read
WIDTHS = (8, 12, 4)  # of all passes, where the bits change with the row count
_PREFIX = 61  # tokens before the text under test
_LONG_PREFIX = GRAIN + _PREFIX  # the same where texts share their passes: attention is a good part of those
_ROUNDS, _TIMING_S, _LONG_TIMING_S = 4, 2.0, 10.0  # repetitions of a timing, fewer where they take longer
_OFFSETS = (0, 1)  # one row apart, so that every row is compared with its neighbours


@dataclass(frozen=True)
class RowPlan:
    """`safe`: row counts with equal bits, ascending. `cost_s[n - 1]`: seconds of a forward of n rows."""

    safe: tuple[int, ...]
    cost_s: tuple[float, ...]
    exact: bool = True  # False: the bits depend on the row count whatever is done
    branches: bool = True  # a row beside the chain has the bits that it would have in it
    path_s: float = 0.0  # seconds that a pass takes longer for each path beside its chain

    def pad(self, rows: int) -> int:
        """The least safe count that holds `rows`; beyond what was tested, as many as they are."""
        return next((count for count in self.safe if count >= rows), rows)

    @property
    def most(self) -> int:
        """The widest pass."""
        return self.safe[-1]

    @property
    def fixed(self) -> bool:
        """There is one width for all passes."""
        return self.exact and len(self.safe) == 1

    def cost(self, rows: int, paths: int = 0) -> float:
        """Seconds of a pass of so many rows, some of them on `paths` beside its chain."""
        return self.cost_s[min(self.pad(rows), LIMIT) - 1] + paths * self.path_s

    def up_to(self, position: int) -> int:
        """The most rows of a pass whose root is at `position`: it ends where the cache's grain does."""
        return GRAIN - position % GRAIN


@dataclass(frozen=True)
class JointRows:
    """The row counts of forwards that several texts share, at which each text's rows have the bits that they have in a
    forward of its own; ascending. `cost_s`: the seconds of each; `path_s`: see `RowPlan`."""

    counts: tuple[int, ...]
    cost_s: tuple[float, ...]
    path_s: float = 0.0

    def pad(self, rows: int) -> int:
        """The least of the counts that holds `rows`."""
        assert rows <= self.most, "no forward that wide was tried"
        return self.counts[bisect.bisect_left(self.counts, rows)]

    @property
    def most(self) -> int:
        return self.counts[-1]

    def cost(self, rows: int, paths: int = 0) -> float:
        """Seconds of a pass of so many rows, some of them on `paths` beside the chains."""
        return self.cost_s[bisect.bisect_left(self.counts, min(rows, self.most))] + paths * self.path_s


@dataclass(frozen=True)
class Check:
    """A fact about bits that was tried on this machine."""

    what: str
    holds: bool
    found: str


class CannotBranch(Exception):
    """The model's attention does not read the cached keys themselves."""


ANY = RowPlan(tuple(range(1, LIMIT + 1)), (1.0,) * LIMIT)


def extended(seconds: Sequence[float], rows: int) -> float:
    """The cost of so many rows, where that of 1, 2, ... is known: beyond, each costs as much as the last one did."""
    known = len(seconds)
    step = seconds[-1] - seconds[0] if known > 1 else 0.0
    return seconds[min(rows, known) - 1] + max(0, rows - known) * max(0.0, step) / max(1, known - 1)


def measure(read: Callable[[Sequence[int], int], Tensor], vocabulary: int, one_width: bool = False) -> RowPlan:
    """Tries every count on the model itself.

    `read(tokens, first)` forwards `tokens` at the positions from `first` without padding and returns logits [rows, V].
    `one_width`: where the bits change with the row count, look for a single one for all passes.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (_PREFIX + LIMIT + max(_OFFSETS),), generator=generator).tolist()
    read(text[:_PREFIX], 0)
    logits: dict[int, list[Tensor]] = {}
    seconds: dict[int, list[float]] = {}
    started = time.perf_counter()
    while True:
        for count in [LIMIT, *range(1, LIMIT + 1)]:
            for offset in _OFFSETS:
                first = _PREFIX + offset
                began = time.perf_counter()
                rows = read(text[first : first + count], first)
                _finish(rows)
                seconds.setdefault(count, []).append(time.perf_counter() - began)
                logits.setdefault(count, []).append(rows)
        if time.perf_counter() - started > _TIMING_S or len(seconds[LIMIT]) >= 2 * _ROUNDS * len(_OFFSETS):
            break
    logits = {count: rows[: len(_OFFSETS)] for count, rows in logits.items()}
    safe = max((_agreeing(logits, reference) for reference in logits), key=len)
    costs = _rising([min(seconds[count]) for count in range(1, LIMIT + 1)])
    if len(safe) >= 3:
        return RowPlan(safe, costs)
    width = _one_width(read, text) if one_width else None
    if width is None:
        return RowPlan(ANY.safe, costs, exact=False)
    return RowPlan((width,), (costs[width - 1],) * LIMIT)


def _one_width(read: Callable[[Sequence[int], int], Tensor], text: Sequence[int]) -> int | None:
    """A row count at which a token's bits are the same in every row, whatever the other rows hold; None if there is no
    such."""
    return next((width for width in WIDTHS if _steady(read, text, width)), None)


def _steady(read: Callable[[Sequence[int], int], Tensor], text: Sequence[int], width: int) -> bool:
    """Whether every token of the text under test has one set of bits in passes of `width` rows: each is read in every
    row, and in the first one also with other tokens after it."""
    bits: dict[int, Tensor] = {}
    for first in range(_PREFIX, _PREFIX + LIMIT + max(_OFFSETS) - width + 1):
        tokens = list(text[first : first + width])
        for line in (tokens, tokens[:1] + tokens[:1] * (width - 1)):
            rows = read(line, first)
            same = rows if line is tokens else rows[:1]
            if any(not torch.equal(bits.setdefault(first + r, row), row) for r, row in enumerate(same)):
                return False
    return True


def _rising(costs: Sequence[float]) -> tuple[float, ...]:
    """Whatever else ran on the machine made some of them longer: a pass costs no more than one of more rows."""
    return tuple(min(costs[count:]) for count in range(len(costs)))


def path_cost(reader: Any, vocabulary: int) -> float:
    """Seconds that a pass takes longer for each path beside its chain. `reader` is a `model.LanguageModel`."""
    generator = torch.Generator().manual_seed(3)
    *text, a, b, c, d, e = torch.randint(vocabulary, (_PREFIX,), generator=generator).tolist()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for chain, sides, found in (((a, b), (c, d, e), seconds[0]), ((a, b, c, d, e), (), seconds[1])):
            reader.read(text, 1)
            began = time.perf_counter()
            _finish(reader.read([*text, *chain], len(chain) + 1, branches=[(0, side) for side in sides]))
            found.append(time.perf_counter() - began)
    return max(0.0, (min(seconds[0]) - min(seconds[1])) / 3)


def branches_agree(reader: Any, vocabulary: int) -> bool:
    """Whether rows beside the chain have, bit for bit, the logits that they would have in it, on this very model.

    `reader` is a `model.LanguageModel`.
    """
    generator = torch.Generator().manual_seed(1)
    *text, a, b, c, d, e = torch.randint(vocabulary, (_PREFIX + 5,), generator=generator).tolist()
    try:
        mixed = reader.read([*text, a, b], 3, branches=[(0, c), (3, d), (1, e)])
    except CannotBranch:
        return False
    beside = reader.read([*text, c, d], 3)[1:]
    later = reader.read([*text, a, e], 3)[2:]
    return torch.equal(mixed[3:], torch.cat([beside, later]))


def measure_together(reader: Any, vocabulary: int) -> JointRows | None:
    """Tries the row counts of a forward that all texts of `reader` share. None: their bits are not those of a text
    alone, or too few counts' are.

    All read the same tokens, so each row can be compared with one that a text has read alone. `reader` is a
    `model.LanguageModel`, its `rows` known.
    """
    if not reader.branches or reader.texts < 2:
        return None
    prefix = min(_LONG_PREFIX, reader.max_length - reader.rows.most)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(vocabulary, (prefix + reader.rows.most,), generator=generator).tolist()
    reader.read(text[:prefix], 1)
    reader.spread(prefix)
    alone = reader.read(text, reader.rows.most)
    counts = joint_candidates(reader.rows, reader.texts)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < _ROUNDS and time.perf_counter() - started < _LONG_TIMING_S):
        for count in list(counts):
            share, more = divmod(count, reader.texts)
            lengths = [share + (one < more) for one in range(reader.texts)]
            began = time.perf_counter()
            logits = reader.try_together(text[prefix:], prefix, lengths, count)
            _finish(logits[0])
            seconds[count].append(time.perf_counter() - began)
            if not all(torch.equal(rows, alone[: len(rows)]) for rows in logits):
                counts.remove(count)
        rounds += 1
    if len(counts) < 2:
        return None
    return JointRows(tuple(counts), _rising([min(seconds[count]) for count in counts]), reader.rows.path_s)


def joint_candidates(rows: RowPlan, texts: int) -> list[int]:
    """Row counts worth trying: up to several rows for each of so many texts. Products over blocks of rows are often
    made for multiples of 4 or 6."""
    steps = (*rows.safe, 18, 20, 24, 28, 30, 36, 40, 48, 60, 72, 84, 96, 120, 144, 168, 192, 240, 288)
    widest = min(texts * rows.most, max(2 * LIMIT, ROWS_A_TEXT * texts))
    return [count for count in steps if count <= widest]


def leaf_costs(reader: Any, vocabulary: int) -> tuple[float, ...]:
    """Seconds of a drafter's forward of 1, 2, ... `LEAVES` leaves."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(vocabulary, (2 * _PREFIX,), generator=generator).tolist()
    costs = []
    reader.read_leaves(text, [()])
    for count in range(1, LEAVES + 1):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            _finish(reader.read_leaves(text, [(token,) for token in range(count)]))
            seconds.append(time.perf_counter() - began)
        costs.append(min(seconds))
    return tuple(costs)


def _agreeing(logits: dict[int, list[Tensor]], reference: int) -> tuple[int, ...]:
    """The counts whose rows have the bits of the same rows of `reference`, wherever in the pass they stand."""
    early, late = logits[reference]
    shift = _OFFSETS[1] - _OFFSETS[0]

    def agrees(count: int) -> bool:
        mine, later = logits[count]
        return _same(mine, early) and _same(later, late) and _same(mine[shift:], later)

    return tuple(count for count in range(LEAST, LIMIT + 1) if agrees(count))


def _same(a: Tensor, b: Tensor) -> bool:
    shared = min(len(a), len(b))
    return torch.equal(a[:shared], b[:shared])


def _finish(rows: Tensor) -> None:
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)


def remembered(key: dict[str, object], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`find()`, or what it said the last time on this machine for this `key` and these versions."""
    versions = [torch.__version__, transformers.__version__, platform.processor(), torch.get_num_threads()]
    name = hashlib.sha256(json.dumps([key, versions, _processor()], sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "rows" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = find()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    return found


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))][:2]
    return "".join(flags)


def cache_folder() -> Path:
    """The user's cache directory for what this project computes once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pearl"
