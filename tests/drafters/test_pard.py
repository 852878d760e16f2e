"""A PARD model's guesses are those of one plain forward over text, path and mask rows; mask rows are gone afterwards.

The models are random: what decides a text must not depend on them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiers import tiered
from toys import EAGER, ScriptedChannel, examples, extend, falsified, scrambled, ticks, together

from pearl.core.logits.processing import LogitsProcessing
from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import ranked
from pearl.core.schedule import Schedule
from pearl.core.trie import Trie
from pearl.drafters.draft_source import MAX_CHILDREN, ChainQuery, TreeQuery
from pearl.drafters.one_pass import PathsQuery
from pearl.drafters.pard import PardSource
from pearl.engine import Engine
from pearl.models.draft_model import DraftModel
from pearl.models.kv_cache.draft_tree_cache import DraftTreeCache
from pearl.roles.target import Target

pytestmark = pytest.mark.usefixtures("own_cache", "hurried")

MASK, DEPTHS = 159, 4
FAMILIES = ("llama", "qwen2", "qwen3")
WORDS = st.integers(0, 9)


@functools.cache
def plain(family: str, seed: int = 0) -> Any:
    """As transformers makes it."""
    return tiny.random_model(tiny.CONFIGS[family](), seed)


def reader(family: str, seed: int = 0, **options: object) -> DraftModel:
    return tiny.draft_model(tiny.random_model(tiny.CONFIGS[family](), seed), **options)


class Raw(PardSource):
    """Its tables are logits."""

    def _ranked(self, queries):
        self.positions = [at for one in queries for at in one.positions]
        return [one.logits for one in queries]


def by_transformers(family: str, text: Sequence[int], path: Sequence[int], way: bool = True) -> torch.Tensor:
    """Logits of the rows that are asked for, by one forward of transformers over the same ids; the mask token is never
    guessed."""
    ids = torch.tensor([[*text, *path, *[MASK] * (DEPTHS - 1)]])
    with torch.no_grad():
        logits = plain(family)(ids).logits[0, -((len(path) if way else 0) + DEPTHS) :]
    return logits.index_fill(1, torch.tensor([MASK]), -torch.inf)


def assert_as_transformers(source: Raw, family: str, text: list[int], paths: list[list[int]], way: bool) -> None:
    query = PathsQuery(source._sequences[0], text, paths, way=way)
    for path, (before, table) in zip(paths, source.read_on([query])[0], strict=True):
        expected = by_transformers(family, text, path, way)
        assert len(before) == (len(path) if way else 0)
        torch.testing.assert_close(torch.cat([before, table]), expected, atol=1e-4, rtol=1e-4)
    expected_positions = [
        len(text) + row for path in paths for row in range(0 if way else len(path), len(path) + DEPTHS)
    ]
    assert source.positions == expected_positions, "of the token that each row guesses"


PATHS = st.lists(st.lists(WORDS, max_size=4), min_size=1, max_size=3)
TURNS = st.lists(st.tuples(st.integers(0, 9), st.lists(WORDS, max_size=6), PATHS, st.booleans()), max_size=4)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@examples(12)
@given(turns=TURNS)
def test_its_logits_are_those_of_a_plain_forward_of_the_same_ids(family: str, turns: list):
    """While the text grows piece by piece, along paths or not; GPT-2 makes its masks itself and reads chains."""
    source, text = Raw(reader(family), MASK, DEPTHS), [3, 1, 4]
    for back, more, paths, way in turns:
        text = [*text[: max(1, len(text) - back)], *more]
        assert_as_transformers(source, family, text, paths, way)


def test_the_mask_token_is_never_guessed():
    """A tied head has a row of it, which is what mask rows are fed."""
    model, text = reader("llama"), [3, 1, 4]
    source = PardSource(model, MASK, DEPTHS, top_k=8)
    read = model.read_leaves_together

    def liked(queries: list) -> list[torch.Tensor]:
        return [logits.index_fill(1, torch.tensor([MASK]), 99.0) for logits in read(queries)]

    model.read_leaves_together = liked  # type: ignore[method-assign]
    for _, guesses in source.read_on([PathsQuery(source._sequences[0], text, [(), (2,)])])[0]:
        assert all(token != MASK for row in guesses for token, _, _ in row)


def mask_rows(model: DraftModel) -> int:
    """Nodes of the mask token below the text, in the cache of the first batch slot."""
    tree = model._slots[0].tree
    stack, found = [tree._end] if tree else [], 0
    while stack:
        node = stack.pop()
        found += node.token == MASK
        stack += node.children.values()
    return found


@given(TURNS)
@examples(20)
def test_no_mask_row_stays_in_the_cache(turns: list):
    model = reader("llama")
    source, text = PardSource(model, MASK, DEPTHS), [3, 1, 4]
    for back, more, paths, way in turns:
        text = [*text[: max(1, len(text) - back)], *more]
        source.read_on([PathsQuery(source._sequences[0], text, paths, way=way)])
        assert mask_rows(model) == 0
        tree = model._slots[0].tree
        assert tree and int(tree._used.sum()) <= len(text) + sum(map(len, paths)) + 40


def test_that_test_can_fail():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftTreeCache, "give_back", lambda self, token: None)
        assert falsified(test_no_mask_row_stays_in_the_cache.hypothesis.inner_test, TURNS, most=20)


def test_a_text_with_the_mask_token_in_it_is_read_as_any_other():
    source = Raw(reader("llama"), MASK, DEPTHS)
    for text in ([3, MASK, 4], [3, MASK, 4, MASK], [3, MASK, 4, MASK, MASK, 5]):
        assert_as_transformers(source, "llama", text, [[], [MASK, 2], [7]], way=True)


def test_what_was_read_of_a_path_is_not_read_again():
    """Once a path is in the cache, each forward reads its leaf and the mask rows."""
    model = reader("llama")
    source, read = PardSource(model, MASK, DEPTHS), []
    forward = model.run
    model.run = lambda tokens, *rest: (read.append(tokens), forward(tokens, *rest))[1]  # type: ignore[method-assign]
    state = source._sequences[0]
    for text, path in (([1, 2, 3], []), ([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 5, 6]), ([1, 2, 3, 4, 5], [6, 7])):
        source.read_on([PathsQuery(state, text, [path], way=False)])
    masks = [MASK] * (DEPTHS - 1)
    assert read == [[1, 2, 3, *masks], [4, 5, *masks], [6, *masks], [7, *masks]]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_texts_are_guessed_in_one_forward_as_each_is_alone(family: str):
    texts = {0: [3, 1, 4], 1: [5, 9, 2, 6], 2: [8]}
    source = Raw(reader(family, max_sequences=3), MASK, DEPTHS)
    for slot in texts:
        source.begin(slot, SamplingParams())
    before = source.forwards
    queries = [PathsQuery(source._sequences[slot], text, [[], [7, 7]]) for slot, text in texts.items()]
    for query, read in zip(queries, source.read_on(queries), strict=True):
        for path, (way, table) in zip(query.paths, read, strict=True):
            expected = by_transformers(family, query.prefix, path)
            torch.testing.assert_close(torch.cat([way, table]), expected, atol=1e-4, rtol=1e-4)
    assert source.forwards == before + 1


def test_a_chain_is_the_best_guess_of_every_row():
    source, text = PardSource(reader("qwen3"), MASK, DEPTHS), [3, 1, 4]
    expected = by_transformers("qwen3", text, [5]).argmax(-1).tolist()[1:]
    chain = source.propose_batch([ChainQuery(0, text, (5,), 9)])[0]
    assert chain == [(token, ()) for token in expected]
    assert source.propose_batch([ChainQuery(0, text, (5,), 2)])[0] == chain[:2], "as many as there is room for"


def test_a_tree_holds_the_likeliest_paths_by_the_product_of_its_rows():
    source, text = PardSource(reader("llama"), MASK, DEPTHS, top_k=3), [3, 1, 4]
    trie = Trie(text)
    extend(source, trie, 4, 99)
    rows = ranked(by_transformers("llama", text, []), SamplingParams(), range(3, 3 + DEPTHS), MAX_CHILDREN)
    assert [node.token for node in trie.chain()] == [row[0][0] for row in rows]
    for likely in trie.best(99):
        logp = {token: q for token, q, _ in rows[likely.depth - 1]}
        assert likely.node.logp == pytest.approx(logp[likely.node.token], abs=1e-4)


def test_its_guesses_are_what_the_targets_bans_leave():
    source, text = PardSource(reader("llama"), MASK, DEPTHS), [3, 1, 4]
    banned = source.propose(text, 9)[0][0]
    params = SamplingParams(suppress_tokens=[banned])
    processing, trie = LogitsProcessing.of(params, len(text)), Trie(text)
    assert banned not in {token for token, _ in source.propose_batch([ChainQuery(0, text, (), 9, processing)])[0]}
    grown = source.extend([TreeQuery(0, trie, 4, 9, processing=processing)])[0]
    assert grown and banned not in {node.token for _, node in grown}


def test_it_rests_where_its_mask_rows_would_not_fit():
    source = PardSource(reader("llama", max_length=20), MASK, DEPTHS)
    assert source.propose([1] * 17, 9) == [] and extend(source, Trie([1] * 16), 4, 9) == []
    assert len(source.propose([1] * 16, 9)) == DEPTHS and extend(source, Trie([1] * 15), 4, 9)


def test_a_new_text_knows_nothing_of_the_last_one_and_a_second_turn_goes_on():
    model = reader("llama")
    source, read = PardSource(model, MASK, DEPTHS), []
    source.propose([1, 2, 3], 9)
    run = model.run
    model.run = lambda tokens, *rest: (read.append(tokens), run(tokens, *rest))[1]  # type: ignore[method-assign]
    masks = [MASK] * (DEPTHS - 1)
    source.begin(0, SamplingParams(), continues=True)
    source.propose([1, 2, 3, 4], 9)
    source.begin(0, SamplingParams())
    source.propose([1, 2, 3, 4], 9)
    assert read == [[4, *masks], [1, 2, 3, 4, *masks]] or read == [[3, 4, *masks], [1, 2, 3, 4, *masks]]


# The text


GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=1.0, seed=7)
RULED = SamplingParams(
    max_new_tokens=9, ignore_eos=True, temperature=0.7, seed=7, repetition_penalty=1.2, suppress_tokens=[2, 3]
)
PROMPT = [5, 9, 5, 9, 5]


@functools.cache
def target(family: str) -> Any:
    return tiny.verifier(tiny.random_model(tiny.CONFIGS[family](), 1))


@functools.cache
def alone(family: str, which: str):
    return together(Target(target(family)), PROMPT, Schedule.of("ar"), PARAMS[which], decode=str)


PARAMS = {"greedy": GREEDY, "seeded": SEEDED, "ruled": RULED}


@pytest.mark.parametrize("which", tiered(PARAMS, lambda which: which == "greedy"))
@pytest.mark.parametrize("mode", ["sd", "pearl", "tree"])
@pytest.mark.parametrize("family, seed", [("llama", 2), ("qwen2", 2), ("qwen3", 1), ("qwen3", 2)])
def test_an_untrained_drafter_changes_no_text(family: str, mode: str, which: str, seed: int):
    """The same weights as the target's are often right at the first row and wrong at the next."""
    source = PardSource(reader(family, seed), MASK, DEPTHS)
    writer = Target(target(family), ScriptedChannel(source, EAGER if seed == 1 else scrambled(3)), ticks())
    assert together(writer, PROMPT, Schedule.of(mode), PARAMS[which], decode=str) == alone(family, which)
    assert source.forwards and writer.draft_stats and not writer.draft_stats.failed


