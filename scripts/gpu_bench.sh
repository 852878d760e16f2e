#!/usr/bin/env bash
# What this GPU makes of drafters of 0.5B, 1B and 8B and targets of 8B, 14B and 32B shapes with random weights: bits,
# graph against eager, bandwidth, overhead, and what two of it are predicted to reach. Under ten minutes, no network.
#
#   bash scripts/gpu_bench.sh                       results/gpu_bench/bench.json and bench.md
#   SHAPES="1B 8B" bash scripts/gpu_bench.sh --seconds 200
#   SHAPES=tiny bash scripts/gpu_bench.sh           seconds, on a CPU too
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
# READY=1: everything is installed, don't look; PYTHON says where
if [[ -n ${READY:-} ]]; then cd "$scripts/.."; else source "$scripts/environment.sh" run; PYTHON=; fi
read -ra shapes <<<"${SHAPES:-0.5B 1B 8B 14B 32B}"
exec "${PYTHON:-python3}" -m pearl bench --shapes "${shapes[@]}" "$@"
