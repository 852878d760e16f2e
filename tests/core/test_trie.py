"""The trie against the plainest model of it: a text, and the set of all claims about it that it has not refuted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toys import examples

import pearl.core.trie
from pearl.core.token_buckets import ANY
from pearl.core.trie import Node, Trie, path_numbers, walk
from pearl.models.language_model import _branches

Path = tuple[int, ...]
TOKENS = st.integers(0, 2)


def agree(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one of them begins with the other."""
    return all(x == y for x, y in zip(a, b, strict=False))


def below(node: Node, path: Path = ()) -> set[Path]:
    """The paths of all nodes below a node."""
    paths: set[Path] = set()
    for token, child in node.children.items():
        assert child.token == token and child.position == node.position + 1 and not child.dead
        paths |= {(*path, token)} | below(child, (*path, token))
    return paths


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, list[int]]]:
    """What happens to a trie: a guess below any node that was ever known, or a verdict."""
    grow = st.tuples(st.just("grow"), st.integers(0, 30), st.lists(TOKENS, min_size=1, max_size=1))
    commit = st.tuples(st.just("commit"), st.just(0), st.lists(TOKENS, min_size=1, max_size=3))
    return draw(st.lists(st.one_of(grow, grow, grow, commit), max_size=40))


def check(prompt: Sequence[int], history: list[tuple[str, int, list[int]]]) -> None:
    trie = Trie(prompt)
    claims: set[Path] = set()  # whole texts, from the first token on
    known: list[tuple[Node, Path]] = [(trie.root, tuple(prompt))]  # handles are never given up, however stale
    for kind, which, tokens in history:
        if kind == "grow":
            parent, path = known[which % len(known)]
            text = (*path, tokens[0])
            node = trie.grow(parent, tokens[0])
            assert (node is not None) == agree(text, trie.tokens), "a guess lives while the text has not refuted it"
            if node is not None:
                assert (node.token, node.position) == (tokens[0], len(text) - 1)
                known.append((node, text))
                claims.add(text)
        else:
            was_there = (*trie.tokens, *tokens) in claims
            before = list(trie.tokens)
            assert trie.commit(tokens) == was_there, "a hit is a new root that had been guessed"
            assert trie.tokens == before + tokens
            known.append((trie.root, tuple(trie.tokens)))
        size = len(trie.tokens)
        assert (trie.root.token, trie.root.position) == (trie.tokens[-1], size - 1)
        alive = {text[size:] for text in claims if len(text) > size and agree(text, trie.tokens)}
        assert below(trie.root) == alive, "all guesses that the text has not refuted, and no other"
        for node, path in known:
            assert node.dead == (not agree(path, trie.tokens))


@examples(300)
@given(st.lists(TOKENS, min_size=1, max_size=3), histories())
def test_a_trie_holds_the_guesses_that_the_text_has_not_refuted(prompt: list[int], history: list):
    check(prompt, history)