# A checkpoint


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory) -> tuple[str, Path]:
    """The tiny target, and its draft model as a PARD checkpoint: its mask rows are of a token that nobody writes."""
    folder = tmp_path_factory.mktemp("pard") / "draft"
    shutil.copytree(pair[1], folder)
    _say(folder, pard_token=270)
    return pair[0], folder


def _say(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return folder


def _opened(target: str, folder: Path, **options: Any) -> Engine:
    core = {"target_cores": str(min(os.sched_getaffinity(0)))} if options.get("processes") == 1 else {}
    return Engine.from_pretrained(target, str(folder), **{"dtype": "float32", "max_length": 200, **core, **options})


def test_in_one_process_the_text_is_the_targets_own_and_the_drafter_is_said_at_start(folders):
    with _opened(*folders, mode="sd", processes=1, draft_depths=3) as engine:
        assert "draft: PARD llama language model, 1 layer, 3 tokens a forward" in engine.description
        for params in PARAMS.values():
            written = engine.generate("def f(x):", params)
            assert written.tokens == engine.generate("def f(x):", params, mode="ar").tokens
            assert written.stats.drafter and written.stats.drafter.forwards > 0 and not written.stats.drafter.failed
        assert max(one.offered - one.sides for one in written.stats.passes) > 1, "one forward gave several tokens"


@pytest.mark.slow
def test_in_two_processes_the_text_is_the_targets_own_in_every_mode(folders):
    rejection = replace(SEEDED, method="rejection")
    with _opened(*folders, max_sequences=3) as engine:
        for params in PARAMS.values():
            own = engine.generate("def f(x):", params, mode="ar").tokens
            for mode in ("sd", "pearl", "tree"):
                written = engine.generate("def f(x):", params, mode=mode)
                assert written.tokens == own and written.stats.drafter and not written.stats.drafter.failed
        texts = ["def f(x):", "the", "in the"]
        own = [engine.generate(text, SEEDED, mode="ar").tokens for text in texts]
        for mode in ("pearl", "tree"):
            assert [one.tokens for one in engine.generate(texts, SEEDED, mode=mode)] == own
            assert len(engine.generate("def f(x):", rejection, mode=mode).tokens) == 9
