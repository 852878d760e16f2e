# Sourced by the other scripts: goes to the repository's root, installs what is missing, activates the environment.
# usage: source scripts/environment.sh run|dev        (without a word it would take the options of the script)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh "${1:-run}"
if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then source .venv/bin/activate; fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
