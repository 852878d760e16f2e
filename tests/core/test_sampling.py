"""What is kept is what transformers keeps, noise is a function, and a guess is drawn from what is sent with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare, gumbel_r, kstest, uniform
from torch import Tensor
from toys import examples
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pearl.core.messages import Guess, Nodes
from pearl.core.params import SamplingParams
from pearl.core.sampling import methods, noise
from pearl.core.sampling.methods import Picker, accept_or_resample, noisy_argmax, propose, ranked, residual, warp
from pearl.core.trie import Node
from pearl.errors import NonFiniteLogits, UsageError
from pearl.wire.codec import decode, encode

ALPHA = 1e-4
SEEDS = st.integers(0, (1 << 63) - 1)
POSITIONS = st.integers(0, 1 << 20)
PURPOSES = st.sampled_from([noise.PICK, noise.DRAFT, noise.ACCEPT, noise.RESIDUAL])


def random_logits(seed: int, size: int, scale: float) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def all_logits(draw: st.DrawFn, most: int = 900) -> Tensor:
    """Up to more tokens than top-p looks at first, flat or peaked, in the dtypes that models have."""
    size = draw(st.one_of(st.integers(1, 12), st.integers(500, most)))
    logits = random_logits(draw(st.integers(0, 10_000)), size, draw(st.sampled_from([0.01, 1.0, 8.0])))
    return logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


CUTS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 3.0),
    top_k=st.integers(0, 1000),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


# what is cut


def by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    scores = logits.float()[None]
    warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if (params.top_p or 1) < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores[0]


def on_the_edge(logits: Tensor, params: SamplingParams) -> bool:
    """Whether rounding may decide what is kept: equal logits, or a probability right at top-p or min-p."""
    scores = (logits.double() / params.temperature).sort(descending=True).values
    if 0 < params.top_k < len(scores):
        scores = scores[: params.top_k]
    p = scores.softmax(-1)
    before = p.cumsum(-1) - p
    near_p = (before - params.top_p).abs().min() < 1e-5
    near_floor = (p / p[0] - params.min_p).abs().min() < 1e-5
    return bool(near_p or near_floor) or len(logits.unique()) < len(logits)


@examples(300)
@given(all_logits(), CUTS)
def test_warp_keeps_what_transformers_keeps(logits: Tensor, params: SamplingParams):
    assume(not on_the_edge(logits, params))
    ours, theirs = warp(logits[None], params)[0], by_transformers(logits, params)
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert torch.equal(ours, theirs)


@examples(100)
@given(all_logits(), CUTS)
def test_warp_keeps_a_likeliest_token_and_changes_no_logit_that_it_keeps(logits: Tensor, params: SamplingParams):
    scores = warp(logits[None], params)[0]
    kept, before = ~scores.isinf(), logits.float() / params.temperature
    assert torch.equal(scores[kept], before[kept]) and scores.dtype == torch.float32
    assert scores.max() == before.max()


def test_warp_keeps_a_nucleus_larger_than_it_looks_for_first():
    logits = random_logits(0, 5000, 0.1)
    for top_p in (0.05, 0.5, 0.99):
        params = SamplingParams(temperature=1.0, top_p=top_p)
        assert torch.equal(warp(logits[None], params)[0], by_transformers(logits, params))


@st.composite
def tied_rows(draw: st.DrawFn) -> Tensor:
    """Rows of few different logits, so that several tokens lie at the edge of a nucleus."""
    size = draw(st.one_of(st.integers(1, 12), st.integers(500, 900)))
    seed, levels = draw(st.integers(0, 10_000)), draw(st.integers(1, 4))
    return torch.randint(levels, (draw(st.integers(1, 4)), size), generator=torch.Generator().manual_seed(seed)).float()


@examples(300)
@given(tied_rows(), st.one_of(st.floats(0.001, 0.999), st.integers(1, 9).map(lambda tenths: tenths / 10)))
def test_a_nucleus_is_the_fewest_first_tokens_that_reach_top_p_however_it_is_computed(logits: Tensor, top_p: float):
    params = SamplingParams(temperature=1.0, top_p=top_p)
    together = warp(logits, params)
    for row, scores in zip(logits, together, strict=True):
        assert torch.equal(warp(row[None], params)[0], scores), "the rows beside it are of no account"
        units = [int(p * 2.0**40) for p in row.softmax(-1).tolist()]
        order = sorted(range(len(row)), key=lambda token: (-units[token], token))
        ahead = itertools.accumulate([units[token] for token in order], initial=0)
        nucleus = {token for token, mass in zip(order, ahead, strict=False) if mass < math.ceil(top_p * 2**40)}
        assert set(scores.isfinite().nonzero().flatten().tolist()) == nucleus
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(methods, "_FIRST", logits.shape[1])  # as on a GPU, which sorts all at once
        assert torch.equal(warp(logits, params), together)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-46, 1e-300])
def test_the_lower_the_temperature_the_greedier(temperature: float):
    logits = torch.tensor([1.0, 30.0, 29.0])
    try:
        params = SamplingParams(temperature=temperature)
    except UsageError:
        return  # refused: fine
    assert noisy_argmax(warp(logits[None], params)[0], 1, 2, noise.PICK) == 1


# noise


@given(SEEDS, POSITIONS, PURPOSES, st.lists(st.integers(0, 300_000), min_size=1, max_size=5))
def test_noise_is_a_pure_function_of_each_token(seed: int, position: int, purpose: int, tokens: list[int]):
    together = noise.gumbel(seed, position, purpose, torch.tensor(tokens))
    noise.gumbel(seed + 1, position + 1, purpose, torch.tensor(tokens))  # nothing that a call leaves behind
    alone = [float(noise.gumbel(seed, position, purpose, torch.tensor([token]))) for token in tokens]
    assert together.tolist() == alone
    assert together.dtype == torch.float64 and together.isfinite().all()


@given(SEEDS, POSITIONS, PURPOSES, st.integers(0, 300_000))
def test_tensors_and_python_integers_make_the_same_noise(seed: int, position: int, purpose: int, token: int):
    mask = (1 << 64) - 1
    word = noise._mix((noise._stream(seed, position, purpose) + (token + 1) * noise._GOLDEN) & mask) >> 32
    expected = -math.log(-math.log((word + 0.5) / 2**32))
    assert math.isclose(float(noise.gumbel(seed, position, purpose, torch.tensor([token]))), expected, abs_tol=1e-12)


@given(SEEDS, POSITIONS, PURPOSES)
def test_one_uniform_is_the_vectors_first(seed: int, position: int, purpose: int):
    u = noise.uniform(seed, position, purpose)
    assert 0 < u < 1
    first = float(noise.gumbel(seed, position, purpose, torch.tensor([0])))
    assert math.isclose(-math.log(-math.log(u)), first, abs_tol=1e-12)


def test_the_mixing_function_is_splitmix64():
    """Its first three numbers from seed 1234567, as published with the reference implementation in C."""
    state, numbers = 1234567, []
    for _ in range(3):
        state = (state + noise._GOLDEN) & noise._MASK
        numbers.append(noise._mix(state))
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_gumbel_noise_has_the_gumbel_distribution_along_every_axis():
    tokens = torch.arange(20_000)
    few = torch.arange(1)
    across = {
        "tokens": noise.gumbel(0, 0, noise.PICK, tokens).tolist(),
        "positions": [float(noise.gumbel(0, position, noise.PICK, few)) for position in range(3000)],
        "seeds": [float(noise.gumbel(seed, 0, noise.PICK, few)) for seed in range(3000)],
    }
    for axis, values in across.items():
        assert kstest(values, gumbel_r.cdf).pvalue > ALPHA, axis
    assert kstest([noise.uniform(seed, 3, noise.ACCEPT) for seed in range(3000)], uniform.cdf).pvalue > ALPHA


def test_streams_of_different_purposes_seeds_and_positions_are_unrelated():
    tokens = torch.arange(20_000)
    base = noise.gumbel(5, 7, noise.PICK, tokens)
    others = [(5, 7, noise.DRAFT), (5, 7, noise.ACCEPT), (5, 7, noise.RESIDUAL), (6, 7, noise.PICK), (5, 8, noise.PICK)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, noise.gumbel(*other, tokens)]))[0, 1]
        assert abs(correlation) < 4 / len(tokens) ** 0.5


def test_no_noise_is_louder_than_the_loudest():
    loudest = -math.log(-math.log(1 - 0.5 / 2**32))
    assert loudest < noise.MAX_GUMBEL < loudest + 0.1


@given(SEEDS, POSITIONS, PURPOSES, st.floats(-5, 22))
def test_the_loud_tokens_are_found_without_their_noise(seed: int, position: int, purpose: int, least: float):
    tokens = torch.arange(0, 60_000, 3)
    candidates_above = noise.candidates_above(seed, position, purpose, tokens, least)
    above = tokens[noise.gumbel(seed, position, purpose, tokens) > least]
    assert set(above.tolist()) <= set(candidates_above.tolist()) <= set(tokens.tolist())
    assert least < -3 or len(candidates_above) <= len(above) + 2


@examples(200)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 5.0, 30.0]), SEEDS, POSITIONS, PURPOSES)
def test_leaving_out_tokens_beyond_the_reach_changes_no_pick(
    table: int, scale: float, seed: int, position: int, purpose: int
):
    scores = random_logits(table, 300, scale)
    everything = scores.double() + noise.gumbel(seed, position, purpose, torch.arange(300))
    assert noisy_argmax(scores, seed, position, purpose) == int(everything.argmax())


def test_noisy_argmax_draws_from_the_softmax():
    scores = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    counts = [0] * 5
    for seed in range(4000):
        counts[noisy_argmax(scores, seed, 11, noise.PICK)] += 1
    assert counts[2] == 0
    expected = (scores.double().softmax(-1) * 4000).tolist()
    assert chisquare([c for c in counts if c], [e for e in expected if e]).pvalue > ALPHA


# picking


def test_a_greedy_pick_is_the_argmax_of_its_row():
    logits = random_logits(1, 30, 1.0).reshape(3, 10)
    picker = Picker(SamplingParams(), logits, [4, 5, 6])
    assert [picker.pick(row, Node(0, 4 + row)) for row in range(3)] == logits.argmax(-1).tolist()


WAYS = [dict(), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9), dict(temperature=1.0, method="rejection")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logits_that_are_not_finite_are_an_error_of_target_and_drafter(way, bad):
    """It names the dtype, as float16 that overflows is the common cause. A mask's -inf is none."""
    params, node = SamplingParams(seed=0, **way), Node(0, 8)
    logits = random_logits(0, 40, 1.0).half()
    logits[3] = -math.inf
    assert 0 <= Picker(params, logits[None], [8]).pick(0, node) < 40
    logits[7] = bad
    for ask in (
        lambda: Picker(params, logits[None], [8]).pick(0, node),
        lambda: propose(logits, params, 9),
        lambda: ranked(logits[None], params, [9], 4),
    ):
        with pytest.raises(NonFiniteLogits, match=r"not finite.*float16: use dtype bfloat16 or float32"):
            ask()


