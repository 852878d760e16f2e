"""The speed-up to expect of every mode, from one recorded run, or from a few numbers.

    pearl predict RUN_FOLDER          a folder that an evaluation has written
    pearl predict --a 0.8 --c 3       acceptance a and speed ratio c, as in pearl.core.theory

Knows: which modes to ask about, and how to say the answer. Refuses to know: how decoding works. A prediction is the
figures (`pearl.evaluation.metrics`) of a simulated run (`pearl.predict.simulation`), in which the real loops,
schedule and controller meet the guesses of the recorded one (`pearl.predict.replay`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pearl.config.synthetic import SyntheticDraft
from pearl.core.records import SampleKey
from pearl.core.schedule import Schedule
from pearl.core.token_buckets import LEAVES, LIMIT, TokenBuckets
from pearl.errors import UsageError
from pearl.evaluation import metrics
from pearl.predict.beside import SourceBeside
from pearl.predict.replay import Case, missed, sureness
from pearl.predict.script import DraftedToken, Script, Times
from pearl.predict.simulation import simulate

MODES = ("ar", "sd", "sd:2", "sd:4", "pearl", "pearl:4", "pearl-no-pre", "pearl-no-post", "tree")


def predict(
    case: Case, modes: Iterable[str], seed: int = 0, synthetic: SyntheticDraft | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of each mode, as `metrics.summarise` names them. Raises `UsageError` for an unknown mode.

    `synthetic`: drafts in place of what the case says of the drafter."""
    schedules = {mode: Schedule.of(mode, **case.settings) for mode in ("ar", *modes)}
    if any(schedule.mode == "ar-all" for schedule in schedules.values()):
        raise UsageError("ar-all runs on other cores or devices than what was recorded: leave it out.")
    runs: dict[str, metrics.Runs] = {}
    for mode, schedule in schedules.items():
        scripts = list(case.scripts.values())
        texts = simulate(schedule, scripts, case.times, case.own, seed, synthetic=synthetic, beside=case.beside)
        runs[mode] = dict(zip(case.scripts, texts, strict=True))
    return metrics.summarise(runs)


def by_hand(
    a: float,
    c: float,
    latency: float = 0.0,
    tokens: int = 2000,
    row_cost: float = 0.0,
    seed: int = 0,
    beside: tuple[float, float, int] | None = None,
) -> Case:
    """One text whose guesses are right with chance `a`, each for itself; a pass takes 1, a drafter forward 1/c.

    Every row after the first adds `row_cost` of a forward, on both sides. `beside`: of a source in the target's
    process how often it is right, the part of a pass that its forward takes (0: it answers at once), and how many
    tokens it then guesses.
    """
    if not 0.0 < c < math.inf:
        raise UsageError(f"The speed ratio c is target pass time / drafter forward time, so give c > 0 (got {c}).")
    if not (0 <= latency < math.inf and 0 <= row_cost < math.inf):
        raise UsageError("Give a latency and a cost of rows that are numbers from 0.")
    shape = [1 + row_cost * row for row in range(LIMIT)]
    rows = TokenBuckets(tuple(range(1, LIMIT + 1)), tuple(shape))
    draft_s = tuple(cost / c for cost in shape[:LEAVES])
    case = by_times(a, rows, draft_s, latency, tokens, seed, f"a {a:g}, c {c:g}, latency {latency:g}")
    return case if beside is None else _with_beside(case, *beside, seed)


def _with_beside(case: Case, a: float, cost: float, depths: int, seed: int) -> Case:
    """The same with a source beside the target."""
    if not (0.0 <= a <= 1.0 and 0 <= cost < math.inf and depths >= 1):
        raise UsageError("Of a source beside the target give a chance, a cost that is not negative, a depth from 1.")
    rng = random.Random(f"{seed} beside")
    scripts = {
        key: replace(script, beside=(tuple(_drawn(a, rng) for _ in script.places),))
        for key, script in case.scripts.items()
    }
    source = f"{case.source}; beside the target a {a:g} for {cost:g} of a pass, {depths} tokens"
    return replace(case, scripts=scripts, beside=(SourceBeside("feature", cost, depths),), source=source)


def _drawn(a: float, rng: random.Random) -> DraftedToken:
    """The guesses of one place, the first of which is right with chance `a`."""
    rank = 0 if rng.random() < a else missed(1, rng)
    return DraftedToken(rank, (sureness(rank == 0, a, rng),))


def by_times(
    a: float, rows: TokenBuckets, draft_s: Sequence[float], latency: float, tokens: int, seed: int, source: str
) -> Case:
    """The same of a pass and a drafter forward that take so many seconds by their rows, each side on its own device."""
    if not 0.0 <= a <= 1.0:
        raise UsageError(f"The acceptance a is a probability, so give a number from 0 to 1 (got {a}).")
    if tokens < 1:
        raise UsageError("Give at least one token.")
    rng = random.Random(seed)
    places = [_drawn(a, rng) for _ in range(tokens)]
    # the drafter's prompt takes part of a forward more than one, so that the two clocks do not strike together
    script = Script(1, tuple(places), rows.cost(1), 1.37 * draft_s[0])
    pass_s = tuple(rows.cost(count) for count in range(1, LIMIT + 1))
    times = Times(rows, pass_s, tuple(draft_s), tuple(draft_s), latency, path_s=rows.path_s)
    return Case({SampleKey("by hand"): script}, times, 0.0, {}, {}, source)


HEAD = ("mode", "x ar", "tok/pass", "hits", "target", "drafter", "measured", "ratio")


def cells(case: Case, figures: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """The lines of a table, below `HEAD`."""
    lines = []
    for mode, values in figures.items():
        measured = case.measured.get(mode)
        speeds = [values[name] for name in ("speedup_vs_ar", "tokens_per_pass")]
        shares = [values[name] for name in ("hit_rate", "target_busy", "drafter_busy")]
        beside = [measured, values["speedup_vs_ar"] / measured if measured else None]
        lines.append([mode, *map(_cell, speeds), *(_cell(share, "{:.0%}") for share in shares), *map(_cell, beside)])
    return lines


def _cell(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)
