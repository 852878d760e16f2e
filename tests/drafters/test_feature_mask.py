"""Who sees whom: the mask by hand, the network by perturbation, the segments by their gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import examples
from trained import drafter_for, small_target

from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.path_rows import PathRows, rows_mask
from pearl.training import partition
from pearl.training.partition import evaluate
from pearl.training.train import RUN, runs

N = 6  # known positions of the texts below


def written(rows: str) -> Tensor:
    """A mask as it is drawn: x is seen."""
    return torch.tensor([[cell == "x" for cell in row.split()] for row in rows.strip().splitlines()])


# The mask


def test_the_mask_of_three_positions_and_three_depths_is_the_one_drawn_in_its_module():
    mask = SlotMask(3, 3)
    known = """
        x . .
        x x .
        x x x"""
    assert torch.equal(mask.known(3), written(known))
    #   k0 k1 k2   01 02   11 12   21 22
    slots = """
        x  .  .    x  .    .  .    .  .
        x  .  .    x  x    .  .    .  .
        x  x  .    .  .    x  .    .  .
        x  x  .    .  .    x  x    .  .
        x  x  x    .  .    .  .    x  .
        x  x  x    .  .    .  .    x  x"""
    assert torch.equal(mask.of(torch.arange(3), 3), written(slots))
    assert mask.positions(torch.arange(3)).tolist() == [1, 2, 2, 3, 3, 4]


def test_a_subset_of_anchors_has_their_rows_and_no_others():
    #   k0 k1 k2 k3   01 02   21 22
    slots = """
        x  .  .  .    x  .    .  .
        x  .  .  .    x  x    .  .
        x  x  x  .    .  .    x  .
        x  x  x  .    .  .    x  x"""
    assert torch.equal(SlotMask(9, 3).of(torch.tensor([0, 2]), 4), written(slots))


def test_one_depth_needs_no_slots():
    mask = SlotMask(4, 1)
    assert mask.slots == 0
    assert mask.of(torch.tensor([1, 2]), 4).shape == (0, 4) and len(mask.positions(torch.tensor([1, 2]))) == 0


ANCHORS = st.integers(1, 12).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
)


@examples(50)
@given(ANCHORS, st.integers(1, 5), st.integers(0, 9))
def test_the_slice_of_a_longer_mask_is_the_mask_built_shorter(case: tuple[int, list[int]], depths: int, more: int):
    count, anchors = case
    long, short = SlotMask(count + more, depths), SlotMask(count, depths)
    assert torch.equal(long.known(count), short.known(count))
    assert torch.equal(long.of(torch.tensor(anchors), count), short.of(torch.tensor(anchors), count))


@examples(50)
@given(ANCHORS, st.integers(2, 5))
def test_the_mask_is_the_rule_of_its_docstring(case: tuple[int, list[int]], depths: int):
    count, anchors = case
    rows = [(anchor, depth) for anchor in anchors for depth in range(1, depths)]
    keys = [(position, 0) for position in range(count)] + rows

    def sees(row: tuple[int, int], key: tuple[int, int]) -> bool:
        return key[0] <= row[0] if key[1] == 0 else key[0] == row[0] and key[1] <= row[1]

    expected = torch.tensor([[sees(row, key) for key in keys] for row in rows])
    assert torch.equal(SlotMask(count, depths).of(torch.tensor(anchors), count), expected)


PATHS = st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=4)


@examples(100)
@given(st.integers(1, 6), st.integers(0, 6), PATHS, PATHS, st.integers(2, 5))
def test_at_inference_a_leaf_sees_what_an_anchor_sees_in_training(
    prefix: int, fresh: int, read: list[list[int]], paths: list[list[int]], depths: int
):
    """Where its path is taken for known positions, and other leaves are left out. `read`: by forwards before."""
    fresh, rows, slots = min(fresh, prefix), PathRows(), depths - 1
    for path in read if not fresh else ():
        rows.grow(path)
    known = len(rows.ways)
    on = [rows.grow(path)[0] for path in paths]
    mask = rows_mask(prefix, fresh, rows.ways, known, [numbers[-1] for numbers in on], slots)
    kept, columns = mask.shape[1] - mask.shape[0], mask.shape[1]
    assert kept == (prefix - fresh if fresh else prefix + known - 1)
    first = columns - len(paths) * slots
    new = set(range(prefix - 1 + known, first)) if known > 1 else set(range(prefix, first))
    assert torch.equal(mask[:fresh, :prefix], SlotMask(prefix, depths).known(prefix)[prefix - fresh :])
    assert not mask[:fresh, prefix:].any()
    for group, numbers in enumerate(on):
        way = [*range(prefix), *(prefix - 1 + number for number in numbers[1:])]
        own = [*way, *range(first + group * slots, first + (group + 1) * slots)]
        rule = SlotMask(len(way), depths)
        seen = mask[[column - kept for column in own[len(way) :]]]
        assert torch.equal(seen[:, own], rule.of(torch.tensor([len(way) - 1]), len(way)))
        for place, column in enumerate(way):
            if column in new:
                assert mask[column - kept].nonzero()[:, 0].tolist() == sorted(way[: place + 1])
        assert seen.sum() == seen[:, own].sum(), "another leaf's path or slots"


# The network


@dataclass(frozen=True)
class Inputs:
    """One text, or several: what the drafter reads of it."""

    tokens: Tensor  # [B, n]
    features: Tensor  # [B, n, F], of the token before
    withheld: Tensor  # [B, n]

    def changed(self, **new: Tensor) -> Inputs:
        return Inputs(**{**vars(self), **new})


@functools.cache
def precise(
    layers: int = 2, depths: int = 4, features: tuple[int, ...] = (0, 2), kind: str = "feature"
) -> FeatureDrafter:
    made = drafter_for(small_target(), features, depths, layers, kind=kind)
    return made.place("cpu", torch.float64)


def inputs(drafter: FeatureDrafter, batch: int = 1, count: int = N, withheld: Sequence[int] = (0,), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(batch, count, dtype=torch.bool)
    hidden[:, list(withheld)] = True
    width = len(drafter.shape.features) * drafter.shape.hidden
    return Inputs(
        torch.randint(40, (batch, count), generator=generator),
        torch.randn(batch, count, width, generator=generator, dtype=torch.float64),
        hidden,
    )


@torch.no_grad()
def outputs(drafter: FeatureDrafter, given: Inputs) -> tuple[Tensor, Tensor]:
    """hidden of the known positions [n, H], and of the slots of all of them [n, K - 1, H]."""
    found = []
    count = given.tokens.shape[1]

    def keep(hidden: Tensor, ahead: Tensor | None, anchors: Tensor | None) -> Tensor:
        found.append((hidden if ahead is None else ahead)[0])
        return hidden.sum()

    mask = SlotMask(count, drafter.shape.depths)
    evaluate(drafter, mask, given.tokens, given.features, given.withheld, torch.arange(count), keep)
    known, slots = found
    return known, slots.view(count, -1, drafter.shape.hidden)


POSITIONS = st.integers(0, N - 1)


def moved(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[list[int], list[int]]:
    """The known positions that moved, and the anchors of which all slots moved; none moves in part."""
    known = [i for i in range(N) if not torch.equal(before[0][i], after[0][i])]
    slots = [
        [not torch.equal(a, b) for a, b in zip(*both, strict=True)] for both in zip(before[1], after[1], strict=True)
    ]
    assert all(all(one) or not any(one) for one in slots), "the slots of an anchor move together"
    return known, [i for i, one in enumerate(slots) if all(one)]


@examples(30)
@given(POSITIONS, st.sets(st.integers(1, N - 1)))
def test_a_token_moves_nothing_before_it_and_everything_from_there_on(at: int, withheld: set[int]):
    drafter = precise()
    given = inputs(drafter, withheld=(0, *withheld))
    tokens = given.tokens.clone()
    tokens[0, at] = (tokens[0, at] + 1) % 40
    later = list(range(at, N))
    assert moved(outputs(drafter, given), outputs(drafter, given.changed(tokens=tokens))) == (later, later)


@examples(30)
@given(POSITIONS, st.sets(st.integers(1, N - 1)))
def test_a_feature_moves_what_follows_it_unless_it_is_withheld(at: int, withheld: set[int]):
    drafter = precise()
    given = inputs(drafter, withheld=(0, *withheld))
    features = given.features.clone()
    features[0, at] += 1.0
    later = [] if at in {0, *withheld} else list(range(at, N))
    assert moved(outputs(drafter, given), outputs(drafter, given.changed(features=features))) == (later, later)


@examples(30)
@given(POSITIONS, st.integers(1, 3))
def test_a_slot_moves_itself_and_the_deeper_ones_of_its_anchor_only(anchor: int, depth: int):
    drafter, mask = precise(), SlotMask(N, 4)
    given, anchors = inputs(drafter), torch.arange(N)
    with torch.no_grad():
        known = drafter.known(given.tokens, given.features, given.withheld)
        _, past = drafter.stack(known, anchors, mask.known(N))
        slots = drafter.slots(1, N * mask.slots).clone()

        def read(x: Tensor) -> Tensor:
            return drafter.stack(x, mask.positions(anchors), mask.of(anchors, N), past)[0].view(N, mask.slots, -1)

        before = read(slots)
        slots[0, anchor * mask.slots + depth - 1] += 1.0
        after = read(slots)
    differ = [(a, d + 1) for a in range(N) for d in range(3) if not torch.equal(before[a, d], after[a, d])]
    assert differ == [(anchor, deeper) for deeper in range(depth, 4)]


def test_depth_is_told_by_position(monkeypatch: pytest.MonkeyPatch):
    """All slots are fed alike. Were they all where their anchor is, they would say something else."""
    known, slots = outputs(precise(), inputs(precise()))
    assert all(not torch.allclose(slots[:, a], slots[:, b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    monkeypatch.setattr(SlotMask, "positions", lambda self, anchors: anchors.repeat_interleave(self.slots))
    same, other = outputs(precise(), inputs(precise()))
    assert torch.equal(known, same) and not torch.allclose(slots, other, rtol=1e-2)


def test_only_the_distance_counts():
    """A text that begins later says the same (RoFormer, Su et al. 2021)."""
    drafter = precise()
    given, mask = inputs(drafter), SlotMask(N, 4)
    with torch.no_grad():
        known = drafter.known(given.tokens, given.features, given.withheld)
        here, there = (drafter.stack(known, torch.arange(N) + shift, mask.known(N))[0] for shift in (0, 50))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_drafter_whose_features_are_all_withheld_equals_one_that_never_sees_them(layers: int):
    seeing, blind = precise(layers), precise(layers, features=())
    given = inputs(seeing, withheld=range(N))
    kept = {name: tensor for name, tensor in seeing.state_dict().items() if not name.startswith("fc")}
    before = {name: tensor.clone() for name, tensor in blind.state_dict().items()}
    blind.load_state_dict(kept)
    try:
        for a, b in zip(
            outputs(seeing, given), outputs(blind, given.changed(features=given.features[..., :0])), strict=True
        ):
            assert torch.equal(a, b)
        other = outputs(seeing, given.changed(withheld=given.withheld & False))
        assert not torch.allclose(other[0], outputs(blind, given)[0]), "and one that sees them differs"
    finally:
        blind.load_state_dict(before)


def test_outliers_of_a_layer_do_not_drown_the_others():
    """Each layer is normalised by itself: one that is 200 times as large says no more than before."""
    drafter = precise()
    given = inputs(drafter)
    large = given.features.clone()
    large[..., drafter.shape.hidden :] *= 200
    for a, b in zip(outputs(drafter, given), outputs(drafter, given.changed(features=large)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_draft_vocabulary_has_the_rows_of_the_targets_head():
    target = small_target()
    drafter = drafter_for(target, vocabulary=(3, 5, 39))
    hidden = torch.randn(2, drafter.shape.hidden)
    torch.testing.assert_close(drafter.logits(hidden), target.lm_head(target.model.norm(hidden))[:, [3, 5, 39]])
    assert not any("head" in name or "embed" in name.replace("mask_embedding", "") for name in drafter.state_dict())


# The gradient in segments


@dataclass(frozen=True)
class Gradient:
    """A case: what is read, and from where slots look ahead."""

    layers: int
    depths: int
    batch: int
    count: int
    anchors: tuple[int, ...]
    withheld: tuple[int, ...]
    features: tuple[int, ...]
    kind: str = "feature"


def a_loss(drafter: FeatureDrafter, slots: int):
    """Shares that are not linear and weigh every row differently, whatever segment it is in."""

    def loss(hidden: Tensor, ahead: Tensor | None, anchors: Tensor | None) -> Tensor:
        said = drafter.logits(hidden if ahead is None else ahead).log_softmax(-1)  # [B, rows, V]
        if anchors is None:
            rows = torch.arange(said.shape[1])
        else:
            rows = (1000 + 7 * anchors[:, None] + torch.arange(slots)).flatten()
        weight = (1 + torch.sin(rows.double()))[None] * torch.arange(1, 1 + len(said))[:, None]
        return -(weight * said[..., 3]).sum() / 10

    return loss


def gradients(case: Gradient, segments: int | None) -> dict[str, Tensor]:
    """Of every parameter; `segments` None: in one piece."""
    drafter = precise(case.layers, case.depths, case.features, case.kind)
    given = inputs(drafter, case.batch, case.count, case.withheld, seed=5)
    drafter.zero_grad()
    anchors, mask = torch.tensor(case.anchors, dtype=torch.int64), SlotMask(case.count + 2, case.depths)
    args = (drafter, mask, given.tokens, given.features, given.withheld, anchors)
    if segments is None:
        evaluate(*args, a_loss(drafter, mask.slots)).backward()
    else:
        partition.backward(*args, segments, a_loss(drafter, mask.slots))
    return {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}


CASES = st.integers(1, 9).flatmap(
    lambda count: st.builds(
        Gradient,
        st.integers(1, 3),
        st.integers(1, 5),
        st.integers(1, 3),
        st.just(count),
        st.sets(st.integers(0, count - 1)).map(sorted).map(tuple),
        st.sets(st.integers(0, count - 1)).map(sorted).map(tuple),
        st.just((0, 2)),
        st.sampled_from(["feature", "peagle", "eagle3"]),
    )
)


@examples(12)
@given(CASES)
def test_the_gradient_in_segments_is_that_of_the_whole_text(case: Gradient):
    whole = gradients(case, None)
    for segments in (1, 2, 3, 5):
        parts = gradients(case, segments)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["feature", "peagle", "eagle3"])
def test_every_parameter_of_such_a_case_has_a_gradient_worth_comparing(kind: str):
    found = gradients(Gradient(2, 4, 2, 7, (0, 2, 3, 5), (0, 4), (0, 2), kind), 3)
    assert found.keys() == dict(precise(kind=kind).named_parameters()).keys()
    assert all(gradient.abs().max() > 1e-3 for gradient in found.values())


def test_segments_hold_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Of n positions and K - 1 segments: n, then as many slots; all in one piece would be n (K - 1)."""
    drafter, read = precise(), []
    given = inputs(drafter, count=12)
    whole = FeatureDrafter.stack
    monkeypatch.setattr(
        FeatureDrafter, "stack", lambda self, x, *rest: read.append(x.shape[1]) or whole(self, x, *rest)
    )
    args = (SlotMask(12, 4), given.tokens, given.features, given.withheld, torch.arange(12), 3)
    partition.backward(drafter, *args, a_loss(drafter, 3))
    assert read == [12, 12, 12, 12]


# Withheld features


@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5])
def test_features_are_withheld_at_the_rate_that_the_recipe_says(chance: float):
    withheld = runs((400, 200), chance, torch.Generator().manual_seed(1))
    free = math.prod(1 - chance * (RUN - back) / RUN for back in range(RUN))  # that no run covers a position
    assert withheld[:, RUN:].double().mean() == pytest.approx(1 - free, abs=0.01)


def test_features_are_withheld_in_runs_of_every_length():
    withheld = runs((2000, 60), 0.002, torch.Generator().manual_seed(1))  # so few that they hardly meet
    lengths = {len(run) for row in withheld for run in "".join("x" if w else " " for w in row.tolist()).split()}
    assert set(range(1, RUN + 1)) <= lengths
    seeded = [runs((3, 50), 0.1, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_no_chance_withholds_nothing_and_certainty_everything():
    generator = torch.Generator().manual_seed(0)
    assert not runs((3, 20), 0.0, generator).any() and runs((3, 20), 1.0, generator).all()
    assert runs((2, 3), 1.0, generator).all(), "texts may be shorter than a run"
