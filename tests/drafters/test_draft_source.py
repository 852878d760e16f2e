"""Sources propose chains of at most the room they are given."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import TableModel, alone

from pearl.core.params import SamplingParams
from pearl.drafters.draft_source import ChainQuery
from pearl.drafters.model import ModelSource

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@given(st.integers(0, 50), TEXTS, st.sampled_from([0.0, 0.7]), st.integers(0, 99), st.integers(1, 5))
def test_a_model_proposes_one_token_a_forward_the_one_that_a_target_like_it_would_pick(
    table: int, text: list[int], temperature: float, seed: int, room: int
):
    model = TableModel(3, seed=table)
    params = SamplingParams(max_new_tokens=1, temperature=temperature, seed=seed)
    source = ModelSource(model)
    source.begin(0, params)
    assert source.propose(text, room) == [(alone(model, text, params, ()).tokens[0], ())]
    assert source.forwards == 1


def test_a_model_forgets_the_last_sequence_when_a_new_one_starts():
    model = TableModel(3)
    source = ModelSource(model)
    source.begin(0, SamplingParams())
    source.begin(0, SamplingParams(temperature=1.0, seed=0, method="rejection"))
    assert model.forgotten == 2
    assert source.propose([0, 1], 1)[0][1], "and samples as the new one asks"


def test_a_model_is_at_a_loss_beyond_its_length():
    source = ModelSource(TableModel(3, max_length=4))
    assert len(source.propose([0] * 4, 3)) == 1
    assert source.propose([0] * 5, 3) == [] and source.forwards == 1


@pytest.mark.parametrize("slots", [(0,), (0, 1), (3,)], ids=["alone", "two", "alone, where it was beside others"])
def test_a_forward_of_chains_reads_a_row_of_each_and_samples_as_that_sequence_asks(slots: tuple[int, ...]):
    model = TableModel(5)
    source, params = ModelSource(model), {slot: SamplingParams(temperature=1.0, seed=slot) for slot in slots}
    for slot in slots:
        source.begin(slot, params[slot])
    guesses = source.propose_batch([ChainQuery(slot, [1, 2], (3,), 1) for slot in slots])
    wanted = [alone(model, [1, 2, 3], replace(params[slot], max_new_tokens=1), ()).tokens[0] for slot in slots]
    assert guesses == [[(token, ())] for token in wanted]
    assert (source.forwards, source.rows) == (1, len(slots))
