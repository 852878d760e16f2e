#!/usr/bin/env bash
# From nothing to a result: installs pearl, then decodes real HumanEval problems with the embedded default model in two
# processes, alone (ar) and in parallel (pearl, tree), interleaved problem by problem, and prints two tables: of whole
# answers, and without the part that repeats the question. They are not scored: the model is too small to solve them.
# Further options go to eval/humaneval.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
  eval/humaneval.py --mode ar pearl tree --limit 6 --max-new-tokens 128 --no-score "$@"
