"""The feature drafter as a draft source: one forward gives the distributions of the next K tokens.

What the target has read comes with its verdicts, as features. Known positions whose features are there are read once
and stay in the cache; tokens beyond them are guesses or too new, so they enter with the learned hidden state instead
and are read anew each time. One forward holds the newly confirmed rows, the paths of the leaves that it extends, and
the slots after each leaf:

    confirmed rows                 see the text up to themselves
    a leaf's path                  sees the text and itself up to each row
    a leaf's slots                 see the text, the path, and themselves up to each row (`pearl.drafters.feature.mask`)

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.core.sampling import SamplingParams, ranked
from pearl.core.trie import Node, Trie, shared_prefix
from pearl.drafters.draft_source import Chain, Proposal, Tree
from pearl.drafters.feature.network import FeatureDrafter, KeyValue
from pearl.models.timing import best_of

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
        self.device = drafter.mask_embedding.device
        self._vocabulary = drafter.vocabulary
        self._texts: dict[int, _Text] = {}
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
        self.begin(0, params)

    def go_on(self, params: SamplingParams) -> None:
        """The new text continues the last one."""
        self.begin(0, params, continues=True)

    def begin(self, text: int, params: SamplingParams, continues: bool = False) -> None:
        """A new sequence begins where `text` was. The target tells the features of its whole prompt in any case."""
        old = self._texts.get(text) or _Text(params, _Cache(self._drafter))
        self._texts[text] = _Text(params, old.cache, old.read if continues else [])

    def observe(self, features: Features, text: int = 0) -> None:
        """Those of the positions that follow the ones seen so far, [positions, F]."""
        self._texts[text].features.append(features)
        self._texts[text].known += len(features)

    def propose(self, text: Sequence[int], room: int) -> list[tuple[int, Proposal]]:
        """The best guess of every depth, one after the other."""
        return self.propose_each([Chain(0, text, (), room)])[0]

    def propose_each(self, asked: Sequence[Chain]) -> list[list[tuple[int, Proposal]]]:
        """The same after several texts, in one forward."""
        wanted: dict[int, _Asked] = {}
        for one in asked:
            state, tokens = self._texts[one.text], [*one.tokens, *one.path]
            path = tokens[state.known + 1 :] if self.layers else []
            trunk = tokens[: len(tokens) - len(path)]
            if self._ready(state, trunk) and len(tokens) + self.depths <= self._longest:
                wanted[one.text] = _Asked(state, trunk, [path])
        found = dict(zip(wanted, self._read_on(list(wanted.values())), strict=True))
        return [
            [(depth[0][0], depth[0][2]) for depth in found[one.text][0][1][: one.room]] if one.text in found else []
            for one in asked
        ]

    def extend(self, trie: Trie, most: int, deepest: int, fixed: bool = False) -> list[tuple[Node, Node]]:
        """Grows the trie below its likeliest leaves, at most `most` of them; see `sources.TreeGrower`.

        Where the text has grown since the last time, the way to these leaves is gone again: the target has said more,
        so what follows each node on the way is known better than when it was first guessed.
        """
        return self.extend_each([Tree(0, trie, most, deepest, fixed)])[0]

    def extend_each(self, asked: Sequence[Tree]) -> list[list[tuple[Node, Node]]]:
        """The same of several tries, in one forward."""
        leaves = {one.text: self._leaves(one) for one in asked}
        reading = [one for one in asked if leaves[one.text]]
        wanted = [
            _Asked(self._texts[one.text], one.trie.tokens, [list(path) for path, _, _ in leaves[one.text]])
            for one in reading
        ]
        found = dict(zip((one.text for one in reading), self._read_on(wanted), strict=True))
        return [self._hang(one, leaves[one.text], found[one.text]) if one.text in found else [] for one in asked]

    def _leaves(self, one: Tree) -> list[tuple[tuple[int, ...], Node, float]]:
        """Those of a trie that are to be extended."""
        leaves = one.trie.leaves(self._deepest(one) - 1)
        if len(leaves) > CROWD or not self._ready(self._texts[one.text], one.trie.tokens):
            return []
        return [leaf for leaf in leaves[: min(one.most, LEAVES)] if leaf[2] >= FAINTEST]

    def _deepest(self, one: Tree) -> int:
        return min(one.deepest, self._longest - len(one.trie.tokens) - self.depths)

    def _hang(
        self, one: Tree, leaves: Sequence[tuple[tuple[int, ...], Node, float]], read: Sequence[tuple[Guesses, Guesses]]
    ) -> list[tuple[Node, Node]]:
        """Grows a trie by what was read of its leaves."""
        state, trie, deepest = self._texts[one.text], one.trie, self._deepest(one)
        anew = state.guessed != len(trie.tokens)
        state.guessed = len(trie.tokens)
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

    def _ready(self, state: _Text, trunk: Sequence[int]) -> bool:
        """Whether the features of all of the text but its last token are there, if any are wanted."""
        return not self.layers or state.known >= max(1, len(trunk) - 1)

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
        return [table for _, table in self._read_on([_Asked(self._texts[0], trunk, paths)])[0]]

    @torch.inference_mode()
    def _read_on(self, asked: Sequence[_Asked]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each text: what follows each node on its way, the trunk's last token first, and
        guesses of K depths after its end."""
        if not asked:
            return []
        drafter = self._drafter
        inputs, positions, blocks, wanted, params = [], [], [], [], []
        first = 0
        for one in asked:
            kept = min(shared_prefix(one.state.read, one.trunk), len(one.trunk) - 1)
            rows, places, block, mine = self._rows_of(one, kept)
            inputs.append(rows)
            positions += places
            blocks.append(block)
            wanted += [first + row for row in mine]
            params += [one.state.params] * len(mine)
            first += len(rows)
        mask = _side_by_side(blocks).to(self.device)
        places = torch.tensor(positions, device=self.device)
        past = [one.state.cache.upto(block.kept) for one, block in zip(asked, blocks, strict=True)]
        hidden, made = drafter.stack(torch.cat(inputs)[None], places, mask, _concatenated(past))
        first = 0
        for one, block in zip(asked, blocks, strict=True):
            one.state.cache.keep(made, block.kept, slice(first, first + block.fresh))
            one.state.read = list(one.trunk)
            first += block.rows
        self.forwards += 1
        self.rows += first
        guesses = self._ranked(drafter.head(hidden[0, wanted]).float(), [positions[row] + 1 for row in wanted], params)
        found, at = [], 0
        for one in asked:
            found.append([])
            for path in one.paths:
                end = at + len(path)
                found[-1].append((guesses[at:end], guesses[end : end + self.depths]))
                at = end + self.depths
        return found

    def _rows_of(self, one: _Asked, kept: int) -> tuple[Tensor, list[int], _Block, list[int]]:
        """The rows of one text, [R, H], their positions, who sees whom, and the rows whose guesses are wanted."""
        trunk, slots = one.trunk, self.depths - 1
        fresh = len(trunk) - kept
        known = self._known_rows(one, kept)
        ahead = self._drafter.slots(1, slots)[0]
        inputs, positions, groups = [known[:fresh]], list(range(kept, len(trunk))), []
        wanted, at, rows = [], fresh, fresh
        for path in one.paths:
            inputs += [known[at : at + len(path)], ahead]
            at += len(path)
            count = len(path) + slots
            positions += range(len(trunk), len(trunk) + count)
            groups.append((rows, count))
            wanted += [fresh - 1, *range(rows, rows + count)]
            rows += count
        return torch.cat(inputs), positions, _Block(kept, fresh, tuple(groups)), wanted

    def _known_rows(self, one: _Asked, kept: int) -> Tensor:
        """The inputs of the trunk's rows from `kept` on, with features, and of all paths' rows, without, [R, H]."""
        trunk, paths = one.trunk, one.paths
        tokens = torch.tensor([*trunk[kept:], *(token for path in paths for token in path)], device=self.device)
        fresh = len(trunk) - kept
        withheld = torch.ones(len(tokens), dtype=torch.bool)
        features = torch.zeros(len(tokens), 0, device=self.device)
        if self.layers:
            withheld[:fresh] = torch.arange(kept, len(trunk)) == 0
            width = len(self.layers) * self._drafter.shape.hidden
            features = torch.zeros(len(tokens), width, dtype=torch.bfloat16, device=self.device)
            first = max(kept, 1)
            if first < len(trunk):
                features[first - kept : fresh] = one.state.between(first - 1, len(trunk) - 1)
        return self._drafter.known(tokens[None], features[None], withheld[None].to(self.device))[0]

    def _ranked(self, logits: Tensor, positions: Sequence[int], params: Sequence[SamplingParams]) -> Guesses:
        """logits: [R, V] over the draft vocabulary; positions: of the token that each row guesses; params: of its
        text."""
        found: Guesses = []
        for own, group in itertools.groupby(range(len(logits)), key=params.__getitem__):
            rows = list(group)
            found += self._ranked_by(logits[rows[0] : rows[-1] + 1], [positions[row] for row in rows], own)
        return found

    def _ranked_by(self, logits: Tensor, positions: Sequence[int], params: SamplingParams) -> Guesses:
        if params.greedy:
            found = ranked(logits, params, positions, CHILDREN)
            return [[(int(self._vocabulary[at]), q, proposal) for at, q, proposal in guesses] for guesses in found]
        # noise and filters are functions of the target's own token ids
        full = logits.new_full((len(logits), int(self._vocabulary.max()) + 1), -torch.inf)
        full[:, self._vocabulary] = logits
        return ranked(full, params, positions, CHILDREN)

    def _time(self) -> tuple[float, ...]:
        """Seconds of a forward of 1, 2, ... leaves."""
        length, rounds = _TIMED
        text = [0] * length
        if self.layers:
            self.observe(np.zeros((length - 1, len(self.layers) * self._drafter.shape.hidden), np.int16))
        leaves = [[[0]] * count for count in range(1, LEAVES + 1)]
        costs = tuple(best_of(rounds, functools.partial(self.guess, text, paths)) for paths in leaves)
        self.start(SamplingParams())
        self.forwards = self.rows = 0
        return costs


