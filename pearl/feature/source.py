"""The feature drafter as a draft source: one forward gives the distributions of the next K tokens.

What the target has read comes with its verdicts, as features. Known positions whose features are there are read once
and stay in the cache; tokens beyond them are guesses or too new, so they enter with the learned hidden state instead
and are read anew each time. One forward holds the newly confirmed rows, the paths of the leaves that it extends, and
the slots after each leaf:

    confirmed rows                 see the text up to themselves
    a leaf's path                  sees the text and itself up to each row
    a leaf's slots                 see the text, the path, and themselves up to each row (`pearl.feature.mask`)

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pearl.feature.network import FeatureDrafter, KeyValue
from pearl.sampling import SamplingParams, ranked
from pearl.sources import Proposal
from pearl.trie import Node, Trie, shared_prefix

CHILDREN = 6  # guesses after a row at most
FAINTEST = math.log(0.003)  # a path that is less likely is not offered, nor gone on from
LEAVES = 4  # extended by one forward at most
BEAM = 8  # paths that survive a depth
CROWD = 128  # leaves in waiting; beyond that the drafter rests
_GROW = 256  # slots by which the cache grows
_TIMED = (64, 3)  # tokens of text, and repetitions, when a forward is timed

Guesses = list[list[tuple[int, float, Proposal]]]  # by depth, likeliest first: (token, log q, proposal)


class FeatureSource:
    """`sources.DraftSource` and `sources.TreeGrower`. Takes features through `observe`."""

    whole = True  # one forward makes a tree by itself

    def __init__(self, drafter: FeatureDrafter, beam: int = 0, longest: int = 1 << 20):
        """`drafter` has its target attached. `beam`: paths kept at each depth, 0: `BEAM`; 1 makes chains.
        `longest`: tokens of a text."""
        self._drafter, self._beam, self._longest = drafter.eval(), beam or BEAM, longest
        self._device = drafter.mask_embedding.device
        self._vocabulary = drafter.vocabulary
        self._cache = _Cache(drafter)
        self.forwards = self.rows = self.own = self.confirmed = 0
        self.costs: tuple[float, ...] = ()
        self.start(SamplingParams())
        self.costs = self._time()

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the target, whose features are wanted."""
        return self._drafter.shape.features

    @property
    def depths(self) -> int:
        """K: guesses that follow one another in one forward."""
        return self._drafter.shape.depths

    def start(self, params: SamplingParams) -> None:
        self._read: list[int] = []  # confirmed tokens in the cache
        self.go_on(params)

    def go_on(self, params: SamplingParams) -> None:
        """The target tells the features of the whole prompt again."""
        self._params = params
        self._features: list[np.ndarray] = []  # pieces, bfloat16 bits
        self._known = 0  # positions that they are of
        self._guessed = 0  # length of the text when the tree was last extended

    def observe(self, features: np.ndarray) -> None:
        """The features of the positions that follow those seen so far: int16 [positions, F], bits of bfloat16."""
        self._features.append(features)
        self._known += len(features)

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        """The best guess of every depth, one after the other."""
        path = list(text[self._known + 1 :]) if self.layers else []
        trunk = list(text[: len(text) - len(path)])
        if not self._ready(trunk) or len(text) + self.depths > self._longest:
            return []
        (guesses,) = self.guess(trunk, [path])
        return [(depth[0][0], depth[0][2]) for depth in guesses[:room]]

    def extend(self, trie: Trie, most: int, deepest: int, fixed: bool = False) -> list[tuple[Node, Node]]:
        """Grows the trie below its likeliest leaves, at most `most` of them; see `sources.TreeGrower`.

        Where the text has grown since the last time, the way to these leaves is gone again: the target has said more,
        so what follows each node on the way is known better than when it was first guessed.
        """
        deepest = min(deepest, self._longest - len(trie.tokens) - self.depths)
        leaves = trie.leaves(deepest - 1)
        if len(leaves) > CROWD or not self._ready(trie.tokens):
            return []
        leaves = [leaf for leaf in leaves[: min(most, LEAVES)] if leaf[2] >= FAINTEST]
        if not leaves:
            return []
        anew = self._guessed != len(trie.tokens)
        self._guessed = len(trie.tokens)
        read = self._read_on(trie.tokens, [path for path, _, _ in leaves])
        new: list[tuple[Node, Node]] = []
        gone: set[int] = set()
        for (path, leaf, logp), (way, table) in zip(leaves, read, strict=True):
            node, joint = trie.root, 0.0
            for token, guesses in zip(path, way if anew else (), strict=False):
                if id(node) not in gone:
                    gone.add(id(node))
                    new += self._grow(trie, node, joint, [guesses])
                node = node.children[token]
                joint += node.logp
            new += self._grow(trie, leaf, joint if anew else logp, table[: deepest - len(path)])
        return new

    def _ready(self, trunk: Sequence[int]) -> bool:
        """Whether the features of all of the text but its last token are there, if any are wanted."""
        return not self.layers or self._known >= max(1, len(trunk) - 1)

    def _grow(self, trie: Trie, leaf: Node, logp: float, table: Guesses) -> list[tuple[Node, Node]]:
        """A beam of highest joint probability: every surviving parent meets every candidate of its depth."""
        beam, new = [(logp, leaf)], []
        for guesses in table:
            paths = [
                (joint + q, rank, parent, token, proposal, q)
                for joint, parent in beam
                for rank, (token, q, proposal) in enumerate(guesses)
            ]
            first = paths[0] if paths else None
            paths = sorted(paths, key=lambda path: (-path[0], path[1]))[: self._beam]
            beam = []
            for path in paths:
                joint, _, parent, token, proposal, q = path
                if joint < FAINTEST and path is not first:
                    continue
                there = token in parent.children
                child = trie.grow(parent, token, proposal, q)
                assert child is not None, "a source extends the tree that it was given"
                if not there:
                    new.append((parent, child))
                beam.append((joint, child))
            if not beam:
                break
        return new

    def guess(self, trunk: Sequence[int], paths: Sequence[Sequence[int]]) -> list[Guesses]:
        """For each path after the trunk, guesses of K depths."""
        return [table for _, table in self._read_on(trunk, paths)]

    @torch.inference_mode()
    def _read_on(self, trunk: Sequence[int], paths: Sequence[Sequence[int]]) -> list[tuple[Guesses, Guesses]]:
        """One forward. For each path: what follows each node on its way, the trunk's last token first, and guesses of K
        depths after its end."""
        drafter, slots = self._drafter, self.depths - 1
        kept = min(shared_prefix(self._read, trunk), len(trunk) - 1)
        fresh = len(trunk) - kept
        known = self._known_rows(trunk, kept, paths)
        ahead = drafter.slots(1, slots)[0]
        inputs, positions, groups = [known[:fresh]], list(range(kept, len(trunk))), []
        wanted, at, rows = [], fresh, fresh
        for path in paths:
            inputs += [known[at : at + len(path)], ahead]
            at += len(path)
            count = len(path) + slots
            positions += range(len(trunk), len(trunk) + count)
            groups.append((rows, count))
            wanted += [fresh - 1, *range(rows, rows + count)]
            rows += count
        mask = _tree_mask(kept, fresh, groups).to(self._device)
        places = torch.tensor(positions, device=self._device)
        hidden, made = drafter.stack(torch.cat(inputs)[None], places, mask, self._cache.upto(kept))
        self._cache.keep(made, kept, fresh)
        self._read = list(trunk)
        self.forwards += 1
        self.rows += rows
        guesses = self._ranked(drafter.head(hidden[0, wanted]).float(), [positions[row] + 1 for row in wanted])
        found = []
        for path in paths:
            count = 1 + len(path) + slots
            found.append((guesses[: len(path)], guesses[len(path) : count]))
            guesses = guesses[count:]
        return found

    def _known_rows(self, trunk: Sequence[int], kept: int, paths: Sequence[Sequence[int]]) -> Tensor:
        """The inputs of the trunk's rows from `kept` on, with features, and of all paths' rows, without, [R, H]."""
        tokens = torch.tensor([*trunk[kept:], *(token for path in paths for token in path)], device=self._device)
        fresh = len(trunk) - kept
        withheld = torch.ones(len(tokens), dtype=torch.bool)
        features = torch.zeros(len(tokens), 0)
        if self.layers:
            withheld[:fresh] = torch.arange(kept, len(trunk)) == 0
            features = torch.zeros(len(tokens), len(self.layers) * self._drafter.shape.hidden, dtype=torch.bfloat16)
            first = max(kept, 1)
            features[first - kept : fresh] = self._between(first - 1, len(trunk) - 1)
        return self._drafter.known(tokens[None], features[None].to(self._device), withheld[None].to(self._device))[0]

    def _ranked(self, logits: Tensor, positions: Sequence[int]) -> Guesses:
        """logits: [R, V] over the draft vocabulary; positions: of the token that each row guesses."""
        if self._params.greedy:
            found = ranked(logits, self._params, positions, CHILDREN)
            return [[(int(self._vocabulary[at]), q, proposal) for at, q, proposal in guesses] for guesses in found]
        # noise and filters are functions of the target's own token ids
        full = logits.new_full((len(logits), int(self._vocabulary.max()) + 1), -torch.inf)
        full[:, self._vocabulary] = logits
        return ranked(full, self._params, positions, CHILDREN)

    def _between(self, first: int, last: int) -> Tensor:
        """The features of the positions from `first` up to `last`, bfloat16 [last - first, F]."""
        if len(self._features) > 1:
            self._features = [np.concatenate(self._features)]
        if not self._features:
            return torch.zeros(0)
        return torch.from_numpy(self._features[0][first:last].copy()).view(torch.bfloat16)

    def _time(self) -> tuple[float, ...]:
        """Seconds of a forward of 1, 2, ... leaves."""
        length, rounds = _TIMED
        text = [0] * length
        if self.layers:
            self.observe(np.zeros((length - 1, len(self.layers) * self._drafter.shape.hidden), np.int16))
        costs = []
        for count in range(1, LEAVES + 1):
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                self.guess(text, [[0]] * count)
                seconds.append(time.perf_counter() - began)
            costs.append(min(seconds))
        self.start(SamplingParams())
        self.forwards = self.rows = 0
        return tuple(costs)


