"""What a drafter has read is a memo: with it or without it, each path's logits are those of its own text.

`DraftTreeCache` is tested against a machine that is nothing but slots: each holds the last token written to it, and a
row sees what its mask says. A row whose view is not exactly the text before it would have been read wrong by any model.
"""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import examples, falsified

import pearl.models.language_model
from pearl.models.draft_model import DraftModel, Overtaken
from pearl.models.kv_cache.draft_tree_cache import DraftTreeCache, TreeNode

SLOTS = 48
TOKENS = st.integers(0, 2)
NEAR = {"atol": 1e-3, "rtol": 0}
Path = tuple[int, ...]


class Slots:
    """A model that writes down what it sees."""

    def __init__(self, slots: int):
        self.leaves = DraftTreeCache(slots)
        self._held: dict[int, tuple[int, int]] = {}  # slot: (position, token)
        self.rows = 0

    def read(self, text: list[int], paths: list[Path], chunk: int = 5) -> list[list[int]]:
        """The text that each path's row has seen, itself included."""
        plan = self.leaves.plan(text, paths)
        wanted: list[list[int]] = []
        for part in plan.chunks(chunk):
            assert part.mask.visible.shape == (1, 1, len(part.tokens), part.seen)
            slots = part.slots.tolist()
            assert len(set(slots)) == len(slots) and max(slots) < part.seen
            self._held.update(zip(slots, zip(part.positions.tolist(), part.tokens, strict=True), strict=True))
            self.rows += len(slots)
            for row in range(len(slots)):
                seen = sorted(self._held[slot] for slot in part.mask.visible[0, 0, row].nonzero().flatten().tolist())
                assert [position for position, _ in seen] == list(range(len(seen))), "each position is seen once"
                assert len(seen) == int(part.positions[row]) + 1
                if row in part.wanted.tolist():
                    wanted.append([token for _, token in seen])
        check_slots(self.leaves)
        return [wanted[place] for place in plan.order]

    def give_up(self, text: list[int], paths: list[Path]) -> None:
        """Reading these is given up when all their rows are written and none is answered."""
        plan = self.leaves.plan(text, paths)
        self._held.update((node.slot, (node.position, node.token)) for node in plan.nodes)
        self.leaves.undo(plan)
        check_slots(self.leaves)
        added = set(plan.added)
        assert not added & set(nodes(self.leaves)) and set(plan.nodes) - added <= set(nodes(self.leaves))


