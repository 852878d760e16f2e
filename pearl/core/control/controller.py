"""The decisions for one schedule: the rows of a pass, what the drafter is to do, how long to wait for it.

The target decides, its verdicts carry what concerns the drafter, and `passes.jsonl` holds every decision.

One price runs through all of it: the tokens per second that the run has been making, `rate`. Something that takes a
second more has to bring that many tokens more (Dinkelbach 1967: the best ratio is the one at whose price nothing more
can be gained).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from pearl.core.control.acceptance import AcceptanceRates
from pearl.core.control.averages import ema
from pearl.core.control.draft_trial import DraftTrial
from pearl.core.control.pass_costs import AveragedCosts, InterpolatedCosts, PassCosts
from pearl.core.control.wait_policy import WaitPolicy
from pearl.core.messages import DraftPlan
from pearl.core.schedule import MAX_AHEAD, Schedule
from pearl.core.theory import best_gamma, tokens_per_pass_sd
from pearl.core.token_buckets import LEAVES, BatchedTokenBuckets, TokenBuckets
from pearl.core.trie import DRAFT, Candidate, Node, path_numbers

RATE_DECAY = 0.95  # of the moving sums of tokens and seconds, from one pass to the next
_GUESS_WEIGHT = 0.1  # of one more wait in the seconds of a guess
LONGEST_BLOCK = 8  # of `auto` where several sequences share a pass


class Controller:
    """The decisions for one schedule, and for passes of about so many sequences."""

    def __init__(
        self,
        schedule: Schedule,
        buckets: TokenBuckets,
        batched: BatchedTokenBuckets | None = None,
        rates: AcceptanceRates | None = None,
    ):
        """`buckets` of one sequence, `batched`: of several that share their passes. `rates`: shared with other
        controllers."""
        self._schedule, self._each, self._shared = schedule, buckets, batched is not None
        self._buckets: TokenBuckets | BatchedTokenBuckets = batched or buckets
        self._sequences, self._rows = 1, 1  # of the last pass
        self.rates = rates or AcceptanceRates()
        self._cost: PassCosts = AveragedCosts(batched) if batched else InterpolatedCosts(buckets)
        self._trial, self._wait = DraftTrial(), WaitPolicy()
        self._draft_s: tuple[float, ...] = ()  # of a drafter forward, by its rows
        self._guess_s = 0.0  # waited for, each: of a lock-step schedule
        self._tokens = self._seconds = 0.0  # moving sums

    # facts

    def record_draft_costs(self, seconds: Sequence[float]) -> None:
        if seconds and not self._draft_s:
            self._wait.expect(seconds[min(1, len(seconds) - 1)])
        self._draft_s = tuple(seconds)

    def record_guess(
        self, logp: float, accepted: bool, first: bool = True, depth: int = 1, origin: str = DRAFT
    ) -> None:
        """A guess of that log-probability was compared with the target's pick; `first`: the drafter's best there."""
        self.rates.learn(logp, accepted, depth, origin)
        if first:
            self.rates.learn_first(accepted)

    def record_wait(self, came: bool, seconds: float = 0.0) -> None:
        """A wait for a first guess is over."""
        self._wait.waited(came, seconds)

    def record_drafting(self, guesses: float, seconds: float) -> None:
        """So many guesses came while the target waited for them, for each sequence that it waited for."""
        each = seconds / guesses
        self._guess_s = ema(self._guess_s, each, weight=_GUESS_WEIGHT) if self._guess_s else each

    def record_pass(
        self, rows: int, committed: int, forward_s: float, seconds: float, paths: int = 0, sequences: int = 1
    ) -> None:
        """A pass of so many rows, some of them on `paths` beside its chain, is over; it was of so many sequences."""
        self._sequences, self._rows = sequences, rows
        forwards = sequences // self._together  # where there are several, what is learned is their mean
        self._cost.observe(round(rows / forwards), round(paths / forwards), forward_s / forwards)
        self._tokens = RATE_DECAY * self._tokens + committed
        self._seconds = RATE_DECAY * self._seconds + seconds
        if self.free and self._draft_s:  # a source without a model takes nothing from the target
            self._trial.passed(committed, seconds, sequences, forwards * self._buckets.cost(self._together))

    # decisions

    @property
    def rate(self) -> float:
        """Tokens per second, over the last passes."""
        return self._tokens / self._seconds if self._tokens else self._sequences / self._pass_s()

    @property
    def acceptance(self) -> float:
        """Of the drafter's first guesses, over the last ones."""
        return self.rates.first

    def chance(self, node: Node, depth: int) -> float:
        """That the walk goes to a node, so deep below the root, once it is at its parent."""
        return self.rates.of(node.logp, depth, node.origin)

    def log_chance(self, node: Node, depth: int) -> float:
        return math.log(self.chance(node, depth))

    def seconds_of_rows(self, some: int, rows: int, paths: int = 0) -> float:
        """What `some` of the `rows` that a sequence had in the last pass have added to its time, and so many paths that
        they began: others may have shared its forward, where a row costs what it costs beside theirs."""
        all_rows = self._rows if self._shared else rows
        return self._cost(all_rows, paths) - self._cost(max(1, all_rows - some))

    @property
    def _together(self) -> int:
        """Sequences of a forward: all of a pass, or each has one of its own."""
        return self._sequences if self._shared else 1

    def _pass_s(self, each: int = 1) -> float:
        """Seconds of a pass with so many rows of each sequence."""
        return self._sequences // self._together * self._cost(self._together * each)

    @property
    def free(self) -> bool:
        """Whether anything is left to decide: the schedule has no block."""
        return self._schedule.gamma is None and self._schedule.post_verify

    @property
    def paused(self) -> bool:
        """Whether the target goes on alone for now, because drafting did not pay."""
        return self._trial.paused

    @property
    def plan(self) -> DraftPlan:
        """What the drafter is told."""
        schedule = self._schedule
        max_depth = 0 if self.paused else schedule.max_draft_tokens or self._max_depth()
        return DraftPlan(self.gamma, schedule.draft_batch or self._draft_batch(), max_depth)

    @property
    def gamma(self) -> int:
        """The block length in force: the schedule's, or the best one by theory where `auto` works in blocks."""
        if self._schedule.gamma is not None:
            return self._schedule.gamma
        if self._schedule.post_verify:
            return 1
        sequences = self._sequences
        if sequences == 1:
            c = self._cost(1) / self._guess_s if self._guess_s else 3.0
            return best_gamma(self.acceptance, max(c, 0.01))
        guess_s = self._guess_s or self._pass_s() / 3
        speeds = {
            gamma: tokens_per_pass_sd(self.acceptance, gamma) / (self._pass_s(gamma + 1) + gamma * guess_s)
            for gamma in range(1, LONGEST_BLOCK + 1)
            if self._together * (gamma + 1) <= self._buckets.most
        }
        return max(speeds, key=speeds.__getitem__, default=1)

    def take_wait_budget(self, lacking: int = 1) -> float:
        """Seconds worth waiting for a first guess of each of so many sequences that have none."""
        if not self.free or self.paused:
            return 0.0
        return self._wait.take_budget(self.acceptance, self._pass_s(), lacking, self._sequences, bool(self._draft_s))

    def choose(self, candidates: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
        """Of each sequence's candidates, likeliest first, those that a pass verifies: they bring more tokens than their
        time does. The sequences that share a pass compete for its rows."""
        self._sequences = len(candidates)
        if self._shared:
            return self._choose(candidates)
        return [self._choose([nodes])[0] for nodes in candidates]  # each has a forward of its own

    def _choose(self, candidates: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
        """Every path beside the chains has a price of its own, so the best choice may leave out some whose nodes are
        likelier than others on a chain."""
        schedule, room = self._schedule, max(0, self._buckets.most - len(candidates))
        each = min(schedule.max_verify_tokens or self._each.most, self._each.most) - 1
        if schedule.gamma is not None or schedule.max_verify_tokens is not None:
            most = each if schedule.gamma is None else min(each, schedule.gamma)
            while sum(min(len(nodes), most) for nodes in candidates) > room:
                most -= 1
            return [list(nodes[:most]) for nodes in candidates]
        reached = [self._reached(nodes) for nodes in candidates]
        paths_of = [path_numbers(nodes) for nodes in candidates]
        all_paths = max((max(paths, default=0) for paths in paths_of), default=0)
        best = -math.inf
        chosen: list[list[int]] = [[] for _ in candidates]
        for limit in range(all_paths + 1) if self._buckets.path_s else (all_paths,):
            kept = [[place for place, path in enumerate(paths) if path <= limit][:each] for paths in paths_of]
            gain, counts = self._share(reached, paths_of, kept, room)
            if gain >= best:
                best, chosen = gain, [places[:count] for places, count in zip(kept, counts, strict=True)]
        return [_renumbered(nodes, places) for nodes, places in zip(candidates, chosen, strict=True)]

    def _share(
        self,
        reached: Sequence[dict[int, float]],
        paths_of: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]],
        room: int,
    ) -> tuple[float, list[int]]:
        """How many of the nodes at the places `kept` of each sequence a pass reads, and their gain over their price.
        `paths_of`: of each node of a sequence, see `path_numbers`."""
        counts = [0] * len(kept)
        paths = [0] * len(kept)
        heap = [(-reached[i][places[0]], i) for i, places in enumerate(kept) if places]
        heapq.heapify(heap)
        rows, tokens, rate = len(kept), float(len(kept)), self.rate
        best, chosen = tokens - rate * self._cost(rows), list(counts)
        while heap and room:
            chance, i = heapq.heappop(heap)
            place = kept[i][counts[i]]
            paths[i] = max(paths[i], paths_of[i][place])
            counts[i] += 1
            rows, tokens, room = rows + 1, tokens - chance, room - 1
            if counts[i] < len(kept[i]):
                heapq.heappush(heap, (-reached[i][kept[i][counts[i]]], i))
            gain = tokens - rate * self._cost(rows, sum(paths))
            if gain >= best:
                best, chosen = gain, list(counts)
        return best, chosen

    def _reached(self, nodes: Sequence[Candidate]) -> dict[int, float]:
        """The chance that the walk comes to each node, by its place; -1 is the root."""
        reached = {-1: 1.0}
        for place, node in enumerate(nodes):
            reached[place] = reached[node.parent] * self.chance(node.node, node.depth)
        return reached

    def _max_depth(self) -> int:
        """How deep guesses go. A drafter that serves several sequences does for the others what it does not do for one:
        twice what a pass can read of each is enough."""
        if self._sequences == 1:
            return MAX_AHEAD
        return min(MAX_AHEAD, max(2, 2 * (self._buckets.most // self._together - 1)))

    def _draft_batch(self) -> int:
        """Rows of a draft: up to where a row more costs more than the rows before it did on average."""
        if not self._draft_s:
            return LEAVES
        return max(range(1, len(self._draft_s) + 1), key=lambda rows: rows / self._draft_s[rows - 1])


def _renumbered(nodes: Sequence[Candidate], places: Sequence[int]) -> list[Candidate]:
    """Those at `places`, which hold the parents of all of them, as a list of its own."""
    new = {-1: -1} | {place: number for number, place in enumerate(places)}
    return [nodes[place]._replace(parent=new[nodes[place].parent]) for place in places]
