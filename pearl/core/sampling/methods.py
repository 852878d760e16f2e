"""Picking the next token: greedy, seeded, or by rejection.

    greedy      pick = argmax p
    seeded      pick = argmax over tokens of log p(token) + Gumbel(seed, position, token): an exact sample from p that
                is a function of (prompt, seed, target), so the text is the same in every mode, with every drafter
                (Gumbel coupling: Daliri et al. 2024). The drafter adds the same noise to its q and guesses the sample.
    rejection   accept the guess x ~ q with min(1, p(x)/q(x)), else sample from norm(max(0, p - q)) (Leviathan et al.
                2023, Chen et al. 2023): the most tokens accepted, exact in distribution; the text depends on q too.

p is the target's distribution and q the drafter's, after the processors (`pearl.core.logits`), and after temperature,
top-k, top-p and min-p, in transformers' order.
Shapes: R rows of a pass, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.core.logits.top_k import top_k
from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.trie import Node, Proposal
from pearl.errors import NonFiniteLogits, UsageError
from pearl.machine.transfers import all_on_host, on_host

SUPPORT = 10  # most tokens of the drafter's q that rejection sampling draws from and sends
CANDIDATES = 64, 512  # best tokens of the drafter's q among which it ranks its guesses: greedy, sampling
NOT_FINITE = -1  # in place of a token, where there is none
TOP_MARGIN = 5.0  # nats below the best token
_UNITS = 40  # bits of a probability
_FIRST = 512  # likeliest tokens in which a nucleus is looked for before the whole vocabulary is sorted
RankedRow = list[tuple[int, float, Proposal]]  # likeliest first: token, log q, proposal
Ranked = list[RankedRow]  # of each row
ALTERNATIVE_MASS = 0.2  # rejection sampling: how often a drawn guess is taken to be rejected, where guesses are ranked


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p, min-p.  logits: [R, V]  ->  float32 [R, V], -inf where a token is cut.

    Keeps the tokens that transformers' warpers keep. What is kept of a row does not depend on the rows beside it, nor
    on the device but for the last bits of a probability. On a GPU nothing waits for it.
    """
    assert params.temperature, "greedy picks are not warped"
    scores = logits.float() / params.temperature
    if params.top_k and params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[:, -1:], -torch.inf)
    if params.top_p is not None and params.top_p < 1:
        scores = _nucleus(scores, params.top_p)
    if params.min_p:
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(params.min_p), -torch.inf)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The fewest tokens of each row whose probability reaches top_p, of equally likely ones the first; at least one.

    The mass ahead of a token, which decides whether it belongs to them, is a sum of integers, probabilities in units of
    2^-40: a sum of floats may depend on the order in which it is added up.
    """
    probabilities = scores.softmax(-1)
    limit = math.ceil(top_p * (1 << _UNITS))
    size = scores.shape[-1]
    for count in (size,) if scores.is_cuda else (min(_FIRST, size), size):  # a GPU would be waited for to look at few
        best, tokens = _best_first(probabilities, count)
        units = (best.double() * (1 << _UNITS)).long()
        kept = (units.cumsum(-1) - units < limit) & (best > 0)
        if count == size or not (kept & (best == best[:, -1:])).any():  # every token that is as likely has been seen
            break
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens, scores.gather(1, tokens).where(kept, -torch.inf))


def _best_first(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row and their probabilities, of equally likely ones the first at first."""
    if count == probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    tokens = probabilities.topk(count, sorted=False).indices.sort(-1).values
    best, order = probabilities.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    return best, tokens.gather(-1, order)


class RankQuery(NamedTuple):
    """Asks for the drafter's guesses for each of `positions`."""

    logits: Tensor  # [R, V], the drafter's
    params: SamplingParams
    positions: Sequence[int]
    hidden: Tensor | None = None  # [R, H], of a drafter whose guesses depend on more than the logits
    paths: Sequence[Sequence[int]] | None = None  # of guesses, at whose ends the rows are; None: in the text itself


