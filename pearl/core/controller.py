"""What the runtime decides for itself: the width of a pass, the rows of a draft, whether to wait, whether to draft.

Knows: what passes and drafts have cost, and how often guesses of a given probability came true. Refuses to know:
tokens, tensors, messages, clocks. A decision changes when things are done and how fast, never what is written. The
target decides, its verdicts carry what concerns the drafter, and `passes.jsonl` holds every decision.

One price runs through all of it: the tokens per second that the run has been making, `rate`. Something that takes a
second more has to bring that many tokens more (Dinkelbach 1967: the best ratio is the one at whose price nothing more
can be gained).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from pearl.core.messages import Plan
from pearl.core.schedule import MAX_AHEAD, Schedule
from pearl.core.theory import best_gamma, tokens_per_pass_sd
from pearl.core.token_buckets import LEAVES, BatchedTokenBuckets, TokenBuckets
from pearl.core.trie import Likely, path_numbers

MEMORY = 0.95  # of a moving sum, from one pass to the next
TRIAL, LONGEST_TRIAL = 12, 96  # passes after which drafting is judged, doubled each time that it was worth it
LOOK = 4  # passes without drafting that show what the target makes alone
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # passes without drafting, doubled each time that it was not worth it
LONG = 3  # times as long as usual: no guess is waited for any longer
MOMENT = 0.02  # of a pass: the short wait for a source that answers at once
WORTH = 0.985  # drafting goes on at this many times the speed of the target alone: guesses come in bursts
LONGEST_BLOCK = 8  # of `auto` where several texts share a pass
TRUST, OFTEN = 2, 8  # what a pass cost at loading counts as much as this many passes; the last so many make an average
CLEAR = 1.3  # times faster than the target was expected to be alone: no need to find out what it really makes


class Chances:
    """How often a guess came true, by the probability that the drafter gave it; at first it is believed."""

    BINS = 10

    def __init__(self) -> None:
        centres = [(b + 0.5) / self.BINS for b in range(self.BINS)]
        self._right = [4 * centre for centre in centres] + [4 * 0.7]  # the last: guesses without a probability
        self._asked = [4.0] * (self.BINS + 1)
        self.acceptance = 0.7  # of first guesses

    def __getitem__(self, logp: float) -> float:
        b = self._bin(logp)
        return self._right[b] / self._asked[b]

    def learn(self, logp: float, right: bool) -> None:
        b = self._bin(logp)
        self._right[b] = 0.98 * self._right[b] + right
        self._asked[b] = 0.98 * self._asked[b] + 1

    def _bin(self, logp: float) -> int:
        return self.BINS if logp == 0 else min(self.BINS - 1, int(math.exp(logp) * self.BINS))


class Controller:
    """The decisions for one schedule, and for passes of about so many texts."""

    def __init__(
        self,
        schedule: Schedule,
        rows: TokenBuckets,
        joint: BatchedTokenBuckets | None = None,
        chances: Chances | None = None,
    ):
        """`rows` of one text, `joint`: of several that share their passes. `chances`: shared with other controllers."""
        self._schedule, self._each = schedule, rows
        self._rows: TokenBuckets | BatchedTokenBuckets = joint or rows
        self._texts = 1  # of the last pass
        self.chances = chances or Chances()
        self._draft_s: tuple[float, ...] = ()  # of a drafter forward, by its rows
        self._seen: dict[int, tuple[int, float]] = {}  # by rows, padded: how many passes, their average
        self._scale = 1.0  # a pass costs this many times what was measured at the start
        self._tokens = self._seconds = 0.0  # moving sums
        self._alone_s = 0.0  # of a pass, a text, while the drafter rests; both models share caches and memory
        self._guess_s = 0.0  # waited for, each: of a lock-step schedule
        self._trial = (0, 0.0, 0)  # tokens, seconds and passes since drafting was last judged
        self._trial_passes = TRIAL  # after so many it is judged again
        self._pause, self._left = FIRST_PAUSE, 0  # how long the next pause is, and what is left of this one
        self._resting = False  # the drafter has finished the forward that it was in when the pause began
        self._wait_s = 0.0  # until the first guess after a miss comes
        self._moment_every = self._moment_in = 1  # passes until a short wait for a first guess is tried again

    # facts

    def draft_costs(self, seconds: Sequence[float]) -> None:
        if seconds and not self._draft_s:
            self._wait_s = 1.5 * seconds[min(1, len(seconds) - 1)]
        self._draft_s = tuple(seconds)

    def judged(self, logp: float, right: bool, first: bool = True) -> None:
        """A guess of that log-probability was compared with the target's pick; `first`: the drafter's best there."""
        self.chances.learn(logp, right)
        if first:
            self.chances.acceptance += 0.05 * (right - self.chances.acceptance)

    def waited(self, came: bool, seconds: float = 0.0) -> None:
        """A wait for a first guess is over."""
        self._wait_s += 0.1 * (seconds - self._wait_s)
        self._moment_every = 1 if came else min(2 * self._moment_every, 64)
        self._moment_in = self._moment_every

    def guessed(self, guesses: float, seconds: float) -> None:
        """So many guesses came while the target waited for them, for each text that it waited for."""
        each = seconds / guesses
        self._guess_s = self._guess_s + 0.1 * (each - self._guess_s) if self._guess_s else each

    def passed(
        self, rows: int, committed: int, forward_s: float, seconds: float, paths: int = 0, texts: int = 1
    ) -> None:
        """A pass of so many rows, some of them on `paths` beside its chain, is over; so many texts shared it."""
        self._texts = texts
        ratio = forward_s / self._rows.cost(rows, paths)
        if isinstance(self._rows, BatchedTokenBuckets):
            self._observe(rows, forward_s - self._scale * paths * self._rows.path_s)
        self._scale = self._scale + 0.1 * (ratio - self._scale) if self._seconds else ratio
        self._tokens = MEMORY * self._tokens + committed
        self._seconds = MEMORY * self._seconds + seconds
        if self.free and self._draft_s:  # a source without a model takes nothing from the target
            self._judge_drafting(committed, seconds)

    def _observe(self, rows: int, seconds: float) -> None:
        """What a pass of so many rows took in truth: what was measured at loading is soon the lesser part of it."""
        count = self._rows.pad(min(rows, self._rows.most))
        often, average = self._seen.get(count, (0, 0.0))
        often = min(often + 1, OFTEN)
        self._seen[count] = often, average + (seconds - average) / often

    def _judge_drafting(self, committed: int, seconds: float) -> None:
        """Whether drafting pays is found out by stopping it where it may not, and trying again, ever more rarely."""
        if self._left:
            if self._resting:
                each = seconds / self._texts
                self._alone_s = self._alone_s + 0.1 * (each - self._alone_s) if self._alone_s else each
            self._left, self._resting = self._left - 1, True
            if self._left or not self._trial[2]:
                return
        else:
            tokens, time, passes = self._trial
            self._trial = (tokens + committed, time + seconds, passes + 1)
            if passes + 1 < self._trial_passes:
                return
        tokens, time, _ = self._trial
        if not self._alone_s and tokens / time <= CLEAR * self._texts / self._rows.cost(self._texts):
            self._left, self._resting = LOOK, False  # and then this trial is judged
            return
        if not self._alone_s or tokens / time > WORTH / self._alone_s:
            self._pause, self._trial_passes = FIRST_PAUSE, min(2 * self._trial_passes, LONGEST_TRIAL)
        else:
            self._left, self._resting, self._trial_passes = self._pause, False, TRIAL
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._trial = (0, 0.0, 0)

    # decisions

    @property
    def rate(self) -> float:
        """Tokens per second of late."""
        return self._tokens / self._seconds if self._seconds else self._texts / self._cost(self._texts)

    @property
    def acceptance(self) -> float:
        """Of the drafter's first guesses, of late."""
        return self.chances.acceptance

    @property
    def free(self) -> bool:
        """Whether anything is left to decide: the schedule has no block."""
        return self._schedule.gamma is None and self._schedule.post_verify

    @property
    def paused(self) -> bool:
        """Whether the target goes on alone for now, because drafting did not pay."""
        return self._left > 0

    @property
    def plan(self) -> Plan:
        """What the drafter is told."""
        schedule = self._schedule
        ahead = 0 if self.paused else schedule.max_draft_tokens or self._ahead()
        return Plan(self.block, schedule.draft_batch or self._branches(), ahead)

    @property
    def block(self) -> int:
        """The block length in force: gamma, or the best one by theory where `auto` works in blocks."""
        if self._schedule.gamma is not None:
            return self._schedule.gamma
        if self._schedule.post_verify:
            return 1
        texts = self._texts
        if texts == 1:
            c = self._cost(1) / self._guess_s if self._guess_s else 3.0
            return best_gamma(self.acceptance, max(c, 0.01))
        guess_s = self._guess_s or self._cost(texts) / 3
        speeds = {
            block: tokens_per_pass_sd(self.acceptance, block) / (self._cost(texts * (block + 1)) + block * guess_s)
            for block in range(1, LONGEST_BLOCK + 1)
            if texts * (block + 1) <= self._rows.most
        }
        return max(speeds, key=speeds.__getitem__, default=1)

    def choose(self, nodes: Sequence[Likely]) -> list[Likely]:
        """Those of `nodes`, likeliest first, that a pass verifies: they bring more tokens than their time does.

        Every path beside the chain has a price of its own, so the best choice may leave out some whose nodes are
        likelier than others on the chain.
        """
        plan, schedule = self._each, self._schedule
        most = min(schedule.max_verify_tokens or plan.most, plan.most) - 1
        if schedule.gamma is not None:
            return list(nodes[: min(most, schedule.gamma)])
        if schedule.max_verify_tokens is not None:
            return list(nodes[:most])
        reached = self._reached(nodes)
        numbers = path_numbers(nodes)
        all_paths = max(numbers, default=0)
        best, chosen = -math.inf, []
        for limit in range(all_paths + 1) if plan.path_s else (all_paths,):
            kept = [place for place, number in enumerate(numbers) if number <= limit][:most]
            tokens, paths = 0.0, 0
            for rows, place in enumerate([-1, *kept], 1):
                tokens += reached[place]
                paths = max(paths, numbers[place] if place >= 0 else 0)
                gain = tokens - self.rate * self._cost(rows, paths)
                if gain >= best:
                    best, chosen = gain, kept[: rows - 1]
        return _renumbered(nodes, chosen)

    def choose_each(self, texts: Sequence[Sequence[Likely]]) -> list[list[Likely]]:
        """As `choose`, for several texts that share a pass: their nodes compete for its rows."""
        self._texts = len(texts)
        if len(texts) == 1 or not isinstance(self._rows, BatchedTokenBuckets):
            return [self.choose(nodes) for nodes in texts]
        schedule, room = self._schedule, self._rows.most - len(texts)
        each = min(schedule.max_verify_tokens or self._each.most, self._each.most) - 1
        if schedule.gamma is not None or schedule.max_verify_tokens is not None:
            most = each if schedule.gamma is None else min(each, schedule.gamma)
            while sum(min(len(nodes), most) for nodes in texts) > room:
                most -= 1
            return [list(nodes[:most]) for nodes in texts]
        reached = [self._reached(nodes) for nodes in texts]
        numbers = [path_numbers(nodes) for nodes in texts]
        all_paths = max((max(some, default=0) for some in numbers), default=0)
        best = -math.inf
        chosen: list[list[int]] = [[] for _ in texts]
        for limit in range(all_paths + 1) if self._rows.path_s else (all_paths,):
            kept = [[place for place, number in enumerate(some) if number <= limit][:each] for some in numbers]
            gain, counts = self._share(reached, numbers, kept, room)
            if gain >= best:
                best, chosen = gain, [places[:count] for places, count in zip(kept, counts, strict=True)]
        return [_renumbered(nodes, places) for nodes, places in zip(texts, chosen, strict=True)]

    def _share(
        self,
        reached: Sequence[dict[int, float]],
        numbers: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]],
        room: int,
    ) -> tuple[float, list[int]]:
        """How many of the nodes at the places `kept` of each text a pass reads, and their gain over their price."""
        counts = [0] * len(kept)
        paths = [0] * len(kept)
        heap = [(-reached[text][places[0]], text) for text, places in enumerate(kept) if places]
        heapq.heapify(heap)
        rows, tokens, rate = len(kept), float(len(kept)), self.rate
        best, chosen = tokens - rate * self._cost(rows), list(counts)
        while heap and room:
            chance, text = heapq.heappop(heap)
            paths[text] = max(paths[text], numbers[text][kept[text][counts[text]]])
            counts[text] += 1
            rows, tokens, room = rows + 1, tokens - chance, room - 1
            if counts[text] < len(kept[text]):
                heapq.heappush(heap, (-reached[text][kept[text][counts[text]]], text))
            gain = tokens - rate * self._cost(rows, sum(paths))
            if gain >= best:
                best, chosen = gain, list(counts)
        return best, chosen

    def _reached(self, nodes: Sequence[Likely]) -> dict[int, float]:
        """The chance that the walk comes to each node, by its place; -1 is the root."""
        reached = {-1: 1.0}
        for place, node in enumerate(nodes):
            reached[place] = reached[node.parent] * self.chances[node.node.logp]
        return reached

    def patience(self, lacking: int = 1) -> float:
        """Seconds worth waiting for a first guess of each of so many texts that have none.

        A pass that reads the root alone tells whether the first guess is right, as it comes meanwhile (pre-verify), and
        the next pass reads those that follow. So waiting for it saves a pass only where it is right and the second is
        wrong: if that is worth the wait, it is waited for. Else there is a short wait now and then, for a source that
        answers at once, and ever more rarely where nothing came of it.
        """
        if not self.free or self.paused:
            return 0.0
        worth = self.acceptance * (1 - self.acceptance) * self._cost(self._texts) * lacking / self._texts
        if self._draft_s and worth > self._wait_s:
            return LONG * self._wait_s
        self._moment_in -= 1
        return 0.0 if self._moment_in > 0 else MOMENT * self._cost(self._texts)

    def _ahead(self) -> int:
        """How deep guesses go. A drafter that serves several texts does for the others what it does not do for one:
        twice what a pass can read of each is enough."""
        if self._texts == 1:
            return MAX_AHEAD
        return min(MAX_AHEAD, max(2, 2 * (self._rows.most // self._texts - 1)))

    def _branches(self) -> int:
        """Rows of a draft: up to where a row more costs more than the rows before it did on average."""
        if not self._draft_s:
            return LEAVES
        return max(range(1, len(self._draft_s) + 1), key=lambda rows: rows / self._draft_s[rows - 1])

    def _cost(self, rows: int, paths: int = 0) -> float:
        """Seconds of a pass of so many rows: what was measured, drawn to what such passes have taken."""
        expected = self._scale * self._rows.cost(rows, paths)
        if not self._seen:
            return expected
        often, average = self._seen.get(self._rows.pad(min(rows, self._rows.most)), (0, 0.0))
        beside = self._scale * paths * self._rows.path_s
        return (TRUST * expected + often * (average + beside)) / (TRUST + often)


def _renumbered(nodes: Sequence[Likely], places: Sequence[int]) -> list[Likely]:
    """Those at `places`, which hold the parents of all of them, as a list of its own."""
    new = {-1: -1} | {place: number for number, place in enumerate(places)}
    return [nodes[place]._replace(parent=new[nodes[place].parent]) for place in places]
