#!/usr/bin/env bash
# Resource competition: the drafter on a device of its own, and on the target's.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
if [[ -e /dev/nvidia0 ]]; then
  shared="--target-device cuda:0 --draft-device cuda:0"
else
  core=$(python -c 'import os; print(min(os.sched_getaffinity(0)))')
  shared="--target-cores $core --draft-cores $core"
fi
row humaneval-apart humaneval --mode ar sd pearl tree
row humaneval-shared humaneval --mode ar sd pearl tree $shared
table "Drafter and target on two devices and on one" --plots speedup