def ranked(logits: Tensor, params: SamplingParams, positions: Sequence[int], most: int) -> Ranked:
    """The drafter's guesses for each of `positions`, likeliest first, at most `most`: (token, log q, proposal).

    logits: [R, V], the drafter's. Greedy: the best of q. Seeded: the best *samples*, as both sides add the same noise
    to p and to q; their gaps say how sure each is. Rejection: the first is drawn from q and is judged, the others are
    the likeliest of the rest. Looks at the `CANDIDATES` best tokens of q only: guesses may miss.
    """
    return ranked_together([RankQuery(logits, params, positions)], most)[0]


def ranked_together(queries: Sequence[RankQuery], most: int) -> list[Ranked]:
    """The same for several sequences. The host waits for a GPU once."""
    coming = all_on_host([_asked(one) for one in queries])
    return [_ranked(one, here, most) for one, here in zip(queries, coming, strict=True)]


def _asked(query: RankQuery) -> Tensor:
    """What the host has to know: of a GPU's logits the best and their tokens, as doubles, which hold them as they are,
    [2, R, candidates]; else, and where a guess is drawn, all of them."""
    logits, params = query.logits, query.params
    if params.rejection or not logits.is_cuda:
        return logits
    best, tokens = logits.topk(_candidates(query))
    return torch.stack([best.double(), tokens.double()])


def _candidates(query: RankQuery) -> int:
    return min(CANDIDATES[not query.params.greedy], query.logits.shape[-1])


def _ranked(query: RankQuery, here: Tensor, most: int) -> Ranked:
    """here: of `_asked`, on the host."""
    logits, params, positions = query.logits, query.params, query.positions
    if here.dim() == 3:
        best, tokens = here[0].to(logits.dtype), here[1].long()
    else:
        logits = here
        best, tokens = top_k(here, _candidates(query))
    if params.greedy:
        logp = best.float().log_softmax(-1).tolist()
        if any(math.isnan(row[0]) for row in logp):  # of infinity too
            raise NonFiniteLogits(logits.dtype)
        return [_likeliest(row, qs, most) for row, qs in zip(tokens.tolist(), logp, strict=True)]
    if not all(map(math.isfinite, best[:, 0].tolist())):
        raise NonFiniteLogits(logits.dtype)
    if params.rejection:
        rows = zip(logits, warp(best, params), tokens, positions, query.paths or [()] * len(positions), strict=True)
        return [_drawn_first(row, scores, t, params, at, path, most) for row, scores, t, at, path in rows]
    kept = zip(warp(best, params), tokens, positions, strict=True)
    return [_best_samples(scores, t, params, position, most) for scores, t, position in kept]


def _likeliest(tokens: Sequence[int], logp: Sequence[float], most: int) -> list:
    """The first of tokens whose probabilities don't rise. Of equal ones, which half precision often has, the first
    token comes first, as argmax has it."""
    pairs = list(zip(tokens, logp, strict=True))
    if len(set(logp[: most + 1])) <= min(most, len(logp) - 1):
        pairs.sort(key=lambda one: (-one[1], one[0]))
    return [(token, q, ()) for token, q in pairs[:most]]


def _best_samples(scores: Tensor, tokens: Tensor, params: SamplingParams, position: int, most: int) -> list:
    """scores, tokens: [candidates], warped logits and their tokens."""
    kept = scores.isfinite().nonzero().squeeze(1)
    noisy = scores[kept].double() + noise.gumbel(_seed(params), position, noise.PICK, tokens[kept])
    logp, order = noisy.log_softmax(-1).sort(descending=True)
    return [(t, q, ()) for t, q in zip(tokens[kept][order[:most]].tolist(), logp.tolist(), strict=False)]


def _drawn_first(
    logits: Tensor,
    scores: Tensor,
    tokens: Tensor,
    params: SamplingParams,
    position: int,
    path: Sequence[int],
    most: int,
) -> list:
    first, proposal = propose(logits, params, position, path)
    shares = {t: q for t, q in zip(tokens.tolist(), scores.softmax(-1).tolist(), strict=True) if t != first and q > 0}
    rest = sum(shares.values())
    others = [(t, math.log(ALTERNATIVE_MASS * q / rest), ()) for t, q in list(shares.items())[: most - 1]]
    return [(first, math.log(1 - ALTERNATIVE_MASS), proposal), *others]