class _Cache:
    """Keys and values of the confirmed positions, [1, kv heads, slots, head_dim] a layer."""

    def __init__(self, drafter: FeatureDrafter):
        shape, one = drafter.shape, drafter.mask_embedding
        empty = one.new_zeros(1, shape.kv_heads, 0, shape.head_dim)
        self._layers: list[KeyValue] = [(empty, empty) for _ in drafter.layers]

    def upto(self, count: int) -> list[KeyValue]:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in self._layers]

    def keep(self, made: Sequence[KeyValue], first: int, rows: slice) -> None:
        """Takes over those new rows as the positions from `first` on."""
        for number, new in enumerate(made):
            self._layers[number] = tuple(
                _written(old, part[:, :, rows], first) for old, part in zip(self._layers[number], new, strict=True)
            )


def _written(old: Tensor, rows: Tensor, first: int) -> Tensor:
    last = first + rows.shape[2]
    if last > old.shape[2]:
        more = -(-(last - old.shape[2]) // _GROW) * _GROW
        old = torch.cat([old.to(rows.dtype), rows.new_zeros(1, rows.shape[1], more, rows.shape[3])], 2)
    old[:, :, first:last] = rows
    return old


@dataclass
class _Text:
    """What is known of one text."""

    params: SamplingParams
    cache: _Cache
    read: list[int] = field(default_factory=list)  # confirmed tokens in the cache
    features: list[Features] = field(default_factory=list)  # one piece after the other
    known: int = 0  # positions that they are of
    guessed: int = 0  # length of the text when the tree was last extended

    def between(self, first: int, last: int) -> Tensor:
        """The features of the positions from `first` up to `last`, bfloat16 [last - first, F]."""
        found, at = [], self.known
        for piece in reversed(self.features):
            if at <= first:
                break
            at -= len(piece)
            if at < last:
                found.append(_rows(piece)[max(0, first - at) : last - at])
        return torch.cat(found[::-1])


def _rows(piece: Features) -> Tensor:
    return torch.from_numpy(piece).view(torch.bfloat16) if isinstance(piece, np.ndarray) else piece.rows


@dataclass(frozen=True)
class _Asked:
    """What a forward is to say of one text: what follows `trunk`, which the target has confirmed, and each path."""

    state: _Text
    trunk: Sequence[int]
    paths: Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Block:
    """One text's rows of a forward."""

    kept: int  # rows in its cache
    fresh: int  # rows of its trunk
    groups: tuple[tuple[int, int], ...]  # first row and count of each leaf's path and slots, after those

    @property
    def rows(self) -> int:
        return self.fresh + sum(count for _, count in self.groups)


def _concatenated(past: Sequence[Sequence[KeyValue]]) -> list[KeyValue]:
    """The keys and values of several texts, layer by layer, one text after the other."""
    if len(past) == 1:
        return list(past[0])
    return [tuple(torch.cat(parts, 2) for parts in zip(*layer, strict=True)) for layer in zip(*past, strict=True)]


def _side_by_side(blocks: Sequence[_Block]) -> Tensor:
    """bool [rows, all kept + rows]: each text sees itself alone."""
    masks = [_tree_mask(block.kept, block.fresh, block.groups) for block in blocks]
    if len(masks) == 1:
        return masks[0]
    cached = torch.block_diag(*(mask[:, : block.kept] for mask, block in zip(masks, blocks, strict=True)))
    new = torch.block_diag(*(mask[:, block.kept :] for mask, block in zip(masks, blocks, strict=True)))
    return torch.cat([cached, new], 1).bool()


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
