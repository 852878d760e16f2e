"""What the feature drafter drafts is what it was trained to, its trees are the likeliest, and the text is the target's.

No drafter here is trained: what decides a text must not depend on it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import EAGER, IDLE, ScriptedChannel, examples, extend, scrambled, ticks, together
from trained import (
    CONFIG,
    WEIGHTS,
    WORDS,
    bits_of,
    drafter_for,
    read_drafter,
    save_as_before,
    save_toy_target,
    small_target,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl.checkpoints import quantized
from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import load_target
from pearl.config.engine_config import EngineConfig
from pearl.core.logits.processing import LogitsProcessing
from pearl.core.messages import Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.trie import Node, Trie
from pearl.drafters.draft_source import MIN_PATH_LOGP, ChainQuery, TreeQuery
from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.one_pass import PathsQuery
from pearl.engine import Engine
from pearl.errors import CheckpointError, UsageError
from pearl.models import language_model as model_module
from pearl.models.batch_invariance import branches_agree, find_invariant_counts
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.verifier import VerifierModel
from pearl.roles.target import Target

pytestmark = pytest.mark.usefixtures("own_cache", "hurried")

DEPTHS = 4


@functools.cache
def network(features: tuple[int, ...] = (0, 2), depths: int = DEPTHS) -> FeatureDrafter:
    return drafter_for(small_target(), features, depths).requires_grad_(False)


# The tree


class Told(FeatureSource):
    """Its guesses are tables that it was given, the same ones after every path."""

    def __init__(self, tables: Sequence[Sequence[float]], beam: int = 0, longest: int = 1000):
        """tables: of each depth the log-probabilities of tokens 0, 1, ..."""
        self.asked: list[list[tuple[int, ...]]] = []
        self.tables: list = [()] * len(tables)
        super().__init__(network((), len(tables)), beam, longest)
        self.tables = [
            sorted(((token, q, ()) for token, q in enumerate(table)), key=lambda one: -one[1]) for table in tables
        ]
        self.asked.clear()

    def read_on(self, asked):
        self.asked += [[tuple(path) for path in one.paths] for one in asked]
        return [[(self.tables[:1] * len(path), self.tables) for path in one.paths] for one in asked]


def paths_of(trie: Trie) -> dict[tuple[int, ...], float]:
    """Every node by its path, with its joint log-probability."""
    found: dict[tuple[int, ...], float] = {}

    def visit(node: Node, path: tuple[int, ...], logp: float) -> None:
        for child in node.children.values():
            found[(*path, child.token)] = logp + child.logp
            visit(child, (*path, child.token), logp + child.logp)

    visit(trie.root, (), 0.0)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_its_guesses_are_what_the_targets_bans_leave(temperature: float):
    params = SamplingParams(temperature=temperature, seed=3)
    source = FeatureSource(network((), 3))
    source.begin(0, params)
    first = [token for (token, _, _), *_ in source.guess([1, 2, 3], [[]])[0]]
    params = replace(params, bad_words_ids=[[3, first[0]]], suppress_tokens=first[1:])
    processing, trie = LogitsProcessing.of(params, 1), Trie([1, 2, 3])
    source.begin(0, params)
    grown = source.extend([TreeQuery(0, trie, 4, 9, processing=processing)])[0]
    assert grown and first[0] not in trie.root.children
    assert not {node.token for _, node in grown} & set(first[1:])
    chain = source.propose_batch([ChainQuery(0, [1, 2, 3], (), 3, processing)])[0]
    assert len(chain) == 3 and chain[0][0] != first[0] and not {token for token, _ in chain} & set(first[1:])
    source.begin(0, params)
    plain = source.propose_batch([ChainQuery(0, [1, 2, 3], (), 3)])[0]
    assert [token for token, _ in plain] == first, "the query says what is done"


def test_a_small_tree_by_hand():
    """0.6 0.4, then 0.9 0.1, with a beam of two: the second depth keeps 0.54 (0 0) and 0.36 (1 0), not 0.06 and 0.04;
    the third goes on from these two, and its best two follow the likelier of them."""
    tables = [[math.log(q) for q in row] for row in ((0.6, 0.4), (0.9, 0.1), (0.55, 0.45))]
    trie = Trie([7])
    extend(Told(tables, beam=2), trie, 1, 9)
    found = {path: round(math.exp(logp), 3) for path, logp in paths_of(trie).items()}
    assert found == {(0,): 0.6, (1,): 0.4, (0, 0): 0.54, (1, 0): 0.36, (0, 0, 0): 0.297, (0, 0, 1): 0.243}


ROWS = st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True)
TABLES = st.lists(ROWS.map(lambda row: [math.log(x / sum(row)) for x in row]), min_size=1, max_size=4)


@examples(60)
@given(TABLES, st.integers(1, 12))
def test_each_depth_holds_the_likeliest_paths_of_all(tables: list[list[float]], beam: int):
    """Since every parent meets the same candidates, the best paths of a depth go on from the best ones above."""
    trie = Trie([7])
    extend(Told(tables, beam), trie, 1, 99)
    found = paths_of(trie)
    for depth in range(1, len(tables) + 1):
        joint = {
            path: sum(tables[d][token] for d, token in enumerate(path))
            for path in itertools.product(*(range(len(table)) for table in tables[:depth]))
        }
        best = sorted(joint.values(), reverse=True)[:beam]
        kept = [q for place, q in enumerate(best) if q >= MIN_PATH_LOGP or place == 0]
        mine = {path: q for path, q in found.items() if len(path) == depth}
        assert sorted(mine.values(), reverse=True) == pytest.approx(kept)
        assert all(q == pytest.approx(joint[path]) for path, q in mine.items())


@examples(30)
@given(TABLES, st.integers(1, 6), st.integers(1, 3))
def test_parents_come_before_children_and_no_path_is_deeper_than_asked(tables: list, beam: int, deepest: int):
    trie = Trie([7])
    source, known = Told(tables, beam), {trie.root}
    for turn in range(4):
        for parent, node in extend(source, trie, 2, deepest):
            assert parent in known and node not in known and parent.children[node.token] is node
            known.add(node)
        assert max(map(len, paths_of(trie)), default=0) <= deepest
        if turn == 1:
            trie.commit([trie.chain()[0].token])


@given(TABLES)
def test_a_beam_of_one_is_a_chain_of_the_best_guesses(tables: list[list[float]]):
    trie = Trie([7])
    extend(Told(tables, beam=1), trie, 1, 99)
    assert [node.token for node in trie.chain()] == [table.index(max(table)) for table in tables]
    assert len(paths_of(trie)) == len(tables)


def test_one_forward_goes_on_from_the_likeliest_leaves():
    source, trie = Told([[math.log(0.5), math.log(0.3), math.log(0.2)]]), Trie([7])
    extend(source, trie, 1, 9)
    extend(source, trie, 2, 9)
    assert source.asked == [[()], [(0,), (1,)]], "two leaves, the likeliest"
    extend(source, trie, 99, 9)
    assert len(source.asked[-1]) <= FeatureSource.max_leaves and source.asked[-1][0] == (0, 0)


def test_once_the_text_has_grown_the_way_to_a_leaf_is_guessed_again():
    """The target has said more, so what follows the nodes on the way is known better; what was there stays."""
    source, trie = Told([[math.log(0.9)], [math.log(0.9)]]), Trie([7])
    extend(source, trie, 1, 9)
    trie.commit([0])
    assert list(paths_of(trie)) == [(0,)]
    source.tables = [[(0, math.log(0.5), ()), (3, math.log(0.4), ())]] * 2
    grown = [(parent.position, node.token) for parent, node in extend(source, trie, 1, 9)]
    assert grown[0] == (1, 3), "beside the node on the way"
    assert (1, 0) not in grown, "which is there already, and known to the target"
    assert {(0,), (3,), (0, 0), (0, 3)} <= paths_of(trie).keys()
    before = len(paths_of(trie))
    extend(source, trie, 1, 9)
    assert len(paths_of(trie)) > before, "and on from there"


def test_what_is_hardly_likely_is_not_offered_but_the_best_guess_is():
    faint = math.log(0.001)
    trie = Trie([7])
    extend(Told([[faint, faint - 1]]), trie, 1, 9)
    assert list(paths_of(trie)) == [(0,)]


def test_it_rests_where_nothing_likely_is_left_to_go_on_from():
    """A drafter that waits for its target would else draft what is never read, and be late with what is."""
    source, trie = Told([[math.log(0.3), math.log(0.1)]] * 2), Trie([7])
    while extend(source, trie, 1, 99):
        assert len(source.asked) < 20
    assert 4 * math.log(0.3) > MIN_PATH_LOGP > 5 * math.log(0.3)
    assert max(map(len, paths_of(trie))) == 6, "two depths a forward, and none begins below the line"
    forwards = len(source.asked)
    assert extend(source, trie, 4, 99) == [] and len(source.asked) == forwards


def test_it_rests_where_the_text_may_not_go_on():
    source = Told([[0.0]] * 3, longest=10)
    assert extend(source, Trie([7] * 7), 1, 9) == [] and source.propose([7] * 8, 3) == []
    assert len(extend(source, Trie([7] * 6), 1, 9)) == 1 and len(source.propose([7] * 7, 3)) == 3
    assert extend(source, Trie([7]), 1, 0) == []


def test_it_is_a_source_of_trees_that_observes():
    source = FeatureSource(network())
    assert source.grows_trees and source.makes_trees_alone and source.layers
    assert source.layers == (0, 2) and source.depths == DEPTHS
    assert len(source.costs) == FeatureSource.max_leaves and all(seconds > 0 for seconds in source.costs)


# Inference equals training


class Raw(FeatureSource):
    """Gives the logits as they are."""

    def _ranked(self, queries):
        return [one.logits for one in queries]


FEATURES = torch.randn(40, 2 * 64, generator=torch.Generator().manual_seed(1)).bfloat16()


def as_trained(text: Sequence[int], confirmed: int, features: tuple[int, ...]) -> torch.Tensor:
    """Logits [K, V] at the last of `text`, whose first `confirmed` positions have features, by the training's code."""
    drafter, count = network(features), len(text)
    mask = SlotMask(count + 3, DEPTHS)
    shifted = torch.cat([torch.zeros(1, FEATURES.shape[1]), FEATURES.float()])[:count]
    withheld = torch.tensor([i == 0 or i > confirmed for i in range(count)])
    last = torch.tensor([count - 1])
    with torch.no_grad():
        known = drafter.known(
            torch.tensor([list(text)]), shifted[None] if features else shifted[None, :, :0], withheld[None]
        )
        hidden, made = drafter.stack(known, torch.arange(count), mask.known(count))
        ahead, _ = drafter.stack(drafter.slots(1, DEPTHS - 1), mask.positions(last), mask.of(last, count), made)
        return drafter.logits(torch.cat([hidden[0, -1:], ahead[0]]))


