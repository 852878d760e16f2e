"""HumanEval: decode its 164 problems in several modes at once and score what comes out.

    accelerate launch --num_processes 2 eval/humaneval.py --pair qwen2.5-coder-0.5b-7b --mode ar sd pearl
    python eval/humaneval.py --limit 10

Prints a table; writes samples.jsonl, passes.jsonl and summary.json into --output (see pearl/results.py).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import main as evaluation
from pearl.tasks import humaneval
from pearl.tasks.suite import Answer


def score(problems: Sequence[humaneval.Problem], answers: Sequence[Answer]) -> dict[str, Any]:
    """pass@k for 1, 10, 100 and as many samples as there are: runs every program."""
    from pearl.tasks import scoring

    samples = max(Counter(task_id for task_id, _ in answers).values())
    ks = sorted({k for k in (1, 10, 100, samples) if k <= samples})
    passed = scoring.score(problems, answers, ks).pass_at_k
    return {"score": passed[1], "pass_at_1": passed[1], "pass_at_k": {str(k): value for k, value in passed.items()}}


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    return evaluation.main(replace(humaneval.SUITE, score=score), argv)


if __name__ == "__main__":
    sys.exit(main())
