#!/usr/bin/env bash
# The drafters of the default target that come with this repository, from nothing: questions, the target's own answers,
# the head over its hidden states, the small draft model, that one trained on (`more`), and then to guess five tokens a
# forward (`pard`). On two CPU cores it takes a night. A run that was cut off goes on where it was; stages can be named,
# and a recording ends with the shard at hand after so many seconds:
#
#   DATA=folder bash scripts/train_smollm2.sh                    all: questions answers feature draft more pard diagnose
#   DATA=folder bash scripts/train_smollm2.sh questions answers  these stages
#   DATA=folder SECONDS_AT_MOST=9000 bash scripts/train_smollm2.sh answers
#
# DATA holds gsm8k/train.jsonl (https://github.com/openai/grade-school-math). What lies there for the evaluations,
# gsm8k/test.jsonl, mgsm/*.jsonl, mt_bench/question.jsonl and spec_bench/question.jsonl, is compared with the questions:
# one that has 13 words in a row in common with them, or with HumanEval, is left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" run
questions=data/questions texts=data/smollm2-135m
: "${DATA:?set DATA to the folder that holds gsm8k/train.jsonl}"

questions() {
  mkdir -p "$questions"
  python scripts/python_prompts.py 2600 > "$questions/python.jsonl"
  python scripts/general_prompts.py 2400 > "$questions/general.jsonl"
  python scripts/prose_prompts.py 7000 > "$questions/prose.jsonl"
  head -n 2400 "$DATA/gsm8k/train.jsonl" > "$questions/gsm8k.jsonl"
  local against=() one
  for one in "$DATA"/gsm8k/test.jsonl "$DATA"/mgsm/*.jsonl "$DATA"/{mt_bench,spec_bench}/question.jsonl; do
    [[ ! -e $one ]] || against+=("$one")
  done
  python scripts/overlap.py "$questions"/*.jsonl --drop --against "${against[@]}"
}

answers() {  # about 17,900 with 3.5 million tokens; one in three at temperature 1
  local ended=0
  timeout --signal=INT "${SECONDS_AT_MOST:-0}" \
    pearl extract --prompts "$questions"/{python,general,prose,gsm8k}.jsonl --self-written 3500 \
    --max-new-tokens 256 --max-length 1024 --temperature 0 0 1 --dtype bfloat16 --shard 192 --batch 96 --output "$texts" || ended=$?
  [[ $ended == 0 || $ended == 124 ]]  # 124: the time was over
}

feature() {
  accelerate launch --num_processes 1 -m pearl train --config configs/feature/smollm2-135m.yaml --markov-rank 32 --borrow
}
draft() { accelerate launch --num_processes 1 -m pearl distill --config configs/distill/smollm2-135m.yaml; }
more() {
  accelerate launch --num_processes 1 -m pearl distill --config configs/distill/smollm2-135m-more.yaml \
    --start results/distill-smollm2-135m
  python scripts/mix_weights.py results/distill-smollm2-135m results/distill-smollm2-135m-more --share 0.75 \
    --output results/distill-smollm2-135m-mixed
}
pard() {
  accelerate launch --num_processes 1 -m pearl distill --config configs/distill/smollm2-135m-pard.yaml \
    --start results/distill-smollm2-135m-mixed
}
diagnose() {
  pearl diagnose --drafter results/feature-smollm2-135m --data "$texts"
  pearl diagnose --drafter results/distill-smollm2-135m-mixed --data "$texts"
}

for stage in "${@:-questions answers feature draft more pard diagnose}"; do
  for one in $stage; do "$one"; done
done