def assert_as_trained(source: Raw, prefix: list[int], paths: list[list[int]], features: tuple[int, ...]) -> None:
    for path, (way, logits) in zip(
        paths, source.read_on([PathsQuery(source._sequences[0], prefix, paths)])[0], strict=True
    ):
        expected = as_trained([*prefix, *path], len(prefix) - 1, features)
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
        assert len(way) == len(path)
        for end, row in enumerate(way):
            expected = as_trained([*prefix, *path[:end]], len(prefix) - 1, features)[0]
            torch.testing.assert_close(row, expected, atol=2e-3, rtol=1e-3)


BOTH = pytest.mark.parametrize("features", [(0, 2), ()], ids=["features", "tokens only"])
PATHS = st.lists(st.lists(st.integers(0, WORDS - 1), max_size=3), min_size=1, max_size=3)
TURNS = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, WORDS - 1), max_size=6), PATHS), max_size=4)


@BOTH
@examples(25)
@given(turns=TURNS)
def test_a_draft_is_what_the_training_would_say(features: tuple[int, ...], turns: list):
    """While the text grows piece by piece, with paths that have no features, and where it parts from what was read."""
    source, text = Raw(network(features)), [3, 1, 4]
    if features:
        source.observe(bits_of(FEATURES))
    for back, more, paths in turns:
        text = [*text[: max(1, len(text) - back)], *more]
        assert_as_trained(source, text, paths, features)


