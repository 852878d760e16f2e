"""Sources beside the target fill its passes, cost no token, and rest where they bring nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import plain_case
from toys import (
    EAGER,
    IDLE,
    Crashing,
    Noise,
    Right,
    ScriptedChannel,
    Sometimes,
    TableModel,
    alone,
    letters,
    ticks,
    together,
)

from pearl.core.control.source_trial import FIRST_REST, FIRST_TRIAL, LONGEST_REST, TRIAL, SourceTrial
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.recycling import RecyclingSource
from pearl.drafters.suffix import SURE, SuffixSource
from pearl.drafters.text_memory import TextMemory
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target


def written(mode, source, beside, script=EAGER, tokens=60, lost_after=None, params=None):
    """The passes of a text that the target writes with a drafter and sources beside it."""
    case = replace(plain_case(mode, None, source, script, tokens))
    case = replace(case, params=params or case.params)
    make = {"right": Right, "recycling": lambda text: RecyclingSource(), "noise": lambda text: Noise(5)}
    text = case.endless(case.prompt, case.params)
    sources = [make[name](text) if isinstance(name, str) else name for name in beside]
    channel = ScriptedChannel(case.make_source(), case.script, lost_after)
    target = Target(case.model, channel, ticks(), sources=sources)
    said = together(target, case.prompt, case.schedule, case.params, case.eos)
    assert said == alone(case.model, case.prompt, case.params, case.eos)
    return target.passes


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_lost_drafter_leaves_self_speculation(mode: str):
    passes = written(mode, "right", ["right"], lost_after=5)
    assert len(passes) < 40 and all(one.offered for one in passes[1:-1])
    assert {name for one in passes[5:] for name in one.rows_by} == {"draft"}  # what this source calls itself


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_what_the_target_has_said_is_recycled_where_the_drafter_is_late(mode: str):
    """The model is a table of the last three tokens, of which there are few here: it says the same again and again."""
    with_, without = (written(mode, "at a loss", beside, IDLE, 200) for beside in (["recycling"], []))
    assert len(with_) < 0.8 * len(without)
    assert sum(one.rows_by.get("recycled", 0) for one in with_) > 0
    assert {name for one in with_ for outcome in one.judged for name in outcome.origins} == {"recycled"}


@pytest.mark.parametrize("mode", ["sd", "pearl-no-pre", "pearl-no-post", "pearl:3", "ar"])
def test_the_modes_of_the_papers_stay_as_they_are(mode: str):
    schedule = Schedule.of(mode)
    case = replace(plain_case("sd", 3, "sometimes"), schedule=schedule)
    target = Target(case.model, ScriptedChannel(case.make_source(), case.script), ticks(), sources=[RecyclingSource()])
    together(target, case.prompt, schedule, case.params)
    assert not any("recycled" in one.rows_by for one in target.passes)


def test_the_drafters_acceptance_is_its_own():
    """Guesses of others that stood there first are not taken for the drafter's first guess."""
    params = SamplingParams(max_new_tokens=60)
    case = replace(plain_case("pearl", None, "right", EAGER), params=params)
    text = case.endless(case.prompt, params)
    wrong = Sometimes(text, case.vocabulary, 0.0)
    channel = ScriptedChannel(case.make_source(), case.script)
    target = Target(case.model, channel, ticks(), sources=[wrong])
    together(target, case.prompt, case.schedule, params)
    (controller,) = target._controllers._made.values()
    assert controller.acceptance > 0.9


def test_a_source_that_crashes_is_left_out_and_the_others_go_on():
    text = plain_case("tree", None, "right").endless((1, 2, 3), SamplingParams(max_new_tokens=60))
    passes = written("tree", "at a loss", [Crashing(Right(text), 2), "right"])
    assert sum(one.committed for one in passes) / len(passes) > 1.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rejection_sampling_has_none(temperature: float):
    params = SamplingParams(max_new_tokens=30, temperature=temperature, seed=1, method="rejection")
    case = replace(plain_case("tree", None, "at a loss"), params=params)
    target = Target(case.model, ScriptedChannel(case.make_source(), case.script), ticks(), sources=[RecyclingSource()])
    together(target, case.prompt, case.schedule, params)
    assert any(one.rows_by for one in target.passes) == (not params.rejection)


