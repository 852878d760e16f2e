"""One forward of a drafter extends the leaves that pay, likeliest first, and its own guesses cost it nothing but rows.

What a node's children must be is said by the table that the toy model is made of (`expected`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import distribution
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import TableModel, alone, examples, extend

from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import propose, ranked
from pearl.core.schedule import Schedule
from pearl.core.token_buckets import ANY
from pearl.core.trie import Node, Trie
from pearl.drafters import tree
from pearl.drafters.draft_source import MIN_PATH_LOGP
from pearl.drafters.suffix import SuffixIndex
from pearl.drafters.tree import RANKED, TreeSource
from pearl.predict.script import Times

Path = tuple[int, ...]
V = 8
FLAT = [1.0] * 8


class Silent(SuffixIndex):
    """No guesses of its own."""

    def next(self, spot: Any) -> None:
        return None


class Knowing(SuffixIndex):
    """Knows what a model says after each text, and guesses so far ahead; wrongly with `wrong`, where it is certain."""

    def __init__(self, model: TableModel, ahead: int = 5, wrong: bool = False, match: int = 4):
        super().__init__()
        self.model, self.ahead, self.wrong, self.match = model, ahead, wrong, match

    def place(self, batch_slot: int, tokens: Sequence[int], path: Sequence[int] = ()) -> Any:
        return (*tokens, *path), self.ahead

    def next(self, spot: Any) -> tuple[int, int, Any] | None:
        text, left = spot
        if not left:
            return None
        logits = self.model.after(list(text))
        token = int(logits.argmin() if self.wrong else logits.argmax())
        return token, self.match, ((*text, token), left - 1)


class Watched(TableModel):
    """Takes down what each forward read."""

    def __init__(self, *args: object, **more: object):
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.read_paths: list[list[Path]] = []

    def read_leaves(self, text: Sequence[int], paths: Sequence[Path]) -> torch.Tensor:
        self.read_paths.append(list(paths))
        return super().read_leaves(text, paths)


def started(model: TableModel, params: SamplingParams | None = None, **options: object) -> TreeSource:
    source = TreeSource(model, **options)  # type: ignore[arg-type]
    source.begin(0, params or SamplingParams())
    return source


def joint(trie: Trie, path: Path) -> float:
    logp, node = 0.0, trie.root
    for token in path:
        node = node.children[token]
        logp += node.logp
    return logp


def expected(model: TableModel, text: Sequence[int], path: Path, above: float, params: SamplingParams) -> list[int]:
    """The children of a node whose path has the joint log-probability `above`."""
    logits = model.after([*text, *path])[None]
    guesses = ranked(logits, params, [len(text) + len(path)], RANKED)[0]
    faint = next((i for i, (_, logp, _) in enumerate(guesses) if i and above + logp < MIN_PATH_LOGP), len(guesses))
    return [token for token, _, _ in guesses[:faint]]


def paths_of(node: Node, path: Path = ()) -> dict[Path, Node]:
    found = {path: node}
    for token, child in node.children.items():
        found |= paths_of(child, (*path, token))
    return found


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    seed=st.integers(0, 99),
    method=st.sampled_from(["seeded", "rejection"]),
)
TEXTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
COSTS = st.sampled_from([(), FLAT, [1, 1.1, 1.2, 2.0], [1, 3, 9, 27]])
MODELS = st.builds(Watched, st.just(V), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.7, 2.0, 5.0]))


@st.composite
def owns(draw: st.DrawFn) -> SuffixIndex | None:
    kind = draw(st.sampled_from(["silent", "its text", "knowing", "wrong"]))
    if kind in ("knowing", "wrong"):
        return Knowing(TableModel(V, 2, draw(st.integers(0, 3)), 2.0), draw(st.integers(1, 6)), kind == "wrong")
    return Silent() if kind == "silent" else None


@examples(150)
@given(MODELS, TEXTS, PARAMS, COSTS, owns(), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_whatever_is_extended_the_tree_is_what_the_model_says_of_each_node(
    model: Watched, text, params, costs, lookahead, most: int, deepest: int, fixed: bool, data: st.DataObject
):
    source, trie = started(model, params, costs=costs, lookahead=lookahead), Trie(text)
    for _ in range(data.draw(st.integers(1, 6))):
        before = set(paths_of(trie.root))
        grown = extend(source, trie, most, deepest, fixed)
        nodes = paths_of(trie.root)
        names = {node: path for path, node in nodes.items()}
        new = [names[child] for _, child in grown]
        assert set(new) == set(nodes) - before and len(set(new)) == len(new), "the new nodes, each once"
        if not grown:
            break
        known = before | {()}
        for (parent, _), path in zip(grown, new, strict=True):
            assert names[parent] == path[:-1] and path[:-1] in known, "parents first"
            known.add(path)
        read = model.read_paths[-1]
        assert len(read) <= most and len(set(read)) == len(read), "no more rows than it may, none twice"
        assert all(len(path) <= deepest for path in nodes), "none deeper than it may"
        for path in {path[:-1] for path in new}:
            children = list(nodes[path].children)
            assert children == expected(model, trie.tokens, path, joint(trie, path), params)
        if data.draw(st.booleans()):  # the text goes on, along the tree or not
            some = data.draw(st.sampled_from([path for path in nodes if path] or [(0,)]))
            trie.commit([*some, data.draw(st.integers(0, V - 1))])
    assert source.forwards == len(model.read_paths) and source.rows == sum(map(len, model.read_paths))
    assert 0 <= source.lookahead_hits <= source.lookahead_rows <= source.rows


@examples(60)
@given(MODELS, TEXTS, st.integers(1, 8), st.integers(1, 4))
def test_without_guesses_of_its_own_it_extends_the_likeliest_leaves(model: Watched, text, most: int, forwards: int):
    source, trie = started(model, costs=FLAT, lookahead=Silent()), Trie(text)
    for _ in range(forwards):
        leaves = {path: joint(trie, path) for path, node in paths_of(trie.root).items() if not node.children}
        extend(source, trie, most, 9)
        read = model.read_paths[-1]
        assert len(read) == min(most, len(leaves)), "free rows: as many as there are"
        left_out = [logp for path, logp in leaves.items() if path not in read]
        assert min(leaves[path] for path in read) >= max(left_out, default=-math.inf)


@examples(60)
@given(MODELS, TEXTS, st.integers(2, 6))
def test_guesses_that_are_confirmed_are_extended_as_if_they_had_been_read_one_by_one(model: Watched, text, most: int):
    knowing, plain = started(model, costs=FLAT, lookahead=Knowing(model)), started(model, lookahead=Silent())
    fast, slow = Trie(text), Trie(text)
    extend(knowing, fast, most, 99)
    assert knowing.lookahead_rows == knowing.lookahead_hits == most - 1 and knowing.forwards == 1
    for length in range(most):  # the chain of the model's own picks, one forward each
        leaf = [path for path in paths_of(slow.root) if len(path) == length and not any(rank_of(slow, path))]
        assert len(leaf) == 1
        extend_one(plain, slow, leaf[0])
    told, wanted = paths_of(fast.root), paths_of(slow.root)
    assert told.keys() == wanted.keys()
    for path, node in told.items():
        assert node.logp == pytest.approx(wanted[path].logp) and node.proposal == wanted[path].proposal
        assert list(node.children) == list(wanted[path].children), "in the same order"


def rank_of(trie: Trie, path: Path) -> list[int]:
    """Which child of its parent each node of the path is."""
    ranks, node = [], trie.root
    for token in path:
        ranks.append(list(node.children).index(token))
        node = node.children[token]
    return ranks


def extend_one(source: TreeSource, trie: Trie, path: Path) -> None:
    """A forward over one leaf, which need not be the likeliest."""
    node = paths_of(trie.root)[path]
    leaves = Trie.leaves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trie,
            "leaves",
            lambda self, deepest, origin=None: [leaf for leaf in leaves(self, deepest) if leaf[1] is node],
        )
        extend(source, trie, 1, 99)


@examples(60)
@given(MODELS, TEXTS, st.integers(2, 6))
def test_guesses_that_are_not_confirmed_leave_no_trace(model: Watched, text, most: int):
    class Wrong(Knowing):
        def next(self, spot: Any) -> tuple[int, int, Any]:
            return V, 4, spot  # not a token of the model

    wrong, trie = started(model, costs=FLAT, lookahead=Wrong(model)), Trie(text)
    extend(wrong, trie, most, 99)
    assert wrong.lookahead_rows == most - 1 and wrong.lookahead_hits == 0
    assert set(paths_of(trie.root)) == {(), *[(t,) for t in expected(model, text, (), 0.0, SamplingParams())]}


def test_guesses_that_came_true_are_trusted_and_others_are_not():
    """Until they are read before the leaves that they follow, or no longer."""
    model = Watched(V, 2, 1, 2.0)
    shares = {}
    for wrong in (False, True):
        source, trie = started(model, costs=[1.0, 1.3, 1.6], lookahead=Knowing(model, 1, wrong)), Trie([0])
        for _ in range(200):
            extend(source, trie, 3, 9)
            trie.commit(alone(model, trie.tokens, SamplingParams(max_new_tokens=1), ()).tokens)
        shares[wrong] = source.lookahead_rows / source.rows
        assert source.lookahead_hits == (0 if wrong else source.lookahead_rows)
    assert shares[True] < 0.2 < 0.3 < shares[False]


@pytest.mark.parametrize("costs, rows", [(FLAT, 6), ((), 6), ([1.0, 100.0], 1), ([1.0, 1.01, 100.0], 2)])
def test_rows_are_taken_while_they_bring_more_than_they_cost(costs: Sequence[float], rows: int):
    model = Watched(V, 2, 5, 0.3)  # unsure: many children, none likely
    source, trie = started(model, costs=costs, lookahead=Silent()), Trie([0, 1])
    extend(source, trie, 6, 9)
    assert len(trie.root.children) >= 6
    extend(source, trie, 6, 9)
    assert len(model.read_paths[-1]) == rows


def test_beyond_the_measured_rows_a_tree_expects_what_a_simulation_takes():
    """The rows that are chosen with few measured costs are those chosen with all of them."""
    few = (1.0, 1.0, 1.0, 1.15)  # the mean step pays, and the last one does not
    times = Times(ANY, (1.0,), few, few, 0.0)
    chosen = []
    for costs in (few, [times.draft(rows) for rows in range(1, 17)]):
        model = Watched(40, 2, 5, 0.3)
        source, trie = started(model, costs=costs, lookahead=Silent()), Trie([0, 1])
        for _ in range(4):
            extend(source, trie, 16, 9)
        chosen.append(model.read_paths)
    assert chosen[0] == chosen[1] and max(map(len, chosen[0])) > len(few)


def test_a_fixed_number_of_rows_is_taken_whatever_they_cost():
    for fixed, rows in ((True, 4), (False, 1)):
        model = Watched(V, 2, 5, 0.3)
        source, trie = started(model, costs=[1.0, 100.0], lookahead=Silent()), Trie([0, 1])
        extend(source, trie, 4, 9, fixed)
        extend(source, trie, 4, 9, fixed)
        assert len(model.read_paths[-1]) == rows


def test_the_rule_stops_where_a_row_adds_less_than_the_forward_yields_a_second():
    """By brute force: no smaller prefix of the likeliest leaves yields more a second than what is taken."""
    for table in range(30):
        costs = [1.0, 1.2, 1.5, 1.9, 2.4, 3.0]
        model = Watched(V, 2, table, 1.0)
        source, trie = started(model, costs=costs, lookahead=Silent()), Trie([0, 1])
        extend(source, trie, 6, 9)
        uses = sorted((math.exp(node.logp) for node in trie.root.children.values()), reverse=True)
        extend(source, trie, 6, 9)
        yields = [sum(uses[:rows]) / cost for rows, cost in enumerate(costs, 1) if rows <= len(uses)]
        assert len(model.read_paths[-1]) == yields.index(max(yields)) + 1


def test_nothing_is_read_where_all_leaves_are_deep_enough():
    source, trie = started(Watched(V), lookahead=Silent()), Trie([0])
    assert extend(source, trie, 9, 1)
    assert extend(source, trie, 9, 1) == [] and source.forwards == 1
    assert extend(source, trie, 9, 2)


def test_a_crowd_of_leaves_is_not_made_larger():
    source, trie = started(Watched(6, 1, 3, 0.02), costs=FLAT, lookahead=Silent()), Trie([0])
    while extend(source, trie, 8, 99, True):
        assert len(trie.leaves(98)) <= TreeSource.max_open_leaves + 8 * (RANKED - 1)
    assert len(trie.leaves(98)) > TreeSource.max_open_leaves
    trie.commit([next(iter(trie.root.children))])
    assert len(trie.leaves(98)) <= TreeSource.max_open_leaves and extend(source, trie, 8, 99, True), (
        "until the text moves on"
    )


def test_a_path_that_is_hardly_likely_is_not_offered_unless_nothing_else_follows():
    model = Watched(V, 1, 3, 6.0)
    source, trie = started(model, costs=FLAT, lookahead=Silent()), Trie([0])
    for _ in range(6):
        extend(source, trie, 8, 99, True)
    for path, node in paths_of(trie.root).items():
        assert all(joint(trie, (*path, token)) >= MIN_PATH_LOGP for token in list(node.children)[1:])
    assert any(joint(trie, path) < MIN_PATH_LOGP for path in paths_of(trie.root)), "first children go on below it"


def test_a_guess_that_is_too_unlikely_far_below_the_root_is_offered_once_the_root_has_come_near():
    model, params = Watched(V, 2, 3, 2.0), SamplingParams()
    source, trie = started(model, costs=FLAT, lookahead=Silent()), Trie([0])
    for _ in range(6):
        extend(source, trie, 8, 99, True)
    before = {node: len(node.children) for node in paths_of(trie.root).values()}
    trie.commit([node.token for node in trie.chain()[:2]])
    new = extend(source, trie, 8, 99, True)
    assert any(len(node.children) > before[node] > 0 for node in paths_of(trie.root).values() if node in before)
    for path, node in paths_of(trie.root).items():
        assert not node.children or list(node.children) == expected(model, trie.tokens, path, joint(trie, path), params)
    assert len(set(map(id, (child for _, child in new)))) == len(new), "each is told once"
    forwards = source.forwards
    assert extend(source, trie, 8, 0) == [] and source.forwards == forwards, "and not again"


def test_no_text_is_longer_than_the_model_reads():
    model = Watched(V, 2, 0, 1.0, 6)  # its `read_leaves` asserts it
    source, trie = started(model), Trie([0, 1, 2])
    while extend(source, trie, 8, 99):
        pass
    assert max(map(len, paths_of(trie.root))) == 4, "and what follows the longest is guessed"
    trie.commit([next(iter(trie.root.children)), 1, 1])
    assert len(trie.tokens) == 6 and extend(source, trie, 8, 99), (
        "as a chain does, it guesses what follows its last text"
    )


def test_a_tree_is_at_a_loss_beyond_its_models_length():
    source, trie = started(Watched(V, 2, 0, 1.0, 4)), Trie([0] * 5)
    assert extend(source, trie, 8, 99) == []


# sampling


@examples(60)
@given(MODELS, TEXTS, st.integers(0, 99), st.integers(1, 5))
def test_where_the_models_agree_the_first_child_is_the_targets_own_sample(model: Watched, text, seed: int, most: int):
    params = SamplingParams(temperature=1.0, seed=seed, max_new_tokens=6)
    source, trie = started(model, params), Trie(text)
    for _ in range(6):
        extend(source, trie, most, 9)
    chain = [node.token for node in trie.chain()]
    assert chain and chain[:6] == alone(model, text, params, ()).tokens[: len(chain)]


@examples(60)
@given(MODELS, TEXTS, st.integers(0, 99))
def test_in_rejection_sampling_the_first_child_is_the_drawn_one_and_no_other_was(model: Watched, text, seed: int):
    params = SamplingParams(temperature=1.0, seed=seed, method="rejection")
    source, trie = started(model, params), Trie(text)
    for _ in range(3):
        extend(source, trie, 4, 9)
    nodes = paths_of(trie.root)
    assert len(nodes) > 3
    for path, node in nodes.items():
        if node.children:
            first, *others = node.children.values()
            logits = model.after([*text, *path])
            assert (first.token, first.proposal) == propose(logits, params, len(text) + len(path), path)
            assert first.proposal and not any(other.proposal for other in others)


def drawn_with_a_tree(texts: int) -> tuple[distribution.Sample, float]:
    """Seeded texts are the target's own, token for token (test_lossless); so here it is rejection sampling."""
    params, script = distribution.REJECTION, distribution.SCRIPTS["at any time"]
    drawn = distribution.sample(TreeSource(distribution.DRAFT, FLAT), Schedule.of("tree"), params, script, texts=texts)
    return drawn, distribution.chance_of(drawn.counts, distribution.exact(params))


@pytest.mark.slow
def test_with_a_tree_the_text_follows_the_targets_distribution():
    drawn, chance = drawn_with_a_tree(350)
    assert chance > distribution.ALPHA
    ranks = [one.rank for p in drawn.passes for one in p.judged]
    assert {0, 1, None} <= set(ranks), "guesses that were right, corrections that were prepared, and others"
    assert any(p.sides for p in drawn.passes)


def test_a_tree_whose_first_child_is_not_the_drawn_one_shifts_the_distribution(monkeypatch: pytest.MonkeyPatch):
    """The likeliest first, as in a greedy tree, with the q of another: rejection sampling judges the wrong guess."""
    right = tree.ranked_together

    def likeliest_first(queries, most):
        found = []
        for ranked_rows in right(queries, most):
            rows = []
            for row in ranked_rows:
                q = row[0][2]
                tokens = sorted(row, key=lambda guess: -dict(q).get(guess[0], 0.0))
                rows.append([(token, logp, () if i else q) for i, (token, logp, _) in enumerate(tokens)])
            found.append(rows)
        return found

    monkeypatch.setattr(tree, "ranked_together", likeliest_first)
    assert drawn_with_a_tree(150)[1] < distribution.ALPHA
