"""A synthetic drafter is right as often as it is told to be, and what the runtime makes of that is what theory says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import tiny
from tiers import tiered
from toys import TableModel, letters

from pearl import Engine, SamplingParams
from pearl.bench import synthetic_bench
from pearl.config.engine_config import EngineConfig
from pearl.config.synthetic import SyntheticDraft
from pearl.core import theory
from pearl.core.records import Pass
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import TokenBuckets
from pearl.drafters.draft_source import ChainQuery, TreeQuery
from pearl.drafters.synthetic import SyntheticSource
from pearl.errors import UsageError
from pearl.evaluation.measures.acceptance import by_depth
from pearl.models.verifier import VerifierModel
from pearl.predict import simulation
from pearl.predict.script import DraftedToken, Script, Times
from pearl.predict.simulation import simulate
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import LocalChannel

CHANCES = (0.5, 0.7, 0.9)
FLAT = TokenBuckets(tuple(range(1, 65)), (1.0,) * 64)  # rows cost nothing
C = 2.6  # drafter forwards in the time of a pass; so few that waiting for one does not pay


def within(expected: float, values: Sequence[float], sigmas: float = 3.0) -> bool:
    """Whether the mean of the values has it in its interval."""
    return abs(statistics.fmean(values) - expected) <= sigmas * statistics.stdev(values) / math.sqrt(len(values))


def share_within(expected: float, passes: Sequence[Pass]) -> bool:
    """Whether the acceptance of all judged places has it in its interval."""
    tested, right = sum(one.tested for one in passes), sum(one.accepted for one in passes)
    return abs(right / tested - expected) <= 3.3 * math.sqrt(expected * (1 - expected) / tested)


def simulated(mode: str, draft: SyntheticDraft, tokens: int = 1200) -> list[Pass]:
    times = Times(FLAT, (1.0,) * 64, (), (), 0.0)
    script = Script(
        1, tuple(DraftedToken(0, ()) for _ in range(tokens)), 1.37, 0.0
    )  # so that the two clocks do not strike together
    (text,) = simulate(Schedule.of(mode), [script], times, synthetic=draft)
    return list(text.passes)[1:-1]


@pytest.mark.parametrize("a", CHANCES)
def test_blocks_commit_what_leviathan_says(a: float):
    passes = simulated("sd:4", SyntheticDraft((a,)))
    assert within(theory.tokens_per_pass_sd(a, 4), [one.committed for one in passes])


@pytest.mark.parametrize("a", CHANCES)
@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_free_running_drafter_is_worth_what_theory_says(mode: str, a: float):
    """Without corrections a tree is a chain."""
    passes = simulated(mode, SyntheticDraft((a,), 1 / C))
    runs = [passes[first : first + 10] for first in range(0, len(passes) - 9, 10)]  # passes of one run hang together
    assert within(theory.speedup_pearl(a, C), [statistics.fmean(one.committed for one in run) for run in runs])
    assert share_within(a, passes)


@pytest.mark.parametrize("a", CHANCES)
def test_prepared_corrections_raise_the_acceptance_of_a_tree(a: float):
    passes = simulated("tree", SyntheticDraft((a,), 1 / C, 0.5), tokens=600)
    better = a + (1 - a) / 2
    assert share_within(better, passes)
    mean = statistics.fmean(one.committed for one in passes)
    assert theory.speedup_pearl(a, C) < mean < theory.tokens_per_pass_ceiling(better)


class Recorded(SyntheticSource):
    """Keeps what it has guessed, by position."""

    def __init__(self, draft: SyntheticDraft):
        super().__init__(draft)
        self.guessed: dict[int, tuple[int, int]] = {}

    def _guesses(self, seed: int, position: int, right: int, depth: int) -> tuple[int, int]:
        made = super()._guesses(seed, position, right, depth)
        assert self.guessed.setdefault(position, made) == made, "the same, however often it is asked"
        return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["sd:3", "pearl", "tree"])
def test_the_text_is_the_targets_own_by_one_seed_the_same_guesses(mode: str, temperature: float):
    """How many of them there are depends on time."""
    params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)

    def write(schedule: Schedule, reference: tuple[int, ...]) -> tuple[list[int], dict[int, tuple[int, int]], int]:
        here, there = LocalChannel.pair()
        source = Recorded(SyntheticDraft((0.6,), 0.0, 0.5))
        here.peer_step = Drafter(source, there).step
        target = Target(TableModel(vocabulary=9), here)
        passes = target.decode([0, 1], schedule, params, Stopper(params, (), letters), reference=reference)
        text = [token for committed in passes for token in committed]
        return text, source.guessed, sum(one.accepted for one in target.passes)

    alone, _, _ = write(Schedule.of("ar"), ())
    (once, guessed, right), (again, guessed_again, _) = (write(Schedule.of(mode), tuple(alone)) for _ in range(2))
    assert once == again == alone and right > 5
    both = guessed.keys() & guessed_again.keys()
    assert len(both) > 10 and all(guessed[place] == guessed_again[place] for place in both)
    unknown, guessed, _ = write(Schedule.of(mode), ())  # without a reference it has no guess
    assert unknown == alone and not guessed


def test_chances_may_depend_on_the_depth():
    source = SyntheticSource(SyntheticDraft((1.0, 0.0)))
    source.begin(0, SamplingParams())
    source.expect(0, [5], [7, 8, 9])
    ((first, _),), ((second, _),) = source.propose_batch([ChainQuery(0, [5], path, 4) for path in ((), (7,))])
    assert first == 7 and second != 8
    assert source.propose([5, 7, 8, 9], 4) == []  # nothing is known of what comes after
    source.begin(0, SamplingParams())
    assert source.propose([5], 4) == [], "a new sequence has another text"


def test_a_forward_takes_its_time_and_extends_several_leaves():
    slept: list[float] = []
    source = SyntheticSource(SyntheticDraft((0.5,), 0.005, 0.5), sleep=slept.append)
    from pearl.core.trie import Trie

    trie = Trie([1, 2])
    source.expect(0, [1, 2], [3, 4, 5, 6])
    grown = [source.extend([TreeQuery(0, trie, 4, 8)])[0] for _ in range(2)]
    assert [len(some) for some in grown] == [2, 4] and slept == [0.005] * 2
    assert (source.forwards, source.rows, source.costs) == (2, 3, (0.005,))
    assert all(len(node.children) == 2 for node in (trie.root, *trie.root.children.values()))


@pytest.mark.parametrize(
    "word", ["synthetic", *(f"synthetic:{said}" for said in ("", "1.2", "a", "0.5@5", "0.5@", "0.5/2"))]
)
def test_one_that_cant_be_meant_is_refused_with_what_can(word: str):
    with pytest.raises(UsageError, match=r"must be like synthetic:0\.8"):
        EngineConfig(draft=word)


def test_what_it_is_asked_to_be():
    assert SyntheticDraft.of("synthetic:0.9,0.8/0.25@5ms") == SyntheticDraft((0.9, 0.8), 0.005, 0.25)
    assert SyntheticDraft.of("ngram") is None and SyntheticDraft.of("synthetic-model") is None
    assert [SyntheticDraft((0.9, 0.8)).chance(depth) for depth in (1, 2, 9)] == [0.9, 0.8, 0.8]


def test_a_bench_with_one_says_synthetic_and_what_is_measured_and_what_predicted():
    reader, draft = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]())), SyntheticDraft((0.7,), 0.001)
    both = synthetic_bench.measured(reader, reader.vocabulary, 150, draft)
    measured = both["sd:4"]
    assert both["ar"]["speedup_vs_ar"] == 1.0 == both["ar"]["tokens_per_pass"] and both["ar"]["how"] == "measured"
    assert measured["tokens_per_second"] == pytest.approx(both["ar"]["tokens_per_second"] * measured["speedup_vs_ar"])
    assert measured["how"] == "measured" and measured["identical_to_ar"] == 1.0
    assert measured["acceptance_length"] == pytest.approx(theory.tokens_per_pass_sd(0.7, 4), abs=0.7)
    predicted = synthetic_bench.predicted(TokenBuckets(tuple(range(1, 17)), (0.0026,) * 16), draft)
    assert {one["how"] for one in predicted.values()} == {"PREDICTED"}
    assert predicted["pearl"]["speedup_vs_ar"] == pytest.approx(theory.speedup_pearl(0.7, 2.6), rel=0.15)
    foretold = predicted["pearl"]["tokens_per_second"] / predicted["pearl"]["speedup_vs_ar"]
    both["ar"]["tokens_per_second"] = foretold * 0.9

    def page() -> list[str]:
        shapes = [{"shape": "8B", "synthetic": both | predicted}]
        return synthetic_bench.markdown({"synthetic": "synthetic:0.7@1ms", "shapes": shapes})

    said, table = page()
    assert said.startswith("SYNTHETIC, of synthetic:0.7@1ms") and "| 8B | tree | PREDICTED |" in table
    both["ar"]["tokens_per_second"] = foretold / 6
    assert f"8B: ar made {foretold / 6:.0f} tokens/s, and {foretold:.0f} by the step times" in page()[-1]
    assert synthetic_bench.markdown({"synthetic": None, "shapes": [{"shape": "8B"}]}) == []


class InVirtualTime(simulation._TargetReader):
    """A real model whose passes take a time of 1, on the clock of the simulation."""

    def __init__(self, stage: simulation._Stage, wire: simulation._TargetEnd, model: VerifierModel):
        super().__init__(stage, wire)
        self._model = model

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        super().forget()
        return self._model.forget(but, batch_slot)

    def read(self, tokens, keep, side_rows=(), batch_slot=0):
        super().read(tokens, keep, side_rows)
        return self._model.read(tokens, keep, side_rows)


@pytest.fixture(scope="module")
def model() -> VerifierModel:
    return tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()))


def written(model: VerifierModel, mode: str, draft: SyntheticDraft) -> list[list[Pass]]:
    """The passes of two texts that a real model writes, without the first and the last; each the target's own."""
    texts = []
    times = Times(FLAT, (1.0,) * 64, (), (), 0.0)
    for number in range(2):
        prompt, params = [5, 6, 7 + number], SamplingParams(max_new_tokens=240, temperature=1.0, seed=number)
        stage = simulation._Stage(times, 0.0, 0)
        stage.begin(Script(len(prompt), (DraftedToken(0, ()),) * 250, 1.37, 0.0))
        wire = simulation._TargetEnd(stage)
        wire.drafter = Drafter(SyntheticSource(draft, number, stage.draft), wire.peer, wire.peer.clock)
        target = Target(InVirtualTime(stage, wire, model), wire, wire.clock)

        def write(
            mode: str, reference: tuple[int, ...], target=target, prompt=prompt, params=params
        ) -> tuple[int, ...]:
            stopper = Stopper(params, (), letters)
            for _ in target.decode(prompt, Schedule.of(mode), params, stopper, reference=reference):
                pass
            return tuple(stopper.tokens)

        alone = write("ar", ())
        assert write(mode, alone) == alone
        texts.append(list(target.passes)[1:-1])
    return texts


