"""The formulas of `pearl.core.theory`, against their known values, their order, and direct simulation of the
processes."""

import math
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pearl.core.theory import (
    best_gamma,
    speedup_pearl,
    speedup_sd,
    table,
    tokens_per_pass_ceiling,
    tokens_per_pass_chain_ceiling,
    tokens_per_pass_sd,
)
from pearl.errors import UsageError

ACCEPTANCES = st.floats(0.0, 1.0)
RATIOS = st.floats(0.05, 100.0)
GAMMAS = st.integers(0, 32)
GRID_A = [i / 50 for i in range(51)]
GRID_C = [0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.6, 3.0, 5.0, 8.0, 13.0, 40.0]


def walk(chain: list[bool]) -> int:
    """How many guesses of `chain` the target goes through: those before the first wrong one."""
    return next((depth for depth, right in enumerate(chain) if not right), len(chain))


def simulated_sd(a: float, c: float, gamma: int, rounds: int) -> tuple[float, float]:
    """Tokens a pass and speed-up of lock-step rounds, with one coin for each guess."""
    rng = random.Random(0)
    tokens = sum(walk([rng.random() < a for _ in range(gamma)]) + 1 for _ in range(rounds))
    return tokens / rounds, tokens / (rounds * (1 + gamma / c))


def simulated_pearl(a: float, c: float, passes: int) -> float:
    """Tokens a pass of a free-running chain: two clocks, one coin for each guess, and no knowledge of any state."""
    rng = random.Random(0)
    chain: list[bool] = []  # whether each guess below the root is right
    lost = False  # the forward in flight started from a leaf that no longer exists
    ends, tokens = 0.37 / c, 0
    for now in range(1, passes + 1):
        offered = chain[:]
        while ends < now:
            if not lost:
                chain.append(rng.random() < a)
            lost = False
            ends += 1 / c
        accepted = walk(offered)
        tokens += accepted + 1
        if accepted == len(offered) < len(chain) and chain[accepted]:
            chain = chain[accepted + 1 :]
        else:
            chain, lost = [], True
    return tokens / passes


@given(GAMMAS)
def test_a_drafter_that_is_never_right_still_leaves_one_token_a_pass(gamma: int) -> None:
    assert tokens_per_pass_sd(0.0, gamma) == 1.0


@given(GAMMAS)
def test_a_perfect_drafter_gives_its_block_and_the_bonus(gamma: int) -> None:
    assert tokens_per_pass_sd(1.0, gamma) == gamma + 1
    assert tokens_per_pass_sd(1.0 - 1e-14, gamma) == pytest.approx(gamma + 1)


@given(ACCEPTANCES, GAMMAS)
def test_tokens_a_pass_are_the_sum_of_the_chances_to_reach_each_guess(a: float, gamma: int) -> None:
    assert tokens_per_pass_sd(a, gamma) == pytest.approx(sum(a**i for i in range(gamma + 1)), rel=1e-12)


@pytest.mark.parametrize(("a", "c", "gamma"), [(0.5, 2.6, 1), (0.8, 5.0, 4), (0.92, 2.6, 5)])
def test_the_sd_formulas_agree_with_the_simulated_process(a: float, c: float, gamma: int) -> None:
    tokens, speedup = simulated_sd(a, c, gamma, rounds=40_000)
    assert tokens_per_pass_sd(a, gamma) == pytest.approx(tokens, rel=0.015)
    assert speedup_sd(a, c, gamma) == pytest.approx(speedup, rel=0.015)


@pytest.mark.parametrize("a", [0.3, 0.7, 0.92, 1.0])
@pytest.mark.parametrize("c", [0.7, 1.3, 2.0, 2.6, math.pi, 8.0])
def test_the_pearl_figure_agrees_with_the_simulated_process(a: float, c: float) -> None:
    assert speedup_pearl(a, c) == pytest.approx(simulated_pearl(a, c, passes=20_000), rel=0.02)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.5, 0.7, 0.92])
def test_a_chain_with_an_instant_drafter_reaches_exactly_its_ceiling(a: float) -> None:
    assert speedup_pearl(a, 1e4) == pytest.approx(tokens_per_pass_chain_ceiling(a), rel=1e-9)
    assert tokens_per_pass_chain_ceiling(a) == pytest.approx(simulated_pearl(a, 100.0, passes=8_000), rel=0.04)


