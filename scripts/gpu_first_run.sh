#!/usr/bin/env bash
# The first run on a GPU: one call, eight minutes at most, no network. It reports as it goes; what it has found when it
# is cut off lies in results/gpu_first_run: first_run.json, first_run.md, and the output of every step.
#
#   bash scripts/gpu_first_run.sh                   shapes 0.5B to 32B, as far as memory and time hold them
#   SHAPES="1B 8B" bash scripts/gpu_first_run.sh
#   SHAPES=tiny bash scripts/gpu_first_run.sh       the same on a CPU, in under four minutes
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
# READY=1: everything is installed, don't look; PYTHON says where
if [[ -n ${READY:-} ]]; then cd "$scripts/.."; else source "$scripts/environment.sh" run; PYTHON=; fi
read -ra shapes <<<"${SHAPES:-0.5B 1B 8B 14B 32B}"
exec "${PYTHON:-python3}" scripts/gpu_first_run.py --shapes "${shapes[@]}" "$@"
