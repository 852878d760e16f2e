#!/usr/bin/env bash
# What both processes do around a miss, in every mode that drafts.
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
TRACE=1 row humaneval-timeline humaneval --mode ar sd pearl tree --limit 1
table "Timeline" --plots timeline