class FailsOnce(RecyclingSource):
    fails = False

    def extend(self, queries):
        if self.fails:
            self.fails = False
            raise RuntimeError("once")
        return super().extend(queries)


@pytest.mark.parametrize("before", ["rejection", "a failure"])
def test_a_source_that_could_not_help_a_text_is_there_for_the_next(before: str):
    case, source = plain_case("tree", None, "at a loss"), FailsOnce()
    target = Target(case.model, ScriptedChannel(case.make_source(), IDLE), ticks(), sources=[source])

    def passes(params: SamplingParams) -> int:
        request = SequenceRequest(case.prompt, params, Stopper(params, (), letters))
        return next(len(said.passes) for said, more in target.write([request], case.schedule) if not more)

    first = passes(SamplingParams(max_new_tokens=100))
    source.fails = before == "a failure"
    if source.fails:
        passes(SamplingParams(max_new_tokens=400))
    for seed in range(0 if before == "a failure" else 6):
        passes(SamplingParams(max_new_tokens=200, temperature=1.0, seed=seed, method="rejection"))
    assert passes(SamplingParams(max_new_tokens=100)) <= first < 60


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_what_was_written_before_is_written_in_few_passes(mode: str):
    """A model of a hundred tokens repeats nothing by itself. The drafter knows nothing."""
    source = SuffixSource(memory=TextMemory(1))
    passes = [len(warm_passes(mode, source)) for _ in range(3)]
    assert passes[0] > 80 and passes[1] < passes[0] / 4 and passes[2] <= passes[1]


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_source_at_rest_is_asked_once_it_knows_the_text(mode: str):
    source = SuffixSource(memory=TextMemory(1))
    case = warm_case(mode)
    target = Target(case.model, ScriptedChannel(case.make_source(), IDLE), ticks(), sources=[source])
    counts = []
    for _ in range(2):
        for trial in target._beside.policies[source].trials.values():
            trial.resting, trial._left = True, 1000
        stopper = Stopper(case.params, case.eos, letters)
        request = SequenceRequest(case.prompt, case.params, stopper)
        (over,) = [text for text, committed in target.write([request], case.schedule) if not committed]
        counts.append(len(over.passes))
    assert counts[0] > 80, "it rests"
    assert counts[1] < 60 - SURE + 120 / 8, "and wakes when so much of the text has come back"


class Priced(Right):
    """One that says what its forwards cost: about one reading of the clock, as a pass does."""

    costs = (1e-4,)
    calls = 0

    def propose(self, text, room):
        self.calls += 1
        return super().propose(text, room)


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_forward_is_made_before_every_pass_that_it_makes_longer(mode: str):
    case = plain_case(mode, None, "right", tokens=60)
    source = Priced(case.endless(case.prompt, case.params))
    passes = written(mode, "at a loss", [source], IDLE)
    assert source.calls >= len(passes) - 4 and len(passes) < 40


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_forwards_that_bring_nothing_are_hardly_ever_made(mode: str):
    """The drafter has said all that this source would say, or it is never right."""
    case = plain_case(mode, None, "right", tokens=400)
    text = case.endless(case.prompt, case.params)
    for source, drafter in ((Priced(text), "right"), (Priced([9] * len(text)), "at a loss")):
        passes = written(mode, drafter, [source], EAGER, 400)
        assert source.calls < 40 + 0.02 * len(passes)


def test_a_source_may_make_several_forwards_before_a_pass():
    """Each of them is a token of a chain, as of EAGLE-3."""
    case = plain_case("tree", None, "right", tokens=60)
    source = Priced(case.endless(case.prompt, case.params), chunk=1)
    source.grows_trees = True
    source.extend = lambda queries: [_one_more(source, query) for query in queries]
    passes = written("tree", "at a loss", [source], IDLE)
    assert max(one.offered for one in passes) >= 3


