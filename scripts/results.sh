#!/usr/bin/env bash
# The results that docs/results/ keeps: whole answers, up to 512 tokens, greedy and at temperature 1, of as many problems
# as make every speed-up's interval INTERVAL wide at most. A step is a run of a task; one that was cut off goes on.
#
#   DATA=folder bash scripts/results.sh                  the default pair, every task
#   DATA=folder PAIR=mine.yaml TASKS="humaneval gsm8k mt_bench" bash scripts/results.sh     a pair of your own
#   DATA=folder bash scripts/results.sh keep             then: into docs/results/, with the page and its pictures
#
# HumanEval has three lines: chat, chat without the part of an answer that repeats its prompt, completion. What draws in
# its own way (hf-*) is greedy only. The variables of scripts/rows.sh hold; TEMPERATURES and INTERVAL (0.1) are its own.
MODES=${MODES:-ar ar-all sd pearl tree} TASKS=${TASKS:-humaneval gsm8k mt_bench spec_bench}
TOKENS=${TOKENS:-512} INTERVAL=${INTERVAL:-0.1}
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs $TASKS
for temperature in ${TEMPERATURES:-0 1}; do
  modes=$MODES
  if [[ $temperature == 0 ]]; then modes="$MODES ${BASELINES-hf-assisted hf-prompt-lookup}"; fi
  for task in $TASKS; do
    options=(--mode $modes --temperature "$temperature" --stop-at-interval "$INTERVAL" --skip-too-long)
    if [[ $task == humaneval ]]; then
      row "humaneval-chat-t$temperature" humaneval "${options[@]}" --format chat
      row "humaneval-completion-t$temperature" humaneval "${options[@]}" --format completion
    else
      row "$task-t$temperature" "$task" "${options[@]}"
    fi
  done
done
if [[ ${1:-} == keep ]]; then
  run python scripts/keep_results.py "${folders[@]}" ${KEEP_TO:+--to "$KEEP_TO"}
fi
table "Whole answers" --columns tokens_per_second,speedup_vs_ar,speedup_interval_95,speedup_vs_ar_all,identical_to_ar,tokens_per_pass,acceptance_length,acceptance,score --plots speedup latency