@given(st.integers(0, 100), SEEDS)
def test_a_seeded_pick_asks_neither_the_row_nor_the_guesses(table: int, seed: int):
    logits = random_logits(table, 20, 2.0)
    params = SamplingParams(temperature=0.9, seed=seed)
    node = Node(3, 8)
    alone = Picker(params, logits[None], [8]).pick(0, node)
    node.children[5] = Node(5, 9)
    assert Picker(params, torch.stack([-logits, logits]), [7, 8]).pick(1, node) == alone
    assert propose(logits, params, position=9) == (alone, ())  # a drafter with the same distribution guesses it


def test_rejection_accepts_with_the_least_of_one_and_p_over_q():
    """And what is accepted or put in its place follows p."""
    p, q = torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0.6, 0.3, 0.1])
    params = SamplingParams(temperature=1.0, seed=0, method="rejection")
    drawn, accepted, out = [0] * 3, [0] * 3, [0] * 3
    for seed in range(4000):
        token, proposal = propose(q.log(), replace(params, seed=seed), position=2)
        said = accept_or_resample(p.log(), Node(token, 2, proposal=proposal), seed)
        drawn[token] += 1
        accepted[token] += said == token
        out[said] += 1
    for token in range(3):
        chance = min(1.0, float(p[token] / q[token]))
        error = 4 * math.sqrt(max(chance * (1 - chance), 1e-9) / drawn[token])
        assert abs(accepted[token] / drawn[token] - chance) <= error
    assert chisquare(out, (p.double() / p.double().sum() * 4000).tolist()).pvalue > ALPHA


