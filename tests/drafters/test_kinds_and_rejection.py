"""Rejection sampling keeps the target's distribution with every kind of drafter: heads over hidden states and PARD.

The target is a table over four tokens, of which a cut vocabulary drafts three; its "hidden states" are noise that
depends on the text. `tests/roles/test_distribution.py` says how the comparison is made, and that it can fail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import distribution
import pytest
import tiny
import torch
from toys import EAGER, TableModel
from trained import drafter_for
from transformers import LlamaConfig

from pearl.core.schedule import Schedule
from pearl.core.trie import SUFFIX, Trie
from pearl.drafters import one_pass, pard
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.shape import DFLASH, DSPARK, DFlashShape
from pearl.drafters.dflash.source import DFlashSource
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.guesses import with_confidence
from pearl.models import timing

WIDE = 16  # numbers of a hidden state
DRAFTED = (0, 1, 3)
SIZES = tiny.SIZES | {"vocab_size": 8, "hidden_size": WIDE, "intermediate_size": 24, "num_hidden_layers": 3}
DEPTHS = 2


class Told(TableModel):
    """The target of `distribution`, with hidden states of two layers."""

    gives_features = True

    def __init__(self):
        super().__init__(distribution.VOCABULARY, order=2, seed=3, scale=1.0)
        self._read: list[tuple[int, ...]] = []  # the last pass, each row by the last tokens that it follows
        self._states: dict[tuple[int, ...], torch.Tensor] = {}

    def read(self, tokens, keep, side_rows=(), batch_slot=0):
        rows = [tuple(tokens[:end]) for end in range(1, len(tokens) + 1)]
        for parent, token in side_rows:
            rows.append((*rows[len(tokens) - keep + parent], token))
        self._read, self._first = rows, len(tokens) - keep
        return super().read(tokens, keep, side_rows, batch_slot)

    def features(self, rows: Sequence[int], batch_slot: int = 0):
        return torch.stack([self._state(self._read[self._first + row][-2:]) for row in rows]).view(torch.int16).numpy()

    def _state(self, key: tuple[int, ...]) -> torch.Tensor:
        if key not in self._states:
            seed = random.Random(str(key)).randrange(1 << 30)
            self._states[key] = torch.randn(2 * WIDE, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return self._states[key]


def head(kind: str, markov: int = 0) -> Any:
    target = tiny.random_model(LlamaConfig(**SIZES))
    made = drafter_for(target, (0, 2), DEPTHS, 1, DRAFTED, kind=kind, markov_rank=markov).requires_grad_(False)
    if markov:
        made.confidence.weight *= 0.1  # neither sure nor hopeless
    return made


def block_source(kind: str) -> DraftSource:
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 64}
    shape = DFlashShape(
        kind=kind,
        features=(0, 2),
        hidden=WIDE,
        layers=2,
        depths=DEPTHS,
        mask_token=4,
        vocabulary=len(DRAFTED),
        known=8,
        config=sizes | heads | {"num_hidden_layers": 2},
        own_head=True,
        own_embedding=True,
        mapped=True,
        windows=(0, 0),
        causal=(False, False),
        from_anchor=kind == DSPARK,
        markov_rank=3 * (kind == DSPARK),
        confidence=kind == DSPARK,
        confident_markov=kind == DSPARK,
    )
    made = DFlashDrafter(shape, torch.tensor(DRAFTED))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 + float("norm" in name))
    made.attach(torch.zeros(8, WIDE), torch.nn.Linear(WIDE, 8, bias=False))
    return DFlashSource(made.place("cpu", torch.float32))


def pard_source() -> DraftSource:
    model = tiny.random_model(LlamaConfig(**SIZES), 1)
    return pard.PardSource(tiny.draft_model(model, vocabulary=distribution.VOCABULARY), 4, DEPTHS)


SOURCES: dict[str, Callable[[], DraftSource]] = {
    "pard": pard_source,
    "eagle3": lambda: HeadSource(HeadReader(head("eagle3"), 100)),
    "peagle": lambda: FeatureSource(head("peagle")),
    "peagle with a markov head": lambda: FeatureSource(head("peagle", markov=3)),
    "dflash": lambda: block_source(DFLASH),
    "dspark": lambda: block_source(DSPARK),
    "feature": lambda: FeatureSource(head("feature")),
}


@pytest.fixture(autouse=True, scope="module")
def hurried():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TIMED", (8, 1))
        patch.setattr(distribution, "TARGET", Told())
        yield


def drawn(kind: str, mode: str, texts: int) -> tuple[distribution.Sample, float]:
    params = distribution.REJECTION
    found = distribution.sample(SOURCES[kind](), Schedule.of(mode), params, EAGER, texts)
    return found, distribution.chance_of(found.counts, distribution.exact(params))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_the_text_follows_the_targets_distribution(kind: str):
    """In trees; a chain is the part of one that rejection sampling judges."""
    found, chance = drawn(kind, "tree", 200)
    assert chance > distribution.ALPHA
    judged = [one.rank for p in found.passes for one in p.judged]
    assert 0 in judged and None in judged, "guesses that were right, and others"


@pytest.mark.parametrize("kind", SOURCES)
def test_the_first_child_of_a_node_is_the_drawn_one_and_no_other_was(kind: str):
    """Whatever its chance was given out to be: which guess is judged must not depend on which was drawn."""
    source = SOURCES[kind]()
    features, several = torch.randn(6, 2 * WIDE).bfloat16().view(torch.int16).numpy(), 0
    for seed in range(8):
        source.begin(0, replace(distribution.REJECTION, seed=seed))
        source.observe(features, 0)
        trie = Trie([0, 1, 2, 0, 1, 2, 3])
        for _ in range(2):
            source.extend([one_pass.TreeQuery(0, trie, 4, 3, True)])
        nodes = [trie.root, *(likely.node for likely in trie.best(999))]
        for first, *others in (list(node.children.values()) for node in nodes if node.children):
            assert dict(first.proposal)[first.token] > 0 and not any(other.proposal for other in others)
            assert not others or first.logp >= max(other.logp for other in others)
            several += bool(others)
    assert several > 8 if kind == "eagle3" else not several, "a slot of a one-pass drafter is drawn for once"


@pytest.mark.parametrize("kind", SOURCES)
def test_guesses_of_two_branches_are_drawn_independently(kind: str):
    """Which rows of a tree are read may depend on what was drawn in another branch: that may say nothing of a guess."""
    source = SOURCES[kind]()
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(6, 2 * WIDE, generator=generator).bfloat16().view(torch.int16).numpy()
    same = expected = variance = 0.0
    for seed in range(200):
        source.begin(0, replace(distribution.REJECTION, seed=seed))
        source.observe(features, 0)
        trie = Trie([0, 1, 2, 0, 1, 2, 3])
        branches = [trie.grow(trie.root, token, (), math.log(0.4), SUFFIX) for token in (0, 1)]
        source.extend([one_pass.TreeQuery(0, trie, 4, 3, True)])
        one, other = (next(iter(node.children.values())) for node in branches)
        q, p = dict(one.proposal), dict(other.proposal)
        chance = sum(q[token] * p.get(token, 0.0) for token in q)
        same, expected, variance = (
            same + (one.token == other.token),
            expected + chance,
            variance + chance * (1 - chance),
        )
    assert abs(same - expected) < 4 * variance**0.5


@pytest.mark.parametrize("chance", [0.001, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("best", [0.02, 0.6, 1.0])
def test_the_chances_of_a_row_stay_chances_when_a_head_knows_that_of_the_best(best: float, chance: float):
    guesses = [(7, math.log(best), ()), *((token, math.log(max(1e-9, (1 - best) / 6)), ()) for token in range(3))]
    found = with_confidence(guesses, math.log(chance))
    chances = [math.exp(logp) for _, logp, _ in found]
    assert [token for token, *_ in found] == [7, 0, 1, 2] and chances[0] == pytest.approx(chance)
    assert sum(chances) <= 1 + 1e-5 and max(chances) == chances[0]