@given(ACCEPTANCES, RATIOS)
def test_pearl_stays_below_its_ceilings_and_never_below_the_target_alone(a: float, c: float) -> None:
    speedup = speedup_pearl(a, c)
    assert 1.0 - 1e-9 <= speedup <= tokens_per_pass_chain_ceiling(a) * (1 + 1e-9)
    assert tokens_per_pass_chain_ceiling(a) <= tokens_per_pass_ceiling(a)
    assert speedup <= max(1.0, c) * (1 + 1e-3)  # a drafted token is a forward; c is rounded to a fraction


@settings(deadline=None)
@given(ACCEPTANCES, ACCEPTANCES, RATIOS, GAMMAS)
def test_better_guesses_never_cost_speed(a: float, b: float, c: float, gamma: int) -> None:
    low, high = sorted((a, b))
    assert tokens_per_pass_sd(low, gamma) <= tokens_per_pass_sd(high, gamma) * (1 + 1e-12)
    assert speedup_sd(low, c, gamma) <= speedup_sd(high, c, gamma) * (1 + 1e-12)
    assert speedup_pearl(low, c) <= speedup_pearl(high, c) * (1 + 1e-9)
    assert tokens_per_pass_ceiling(low) <= tokens_per_pass_ceiling(high)
    assert tokens_per_pass_chain_ceiling(low) <= tokens_per_pass_chain_ceiling(high)


@settings(deadline=None)
@given(ACCEPTANCES, RATIOS, RATIOS)
def test_a_faster_drafter_never_costs_speed(a: float, c: float, d: float) -> None:
    low, high = sorted((c, d))
    assert speedup_sd(a, low, 4) <= speedup_sd(a, high, 4)
    assert speedup_pearl(a, low) <= speedup_pearl(a, high) * (1 + 1e-9)


def test_the_best_block_grows_with_acceptance_and_with_the_speed_ratio() -> None:
    best = [[best_gamma(a, c) for c in GRID_C] for a in GRID_A]
    assert all(row == sorted(row) for row in best)
    assert all(list(column) == sorted(column) for column in zip(*best, strict=True))
    assert best[0] == [1] * len(GRID_C)
    assert best_gamma(1.0, 2.6) == 16


def test_the_best_block_is_no_worse_than_any_other() -> None:
    for a in GRID_A:
        for c in GRID_C:
            best = speedup_sd(a, c, best_gamma(a, c))
            assert all(best >= speedup_sd(a, c, gamma) for gamma in range(1, 17))


def test_speculation_loses_where_guesses_are_poor_or_the_drafter_is_slow() -> None:
    assert speedup_sd(0.1, 2.0, 1) < 1.0
    assert speedup_sd(0.95, 0.9, best_gamma(0.95, 0.9)) < 1.0
    assert speedup_sd(0.92, 2.6, best_gamma(0.92, 2.6)) > 1.0


@given(ACCEPTANCES, RATIOS)
@example(0.5, 2.01)
@example(0.5, 1.99)
def test_speculation_pays_exactly_where_the_best_block_gains(a: float, c: float) -> None:
    if abs(a * c - 1.0) > 1e-9:
        assert (a * c > 1.0) == (speedup_sd(a, c, best_gamma(a, c)) > 1.0)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_a_chain_drafted_no_faster_than_the_target_reads_gains_nothing(a: float) -> None:
    assert speedup_pearl(a, 0.3) == speedup_pearl(a, 1.0) == 1.0


@pytest.mark.parametrize("c", [1.5, 2.6, 7.0])
def test_a_perfect_drafter_makes_pearl_as_fast_as_the_drafter(c: float) -> None:
    assert speedup_pearl(1.0, c) == pytest.approx(c)


def test_a_chain_that_never_waits_can_lose_to_lock_step_where_drafting_is_cheap_and_poor() -> None:
    assert speedup_pearl(0.3, 30.0) < speedup_sd(0.3, 30.0, best_gamma(0.3, 30.0))
    assert speedup_pearl(0.92, 2.6) > speedup_sd(0.92, 2.6, best_gamma(0.92, 2.6))


@pytest.mark.parametrize(("a", "c"), [(-0.1, 2.0), (1.1, 2.0), (math.nan, 2.0), (0.5, 0.0), (0.5, math.inf)])
def test_figures_outside_the_model_are_refused(a: float, c: float) -> None:
    for figure in (speedup_pearl, best_gamma):
        with pytest.raises(UsageError):
            figure(a, c)


def test_blocks_outside_the_model_are_refused() -> None:
    with pytest.raises(UsageError):
        tokens_per_pass_sd(0.5, -1)


def test_the_page_shows_the_table_that_the_code_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanations" / "theory.md"
    assert table() in page.read_text(encoding="utf-8")
