"""A feature drafter in the target's process: its hidden states never travel, it changes no text, and the drafter may
read others, or be lost."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from toys import EAGER, IDLE, Moody, Noise, ScriptedChannel, letters, scrambled, ticks, together
from trained import drafter_for, save_toy_target
from transformers import AutoModelForCausalLM

from pearl.checkpoints.drafts import envelope
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.control import forward_trial
from pearl.core.feature_shares import FeatureShares
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.source import FeatureSource
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.machine.device_features import DeviceFeatures
from pearl.models import timing
from pearl.models.hidden_states import HiddenStateHooks
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target

PROMPT = [3, 1, 4, 1, 5]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, seed=3)
PENALISED = SamplingParams(max_new_tokens=12, ignore_eos=True, repetition_penalty=1.5, suppress_tokens=[7])
REJECTION = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, seed=3, method="rejection")
BESIDE = (0, 1)  # layers that it reads


@pytest.fixture(autouse=True, scope="module")
def hurried():
    """Nothing here depends on how long a forward takes; heads that know nothing are asked all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TIMED", (8, 1))
        patch.setattr(timing, "best_of", lambda rounds, read, device: (read(), 1e-9)[1])
        patch.setattr(forward_trial, "FIRST_WORTH", 1e6)
        yield


@functools.cache
def model():
    return tiny.random_model(tiny.CONFIGS["llama"]())


def head(kind: str, features=BESIDE, seed: int = 0) -> FeatureSource | HeadSource:
    drafter = drafter_for(model(), features, 4, 1, seed=seed, kind=kind).requires_grad_(False)
    return FeatureSource(drafter) if drafter.shape.parallel else HeadSource(HeadReader(drafter, 200, 4))


def target_of(beside: DraftSource, drafter: DraftSource, script=EAGER, lost_after=None, slots: int = 1) -> Target:
    shares = FeatureShares.of(tuple(drafter.layers), tuple(beside.layers))
    hooks = HiddenStateHooks(model(), shares.layers)
    reader = tiny.verifier(model(), hooks=hooks, max_sequences=slots)
    channel = ScriptedChannel(drafter, script, lost_after)
    return Target(reader, channel, ticks(), sources=[beside], shares=shares)


@functools.cache
def alone(params: SamplingParams):
    return together(Target(tiny.verifier(model())), PROMPT, Schedule.of("ar"), params, decode=str)


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
@pytest.mark.parametrize(
    "mode, kind, script", [("tree", "peagle", EAGER), ("pearl", "eagle3", scrambled(3)), ("tree", "eagle3", IDLE)]
)
def test_an_untrained_head_beside_the_target_changes_no_text(mode: str, kind: str, script, params: SamplingParams):
    beside = head(kind)
    target = target_of(beside, Noise(tiny.VOCABULARY), script)
    assert together(target, PROMPT, Schedule.of(mode), params, decode=str) == alone(params)
    assert beside.forwards and any(one.rows_by.get("feature") for one in target.passes)


@pytest.mark.parametrize("layers", [(1,), (0, 1), (1, 2)])
def test_the_drafter_may_read_other_layers(layers: tuple[int, ...]):
    """Both are networks over features: each gets those of its layers, and what it says is what it says alone."""
    beside, drafter = head("eagle3"), head("peagle", layers, seed=1)
    heard: dict[str, list[np.ndarray]] = {"beside": [], "drafter": []}
    for name, one in (("beside", beside), ("drafter", drafter)):
        observe = one.observe

        def noted(features, batch_slot=0, name=name, observe=observe):
            heard[name].append(np.asarray(features))
            observe(features, batch_slot)

        one.observe = noted  # type: ignore[method-assign]
    target = target_of(beside, drafter, scrambled(3))
    assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)
    hidden = model().config.hidden_size
    mine, theirs = (np.concatenate(heard[name]) for name in ("beside", "drafter"))
    assert mine.shape[1] == 2 * hidden and theirs.shape[1] == len(layers) * hidden
    shared = [(BESIDE.index(layer), at) for at, layer in enumerate(layers) if layer in BESIDE]
    for a, b in shared:
        here, there = mine[:, a * hidden : (a + 1) * hidden], theirs[:, b * hidden : (b + 1) * hidden]
        assert (here[: len(there)] == there[: len(here)]).all() and len(there) > 3
    assert target.draft_stats and not target.draft_stats.failed and drafter.forwards and beside.forwards