@BOTH
def test_a_new_text_knows_nothing_of_the_last_one(features: tuple[int, ...]):
    source = Raw(network(features))
    for shift in (0, 5):
        source.begin(0, SamplingParams())
        if features:
            source.observe(bits_of(FEATURES[shift:]))
        out = source.guess([3, 1, 4, 1, 5], [[9]])[0]
        if not shift:
            torch.testing.assert_close(out, as_trained([3, 1, 4, 1, 5, 9], 4, features), atol=2e-3, rtol=1e-3)
            first = out
    assert torch.allclose(out, first, atol=1e-4) == (not features), "other features, another draft"


def test_features_may_come_in_pieces():
    whole, parts = Raw(network()), Raw(network())
    whole.observe(bits_of(FEATURES))
    text = list(range(9))
    for first, last in ((0, 3), (3, 4), (4, 9)):
        parts.observe(bits_of(FEATURES[first:last]))
        parts.guess(text[: last + 1], [[]])
    torch.testing.assert_close(parts.guess(text, [[2]]), whole.guess(text, [[2]]), atol=1e-4, rtol=1e-4)


@BOTH
def test_its_guesses_are_the_likeliest_tokens_of_the_draft_vocabulary(features: tuple[int, ...]):
    source, text = FeatureSource(network(features)), [3, 1, 4, 1, 5]
    if features:
        source.observe(bits_of(FEATURES[:4]))
    (guesses,) = source.guess(text, [[]])
    logp = as_trained(text, 4, features).log_softmax(-1)
    for depth, row in zip(guesses, logp, strict=True):
        best, places = row.topk(len(depth))
        assert [token for token, _, _ in depth] == source._vocabulary[places].tolist()
        assert [q for _, q, _ in depth] == pytest.approx(best.tolist(), abs=2e-3)
    proposed = source.propose(text, 9)
    assert [token for token, _ in proposed] == [depth[0][0] for depth in guesses]
    assert len(source.propose(text, 2)) == 2, "as many as there is room for"


