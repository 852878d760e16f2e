#!/usr/bin/env bash
# Main results: every mode on every task, Spec-Bench on a tenth of each subtask. PAIR="a b" compares models.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs $TASKS
for task in $TASKS; do
  row "$task" "$task" --mode $MODES $([[ $task != spec_bench ]] || echo --share 0.1)
done
table "Main results" --plots speedup latency