def nodes(leaves: DraftTreeCache) -> Iterator[TreeNode]:
    """All that it remembers below the committed prefix."""
    stack = list(leaves._end.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()


def check_slots(leaves: DraftTreeCache) -> None:
    """No slot is two tokens', and none is lost."""
    slots = [*leaves._prefix_slots, *(node.slot for node in nodes(leaves))]
    assert len(set(slots)) == len(slots), "a slot that two share"
    assert sorted(slots + leaves._free) == list(range(leaves._slots)), "a slot is in use or free"
    assert sorted(leaves._used.nonzero()[0].tolist()) == sorted(slots)
    assert sorted(leaves._seen.nonzero()[0].tolist()) == sorted(leaves._prefix_slots)


Turn = tuple[str, float, list[int], list[Path]]
PATHS = st.lists(st.lists(TOKENS, max_size=4).map(tuple), min_size=1, max_size=4)
TURNS: st.SearchStrategy[list[Turn]] = st.lists(
    st.tuples(
        st.sampled_from(["on a path", "on a path", "on", "back", "same", "other"]),
        st.floats(0, 1),
        st.lists(TOKENS, min_size=1, max_size=3),
        PATHS,
    ),
    min_size=2,
    max_size=12,
)


def go(text: list[int], last: list[Path], turn: Turn, longest: int) -> list[int]:
    """The next text: along a path that was read, on with other tokens, back to a beginning, or another text."""
    kind, share, tokens, _ = turn
    at = int(share * len(text))
    following = {
        "on a path": [*text, *last[int(share * (len(last) - 1))]],
        "on": text + tokens,
        "back": text[: at + 1],
        "same": text,
        "other": text[:at] + tokens,
    }[kind]
    return following if len(following) <= longest else tokens


def play(machine: Slots, turns: list[Turn], longest: int) -> None:
    text, last = [0], [()]
    for turn in turns:
        text, last = go(text, last, turn, longest), turn[3]
        assert machine.read(text, last) == [[*text, *path] for path in last], "each row sees its own text, in order"


@examples(200)
@given(TURNS)
def test_every_row_sees_its_own_text_and_nothing_else(turns: list[Turn]):
    play(Slots(SLOTS), turns, longest=SLOTS - 16)  # four paths of four tokens fit beside the longest text


@examples(100)
@given(TURNS, st.sampled_from([16, 32]))
def test_a_cache_that_is_just_large_enough_holds_every_text_and_its_paths(turns: list[Turn], longest: int):
    play(Slots(longest + 16), turns, longest)


@examples(100)
@given(TURNS, st.lists(PATHS, min_size=12, max_size=12))
def test_a_read_that_was_given_up_leaves_no_trace(turns: list[Turn], others: list[list[Path]]):
    """Neither in the slots nor in what later rows see."""
    machine, text, last = Slots(SLOTS), [0], [()]
    for turn, given_up in zip(turns, others, strict=False):
        text, last = go(text, last, turn, SLOTS - 16), turn[3]
        machine.give_up(text, given_up)
        assert machine.read(text, last) == [[*text, *path] for path in last]


def test_what_was_read_is_not_read_again():
    machine = Slots(SLOTS)
    machine.read([1, 2, 3], [()])
    assert machine.rows == 3
    machine.read([1, 2, 3], [(4,), (5,)])
    assert machine.rows == 5, "two leaves"
    machine.read([1, 2, 3], [(4, 6), (5, 7), (4, 8)])
    assert machine.rows == 8, "three more"
    machine.read([1, 2, 3, 4, 8], [(9,)])
    assert machine.rows == 9, "the text went along a path, and its end is in there"
    machine.read([1, 2, 3, 4, 8], [()])
    assert machine.rows == 10, "a row whose logits are gone"


def test_the_slots_of_what_can_not_come_true_are_given_back():
    machine = Slots(SLOTS)
    machine.read([1, 2, 3], [(4,), (5, 6), (7,)])
    machine.read([1, 2, 3, 5], [(6,)])
    assert int(machine.leaves._used.sum()) == 5
    assert machine.read([1, 2, 3, 5, 6], [()]) == [[1, 2, 3, 5, 6]]


def test_a_long_text_takes_memory_by_its_length_and_not_by_its_square():
    count = 3000
    tracemalloc.start()
    leaves = DraftTreeCache(count + 64)
    for _ in leaves.plan(list(range(count)), [()]).chunks(64):
        pass
    leaves.plan(list(range(count + 1)), [()])
    assert tracemalloc.get_traced_memory()[1] < count**2 / 4
    tracemalloc.stop()


def test_more_than_fits_is_asserted():
    with pytest.raises(AssertionError, match="more nodes than slots"):
        DraftTreeCache(4).plan([1, 2, 3], [(4, 5)])


def test_low_slots_come_first_so_that_few_are_read():
    machine = Slots(SLOTS)
    machine.read([1, 2, 3], [(4, 5, 6), (7, 8, 9), (2, 2, 2), (1, 1, 1), (3, 3, 3)])
    plan = machine.leaves.plan([1, 2, 3, 7], [()])
    assert plan.high <= 16


# over a real model


@functools.cache
def model() -> tuple[DraftModel, torch.nn.Module]:
    return tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]())), tiny.random_model(tiny.CONFIGS["llama"]())


@functools.cache
def own_logits(text: tuple[int, ...]) -> torch.Tensor:
    """[V] from the model as transformers runs it, without any cache."""
    with torch.inference_mode():
        return model()[1](torch.tensor([text]), use_cache=False).logits[0, -1]


def own(text: list[int], paths: list[Path]) -> list[torch.Tensor]:
    return [own_logits((*text, *path)) for path in paths]


def assert_says(reader: DraftModel, text: list[int], paths: list[Path]) -> None:
    torch.testing.assert_close(reader.read_leaves(text, paths), torch.stack(own(text, paths)), **NEAR)


@examples(20)
@given(TURNS, st.sets(st.integers(0, 12)), st.sampled_from([2, 512]))
def test_whatever_was_read_before_each_path_is_read_right(turns: list[Turn], chains: set[int], chunk: int):
    """Also where the same reader has read chains in between (`chains`: at these turns)."""
    reader, text, last = model()[0], [0], [()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pearl.models.language_model, "PREFILL_CHUNK", chunk)
        for i, turn in enumerate(turns):
            text, last = go(text, last, turn, 30), turn[3]
            if i in chains:
                wanted = own_logits(tuple(text))
                torch.testing.assert_close(reader.read(text, 1)[0], wanted, atol=1e-3, rtol=0)
            assert_says(reader, text, last)


def test_forgetting_changes_nothing():
    reader, text, paths = model()[0], [1, 2, 3, 4], [(), (5,), (5, 6), (7,)]
    assert_says(reader, text, paths)
    reader.forget()
    assert_says(reader, text, paths)


def test_leaves_after_a_pass_with_branches_and_a_pass_after_leaves_say_the_same():
    reader, text = model()[0], [1, 2, 3, 4]
    for _ in range(2):
        beside = reader.read([*text, 5], 2, side_rows=[(0, 6)])[2]
        torch.testing.assert_close(beside, own_logits((*text, 6)), atol=1e-3, rtol=0)
        assert_says(reader, [*text, 6], [(), (7,)])


def test_a_read_that_failed_leaves_no_false_memory(monkeypatch):
    reader, text, paths = model()[0], [9, 8, 7, 6], [(5,), (4,)]
    assert_says(reader, [1, 2, 3], [()])
    reader.forget()

    def fail(*_: object) -> None:
        raise RuntimeError("this forward was made to fail")

    monkeypatch.setattr(reader, "run", fail)
    with pytest.raises(RuntimeError):
        reader.read_leaves(text, paths)
    monkeypatch.undo()
    assert_says(reader, text, paths)


