"""MGSM: the same ten problems in eleven languages, figures language by language.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/mgsm.py --mode ar pearl tree
    python eval/mgsm.py --share 0.1 --data mgsm.jsonl

The same as `pearl eval mgsm`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("mgsm")

if __name__ == "__main__":
    sys.exit(main())
