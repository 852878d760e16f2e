"""Intervals of a run's figures: of which totals of each problem a figure is made. `intervals` has the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pearl.core.records import GenerationStats, SampleKey
from pearl.evaluation.measures import acceptance, intervals

TIMES = 200  # points of a curve of latencies
Runs = Mapping[SampleKey, GenerationStats]


def of_figures(runs: Runs, ar: Runs) -> dict[str, Any]:
    """Of the figures that are compared most."""
    alone = intervals.gathered(
        (key.task, [len(text.tokens), text.seconds, *_verified(text), text.latency_s, text.energy_j or 0.0])
        for key, text in runs.items()
    )
    return {
        "speedup_interval_95": of_speedup(runs, ar),
        "tokens_per_second_interval_95": intervals.interval(alone, lambda n, s, *_: n / s),
        "ms_per_token_of_each_interval_95": intervals.interval(alone, lambda n, s, a, v, mine, _: 1e3 * mine / n),
        "acceptance_length_interval_95": intervals.interval(alone, lambda n, s, a, v, *_: 1 + a / v)
        if any(figures[3] for figures in alone.values())
        else None,
        "millijoules_per_token_interval_95": intervals.interval(alone, lambda n, *rest: 1e3 * rest[-1] / n)
        if all(text.energy_j is not None for text in runs.values())
        else None,
    }


def of_speedup(runs: Runs, others: Runs) -> list[float] | None:
    beside = intervals.gathered(
        (key.task, [fact for text in (runs[key], others[key]) for fact in (sum(text.committed), text.seconds)])
        for key in runs
        if key in others
    )
    return intervals.interval(beside, lambda n, s, their_n, their_s: (n / s) / (their_n / their_s))


def by_depth(runs: Runs, depths: int) -> list[list[float] | None]:
    """Of the acceptance at each depth."""
    counts = intervals.gathered(
        (key.task, [float(fact) for pair in _padded(acceptance.by_depth(text.passes), depths) for fact in pair])
        for key, text in runs.items()
    )
    return [
        intervals.interval(
            {task: facts[2 * at : 2 * at + 2] for task, facts in counts.items()}, lambda right, read: right / read
        )
        for at in range(depths)
    ]


def shares_by_latency(runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """At so many milliseconds a token after the first (a pass is spread evenly over what it committed): the share of
    tokens that took at most that, and below and above [2, times] the interval of that share. None without tokens."""
    passes = [
        (key.task, 1e3 * one.seconds / one.committed, one.committed)
        for key, text in runs.items()
        for one in text.passes[1:]
        if one.committed
    ]
    if not passes:
        return None
    names = {task: number for number, task in enumerate(dict.fromkeys(task for task, *_ in passes))}
    took, weights = np.array([ms for _, ms, _ in passes]), np.array([count for *_, count in passes], dtype=float)
    times = np.quantile(took, np.linspace(0, 1, TIMES), weights=weights, method="inverted_cdf")
    counts = np.zeros((len(names), len(times) + 1))  # of each problem: tokens at most so slow, and all of them
    for task, ms, count in passes:
        counts[names[task], np.searchsorted(times, ms) :] += count
    shares = counts[:, :-1].sum(0) / counts[:, -1].sum()
    return times, shares, intervals.band(counts[:, :-1], counts[:, -1])


def _padded(pairs: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    return [*pairs, *[(0, 0)] * (length - len(pairs))]


def _verified(text: GenerationStats) -> list[int]:
    """Guesses accepted, and passes that verified any."""
    return [sum(p.accepted_rows for p in text.passes), sum(p.verified > 0 for p in text.passes)]