def test_a_guess_of_zero_probability_is_never_accepted():
    scores = torch.tensor([0.0, -torch.inf, 0.0])
    for seed in range(200):
        assert accept_or_resample(scores, Node(1, 3), seed) != 1
        assert accept_or_resample(scores, Node(1, 3, proposal=((1, 0.5), (0, 0.5))), seed) != 1


def test_a_guess_that_is_not_in_what_it_was_drawn_from_is_not_accepted():
    scores = torch.tensor([0.0, 0.0, 0.0])
    said = {accept_or_resample(scores, Node(1, 3, proposal=((0, 0.5), (2, 0.5))), seed) for seed in range(50)}
    assert said == {1}, "what p has more than q is at that token alone"
    assert {accept_or_resample(scores, Node(1, 3, proposal=((0, 0.1),)), seed) for seed in range(50)} == {0, 1, 2}


def test_a_guess_made_for_certain_is_accepted_with_its_probability():
    scores = torch.tensor([0.2, 0.3, 0.5]).log()
    accepted = sum(accept_or_resample(scores, Node(2, 3), seed) == 2 for seed in range(3000))
    assert abs(accepted / 3000 - 0.5) < 4 * 0.5 / 3000**0.5


@given(st.integers(0, 1000))
def test_the_residual_is_what_p_has_more_than_q(table: int):
    p = random_logits(table, 6, 1.0).double().softmax(-1)
    q = random_logits(table + 1, 6, 1.0).double().softmax(-1)
    left = residual(p, dict(enumerate(q.tolist())))
    assert torch.allclose(left, (p - q).clamp(min=0))
    assert torch.isclose(left.sum(), (p - q).abs().sum() / 2)  # the total variation distance


