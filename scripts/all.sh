#!/usr/bin/env bash
# Every table, then all of it on one page. Batches only where asked for: BATCHES=1.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs $TASKS
tables="main_results ablation gamma_sweep mean_accepted acceptance_by_depth equal_devices competition draft_sources timeline"
for name in $tables ${BATCHES:+batch_scaling}; do bash "scripts/$name.sh"; done
run python eval/report.py "$RESULTS" --output "$RESULTS/report.html"
