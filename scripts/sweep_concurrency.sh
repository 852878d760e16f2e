#!/usr/bin/env bash
# 1 to 32 texts side by side: tokens a second of all against time per token of each, a Pareto line with `ar` on it.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
for size in ${SIZES:-1 2 4 8 16 32}; do
  row "humaneval-concurrency-$size" humaneval --mode ar pearl tree --batch-size "$size"
done
sweep concurrency "Concurrency" --columns tokens_per_second,ms_per_token_of_each,speedup_vs_ar,identical_to_ar,acceptance_length
