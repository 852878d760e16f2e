"""What a forward of so many rows costs, where it was measured and beyond."""

from __future__ import annotations

import pytest

from pearl.core.token_buckets import LIMIT, TokenBuckets, extended
from pearl.predict.script import Times

FEW = (1.0, 1.1, 1.2, 2.0)  # the last step is twice the mean one


@pytest.mark.parametrize("rows, seconds", [(1, 1.0), (4, 2.0), (5, 2.0 + 1 / 3), (7, 3.0)])
def test_rows_beyond_those_measured_cost_the_mean_step_each(rows: int, seconds: float):
    assert extended(FEW, rows) == pytest.approx(seconds)


def test_rows_beyond_those_measured_are_never_cheaper():
    assert extended((2.0, 1.0), 5) == 1.0
    assert extended((2.0,), 5) == 2.0


@pytest.mark.parametrize("rows", range(1, 2 * LIMIT))
def test_a_simulated_drafter_takes_the_seconds_that_a_real_one_expects(rows: int):
    times = Times(TokenBuckets((2,), (1.0,) * LIMIT), (1.0,), FEW, FEW, 0.0)
    assert times.draft(rows) == extended(FEW, rows)
