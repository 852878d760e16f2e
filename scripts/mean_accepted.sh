#!/usr/bin/env bash
# Mean accepted tokens: committed by a pass (Spec-Bench's measure), and from one rejected guess to the next (PEARL's).
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs humaneval gsm8k mt_bench
for task in humaneval gsm8k mt_bench; do row "$task" "$task" --mode $MODES; done
table "Mean accepted tokens" --columns tokens_per_pass,tokens_per_rejection,acceptance,identical_to_ar
