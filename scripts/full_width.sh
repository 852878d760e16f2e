#!/usr/bin/env bash
# Every mode on every problem: HumanEval, 100 problems of GSM8K, both turns of MT-bench, a tenth of each subtask of Spec-Bench.
#
#   DATA=folder TOKENS=64 bash scripts/full_width.sh    what docs/results/ holds; hours on two cores, and it may be cut off
MODES=${MODES:-ar ar-all sd pearl pearl-no-pre pearl-no-post tree}
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
row humaneval humaneval --mode $MODES
row gsm8k gsm8k --mode $MODES --limit "${LIMIT:-100}"
row spec_bench spec_bench --mode $MODES --share 0.1
row mt_bench mt_bench --mode $MODES
table "Every mode" --plots speedup latency