def noisy_argmax(scores: Tensor, seed: int, position: int, purpose: int, dtype: torch.dtype | None = None) -> int:
    """An exact sample from softmax(scores), by the Gumbel-max trick.  scores: [V]

    The best of the likely tokens comes first. Of the others only those are looked at whose noise is large enough to
    beat it; their noise decides, so the result is that of all tokens. Raises `NonFiniteLogits`, of `dtype`.
    """
    highest = float(scores.max())
    if not math.isfinite(highest):
        raise NonFiniteLogits(dtype or scores.dtype)
    likely = (scores >= highest - TOP_MARGIN).nonzero().squeeze(1)
    noisy = scores[likely].double() + noise.gumbel(seed, position, purpose, likely)
    best = float(noisy.max())
    others = (scores >= best - noise.MAX_GUMBEL).nonzero().squeeze(1)
    others = noise.candidates_above(seed, position, purpose, others, best - (highest - TOP_MARGIN))
    more = scores[others].double() + noise.gumbel(seed, position, purpose, others)
    noisy, tokens = torch.cat([noisy, more]), torch.cat([likely, others])
    return int(tokens[noisy == noisy.max()].min())


def best_tokens(scores: Tensor) -> Tensor:
    """The best token of each row, int64 [R], `NOT_FINITE` where scores are no finite numbers.  scores: [R, V]

    One that is not a number beats all others, and so does infinity: the best tells of them all.
    """
    best, tokens = scores.max(-1)  # of equal ones the first, as `argmax`, which takes half-precision scores much longer
    return tokens.masked_fill(~best.isfinite(), NOT_FINITE)


def best_on_host(scores: Tensor) -> list[int]:
    """The same as a list, by one copy from a GPU. On the host a number is looked at sooner than by a tensor's kernels,
    which are cold after a forward."""
    if scores.is_cuda:
        found: list[int] = on_host(best_tokens(scores)).tolist()
        return found
    best, tokens = scores.max(-1)
    pairs = zip(best.tolist(), tokens.tolist(), strict=True)
    return [token if math.isfinite(highest) else NOT_FINITE for highest, token in pairs]


def argmax(logits: Tensor) -> list[int]:
    """The best token of each row.  logits: [R, V].  Raises `NonFiniteLogits`."""
    tokens = best_on_host(logits)
    if NOT_FINITE in tokens:
        raise NonFiniteLogits(logits.dtype)
    return tokens


class Picker:
    """The target's pick after each row of a pass."""

    def __init__(self, params: SamplingParams, logits: Tensor, positions: Sequence[int]):
        """logits: [R, V]; positions: of each row's own token, so the pick of row r is for positions[r] + 1."""
        self.params, self.logits, self.positions = params, logits, positions
        self._best = best_on_host(logits) if params.greedy else []

    def pick(self, row: int, node: Node) -> int:
        """The token after `node`, which the pass read as `row`. Rejection sampling judges the node's first guess."""
        if not self.params.greedy:
            return self._sample(self.logits[row], row, node)
        if self._best[row] == NOT_FINITE:  # raised only here: rows that the walk does not come to may hold anything
            raise NonFiniteLogits(self.logits.dtype)
        return self._best[row]

    def _sample(self, logits: Tensor, row: int, node: Node) -> int:
        """logits: [V]"""
        scores, seed, position = warp(logits[None], self.params)[0], _seed(self.params), self.positions[row] + 1
        if not self.params.rejection:
            return noisy_argmax(scores, seed, position, noise.PICK, self.logits.dtype)
        guess = next(iter(node.children.values()), None)
        if guess is None:
            return noisy_argmax(scores, seed, position, noise.RESIDUAL, self.logits.dtype)
        return accept_or_resample(scores, guess, seed, self.logits.dtype)


class ProcessedPicker(Picker):
    """Of logits that processors have changed, or are still to change."""

    def __init__(
        self, params: SamplingParams, logits: Tensor, positions: Sequence[int], finish: Callable[[int, Tensor], Tensor]
    ):
        """`finish(row, logits)`: the logits [V] of a row that the walk has come to, with all that is done to them."""
        self.params, self.logits, self.positions, self._finish = params, logits, positions, finish

    def pick(self, row: int, node: Node) -> int:
        logits = self._finish(row, self.logits[row])
        if logits.max() == -torch.inf:
            raise nothing_left(self.positions[row] + 1)
        return argmax(logits[None])[0] if self.params.greedy else self._sample(logits, row, node)


