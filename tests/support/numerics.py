"""Models in which two tokens all but tie, readers prepared as loading prepares them, and random passes over trees."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tiny
import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from pearl.core.token_buckets import LIMIT, TokenBuckets
from pearl.models import linear
from pearl.models.batch_invariance import branches_agree, find_invariant_counts, products
from pearl.models.language_model import SideRow
from pearl.models.verifier import VerifierModel

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines


class Recorder:
    """Stands for a graph: it calls the code, and counts how often it recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def close_model(name: str, dtype: str, drift: float = 0.0) -> PreTrainedModel:
    """A model whose tokens 2i and 2i + 1 have all but the same logits: they differ by a millionth of one activation.

    `drift`: its weights are off by so much, as a drafter's are. They fit float16, as a bfloat16 checkpoint's do.
    """
    model = tiny.random_model(tiny.CONFIGS[name]())
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[1::2] = head[::2]
        head[::2, 0], head[1::2, 0] = 0.0, 2.0**-20
        if drift:
            generator = torch.Generator().manual_seed(1)
            for weight in model.parameters():
                weight += drift * weight.std() * torch.randn(weight.shape, generator=generator)
    return model.bfloat16().to(getattr(torch, dtype))


def prepared(name: str, dtype: str, kernel: str) -> VerifierModel:
    """As loading prepares a target."""
    model = close_model(name, dtype)
    assert linear.pack(model, linear.chosen(kernel, model.dtype)) == 0 or kernel == "stock"
    reader = tiny.verifier(model)
    reader.buckets = measured(reader)
    reader.buckets = replace(
        reader.buckets, branches=reader.verifies_trees and branches_agree(reader, reader.vocabulary)
    )
    reader.forget()
    return reader


def measured(reader: VerifierModel) -> TokenBuckets:
    return find_invariant_counts(
        lambda tokens, first: reader.forward(list(tokens), first, len(tokens)),
        reader.vocabulary,
        products=products(reader.model),
    )


class Plain:
    """Reads a text one token a pass, its prompt in the first."""

    def __init__(self, reader: VerifierModel, prompt: Sequence[int]):
        self.reader, self.prompt, self._at = reader, len(prompt), list(prompt)
        self._bits: dict[tuple[int, ...], torch.Tensor] = {}
        reader.forget()
        reader.read(prompt, 1)

    def go(self, text: Sequence[int]) -> None:
        """Reads what is new of it."""
        same = next((i for i, (a, b) in enumerate(zip(self._at, text, strict=False)) if a != b), len(self._at))
        for end in range(max(min(same, len(text) - 1), self.prompt) + 1, len(text) + 1):
            self._bits[tuple(text[:end])] = self.reader.read(text[:end], 1)[0]
        self._at = list(text)

    def after(self, text: Sequence[int]) -> torch.Tensor:
        """Logits [V]"""
        if tuple(text) not in self._bits:
            self.go(text)
        return self._bits[tuple(text)]


@functools.cache
def pair(name: str, dtype: str, kernel: str) -> tuple[VerifierModel, VerifierModel]:
    """The reader under test, and one for the reference."""
    one, other = prepared(name, dtype, kernel), prepared(name, dtype, kernel)
    if (
        one.buckets.safe != other.buckets.safe
    ):  # the same on every machine that we know; then the plainer promise of the two
        one.buckets = other.buckets
    other.buckets = one.buckets
    return one, other


@dataclass(frozen=True)
class Step:
    """A pass over a tree, and what the text does then."""

    draws: tuple[tuple[int, int], ...]  # (parent, token) of each node; a parent that is not there: the last node
    taken: int  # the node that the text goes to; -1: the same root is read again
    then: int  # the token after it, which the pass has not read


TOKENS = st.one_of(st.integers(0, 3), st.integers(0, tiny.VOCABULARY - 1))  # a few come up again and again
TREES = st.lists(st.tuples(st.integers(0, 2 * LIMIT), TOKENS), min_size=4, max_size=LIMIT - 1).map(tuple)


@dataclass(frozen=True)
class Tree:
    paths: list[tuple[int, ...]]  # of each row: the tokens below the root
    chain: int  # how many of them are the chain, after the root
    sides: list[SideRow]


def tree(step: Step, deepest: int, most: int, branches: bool) -> Tree:
    """The rows of a pass: root, chain (each node's first child), and the others in the order in which they were drawn.

    Without `branches` the others are left out.
    """
    nodes: list[tuple[int, ...]] = [()]
    for parent, token in step.draws:
        path = (*nodes[parent if parent < len(nodes) else -1], token)
        if path not in nodes and len(path) <= deepest and len(nodes) < most:
            nodes.append(path)
    chain: list[tuple[int, ...]] = [()]
    while below := [path for path in nodes if path[:-1] == chain[-1] and path]:
        chain.append(below[0])
    beside = [path for path in nodes if path not in chain] if branches else []
    paths = chain + beside
    return Tree(paths, len(chain) - 1, [(paths.index(path[:-1]), path[-1]) for path in beside])


def random_prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist()


VOCABULARY = 8


def fake(bits):
    """A `read` whose row r of n has the noise `bits(n, r)`; else it knows only the token and where it stands."""

    def read(tokens, first):
        rows = [
            [math.sin(token + first + r) + 1e-6 * bits(len(tokens), r)] * VOCABULARY for r, token in enumerate(tokens)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    return read
