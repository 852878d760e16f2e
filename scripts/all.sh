#!/usr/bin/env bash
# Every table but those that take hours (results, sweep_*), then all of it on one page.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs $TASKS
tables="main_results ablation gamma_sweep mean_accepted acceptance_by_depth equal_devices competition draft_sources timeline"
for name in $tables; do
  if over; then break; fi
  (if [[ -n ${MINUTES:-} ]]; then export MINUTES=$((MINUTES - SECONDS / 60)); fi; bash "scripts/$name.sh")
done
run python eval/report.py "$RESULTS" --output "$RESULTS/report.html"
