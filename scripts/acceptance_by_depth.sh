#!/usr/bin/env bash
# How far below the root guesses come true.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
row humaneval humaneval --mode $MODES
table "Acceptance by depth" --columns acceptance,acceptance_by_depth --plots depth