def _one_more(source, query):
    chain = query.trie.chain()
    path = [node.token for node in chain]
    if len(chain) >= query.max_depth or not (said := source.propose([*query.trie.tokens, *path], 1)):
        return []
    parent = chain[-1] if chain else query.trie.root
    return [(parent, query.trie.grow(parent, said[0][0], (), -0.1, source.origin))]


def test_out_of_memory_halves_the_texts_of_a_forward(monkeypatch):
    case = plain_case("tree", None, "right", tokens=20)
    source = Priced(case.endless(case.prompt, case.params))
    most = []

    def propose_batch(queries):
        if len(queries) > 2:
            raise torch.OutOfMemoryError
        most.append(len(queries))
        return [source.propose(one.tokens, one.room) for one in queries]

    source.propose_batch = propose_batch
    target = Target(case.model, ScriptedChannel(case.make_source(), IDLE), ticks(), sources=[source])
    requests = [SequenceRequest(case.prompt, case.params, Stopper(case.params, (), letters)) for _ in range(4)]
    texts = {id(text): text.stopper.tokens for text, _ in target.write(requests, case.schedule, batch_size=4)}
    assert len(texts) == 4 and len(set(map(tuple, texts.values()))) == 1 and max(most) == 2


def test_every_mode_remembers_and_only_in_later_rounds_where_there_are_rounds():
    memory = TextMemory(1)
    source = SuffixSource(memory=memory)
    memory.begin_round()
    assert len(warm_passes("ar", source)) == len(warm_passes("ar", source))
    assert len(warm_passes("tree", source)) > 80, "of this round nothing is found"
    memory.begin_round()
    assert len(warm_passes("tree", source)) < 25


@pytest.mark.parametrize("method", ["seeded", "rejection"])
def test_a_text_is_remembered_however_it_is_sampled(method: str):
    memory = TextMemory(1)
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=1, method=method)
    case = replace(plain_case("tree", None, "at a loss"), params=params)
    channel = ScriptedChannel(case.make_source(), case.script)
    target = Target(case.model, channel, ticks(), sources=[SuffixSource(memory=memory)])
    together(target, case.prompt, case.schedule, params)
    assert memory.texts == 1 and memory.size > 30


def test_in_rounds_no_mode_recycles_what_another_has_read():
    """A short text of a table that says the same after the same tokens: whoever knows it all guesses far."""
    case = replace(plain_case("tree", None, "at a loss", IDLE, 40), vocabulary=100, order=1)

    def counts(rounds: bool) -> list[int]:
        source = RecyclingSource(over_texts=True)
        target = Target(case.model, ScriptedChannel(case.make_source(), IDLE), ticks(), sources=[source])
        found = []
        for mode in ("pearl", "tree", "tree"):
            if rounds:
                target.begin_round()
            together(target, case.prompt, Schedule.of(mode), case.params)
            found.append(len(target.passes))
        return found

    helped, alone = counts(rounds=False), counts(rounds=True)
    assert helped[2] < alone[2] == alone[1]


def test_a_prediction_is_read_several_tokens_a_pass_and_changes_nothing():
    source = SuffixSource()
    text = warm_text()
    edited = [*text[:40], 7, 8, 9, *text[43:]]
    plain, predicted = (len(warm_passes("tree", source, prediction)) for prediction in ((), edited))
    assert predicted < plain / 3
    assert len(warm_passes("tree", source)) == plain, "it is forgotten with its text"


def warm_passes(mode: str, source: SuffixSource, prediction=()):
    case = warm_case(mode)
    channel = ScriptedChannel(case.make_source(), IDLE) if case.schedule.drafts else None
    target = Target(case.model, channel, ticks(), sources=[source])
    stopper = Stopper(case.params, case.eos, letters)
    request = SequenceRequest(case.prompt, case.params, stopper, prediction=prediction)
    (over,) = [text for text, committed in target.write([request], case.schedule) if not committed]
    assert over.stopper.tokens == warm_text()
    return over.passes


def warm_case(mode: str = "tree"):
    case = replace(plain_case("sd", 3, "at a loss", IDLE, 120), schedule=Schedule.of(mode))
    return replace(case, vocabulary=100, order=3)


