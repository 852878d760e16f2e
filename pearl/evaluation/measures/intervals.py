"""Intervals of 95 %: percentiles of a bootstrap over problems (Efron and Tibshirani 1993, chapter 13).

A problem is drawn with all its samples, repeats and turns, which are no independent draws. Whatever is a total over a
total, or a ratio of two such, has one. The seed is fixed: the same facts give the same interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

DRAWS = 1000
FEWEST = 3  # problems; of fewer there is no interval

Totals = dict[str, np.ndarray]  # of each problem: what is added up


def gathered(facts: Iterable[tuple[str, list[float]]]) -> Totals:
    """Adds up the facts of each problem, given with its name."""
    totals: Totals = {}
    for problem, some in facts:
        totals[problem] = totals.get(problem, 0) + np.array(some, dtype=float)
    return totals


def band(above: np.ndarray, below: np.ndarray) -> np.ndarray | None:
    """Intervals [2, points] of many shares at once: totals of `above` [problems, points] over those of `below`
    [problems]. None of fewer than three problems."""
    problems = len(below)
    if problems < FEWEST:
        return None
    drawn = np.random.default_rng(0).multinomial(problems, np.full(problems, 1 / problems), DRAWS)  # how often each
    return np.percentile((drawn @ above) / (drawn @ below)[:, None], [2.5, 97.5], axis=0)


def interval(totals: Totals, figure: Callable[..., Any]) -> list[float] | None:
    """Of `figure(*totals)`, a function of arrays. None of fewer than three problems, or where it has no value in a draw
    (a total to divide by is nought)."""
    if len(totals) < FEWEST:
        return None
    from scipy.stats import DegenerateDataWarning, bootstrap  # takes a second to load

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # no value in a draw: said by None
        drawn = bootstrap(
            tuple(np.stack([*totals.values()], axis=1)),
            lambda *columns, axis=-1: figure(*(one.sum(axis) for one in columns)),
            paired=True,
            vectorized=True,
            n_resamples=DRAWS,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
    return [low, high] if np.isfinite([low, high]).all() else None
