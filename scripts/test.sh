#!/usr/bin/env bash
# Installs pearl with its development extras and passes the tests: ruff, then mypy on the pure core, then pytest, two tests at a time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
ruff check .
ruff format --check .
mypy
pytest --numprocesses 2 --dist worksteal "$@"