def test_a_chain_goes_on_beyond_what_the_target_has_read():
    source, text = FeatureSource(network()), [3, 1, 4, 1, 5]
    source.observe(bits_of(FEATURES[:2]))
    expected = as_trained(text, 2, (0, 2)).argmax(-1)
    assert [token for token, _ in source.propose(text, 9)] == source._vocabulary[expected].tolist()


def test_without_features_of_the_text_there_is_nothing_to_draft_from():
    source = FeatureSource(network())
    assert extend(source, Trie([1, 2, 3]), 1, 9) == [] and source.propose([1, 2, 3], 4) == []
    source.observe(bits_of(FEATURES[:2]))
    assert extend(source, Trie([1, 2, 3]), 1, 9) and source.propose([1, 2, 3], 4)
    assert FeatureSource(network(())).propose([1, 2, 3], 4), "a drafter of tokens needs none"


# What the target sends


PROMPT = [5, 9, 5, 9, 5]
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=7)


@functools.cache
def tapped(layers: tuple[int, ...] = (0, 1)) -> VerifierModel:
    """The small target as loading prepares it, with side branches if its attention agrees."""
    model = small_target()
    made = tiny.verifier(model, hooks=HiddenStateHooks(model, layers) if layers else None)
    made.buckets = find_invariant_counts(
        lambda tokens, first: made.forward(list(tokens), first, len(tokens)), made.vocabulary
    )
    made.buckets = replace(made.buckets, branches=made.verifies_trees and branches_agree(made, made.vocabulary))
    made.forget()
    return made


