"""GSM8K: grade-school problems, right if the final number is.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/gsm8k.py --mode ar pearl tree
    python eval/gsm8k.py --limit 10 --data test.jsonl

The same as `pearl eval gsm8k`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
`--format completion` is the 8-shot chain of thought, `--format chat` asks without examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("gsm8k")

if __name__ == "__main__":
    sys.exit(main())