@pytest.mark.parametrize("a", tiered(CHANCES, lambda a: a == 0.7))
@pytest.mark.parametrize("mode", ["sd:4", "pearl", "tree"])
def test_a_real_target_commits_what_theory_says(model: VerifierModel, mode: str, a: float):
    """Time is virtual, so that the two speeds have the ratio that theory is asked about; the model is not."""
    texts = written(model, mode, SyntheticDraft((a,), 1 / C))
    expected = theory.tokens_per_pass_sd(a, 4) if mode == "sd:4" else theory.speedup_pearl(a, C)
    runs = [passes[first : first + 8] for passes in texts for first in range(0, len(passes) - 7, 8)]
    assert within(expected, [statistics.fmean(one.committed for one in run) for run in runs])


def test_by_position_each_guess_is_right_as_often_as_it_was_told(model: VerifierModel):
    """A block of three commits 1 + 0.9 + 0.9 x 0.8 + 0.9 x 0.8 x 0.7 tokens; at each depth its own share is right."""
    draft, chances = SyntheticDraft((0.9, 0.8, 0.7)), (0.9, 0.8, 0.7)
    for passes in (simulated("sd:3", draft), [one for some in written(model, "sd:3", draft) for one in some]):
        assert within(1 + 0.9 + 0.72 + 0.504, [one.committed for one in passes if one.offered == 3])
        for (right, read), chance in zip(by_depth(passes), chances, strict=True):
            assert abs(right / read - chance) <= 3.3 * math.sqrt(chance * (1 - chance) / read)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.mark.parametrize("a", tiered(CHANCES, lambda a: a == CHANCES[1]))