class Scattered(FeatureSource):
    """Trees in which the target's own text runs along side branches: it knows the text, and puts it second."""

    def __init__(self, text: Sequence[int]):
        self.text: list[int] = []
        super().__init__(network((0, 1)))
        self.text = list(text)

    def read_on(self, asked):
        return [[self._told(len(one.prefix), len(one.prefix) + len(path)) for path in one.paths] for one in asked]

    def _told(self, first: int, last: int):
        right = [*self.text[first : last + 3], *[0] * (last + 3)][: last + 3 - first]
        tables = [[((token + 1) % WORDS, -0.6, ()), (token, -0.8, ())] for token in right]
        return tables[: last - first], tables[last - first :]


@pytest.mark.parametrize("script", [EAGER, IDLE, scrambled(1)], ids=["eager", "idle", "scrambled"])
@pytest.mark.parametrize("mode", ["sd", "pearl", "tree"])
@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
def test_the_features_of_a_text_are_those_of_a_plain_forward(mode: str, params: SamplingParams, script, monkeypatch):
    """Position by position, whatever passes read it: prompts in parts, chains, trees, side branches that were taken."""
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 16)
    reader = tapped()
    prompt = PROMPT * 8
    own = together(Target(reader), prompt, Schedule.of("ar"), params, decode=str).tokens
    channel = ScriptedChannel(Scattered([*prompt, *own]), script)
    target = Target(reader, channel, ticks())
    assert together(target, prompt, Schedule.of(mode), params, decode=str).tokens == own
    verdicts = [message for message in channel.sent if isinstance(message, Verdict)]
    assert all(verdict.features is not None for verdict in verdicts)
    rows = np.concatenate([verdict.features for verdict in verdicts])
    assert len(rows) == verdicts[-1].position, "of all positions before the last root, each once"
    assert [len(v.features) for v in verdicts[1:]] == [len(v.tokens) for v in verdicts[1:]]
    with torch.no_grad():
        out = small_target()(torch.tensor([[*prompt, *own][: len(rows)]]), output_hidden_states=True)
    expected = torch.cat([out.hidden_states[layer + 1][0] for layer in (0, 1)], -1)
    mine = torch.from_numpy(rows).view(torch.bfloat16).float()
    torch.testing.assert_close(mine, expected, atol=2e-2, rtol=2e-2)
    if mode == "tree" and script is EAGER:
        assert any(p.sides and p.committed > 1 for p in target.passes), "a side branch was read and taken"


@pytest.mark.parametrize("mode", ["sd", "tree"])
def test_a_second_turn_tells_the_features_of_the_first_too_and_reads_only_what_is_new(mode: str):
    reader, prompt, reply = tapped(), PROMPT * 8, [4, 5, 6]
    own = together(Target(reader), prompt, Schedule.of("ar"), GREEDY, decode=str).tokens
    source = Scattered([*prompt, *own])
    channel = ScriptedChannel(source, EAGER)
    target = Target(reader, channel, ticks())
    together(target, prompt, Schedule.of(mode), GREEDY, decode=str)
    before, talk = len(channel.sent), [*prompt, *own, *reply]
    together(target, talk, Schedule.of(mode), GREEDY, decode=str, continues=True)
    assert target.passes[0].rows == 1 + len(reply)
    verdict = next(message for message in channel.sent[before:] if isinstance(message, Verdict))
    assert len(verdict.features) == verdict.position
    with torch.no_grad():
        out = small_target()(torch.tensor([[*talk, *verdict.tokens[:-1]]]), output_hidden_states=True)
    expected = torch.cat([out.hidden_states[layer + 1][0] for layer in (0, 1)], -1)
    mine = torch.from_numpy(verdict.features).view(torch.bfloat16).float()
    torch.testing.assert_close(mine, expected, atol=2e-2, rtol=2e-2)


