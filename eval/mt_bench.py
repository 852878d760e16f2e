"""MT-bench: 80 questions in two turns; the second turn's prompt goes on from the first answer.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/mt_bench.py --mode ar pearl tree
    python eval/mt_bench.py --share 0.1 --data question.jsonl

The same as `pearl eval mt-bench`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
Each mode's answers go to model_answer/ in the format of FastChat's llm_judge; `pearl judge` judges them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("mt-bench")

if __name__ == "__main__":
    sys.exit(main())
