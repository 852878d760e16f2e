#!/usr/bin/env bash
# Several texts at once: what is left of the speed-up as the batch fills the device.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
for size in 1 2 4 8; do row "humaneval-batch-$size" humaneval --mode ar pearl tree --batch-size "$size"; done
table "Batch scaling" --plots speedup
