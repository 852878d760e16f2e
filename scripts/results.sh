#!/usr/bin/env bash
# The results that docs/results/ keeps: whole answers, up to 512 tokens, greedy and at temperature 1, of as many problems
# as make every speed-up's interval the last of INTERVALS wide at most.
#
#   DATA=folder bash scripts/results.sh                  the default pair, every task
#   DATA=folder PAIR=mine.yaml TASKS="humaneval gsm8k mt_bench" bash scripts/results.sh     a pair of your own
#   DATA=folder bash scripts/results.sh keep             then: into docs/results/, with the page and its pictures
#   DATA=folder MINUTES=10 bash scripts/results.sh keep  ten minutes of it; called again, it goes on
#
# It may be cut off at any time: a problem that all modes have finished is kept. First all greedy tables with wide
# intervals, then those at temperature 1, then all again with narrower ones: so that whenever it ends each table is as
# good as the others. HumanEval has three lines: chat, chat without the part of an answer that repeats its prompt,
# completion. What draws in its own way (hf-*) is greedy only. Beside the variables of scripts/rows.sh: TEMPERATURES
# (0 1), INTERVALS (0.5 0.3 0.2 0.1, parts of a speed-up), BASELINES (hf-assisted hf-prompt-lookup; hf-assisted needs a draft
# model).
MODES=${MODES:-ar ar-all sd pearl tree} TASKS=${TASKS:-humaneval gsm8k mt_bench spec_bench}
TOKENS=${TOKENS:-512} INTERVALS=${INTERVALS:-0.5 0.3 0.2 0.1}
source "$(dirname "${BASH_SOURCE[0]}")/rows.sh"
needs $TASKS
for interval in $INTERVALS; do
  ENOUGH=$interval
  if [[ $interval == "${INTERVALS##* }" ]]; then ENOUGH=; fi  # the last round tells whether all is what was asked for
  for temperature in ${TEMPERATURES:-0 1}; do
    modes=$MODES
    if [[ $temperature == 0 ]]; then modes="$MODES ${BASELINES-hf-assisted hf-prompt-lookup}"; fi
    options=(--mode $modes --temperature "$temperature" --stop-at-interval "$interval" --skip-too-long)
    for task in $TASKS; do
      if [[ $task == humaneval ]]; then
        row "humaneval-chat-t$temperature" humaneval "${options[@]}" --format chat
      else
        row "$task-t$temperature" "$task" "${options[@]}"
      fi
    done
    if [[ " $TASKS " == *" humaneval "* ]]; then
      row "humaneval-completion-t$temperature" humaneval "${options[@]}" --format completion
    fi
  done
done
ended
if [[ $asked == keep ]] && ((${#folders[@]})); then keep --interval "${INTERVALS##* }"; fi
table "Whole answers" --columns tokens_per_second,speedup_vs_ar,speedup_interval_95,speedup_vs_ar_all,identical_to_ar,tokens_per_pass,acceptance_length,acceptance,score --plots speedup length equal_devices latency