# proposing


@given(all_logits(), CUTS, SEEDS, POSITIONS)
def test_a_proposal_is_a_distribution_over_few_kept_tokens(
    logits: Tensor, params: SamplingParams, seed: int, position: int
):
    params = replace(params, seed=seed, method="rejection")
    token, proposal = propose(logits, params, position)
    tokens, q = [t for t, _ in proposal], [x for _, x in proposal]
    assert token in tokens and len(set(tokens)) == len(tokens) <= methods.SUPPORT
    assert abs(sum(q) - 1) < 1e-6 and min(q) > 0
    assert not warp(logits[None], params)[0, tokens].isinf().any()
    assert propose(logits, params, position) == (token, proposal)


@given(all_logits(), SEEDS)
def test_q_arrives_as_it_was_drawn_from(logits: Tensor, seed: int):
    token, proposal = propose(logits, SamplingParams(temperature=1.0, seed=seed, method="rejection"), 3)
    message = Nodes(1, 0, 2, False, (Guess(1, 0, token, proposal),))
    assert decode(encode(message)) == message


def test_guesses_are_drawn_from_the_q_that_is_sent():
    logits = random_logits(3, 40, 1.5)  # more tokens than are sent
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0, method="rejection")
    drawn = [propose(logits, replace(params, seed=seed), 6) for seed in range(4000)]
    proposal = drawn[0][1]
    assert all(q == proposal for _, q in drawn), "q knows nothing of the seed"
    counts = {token: 0 for token, _ in proposal}
    for token, _ in drawn:
        counts[token] += 1
    assert (
        chisquare(list(counts.values()), [4000 * q / sum(q for _, q in proposal) for _, q in proposal]).pvalue > ALPHA
    )


def test_a_greedy_or_seeded_proposal_sends_no_probability():
    logits = random_logits(3, 40, 1.5)
    assert propose(logits, SamplingParams(), 6) == (int(logits.argmax()), ())
    assert propose(logits, SamplingParams(temperature=1.0, seed=0), 6)[1] == ()


# the drafter's guesses for a tree


@examples(200)
@given(
    all_logits(most=600), CUTS, SEEDS, POSITIONS, st.integers(1, 6), st.sampled_from(["greedy", "seeded", "rejection"])
)
def test_the_first_of_the_ranked_guesses_is_the_one_that_a_chain_would_propose(
    logits: Tensor, params: SamplingParams, seed: int, position: int, most: int, how: str
):
    """Of few tokens; of more only the best are looked at, and a seeded sample may be beyond them."""
    logits = logits[: min(methods.CANDIDATES)]
    params = replace(params, seed=seed, temperature=0.0) if how == "greedy" else replace(params, seed=seed, method=how)
    guesses = ranked(logits[None], params, [position], most)[0]
    tokens = [token for token, _, _ in guesses]
    assert 1 <= len(guesses) <= most and len(set(tokens)) == len(tokens)
    if how == "greedy" or params.top_p == 1:  # over its candidates alone a nucleus is a little smaller or larger
        assert (tokens[0], guesses[0][2]) == propose(logits, params, position)
    assert not any(proposal for _, _, proposal in guesses[1:]), "the others were not drawn from q"
    assert all(-math.inf < logp <= 1e-9 for _, logp, _ in guesses)
    after_first = [logp for _, logp, _ in guesses[how == "rejection" :]]
    assert after_first == sorted(after_first, reverse=True), "likeliest first"
    assert sum(math.exp(logp) for _, logp, _ in guesses) < 1 + 1e-6, "chances of one and the same pick"


def test_seeded_guesses_are_ranked_by_the_samples_that_they_would_be():
    """By q and the noise that the target adds too: the second is what is drawn if the first can't be."""
    logits = random_logits(5, 20, 1.0)
    for seed in range(50):
        params = SamplingParams(temperature=1.0, seed=seed)
        (first, _, _), (second, _, _) = ranked(logits[None], params, [9], 2)[0]
        without = logits.clone()
        without[first] = -torch.inf
        assert second == noisy_argmax(warp(without[None], params)[0], seed, 9, noise.PICK)
