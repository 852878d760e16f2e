"""Rows of paths are read once and kept until the text grows: what a forward says is what it says with nothing kept."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import examples
from trained import drafter_for

from pearl.core.params import SamplingParams
from pearl.core.trie import FEATURE, SUFFIX, Trie
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.path_rows import PathRows
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.guesses import Guesses
from pearl.drafters.one_pass import PathsQuery

pytestmark = pytest.mark.usefixtures("hurried")

FEATURES = torch.randn(60, 2 * 64, generator=torch.Generator().manual_seed(1)).bfloat16()
TEXT = torch.randint(0, tiny.VOCABULARY, (60,), generator=torch.Generator().manual_seed(2)).tolist()


class Raw(FeatureSource):
    """Says logits, a row for each guess."""

    def tables(self, queries: Any, logits: Tensor, hidden: Tensor | None = None) -> list[list[tuple[Guesses, Guesses]]]:
        rows = [(one, path) for one in queries for path in one.paths]
        parts = iter(logits.split([one.rows(path, self.depths) for one, path in rows]))
        return [
            [
                (list(part[: -self.depths]), list(part[-self.depths :]))
                for _, part in zip(one.paths, parts, strict=False)
            ]
            for one in queries
        ]


@functools.cache
def source(kind: str) -> Raw:
    name = "feature" if kind == "feature" else "peagle"
    drafter: FeatureDrafter = drafter_for(tiny.random_model(tiny.CONFIGS["llama"]()), (0, 1), 4, 2, kind=name)
    if kind == "windowed":
        drafter.shape = replace(drafter.shape, windows=(3, 0))
    return Raw(drafter.requires_grad_(False))


def told(source: Raw, slot: int, known: int) -> None:
    source.observe(FEATURES[:known].view(torch.int16).numpy(), slot)


PATHS = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=3)
STEPS = st.lists(st.tuples(st.integers(0, 4), PATHS, st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["peagle", "windowed", "feature"])
@examples(25)
@given(st.lists(STEPS, min_size=1, max_size=2))
def test_a_forward_says_what_it_says_with_nothing_kept(kind: str, texts: list[list[tuple[int, list[list[int]], bool]]]):
    """Each step: tokens that the text has grown by, the paths asked about, and whether the way to them is too."""
    drafting, lengths = source(kind), [3] * len(texts)
    for slot in range(len(texts)):
        drafting.begin(slot, SamplingParams())
        told(drafting, slot, 50)
    for step in range(max(map(len, texts))):
        queries = []
        for slot, steps in enumerate(texts):
            if step < len(steps):
                more, paths, way = steps[step]
                lengths[slot] += more
                state = drafting._sequences[slot]
                queries.append(PathsQuery(state, TEXT[: lengths[slot]], paths, way=way))
        found = drafting.read_on(queries)
        drafting.begin(9, SamplingParams())
        told(drafting, 9, 50)
        for query, said in zip(queries, found, strict=True):
            for path, (way, table) in zip(query.paths, said, strict=True):
                drafting._sequences[9].read = []
                alone = replace(query, state=drafting._sequences[9], paths=[path])
                ((way_alone, table_alone),) = drafting.read_on([alone])[0]
                assert len(way) == len(way_alone) == (len(path) if query.way else 0)
                torch.testing.assert_close([*way, *table], [*way_alone, *table_alone], atol=2e-3, rtol=1e-3)


def test_a_row_is_read_once_for_all_paths_and_all_forwards_until_the_text_grows():
    drafting = source("peagle")
    slots = drafting.depths - 1
    drafting.begin(0, SamplingParams())
    told(drafting, 0, 50)

    def rows(length: int, *paths: list[int]) -> int:
        before = drafting.rows
        drafting.read_on([PathsQuery(drafting._sequences[0], TEXT[:length], paths)])
        return drafting.rows - before

    assert rows(10, [1, 2]) == 9 + 2 + slots, "token 0 has no row"
    assert rows(10, [1, 2, 3], [1, 2, 4], [1, 5]) == 3 + 3 * slots
    assert rows(10, [1, 5]) == slots
    assert rows(12, [3]) == 2 + 1 + slots
    assert rows(12, [3, 3]) == 1 + slots


def test_a_text_that_goes_on_from_one_that_ended_with_nothing_new_is_read():
    drafting = source("peagle")
    drafting.begin(0, SamplingParams())
    told(drafting, 0, 50)
    first = drafting.guess(TEXT[:9], [[], [4, 4]])
    drafting.begin(0, SamplingParams(), continues=True)
    told(drafting, 0, 50)
    for before, after in zip(first, drafting.guess(TEXT[:9], [[], [4, 4]]), strict=True):
        torch.testing.assert_close(before, after, atol=2e-3, rtol=1e-3)


def test_after_a_forward_that_failed_all_is_read_again(monkeypatch: pytest.MonkeyPatch):
    drafting = source("peagle")
    drafting.begin(0, SamplingParams())
    told(drafting, 0, 50)
    expected = drafting.guess(TEXT[:12], [[1, 2, 3]])
    drafting.begin(0, SamplingParams())
    told(drafting, 0, 50)
    drafting.guess(TEXT[:9], [[1]])

    def fails(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(drafting, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            drafting.guess(TEXT[:12], [[1, 2, 3]])
    torch.testing.assert_close(drafting.guess(TEXT[:12], [[1, 2, 3]]), expected, atol=2e-3, rtol=1e-3)


def test_a_root_that_only_others_have_extended_is_read_once():
    drafting = source("peagle")
    drafting.begin(0, SamplingParams())
    told(drafting, 0, 50)
    trie = Trie(TEXT[:10])
    trie.grow(trie.root, 3, (), -0.1, SUFFIX)
    asked: list[PathsQuery] = []
    read = FeatureSource.read_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "read_on", lambda queries: (asked.extend(queries), read(drafting, queries))[1])
        patch.setattr(drafting, "tables", functools.partial(FeatureSource.tables, drafting))
        drafting.extend([TreeQuery(0, trie, 15, 8)])
        assert [one.paths for one in asked] == [[[], [3]]]
        trie = Trie(TEXT[:11])
        child = trie.grow(trie.root, 3, (), -0.1, FEATURE)
        assert child is not None
        drafting.extend([TreeQuery(0, trie, 1, 8)])
        assert asked[-1].paths == [[]], "max_rows"


def test_numbers_of_rows():
    paths = PathRows()
    assert paths.grow([7, 8]) == ([0, 1, 2], [7, 8])
    assert paths.grow([7, 9, 8]) == ([0, 1, 3, 4], [9, 8])
    assert paths.grow([]) == ([0], [])
    assert paths.ways == [(), (1,), (1, 2), (1, 3), (1, 3, 4)]
