#!/usr/bin/env bash
# The paper's ablation: PEARL without pre-verify, without post-verify, and whole.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs humaneval gsm8k
row humaneval-ablation humaneval --mode ar pearl-no-pre pearl-no-post pearl
row gsm8k-ablation gsm8k --mode ar pearl-no-pre pearl-no-post pearl
table "Ablation" --plots speedup