@pytest.mark.parametrize("forgotten", ["to kill", "to drop"])
def test_a_trie_that_forgets_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch):
    """A dead guess could not harm a text, since the target judges every guess. It would only waste a row; so here is
    where it is noticed."""
    if forgotten == "to kill":
        monkeypatch.setattr(pearl.core.trie, "_kill", lambda children: None)
    else:

        def commit(self: Trie, tokens: Sequence[int]) -> bool:
            stale = self.root.children
            self.root = Node(tokens[-1], self.root.position + len(tokens), children=stale)
            self.tokens += tokens
            return tokens[-1] in stale

        monkeypatch.setattr(Trie, "commit", commit)

    @settings(max_examples=300, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(st.lists(TOKENS, min_size=1, max_size=3), histories())
    def the_property(prompt: list[int], history: list) -> None:
        check(prompt, history)

    with pytest.raises(AssertionError):
        the_property()


def test_the_docstrings_example():
    a, b, c, d, x = range(5)
    trie = Trie([a, b])
    at_b = trie.root
    trie.commit([c, d])
    assert trie.grow(at_b, x) is None, "the text says c follows b"
    true = trie.grow(at_b, c)
    assert true is not None and true.position == 2 and not trie.root.children, "true, and already committed"
    assert trie.grow(true, d) is trie.root
    assert trie.grow(trie.grow(true, d), x) is trie.root.children[x]


def test_the_same_guess_twice_is_one_node_and_keeps_what_it_was_drawn_from():
    trie = Trie([0])
    first = trie.grow(trie.root, 1, ((1, 0.5), (2, 0.5)))
    again = trie.grow(trie.root, 1)
    assert first is again and again.proposal == ((1, 0.5), (2, 0.5))


def test_of_two_sources_that_guess_the_same_the_one_that_has_read_more_is_believed():
    for origins in (("recycled", "draft"), ("draft", "recycled")):
        trie = Trie([0])
        for origin in origins:
            node = trie.grow(trie.root, 1, logp=-float(len(origin)), origin=origin)
        assert (node.origin, node.logp) == ("draft", -5.0) and len(trie.root.children) == 1


def test_the_subtree_below_a_hit_is_kept_and_its_siblings_die():
    trie = Trie([0])
    right, wrong = trie.grow(trie.root, 1), trie.grow(trie.root, 2)
    after, lost = trie.grow(right, 3), trie.grow(wrong, 3)
    assert trie.commit([1])
    assert trie.root is right and trie.chain() == [after]
    assert (right.dead, after.dead, wrong.dead, lost.dead) == (False, False, True, True)


def test_a_chain_deeper_than_pythons_stack_dies_at_once():
    trie = Trie([1])
    node, deep = trie.root, []
    for token in range(5000):
        node = trie.grow(node, token)
        deep.append(node)
    trie.commit([99])
    assert all(one.dead for one in deep)


def test_a_chain_follows_first_guesses():
    trie = Trie([0])
    one = trie.grow(trie.root, 1)
    trie.grow(trie.root, 9)
    two = trie.grow(one, 2)
    assert trie.chain() == [one, two]


def all_below(trie: Trie) -> dict[Path, tuple[Node, float]]:
    """Every node below the root with its joint log-probability, by its path."""
    found: dict[Path, tuple[Node, float]] = {}

    def look(node: Node, path: Path, logp: float) -> None:
        for token, child in node.children.items():
            found[(*path, token)] = (child, logp + child.logp)
            look(child, (*path, token), logp + child.logp)

    look(trie.root, (), 0.0)
    return found


@st.composite
def tries(draw: st.DrawFn) -> Trie:
    trie = Trie([0])
    nodes = [trie.root]
    for parent, token, logp in draw(st.lists(st.tuples(st.integers(0, 20), TOKENS, st.floats(-5, 0)), max_size=20)):
        nodes.append(trie.grow(nodes[parent % len(nodes)], token, logp=logp))
    return trie


@examples(200)
@given(tries(), st.integers(0, 22), st.integers(0, 6))
def test_the_best_nodes_are_the_likeliest_and_come_with_their_parents(trie: Trie, limit: int, deepest: int):
    nodes = {path: one for path, one in all_below(trie).items() if len(path) <= deepest}
    best = trie.best(limit, deepest)
    assert len(best) == min(limit, len(nodes))
    paths: list[Path] = []
    for place, likely in enumerate(best):
        assert -1 <= likely.parent < place
        paths.append((*(paths[likely.parent] if likely.parent >= 0 else ()), likely.node.token))
        node, logp = nodes[paths[-1]]
        assert likely.node is node and likely.depth == len(paths[-1])
        assert likely.logp == pytest.approx(logp)
    logps = [likely.logp for likely in best]
    assert logps == sorted(logps, reverse=True) and len(set(paths)) == len(paths)
    left_out = [logp for path, (_, logp) in nodes.items() if path not in paths]
    assert not left_out or not best or max(left_out) <= min(logps) + 1e-9


@examples(200)
@given(tries())
def test_paths_are_those_that_a_model_lays_beside_its_chain(trie: Trie):
    """The numbers agree with the paths that `pearl.models.language_model` makes of the same nodes, the chain first."""
    nodes = trie.best(15)
    numbers = path_numbers(nodes)
    assert all(
        number >= (numbers[node.parent] if node.parent >= 0 else 0) for node, number in zip(nodes, numbers, strict=True)
    )
    order = [-1, *sorted(range(len(nodes)), key=lambda place: numbers[place] > 0)]
    rows = {place: row for row, place in enumerate(order)}
    chain = 1 + numbers.count(0)
    parents = [rows[nodes[place].parent] for place in order[chain:]]
    positions = [0 if place < 0 else nodes[place].depth for place in order]
    paths = _branches(chain, parents, positions, ANY)
    own = [{order[row] for row in path.overlay[-path.own :]} for path in paths]
    assert own == [{place for place, n in enumerate(numbers) if n == number} for number in range(1, len(own) + 1)]
    assert len(own) == max(numbers, default=0)


def test_among_equals_the_first_guess_comes_first_so_that_a_chain_without_probabilities_is_best():
    trie = Trie([0])
    one = trie.grow(trie.root, 5)
    trie.grow(trie.root, 4)
    two = trie.grow(one, 3)
    assert [likely.node for likely in trie.best(2)] == [one, trie.root.children[4]]
    assert [likely.node for likely in trie.best(9)] == [one, trie.root.children[4], two]


@examples(200)
@given(tries(), st.integers(0, 6))
def test_leaves_are_what_nothing_follows_the_likeliest_first(trie: Trie, deepest: int):
    nodes = all_below(trie)
    wanted = {path for path, (node, _) in nodes.items() if not node.children and len(path) <= deepest}
    leaves = trie.leaves(deepest)
    if not nodes:
        assert leaves == [((), trie.root, 0.0)]
        return
    assert {path for path, _, _ in leaves} == wanted and len(leaves) == len(wanted)
    for path, node, logp in leaves:
        assert node is nodes[path][0] and logp == pytest.approx(nodes[path][1])
    logps = [logp for _, _, logp in leaves]
    assert logps == sorted(logps, reverse=True)


def test_a_root_alone_is_a_leaf_unless_even_it_is_too_deep():
    trie = Trie([0])
    assert [node for _, node, _ in trie.leaves(0)] == [trie.root]
    assert trie.leaves(-1) == []


def test_a_trie_does_not_share_its_text_with_the_prompt():
    prompt = [1, 2]
    Trie(prompt).commit([3])
    assert prompt == [1, 2]


@examples(200)
@given(
    st.lists(st.tuples(st.integers(0, 20), TOKENS), max_size=20),
    st.lists(TOKENS, min_size=30, max_size=30),
    st.sets(st.integers(0, 20)),
)
def test_a_walk_commits_the_targets_picks_as_far_as_the_pass_has_read(
    guesses: list[tuple[int, int]], picks: list[int], left_out: set[int]
):
    """Of a tree of any shape, whose rows are any nodes of it: no token but a pick is committed, and none beyond."""
    trie = Trie([0])
    nodes = [trie.root]
    for parent, token in guesses:
        node = trie.grow(nodes[parent % len(nodes)], token)
        if node not in nodes:
            nodes.append(node)
    rows = {node: row for row, node in enumerate(nodes) if row == 0 or row not in left_out}
    asked: list[Node] = []

    def pick(node: Node) -> int:
        asked.append(node)
        return picks[rows[node]]

    committed = walk(trie.root, rows, pick)
    assert committed == [picks[rows[node]] for node in asked], "every token is the pick of a row of the pass"
    assert asked[0] is trie.root
    for token, before, after in zip(committed, asked, asked[1:], strict=False):
        assert before.children[token] is after, "and each row follows the pick before it"
    assert asked[-1].children.get(committed[-1]) not in rows, "until a pick leads out of the pass"