def test_a_feature_drafter_keeps_its_cache_in_a_second_turn():
    source, text = FeatureSource(network((0, 1))), [*PROMPT, 7, 8]
    fresh = FeatureSource(network((0, 1)))
    width = 2 * network((0, 1)).shape.hidden
    features = torch.randn(len(text) + 2, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    features = features.view(torch.int16).numpy()
    source.observe(features[: len(text) - 1])
    source.guess(text, [[]])
    longer, rows = [*text, 9, 10], source.rows
    source.begin(0, GREEDY, continues=True)
    for one in (source, fresh):
        one.observe(features[: len(longer) - 1])
    (mine,), (wanted,) = source.guess(longer, [[]]), fresh.guess(longer, [[]])
    for depth, other in zip(mine, wanted, strict=True):
        assert [token for token, _, _ in depth] == [token for token, _, _ in other]
        assert [q for _, q, _ in depth] == pytest.approx([q for _, q, _ in other], abs=1e-4)
    assert source.rows - rows == fresh.rows - len(text)


def test_a_target_without_taps_sends_no_features():
    channel = ScriptedChannel(FeatureSource(network(())), EAGER)
    together(Target(tiny.verifier(small_target()), channel, ticks()), PROMPT, Schedule.of("sd"), GREEDY, decode=str)
    verdicts = [message for message in channel.sent if isinstance(message, Verdict)]
    assert verdicts and all(verdict.features is None for verdict in verdicts)


# The text


@functools.cache
def alone(params: SamplingParams):
    return together(Target(tiny.verifier(small_target())), PROMPT, Schedule.of("ar"), params, decode=str)


@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "mode, beam, features, script",
    [
        ("sd", 0, (0, 1), EAGER),
        ("sd", 1, (), EAGER),
        ("pearl", 0, (0, 1), EAGER),
        ("pearl", 1, (0, 1), scrambled(3)),
        ("pearl-no-pre", 0, (), scrambled(4)),
        ("pearl-no-post", 0, (0, 1), EAGER),
        ("tree", 0, (0, 1), EAGER),
        ("tree", 0, (), scrambled(3)),
        ("tree", 1, (0, 1), scrambled(5)),
    ],
)
def test_an_untrained_drafter_changes_no_text(mode: str, beam: int, features: tuple[int, ...], script, params):
    source = FeatureSource(network(features), beam)
    channel = ScriptedChannel(source, script)
    target = Target(tapped(features), channel, ticks())
    assert together(target, PROMPT, Schedule.of(mode), params, decode=str) == alone(params)
    assert source.forwards and target.draft_stats and not target.draft_stats.failed


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return save_toy_target(tmp_path_factory.mktemp("toy") / "target")


@pytest.fixture(scope="module")
def drafter_folder(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    return save_as_before(drafter_for(AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32), (1, 3)), folder)


@contextlib.contextmanager
def opened(toy: str, folder: Path, **options: object):
    with Engine.from_pretrained(toy, f"feature:{folder}", **{"dtype": "float32", "max_length": 300, **options}) as made:
        yield made


@pytest.mark.parametrize("beam", [0, 1])
def test_in_one_process_the_text_is_the_targets_own(toy, drafter_folder, beam: int):
    core = str(min(os.sched_getaffinity(0)))
    with opened(toy, drafter_folder, mode="sd", processes=1, tree_top_k=beam, target_cores=core) as engine:
        for params in (GREEDY, SEEDED):
            written = engine.generate("def f(x):", params)
            assert written.tokens == engine.generate("def f(x):", params, mode="ar").tokens
            assert written.stats.drafter and written.stats.drafter.forwards > 0 and not written.stats.drafter.failed
        offered = [one.q for p in written.stats.passes for one in p.judged]
        assert (max(map(len, offered)) == 1) == (beam == 1), "a beam of one offers one guess a place"


@pytest.mark.slow
def test_in_two_processes_the_text_is_the_targets_own_in_every_mode(toy, drafter_folder):
    with opened(toy, drafter_folder) as engine:
        for params in (GREEDY, SEEDED):
            own = engine.generate("def f(x):", params, mode="ar").tokens
            for mode in ("sd", "pearl", "tree"):
                written = engine.generate("def f(x):", params, mode=mode)
                assert written.tokens == own
                assert written.stats.drafter and not written.stats.drafter.failed
                assert written.stats.drafter.forwards > 0


# What does not fit


