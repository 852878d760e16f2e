"""What a GPU picks of all rows at once is what the host picks row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl.core.params import SamplingParams
from pearl.core.sampling import noise, picks
from pearl.core.sampling.methods import NOT_FINITE, Picker
from pearl.core.trie import Trie

NODE = Trie([1, 2, 3]).root
WAYS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=5),
    dict(temperature=1.3, top_p=0.8),
    dict(temperature=1.0, min_p=0.1),
    dict(temperature=2.0, top_k=50, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 900])
def test_all_rows_at_once_as_row_by_row(way, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    for seed in range(20):
        params = SamplingParams(seed=seed, **way)
        logits = 4 * torch.randn(8, vocabulary, generator=generator)
        positions = list(range(seed, seed + 8))
        host = Picker(params, logits, positions)
        assert picks.on_device(params, logits, positions).tolist() == [host.pick(row, NODE) for row in range(8)]


@settings(max_examples=60)
@given(rows=st.integers(1, 6), seed=st.integers(0, 1 << 40), way=st.sampled_from(WAYS))
def test_a_pick_does_not_depend_on_the_rows_beside_it(rows, seed, way):
    params = SamplingParams(seed=seed, **way)
    logits = 3 * torch.randn(rows, 300, generator=torch.Generator().manual_seed(seed))
    together = picks.on_device(params, logits, range(rows)).tolist()
    assert together == [picks.on_device(params, logits[r : r + 1], [r]).item() for r in range(rows)]


def test_noise_of_many_positions_has_the_bits_of_each():
    tokens = torch.arange(50)
    rows = noise.gumbel_rows(3, [7, 9], noise.PICK, 50, torch.device("cpu"))
    assert torch.equal(rows, torch.stack([noise.gumbel(3, at, noise.PICK, tokens) for at in (7, 9)]))


def test_on_the_host_nothing_is_awaited():
    made = picks.begin(SamplingParams(), torch.tensor([[0.0, 2.0, 1.0]]), [4])
    assert not picks.wait([made])
    assert isinstance(made, Picker) and made.pick(0, NODE) == 1


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_that_are_not_finite_have_no_token(way):
    logits = torch.randn(3, 40)
    logits[1, 5] = torch.nan
    found = picks.on_device(SamplingParams(seed=0, **way), logits, [7, 8, 9]).tolist()
    assert [token == NOT_FINITE for token in found] == [False, True, False]
