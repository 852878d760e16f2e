"""Sampled text follows the target's exact distribution, whoever drafts and whenever the guesses arrive.

Every text of a few tokens has a probability that can be worked out by hand from the target's table. Many short texts
are decoded with a drafter, one seed each, and compared with it by a chi-square test. The seeds are fixed, so a test
that passes always passes. The last part breaks the sampling on purpose, and the same test has to notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from distribution import (
    ALPHA,
    DRAFT,
    PLAIN,
    PROMPT,
    REJECTION,
    SCRIPTS,
    TARGET,
    TEXTS,
    VOCABULARY,
    chance_of,
    exact,
    sample,
)
from scipy.stats import chisquare
from toys import EAGER, TableModel, letters

from pearl.core.params import SamplingParams
from pearl.core.sampling import methods, noise
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.trie import Node, Proposal
from pearl.drafters import model
from pearl.drafters.draft_source import Chain, DraftSource
from pearl.drafters.model import ModelSource
from pearl.drafters.suffix import SuffixSource
from pearl.roles.target import Target

pytestmark = pytest.mark.slow

MANY = 1200  # where what is compared is one number


class Certain(DraftSource):
    """Guesses for certain: the next token is a function of the last one. Two tokens a turn."""

    def propose(self, text: Sequence[int], room: int) -> Chain:
        first = (3 * text[-1] + 1) % VOCABULARY
        return [(first, ()), ((3 * first + 1) % VOCABULARY, ())][:room]


def suffix_source() -> DraftSource:
    return SuffixSource(most=3)


CUTS: dict[str, dict[str, float]] = {
    "nothing": {},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "all of them": {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
}


def p_value(
    params: SamplingParams,
    mode: str = "sd",
    gamma: int | str = 2,
    script: str = "when waited for",
) -> float:
    drawn = sample(ModelSource(DRAFT), Schedule.of(mode, gamma), params, SCRIPTS[script])
    return chance_of(drawn.counts, exact(params))


def sample_alone(model: TableModel, params: SamplingParams) -> Counter[tuple[int, ...]]:
    target = Target(model)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(TEXTS):
        own = replace(params, seed=seed)
        stopper = Stopper(own, (), letters)
        list(target.decode(PROMPT, Schedule.of("ar"), own, stopper))
        counts[tuple(stopper.tokens[1:])] += 1
    return counts


def test_the_comparison_itself_tells_distributions_apart():
    """The drafter's distribution is not the target's: otherwise nothing below would mean anything."""
    assert chance_of(sample_alone(DRAFT, PLAIN), exact(PLAIN)) < 1e-50


@pytest.mark.parametrize("cut", CUTS)
def test_the_target_alone_draws_from_its_distribution(cut: str):
    """So does every seeded text: it is this text, token for token (test_lossless)."""
    params = replace(PLAIN, **CUTS[cut])
    assert chance_of(sample_alone(TARGET, params), exact(params)) > ALPHA


@pytest.mark.parametrize(
    "params, mode, gamma, script",
    [
        (PLAIN, "sd", 2, "when waited for"),
        (PLAIN, "pearl", "auto", "at any time"),
        (REJECTION, "sd", 2, "when waited for"),
        (REJECTION, "pearl", "auto", "at any time"),
        (REJECTION, "pearl", 2, "late"),
        (REJECTION, "pearl-no-post", 1, "at any time"),
    ],
    ids=lambda value: value.method if isinstance(value, SamplingParams) else str(value),
)
def test_with_a_drafter_the_text_follows_the_targets_distribution(
    params: SamplingParams, mode: str, gamma: int | str, script: str
):
    drawn = sample(ModelSource(DRAFT), Schedule.of(mode, gamma), params, SCRIPTS[script])
    assert chance_of(drawn.counts, exact(params)) > ALPHA
    # every way that a pass can end is among them
    assert any(p.tested > p.accepted for p in drawn.passes), "a wrong guess"
    assert any(p.accepted == p.offered > 0 for p in drawn.passes), "a pass accepted to its end"
    if mode == "pearl":
        assert any(p.tested > p.offered for p in drawn.passes), "a guess that came while the pass ran"
        assert any(p.hit for p in drawn.passes)


def test_what_is_cut_is_never_said_and_the_rest_keeps_its_share():
    assert p_value(replace(REJECTION, **CUTS["all of them"]), "pearl", "auto", "at any time") > ALPHA


def favours_the_third(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.tensor([0.0, 0.0, 0.7 * (tokens[-1] % 2), 0.0])


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.6, "presence_penalty": 0.8, "logit_bias": {1: 0.9}},
        {"suppress_tokens": [2], "no_repeat_ngram_size": 2, "frequency_penalty": 0.5},
        {"logits_processors": [favours_the_third], "repetition_penalty": 1.4, "top_k": 3},
    ],
    ids=lambda processors: next(iter(processors)),
)
def test_rejection_draws_from_the_distribution_that_processors_leave(processors: dict[str, Any]):
    """Whether the drafter, whose guesses are processed too, knows all of them, or, of callables, none."""
    params = replace(REJECTION, **processors)
    drawn = sample(ModelSource(DRAFT), Schedule.of("pearl", "auto"), params, SCRIPTS["at any time"])
    assert any(p.tested > p.accepted > 0 for p in drawn.passes)
    assert chance_of(drawn.counts, exact(params)) > ALPHA
    plain = exact(REJECTION)
    assert all(plain[text] for text in drawn.counts) and chance_of(drawn.counts, plain) < ALPHA, "they matter"


@pytest.mark.parametrize("source", [Certain, suffix_source])
def test_guesses_made_for_certain_shift_nothing(source: Callable[[], DraftSource]):
    drawn = sample(source(), Schedule.of("pearl", "auto"), REJECTION, SCRIPTS["at any time"])
    assert chance_of(drawn.counts, exact(REJECTION)) > ALPHA
    assert any(p.tested > p.accepted > 0 for p in drawn.passes)


def test_a_drafter_that_sends_only_its_likeliest_tokens_shifts_nothing(monkeypatch: pytest.MonkeyPatch):
    """q is cut to a few tokens before it is drawn from, so what is sent is all that the residual needs."""
    monkeypatch.setattr(methods, "SUPPORT", 2)
    assert p_value(REJECTION) > ALPHA


def test_rejection_accepts_more_than_the_seeded_coupling_and_neither_less_than_its_bound():
    """With d the total variation distance: rejection 1 - d; seeded at least (1 - d) / (1 + d) (Daliri et al. 2024)."""
    p = TARGET.after(PROMPT).double().softmax(-1)
    q = DRAFT.after(PROMPT).double().softmax(-1)
    d = float((p - q).abs().sum()) / 2
    accepted = {}
    for params in (PLAIN, REJECTION):
        one = replace(params, max_new_tokens=1)
        passes = sample(ModelSource(DRAFT), Schedule.of("pearl"), one, EAGER, MANY).passes
        assert all(x.tested == 1 for x in passes)
        accepted[params.method] = sum(x.accepted for x in passes) / MANY
    error = 3 / MANY**0.5 / 2
    assert abs(accepted["rejection"] - (1 - d)) < error
    assert (1 - d) / (1 + d) - error < accepted["seeded"] < 1 - d + error


# Break the sampling on purpose: the comparison has to fail.


def test_without_the_residual_the_distribution_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "residual", lambda p, q: p)
    assert p_value(REJECTION) < ALPHA


def test_with_a_q_that_is_not_what_was_drawn_from_the_distribution_is_wrong(monkeypatch: pytest.MonkeyPatch):
    honest = methods.propose

    def propose(logits: torch.Tensor, params: SamplingParams, position: int) -> tuple[int, Proposal]:
        token, proposal = honest(logits, params, position)
        return token, tuple((t, 1 / len(proposal)) for t, _ in proposal)

    monkeypatch.setattr(model, "propose", propose)
    assert p_value(REJECTION) < ALPHA


def test_one_number_for_all_positions_makes_the_distribution_wrong(monkeypatch: pytest.MonkeyPatch):
    stream = noise._stream
    monkeypatch.setattr(noise, "_stream", lambda seed, position, purpose: stream(seed, 0, purpose))
    assert p_value(PLAIN) < ALPHA


def judged(p: Sequence[float], q: Sequence[float]) -> float:
    """The comparison at one position, for guesses drawn from q."""
    counts = [0] * len(p)
    for seed in range(MANY):
        token, proposal = methods.propose(torch.tensor(q).log(), replace(REJECTION, seed=seed), position=5)
        counts[methods.accept_or_resample(torch.tensor(p).log(), Node(token, 5, proposal=proposal), seed)] += 1
    return float(chisquare(counts, [MANY * x for x in p]).pvalue)


@pytest.mark.parametrize("shared", [None, "ACCEPT", "RESIDUAL"])
def test_one_stream_for_two_purposes_makes_the_distribution_wrong(shared: str | None, monkeypatch: pytest.MonkeyPatch):
    """The test of a guess, or the choice of what replaces it, would know the number that the guess was drawn with."""
    if shared:
        monkeypatch.setattr(noise, shared, noise.DRAFT)
    chance = judged(p=[0.1, 0.45, 0.45], q=[0.8, 0.19, 0.01])
    assert chance < ALPHA if shared else chance > ALPHA