def warm_text() -> list[int]:
    case = warm_case()
    return alone(case.model, case.prompt, case.params, case.eos).tokens


# whether a source is worth its time


def passes_asked(trial: SourceTrial, passes: int, right: float, seconds: float, rate: float = 10.0) -> list[bool]:
    asked = []
    for _ in range(passes):
        asked.append(not trial.resting)
        if not trial.resting:
            trial.spent(seconds)
        trial.passed(right if not trial.resting else 0, 0.0, rate)
    return asked


def test_a_source_that_brings_more_than_it_costs_is_always_asked():
    assert all(passes_asked(SourceTrial(), 400, right=1, seconds=0.09))


def test_a_source_that_brings_less_rests_ever_longer():
    asked = passes_asked(SourceTrial(), 4000, right=0, seconds=0.01)
    assert asked[:FIRST_TRIAL] == [True] * FIRST_TRIAL and asked[FIRST_TRIAL : FIRST_TRIAL + FIRST_REST] == [False] * 16
    assert sum(asked) < FIRST_TRIAL + 8 * TRIAL + 4000 * TRIAL / LONGEST_REST


def test_rows_count_too():
    trial = SourceTrial()
    for _ in range(FIRST_TRIAL):
        trial.passed(1, row_s=0.2, rate=10.0)
    assert trial.resting


def test_it_is_tried_again_and_stays_once_it_pays():
    trial = SourceTrial()
    passes_asked(trial, FIRST_TRIAL, right=0, seconds=0.01)
    asked = passes_asked(trial, 300, right=1, seconds=0.01)
    assert not any(asked[:FIRST_REST]) and all(asked[FIRST_REST:])


@pytest.mark.parametrize("ending", ["of its own", "nobody wants it", "it is left"])
def test_nothing_is_kept_of_a_text_that_is_over(ending: str):
    case = replace(plain_case("tree", None, "right"), params=SamplingParams(max_new_tokens=20))
    channel = ScriptedChannel(case.make_source(), case.script)
    target = Target(case.model, channel, ticks(), sources=[RecyclingSource(), SuffixSource()])
    passes: list[int] = []
    wanted = (lambda: not passes) if ending == "nobody wants it" else lambda: True
    request = SequenceRequest(case.prompt, case.params, Stopper(case.params, (), letters), wanted=wanted)
    writing = target.write([request], case.schedule)
    for _, committed in writing:
        passes += committed
        if ending == "it is left":
            break
    writing.close()
    beside = target._beside
    assert not beside._serving and not beside._processing
    assert not any(getattr(one, name) for one in beside.policies.values() for name in ("_late",))


def test_the_last_pass_of_a_text_is_judged_too():
    judged: list[int] = []
    case = replace(plain_case("tree", None, "right"), params=SamplingParams(max_new_tokens=20))
    target = Target(case.model, ScriptedChannel(case.make_source(), case.script), ticks(), sources=[RecyclingSource()])
    (policy,) = target._beside.policies.values()
    plain, over = policy.judge, policy.end
    policy.judge = lambda *given: (judged.append(0), plain(*given))  # type: ignore[method-assign]
    policy.end = lambda *given: (judged.append(1), over(*given))  # type: ignore[method-assign]
    together(target, case.prompt, case.schedule, case.params)
    assert judged == [0] * (len(target.passes) - 1) + [1]


def test_the_time_of_sources_is_no_time_of_the_forward():
    """Or rows would look dear, and sources would be charged twice."""
    now = [0.0]

    class Timed(TableModel):
        def read(self, *args, **more):
            now[0] += 1.0
            return super().read(*args, **more)

    class Slow(Noise):
        def propose(self, text, room):
            now[0] += 0.25
            return super().propose(text, room)

    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    channel = ScriptedChannel(Right([]), EAGER)
    target = Target(Timed(vocabulary=12, max_length=300), channel, lambda: now[0], sources=[Slow(12)])
    list(target.decode([1, 2, 3], Schedule.of("tree"), params, Stopper(params, (), str)))
    assert {one.forward_s for one in target.passes} == {1.0}
    assert {one.seconds for one in target.passes} >= {1.25}
