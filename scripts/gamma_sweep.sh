#!/usr/bin/env bash
# Draft lengths fixed by hand, and beside them what finds its length by itself (sd, pearl).
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
row humaneval-gamma humaneval --mode ar sd:{1,2,3,4,6,8} sd pearl:{1,2,3,4,6,8} pearl
sweep draft_length "Gamma by hand and by itself" --plots speedup