def test_on_a_real_target_too(target: str, a: float):
    params = SamplingParams(max_new_tokens=300, temperature=1.0, seed=1, ignore_eos=True)
    with Engine.from_pretrained(
        target, f"synthetic:{a}", mode="sd", processes=1, dtype="float32", pin_cores="off"
    ) as one:
        text, alone = (one.generate([5, 6, 7], params, mode=mode) for mode in ("sd:4", "ar"))
        with pytest.raises(UsageError, match="synthetic"):
            one.generate([5], SamplingParams(temperature=1.0, method="rejection"))
    assert text.tokens == alone.tokens
    assert within(theory.tokens_per_pass_sd(a, 4), [p.committed for p in text.stats.passes[1:-1] if p.offered == 4])


@pytest.mark.slow
def test_on_a_real_target_in_two_processes(target: str):
    a, params = 0.7, SamplingParams(max_new_tokens=300, temperature=1.0, seed=1, ignore_eos=True)
    with Engine.from_pretrained(target, f"synthetic:{a}", mode="tree", dtype="float32") as one:
        assert "synthetic" in one.description
        alone, *texts = (one.generate([5, 6, 7], params, mode=mode) for mode in ("ar", "pearl", "tree"))
    for text in texts:
        passes = text.stats.passes
        assert text.tokens == alone.tokens and share_within(a, passes)
        assert 1.0 < len(text.tokens) / len(passes) < theory.tokens_per_pass_ceiling(a)