def nothing_left(position: int) -> UsageError:
    return UsageError(f"At token {position} bans and logits_processors forbid every token: allow one.")


def _seed(params: SamplingParams) -> int:
    assert params.seed is not None, "a sequence has a seed before it begins"
    return params.seed


def accept_or_resample(scores: Tensor, guess: Node, seed: int, dtype: torch.dtype | None = None) -> int:
    """Rejection sampling at one position.  scores: warped log-probabilities up to a constant, [V].

    Accepts `guess` with min(1, p/q), else samples the residual norm(max(0, p - q)) (Leviathan et al. 2023, A.1).
    A guess without a proposal was made for certain: q is 1 on it.
    """
    p = scores.double().softmax(-1)
    q = dict(guess.proposal) or {guess.token: 1.0}
    share = float(p[guess.token])
    if math.isnan(share):
        raise NonFiniteLogits(dtype or scores.dtype)
    drawn_with = q.get(guess.token, 0.0)  # 0: of a source that has not drawn what it says
    if drawn_with and noise.uniform(seed, guess.position, noise.ACCEPT) * drawn_with < share:
        return guess.token
    left = residual(p, q)
    if not left.any():  # p is q but for rounding
        return guess.token
    return noisy_argmax(left.log(), seed, guess.position, noise.RESIDUAL)


def residual(p: Tensor, q: dict[int, float]) -> Tensor:
    """max(0, p - q), unnormalised.  p: [V]"""
    support = torch.tensor(list(q), device=p.device)
    mass = torch.tensor(list(q.values()), dtype=p.dtype, device=p.device)
    return p.index_add(0, support, -mass).clamp_(min=0)


Proposed = tuple[int, Proposal]


def propose(logits: Tensor, params: SamplingParams, position: int, path: Sequence[int] = ()) -> Proposed:
    """The drafter's guess for `position`, and the (token, q) pairs it was drawn from (rejection sampling only).

    logits: [V], the drafter's. path: the guesses before it, in a tree. For rejection q is cut to its best few tokens
    first; what is sent is exactly what was sampled from, which is all that the proof needs. In each branch it is drawn
    anew: which rows of a tree are read may depend on what was drawn in another branch.
    """
    if params.greedy:
        return argmax(logits[None])[0], ()
    return _drawn(on_host(logits), params, position, path)


def propose_together(asked: Sequence[tuple[Tensor, SamplingParams, int]]) -> list[Proposed]:
    """The same for several sequences. The host waits for a GPU once."""
    if not any(logits.is_cuda for logits, _, _ in asked):
        return [propose(*one) for one in asked]
    here = all_on_host([best_tokens(logits[None]) if params.greedy else logits for logits, params, _ in asked])
    found: list[Proposed] = []
    for (logits, params, position), one in zip(asked, here, strict=True):
        if params.greedy and int(one) == NOT_FINITE:
            raise NonFiniteLogits(logits.dtype)
        found.append((int(one), ()) if params.greedy else _drawn(one, params, position))
    return found


def _drawn(logits: Tensor, params: SamplingParams, position: int, path: Sequence[int] = ()) -> Proposed:
    """logits: [V], on the host"""
    scores = warp(logits[None], params)[0]
    if not params.rejection:
        return noisy_argmax(scores, _seed(params), position, noise.PICK, logits.dtype), ()
    best, tokens = scores.topk(min(SUPPORT, scores.numel()))
    # rounded to what a message carries before it is drawn from, so that both sides hold the same q
    q = best.double().softmax(-1).float()
    proposal = tuple((t, p) for t, p in zip(tokens.tolist(), q.tolist(), strict=True) if p > 0)
    spread = torch.full_like(scores, -torch.inf).index_copy_(0, tokens, q.log().to(scores.dtype))
    seed = noise.of_branch(_seed(params), path)
    return noisy_argmax(spread, seed, position, noise.DRAFT, logits.dtype), proposal
