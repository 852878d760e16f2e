#!/usr/bin/env bash
# Is a second device better spent on a drafter or on the target? Every mode against ar-all, which has both.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs humaneval gsm8k
for task in humaneval gsm8k; do row "$task" "$task" --mode $MODES; done
table "Equal devices" --columns tokens_per_second,speedup_vs_ar,speedup_interval_95,speedup_vs_ar_all,target_busy,drafter_busy --plots speedup equal_devices
