"""Results to hold beside those of SPEED-Bench's own framework.

That is examples/specdec_bench of NVIDIA/Model-Optimizer: `main` at a2fbac7ba of 21 August 2026, with its vLLM adapter.

    speed_bench/MODE/specbench_results.json    acceptance lengths: of each request, each category, all; its keys
    speed_bench/MODE/timing.json               tokens a second, of all and of each turn, a request there
    speed_bench/MODE/by_group.json             both by category, sub-category and entropy tier, with counts; ours too

There a step is a decode step of a text, with or without a draft, also the one that reads the prompt. The end of
sequence is no token of it. A request's acceptance length is the mean over the steps of all its turns; a category's the
mean over its requests. So these differ from the `acceptance_length` of summary.json, which is of verifications, totals
over totals. Output TPS is there of the time from the first start to the last end; as our modes take turns, ours is of
the target's own time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean, pstdev
from typing import Any, Protocol

import numpy as np

from pearl.tasks.benchmark import Conversations, Turn


class Asked(Protocol):
    @property
    def task_id(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def sub_category(self) -> str: ...
    @property
    def tier(self) -> str | None: ...


def files(problems: Sequence[Asked], talks: Conversations, mode: str) -> dict[str, Any]:
    """The content of each file, by its name. Of several samples the first counts."""
    asked = [one for one in problems if talks.get(one.task_id)]
    turns = {one.task_id: talks[one.task_id][0] for one in asked}
    steps = {name: [*chain.from_iterable(map(steps_of, some))] for name, some in turns.items()}
    lengths = {name: fmean(some or [1]) for name, some in steps.items()}  # 1 of an answer that is an end alone
    folder = f"speed_bench/{mode.replace(':', '-')}"
    return {
        f"{folder}/specbench_results.json": acceptance(asked, steps, lengths),
        f"{folder}/timing.json": timing(list(turns.values())),
        f"{folder}/by_group.json": by_group(asked, turns, lengths),
    }


def steps_of(turn: Turn) -> list[int]:
    """The tokens of each step, without the end of sequence and without a step that was nothing else."""
    steps = list(turn.committed)
    if turn.finish == "eos":
        steps[-1] -= 1
    return [step for step in steps if step]


def acceptance(
    asked: Sequence[Asked], steps: Mapping[str, Sequence[int]], lengths: Mapping[str, float]
) -> dict[str, Any]:
    counted = Counter(chain.from_iterable(steps.values()))
    histogram = {length: counted[length] for length in sorted(counted)}
    left = total = sum(histogram.values())
    conditional, joint, before = {}, {}, 1.0
    for length, count in histogram.items():
        reached = left / total
        conditional[length], joint[length] = reached / before, reached
        before, left = reached, left - count
    return {
        "Request_AL": dict(lengths),
        "Category_AL": {name: fmean(some) for name, some in sorted(_grouped(asked, lengths, "category").items())},
        "Average_AL": fmean(lengths.values()),
        "Acceptance_Length_Histogram": histogram,
        "Conditional_Acceptance_Rate": conditional,
        "Joint_Acceptance_Rate": joint,
    }


def timing(requests: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """All tokens over the target's time; of each turn the time that its reader had, with others beside it."""
    turns = [[turn] for some in requests for turn in some]
    return {
        "Output TPS": sum(map(_tokens, turns)) / sum(turn.seconds for (turn,) in turns),
        "E2E Request Time": _statistics([*map(_latency_s, turns)]),
        "Request Tokens Per Second": _statistics([*map(_speed, turns)]),
        "Number of Output Tokens": _statistics([*map(_tokens, turns)]),
    }


def _tokens(turns: Sequence[Turn]) -> int:
    return sum(map(sum, map(steps_of, turns)))


def _latency_s(turns: Sequence[Turn]) -> float:
    return sum(turn.latency_s for turn in turns)


def _speed(turns: Sequence[Turn]) -> float:
    return _tokens(turns) / _latency_s(turns)


def by_group(
    asked: Sequence[Asked], turns: Mapping[str, Sequence[Turn]], lengths: Mapping[str, float]
) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for kind in ("category", "sub_category", "tier"):
        speed = {name: _speed(turns[name]) for name in lengths}
        groups, speeds = _grouped(asked, lengths, kind), _grouped(asked, speed, kind)
        members = defaultdict(list)
        for one in asked:
            members[getattr(one, kind)].append(turns[one.task_id])
        told[kind] = {
            name: {
                "requests": len(some),
                "AL": fmean(some),
                "Output TPS": timing(members[name])["Output TPS"],
                "Request Tokens Per Second": fmean(speeds[name]),
            }
            for name, some in sorted(groups.items())
        }
    return told


def _grouped(asked: Sequence[Asked], values: Mapping[str, float], kind: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for one in asked:
        if getattr(one, kind):
            groups[getattr(one, kind)].append(values[one.task_id])
    return groups


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """With four digits."""
    told: dict[str, Any] = {"min": min(values), "max": max(values), "mean": fmean(values), "std": pstdev(values)}
    quantiles = {f"{q}": f"{np.percentile(values, 100 * q):.4f}" for q in (0.25, 0.5, 0.75)}
    return {name: f"{value:.4f}" for name, value in told.items()} | {"quantiles": quantiles}
