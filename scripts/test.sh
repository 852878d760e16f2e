#!/usr/bin/env bash
# Installs pearl with its development extras and passes the tests: ruff, then pytest, two tests at a time, beside mypy.
#
#   bash scripts/test.sh          all of them, in about 12 minutes on two cores
#   bash scripts/test.sh quick    what one runs all day, in about 3: without those that are marked as slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
tier=()
if [[ ${1:-} == quick ]]; then tier=(-m "not slow" --hypothesis-profile=quick); shift; fi
ruff check .
ruff format --check .
unset PYTHONDONTWRITEBYTECODE  # else every process compiles pearl and its tests again
mypy &
types=$!
pytest -q --numprocesses 2 --dist worksteal "${tier[@]}" "$@"
wait $types
