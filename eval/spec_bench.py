"""Spec-Bench: 480 prompts of 13 kinds, made to compare speculative decoding.

    accelerate launch --num_processes 2 eval/spec_bench.py --pair qwen2.5-0.5b-7b --mode ar sd pearl
    python eval/spec_bench.py --share 0.1 --data question.jsonl

Writes what eval/humaneval.py writes, and each mode's answers to model_answer/ in the format of
Spec-Bench, whose speed.py compares two of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import main as evaluation
from pearl.tasks import spec_bench


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    return evaluation.main(spec_bench.SUITE, argv)


if __name__ == "__main__":
    sys.exit(main())