def test_features_that_lie_on_a_device_are_shared_alike():
    rows = torch.arange(24).view(2, 12).bfloat16()
    shares = FeatureShares.of((5, 2), (7, 2))
    assert shares.layers == (5, 2, 7)
    there = shares.for_beside(DeviceFeatures(rows))
    assert isinstance(there, DeviceFeatures)
    assert torch.equal(there.rows, rows[:, [8, 9, 10, 11, 4, 5, 6, 7]])
    assert FeatureShares.of((), (1,)).for_drafter(DeviceFeatures(rows)) is None
    assert FeatureShares.of((1,), ()).for_drafter(there) is there


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_a_lost_drafter_leaves_the_head(kind: str):
    beside = head(kind)
    target = target_of(beside, Noise(tiny.VOCABULARY), lost_after=3)
    assert together(target, PROMPT, Schedule.of("tree"), SEEDED, decode=str) == alone(SEEDED)
    assert sum(one.rows_by.get("feature", 0) for one in target.passes[-4:])


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_several_texts_share_its_forwards(kind: str):
    beside, asked = head(kind), []
    extend = beside.extend
    beside.extend = lambda queries: (asked.append(len(queries)), extend(queries))[1]  # type: ignore[method-assign]
    before = beside.forwards
    target = target_of(beside, Moody(Noise(tiny.VOCABULARY), 1), slots=3)
    requests = [SequenceRequest(PROMPT, SEEDED, Stopper(SEEDED, (), letters)) for _ in range(5)]
    over = [text for text, said in target.write(requests, Schedule.of("pearl"), batch_size=3) if not said]
    assert len(over) == 5 and all(text.stopper.tokens == alone(SEEDED).tokens for text in over)
    assert max(asked) > 1 and beside.forwards - before < sum(asked)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_rejection_sampling_judges_its_drawn_guesses(kind: str):
    beside = head(kind)
    target = target_of(beside, Moody(Noise(tiny.VOCABULARY), 1), IDLE)
    assert len(together(target, PROMPT, Schedule.of("tree"), REJECTION, decode=str).tokens) == 12
    assert sum(one.rows_by.get("feature", 0) for one in target.passes) > 5


def test_a_head_that_fails_leaves_the_text_to_the_others():
    beside = head("peagle")
    beside.read_on = lambda queries: 1 / 0  # type: ignore[assignment, return-value]
    target = target_of(beside, Noise(tiny.VOCABULARY))
    assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)


# In an engine


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[str, str]:
    target = save_toy_target(tmp_path_factory.mktemp("toy") / "target")
    folder = tmp_path_factory.mktemp("head")
    made = drafter_for(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), (1, 2, 4), 4, kind="peagle")
    envelope.save(made, folder, tokens=4)
    return target, str(folder)


@pytest.mark.usefixtures("own_cache")
def test_an_engine_drafts_by_it_and_goes_on_when_its_drafter_has_died(toy):
    target, folder = toy
    options = {"dtype": "float32", "max_length": 300, "target_draft": f"feature:{folder}", "max_draft_restarts": 0}
    with Engine.from_pretrained(target, **options) as engine:
        assert "target draft: P-EAGLE" in engine.description
        for params in (GREEDY, SEEDED):
            own = engine.generate("def f(x):", params, mode="ar").tokens
            for mode in ("pearl", "tree"):
                written = engine.generate("def f(x):", params, mode=mode)
                assert written.tokens == own and sum(one.rows_by.get("feature", 0) for one in written.stats.passes)
        assert engine.runtime.drafter_pid
        os.kill(engine.runtime.drafter_pid, signal.SIGKILL)
        lost = engine.generate("def f(x):", SEEDED, mode="tree")
        assert lost.tokens == own and sum(one.rows_by.get("feature", 0) for one in lost.stats.passes)


def test_what_can_not_draft_there_is_refused(toy, tmp_path: Path):
    target, folder = toy
    with pytest.raises(UsageError, match="is a language model, which drafts in a process of its own"):
        preflight(EngineConfig(target, target_draft=target))
    (tmp_path / "pair").mkdir()
    other = tiny.save_pair(tmp_path / "pair")[0]
    with pytest.raises(UsageError, match="reads the outputs of the layers 1, 2, 4"):
        preflight(EngineConfig(other, target_draft=folder))
    checked = preflight(EngineConfig(target, target_draft=folder))
    assert checked.features == (1, 2, 4) and checked.shares.drafter == () and not checked.features_from(True)
    assert checked.of_beside().drafting is checked.beside


def test_a_text_that_goes_on_from_a_failed_one_tells_every_position_once():
    def fails(tokens, logits):
        raise RuntimeError("a callable of the user's")

    prompt = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(150)]
    beside = head("eagle3")
    target = target_of(beside, Noise(tiny.VOCABULARY))
    broken = replace(GREEDY, logits_processors=(fails,))
    list(target.decode(prompt, Schedule.of("tree"), broken, Stopper(broken, (), str)))
    heard: list[int] = []
    observe = beside.observe
    beside.observe = lambda features, batch_slot=0: (heard.append(len(features)), observe(features, batch_slot))[1]
    list(target.decode(prompt, Schedule.of("tree"), GREEDY, Stopper(GREEDY, (), str), continues=True))
    read = len(target._batch.last.trie.tokens) - 1
    assert read - target._batch.last.cached == sum(heard) == len(prompt) + 11
