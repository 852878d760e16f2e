#!/usr/bin/env bash
# The cost of everything that is not a model forward, per pass: choosing nodes, masks, walking, messages, Python.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
exec python "$(dirname "${BASH_SOURCE[0]}")/bench_runtime.py" "$@"
