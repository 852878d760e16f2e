"""Several sources are one: each adds its own, none can stop another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cases import DRAFTING, Case, cases, check, plain_case
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    EAGER,
    Crashing,
    Moody,
    Noise,
    Right,
    ScriptedChannel,
    TableModel,
    alone,
    examples,
    extend,
    ticks,
    together,
)

from pearl.core.params import SamplingParams
from pearl.core.trie import Trie
from pearl.drafters.draft_source import ChainQuery, DraftSource, Grown, TreeQuery
from pearl.drafters.suffix import SuffixSource
from pearl.drafters.tree import TreeSource
from pearl.drafters.united import UnitedSource
from pearl.roles.target import Target

TEXT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def united(*sources: DraftSource) -> UnitedSource:
    made = UnitedSource(sources)
    made.begin(0, SamplingParams())
    return made


def test_a_tree_has_the_nodes_of_all_each_with_its_origin():
    model = TreeSource(TableModel(6, 2, 3, 1.5))
    trie = Trie(TEXT)
    grown = extend(united(SuffixSource(), model), trie, 4, 8)
    origins = {node.origin for _, node in grown}
    assert origins == {"draft", "suffix"}
    assert all(parent.children[node.token] is node for parent, node in grown)
    mine = [node for node in trie.root.children.values() if node.origin == "draft"]
    assert mine, "the model has its say below the root, though another source had a guess there already"


def test_a_chain_is_the_first_ones_that_has_something_to_say():
    one = united(Moody(SuffixSource(), 1), Right([*TEXT, 3, 4]))
    ((token, _, logp, origin),) = one.propose(TEXT, 1)
    assert (token, logp, origin) == (3, 0.0, "draft")
    first = united(SuffixSource(), Right([*TEXT, 5])).propose(TEXT, 1)[0]
    assert first[0] == 3 and first[3] == "suffix" and first[2] < 0


def test_a_source_that_makes_chains_alone_is_part_of_a_tree():
    trie = Trie(TEXT)
    extend(united(Right([*TEXT, 5, 4], chunk=2), SuffixSource()), trie, 8, 8)
    assert trie.root.children[5].children[4].origin == "draft" and trie.root.children[3].origin == "suffix"


@pytest.mark.parametrize("place", [0, 1])
def test_one_that_crashes_stops_no_other_and_is_asked_again_in_the_next_text(place: int):
    crashing, good = Crashing(Right([*TEXT, 5]), 0), Right([*TEXT, 5])
    one = united(*([crashing, good] if place == 0 else [good, crashing]))
    for _ in range(2):
        assert [guess[0] for guess in one.propose(TEXT, 1)] == [5]
    calls = crashing.every
    one.begin(0, SamplingParams())
    one.propose(TEXT, 1)
    assert crashing.every == (calls - 1 if place == 0 else calls)


class RightTree(Right):
    """One node a turn, below the first guesses there are, whoever made them. `raises`: once it has grown one."""

    grows_trees = True

    def __init__(self, text: Sequence[int], raises: bool = False):
        super().__init__(text)
        self.raises = raises

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        grown = [self._extend(query.trie) for query in queries if len(query.trie.chain()) < query.max_depth]
        if self.raises:
            raise RuntimeError("after it has grown something")
        return grown or [[] for _ in queries]

    def _extend(self, trie: Trie) -> Grown:
        leaf = [trie.root, *trie.chain()][-1]
        guesses = self.propose([*trie.tokens, *(node.token for node in trie.chain())], 1)
        grown = [(leaf, trie.grow(leaf, token, logp=-0.1)) for token, _ in guesses]
        return [(parent, node) for parent, node in grown if node]


def test_what_one_has_grown_before_it_raised_holds_the_others_guesses():
    case = plain_case("tree", None, "right")
    case = replace(case, params=SamplingParams(max_new_tokens=60))
    text = case.endless(case.prompt, case.params)
    both = UnitedSource([RightTree(text, raises=True), RightTree(text)])
    target = Target(case.model, ScriptedChannel(both, EAGER), ticks())
    said = together(target, case.prompt, case.schedule, case.params, case.eos)
    assert said == alone(case.model, case.prompt, case.params, case.eos)
    assert len(target.passes) < 20


def test_where_all_have_crashed_it_raises():
    one = united(Crashing(Noise(5), 0), Crashing(Noise(5), 1))
    one.propose(TEXT, 1)
    with pytest.raises(RuntimeError, match="made to crash"):
        one.propose(TEXT, 1)


def test_what_one_failed_at_in_a_batch_is_not_asked_there_again():
    crashing, good = Crashing(Noise(5), 0), Noise(5)
    one = united(crashing, good)
    one.begin(1, SamplingParams())
    queries = [ChainQuery(slot, TEXT, (), 2) for slot in (0, 1)]
    assert all(len(chain) == 1 for chain in one.propose_batch(queries))
    assert crashing.every == -1
    one.propose_batch(queries)
    assert crashing.every == -1


def test_forwards_are_counted_together():
    model = TreeSource(TableModel(6, 2, 3, 1.5))
    one = united(SuffixSource(), model)
    extend(one, Trie(TEXT), 4, 8)
    assert one.forwards == model.forwards == 1 and one.costs == model.costs and math.isfinite(one.rows)


# Any sources, on both sides


PARTS = (
    "right",
    "sometimes",
    "random",
    "a tree",
    "its own tree",
    "suffix",
    "crashing",
    "crashing tree",
    "sure and wrong",
    "too talkative",
    "short of answers",
)


@st.composite
def several(draw: st.DrawFn, modes: Sequence[str] = DRAFTING) -> Case:
    """A drafter of two or three sources, as often as not with as many beside the target."""
    case = draw(cases(modes, ["right"]))
    names = st.lists(st.sampled_from(PARTS), min_size=2, max_size=3)
    beside = (tuple(draw(names)),) if draw(st.booleans()) else ()
    return replace(case, source="+".join(draw(names)), beside=tuple(name for group in beside for name in group))


@examples(30)
@given(several())
def test_whatever_sources_are_united_the_text_is_the_targets_own(case: Case):
    """Some are right, some make things up and are sure of them, some say more or less than they were asked for, some
    raise, also in the middle of their work."""
    target, _ = check(case)
    stats = target.draft_stats
    healthy = not all(name in FAILING for name in case.source.split("+"))
    assert not (stats and stats.failed and healthy), "one that is sound goes on"


FAILING = {"crashing", "crashing tree", "short of answers"}


@examples(10)
@given(several(), st.integers(0, 30))
def test_so_it_is_when_they_are_all_lost(case: Case, moves: int):
    check(case, lost_after=moves)


@pytest.mark.parametrize("lies", ["sure and wrong", "too talkative"])
def test_lies_do_not_keep_a_source_that_is_right_from_being_read(lies: str):
    """What each says is weighed by how often it came true."""
    case = replace(plain_case("tree", None, f"{lies}+right", EAGER, 120), beside=(lies, "right"))
    target, _ = check(case)
    assert len(target.passes) < 75