class _Cache:
    """Keys and values of the confirmed positions, [1, kv heads, slots, head_dim] a layer."""

    def __init__(self, drafter: FeatureDrafter):
        shape, one = drafter.shape, drafter.mask_embedding
        empty = one.new_zeros(1, shape.kv_heads, 0, shape.head_dim)
        self._layers: list[KeyValue] = [(empty, empty) for _ in drafter.layers]

    def upto(self, count: int) -> list[KeyValue]:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in self._layers]

    def keep(self, made: Sequence[KeyValue], first: int, count: int) -> None:
        """Takes over the first `count` new rows as the positions from `first` on."""
        for number, new in enumerate(made):
            self._layers[number] = tuple(
                _written(old, part[:, :, :count], first) for old, part in zip(self._layers[number], new, strict=True)
            )


def _written(old: Tensor, rows: Tensor, first: int) -> Tensor:
    last = first + rows.shape[2]
    if last > old.shape[2]:
        more = -(-(last - old.shape[2]) // _GROW) * _GROW
        old = torch.cat([old.to(rows.dtype), rows.new_zeros(1, rows.shape[1], more, rows.shape[3])], 2)
    old[:, :, first:last] = rows
    return old


def _tree_mask(kept: int, fresh: int, groups: Sequence[tuple[int, int]]) -> Tensor:
    """bool [rows, kept + rows]; `groups`: first row and count of each leaf's path and slots, after the fresh rows."""
    rows = fresh + sum(count for _, count in groups)
    mask = torch.zeros(rows, kept + rows, dtype=torch.bool)
    mask[:, :kept] = True
    mask[:fresh, kept : kept + fresh] = torch.ones(fresh, fresh, dtype=torch.bool).tril()
    mask[fresh:, kept : kept + fresh] = True
    for first, count in groups:
        own = slice(first, first + count)
        mask[own, kept + first : kept + first + count] = torch.ones(count, count, dtype=torch.bool).tril()
    return mask
