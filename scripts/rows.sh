# Sourced by the scripts of tables: `row` decodes what is missing, `table` shows it. Run twice, nothing is done twice.
#
#   PAIR      pairs of the registry (pearl pairs) or YAML files; default: smollm2-135m
#   LIMIT     problems of each task; default: all.  TOKENS: new tokens of a text; default: the task's
#   DATA      a folder with gsm8k/test.jsonl, mgsm/mgsm.jsonl, mt_bench/ and spec_bench/question.jsonl, and speed_bench/
#             (what prepare_data.py writes: of several configs qualitative/); default: the hub
#   OPTIONS   further options of every run.  RESULTS: where all goes; default: results
#   MODES     of runs that several tables share; default: ar ar-all sd pearl tree
#   LAUNCH    what starts an evaluation; default: accelerate launch --num_processes 2
#   MINUTES   that this call may take: no run is begun after them, and one under way stops in time; the next call goes on
#   KEEP_TO   where results are kept that a script is told to `keep`; default: docs/results
#   DRY_RUN=1 prints the commands.  READY=1: everything is installed, don't look
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
for name in DATA RESULTS KEEP_TO; do # as they are where the caller is, before the folder changes
  if [[ -n ${!name:-} ]]; then export "$name=$(realpath -ms "${!name}")"; fi
done
pairs=""
for pair in ${PAIR:-}; do
  case $pair in */* | *.yaml | *.yml) pair=$(realpath -ms "$pair") ;; esac
  pairs+="${pairs:+ }$pair"
done
PAIR=$pairs
if [[ -n ${DRY_RUN:-}${READY:-} ]]; then cd "$scripts/.."; else source "$scripts/environment.sh" run; fi
PAIR=${PAIR:-smollm2-135m} RESULTS=${RESULTS:-results}
LAUNCH=${LAUNCH:-accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no}
MODES=${MODES:-ar ar-all sd pearl tree}
TASKS=${TASKS:-humaneval gsm8k mgsm mt_bench spec_bench}
folders=() asked=${1:-}

run() { if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# data_of TASK: the file of its problems, if DATA holds them
data_of() {
  if [[ -n ${DATA:-} ]]; then case $1 in
    gsm8k) echo "$DATA/gsm8k/test.jsonl" ;;
    mgsm) echo "$DATA/mgsm/mgsm.jsonl" ;;
    mt_bench | spec_bench) echo "$DATA/$1/question.jsonl" ;;
    speed_bench)
      if [[ -d $DATA/$1/qualitative ]]; then echo "$DATA/$1/qualitative"; else echo "$DATA/$1"; fi ;;
  esac; fi
}

# ended: leaves the runs that have a summary in `folders`, each once
ended() {
  local folder all=("${folders[@]}"); declare -A seen=(); folders=()
  for folder in "${all[@]}"; do
    if [[ -z ${seen[$folder]:-} && (-n ${DRY_RUN:-} || -e $folder/summary.json) ]]; then folders+=("$folder"); fi
    seen[$folder]=1
  done
}

# needs TASK...: ends at once, with a sentence, where a later row would find no problems
needs() {
  local task words=()
  for task in "$@"; do words+=("${task//_/-}" "$(data_of "$task")"); done
  [[ -n ${DRY_RUN:-} ]] || python -c "import sys
from pearl.commands.eval import benchmark
from pearl.config.cli import guarded
tasks = zip(sys.argv[1::2], sys.argv[2::2])
sys.exit(guarded(lambda _: not all(benchmark(name).problems(file or None) for name, file in tasks))())" "${words[@]}"
}

# over: whether a run that is begun now would have less than half a minute
over() { [[ -n ${MINUTES:-} ]] && ((60 * MINUTES - SECONDS < 30)); }

# enough FOLDER: whether the run there has all its problems, or intervals as narrow as ENOUGH, if that is set
enough() {
  [[ -n ${ENOUGH:-} && -e $1/summary.json ]] && python -c 'import json, sys
told = json.load(open(sys.argv[1]))
sys.exit(told["left"] > 0 and (told["widest_interval"] or 9) > float(sys.argv[2]))' "$1/summary.json" "$ENOUGH"
}

# row NAME TASK OPTIONS...: a run of every pair, in RESULTS/PAIR/NAME
row() {
  local name=$1 task=$2 pair folder command data; shift 2
  data=$(data_of "$task")
  for pair in $PAIR; do
    folder=$RESULTS/$(basename "$pair" .yaml)${LIMIT:+-limit-$LIMIT}${TOKENS:+-tokens-$TOKENS}/$name
    folders+=("$folder")
    if over || enough "$folder"; then continue; fi
    command=($LAUNCH "eval/$task.py" --pair "$pair" --output "$folder" --resume)
    command+=(${LIMIT:+--limit "$LIMIT"} ${TOKENS:+--max-new-tokens "$TOKENS"} ${TRACE:+--trace "$folder/trace.json"})
    command+=(${data:+--data "$data"} ${MINUTES:+--seconds "$((60 * MINUTES - SECONDS))"})
    [[ -n ${DRY_RUN:-} ]] || mkdir -p "$folder"
    run "${command[@]}" ${OPTIONS:-} "$@"
  done
}

# table TITLE OPTIONS...: of all rows so far, in RESULTS/tables/SCRIPT. With MINUTES, of those that have a summary
table() {
  local title=$1; shift
  if [[ -n ${MINUTES:-} ]]; then ended; fi
  if ((${#folders[@]} == 0)); then echo "no run has a summary yet: call it again"; return; fi
  run python eval/table.py "${folders[@]}" --title "$title" --output "$RESULTS/tables/$(basename "$0" .sh)" "$@"
}

# sweep NAME TITLE OPTIONS...: the table of one, with its picture. `keep` behind the script's name: into docs/results/ too
sweep() {
  local name=$1 all=${#folders[@]}; shift
  table "$@" --sweep "$name"
  if [[ $asked != keep ]]; then return; fi
  if ((${#folders[@]} == all)); then keep --sweep "$name"; else echo "kept once all its runs have ended: call it again"; fi
}

keep() { run python scripts/keep_results.py "${folders[@]}" "$@" ${KEEP_TO:+--to "$KEEP_TO"}; }
