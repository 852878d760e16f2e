"""Spec-Bench: 480 prompts of 13 kinds, made to compare speculative decoding.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/spec_bench.py --mode ar pearl tree
    python eval/spec_bench.py --share 0.1 --data question.jsonl

The same as `pearl eval spec-bench`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
Each mode's answers go to model_answer/ in the format of Spec-Bench, whose speed.py compares two of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("spec-bench")

if __name__ == "__main__":
    sys.exit(main())
