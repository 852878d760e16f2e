#!/usr/bin/env bash
# Every mode on every problem: HumanEval, 100 problems of GSM8K, both turns of MT-bench, a tenth of each subtask of Spec-Bench.
#
#   DATA=folder TOKENS=48 bash scripts/full_width.sh    what docs/results/ holds; hours on two cores, and it may be cut off
MODES=${MODES:-ar ar-all sd pearl pearl-no-pre pearl-no-post tree}
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs humaneval gsm8k spec_bench mt_bench
row full-humaneval humaneval --mode $MODES
row full-gsm8k gsm8k --mode $MODES $([[ -n ${LIMIT:-} ]] || echo --limit 100)
row full-spec_bench spec_bench --mode $MODES --share 0.1
row full-mt_bench mt_bench --mode $MODES
table "Every mode" --plots speedup latency
