"""A pass that is laid out before the picks of the last one are known is the pass that would have been laid out after
them, or it is laid out again."""

from __future__ import annotations

import pytest
import tiny
import torch
from toys import Right, Sometimes, TableModel, alone, ticks, together

from pearl.bench.host_time import DuringPasses
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.tree import TreeSource
from pearl.models.static_shapes.one_text import ForwardRows
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.roles.target_model import TargetModel

PROMPT = [3 * i % tiny.VOCABULARY for i in range(20)]
PARAMS = SamplingParams(max_new_tokens=24)


def with_drafter(model: TargetModel, source: DraftSource, prepares: bool) -> Target:
    here, there = DuringPasses.pair()
    here.peer_step = Drafter(source, there, ticks()).step
    target = Target(model, here, ticks())
    target.always_prepares = prepares
    return target


def target_with(drift: float, prepares: bool) -> Target:
    model, draft = (tiny.random_model(tiny.CONFIGS["llama"]()) for _ in range(2))
    torch.manual_seed(1)
    for weight in draft.parameters():
        weight.data += drift * torch.randn_like(weight)
    reader, drafter = tiny.verifier(model), tiny.draft_model(draft)
    reader.enable_static_shapes()
    return with_drafter(reader, TreeSource(drafter), prepares)


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_walk_that_goes_as_foreseen_finds_its_inputs_filled_and_any_other_fills_them_again(mode):
    target = target_with(0.008, True)
    said = together(target, PROMPT, Schedule.of(mode), PARAMS, decode=str)
    assert said == together(target_with(0.008, False), PROMPT, Schedule.of(mode), PARAMS, decode=str)
    assert 0 < target.next_pass.used <= target._model.static.foreseen < target.next_pass.prepared


def test_inputs_of_another_pass_than_was_foreseen_would_change_the_text(monkeypatch):
    """So the test above would tell."""
    expected = together(target_with(0.008, False), PROMPT, Schedule.of("tree"), PARAMS, decode=str)
    monkeypatch.setattr(ForwardRows, "__eq__", lambda one, other: True)
    assert together(target_with(0.008, True), PROMPT, Schedule.of("tree"), PARAMS, decode=str) != expected


def test_on_a_cpu_nothing_is_prepared_as_nothing_is_waited_for():
    target = target_with(0.008, False)
    together(target, PROMPT, Schedule.of("tree"), PARAMS, decode=str)
    assert target.next_pass.prepared == target._model.static.foreseen == 0 == target.next_pass.seconds


def test_the_likeliest_walk_is_foreseen_through_the_rows_of_the_pass():
    """A drafter that is always right, and far enough ahead, is always foreseen."""
    model, params = TableModel(), SamplingParams(max_new_tokens=60)
    text = [0, 1, *alone(model, [0, 1], SamplingParams(max_new_tokens=90), ()).tokens]
    used = {}
    for source in (Right(text), Sometimes(text, model.vocabulary, 0.3)):
        target = with_drafter(model, source, True)
        together(target, [0, 1], Schedule.of("pearl"), params)
        used[type(source)] = target.next_pass.used / target.next_pass.prepared
    assert used[Right] > 0.9 > 0.5 > used[Sometimes]