def test_a_forward_that_is_overtaken_is_given_up_between_layers_and_what_was_read_stays_known(monkeypatch):
    """It is asked before each layer and the head. A text that is still to be read is read to its end."""
    reader = tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]()))
    rows, run = [], reader.run
    monkeypatch.setattr(reader, "run", lambda tokens, *rest: rows.append(len(tokens)) or run(tokens, *rest))
    text, paths = list(range(1, 30)), [(), (5,), (5, 6)]
    reader.overtaken = lambda: True
    assert_says(reader, text, paths)
    last = reader.model.config.num_hidden_layers + 1

    def given_up(read: Callable[[], torch.Tensor]) -> None:
        for times in range(1, last + 1):
            answers = iter([False] * (times - 1) + [True])
            reader.overtaken = answers.__next__
            with pytest.raises(Overtaken):
                read()
            assert not list(answers)
        reader.overtaken = iter([False] * last).__next__

    given_up(lambda: reader.read_leaves([*text, 5], [(6,), (7,)]))
    assert_says(reader, [*text, 5], [(6,), (7, 8)])
    assert rows == [31, *[2] * last, 3], "neither the text again nor the row before"
    reader.overtaken = None
    reader.read([*text, 5], 1)
    given_up(lambda: reader.read([*text, 5, 6, 7], 1))
    torch.testing.assert_close(reader.read([*text, 5, 6, 7], 1)[0], own_logits((*text, 5, 6, 7)), **NEAR)
    assert rows[last + 2 :] == [30, *[2] * last, 2]


def test_a_prompt_is_not_read_again_where_the_forward_after_its_pieces_was_given_up(monkeypatch):
    reader = tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]()))
    rows, run = [], reader.run
    monkeypatch.setattr(reader, "run", lambda tokens, *rest: rows.append(len(tokens)) or run(tokens, *rest))
    monkeypatch.setattr(pearl.models.language_model, "PREFILL_CHUNK", 24)
    text = [token % 50 for token in range(30)]
    reader.overtaken = lambda: True
    with pytest.raises(Overtaken):
        reader.read(text, 1)
    reader.overtaken = None
    torch.testing.assert_close(reader.read(text, 1)[0], own_logits(tuple(text)), **NEAR)
    assert rows == [24, 6, 6]


def test_no_row_is_added_to_the_leaves_of_a_drafter(monkeypatch):
    reader = tiny.draft_model(model()[1])
    rows, run = [], reader.run
    monkeypatch.setattr(reader, "run", lambda tokens, *rest: rows.append(len(tokens)) or run(tokens, *rest))
    reader.read_leaves([1, 2, 3], [()])
    reader.read_leaves([1, 2, 3], [(4,), (5,), (6,)])
    assert rows == [3, 3]


# Break the code on purpose: the property has to fail.


def give_back_slots_that_are_in_use(patch: pytest.MonkeyPatch) -> None:
    """What hangs below a released node is kept."""
    patch.setattr(DraftTreeCache, "_release", lambda self, gone: [self._give_back(node.slot) for node in gone[:1]])


def see_siblings(patch: pytest.MonkeyPatch) -> None:
    """A node sees what hangs beside it."""
    right = DraftTreeCache._add

    def add(self: DraftTreeCache, parent: TreeNode, token: int) -> TreeNode:
        beside = list(parent.children.values())
        child = right(self, parent, token)
        child.parent = beside[-1] if beside else parent
        return child

    patch.setattr(DraftTreeCache, "_add", add)


def take_the_wrong_sibling(patch: pytest.MonkeyPatch) -> None:
    """The committed prefix goes on with another child than the text's."""
    right = DraftTreeCache._follow

    def follow(self: DraftTreeCache, text: list[int]) -> None:
        children = self._end.children
        if len(children) == 2:
            (a, x), (b, y) = children.items()
            self._end.children = {a: y, b: x}
        right(self, text)

    patch.setattr(DraftTreeCache, "_follow", follow)


def never_give_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DraftTreeCache, "_give_back", lambda self, slot: None)


def keep_the_view_of_the_old_text(patch: pytest.MonkeyPatch) -> None:
    """After a cut, new tokens still see what was cut off."""
    right = DraftTreeCache._settle

    def settle(self: DraftTreeCache) -> None:
        before = self._seen
        right(self)
        self._seen |= before

    patch.setattr(DraftTreeCache, "_settle", settle)


MUTANTS = [
    give_back_slots_that_are_in_use,
    see_siblings,
    take_the_wrong_sibling,
    never_give_back,
    keep_the_view_of_the_old_text,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_property_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    assert falsified(
        lambda turns: play(Slots(SLOTS), turns, SLOTS - 16), TURNS, most=500, by=(AssertionError, KeyError)
    )