def test_a_drafter_of_another_target_is_refused(toy, drafter_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16)
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "other")
    config = EngineConfig(str(tmp_path / "other"), f"feature:{drafter_folder}", dtype="float32")
    sentence = "was trained for the small target, and its weights are not those of this target: name the target"
    with pytest.raises(UsageError, match=sentence):
        load_target(preflight(config))
    with pytest.raises(UsageError, match=sentence):
        drafter_for(small_target()).attach(small_target(seed=1))


def changed(folder: Path, to: Path, **values: object) -> Path:
    """A drafter's folder whose note says something else."""
    to.mkdir()
    (to / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    note = json.loads((folder / CONFIG).read_text()) | values
    (to / CONFIG).write_text(json.dumps({name: value for name, value in note.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"hidden": 32}, "hidden states of 32 numbers, and .* has 64: name its target"),
        ({"vocabulary": 10_000}, "name its target, or train one for this target"),
        ({"format": 9}, "has format 9, this version reads 1"),
        ({"depths": None}, r"drafter\.json is not a feature drafter's"),
        ({"colour": "red"}, r"drafter\.json is not a feature drafter's"),
        ({"features": 3}, r"drafter\.json is not a feature drafter's"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(toy, drafter_folder, tmp_path, values, sentence):
    folder = changed(drafter_folder, tmp_path / "changed", **values)
    with pytest.raises(UsageError, match=sentence):
        preflight(EngineConfig(toy, f"feature:{folder}", dtype="float32"))


@pytest.mark.parametrize(
    "option, value", [("draft_dtype", "bfloat16"), ("draft_load_in", "8bit"), ("draft_vocabulary", 50)]
)
def test_options_of_draft_models_are_refused(toy, drafter_folder, monkeypatch, option, value):
    monkeypatch.setattr(quantized, "need_bitsandbytes", lambda: None)
    with pytest.raises(UsageError, match=f"{option} is for draft models: leave it out"):
        preflight(EngineConfig(toy, f"feature:{drafter_folder}", dtype="float32", **{option: value}))


def test_layers_that_the_target_does_not_have_are_refused(toy, drafter_folder, tmp_path):
    folder = changed(drafter_folder, tmp_path / "changed", features=[1, 77])
    with pytest.raises(
        UsageError, match=r"reads the outputs of the layers 1, 77, and .* has 6 layers: name its target"
    ):
        preflight(EngineConfig(toy, f"feature:{folder}", dtype="float32"))


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), r"drafter\.safetensors can't be read"),
        (lambda path: path.write_bytes(b"no weights"), r"drafter\.safetensors can't be read"),
        (Path.unlink, "holds no weights"),
    ],
    ids=["truncated", "broken", "missing"],
)
def test_weights_that_are_not_whole_are_refused(toy, drafter_folder, tmp_path, harm, sentence):
    folder = changed(drafter_folder, tmp_path / "changed")
    harm(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=sentence):
        read_drafter(folder)
    folder = changed(drafter_folder, tmp_path / "other", layers=3)
    with pytest.raises(CheckpointError, match=r"are not those that its config\.json says.*[Mm]issing"):
        read_drafter(folder)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"draft": "feature:/not/there"}, "The draft /not/there does not exist: give a hub id, a folder"),
        ({"tree_top_k": -1}, "tree_top_k must be a number of paths up to 64, or 0 for auto, not -1"),
        ({"tree_top_k": 65}, "tree_top_k must be"),
        ({"tree_top_k": 1.5}, "tree_top_k must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(UsageError) as caught:
        EngineConfig(**options)
    assert sentence in str(caught.value)


def test_a_folder_of_anything_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        EngineConfig(draft=f"feature:{tmp_path}")


def test_the_stopper_is_no_part_of_a_draft():
    """A text that ends inside a pass: the verdict is not sent, and nothing is left over for the next text."""
    reader = tapped()
    channel = ScriptedChannel(FeatureSource(network((0, 1))), EAGER)
    target = Target(reader, channel, ticks())
    for most in (1, 2, 9):
        params = SamplingParams(max_new_tokens=most, ignore_eos=True)
        own = alone(params)
        stopper = Stopper(params, (), str)
        said = [token for part in target.decode(PROMPT, Schedule.of("tree"), params, stopper) for token in part]
        assert said == own.tokens
