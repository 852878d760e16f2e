#!/usr/bin/env bash
# Peak memory of one training step of a feature drafter against S, the number of segments in which its slots are read.
#
#   bash scripts/mem_scaling.sh              n = 1024 tokens, K = 8 depths
#   N=2048 K=12 bash scripts/mem_scaling.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
echo "| S | rows in memory | peak MB above the start | seconds |"
echo "|--:|--:|--:|--:|"
for segments in ${SEGMENTS:-1 2 4 8 16}; do
  python scripts/mem_scaling.py "$segments" "${N:-1024}" "${K:-8}"
done
