#!/usr/bin/env bash
# Where guesses come from: the pair's draft model (or DRAFT), a feature drafter (FEATURE, its folder), the text. The default
# pair has a feature drafter too; FEATURE= leaves it out.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
if [[ $PAIR == smollm2-135m ]]; then FEATURE=${FEATURE-smollm2-135m-feature}; fi
row humaneval-model humaneval --mode ar pearl tree ${DRAFT:+--draft "$DRAFT"}
row humaneval-suffix humaneval --mode ar pearl --draft suffix
if [[ -n ${FEATURE:-} ]]; then
  row humaneval-feature-chain humaneval --mode ar pearl --draft "feature:$FEATURE"
  row humaneval-feature-tree humaneval --mode ar tree --draft "feature:$FEATURE"
fi
table "Draft sources" --columns tokens_per_second,speedup_vs_ar,speedup_interval_95,tokens_per_pass,acceptance --plots speedup depth
