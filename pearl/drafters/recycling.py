"""Token recycling: what the target itself would have said after such a token, as it last did (Luo et al., ACL 2025).

Every row that the target reads has a whole distribution, and all but one of its tokens are thrown away, of a rejected
guess even that one. Here the best few of each row are kept, by the token that was read and by the last two:

    read     "... b c"        kept      (b, c): d 0.6, e 0.3, ...        c: d 0.6, e 0.3, ...
    later    "... b c"        guesses   d, e, ... and below each what is kept after it

How much such a memory is worth is learned from every row, before it is overwritten: how often the best token was among
those kept, by what their probabilities were then.

The table has places by a hash of its key, and the newest takes the place: so its size is fixed, and so is the time of a
look-up. Knows: tokens, and logits of the target's rows. Refuses to know: which of these rows were right.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from pearl.core.logits.top_k import top_k
from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.trie import RECYCLED, Node
from pearl.drafters.draft_source import MAX_CHILDREN, MIN_PATH_LOGP, DraftSource, Grown, RowsRead, TreeQuery
from pearl.machine.transfers import Fetched

KEPT = 8  # tokens of a row
PLACES = 1 << 16  # rows that are kept: with KEPT tokens each 3.1 MB
PAIR, ALONE = 0, 1  # the key: the last two tokens, or the last one
_BINS = 12  # of the probabilities that were kept, each half the one before
_BELIEF = 8.0  # what a probability says of itself counts as much as so many rows
_TRUST = 0.75, 0.45  # and how far it is believed at first, by the key
_FORGET = 0.998  # of what was counted, from pass to pass
_UNKNOWN = math.log(0.7)  # of a guess whose source had no probability
_FACTOR = 0x9E3779B97F4A7C15
_OTHER_FACTOR = 0xD1B54A32D192ED03
_MASK = (1 << 64) - 1


class RecyclingSource(DraftSource):
    """Grows trees from what was kept of the same text, in one table for all that are under way."""

    origin = RECYCLED
    grows_trees = True
    reads_rows = True

    def __init__(self, over_texts: bool = False):
        """`over_texts`: what was kept serves the texts that follow too."""
        self._over_texts, self._texts = over_texts, 0
        self._text: dict[int, int] = {}  # by batch slot: the number of the text there, a part of its keys
        self._keys = np.zeros(PLACES, np.int64)
        self._tokens = np.full((PLACES, KEPT), -1, np.int32)  # a small vocabulary does not fill a row
        self._bins = np.zeros((PLACES, KEPT), np.uint8)  # of the probabilities
        centres = 0.75 * 0.5 ** np.arange(_BINS)
        self._judged = np.full((2, _BINS), _BELIEF)
        self._right = _BELIEF * np.outer(_TRUST, centres)
        self._params: dict[int, SamplingParams] = {}
        self._coming: deque[tuple[int, Sequence[tuple[int, int]], Fetched, Fetched]] = deque()  # see `_keep`
        self._logp: list[list[float]] = []
        self._count(np.zeros(0, np.int64), np.zeros(0), ALONE)

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._params[batch_slot] = params
        if not (continues and batch_slot in self._text):
            self._texts += not self._over_texts
            self._text[batch_slot] = self._texts

    def begin_round(self, forget: bool = False) -> None:
        """Its rows are kept as they are read, so modes that are compared have those of their own text alone."""
        self._over_texts = False

    def read_rows(self, batch_slot: int, read: RowsRead) -> None:
        """The best tokens of each row are kept once they have come from the device, before any are asked for."""
        values, tokens = top_k(read.logits, KEPT)
        self._coming.append((self._text[batch_slot], read.contexts, Fetched(values.float()), Fetched(tokens)))
        self._take()

    def _take(self, wait: bool = False) -> None:
        while self._coming and (wait or self._coming[0][-1].arrived):
            text, contexts, values, tokens = self._coming.popleft()
            kept = tokens.wait().numpy()  # with them have come the values, which were asked for before
            self._keep(text, contexts, values.wait().numpy(), kept)

    def _keep(self, text: int, contexts: Sequence[tuple[int, int]], best: np.ndarray, kept: np.ndarray) -> None:
        """Keeps the best tokens of each row, and learns from what was kept of it before.

        best: float [rows, KEPT], their logits; kept: int [rows, KEPT]"""
        width = best.shape[1]
        if not np.isfinite(best[:, 0]).all():
            return
        # of those that are kept alone: the whole vocabulary takes as long again
        shares = np.exp2((best - best[:, :1]) / math.log(2))
        shares /= shares.sum(1, keepdims=True)
        bins = np.minimum(-np.log2(np.maximum(shares, 1e-9)), _BINS - 1).astype(np.uint8)
        for level in (PAIR, ALONE):
            keys = np.fromiter((_key(text, *context, level) for context in contexts), np.int64, len(kept))
            places = keys & (PLACES - 1)
            known = np.flatnonzero(self._keys[places] == keys)
            if len(known):
                right = self._tokens[places[known], :width] == kept[known, :1]
                self._count(self._bins[places[known], :width].ravel(), right.ravel(), level)
            self._keys[places] = keys
            self._tokens[places, :width], self._bins[places, :width] = kept, bins

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        self._take(wait=True)
        return [self._extend(query) for query in queries]

    def _extend(self, query: TreeQuery) -> Grown:
        """The likeliest nodes, whoever made those above them: a tree of `max_rows` nodes in all."""
        trie = query.trie
        order = itertools.count()
        grown: Grown = []
        heap: list[tuple[float, int, Node, int, float, int, tuple[int, ...]]] = []

        def push(parent: Node, before: int, joint: float, path: tuple[int, ...]) -> None:
            """What may follow a node; what others guess there has its part of the chance already."""
            if len(path) >= query.max_depth:
                return
            others = {
                token: child.logp or _UNKNOWN for token, child in parent.children.items() if child.origin != self.origin
            }
            left = 1.0 - sum(map(math.exp, others.values()))
            guesses = self._after(query.batch_slot, before, parent, math.log(left)) if left > 0 else {}
            for token, logp in (guesses | others).items():
                if joint + logp >= MIN_PATH_LOGP:
                    heapq.heappush(heap, (-joint - logp, next(order), parent, token, logp, parent.token, path))

        push(trie.root, trie.tokens[-2] if len(trie.tokens) > 1 else -1, 0.0, ())
        for _ in range(query.max_rows):
            if not heap:
                break
            joint, _, parent, token, logp, before, path = heapq.heappop(heap)
            node = parent.children.get(token)
            if node is None or node.origin == self.origin:
                if query.processing and query.processing.forbids(trie.tokens, list(path), token):
                    continue
                there = node is not None
                node = trie.grow(parent, token, (), logp, self.origin)
                assert node is not None, "a source extends the tree that it was given"
                if not there:
                    grown.append((parent, node))
            push(node, before, -joint, (*path, token))
        return grown

    def _after(self, batch_slot: int, before: int, node: Node, left: float) -> dict[int, float]:
        """The tokens that may follow `node`, and the logarithms of their chances, which share `left`."""
        text, params = self._text[batch_slot], self._params[batch_slot]
        for level in (PAIR, ALONE):
            key = _key(text, before, node.token, level)
            place = key & (PLACES - 1)
            if self._keys[place] == key:
                break
        else:
            return {}
        logp = self._logp[level]
        found = {
            token: left + logp[at]
            for token, at in zip(self._tokens[place].tolist(), self._bins[place].tolist(), strict=True)
            if token >= 0
        }
        if params.greedy:
            return dict(itertools.islice(found.items(), MAX_CHILDREN))
        return _sampled(found, params, node.position + 1)

    def _count(self, bins: np.ndarray, right: np.ndarray, level: int) -> None:
        """Probabilities that were kept, by their bins, and whether each was that of the best token now."""
        judged, rights = self._judged[level], self._right[level]
        judged *= _FORGET
        rights *= _FORGET
        judged += np.bincount(bins, minlength=_BINS)
        rights += np.bincount(bins, weights=right, minlength=_BINS)
        self._logp = np.log(np.clip(self._right / self._judged, 1e-6, 0.98)).tolist()


def _key(text: int, before: int, token: int, level: int) -> int:
    """Not nought, which stands for an empty place; its low bits are those of a hash."""
    pair = (before + 2) << 32 if level == PAIR else level
    mixed = ((token + 1 + pair) * _FACTOR + text * _OTHER_FACTOR) & _MASK
    mixed ^= mixed >> 29
    return (mixed * _FACTOR & _MASK) >> 2 | 1 << 62


def _sampled(found: dict[int, float], params: SamplingParams, position: int) -> dict[int, float]:
    """Chances that a seeded sample is each of these tokens: the noise that the target will add is known."""
    assert params.temperature and params.seed is not None, "a sequence has a seed before it begins"
    added = noise.gumbel_of(params.seed, position, noise.PICK, list(found))
    scores = {token: logp / params.temperature + more for (token, logp), more in zip(found.items(), added, strict=True)}
    highest = max(scores.values())
    total = highest + math.log(sum(math.exp(score - highest) for score in scores.values()))
    share = math.log(min(1.0, sum(map(math.exp, found.values()))))
    best = heapq.nlargest(MAX_CHILDREN, scores.items(), key=lambda one: one[1])
    return {token: share + score - total for token, score in best}
